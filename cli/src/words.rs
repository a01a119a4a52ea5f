//! The protocol's numbers as the words that people and scripts see.

use podferry_common::{Failure, FailureCode};
use podferry_proto::v1::{Decision, Migration, Phase, Problem, Strategy};

/// `warm`, `live`, …; empty as long as it is still to be chosen.
pub(crate) fn strategy(migration: &Migration) -> String {
    if migration.strategy() == Strategy::Unspecified && Strategy::try_from(migration.strategy).is_ok() {
        return String::new();
    }
    lower(Strategy::try_from(migration.strategy).map_or("STRATEGY_UNKNOWN", |s| s.as_str_name()), "STRATEGY_")
}

/// `preflight`, `freeze`, `rolling_back`, …
pub(crate) fn phase(migration: &Migration) -> String {
    lower(Phase::try_from(migration.phase).map_or("PHASE_UNKNOWN", |p| p.as_str_name()), "PHASE_")
}

fn lower(name: &str, prefix: &str) -> String {
    name.strip_prefix(prefix).unwrap_or(name).to_ascii_lowercase()
}

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

fn from_problem(problem: &Problem) -> Failure {
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
