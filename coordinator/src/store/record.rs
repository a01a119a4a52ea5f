//! The record of one migration.

use jiff::Timestamp;
use podferry_common::{MigrationId, NodeName, WorkloadName};
use podferry_proto::v1;
use serde::{Deserialize, Serialize};

use crate::migration::{Decision, Phase, State};
use crate::strategy::Strategy;

/// Everything that has to be known of a migration to go on with it, or to tell of it afterwards.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Its id.
    pub id: MigrationId,
    /// The workload's name in the inventory.
    pub workload: WorkloadName,
    /// runc's id of the workload's container, which is what agents know it by.
    pub container: String,
    /// How it is moved.
    pub strategy: Strategy,
    /// Where it ran at the start.
    pub source: NodeName,
    /// `host:port` of the source's agent, so that a migration can go on when the inventory has changed.
    pub source_address: String,
    /// Where it goes.
    pub target: NodeName,
    /// `host:port` of the target's agent.
    pub target_address: String,
    /// Whether pages may be compressed.
    pub compress: bool,
    /// When it was accepted.
    pub created_at: Timestamp,
    /// When the source's processes stood still, as far as the coordinator saw it.
    #[serde(default)]
    pub frozen_at: Option<Timestamp>,
    /// Where it stands.
    pub state: State,
    /// What was measured.
    pub report: Report,
}

/// What a migration cost. All times in milliseconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Report {
    /// From the freeze to the target's resume, as the coordinator saw it.
    pub downtime_ms: f64,
    /// From the request to the outcome.
    pub total_ms: f64,
    /// Passes over the memory.
    pub rounds: Vec<Round>,
    /// Bytes that crossed the network.
    pub wire_bytes: u64,
    /// By phase.
    pub timings: Timings,
    /// How far the transfer is.
    pub progress: Progress,
    /// Whether established TCP connections move along.
    pub keeps_connections: bool,
    /// What a person should know.
    pub notes: Vec<String>,
    /// What keeps a committed migration from its end at the moment. Not recorded: it is found out again.
    #[serde(skip)]
    pub obstacle: Option<String>,
}

/// One pass over the memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Round {
    /// Pages sent.
    pub pages: u64,
    /// Bytes before compression.
    pub raw_bytes: u64,
    /// Bytes on the network.
    pub wire_bytes: u64,
    /// Milliseconds.
    pub duration_ms: f64,
    /// Pages a second that the workload wrote meanwhile; 0 when frozen.
    pub dirty_rate: f64,
}

/// Milliseconds spent in each phase; 0 for one that was not gone through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Timings {
    /// Both agents looking whether it can be done.
    pub preflight: f64,
    /// The target reserving.
    pub prepare: f64,
    /// Copying while the workload runs.
    pub precopy: f64,
    /// From the request to stop to the workload standing still, as the source says.
    pub freeze: f64,
    /// From there to the end of the dump, as the source says.
    pub dump: f64,
    /// From there until the target has everything, as the source says.
    pub transfer: f64,
    /// From there until the container is held, as the target says.
    pub restore: f64,
    /// Sealing both parts, writing the decision, and destroying the source.
    pub commit: f64,
    /// Letting the target go.
    pub resume: f64,
    /// Filling in pages afterwards.
    pub fill: f64,
}

/// How far a transfer is, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Sent, before compression.
    pub raw_bytes: u64,
    /// Sent, on the network.
    pub wire_bytes: u64,
    /// To be sent, before compression, as preflight saw it.
    pub expected_bytes: u64,
}

impl Record {
    /// The node whose copy is the right one, by the decision.
    pub fn place(&self) -> &NodeName {
        if self.state.decision() == Decision::Commit { &self.target } else { &self.source }
    }

    /// As the API shows it.
    pub fn to_wire(&self) -> v1::Migration {
        let failure = self.state.failure();
        v1::Migration {
            id: self.id.to_string(),
            workload: self.workload.to_string(),
            strategy: v1::Strategy::from(self.strategy).into(),
            source: self.source.to_string(),
            target: self.target.to_string(),
            phase: v1::Phase::from(self.state.phase()).into(),
            reason: failure.map(ToString::to_string).unwrap_or_default(),
            downtime_ms: self.report.downtime_ms,
            total_ms: self.report.total_ms,
            rounds: self.report.rounds.iter().copied().map(Round::to_wire).collect(),
            wire_bytes: self.report.wire_bytes,
            timings: Some(self.report.timings.to_wire()),
            problem: failure.cloned().map(|failure| v1::Problem {
                code: failure.code.to_string(),
                node: failure.node.unwrap_or_default(),
                phase: failure.phase.unwrap_or_default(),
                message: failure.message,
                criu_line: failure.criu_line.unwrap_or_default(),
                remedy: failure.remedy.unwrap_or_default(),
            }),
            progress: Some(self.report.progress.to_wire()),
            created_at: self.created_at.to_string(),
            keeps_connections: self.report.keeps_connections,
            notes: self.notes(),
        }
    }

    fn notes(&self) -> Vec<String> {
        let mut notes = self.report.notes.clone();
        if matches!(self.state, State::RolledBack { .. }) {
            let target = &self.target;
            notes.push(format!("node {target} has not confirmed that it keeps nothing; it is asked until it does"));
        }
        notes.extend(self.report.obstacle.clone());
        notes
    }
}

impl Round {
    fn to_wire(self) -> v1::Round {
        v1::Round {
            pages: self.pages,
            raw_bytes: self.raw_bytes,
            wire_bytes: self.wire_bytes,
            duration_ms: self.duration_ms,
            dirty_rate: self.dirty_rate,
        }
    }
}

impl Timings {
    fn to_wire(self) -> v1::Timings {
        v1::Timings {
            preflight: self.preflight,
            prepare: self.prepare,
            precopy: self.precopy,
            freeze: self.freeze,
            dump: self.dump,
            transfer: self.transfer,
            restore: self.restore,
            commit: self.commit,
            resume: self.resume,
            fill: self.fill,
        }
    }
}

impl Progress {
    fn to_wire(self) -> v1::TransferProgress {
        v1::TransferProgress {
            raw_bytes: self.raw_bytes,
            wire_bytes: self.wire_bytes,
            expected_bytes: self.expected_bytes,
        }
    }
}

impl From<Phase> for v1::Phase {
    fn from(phase: Phase) -> Self {
        match phase {
            Phase::Preflight => Self::Preflight,
            Phase::Prepare => Self::Prepare,
            Phase::Freeze => Self::Freeze,
            Phase::Commit => Self::Commit,
            Phase::Release => Self::Release,
            Phase::Resume => Self::Resume,
            Phase::RollingBack => Self::RollingBack,
            Phase::Succeeded => Self::Succeeded,
            Phase::Failed => Self::Failed,
            Phase::Cancelled => Self::Cancelled,
        }
    }
}
