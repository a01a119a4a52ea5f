//! Where migrations are recorded: an embedded database that survives being killed at any instant.
//!
//! One file, [`FILE_NAME`], holds the record of every migration, what happened in it, which workload is part of which
//! migration, and where migrations have put workloads. The write that enters
//! [`crate::migration::State::Releasing`] is *the* commit of a migration: one redb transaction, on disk when
//! [`Store::update`] returns.
//!
//! The file is locked while it is open, so two coordinators cannot share a record.

mod database;
mod record;

pub use database::{Conflict, FILE_NAME, HistoryEntry, Store, StoreError};
pub(crate) use record::told;
pub use record::{PodMove, Progress, Record, Report, Round, Timings};
