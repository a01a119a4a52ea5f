//! The freeze: CRIU's dump by the worker, and everything of it on its way to the target.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use podferry_common::failure::{Failure, FailureCode};
use podferry_common::identity::Peer;
use podferry_criu::{CgroupsMode, DumpRequest};
use podferry_filesystem::{Seeder, WritableLayer};
use podferry_runtime::{DESCRIPTORS, Externals};
use podferry_transfer::{Object, Sender, SenderStats, TransferError};
use tokio::net::UnixListener;
use tokio::sync::{OwnedMutexGuard, mpsc};
use tokio_util::sync::CancellationToken;

use super::order::{Connections, FreezeEvent, FreezeOrder, Verified};
use super::precopy::{Converged, Followers, Rest, Round, SendError};
use super::{SourcePart, VERIFY, io_failed, ms, not_running, pages, patience, tell_progress};
use crate::context::{Context, blocking};
use crate::journal::PartDirs;
use crate::relay::Home;
use crate::throttle::ThrottleRecord;
use crate::worker::client::{View, Worker};
use crate::worker::messages::{Diverted, DumpJob, Stage};

/// How long CRIU may take to stop all tasks.
const FREEZE_TIMEOUT_S: u32 = 5;

/// The last round, on a thread of its own; gives how many pages it sent.
type LastRound = tokio::task::JoinHandle<Result<u64, Failure>>;

/// What was sent behind the freeze.
struct Sent {
    /// Pages of the last round and of CRIU.
    pages: u64,
    /// When CRIU had written everything.
    dumped_at: Instant,
    /// What is being compared, and since when.
    verifying: Option<(u64, Instant)>,
}

/// A dump under way.
pub(super) struct Dump {
    /// Where CRIU's page stream comes.
    pages: UnixListener,
    /// When it began.
    at: Instant,
    /// What had been sent by then.
    sent_before: SenderStats,
    /// What pre-copy came to, if there was one.
    converged: Option<Converged>,
}

impl SourcePart {
    /// Tells the target of the container's descriptors, with which it can start its restore before the rest is there.
    pub(super) async fn describe(&self, order: &FreezeOrder, sender: &Arc<Sender>) -> Result<Externals, Failure> {
        let (context, container, images) = (self.context.clone(), order.container.clone(), self.dirs.images.clone());
        let (sender, cancelled) = (Arc::clone(sender), self.cancelled.clone());
        blocking(move || {
            let written = Externals::of(&container)
                .and_then(|externals| externals.write_descriptors(&images).map(|()| externals));
            let externals = written.map_err(|error| {
                let what = "the container's mounts and namespaces cannot be read";
                context.failure(FailureCode::FailedPrecondition, what, &error).in_phase("freeze")
            })?;
            send_image(&context, &sender, &images.join(DESCRIPTORS), &cancelled)?;
            Ok(externals)
        })
        .await
    }

    /// Starts the worker, which starts CRIU. To its end, also when nobody waits any more: a worker must be known.
    pub(super) async fn start_dump(
        &self,
        order: &FreezeOrder,
        externals: Externals,
        sender: &Sender,
        converged: Option<Converged>,
        mut followers: OwnedMutexGuard<Followers>,
    ) -> Result<Dump, Failure> {
        let (context, dirs, order) = (self.context.clone(), self.dirs.clone(), order.clone());
        let (worker, cancelled) = (Arc::clone(&self.worker), self.cancelled.clone());
        let sent_before = sender.stats();
        let diverted = self.home.get().map(Home::diverted);
        let starting = tokio::spawn(async move {
            if cancelled.is_cancelled() {
                return Err(context.refusal(FailureCode::Aborted, "the migration was aborted").in_phase("freeze"));
            }
            let hidden = converged.is_some().then(|| hide(&context, &dirs, &mut followers)).transpose()?;
            let at = Instant::now();
            let (started, pages) = start_worker(&context, &dirs, &order, externals, hidden, diverted).await?;
            let _never_set_before = worker.set(started);
            drop(followers);
            Ok(Dump { pages, at, sent_before, converged })
        });
        let what = "the task that starts a dump ended";
        starting.await.map_err(|error| self.context.failure(FailureCode::Internal, what, &error))?
    }

    pub(super) async fn dump_and_send(
        &self,
        order: &FreezeOrder,
        dump: Dump,
        sender: Arc<Sender>,
        events: &mpsc::Sender<FreezeEvent>,
    ) -> Result<(), Failure> {
        let Dump { pages, at: begun, sent_before, converged } = dump;
        let worker = self.worker()?;
        let deadline = SystemTime::now() + order.patience;
        let forwarding = self.spawn_forwarding(&pages, &sender).await?;

        let frozen = worker.until(patience(deadline), |view| *view != View::Stage(Stage::Freezing)).await;
        self.check(&frozen)?;
        if let Some(arrivals) = self.arrivals.get() {
            // Later words may have come already.
            arrivals.link_was_cut(if let View::Stage(Stage::Frozen { cut_at }) = frozen {
                cut_at
            } else {
                SystemTime::now()
            });
        }
        if let Some(home) = self.home.get() {
            home.frozen();
        }
        let frozen_at = Instant::now();
        tracing::debug!(migration = %order.migration, "the tasks stand still");
        let rest = converged.as_ref().map(|converged| converged.rest);
        let last_round = self.spawn_last_round(order, rest, &sender).await;
        let _ = events.send(FreezeEvent::Frozen { freeze_ms: ms(begun, frozen_at), killed: false }).await;

        let telling = tell_progress(&sender, events);
        let sending = self.send_rest(order, deadline, &sender, forwarding, last_round);
        let sent = tokio::select! {
            sent = sending => sent?,
            () = telling => return Err(self.context.refusal(FailureCode::Internal, "progress ended").in_phase("transfer")),
        };
        let Some(sender) = Arc::into_inner(sender) else {
            return Err(self.context.refusal(FailureCode::Internal, "the transfer is still used").in_phase("transfer"));
        };
        let stats = sender.finish().await.map_err(|error| self.finish_failed(order, &error))?;
        tracing::debug!(migration = %order.migration, "the target has everything");
        let last_round = converged.as_ref().map(|_| Round {
            pages: sent.pages,
            raw_bytes: stats.raw_bytes - sent_before.raw_bytes,
            wire_bytes: stats.wire_bytes - sent_before.wire_bytes,
            duration: frozen_at.elapsed(),
            ..Round::default()
        });
        let done = FreezeEvent::Transferred {
            pages: converged.map_or(0, |converged| converged.pages) + sent.pages,
            raw_bytes: stats.raw_bytes,
            zero_bytes: stats.zero_bytes,
            wire_bytes: stats.wire_bytes,
            dump_ms: ms(frozen_at, sent.dumped_at),
            transfer_ms: ms(sent.dumped_at, Instant::now()),
            last_round,
            verified: sent.verifying.map(|(bytes, since)| Verified { bytes, duration: since.elapsed() }),
        };
        let _ = events.send(done).await;
        Ok(())
    }

    /// Beside CRIU, which does not look where this looks.
    async fn spawn_last_round(&self, order: &FreezeOrder, rest: Option<Rest>, sender: &Arc<Sender>) -> LastRound {
        let mut followers = Arc::clone(&self.followers).lock_owned().await;
        let (context, way, files) = (self.context.clone(), self.way(sender), order.files.clone());
        tokio::task::spawn_blocking(move || match rest {
            Some(rest) => followers.last_round(&context, &files, &way, rest),
            None => Ok(0),
        })
    }

    /// Waits for the end of CRIU's dump, then sends images, writable layer and volumes, and what the end check needs.
    async fn send_rest(
        &self,
        order: &FreezeOrder,
        deadline: SystemTime,
        sender: &Arc<Sender>,
        forwarding: tokio::task::JoinHandle<Result<u64, podferry_criu::CriuError>>,
        last_round: LastRound,
    ) -> Result<Sent, Failure> {
        let dumped = self.worker()?.until(patience(deadline), |view| *view == View::Stage(Stage::Dumped)).await;
        let forwarded = async {
            let ended = forwarding.await;
            ended.map_err(|error| self.context.failure(FailureCode::Internal, "the page stream's task ended", &error))
        };
        if dumped != View::Stage(Stage::Dumped) {
            // The transfer's failure is the cause when there is one: CRIU only sees its socket closed.
            if let View::Stage(Stage::Undone { .. }) | View::Lost = dumped
                && let Ok(Err(error)) = forwarded.await
                && matches!(error, podferry_criu::CriuError::Sink(_))
            {
                return Err(self.transfer_failed(&error));
            }
            self.check(&dumped)?;
            let message = "the dump did not end before the migration's deadline";
            return Err(self.context.refusal(FailureCode::DeadlineExceeded, message).in_phase("dump"));
        }
        let dumped_at = Instant::now();
        tracing::debug!(migration = %order.migration, "dumped");
        let mut pages = forwarded.await?.map_err(|error| self.transfer_failed(&error))?;
        let what = "the task of the last round ended";
        pages += last_round.await.map_err(|error| self.context.failure(FailureCode::Internal, what, &error))??;
        tracing::debug!(migration = %order.migration, "the last round is sent");
        self.send_images(sender).await?;
        tracing::debug!(migration = %order.migration, "the images are sent");
        self.send_files(order, sender).await?;
        tracing::debug!(migration = %order.migration, "the files are sent");
        let verifying = if order.verifies() { Some(self.verify(order, sender).await?) } else { None };
        Ok(Sent { pages, dumped_at, verifying })
    }

    /// Has the target compare all memory that was sent before the freeze. Gives how many bytes, and since when.
    async fn verify(&self, order: &FreezeOrder, sender: &Arc<Sender>) -> Result<(u64, Instant), Failure> {
        let mut followers = Arc::clone(&self.followers).lock_owned().await;
        let (images, way, begun) = (self.dirs.images.clone(), self.way(sender), Instant::now());
        let sent = tokio::task::spawn_blocking(move || followers.verify(&images, &way));
        let what = "the task of the end check ended";
        let sent = sent.await.map_err(|error| self.context.failure(FailureCode::Internal, what, &error))?;
        match sent {
            Ok(pages) => Ok((pages * podferry_memory::PAGE_SIZE, begun)),
            Err(SendError::Transfer(error)) => Err(self.finish_failed(order, &error)),
            Err(error) => {
                let what = "the memory of the frozen processes cannot be read for the end check";
                Err(self.context.failure(FailureCode::Unavailable, what, &error).in_phase(VERIFY))
            }
        }
    }

    async fn spawn_forwarding(
        &self,
        pages: &UnixListener,
        sender: &Arc<Sender>,
    ) -> Result<tokio::task::JoinHandle<Result<u64, podferry_criu::CriuError>>, Failure> {
        let what = "the dump worker does not bring CRIU's page stream";
        let (socket, _) = tokio::time::timeout(Duration::from_secs(10), pages.accept())
            .await
            .map_err(|error| self.context.failure(FailureCode::DeadlineExceeded, what, &error))?
            .map_err(|error| self.context.failure(FailureCode::Internal, what, &error))?;
        let socket = socket.into_std().and_then(|socket| socket.set_nonblocking(false).map(|()| socket));
        let socket = socket.map_err(|error| self.context.failure(FailureCode::Internal, what, &error))?;
        let (pool, sender) = (sender.pool(), Arc::downgrade(sender));
        Ok(tokio::task::spawn_blocking(move || pages::forward(socket, sender, pool)))
    }

    async fn send_images(&self, sender: &Arc<Sender>) -> Result<(), Failure> {
        let images = self.dirs.images.clone();
        let sender = Arc::clone(sender);
        let context = self.context.clone();
        let cancelled = self.cancelled.clone();
        blocking(move || {
            let files = files_of(&images).map_err(|error| io_failed(&context, &error))?;
            // The descriptors are there already.
            let mut rest = files.iter().filter(|file| !file.ends_with(DESCRIPTORS));
            rest.try_for_each(|file| send_image(&context, &sender, file, &cancelled))
        })
        .await
    }

    /// Sends the writable layer and the volumes of a container that stands still.
    pub(super) async fn send_files(&self, order: &FreezeOrder, sender: &Arc<Sender>) -> Result<(), Failure> {
        let files = order.files.clone();
        let seeds = std::mem::take(&mut self.followers.lock().await.seeds);
        let sender = Arc::clone(sender);
        let context = self.context.clone();
        let cancelled = self.cancelled.clone();
        blocking(move || {
            for ((name, layer), seeder) in files.iter().zip(seeds.into_seeders()) {
                send_tree(&sender, name, layer, &seeder, &cancelled).map_err(|error| {
                    let what = format!("the files of {name} cannot be sent");
                    context.failure(FailureCode::Unavailable, &what, error.as_ref()).in_phase("transfer")
                })?;
            }
            Ok(())
        })
        .await
    }

    /// As [`Self::transfer_failed`], but for a difference that the end check has found: the transfer is not to blame for that.
    fn finish_failed(&self, order: &FreezeOrder, error: &TransferError) -> Failure {
        match (error, &order.target) {
            (TransferError::Refused(found), Peer::Agent(node)) if found.phase.as_deref() == Some(VERIFY) => {
                found.as_ref().clone().on(node.as_str())
            }
            _ => self.transfer_failed(error),
        }
    }
}

/// Writes down what CRIU is not to see; gives the file.
fn hide(context: &Context, dirs: &PartDirs, followers: &mut Followers) -> Result<PathBuf, Failure> {
    let ranges = dirs.run.join("hidden");
    followers.hide(&ranges).map_err(|error| io_failed(context, &error))?;
    Ok(ranges)
}

async fn start_worker(
    context: &Context,
    dirs: &PartDirs,
    order: &FreezeOrder,
    externals: Externals,
    hidden: Option<PathBuf>,
    diverted: Option<Diverted>,
) -> Result<(Worker, UnixListener), Failure> {
    let init = order.container.init.ok_or_else(|| not_running(context, &order.container.id))?;
    let pages = UnixListener::bind(dirs.page_socket()).map_err(|error| io_failed(context, &error))?;
    let tools = &context.config.tools;
    let throttled = ThrottleRecord::load(&dirs.throttle_file()).map_err(|error| {
        let what = "the container's own CPU limit is not known";
        context.failure(FailureCode::Internal, what, &error).in_phase("freeze")
    })?;
    let job = DumpJob {
        migration: order.migration.to_string(),
        criu: tools.criu.clone(),
        root: order.container.root.clone(),
        container: order.container.id.clone(),
        request: DumpRequest {
            pid: init.pid,
            images_dir: dirs.images.clone(),
            work_dir: dirs.work.clone(),
            root: order.container.rootfs.clone(),
            external_mounts: externals.mounts,
            externals: externals.namespaces,
            tcp_established: order.connections != Connections::Close,
            // The others are given the time to be taken.
            skip_in_flight: order.connections != Connections::Keep,
            freeze_cgroup: None,
            cgroups: CgroupsMode::Ignore,
            freeze_timeout_s: FREEZE_TIMEOUT_S,
        },
        shim: tools.criu_shim.clone(),
        programs: dirs.programs(tools).map_err(|error| io_failed(context, &error))?,
        // Throttled processes: see the worker.
        mappings: hidden.as_ref().filter(|_| throttled.is_none()).map(|_| dirs.run.join("mappings")),
        hidden,
        link: order.link_handle(),
        diverted,
        throttled,
        deadline: SystemTime::now() + order.patience,
        control: dirs.control_socket(),
        record: dirs.worker_record(),
    };
    let job_file = dirs.job_file();
    let log = dirs.state.join("worker.log");
    let worker = Worker::start(&tools.dump_worker, &job, job_file, &dirs.page_socket(), &log).await;
    worker.map(|worker| (worker, pages)).map_err(|failure| failure.on(context.config.node.as_str()))
}

fn send_image(context: &Context, sender: &Sender, file: &Path, cancelled: &CancellationToken) -> Result<(), Failure> {
    send_file(sender, file, cancelled).map_err(|error| {
        context.failure(FailureCode::Unavailable, "an image cannot be sent", error.as_ref()).in_phase("transfer")
    })
}

fn send_file(sender: &Sender, file: &Path, cancelled: &CancellationToken) -> Result<(), Box<dyn std::error::Error>> {
    let name = file.file_name().ok_or("an image without a name")?.to_string_lossy().into_owned();
    let writer = sender.open_blocking(&Object::ImageFile(name))?;
    let mut out = pages::LayerOut::new(writer, cancelled.clone());
    std::io::copy(&mut std::fs::File::open(file)?, &mut out)?;
    Ok(out.close()?)
}

fn send_tree(
    sender: &Sender,
    name: &str,
    layer: &WritableLayer,
    seeder: &Seeder,
    cancelled: &CancellationToken,
) -> Result<(), Box<dyn std::error::Error>> {
    let writer = sender.open_blocking(&Object::Layer(name.to_owned()))?;
    let mut out = pages::LayerOut::new(writer, cancelled.clone());
    podferry_filesystem::pack_with_seeds(layer, seeder, &mut out)?;
    Ok(out.close()?)
}

fn files_of(dir: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            files.push(entry.path());
        }
    }
    files.sort();
    Ok(files)
}
