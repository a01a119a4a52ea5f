//! Where migrations are recorded, so that a coordinator that is killed at any instant goes on.
//!
//! One [`Store`], two places: an embedded database ([`FILE_NAME`]) for a coordinator on a machine, and the status of `Migration`
//! objects ([`Objects`]) for one in Kubernetes. Either holds the record of every migration, what happened in it, which workload is part
//! of which migration, and where migrations have put workloads. The write that enters
//! [`crate::migration::State::Releasing`] is *the* commit of a migration: one redb transaction, or one write of an object that
//! the API server takes only if nobody else has written it; it is durable when [`Store::update`] returns.
//!
//! Evacuations have a table of their own in the database, of which no migration's record depends; in Kubernetes they are in the status of
//! `NodeEvacuation` objects ([`Evacuations`]).
//!
//! The file is locked while it is open, and a write of an object that somebody else has written fails, so two coordinators cannot
//! share a record.

mod database;
mod evacuations;
mod front;
mod kubernetes;
mod record;

pub use database::{Conflict, EvacuationConflict, FILE_NAME, HistoryEntry, StoreError};
pub use front::Store;
pub(crate) use kubernetes::{ACCEPTED, FINISHED, Judgement, SUCCEEDED, deadline_of, judge, pod_of, reason_of, time};
pub use kubernetes::{Evacuations, Objects, Owner, home_of, workload_of};
pub(crate) use record::told;
pub use record::{PodMove, Progress, Record, Report, Round, Timings};
