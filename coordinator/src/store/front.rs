//! The store, whichever place it has.

use std::path::Path;

use podferry_common::{MigrationId, NodeName, WorkloadName};

use super::database::Local;
use super::{Conflict, EvacuationConflict, Evacuations, HistoryEntry, Objects, Record, StoreError};
use crate::evacuation::{Evacuation, EvacuationId};
use crate::migration::Decision;

/// The store. Clones share it. What writes may wait for a disk or the API server: it is called where that is allowed
/// ([`crate::runner::blocking`]).
#[derive(Clone)]
pub struct Store {
    place: Place,
}

#[derive(Clone)]
enum Place {
    Local(Local),
    Kubernetes(Objects, Evacuations),
}

impl Store {
    /// Opens the store in that folder, which is made if missing; repairs it after a crash.
    pub fn open(folder: &Path) -> Result<Self, StoreError> {
        Ok(Self { place: Place::Local(Local::open(folder)?) })
    }

    /// The store in the API server.
    pub fn in_kubernetes(objects: Objects, evacuations: Evacuations) -> Self {
        Self { place: Place::Kubernetes(objects, evacuations) }
    }

    /// Records an evacuation, unless its node is being evacuated already. Durable when it returns.
    pub fn create_evacuation(&self, new: &Evacuation) -> Result<Result<(), EvacuationConflict>, StoreError> {
        match &self.place {
            Place::Local(local) => local.create_evacuation(new),
            Place::Kubernetes(_, evacuations) => evacuations.create(new),
        }
    }

    /// Writes an evacuation's new state; with `lazily` to be durable with the next write that is, for what a restart may find in its
    /// old state.
    pub fn update_evacuation(&self, evacuation: &Evacuation, lazily: bool) -> Result<(), StoreError> {
        match &self.place {
            Place::Local(local) => local.update_evacuation(evacuation, lazily),
            Place::Kubernetes(_, evacuations) if lazily => evacuations.update_lazily(evacuation),
            Place::Kubernetes(_, evacuations) => evacuations.update(evacuation),
        }
    }

    /// The evacuation of that id.
    pub fn evacuation(&self, id: EvacuationId) -> Result<Option<Evacuation>, StoreError> {
        match &self.place {
            Place::Local(local) => local.evacuation(id),
            Place::Kubernetes(_, evacuations) => Ok(evacuations.get(id)),
        }
    }

    /// All evacuations, newest first.
    pub fn evacuations(&self) -> Result<Vec<Evacuation>, StoreError> {
        match &self.place {
            Place::Local(local) => local.evacuations(),
            Place::Kubernetes(_, evacuations) => Ok(evacuations.list()),
        }
    }

    /// Records a new migration, unless its workload is part of another one or a node has `limit` already. Durable when it
    /// returns.
    pub fn create(&self, record: &Record, limit: usize) -> Result<Result<(), Conflict>, StoreError> {
        match &self.place {
            Place::Local(local) => local.create(record, limit),
            Place::Kubernetes(objects, _) => objects.create(record, limit),
        }
    }

    /// Writes a record's new state. Durable when it returns.
    pub fn update(&self, record: &Record, what: &str) -> Result<(), StoreError> {
        match &self.place {
            Place::Local(local) => local.update(record, what),
            Place::Kubernetes(objects, _) => objects.update(record, what),
        }
    }

    /// Writes a record's new state, to be durable with the next write that is: what a restart may find in its old state.
    pub fn update_lazily(&self, record: &Record, what: &str) -> Result<(), StoreError> {
        match &self.place {
            Place::Local(local) => local.update_lazily(record, what),
            Place::Kubernetes(objects, _) => objects.update_lazily(record, what),
        }
    }

    /// The record of that id.
    pub fn get(&self, id: MigrationId) -> Result<Option<Record>, StoreError> {
        match &self.place {
            Place::Local(local) => local.get(id),
            Place::Kubernetes(objects, _) => Ok(objects.record(id)),
        }
    }

    /// All records, newest first.
    pub fn list(&self) -> Result<Vec<Record>, StoreError> {
        match &self.place {
            Place::Local(local) => local.list(),
            Place::Kubernetes(objects, _) => Ok(objects.list()),
        }
    }

    /// Any record that is as wanted.
    pub fn find(&self, wanted: impl Fn(&Record) -> bool) -> Result<Option<Record>, StoreError> {
        match &self.place {
            Place::Local(local) => Ok(local.list()?.into_iter().find(wanted)),
            Place::Kubernetes(objects, _) => Ok(objects.find(wanted)),
        }
    }

    /// All records that are not final, oldest first: what a restarted coordinator has to go on with.
    pub fn open_migrations(&self) -> Result<Vec<Record>, StoreError> {
        match &self.place {
            Place::Local(local) => local.open_migrations(),
            Place::Kubernetes(objects, _) => Ok(objects.open_migrations()),
        }
    }

    /// How a migration was decided. Of one that was never recorded nothing is known: every migration is recorded before an
    /// agent hears of it, so this store is not the one that it was recorded in, and that one may have the commit.
    pub fn decision(&self, id: MigrationId) -> Result<Decision, StoreError> {
        match &self.place {
            Place::Local(local) => local.decision(id),
            Place::Kubernetes(objects, _) => Ok(objects.decision(id)),
        }
    }

    /// What happened in a migration, oldest first.
    pub fn history(&self, id: MigrationId) -> Result<Vec<HistoryEntry>, StoreError> {
        match &self.place {
            Place::Local(local) => local.history(id),
            Place::Kubernetes(objects, _) => Ok(objects.history(id)),
        }
    }

    /// The migration that a workload is part of and whose outcome is open.
    pub fn busy_with(&self, workload: &WorkloadName) -> Result<Option<MigrationId>, StoreError> {
        match &self.place {
            Place::Local(local) => local.busy_with(workload),
            Place::Kubernetes(objects, _) => Ok(objects.busy_with(workload)),
        }
    }

    /// Where the last committed migration has put a workload.
    pub fn place(&self, workload: &WorkloadName) -> Result<Option<NodeName>, StoreError> {
        match &self.place {
            Place::Local(local) => local.place(workload),
            Place::Kubernetes(objects, _) => Ok(objects.place(workload)),
        }
    }

    /// Records many migrations at once.
    #[cfg(test)]
    pub(crate) fn fill(&self, records: &[Record]) -> Result<(), redb::Error> {
        match &self.place {
            Place::Local(local) => local.fill(records),
            Place::Kubernetes(..) => unreachable!("tests without an API server have none"),
        }
    }
}
