//! What is due with the API server when a migration has come so far, done until it is done.

use std::collections::HashSet;
use std::time::Duration;

use kube::ResourceExt as _;
use podferry_common::{Failure, MigrationId};
use tokio::time::sleep;

use super::plan::MIGRATION;
use super::steps::Pods;
use crate::migration::State;
use crate::runner::blocking;
use crate::store::{PodMove, Record, Store};

/// The pause before the first repetition; doubled for each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// The longest pause between repetitions.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// How often it is looked for pods that are still marked: a request to make one may have been under way longer than the
/// migration that it was for.
const ROUND: Duration = Duration::from_secs(60);

/// What is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Due {
    /// Nothing.
    Nothing,
    /// The target pod goes: the workload runs where it was.
    Discard,
    /// Whoever counts pods that have ended counts the target: nothing can bring the workload back to the source.
    HandOver,
    /// New connections go to the target pod; the source pod has to stay, for the target lacks memory that it has.
    Expose,
    /// The target pod takes the source pod's place.
    Complete,
}

impl Due {
    /// What is due in a state of a migration; `post_copy`: whether the target fetches memory after its resume.
    pub(super) fn of(state: &State, post_copy: bool) -> Self {
        match state {
            State::Aborted { .. } => Self::Discard,
            State::Filling if post_copy => Self::Expose,
            State::Filling | State::Completed | State::Lost { .. } => Self::Complete,
            State::Releasing | State::Resuming => Self::HandOver,
            State::Preflight { .. }
            | State::Preparing
            | State::PreCopying
            | State::Freezing(_)
            | State::Sealing { .. }
            | State::Losing { .. }
            | State::Aborting { .. }
            | State::RolledBack { .. } => Self::Nothing,
        }
    }
}

impl Pods {
    /// Begins what has become due for a migration of this record that was in the state `before`. Must be called inside a tokio runtime.
    pub fn follow(&self, before: &State, record: &Record) {
        let post_copy = record.strategy.path().post_copy;
        if Due::of(before, post_copy) != Due::of(&record.state, post_copy) {
            self.begin(record);
        }
    }

    /// Begins what is due for it, whatever was before. Who is at it already goes on with that.
    fn begin(&self, record: &Record) {
        let Some(moved) = record.pod.clone() else { return };
        let (id, due) = (record.id, Due::of(&record.state, record.strategy.path().post_copy));
        if due == Due::Nothing || self.due().insert(id, due).is_some() {
            return;
        }
        let pods = self.clone();
        tokio::spawn(async move { pods.until_done(id, &moved).await });
    }

    async fn until_done(&self, id: MigrationId, moved: &PodMove) {
        let mut pause = FIRST_PAUSE;
        while let Some(due) = self.due_for(id) {
            let Err(failure) = self.carry_out(due, id, moved).await else {
                tracing::info!(migration = %id, pod = moved.target_name, ?due, "done with the API server");
                self.is_done(id, due);
                pause = FIRST_PAUSE;
                continue;
            };
            tracing::warn!(migration = %id, pod = moved.target_name, ?due, %failure, "repeated until it is done");
            sleep(pause).await;
            pause = pause.saturating_mul(2).min(LONGEST_PAUSE);
        }
    }

    fn due_for(&self, id: MigrationId) -> Option<Due> {
        self.due().get(&id).copied()
    }

    /// Nothing more is due, unless that has changed meanwhile.
    fn is_done(&self, id: MigrationId, done: Due) {
        let mut due = self.due();
        if due.get(&id) == Some(&done) {
            due.remove(&id);
        }
    }

    async fn carry_out(&self, due: Due, id: MigrationId, moved: &PodMove) -> Result<(), Failure> {
        match due {
            Due::Nothing => Ok(()),
            Due::Discard => self.discard_target(id, moved).await,
            Due::HandOver => self.hand_over(id, moved).await,
            Due::Expose => self.expose(id, moved).await,
            Due::Complete => {
                self.expose(id, moved).await?;
                Box::pin(self.complete(id, moved)).await
            }
        }
    }

    /// Goes on with what a former process left, and looks again and again, until it is dropped.
    pub async fn look_after(&self, store: &Store) {
        let mut told = HashSet::new();
        loop {
            if let Err(failure) = self.recover(store, &mut told).await {
                tracing::warn!(%failure, "pods that migrations have left are looked for again later");
            }
            sleep(ROUND).await;
        }
    }

    /// Every pod that is still marked belongs to a migration; of those that are not known it is told once.
    async fn recover(&self, store: &Store, told: &mut HashSet<MigrationId>) -> Result<(), Failure> {
        for pod in self.marked().await? {
            let Some(id) = pod.labels().get(MIGRATION).and_then(|id| id.parse().ok()) else { continue };
            let store = store.clone();
            match blocking(move || store.get(id)).await {
                Ok(Some(record)) => self.begin(&record),
                Ok(None) if told.insert(id) => {
                    let (namespace, pod) = (pod.namespace().unwrap_or_default(), pod.name_any());
                    tracing::warn!(namespace, pod, %id, "a pod is marked by a migration that is not known");
                }
                Ok(None) => {}
                Err(error) => tracing::error!(%error, %id, "a migration's record cannot be read"),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use podferry_common::FailureCode;

    use crate::migration::{Freezing, PartAbort, SourceAbort, Why};

    #[test]
    fn nothing_is_due_before_the_outcome_and_the_source_pod_stays_while_it_has_memory() {
        for post_copy in [false, true] {
            for open in [State::new(), State::Preparing, State::PreCopying, State::Freezing(Freezing::default())] {
                assert_eq!(Due::of(&open, post_copy), Due::Nothing, "{open:?}");
            }
            for committed in [State::Releasing, State::Resuming] {
                assert_eq!(Due::of(&committed, post_copy), Due::HandOver, "{committed:?}");
            }
            assert_eq!(Due::of(&State::Completed, post_copy), Due::Complete);
        }
        assert_eq!(Due::of(&State::Filling, false), Due::Complete);
        assert_eq!(Due::of(&State::Filling, true), Due::Expose);
    }

    #[test]
    fn the_target_pod_goes_only_when_the_workload_runs_where_it_was_and_stays_when_it_was_lost() {
        let why = || Why::from(Failure::new(FailureCode::Aborted, "no"));
        let aborting = State::Aborting { target: PartAbort::Asked, source: SourceAbort::Due, why: why() };
        for open in [aborting, State::Losing { why: why() }, State::RolledBack { why: why() }] {
            for post_copy in [false, true] {
                assert_eq!(Due::of(&open, post_copy), Due::Nothing, "{open:?}");
            }
        }
        for post_copy in [false, true] {
            assert_eq!(Due::of(&State::Aborted { why: why() }, post_copy), Due::Discard);
            assert_eq!(Due::of(&State::Lost { why: why() }, post_copy), Due::Complete);
        }
    }
}
