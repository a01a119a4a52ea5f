//! Containers on a node: bundle, network namespace, runc.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use crate::command::{self, Output};
use crate::error::{Error, FileContext, Result};
use crate::network::{GATEWAY, NETNS_FOLDER, NODE_BRIDGE, PREFIX_LENGTH};
use crate::node::Node;
use crate::process::{self, ProcessId};
use crate::workload::{BindMount, Network, Workload, check_label};

/// Where runc keeps its state on a node; a tmpfs of the node's own.
pub const RUNC_ROOT: &str = "/run/runc";
/// The longest name of a link, IFNAMSIZ less the final zero.
const LONGEST_LINK: usize = 15;

/// A container that was started on a node.
#[derive(Debug, Clone)]
pub struct Container {
    /// Its name, which is its runc id.
    pub name: String,
    /// Its first process, in the machine's pid namespace.
    pub process: ProcessId,
    /// Its bundle, as the node sees it.
    pub bundle: PathBuf,
    /// Where its output is written, the same path on the machine and on the node.
    pub log: PathBuf,
}

impl Node {
    /// The bundle of the container with this name, as the node sees it.
    pub fn bundle(&self, name: &str) -> PathBuf {
        self.bundles().join(name)
    }

    /// The directory of this node that the container with this name has mounted at `destination`, when that is one of its volumes.
    pub fn volume(&self, name: &str, destination: &Path) -> PathBuf {
        self.volumes().join(name).join(destination.strip_prefix("/").unwrap_or(destination))
    }

    /// The cgroup path of the container with this name, absolute from the root of every hierarchy.
    pub fn cgroups_path(&self, name: &str) -> PathBuf {
        Path::new("/").join(&self.cgroup).join(name)
    }

    /// Runs runc with the root that the node's containers are in.
    pub fn runc(&self, arguments: &[&str]) -> Result<Output> {
        let mut command = self.command(self.tools.join("runc"));
        command::run(command.args(["--root", RUNC_ROOT]).args(arguments))
    }

    /// Makes only what a node must have before a workload can arrive: the bundle with `config.json`, `lower` (a link to
    /// the root filesystem) and empty `upper`, `work` and `rootfs`. Nothing is mounted, no namespace is made.
    pub fn prepare_workload(&self, workload: &Workload) -> Result<PathBuf> {
        check_label("the workload's name", &workload.name, 63)?;
        let lower = workload.rootfs.canonicalize().at("find the root filesystem", &workload.rootfs)?;
        if !self.on_machine(&lower).is_dir() {
            let words = format!("{} is no folder that {} can see", lower.display(), self.name());
            return Err(Error::Invalid(words));
        }
        let bundle = self.bundle(&workload.name);
        let on_machine = self.on_machine(&bundle);
        fs::create_dir(&on_machine).at("create the bundle", &on_machine)?;
        for part in ["upper", "work", "rootfs"] {
            let folder = on_machine.join(part);
            fs::create_dir(&folder).at("create the folder", &folder)?;
        }
        let link = on_machine.join("lower");
        symlink(&lower, &link).at("link the root filesystem as", &link)?;
        let config = on_machine.join("config.json");
        self.with_volumes(workload)
            .spec(&self.cgroups_path(&workload.name))?
            .save(&config)
            .map_err(|error| Error::Document { what: config.display().to_string(), reason: error.to_string() })?;
        Ok(bundle)
    }

    /// The same workload with its volumes as mounts of this node's directories.
    fn with_volumes(&self, workload: &Workload) -> Workload {
        let mut here = workload.clone();
        here.mounts.extend(workload.volumes.iter().map(|destination| BindMount {
            source: self.volume(&workload.name, destination),
            destination: destination.clone(),
            read_only: false,
        }));
        here
    }

    /// Makes the bundle and the volumes, mounts its root filesystem, makes the network namespace of a linked one and runs the container.
    pub fn start_workload(&self, workload: &Workload) -> Result<Container> {
        let bundle = self.prepare_workload(workload)?;
        for destination in &workload.volumes {
            let folder = self.volume(&workload.name, destination);
            fs::create_dir_all(&folder).at("create the volume", &folder)?;
        }
        self.run_prepared(workload, &bundle).inspect_err(|_| {
            // The failure is what counts; what is left goes with the cluster at the latest.
            let _ = self.remove_workload(&workload.name);
        })
    }

    fn run_prepared(&self, workload: &Workload, bundle: &Path) -> Result<Container> {
        let name = &workload.name;
        self.mount_rootfs(bundle)?;
        if workload.network == Network::Linked {
            self.make_container_network(workload)?;
        }
        let log = self.container_logs().join(format!("{name}.log"));
        self.create(workload, bundle, &log)?;
        self.runc(&["start", name])?.success()?;
        let process = self.container_process(name)?;
        Ok(Container { name: name.clone(), process, bundle: bundle.to_owned(), log })
    }

    /// Mounts the root filesystem of a bundle that [`Node::prepare_workload`] made.
    pub fn mount_rootfs(&self, bundle: &Path) -> Result<()> {
        let part = |name: &str| bundle.join(name).display().to_string();
        let options = format!("lowerdir={},upperdir={},workdir={}", part("lower"), part("upper"), part("work"));
        self.check(["mount", "-t", "overlay", "overlay", "-o", &options, &part("rootfs")]).map(drop)
    }

    fn make_container_network(&self, workload: &Workload) -> Result<()> {
        let (name, ip) = (&workload.name, workload.ip);
        let link = link_name(name);
        self.shell(&format!(
            "ip netns add {name}
             ip link add {link} type veth peer name eth0 netns {name}
             ip link set {link} master {NODE_BRIDGE} up
             ip -n {name} link set lo up
             ip -n {name} address add {ip}/{PREFIX_LENGTH} dev eth0
             ip -n {name} link set eth0 up
             ip -n {name} route add default via {GATEWAY}"
        ))
        .map(drop)
    }

    /// `runc create`, with the container's streams on a pipe (or a terminal) that a keeper of this node holds: CRIU
    /// cannot dump a container whose standard output is a file of the machine.
    fn create(&self, workload: &Workload, bundle: &Path, log: &Path) -> Result<()> {
        let runc_log = log.with_extension("runc.log");
        let mut command = self.command(self.binaries.join("podferry-node-init"));
        command.args(["create", "--log"]).arg(log);
        if workload.terminal {
            command.arg("--console-socket").arg(Path::new("/run").join(format!("{}.console", workload.name)));
        } else {
            command.arg("--keeper").arg(self.binaries.join("podferry-stdio-keeper"));
        }
        command.arg("--").arg(self.tools.join("runc")).args(["--root", RUNC_ROOT, "--log"]).arg(&runc_log);
        command.args(["create", "--bundle"]).arg(bundle).arg(&workload.name);
        let output = command::run(&mut command)?;
        let said = fs::read_to_string(&runc_log).unwrap_or_default();
        Output { stderr: format!("{}{said}", output.stderr), ..output }.success().map(drop)
    }

    /// The container's first process, found by its cgroup: its number in the machine's pid namespace.
    pub fn container_process(&self, name: &str) -> Result<ProcessId> {
        let state = self.runc(&["state", name])?.success()?;
        let parsed: serde_json::Value = serde_json::from_str(&state)
            .map_err(|error| Error::Document { what: format!("runc's state of {name}"), reason: error.to_string() })?;
        let inner = parsed["pid"].as_u64().filter(|pid| *pid != 0);
        let not_running = || Error::NotRunning { what: format!("the container {name} on {}", self.name()) };
        let inner = inner.ok_or_else(not_running)?.to_string();
        let cgroup = self.cgroups_path(name);
        process::pids(Path::new("/proc"))
            .into_iter()
            .find(|pid| has_number(*pid, &inner) && is_in_cgroup(*pid, &cgroup))
            .and_then(ProcessId::of)
            .ok_or_else(not_running)
    }

    /// Kills and deletes a container, its network namespace and its bundle; whatever of it is there.
    pub fn remove_workload(&self, name: &str) -> Result<()> {
        check_label("the workload's name", name, 63)?;
        // A restore that was killed leaves a bind mount of the container's root filesystem there, which `runc delete`
        // would empty.
        let stray = format!("{RUNC_ROOT}/{name}/criu-root");
        let rootfs = self.bundle(name).join("rootfs");
        self.unmount_all(Path::new(&stray))?;
        if self.on_machine(Path::new(RUNC_ROOT)).join(name).exists() {
            self.runc(&["delete", "--force", name])?.success()?;
        }
        self.unmount_all(&rootfs)?;
        if self.on_machine(Path::new(NETNS_FOLDER)).join(name).exists() {
            // The kernel dismantles a namespace some time after its deletion. Until then its link would answer for an
            // address that somebody else may have been given.
            self.exec(["ip", "-netns", name, "link", "delete", "eth0"])?;
            self.check(["ip", "netns", "delete", name])?;
        }
        let bundle = self.on_machine(&self.bundle(name));
        match fs::remove_dir_all(&bundle) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error).at("remove the bundle", &bundle),
            _ => Ok(()),
        }
    }

    fn unmount_all(&self, point: &Path) -> Result<()> {
        let point = point.display().to_string();
        while self.mount_points().contains(&point) {
            self.check(["umount", &point])?;
        }
        Ok(())
    }

    /// All mount points that the node's processes see, one for every mount.
    pub(crate) fn mount_points(&self) -> Vec<String> {
        let Some(init) = self.init() else { return Vec::new() };
        let table = fs::read_to_string(format!("/proc/{}/mountinfo", init.pid)).unwrap_or_default();
        table.lines().filter_map(|line| line.split_whitespace().nth(4)).map(str::to_owned).collect()
    }
}

/// A process has one number in every pid namespace it is seen from; the second is the one on its node.
fn has_number(pid: u32, inner: &str) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
    numbers.is_some_and(|numbers| numbers.split_whitespace().nth(1) == Some(inner))
}

fn is_in_cgroup(pid: u32, cgroup: &Path) -> bool {
    let table = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    table.lines().filter_map(|line| line.splitn(3, ':').nth(2)).any(|path| Path::new(path).starts_with(cgroup))
}

/// The name of the node's end of a container's link: telling for short names, else a hash (FNV-1a) of the name.
fn link_name(name: &str) -> String {
    let telling = format!("v-{name}");
    if telling.len() <= LONGEST_LINK {
        return telling;
    }
    let hash = name
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    format!("v-{:013x}", hash >> 12)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn link_names_fit_and_differ() {
        assert_eq!(link_name("redis"), "v-redis");
        let (one, two) = (link_name("a-rather-long-name-1"), link_name("a-rather-long-name-2"));
        assert!(one.len() <= LONGEST_LINK && two.len() <= LONGEST_LINK);
        assert_ne!(one, two);
    }
}
