//! All evacuations that go on.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use jiff::Timestamp;
use podferry_common::{Failure, FailureCode, NodeName, chain};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::driver::Driver;
use super::{Evacuation, EvacuationId};
use crate::api::Core;
use crate::runner::{Runner, blocking};
use crate::store::{EvacuationConflict, Store, StoreError};

/// The nodes that no migration may go to, because they are being evacuated. Clones share them.
#[derive(Clone, Default)]
pub struct Cordons(Arc<Mutex<HashMap<NodeName, EvacuationId>>>);

impl Cordons {
    fn lock(&self) -> MutexGuard<'_, HashMap<NodeName, EvacuationId>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The evacuation of that node, if there is one.
    pub fn of(&self, node: &NodeName) -> Option<EvacuationId> {
        self.lock().get(node).copied()
    }

    fn set(&self, node: NodeName, id: EvacuationId) {
        self.lock().insert(node, id);
    }

    fn lift(&self, node: &NodeName, id: EvacuationId) {
        let mut cordons = self.lock();
        if cordons.get(node) == Some(&id) {
            cordons.remove(node);
        }
    }
}

/// The core as it is now, with the inventory of now; none when the coordinator is on its way out.
type Cores = Box<dyn Fn() -> Option<Core> + Send + Sync>;

/// What is wished of an evacuation that goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wish {
    /// That it stops; who wishes it.
    Cancel(String),
    /// That its deadline is this, or that it has none.
    Deadline(Option<Timestamp>),
}

/// One evacuation that goes on, seen from outside.
struct Handle {
    wishes: mpsc::UnboundedSender<Wish>,
    view: watch::Receiver<Evacuation>,
}

/// All evacuations that go on. Clones share them.
#[derive(Clone)]
pub struct Evacuator {
    shared: Arc<Shared>,
}

struct Shared {
    store: Store,
    runner: Runner,
    cordons: Cordons,
    live: Mutex<HashMap<EvacuationId, Handle>>,
    cores: OnceLock<Cores>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Shared {
    fn live(&self) -> MutexGuard<'_, HashMap<EvacuationId, Handle>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Evacuator {
    /// None goes on yet. All end with that runner.
    pub fn new(store: Store, runner: Runner) -> Self {
        let (cordons, live, cores) = (Cordons::default(), Mutex::default(), OnceLock::new());
        let (tasks, stop) = (TaskTracker::new(), runner.stopped().child_token());
        Self { shared: Arc::new(Shared { store, runner, cordons, live, cores, tasks, stop }) }
    }

    /// From where the core of the moment comes. Only the first word counts.
    pub fn ask(&self, cores: impl Fn() -> Option<Core> + Send + Sync + 'static) {
        let _only_once = self.shared.cores.set(Box::new(cores));
    }

    /// The core of the moment.
    pub(super) fn core(&self) -> Option<Core> {
        self.shared.cores.get().and_then(|cores| cores())
    }

    pub(super) fn store(&self) -> &Store {
        &self.shared.store
    }

    pub(super) fn runner(&self) -> &Runner {
        &self.shared.runner
    }

    pub(super) fn stopped(&self) -> &CancellationToken {
        &self.shared.stop
    }

    /// The nodes that no migration may go to.
    pub fn cordons(&self) -> &Cordons {
        &self.shared.cordons
    }

    /// Goes on with every evacuation that a former process left open. Before the first request, so that the cordons stand.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn recover(&self) -> Result<usize, StoreError> {
        let store = self.shared.store.clone();
        let mut open = blocking(move || store.evacuations()).await?;
        open.retain(|evacuation| !evacuation.has_ended());
        let count = open.len();
        for mut evacuation in open {
            tracing::info!(evacuation = %evacuation.id, node = %evacuation.node, "going on");
            evacuation.apply(super::Event::Restarted);
            self.spawn(evacuation);
        }
        Ok(count)
    }

    /// Records an evacuation, and begins with it, also when whoever asked goes away meanwhile.
    ///
    /// # Errors
    /// `ALREADY_EXISTS` when the node is being evacuated already.
    pub async fn start(&self, evacuation: Evacuation) -> Result<Evacuation, Failure> {
        let evacuator = self.clone();
        let begun = self.shared.tasks.spawn(async move { evacuator.begin(evacuation).await }).await;
        begun.unwrap_or_else(|error| {
            let message = format!("the coordinator's own code failed as an evacuation began: {error}");
            Err(Failure::new(FailureCode::Internal, message).remedy("see the coordinator's log"))
        })
    }

    async fn begin(&self, evacuation: Evacuation) -> Result<Evacuation, Failure> {
        if self.shared.stop.is_cancelled() {
            return Err(Failure::new(FailureCode::Unavailable, "the coordinator is stopping").remedy("try again later"));
        }
        let (store, new) = (self.shared.store.clone(), evacuation.clone());
        match blocking(move || store.create_evacuation(&new)).await {
            Ok(Ok(())) => {}
            Ok(Err(conflict)) => return Err(refusal(&evacuation.node, conflict)),
            Err(error) => return Err(self.shared.runner.fail(error)),
        }
        let (id, node, peer) = (evacuation.id, &evacuation.node, &evacuation.requested_by);
        tracing::info!(%peer, evacuation = %id, %node, workloads = evacuation.entries.len(), "evacuation accepted");
        self.spawn(evacuation.clone());
        Ok(evacuation)
    }

    fn spawn(&self, evacuation: Evacuation) {
        let (id, node) = (evacuation.id, evacuation.node.clone());
        let (wishes, queue) = mpsc::unbounded_channel();
        let (sender, view) = watch::channel(evacuation.clone());
        self.shared.cordons.set(node.clone(), id);
        self.shared.live().insert(id, Handle { wishes, view });
        let evacuator = self.clone();
        self.shared.tasks.spawn(async move {
            let driver = Driver::new(evacuator.clone(), evacuation, queue, sender);
            let ended = driver.run().await;
            evacuator.shared.live().remove(&id);
            match ended {
                Ok(()) => evacuator.shared.cordons.lift(&node, id),
                Err(error) => drop(evacuator.shared.runner.fail(error)),
            }
        });
    }

    /// The newest state of an evacuation that goes on, and every later one.
    pub fn watch(&self, id: EvacuationId) -> Option<watch::Receiver<Evacuation>> {
        self.shared.live().get(&id).map(|handle| handle.view.clone())
    }

    /// Tells an evacuation what is wished. Whether there is one of that id that goes on.
    pub fn wish(&self, id: EvacuationId, wish: Wish) -> bool {
        self.shared.live().get(&id).is_some_and(|handle| handle.wishes.send(wish).is_ok())
    }

    /// Ends all drivers: the next process goes on with the evacuations. What is undone meanwhile is begun again then.
    pub fn shut_down(&self) {
        self.shared.stop.cancel();
    }

    /// Waits until all drivers have ended, after a shutdown.
    pub async fn join(&self) {
        self.shared.tasks.close();
        self.shared.tasks.wait().await;
    }
}

fn refusal(node: &NodeName, conflict: EvacuationConflict) -> Failure {
    let failure = match conflict {
        EvacuationConflict::Node { id } => {
            let message = format!("node {node} is being evacuated already, by {id}");
            Failure::new(FailureCode::AlreadyExists, message)
                .remedy(format!("follow it (`podferry watch {id}`), or cancel it (`podferry cancel {id}`)"))
        }
        EvacuationConflict::Object { why } => {
            let message = format!("the API server does not take the NodeEvacuation of {node}: {why}");
            Failure::new(FailureCode::FailedPrecondition, message).remedy("see that this may be made")
        }
        EvacuationConflict::Changed => {
            let message = format!("the NodeEvacuation of {node} has changed since it was seen");
            Failure::new(FailureCode::Unavailable, message).remedy("it is looked at again by itself")
        }
    };
    failure.on(node.as_str())
}

/// Logs that something of an evacuation could not be found out, which is tried again.
pub(super) fn put_off(evacuation: EvacuationId, failure: &Failure) {
    tracing::warn!(%evacuation, error = %chain(failure), "the evacuation cannot go on at the moment");
}
