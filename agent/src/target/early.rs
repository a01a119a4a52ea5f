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

use super::restore::Restoring;
use super::{GONE_TIMEOUT, TargetPart, inbox, io_failed};
use crate::context::blocking;

/// How long runc and CRIU get until they wait.
const REACH_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a restore that waits gets to end when there is nothing for it. It has made nothing yet that would take time to undo.
const END_TIMEOUT: Duration = Duration::from_secs(2);

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
        let (restoring, cancelled) = (self.restoring(), self.cancelled.clone());
        // This future may be dropped meanwhile. The lock goes along, so that an abort waits for what was started.
        let starting = tokio::spawn(blocking(move || {
            if !cancelled.is_cancelled() {
                *running = Some(start(&restoring, lazy)?);
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

/// Starts one that waits, and sees it wait.
fn start(restoring: &Restoring, lazy: bool) -> Result<Started, Failure> {
    let failed = |error: &(dyn std::error::Error + 'static)| not_started(restoring, error);
    let gate = ImageGate::new(&restoring.dirs.images).map_err(|error| failed(&error))?;
    let bundle = &restoring.bundle;
    let mounted = bundle.overlay().mount_placeholder(&bundle.rootfs(), &restoring.dirs.placeholder());
    mounted.map_err(|error| failed(&error))?;
    let runc = restoring.start(lazy)?;
    let mut started = Started { runc, early: Some(Early { gate, lazy }) };
    // From then on the gate's other end is held: CRIU reads its end when this agent is killed, and gives up.
    match started.reach_gate() {
        Ok(true) => Ok(started),
        Ok(false) => {
            started.end(restoring, GONE_TIMEOUT)?;
            let message = "runc and CRIU do not come to wait for their images";
            Err(restoring.context.refusal(FailureCode::DeadlineExceeded, message).in_phase("restore"))
        }
        Err(error) => {
            started.end(restoring, GONE_TIMEOUT)?;
            Err(failed(&error))
        }
    }
}

/// Everything is here: lets the restore that was started early have it, or starts one; blocks.
///
/// # Errors
/// When something cannot be put where it belongs, a restore that cannot be used cannot be ended, or none be started.
pub(super) fn go_on_or_start(running: &mut Option<Started>, restoring: &Restoring, lazy: bool) -> Result<(), Failure> {
    if let Some(started) = running
        && started.open_gate(restoring, lazy)?
    {
        return Ok(());
    }
    if let Some(useless) = running.take() {
        tracing::warn!(migration = %restoring.migration, "a restore that was started early is of no use; starting anew");
        useless.end(restoring, END_TIMEOUT)?;
    }
    inbox::place_inventory(&restoring.dirs.images).map_err(|error| io_failed(&restoring.context, &error))?;
    restoring.mount_root()?;
    *running = Some(Started { runc: restoring.start(lazy)?, early: None });
    Ok(())
}

impl Started {
    /// Whether it waits for its images.
    pub(super) fn is_early(&self) -> bool {
        self.early.is_some()
    }

    /// See [`RunningRestore::try_wait`].
    pub(super) fn try_wait(&mut self) -> Result<bool, podferry_runtime::Error> {
        self.runc.try_wait()
    }

    /// Gives it the root filesystem and the inventory; false when it has died, or was told wrongly whether pages come later.
    fn open_gate(&mut self, restoring: &Restoring, lazy: bool) -> Result<bool, Failure> {
        let as_told = self.early.as_ref().is_some_and(|early| early.lazy == lazy);
        if !as_told || self.has_died() {
            return Ok(false);
        }
        let (context, images) = (&restoring.context, &restoring.dirs.images);
        restoring.mount_root()?;
        self.runc.renew_root(&restoring.bundle.rootfs()).map_err(|error| not_started(restoring, &error))?;
        let inventory = fs::read(inbox::arrived_inventory(images)).map_err(|error| io_failed(context, &error))?;
        if let Some(early) = self.early.take() {
            early.gate.open(&inventory).map_err(|error| not_started(restoring, &error))?;
        }
        // For a restore that has to be done again.
        inbox::place_inventory(images).map_err(|error| io_failed(context, &error))?;
        Ok(true)
    }

    fn has_died(&mut self) -> bool {
        !matches!(self.runc.try_wait(), Ok(false)) || self.has_lost_criu()
    }

    /// Whether its CRIU was killed while it waited. runc takes ten seconds to see that.
    fn has_lost_criu(&self) -> bool {
        self.early.as_ref().is_some_and(|early| early.gate.is_deserted())
    }

    /// Waits until CRIU waits; false when it never will.
    fn reach_gate(&mut self) -> Result<bool, CriuError> {
        let Self { runc, early } = self;
        let Some(early) = early else { return Ok(false) };
        early.gate.wait(REACH_TIMEOUT, || runc.try_wait().is_ok_and(|ended| !ended))
    }

    /// Waits for its end, kills it when it does not end by itself, and removes what it made; blocks.
    ///
    /// # Errors
    /// When something stays.
    pub(super) fn end(self, restoring: &Restoring, patience: Duration) -> Result<(), Failure> {
        let patience = if self.has_lost_criu() { GONE_TIMEOUT } else { patience };
        let Self { mut runc, early } = self;
        // Without its gate it reads nothing, and gives up.
        drop(early);
        match runc.wait_until(Instant::now() + patience) {
            Ok(true) => {}
            Ok(false) => {
                tracing::warn!(pid = runc.pid, "a restore does not end by itself; killing it");
                runc.kill_and_clean().map_err(|error| restoring.not_removed(&error))?;
            }
            Err(error) => tracing::debug!(error = chain(&error), "a restore has ended"),
        }
        restoring.clean_up()
    }
}

fn not_started(restoring: &Restoring, error: &(dyn std::error::Error + 'static)) -> Failure {
    restoring.failed("a restore that waits for its images fails", error)
}
