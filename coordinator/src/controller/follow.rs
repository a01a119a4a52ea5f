//! Showing a migration as it goes on.

use std::sync::{Arc, PoisonError};
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
    /// Shows the progress of a migration that has not ended, and writes events of it, unless somebody does already.
    pub(super) fn follow(self: &Arc<Self>, object: &Migration, id: MigrationId) {
        let Some(view) = self.runner.watch(id) else { return };
        if !self.followed.lock().unwrap_or_else(PoisonError::into_inner).insert(id) {
            return;
        }
        let (controller, object) = (Arc::clone(self), object.clone());
        tokio::spawn(async move {
            controller.show(&object, view).await;
            controller.followed.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
        });
    }

    async fn show(&self, object: &Migration, mut view: watch::Receiver<Record>) {
        let mut before = view.borrow_and_update().clone();
        while view.changed().await.is_ok() {
            let now = view.borrow_and_update().clone();
            if let Some(what) = What::of(&before.state, &now.state) {
                self.events.became(object, what, &now).await;
            }
            if now.state == before.state
                && let Err(error) = self.objects.show(&now).await
            {
                tracing::warn!(migration = %now.id, %error, "progress is not shown");
            }
            let shows_progress = now.state == before.state;
            before = now;
            if shows_progress {
                sleep(INTERVAL).await;
            }
        }
        // The last state may have come with the end of the channel.
        let last = view.borrow().clone();
        if let Some(what) = What::of(&before.state, &last.state) {
            self.events.became(object, what, &last).await;
        }
    }
}
