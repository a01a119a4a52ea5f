//! Finding the processes of a migration, from outside.

use std::fs;
use std::path::{Path, PathBuf};

use crate::node::Node;
use crate::process::{self, ProcessId};

fn words(pid: u32) -> Vec<String> {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    line.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect()
}

fn parent(pid: u32) -> Option<u32> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    text.rsplit_once(") ")?.1.split_whitespace().nth(1)?.parse().ok()
}

/// The `nsenter` that a process was started by.
pub fn nsenter_of(pid: u32) -> Option<ProcessId> {
    let parent = parent(pid)?;
    words(parent)[0].ends_with("nsenter").then(|| ProcessId::of(parent))?
}

fn find(wanted: impl Fn(u32, &[String]) -> bool) -> Option<ProcessId> {
    process::pids(Path::new("/proc")).into_iter().find(|pid| wanted(*pid, &words(*pid))).and_then(ProcessId::of)
}

fn mentions(words: &[String], folder: &Path) -> bool {
    words.iter().any(|word| Path::new(word).starts_with(folder))
}

/// The dump worker of a node.
pub fn dump_worker(node: &Node) -> Option<ProcessId> {
    let state = node.agent_state();
    find(|_, words| words[0].ends_with("podferry-dump-worker") && mentions(words, &state))
}

/// The CRIU that dumps on a node.
pub fn criu_of_dump(node: &Node) -> Option<ProcessId> {
    let worker = dump_worker(node)?.pid;
    find(|pid, words| words.iter().any(|word| word == "swrk") && parent(pid) == Some(worker))
}

/// Both pagers of a node: the one that works, and the one that takes over from it.
pub fn pagers(node: &Node) -> (Option<ProcessId>, Option<ProcessId>) {
    let state = node.agent_state();
    let is_pager = |words: &[String]| words[0].ends_with("podferry-pager") && mentions(words, &state);
    let is_second = |words: &[String]| words.iter().any(|word| word == "second");
    let first = find(|_, words| is_pager(words) && !is_second(words));
    (first, find(|_, words| is_pager(words) && is_second(words)))
}

/// `runc restore` on a node.
pub fn runc_restore(node: &Node) -> Option<ProcessId> {
    let bundles = node.bundles();
    find(|_, words| words.iter().any(|word| word == "restore") && mentions(words, &bundles))
}

/// The CRIU that restores on a node.
pub fn criu_of_restore(node: &Node) -> Option<ProcessId> {
    let runc = runc_restore(node)?.pid;
    find(|pid, words| words.iter().any(|word| word == "swrk") && parent(pid) == Some(runc))
}

/// The hook that holds a restored container of a node.
pub fn hook(node: &Node) -> Option<ProcessId> {
    let own = fs::read_link(format!("/proc/{}/ns/mnt", node.init()?.pid)).ok()?;
    find(|pid, words| {
        words[0].ends_with("podferry-hook")
            && fs::read_link(format!("/proc/{pid}/ns/mnt")).is_ok_and(|namespace| namespace == own)
            && fs::read(format!("/proc/{pid}/environ")).is_ok_and(|environment| {
                environment.split(|byte| *byte == 0).any(|word| word == b"CRTOOLS_SCRIPT_ACTION=post-restore")
            })
    })
}

/// Where the kernel lists the processes of a container.
pub fn cgroup_processes(node: &Node, workload: &str) -> PathBuf {
    let root = Path::new("/sys/fs/cgroup");
    let hierarchy = if root.join("cgroup.controllers").exists() { root.to_owned() } else { root.join("freezer") };
    let path = node.cgroups_path(workload);
    hierarchy.join(path.strip_prefix("/").unwrap_or(&path)).join("cgroup.procs")
}

/// The processes in a container's cgroup, by their numbers on the machine.
pub fn of_container(node: &Node, workload: &str) -> Vec<u32> {
    let text = fs::read_to_string(cgroup_processes(node, workload)).unwrap_or_default();
    text.lines().filter_map(|line| line.parse().ok()).collect()
}

/// The state letter of a process, proc(5).
pub fn state(pid: u32) -> Option<char> {
    process::stat(Path::new("/proc"), pid).map(|(state, _)| state)
}

/// Whether a process may execute another instruction of its program before anybody lets it: it is neither stopped, nor killed, nor
/// exiting.
pub fn may_go_on(pid: u32) -> bool {
    /// `include/linux/sched.h`.
    const PF_EXITING: u64 = 4;
    const KILL: u64 = 1 << 8;
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let pending = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        u64::from_str_radix(line.trim(), 16).ok()
    };
    let killed = ["SigPnd:", "ShdPnd:"].into_iter().filter_map(pending).any(|signals| signals & KILL != 0);
    // Later than the signals: a signal that was taken by then shows here.
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit_once(") ").map_or("", |(_, fields)| fields).split_whitespace().collect();
    let (Some(state), Some(flags)) = (fields.first(), fields.get(6)) else { return false };
    let exiting = flags.parse::<u64>().is_ok_and(|flags| flags & PF_EXITING != 0);
    !killed && !exiting && !["t", "T", "Z", "X"].contains(state)
}
