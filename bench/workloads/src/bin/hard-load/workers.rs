//! Threads that write their memory at a given rate, and look whether it is what they wrote.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::memory::{Backing, Memory, PAGE};

/// Between two times that pages are written.
const TICK: Duration = Duration::from_millis(10);
/// Who stood still does not make up for more than this: it is no load that anybody meant.
const MOST_BEHIND: Duration = Duration::from_millis(50);
/// Pages in a MiB.
const PAGES_IN_MIB: usize = (1 << 20) / PAGE;

/// What the workers of a process do.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plan {
    /// How many there are.
    pub(crate) threads: usize,
    /// Memory of all together, in MiB.
    pub(crate) mib: usize,
    /// How much of it they write in a second, in percent.
    pub(crate) percent: f64,
    /// How much of it they only look at in a second, in percent.
    pub(crate) looked_at: f64,
    /// Which memory it is.
    pub(crate) backing: Backing,
    /// What their contents follow from.
    pub(crate) seed: u64,
}

/// What the workers of this process found. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Findings(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    workers: u64,
    wrong: AtomicU64,
    /// How often everything was asked to be looked at, and how many workers have done so in all.
    asked: AtomicU64,
    done: AtomicU64,
    one_at_a_time: Mutex<()>,
}

impl Findings {
    /// Pages that were not what was written to them.
    pub(crate) fn wrong(&self) -> u64 {
        self.0.wrong.load(Ordering::Acquire)
    }

    /// Has every page looked at; pages that are or were wrong.
    pub(crate) fn look_at_everything(&self) -> u64 {
        let _alone = self.0.one_at_a_time.lock().unwrap_or_else(PoisonError::into_inner);
        let asked = self.0.asked.fetch_add(1, Ordering::AcqRel) + 1;
        while self.0.done.load(Ordering::Acquire) < asked * self.0.workers {
            thread::sleep(Duration::from_millis(1));
        }
        self.wrong()
    }

    fn found(&self, right: bool) {
        if !right {
            self.0.wrong.fetch_add(1, Ordering::AcqRel);
        }
    }
}

/// Starts the workers; they go on as long as the process does.
pub(crate) fn start(plan: Plan) -> io::Result<Findings> {
    let findings = Findings(Arc::new(Shared { workers: plan.threads as u64, ..Shared::default() }));
    let pages = (plan.mib * PAGES_IN_MIB / plan.threads).max(1);
    for number in 0..plan.threads {
        let findings = findings.clone();
        let memory = Memory::new(plan.backing, pages, plan.seed ^ ((number as u64 + 1) << 48))?;
        thread::Builder::new().name(format!("worker-{number}")).spawn(move || work(memory, plan, &findings))?;
    }
    Ok(findings)
}

fn work(mut memory: Memory, plan: Plan, findings: &Findings) {
    let due = |percent| Due::new(memory.pages(), percent);
    let (mut written, mut looked_at) = (due(plan.percent), due(plan.looked_at));
    let mut seen = 0;
    loop {
        let now = Instant::now();
        (0..written.pages(now)).for_each(|_| findings.found(memory.write_next().is_ok_and(|right| right)));
        (0..looked_at.pages(now)).for_each(|_| findings.found(memory.check_next().is_ok_and(|right| right)));
        let asked = findings.0.asked.load(Ordering::Acquire);
        if asked > seen {
            seen = asked;
            (0..memory.pages()).for_each(|page| findings.found(memory.is_right(page).is_ok_and(|right| right)));
            findings.0.done.fetch_add(1, Ordering::AcqRel);
        }
        thread::sleep(TICK.saturating_sub(now.elapsed()));
    }
}

/// How many pages are due by a rate.
struct Due {
    per_second: f64,
    since: Instant,
    rest: f64,
}

impl Due {
    fn new(pages: usize, percent: f64) -> Self {
        #[expect(clippy::cast_precision_loss, reason = "page counts are small")]
        let per_second = pages as f64 * percent / 100.0;
        Self { per_second, since: Instant::now(), rest: 0.0 }
    }

    fn pages(&mut self, now: Instant) -> u64 {
        let passed = now.saturating_duration_since(self.since).min(MOST_BEHIND);
        self.since = now;
        let due = self.rest + passed.as_secs_f64() * self.per_second;
        self.rest = due.fract();
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "not negative, and small")]
        let whole = due as u64;
        whole
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_kept_and_a_pause_is_not_made_up_for() {
        let mut due = Due::new(1000, 25.0);
        let start = due.since;
        let pages: u64 = (1..=100).map(|tick| due.pages(start + TICK * tick)).sum();
        assert!((249..=250).contains(&pages), "{pages}");
        assert!(due.pages(start + Duration::from_secs(60)) <= 13);
    }

    #[test]
    fn workers_find_nothing_wrong_with_their_own_memory() {
        let plan = Plan { threads: 3, mib: 3, percent: 100.0, looked_at: 5.0, backing: Backing::Private, seed: 1 };
        let findings = start(plan).unwrap();
        thread::sleep(Duration::from_millis(50));
        assert_eq!((findings.look_at_everything(), findings.look_at_everything()), (0, 0));
        findings.found(false);
        assert_eq!(findings.look_at_everything(), 1);
    }
}
