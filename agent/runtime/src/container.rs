//! runc's containers: found by the state that runc keeps, described by their OCI configuration.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use oci_spec::runtime::Spec;
use procfs::process::Process;
use serde::{Deserialize, Deserializer};

use crate::cgroup::CgroupPaths;
use crate::error::Error;
use crate::freezer::{Freezer, FreezerState};

/// A kind of Linux namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub enum NamespaceKind {
    /// Network.
    #[serde(rename = "NEWNET")]
    Network,
    /// Process ids.
    #[serde(rename = "NEWPID")]
    Pid,
    /// Mounts.
    #[serde(rename = "NEWNS")]
    Mount,
    /// Host name.
    #[serde(rename = "NEWUTS")]
    Uts,
    /// System V IPC and POSIX message queues.
    #[serde(rename = "NEWIPC")]
    Ipc,
    /// User and group ids, capabilities.
    #[serde(rename = "NEWUSER")]
    User,
    /// The view of the cgroup hierarchy.
    #[serde(rename = "NEWCGROUP")]
    Cgroup,
    /// Monotonic and boot clocks.
    #[serde(rename = "NEWTIME")]
    Time,
}

impl NamespaceKind {
    /// Its file in `/proc/PID/ns`.
    pub fn proc_name(self) -> &'static str {
        match self {
            Self::Network => "net",
            Self::Pid => "pid",
            Self::Mount => "mnt",
            Self::Uts => "uts",
            Self::Ipc => "ipc",
            Self::User => "user",
            Self::Cgroup => "cgroup",
            Self::Time => "time",
        }
    }
}

/// What a container is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Made, and its program not yet started.
    Created,
    /// Running.
    Running,
    /// Frozen.
    Paused,
    /// Its init process is gone.
    Stopped,
}

/// A container's first process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Init {
    /// In the host's pid namespace.
    pub pid: i32,
    /// Clock ticks since boot (field 22 of `/proc/PID/stat`): tells it from a later process with the same pid.
    pub start_time: u64,
}

impl Init {
    /// Whether exactly this process still runs: same start time, and no zombie.
    pub fn is_alive(self) -> bool {
        Process::new(self.pid)
            .and_then(|process| process.stat())
            .is_ok_and(|stat| stat.starttime == self.start_time && !matches!(stat.state, 'Z' | 'X' | 'x'))
    }
}

/// A mount of the container, as runc keeps it in its state.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct ContainerMount {
    /// Where, in the container.
    pub destination: PathBuf,
    /// What, on the host.
    #[serde(default)]
    pub source: PathBuf,
    /// runc's kind: `bind`, or the filesystem's type.
    #[serde(default)]
    pub device: String,
}

/// A container of runc.
#[derive(Debug, Clone)]
pub struct Container {
    /// Its name.
    pub id: String,
    /// The root directory of the runc that it belongs to (`runc --root`).
    pub root: PathBuf,
    /// Its OCI bundle.
    pub bundle: PathBuf,
    /// Its root filesystem on the host.
    pub rootfs: PathBuf,
    /// What it was doing when it was looked at.
    pub status: Status,
    /// Its first process; none when it was stopped.
    pub init: Option<Init>,
    /// Its cgroup.
    pub cgroups: CgroupPaths,
    /// The kinds of namespaces that it has apart from the host, new or joined.
    pub namespaces: BTreeSet<NamespaceKind>,
    /// Those of them that its configuration gives by path: they belong to somebody else and are not dumped.
    pub namespace_paths: BTreeMap<NamespaceKind, PathBuf>,
    /// The configuration's annotations.
    pub annotations: BTreeMap<String, String>,
    /// The bundle's OCI configuration.
    pub config: Spec,
    /// What stdin, stdout and stderr were when it started: `/dev/null`, `pipe:[4711]`.
    pub external_descriptors: Vec<String>,
    /// Mounts as runc made them.
    pub mounts: Vec<ContainerMount>,
    /// Paths hidden from the container.
    pub masked_paths: Vec<PathBuf>,
    /// Device nodes that runc made, in the container.
    pub devices: Vec<PathBuf>,
}

impl Container {
    /// Reads the container `id` below runc's root directory.
    pub fn read(root: &Path, id: &str) -> Result<Self, Error> {
        check_id(id)?;
        let path = root.join(id).join("state.json");
        let text = fs::read(&path).map_err(Error::io("read", &path))?;
        let state: StateFile =
            serde_json::from_slice(&text).map_err(|source| Error::State { path: path.clone(), source })?;
        let bundle = state
            .config
            .labels
            .iter()
            .find_map(|label| label.strip_prefix("bundle="))
            .map(PathBuf::from)
            .ok_or(Error::NoBundle { path })?;
        let config_path = bundle.join("config.json");
        let config = Spec::load(&config_path).map_err(|source| Error::Spec { path: config_path, source })?;
        let init = (state.init_process_pid > 0)
            .then_some(Init { pid: state.init_process_pid, start_time: state.init_process_start });
        let mut container = Self {
            id: state.id,
            root: root.to_owned(),
            bundle,
            rootfs: state.config.rootfs,
            status: Status::Stopped,
            init,
            cgroups: CgroupPaths::from_state(state.cgroup_paths),
            namespaces: state.config.namespaces.iter().map(|namespace| namespace.kind).collect(),
            namespace_paths: state
                .config
                .namespaces
                .into_iter()
                .filter(|namespace| !namespace.path.as_os_str().is_empty())
                .map(|namespace| (namespace.kind, namespace.path))
                .collect(),
            annotations: config
                .annotations()
                .iter()
                .flatten()
                .map(|(key, value)| (key.clone(), value.clone()))
                .collect(),
            config,
            external_descriptors: state.external_descriptors,
            mounts: state.config.mounts,
            masked_paths: state.config.mask_paths,
            devices: state.config.devices.into_iter().map(|device| device.path).collect(),
        };
        container.status = container.current_status();
        Ok(container)
    }

    /// The directory in which runc keeps this container's state.
    pub fn state_dir(&self) -> PathBuf {
        self.root.join(&self.id)
    }

    /// Whether its init process is still the one that its state names, and no zombie.
    pub fn is_alive(&self) -> bool {
        self.init.is_some_and(Init::is_alive)
    }

    /// The host's pids of all its processes: those in its cgroup, and the descendants of its init.
    pub fn processes(&self) -> Result<Vec<i32>, Error> {
        let mut pids = self.cgroups.processes()?;
        if let Some(init) = self.init.filter(|init| init.is_alive()) {
            collect_descendants(init.pid, &mut pids);
        }
        Ok(pids.into_iter().collect())
    }

    /// Bytes that a migration has to move: private anonymous memory, what of it is swapped, and shared memory (which
    /// is counted once, however many processes map it; tmpfs files count as well, since CRIU dumps them).
    pub fn memory_to_move(&self) -> Result<u64, Error> {
        let (mut private_kib, mut shared_kib) = (0, 0);
        for pid in self.processes()? {
            // A process that ended meanwhile has nothing to move.
            let Ok(status) = Process::new(pid).and_then(|process| process.status()) else { continue };
            private_kib += status.rssanon.unwrap_or(0) + status.vmswap.unwrap_or(0);
            shared_kib = shared_kib.max(status.rssshmem.unwrap_or(0));
        }
        let charged = self.cgroups.controller("memory").and_then(|dir| charged(dir, "shmem")).unwrap_or(0);
        Ok(private_kib * 1024 + charged.max(shared_kib * 1024))
    }

    /// Bytes of memory that are charged to its cgroup and that the kernel cannot drop: anonymous, shared, tmpfs. Pages that processes share since
    /// a fork count once. None where its cgroup has no memory controller.
    pub fn charged_memory(&self) -> Option<u64> {
        let dir = self.cgroups.controller("memory")?;
        // `anon` in version 2 of cgroups, `rss` in version 1, which counts the same.
        let anonymous = charged(dir, "anon").or_else(|| charged(dir, "rss"))?;
        Some(anonymous + charged(dir, "shmem").unwrap_or(0))
    }

    fn current_status(&self) -> Status {
        if !self.is_alive() {
            return Status::Stopped;
        }
        if self.state_dir().join("exec.fifo").exists() {
            return Status::Created;
        }
        match Freezer::of(self).and_then(|freezer| freezer.state()) {
            Ok(FreezerState::Frozen) => Status::Paused,
            _ => Status::Running,
        }
    }
}

/// All containers below the given runc root directories, by root and name. A root that does not exist has none; a
/// container that cannot be understood is logged and left out, for it must not hide the others.
pub fn discover(roots: &[PathBuf]) -> Result<Vec<Container>, Error> {
    let mut containers = Vec::new();
    for root in roots {
        for id in ids(root)? {
            match Container::read(root, &id) {
                Ok(container) => containers.push(container),
                // Half-made, or just deleted.
                Err(error) if error.is_gone() => {}
                Err(error) => tracing::warn!(container = %id, root = %root.display(), %error, "container left out"),
            }
        }
    }
    Ok(containers)
}

/// The container with this name, in the first root that has it.
pub fn find(roots: &[PathBuf], id: &str) -> Result<Container, Error> {
    check_id(id)?;
    let root = roots.iter().find(|root| root.join(id).join("state.json").exists());
    let root = root.ok_or_else(|| Error::NotFound { id: id.to_owned(), roots: roots.to_vec() })?;
    Container::read(root, id)
}

/// Refuses names that are no single path component, by runc's own rule.
pub(crate) fn check_id(id: &str) -> Result<(), Error> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_+-.".contains(&byte);
    if id.is_empty() || id == "." || id == ".." || !id.bytes().all(allowed) {
        return Err(Error::BadId { id: id.to_owned() });
    }
    Ok(())
}

fn ids(root: &Path) -> Result<Vec<String>, Error> {
    let entries = match fs::read_dir(root) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io("list", root)(error)),
    };
    let mut ids: Vec<String> = entries
        .flatten()
        .filter(|entry| entry.path().join("state.json").exists())
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    ids.sort();
    Ok(ids)
}

/// The children of every thread, recursively. Processes that end meanwhile have none.
pub(crate) fn collect_descendants(pid: i32, pids: &mut BTreeSet<i32>) {
    pids.insert(pid);
    let Ok(tasks) = Process::new(pid).and_then(|process| process.tasks()) else { return };
    let children = tasks.flatten().filter_map(|task| task.children().ok()).flatten();
    for child in children.filter_map(|child| i32::try_from(child).ok()) {
        if !pids.contains(&child) {
            collect_descendants(child, pids);
        }
    }
}

/// Bytes of one kind that are charged to a memory cgroup (`memory.stat`; `shmem`, which both versions have, is shared memory and tmpfs).
fn charged(dir: &Path, kind: &str) -> Option<u64> {
    let text = fs::read_to_string(dir.join("memory.stat")).ok()?;
    text.lines().find_map(|line| line.strip_prefix(kind)?.strip_prefix(' '))?.trim().parse().ok()
}

/// What this crate reads of runc's `state.json` (libcontainer's `State`).
#[derive(Deserialize)]
struct StateFile {
    id: String,
    #[serde(default)]
    init_process_pid: i32,
    #[serde(default)]
    init_process_start: u64,
    #[serde(default, deserialize_with = "null_is_default")]
    cgroup_paths: BTreeMap<String, PathBuf>,
    #[serde(default, deserialize_with = "null_is_default")]
    external_descriptors: Vec<String>,
    config: StateConfig,
}

#[derive(Deserialize)]
struct StateConfig {
    rootfs: PathBuf,
    #[serde(default, deserialize_with = "null_is_default")]
    labels: Vec<String>,
    #[serde(default, deserialize_with = "null_is_default")]
    namespaces: Vec<StateNamespace>,
    #[serde(default, deserialize_with = "null_is_default")]
    mounts: Vec<ContainerMount>,
    #[serde(default, deserialize_with = "null_is_default")]
    mask_paths: Vec<PathBuf>,
    #[serde(default, deserialize_with = "null_is_default")]
    devices: Vec<StateDevice>,
}

#[derive(Deserialize)]
struct StateNamespace {
    #[serde(rename = "type")]
    kind: NamespaceKind,
    #[serde(default)]
    path: PathBuf,
}

#[derive(Deserialize)]
struct StateDevice {
    path: PathBuf,
}

/// Go writes an empty slice or map as `null`.
fn null_is_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(deserializer: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A root with one container whose state is this, and its bundle.
    fn root_with(id: &str, state: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let bundle = dir.path().join("bundle");
        fs::create_dir_all(dir.path().join("root").join(id)).unwrap();
        fs::create_dir_all(&bundle).unwrap();
        let config = r#"{"ociVersion":"1.2.1","root":{"path":"rootfs"},"annotations":{"a":"b"}}"#;
        fs::write(bundle.join("config.json"), config).unwrap();
        let state = state.replace("@BUNDLE@", bundle.to_str().unwrap());
        fs::write(dir.path().join("root").join(id).join("state.json"), state).unwrap();
        dir
    }

    #[test]
    fn state_of_runc_on_cgroup_v1_is_understood() {
        let dir = root_with("redis", include_str!("../tests/fixtures/state-v1.json"));
        let container = find(&[dir.path().join("none"), dir.path().join("root")], "redis").unwrap();
        assert_eq!(container.bundle, dir.path().join("bundle"));
        assert_eq!(container.init, Some(Init { pid: 4204, start_time: 401_005 }));
        assert!(!container.is_alive(), "no process of this machine has that pid and start time");
        assert_eq!(container.status, Status::Stopped);
        assert_eq!(container.cgroups.dirs().len(), 4);
        let freezer = Freezer::of(&container).unwrap();
        assert_eq!(freezer.dir(), Path::new("/sys/fs/cgroup/freezer/podferry/redis"));
        assert!(container.namespace_paths.is_empty() && container.namespaces.contains(&NamespaceKind::Network));
        assert_eq!(container.external_descriptors, ["/dev/null", "pipe:[1234]", "pipe:[1234]"]);
        assert_eq!(container.mounts[1].destination, Path::new("/data"));
        assert_eq!(container.annotations["a"], "b");
    }

    #[test]
    fn state_of_containerd_on_cgroup_v2_is_understood() {
        let dir = root_with("c0ffee", include_str!("../tests/fixtures/state-v2.json"));
        let container = discover(&[dir.path().join("root")]).unwrap().remove(0);
        assert_eq!(container.init, None);
        assert_eq!(container.cgroups, CgroupPaths::V2("/sys/fs/cgroup/kubepods.slice/pod1/c0ffee".into()));
        assert_eq!(container.namespace_paths[&NamespaceKind::Network], Path::new("/var/run/netns/cni-1"));
        assert_eq!(container.namespace_paths.len(), 3);
        assert!(container.mounts.is_empty() && container.external_descriptors.is_empty());
    }

    #[test]
    fn a_container_without_freezer_says_which_controllers_it_has() {
        let cgroups = CgroupPaths::V1(BTreeMap::from([("memory".to_owned(), PathBuf::from("/x"))]));
        let error = Freezer::at(cgroups).unwrap_err().to_string();
        assert!(error.contains("no freezer cgroup (only: memory)"), "{error}");
    }

    #[test]
    fn broken_state_is_an_error_with_its_path_and_hides_no_other() {
        let dir = root_with("bad", "{\"id\":");
        let root = dir.path().join("root");
        assert!(Container::read(&root, "bad").unwrap_err().to_string().contains("bad/state.json"));
        assert!(discover(&[root]).unwrap().is_empty());
    }
}
