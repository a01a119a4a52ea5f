//! What an earlier migration of the same workload says of the next one.

use podferry_common::FailureCode;
use serde::{Deserialize, Serialize};

use super::budget_ms;
use crate::migration::{Decision, Phase, State};
use crate::store::{Record, Round};

/// How the last migration went that copied memory while the workload ran.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Past {
    /// What was left at the end of the rounds would have taken so long in a freeze, in milliseconds.
    pub left_ms: f64,
    /// Bytes per second that its first round sent, before compression.
    pub rate: f64,
    /// Whether the rounds came below the downtime that was aimed at, with all processor time that the workload wanted.
    pub converged: bool,
}

/// What is to be expected of the next migration's rounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outlook {
    /// They come below the downtime that is aimed at.
    Converges,
    /// They do not.
    DoesNotConverge,
    /// Nothing that is known says it.
    Unknown,
}

impl Past {
    /// What a record says, if its rounds came to an end of their own: those of a migration that was cancelled or broke do not.
    pub fn of(record: &Record) -> Option<Self> {
        // Before the freeze, and before any throttle: what was left then is what the workload writes when it may.
        let at_full_speed = |round: &&Round| round.predicted_ms > 0.0 && round.cpu_limit <= 0.0;
        let last = record.report.rounds.iter().rev().find(at_full_speed)?;
        let first = record.report.rounds.first()?;
        let budget = budget_ms(record.downtime_budget_ms);
        let converged = if gave_up(&record.state) {
            false
        } else if record.state.decision() == Decision::Commit {
            last.predicted_ms <= budget
        } else {
            return None;
        };
        #[expect(clippy::cast_precision_loss, reason = "a rate")]
        let rate = first.raw_bytes as f64 / (first.duration_ms / 1e3).max(1e-3);
        Some(Self { left_ms: last.predicted_ms, rate, converged })
    }

    /// What is left when no more than `limit` bytes per second are sent; 0 is no limit.
    pub(super) fn left_ms_at(self, limit: u64) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "a rate")]
        let slower = if limit > 0 { (self.rate / limit as f64).max(1.0) } else { 1.0 };
        self.left_ms * slower
    }

    /// What it says of rounds that aim at this downtime under this limit.
    pub(super) fn outlook(self, budget_ms: f64, limit: u64) -> Outlook {
        if self.left_ms_at(limit) <= budget_ms {
            Outlook::Converges
        } else if self.converged {
            // They ended when they were below a larger budget, or had more bandwidth: further ones might have done.
            Outlook::Unknown
        } else {
            Outlook::DoesNotConverge
        }
    }
}

/// Whether the source gave up because memory was written faster than it was sent.
fn gave_up(state: &State) -> bool {
    state.failure().is_some_and(|failure| {
        failure.code == FailureCode::FailedPrecondition && failure.phase.as_deref() == Some(Phase::PreCopy.as_str())
    })
}

#[cfg(test)]
mod tests {
    use podferry_common::Failure;

    use super::*;
    use crate::strategy::Strategy;
    use crate::testing;

    fn round(predicted_ms: f64) -> Round {
        Round { raw_bytes: 100 << 20, duration_ms: 500.0, predicted_ms, ..Round::default() }
    }

    fn record(state: State, rounds: Vec<Round>) -> Record {
        let mut record = testing::record("cart", "a", "b");
        (record.strategy, record.state, record.report.rounds) = (Strategy::Live, state, rounds);
        record
    }

    fn given_up() -> State {
        let failure = Failure::new(FailureCode::FailedPrecondition, "it writes too fast").in_phase("precopy");
        State::Aborted { why: failure.into() }
    }

    #[test]
    fn rounds_that_came_to_an_end_of_their_own_say_what_comes_next() {
        let moved = Past::of(&record(State::Completed, vec![round(400.0), round(20.0), round(0.0)])).unwrap();
        assert_eq!((moved.left_ms, moved.converged), (20.0, true));
        assert_eq!(moved.outlook(100.0, 0), Outlook::Converges);
        assert_eq!(moved.outlook(10.0, 0), Outlook::Unknown);
        assert_eq!(moved.outlook(100.0, 10 << 20), Outlook::Unknown, "twenty times narrower");
        let lost = Past::of(&record(given_up(), vec![round(400.0), round(300.0)])).unwrap();
        assert_eq!((lost.left_ms, lost.converged), (300.0, false));
        assert_eq!(lost.outlook(100.0, 0), Outlook::DoesNotConverge);
        assert_eq!(lost.outlook(1000.0, 0), Outlook::Converges, "the budget is larger now");
    }

    #[test]
    fn what_says_nothing_of_convergence_is_not_asked() {
        let broken = State::Aborted { why: Failure::new(FailureCode::Unavailable, "gone").in_phase("precopy").into() };
        assert_eq!(Past::of(&record(broken, vec![round(400.0)])), None);
        assert_eq!(Past::of(&record(State::PreCopying, vec![round(400.0)])), None);
        assert_eq!(Past::of(&record(State::Completed, vec![round(0.0)])), None, "warm");
        let throttled = Round { cpu_limit: 0.5, ..round(20.0) };
        let slowed = Past::of(&record(State::Completed, vec![round(400.0), throttled])).unwrap();
        assert_eq!((slowed.left_ms, slowed.converged), (400.0, false), "throttled, it converges");
        let fetched = Past::of(&record(State::Completed, vec![round(400.0), round(350.0), round(0.0)]));
        assert!(!fetched.unwrap().converged, "hybrid fetched the rest");
    }
}
