//! A cold migration's target: the container is created from this node's bundle, on the layer that came, and started at the resume.
//!
//! Created, its init waits at runc's fifo for `runc start`, whatever becomes of this agent: that is what *held* means here, and it takes
//! no hook. One that dies while it waits is created again, since the layer stays as it came until somebody runs on it.

use std::sync::Arc;
use std::time::Duration;

use podferry_common::failure::{Failure, FailureCode};
use podferry_runtime::{Container, CreateRequest};
use tokio::sync::MutexGuard;

use super::restore::Restoring;
use super::{TargetPart, network};
use crate::context::blocking;
use crate::journal::PartRecord;

/// How often a committed container that does not come to run is created and started.
const TRIES: u32 = 3;
/// How long runc may take to create a container, and one that an agent which was killed has started.
pub(super) const RUNC_TIMEOUT: Duration = Duration::from_secs(30);

/// What there is of a container.
pub(super) enum Found {
    /// It waits for its start.
    Waits,
    /// It runs, or it was started and has run to its end.
    Started,
    /// Neither.
    Nothing,
}

impl TargetPart {
    /// Creates the container on what arrived. Returns when it waits for its start.
    pub(super) async fn create(&self) -> Result<(), Failure> {
        let running = Arc::clone(&self.restore).lock_owned().await;
        let (restoring, cancelled) = (self.restoring(), self.cancelled.clone());
        // This future may be dropped while runc works. The lock goes along, so that an abort waits for what was started.
        let creating = tokio::spawn(blocking(move || {
            let _abort_waits = running;
            if cancelled.is_cancelled() {
                return Err(restoring
                    .context
                    .refusal(FailureCode::Aborted, "the migration was aborted")
                    .in_phase("restore"));
            }
            restoring.create()
        }));
        let what = "the task that creates a container ended";
        creating.await.map_err(|error| self.context.failure(FailureCode::Internal, what, &error))?
    }

    /// Fails unless the container waits for its start.
    pub(super) async fn check_created(&self) -> Result<(), Failure> {
        match self.find_created(false).await? {
            Found::Waits => Ok(()),
            Found::Started | Found::Nothing => Err(self.refused(
                FailureCode::FailedPrecondition,
                "the created container is not there any more",
                "commit",
            )),
        }
    }

    /// Starts the created container, with its link; creates it again when it is not there any more and has not run.
    pub(super) async fn start_created(&self, record: &mut MutexGuard<'_, PartRecord>) -> Result<(), Failure> {
        let mut failure = None;
        for _ in 0..TRIES {
            // A new instance that runs no more is started again, as whoever watches over it would: on what it has written.
            match self.find_created(record.going && !self.takes_over).await? {
                Found::Started => {
                    // An agent that was killed may not have come so far. Of a new instance the link has not been joined yet.
                    self.join_link(record)?;
                    Self::announce(record);
                    if self.takes_over {
                        // Whoever was connected to the old one is told at once that it is gone.
                        self.open_door(record);
                    }
                    return Ok(());
                }
                Found::Waits => {
                    self.note(record, |record| record.going = true)?;
                    self.join_link(record)?;
                    Self::announce(record);
                    let restoring = self.restoring();
                    failure = blocking(move || restoring.start_created()).await.err();
                    if failure.is_none() {
                        return Ok(());
                    }
                }
                Found::Nothing => self.create_again(record).await?,
            }
            if let Some(failure) = &failure {
                tracing::error!(migration = %self.migration, %failure, "a committed container was not started; trying again");
            }
        }
        let message = "the committed container dies again and again before it is started";
        Err(failure.unwrap_or_else(|| self.refused(FailureCode::Internal, message, "resume")))
    }

    async fn create_again(&self, record: &mut MutexGuard<'_, PartRecord>) -> Result<(), Failure> {
        tracing::error!(migration = %self.migration, "the committed container is gone before it was started; creating it again");
        self.part_link(record)?;
        self.end_instance(record).await?;
        self.clean_restore(Duration::ZERO).await?;
        self.note(record, |record| record.going = false)?;
        network::remove(&self.context, record).await?;
        network::make(&self.context, record).await?;
        network::restore_mtu(record);
        self.create().await
    }

    pub(super) async fn find_created(&self, may_have_run: bool) -> Result<Found, Failure> {
        let restoring = self.restoring();
        blocking(move || {
            restoring.wait_for_runc()?;
            Ok(match restoring.container()? {
                Some(container) if container.awaits_start() => Found::Waits,
                Some(container) if container.is_alive() => Found::Started,
                // runc removes its fifo when it has let the init go.
                Some(container) if may_have_run && !container.ended_unstarted() => Found::Started,
                _ => Found::Nothing,
            })
        })
        .await
    }
}

impl Restoring {
    /// Creates the container; blocks.
    fn create(&self) -> Result<(), Failure> {
        let Self { context, bundle, dirs, workload, .. } = self;
        self.wait_for_runc()?;
        self.mount_root()?;
        let request = CreateRequest {
            id: workload.clone(),
            bundle: bundle.dir.clone(),
            stdio: context.container_stdio(workload)?,
            log: dirs.work.join("runc-create.log"),
            note: Some(dirs.work.clone()),
            patience: RUNC_TIMEOUT,
        };
        let runc = context.runc(context.config.runc_root());
        runc.create(request).map_err(|error| {
            let failure = context.failure(FailureCode::Aborted, "the container cannot be created", &error);
            let config = bundle.dir.join("config.json");
            failure.in_phase("restore").remedy(format!("see {}, and the image beside it", config.display()))
        })
    }

    pub(super) fn start_created(&self) -> Result<(), Failure> {
        let runc = self.context.runc(self.context.config.runc_root());
        let started = runc.start(&self.workload, &self.dirs.work.join("runc-start.log"));
        started.map_err(|error| self.failed("the created container cannot be started", &error).in_phase("resume"))
    }

    pub(super) fn container(&self) -> Result<Option<Container>, Failure> {
        match self.context.runc(self.context.config.runc_root()).container(&self.workload) {
            Ok(container) => Ok(Some(container)),
            Err(podferry_runtime::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(self.failed("what runc knows of the container cannot be read", &error)),
        }
    }

    /// Waits until a runc that an agent which was killed has started is done; blocks.
    pub(super) fn wait_for_runc(&self) -> Result<(), Failure> {
        let runc = self.context.runc(self.context.config.runc_root());
        if runc.wait_for_others(&self.workload, RUNC_TIMEOUT) {
            return Ok(());
        }
        let message = format!("another runc works on {}, and does not end", self.workload);
        Err(self.context.refusal(FailureCode::Unavailable, message).in_phase("restore"))
    }
}
