//! The protocol's numbers as the words that people and scripts see.

use podferry_common::{Failure, FailureCode};
pub(crate) use podferry_proto::json::{phase, strategy};
use podferry_proto::v1::{Decision, Migration, Phase, Problem};

/// Whether it failed behind its commit: neither node runs the workload.
pub(crate) fn is_lost(migration: &Migration) -> bool {
    migration.phase() == Phase::Failed && migration.decision() == Decision::Commit
}

/// Whether nothing more will happen to it.
pub(crate) fn has_ended(migration: &Migration) -> bool {
    matches!(migration.phase(), Phase::Succeeded | Phase::Failed | Phase::Cancelled)
}

/// What went wrong with a migration, if something did.
pub(crate) fn failure(migration: &Migration) -> Option<Failure> {
    if migration.phase() == Phase::Succeeded {
        return None;
    }
    match &migration.problem {
        Some(problem) => Some(from_problem(problem)),
        None if migration.reason.is_empty() => None,
        None => Some(Failure::new(FailureCode::Aborted, &migration.reason)),
    }
}

/// The failure that the protocol has in parts.
pub(crate) fn from_problem(problem: &Problem) -> Failure {
    let given = |text: &String| (!text.is_empty()).then(|| text.clone());
    Failure {
        code: FailureCode::from_name(&problem.code).unwrap_or(FailureCode::Internal),
        node: given(&problem.node),
        phase: given(&problem.phase),
        message: problem.message.clone(),
        criu_line: given(&problem.criu_line),
        remedy: given(&problem.remedy),
    }
}
