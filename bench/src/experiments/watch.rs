//! Downtime as seen from outside the process: from when until when the container's first process could not run.
//!
//! The kernel's table of processes is read every half a millisecond. The downtime **begins** when the process on the source is seen to
//! stand still for the last time: frozen by its cgroup, stopped, ended or gone (states `D`, `T`, `t`, `Z`, `X`, or no entry in `/proc`), or
//! traced: while CRIU dumps a process, that process runs CRIU's code, and none of its own. It **ends** when the process on the target is first seen to run on its own: one that was restored has been let go by CRIU,
//! which traces each task until all is in place; one that was started anew is no longer runc's. So neither the process nor its clock has
//! a part in it, and podferry and its peers are measured alike. How long looking takes adds to the half millisecond on a busy machine.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use crate::{load::milliseconds, stage::unix_ms};

/// How often is looked.
const INTERVAL: Duration = Duration::from_micros(500);
/// What runc calls its own process before it becomes the container's.
const RUNC: &str = "runc";

/// How the container comes to be on the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrival {
    /// CRIU makes its processes.
    Restored,
    /// Its program is started.
    Started,
}

/// What was seen, in ms since 1970.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Seen {
    /// Since when the source's process stood still for good.
    pub still_since: Option<f64>,
    /// When the target's process first ran.
    pub ran_at: Option<f64>,
}

impl Seen {
    /// Downtime in ms, if both its ends were seen in their order.
    pub fn downtime_ms(self) -> Option<f64> {
        let (still_since, ran_at) = (self.still_since?, self.ran_at?);
        (ran_at >= still_since).then_some(ran_at - still_since)
    }
}

/// What one look at a process finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Look {
    state: char,
    is_traced: bool,
    is_of_runc: bool,
}

impl Look {
    fn stands_still(self) -> bool {
        self.is_traced || matches!(self.state, 'D' | 'T' | 't' | 'Z' | 'X')
    }
}

/// Makes out of looks what was seen. Knows no clock.
#[derive(Debug)]
struct Tracker {
    arrival: Arrival,
    seen: Seen,
    was_traced: bool,
}

impl Tracker {
    fn new(arrival: Arrival) -> Self {
        Self { arrival, seen: Seen::default(), was_traced: false }
    }

    /// The source's process at this time; `None` when it is gone. Behind the target's first step it does not count any more.
    fn source(&mut self, now: f64, look: Option<Look>) {
        if self.seen.ran_at.is_some() {
            return;
        }
        if look.is_none_or(Look::stands_still) {
            self.seen.still_since.get_or_insert(now);
        } else {
            self.seen.still_since = None;
        }
    }

    /// The target's process at this time.
    fn target(&mut self, now: f64, look: Look) {
        if self.seen.ran_at.is_some() {
            return;
        }
        self.was_traced |= look.is_traced;
        let is_free = !look.stands_still() && !look.is_of_runc;
        let has_arrived = match self.arrival {
            Arrival::Restored => self.was_traced,
            Arrival::Started => true,
        };
        if is_free && has_arrived {
            self.seen.ran_at = Some(now);
        }
    }
}

/// Looks until it is told to end.
#[derive(Debug)]
pub struct Watch {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Seen>>,
}

impl Watch {
    /// Begins to look at a process, and at the cgroup in which the one that takes its place will be. `target_group` is a path from the root of
    /// every hierarchy.
    pub fn start(source: u32, target_group: &Path, arrival: Arrival) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (told, group) = (Arc::clone(&stop), processes_file(target_group));
        let thread = std::thread::spawn(move || watch(source, &group, arrival, &told));
        Self { stop, thread: Some(thread) }
    }

    /// Ends it; gives what was seen.
    pub fn finish(mut self) -> Seen {
        self.stop.store(true, Ordering::Release);
        self.thread.take().and_then(|thread| thread.join().ok()).unwrap_or_default()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
    }
}

fn watch(source: u32, group: &Path, arrival: Arrival, stop: &AtomicBool) -> Seen {
    // A clock that nobody sets, related once to the one that clients use.
    let (base, since) = (unix_ms(), Instant::now());
    let mut tracker = Tracker::new(arrival);
    let mut target = None;
    while !stop.load(Ordering::Acquire) {
        let now = base + milliseconds(since.elapsed());
        tracker.source(now, look_at(source));
        if tracker.seen.ran_at.is_none() {
            target = target.or_else(|| first_process(group));
            match target.map(look_at) {
                Some(Some(look)) => tracker.target(now, look),
                // A restore that failed; there may be another.
                Some(None) => target = None,
                None => {}
            }
        }
        std::thread::sleep(INTERVAL);
    }
    tracker.seen
}

/// The list of a cgroup's processes: in the one hierarchy of cgroup v2, or in the freezer's of v1, which runc always uses.
fn processes_file(group: &Path) -> PathBuf {
    let hierarchy = if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        "/sys/fs/cgroup"
    } else {
        "/sys/fs/cgroup/freezer"
    };
    Path::new(hierarchy).join(group.strip_prefix("/").unwrap_or(group)).join("cgroup.procs")
}

/// The process of the cgroup that is the first in its own pid namespace.
fn first_process(group: &Path) -> Option<u32> {
    let list = fs::read_to_string(group).ok()?;
    list.lines().filter_map(|line| line.parse().ok()).find(|pid| is_first(*pid))
}

fn is_first(pid: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
    numbers.and_then(|numbers| numbers.split_whitespace().last()) == Some("1")
}

fn look_at(pid: u32) -> Option<Look> {
    parse(&fs::read_to_string(format!("/proc/{pid}/status")).ok()?)
}

/// Reads `/proc/PID/status` (proc(5)).
fn parse(status: &str) -> Option<Look> {
    let field = |name: &str| status.lines().find_map(|line| Some(line.strip_prefix(name)?.trim()));
    Some(Look {
        state: field("State:")?.chars().next()?,
        is_traced: field("TracerPid:")? != "0",
        is_of_runc: field("Name:")?.starts_with(RUNC),
    })
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command, Stdio};

    use nix::{
        sys::signal::{Signal, kill},
        unistd::Pid,
    };

    use super::*;

    fn look(state: char) -> Look {
        Look { state, is_traced: state == 't', is_of_runc: false }
    }

    fn seen(arrival: Arrival, source: &[(f64, char)], target: &[(f64, char)]) -> Seen {
        let mut tracker = Tracker::new(arrival);
        let mut all: Vec<(f64, bool, char)> = source.iter().map(|(at, state)| (*at, true, *state)).collect();
        all.extend(target.iter().map(|(at, state)| (*at, false, *state)));
        all.sort_by(|one, two| one.0.total_cmp(&two.0));
        for (at, is_source, state) in all {
            match (is_source, state) {
                (true, '-') => tracker.source(at, None),
                (true, state) => tracker.source(at, Some(look(state))),
                (false, state) => tracker.target(at, look(state)),
            }
        }
        tracker.seen
    }

    #[test]
    fn downtime_is_from_the_last_stop_to_being_let_go() {
        // A short stop in pre-copy does not count, nor what runs in CRIU's restorer before it is traced.
        let source = [(0.0, 'S'), (1.0, 't'), (2.0, 'R'), (10.0, 'D'), (11.0, 't'), (20.0, '-')];
        let target = [(15.0, 'R'), (18.0, 'S'), (25.0, 't'), (31.0, 'S'), (32.0, 'R')];
        let seen = seen(Arrival::Restored, &source, &target);
        assert_eq!((seen.still_since, seen.ran_at, seen.downtime_ms()), (Some(10.0), Some(31.0), Some(21.0)));
    }

    #[test]
    fn code_of_criu_in_the_process_is_not_the_process() {
        let mut tracker = Tracker::new(Arrival::Restored);
        tracker.source(1.0, Some(look('D')));
        tracker.source(2.0, Some(Look { state: 'R', is_traced: true, is_of_runc: false }));
        assert_eq!(tracker.seen.still_since, Some(1.0));
    }

    #[test]
    fn a_source_that_is_thawed_again_had_no_downtime_to_tell() {
        let seen = seen(Arrival::Restored, &[(0.0, 'S'), (10.0, 'D'), (50.0, 'S')], &[]);
        assert_eq!(seen, Seen::default());
    }

    #[test]
    fn what_is_started_anew_runs_when_it_is_no_longer_runcs() {
        let mut tracker = Tracker::new(Arrival::Started);
        tracker.source(5.0, None);
        tracker.target(8.0, Look { state: 'S', is_traced: false, is_of_runc: true });
        tracker.target(9.0, Look { state: 'R', is_traced: false, is_of_runc: false });
        assert_eq!(tracker.seen.downtime_ms(), Some(4.0));
    }

    #[test]
    fn the_kernels_table_is_read() {
        let status = "Name:\trunc:[2:INIT]\nUmask:\t0022\nState:\tt (tracing stop)\nTracerPid:\t77\n";
        assert_eq!(parse(status), Some(Look { state: 't', is_traced: true, is_of_runc: true }));
        assert_eq!(parse("Name:\tx\n"), None);
    }

    struct Victim(Child);

    impl Victim {
        fn start() -> Self {
            let started = Command::new("sleep").arg("60").stdout(Stdio::null()).spawn();
            Self(started.unwrap())
        }

        fn signal(&self, signal: Signal) {
            kill(Pid::from_raw(self.0.id().try_into().unwrap()), signal).unwrap();
        }
    }

    impl Drop for Victim {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    /// The beginning of a stop is found within a millisecond of when the signal was sent, in the middle of many tries: a machine that is
    /// busy with other things may look late now and then.
    #[test]
    fn a_stop_is_found_within_a_millisecond() {
        let errors = (0..15).map(|_| {
            let victim = Victim::start();
            let watch = Watch::start(victim.0.id(), Path::new("/no-such-group"), Arrival::Restored);
            std::thread::sleep(Duration::from_millis(30));
            let stopped = unix_ms();
            victim.signal(Signal::SIGSTOP);
            std::thread::sleep(Duration::from_millis(20));
            watch.finish().still_since.expect("it was seen to stand still") - stopped
        });
        let error = crate::migration::median(errors).unwrap();
        assert!((-0.1..1.0).contains(&error), "{error} ms");
    }
}
