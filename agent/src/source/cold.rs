//! A cold migration's source: the container is stopped, its files are sent, and whoever undoes that starts it again.
//!
//! ```text
//! container   runs ─────────────────│ SIGTERM ┄ ends by itself, or is killed │ stopped; runc's state and its root stay
//! files       round 1, round 2, …   │                                        │ last round, and all that is small
//! journal                           │ begun, told
//! ```
//!
//! Nothing is between the container and its end but the journal: that it was running, and was told to end by this migration, is noted
//! before it is told. From then on an abort, also that of an agent started later, sees the stop through (nobody can tell a program that
//! does not heed the signal from one that is half-way through its shutdown) and starts the container again from its bundle.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use podferry_common::failure::{Failure, FailureCode, chain};
use podferry_runtime::{Container, CreateRequest, Init};
use podferry_transfer::Sender;
use tokio::sync::{OwnedMutexGuard, mpsc};

use super::order::{FreezeEvent, FreezeOrder};
use super::precopy::{Followers, Round, SendError, Way};
use super::{RELEASE_TIMEOUT, SourcePart, init_lives, io_failed, ms, sweep, tell_progress};
use crate::context::{Context, blocking};
use crate::journal::{PartRecord, Role, Standing, StopNote};
use crate::volumes::MovedFiles;
use crate::worker::messages::WorkerRecord;
use crate::worker::run::kill_once;

/// Rounds over the files at most.
const MOST_ROUNDS: u32 = 4;
/// So little of the files is left for the stop.
const LITTLE: u64 = 4 << 20;
/// Between two looks at a container that is ending.
const LOOK: Duration = Duration::from_millis(2);
/// How long runc may take to create a container, and one that an agent which was killed has started.
const RUNC_TIMEOUT: Duration = Duration::from_secs(30);

/// A container's end.
struct Stopped {
    /// When it was told to end.
    told: Instant,
    at: Instant,
    /// It did not heed it.
    killed: bool,
}

impl SourcePart {
    /// Sends what the container's large files hold, stops the container, and sends the rest. Returns when the target has confirmed
    /// everything.
    pub(super) async fn stop_and_send(
        &self,
        order: &FreezeOrder,
        sender: Arc<Sender>,
        events: &mpsc::Sender<FreezeEvent>,
    ) -> Result<(), Failure> {
        self.copy_files(order, &sender, events).await?;
        let sent_before = sender.stats();
        sender.hurry();
        let stopped = self.stop(&order.container).await?;
        self.cut_link(order).await?;
        tracing::debug!(migration = %order.migration, killed = stopped.killed, "the container is stopped");
        let frozen = FreezeEvent::Frozen { freeze_ms: ms(stopped.told, stopped.at), killed: stopped.killed };
        let _nobody_watches = events.send(frozen).await;
        tokio::select! {
            sent = self.send_rest_of_files(order, &sender) => sent?,
            () = tell_progress(&sender, events) => {
                return Err(self.context.refusal(FailureCode::Internal, "progress ended").in_phase("transfer"));
            }
        }
        let Some(sender) = Arc::into_inner(sender) else {
            return Err(self.context.refusal(FailureCode::Internal, "the transfer is still used").in_phase("transfer"));
        };
        let stats = sender.finish().await.map_err(|error| self.transfer_failed(&error))?;
        self.stopped.store(true, Ordering::Relaxed);
        let last_round = Round {
            raw_bytes: stats.raw_bytes - sent_before.raw_bytes,
            wire_bytes: stats.wire_bytes - sent_before.wire_bytes,
            duration: stopped.at.elapsed(),
            ..Round::default()
        };
        let done = FreezeEvent::Transferred {
            pages: 0,
            raw_bytes: stats.raw_bytes,
            zero_bytes: stats.zero_bytes,
            wire_bytes: stats.wire_bytes,
            dump_ms: 0.0,
            transfer_ms: ms(stopped.at, Instant::now()),
            last_round: order.pre_copy.map(|_| last_round),
            verified: None,
        };
        let _nobody_watches = events.send(done).await;
        Ok(())
    }

    /// Goes over the running container's files until little of it is left, or it does not become less.
    async fn copy_files(
        &self,
        order: &FreezeOrder,
        sender: &Arc<Sender>,
        events: &mpsc::Sender<FreezeEvent>,
    ) -> Result<(), Failure> {
        let Some(wish) = order.pre_copy else { return Ok(()) };
        self.pre_copying.store(true, Ordering::Relaxed);
        let mut before = u64::MAX;
        for _ in 0..wish.max_rounds.min(MOST_ROUNDS) {
            let followers = Arc::clone(&self.followers).lock_owned().await;
            let (way, files) = (self.way(sender), order.files.clone());
            let telling = tell_progress(sender, events);
            let context = self.context.clone();
            let copying = blocking(move || {
                let copied = round(followers, &files, &way);
                copied.map_err(|error| {
                    context.failure(FailureCode::Unavailable, FILES_FAILED, &error).in_phase("precopy")
                })
            });
            let round = tokio::select! {
                copied = copying => copied?,
                () = telling => return Err(self.context.refusal(FailureCode::Internal, "progress ended").in_phase("precopy")),
            };
            let _nobody_watches = events.send(FreezeEvent::Round(round)).await;
            if SystemTime::now() > wish.deadline {
                let message = "copying the container's files did not end before its deadline";
                return Err(self.context.refusal(FailureCode::DeadlineExceeded, message).in_phase("precopy"));
            }
            if round.raw_bytes <= LITTLE || round.raw_bytes > before / 2 {
                break;
            }
            before = round.raw_bytes;
        }
        self.pre_copying.store(false, Ordering::Relaxed);
        let _nobody_watches = events.send(FreezeEvent::Converged { predicted_ms: 0.0, notes: Vec::new() }).await;
        Ok(())
    }

    /// Tells the container to end, and waits until all of its processes have.
    async fn stop(&self, container: &Container) -> Result<Stopped, Failure> {
        let (init, note) = self.tell_to_end(container).await?;
        let told = Instant::now();
        let ended = tokio::time::timeout(note.grace, until_ended(init)).await.is_ok();
        // An abort waits for this guard, and so until nobody kills any more: what it starts again has the same cgroup.
        let guard = Arc::clone(&self.followers).lock_owned().await;
        let (context, container) = (self.context.clone(), container.clone());
        blocking(move || {
            let _guard = guard;
            end_all(&context, &container)
        })
        .await?;
        Ok(Stopped { told, at: Instant::now(), killed: !ended })
    }

    /// Between the lock and its end nothing is waited for: it is done as a whole, or not at all.
    async fn tell_to_end(&self, container: &Container) -> Result<(Init, StopNote), Failure> {
        let mut record = self.ledger.lock().await;
        // An abort may have had the lock just before.
        if self.cancelled.is_cancelled() || record.standing != Standing::Open {
            return Err(self.context.refusal(FailureCode::Aborted, "the migration was aborted").in_phase("freeze"));
        }
        let (Some(init), Some(note)) = (container.init.filter(|init| init.is_alive()), record.stop()) else {
            let message = format!("{} has ended by itself: there is nothing to move", container.id);
            return Err(self.context.refusal(FailureCode::FailedPrecondition, message).in_phase("freeze"));
        };
        let failed = |error: &std::io::Error| io_failed(&self.context, error);
        let begin = |note: &mut StopNote| note.begun = Some(SystemTime::now());
        self.ledger.change(&mut record, |record| record.note_stop(begin)).map_err(|error| failed(&error))?;
        init.terminate(note.signal);
        self.ledger
            .change(&mut record, |record| record.note_stop(|note| note.told = true))
            .map_err(|error| failed(&error))?;
        Ok((init, note))
    }

    /// From here on nobody is refused at the address: who comes tries again, and finds the target.
    pub(super) async fn cut_link(&self, order: &FreezeOrder) -> Result<(), Failure> {
        let (Some(link), context) = (order.link_handle(), self.context.clone()) else { return Ok(()) };
        // An abort joins the link again, and waits for this guard before.
        let guard = Arc::clone(&self.followers).lock_owned().await;
        blocking(move || {
            let _guard = guard;
            podferry_network::cut(&link).map(drop).map_err(|error| {
                let what = "the stopped container's link cannot be cut";
                context.failure(FailureCode::Internal, what, &error).in_phase("freeze")
            })
        })
        .await
    }

    async fn send_rest_of_files(&self, order: &FreezeOrder, sender: &Arc<Sender>) -> Result<(), Failure> {
        let mut followers = Arc::clone(&self.followers).lock_owned().await;
        let (way, files, context) = (self.way(sender), order.files.clone(), self.context.clone());
        blocking(move || {
            let sent = followers.seeds.last_round(&files, &way);
            sent.map_err(|error| context.failure(FailureCode::Unavailable, FILES_FAILED, &error).in_phase("transfer"))
        })
        .await?;
        self.send_files(order, sender).await
    }

    /// Fails unless the container has been stopped and sent, and nobody has started it since.
    pub(super) async fn check_stopped(&self, record: &PartRecord) -> Result<(), Failure> {
        if !self.stopped.load(Ordering::Relaxed) {
            let message = "the container is not stopped, or its files are not sent";
            return Err(self.context.refusal(FailureCode::FailedPrecondition, message).in_phase("commit"));
        }
        self.check_absent(record).await
    }

    /// Fails when the container runs: somebody else has started it. Two copies must not.
    pub(super) async fn check_absent(&self, record: &PartRecord) -> Result<(), Failure> {
        let Some(stage) = Stage::of(&self.context, record) else { return Ok(()) };
        let id = stage.id.clone();
        let runs = blocking(move || Ok(stage.living()?.is_some())).await?;
        if !runs && !init_lives(record) {
            return Ok(());
        }
        let message = format!("{id} was stopped to be moved, and somebody has started it again");
        let failure = self.context.refusal(FailureCode::FailedPrecondition, message).in_phase("commit");
        Err(failure.remedy(format!("find out who restarts it, and stop it: runc delete --force {id}")))
    }

    /// Undoes a stop, if one was begun: the container runs again when this returns. Idempotent.
    pub(super) async fn start_again(&self, record: &PartRecord) -> Result<(), Failure> {
        let Some(note @ StopNote { begun: Some(begun), .. }) = record.stop() else { return Ok(()) };
        self.stopped.store(false, Ordering::Relaxed);
        self.see_through(record, note, begun).await?;
        let link = match &record.role {
            Role::Source { link, .. } => link.clone(),
            Role::Target { .. } => None,
        };
        sweep::free_container(&self.context, None, WorkerRecord::default(), link).await?;
        let Some(stage) = Stage::of(&self.context, record) else { return Ok(()) };
        blocking(move || stage.start()).await
    }

    /// Waits for the end of a container that was told to end, as long as it still has time, and kills what is left of it then.
    async fn see_through(&self, record: &PartRecord, note: StopNote, begun: SystemTime) -> Result<(), Failure> {
        let Role::Source { init_pid, init_start, .. } = record.role else { return Ok(()) };
        let init = Init { pid: init_pid, start_time: init_start };
        if !init.is_alive() {
            return Ok(());
        }
        if !note.told {
            // An agent that was killed may not have come to it.
            init.terminate(note.signal);
        }
        // A clock that was set back must not make it longer.
        let left = note.grace.saturating_sub(begun.elapsed().unwrap_or_default());
        let _killed_now = tokio::time::timeout(left, until_ended(init)).await;
        let (Some(container), context) = (self.known_unless_dead(record)?, self.context.clone()) else { return Ok(()) };
        blocking(move || end_all(&context, &container)).await
    }
}

const FILES_FAILED: &str = "what the container's files hold cannot be sent";

/// One round over the files of a running container; blocks.
fn round(mut followers: OwnedMutexGuard<Followers>, files: &MovedFiles, way: &Way) -> Result<Round, SendError> {
    let (begun, wire_before) = (Instant::now(), way.wire_bytes());
    let sent = followers.seeds.round(files, way)?;
    let wire_bytes = way.wire_bytes() - wire_before;
    Ok(Round { raw_bytes: sent.data_bytes, wire_bytes, duration: begun.elapsed(), ..Round::default() })
}

pub(super) async fn until_ended(init: Init) {
    while init.is_alive() {
        tokio::time::sleep(LOOK).await;
    }
}

/// Kills what is left of a container; blocks until it is gone.
pub(super) fn end_all(context: &Context, container: &Container) -> Result<(), Failure> {
    let begun = Instant::now();
    while container.is_alive() || !container.processes().unwrap_or_default().is_empty() {
        if begun.elapsed() > RELEASE_TIMEOUT {
            let message = format!("processes of {} do not die (uninterruptible I/O?)", container.id);
            return Err(context.refusal(FailureCode::DeadlineExceeded, message).in_phase("freeze"));
        }
        if let Err(error) = kill_once(container) {
            tracing::debug!(error = chain(&error), container = container.id, "processes that end cannot be listed");
        }
        std::thread::sleep(LOOK);
    }
    Ok(())
}

/// Where a stopped container is started again.
struct Stage {
    context: Context,
    id: String,
    root: PathBuf,
    bundle: PathBuf,
    /// runc's.
    log: PathBuf,
}

impl Stage {
    fn of(context: &Context, record: &PartRecord) -> Option<Self> {
        let Role::Source { root, bundle, .. } = &record.role else { return None };
        let (id, context) = (record.workload.clone(), context.clone());
        let log = context.config.runtime.logs_dir.join(format!("{id}.runc.log"));
        Some(Self { context, id, root: root.clone(), bundle: bundle.clone(), log })
    }

    /// The container of that name, if one lives.
    fn living(&self) -> Result<Option<Container>, Failure> {
        match self.context.runc(&self.root).container(&self.id) {
            Ok(container) => Ok(Some(container).filter(Container::is_alive)),
            Err(podferry_runtime::Error::NotFound { .. }) => Ok(None),
            Err(error) => {
                let what = format!("what runc knows of {} cannot be read", self.id);
                Err(self.context.failure(FailureCode::Internal, &what, &error))
            }
        }
    }

    /// Creates and starts it, from wherever an earlier attempt has come to; blocks.
    fn start(&self) -> Result<(), Failure> {
        let runc = self.context.runc(&self.root);
        // An agent that was killed may have started one.
        if !runc.wait_for_others(&self.id, RUNC_TIMEOUT) {
            let message = format!("another runc works on {}, and does not end", self.id);
            return Err(self.context.refusal(FailureCode::Unavailable, message).in_phase("rollback"));
        }
        let living = self.living()?;
        if living.as_ref().is_some_and(|container| !container.awaits_start()) {
            return Ok(());
        }
        if living.is_none() {
            runc.cleanup_killed_restore(&self.id, &self.bundle).map_err(|error| self.failed(&error))?;
            runc.create(self.request()?).map_err(|error| self.failed(&error))?;
        }
        runc.start(&self.id, &self.log).map_err(|error| self.failed(&error))?;
        tracing::info!(container = self.id, "a container that was stopped to be moved is started again");
        Ok(())
    }

    fn request(&self) -> Result<CreateRequest, Failure> {
        let stdio = self.context.container_stdio(&self.id)?;
        let (id, bundle, log) = (self.id.clone(), self.bundle.clone(), self.log.clone());
        Ok(CreateRequest { id, bundle, stdio, log, note: None, patience: RUNC_TIMEOUT })
    }

    fn failed(&self, error: &(dyn std::error::Error + 'static)) -> Failure {
        let what = format!("{} cannot be started again", self.id);
        let failure = self.context.failure(FailureCode::Internal, &what, error).in_phase("rollback");
        failure.remedy(format!(
            "put right what is named, or start it by hand from {}: it is tried again",
            self.bundle.display()
        ))
    }
}
