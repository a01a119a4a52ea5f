//! An evacuation, as it is kept and shown.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use podferry_common::identity::Peer;
use podferry_common::{Failure, MigrationId, NodeName, WorkloadName};
use podferry_proto::v1;
use serde::{Deserialize, Serialize};

use super::EvacuationId;
use super::machine::Outcome;
use crate::strategy::{Connections, Strategy};

/// What whoever asked for an evacuation wants.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Terms {
    /// How workloads are moved; none: the coordinator chooses for each.
    pub strategy: Option<Strategy>,
    /// As in a migration.
    pub accept_loss: bool,
    /// As in a migration.
    pub allow_restart: bool,
    /// When the node goes away.
    pub deadline_at: Option<Timestamp>,
    /// Priorities that count instead of the inventory's.
    pub priorities: BTreeMap<WorkloadName, i32>,
    /// Migrations at a time; none: as many as the limits of nodes allow.
    pub concurrency: Option<usize>,
    /// The most bytes per second of each migration; 0 for as many as it takes.
    pub bandwidth_limit: u64,
    /// What else is wished of each migration that goes the way that was asked for.
    #[serde(default)]
    pub manner: Manner,
    /// Whose turn comes first.
    #[serde(default)]
    pub order: Order,
    /// Kubernetes: only pods with such labels; none: all.
    #[serde(default)]
    pub selector: Option<LabelSelector>,
    /// Kubernetes: whether the node is marked unschedulable.
    #[serde(default)]
    pub cordon: bool,
}

/// Which priority leaves first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// The highest: what must not be left behind.
    #[default]
    HighestFirst,
    /// The lowest: what matters most goes when others have tried the way.
    LowestFirst,
}

/// As in a migration, each.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Manner {
    /// Milliseconds; 0 for the default.
    pub downtime_budget_ms: f64,
    /// Whether all memory is compared in the freeze.
    pub verify: bool,
    /// Whether what writes too fast is slowed down.
    pub throttle: bool,
    /// Seconds that a workload gets to end.
    pub grace_period_s: Option<u32>,
    /// Whether pages go as they are.
    pub no_compression: bool,
    /// What becomes of connections.
    pub connections: Connections,
}

/// Where an evacuation stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// It goes on.
    Running,
    /// Nothing more is begun; what can be undone is.
    Cancelling {
        /// Who asked for that.
        by: String,
    },
    /// Nothing more will happen.
    Ended(Outcome),
}

/// Everything that has to be known of an evacuation to go on with it, or to tell of it afterwards.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evacuation {
    /// Its id.
    pub id: EvacuationId,
    /// The node that is emptied.
    pub node: NodeName,
    /// What was asked for.
    pub terms: Terms,
    /// Who asked for it: each migration is one that they ask for.
    pub requested_by: Peer,
    /// When it was accepted.
    pub created_at: Timestamp,
    /// When it had ended.
    pub ended_at: Option<Timestamp>,
    /// Where it stands.
    pub phase: Phase,
    /// All workloads that it has met.
    pub entries: Vec<Entry>,
    /// Why it is not known any more what is on the node.
    pub trouble: Option<Failure>,
    /// Outcomes so far: the number of the next one.
    pub outcomes: u64,
    /// Whether the node has been marked unschedulable. Done once: who takes the mark away again has a reason.
    #[serde(default)]
    pub cordoned: bool,
    /// Workloads that have left the node and whose connections still need it, when it was looked at last.
    #[serde(default)]
    pub homes: u32,
}

/// A workload of an evacuation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// The workload.
    pub workload: WorkloadName,
    /// Higher ones leave first.
    pub priority: i32,
    /// Bytes of its memory, when it was seen last.
    pub memory_bytes: u64,
    /// What became of it.
    pub standing: Standing,
    /// Its migrations, oldest first.
    pub migrations: Vec<MigrationId>,
    /// Where the last one went.
    pub target: Option<NodeName>,
    /// What it cost, in milliseconds.
    pub downtime_ms: f64,
    /// How long it took, in milliseconds.
    pub total_ms: f64,
    /// When it is moved in another way than was asked for.
    pub hurried: Option<Hurried>,
    /// Why it is not expected to be away in time.
    pub late: Option<String>,
    /// Why the last try to begin has to be repeated.
    pub waits_for: Option<String>,
    /// The nodes whose preflight refused it, and why the last one did.
    pub refused_by: Vec<NodeName>,
    /// See there.
    pub refusal: Option<Failure>,
    /// Its place among the outcomes; 0 before there is one.
    pub outcome: u64,
}

/// What became of a workload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    /// It has not begun.
    Waiting,
    /// It is part of a migration, from the node or to it.
    Moving {
        /// Which.
        migration: MigrationId,
        /// Whether this evacuation began it.
        ours: bool,
        /// Whether the coordinator was started again meanwhile: what that undid is begun again.
        interrupted: bool,
    },
    /// It runs elsewhere.
    Moved,
    /// It does not run.
    NotRunning,
    /// It is still there.
    LeftBehind {
        /// Why.
        failure: Failure,
    },
    /// It runs nowhere.
    Lost,
    /// It was not there in the end, whoever did that.
    Elsewhere,
}

impl Standing {
    /// Whether nothing more is to be expected.
    pub fn is_settled(&self) -> bool {
        !matches!(self, Self::Waiting | Self::Moving { .. })
    }
}

/// That a workload is moved in another way than was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hurried {
    /// How.
    pub strategy: Strategy,
    /// Why.
    pub why: String,
}

impl Entry {
    /// A workload that waits.
    pub fn new(workload: WorkloadName, priority: i32, memory_bytes: u64) -> Self {
        Self {
            workload,
            priority,
            memory_bytes,
            standing: Standing::Waiting,
            migrations: Vec::new(),
            target: None,
            downtime_ms: 0.0,
            total_ms: 0.0,
            hurried: None,
            late: None,
            waits_for: None,
            refused_by: Vec::new(),
            refusal: None,
            outcome: 0,
        }
    }

    /// The migration that it is part of.
    pub fn migration(&self) -> Option<MigrationId> {
        match self.standing {
            Standing::Moving { migration, .. } => Some(migration),
            _ => None,
        }
    }

    pub(crate) fn to_wire(&self) -> v1::EvacuatedWorkload {
        let (state, failure) = match &self.standing {
            Standing::Waiting => (v1::EvacuatedState::Waiting, None),
            Standing::Moving { .. } => (v1::EvacuatedState::Moving, None),
            Standing::Moved => (v1::EvacuatedState::Moved, None),
            Standing::NotRunning => (v1::EvacuatedState::NotRunning, None),
            Standing::LeftBehind { failure } => (v1::EvacuatedState::LeftBehind, Some(failure)),
            Standing::Lost => (v1::EvacuatedState::Lost, None),
            Standing::Elsewhere => (v1::EvacuatedState::Elsewhere, None),
        };
        let hurried = self.hurried.as_ref();
        v1::EvacuatedWorkload {
            workload: self.workload.to_string(),
            state: state.into(),
            priority: self.priority,
            memory_bytes: self.memory_bytes,
            migration_ids: self.migrations.iter().map(ToString::to_string).collect(),
            target: self.target.as_ref().map(ToString::to_string).unwrap_or_default(),
            downtime_ms: self.downtime_ms,
            total_ms: self.total_ms,
            hurried_strategy: hurried
                .map_or(v1::Strategy::Unspecified, |hurried| v1::Strategy::from(hurried.strategy))
                .into(),
            hurried_why: hurried.map(|hurried| hurried.why.clone()).unwrap_or_default(),
            late: self.late.clone().unwrap_or_default(),
            waits_for: self.waits_for.clone().unwrap_or_default(),
            problem: failure.map(problem),
        }
    }
}

impl Evacuation {
    /// One that begins now.
    pub fn new(node: NodeName, terms: Terms, requested_by: Peer) -> Self {
        Self::with_id(EvacuationId::new(), node, terms, requested_by)
    }

    /// One of that id which begins now.
    pub fn with_id(id: EvacuationId, node: NodeName, terms: Terms, requested_by: Peer) -> Self {
        Self {
            id,
            node,
            terms,
            requested_by,
            created_at: Timestamp::now(),
            ended_at: None,
            phase: Phase::Running,
            entries: Vec::new(),
            trouble: None,
            outcomes: 0,
            cordoned: false,
            homes: 0,
        }
    }

    /// Whether nothing more will happen.
    pub fn has_ended(&self) -> bool {
        matches!(self.phase, Phase::Ended(_))
    }

    /// The entry of that workload.
    pub fn entry(&self, workload: &WorkloadName) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.workload == *workload)
    }

    /// As the API shows it.
    pub fn to_wire(&self) -> v1::Evacuation {
        let workloads = self.in_order().into_iter().map(Entry::to_wire).collect();
        v1::Evacuation { workloads, ..self.to_list_entry() }
    }

    /// As the API shows it among all others.
    pub fn to_list_entry(&self) -> v1::Evacuation {
        let count = |of: fn(&Standing) -> bool| {
            u32::try_from(self.entries.iter().filter(|entry| of(&entry.standing)).count()).unwrap_or(u32::MAX)
        };
        let phase = match &self.phase {
            Phase::Running => v1::EvacuationPhase::Running,
            Phase::Cancelling { .. } => v1::EvacuationPhase::Cancelling,
            Phase::Ended(Outcome::Complete) => v1::EvacuationPhase::Complete,
            Phase::Ended(Outcome::Incomplete) => v1::EvacuationPhase::Incomplete,
            Phase::Ended(Outcome::Cancelled) => v1::EvacuationPhase::Cancelled,
        };
        let text = |at: Option<Timestamp>| at.as_ref().map(ToString::to_string).unwrap_or_default();
        v1::Evacuation {
            id: self.id.to_string(),
            node: self.node.to_string(),
            phase: phase.into(),
            strategy: self.terms.strategy.map_or(v1::Strategy::Auto, v1::Strategy::from).into(),
            created_at: self.created_at.to_string(),
            ended_at: text(self.ended_at),
            deadline_at: text(self.terms.deadline_at),
            requested_by: self.requested_by.dns_name(),
            workloads: Vec::new(),
            problem: self.trouble.as_ref().map(problem),
            moved: count(|standing| *standing == Standing::Moved),
            remaining: count(|standing| !standing.is_settled()),
            failed: count(|standing| matches!(standing, Standing::LeftBehind { .. } | Standing::Lost)),
            homes: if self.has_ended() { 0 } else { self.homes },
        }
    }

    /// Those with an outcome in their order, those under way, those that wait in theirs.
    pub(crate) fn in_order(&self) -> Vec<&Entry> {
        let mut entries: Vec<_> = self.entries.iter().collect();
        entries.sort_by_key(|entry| match &entry.standing {
            Standing::Moving { .. } => (1, 0, entry.turn(&self.terms)),
            Standing::Waiting => (2, 0, entry.turn(&self.terms)),
            _ => (0, entry.outcome, entry.turn(&self.terms)),
        });
        entries
    }
}

impl Entry {
    /// Its place among those that wait: see [`podferry_proto::evacuation`].
    pub(super) fn turn(&self, terms: &Terms) -> (Reverse<i64>, i128, &WorkloadName) {
        let (priority, bytes) = (i64::from(self.priority), i128::from(self.memory_bytes));
        let priority = if terms.order == Order::LowestFirst { -priority } else { priority };
        // With a deadline the smallest first: more of them get away.
        (Reverse(priority), if terms.deadline_at.is_some() { bytes } else { -bytes }, &self.workload)
    }
}

fn problem(failure: &Failure) -> v1::Problem {
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    v1::Problem {
        code: failure.code.to_string(),
        node: text(&failure.node),
        phase: text(&failure.phase),
        message: failure.message.clone(),
        criu_line: text(&failure.criu_line),
        remedy: text(&failure.remedy),
    }
}
