//! A migration's part on the node that the container leaves.
//!
//! ```text
//!  Freeze ─▶ [pre-copy] ─▶ worker started ─▶ tasks frozen, link cut ─▶ the rest sent ─▶ FROZEN ─Seal─▶ SEALED ─Release─▶ RELEASED
//!                └───────────────┴──────────────────┴───── anything wrong ───┴─────────────┴───── Abort ─────┘──▶ ABORTED
//! ```
//!
//! In an [application-level](application) migration a new instance takes its place; in a [cold](cold) migration the container is stopped instead, the layer alone is sent, and an abort starts it again.
//!
//! [Pre-copy](precopy) is for live migrations: memory is sent while the container runs. If it is asked for, all of that is compared
//! with what the target has before FROZEN.
//!
//! The tasks belong to the [dump worker](crate::worker), which undoes an unsealed part by itself. What is here moves what
//! CRIU writes, and when the worker was killed does what it would have done, from its record.

mod application;
mod arrivals;
mod batch;
mod cold;
mod courtesy;
mod dump;
mod fetched;
mod order;
mod pages;
mod pod;
mod precopy;
mod sweep;
mod undo;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use podferry_common::failure::{Failure, FailureCode, chain};
use podferry_common::identity::Peer;
use podferry_part::{May, Side, Step, may};
use podferry_runtime::{Container, Init};
use podferry_transfer::{Compression, Introduction, Options, Sender};
use tokio::sync::{Mutex, MutexGuard, OwnedMutexGuard, mpsc};
use tokio_util::sync::CancellationToken;

use crate::context::{Context, blocking};
use crate::journal::{FetchedBy, Ledger, PartDirs, PartRecord, Role, Standing};
use crate::pods::{Fence, Keeping};
use crate::relay::{self, Home};
use crate::worker::client::{View, Worker};
use crate::worker::messages::{Order, Stage};
use arrivals::Arrivals;
use pod::fence_of;
use precopy::{Converged, Followers, Way};

pub use fetched::PageReader;
pub use order::{Connections, FreezeEvent, FreezeOrder, Verified};
pub use precopy::{PreCopyOrder, Round};

/// How long the worker gets to seal: freezing a cgroup of stopped tasks.
const SEAL_TIMEOUT: Duration = Duration::from_secs(5);
/// How long killed tasks get to die before Release says that it is still waiting.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(60);
/// How often progress is told.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);
/// The phase of a failure that the end check has found.
pub const VERIFY: &str = "verify";

/// The part.
#[derive(Debug)]
pub struct SourcePart {
    context: Context,
    dirs: PartDirs,
    /// None when it was gone before a restarted agent looked.
    container: Option<Container>,
    /// Kubernetes: what keeps the kubelet from starting it again here, and from killing it while it stands still.
    fence: Option<Fence>,
    /// From the freeze to the end.
    keeping: std::sync::Mutex<Option<Keeping>>,
    /// None before the freeze, and when it was killed before a restarted agent looked.
    worker: Arc<OnceLock<Worker>>,
    /// Whose writes are followed. Locked while anybody reads their memory or starts the worker: an abort waits for that.
    followers: Arc<Mutex<Followers>>,
    ledger: Ledger,
    /// Post-copy: who fetches what stays here.
    fetched_by: Option<FetchedBy>,
    /// Application-level: who has the instance that takes this one's place.
    replaced_on: Option<Peer>,
    /// What comes for the container while its link is cut; none before, and in a restarted agent.
    arrivals: OnceLock<Arrivals>,
    /// Kubernetes: its address, which stays here. None before the freeze.
    home: OnceLock<Home>,
    pre_copying: AtomicBool,
    /// Cold: it has ended, and its layer is with the target. Application-level: the new instance has all that this one had.
    stopped: AtomicBool,
    /// Ends a dump and transfer that go on: a stalled link must not keep the tasks frozen.
    cancelled: CancellationToken,
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
                stop: order.stop,
                take_over: order.take_over,
                volumes: order.volumes.clone(),
                fence: fence_of(context, &order.container),
            },
        };
        let fence = record.fence().cloned();
        // A target that cannot be reached is to cost the tasks nothing.
        let connected = async {
            let begun = record.begin(&dirs).and_then(|()| fence.as_ref().map_or(Ok(()), Fence::put_up));
            begun.map_err(|error| context.failure(FailureCode::Internal, "the part cannot be written down", &error))?;
            connect(context, order).await
        };
        match connected.await {
            Ok(sender) => {
                let container = Some(order.container.clone());
                let mut part = Self::of(context, dirs, container, record);
                part.replaced_on = order.take_over.map(|_| order.target.clone());
                Ok((part, Connected(sender)))
            }
            Err(failure) => {
                dirs.wipe_volatile();
                match fence.as_ref().map_or(Ok(()), Fence::take_away) {
                    Ok(()) => forget(&dirs),
                    // The next agent undoes what is noted.
                    Err(error) => tracing::error!(%error, "the fence around a pod that does not move stays"),
                }
                Err(failure)
            }
        }
    }

    fn of(context: &Context, dirs: PartDirs, container: Option<Container>, record: PartRecord) -> Self {
        let fetched_by = match &record.role {
            Role::Source { fetched_by, .. } => fetched_by.clone(),
            Role::Target { .. } => None,
        };
        let fence = record.fence().cloned();
        let ledger = Ledger::new(record, dirs.clone());
        Self {
            context: context.clone(),
            dirs,
            container,
            fence,
            keeping: std::sync::Mutex::default(),
            worker: Arc::default(),
            followers: Arc::default(),
            ledger,
            fetched_by,
            replaced_on: None,
            arrivals: OnceLock::new(),
            home: OnceLock::new(),
            pre_copying: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
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
        if matches!(part.standing(), Standing::Open | Standing::Sealed)
            && let Some(home) = Home::resumed(context, part.ledger.migration())
        {
            if part.standing() == Standing::Sealed {
                home.frozen();
            }
            let _never_set_before = part.home.set(home);
        }
        if part.standing() == Standing::Sealed
            && let Err(failure) = part.keep_from_being_killed()
        {
            tracing::warn!(%failure, "the kubelet may kill a pod that stands still");
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
            if order.take_over.is_some() {
                return self.hand_over(order, sender, events).await;
            }
            if order.stop.is_some() {
                return self.stop_and_send(order, sender, events).await;
            }
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
            self.keep_from_being_killed()?;
            self.watch_arrivals(order);
            self.stay_home(order).await?;
            let externals = self.describe(order, &sender).await?;
            sender.hurry();
            let dump = self.start_dump(order, externals, &sender, converged, followers).await?;
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
            files: order.files.clone(),
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
        let Some(link) =
            order.link.as_ref().filter(|_| order.connections == Connections::Keep || order.take_over.is_some())
        else {
            return;
        };
        match Arrivals::watch(&self.context, order, link) {
            Ok(arrivals) => drop(self.arrivals.set(arrivals)),
            Err(error) => tracing::warn!(error = chain(&error), "what comes in the freeze cannot be kept"),
        }
    }

    fn way(&self, sender: &Arc<Sender>) -> Way {
        Way { sender: Arc::downgrade(sender), cancelled: self.cancelled.clone(), courtesy: None }
    }

    /// From now on the part waits for the decision, whatever happens to this agent.
    ///
    /// # Errors
    /// When the part is not frozen, or the seal cannot be made; then it is as before.
    pub async fn seal(&self) -> Result<(), Failure> {
        let mut record = self.ledger.lock().await;
        match may(Side::Source, record.standing, Step::Seal) {
            May::Taken => return Ok(()),
            May::Take => {}
            May::Refuse => return Err(self.wrong_standing("seal", record.standing)),
        }
        if record.take_over().is_some() {
            self.check_handed_over(&record)?;
            return self.note_sealed(&mut record);
        }
        if record.stop().is_some() {
            self.check_stopped(&record).await?;
            return self.note_sealed(&mut record);
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
        self.note_sealed(&mut record)
    }

    fn note_sealed(&self, record: &mut MutexGuard<'_, PartRecord>) -> Result<(), Failure> {
        self.ledger
            .change(record, |record| record.standing = Standing::Sealed)
            .map_err(|error| io_failed(&self.context, &error))
    }

    /// The migration is committed: ends the container. Returns once none of its processes will run another instruction; the rest of
    /// their end, and what else the container leaves, is for [`SourcePart::tidy`].
    ///
    /// # Errors
    /// When a process does not die, or the record cannot be written; to be called again.
    pub async fn release(&self) -> Result<(), Failure> {
        let mut record = self.ledger.lock().await;
        match may(Side::Source, record.standing, Step::Release) {
            May::Taken => return Ok(()),
            May::Take => {}
            May::Refuse => return Err(self.wrong_standing("release", record.standing)),
        }
        let ended = match self.worker.get() {
            Some(worker) => {
                worker.order(&Order::Release).await;
                worker.until(RELEASE_TIMEOUT, View::is_last).await
            }
            None if let Some(note) = record.take_over() => {
                self.end_replaced(&record, note).await?;
                View::Stage(Stage::Released)
            }
            None if record.stop().is_some() => {
                self.check_absent(&record).await?;
                View::Stage(Stage::Released)
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
        if let Some(home) = self.home.get() {
            // What it says of the pod is to be the last word.
            self.stop_keeping().await;
            home.commit();
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
        self.stop_keeping().await;
        let fence = self.fence.as_ref().filter(|_| !relay::stays(&self.context, record.migration));
        if let Some(Err(error)) = fence.map(Fence::let_die) {
            tracing::warn!(%error, "the fence around a pod that has moved keeps what is dead");
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

    /// Whether the worker holds the frozen tasks, or cold: they have ended.
    pub fn is_frozen(&self) -> bool {
        if self.stopped.load(Ordering::Relaxed) {
            return true;
        }
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

    fn wrong_standing(&self, what: &str, standing: Standing) -> Failure {
        let message = format!("cannot {what} a source that is {standing:?}");
        self.context.refusal(FailureCode::FailedPrecondition, message)
    }
}

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
    let options = Options { compression, bandwidth_cap: order.bandwidth_limit, shares: context.shares.clone() };
    let connecting = Sender::connect(&order.target_address, &context.identity, &order.target, &introduction, options);
    connecting.await.map(Arc::new).map_err(|error| transfer_failed(context, &error))
}

async fn tell_progress(sender: &Sender, events: &mpsc::Sender<FreezeEvent>) {
    loop {
        tokio::time::sleep(PROGRESS_INTERVAL).await;
        let stats = sender.stats();
        // Nobody listens: the coordinator is gone, and the deadline or its successor decides.
        let _ = events.send(FreezeEvent::Progress { raw_bytes: stats.raw_bytes, wire_bytes: stats.wire_bytes }).await;
    }
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
