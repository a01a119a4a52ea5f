//! The records in the API server: each in the status of its `Migration` object.
//!
//! Everything is read once, when a coordinator begins to lead, and kept in memory from then on. Only the leader writes, and
//! each of its writes is made from the object as it last knew it ([`write`]): a coordinator that leads no more cannot decide
//! anything, and stops when it tries.
//!
//! An object may have been there before its record: somebody asked for a migration by it, and the controller has
//! [claimed](Objects::claim) it. Otherwise the store makes one, which says by an annotation that it is no request.

mod evacuations;
mod names;
mod past;
mod status;
mod write;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use kube::api::ListParams;
use kube::{Api, Client, ResourceExt as _};
use podferry_common::{MigrationId, NodeName, WorkloadName};
use podferry_crds::{
    Connections as WantedConnections, FINALIZER, ID_ANNOTATION, Migration, MigrationSpec, MigrationStatus,
    Strategy as Wanted, Wishes,
};
use tokio::runtime::Handle;

use super::{Conflict, HistoryEntry, Record, StoreError};
use crate::migration::Decision;
use crate::strategy::{Fate, Strategy};
use write::{Kept, Pen, Unwritten};

pub use evacuations::Evacuations;
pub(crate) use evacuations::deadline_of;
pub(crate) use names::pod_of;
pub use names::{home_of, workload_of};
pub(crate) use status::{ACCEPTED, FINISHED, Judgement, SUCCEEDED, judge, reason_of, time};

/// How long a state that is written lazily may wait for company.
const LAZINESS: Duration = Duration::from_secs(1);
/// Objects that are asked for at a time.
const PAGE: u32 = 200;

/// The records in the API server. Clones share them.
#[derive(Clone)]
pub struct Objects {
    shared: Arc<Shared>,
}

struct Shared {
    pen: Pen,
    /// Where objects are made for workloads that are no pods.
    namespace: String,
    entries: Mutex<BTreeMap<MigrationId, Entry>>,
    /// Objects that await the record of the migration that they asked for.
    claims: Mutex<HashMap<MigrationId, Migration>>,
    /// Where writes are made that are called from threads which may wait.
    runtime: Handle,
}

/// A migration as it is known here.
struct Entry {
    /// The newest record. What of it is not written yet is what may be lost.
    record: Record,
    history: Vec<HistoryEntry>,
    /// The record has more than the object.
    lazy: bool,
    owner: Owner,
    /// The object as it was seen last. Held while it is written.
    object: Arc<tokio::sync::Mutex<Migration>>,
}

/// The object of a migration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Owner {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its uid.
    pub uid: String,
    /// The coordinator has made it.
    pub made_here: bool,
}

impl Owner {
    fn of(object: &Migration) -> Self {
        Self {
            namespace: write::namespace(object),
            name: object.name_any(),
            uid: object.uid().unwrap_or_default(),
            made_here: object.annotations().contains_key(ID_ANNOTATION),
        }
    }
}

impl Objects {
    /// Reads all records. `namespace` is the coordinator's own, `writer` what this process is called, as no other one ever is.
    ///
    /// # Errors
    /// When the API server does not list them, or a record cannot be read: a migration that is not gone on with may have been
    /// committed.
    pub async fn open(client: Client, namespace: &str, writer: &str) -> Result<Self, StoreError> {
        let mut entries = BTreeMap::new();
        for object in all::<Migration>(&client).await? {
            entries.extend(Entry::of(object)?.map(|entry| (entry.record.id, entry)));
        }
        let shared = Shared {
            pen: Pen::new(client, writer),
            namespace: namespace.to_owned(),
            entries: Mutex::new(entries),
            claims: Mutex::default(),
            runtime: Handle::current(),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// The record of the migration of that id, when it is created, goes into this object.
    pub fn claim(&self, id: MigrationId, object: Migration) {
        self.claims().insert(id, object);
    }

    /// A migration that was claimed for was not begun.
    pub fn unclaim(&self, id: MigrationId) {
        self.claims().remove(&id);
    }

    /// Writes the status of an object that has no record; it is on the API server on return.
    ///
    /// # Errors
    /// When it is not taken.
    pub async fn mark(&self, mut object: Migration, status: MigrationStatus) -> Result<Migration, StoreError> {
        let written = self.shared.pen.write(&mut object, status).await;
        written.map_err(|unwritten| unwritten.fatal("refuse a migration", &object))?;
        Ok(object)
    }

    /// Shows how far a migration is, as far as it has not come to another state meanwhile. Nothing that is recorded depends on it.
    ///
    /// # Errors
    /// When it cannot be written.
    pub async fn show(&self, seen: &Record) -> Result<(), StoreError> {
        let id = seen.id;
        if let Some(entry) = self.entries().get_mut(&id)
            && entry.record.state == seen.state
        {
            entry.record.report.clone_from(&seen.report);
            entry.lazy = true;
        }
        self.write_what_is_lazy(id).await
    }

    pub(super) fn create(&self, record: &Record, limit: usize) -> Result<Result<(), Conflict>, StoreError> {
        if let Some(conflict) = self.reserve(record, limit) {
            return Ok(Err(conflict));
        }
        let made = self.shared.runtime.block_on(self.begin(record));
        if matches!(made, Ok(Ok(()))) {
            let objects = self.clone();
            self.shared.runtime.spawn(async move { objects.forget_the_oldest().await });
        } else {
            self.entries().remove(&record.id);
        }
        made
    }

    /// Takes the workload and a place on both nodes, before anything is written.
    fn reserve(&self, record: &Record, limit: usize) -> Option<Conflict> {
        let mut entries = self.entries();
        let conflict = past::conflict(entries.values().map(|entry| &entry.record), record, limit);
        if conflict.is_none() {
            let (object, history) = (Arc::default(), Vec::new());
            let entry = Entry { record: record.clone(), history, lazy: false, owner: Owner::default(), object };
            entries.insert(record.id, entry);
        }
        conflict
    }

    async fn begin(&self, record: &Record) -> Result<Result<(), Conflict>, StoreError> {
        let claimed = self.claims().remove(&record.id);
        let begun = match claimed {
            Some(object) => self.first_write(object, record).await,
            None => match self.shared.pen.make(&self.object_of(record)).await {
                Ok(object) => self.first_write(object, record).await,
                Err(unwritten) => Err(unwritten),
            },
        };
        match begun {
            Ok(()) => Ok(Ok(())),
            Err(Unwritten::Refused(error)) => Ok(Err(Conflict::Object { why: error.to_string() })),
            Err(Unwritten::Gone) => Ok(Err(Conflict::Object { why: "it has been deleted".to_owned() })),
            Err(Unwritten::Stale) => Ok(Err(Conflict::Changed)),
            Err(Unwritten::Store(error)) => Err(error),
        }
    }

    async fn first_write(&self, mut object: Migration, record: &Record) -> Result<(), Unwritten> {
        let history = vec![happened("accepted")];
        let status = status_of(&object, record, &history).map_err(Unwritten::Store)?;
        self.shared.pen.write(&mut object, status).await?;
        if let Some(entry) = self.entries().get_mut(&record.id) {
            entry.owner = Owner::of(&object);
            entry.object = Arc::new(tokio::sync::Mutex::new(object));
            entry.history = history;
        }
        Ok(())
    }

    /// The object of a migration that was asked for otherwise.
    fn object_of(&self, record: &Record) -> Migration {
        let (namespace, pod) = home_of(&record.workload, &self.shared.namespace);
        let mut object = Migration::new(&names::object_name(pod, &record.id.to_string()), spec_of(record, pod));
        object.metadata.namespace = Some(namespace.to_owned());
        object.annotations_mut().insert(ID_ANNOTATION.to_owned(), record.id.to_string());
        object.finalizers_mut().push(FINALIZER.to_owned());
        object
    }

    pub(super) fn update(&self, record: &Record, what: &str) -> Result<(), StoreError> {
        self.shared.runtime.block_on(self.write_now(record, what))
    }

    async fn write_now(&self, record: &Record, what: &str) -> Result<(), StoreError> {
        let object = self.object(record.id).ok_or_else(|| StoreError::Unknown { id: record.id.to_string() })?;
        let mut object = object.lock().await;
        let history = self.history_with(record.id, what);
        let status = |object: &Migration| status_of(object, record, &history);
        let written = self.shared.pen.write_surely(&mut *object, status, || self.object_of(record)).await;
        written.map_err(|unwritten| unwritten.fatal("update a migration", &*object))?;
        if let Some(entry) = self.entries().get_mut(&record.id) {
            entry.record = record.clone();
            entry.history = history;
            entry.lazy = false;
            entry.owner = Owner::of(&object);
        }
        Ok(())
    }

    async fn write(&self, object: &mut Migration, record: &Record, history: &[HistoryEntry]) -> Result<(), Unwritten> {
        let status = status_of(object, record, history).map_err(Unwritten::Store)?;
        self.shared.pen.write(object, status).await
    }

    pub(super) fn update_lazily(&self, record: &Record, what: &str) -> Result<(), StoreError> {
        let history = self.history_with(record.id, what);
        let id = record.id;
        let mut entries = self.entries();
        let entry = entries.get_mut(&id).ok_or_else(|| StoreError::Unknown { id: id.to_string() })?;
        let waits = std::mem::replace(&mut entry.lazy, true);
        entry.record = record.clone();
        entry.history = history;
        drop(entries);
        if !waits {
            let objects = self.clone();
            self.shared.runtime.spawn(async move {
                tokio::time::sleep(LAZINESS).await;
                if let Err(error) = objects.write_what_is_lazy(id).await {
                    tracing::warn!(migration = %id, %error, "a state is not shown yet: it is written with the next");
                }
            });
        }
        Ok(())
    }

    /// Writes what the object lacks of a record. The commit must not find such a write under way: a workload that is about to be
    /// committed waits for nothing else.
    async fn write_what_is_lazy(&self, id: MigrationId) -> Result<(), StoreError> {
        let Some(object) = self.object(id) else { return Ok(()) };
        let mut object = object.lock().await;
        let due = {
            let mut entries = self.entries();
            let entry = entries.get_mut(&id).filter(|entry| entry.lazy && !is_about_to_be_decided(&entry.record));
            entry.map(|entry| {
                entry.lazy = false;
                (entry.record.clone(), entry.history.clone())
            })
        };
        let Some((record, history)) = due else { return Ok(()) };
        let written = self.write(&mut object, &record, &history).await;
        written.map_err(|unwritten| unwritten.fatal("show a migration", &*object))
    }

    /// Deletes the objects of the oldest migrations that have ended, of those that the coordinator has made.
    async fn forget_the_oldest(&self) {
        let surplus = past::surplus(self.entries().values().map(|entry| (&entry.record, entry.owner.made_here)));
        for id in surplus {
            let Some(owner) = self.owner(id) else { continue };
            if self.shared.pen.delete::<Migration>(&owner.namespace, &owner.name, owner.uid).await {
                self.forget(id);
            }
        }
    }

    /// Forgets a migration that has ended and whose object is gone.
    pub fn forget(&self, id: MigrationId) {
        let mut entries = self.entries();
        if entries.get(&id).is_some_and(|entry| entry.record.state.is_final()) {
            entries.remove(&id);
        }
    }

    /// Forgets the migrations that have ended a while ago and of whose objects it is not said that they are still there. What has ended just now
    /// may not have been seen yet.
    pub fn forget_all_but(&self, is_there: impl Fn(&Owner) -> bool) {
        let now = Timestamp::now();
        self.entries().retain(|_, entry| !past::is_long_over(&entry.record, now) || is_there(&entry.owner));
    }

    /// The object of a migration.
    pub fn owner(&self, id: MigrationId) -> Option<Owner> {
        self.entries().get(&id).map(|entry| entry.owner.clone())
    }

    /// Whether an object says that its migration is at its end, which it says before the store knows that it does.
    pub(crate) fn is_at_its_end(object: &Migration) -> bool {
        status::record_of(object).is_ok_and(|record| record.is_some_and(|record| record.state.is_final()))
    }

    /// The migration that an object is of, also when the object as it was seen does not say so yet.
    pub fn of_object(&self, uid: &str) -> Option<Record> {
        self.entries().values().find(|entry| entry.owner.uid == uid).map(|entry| entry.record.clone())
    }

    /// The record of that id.
    pub fn record(&self, id: MigrationId) -> Option<Record> {
        self.entries().get(&id).map(|entry| entry.record.clone())
    }

    pub(super) fn list(&self) -> Vec<Record> {
        past::newest(self.entries().values().map(|entry| &entry.record))
    }

    pub(super) fn find(&self, wanted: impl Fn(&Record) -> bool) -> Option<Record> {
        self.entries().values().map(|entry| &entry.record).find(|record| wanted(record)).cloned()
    }

    pub(super) fn open_migrations(&self) -> Vec<Record> {
        let entries = self.entries();
        entries.values().map(|entry| &entry.record).filter(|record| !record.state.is_final()).cloned().collect()
    }

    pub(super) fn decision(&self, id: MigrationId) -> Decision {
        self.entries().get(&id).map_or(Decision::Undecided, |entry| entry.record.state.decision())
    }

    pub(super) fn history(&self, id: MigrationId) -> Vec<HistoryEntry> {
        self.entries().get(&id).map(|entry| entry.history.clone()).unwrap_or_default()
    }

    pub(super) fn busy_with(&self, workload: &WorkloadName) -> Option<MigrationId> {
        let entries = self.entries();
        let mut records = entries.values().map(|entry| &entry.record);
        records.find(|record| record.workload == *workload && !record.state.is_settled()).map(|record| record.id)
    }

    pub(super) fn place(&self, workload: &WorkloadName) -> Option<NodeName> {
        past::place(self.entries().values().map(|entry| &entry.record), workload)
    }

    fn object(&self, id: MigrationId) -> Option<Arc<tokio::sync::Mutex<Migration>>> {
        self.entries().get(&id).map(|entry| Arc::clone(&entry.object))
    }

    fn history_with(&self, id: MigrationId, what: &str) -> Vec<HistoryEntry> {
        let mut history = self.history(id);
        history.push(happened(what));
        let surplus = history.len().saturating_sub(status::MAX_HISTORY);
        history.drain(..surplus);
        history
    }

    fn entries(&self) -> MutexGuard<'_, BTreeMap<MigrationId, Entry>> {
        self.shared.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn claims(&self) -> MutexGuard<'_, HashMap<MigrationId, Migration>> {
        self.shared.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entry {
    /// What an object says; none when it has no record.
    fn of(object: Migration) -> Result<Option<Self>, StoreError> {
        let broken = |source| StoreError::Broken { id: write::title(&object), source };
        let Some(record) = status::record_of(&object).map_err(broken)? else { return Ok(None) };
        let (history, owner) = (status::history_of(&object), Owner::of(&object));
        let object = Arc::new(tokio::sync::Mutex::new(object));
        Ok(Some(Self { record, history, lazy: false, owner, object }))
    }
}

/// All objects of a kind.
async fn all<K: Kept>(client: &Client) -> Result<Vec<K>, StoreError> {
    let api: Api<K> = Api::all(client.clone());
    let (mut page, mut all) = (ListParams::default().limit(PAGE), Vec::new());
    loop {
        let found = api.list(&page).await;
        let found = found.map_err(|source| StoreError::Api { action: "list the records", source: Box::new(source) })?;
        all.extend(found.items);
        match found.metadata.continue_ {
            Some(more) if !more.is_empty() => page = page.continue_token(&more),
            _ => return Ok(all),
        }
    }
}

fn happened(what: &str) -> HistoryEntry {
    HistoryEntry { at: Timestamp::now(), what: what.to_owned() }
}

fn status_of(object: &Migration, record: &Record, history: &[HistoryEntry]) -> Result<MigrationStatus, StoreError> {
    let broken = |source| StoreError::Broken { id: record.id.to_string(), source };
    status::status_of(object, record, history).map_err(broken)
}

/// Whether the next write decides.
fn is_about_to_be_decided(record: &Record) -> bool {
    record.state.phase() == crate::migration::Phase::Commit
}

/// What somebody has asked for otherwise than by an object, as an object says it.
fn spec_of(record: &Record, pod: &str) -> MigrationSpec {
    let auto = record.auto.as_ref();
    let restart = auto.is_some_and(|auto| auto.allow_restart);
    let stops = restart || (auto.is_none() && record.strategy.starts_anew());
    let loss = auto.map_or(record.strategy.path().post_copy, |auto| auto.accept_loss);
    let wishes = Wishes {
        strategy: Some(auto.map_or_else(|| wanted(record.strategy), |_| Wanted::Auto)),
        downtime_budget_ms: whole(record.downtime_budget_ms),
        bandwidth_limit: i64::try_from(record.bandwidth_limit).ok().filter(|limit| *limit > 0),
        verify: record.verify.then_some(true),
        throttle: record.throttle.then_some(true),
        accept_loss: loss.then_some(true),
        allow_restart: restart.then_some(true),
        grace_period_seconds: i32::try_from(record.grace_period_s).ok().filter(|_| stops),
        connections: kept_or_closed(record.connections.fate),
        connections_deadline_seconds: i32::try_from(record.connections.deadline_s).ok().filter(|seconds| *seconds > 0),
        compress: (!record.compress).then_some(false),
    };
    let (pod_name, target_node) = (pod.to_owned(), Some(record.target.to_string()));
    MigrationSpec { pod_name, target_node, wishes, ..MigrationSpec::default() }
}

/// What was asked for connections; none for nothing.
fn kept_or_closed(fate: Fate) -> Option<WantedConnections> {
    match fate {
        Fate::Auto => None,
        Fate::Keep => Some(WantedConnections::Keep),
        Fate::Close => Some(WantedConnections::Close),
    }
}

/// A downtime in whole milliseconds; none for none.
fn whole(ms: f64) -> Option<i32> {
    format!("{ms:.0}").parse().ok().filter(|ms| *ms > 0)
}

fn wanted(strategy: Strategy) -> Wanted {
    match strategy {
        Strategy::Cold => Wanted::Cold,
        Strategy::Warm => Wanted::Warm,
        Strategy::Live => Wanted::Live,
        Strategy::Postcopy => Wanted::PostCopy,
        Strategy::Hybrid => Wanted::Hybrid,
        Strategy::Application => Wanted::Application,
    }
}
