//! What each node spends on a migration: CPU time and memory of the agent and of all that it starts, without the workload.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use nix::sys::statvfs::statvfs;
use podferry_report::results::Cost;

use crate::processor::Snapshot;

/// How often the workload's own CPU time is read; every so many times memory is, which takes longer.
const INTERVAL: Duration = Duration::from_millis(20);
const MEMORY_EVERY: u32 = 5;

/// A node, as this looks at it.
#[derive(Debug, Clone)]
pub(super) struct Side {
    /// The first process of its pid namespace.
    pub(super) init: u32,
    /// The cgroup of the workload there, from the root of every hierarchy.
    pub(super) group: PathBuf,
    /// The tmpfs with the images of migrations, as this machine sees it.
    pub(super) images: PathBuf,
}

/// Looks until it is told to end.
#[derive(Debug)]
pub(super) struct Costs {
    sides: [Side; 2],
    before: [f64; 2],
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<[Tally; 2]>>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Tally {
    /// CPU seconds of the workload at first and at last.
    workload: Option<(f64, f64)>,
    most_memory: u64,
}

impl Costs {
    /// Begins to look at source and target.
    pub(super) fn start(sides: [Side; 2]) -> Self {
        let snapshot = Snapshot::take();
        let before = [0, 1].map(|side: usize| snapshot.node(sides[side].init));
        let stop = Arc::new(AtomicBool::new(false));
        let (told, looked_at) = (Arc::clone(&stop), sides.clone());
        let thread = std::thread::spawn(move || look(&looked_at, &told));
        Self { sides, before, stop, thread: Some(thread) }
    }

    /// Ends it; gives what source and target spent meanwhile. Memory is the most that they held at once, images in memory among it.
    pub(super) fn finish(mut self) -> Option<[Cost; 2]> {
        self.stop.store(true, Ordering::Release);
        let tallies = self.thread.take()?.join().ok()?;
        let snapshot = Snapshot::take();
        Some([0, 1].map(|side: usize| {
            let tally = tallies[side];
            let (first, last) = tally.workload.unwrap_or_default();
            let node = snapshot.node(self.sides[side].init) - self.before[side];
            Cost { cpu_s: (node - (last - first)).max(0.0), peak_memory_bytes: tally.most_memory }
        }))
    }
}

impl Drop for Costs {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
    }
}

fn look(sides: &[Side; 2], stop: &AtomicBool) -> [Tally; 2] {
    let mut tallies = [Tally::default(); 2];
    // On the side where the workload is not yet, all of its CPU time is within what is looked at.
    for (side, tally) in sides.iter().zip(&mut tallies) {
        tally.workload = Some(cpu_seconds(&side.group).map_or((0.0, 0.0), |seconds| (seconds, seconds)));
    }
    let mut round = 0;
    while !stop.load(Ordering::Acquire) {
        for (side, tally) in sides.iter().zip(&mut tallies) {
            if let (Some((_, last)), Some(seconds)) = (&mut tally.workload, cpu_seconds(&side.group)) {
                *last = seconds;
            }
            if round % MEMORY_EVERY == 0 {
                tally.most_memory = tally.most_memory.max(memory(side));
            }
        }
        round += 1;
        std::thread::sleep(INTERVAL);
    }
    tallies
}

/// CPU time that a cgroup's processes have used, those that have ended among them: `cpuacct.usage` of v1 (in ns), `cpu.stat` of v2.
fn cpu_seconds(group: &Path) -> Option<f64> {
    let relative = group.strip_prefix("/").unwrap_or(group);
    let nanoseconds = |file: &Path| fs::read_to_string(file).ok()?.trim().parse().ok();
    if let Some(used) = nanoseconds(&Path::new("/sys/fs/cgroup/cpuacct").join(relative).join("cpuacct.usage")) {
        return Some(Duration::from_nanos(used).as_secs_f64());
    }
    let stat = fs::read_to_string(Path::new("/sys/fs/cgroup").join(relative).join("cpu.stat")).ok()?;
    let used = stat.lines().find_map(|line| line.strip_prefix("usage_usec ")?.parse().ok())?;
    Some(Duration::from_micros(used).as_secs_f64())
}

/// Resident memory of all processes in the node's pid namespace itself, where containers' are not, and what is in the tmpfs of images. The agent's
/// parents are elsewhere, but it is in the namespace.
fn memory(side: &Side) -> u64 {
    let processes: u64 = processes_of(side.init).into_iter().map(resident_bytes).sum();
    processes + images_bytes(&side.images)
}

fn processes_of(init: u32) -> BTreeSet<u32> {
    let namespace = |pid: u32| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    let Some(own) = namespace(init) else { return BTreeSet::new() };
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid| namespace(*pid).as_ref() == Some(&own)).collect()
}

/// What only this process holds and its share of what several do would be exacter (`Pss`), and takes far longer to find out.
fn resident_bytes(pid: u32) -> u64 {
    let statm = fs::read_to_string(format!("/proc/{pid}/statm")).unwrap_or_default();
    let pages = |index: usize| statm.split_whitespace().nth(index).and_then(|field| field.parse::<u64>().ok());
    // Without pages of files, which all processes of one program share: fields 2 and 3 of proc_pid_statm(5).
    let private = pages(1).unwrap_or(0).saturating_sub(pages(2).unwrap_or(0));
    private * 4096
}

fn images_bytes(folder: &Path) -> u64 {
    statvfs(folder).map_or(0, |status| (status.blocks() - status.blocks_free()) * status.fragment_size())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_work_of_this_namespace_is_found() {
        let side =
            || Side { init: std::process::id(), group: "/no-such-group".into(), images: "/no-such-folder".into() };
        let costs = Costs::start([side(), side()]);
        let until = std::time::Instant::now() + Duration::from_millis(300);
        while std::time::Instant::now() < until {}
        let [source, _] = costs.finish().unwrap();
        assert!(source.cpu_s >= 0.1, "{source:?}");
        assert!(source.peak_memory_bytes > 1 << 20, "{source:?}");
    }
}
