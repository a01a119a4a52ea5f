//! `criu dump`, a copy, `criu restore`: the least that a checkpoint of the same processes takes, with nobody who manages containers.
//!
//! CRIU is told by hand what a container runtime would tell it: which mounts and which network namespace come from outside. The restored
//! processes are in the container's cgroups of the freezer, of memory and of CPU time, without limits; whoever removes them has to look there.

use std::{fs, path::Path, thread, time::Duration};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use podferry_local::Node;

use super::way::{Tool, Way, images, path};
use crate::error::{Error, Result};

/// The hierarchies of cgroup v1 that restored processes are put into.
const HIERARCHIES: [&str; 3] = ["freezer", "cpuacct", "memory"];
/// Why it does not work elsewhere.
const NEEDS_V1: &str = "the peer criu is driven on cgroup v1 only, and this machine has v2";
/// How often and at what distance is looked whether a cgroup is empty.
const TRIES: u32 = 200;
const PAUSE: Duration = Duration::from_millis(10);

/// What of the processes comes from outside of them.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Criu {
    /// `(mount point, where it is on any node)`.
    mounts: Vec<(String, String)>,
    /// The network namespace's number.
    network: String,
    /// The pipes that they write to: `(descriptor, number of the pipe)`.
    pipes: Vec<(u32, String)>,
}

impl Criu {
    fn look(&mut self, pid: u32) -> Result<()> {
        let root = Path::new("/proc").join(pid.to_string());
        let table = root.join("mountinfo");
        let read = fs::read_to_string(&table);
        self.mounts = outer_mounts(&read.map_err(|source| Error::File { action: "read", path: table, source })?);
        self.network = link(&root.join("ns/net"))?;
        for descriptor in [1, 2] {
            let pipe = link(&root.join("fd").join(descriptor.to_string()))?;
            if pipe.starts_with("pipe:") && !self.pipes.iter().any(|(_, known)| *known == pipe) {
                self.pipes.push((descriptor, pipe));
            }
        }
        Ok(())
    }
}

fn link(at: &Path) -> Result<String> {
    let target = fs::read_link(at).map_err(|source| Error::File { action: "read", path: at.to_owned(), source })?;
    Ok(target.to_string_lossy().into_owned())
}

/// Mounts that are not made of what CRIU dumps: what hides files (a device of the machine's), and the hierarchies of cgroups. Of
/// `proc_pid_mountinfo(5)`: field 4 is the root within the file system, field 5 the mount point, the type follows the lone hyphen.
fn outer_mounts(table: &str) -> Vec<(String, String)> {
    let mount = |line: &str| {
        let (before, after) = line.split_once(" - ")?;
        let mut fields = before.split_whitespace().skip(3);
        let (root, point) = (fields.next()?, fields.next()?.to_owned());
        match after.split_whitespace().next()? {
            "devtmpfs" => Some((point, format!("/dev{root}"))),
            "cgroup" => Some((point.clone(), point)),
            _ => None,
        }
    };
    table.lines().filter_map(mount).collect()
}

impl Tool for Criu {
    fn checkpoint(&mut self, way: &Way) -> Result<()> {
        if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
            return Err(Error::Misplaced(NEEDS_V1.to_owned()));
        }
        let process = way.source.container_process(way.name)?;
        self.look(process.pid)?;
        let group = way.source.cgroups_path(way.name);
        let mut command = way.source.command("criu");
        command.args(["dump", "--tree", &number_on_node(process.pid)?, "--images-dir", &path(&images(way.source))]);
        command.args(["--work-dir", "/tmp", "--log-file", "peer-dump.log", "--tcp-established", "--root"]);
        command.arg(way.source.bundle(way.name).join("rootfs")).arg("--manage-cgroups=ignore");
        command.arg("--freeze-cgroup").arg(format!("/sys/fs/cgroup/freezer{}", group.display()));
        command.args(["--external", &format!("{}:extRootNetNS", self.network.replace(":[", "["))]);
        for (point, at) in &self.mounts {
            command.args(["--external", &format!("mnt[{point}]:{at}")]);
        }
        podferry_local::command::run_within(&mut command, super::way::DEADLINE)?.success()?;
        Ok(())
    }

    fn restore(&mut self, way: &Way) -> Result<()> {
        let group = way.target.cgroups_path(way.name);
        let joins = HIERARCHIES.map(|hierarchy| {
            let folder = format!("/sys/fs/cgroup/{hierarchy}{}", group.display());
            format!("mkdir -p {folder}; echo $$ > {folder}/cgroup.procs")
        });
        let first = format!("{}; exec 9</run/netns/{}", joins.join("; "), way.name);
        let (images, root) = (path(&images(way.target)), path(&way.target.bundle(way.name).join("rootfs")));
        let words = ["restore", "--restore-detached", "--images-dir", &images, "--work-dir", "/tmp"];
        let more = ["--log-file", "peer-restore.log", "--tcp-established", "--manage-cgroups=ignore", "--root", &root];
        let network = ["--inherit-fd", "fd[9]:extRootNetNS"];
        let mut words: Vec<String> = words.into_iter().chain(more).chain(network).map(str::to_owned).collect();
        let mut outer = |what: &str, value: String| words.extend([what.to_owned(), value]);
        self.mounts.iter().for_each(|(_, at)| outer("--external", format!("mnt[{at}]:{at}")));
        self.pipes.iter().for_each(|(descriptor, pipe)| outer("--inherit-fd", format!("fd[{descriptor}]:{pipe}")));
        way.run_on_target(&first, "criu", &words)
    }
}

/// A process's number in the node's pid namespace, the second that it has.
fn number_on_node(pid: u32) -> Result<String> {
    let file = Path::new("/proc").join(pid.to_string()).join("status");
    let status = fs::read_to_string(&file).map_err(|source| Error::File { action: "read", path: file, source })?;
    let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
    let number = numbers.and_then(|numbers| numbers.split_whitespace().nth(1));
    number.map(str::to_owned).ok_or_else(|| Error::Misplaced(format!("process {pid} is in no pid namespace of a node")))
}

/// Ends what was restored on a node, and removes its cgroups.
pub(super) fn remove(node: &Node, name: &str) -> Result<()> {
    let group = node.cgroups_path(name);
    let relative = group.strip_prefix("/").unwrap_or(&group);
    for hierarchy in HIERARCHIES {
        let folder = Path::new("/sys/fs/cgroup").join(hierarchy).join(relative);
        for _ in 0..TRIES {
            if !folder.exists() || fs::remove_dir(&folder).is_ok() {
                break;
            }
            let list = fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
            for pid in list.lines().filter_map(|line| line.parse().ok()) {
                // One that has ended meanwhile is fine.
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
            thread::sleep(PAUSE);
        }
        if folder.exists() {
            return Err(Error::Misplaced(format!("{} cannot be removed", folder.display())));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_from_outside_are_found() {
        let table = "161 157 0:52 / / rw,relatime - overlay overlay rw,lowerdir=/x\n\
                     175 163 0:6 /null /proc/keys rw,nosuid - devtmpfs devtmpfs rw,size=1k\n\
                     211 195 0:32 /up/there /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n";
        let pair = |point: &str, at: &str| (point.to_owned(), at.to_owned());
        let expected = [pair("/proc/keys", "/dev/null"), pair("/sys/fs/cgroup/memory", "/sys/fs/cgroup/memory")];
        assert_eq!(outer_mounts(table), expected);
    }
}
