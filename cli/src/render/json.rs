//! What only the command line says in JSON. Migrations, nodes and workloads are [`podferry_proto::json`]'s.

use std::path::{Path, PathBuf};

use podferry_common::identity::IdentityFiles;
use podferry_common::{Failure, FailureCode};
use podferry_proto::json::strategy_word;
pub(crate) use podferry_proto::json::{Connections, Evacuation, Migration, Node, Workload};
use podferry_proto::v1::{self, EvacuatedState, EvacuatedWorkload, EvacuationPhase};
use serde::Serialize;

use crate::words;

/// What a drain did.
#[derive(Debug, Default, Serialize)]
pub(crate) struct DrainReport {
    /// The evacuation's id.
    pub(crate) evacuation: String,
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
    /// The workloads that were not expected to be away by the deadline.
    pub(crate) late: Vec<Late>,
    /// Whether it cannot be said any more what is there; the error says why.
    #[serde(skip)]
    pub(crate) lost_sight: bool,
    /// Whether somebody stopped it.
    #[serde(skip)]
    pub(crate) cancelled: bool,
}

impl DrainReport {
    /// Takes down what became of each workload.
    pub(crate) fn finish(&mut self, ended: &v1::Evacuation) {
        let of = |state| ended.workloads.iter().filter(move |one| one.state() == state);
        let names = |state| of(state).map(|one| one.workload.clone()).collect();
        (self.evacuation, self.node) = (ended.id.clone(), ended.node.clone());
        self.left_behind = of(EvacuatedState::LeftBehind).map(LeftBehind::of).collect();
        (self.lost, self.not_running) = (names(EvacuatedState::Lost), names(EvacuatedState::NotRunning));
        self.hurried = ended.workloads.iter().filter(|one| !one.hurried_why.is_empty()).map(Hurried::of).collect();
        self.lost_sight = ended.problem.is_some();
        self.cancelled = ended.phase() == EvacuationPhase::Cancelled;
    }

    /// How many workloads left the node.
    pub(crate) fn moved(&self) -> usize {
        let left = |migration: &&Migration| migration.phase == "succeeded" && migration.target != self.node;
        self.migrations.iter().filter(left).count()
    }

    /// Whether nothing runs there any more, and all that did runs elsewhere.
    pub(crate) fn is_complete(&self) -> bool {
        self.left_behind.is_empty() && self.lost.is_empty() && !self.lost_sight && !self.cancelled
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

impl Hurried {
    /// As the coordinator says it.
    pub(crate) fn of(one: &EvacuatedWorkload) -> Self {
        let (workload, why) = (one.workload.clone(), one.hurried_why.clone());
        Self { workload, strategy: strategy_word(one.hurried_strategy), why }
    }
}

/// A workload that was not expected to be away by the deadline.
#[derive(Debug, Serialize)]
pub(crate) struct Late {
    /// The workload.
    pub(crate) workload: String,
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

impl LeftBehind {
    /// As the coordinator says it.
    pub(crate) fn of(one: &EvacuatedWorkload) -> Self {
        let unsaid = || Failure::new(FailureCode::Aborted, format!("{} was not moved", one.workload));
        let error = one.problem.as_ref().map_or_else(unsaid, words::from_problem);
        Self { workload: one.workload.clone(), error, migrated: !one.migration_ids.is_empty() }
    }
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
