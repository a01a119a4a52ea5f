//! When to end pre-copy: pure arithmetic over what the rounds were like.
//!
//! At the end of a round it is not known yet what the process wrote meanwhile; the next scan tells. It is predicted from the rounds
//! that are over. With `pages(k)`, `bytes(k)`, `duration(k)` of round *k*, all of *round k* being what the process wrote during
//! round *k−1*, and `wire(k)` the bytes per second that the link took:
//!
//! ```text
//! dirty rate   D(k) = pages(k) / duration(k−1)                              pages/s; from the second round on
//! left over    L(k) = min(c(k) · D(k) · duration(k), pages(k), pages(1))    what a freeze now would find, for a round that was
//!                                                                           shorter than the one before
//!              L(k) = min(D(k) · duration(k), pages(1))                     for one that was longer
//! correction   c(k) = max(1, pages(k) / (D(k−1) · duration(k−1)))           from the third round on; without limit in the second
//! send rate    S(k) = wire(k) · pages(k) / bytes(k), or where wire(k) or bytes(k) is 0: pages(k) / duration(k)
//!                     of the latest round of 1024 pages or more: a small one says more of its fixed costs than of the rate
//! memory part  M(k) = L(k) / S + beside(k)                                  of the freeze; `beside` is what comparing and laying in
//!                                                                           shared memory takes, and comparing open files
//! target          T = max(budget − fixed, budget / 10, 5 ms)
//! ```
//!
//! The rate alone would promise too much of a process that writes the same pages again and again: it writes nearly as many of
//! them in a short round as in a long one. So a shorter round's rest is taken for as many times more than the rate says as
//! the last one's turned out to be, and in the second round, after which nothing is known of that, for what that round itself had.
//!
//! After round *k*, the first that applies:
//!
//! 1. *Freeze* when L(k) or `pages(k)` is less than 1024 pages (4 MiB) and M(k) ≤ budget. Another round would cost more than it saves.
//!    For the first round, of which nothing is left over that is known, `pages(1)` stands for L(1).
//! 2. *Another* after the first round.
//! 3. *Freeze* when M(k) ≤ T.
//! 4. When another round would not pay, because L shrank by less than a tenth twice in a row or because all rounds are used up:
//!    *freeze* when M(k) ≤ budget, else *give up*. From the second round on none pays where beside(k) alone is
//!    more than the budget.
//! 5. *Another*.
//!
//! A freeze that rule 4 allows may exceed the budget by the fixed part: the alternative is one that stands still for all its
//! memory.
//!
//! # Throttling
//!
//! Where it is [allowed](Convergence::with_throttle), *throttle* takes the place of *give up* as long as there are rounds and a lower
//! step: the processes get less CPU time, write less, and rounds go on. The steps are of `used`, the CPU time per second that they
//! had in the round before the first of them:
//!
//! ```text
//! step 1       0.8 · used
//! step n + 1   half of step n
//! never below  max(used / 100, the least that can be set)
//! ```
//!
//! - The first is QEMU's (`cpu-throttle-initial`): who writes hardly faster than is sent loses a fifth. From then on one that
//!   writes *x* times too fast is slow enough after about log₂ *x* steps, and never more than half as fast as it could be. QEMU's
//!   even steps of a tenth would take as many rounds and be too coarse at their end, where its least is a hundredth, too.
//! - At a hundredth a process answers nobody in time any more; standing still for its memory is then the better choice.
//! - A step shows late: the round behind it sends what was written before it. That one is not judged.
//! - A round under a throttle pays when it leaves half of what the one before left, and not nine tenths: rounds are few, and the
//!   processes suffer meanwhile. (QEMU's `throttle-trigger-threshold`, 50 %.) One that does not pay is followed by the next step.

use std::fmt;
use std::time::Duration;

use crate::PAGE_SIZE;

/// What is asked of a freeze.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// How long the process may stand still.
    pub budget: Duration,
    /// What a freeze takes without memory: dump and restore of all else.
    pub fixed: Duration,
    /// No more rounds than this.
    pub most_rounds: u32,
}

impl Plan {
    /// Of all containers and moves that were measured, the least downtime was 178 ms (`docs/performance.md`). A single process without a
    /// network takes 60.
    pub const FIXED: Duration = Duration::from_millis(180);
    /// Rounds that are enough for whatever converges at all.
    pub const MOST_ROUNDS: u32 = 30;

    /// A plan for a budget, with what is usual else.
    pub const fn new(budget: Duration) -> Self {
        Self { budget, fixed: Self::FIXED, most_rounds: Self::MOST_ROUNDS }
    }

    /// The memory part that a freeze is worth at once.
    fn target(self) -> Duration {
        self.budget.saturating_sub(self.fixed).max(self.budget / 10).max(Duration::from_millis(5))
    }
}

/// What a round was like that is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoundFacts {
    /// Pages that were sent: all that the process wrote since the round before.
    pub pages: u64,
    /// Bytes they took on the wire.
    pub bytes: u64,
    /// From its scan to the end of its sending, and of what was waited for before the next one.
    pub duration: Duration,
    /// Bytes per second that the link took while it was sent; 0 if that is not known.
    pub wire_rate: u64,
    /// CPU time that the processes had meanwhile, in microseconds per second: 1 000 000 is one whole CPU; 0 if that is not known.
    pub cpu_rate: u64,
    /// What shared memory, and files that are open for writing, will add to the freeze by their size, however little of them is written.
    pub beside: Duration,
}

/// What to do after a round.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// One more round.
    Another,
    /// Freeze now.
    Freeze {
        /// How long the process will stand still, the fixed part included.
        predicted: Duration,
    },
    /// One more round, and from now on no more CPU time than this for the processes.
    Throttle {
        /// Microseconds per second; each is lower than the one before.
        rate: u64,
    },
    /// The budget cannot be kept.
    GiveUp {
        /// Why, with the figures, and what to do.
        why: String,
    },
}

/// A round with less than this is not worth another: 4 MiB are read in a millisecond.
const FEW_PAGES: u64 = 1024;
/// What the first step of a throttle leaves of the CPU time that was used, in hundredths.
const FIRST_STEP: u64 = 80;
/// How many times the CPU time that was used is more than the last step leaves.
const LAST_STEP: u64 = 100;

/// How far processes are throttled. Both are microseconds of CPU time per second.
///
/// ```
/// use podferry_memory::convergence::Throttled;
///
/// assert_eq!(Throttled { used: 1_500_000, rate: 300_000 }.to_string(), "0.30 of the 1.50 CPUs that they used (20 %)");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Throttled {
    /// What they used before the first step.
    pub used: u64,
    /// What the last step leaves.
    pub rate: u64,
}

impl Throttled {
    /// Unthrottled, they used this much.
    const fn before(used: u64) -> Self {
        Self { used, rate: used }
    }

    /// The next lower step, if there is one.
    fn lower(self, least: u64) -> Option<Self> {
        let step = if self.rate == self.used { self.used / 100 * FIRST_STEP } else { self.rate / 2 };
        let rate = step.max(self.used / LAST_STEP).max(least);
        (rate < self.rate).then_some(Self { rate, ..self })
    }
}

impl fmt::Display for Throttled {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cpus = |rate: u64| real(rate) / 1e6;
        let percent = 100.0 * real(self.rate) / real(self.used).max(1.0);
        write!(out, "{:.2} of the {:.2} CPUs that they used ({percent:.0} %)", cpus(self.rate), cpus(self.used))
    }
}

/// Follows the rounds of one migration.
///
/// ```
/// use std::time::Duration;
/// use podferry_memory::convergence::{Convergence, Plan, RoundFacts, Verdict};
///
/// let mut convergence = Convergence::new(Plan::new(Duration::from_millis(300)));
/// let all = RoundFacts {
///     pages: 262_144, bytes: 1 << 30, duration: Duration::from_secs(1), wire_rate: 0, cpu_rate: 0, beside: Duration::ZERO,
/// };
/// assert_eq!(convergence.after_round(all), Verdict::Another);
/// let few = RoundFacts { pages: 2_000, bytes: 2_000 << 12, duration: Duration::from_millis(10), ..all };
/// assert!(matches!(convergence.after_round(few), Verdict::Freeze { .. }));
/// ```
#[derive(Clone, Debug)]
pub struct Convergence {
    plan: Plan,
    rounds: u32,
    /// Pages of the first round.
    all: f64,
    /// How long the last round was, in seconds.
    last: f64,
    /// What the last round left over by its rate alone; none before the second.
    by_rate: Option<f64>,
    /// What the last round left over.
    left: Option<f64>,
    /// Rounds in a row that left over hardly less than the one before.
    idle: u32,
    /// Pages per second.
    send_rate: f64,
    predicted: Duration,
    /// The least CPU time that can be set, in microseconds per second; none: nobody is to be throttled.
    least: Option<u64>,
    throttled: Option<Throttled>,
    /// What the next round sends was written before the last step.
    settling: bool,
}

/// What a freeze after a round would meet: pages, and pages per second.
#[derive(Clone, Copy, Debug)]
struct Outlook {
    left: f64,
    dirty_rate: f64,
    send_rate: f64,
    beside: Duration,
}

impl Outlook {
    fn memory_part(self) -> Duration {
        Duration::try_from_secs_f64(self.left / self.send_rate).unwrap_or(Duration::MAX).saturating_add(self.beside)
    }
}

impl Convergence {
    /// Before the first round.
    pub const fn new(plan: Plan) -> Self {
        Self {
            plan,
            rounds: 0,
            all: 0.0,
            last: 0.0,
            by_rate: None,
            left: None,
            idle: 0,
            send_rate: 0.0,
            predicted: Duration::ZERO,
            least: None,
            throttled: None,
            settling: false,
        }
    }

    /// Allows to throttle instead of giving up. `least` is the least CPU time that can be set, in microseconds per second.
    #[must_use]
    pub const fn with_throttle(mut self, least: u64) -> Self {
        self.least = Some(least);
        self
    }

    /// The processes cannot be throttled any further: from now on no [`Verdict::Throttle`] comes.
    pub const fn cannot_throttle(&mut self) {
        self.least = None;
    }

    /// How far the processes are to be throttled by what was said so far; none without a throttle.
    pub const fn throttled(&self) -> Option<Throttled> {
        self.throttled
    }

    /// How long the process would stand still if it were frozen after the last round, the fixed part included.
    pub const fn predicted(&self) -> Duration {
        self.predicted
    }

    /// Takes in a round that is over, and says what to do.
    pub fn after_round(&mut self, facts: RoundFacts) -> Verdict {
        let is_first = self.rounds == 0;
        let outlook = self.take_in(facts);
        let memory = outlook.memory_part();
        let predicted = memory.saturating_add(self.plan.fixed);
        self.predicted = predicted;
        let few = outlook.left < real(FEW_PAGES) || facts.pages < FEW_PAGES;
        let is_last = self.rounds >= self.plan.most_rounds;
        // The first round takes longer than any later one, since all of it is new.
        let hopeless = !is_first && facts.beside > self.plan.budget;
        let does_not_pay = is_last || hopeless || self.idle >= if self.throttled.is_some() { 1 } else { 2 };
        if few && memory <= self.plan.budget {
            Verdict::Freeze { predicted }
        } else if is_first && !does_not_pay {
            Verdict::Another
        } else if memory <= self.plan.target() || does_not_pay && memory <= self.plan.budget {
            Verdict::Freeze { predicted }
        } else if !does_not_pay {
            Verdict::Another
        } else if let Some(rate) = self.lower(facts.cpu_rate).filter(|_| !is_last && !hopeless) {
            self.throttled = Some(rate);
            (self.settling, self.idle) = (true, 0);
            Verdict::Throttle { rate: rate.rate }
        } else {
            Verdict::GiveUp { why: self.why(outlook, predicted) }
        }
    }

    /// The next step of the throttle, if one is allowed. `used` counts before the first.
    fn lower(&self, used: u64) -> Option<Throttled> {
        self.throttled.unwrap_or(Throttled::before(used)).lower(self.least?)
    }

    fn take_in(&mut self, facts: RoundFacts) -> Outlook {
        let pages = real(facts.pages);
        // A round cannot take no time at all; a clock may say so.
        let duration = facts.duration.as_secs_f64().max(1e-6);
        self.rounds += 1;
        if self.rounds == 1 {
            self.all = pages;
        }
        if facts.pages >= FEW_PAGES || self.send_rate == 0.0 {
            self.send_rate = send_rate(facts, duration);
        }
        let dirty_rate = if self.rounds == 1 { 0.0 } else { pages / self.last };
        let left = if self.rounds == 1 { pages } else { self.left_over(pages, dirty_rate, duration) };
        self.by_rate = (self.rounds > 1).then_some(dirty_rate * duration);
        self.last = duration;
        let enough = if self.throttled.is_some() { 0.5 } else { 0.9 };
        let shrank = self.left.is_none_or(|before| left <= enough * before);
        let settling = std::mem::take(&mut self.settling);
        self.idle = if shrank || settling { 0 } else { self.idle + 1 };
        // What all of the first round is compared with is no left over.
        self.left = (self.rounds > 1).then_some(left);
        Outlook { left, dirty_rate, send_rate: self.send_rate, beside: facts.beside }
    }

    fn left_over(&self, pages: f64, dirty_rate: f64, duration: f64) -> f64 {
        let by_rate = dirty_rate * duration;
        let left = if duration > self.last {
            by_rate
        } else {
            self.by_rate.map_or(pages, |promised| (by_rate * (pages / promised).max(1.0)).min(pages))
        };
        left.min(self.all.max(pages))
    }

    fn why(&self, outlook: Outlook, predicted: Duration) -> String {
        let mebibytes = |pages: f64| pages * real(PAGE_SIZE) / real(1 << 20);
        let beside = match outlook.beside.as_millis() {
            0 => String::new(),
            beside => format!(", {beside} ms for all shared memory and open files"),
        };
        let throttle = self.throttled.map_or(String::new(), |to| format!(", although they were throttled to {to}"));
        format!(
            "after {} rounds the processes still write {:.1} MiB/s of memory anew, and {:.1} MiB/s are sent{throttle}: {:.1} MiB would be left \
             for the freeze, which would take {} ms ({} ms of them without memory{beside}), with a budget of {} ms; give a larger \
             --downtime-budget, migrate when they are less busy, or migrate warm",
            self.rounds,
            mebibytes(outlook.dirty_rate),
            mebibytes(outlook.send_rate),
            mebibytes(outlook.left),
            predicted.as_millis(),
            self.plan.fixed.as_millis(),
            self.plan.budget.as_millis(),
        )
    }
}

/// Pages per second; never 0.
fn send_rate(facts: RoundFacts, duration: f64) -> f64 {
    let rate = if facts.wire_rate > 0 && facts.bytes > 0 {
        real(facts.wire_rate) * real(facts.pages) / real(facts.bytes)
    } else {
        real(facts.pages) / duration
    };
    rate.max(1.0)
}

#[expect(clippy::cast_precision_loss, reason = "estimates: pages and bytes up to 2^53 are exact")]
const fn real(number: u64) -> f64 {
    number as f64
}

#[cfg(test)]
mod tests;
