//! Undoing: the container runs on where it was.

use std::time::Duration;

use podferry_common::failure::{Failure, FailureCode};
use podferry_part::{May, Side, Step, may};

use super::{SourcePart, end_following, io_failed, sweep};
use crate::journal::{PartRecord, Role, Standing};
use crate::parts::Authority;
use crate::worker::client::{View, Worker};
use crate::worker::messages::{Order, Stage, WorkerRecord};

/// How long the worker gets to undo a dump. CRIU resumes a container in milliseconds.
const UNDO_TIMEOUT: Duration = Duration::from_secs(30);

impl SourcePart {
    /// Lets the container run on. Returns once it does.
    ///
    /// # Errors
    /// When it does not resume or its link stays cut; to be called again.
    pub async fn abort(&self, reason: &str, authority: Authority) -> Result<(), Failure> {
        let mut record = self.ledger.lock().await;
        match may(Side::Source, record.standing, Step::Abort(authority)) {
            May::Taken => return Ok(()),
            May::Take => {}
            May::Refuse => return Err(self.wrong_standing("abort", record.standing)),
        }
        self.cancelled.cancel();
        // Whoever reads memory or starts the worker sees that, and ends.
        let mut followers = self.followers.lock().await;
        // Not the end if it fails: the tasks are to go on all the same.
        let unthrottled = sweep::release_throttle(&self.context, &self.dirs, &record).await;
        let ended = match self.worker.get() {
            Some(worker) => {
                worker.order(&Order::Abort { reason: reason.to_owned() }).await;
                worker.until(UNDO_TIMEOUT, View::is_last).await
            }
            None => View::Lost,
        };
        match ended {
            View::Stage(Stage::Undone { left, .. }) if left.is_empty() => {}
            View::Stage(Stage::Undone { left, .. }) => {
                tracing::error!(migration = %record.migration, ?left, "the source is not wholly as it was");
                self.free_orphans(&record).await?;
            }
            View::Stage(Stage::Released) => {
                let message = "the container's processes are dead already: this migration was committed";
                return Err(self.context.refusal(FailureCode::FailedPrecondition, message));
            }
            View::Lost => self.free_orphans(&record).await?,
            View::Stage(_) => {
                let message = "CRIU does not let the tasks go";
                return Err(self.context.refusal(FailureCode::DeadlineExceeded, message).in_phase("rollback"));
            }
        }
        self.unquiesce(&record).await?;
        self.start_again(&record).await?;
        self.stop_keeping().await;
        if let Some(fence) = &self.fence {
            fence.take_away().map_err(|error| io_failed(&self.context, &error))?;
        }
        if let Some(arrivals) = self.arrivals.get() {
            arrivals.give_back();
        }
        if let Some(home) = self.home.get() {
            home.give_back().await;
        }
        // Before another migration of the container may begin: two cannot follow it.
        end_following(std::mem::take(&mut *followers)).await?;
        unthrottled?;
        self.ledger
            .change(&mut record, |record| record.standing = Standing::Aborted)
            .map_err(|error| io_failed(&self.context, &error))?;
        self.dirs.wipe_volatile();
        Ok(())
    }

    /// The worker was killed before the commit: does its work.
    async fn free_orphans(&self, record: &PartRecord) -> Result<(), Failure> {
        let worker: Option<WorkerRecord> = crate::worker::record::load(&self.dirs.worker_record())
            .map_err(|error| io_failed(&self.context, &error))?;
        let link = match &record.role {
            Role::Source { link, .. } => link.clone(),
            Role::Target { .. } => None,
        };
        if worker.is_none() && !Worker::was_started(&self.dirs.job_file()) {
            return Ok(());
        }
        let container = self.known_unless_dead(record)?;
        sweep::free_container(&self.context, container.as_ref(), worker.unwrap_or_default(), link).await
    }
}
