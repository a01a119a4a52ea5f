//! A migration's part on the node that the container goes to.
//!
//! ```text
//!  Prepare ─▶ PREPARED ─Restore─▶ (arrival, runc restore) ─▶ HELD ─Seal─▶ SEALED ─Resume─▶ RESUMED
//!                 └─────────────────────────┴─────────────────┴────────────┴── Abort ──▶ ABORTED: nothing left
//! ```
//!
//! In a [cold](cold) migration it is created instead of restored, and held by runc itself. In an [application-level](application) one it
//! is started, too, and held by that its link is on no bridge.
//!
//! Until the resume the container's link is on no bridge, so its address answers nobody here. The images stay until the
//! container runs: when a committed restore dies before that, it is done again from them.

pub mod application;
pub mod bundle;
mod cold;
mod doorstep;
mod early;
pub mod fetch;
pub mod fill;
pub mod hook;
pub mod inbox;
mod memory;
mod network;
mod place;
mod pod;
mod rebind;
mod restore;
mod resume;
mod seeds;
#[cfg(test)]
pub(crate) mod tests;

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use podferry_common::MigrationId;
use podferry_common::failure::{Failure, FailureCode};
use podferry_common::identity::Peer;
use podferry_criu::CriuLog;
use podferry_memory::shared::laying;
use podferry_network::{ContainerLink, LinkHandle, Netns};
use podferry_part::{May, Side, Step, may};
use tokio::sync::{Mutex, MutexGuard};
use tokio::task::{JoinHandle, spawn_blocking};
use tokio_util::sync::CancellationToken;

use crate::context::{Context, blocking};
use crate::journal::{Ledger, PartDirs, PartRecord, PodArrival, Role, Standing};
use crate::pager;
use crate::pager::messages::PagerState;
use crate::parts::Authority;
use crate::pods::Visitor;
use crate::relay::Away;
use crate::source::VERIFY;
use crate::volumes::Volume;
use application::TakeOver;
use bundle::Bundle;
use doorstep::Doorstep;
use early::Started;
use hook::{Hold, HookKeeper};
use inbox::{Arrival, Inbox};

pub use network::INTERFACE;

/// How often a restore is looked at while it works.
const LOOK: Duration = Duration::from_millis(2);
/// How long a hook gets to answer.
const HOOK_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a restore that was told to abort, or to go, gets to end.
const END_TIMEOUT: Duration = Duration::from_secs(30);
/// How long runc gets to notice that its CRIU is dead.
const GONE_TIMEOUT: Duration = Duration::from_millis(200);

/// What the coordinator wants of a target.
#[derive(Debug)]
pub struct PrepareOrder {
    /// Of which migration.
    pub migration: MigrationId,
    /// runc's id of the container.
    pub workload: String,
    /// The only peer that may send it.
    pub source: Peer,
    /// The name of that node.
    pub source_node: String,
    /// The link to make; none when the container's address does not move.
    pub link: Option<ContainerLink>,
    /// Whether connections are kept.
    pub keep_connections: bool,
    /// Post-copy: host:port of the source's agent.
    pub fetch_from: Option<String>,
    /// The container is created from the bundle; nothing is restored.
    pub cold: bool,
    /// It is started, too, and takes the place of the source's instance.
    pub take_over: Option<TakeOver>,
    /// The volumes that come along, in the order in which the source sends them.
    pub volumes: Vec<Volume>,
    /// Kubernetes: what waits to become the container.
    pub visitor: Option<Arc<Visitor>>,
    /// That it only stands in for what the container becomes in the end.
    pub stands_in: bool,
    /// Kubernetes: what connections live on through a relay.
    pub relayed: Option<Relayed>,
}

/// Addresses that stay on the source, and whose connections come all the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Relayed {
    /// The addresses.
    pub addresses: Vec<IpAddr>,
    /// Bytes of the largest packet there.
    pub mtu: u32,
    /// For how many seconds at most; 0 for as long as the node is set to.
    pub lifetime_s: u32,
}

/// The part.
#[derive(Debug)]
pub struct TargetPart {
    context: Context,
    dirs: PartDirs,
    bundle: Bundle,
    /// What comes with the container.
    volumes: Vec<Volume>,
    workload: String,
    migration: MigrationId,
    keep_connections: bool,
    /// Post-copy: where memory is that comes later.
    fetch_from: Option<fetch::Source>,
    hook: HookKeeper,
    source: Option<Peer>,
    /// What came for the container where it was.
    doorstep: Arc<Doorstep>,
    /// None in an agent that was restarted: what had arrived by then is complete.
    inbox: Option<Arc<Inbox>>,
    ledger: Ledger,
    /// The restore that this agent started; a sealed one may be an earlier agent's.
    restore: Arc<Mutex<Option<Started>>>,
    /// Bringing the files to the disk, which goes on while the container is restored.
    syncing: Mutex<Option<JoinHandle<Result<(), place::SyncError>>>>,
    restoring: AtomicBool,
    /// Kubernetes: what it becomes,
    pod: Option<PodArrival>,
    /// and its connections to the address that it had.
    away: Option<Arc<Away>>,
    /// The container is created, not restored,
    cold: bool,
    /// and that has been done. Application-level: the instance has everything.
    created: AtomicBool,
    /// It takes the place of an instance on the source.
    takes_over: bool,
    /// Its container was begun anew, and there is another value of this part, which has that.
    replaced: AtomicBool,
    /// With what; none in an agent that was restarted.
    take_over: Option<TakeOver>,
    cancelled: CancellationToken,
}

impl TargetPart {
    /// Makes room: folders, network namespace, the expectation of the transfer.
    ///
    /// # Errors
    /// When something is missing or in the way. What was made by then is removed again.
    pub async fn prepare(context: &Context, order: PrepareOrder) -> Result<Self, Failure> {
        let (with, visitor, workload) = (context.clone(), order.visitor.clone(), order.workload.clone());
        let wanted = order.volumes.clone();
        let (bundle, pod) = blocking(move || place::place(&with, visitor.as_deref(), &workload, &wanted)).await?;
        let volumes = order.volumes.clone();
        let dirs = PartDirs::of(&context.config, order.migration);
        let netns = order.link.as_ref().and(bundle.netns.clone());
        let host_interface = network::host_interface(order.migration);
        let link = netns.as_ref().map(|_| LinkHandle::new(&host_interface));
        let mut record = PartRecord {
            migration: order.migration,
            workload: order.workload.clone(),
            standing: Standing::Open,
            tidied: false,
            going: false,
            written: SystemTime::now(),
            role: Role::Target {
                source_node: order.source_node.clone(),
                keep_connections: order.keep_connections,
                link,
                plan: order.link.clone(),
                netns: netns.clone(),
                fetch_from: order.fetch_from.clone(),
                cold: order.cold,
                takes_over: order.take_over.is_some(),
                volumes: order.volumes,
                pod: pod.map(|pod| Box::new(PodArrival { stands_in: order.stands_in, ..pod })),
            },
        };
        let made = async {
            record.begin(&dirs).map_err(|error| io_failed(context, &error))?;
            let (with, bundle, volumes) = (context.clone(), bundle.clone(), volumes.clone());
            blocking(move || {
                bundle.make_room().map_err(|error| io_failed(&with, &error))?;
                volumes.iter().try_for_each(Volume::make_room).map_err(|error| place::not_ready(&with, &error))
            })
            .await?;
            network::make(context, &record).await?;
            if order.cold {
                network::restore_mtu(&record);
            }
            HookKeeper::listen(&dirs.hook_socket(), order.migration.to_string())
                .map_err(|error| io_failed(context, &error))
        };
        let hook = match made.await {
            Ok(hook) => hook,
            Err(failure) => {
                place::remove(context, &record, &bundle, &dirs).await?;
                // An agent that is started later must not undo it again: the workload may be here by then.
                record.standing = Standing::Aborted;
                record.store(&dirs).map_err(|error| io_failed(context, &error))?;
                return Err(failure);
            }
        };
        let source = order.source.clone();
        let post_copy = order.fetch_from.is_some();
        let trees = place::trees(&bundle, &volumes);
        let inbox = Inbox::new(order.source, dirs.images.clone(), trees, post_copy);
        context.admissions.expect(order.migration, Arc::clone(&inbox));
        let fetch_from = fetch::Source::of(&record.role);
        let record_pod = record.pod().cloned();
        Ok(Self {
            context: context.clone(),
            fetch_from,
            ledger: Ledger::new(record, dirs.clone()),
            dirs,
            bundle,
            volumes,
            workload: order.workload,
            migration: order.migration,
            keep_connections: order.keep_connections,
            away: pod::expect_relay(context, order.migration, &source, record_pod.as_ref(), order.relayed).await,
            pod: record_pod,
            cold: order.cold,
            created: AtomicBool::new(false),
            takes_over: order.take_over.is_some(),
            replaced: AtomicBool::new(false),
            take_over: order.take_over,
            hook,
            source: Some(source),
            doorstep: Arc::default(),
            inbox: Some(inbox),
            restore: Arc::default(),
            syncing: Mutex::default(),
            restoring: AtomicBool::new(false),
            cancelled: CancellationToken::new(),
        })
    }

    /// A part of an agent that was killed, taken up again.
    ///
    /// # Errors
    /// When its bundle is gone or its socket cannot be made.
    pub fn resumed(context: &Context, record: PartRecord) -> Result<Self, Failure> {
        let dirs = PartDirs::of(&context.config, record.migration);
        dirs.create().map_err(|error| io_failed(context, &error))?;
        let pod = record.pod().cloned();
        let bundle = match &pod {
            Some(pod) => pod::bundle(pod),
            None => Bundle::read(&context.config.runtime.bundles_dir, &record.workload)?,
        };
        let hook = HookKeeper::listen(&dirs.hook_socket(), record.migration.to_string())
            .map_err(|error| io_failed(context, &error))?;
        let keep_connections = matches!(record.role, Role::Target { keep_connections: true, .. });
        let fetch_from = fetch::Source::of(&record.role);
        if let Some(source) = fetch_from.as_ref().filter(|_| fill::is_under_way(&dirs)) {
            fetch::start(context, record.migration, source).map_err(|error| io_failed(context, &error))?;
        }
        let cold = matches!(record.role, Role::Target { cold: true, .. });
        let takes_over = matches!(record.role, Role::Target { takes_over: true, .. });
        let created = AtomicBool::new(cold && record.standing == Standing::Sealed);
        let (workload, migration, volumes) = (record.workload.clone(), record.migration, record.volumes().to_vec());
        let ledger = Ledger::new(record, dirs.clone());
        Ok(Self {
            context: context.clone(),
            dirs,
            bundle,
            volumes,
            workload,
            migration,
            keep_connections,
            away: context.aways.get(migration),
            pod,
            cold,
            created,
            takes_over,
            replaced: AtomicBool::new(false),
            take_over: None,
            fetch_from,
            hook,
            source: None,
            doorstep: Arc::default(),
            inbox: None,
            ledger,
            restore: Arc::default(),
            syncing: Mutex::default(),
            restoring: AtomicBool::new(false),
            cancelled: CancellationToken::new(),
        })
    }

    /// Waits for the transfer, then restores. Returns the milliseconds from the last byte until the container was held.
    ///
    /// # Errors
    /// When the transfer breaks, the restore fails, the part is aborted, or `deadline` passes.
    pub async fn restore(&self, deadline: SystemTime) -> Result<f64, Failure> {
        self.restoring.store(true, Ordering::Relaxed);
        let patience = deadline.duration_since(SystemTime::now()).unwrap_or_default();
        let work = async {
            if !self.cold {
                self.start_early().await;
            }
            self.arrived().await?;
            let begun = Instant::now();
            tracing::debug!(migration = %self.migration, "everything is here");
            if self.takes_over {
                self.take_over_now().await?;
                return Ok(begun.elapsed().as_secs_f64() * 1e3);
            }
            let (layer, volumes, inbox) = (self.bundle.upper(), self.volumes.clone(), self.inbox.clone());
            *self.syncing.lock().await = Some(spawn_blocking(move || place::sync(&layer, &volumes, inbox.as_deref())));
            if self.cold {
                self.create().await?;
                self.created.store(true, Ordering::Relaxed);
            } else {
                self.start_restore().await?;
                self.until_held().await?;
            }
            tracing::debug!(migration = %self.migration, "the container is held");
            Ok(begun.elapsed().as_secs_f64() * 1e3)
        };
        tokio::select! {
            result = work => result,
            () = self.cancelled.cancelled() => {
                Err(self.refused(FailureCode::Aborted, "the migration was aborted", "restore"))
            }
            () = tokio::time::sleep(patience) => {
                Err(self.refused(FailureCode::DeadlineExceeded, "the restore did not end before the deadline", "restore"))
            }
        }
    }

    async fn arrived(&self) -> Result<(), Failure> {
        let Some(inbox) = &self.inbox else { return Ok(()) };
        let mut arrival = inbox.arrival();
        let ended = arrival.wait_for(|arrival| *arrival != Arrival::Waiting).await.map(|arrival| arrival.clone());
        match ended {
            Ok(Arrival::Complete) => Ok(()),
            // No fault of the transfer's.
            Ok(Arrival::Broken(found)) if found.phase.as_deref() == Some(VERIFY) => {
                Err(found.on(self.context.config.node.as_str()))
            }
            Ok(Arrival::Broken(reason)) => {
                let message = format!("the transfer from the source broke: {}", reason.message);
                let full = reason.code == FailureCode::ResourceExhausted;
                let code = if full { reason.code } else { FailureCode::Unavailable };
                Err(Failure { code, message, ..reason }.on(self.context.config.node.as_str()).in_phase("transfer"))
            }
            Ok(Arrival::Waiting) | Err(_) => Err(self.refused(FailureCode::Internal, "nothing arrived", "transfer")),
        }
    }

    /// Ends the pager of a restore that came to nothing, of which no process is left. Gives its last state if there is one.
    async fn stop_pager(&self) -> Result<Option<PagerState>, Failure> {
        let file = self.dirs.pager_status();
        if !file.is_file() {
            return Ok(None);
        }
        // One whose processes ran sees by itself that they have ended.
        let filling =
            pager::client::status(&file).is_ok_and(|status| matches!(status.state, PagerState::Filling { .. }));
        let stopped =
            if filling { Ok(pager::client::wait_filled(&file).await) } else { pager::client::stop(&file).await };
        stopped.map(Some).map_err(|failure| failure.on(self.context.config.node.as_str()))
    }

    /// Fails when pages come later and nobody has them any more.
    fn check_pager(&self) -> Result<(), Failure> {
        let file = self.dirs.pager_status();
        if !file.is_file() || pager::client::is_well(&file) {
            return Ok(());
        }
        Err(self.refused(FailureCode::Aborted, "both holders of the container's memory were killed", "restore"))
    }

    async fn until_held(&self) -> Result<(), Failure> {
        loop {
            if let Some(init) = self.hook.until(LOOK, |hold| hold.pid().is_some()).await.pid() {
                self.check_shared_memory()?;
                return match &self.pod {
                    Some(pod) => pod::name_host(&self.context, pod).await,
                    None => self.wake_loopback(init),
                };
            }
            let mut running = self.restore.lock().await;
            let Some(restore) = &mut *running else { continue };
            if restore.try_wait().map_err(|error| self.restore_failed(&error))? {
                drop(running);
                self.clean_restore(Duration::ZERO).await?;
                let message = "the container ran without being held, and was killed: CRIU did not run podferry-hook";
                return Err(self.refused(FailureCode::Internal, message, "restore"));
            }
        }
    }

    /// Fails when shared memory that is here was not laid in, and so would be zero.
    fn check_shared_memory(&self) -> Result<(), Failure> {
        let not_laid = laying::not_laid(&self.dirs.images).map_err(|error| io_failed(&self.context, &error))?;
        let Some(number) = not_laid.first() else { return Ok(()) };
        let message = format!("CRIU restored the shared memory {number} without what was sent of it before the freeze");
        let failure = self.refused(FailureCode::Internal, message, "restore");
        Err(failure
            .remedy("see whether the agent's criu_shim is the one that came with it; `--strategy warm` does without"))
    }

    /// A network namespace that is not ours to make is CRIU's, and its loopback is down.
    fn wake_loopback(&self, init: i32) -> Result<(), Failure> {
        if self.bundle.netns.is_some() {
            return Ok(());
        }
        let netns = Netns::of_process(init.unsigned_abs());
        netns.and_then(|netns| podferry_network::bring_loopback_up(&netns)).map_err(|error| {
            let what = "the loopback of the container's network namespace cannot be brought up";
            self.context.failure(FailureCode::Internal, what, &error).in_phase("restore")
        })
    }

    /// The files are on the disk, as far as they have to be: the source's are wiped after the commit.
    async fn synced(&self) -> Result<(), Failure> {
        let Some(syncing) = self.syncing.lock().await.take() else { return Ok(()) };
        let what = "the container's files cannot be written to the disk";
        let failed = |error: &(dyn std::error::Error + 'static)| {
            self.context.failure(FailureCode::Aborted, what, error).in_phase("commit")
        };
        syncing.await.map_err(|error| failed(&error))?.map_err(|error| failed(&error))
    }

    /// From now on the part waits for the decision, whatever happens to this agent.
    ///
    /// # Errors
    /// When the container is not held.
    pub async fn seal(&self) -> Result<(), Failure> {
        let mut record = self.ledger.lock().await;
        match may(Side::Target, record.standing, Step::Seal) {
            May::Taken => return Ok(()),
            May::Take => {}
            May::Refuse => return Err(self.wrong_standing("seal", record.standing)),
        }
        if self.takes_over {
            self.check_taken_over().await?;
            return self.note(&mut record, |record| record.standing = Standing::Sealed);
        }
        self.synced().await?;
        if self.cold {
            self.check_created().await?;
            return self.note(&mut record, |record| record.standing = Standing::Sealed);
        }
        // A dead restore could be done again after the commit, but before it the source is the safer copy.
        self.check_restore().await?;
        self.check_pager()?;
        let told = self.hook.tell("seal").await;
        let sealed = self.hook.until(HOOK_TIMEOUT, |hold| !matches!(hold, Hold::Held { .. })).await;
        if told.is_err() || !matches!(sealed, Hold::Sealed { .. }) {
            return Err(self.refused(FailureCode::FailedPrecondition, "the container is not held", "commit"));
        }
        self.note(&mut record, |record| record.standing = Standing::Sealed)
    }

    /// Fails when the restore has died.
    async fn check_restore(&self) -> Result<(), Failure> {
        match &mut *self.restore.lock().await {
            Some(restore) => restore.try_wait().map(drop).map_err(|error| self.restore_failed(&error)),
            None => Ok(()),
        }
    }

    /// Undoes everything.
    ///
    /// # Errors
    /// When something stays; to be called again.
    pub async fn abort(&self, authority: Authority) -> Result<(), Failure> {
        let mut record = self.ledger.lock().await;
        self.check_bound(&record)?;
        match may(Side::Target, record.standing, Step::Abort(authority)) {
            May::Taken => return Ok(()),
            May::Take => {}
            May::Refuse => return Err(self.wrong_standing("abort", record.standing)),
        }
        self.cancelled.cancel();
        self.context.admissions.forget(self.migration);
        if let Some(inbox) = self.inbox.clone() {
            blocking(move || {
                inbox.shut();
                Ok(())
            })
            .await?;
        }
        let patience = self.patience();
        self.hook.abort().await;
        self.end_instance(&record).await?;
        self.clean_restore(patience).await?;
        self.stop_pager().await?;
        if let Some(away) = &self.away {
            away.end().await;
        }
        self.context.visitors.dismiss(self.migration).await;
        place::remove(&self.context, &record, &self.bundle, &self.dirs).await?;
        self.note(&mut record, |record| record.standing = Standing::Aborted)
    }

    /// How long a restore gets to end by itself. A hook that went without having been told to has lost its CRIU, and runc
    /// takes ten seconds to see that.
    fn patience(&self) -> Duration {
        if self.hook.hold() == Hold::Gone { GONE_TIMEOUT } else { END_TIMEOUT }
    }

    /// The container's init; 0 when it does not run.
    fn init_pid(&self) -> i32 {
        let runc = self.context.runc(self.context.config.runc_root());
        let container = runc.container(&self.workload).ok();
        container.filter(podferry_runtime::Container::is_alive).and_then(|now| now.init).map_or(0, |init| init.pid)
    }

    /// Who sends the container.
    ///
    /// None in an agent that was restarted.
    pub fn source(&self) -> Option<&Peer> {
        self.source.as_ref()
    }

    /// Where packets for it wait.
    pub fn doorstep(&self) -> &Arc<Doorstep> {
        &self.doorstep
    }

    /// Whether connections to the address that it had are taken.
    pub fn relays(&self) -> bool {
        self.away.is_some()
    }

    /// What comes with the container.
    pub fn volumes(&self) -> &[Volume] {
        &self.volumes
    }

    /// Of which migration it is.
    pub fn migration(&self) -> MigrationId {
        self.migration
    }

    /// runc's id of the container.
    pub fn workload(&self) -> &str {
        &self.workload
    }

    /// Where the part stands.
    pub fn standing(&self) -> Standing {
        self.ledger.standing()
    }

    fn note(
        &self,
        record: &mut MutexGuard<'_, PartRecord>,
        change: impl FnOnce(&mut PartRecord),
    ) -> Result<(), Failure> {
        self.ledger.change(record, change).map_err(|error| io_failed(&self.context, &error))
    }

    /// Whether the container is held.
    pub fn is_held(&self) -> bool {
        self.created.load(Ordering::Relaxed) || self.hook.hold().pid().is_some()
    }

    /// Whether the coordinator has asked for the restore.
    pub fn is_restoring(&self) -> bool {
        self.restoring.load(Ordering::Relaxed)
    }

    fn pid_file(&self) -> PathBuf {
        self.pod.as_ref().map_or_else(|| self.dirs.run.join("pid"), |pod| pod.pid_file.clone())
    }

    fn restore_failed(&self, error: &podferry_runtime::Error) -> Failure {
        let what = "the container cannot be restored";
        let mut failure = self.context.failure(FailureCode::Aborted, what, error).in_phase("restore");
        if let Some(criu) = CriuLog::of_restore(&self.dirs.work).failure() {
            failure = failure.criu_line(criu.line).remedy(criu.remedy);
        }
        failure
    }

    fn refused(&self, code: FailureCode, message: impl Into<String>, phase: &str) -> Failure {
        self.context.refusal(code, message).in_phase(phase)
    }

    fn wrong_standing(&self, what: &str, standing: Standing) -> Failure {
        let message = format!("cannot {what} a target that is {standing:?}");
        self.context.refusal(FailureCode::FailedPrecondition, message)
    }
}

fn io_failed(context: &Context, error: &std::io::Error) -> Failure {
    context.failure(FailureCode::Internal, "the agent cannot write its own files", error)
}
