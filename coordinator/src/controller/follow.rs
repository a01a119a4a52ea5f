//! Showing a migration as it goes on.

use std::collections::HashSet;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use podferry_common::MigrationId;
use podferry_crds::Migration;
use tokio::sync::watch;
use tokio::time::sleep;

use super::Controller;
use crate::audit::What;
use crate::store::Record;

/// How often progress is shown, at most. New states are written by those who make them.
const INTERVAL: Duration = Duration::from_secs(1);

impl Controller {
    /// Says that a migration begins, and shows it from then on.
    pub(super) fn follow_from_the_start(self: &Arc<Self>, object: &Migration, record: Record) {
        let view = self.runner.watch(record.id);
        self.followed().insert(record.id);
        let (controller, object) = (Arc::clone(self), object.clone());
        tokio::spawn(async move {
            controller.events.accepted(&object, &record).await;
            let id = record.id;
            match view {
                Some(view) => controller.show(&object, record, view).await,
                // It has ended already.
                None => controller.tell_the_end(&object, &record).await,
            }
            controller.followed().remove(&id);
        });
    }

    /// Shows the progress of a migration that has not ended, and writes events of it, unless somebody does already.
    pub(super) fn follow(self: &Arc<Self>, object: &Migration, id: MigrationId) {
        let Some(view) = self.runner.watch(id) else { return };
        if !self.followed().insert(id) {
            return;
        }
        let (controller, object) = (Arc::clone(self), object.clone());
        tokio::spawn(async move {
            let now = view.borrow().clone();
            controller.show(&object, now, view).await;
            controller.followed().remove(&id);
        });
    }

    /// `before` is what has been told.
    async fn show(&self, object: &Migration, mut before: Record, mut view: watch::Receiver<Record>) {
        loop {
            let now = view.borrow_and_update().clone();
            if let Some(what) = What::of(&before.state, &now.state) {
                self.events.became(object, what, &now).await;
            }
            // New states are shown by the writes that record them.
            if now.state == before.state && now.report != before.report {
                if let Err(error) = self.objects.show(&now).await {
                    tracing::warn!(migration = %now.id, %error, "progress is not shown");
                }
                sleep(INTERVAL).await;
            }
            before = now;
            if view.changed().await.is_err() {
                return self.tell_the_end(object, &before).await;
            }
        }
    }

    async fn tell_the_end(&self, object: &Migration, before: &Record) {
        let Some(last) = self.objects.record(before.id) else { return };
        if let Some(what) = What::of(&before.state, &last.state) {
            self.events.became(object, what, &last).await;
        }
    }

    fn followed(&self) -> MutexGuard<'_, HashSet<MigrationId>> {
        self.followed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
