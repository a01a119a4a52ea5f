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
//! memory part  M(k) = L(k) / S                                              of the freeze
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
//!    *freeze* when M(k) ≤ budget, else *give up*.
//! 5. *Another*.
//!
//! A freeze that rule 4 allows may exceed the budget by the fixed part: the alternative is one that stands still for all its
//! memory.

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
    /// Measured for a single process: about 15 ms of dump and 45 ms of restore (`docs/performance.md`).
    pub const FIXED: Duration = Duration::from_millis(60);
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
    /// From its scan to the end of its sending.
    pub duration: Duration,
    /// Bytes per second that the link took while it was sent; 0 if that is not known.
    pub wire_rate: u64,
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
    /// The budget cannot be kept.
    GiveUp {
        /// Why, with the figures, and what to do.
        why: String,
    },
}

/// A round with less than this is not worth another: 4 MiB are read in a millisecond.
const FEW_PAGES: u64 = 1024;

/// Follows the rounds of one migration.
///
/// ```
/// use std::time::Duration;
/// use podferry_memory::convergence::{Convergence, Plan, RoundFacts, Verdict};
///
/// let mut convergence = Convergence::new(Plan::new(Duration::from_millis(300)));
/// let all = RoundFacts { pages: 262_144, bytes: 1 << 30, duration: Duration::from_secs(1), wire_rate: 0 };
/// assert_eq!(convergence.after_round(all), Verdict::Another);
/// let few = RoundFacts { pages: 2_000, bytes: 2_000 << 12, duration: Duration::from_millis(10), wire_rate: 0 };
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
}

/// What a freeze after a round would meet: pages, and pages per second.
#[derive(Clone, Copy, Debug)]
struct Outlook {
    left: f64,
    dirty_rate: f64,
    send_rate: f64,
}

impl Outlook {
    fn memory_part(self) -> Duration {
        Duration::try_from_secs_f64(self.left / self.send_rate).unwrap_or(Duration::MAX)
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
        }
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
        let does_not_pay = self.idle >= 2 || self.rounds >= self.plan.most_rounds;
        if few && memory <= self.plan.budget {
            Verdict::Freeze { predicted }
        } else if is_first && !does_not_pay {
            Verdict::Another
        } else if memory <= self.plan.target() || does_not_pay && memory <= self.plan.budget {
            Verdict::Freeze { predicted }
        } else if does_not_pay {
            Verdict::GiveUp { why: self.why(outlook, predicted) }
        } else {
            Verdict::Another
        }
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
        let shrank = self.left.is_none_or(|before| left <= 0.9 * before);
        self.idle = if shrank { 0 } else { self.idle + 1 };
        // What all of the first round is compared with is no left over.
        self.left = (self.rounds > 1).then_some(left);
        Outlook { left, dirty_rate, send_rate: self.send_rate }
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
        format!(
            "after {} rounds the processes still write {:.1} MiB/s of memory anew, and {:.1} MiB/s are sent: {:.1} MiB would be left \
             for the freeze, which would take {} ms ({} ms of them without memory), with a budget of {} ms; give a larger \
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
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// 1 GiB/s.
    const SENT_PER_SECOND: u64 = 262_144;

    fn budget(ms: u64) -> Plan {
        Plan::new(Duration::from_millis(ms))
    }

    fn round(pages: u64, rate: u64) -> RoundFacts {
        let duration = Duration::from_secs_f64(real(pages) / real(rate) + 0.0005);
        RoundFacts { pages, bytes: pages * PAGE_SIZE, duration, wire_rate: rate * PAGE_SIZE }
    }

    /// A process with so many pages that writes so many per second, sent at this rate. Gives the rounds and the last verdict.
    fn migrate(plan: Plan, all: u64, dirty: u64, rate: u64) -> (u32, Verdict) {
        let mut convergence = Convergence::new(plan);
        let mut pages = all;
        for number in 1.. {
            let facts = round(pages, rate);
            let verdict = convergence.after_round(facts);
            if verdict != Verdict::Another {
                return (number, verdict);
            }
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "pages of a test")]
            let written = (real(dirty) * facts.duration.as_secs_f64()) as u64;
            pages = written.min(all);
        }
        unreachable!("the rounds are limited")
    }

    #[test]
    fn an_idle_process_is_frozen_after_its_second_round() {
        let (rounds, verdict) = migrate(budget(300), SENT_PER_SECOND, 100, SENT_PER_SECOND);
        let Verdict::Freeze { predicted } = verdict else { panic!("{verdict:?}") };
        assert_eq!(rounds, 2);
        assert!(predicted >= Plan::FIXED && predicted < Duration::from_millis(65), "{predicted:?}");
    }

    #[test]
    fn a_small_process_is_frozen_after_its_first_round() {
        assert_eq!(migrate(budget(100), 1000, 500_000, SENT_PER_SECOND).0, 1);
    }

    /// 4 MiB in four seconds.
    #[test]
    fn few_pages_on_a_slow_link_are_not_few() {
        let (_, verdict) = migrate(budget(100), 1000, 1_000_000, 256);
        assert!(matches!(verdict, Verdict::GiveUp { .. }), "{verdict:?}");
    }

    #[test]
    fn one_that_writes_at_half_the_rate_converges() {
        let (rounds, verdict) = migrate(budget(100), SENT_PER_SECOND, SENT_PER_SECOND / 2, SENT_PER_SECOND);
        let Verdict::Freeze { predicted } = verdict else { panic!("{verdict:?}") };
        assert!((3..8).contains(&rounds) && predicted <= Duration::from_millis(100), "{rounds}: {predicted:?}");
    }

    #[test]
    fn one_that_writes_faster_than_is_sent_is_given_up_with_the_figures() {
        let (rounds, verdict) = migrate(budget(200), SENT_PER_SECOND, 2 * SENT_PER_SECOND, SENT_PER_SECOND);
        let Verdict::GiveUp { why } = verdict else { panic!("{verdict:?}") };
        assert!(rounds <= 5, "{rounds}");
        for part in
            ["1024.0 MiB/s are sent", "1024.0 MiB would be left", "budget of 200 ms", "--downtime-budget", "warm"]
        {
            assert!(why.contains(part), "{part}: {why}");
        }
    }

    #[test]
    fn a_working_set_that_fits_the_budget_is_frozen_though_it_never_shrinks() {
        // 64 MiB that are written all the time: 62 ms at this rate; the target of the budget of 100 ms is 40 ms.
        let mut convergence = Convergence::new(budget(100));
        assert_eq!(convergence.after_round(round(SENT_PER_SECOND, SENT_PER_SECOND)), Verdict::Another);
        let mut rounds = 1;
        let verdict = loop {
            rounds += 1;
            match convergence.after_round(round(16_384, SENT_PER_SECOND)) {
                Verdict::Another => {}
                verdict => break verdict,
            }
        };
        let Verdict::Freeze { predicted } = verdict else { panic!("{verdict:?}") };
        assert!(rounds <= 5 && predicted > Duration::from_millis(100), "{rounds}: {predicted:?}");
    }

    #[test]
    fn a_budget_below_the_fixed_part_leaves_a_tenth_and_five_milliseconds() {
        assert_eq!(budget(40).target(), Duration::from_millis(5));
        assert_eq!(budget(62).target(), Duration::from_micros(6200));
        assert_eq!(budget(300).target(), Duration::from_millis(240));
    }

    #[test]
    fn there_are_no_more_rounds_than_planned() {
        let plan = Plan { most_rounds: 1, ..budget(100) };
        let (rounds, verdict) = migrate(plan, SENT_PER_SECOND, 1, SENT_PER_SECOND);
        assert!(rounds == 1 && matches!(verdict, Verdict::GiveUp { .. }), "{verdict:?}");
    }

    fn facts() -> impl Strategy<Value = RoundFacts> {
        (0_u64..1 << 40, 0_u64..1 << 52, 0_u64..1 << 40, prop_oneof![Just(0), 0_u64..1 << 40]).prop_map(
            |(pages, bytes, nanoseconds, wire_rate)| RoundFacts {
                pages,
                bytes,
                duration: Duration::from_nanos(nanoseconds),
                wire_rate,
            },
        )
    }

    proptest! {
        #[test]
        fn whatever_the_rounds_are_it_ends_and_keeps_to_the_budget(
            all in prop::collection::vec(facts(), 40), ms in 0_u64..10_000, fixed in 0_u64..1000,
        ) {
            let plan = Plan { budget: Duration::from_millis(ms), fixed: Duration::from_millis(fixed), most_rounds: 30 };
            let mut convergence = Convergence::new(plan);
            let verdicts: Vec<Verdict> = all.into_iter().map(|facts| convergence.after_round(facts)).collect();
            let end = verdicts.iter().position(|verdict| *verdict != Verdict::Another);
            prop_assert!(end.is_some_and(|end| end < 30));
            for verdict in verdicts {
                if let Verdict::Freeze { predicted } = verdict {
                    let most = plan.budget.max(Duration::from_millis(5)) + plan.fixed;
                    prop_assert!(plan.fixed <= predicted && predicted <= most, "{:?}", predicted);
                }
            }
        }

        #[test]
        fn a_larger_budget_never_takes_more_rounds(
            all in 1_u64..1 << 22, dirty in 0_u64..1 << 20, rate in 1000_u64..1 << 20, ms in 1_u64..2000, more in 0_u64..2000,
        ) {
            let (small, large) = (migrate(budget(ms), all, dirty, rate), migrate(budget(ms + more), all, dirty, rate));
            prop_assert!(large.0 <= small.0, "{:?} {:?}", small, large);
            if matches!(small.1, Verdict::Freeze { .. }) {
                prop_assert!(matches!(large.1, Verdict::Freeze { .. }), "{:?}", large);
            }
        }

        #[test]
        fn what_is_written_at_less_than_half_the_rate_is_always_frozen_within_a_second(
            all in 1_u64..1 << 22, rate in 100_000_u64..1 << 20, percent in 0_u64..50,
        ) {
            let (_, verdict) = migrate(budget(1000), all, rate * percent / 100, rate);
            prop_assert!(matches!(verdict, Verdict::Freeze { .. }), "{:?}", verdict);
        }
    }
}
