//! Which parts of migrations there are on this node.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use podferry_common::MigrationId;
use podferry_common::failure::{Failure, FailureCode};
pub use podferry_part::Authority;

use crate::journal::Standing;
use crate::source::SourcePart;
use crate::target::TargetPart;
use crate::volumes::Volume;

/// How long the removal of a released container is waited for.
const TIDY_TIMEOUT: Duration = Duration::from_secs(10);

/// A part of a migration.
#[derive(Clone, Debug)]
pub enum Part {
    /// The container leaves this node.
    Source(Arc<SourcePart>),
    /// The container comes to this node.
    Target(Arc<TargetPart>),
}

/// A place in the registry: a part, one that is being made, or what became of one.
#[derive(Clone, Debug)]
pub enum Entry {
    /// It is being made.
    Beginning {
        /// Of which container.
        workload: String,
    },
    /// It is there.
    Alive {
        /// Of which container.
        workload: String,
        /// The part.
        part: Part,
    },
    /// It is there and cannot be taken up: nobody knows how it stands.
    Broken {
        /// Of which container, when that is known.
        workload: String,
    },
    /// Its container runs here, and the rest of its memory is being laid in.
    Filling {
        /// Which container.
        workload: String,
    },
    /// It has ended.
    Ended(Standing),
}

/// All parts of this node.
#[derive(Clone, Debug, Default)]
pub struct Parts(Arc<Mutex<HashMap<MigrationId, Entry>>>);

impl Parts {
    /// Takes the place of a new part.
    ///
    /// # Errors
    /// When the migration has a part here already, or the workload is part of another migration.
    pub fn reserve(&self, migration: MigrationId, workload: &str) -> Result<Reservation, Failure> {
        let mut parts = self.lock();
        if parts.contains_key(&migration) {
            let message = format!("migration {migration} has a part on this node already");
            return Err(Failure::new(FailureCode::AlreadyExists, message));
        }
        let busy = parts.iter().find(|(_, entry)| entry.workload() == Some(workload));
        if let Some((other, _)) = busy {
            let message = format!("{workload} is part of migration {other}");
            return Err(Failure::new(FailureCode::AlreadyExists, message).remedy("wait for it, or cancel it"));
        }
        parts.insert(migration, Entry::Beginning { workload: workload.to_owned() });
        drop(parts);
        Ok(Reservation { parts: self.clone(), migration, workload: workload.to_owned(), filled: false })
    }

    /// Fails when one of these volumes lies where another migration brings one: each would empty it when it is undone.
    ///
    /// # Errors
    /// Which migration that is.
    pub fn check_volumes(&self, volumes: &[Volume]) -> Result<(), Failure> {
        let parts = self.lock();
        let arriving = |entry: &Entry| match entry {
            Entry::Alive { part: Part::Target(target), .. } => target.volumes().to_vec(),
            _ => Vec::new(),
        };
        let taken = parts
            .iter()
            .find(|(_, entry)| arriving(entry).iter().any(|theirs| volumes.iter().any(|ours| ours.overlaps(theirs))));
        let Some((other, _)) = taken else { return Ok(()) };
        let message = format!("migration {other} fills a volume in the same directory");
        let remedy = "give each workload a directory of its own in config.json, or wait for that migration";
        Err(Failure::new(FailureCode::FailedPrecondition, message).in_phase("prepare").remedy(remedy))
    }

    /// What is known of a migration.
    pub fn get(&self, migration: MigrationId) -> Option<Entry> {
        self.lock().get(&migration).cloned()
    }

    /// What is known of a migration; when that is nothing, it is aborted from now on and has no part here any more.
    pub fn get_or_abort(&self, migration: MigrationId) -> Option<Entry> {
        let mut parts = self.lock();
        let known = parts.get(&migration).cloned();
        if known.is_none() {
            parts.insert(migration, Entry::Ended(Standing::Aborted));
        }
        known
    }

    /// Waits while an earlier migration's part of that workload is being removed: it may come back at once.
    pub async fn tidied(&self, workload: &str) {
        let begun = Instant::now();
        while begun.elapsed() < TIDY_TIMEOUT && self.is_released(workload) {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Whether an earlier migration's part of that workload has been released, and only its removal goes on.
    pub fn is_released(&self, workload: &str) -> bool {
        self.lock().values().any(|entry| match entry {
            Entry::Alive { workload: of, part: Part::Source(source) } => {
                of == workload && source.standing() == Standing::Released
            }
            _ => false,
        })
    }

    /// Notes a part that cannot be taken up.
    pub fn broken(&self, migration: MigrationId, workload: &str) {
        self.lock().insert(migration, Entry::Broken { workload: workload.to_owned() });
    }

    /// Notes that a container runs, and waits for the rest of its memory.
    pub fn filling(&self, migration: MigrationId, workload: &str) {
        self.lock().insert(migration, Entry::Filling { workload: workload.to_owned() });
    }

    /// Puts another part of the same migration in the place of one whose container was begun anew.
    pub fn rebind(&self, migration: MigrationId, workload: &str, part: Part) {
        self.lock().insert(migration, Entry::Alive { workload: workload.to_owned(), part });
    }

    /// Notes how a part ended.
    pub fn ended(&self, migration: MigrationId, standing: Standing) {
        self.lock().insert(migration, Entry::Ended(standing));
    }

    /// How many parts have not ended.
    pub fn alive(&self) -> usize {
        self.lock().values().filter(|entry| entry.workload().is_some()).count()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<MigrationId, Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Part {
    /// Where it stands.
    pub fn standing(&self) -> Standing {
        match self {
            Self::Source(source) => source.standing(),
            Self::Target(target) => target.standing(),
        }
    }
}

impl Entry {
    fn workload(&self) -> Option<&str> {
        match self {
            Self::Beginning { workload }
            | Self::Alive { workload, .. }
            | Self::Broken { workload }
            | Self::Filling { workload } => Some(workload),
            Self::Ended(_) => None,
        }
    }
}

/// The place of a part that is being made; given back when it comes to nothing.
#[derive(Debug)]
pub struct Reservation {
    parts: Parts,
    migration: MigrationId,
    workload: String,
    filled: bool,
}

impl Reservation {
    /// The part is there.
    pub fn fill(mut self, part: Part) {
        self.filled = true;
        let entry = Entry::Alive { workload: self.workload.clone(), part };
        self.parts.lock().insert(self.migration, entry);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if !self.filled {
            self.parts.lock().remove(&self.migration);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_workload_and_a_migration_have_one_part_at_a_time() {
        let parts = Parts::default();
        let (first, second) = (MigrationId::new(), MigrationId::new());
        let reservation = parts.reserve(first, "redis").unwrap();
        assert!(parts.reserve(first, "other").is_err());
        assert!(parts.reserve(second, "redis").is_err());
        assert_eq!(parts.alive(), 1);
        drop(reservation);
        drop(parts.reserve(second, "redis").unwrap());
        parts.filling(second, "redis");
        assert!(parts.reserve(MigrationId::new(), "redis").is_err(), "its memory is not there yet");
        parts.ended(second, Standing::Resumed);
        let second = MigrationId::new();
        parts.ended(first, Standing::Aborted);
        assert!(parts.reserve(first, "redis").is_err(), "an ended migration does not begin again");
        assert!(parts.get_or_abort(second).is_none());
        assert!(parts.reserve(second, "redis").is_err(), "what was aborted before it came does not begin");
        assert_eq!(parts.alive(), 0);
    }
}
