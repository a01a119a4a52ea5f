//! The JSON that scripts rely on. Every key is always there; times are in milliseconds, sizes in bytes.

use std::path::{Path, PathBuf};

use podferry_common::Failure;
use podferry_common::identity::IdentityFiles;
use podferry_proto::v1;
use serde::Serialize;

use crate::words;

/// A migration: the keys up to `timings` are fixed by the architecture.
#[derive(Debug, Serialize)]
pub(crate) struct Migration {
    id: String,
    workload: String,
    strategy: String,
    source: String,
    target: String,
    phase: String,
    reason: String,
    downtime_ms: f64,
    total_ms: f64,
    rounds: Vec<Round>,
    wire_bytes: u64,
    timings: Timings,
    keeps_connections: bool,
    notes: Vec<String>,
    strategy_reason: String,
}

#[derive(Debug, Serialize)]
struct Round {
    pages: u64,
    raw_bytes: u64,
    wire_bytes: u64,
    duration_ms: f64,
    dirty_rate: f64,
    predicted_ms: f64,
    cpu_limit: f64,
}

#[derive(Debug, Serialize)]
struct Timings {
    preflight: f64,
    prepare: f64,
    precopy: f64,
    freeze: f64,
    dump: f64,
    transfer: f64,
    restore: f64,
    commit: f64,
    resume: f64,
    fill: f64,
}

impl From<&v1::Migration> for Migration {
    fn from(migration: &v1::Migration) -> Self {
        let timings = migration.timings.unwrap_or_default();
        Self {
            id: migration.id.clone(),
            workload: migration.workload.clone(),
            strategy: words::strategy(migration),
            source: migration.source.clone(),
            target: migration.target.clone(),
            phase: words::phase(migration),
            reason: migration.reason.clone(),
            downtime_ms: micro(migration.downtime_ms),
            total_ms: micro(migration.total_ms),
            rounds: migration.rounds.iter().map(Round::from).collect(),
            wire_bytes: migration.wire_bytes,
            timings: Timings::from(&timings),
            keeps_connections: migration.keeps_connections,
            notes: migration.notes.clone(),
            strategy_reason: migration.strategy_reason.clone(),
        }
    }
}

impl From<&v1::Round> for Round {
    fn from(round: &v1::Round) -> Self {
        Self {
            pages: round.pages,
            raw_bytes: round.raw_bytes,
            wire_bytes: round.wire_bytes,
            duration_ms: micro(round.duration_ms),
            dirty_rate: micro(round.dirty_rate),
            predicted_ms: micro(round.predicted_ms),
            cpu_limit: micro(round.cpu_limit),
        }
    }
}

impl From<&v1::Timings> for Timings {
    fn from(timings: &v1::Timings) -> Self {
        Self {
            preflight: micro(timings.preflight),
            prepare: micro(timings.prepare),
            precopy: micro(timings.precopy),
            freeze: micro(timings.freeze),
            dump: micro(timings.dump),
            transfer: micro(timings.transfer),
            restore: micro(timings.restore),
            commit: micro(timings.commit),
            resume: micro(timings.resume),
            fill: micro(timings.fill),
        }
    }
}

/// Milliseconds to the microsecond: further digits are noise.
fn micro(milliseconds: f64) -> f64 {
    (milliseconds * 1000.0).round() / 1000.0
}

/// A node.
#[derive(Debug, Serialize)]
pub(crate) struct Node {
    name: String,
    address: String,
    reachable: bool,
    fit: bool,
    complaints: Vec<String>,
    architecture: String,
    kernel: String,
    cpu_model: String,
    criu_version: String,
    runc_version: String,
    cgroup_version: u32,
    agent_version: String,
    memory_total: u64,
    memory_available: u64,
    workloads: Vec<String>,
    features: Vec<String>,
}

impl From<&v1::Node> for Node {
    fn from(node: &v1::Node) -> Self {
        Self {
            name: node.name.clone(),
            address: node.address.clone(),
            reachable: node.reachable,
            fit: node.fit,
            complaints: node.complaints.clone(),
            architecture: node.architecture.clone(),
            kernel: node.kernel.clone(),
            cpu_model: node.cpu_model.clone(),
            criu_version: node.criu_version.clone(),
            runc_version: node.runc_version.clone(),
            cgroup_version: node.cgroup_version,
            agent_version: node.agent_version.clone(),
            memory_total: node.memory_total,
            memory_available: node.memory_available,
            workloads: node.workloads.clone(),
            features: node.features.clone(),
        }
    }
}

/// A workload.
#[derive(Debug, Serialize)]
pub(crate) struct Workload {
    name: String,
    node: String,
    status: String,
    memory_bytes: u64,
    processes: u32,
    addresses: Vec<String>,
    migration_id: String,
}

impl From<&v1::Workload> for Workload {
    fn from(workload: &v1::Workload) -> Self {
        Self {
            name: workload.name.clone(),
            node: workload.node.clone(),
            status: workload.status.clone(),
            memory_bytes: workload.memory_bytes,
            processes: workload.processes,
            addresses: workload.addresses.clone(),
            migration_id: workload.migration_id.clone(),
        }
    }
}

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
