//! The I/O shell around [`crate::migration`]: it calls agents, keeps time, and writes down.
//!
//! Each migration that is not final has one task, its driver. A driver that cannot write stops the whole coordinator:
//! whether a failed write is on disk is not known, and only a fresh look at the disk says it.

mod calls;
mod choosing;
mod committed;
mod deadlines;
mod driver;
mod meter;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use podferry_common::{Failure, FailureCode, MigrationId, NodeName, WorkloadName, chain};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use deadlines::Deadlines;

use crate::audit::{AuditLog, What};
use crate::cluster::Agents;
use crate::metrics::Metrics;
use crate::migration::{Event, Phase};
use crate::pods::Pods;
use crate::store::{Conflict, Record, Store, StoreError};
use driver::Driver;

/// A driver, seen from outside.
struct Handle {
    inputs: mpsc::UnboundedSender<calls::Input>,
    view: watch::Receiver<Record>,
}

/// How many migrations there may be at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// That one node may take part in.
    pub per_node: usize,
    /// From one node to one other.
    pub per_link: usize,
}

impl Limits {
    /// So many for each node, and no limit of their own for pairs.
    pub fn of_nodes(per_node: usize) -> Self {
        Self { per_node, per_link: per_node }
    }
}

/// All drivers. Clones share them.
#[derive(Clone)]
pub struct Runner {
    shared: Arc<Shared>,
}

struct Shared {
    store: Store,
    agents: Agents,
    audit: AuditLog,
    metrics: Metrics,
    deadlines: Deadlines,
    limits: Limits,
    /// Held while a migration is begun: limits of pairs of nodes are counted by who has begun.
    beginning: tokio::sync::Mutex<()>,
    /// In Kubernetes: what is done with pods.
    pods: Option<Pods>,
    live: Mutex<HashMap<MigrationId, Handle>>,
    tasks: TaskTracker,
    stop: CancellationToken,
    /// Set once no more migrations are begun.
    closing: AtomicBool,
    fatal: Mutex<Option<StoreError>>,
}

impl Runner {
    /// No drivers yet. `stop` ends all of them, and is cancelled by the one that cannot write.
    pub fn new(
        store: Store,
        agents: Agents,
        audit: AuditLog,
        metrics: Metrics,
        deadlines: Deadlines,
        limits: Limits,
        stop: CancellationToken,
    ) -> Self {
        let beginning = tokio::sync::Mutex::default();
        let (live, tasks, closing, fatal) =
            (Mutex::default(), TaskTracker::new(), AtomicBool::new(false), Mutex::default());
        Self {
            shared: Arc::new(Shared {
                store,
                agents,
                audit,
                metrics,
                deadlines,
                limits,
                beginning,
                pods: None,
                live,
                tasks,
                stop,
                closing,
                fatal,
            }),
        }
    }

    /// The same in Kubernetes. To be called before the first migration.
    #[must_use]
    pub fn with_pods(mut self, pods: Pods) -> Self {
        let Some(shared) = Arc::get_mut(&mut self.shared) else {
            tracing::error!("pods are named too late: migrations are under way");
            return self;
        };
        shared.pods = Some(pods);
        self
    }

    /// In Kubernetes: what is done with pods.
    pub fn pods(&self) -> Option<&Pods> {
        self.shared.pods.as_ref()
    }

    /// Goes on with every migration that a former process left open.
    pub async fn recover(&self) -> Result<usize, StoreError> {
        let store = self.shared.store.clone();
        let open = blocking(move || store.open_migrations()).await?;
        let count = open.len();
        for record in open {
            tracing::info!(migration = %record.id, workload = %record.workload, phase = %record.state.phase(), "going on");
            self.shared.audit.migration(What::TakenUp, &record);
            let failure = Failure::new(FailureCode::Aborted, "the coordinator was restarted before the commit")
                .in_phase(record.state.phase().as_str())
                .remedy("migrate again");
            self.spawn(record, Event::Restarted(failure));
        }
        Ok(count)
    }

    /// Records a migration, and begins with it. Returns the record, or the conflict that stands
    /// against it.
    ///
    /// Whoever asked may go away meanwhile, and this future is dropped then: a record that was written and has no driver
    /// would keep its workload busy until the next start. So both are done in a task that comes to its end.
    pub async fn start(&self, record: Record) -> Result<Record, Failure> {
        let runner = self.clone();
        let begun = self.shared.tasks.spawn(async move { runner.begin(record).await }).await;
        begun.unwrap_or_else(|error| {
            let message = format!("the coordinator's own code failed as a migration began: {error}");
            Err(Failure::new(FailureCode::Internal, message).remedy("see the coordinator's log"))
        })
    }

    async fn begin(&self, record: Record) -> Result<Record, Failure> {
        if self.shared.closing.load(Ordering::Acquire) {
            return Err(Failure::new(FailureCode::Unavailable, "the coordinator is stopping").remedy("try again later"));
        }
        let _alone = self.shared.beginning.lock().await;
        self.has_room(&record)?;
        let (store, limit, new) = (self.shared.store.clone(), self.shared.limits.per_node, record.clone());
        match blocking(move || store.create(&new, limit)).await {
            Ok(Ok(())) => {}
            Ok(Err(conflict)) => return Err(refusal(&record, conflict)),
            Err(error) => return Err(self.shared.fail(error)),
        }
        // Here and not where it was asked for: that future may be gone.
        let peer = record.requested_by.as_ref().map(tracing::field::display);
        tracing::info!(
            peer, migration = %record.id, workload = %record.workload, source = %record.source, target = %record.target,
            strategy = record.strategy_word(), "migration accepted"
        );
        // It is recorded, and goes on in any case. The log has said it if this cannot be written.
        let _goes_on = self.shared.audit.accepted(&record).await;
        self.spawn(record.clone(), Event::Started);
        Ok(record)
    }

    /// Whether there is room between its two nodes; about each of them the store decides.
    fn has_room(&self, record: &Record) -> Result<(), Failure> {
        let limit = self.shared.limits.per_link;
        if self.link_load(&record.source).get(&record.target).is_none_or(|count| *count < limit) {
            return Ok(());
        }
        let Record { source, target, .. } = record;
        let message = format!("{limit} migrations go from node {source} to node {target} already, which is the limit");
        Err(Failure::new(FailureCode::ResourceExhausted, message)
            .on(target.as_str())
            .remedy("wait until one has ended"))
    }

    fn spawn(&self, record: Record, first: Event) {
        let id = record.id;
        let (inputs, queue) = mpsc::unbounded_channel();
        let (view_sender, view) = watch::channel(record.clone());
        let driver = Driver::new(Arc::clone(&self.shared), record, inputs.clone(), queue, view_sender);
        self.shared.live().insert(id, Handle { inputs, view });
        let shared = Arc::clone(&self.shared);
        self.shared.tasks.spawn(async move {
            let ended = driver.run(first).await;
            shared.live().remove(&id);
            if let Err(error) = ended {
                shared.fail(error);
            }
        });
    }

    /// The newest state of a migration that is not final, and every later one.
    pub fn watch(&self, id: MigrationId) -> Option<watch::Receiver<Record>> {
        self.shared.live().get(&id).map(|handle| handle.view.clone())
    }

    /// In how many migrations of open outcome each node takes part.
    pub fn load(&self) -> HashMap<NodeName, usize> {
        let mut load = HashMap::new();
        for handle in self.shared.live().values() {
            let record = handle.view.borrow();
            if !record.state.is_settled() {
                *load.entry(record.source.clone()).or_default() += 1;
                *load.entry(record.target.clone()).or_default() += 1;
            }
        }
        load
    }

    /// All migrations that are not final: the [word](Record::strategy_word) for how they are moved, and where they stand.
    pub fn in_flight(&self) -> Vec<(&'static str, Phase)> {
        let live = self.shared.live();
        let seen = live.values().map(|handle| {
            let record = handle.view.borrow();
            (record.strategy_word(), record.state.phase())
        });
        seen.collect()
    }

    /// How many migrations of open outcome go from that node to each other one.
    pub fn link_load(&self, source: &NodeName) -> HashMap<NodeName, usize> {
        let mut load = HashMap::new();
        for (from, target, _) in self.moving() {
            if from == *source {
                *load.entry(target).or_default() += 1;
            }
        }
        load
    }

    /// All migrations of open outcome: source, target and workload.
    pub fn moving(&self) -> Vec<(NodeName, NodeName, WorkloadName)> {
        let live = self.shared.live();
        let open = live.values().filter_map(|handle| {
            let record = handle.view.borrow();
            let ends = || (record.source.clone(), record.target.clone(), record.workload.clone());
            (!record.state.is_settled()).then(ends)
        });
        open.collect()
    }

    /// How many migrations there may be at a time.
    pub fn limits(&self) -> Limits {
        self.shared.limits
    }

    /// Cancelled when everything is to end.
    pub fn stopped(&self) -> &CancellationToken {
        &self.shared.stop
    }

    /// Stops the coordinator because something could not be written: whether it is on disk only a fresh look says.
    pub(crate) fn fail(&self, error: StoreError) -> Failure {
        self.shared.fail(error)
    }

    /// Undoes a migration that is not committed. `None`: no such migration is live.
    pub async fn cancel(&self, id: MigrationId, who: &str) -> Option<Result<Record, Failure>> {
        let (reply, answer) = oneshot::channel();
        let cancel = calls::Input::Cancel { who: who.to_owned(), reply };
        // One that ended meanwhile is not live.
        self.shared.live().get(&id)?.inputs.send(cancel).ok()?;
        answer.await.ok()
    }

    /// Begins no more migrations, undoes those that are not committed, waits up to `grace` for all outcomes, and stops. What
    /// is open then, the next process goes on with. Without this a frozen workload would wait for that process.
    pub async fn shut_down(&self, grace: Duration) {
        self.shared.closing.store(true, Ordering::Release);
        let mut views = Vec::new();
        for handle in self.shared.live().values() {
            let (reply, _nobody_waits) = oneshot::channel();
            let cancel = calls::Input::Cancel { who: "the coordinator's shutdown".to_owned(), reply };
            // One that has ended needs no cancel.
            let _ended = handle.inputs.send(cancel);
            views.push(handle.view.clone());
        }
        let settled = views.into_iter().map(|mut view| async move {
            // A driver that is gone has settled, or could not write.
            let _gone = view.wait_for(|record| record.state.is_settled()).await.map(drop);
        });
        if timeout(grace, futures::future::join_all(settled)).await.is_err() {
            tracing::warn!("not every migration has an outcome yet: the next start goes on with them");
        }
        self.shared.stop.cancel();
    }

    /// Waits until all drivers have ended, after `stop`. The error is that of the driver that could not write.
    pub async fn join(&self) -> Result<(), StoreError> {
        self.shared.tasks.close();
        self.shared.tasks.wait().await;
        let fatal = self.shared.fatal.lock().unwrap_or_else(PoisonError::into_inner).take();
        fatal.map_or(Ok(()), Err)
    }
}

impl Shared {
    fn live(&self) -> std::sync::MutexGuard<'_, HashMap<MigrationId, Handle>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stops the coordinator because it cannot write any more.
    fn fail(&self, error: StoreError) -> Failure {
        tracing::error!(error = %chain(&error), "the store failed: stopping, so that a restart reads what is on disk");
        let failure = Failure::from_error(FailureCode::Internal, &error).remedy("see the coordinator's log");
        self.fatal.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        self.stop.cancel();
        failure
    }
}

fn refusal(record: &Record, conflict: Conflict) -> Failure {
    match conflict {
        Conflict::Workload { id } => {
            let message = format!("workload {} is part of migration {id} already", record.workload);
            Failure::new(FailureCode::AlreadyExists, message).remedy(format!("wait for {id} to end, or cancel it"))
        }
        Conflict::Node { node, limit } => {
            let message = format!("node {node} takes part in {limit} migrations already, which is its limit");
            Failure::new(FailureCode::ResourceExhausted, message).on(node.as_str()).remedy("wait until one has ended")
        }
        Conflict::Object { why } => {
            let message = format!("the API server does not take the Migration of {}: {why}", record.workload);
            Failure::new(FailureCode::FailedPrecondition, message).remedy("see that this may be made in the namespace")
        }
        Conflict::Changed => {
            let message = format!("the Migration of {} has changed since it was seen", record.workload);
            Failure::new(FailureCode::Unavailable, message).remedy("it is looked at again by itself")
        }
    }
}

/// Runs disk work where it may block.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => value,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

#[cfg(test)]
mod tests {
    use std::task::{Context, Poll, Waker};

    use super::*;
    use crate::testing;

    const PATIENCE: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn a_migration_whose_client_has_gone_is_driven() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("state")).unwrap();
        let runner = testing::runner(&testing::agents(folder.path()), &store, &testing::audit(folder.path()));
        let record = testing::record("cart", "a", "b");
        let id = record.id;
        {
            let mut starting = Box::pin(runner.start(record));
            let begun = starting.as_mut().poll(&mut Context::from_waker(Waker::noop()));
            assert!(matches!(begun, Poll::Pending), "it has begun, and is dropped in the middle");
        }
        // Nobody listens at the nodes' addresses: its driver aborts it.
        let ended = timeout(PATIENCE, async {
            while !store.get(id).unwrap().is_some_and(|record| record.state.is_final()) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        ended.await.unwrap_or_else(|_| panic!("nobody drives {:?}", store.get(id)));
    }
}
