//! What requests and answers hold. Migrations, nodes and workloads are [`podferry_proto::json`]'s.

use std::collections::HashMap;

use podferry_proto::json::{self, Evacuation, Node, Workload};
use podferry_proto::v1;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::store::Record;

/// Who answers.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Version {
    /// The coordinator's version.
    pub(super) coordinator_version: &'static str,
}

/// All nodes of the inventory.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Nodes {
    nodes: Vec<Node>,
}

impl From<Vec<v1::Node>> for Nodes {
    fn from(nodes: Vec<v1::Node>) -> Self {
        Self { nodes: nodes.iter().map(Node::from).collect() }
    }
}

/// Which workloads are asked for.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct WorkloadFilter {
    /// Only those that are on this node, or are being migrated from or to it.
    #[serde(default)]
    #[param(required = false)]
    pub(super) node: String,
}

/// Which connections are asked for.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct ConnectionFilter {
    /// Only this workload's.
    #[serde(default)]
    #[param(required = false)]
    pub(super) workload: String,
    /// Only those that need this node, as home of the old addresses or because the workload is there.
    #[serde(default)]
    #[param(required = false)]
    pub(super) node: String,
}

/// Workloads of the inventory.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Workloads {
    workloads: Vec<Workload>,
}

impl From<Vec<v1::Workload>> for Workloads {
    fn from(workloads: Vec<v1::Workload>) -> Self {
        Self { workloads: workloads.iter().map(Workload::from).collect() }
    }
}

/// How a workload is moved.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum Strategy {
    /// The one that preflight finds best.
    Auto,
    /// Stop, move the writable layer and the address, start anew.
    Cold,
    /// Freeze, move everything, resume.
    Warm,
    /// Copy memory while it runs, then freeze for what is left.
    Live,
    /// Freeze, resume on the target, fetch the memory afterwards.
    Postcopy,
    /// As live, with the rest fetched afterwards when it does not converge.
    Hybrid,
    /// A new instance takes over by the application's own means.
    Application,
}

impl From<Strategy> for v1::Strategy {
    fn from(strategy: Strategy) -> Self {
        match strategy {
            Strategy::Auto => Self::Auto,
            Strategy::Cold => Self::Cold,
            Strategy::Warm => Self::Warm,
            Strategy::Live => Self::Live,
            Strategy::Postcopy => Self::Postcopy,
            Strategy::Hybrid => Self::Hybrid,
            Strategy::Application => Self::Application,
        }
    }
}

/// What is to be moved, where to, and how.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[expect(clippy::struct_excessive_bools, reason = "each is a wish of its own, as in the protocol")]
pub(super) struct MigrateRequest {
    /// The workload's name.
    workload: String,
    /// The node that it is to go to. Without one the coordinator chooses.
    #[serde(default)]
    target: Option<String>,
    /// Auto, when none is given.
    #[serde(default)]
    strategy: Option<Strategy>,
    /// Whether nothing is compressed.
    #[serde(default)]
    no_compression: bool,
    /// Live and hybrid: the downtime that is aimed at, in milliseconds, from 1 to 60000; 100 when none is given.
    #[serde(default)]
    downtime_budget_ms: Option<f64>,
    /// The most that the source sends, in bytes per second, at least 65536; as much as it can when none is given.
    #[serde(default)]
    bandwidth_limit: Option<u64>,
    /// Live: whether all memory that was copied while the workload ran is compared before the commit, which costs downtime.
    #[serde(default)]
    verify: bool,
    /// Live and hybrid: whether a workload that writes memory faster than it is sent gets less CPU time instead of being given up.
    #[serde(default)]
    throttle: bool,
    /// Postcopy and hybrid are refused without: from the resume until the last page is across, losing either node, or the link
    /// between them for too long, loses the workload.
    #[serde(default)]
    accept_loss: bool,
    /// Auto: when no other strategy can work, the workload may be stopped and started anew, which loses its memory and closes its
    /// connections.
    #[serde(default)]
    allow_restart: bool,
    /// Cold, and application for a stateless workload: seconds that it gets to end, at most 3600, before it is killed; 30 when none are given.
    #[serde(default)]
    grace_period_s: Option<u32>,
    /// What becomes of its established connections; auto when none is given.
    #[serde(default)]
    connections: Connections,
    /// Pods: seconds that connections to the old address live on, at most 604800; as long as the nodes are set to when none are given.
    #[serde(default)]
    connections_deadline_s: Option<u32>,
}

/// What becomes of a workload's established connections.
#[derive(Debug, Default, Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum Connections {
    /// They live on where they can, and are closed where they cannot, which the migration's notes say.
    #[default]
    Auto,
    /// It moves only if they live on.
    Keep,
    /// They are closed.
    Close,
}

impl From<Connections> for v1::Connections {
    fn from(wanted: Connections) -> Self {
        match wanted {
            Connections::Auto => Self::Unspecified,
            Connections::Keep => Self::Keep,
            Connections::Close => Self::Close,
        }
    }
}

impl From<MigrateRequest> for v1::MigrateRequest {
    fn from(wanted: MigrateRequest) -> Self {
        let strategy = wanted.strategy.map_or(v1::Strategy::Auto, v1::Strategy::from);
        Self {
            workload: wanted.workload,
            target: wanted.target.unwrap_or_default(),
            strategy: strategy.into(),
            no_compression: wanted.no_compression,
            downtime_budget_ms: wanted.downtime_budget_ms.unwrap_or_default(),
            bandwidth_limit: wanted.bandwidth_limit.unwrap_or_default(),
            verify: wanted.verify,
            accept_loss: wanted.accept_loss,
            throttle: wanted.throttle,
            allow_restart: wanted.allow_restart,
            grace_period_s: wanted.grace_period_s,
            connections: v1::Connections::from(wanted.connections).into(),
            connections_deadline_s: wanted.connections_deadline_s.unwrap_or_default(),
        }
    }
}

/// Which migrations are asked for.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct MigrationFilter {
    /// Only those of this workload.
    #[serde(default)]
    #[param(required = false)]
    pub(super) workload: String,
    /// `true`: only those that have not ended.
    #[serde(default)]
    #[param(required = false)]
    pub(super) active: bool,
}

/// Migrations, newest first. Long texts in them are cut and end with `…`.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Migrations {
    migrations: Vec<MigrationDetails>,
}

impl From<&[Record]> for Migrations {
    fn from(records: &[Record]) -> Self {
        Self { migrations: records.iter().map(|record| MigrationDetails::from(&record.to_list_entry())).collect() }
    }
}

/// A migration: what the command line prints of it, and what it is watched by.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct MigrationDetails {
    #[serde(flatten)]
    shown: json::Migration,
    /// When it was asked for (RFC 3339).
    created_at: String,
    /// Which copy is the right one: `commit`, the target's; `abort`, the source's; `undecided`, the source's until it is decided. A
    /// migration that failed with `commit` has lost its workload.
    decision: String,
    /// How far the transfer is.
    progress: Progress,
    /// What went wrong, in parts; `null` when nothing did.
    #[schema(required)]
    problem: Option<MigrationProblem>,
}

impl From<&v1::Migration> for MigrationDetails {
    fn from(migration: &v1::Migration) -> Self {
        let progress = migration.progress.unwrap_or_default();
        Self {
            shown: migration.into(),
            created_at: migration.created_at.clone(),
            decision: json::decision(migration),
            progress: Progress {
                raw_bytes: progress.raw_bytes,
                wire_bytes: progress.wire_bytes,
                expected_bytes: progress.expected_bytes,
            },
            problem: migration.problem.as_ref().map(MigrationProblem::from),
        }
    }
}

impl From<&Record> for MigrationDetails {
    fn from(record: &Record) -> Self {
        Self::from(&record.to_wire())
    }
}

/// How far a transfer is, with all rounds. More may be sent than was expected.
#[derive(Debug, Serialize, ToSchema)]
#[expect(clippy::struct_field_names, reason = "the protocol's names")]
struct Progress {
    /// Bytes that were sent, before compression.
    raw_bytes: u64,
    /// Bytes that went over the network.
    wire_bytes: u64,
    /// Bytes that are to be sent, before compression, as far as it is known.
    expected_bytes: u64,
}

/// What went wrong with a migration; a part that is not known is empty.
#[derive(Debug, Serialize, ToSchema)]
struct MigrationProblem {
    /// gRPC's name of the failure, such as `DEADLINE_EXCEEDED`.
    code: String,
    /// The node where it failed.
    node: String,
    /// The phase in which it failed.
    phase: String,
    /// What failed and why, for a person.
    message: String,
    /// The line of CRIU's log that says why.
    criu_line: String,
    /// What a person can do about it.
    remedy: String,
}

impl From<&v1::Problem> for MigrationProblem {
    fn from(problem: &v1::Problem) -> Self {
        Self {
            code: problem.code.clone(),
            node: problem.node.clone(),
            phase: problem.phase.clone(),
            message: problem.message.clone(),
            criu_line: problem.criu_line.clone(),
            remedy: problem.remedy.clone(),
        }
    }
}

/// The node that is to be emptied, and how.
#[expect(clippy::struct_excessive_bools, reason = "each is a key of its own")]
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct EvacuateRequest {
    /// The node's name.
    node: String,
    /// Auto, when none is given.
    #[serde(default)]
    strategy: Option<Strategy>,
    /// As in a migration.
    #[serde(default)]
    accept_loss: bool,
    /// As in a migration.
    #[serde(default)]
    allow_restart: bool,
    /// Seconds until the node goes away: what would be too late moves in a faster way, and nothing is begun behind it.
    #[serde(default)]
    deadline_s: Option<u32>,
    /// By workload: counts instead of the priority that the inventory says. Higher ones leave first.
    #[serde(default)]
    priorities: HashMap<String, i32>,
    /// Migrations of this evacuation at a time; as many as the limits of nodes allow when none is given.
    #[serde(default)]
    concurrency: Option<u32>,
    /// The most that each migration sends, in bytes per second, at least 65536; as much as it can when none is given.
    #[serde(default)]
    bandwidth_limit: Option<u64>,
    /// Kubernetes: mark the node unschedulable. It stays so.
    #[serde(default)]
    cordon: bool,
    /// Those of the lowest priority leave first, and not those of the highest.
    #[serde(default)]
    lowest_first: bool,
    /// Only workloads with such labels, as `kubectl get -l` has it.
    #[serde(default)]
    selector: String,
    /// As in a migration, for those that move in the way that is asked for.
    #[serde(default)]
    downtime_budget_ms: Option<f64>,
    /// As in a migration.
    #[serde(default)]
    verify: bool,
    /// As in a migration.
    #[serde(default)]
    throttle: bool,
    /// As in a migration.
    #[serde(default)]
    grace_period_s: Option<u32>,
    /// As in a migration.
    #[serde(default)]
    no_compression: bool,
    /// As in a migration.
    #[serde(default)]
    connections: Connections,
    /// As in a migration.
    #[serde(default)]
    connections_deadline_s: Option<u32>,
}

impl From<EvacuateRequest> for v1::EvacuateRequest {
    fn from(wanted: EvacuateRequest) -> Self {
        Self {
            node: wanted.node,
            strategy: wanted.strategy.map_or(v1::Strategy::Auto, v1::Strategy::from).into(),
            accept_loss: wanted.accept_loss,
            allow_restart: wanted.allow_restart,
            deadline_s: wanted.deadline_s.unwrap_or_default(),
            priorities: wanted.priorities,
            concurrency: wanted.concurrency.unwrap_or_default(),
            bandwidth_limit: wanted.bandwidth_limit.unwrap_or_default(),
            cordon: wanted.cordon,
            order: order(wanted.lowest_first).into(),
            selector: wanted.selector,
            downtime_budget_ms: wanted.downtime_budget_ms.unwrap_or_default(),
            verify: wanted.verify,
            throttle: wanted.throttle,
            grace_period_s: wanted.grace_period_s,
            no_compression: wanted.no_compression,
            connections: v1::Connections::from(wanted.connections).into(),
            connections_deadline_s: wanted.connections_deadline_s.unwrap_or_default(),
        }
    }
}

fn order(lowest_first: bool) -> v1::EvacuationOrder {
    if lowest_first { v1::EvacuationOrder::LowestFirst } else { v1::EvacuationOrder::HighestFirst }
}

/// Which evacuations are asked for.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct EvacuationFilter {
    /// Only those of this node.
    #[serde(default)]
    #[param(required = false)]
    pub(super) node: String,
    /// `true`: only those that have not ended.
    #[serde(default)]
    #[param(required = false)]
    pub(super) active: bool,
}

/// Evacuations, newest first, without their workloads.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Evacuations {
    evacuations: Vec<Evacuation>,
}

impl From<&[crate::evacuation::Evacuation]> for Evacuations {
    fn from(all: &[crate::evacuation::Evacuation]) -> Self {
        Self { evacuations: all.iter().map(|one| Evacuation::from(&one.to_list_entry())).collect() }
    }
}
