//! What only the command line says in JSON. Migrations, nodes and workloads are [`podferry_proto::json`]'s.

use std::path::{Path, PathBuf};

use podferry_common::Failure;
use podferry_common::identity::IdentityFiles;
pub(crate) use podferry_proto::json::{Migration, Node, Workload};
use serde::Serialize;

/// What a drain did.
#[derive(Debug, Serialize)]
pub(crate) struct DrainReport {
    /// The node that was to be emptied.
    pub(crate) node: String,
    /// The migrations that ended, whatever their outcome.
    pub(crate) migrations: Vec<Migration>,
    /// The workloads that are still there, and why.
    pub(crate) left_behind: Vec<LeftBehind>,
    /// The workloads whose memory was lost on the way: they run nowhere.
    pub(crate) lost: Vec<String>,
    /// The workloads that do not run, so that there is nothing to move.
    pub(crate) not_running: Vec<String>,
    /// The workloads that were moved in another way than was asked for, because time was short.
    pub(crate) hurried: Vec<Hurried>,
    /// Whether it cannot be said any more what is there; the error says why.
    #[serde(skip)]
    pub(crate) lost_sight: bool,
}

impl DrainReport {
    /// Nothing was done yet.
    pub(crate) fn of(node: &str) -> Self {
        let (migrations, left_behind) = (Vec::new(), Vec::new());
        let (lost, not_running, hurried) = (Vec::new(), Vec::new(), Vec::new());
        Self { node: node.to_owned(), migrations, left_behind, lost, not_running, hurried, lost_sight: false }
    }

    /// How many workloads left the node.
    pub(crate) fn moved(&self) -> usize {
        let left = |migration: &&Migration| migration.phase == "succeeded" && migration.target != self.node;
        self.migrations.iter().filter(left).count()
    }

    /// Whether nothing runs there any more, and all that did runs elsewhere.
    pub(crate) fn is_complete(&self) -> bool {
        self.left_behind.is_empty() && self.lost.is_empty() && !self.lost_sight
    }
}

/// A workload that a drain moved in another way than was asked for.
#[derive(Debug, Serialize)]
pub(crate) struct Hurried {
    /// The workload.
    pub(crate) workload: String,
    /// How it was moved.
    pub(crate) strategy: String,
    /// Why.
    pub(crate) why: String,
}

/// A workload that a drain could not move.
#[derive(Debug, Serialize)]
pub(crate) struct LeftBehind {
    /// The workload.
    pub(crate) workload: String,
    /// Why it is still there.
    pub(crate) error: Failure,
    /// Whether a migration was tried; it is among the report's migrations then.
    pub(crate) migrated: bool,
}

/// A new certificate authority.
#[derive(Debug, Serialize)]
pub(crate) struct Authority {
    /// Its certificate, which everybody has to have.
    pub(crate) ca: PathBuf,
    /// Its key, which nobody else may have.
    pub(crate) ca_key: PathBuf,
}

impl Authority {
    /// The files that an authority in that folder has.
    pub(crate) fn in_folder(folder: &Path) -> Self {
        Self { ca: folder.join("ca.pem"), ca_key: folder.join("ca-key.pem") }
    }
}

/// A new certificate.
#[derive(Debug, Serialize)]
pub(crate) struct Issued {
    /// The DNS name in it.
    pub(crate) name: String,
    /// Where it is.
    #[serde(flatten)]
    pub(crate) files: IdentityFiles,
    /// How long it is valid.
    pub(crate) hours: u32,
}

/// An error, on standard error.
#[derive(Debug, Serialize)]
pub(crate) struct Error<'a> {
    /// What failed.
    pub(crate) error: &'a Failure,
}
