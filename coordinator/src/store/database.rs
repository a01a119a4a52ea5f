//! The database file and its transactions.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::Timestamp;
use podferry_common::{MigrationId, NodeName, WorkloadName};
use redb::{
    Database, Durability, ReadableDatabase, ReadableTable, ReadableTableMetadata, TableDefinition, WriteTransaction,
};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::Record;
use super::evacuations::EVACUATIONS;
use crate::evacuation::EvacuationId;
use crate::migration::Decision;

/// The database's name in the state folder.
pub const FILE_NAME: &str = "coordinator.redb";

/// Ended migrations that are kept; the oldest beyond them are forgotten. A forgotten migration is over on both nodes, so
/// nobody asks how it was decided. A list of all that are kept has to fit into one message.
const KEPT: u64 = 1000;

/// Layout of the tables. A file of another layout is refused instead of misread.
const LAYOUT: &str = "1";

/// Id -> record (JSON).
const MIGRATIONS: TableDefinition<&str, &[u8]> = TableDefinition::new("migrations");
/// Id of every migration that is not final.
const OPEN: TableDefinition<&str, ()> = TableDefinition::new("open");
/// Workload -> id of the migration whose outcome is open.
const BUSY: TableDefinition<&str, &str> = TableDefinition::new("busy");
/// (Id, number) -> what happened (JSON).
const HISTORY: TableDefinition<(&str, u64), &[u8]> = TableDefinition::new("history");
/// Workload -> node where the last committed migration has put it.
const PLACES: TableDefinition<&str, &str> = TableDefinition::new("places");
/// What the file says of itself.
const META: TableDefinition<&str, &str> = TableDefinition::new("meta");

/// Why the store cannot do its work.
#[derive(Debug, Error)]
pub enum StoreError {
    /// The folder cannot be made.
    #[error("cannot make the state folder {}", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The file cannot be opened.
    #[error("cannot open the store {}; is another coordinator running on it?", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: redb::Error,
    },
    /// The file was written by another version.
    #[error("the store {} has layout {found}, this coordinator knows {LAYOUT}; use the version that wrote it", path.display())]
    Layout {
        /// The file.
        path: PathBuf,
        /// The layout it says it has.
        found: String,
    },
    /// A transaction failed. Whether a write is on disk is not known then.
    #[error("the store cannot {action}")]
    Transaction {
        /// What it was to do.
        action: &'static str,
        /// Why not.
        source: redb::Error,
    },
    /// A record cannot be read.
    #[error("the record of {id} in the store is broken")]
    Broken {
        /// Of what: an id, or an object.
        id: String,
        /// Why not.
        source: serde_json::Error,
    },
    /// The API server could not be asked. Whether a write is in it is not known then.
    #[error("the store cannot {action}: the API server does not do it")]
    Api {
        /// What it was to do.
        action: &'static str,
        /// Why not.
        source: Box<kube::Error>,
    },
    /// Somebody else has written a record that is this coordinator's.
    #[error("{object} was written by {by}, so another coordinator leads; this one stops")]
    Deposed {
        /// Kind, namespace and name.
        object: String,
        /// Who.
        by: String,
    },
    /// This coordinator has written an object itself since it was seen.
    #[error("{object} was written since it was seen; look again")]
    Stale {
        /// Kind, namespace and name.
        object: String,
    },
    /// A record is to be changed that was never made.
    #[error("{id} has no record in the store")]
    Unknown {
        /// The migration or evacuation.
        id: String,
    },
}

/// Why a migration cannot be recorded now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Conflict {
    /// The workload is part of another one.
    Workload {
        /// The other one.
        id: MigrationId,
    },
    /// A node takes part in as many as it may.
    Node {
        /// The node.
        node: NodeName,
        /// How many.
        limit: usize,
    },
    /// The API server does not take its object.
    Object {
        /// What it says.
        why: String,
    },
    /// Its object has changed since it was seen.
    Changed,
}

/// Why an evacuation cannot be recorded now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EvacuationConflict {
    /// The node is being evacuated already.
    Node {
        /// By which.
        id: EvacuationId,
    },
    /// The API server does not take its object.
    Object {
        /// What it says.
        why: String,
    },
    /// Its object has changed since it was seen.
    Changed,
}

/// One thing that happened in a migration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HistoryEntry {
    /// When.
    pub at: Timestamp,
    /// What.
    pub what: String,
}

/// The records in one file of this machine. Clones share it.
#[derive(Clone)]
pub(super) struct Local {
    pub(super) database: Arc<Database>,
}

impl Local {
    /// Opens the store in that folder, which is made if missing; repairs it after a crash.
    pub(super) fn open(folder: &Path) -> Result<Self, StoreError> {
        std::fs::create_dir_all(folder).map_err(|source| StoreError::Folder { path: folder.to_owned(), source })?;
        let path = folder.join(FILE_NAME);
        let failed = |source: redb::Error| StoreError::Open { path: path.clone(), source };
        let database = Database::create(&path).map_err(|error| failed(error.into()))?;
        let found = prepare(&database).map_err(failed)?;
        if found != LAYOUT {
            return Err(StoreError::Layout { path, found });
        }
        Ok(Self { database: Arc::new(database) })
    }

    /// Records a new migration, unless its workload is part of another one or a node has `limit` already. On disk when it
    /// returns.
    pub(super) fn create(&self, record: &Record, limit: usize) -> Result<Result<(), Conflict>, StoreError> {
        let action = "record a migration";
        let transaction = self.begin(action, Durability::Immediate)?;
        if let Some(conflict) = conflict(&transaction, record, limit)? {
            return Ok(Err(conflict));
        }
        write(&transaction, record, "accepted").map_err(failed(action))?;
        prune(&transaction, KEPT).map_err(failed(action))?;
        transaction.commit().map_err(|error| failed(action)(error.into()))?;
        Ok(Ok(()))
    }

    /// Writes a record's new state. On disk when it returns.
    pub(super) fn update(&self, record: &Record, what: &str) -> Result<(), StoreError> {
        self.update_with(record, what, Durability::Immediate)
    }

    /// Writes a record's new state, to be on disk with the next write that is: what a restart may find in its old state.
    pub(super) fn update_lazily(&self, record: &Record, what: &str) -> Result<(), StoreError> {
        self.update_with(record, what, Durability::None)
    }

    /// Records many migrations at once.
    #[cfg(test)]
    pub(crate) fn fill(&self, records: &[Record]) -> Result<(), redb::Error> {
        let transaction = self.database.begin_write()?;
        records.iter().try_for_each(|record| write(&transaction, record, "accepted"))?;
        prune(&transaction, KEPT)?;
        Ok(transaction.commit()?)
    }

    fn update_with(&self, record: &Record, what: &str, durability: Durability) -> Result<(), StoreError> {
        let action = "update a migration";
        let transaction = self.begin(action, durability)?;
        write(&transaction, record, what).map_err(failed(action))?;
        transaction.commit().map_err(|error| failed(action)(error.into()))
    }

    pub(super) fn begin(&self, action: &'static str, durability: Durability) -> Result<WriteTransaction, StoreError> {
        let mut transaction = self.database.begin_write().map_err(|error| failed(action)(error.into()))?;
        transaction.set_durability(durability).map_err(|error| failed(action)(error.into()))?;
        Ok(transaction)
    }

    /// The record of that id.
    pub(super) fn get(&self, id: MigrationId) -> Result<Option<Record>, StoreError> {
        let id = id.to_string();
        let bytes = self.read("read a migration", |transaction| {
            let table = transaction.open_table(MIGRATIONS)?;
            Ok(table.get(id.as_str())?.map(|bytes| bytes.value().to_vec()))
        })?;
        bytes.map(|bytes| parse(&id, &bytes)).transpose()
    }

    /// All records, newest first.
    pub(super) fn list(&self) -> Result<Vec<Record>, StoreError> {
        let all = self.read("list migrations", |transaction| {
            let table = transaction.open_table(MIGRATIONS)?;
            let rows = table.iter()?.rev();
            rows.map(|row| row.map(|(id, bytes)| (id.value().to_owned(), bytes.value().to_vec())).map_err(Into::into))
                .collect()
        })?;
        let all: Vec<(String, Vec<u8>)> = all;
        all.iter().map(|(id, bytes)| parse(id, bytes)).collect()
    }

    /// All records that are not final, oldest first: what a restarted coordinator has to go on with.
    pub(super) fn open_migrations(&self) -> Result<Vec<Record>, StoreError> {
        let all = self.read("list open migrations", |transaction| {
            let (open, records) = (transaction.open_table(OPEN)?, transaction.open_table(MIGRATIONS)?);
            let mut all = Vec::new();
            for row in open.iter()? {
                let id = row?.0.value().to_owned();
                let bytes = records.get(id.as_str())?.map(|bytes| bytes.value().to_vec());
                all.extend(bytes.map(|bytes| (id, bytes)));
            }
            Ok(all)
        })?;
        all.iter().map(|(id, bytes)| parse(id, bytes)).collect()
    }

    /// How a migration was decided. Of one that was never recorded nothing is known: every migration is recorded before an
    /// agent hears of it, so this store is not the one that it was recorded in, and that one may have the commit.
    pub(super) fn decision(&self, id: MigrationId) -> Result<Decision, StoreError> {
        Ok(self.get(id)?.map_or(Decision::Undecided, |record| record.state.decision()))
    }

    /// What happened in a migration, oldest first.
    pub(super) fn history(&self, id: MigrationId) -> Result<Vec<HistoryEntry>, StoreError> {
        let id = id.to_string();
        let all: Vec<Vec<u8>> = self.read("read a migration's history", |transaction| {
            let table = transaction.open_table(HISTORY)?;
            let rows = table.range((id.as_str(), 0)..=(id.as_str(), u64::MAX))?;
            rows.map(|row| row.map(|(_, bytes)| bytes.value().to_vec()).map_err(Into::into)).collect()
        })?;
        all.iter().map(|bytes| parse(&id, bytes)).collect()
    }

    /// The migration that a workload is part of and whose outcome is open.
    pub(super) fn busy_with(&self, workload: &WorkloadName) -> Result<Option<MigrationId>, StoreError> {
        let id = self.read("look for a workload's migration", |transaction| {
            let table = transaction.open_table(BUSY)?;
            Ok(table.get(workload.as_str())?.map(|id| id.value().to_owned()))
        })?;
        Ok(id.and_then(|id| id.parse().ok()))
    }

    /// Where the last committed migration has put a workload.
    pub(super) fn place(&self, workload: &WorkloadName) -> Result<Option<NodeName>, StoreError> {
        let node = self.read("read a workload's place", |transaction| {
            let table = transaction.open_table(PLACES)?;
            Ok(table.get(workload.as_str())?.map(|node| node.value().to_owned()))
        })?;
        Ok(node.and_then(|node| node.parse().ok()))
    }

    pub(super) fn read<T>(
        &self,
        action: &'static str,
        body: impl FnOnce(&redb::ReadTransaction) -> Result<T, redb::Error>,
    ) -> Result<T, StoreError> {
        let transaction = self.database.begin_read().map_err(|error| failed(action)(error.into()))?;
        body(&transaction).map_err(failed(action))
    }
}

pub(super) fn failed(action: &'static str) -> impl Fn(redb::Error) -> StoreError {
    move |source| StoreError::Transaction { action, source }
}

/// Writes a record, what follows from its state, and what happened.
fn write(transaction: &WriteTransaction, record: &Record, what: &str) -> Result<(), redb::Error> {
    let id = record.id.to_string();
    let id = id.as_str();
    transaction.open_table(MIGRATIONS)?.insert(id, to_json(record)?.as_slice())?;
    let mut open = transaction.open_table(OPEN)?;
    let mut busy = transaction.open_table(BUSY)?;
    if record.state.is_final() {
        open.remove(id)?;
    } else {
        open.insert(id, ())?;
    }
    let workload = record.workload.as_str();
    if !record.state.is_settled() {
        busy.insert(workload, id)?;
    } else if busy.get(workload)?.is_some_and(|holder| holder.value() == id) {
        busy.remove(workload)?;
    }
    if record.state.decision() == Decision::Commit {
        transaction.open_table(PLACES)?.insert(workload, record.target.as_str())?;
    }
    let mut history = transaction.open_table(HISTORY)?;
    let number =
        history.range((id, 0)..=(id, u64::MAX))?.next_back().transpose()?.map_or(0, |(key, _)| key.value().1 + 1);
    let entry = to_json(&HistoryEntry { at: Timestamp::now(), what: what.to_owned() })?;
    history.insert((id, number), entry.as_slice())?;
    Ok(())
}

/// Makes the tables of a new file, and forgets what an older version has kept longer; returns the layout that the file has.
fn prepare(database: &Database) -> Result<String, redb::Error> {
    let transaction = database.begin_write()?;
    transaction.open_table(MIGRATIONS)?;
    transaction.open_table(OPEN)?;
    transaction.open_table(BUSY)?;
    transaction.open_table(HISTORY)?;
    transaction.open_table(PLACES)?;
    transaction.open_table(EVACUATIONS)?;
    let found = {
        let mut meta = transaction.open_table(META)?;
        let found = meta.get("layout")?.map(|layout| layout.value().to_owned());
        if found.is_none() {
            meta.insert("layout", LAYOUT)?;
        }
        found.unwrap_or_else(|| LAYOUT.to_owned())
    };
    if found == LAYOUT {
        prune(&transaction, KEPT)?;
    }
    transaction.commit()?;
    Ok(found)
}

/// What of a record says whom its migration keeps busy: all that are open are read for each new one.
#[derive(Deserialize)]
struct Holder {
    id: MigrationId,
    workload: WorkloadName,
    source: NodeName,
    target: NodeName,
}

fn conflict(transaction: &WriteTransaction, new: &Record, limit: usize) -> Result<Option<Conflict>, StoreError> {
    let action = "look for other migrations";
    let busy = transaction.open_table(BUSY).map_err(|error| failed(action)(error.into()))?;
    let records = transaction.open_table(MIGRATIONS).map_err(|error| failed(action)(error.into()))?;
    let mut others = Vec::new();
    for row in busy.iter().map_err(|error| failed(action)(error.into()))? {
        let (_, id) = row.map_err(|error| failed(action)(error.into()))?;
        let bytes = records.get(id.value()).map_err(|error| failed(action)(error.into()))?;
        if let Some(bytes) = bytes {
            others.push(parse::<Holder>(id.value(), bytes.value())?);
        }
    }
    if let Some(other) = others.iter().find(|other| other.workload == new.workload) {
        return Ok(Some(Conflict::Workload { id: other.id }));
    }
    let full = [&new.source, &new.target].into_iter().find(|node| {
        let parts = others.iter().filter(|other| other.source == **node || other.target == **node);
        parts.count() >= limit
    });
    Ok(full.map(|node| Conflict::Node { node: node.clone(), limit }))
}

/// Forgets the oldest final records beyond `kept`.
fn prune(transaction: &WriteTransaction, kept: u64) -> Result<(), redb::Error> {
    let mut records = transaction.open_table(MIGRATIONS)?;
    let open = transaction.open_table(OPEN)?;
    let mut history = transaction.open_table(HISTORY)?;
    let surplus = usize::try_from(records.len()?.saturating_sub(kept)).unwrap_or(usize::MAX);
    let mut forgotten = Vec::new();
    for row in records.iter()?.take(surplus) {
        let id = row?.0.value().to_owned();
        if open.get(id.as_str())?.is_none() {
            forgotten.push(id);
        }
    }
    for id in forgotten {
        records.remove(id.as_str())?;
        history.retain_in((id.as_str(), 0)..=(id.as_str(), u64::MAX), |_, _| false)?;
    }
    Ok(())
}

pub(super) fn to_json<T: Serialize>(value: &T) -> Result<Vec<u8>, redb::Error> {
    serde_json::to_vec(value).map_err(|error| redb::Error::Io(error.into()))
}

pub(super) fn parse<T: for<'a> Deserialize<'a>>(id: &str, bytes: &[u8]) -> Result<T, StoreError> {
    serde_json::from_slice(bytes).map_err(|source| StoreError::Broken { id: id.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use podferry_common::{Failure, FailureCode};

    use super::Local as Store;
    use super::*;
    use crate::migration::State;
    use crate::migration::Why;
    use crate::testing::record;

    fn why() -> Why {
        Failure::new(FailureCode::Unavailable, "gone").criu_line("Error (a): b").into()
    }

    fn aborted(record: &Record) -> Record {
        Record { state: State::Aborted { why: why() }, ..record.clone() }
    }

    #[test]
    fn a_record_is_there_again_after_reopening() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        let mut first = record("cart", "a", "b");
        store.create(&first, 2).unwrap().unwrap();
        first.state = State::Aborting {
            target: crate::migration::PartAbort::Asked,
            source: crate::migration::SourceAbort::Due,
            why: why(),
        };
        store.update(&first, "aborting").unwrap();
        drop(store);
        let store = Store::open(folder.path()).unwrap();
        assert_eq!(store.get(first.id).unwrap().unwrap(), first);
        assert_eq!(store.open_migrations().unwrap(), [first.clone()]);
        let happened: Vec<_> = store.history(first.id).unwrap().into_iter().map(|entry| entry.what).collect();
        assert_eq!(happened, ["accepted", "aborting"]);
        assert_eq!(store.decision(first.id).unwrap(), Decision::Abort);
    }

    #[test]
    fn a_second_coordinator_is_kept_out() {
        let folder = tempfile::tempdir().unwrap();
        let _first = Store::open(folder.path()).unwrap();
        let error = Store::open(folder.path()).err().unwrap();
        assert!(error.to_string().contains("is another coordinator running on it?"), "{error}");
    }

    #[test]
    fn one_migration_a_workload_until_the_outcome_is_known() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        let first = record("cart", "a", "b");
        let second = record("cart", "c", "d");
        store.create(&first, 9).unwrap().unwrap();
        assert_eq!(store.create(&second, 9).unwrap(), Err(Conflict::Workload { id: first.id }));
        assert_eq!(store.get(second.id).unwrap(), None, "a refused migration leaves nothing");
        let rolled_back = Record { state: State::RolledBack { why: why() }, ..first.clone() };
        store.update(&rolled_back, "rolled back").unwrap();
        store.create(&second, 9).unwrap().unwrap();
        // The first one goes on asking its target; that must not free the workload that the second one has now.
        store.update(&aborted(&first), "target confirmed").unwrap();
        assert_eq!(store.create(&record("cart", "a", "b"), 9).unwrap(), Err(Conflict::Workload { id: second.id }));
        assert_eq!(store.open_migrations().unwrap(), [second]);
    }

    #[test]
    fn a_node_takes_part_in_as_many_as_it_may() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        let first = record("w1", "a", "b");
        store.create(&first, 1).unwrap().unwrap();
        let full = |node: &str| Err(Conflict::Node { node: node.parse().unwrap(), limit: 1 });
        assert_eq!(store.create(&record("w2", "b", "c"), 1).unwrap(), full("b"));
        assert_eq!(store.create(&record("w2", "c", "a"), 1).unwrap(), full("a"));
        store.create(&record("w2", "c", "d"), 1).unwrap().unwrap();
        store.update(&aborted(&first), "over").unwrap();
        store.create(&record("w3", "a", "b"), 1).unwrap().unwrap();
    }

    #[test]
    fn decisions_and_places_follow_the_commit() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        let mut first = record("cart", "a", "b");
        assert_eq!(store.decision(first.id).unwrap(), Decision::Undecided, "never recorded");
        store.create(&first, 2).unwrap().unwrap();
        assert_eq!(store.decision(first.id).unwrap(), Decision::Undecided);
        assert_eq!(store.place(&first.workload).unwrap(), None);
        first.state = State::Releasing;
        store.update(&first, "committed").unwrap();
        assert_eq!(store.decision(first.id).unwrap(), Decision::Commit);
        assert_eq!(store.place(&first.workload).unwrap(), Some(first.target.clone()));
    }

    #[test]
    fn old_ended_migrations_are_forgotten_and_open_ones_are_not() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        let records: Vec<_> = (0..6).map(|n| record(&format!("w{n}"), "a", "b")).collect();
        for (n, record) in records.iter().enumerate() {
            store.create(record, 99).unwrap().unwrap();
            if n != 1 {
                store.update(&aborted(record), "over").unwrap();
            }
        }
        let transaction = store.database.begin_write().unwrap();
        prune(&transaction, 2).unwrap();
        transaction.commit().unwrap();
        let left: Vec<_> = store.list().unwrap().into_iter().map(|record| record.id).collect();
        assert_eq!(left, [records[5].id, records[4].id, records[1].id]);
        assert!(store.history(records[0].id).unwrap().is_empty());
        assert_eq!(store.history(records[5].id).unwrap().len(), 2);
    }

    #[test]
    fn a_store_that_an_older_version_filled_is_pruned_when_it_is_opened() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        let kept = usize::try_from(KEPT).unwrap();
        let records: Vec<_> = (0..kept + 5).map(|n| record(&format!("w{n}"), "a", "b")).collect();
        let transaction = store.database.begin_write().unwrap();
        for (n, record) in records.iter().enumerate() {
            write(&transaction, &if n == 2 { record.clone() } else { aborted(record) }, "accepted").unwrap();
        }
        transaction.commit().unwrap();
        assert_eq!(store.list().unwrap().len(), kept + 5);
        drop(store);
        let store = Store::open(folder.path()).unwrap();
        let forgotten = |n: &usize| store.get(records[*n].id).unwrap().is_none();
        let forgotten: Vec<_> = (0..records.len()).filter(forgotten).collect();
        assert_eq!(forgotten, [0, 1, 3, 4], "the oldest, but none that is open");
        assert!(store.history(records[0].id).unwrap().is_empty());
    }

    #[test]
    fn another_layout_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        let transaction = store.database.begin_write().unwrap();
        transaction.open_table(META).unwrap().insert("layout", "0").unwrap();
        transaction.commit().unwrap();
        drop(store);
        assert!(matches!(Store::open(folder.path()).err().unwrap(), StoreError::Layout { found, .. } if found == "0"));
    }
}
