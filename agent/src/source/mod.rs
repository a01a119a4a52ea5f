//! A migration's part on the node that the container leaves.
//!
//! ```text
//!  Freeze ─▶ [pre-copy] ─▶ worker started ─▶ tasks frozen, link cut ─▶ the rest sent ─▶ FROZEN ─Seal─▶ SEALED ─Release─▶ RELEASED
//!                └───────────────┴──────────────────┴───── anything wrong ───┴─────────────┴───── Abort ─────┘──▶ ABORTED
//! ```
//!
//! [Pre-copy](precopy) is for live migrations: memory is sent while the container runs. If it is asked for, all of that is compared
//! with what the target has before FROZEN.
//!
//! The tasks belong to the [dump worker](crate::worker), which undoes an unsealed part by itself. What is here moves what
//! CRIU writes, and when the worker was killed does what it would have done, from its record.

mod arrivals;
mod batch;
mod fetched;
mod pages;
mod precopy;
mod sweep;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use podferry_common::MigrationId;
use podferry_common::failure::{Failure, FailureCode, chain};
use podferry_common::identity::Peer;
use podferry_criu::{CgroupsMode, DumpRequest};
use podferry_filesystem::WritableLayer;
use podferry_network::{ContainerLink, LinkHandle};
use podferry_runtime::{Container, Externals, Init};
use podferry_transfer::{Compression, Introduction, Object, Options, Sender, SenderStats, TransferError};
use tokio::net::UnixListener;
use tokio::sync::{Mutex, OwnedMutexGuard, mpsc};
use tokio_util::sync::CancellationToken;

use crate::context::{Context, blocking};
use crate::journal::{FetchedBy, Ledger, PartDirs, PartRecord, Role, Standing};
use crate::parts::Authority;
use crate::throttle::ThrottleRecord;
use crate::worker::client::{View, Worker};
use crate::worker::messages::{DumpJob, Order, Stage, WorkerRecord};
use arrivals::Arrivals;
use precopy::{Converged, Followers, Rest, SendError, Way};

pub use fetched::PageReader;
pub use precopy::{PreCopyOrder, Round};

/// How long CRIU may take to stop all tasks.
const FREEZE_TIMEOUT_S: u32 = 5;
/// How long the worker gets to seal: freezing a cgroup of stopped tasks.
const SEAL_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the worker gets to undo a dump. CRIU resumes a container in milliseconds.
const UNDO_TIMEOUT: Duration = Duration::from_secs(30);
/// How long killed tasks get to die before Release says that it is still waiting.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(60);
/// How often progress is told.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);
/// The name of the writable layer in the transfer.
pub const LAYER: &str = "upper";
/// The phase of a failure that the end check has found.
pub const VERIFY: &str = "verify";

/// What the coordinator wants of a freeze.
#[derive(Clone, Debug)]
pub struct FreezeOrder {
    /// Of which migration.
    pub migration: MigrationId,
    /// The container, as it was found.
    pub container: Container,
    /// Its link, when it has one that can be cut.
    pub link: Option<ContainerLink>,
    /// Where it goes.
    pub target: Peer,
    /// host:port of the target's agent.
    pub target_address: String,
    /// Whether connections are kept.
    pub keep_connections: bool,
    /// Whether pages may be compressed.
    pub compress: bool,
    /// The most bytes per second on the link; none for as many as it takes.
    pub bandwidth_limit: Option<u64>,
    /// How to pre-copy; none: freeze at once.
    pub pre_copy: Option<PreCopyOrder>,
    /// Whether memory that pre-copy has not brought below the budget stays here for the target to fetch.
    pub post_copy: bool,
    /// How long after the end of pre-copy an unsealed part undoes itself.
    pub patience: Duration,
}

impl FreezeOrder {
    /// Where to cut the link.
    fn link_handle(&self) -> Option<LinkHandle> {
        self.link.as_ref()?.peer.as_ref().map(LinkHandle::new)
    }

    fn fetched_by(&self) -> Option<FetchedBy> {
        let Peer::Agent(node) = &self.target else { return None };
        let (node, compress, bandwidth_limit) = (node.clone(), self.compress, self.bandwidth_limit);
        self.post_copy.then_some(FetchedBy { node, compress, bandwidth_limit })
    }

    /// Whether all memory that is sent before the freeze is compared in it.
    fn verifies(&self) -> bool {
        self.pre_copy.is_some_and(|pre_copy| pre_copy.verify)
    }

    /// When an unsealed part undoes itself at the latest.
    pub fn deadline(&self) -> SystemTime {
        self.pre_copy.map_or_else(SystemTime::now, |pre_copy| pre_copy.deadline) + self.patience
    }
}

/// What a freeze tells while it goes on.
#[derive(Clone, Debug, PartialEq)]
pub enum FreezeEvent {
    /// A round of pre-copy has ended.
    Round(Round),
    /// Pre-copy has ended; the freeze begins now.
    Converged {
        /// What the memory that is left will add to the downtime, in milliseconds.
        predicted_ms: f64,
        /// What a person should know.
        notes: Vec<String>,
    },
    /// The tasks are frozen; milliseconds since the request.
    Frozen {
        /// From the request to the freeze.
        freeze_ms: f64,
    },
    /// Bytes so far.
    Progress {
        /// Of the workload.
        raw_bytes: u64,
        /// On the wire.
        wire_bytes: u64,
    },
    /// All is with the target, verified and stored.
    Transferred {
        /// Pages with contents.
        pages: u64,
        /// Bytes of the workload.
        raw_bytes: u64,
        /// Of them zero pages, which were not sent.
        zero_bytes: u64,
        /// Bytes on the wire.
        wire_bytes: u64,
        /// From the freeze until CRIU had written everything.
        dump_ms: f64,
        /// From then until the target confirmed.
        transfer_ms: f64,
        /// What was sent in the freeze, after a pre-copy.
        last_round: Option<Round>,
        /// What the end check came to, if there was one.
        verified: Option<Verified>,
    },
}

/// What an end check came to that found no difference.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Verified {
    /// Bytes that were compared, zero pages included.
    pub bytes: u64,
    /// From the first page that was read for it to the target's confirmation.
    pub duration: Duration,
}

/// What was sent behind the freeze.
struct Sent {
    /// Pages of the last round and of CRIU.
    pages: u64,
    /// When CRIU had written everything.
    dumped_at: Instant,
    /// What is being compared, and since when.
    verifying: Option<(u64, Instant)>,
}

/// The part.
#[derive(Debug)]
pub struct SourcePart {
    context: Context,
    dirs: PartDirs,
    /// None when it was gone before a restarted agent looked.
    container: Option<Container>,
    /// None before the freeze, and when it was killed before a restarted agent looked.
    worker: Arc<OnceLock<Worker>>,
    /// Whose writes are followed. Locked while anybody reads their memory or starts the worker: an abort waits for that.
    followers: Arc<Mutex<Followers>>,
    ledger: Ledger,
    /// Post-copy: who fetches what stays here.
    fetched_by: Option<FetchedBy>,
    /// What comes for the container while its link is cut; none before, and in a restarted agent.
    arrivals: OnceLock<Arrivals>,
    pre_copying: AtomicBool,
    /// Ends a dump and transfer that go on: a stalled link must not keep the tasks frozen.
    cancelled: CancellationToken,
}

/// A dump under way.
struct Dump {
    /// Where CRIU's page stream comes.
    pages: UnixListener,
    /// When it began.
    at: Instant,
    /// What had been sent by then.
    sent_before: SenderStats,
    /// What pre-copy came to, if there was one.
    converged: Option<Converged>,
}

/// The way to the target, which has admitted the transfer.
#[expect(missing_debug_implementations, reason = "the transfer's sender has none")]
pub struct Connected(Arc<Sender>);

impl SourcePart {
    /// Connects to the target. The container is not touched yet.
    ///
    /// # Errors
    /// When anything cannot be made ready; then nothing is left.
    pub async fn begin(context: &Context, order: &FreezeOrder) -> Result<(Self, Connected), Failure> {
        let dirs = PartDirs::of(&context.config, order.migration);
        let init = order.container.init.ok_or_else(|| not_running(context, &order.container.id))?;
        let mut record = PartRecord {
            migration: order.migration,
            workload: order.container.id.clone(),
            standing: Standing::Open,
            tidied: false,
            going: false,
            written: SystemTime::now(),
            role: Role::Source {
                root: order.container.root.clone(),
                init_pid: init.pid,
                init_start: init.start_time,
                bundle: order.container.bundle.clone(),
                link: order.link_handle(),
                netns: order.container.namespace_paths.get(&podferry_runtime::NamespaceKind::Network).cloned(),
                fetched_by: order.fetched_by(),
            },
        };
        // A target that cannot be reached is to cost the tasks nothing.
        let connected = async {
            let begun = record.begin(&dirs);
            let what = "the part's folders cannot be made";
            begun.map_err(|error| context.failure(FailureCode::Internal, what, &error))?;
            connect(context, order).await
        };
        match connected.await {
            Ok(sender) => {
                let container = Some(order.container.clone());
                Ok((Self::of(context, dirs, container, record), Connected(sender)))
            }
            Err(failure) => {
                dirs.wipe_volatile();
                forget(&dirs);
                Err(failure)
            }
        }
    }

    fn of(context: &Context, dirs: PartDirs, container: Option<Container>, record: PartRecord) -> Self {
        let fetched_by = match &record.role {
            Role::Source { fetched_by, .. } => fetched_by.clone(),
            Role::Target { .. } => None,
        };
        let ledger = Ledger::new(record, dirs.clone());
        Self {
            context: context.clone(),
            dirs,
            container,
            worker: Arc::default(),
            followers: Arc::default(),
            ledger,
            fetched_by,
            arrivals: OnceLock::new(),
            pre_copying: AtomicBool::new(false),
            cancelled: CancellationToken::new(),
        }
    }

    /// A part of an agent that was killed, taken up again. `worker` is the one that still lives, if it does.
    pub fn resumed(context: &Context, record: PartRecord, worker: Option<Worker>) -> Self {
        let dirs = PartDirs::of(&context.config, record.migration);
        let container = match &record.role {
            Role::Source { root, init_pid, init_start, .. } => {
                let found = podferry_runtime::find(std::slice::from_ref(root), &record.workload).ok();
                let init = Init { pid: *init_pid, start_time: *init_start };
                // Another container of that name is not ours to touch.
                found.filter(|container| container.init.is_none_or(|found| found == init))
            }
            Role::Target { .. } => None,
        };
        let part = Self::of(context, dirs, container, record);
        if let Some(worker) = worker {
            let _never_set_before = part.worker.set(worker);
        }
        part
    }

    /// Pre-copies, if that is wanted, then dumps and sends. Returns when the target has confirmed everything; the tasks stay
    /// frozen.
    ///
    /// # Errors
    /// What went wrong. Then the tasks run on, or [`SourcePart::abort`] has to be called and sees to it.
    pub async fn run(
        &self,
        order: &FreezeOrder,
        Connected(sender): Connected,
        events: &mpsc::Sender<FreezeEvent>,
    ) -> Result<(), Failure> {
        let work = async {
            let followers = Arc::clone(&self.followers).lock_owned().await;
            let (followers, converged) = match order.pre_copy {
                None if order.post_copy => self.stand_by(order, &sender, followers).await?,
                Some(wish) => {
                    self.pre_copying.store(true, Ordering::Relaxed);
                    self.pre_copy(order, wish, &sender, events, followers).await?
                }
                None => (followers, None),
            };
            self.pre_copying.store(false, Ordering::Relaxed);
            self.watch_arrivals(order);
            let dump = self.start_dump(order, &sender, converged, followers).await?;
            self.dump_and_send(order, dump, sender, events).await
        };
        tokio::select! {
            ended = work => ended,
            // Dropping the transfer breaks CRIU's page stream, and CRIU fails and resumes the tasks.
            () = self.cancelled.cancelled() => {
                Err(self.context.refusal(FailureCode::Aborted, "the migration was aborted").in_phase("transfer"))
            }
        }
    }

    /// Announces to the target whose memory will stay here.
    async fn stand_by(
        &self,
        order: &FreezeOrder,
        sender: &Arc<Sender>,
        mut followers: OwnedMutexGuard<Followers>,
    ) -> Result<(OwnedMutexGuard<Followers>, Option<Converged>), Failure> {
        self.check_version(order, sender)?;
        let (context, container, way) = (self.context.clone(), order.container.clone(), self.way(sender));
        blocking(move || {
            let converged = followers.stand_by(&context, &container, &way)?;
            Ok((followers, Some(converged)))
        })
        .await
    }

    fn check_version(&self, order: &FreezeOrder, sender: &Sender) -> Result<(), Failure> {
        if sender.version() >= podferry_proto::Version::PRE_COPY {
            return Ok(());
        }
        let message = format!("the agent of {} does not take memory beside CRIU's", order.target);
        let failure = self.context.refusal(FailureCode::Unimplemented, message).in_phase("precopy");
        Err(failure.remedy("update it, or migrate warm"))
    }

    async fn pre_copy(
        &self,
        order: &FreezeOrder,
        wish: PreCopyOrder,
        sender: &Arc<Sender>,
        events: &mpsc::Sender<FreezeEvent>,
        mut followers: OwnedMutexGuard<Followers>,
    ) -> Result<(OwnedMutexGuard<Followers>, Option<Converged>), Failure> {
        self.check_version(order, sender)?;
        let job = precopy::Job {
            context: self.context.clone(),
            container: order.container.clone(),
            order: wish,
            post_copy: order.post_copy,
            way: self.way(sender),
            events: events.clone(),
            throttle_file: self.dirs.throttle_file(),
        };
        let telling = tell_progress(sender, events);
        let copying = blocking(move || {
            let converged = followers.pre_copy(&job)?;
            Ok((followers, Some(converged)))
        });
        tokio::select! {
            copied = copying => copied,
            () = telling => Err(self.context.refusal(FailureCode::Internal, "progress ended").in_phase("precopy")),
        }
    }

    /// Before the freeze, so that nothing is missed. A migration goes on without: its clients wait a little longer then.
    fn watch_arrivals(&self, order: &FreezeOrder) {
        let Some(link) = order.link.as_ref().filter(|_| order.keep_connections) else { return };
        match Arrivals::watch(&self.context, order, link) {
            Ok(arrivals) => drop(self.arrivals.set(arrivals)),
            Err(error) => tracing::warn!(error = chain(&error), "what comes in the freeze cannot be kept"),
        }
    }

    fn way(&self, sender: &Arc<Sender>) -> Way {
        Way { sender: Arc::downgrade(sender), cancelled: self.cancelled.clone() }
    }

    /// Starts the worker, which starts CRIU. To its end, also when nobody waits any more: a worker must be known.
    async fn start_dump(
        &self,
        order: &FreezeOrder,
        sender: &Sender,
        converged: Option<Converged>,
        mut followers: OwnedMutexGuard<Followers>,
    ) -> Result<Dump, Failure> {
        let (context, dirs, order) = (self.context.clone(), self.dirs.clone(), order.clone());
        let (worker, cancelled) = (Arc::clone(&self.worker), self.cancelled.clone());
        let sent_before = sender.stats();
        let starting = tokio::spawn(async move {
            if cancelled.is_cancelled() {
                return Err(context.refusal(FailureCode::Aborted, "the migration was aborted").in_phase("freeze"));
            }
            let hidden = converged.is_some().then(|| hide(&context, &dirs, &mut followers)).transpose()?;
            let at = Instant::now();
            let (started, pages) = start_worker(&context, &dirs, &order, hidden).await?;
            let _never_set_before = worker.set(started);
            drop(followers);
            Ok(Dump { pages, at, sent_before, converged })
        });
        let what = "the task that starts a dump ended";
        starting.await.map_err(|error| self.context.failure(FailureCode::Internal, what, &error))?
    }

    async fn dump_and_send(
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
        let frozen_at = Instant::now();
        let last_round = self.spawn_last_round(converged.as_ref().map(|converged| converged.rest), &sender).await;
        let _ = events.send(FreezeEvent::Frozen { freeze_ms: ms(begun, frozen_at) }).await;

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
    async fn spawn_last_round(&self, rest: Option<Rest>, sender: &Arc<Sender>) -> LastRound {
        let mut followers = Arc::clone(&self.followers).lock_owned().await;
        let (context, way) = (self.context.clone(), self.way(sender));
        tokio::task::spawn_blocking(move || match rest {
            Some(rest) => followers.last_round(&context, &way, rest),
            None => Ok(0),
        })
    }

    /// Waits for the end of CRIU's dump, then sends images and writable layer, and what the end check needs.
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
        let mut pages = forwarded.await?.map_err(|error| self.transfer_failed(&error))?;
        let what = "the task of the last round ended";
        pages += last_round.await.map_err(|error| self.context.failure(FailureCode::Internal, what, &error))??;
        self.send_images(sender).await?;
        self.send_layer(&order.container, sender).await?;
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
            for file in files_of(&images).map_err(|error| io_failed(&context, &error))? {
                send_file(&sender, &file, &cancelled).map_err(|error| {
                    context
                        .failure(FailureCode::Unavailable, "an image cannot be sent", error.as_ref())
                        .in_phase("transfer")
                })?;
            }
            Ok(())
        })
        .await
    }

    async fn send_layer(&self, container: &Container, sender: &Arc<Sender>) -> Result<(), Failure> {
        let rootfs = container.rootfs.clone();
        let sender = Arc::clone(sender);
        let context = self.context.clone();
        let cancelled = self.cancelled.clone();
        blocking(move || {
            let failed = |error: &(dyn std::error::Error + 'static)| {
                context
                    .failure(FailureCode::Unavailable, "the writable layer cannot be sent", error)
                    .in_phase("transfer")
            };
            let layer = WritableLayer::of(&rootfs).map_err(|error| failed(&error))?;
            if matches!(layer, WritableLayer::Plain { .. }) {
                return Ok(());
            }
            let object = Object::Layer(LAYER.to_owned());
            let writer = sender.open_blocking(&object).map_err(|error| failed(&error))?;
            let mut out = pages::LayerOut::new(writer, cancelled);
            podferry_filesystem::pack(&layer, &mut out).map_err(|error| failed(&error))?;
            out.close().map_err(|error| failed(&error))
        })
        .await
    }

    /// From now on the part waits for the decision, whatever happens to this agent.
    ///
    /// # Errors
    /// When the part is not frozen, or the seal cannot be made; then it is as before.
    pub async fn seal(&self) -> Result<(), Failure> {
        let mut record = self.ledger.lock().await;
        match record.standing {
            Standing::Sealed => return Ok(()),
            Standing::Open => {}
            other => return Err(self.wrong_standing("seal", other)),
        }
        let worker = self.worker()?;
        if worker.view() != View::Stage(Stage::Dumped) {
            self.check(&worker.view())?;
            let message = "the container is not frozen and dumped";
            return Err(self.context.refusal(FailureCode::FailedPrecondition, message).in_phase("commit"));
        }
        worker.order(&Order::Seal).await;
        let sealed = worker.until(SEAL_TIMEOUT, |view| *view != View::Stage(Stage::Dumped)).await;
        match sealed {
            View::Stage(Stage::Sealed) => {}
            View::Stage(Stage::NotSealed { message }) => {
                let message = format!("the frozen container cannot be sealed: {message}");
                return Err(self.context.refusal(FailureCode::Internal, message).in_phase("commit"));
            }
            other => {
                self.check(&other)?;
                let message = "the dump worker does not seal in time";
                return Err(self.context.refusal(FailureCode::DeadlineExceeded, message).in_phase("commit"));
            }
        }
        self.ledger
            .change(&mut record, |record| record.standing = Standing::Sealed)
            .map_err(|error| io_failed(&self.context, &error))
    }

    /// The migration is committed: ends the container. Returns once none of its processes will run another instruction; the rest of
    /// their end, and what else the container leaves, is for [`SourcePart::tidy`].
    ///
    /// # Errors
    /// When a process does not die, or the record cannot be written; to be called again.
    pub async fn release(&self) -> Result<(), Failure> {
        let mut record = self.ledger.lock().await;
        match record.standing {
            Standing::Released => return Ok(()),
            Standing::Sealed => {}
            other => return Err(self.wrong_standing("release", other)),
        }
        let ended = match self.worker.get() {
            Some(worker) => {
                worker.order(&Order::Release).await;
                worker.until(RELEASE_TIMEOUT, View::is_last).await
            }
            None => View::Lost,
        };
        match ended {
            View::Stage(Stage::Released) => {}
            View::Lost => self.kill_orphans(&record).await?,
            View::Stage(_) => {
                let message = "the committed source's processes do not die (uninterruptible I/O?)";
                return Err(self.context.refusal(FailureCode::DeadlineExceeded, message).in_phase("release"));
            }
        }
        if let Some(arrivals) = self.arrivals.get() {
            arrivals.end_soon();
        }
        self.ledger
            .change(&mut record, |record| record.standing = Standing::Released)
            .map_err(|error| io_failed(&self.context, &error))
    }

    /// Removes what a released container leaves: runc's state, its writable layer, its network namespace, its images.
    pub async fn tidy(&self) {
        if let Some(worker) = self.worker.get() {
            worker.gone().await;
        }
        let followers = std::mem::take(&mut *self.followers.lock().await);
        if let Err(failure) = end_following(followers).await {
            tracing::error!(%failure, "what followed a released container does not end");
        }
        let mut record = self.ledger.lock().await;
        // The workload may have come back since.
        if record.tidied {
            return;
        }
        // Those of a worker that was killed just behind its word may still be dying.
        if init_lives(&record)
            && let Err(failure) = self.kill_orphans(&record).await
        {
            tracing::error!(%failure, "a released container's processes do not end");
        }
        sweep::remove_container(&self.context, &record, self.container.as_ref()).await;
        if let Err(failure) = sweep::release_throttle(&self.context, &self.dirs, &record).await {
            tracing::error!(%failure, "the note of a released container's CPU limit cannot be removed");
        }
        self.dirs.wipe_volatile();
        if let Err(error) = self.ledger.change(&mut record, |record| record.tidied = true) {
            tracing::error!(%error, migration = %record.migration, "that a released source was removed cannot be noted");
        }
    }

    /// Lets the container run on. Returns once it does.
    ///
    /// # Errors
    /// When it does not resume or its link stays cut; to be called again.
    pub async fn abort(&self, reason: &str, authority: Authority) -> Result<(), Failure> {
        let mut record = self.ledger.lock().await;
        match record.standing {
            Standing::Aborted => return Ok(()),
            Standing::Open => {}
            Standing::Sealed if authority == Authority::Coordinator => {}
            other => return Err(self.wrong_standing("abort", other)),
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
        if let Some(arrivals) = self.arrivals.get() {
            arrivals.give_back();
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

    /// Where the part stands.
    pub fn standing(&self) -> Standing {
        self.ledger.standing()
    }

    /// Post-copy: who fetches what stays here, and how it is given.
    pub fn fetched_by(&self) -> Option<&FetchedBy> {
        self.fetched_by.as_ref()
    }

    /// Whether the container's memory is as it was when it was frozen, and stays so.
    pub fn stands_still(&self) -> bool {
        match self.standing() {
            Standing::Open => self.is_frozen(),
            standing => standing == Standing::Sealed,
        }
    }

    /// Whether the worker holds the frozen tasks.
    pub fn is_frozen(&self) -> bool {
        let view = self.worker.get().map(Worker::view);
        matches!(view, Some(View::Stage(Stage::Frozen { .. } | Stage::Dumped | Stage::Sealed)))
    }

    /// Whether memory is sent while the tasks run.
    pub fn is_pre_copying(&self) -> bool {
        self.pre_copying.load(Ordering::Relaxed)
    }

    /// Waits until the worker has ended.
    pub async fn ended(&self) {
        if let Some(worker) = self.worker.get() {
            worker.until(Duration::MAX, View::is_last).await;
        }
    }

    /// The worker was killed after the commit: does its work.
    async fn kill_orphans(&self, record: &PartRecord) -> Result<(), Failure> {
        tracing::warn!("the dump worker is gone; killing the committed source's processes in its place");
        let Some(container) = self.known_unless_dead(record)? else { return Ok(()) };
        blocking(move || {
            crate::worker::run::kill_all(&container);
            Ok(())
        })
        .await
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

    /// The container; none when its init is dead.
    fn known_unless_dead(&self, record: &PartRecord) -> Result<Option<Container>, Failure> {
        if self.container.is_none() && init_lives(record) {
            let message = format!("what runc knows of {} cannot be read, and its init lives", record.workload);
            return Err(self.context.refusal(FailureCode::Internal, message));
        }
        Ok(self.container.clone())
    }

    fn worker(&self) -> Result<&Worker, Failure> {
        let gone = || self.context.refusal(FailureCode::Internal, "the dump worker was killed").in_phase("freeze");
        self.worker.get().ok_or_else(gone)
    }

    /// Turns a worker's last word into the failure it is.
    fn check(&self, view: &View) -> Result<(), Failure> {
        match view {
            View::Lost => {
                let failure = self.context.refusal(FailureCode::Internal, "the dump worker was killed");
                Err(failure.in_phase("dump").remedy("see who killed it; the container runs on"))
            }
            View::Stage(Stage::Undone { message, criu_line, remedy, left }) => {
                let message = if left.is_empty() { message.clone() } else { format!("{message}; {}", left.join("; ")) };
                let mut failure = self.context.refusal(FailureCode::Aborted, message).in_phase("dump");
                failure.criu_line.clone_from(criu_line);
                failure.remedy.clone_from(remedy);
                Err(failure)
            }
            View::Stage(Stage::Freezing) => {
                let failure =
                    self.context.refusal(FailureCode::DeadlineExceeded, "the container does not freeze in time");
                Err(failure.in_phase("freeze"))
            }
            View::Stage(_) => Ok(()),
        }
    }

    fn transfer_failed(&self, error: &(dyn std::error::Error + 'static)) -> Failure {
        transfer_failed(&self.context, error)
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

    fn wrong_standing(&self, what: &str, standing: Standing) -> Failure {
        let message = format!("cannot {what} a source that is {standing:?}");
        self.context.refusal(FailureCode::FailedPrecondition, message)
    }
}

/// The last round, on a thread of its own; gives how many pages it sent.
type LastRound = tokio::task::JoinHandle<Result<u64, Failure>>;

/// Whether the container's init is the one that was found, and not gone.
fn init_lives(record: &PartRecord) -> bool {
    matches!(record.role, Role::Source { init_pid, init_start, .. } if Init { pid: init_pid, start_time: init_start }.is_alive())
}

async fn end_following(followers: Followers) -> Result<(), Failure> {
    blocking(move || {
        drop(followers);
        Ok(())
    })
    .await
}

/// Writes down what CRIU is not to see; gives the file.
fn hide(context: &Context, dirs: &PartDirs, followers: &mut Followers) -> Result<PathBuf, Failure> {
    let ranges = dirs.run.join("hidden");
    followers.hide(&ranges).map_err(|error| io_failed(context, &error))?;
    Ok(ranges)
}

fn transfer_failed(context: &Context, error: &(dyn std::error::Error + 'static)) -> Failure {
    context.failure(FailureCode::Unavailable, "the transfer to the target broke", error).in_phase("transfer")
}

async fn connect(context: &Context, order: &FreezeOrder) -> Result<Arc<Sender>, Failure> {
    let introduction = Introduction {
        migration_id: order.migration,
        source_node: context.config.node.clone(),
        version: podferry_proto::Version::OURS,
    };
    let compression = if order.compress { Compression::Auto } else { Compression::Off };
    let options = Options { compression, bandwidth_cap: order.bandwidth_limit };
    let connecting = Sender::connect(&order.target_address, &context.identity, &order.target, &introduction, options);
    connecting.await.map(Arc::new).map_err(|error| transfer_failed(context, &error))
}

async fn start_worker(
    context: &Context,
    dirs: &PartDirs,
    order: &FreezeOrder,
    hidden: Option<PathBuf>,
) -> Result<(Worker, UnixListener), Failure> {
    let init = order.container.init.ok_or_else(|| not_running(context, &order.container.id))?;
    let externals = Externals::of(&order.container)
        .and_then(|externals| externals.write_descriptors(&dirs.images).map(|()| externals))
        .map_err(|error| {
            let what = "the container's mounts and namespaces cannot be read";
            context.failure(FailureCode::FailedPrecondition, what, &error).in_phase("freeze")
        })?;
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
            tcp_established: order.keep_connections,
            freeze_cgroup: None,
            cgroups: CgroupsMode::Ignore,
            freeze_timeout_s: FREEZE_TIMEOUT_S,
        },
        shim: tools.criu_shim.clone(),
        programs: dirs.programs(tools).map_err(|error| io_failed(context, &error))?,
        hidden,
        link: order.link_handle(),
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

async fn tell_progress(sender: &Sender, events: &mpsc::Sender<FreezeEvent>) {
    loop {
        tokio::time::sleep(PROGRESS_INTERVAL).await;
        let stats = sender.stats();
        // Nobody listens: the coordinator is gone, and the deadline or its successor decides.
        let _ = events.send(FreezeEvent::Progress { raw_bytes: stats.raw_bytes, wire_bytes: stats.wire_bytes }).await;
    }
}

fn send_file(sender: &Sender, file: &Path, cancelled: &CancellationToken) -> Result<(), Box<dyn std::error::Error>> {
    let name = file.file_name().ok_or("an image without a name")?.to_string_lossy().into_owned();
    let writer = sender.open_blocking(&Object::ImageFile(name))?;
    let mut out = pages::LayerOut::new(writer, cancelled.clone());
    std::io::copy(&mut std::fs::File::open(file)?, &mut out)?;
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

fn forget(dirs: &PartDirs) {
    if let Err(error) = std::fs::remove_dir_all(&dirs.state) {
        tracing::warn!(%error, "a part that never began cannot be forgotten");
    }
}

fn not_running(context: &Context, id: &str) -> Failure {
    context.refusal(FailureCode::FailedPrecondition, format!("{id} does not run")).in_phase("freeze")
}

fn io_failed(context: &Context, error: &std::io::Error) -> Failure {
    tracing::error!(error = chain(error), "the agent cannot write its own files");
    context.failure(FailureCode::Internal, "the agent cannot write its own files", error)
}

fn patience(deadline: SystemTime) -> Duration {
    deadline.duration_since(SystemTime::now()).unwrap_or_default()
}

fn ms(from: Instant, to: Instant) -> f64 {
    to.duration_since(from).as_secs_f64() * 1e3
}
