//! Exit codes: the outcome for scripts. `--help` and `docs/cli.md` list them.

use std::process::ExitCode;

use podferry_common::{Failure, FailureCode};
use podferry_proto::v1::{Migration, Phase};

use crate::words;

/// How the program ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Exit {
    /// Done.
    Done = 0,
    /// A migration failed and was rolled back, a drain was not complete, a check found something.
    Failed = 1,
    /// What was asked makes no sense.
    Usage = 2,
    /// Refused; nothing was touched.
    Refused = 3,
    /// No such thing.
    NotFound = 4,
    /// No answer from the coordinator.
    Unreachable = 5,
    /// The migration was cancelled.
    Cancelled = 6,
    /// A mistake in podferry.
    Internal = 7,
    /// A migration was committed, and then memory was lost: the workload runs nowhere.
    Lost = 8,
    /// Ctrl-C, as shells report it.
    Interrupted = 130,
}

impl Exit {
    /// The code for a request that was not carried out.
    pub(crate) fn of_refusal(failure: &Failure) -> Self {
        if is_of_a_node(failure) { Self::Refused } else { Self::of_code(failure.code) }
    }

    fn of_code(code: FailureCode) -> Self {
        match code {
            FailureCode::InvalidArgument => Self::Usage,
            FailureCode::NotFound => Self::NotFound,
            FailureCode::FailedPrecondition
            | FailureCode::AlreadyExists
            | FailureCode::ResourceExhausted
            | FailureCode::PermissionDenied
            | FailureCode::Unimplemented => Self::Refused,
            FailureCode::Unavailable | FailureCode::DeadlineExceeded => Self::Unreachable,
            FailureCode::Aborted => Self::Failed,
            FailureCode::Internal | FailureCode::DataLoss => Self::Internal,
        }
    }

    /// The code for a migration that ended. One that preflight refused never touched anything: that is a refusal.
    pub(crate) fn of_migration(migration: &Migration) -> Self {
        match migration.phase() {
            Phase::Succeeded => Self::Done,
            Phase::Cancelled => Self::Cancelled,
            _ if words::is_lost(migration) => Self::Lost,
            _ if refused_by_preflight(migration) => Self::Refused,
            _ => Self::Failed,
        }
    }
}

/// Whether the coordinator answered, and it is a node that cannot be reached: only the coordinator names one.
pub(crate) fn is_of_a_node(failure: &Failure) -> bool {
    failure.code == FailureCode::Unavailable && failure.node.is_some()
}

fn refused_by_preflight(migration: &Migration) -> bool {
    migration.problem.as_ref().is_some_and(|problem| {
        let refusal = FailureCode::from_name(&problem.code).map(Exit::of_code) == Some(Exit::Refused);
        refusal && problem.phase.eq_ignore_ascii_case("preflight")
    })
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}
