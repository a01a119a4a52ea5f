//! What happens to an evacuation. Pure: no clock, network or disk.

use jiff::Timestamp;
use podferry_common::{Failure, FailureCode, MigrationId, NodeName, WorkloadName};
use serde::{Deserialize, Serialize};

use super::record::{Entry, Evacuation, Hurried, Phase, Standing};
use crate::migration::{self, Decision};
use crate::store::Record;
use crate::strategy::Strategy;

/// How many targets are tried for a workload that their preflight refuses.
const MAX_TARGETS: usize = 3;

/// How an evacuation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Nothing that runs is left on the node.
    Complete,
    /// Something is left, was lost, or it is not known any more what is there.
    Incomplete,
    /// It was stopped on request.
    Cancelled,
}

/// A workload that is on the node, or on its way from or to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Its name.
    pub workload: WorkloadName,
    /// By the inventory.
    pub priority: i32,
    /// Bytes of its memory on the node.
    pub memory_bytes: u64,
    /// Whether it runs.
    pub runs: bool,
    /// Whether the last committed migration has put it on another node.
    pub placed_elsewhere: bool,
    /// The migration that it is part of.
    pub migration: Option<MigrationId>,
}

/// How a migration ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Ending {
    /// Which.
    pub migration: MigrationId,
    /// Where it went.
    pub target: NodeName,
    /// The failure where it was undone or lost its workload; none where it succeeded.
    pub failure: Option<Failure>,
    /// Whether it had been committed.
    pub committed: bool,
    /// Milliseconds.
    pub downtime_ms: f64,
    /// Milliseconds.
    pub total_ms: f64,
}

impl Ending {
    /// By the record of a migration that has an outcome.
    pub fn of(record: &Record) -> Self {
        Self {
            migration: record.id,
            target: record.target.clone(),
            failure: record.state.failure().cloned(),
            committed: record.state.decision() == Decision::Commit,
            downtime_ms: record.report.downtime_ms,
            total_ms: record.report.total_ms,
        }
    }
}

/// What happened.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// This is on the node now, or on its way from or to it.
    Seen(Vec<Found>),
    /// A workload that waited was gone, and no migration that is known took it away.
    Gone(WorkloadName),
    /// A migration has begun.
    Begun(WorkloadName, MigrationId),
    /// It was not begun.
    Refused(WorkloadName, Failure),
    /// The migration that a workload was part of is not recorded any more.
    Forgotten(WorkloadName, MigrationId),
    /// The migration that a workload was part of has an outcome.
    Ended(WorkloadName, Ending),
    /// It is time to move a workload in another way than was asked for.
    Hurry(WorkloadName, Hurried),
    /// It cannot be expected any more that a workload is away in time; none: it can again.
    Late(WorkloadName, Option<String>),
    /// The deadline is behind us.
    DeadlinePassed,
    /// The deadline is another one, or there is none any more.
    DeadlineMoved(Option<Timestamp>),
    /// The node is marked unschedulable.
    Cordoned,
    /// So many workloads that have left the node have connections that still need it.
    Homes(u32),
    /// The node has not said for too long what is on it.
    LostSight(Failure),
    /// Somebody asked to stop.
    CancelRequested(String),
    /// The coordinator was started again.
    Restarted,
    /// Nothing is left to be done.
    Done(Timestamp),
}

impl Evacuation {
    /// Takes an event in. What belongs to a workload that is not, or no longer, concerned changes nothing.
    pub fn apply(&mut self, event: Event) {
        if self.has_ended() {
            return;
        }
        match event {
            Event::Seen(found) => found.into_iter().for_each(|found| self.seen(found)),
            Event::Gone(workload) => {
                self.settle(&workload, Standing::Elsewhere, |standing| *standing == Standing::Waiting);
            }
            Event::Begun(workload, migration) => self.begun(&workload, migration),
            Event::Refused(workload, failure) => self.refused(&workload, failure),
            Event::Forgotten(workload, migration) => {
                if self.entry(&workload).is_some_and(|entry| entry.migration() == Some(migration)) {
                    self.wait_again(&workload);
                }
            }
            Event::Ended(workload, ending) => self.ended(&workload, ending),
            Event::Hurry(workload, hurried) => self.change(&workload, |entry| entry.hurried = Some(hurried)),
            Event::Late(workload, late) => self.change(&workload, |entry| entry.late = late),
            Event::DeadlinePassed => self.deadline_passed(),
            Event::DeadlineMoved(deadline) => self.terms.deadline_at = deadline,
            Event::Cordoned => self.cordoned = true,
            Event::Homes(count) => self.homes = count,
            Event::LostSight(failure) => self.lost_sight(&failure),
            Event::CancelRequested(by) => self.cancel(by),
            Event::Restarted => self.restarted(),
            Event::Done(at) => self.done(at),
        }
    }

    fn find(&mut self, workload: &WorkloadName) -> Option<&mut Entry> {
        self.entries.iter_mut().find(|entry| entry.workload == *workload)
    }

    fn change(&mut self, workload: &WorkloadName, change: impl FnOnce(&mut Entry)) {
        if let Some(entry) = self.find(workload) {
            change(entry);
        }
    }

    /// Gives a workload its outcome, if it is where that can come from.
    fn settle(&mut self, workload: &WorkloadName, standing: Standing, from: impl FnOnce(&Standing) -> bool) {
        let outcome = self.outcomes + 1;
        let Some(entry) = self.find(workload).filter(|entry| from(&entry.standing)) else { return };
        entry.standing = standing;
        entry.outcome = outcome;
        entry.waits_for = None;
        self.outcomes = outcome;
    }

    fn seen(&mut self, found: Found) {
        let running = self.phase == Phase::Running;
        let priority = self.terms.priorities.get(&found.workload).copied().unwrap_or(found.priority);
        if self.entry(&found.workload).is_none() {
            // What has stopped and was left behind by a migration is no workload, and a cancelled evacuation meets nobody new.
            let remains = !found.runs && found.placed_elsewhere && found.migration.is_none();
            if remains || !running {
                return;
            }
            self.entries.push(Entry::new(found.workload.clone(), priority, found.memory_bytes));
        }
        let Some(entry) = self.find(&found.workload) else { return };
        entry.priority = priority;
        // During a migration it says what one of the copies has.
        if found.migration.is_none() {
            entry.memory_bytes = found.memory_bytes;
        }
        let back = matches!(entry.standing, Standing::Moved | Standing::Elsewhere | Standing::NotRunning);
        match (&entry.standing, found.migration) {
            (Standing::Waiting, Some(migration)) => entry.follow(migration, false),
            (Standing::Waiting, None) if !found.runs => {
                let workload = found.workload;
                self.settle(&workload, Standing::NotRunning, |_| true);
            }
            // A copy that is being taken away is no workload.
            _ if back && running && found.runs && !found.placed_elsewhere => entry.standing = Standing::Waiting,
            _ if back && running && found.migration.is_some() => {
                if let Some(migration) = found.migration.filter(|migration| !entry.migrations.contains(migration)) {
                    entry.follow(migration, false);
                }
            }
            _ => {}
        }
    }

    fn begun(&mut self, workload: &WorkloadName, migration: MigrationId) {
        self.change(workload, |entry| entry.follow(migration, true));
    }

    /// What is refused because limits are reached is tried again; the rest stays.
    fn refused(&mut self, workload: &WorkloadName, failure: Failure) {
        if failure.code == FailureCode::ResourceExhausted {
            self.change(workload, |entry| entry.waits_for = Some(failure.message));
            return;
        }
        // Where the others said that they cannot take it, what the last one that could have said is why.
        let placement = failure.code == FailureCode::FailedPrecondition;
        let said = self.entry(workload).and_then(|entry| entry.refusal.clone()).filter(|_| placement);
        let failure = said.unwrap_or(failure);
        self.settle(workload, Standing::LeftBehind { failure }, |standing| *standing == Standing::Waiting);
    }

    fn ended(&mut self, workload: &WorkloadName, ending: Ending) {
        let node = self.node.clone();
        let arrival = ending.target == node;
        let (cancelling, auto) = (self.phase != Phase::Running, self.terms.strategy.is_none());
        let Some(entry) = self.find(workload) else { return };
        let (ours, interrupted) = match entry.standing {
            Standing::Moving { migration, ours, interrupted } if migration == ending.migration => (ours, interrupted),
            // It was begun in a moment that is not on disk, and is known from its own record.
            Standing::Waiting => (true, true),
            _ => return,
        };
        if !entry.migrations.contains(&ending.migration) {
            entry.migrations.push(ending.migration);
        }
        let Some(failure) = ending.failure else {
            if arrival {
                return self.wait_again(workload);
            }
            entry.target = Some(ending.target);
            (entry.downtime_ms, entry.total_ms) = (ending.downtime_ms, ending.total_ms);
            return self.settle(workload, Standing::Moved, |_| true);
        };
        if ending.committed {
            return self.settle(workload, Standing::Lost, |_| true);
        }
        if arrival {
            return self.settle(workload, Standing::Elsewhere, |_| true);
        }
        let undone_by_restart = interrupted && failure.code == FailureCode::Aborted;
        if !cancelling && (!ours || undone_by_restart) {
            return self.wait_again(workload);
        }
        if !cancelling && refused_by_target(&failure, &node) && entry.refused_by.len() + 1 < MAX_TARGETS {
            entry.refused_by.push(ending.target);
            entry.refusal = Some(failure);
            return self.wait_again(workload);
        }
        if !cancelling && auto && entry.hurried.is_none() && gave_up(&failure) {
            entry.hurried = Some(Hurried { strategy: Strategy::Warm, why: failure.message });
            return self.wait_again(workload);
        }
        self.settle(workload, Standing::LeftBehind { failure }, |_| true);
    }

    fn wait_again(&mut self, workload: &WorkloadName) {
        self.change(workload, |entry| entry.standing = Standing::Waiting);
        if let Phase::Cancelling { by } = &self.phase {
            let failure = stopped(by);
            self.settle(workload, Standing::LeftBehind { failure }, |_| true);
        }
    }

    /// Every one that waits is left behind, each for its reason.
    fn leave_waiting(&mut self, why: impl Fn(&Entry) -> Failure) {
        let waiting = self.entries.iter().filter(|entry| entry.standing == Standing::Waiting);
        let left: Vec<_> = waiting.map(|entry| (entry.workload.clone(), why(entry))).collect();
        for (workload, failure) in left {
            self.settle(&workload, Standing::LeftBehind { failure }, |_| true);
        }
    }

    fn deadline_passed(&mut self) {
        let Some(deadline) = self.terms.deadline_at else { return };
        let begun = self.created_at;
        let seconds = deadline.duration_since(begun).as_secs();
        self.leave_waiting(|entry| {
            let message = format!("{} was not begun: the deadline of {seconds} s has passed", entry.workload);
            Failure::new(FailureCode::DeadlineExceeded, message).remedy("move it by itself, if there is time")
        });
    }

    fn lost_sight(&mut self, failure: &Failure) {
        self.trouble = Some(failure.clone());
        self.homes = 0;
        self.leave_waiting(|_| failure.clone());
    }

    fn cancel(&mut self, by: String) {
        self.leave_waiting(|_| stopped(&by));
        self.phase = Phase::Cancelling { by };
    }

    fn restarted(&mut self) {
        for entry in &mut self.entries {
            if let Standing::Moving { interrupted, .. } = &mut entry.standing {
                *interrupted = true;
            }
        }
    }

    fn done(&mut self, at: Timestamp) {
        let cancelled = matches!(self.phase, Phase::Cancelling { .. });
        // Only migrations of others are still under way when one was cancelled: they go on by themselves.
        if let Phase::Cancelling { by } = &self.phase {
            let failure = stopped(by);
            let followed = self.entries.iter().filter(|entry| !entry.standing.is_settled());
            let followed: Vec<_> = followed.map(|entry| entry.workload.clone()).collect();
            for workload in followed {
                self.settle(&workload, Standing::LeftBehind { failure: failure.clone() }, |_| true);
            }
        }
        let bad = |entry: &Entry| matches!(entry.standing, Standing::LeftBehind { .. } | Standing::Lost);
        let outcome = if cancelled {
            Outcome::Cancelled
        } else if self.trouble.is_some() || self.entries.iter().any(bad) {
            Outcome::Incomplete
        } else {
            Outcome::Complete
        };
        self.phase = Phase::Ended(outcome);
        self.ended_at = Some(at);
    }
}

impl Entry {
    fn follow(&mut self, migration: MigrationId, ours: bool) {
        if !self.migrations.contains(&migration) {
            self.migrations.push(migration);
        }
        self.standing = Standing::Moving { migration, ours, interrupted: false };
        (self.waits_for, self.late) = (None, None);
    }
}

fn stopped(by: &str) -> Failure {
    Failure::new(FailureCode::Aborted, format!("the evacuation was cancelled by {by}"))
}

/// Whether preflight refused the workload, and not because of the node that it is on: another target may take it.
fn refused_by_target(failure: &Failure, source: &NodeName) -> bool {
    failure.phase.as_deref() == Some(migration::Phase::Preflight.as_str())
        && failure.code != FailureCode::Aborted
        && failure.node.as_deref() != Some(source.as_str())
}

/// Whether the workload was left alone because it writes memory faster than it is sent. Somebody who migrates it is asked what to do; a
/// node that is to be empty does not wait until it writes less.
fn gave_up(failure: &Failure) -> bool {
    failure.code == FailureCode::FailedPrecondition
        && failure.phase.as_deref() == Some(migration::Phase::PreCopy.as_str())
}

#[cfg(test)]
mod tests {
    use podferry_common::identity::Peer;
    use podferry_proto::v1;

    use super::*;
    use crate::evacuation::Terms;

    fn name(text: &str) -> WorkloadName {
        text.parse().unwrap()
    }

    fn found(text: &str) -> Found {
        Found {
            workload: name(text),
            priority: 0,
            memory_bytes: 1 << 20,
            runs: true,
            placed_elsewhere: false,
            migration: None,
        }
    }

    fn of(found: impl IntoIterator<Item = Found>) -> Evacuation {
        let mut evacuation = Evacuation::new("n1".parse().unwrap(), Terms::default(), Peer::client("ada").unwrap());
        evacuation.apply(Event::Seen(found.into_iter().collect()));
        evacuation
    }

    fn ending(migration: MigrationId, target: &str, failure: Option<Failure>) -> Ending {
        let (committed, downtime_ms, total_ms) = (failure.is_none(), 10.0, 100.0);
        Ending { migration, target: target.parse().unwrap(), failure, committed, downtime_ms, total_ms }
    }

    fn aborted() -> Failure {
        Failure::new(FailureCode::Aborted, "the coordinator was restarted before the commit")
    }

    fn standing<'a>(evacuation: &'a Evacuation, workload: &str) -> &'a Standing {
        &evacuation.entry(&name(workload)).unwrap().standing
    }

    /// One workload whose migration has begun.
    fn moving() -> (Evacuation, MigrationId) {
        let (mut evacuation, id) = (of([found("redis")]), MigrationId::new());
        evacuation.apply(Event::Begun(name("redis"), id));
        (evacuation, id)
    }

    #[test]
    fn a_workload_that_is_moved_is_shown_with_where_and_what_it_cost() {
        let (mut evacuation, id) = moving();
        evacuation.apply(Event::Ended(name("redis"), ending(id, "n2", None)));
        evacuation.apply(Event::Done(Timestamp::UNIX_EPOCH));
        assert_eq!(evacuation.phase, Phase::Ended(Outcome::Complete));
        let wire = evacuation.to_wire();
        assert_eq!((wire.moved, wire.remaining, wire.failed), (1, 0, 0));
        let one = &wire.workloads[0];
        assert_eq!((one.state(), one.target.as_str()), (v1::EvacuatedState::Moved, "n2"));
        assert_eq!(one.migration_ids, [id.to_string()]);
        assert!(one.downtime_ms > 9.0 && one.total_ms > 99.0);
    }

    #[test]
    fn what_a_restart_of_the_coordinator_undid_is_begun_again_and_another_failure_is_not() {
        let (mut evacuation, id) = moving();
        evacuation.apply(Event::Restarted);
        evacuation.apply(Event::Ended(name("redis"), ending(id, "n2", Some(aborted()))));
        assert_eq!(*standing(&evacuation, "redis"), Standing::Waiting);
        let (mut evacuation, id) = moving();
        evacuation.apply(Event::Ended(name("redis"), ending(id, "n2", Some(aborted()))));
        assert!(matches!(standing(&evacuation, "redis"), Standing::LeftBehind { .. }), "somebody cancelled it");
        evacuation.apply(Event::Done(Timestamp::UNIX_EPOCH));
        assert_eq!(evacuation.phase, Phase::Ended(Outcome::Incomplete));
    }

    #[test]
    fn what_auto_gives_up_because_it_writes_too_much_is_moved_warm_once() {
        let gave_up = Failure::new(FailureCode::FailedPrecondition, "it writes too fast").in_phase("precopy");
        let (mut evacuation, id) = moving();
        evacuation.apply(Event::Ended(name("redis"), ending(id, "n2", Some(gave_up.clone()))));
        let entry = evacuation.entry(&name("redis")).unwrap();
        assert_eq!(entry.standing, Standing::Waiting);
        assert_eq!(entry.hurried.as_ref().unwrap().strategy, Strategy::Warm);
        let second = MigrationId::new();
        evacuation.apply(Event::Begun(name("redis"), second));
        evacuation.apply(Event::Ended(name("redis"), ending(second, "n2", Some(gave_up.clone()))));
        assert!(matches!(standing(&evacuation, "redis"), Standing::LeftBehind { .. }));
        // Who asks for live gets that or nothing.
        let (mut evacuation, id) = moving();
        evacuation.terms.strategy = Some(Strategy::Live);
        evacuation.apply(Event::Ended(name("redis"), ending(id, "n2", Some(gave_up))));
        assert!(matches!(standing(&evacuation, "redis"), Standing::LeftBehind { .. }));
    }

    #[test]
    fn what_arrives_is_moved_on_and_what_stays_away_is_no_ones_failure() {
        let (first, second) = (MigrationId::new(), MigrationId::new());
        let arriving = |text, migration| Found { migration: Some(migration), ..found(text) };
        let mut evacuation = of([arriving("late", first), arriving("shy", second)]);
        evacuation.apply(Event::Ended(name("late"), ending(first, "n1", None)));
        evacuation.apply(Event::Ended(name("shy"), ending(second, "n1", Some(aborted()))));
        assert_eq!(*standing(&evacuation, "late"), Standing::Waiting);
        assert_eq!(*standing(&evacuation, "shy"), Standing::Elsewhere);
    }

    #[test]
    fn a_target_that_refuses_in_preflight_is_not_asked_again_and_three_are_enough() {
        let refused =
            |node: &str| Failure::new(FailureCode::FailedPrecondition, "no bundle").on(node).in_phase("preflight");
        let mut evacuation = of([found("redis")]);
        for (tried, target) in (1..).zip(["n2", "n3", "n4"]) {
            assert_eq!(*standing(&evacuation, "redis"), Standing::Waiting);
            let id = MigrationId::new();
            evacuation.apply(Event::Begun(name("redis"), id));
            evacuation.apply(Event::Ended(name("redis"), ending(id, target, Some(refused(target)))));
            assert_eq!(evacuation.entry(&name("redis")).unwrap().migrations.len(), tried);
        }
        assert_eq!(*standing(&evacuation, "redis"), Standing::LeftBehind { failure: refused("n4") });
        // What is wrong with the workload where it is, is wrong wherever it goes.
        let (mut evacuation, id) = moving();
        evacuation.apply(Event::Ended(name("redis"), ending(id, "n2", Some(refused("n1")))));
        assert_eq!(*standing(&evacuation, "redis"), Standing::LeftBehind { failure: refused("n1") });
        // When no other one is left, the reason of the last one counts.
        let (mut evacuation, id) = moving();
        evacuation.apply(Event::Ended(name("redis"), ending(id, "n2", Some(refused("n2")))));
        let nowhere = Failure::new(FailureCode::FailedPrecondition, "no node can take the workload");
        evacuation.apply(Event::Refused(name("redis"), nowhere));
        assert_eq!(*standing(&evacuation, "redis"), Standing::LeftBehind { failure: refused("n2") });
    }

    #[test]
    fn what_another_ones_migration_left_is_moved() {
        let id = MigrationId::new();
        let mut evacuation = of([Found { migration: Some(id), ..found("busy") }]);
        evacuation.apply(Event::Ended(name("busy"), ending(id, "n2", Some(aborted()))));
        assert_eq!(*standing(&evacuation, "busy"), Standing::Waiting);
    }

    #[test]
    fn a_copy_that_is_being_taken_away_is_not_moved_again_and_one_that_came_back_is() {
        let (mut evacuation, id) = moving();
        evacuation.apply(Event::Ended(name("redis"), ending(id, "n2", None)));
        evacuation.apply(Event::Seen(vec![Found { placed_elsewhere: true, ..found("redis") }]));
        assert_eq!(*standing(&evacuation, "redis"), Standing::Moved);
        evacuation.apply(Event::Seen(vec![found("redis")]));
        assert_eq!(*standing(&evacuation, "redis"), Standing::Waiting);
    }

    #[test]
    fn what_does_not_run_stays_and_is_no_failure_and_what_a_migration_left_is_not_shown() {
        let old = Found { runs: false, ..found("old") };
        let remains = Found { runs: false, placed_elsewhere: true, ..found("remains") };
        let mut evacuation = of([old, remains]);
        evacuation.apply(Event::Done(Timestamp::UNIX_EPOCH));
        assert_eq!(evacuation.phase, Phase::Ended(Outcome::Complete));
        assert_eq!(*standing(&evacuation, "old"), Standing::NotRunning);
        assert_eq!(evacuation.entries.len(), 1);
    }

    #[test]
    fn limits_are_waited_for_and_other_refusals_are_final() {
        let mut evacuation = of([found("redis"), found("cart")]);
        let full = Failure::new(FailureCode::ResourceExhausted, "node n2 takes part in 2 migrations already");
        evacuation.apply(Event::Refused(name("redis"), full.clone()));
        let entry = evacuation.entry(&name("redis")).unwrap();
        assert_eq!((&entry.standing, entry.waits_for.as_ref()), (&Standing::Waiting, Some(&full.message)));
        evacuation.apply(Event::Refused(name("cart"), Failure::new(FailureCode::PermissionDenied, "no")));
        assert!(matches!(standing(&evacuation, "cart"), Standing::LeftBehind { .. }));
    }

    #[test]
    fn a_cancel_leaves_what_waits_and_what_it_has_undone() {
        let (mut evacuation, id) = moving();
        evacuation.apply(Event::Seen(vec![found("cart")]));
        evacuation.apply(Event::CancelRequested("client ada".to_owned()));
        evacuation.apply(Event::Ended(name("redis"), ending(id, "n2", Some(aborted()))));
        evacuation.apply(Event::Seen(vec![found("new")]));
        evacuation.apply(Event::Done(Timestamp::UNIX_EPOCH));
        assert_eq!(evacuation.phase, Phase::Ended(Outcome::Cancelled));
        assert!(evacuation.entries.iter().all(|entry| matches!(entry.standing, Standing::LeftBehind { .. })));
        assert_eq!(evacuation.entries.len(), 2);
    }

    #[test]
    fn a_workload_whose_migration_is_not_recorded_any_more_is_looked_at_again() {
        let (mut evacuation, id) = moving();
        evacuation.apply(Event::Forgotten(name("redis"), MigrationId::new()));
        assert!(matches!(standing(&evacuation, "redis"), Standing::Moving { .. }), "that was another one");
        evacuation.apply(Event::Forgotten(name("redis"), id));
        assert_eq!(*standing(&evacuation, "redis"), Standing::Waiting);
    }

    #[test]
    fn a_deadline_moves_as_long_as_there_is_something_to_do() {
        let mut evacuation = of([found("redis")]);
        let later = Timestamp::now() + jiff::SignedDuration::from_hours(1);
        evacuation.apply(Event::DeadlineMoved(Some(later)));
        assert_eq!(evacuation.terms.deadline_at, Some(later));
        evacuation.apply(Event::DeadlineMoved(None));
        evacuation.apply(Event::DeadlinePassed);
        assert_eq!(*standing(&evacuation, "redis"), Standing::Waiting, "there is none any more");
        evacuation.apply(Event::CancelRequested("ada".to_owned()));
        evacuation.apply(Event::Done(later));
        evacuation.apply(Event::DeadlineMoved(Some(later)));
        assert_eq!(evacuation.terms.deadline_at, None);
    }

    #[test]
    fn a_workload_that_was_lost_is_not_left_behind() {
        let (mut evacuation, id) = moving();
        let lost = Ending { committed: true, ..ending(id, "n2", Some(Failure::new(FailureCode::DataLoss, "gone"))) };
        evacuation.apply(Event::Ended(name("redis"), lost));
        assert_eq!(*standing(&evacuation, "redis"), Standing::Lost);
    }

    #[test]
    fn priorities_that_are_asked_for_count_instead_of_the_inventorys() {
        let mut evacuation = of([]);
        evacuation.terms.priorities = [(name("redis"), -5)].into();
        evacuation
            .apply(Event::Seen(vec![Found { priority: 3, ..found("redis") }, Found { priority: 3, ..found("cart") }]));
        let priorities: Vec<_> = evacuation.entries.iter().map(|entry| entry.priority).collect();
        assert_eq!(priorities, [-5, 3]);
    }
}
