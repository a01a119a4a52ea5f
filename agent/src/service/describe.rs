//! What this node is and can do, and what runs on it.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use podferry_common::failure::{Failure, FailureCode, chain};
use podferry_criu::{Criu, CriuCapabilities};
use podferry_memory::tracker::{SoftDirtyTracker, UserfaultfdTracker};
use podferry_proto::Version;
use podferry_proto::v1::{self, Finding};
use podferry_runtime::{CgroupVersion, Container, HostFacts, NamespaceKind, Status};

use super::network;
use crate::context::{Context, blocking};

/// What this agent knows that others of its version may not.
const AGENT_FEATURES: [&str; 2] = ["post_copy", "volumes"];
/// And that this node lacks nothing for.
const STARTED_ANEW: [&str; 2] = ["agent:application", "agent:cold"];
/// What the agent of a node of Kubernetes says.
const PODS: [&str; 2] = ["agent:names", "agent:pods"];
/// What of the kernel is needed for a restore alone.
const OF_RESTORES: &str = "tcp_repair";

/// The oldest runc that podferry works with: the first whose `restore` can leave cgroups alone.
const OLDEST_RUNC: (u32, u32) = (1, 3);

/// What was found out when the agent started.
#[derive(Debug)]
pub(crate) struct Capabilities {
    criu_version: String,
    runc_version: String,
    complaints: Vec<String>,
    /// Those that do not matter where nothing is dumped and restored.
    criu_complaints: Vec<String>,
    kernel_features: Vec<&'static str>,
    /// Asked for behind the start, because it takes CRIU half a second; none until then.
    criu_features: Arc<OnceLock<Vec<&'static str>>>,
}

impl Capabilities {
    /// Asks CRIU and runc.
    pub(crate) async fn probe(context: &Context) -> Self {
        let criu = Criu::at(&context.config.tools.criu);
        let probed = blocking(move || Ok(criu.probe())).await;
        let mut complaints = Vec::new();
        let (criu_version, mut criu_complaints) = match probed {
            Ok(Ok(CriuCapabilities { version, complaints })) => (version.to_string(), complaints),
            Ok(Err(error)) => (String::new(), vec![chain(&error)]),
            Err(failure) => (String::new(), vec![failure.message]),
        };
        let runc_version = runc_version(&context.config.tools.runc).await.unwrap_or_else(|complaint| {
            complaints.push(complaint);
            String::new()
        });
        complaints.extend(too_old(&runc_version));
        let Kernel { features: kernel_features, missing, missing_for_restores } = Kernel::try_out().await;
        complaints.extend(missing);
        criu_complaints.extend(missing_for_restores);
        let keeper = &context.config.tools.stdio_keeper;
        complaints.extend(absent("podferry-stdio-keeper", keeper));
        criu_complaints.extend(programs(context).into_iter().filter_map(|(what, path)| absent(what, path)));
        for complaint in criu_complaints.iter().filter(|_| complaints.is_empty()) {
            tracing::error!(complaint, "this node can take part in cold migrations alone");
        }
        for complaint in &complaints {
            tracing::error!(complaint, "this node cannot take part in migrations");
        }
        let criu_features = ask_for_features(Criu::at(&context.config.tools.criu));
        Self { criu_version, runc_version, complaints, criu_complaints, kernel_features, criu_features }
    }

    /// What CRIU and the kernel can do, as `DescribeResponse` has it; `cold`: whether nothing is missing for that.
    fn features(&self, cold: bool) -> Vec<String> {
        let criu = self.criu_features.get().into_iter().flatten().map(|name| format!("criu:{name}"));
        let kernel = self.kernel_features.iter().map(|name| format!("kernel:{name}"));
        let agent = AGENT_FEATURES.iter().map(|name| format!("agent:{name}"));
        let started_anew = STARTED_ANEW.iter().filter(|_| cold).map(ToString::to_string);
        started_anew.chain(agent).chain(criu).chain(kernel).collect()
    }

    /// The complaints as preflight's findings; with `cold` without those of CRIU.
    pub(crate) fn findings(&self, cold: bool) -> impl Iterator<Item = Finding> {
        let of_criu = self.criu_complaints.iter().filter(move |_| !cold);
        self.complaints.iter().chain(of_criu).map(|complaint| Finding {
            refuses: true,
            kind: "node-unfit".to_owned(),
            pid: 0,
            fd: -1,
            message: complaint.clone(),
            remedy: "run deploy/setup/setup.sh on the node, or see docs/operations.md, \"Requirements\"".to_owned(),
        })
    }

    /// Why a container cannot be restored here with pages that come later; nothing while CRIU has not answered yet.
    pub(crate) fn lazy_findings(&self) -> Option<Finding> {
        let features = self.criu_features.get()?;
        let lacks = |name: &&str| !features.contains(name);
        let missing: Vec<&str> = ["uffd", "uffd-noncoop"].into_iter().filter(lacks).collect();
        (!missing.is_empty()).then(|| Finding {
            refuses: true,
            kind: "lazy-pages".to_owned(),
            pid: 0,
            fd: -1,
            message: format!("CRIU cannot lay in pages behind a running process here: it lacks {}", missing.join(", ")),
            remedy: "migrate warm, or choose a target whose kernel has CONFIG_USERFAULTFD".to_owned(),
        })
    }

    /// Those of the start that matter to all migrations, and what may have changed since.
    fn complaints_now(&self, context: &Context) -> Vec<String> {
        let own_links = context.config.kubernetes.is_none();
        let bridge = own_links.then(|| network::bridge_complaint(&context.config.network.bridge)).flatten();
        let bridge = bridge.map(|(complaint, remedy)| format!("{complaint}; {remedy}"));
        self.complaints.iter().cloned().chain(bridge).collect()
    }

    /// The answer to `Describe`.
    pub(crate) async fn describe(&self, context: &Context) -> Result<v1::DescribeResponse, Failure> {
        let facts = host_facts(context).await?;
        let mut complaints = self.complaints_now(context);
        let mut features = self.features(complaints.is_empty());
        features.extend(context.config.kubernetes.iter().flat_map(|_| PODS.map(ToOwned::to_owned)));
        complaints.extend(self.criu_complaints.iter().cloned());
        let free = |dir: &Path| podferry_filesystem::free_bytes(dir).unwrap_or(0);
        Ok(v1::DescribeResponse {
            version: Some(Version::OURS.into()),
            node: context.config.node.to_string(),
            architecture: facts.architecture,
            kernel: facts.kernel_release,
            cpu_model: cpu_model(),
            cpu_features: facts.cpu.flags.into_iter().collect(),
            memory_total: facts.memory_total,
            memory_available: facts.memory_available,
            images_free: free(&context.config.images_dir),
            layers_free: free(context.config.layers_dir()),
            criu_version: self.criu_version.clone(),
            features,
            fit: complaints.is_empty(),
            complaints,
            runc_version: self.runc_version.clone(),
            cgroup_version: match facts.cgroup_version {
                CgroupVersion::V1 | CgroupVersion::Hybrid => 1,
                CgroupVersion::V2 => 2,
            },
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        })
    }
}

/// Facts about this machine, fresh.
pub(crate) async fn host_facts(context: &Context) -> Result<HostFacts, Failure> {
    let context = context.clone();
    blocking(move || {
        let facts = HostFacts::collect();
        facts.map_err(|error| context.failure(FailureCode::Internal, "this machine cannot be looked at", &error))
    })
    .await
}

/// The containers of all roots.
pub(crate) async fn containers(context: &Context) -> Result<Vec<v1::Container>, Failure> {
    let found = {
        let context = context.clone();
        blocking(move || {
            let found = podferry_runtime::discover(&context.config.runtime.roots);
            found.map_err(|error| context.failure(FailureCode::Internal, "the containers cannot be listed", &error))
        })
        .await?
    };
    let mut messages = Vec::with_capacity(found.len());
    for container in found {
        messages.push(message_of(&container).await);
    }
    Ok(messages)
}

async fn message_of(container: &Container) -> v1::Container {
    v1::Container {
        id: container.id.clone(),
        root: container.root.display().to_string(),
        status: status_word(container.status).to_owned(),
        pid: container.init.map(|init| init.pid.unsigned_abs()).unwrap_or_default(),
        memory_bytes: container.memory_to_move().unwrap_or_default(),
        processes: container.processes().map(|pids| u32::try_from(pids.len()).unwrap_or(u32::MAX)).unwrap_or_default(),
        addresses: addresses(container).await,
    }
}

fn status_word(status: Status) -> &'static str {
    match status {
        Status::Created => "created",
        Status::Running => "running",
        Status::Paused => "paused",
        Status::Stopped => "stopped",
    }
}

async fn addresses(container: &Container) -> Vec<String> {
    let Some(path) = container.namespace_paths.get(&NamespaceKind::Network) else { return Vec::new() };
    let Ok(netns) = podferry_network::Netns::open(path) else { return Vec::new() };
    match podferry_network::discover(&netns, crate::target::INTERFACE).await {
        Ok(link) => link.addresses.iter().map(|address| address.addr().to_string()).collect(),
        Err(_) => Vec::new(),
    }
}

async fn runc_version(runc: &Path) -> Result<String, String> {
    let ran = tokio::process::Command::new(runc).arg("--version").output().await;
    let output = ran.map_err(|error| format!("runc cannot be started at {}: {error}", runc.display()))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let version = text.lines().find_map(|line| line.strip_prefix("runc version "));
    version
        .map(|version| version.trim().to_owned())
        .ok_or_else(|| format!("{} does not say its version", runc.display()))
}

/// The complaint about a runc that cannot do what is needed. One that does not say its version has one already.
fn too_old(version: &str) -> Option<String> {
    let (oldest_major, oldest_minor) = OLDEST_RUNC;
    let mut numbers = version.split(['.', '-', '+']).map(|part| part.parse::<u32>().unwrap_or(0));
    let found = (numbers.next()?, numbers.next().unwrap_or(0));
    let is_old = !version.is_empty() && found < OLDEST_RUNC;
    is_old.then(|| format!("runc {version} is too old: {oldest_major}.{oldest_minor} or newer is needed"))
}

/// What the kernel has of what migrations need, and a complaint for each that it lacks.
#[derive(Debug, Default)]
struct Kernel {
    /// By name, in alphabetical order.
    features: Vec<&'static str>,
    /// What every migration needs.
    missing: Vec<String>,
    /// What every one but a cold one needs.
    missing_for_restores: Vec<String>,
}

impl Kernel {
    async fn try_out() -> Self {
        let tried = blocking(|| Ok((podferry_network::probe(), has_overlay()))).await;
        let unknown = |why: String| Self { missing: vec![why], ..Self::default() };
        let (network, overlay) = match tried {
            Ok((Ok(network), overlay)) => (network, overlay),
            Ok((Err(error), _)) => return unknown(format!("the kernel cannot be tried out: {}", chain(&error))),
            Err(failure) => return unknown(failure.message),
        };
        let network = network.into_iter().map(|one| (one.name, one.missing.map(|error| chain(&error))));
        let overlay = ("overlay", overlay.err().map(|error| format!("overlayfs cannot be mounted: {error}")));
        let mut kernel = Self::default();
        network.chain([overlay]).for_each(|(name, missing)| kernel.note(name, missing));
        kernel.try_write_tracking();
        kernel.features.sort_unstable();
        kernel
    }

    fn note(&mut self, name: &'static str, missing: Option<String>) {
        let Some(why) = missing else { return self.features.push(name) };
        let complaint = format!("the kernel lacks {name}: {why}");
        if name == OF_RESTORES { self.missing_for_restores.push(complaint) } else { self.missing.push(complaint) }
    }

    /// Without it live migrations are warm ones, and say so.
    fn try_write_tracking(&mut self) {
        match UserfaultfdTracker::try_kernel() {
            Ok(()) => self.features.push("write_tracking"),
            Err(_) if SoftDirtyTracker::try_kernel().unwrap_or(false) => self.features.push("write_tracking"),
            Err(error) => {
                tracing::info!(%error, "this kernel neither follows writes asynchronously nor makes soft-dirty marks");
            }
        }
    }
}

/// Opening a filesystem's context loads its module where there is one, and mounts nothing.
fn has_overlay() -> std::io::Result<()> {
    use rustix::mount::{FsOpenFlags, fsopen};
    Ok(fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).map(drop)?)
}

/// On a thread that an agent which is told to stop does not wait for.
fn ask_for_features(criu: Criu) -> Arc<OnceLock<Vec<&'static str>>> {
    let features = Arc::new(OnceLock::new());
    let answer = Arc::clone(&features);
    let asking = std::thread::Builder::new().name("criu-features".to_owned()).spawn(move || match criu.features() {
        Ok(found) => drop(answer.set(found)),
        Err(error) => tracing::warn!(error = chain(&error), "CRIU cannot be asked for its features"),
    });
    if let Err(error) = asking {
        tracing::warn!(%error, "there is no thread to ask CRIU for its features");
    }
    features
}

fn absent(what: &str, path: &Path) -> Option<String> {
    (!path.is_file()).then(|| format!("{what} is not at {}", path.display()))
}

/// Those that dump and restore.
fn programs(context: &Context) -> [(&'static str, &Path); 5] {
    let tools = &context.config.tools;
    [
        ("podferry-hook", tools.hook.as_path()),
        ("podferry-dump-worker", tools.dump_worker.as_path()),
        ("podferry-pager", tools.pager.as_path()),
        ("podferry-tar", tools.tar.as_path()),
        ("libpodferry_criu_shim.so", tools.criu_shim.as_path()),
    ]
}

fn cpu_model() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with("model name") || line.starts_with("Model"));
    line.and_then(|line| line.split_once(':')).map(|(_, model)| model.trim().to_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_runc_is_complained_of() {
        for old in ["1.2.6", "1.1.15+ds1", "0.9", "1"] {
            assert!(too_old(old).unwrap().contains(old), "{old}");
        }
        for good in ["1.3.0", "1.3.6", "1.3.0-rc.1+dev", "1.10.1", "2.0.0", ""] {
            assert_eq!(too_old(good), None, "{good}");
        }
    }

    #[test]
    fn criu_is_asked_behind_the_start() {
        let made = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.podferry/tools");
        let criu = std::env::var_os("PODFERRY_TOOLS").map_or(made, Into::into).join("bin/criu");
        assert!(criu.exists(), "there is no CRIU at {}: run deploy/setup/setup.sh", criu.display());
        let criu_features = ask_for_features(Criu::at(criu));
        assert!(criu_features.wait().contains(&"seccomp_filters"), "{criu_features:?}");
        let capabilities = Capabilities {
            criu_version: String::new(),
            runc_version: String::new(),
            complaints: Vec::new(),
            criu_complaints: vec!["CRIU is too old".to_owned()],
            kernel_features: vec!["veth"],
            criu_features,
        };
        assert_eq!((capabilities.findings(true).count(), capabilities.findings(false).count()), (0, 1));
        assert!(!capabilities.features(false).iter().any(|word| STARTED_ANEW.contains(&word.as_str())));
        let published = capabilities.features(true);
        assert_eq!(published[..2], STARTED_ANEW);
        assert!(published.is_sorted() && published.contains(&"criu:seccomp_filters".to_owned()), "{published:?}");
        assert_eq!(published.last().map(String::as_str), Some("kernel:veth"));
    }

    #[tokio::test]
    async fn this_kernel_has_what_migrations_need() {
        let kernel = Kernel::try_out().await;
        let all = ["bridge", "link_cut", "overlay", "tcp_repair", "veth", "write_tracking"];
        assert_eq!(kernel.features, all, "{kernel:?}");
        assert!(kernel.missing.is_empty() && kernel.missing_for_restores.is_empty(), "{kernel:?}");
    }
}
