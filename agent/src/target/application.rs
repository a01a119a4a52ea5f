//! An application-level migration's target: a new instance, which gets what the old one has, and then its place.
//!
//! It is created and started from this node's bundle while the old one serves; its link is on no bridge. What it keeps comes by hooks of
//! its own. *Held* means here that it has everything and that nobody reaches it. It lives on when this agent dies; an unsealed one is
//! ended by the next agent, as what cannot be trusted to be whole.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use podferry_common::failure::{Failure, FailureCode};
use podferry_common::identity::Peer;
use podferry_proto::v1::BringUpResponse;
use podferry_runtime::Container;
use tokio::sync::{MutexGuard, OnceCell, mpsc};

use super::cold::Found;
use super::{TargetPart, io_failed};
use crate::application::hook::{Flow, HookError, Instance};
use crate::application::relay::Relay;
use crate::application::{Application, Hook, HookName};
use crate::context::blocking;
use crate::journal::{PartRecord, Standing};

/// Between two tries of what is tried until it succeeds.
const AGAIN: Duration = Duration::from_millis(50);
/// How long one try gets.
const TRY: Duration = Duration::from_secs(10);
/// How long a hook gets that is run once.
const ONCE: Duration = Duration::from_secs(600);

/// What a new instance is brought up with.
#[derive(Debug)]
pub struct TakeOver {
    /// What this node's bundle says of it.
    pub application: Application,
    /// host:port of the agent of the old one.
    pub source_address: String,
    /// The instance, once it was started.
    up: OnceCell<Up>,
}

/// An instance that was started.
#[derive(Debug)]
struct Up {
    instance: Instance,
    /// By which it reaches the old one.
    _relay: Option<Relay>,
    ports: Vec<u16>,
}

impl TakeOver {
    /// Of an instance that is yet to be started.
    pub fn new(application: Application, source_address: String) -> Self {
        Self { application, source_address, up: OnceCell::new() }
    }
}

impl TargetPart {
    /// Starts a new instance. Returns when it is ready, and has caught up if it replicates. `ports` are where the old one listens, and its
    /// node moves the state by `method`.
    ///
    /// # Errors
    /// When this node moves it by another one, when it does not come so far, or was begun before.
    pub async fn bring_up(&self, ports: Vec<u16>, method: &str) -> Result<BringUpResponse, Failure> {
        let take_over = self.take_over()?;
        let own = take_over.application.method();
        if own != method {
            let message = format!("the state moves here {own}, and on the source {method}");
            let failure = self.refused(FailureCode::FailedPrecondition, message, "precopy");
            return Err(
                failure.remedy("let both nodes' config.json have the same podferry.dev/application annotations")
            );
        }
        let begun = Instant::now();
        let work = async {
            self.launch().await?;
            let container = self.instance_container().await?;
            let instance = self.enter(&container, take_over.application.port())?;
            let (instance, relay) = self.with_relay(take_over, instance).await?;
            let up = Up { instance, _relay: relay, ports };
            take_over
                .up
                .set(up)
                .map_err(|_| self.refused(FailureCode::AlreadyExists, "it was brought up before", "precopy"))?;
            self.until_ready("precopy").await?;
            let ready = Instant::now();
            tracing::debug!(migration = %self.migration, "the new instance is ready");
            if take_over.application.hook(HookName::Replicate).is_none() {
                return Ok::<_, Failure>((ready, ready));
            }
            self.once(HookName::Replicate, "precopy").await?;
            self.until_caught_up("precopy").await?;
            Ok((ready, Instant::now()))
        };
        let (ready, caught_up) = tokio::select! {
            done = work => done?,
            () = self.cancelled.cancelled() => {
                return Err(self.refused(FailureCode::Aborted, "the migration was aborted", "precopy"));
            }
        };
        let ms = |from: Instant, to: Instant| to.duration_since(from).as_secs_f64() * 1e3;
        Ok(BringUpResponse { ready_ms: ms(begun, ready), caught_up_ms: ms(ready, caught_up) })
    }

    /// Gives the new instance what the old one has exported. To be dropped when that breaks off: nothing counts then.
    ///
    /// # Errors
    /// When it does not take it.
    pub async fn import(&self, input: mpsc::Receiver<Bytes>) -> Result<(), Failure> {
        let take_over = self.take_over()?;
        let hook = take_over.application.hook(HookName::Import).ok_or_else(|| {
            self.refused(FailureCode::FailedPrecondition, "this node's config.json has no hook import", "transfer")
        })?;
        let flow = Flow { input: Some(input), output: None };
        let imported = self.up()?.instance.run(HookName::Import, hook, flow, Duration::MAX).await;
        imported.map_err(|error| self.hook_failed(&error, "transfer"))
    }

    /// Everything is here, and nothing changes in the old instance any more: the new one is made one of its own.
    pub(super) async fn take_over_now(&self) -> Result<(), Failure> {
        let application = &self.take_over()?.application;
        if application.hook(HookName::CaughtUp).is_some() {
            self.until_caught_up("restore").await?;
        }
        self.once(HookName::Verify, "restore").await?;
        if application.hook(HookName::Promote).is_some() {
            self.once(HookName::Promote, "restore").await?;
            self.until_ready("restore").await?;
        }
        self.check_alive("restore").await?;
        self.created.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Fails unless the new instance runs and has everything.
    pub(super) async fn check_taken_over(&self) -> Result<(), Failure> {
        if !self.created.load(Ordering::Relaxed) {
            let message = "the new instance does not have everything yet";
            return Err(self.refused(FailureCode::FailedPrecondition, message, "commit"));
        }
        self.check_alive("commit").await
    }

    /// Ends a new instance that this migration has started; there may be none.
    pub(super) async fn end_instance(&self, record: &PartRecord) -> Result<(), Failure> {
        if !self.takes_over || !record.going {
            return Ok(());
        }
        let guard = Arc::clone(&self.restore).lock_owned().await;
        let restoring = self.restoring();
        blocking(move || {
            let _nobody_starts_one = guard;
            restoring.wait_for_runc()?;
            let runc = restoring.context.runc(restoring.context.config.runc_root());
            let ended = runc.cleanup_killed_restore(&restoring.workload, &restoring.bundle.dir);
            ended.map_err(|error| restoring.not_removed(&error))
        })
        .await
    }

    fn take_over(&self) -> Result<&TakeOver, Failure> {
        let none = || self.refused(FailureCode::FailedPrecondition, "no new instance is expected here", "precopy");
        self.take_over.as_ref().ok_or_else(none)
    }

    fn up(&self) -> Result<&Up, Failure> {
        let none = || self.refused(FailureCode::FailedPrecondition, "the new instance is not up yet", "transfer");
        self.take_over()?.up.get().ok_or_else(none)
    }

    /// Creates and starts it. Not by halves: an abort waits.
    async fn launch(&self) -> Result<(), Failure> {
        self.create().await?;
        let mut record = self.ledger.lock().await;
        self.check_open(&record)?;
        self.note(&mut record, |record| record.going = true)?;
        let restoring = self.restoring();
        blocking(move || restoring.start_created()).await.map_err(|failure| failure.in_phase("precopy"))
    }

    fn check_open(&self, record: &MutexGuard<'_, PartRecord>) -> Result<(), Failure> {
        if record.standing == Standing::Open && !self.cancelled.is_cancelled() {
            return Ok(());
        }
        Err(self.refused(FailureCode::Aborted, "the migration was aborted", "precopy"))
    }

    async fn instance_container(&self) -> Result<Container, Failure> {
        let restoring = self.restoring();
        let found = blocking(move || restoring.container()).await?;
        found.filter(Container::is_alive).ok_or_else(|| self.ended("precopy"))
    }

    fn enter(&self, container: &Container, port: Option<u16>) -> Result<Instance, Failure> {
        Instance::of(&self.context, container, port).map_err(|error| {
            let what = "the new instance's network cannot be entered";
            self.context.failure(FailureCode::Internal, what, &error).in_phase("precopy")
        })
    }

    async fn with_relay(&self, take_over: &TakeOver, instance: Instance) -> Result<(Instance, Option<Relay>), Failure> {
        let (Some(source), Some(_)) = (&self.source, take_over.application.port()) else { return Ok((instance, None)) };
        let way: (Peer, String) = (source.clone(), take_over.source_address.clone());
        let started = Relay::start(&self.context, self.migration, way, instance.netns()).await;
        let relay = started.map_err(|error| io_failed(&self.context, &error))?;
        Ok((instance.with_source(relay.port()), Some(relay)))
    }

    async fn until_ready(&self, phase: &str) -> Result<(), Failure> {
        match self.take_over()?.application.hook(HookName::Ready) {
            Some(hook) => self.until_well(HookName::Ready, hook, phase).await,
            None => self.until_listening(phase).await,
        }
    }

    async fn until_caught_up(&self, phase: &str) -> Result<(), Failure> {
        match self.take_over()?.application.hook(HookName::CaughtUp) {
            Some(hook) => self.until_well(HookName::CaughtUp, hook, phase).await,
            None => Ok(()),
        }
    }

    /// Tries a hook until it ends well, the instance ends, or somebody gives up.
    async fn until_well(&self, name: HookName, hook: &Hook, phase: &str) -> Result<(), Failure> {
        let mut told = SystemTime::UNIX_EPOCH;
        loop {
            let Err(error) = self.up()?.instance.run(name, hook, Flow::default(), TRY).await else { return Ok(()) };
            self.check_alive(phase).await?;
            if let HookError::Start { .. } = error {
                return Err(self.hook_failed(&error, phase));
            }
            if told.elapsed().is_ok_and(|ago| ago > TRY) {
                tracing::info!(migration = %self.migration, %error, "the new instance is waited for");
                told = SystemTime::now();
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    /// Without a hook that says it: it listens wherever the old one does.
    async fn until_listening(&self, phase: &str) -> Result<(), Failure> {
        loop {
            let container = self.instance_container().await.map_err(|failure| failure.in_phase(phase))?;
            let inbound = container.inbound().unwrap_or_default();
            if self.up()?.ports.iter().all(|port| inbound.ports.contains(port)) {
                return Ok(());
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    /// Runs a hook, if there is that.
    async fn once(&self, name: HookName, phase: &str) -> Result<(), Failure> {
        let Some(hook) = self.take_over()?.application.hook(name) else { return Ok(()) };
        let ended = self.up()?.instance.run(name, hook, Flow::default(), ONCE).await;
        ended.map_err(|error| self.hook_failed(&error, phase))
    }

    async fn check_alive(&self, phase: &str) -> Result<(), Failure> {
        match self.find_created(false).await? {
            Found::Started => Ok(()),
            Found::Waits | Found::Nothing => Err(self.ended(phase)),
        }
    }

    fn ended(&self, phase: &str) -> Failure {
        let failure = self.refused(FailureCode::Aborted, "the new instance has ended by itself", phase);
        let log = self.context.config.runtime.logs_dir.join(format!("{}.log", self.workload));
        failure.remedy(format!("see {} for what it said", log.display()))
    }

    fn hook_failed(&self, error: &HookError, phase: &str) -> Failure {
        let failure = self.context.failure(FailureCode::Aborted, "the new instance", error).in_phase(phase);
        failure.remedy("see the hook in this node's config.json, and try it by hand in the container")
    }
}
