//! What follows from all records.

use jiff::Timestamp;
use podferry_common::{MigrationId, NodeName, WorkloadName};

use crate::migration::Decision;
use crate::store::{Conflict, Record};

/// Ended migrations that are listed, and objects of such that are kept of those that the coordinator makes. A list has to fit into
/// one message.
const KEPT: usize = 1000;

/// How long ago a migration has ended at least that is long over, in milliseconds.
const LONG_MS: f64 = 60_000.0;

/// Whether a migration has ended so long ago that everybody who watches its object knows of its end.
pub(super) fn is_long_over(record: &Record, now: Timestamp) -> bool {
    let age_ms = now.duration_since(record.created_at).as_secs_f64() * 1000.0;
    record.state.is_final() && age_ms > record.report.total_ms + LONG_MS
}

/// What stands against a new migration.
pub(super) fn conflict<'a>(all: impl Iterator<Item = &'a Record>, new: &Record, limit: usize) -> Option<Conflict> {
    let others: Vec<_> = all.filter(|other| other.id != new.id && !other.state.is_settled()).collect();
    if let Some(other) = others.iter().find(|other| other.workload == new.workload) {
        return Some(Conflict::Workload { id: other.id });
    }
    let parts = |node: &NodeName| others.iter().filter(|other| other.source == *node || other.target == *node).count();
    let full = [&new.source, &new.target].into_iter().find(|node| parts(node) >= limit);
    full.map(|node| Conflict::Node { node: node.clone(), limit })
}

/// All that are open and the newest of those that have ended, newest first. `all` come oldest first.
pub(super) fn newest<'a>(all: impl DoubleEndedIterator<Item = &'a Record>) -> Vec<Record> {
    let mut ended = 0;
    let kept = all.rev().filter(|record| {
        ended += usize::from(record.state.is_final());
        !record.state.is_final() || ended <= KEPT
    });
    kept.cloned().collect()
}

/// The oldest that have ended beyond those that are kept. `all` come oldest first, each with whether its object is the coordinator's.
pub(super) fn surplus<'a>(all: impl Iterator<Item = (&'a Record, bool)>) -> Vec<MigrationId> {
    let ended: Vec<_> =
        all.filter(|(record, ours)| *ours && record.state.is_final()).map(|(record, _)| record.id).collect();
    ended[..ended.len().saturating_sub(KEPT)].to_vec()
}

/// Where the last committed migration has put a workload.
pub(super) fn place<'a>(all: impl DoubleEndedIterator<Item = &'a Record>, workload: &WorkloadName) -> Option<NodeName> {
    let mut committed =
        all.rev().filter(|record| record.workload == *workload && record.state.decision() == Decision::Commit);
    committed.next().map(|record| record.target.clone())
}

#[cfg(test)]
mod tests {
    use podferry_common::{Failure, FailureCode};

    use super::*;
    use crate::migration::State;
    use crate::testing::record;

    fn ended(mut record: Record) -> Record {
        record.state = State::Aborted { why: Failure::new(FailureCode::Unavailable, "gone").into() };
        record
    }

    #[test]
    fn one_migration_a_pod_until_the_outcome_is_known() {
        let first = record("shop/cart", "a", "b");
        let second = record("shop/cart", "c", "d");
        assert_eq!(conflict([&first].into_iter(), &second, 9), Some(Conflict::Workload { id: first.id }));
        assert_eq!(conflict([&first].into_iter(), &first, 9), None, "it does not stand against itself");
        assert_eq!(conflict([&ended(first)].into_iter(), &second, 9), None);
    }

    #[test]
    fn a_node_takes_part_in_as_many_as_it_may() {
        let first = record("w1", "a", "b");
        let full = |node: &str| Some(Conflict::Node { node: node.parse().unwrap(), limit: 1 });
        assert_eq!(conflict([&first].into_iter(), &record("w2", "b", "c"), 1), full("b"));
        assert_eq!(conflict([&first].into_iter(), &record("w2", "c", "a"), 1), full("a"));
        assert_eq!(conflict([&first].into_iter(), &record("w2", "b", "c"), 2), None);
        assert_eq!(conflict([&ended(first)].into_iter(), &record("w2", "a", "b"), 1), None);
    }

    #[test]
    fn what_has_ended_just_now_is_not_long_over() {
        let mut record = ended(record("w", "a", "b"));
        record.report.total_ms = 3_600_000.0;
        let after = |seconds: i64| Timestamp::from_second(record.created_at.as_second() + seconds).unwrap();
        assert!(!is_long_over(&record, after(3600)) && is_long_over(&record, after(3700)));
        let open = Record { state: State::new(), ..record.clone() };
        assert!(!is_long_over(&open, after(100_000)));
    }

    #[test]
    fn the_last_commit_says_where_a_pod_is() {
        let mut all = [record("w", "a", "b"), record("w", "b", "c"), record("w", "b", "d"), record("v", "a", "e")];
        all[0].state = State::Completed;
        all[1].state = State::Releasing;
        all[3].state = State::Completed;
        let node = |workload: &str| place(all.iter(), &workload.parse().unwrap()).map(|node| node.to_string());
        assert_eq!((node("w").as_deref(), node("v").as_deref(), node("x")), (Some("c"), Some("e"), None));
    }

    #[test]
    fn only_the_coordinators_own_objects_and_only_old_ended_ones_are_surplus() {
        let mut all: Vec<_> = (0..KEPT + 5).map(|n| ended(record(&format!("w{n}"), "a", "b"))).collect();
        all[1].state = State::new();
        let ours = |n: usize| n != 2;
        let surplus = surplus(all.iter().enumerate().map(|(n, record)| (record, ours(n))));
        assert_eq!(surplus, [all[0].id, all[3].id, all[4].id]);
        let listed = newest(all.iter());
        assert_eq!((listed.len(), listed[0].id), (KEPT + 1, all[KEPT + 4].id), "one that is open is never left out");
    }
}
