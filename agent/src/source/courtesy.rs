//! The first round of pre-copy gives way to the workload.
//!
//! It sends all memory, and takes whole processors for that. Where there are idle ones nobody notices. Where there are none, the
//! workload's threads wait for a processor, and the kernel counts for how long (`/proc/PID/task/TID/schedstat`; the kernel's
//! `Documentation/scheduler/sched-stats.rst`). When they wait longer than they did before the migration, the copying rests between its
//! batches, the longer the more they wait:
//!
//! ```text
//! waiting  w = Δwaited / max(Δt, Δran + Δwaited)      of all threads together, every 50 ms
//! rest     r = min(max(2 r, 1/2), 7)                  times as long as the work before it, where w > usual + 10 %
//!          r = 0.7 r, or 0 below 1/10                 where w < usual + 5 %
//! ```
//!
//! So it goes on with at least an eighth of its speed. Later rounds do not rest: what they send was written during the one before, and
//! the slower they are the more that is.

use std::collections::HashMap;
use std::fs;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How much longer than usual the workload may wait, as a part of the time: a tenth of its speed.
const TOLERATED: f64 = 0.10;
/// Where the copying takes its speed up again.
const AT_EASE: f64 = 0.05;
/// The first rest, as a part of the work before it,
const FIRST_REST: f64 = 0.5;
/// the longest,
const LONGEST_REST: f64 = 7.0;
/// and the shortest that is worth it.
const SHORTEST_REST: f64 = 0.1;
/// How often the threads are looked at, and for how long at least before there is anything usual.
const INTERVAL: Duration = Duration::from_millis(50);
/// Work that is rested from at once: below that timers are too coarse.
const STINT: Duration = Duration::from_millis(5);
/// The most threads that are looked at, the others of a large workload may be like them: reading what they say, at 10 µs for each, must not
/// cost more than it saves.
const MOST_THREADS: usize = 128;

/// What threads had of the processors since they began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Had {
    ran: Duration,
    waited: Duration,
}

/// Looks at a workload's threads, and rests when they wait for processors.
#[derive(Debug)]
pub(super) struct Courtesy {
    pids: Vec<i32>,
    /// No rests behind this.
    until: Instant,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    threads: HashMap<(i32, i32), Had>,
    looked: Instant,
    worked_since: Instant,
    rest: Rest,
    rested: Duration,
}

impl Courtesy {
    /// Towards these processes, until then. Takes `INTERVAL` to see what is usual.
    pub(super) fn towards(pids: Vec<i32>, until: Instant) -> Self {
        let (before, begun) = (look(&pids), Instant::now());
        std::thread::sleep(INTERVAL);
        let (threads, looked) = (look(&pids), Instant::now());
        let usual = waiting(&before, &threads, looked - begun);
        let rest = Rest { usual, factor: 0.0 };
        let state = State { threads, looked, worked_since: looked, rest, rested: Duration::ZERO };
        Self { pids, until, state: Mutex::new(state) }
    }

    /// To be called between two batches: rests as long as it has to. Blocks.
    pub(super) fn rest(&self) {
        let mut guard = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (state, now) = (&mut *guard, Instant::now());
        if now - state.looked >= INTERVAL {
            state.look(&self.pids, now);
        }
        let worked = now - state.worked_since;
        if worked < STINT {
            return;
        }
        let rest = worked.min(INTERVAL).mul_f64(state.rest.factor).min(self.until.saturating_duration_since(now));
        if !rest.is_zero() {
            std::thread::sleep(rest);
        }
        state.worked_since = Instant::now();
        state.rested += state.worked_since - now;
    }

    /// How long it has rested.
    pub(super) fn rested(&self) -> Duration {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).rested
    }
}

impl State {
    fn look(&mut self, pids: &[i32], now: Instant) {
        let threads = look(pids);
        self.rest.after(waiting(&self.threads, &threads, now - self.looked));
        (self.threads, self.looked) = (threads, now);
    }
}

/// How long to rest.
#[derive(Clone, Copy, Debug)]
struct Rest {
    /// What the workload waited before.
    usual: f64,
    /// Times the work before it.
    factor: f64,
}

impl Rest {
    /// The workload waited for this part of the time.
    fn after(&mut self, waiting: f64) {
        if waiting > self.usual + TOLERATED {
            self.factor = (self.factor * 2.0).clamp(FIRST_REST, LONGEST_REST);
        } else if waiting < self.usual + AT_EASE {
            let less = self.factor * 0.7;
            self.factor = if less < SHORTEST_REST { 0.0 } else { less };
        }
    }
}

/// The part of the time that threads waited for a processor. Of one that does little it is the part of all time, or it would count as slow
/// for waiting a millisecond once.
fn waiting(before: &HashMap<(i32, i32), Had>, now: &HashMap<(i32, i32), Had>, time: Duration) -> f64 {
    let (mut ran, mut waited) = (Duration::ZERO, Duration::ZERO);
    for (thread, had) in now {
        let Some(before) = before.get(thread) else { continue };
        ran += had.ran.saturating_sub(before.ran);
        waited += had.waited.saturating_sub(before.waited);
    }
    let wanted = time.max(ran + waited).as_secs_f64();
    if wanted > 0.0 { waited.as_secs_f64() / wanted } else { 0.0 }
}

/// What the processes' threads had. Those that are gone, and kernels without `CONFIG_SCHED_INFO`, say nothing: then nobody rests.
fn look(pids: &[i32]) -> HashMap<(i32, i32), Had> {
    let threads = pids.iter().flat_map(|pid| threads(*pid).map(move |thread| (*pid, thread)));
    let had = |(pid, tid): (i32, i32)| {
        let said = fs::read_to_string(format!("/proc/{pid}/task/{tid}/schedstat")).ok()?;
        Some(((pid, tid), parse(&said)?))
    };
    threads.take(MOST_THREADS).filter_map(had).collect()
}

fn threads(pid: i32) -> impl Iterator<Item = i32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    tasks.filter_map(|task| task.file_name().to_str()?.parse().ok())
}

/// `schedstat`: nanoseconds on a processor, nanoseconds of waiting for one, and how often.
fn parse(schedstat: &str) -> Option<Had> {
    let mut numbers = schedstat.split_whitespace().map(str::parse::<u64>);
    let mut next = || numbers.next()?.ok().map(Duration::from_nanos);
    Some(Had { ran: next()?, waited: next()? })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    const MILLISECOND: Duration = Duration::from_millis(1);

    fn had(ran: u32, waited: u32) -> Had {
        Had { ran: ran * MILLISECOND, waited: waited * MILLISECOND }
    }

    #[test]
    fn what_the_kernel_says_is_understood() {
        assert_eq!(parse("5000000 3000000 17\n"), Some(had(5, 3)));
        assert_eq!(parse("5000000"), None);
        assert_eq!(parse("a b c"), None);
        let own = i32::try_from(std::process::id()).unwrap();
        assert!(!look(&[own]).is_empty(), "this kernel counts");
    }

    #[test]
    fn waiting_is_a_part_of_what_was_wanted_and_of_all_time_at_least() {
        let of = |threads: &[Had]| (0..).zip(threads).map(|(tid, had)| ((1, tid), *had)).collect::<HashMap<_, _>>();
        let nothing = of(&[Had::default(), Had::default()]);
        let waiting = |threads: &[Had]| waiting(&nothing, &of(threads), 100 * MILLISECOND);
        assert!((waiting(&[had(60, 40)]) - 0.4).abs() < 1e-9);
        assert!((waiting(&[had(1, 9)]) - 0.09).abs() < 1e-9, "one that does little");
        assert!((waiting(&[had(100, 0), had(50, 50)]) - 0.25).abs() < 1e-9, "two");
        assert!(waiting(&[had(1, 0), had(0, 0), had(0, 90)]) < 1e-9, "one that is new");
        assert!(super::waiting(&HashMap::new(), &HashMap::new(), Duration::ZERO) < 1e-9);
    }

    #[test]
    fn who_waits_more_than_usual_is_given_more_and_more_room_and_no_more_than_that() {
        let mut rest = Rest { usual: 0.2, factor: 0.0 };
        rest.after(0.29);
        assert!(rest.factor < 1e-9, "a tenth more than usual is tolerated");
        let mut factors = Vec::new();
        for _ in 0..6 {
            rest.after(0.6);
            factors.push(rest.factor);
        }
        assert_eq!(factors, [0.5, 1.0, 2.0, 4.0, 7.0, 7.0]);
        rest.after(0.27);
        assert!((rest.factor - 7.0).abs() < 1e-9, "in between it stays");
        let steps = (0..).take_while(|_| {
            rest.after(0.2);
            rest.factor > 0.0
        });
        assert_eq!(steps.count(), 11);
    }

    #[test]
    fn threads_that_share_a_processor_are_seen_to_wait() {
        let own = i32::try_from(std::process::id()).unwrap();
        let ended = AtomicBool::new(false);
        let busy = || {
            while !ended.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        };
        let waited = std::thread::scope(|scope| {
            let threads = 3 * std::thread::available_parallelism().unwrap().get();
            (0..threads).for_each(|_| drop(scope.spawn(busy)));
            let (before, begun) = (look(&[own]), Instant::now());
            std::thread::sleep(Duration::from_millis(300));
            let waited = waiting(&before, &look(&[own]), begun.elapsed());
            ended.store(true, Ordering::Relaxed);
            waited
        });
        assert!(waited > 0.3, "{waited}");
    }

    #[test]
    fn it_rests_as_long_as_its_work_tells_and_not_behind_its_end() {
        let worked = |courtesy: &Courtesy| {
            let mut state = courtesy.state.lock().unwrap();
            state.rest.factor = 1.0;
            state.worked_since = Instant::now().checked_sub(STINT).unwrap();
        };
        let courtesy = Courtesy::towards(Vec::new(), Instant::now() + Duration::from_secs(60));
        worked(&courtesy);
        courtesy.rest();
        assert!(courtesy.rested() >= STINT);
        let late = Courtesy { until: Instant::now(), ..courtesy };
        let before = late.rested();
        worked(&late);
        late.rest();
        assert!(late.rested() < before + STINT);
    }
}
