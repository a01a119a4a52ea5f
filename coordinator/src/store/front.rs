//! The store, whichever place it has.

use std::path::Path;

use podferry_common::{MigrationId, NodeName, WorkloadName};

use super::database::Local;
use super::{Conflict, HistoryEntry, Objects, Record, StoreError};
use crate::evacuation::{Evacuation, EvacuationId};
use crate::migration::Decision;

/// The store. Clones share it. What writes may wait for a disk or the API server: it is called where that is allowed
/// ([`crate::runner::blocking`]).
#[derive(Clone)]
pub struct Store {
    place: Place,
    /// Where evacuations are recorded, whatever that place is.
    evacuations: Local,
}

#[derive(Clone)]
enum Place {
    Local(Local),
    Kubernetes(Objects),
}

impl Store {
    /// Opens the store in that folder, which is made if missing; repairs it after a crash.
    pub fn open(folder: &Path) -> Result<Self, StoreError> {
        let local = Local::open(folder)?;
        Ok(Self { place: Place::Local(local.clone()), evacuations: local })
    }

    /// The store in the API server; of evacuations, in that folder.
    pub fn in_kubernetes(objects: Objects, folder: &Path) -> Result<Self, StoreError> {
        Ok(Self { place: Place::Kubernetes(objects), evacuations: Local::open(folder)? })
    }

    /// Records an evacuation, unless its node is being evacuated already: then the id of the other one comes back. On disk when it
    /// returns.
    pub fn create_evacuation(&self, new: &Evacuation) -> Result<Result<(), EvacuationId>, StoreError> {
        self.evacuations.create_evacuation(new)
    }

    /// Writes an evacuation's new state; with `lazily` to be on disk with the next write that is, for what a restart may find in its
    /// old state.
    pub fn update_evacuation(&self, evacuation: &Evacuation, lazily: bool) -> Result<(), StoreError> {
        self.evacuations.update_evacuation(evacuation, lazily)
    }

    /// The evacuation of that id.
    pub fn evacuation(&self, id: EvacuationId) -> Result<Option<Evacuation>, StoreError> {
        self.evacuations.evacuation(id)
    }

    /// All evacuations, newest first.
    pub fn evacuations(&self) -> Result<Vec<Evacuation>, StoreError> {
        self.evacuations.evacuations()
    }

    /// Records a new migration, unless its workload is part of another one or a node has `limit` already. Durable when it
    /// returns.
    pub fn create(&self, record: &Record, limit: usize) -> Result<Result<(), Conflict>, StoreError> {
        match &self.place {
            Place::Local(local) => local.create(record, limit),
            Place::Kubernetes(objects) => objects.create(record, limit),
        }
    }

    /// Writes a record's new state. Durable when it returns.
    pub fn update(&self, record: &Record, what: &str) -> Result<(), StoreError> {
        match &self.place {
            Place::Local(local) => local.update(record, what),
            Place::Kubernetes(objects) => objects.update(record, what),
        }
    }

    /// Writes a record's new state, to be durable with the next write that is: what a restart may find in its old state.
    pub fn update_lazily(&self, record: &Record, what: &str) -> Result<(), StoreError> {
        match &self.place {
            Place::Local(local) => local.update_lazily(record, what),
            Place::Kubernetes(objects) => objects.update_lazily(record, what),
        }
    }

    /// The record of that id.
    pub fn get(&self, id: MigrationId) -> Result<Option<Record>, StoreError> {
        match &self.place {
            Place::Local(local) => local.get(id),
            Place::Kubernetes(objects) => Ok(objects.record(id)),
        }
    }

    /// All records, newest first.
    pub fn list(&self) -> Result<Vec<Record>, StoreError> {
        match &self.place {
            Place::Local(local) => local.list(),
            Place::Kubernetes(objects) => Ok(objects.list()),
        }
    }

    /// All records that are not final, oldest first: what a restarted coordinator has to go on with.
    pub fn open_migrations(&self) -> Result<Vec<Record>, StoreError> {
        match &self.place {
            Place::Local(local) => local.open_migrations(),
            Place::Kubernetes(objects) => Ok(objects.open_migrations()),
        }
    }

    /// How a migration was decided. Of one that was never recorded nothing is known: every migration is recorded before an
    /// agent hears of it, so this store is not the one that it was recorded in, and that one may have the commit.
    pub fn decision(&self, id: MigrationId) -> Result<Decision, StoreError> {
        match &self.place {
            Place::Local(local) => local.decision(id),
            Place::Kubernetes(objects) => Ok(objects.decision(id)),
        }
    }

    /// What happened in a migration, oldest first.
    pub fn history(&self, id: MigrationId) -> Result<Vec<HistoryEntry>, StoreError> {
        match &self.place {
            Place::Local(local) => local.history(id),
            Place::Kubernetes(objects) => Ok(objects.history(id)),
        }
    }

    /// The migration that a workload is part of and whose outcome is open.
    pub fn busy_with(&self, workload: &WorkloadName) -> Result<Option<MigrationId>, StoreError> {
        match &self.place {
            Place::Local(local) => local.busy_with(workload),
            Place::Kubernetes(objects) => Ok(objects.busy_with(workload)),
        }
    }

    /// Where the last committed migration has put a workload.
    pub fn place(&self, workload: &WorkloadName) -> Result<Option<NodeName>, StoreError> {
        match &self.place {
            Place::Local(local) => local.place(workload),
            Place::Kubernetes(objects) => Ok(objects.place(workload)),
        }
    }

    /// Records many migrations at once.
    #[cfg(test)]
    pub(crate) fn fill(&self, records: &[Record]) -> Result<(), redb::Error> {
        match &self.place {
            Place::Local(local) => local.fill(records),
            Place::Kubernetes(_) => unreachable!("tests without an API server have none"),
        }
    }
}
