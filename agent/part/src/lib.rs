//! What a part of a migration may do on its node: the rules alone, without clock, disk or processes.
//!
//! The agent keeps them (`podferry-agent`: its source's and target's part, its recovery, its dump worker), and so does the simulation of
//! whole migrations in `coordinator/tests/simulation`, which is what they are apart for.
//!
//! ```text
//!           ┌── Abort, by anybody ──────────────┐
//!  OPEN ────┤                                   ├──▶ ABORTED
//!           └─Seal─▶ SEALED ─┬─ Abort, decided ─┘
//!                            ├─ Release (source) ──▶ RELEASED
//!                            └─ Resume (target) ───▶ RESUMED
//! ```

mod worker;

use serde::{Deserialize, Serialize};

pub use worker::{Dump, Next, Order, Reason};

/// Which part of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// The container leaves this node.
    Source,
    /// The container comes to this node.
    Target,
}

/// Where a part stands, as far as it has to survive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    /// It rolls back by itself.
    Open,
    /// It waits for the decision.
    Sealed,
    /// The source is being destroyed, or is: committed.
    Released,
    /// The target is being set free, or is: committed.
    Resumed,
    /// Undone.
    Aborted,
}

impl Standing {
    /// The part has come to its end.
    pub fn is_last(self) -> bool {
        matches!(self, Self::Released | Self::Resumed | Self::Aborted)
    }
}

/// On whose word a part is undone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Authority {
    /// The part's own: a failure or a deadline. It does not undo what is sealed.
    Own,
    /// The coordinator's, which has written down that the migration is aborted.
    Coordinator,
}

/// What a part is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Roll back no more by yourself.
    Seal,
    /// Source: end the container.
    Release,
    /// Target: let the container run.
    Resume,
    /// Undo everything.
    Abort(Authority),
}

/// What a part says to a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum May {
    /// It is to be done.
    Take,
    /// It has been done: the answer is yes.
    Taken,
    /// Not as the part stands.
    Refuse,
}

/// Whether a part that stands so may take a step.
pub fn may(side: Side, standing: Standing, step: Step) -> May {
    match (step, standing) {
        (Step::Release, _) if side == Side::Target => May::Refuse,
        (Step::Resume, _) if side == Side::Source => May::Refuse,
        (Step::Seal | Step::Abort(_), Standing::Open)
        | (Step::Release | Step::Resume | Step::Abort(Authority::Coordinator), Standing::Sealed) => May::Take,
        (Step::Seal, Standing::Sealed)
        | (Step::Release, Standing::Released)
        | (Step::Resume, Standing::Resumed)
        | (Step::Abort(_), Standing::Aborted) => May::Taken,
        _ => May::Refuse,
    }
}

/// Whether a part that could not be undone is let be; otherwise it is tried again.
pub fn is_let_be(standing: Standing, authority: Authority) -> bool {
    standing.is_last() || (authority == Authority::Own && standing == Standing::Sealed)
}

/// What a restarted agent does with a part of its journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TakeUp {
    /// Undoes it, by its own authority.
    Undo,
    /// Finds out how it was decided.
    Settle,
    /// Nothing: it has ended.
    Nothing,
}

/// What a restarted agent does with a part that stood so. `worker_sealed`: its dump worker has sealed, and does so before the journal says it.
pub fn take_up(standing: Standing, worker_sealed: bool) -> TakeUp {
    match standing {
        Standing::Released | Standing::Resumed | Standing::Aborted => TakeUp::Nothing,
        Standing::Sealed => TakeUp::Settle,
        Standing::Open if worker_sealed => TakeUp::Settle,
        Standing::Open => TakeUp::Undo,
    }
}

/// How a migration was decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// The target's copy is the right one.
    Commit,
    /// The source's copy is the right one.
    Abort,
}

/// What a sealed part knows of the decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Known {
    /// Nobody could say, or it is not decided.
    Nothing,
    /// What the coordinator's record says.
    Recorded(Word),
    /// What an operator says, who takes the place of a record that is lost.
    Said(Word),
}

/// What a sealed part does by itself with what it knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settle {
    /// Undoes itself, by the coordinator's authority.
    Undo,
    /// Ends the source's container.
    Release,
    /// Lets the target's container run.
    Resume,
    /// Waits for the coordinator's call, and asks no more; an operator is still heard.
    Await,
    /// Asks again.
    AskAgain,
}

/// What a sealed part does by itself with what it knows. `keeps_memory`: a source that has memory which the target still needs.
pub fn settle(side: Side, known: Known, keeps_memory: bool) -> Settle {
    match (known, side) {
        (Known::Recorded(Word::Abort) | Known::Said(Word::Abort), _) => Settle::Undo,
        // What the target still needs of it only the coordinator knows, and the operator.
        (Known::Recorded(Word::Commit), Side::Source) if keeps_memory => Settle::Await,
        (Known::Recorded(Word::Commit) | Known::Said(Word::Commit), Side::Source) => Settle::Release,
        // The source must be dead before a target runs: only the coordinator knows that, and the operator.
        (Known::Nothing, _) | (Known::Recorded(Word::Commit), Side::Target) => Settle::AskAgain,
        (Known::Said(Word::Commit), Side::Target) => Settle::Resume,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STANDINGS: [Standing; 5] =
        [Standing::Open, Standing::Sealed, Standing::Released, Standing::Resumed, Standing::Aborted];

    fn taken(side: Side, step: Step) -> Vec<Standing> {
        STANDINGS.into_iter().filter(|standing| may(side, *standing, step) == May::Take).collect()
    }

    #[test]
    fn what_is_sealed_is_undone_on_the_coordinators_word_alone_and_what_is_committed_on_nobodys() {
        for side in [Side::Source, Side::Target] {
            assert_eq!(taken(side, Step::Abort(Authority::Own)), [Standing::Open]);
            assert_eq!(taken(side, Step::Abort(Authority::Coordinator)), [Standing::Open, Standing::Sealed]);
            assert_eq!(taken(side, Step::Seal), [Standing::Open]);
        }
        assert!(is_let_be(Standing::Sealed, Authority::Own) && !is_let_be(Standing::Sealed, Authority::Coordinator));
        assert!(!is_let_be(Standing::Open, Authority::Own));
    }

    #[test]
    fn only_what_is_sealed_is_released_or_resumed_and_each_on_its_side() {
        assert_eq!(taken(Side::Source, Step::Release), [Standing::Sealed]);
        assert_eq!(taken(Side::Target, Step::Resume), [Standing::Sealed]);
        for standing in STANDINGS {
            assert_eq!(may(Side::Target, standing, Step::Release), May::Refuse);
            assert_eq!(may(Side::Source, standing, Step::Resume), May::Refuse);
        }
    }

    #[test]
    fn a_repeated_step_gets_the_same_answer() {
        for (side, step, standing) in [
            (Side::Source, Step::Seal, Standing::Sealed),
            (Side::Source, Step::Release, Standing::Released),
            (Side::Target, Step::Resume, Standing::Resumed),
            (Side::Target, Step::Abort(Authority::Own), Standing::Aborted),
        ] {
            assert_eq!(may(side, standing, step), May::Taken, "{side:?} {step:?}");
        }
    }

    #[test]
    fn a_restarted_agent_undoes_what_is_open_unless_its_worker_has_sealed() {
        assert_eq!(take_up(Standing::Open, false), TakeUp::Undo);
        assert_eq!(take_up(Standing::Open, true), TakeUp::Settle);
        assert_eq!(take_up(Standing::Sealed, false), TakeUp::Settle);
        for ended in [Standing::Released, Standing::Resumed, Standing::Aborted] {
            assert_eq!(take_up(ended, true), TakeUp::Nothing);
        }
    }

    #[test]
    fn nothing_is_done_without_a_decision_and_a_target_waits_for_its_call() {
        for side in [Side::Source, Side::Target] {
            assert_eq!(settle(side, Known::Nothing, false), Settle::AskAgain);
            assert_eq!(settle(side, Known::Recorded(Word::Abort), true), Settle::Undo);
            assert_eq!(settle(side, Known::Said(Word::Abort), true), Settle::Undo);
        }
        assert_eq!(settle(Side::Source, Known::Recorded(Word::Commit), false), Settle::Release);
        assert_eq!(settle(Side::Source, Known::Recorded(Word::Commit), true), Settle::Await);
        assert_eq!(settle(Side::Source, Known::Said(Word::Commit), true), Settle::Release);
        assert_eq!(settle(Side::Target, Known::Recorded(Word::Commit), false), Settle::AskAgain);
        assert_eq!(settle(Side::Target, Known::Said(Word::Commit), false), Settle::Resume);
    }
}
