//! What is due with the API server when a migration has come so far, done until it is done.

use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::api::ListParams;
use kube::{Api, ResourceExt as _};
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

/// How long a request to the API server is under way at most when who made it has gone.
const SECOND_LOOK: Duration = Duration::from_secs(5);

/// What is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Due {
    /// Nothing.
    Nothing,
    /// The target pod goes: the workload runs where it was.
    Discard,
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
            // Post-copy: behind the fill.
            State::Releasing if post_copy => Self::Nothing,
            State::Preflight { .. }
            | State::Preparing
            | State::PreCopying
            | State::Freezing(_)
            | State::Sealing { .. }
            | State::Releasing
            | State::Resuming
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

    /// Begins what is due for it, whatever was before.
    fn begin(&self, record: &Record) {
        let Some(moved) = record.pod.clone() else { return };
        let due = Due::of(&record.state, record.strategy.path().post_copy);
        if due == Due::Nothing {
            return;
        }
        let (pods, id) = (self.clone(), record.id);
        tokio::spawn(async move { pods.until_done(due, id, &moved).await });
    }

    async fn until_done(&self, due: Due, id: MigrationId, moved: &PodMove) {
        let mut pause = FIRST_PAUSE;
        loop {
            let Err(failure) = self.carry_out(due, id, moved).await else { break };
            tracing::warn!(migration = %id, pod = moved.target_name, ?due, %failure, "repeated until it is done");
            sleep(pause).await;
            pause = pause.saturating_mul(2).min(LONGEST_PAUSE);
        }
        tracing::info!(migration = %id, pod = moved.target_name, ?due, "done with the API server");
    }

    async fn carry_out(&self, due: Due, id: MigrationId, moved: &PodMove) -> Result<(), Failure> {
        match due {
            Due::Nothing => Ok(()),
            Due::Discard => {
                self.discard_target(id, moved).await?;
                // A request to make it may have been under way when nobody waited for it any more.
                sleep(SECOND_LOOK).await;
                self.discard_target(id, moved).await
            }
            Due::Expose => self.expose(id, moved).await,
            Due::Complete => {
                self.expose(id, moved).await?;
                self.complete(id, moved).await
            }
        }
    }

    /// Goes on with what a former process left: every target pod that is still marked belongs to a migration.
    ///
    /// # Errors
    /// When pods cannot be listed.
    pub async fn recover(&self, store: &Store) -> Result<(), Failure> {
        let marked = Api::<Pod>::all(self.client()).list(&ListParams::default().labels(MIGRATION)).await;
        let marked = marked.map_err(|error| super::refused("pods cannot be listed", &error))?;
        for pod in marked {
            let Some(id) = pod.labels().get(MIGRATION).and_then(|id| id.parse().ok()) else { continue };
            let store = store.clone();
            match blocking(move || store.get(id)).await {
                Ok(Some(record)) => self.begin(&record),
                Ok(None) => {
                    tracing::warn!(pod = pod.name_any(), %id, "a pod is marked by a migration that is not known");
                }
                Err(error) => tracing::error!(%error, %id, "a migration's record cannot be read"),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration::Freezing;
    use crate::testing;

    #[test]
    fn nothing_is_due_before_the_outcome_and_the_source_pod_stays_while_it_has_memory() {
        for post_copy in [false, true] {
            for open in [State::new(), State::Preparing, State::PreCopying, State::Freezing(Freezing::default())] {
                assert_eq!(Due::of(&open, post_copy), Due::Nothing, "{open:?}");
            }
            for committed in [State::Releasing, State::Resuming] {
                assert_eq!(Due::of(&committed, post_copy), Due::Nothing, "{committed:?}");
            }
            assert_eq!(Due::of(&State::Completed, post_copy), Due::Complete);
        }
        assert_eq!(Due::of(&State::Filling, false), Due::Complete);
        assert_eq!(Due::of(&State::Filling, true), Due::Expose);
        assert_eq!(testing::record("a", "b", "c").pod, None, "and without pods nothing at all");
    }
}
