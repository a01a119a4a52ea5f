//! A restore that is started before what it restores is here.
//!
//! Of the time that a container stands still for its restore, half would pass before CRIU looks at the first image: runc asks CRIU for
//! its version, makes the cgroup and the mount points, CRIU starts. Nothing of that depends on the images, except for the list of the
//! container's descriptors, which the source therefore sends first. So runc is started as soon as that is here, with a placeholder for
//! the root filesystem, whose writable layer is still to come; CRIU then waits at its [gate](ImageGate).
//!
//! ```text
//!   descriptors ─▶ placeholder mounted ─▶ runc, CRIU ─▶ gate ┄┄ everything is here ┄┄▶ root filesystem mounted ─▶ inventory
//! ```
//!
//! What is started early and cannot be used costs time and nothing else: it is ended, and the restore started anew.

use std::fs;
use std::time::{Duration, Instant};

use podferry_common::failure::{Failure, FailureCode, chain};
use podferry_criu::{CriuError, ImageGate};
use podferry_runtime::RunningRestore;

use super::bundle::Bundle;
use super::{
    END_TIMEOUT, GONE_TIMEOUT, RestoreOrder, TargetPart, clean_up, cleanup_failed, inbox, io_failed, mount_root,
    restore_from,
};
use crate::context::{Context, blocking};
use crate::journal::PartDirs;

/// How long runc and CRIU get until they wait.
const REACH_TIMEOUT: Duration = Duration::from_secs(5);

/// A `runc restore` that was started.
#[derive(Debug)]
pub(super) struct Started {
    runc: RunningRestore,
    early: Option<Early>,
}

/// What a restore waits for that was started early.
#[derive(Debug)]
struct Early {
    gate: ImageGate,
    /// Whether CRIU was told that pages come later.
    lazy: bool,
}

impl TargetPart {
    /// Starts the restore as soon as that can be done, which is before everything is here; or not at all. Failures are logged.
    pub(super) async fn start_early(&self) {
        let Some(inbox) = &self.inbox else { return };
        if !inbox.is_described().await {
            return;
        }
        let lazy = self.fetch_from.is_some() || inbox.has_memory();
        let mut running = self.restore.clone().lock_owned().await;
        if running.is_some() {
            return;
        }
        let (context, bundle, dirs, order) =
            (self.context.clone(), self.bundle.clone(), self.dirs.clone(), self.order());
        let cancelled = self.cancelled.clone();
        // This future may be dropped meanwhile. The lock goes along, so that an abort waits for what was started.
        let starting = tokio::spawn(blocking(move || {
            if !cancelled.is_cancelled() {
                start(&mut running, &context, &bundle, &dirs, &order, lazy)?;
            }
            Ok(())
        }));
        let migration = self.migration;
        match starting.await {
            Ok(Ok(())) => tracing::debug!(%migration, "the restore waits for its images"),
            Ok(Err(failure)) => tracing::warn!(%migration, %failure, "the restore cannot be started early"),
            Err(error) => tracing::warn!(%migration, %error, "the task that starts a restore early ended"),
        }
    }
}

fn start(
    running: &mut Option<Started>,
    context: &Context,
    bundle: &Bundle,
    dirs: &PartDirs,
    order: &RestoreOrder,
    lazy: bool,
) -> Result<(), Failure> {
    let gate = ImageGate::new(&dirs.images).map_err(|error| not_started(context, &error))?;
    podferry_filesystem::mount_placeholder(&bundle.rootfs()).map_err(|error| not_started(context, &error))?;
    let runc = restore_from(context, bundle, dirs, order, lazy)?;
    let started = running.insert(Started { runc, early: Some(Early { gate, lazy }) });
    // Also so that the gate's end is held: CRIU reads its end when this agent is killed, and gives up.
    started.reach_gate().map_err(|error| not_started(context, &error))?;
    Ok(())
}

impl Started {
    /// One that does not wait for images.
    pub(super) fn now(runc: RunningRestore) -> Self {
        Self { runc, early: None }
    }

    /// Whether it waits for its images.
    pub(super) fn is_early(&self) -> bool {
        self.early.is_some()
    }

    /// See [`RunningRestore::try_wait`].
    pub(super) fn try_wait(&mut self) -> Result<bool, podferry_runtime::Error> {
        self.runc.try_wait()
    }

    /// Everything is here: lets a restore that was started early have it. Leaves none when there was none that can be used.
    ///
    /// # Errors
    /// When something cannot be put where it belongs, or a restore that cannot be used cannot be ended.
    pub(super) fn go_on(
        running: &mut Option<Self>,
        context: &Context,
        bundle: &Bundle,
        dirs: &PartDirs,
        (workload, ..): &RestoreOrder,
        lazy: bool,
    ) -> Result<(), Failure> {
        if let Some(started) = running
            && started.goes_on(context, bundle, dirs, lazy)?
        {
            return Ok(());
        }
        if let Some(useless) = running.take() {
            tracing::warn!(workload, "a restore that was started early is of no use; starting anew");
            useless.end(context, END_TIMEOUT)?;
            clean_up(context, bundle, workload, dirs)?;
        }
        inbox::place_inventory(&dirs.images).map_err(|error| io_failed(context, &error))
    }

    fn goes_on(&mut self, context: &Context, bundle: &Bundle, dirs: &PartDirs, lazy: bool) -> Result<bool, Failure> {
        let as_told = self.early.as_ref().is_some_and(|early| early.lazy == lazy);
        if !as_told || !self.lives() || !self.reach_gate().map_err(|error| not_started(context, &error))? {
            return Ok(false);
        }
        mount_root(context, bundle)?;
        self.runc.renew_root(&bundle.rootfs()).map_err(|error| not_started(context, &error))?;
        let inventory = fs::read(inbox::arrived_inventory(&dirs.images)).map_err(|error| io_failed(context, &error))?;
        if let Some(early) = self.early.take() {
            early.gate.open(&inventory).map_err(|error| not_started(context, &error))?;
        }
        // For a restore that has to be done again.
        inbox::place_inventory(&dirs.images).map_err(|error| io_failed(context, &error))?;
        Ok(true)
    }

    fn lives(&mut self) -> bool {
        self.runc.try_wait().is_ok_and(|ended| !ended) && !self.has_lost_criu()
    }

    /// Whether its CRIU was killed. runc takes ten seconds to see that.
    fn has_lost_criu(&self) -> bool {
        self.early.as_ref().is_some_and(|early| early.gate.is_deserted())
    }

    /// Waits until CRIU waits; false when it never will.
    fn reach_gate(&mut self) -> Result<bool, CriuError> {
        let Self { runc, early } = self;
        let Some(early) = early else { return Ok(false) };
        early.gate.wait(REACH_TIMEOUT, || runc.try_wait().is_ok_and(|ended| !ended))
    }

    /// Waits for its end; one that does not end by itself is killed, and what it made removed.
    ///
    /// # Errors
    /// When something stays.
    pub(super) fn end(self, context: &Context, patience: Duration) -> Result<(), Failure> {
        let patience = if self.has_lost_criu() { GONE_TIMEOUT } else { patience };
        let Self { mut runc, early } = self;
        // Without its gate it reads nothing, and gives up.
        drop(early);
        match runc.wait_until(Instant::now() + patience) {
            Ok(false) => {
                tracing::warn!(pid = runc.pid, "a restore does not end by itself; killing it");
                runc.kill_and_clean().map_err(|error| cleanup_failed(context, &error))
            }
            Ok(true) => Ok(()),
            Err(error) => {
                tracing::debug!(error = chain(&error), "a restore has ended");
                Ok(())
            }
        }
    }
}

fn not_started(context: &Context, error: &(dyn std::error::Error + 'static)) -> Failure {
    context.failure(FailureCode::Internal, "a restore that waits for its images fails", error).in_phase("restore")
}
