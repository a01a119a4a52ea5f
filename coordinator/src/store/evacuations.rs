//! The table of evacuations.

use redb::{Durability, ReadableTable, TableDefinition, WriteTransaction};

use super::database::{Local, failed, parse, to_json};
use super::{EvacuationConflict, StoreError};
use crate::evacuation::{Evacuation, EvacuationId};

/// Evacuations that have ended and are kept; the oldest beyond them are forgotten.
pub(super) const KEPT: usize = 100;

/// Id -> evacuation (JSON).
pub(super) const EVACUATIONS: TableDefinition<&str, &[u8]> = TableDefinition::new("evacuations");

impl Local {
    /// Records an evacuation, unless its node is being evacuated already. On disk when it returns.
    pub(super) fn create_evacuation(&self, new: &Evacuation) -> Result<Result<(), EvacuationConflict>, StoreError> {
        let action = "record an evacuation";
        let transaction = self.begin(action, Durability::Immediate)?;
        let all = all(&transaction, action)?;
        if let Some(other) = all.iter().find(|other| other.node == new.node && !other.has_ended()) {
            return Ok(Err(EvacuationConflict::Node { id: other.id }));
        }
        let forgotten = all.iter().filter(|old| old.has_ended()).map(|old| old.id).rev().skip(KEPT - 1);
        let written = (|| {
            let mut table = transaction.open_table(EVACUATIONS)?;
            for id in forgotten {
                table.remove(id.to_string().as_str())?;
            }
            table.insert(new.id.to_string().as_str(), to_json(new)?.as_slice())?;
            Ok(())
        })();
        written.map_err(failed(action))?;
        transaction.commit().map_err(|error| failed(action)(error.into()))?;
        Ok(Ok(()))
    }

    /// Writes an evacuation's new state; with `lazily` to be on disk with the next write that is, for what a restart may find in its
    /// old state.
    pub(super) fn update_evacuation(&self, evacuation: &Evacuation, lazily: bool) -> Result<(), StoreError> {
        let action = "update an evacuation";
        let durability = if lazily { Durability::None } else { Durability::Immediate };
        let transaction = self.begin(action, durability)?;
        let written = (|| {
            let mut table = transaction.open_table(EVACUATIONS)?;
            table.insert(evacuation.id.to_string().as_str(), to_json(evacuation)?.as_slice())?;
            Ok(())
        })();
        written.map_err(failed(action))?;
        transaction.commit().map_err(|error| failed(action)(error.into()))
    }

    /// The evacuation of that id.
    pub(super) fn evacuation(&self, id: EvacuationId) -> Result<Option<Evacuation>, StoreError> {
        let id = id.to_string();
        let bytes = self.read("read an evacuation", |transaction| {
            let table = transaction.open_table(EVACUATIONS)?;
            Ok(table.get(id.as_str())?.map(|bytes| bytes.value().to_vec()))
        })?;
        bytes.map(|bytes| parse(&id, &bytes)).transpose()
    }

    /// All evacuations, newest first.
    pub(super) fn evacuations(&self) -> Result<Vec<Evacuation>, StoreError> {
        let all: Vec<(String, Vec<u8>)> = self.read("list evacuations", |transaction| {
            let table = transaction.open_table(EVACUATIONS)?;
            let rows = table.iter()?.rev();
            rows.map(|row| row.map(|(id, bytes)| (id.value().to_owned(), bytes.value().to_vec())).map_err(Into::into))
                .collect()
        })?;
        all.iter().map(|(id, bytes)| parse(id, bytes)).collect()
    }
}

/// All evacuations, oldest first.
fn all(transaction: &WriteTransaction, action: &'static str) -> Result<Vec<Evacuation>, StoreError> {
    let rows = (|| {
        let table = transaction.open_table(EVACUATIONS)?;
        let rows: Result<Vec<_>, redb::Error> = table
            .iter()?
            .map(|row| row.map(|(id, bytes)| (id.value().to_owned(), bytes.value().to_vec())).map_err(Into::into))
            .collect();
        rows
    })();
    rows.map_err(failed(action))?.iter().map(|(id, bytes)| parse(id, bytes)).collect()
}

#[cfg(test)]
mod tests {
    use podferry_common::identity::Peer;

    use super::*;
    use crate::evacuation::{Event, Terms};
    use crate::store::Store;

    fn of(node: &str) -> Evacuation {
        Evacuation::new(node.parse().unwrap(), Terms::default(), Peer::client("ada").unwrap())
    }

    fn ended(mut evacuation: Evacuation) -> Evacuation {
        evacuation.apply(Event::Done(jiff::Timestamp::now()));
        evacuation
    }

    #[test]
    fn a_node_is_evacuated_once_at_a_time_and_what_was_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        let (first, second) = (of("n1"), of("n1"));
        store.create_evacuation(&first).unwrap().unwrap();
        assert_eq!(store.create_evacuation(&second).unwrap(), Err(EvacuationConflict::Node { id: first.id }));
        assert_eq!(store.evacuation(second.id).unwrap(), None, "one that is refused leaves nothing");
        let newest = of("n2");
        store.create_evacuation(&newest).unwrap().unwrap();
        let first = ended(first);
        store.update_evacuation(&first, true).unwrap();
        store.create_evacuation(&second).unwrap().unwrap();
        drop(store);
        let store = Store::open(folder.path()).unwrap();
        assert_eq!(store.evacuation(first.id).unwrap(), Some(first));
        assert_eq!(store.evacuations().unwrap().first().map(|one| one.id), Some(newest.id));
    }

    #[test]
    fn old_ended_ones_are_forgotten_and_open_ones_are_not() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        let open = of("open");
        store.create_evacuation(&open).unwrap().unwrap();
        for _ in 0..KEPT + 3 {
            let evacuation = of("n1");
            store.create_evacuation(&evacuation).unwrap().unwrap();
            store.update_evacuation(&ended(evacuation), true).unwrap();
        }
        let kept = store.evacuations().unwrap();
        assert_eq!(kept.len(), KEPT + 1);
        assert_eq!(kept.last().unwrap().id, open.id);
    }
}
