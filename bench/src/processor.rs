//! Processor time of processes and of whole nodes, from `/proc/PID/stat`.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
};

use nix::unistd::{SysconfVar, sysconf};

use crate::moves::whole;

/// What all processes of the machine had used at one time.
#[derive(Debug, Clone, Default)]
pub(crate) struct Snapshot {
    processes: HashMap<u32, Process>,
}

/// Times in clock ticks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Process {
    parent: u32,
    /// By its own threads, those that ended among them.
    own: u64,
    /// By children that have ended and were waited for, and by theirs.
    waited: u64,
    /// Its pid namespace, as the kernel names it.
    namespace: PathBuf,
}

impl Snapshot {
    /// That of now.
    pub(crate) fn take() -> Self {
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        // One that ends meanwhile is passed over.
        Self { processes: pids.filter_map(|pid| Some((pid, read(pid)?))).collect() }
    }

    /// Seconds of a process and of its children that have ended.
    pub(crate) fn process(&self, pid: u32) -> f64 {
        seconds(self.processes.get(&pid).map_or(0, |process| process.own + process.waited))
    }

    /// Seconds of all that ever ran on a node whose first process this is: of what is in its pid namespace, and below that.
    ///
    /// Not only of what is below the first process: the parent of an agent is on the machine, as whoever started it was.
    pub(crate) fn node(&self, first: u32) -> f64 {
        seconds(self.node_ticks(first))
    }

    fn node_ticks(&self, first: u32) -> u64 {
        let Some(Process { namespace, .. }) = self.processes.get(&first) else { return 0 };
        let on_node = self.processes.keys().filter(|pid| self.is_within(**pid, namespace));
        on_node.map(|pid| self.processes[pid].own + self.processes[pid].waited).sum()
    }

    /// Whether a process or one above it is in the namespace.
    fn is_within(&self, pid: u32, namespace: &Path) -> bool {
        let mut above = std::iter::successors(self.processes.get(&pid), |process| self.processes.get(&process.parent));
        // In a snapshot that takes its time a number may be used again, so that parents run in a circle.
        above.by_ref().take(self.processes.len()).any(|process| process.namespace == namespace)
    }
}

fn read(pid: u32) -> Option<Process> {
    let (own, waited, parent) = parse(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)?;
    Some(Process { parent, own, waited, namespace: fs::read_link(format!("/proc/{pid}/ns/pid")).ok()? })
}

fn seconds(ticks: u64) -> f64 {
    let in_a_second = sysconf(SysconfVar::CLK_TCK).ok().flatten().and_then(|ticks| u64::try_from(ticks).ok());
    whole(ticks) / whole(in_a_second.unwrap_or(100))
}

/// Own and waited-for ticks and the parent: fields 14 to 17 and 4 of `/proc/PID/stat` (proc(5)), counted from behind the name, which
/// may hold anything.
fn parse(stat: &str) -> Option<(u64, u64, u32)> {
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
    Some((field(14)? + field(15)?, field(16)? + field(17)?, field(4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fields_are_found_behind_any_name() {
        let stat = "42 (a) b (c)) S 7 42 42 0 -1 4194560 100 200 0 0 11 5 3 2 20 0 1 0 777 1000 10";
        assert_eq!(parse(stat), Some((16, 5, 7)));
        assert_eq!(parse("42 (a) S 7"), None);
    }

    #[test]
    fn a_node_has_all_in_its_namespace_and_below_and_nothing_beside() {
        let process =
            |parent, own, waited, namespace: &str| Process { parent, own, waited, namespace: namespace.into() };
        let processes = [
            (1, process(0, 1000, 1000, "machine")),
            (5, process(1, 10, 1, "node")),
            (6, process(5, 20, 2, "node")),
            // A container on the node, in a namespace of its own, and an agent, which was started from outside.
            (7, process(6, 40, 4, "container")),
            (8, process(1, 80, 8, "node")),
            (9, process(1, 160, 16, "other node")),
        ];
        let snapshot = Snapshot { processes: processes.into() };
        assert_eq!((snapshot.node_ticks(5), snapshot.node_ticks(9), snapshot.node_ticks(77)), (165, 176, 0));
    }

    #[test]
    fn parents_in_a_circle_end() {
        let process = |parent| Process { parent, ..Process::default() };
        let snapshot = Snapshot { processes: [(2, process(3)), (3, process(2))].into() };
        assert!(!snapshot.is_within(2, Path::new("node")));
    }

    #[test]
    fn this_process_has_used_some() {
        let (before, pid) = (Snapshot::take().process(std::process::id()), std::process::id());
        while Snapshot::take().process(pid) <= before {}
        assert!(Snapshot::take().node(pid) >= before);
    }
}
