//! The JSON that scripts rely on: what the command line prints and the coordinator's REST API answers. Every key is always there,
//! also before its value is known (then it is empty or 0); times are in milliseconds, sizes in bytes.
//!
//! With the feature `openapi` the types can describe themselves.

use serde::Serialize;

use crate::v1;

/// A migration.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Migration {
    /// Its id, 32 hexadecimal digits.
    pub id: String,
    /// The workload's name.
    pub workload: String,
    /// `cold`, `warm`, `live`, `postcopy`, `hybrid` or `application`.
    pub strategy: String,
    /// The node it ran on at the start.
    pub source: String,
    /// The node it goes to.
    pub target: String,
    /// `preflight`, `prepare`, `precopy`, `freeze`, `commit`, `release`, `resume`, `fill` or `rolling_back`; at the end `succeeded`,
    /// `failed` or `cancelled`.
    pub phase: String,
    /// Why it failed or was cancelled.
    pub reason: String,
    /// From the freeze to the target's resume, as the coordinator saw it.
    pub downtime_ms: f64,
    /// From the beginning to the end.
    pub total_ms: f64,
    /// The passes over the memory; the last one of a live migration is that of the freeze. A list of migrations has the last few of each.
    pub rounds: Vec<Round>,
    /// What went over the network until the target's resume.
    pub wire_bytes: u64,
    /// How long each part took.
    pub timings: Timings,
    /// Whether TCP connections move along; if not, they are closed, and `notes` says why.
    pub keeps_connections: bool,
    /// What a person should know.
    pub notes: Vec<String>,
    /// Auto: what was chosen and why, and why not the others; empty before, and when a strategy was asked for.
    pub strategy_reason: String,
    /// Who asked for it, as the certificate names them; empty in the records of coordinators that did not note it.
    pub requested_by: String,
}

/// One pass over the memory.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Round {
    /// Pages of memory that were sent.
    pub pages: u64,
    /// Bytes that were to be sent, of memory and of the writable layer's files.
    pub raw_bytes: u64,
    /// Bytes that went over the network.
    pub wire_bytes: u64,
    /// How long it took.
    pub duration_ms: f64,
    /// Pages per second that the workload wrote meanwhile.
    pub dirty_rate: f64,
    /// What was written meanwhile would have added so much to the downtime.
    pub predicted_ms: f64,
    /// How many CPUs' time the workload was throttled to; 0 when it had its own limit.
    pub cpu_limit: f64,
}

/// Milliseconds in each part of a migration; 0 for one that was not gone through.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Timings {
    /// Both agents looking whether it can be done.
    pub preflight: f64,
    /// The target reserving.
    pub prepare: f64,
    /// Copying while the workload runs.
    pub precopy: f64,
    /// From the request to stop to the workload standing still.
    pub freeze: f64,
    /// From there to the end of the dump.
    pub dump: f64,
    /// From there until the target has everything.
    pub transfer: f64,
    /// From there until the container is held.
    pub restore: f64,
    /// Sealing both parts, writing the decision, and destroying the source.
    pub commit: f64,
    /// Letting the target go.
    pub resume: f64,
    /// From there until the last page was in place.
    pub fill: f64,
}

impl From<&v1::Migration> for Migration {
    fn from(migration: &v1::Migration) -> Self {
        let timings = migration.timings.unwrap_or_default();
        Self {
            id: migration.id.clone(),
            workload: migration.workload.clone(),
            strategy: strategy(migration),
            source: migration.source.clone(),
            target: migration.target.clone(),
            phase: phase(migration),
            reason: migration.reason.clone(),
            downtime_ms: micro(migration.downtime_ms),
            total_ms: micro(migration.total_ms),
            rounds: migration.rounds.iter().map(Round::from).collect(),
            wire_bytes: migration.wire_bytes,
            timings: Timings::from(&timings),
            keeps_connections: migration.keeps_connections,
            notes: migration.notes.clone(),
            strategy_reason: migration.strategy_reason.clone(),
            requested_by: migration.requested_by.clone(),
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

/// The word for a migration's strategy: `warm`, `live`, …; empty as long as it is still to be chosen.
pub fn strategy(migration: &v1::Migration) -> String {
    strategy_word(migration.strategy)
}

/// The word for a strategy; empty for none.
pub fn strategy_word(strategy: i32) -> String {
    if strategy == i32::from(v1::Strategy::Unspecified) {
        return String::new();
    }
    lower(v1::Strategy::try_from(strategy).map_or("STRATEGY_UNKNOWN", |s| s.as_str_name()), "STRATEGY_")
}

/// The word for its phase: `preflight`, `freeze`, `rolling_back`, …
pub fn phase(migration: &v1::Migration) -> String {
    lower(v1::Phase::try_from(migration.phase).map_or("PHASE_UNKNOWN", |p| p.as_str_name()), "PHASE_")
}

/// The word for what was decided: `commit`, `abort`, `undecided`; `unspecified` from coordinators of version 1.
pub fn decision(migration: &v1::Migration) -> String {
    lower(v1::Decision::try_from(migration.decision).map_or("DECISION_UNKNOWN", |d| d.as_str_name()), "DECISION_")
}

fn lower(name: &str, prefix: &str) -> String {
    name.strip_prefix(prefix).unwrap_or(name).to_ascii_lowercase()
}

/// A node, and what its agent says of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Node {
    /// Its name in the inventory.
    pub name: String,
    /// `host:port` of its agent.
    pub address: String,
    /// Whether the agent answered.
    pub reachable: bool,
    /// Whether a migration may use it.
    pub fit: bool,
    /// Why it is not fit or not reachable.
    pub complaints: Vec<String>,
    /// As in `x86_64`.
    pub architecture: String,
    /// The kernel's release.
    pub kernel: String,
    /// The processor's name.
    pub cpu_model: String,
    /// CRIU's version.
    pub criu_version: String,
    /// runc's version.
    pub runc_version: String,
    /// 1 or 2.
    pub cgroup_version: u32,
    /// The agent's version.
    pub agent_version: String,
    /// Bytes of memory.
    pub memory_total: u64,
    /// Bytes of memory that can be had.
    pub memory_available: u64,
    /// The workloads that are on it.
    pub workloads: Vec<String>,
    /// What agent, CRIU and kernel can do: `agent:cold`, `criu:tcp_established`, `kernel:overlay`, …
    pub features: Vec<String>,
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

/// A workload, and where it is.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Workload {
    /// Its name in the inventory.
    pub name: String,
    /// The node that it is on; empty when no reachable node has it.
    pub node: String,
    /// runc's word, such as `running`; `unknown` when no reachable node has it.
    pub status: String,
    /// Bytes of its memory.
    pub memory_bytes: u64,
    /// How many processes it has.
    pub processes: u32,
    /// Its addresses.
    pub addresses: Vec<String>,
    /// The migration that it is part of; empty when there is none.
    pub migration_id: String,
}

/// Connections that have outlived the move of their workload.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Connections {
    /// By the migration that took them along.
    pub kept: Vec<KeptConnections>,
    /// Nodes that do not say what they have.
    pub silent_nodes: Vec<String>,
}

/// Those that one migration took along.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct KeptConnections {
    /// The workload's name; empty when the migration is not recorded any more.
    pub workload: String,
    /// The migration.
    pub migration_id: String,
    /// The node that the old addresses are on, and that has to stay for as long.
    pub home_node: String,
    /// The node that the workload is on.
    pub node: String,
    /// The old addresses.
    pub addresses: Vec<String>,
    /// Since when the workload has run there, RFC 3339.
    pub since: String,
    /// When what is left of them ends, RFC 3339.
    pub until: String,
    /// How many live.
    pub connections: u32,
    /// The first 256 of them.
    pub some: Vec<KeptConnection>,
}

/// One of them.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct KeptConnection {
    /// address:port of the workload.
    pub local: String,
    /// address:port of whom it is with.
    pub peer: String,
    /// Bytes that have come since the workload has run there; null where the kernel does not say.
    pub received_bytes: Option<u64>,
    /// Bytes that the peer has acknowledged since then; null where the kernel does not say.
    pub sent_bytes: Option<u64>,
}

impl From<&v1::ListConnectionsResponse> for Connections {
    fn from(found: &v1::ListConnectionsResponse) -> Self {
        Self { kept: found.kept.iter().map(KeptConnections::from).collect(), silent_nodes: found.silent_nodes.clone() }
    }
}

impl From<&v1::KeptConnections> for KeptConnections {
    fn from(kept: &v1::KeptConnections) -> Self {
        let one = |connection: &v1::RelayedConnection| KeptConnection {
            local: connection.local.clone(),
            peer: connection.peer.clone(),
            received_bytes: connection.received_bytes,
            sent_bytes: connection.sent_bytes,
        };
        Self {
            workload: kept.workload.clone(),
            migration_id: kept.migration_id.clone(),
            home_node: kept.home_node.clone(),
            node: kept.node.clone(),
            addresses: kept.addresses.clone(),
            since: kept.since.clone(),
            until: kept.until.clone(),
            connections: kept.connections,
            some: kept.some.iter().map(one).collect(),
        }
    }
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

/// The emptying of a node.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Evacuation {
    /// Its id, `evac-` and 32 hexadecimal digits.
    pub id: String,
    /// The node that is emptied.
    pub node: String,
    /// `running` or `cancelling`; at the end `complete`, `incomplete` or `cancelled`.
    pub phase: String,
    /// As it was asked for: `auto`, `warm`, …
    pub strategy: String,
    /// When it was asked for (RFC 3339).
    pub created_at: String,
    /// When it had ended (RFC 3339); empty before.
    pub ended_at: String,
    /// When the node goes away (RFC 3339); empty without a deadline.
    pub deadline_at: String,
    /// Who asked for it, as the certificate names them.
    pub requested_by: String,
    /// How many workloads have left the node.
    pub moved: u32,
    /// How many are still to leave it.
    pub remaining: u32,
    /// How many stay there though they run, or were lost.
    pub failed: u32,
    /// How many have left it and have connections that still need it.
    pub homes: u32,
    /// What is or was on the node; empty in a list of evacuations.
    pub workloads: Vec<EvacuatedWorkload>,
    /// Why it is not known any more what is on the node; empty as long as it is.
    pub reason: String,
}

/// What became of a workload of a node that is emptied.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct EvacuatedWorkload {
    /// Its name.
    pub workload: String,
    /// `waiting` or `moving`; at the end `moved`, `not_running`, `left_behind`, `lost` or `elsewhere`.
    pub state: String,
    /// Higher ones leave first.
    pub priority: i32,
    /// Bytes of its memory.
    pub memory_bytes: u64,
    /// Its migrations, oldest first.
    pub migrations: Vec<String>,
    /// Where it is now, when it was moved.
    pub target: String,
    /// As the coordinator saw it.
    pub downtime_ms: f64,
    /// From the beginning of its migration to the end.
    pub total_ms: f64,
    /// How it is moved, when that is not as was asked for; empty otherwise.
    pub hurried_strategy: String,
    /// Why.
    pub hurried_why: String,
    /// Why it is not expected to be away by the deadline; empty when it is.
    pub late: String,
    /// Why it could not begin yet.
    pub waits_for: String,
    /// gRPC's name of why it was left behind; empty otherwise.
    pub code: String,
    /// Why it was left behind.
    pub reason: String,
    /// What a person can do about it.
    pub remedy: String,
}

impl From<&v1::Evacuation> for Evacuation {
    fn from(evacuation: &v1::Evacuation) -> Self {
        let problem = evacuation.problem.as_ref();
        Self {
            id: evacuation.id.clone(),
            node: evacuation.node.clone(),
            phase: evacuation_phase(evacuation),
            strategy: strategy_word(evacuation.strategy),
            created_at: evacuation.created_at.clone(),
            ended_at: evacuation.ended_at.clone(),
            deadline_at: evacuation.deadline_at.clone(),
            requested_by: evacuation.requested_by.clone(),
            moved: evacuation.moved,
            remaining: evacuation.remaining,
            failed: evacuation.failed,
            homes: evacuation.homes,
            workloads: evacuation.workloads.iter().map(EvacuatedWorkload::from).collect(),
            reason: problem.map(|problem| problem.message.clone()).unwrap_or_default(),
        }
    }
}

impl From<&v1::EvacuatedWorkload> for EvacuatedWorkload {
    fn from(one: &v1::EvacuatedWorkload) -> Self {
        let of_problem =
            |part: fn(&v1::Problem) -> &String| one.problem.as_ref().map(part).cloned().unwrap_or_default();
        Self {
            workload: one.workload.clone(),
            state: evacuated_state(one),
            priority: one.priority,
            memory_bytes: one.memory_bytes,
            migrations: one.migration_ids.clone(),
            target: one.target.clone(),
            downtime_ms: micro(one.downtime_ms),
            total_ms: micro(one.total_ms),
            hurried_strategy: strategy_word(one.hurried_strategy),
            hurried_why: one.hurried_why.clone(),
            late: one.late.clone(),
            waits_for: one.waits_for.clone(),
            code: of_problem(|problem| &problem.code),
            reason: of_problem(|problem| &problem.message),
            remedy: of_problem(|problem| &problem.remedy),
        }
    }
}

/// The word for an evacuation's phase: `running`, `complete`, …
pub fn evacuation_phase(evacuation: &v1::Evacuation) -> String {
    const PREFIX: &str = "EVACUATION_PHASE_";
    let known = v1::EvacuationPhase::try_from(evacuation.phase);
    lower(known.map_or("EVACUATION_PHASE_UNKNOWN", |phase| phase.as_str_name()), PREFIX)
}

/// The word for what became of a workload: `waiting`, `moved`, …
pub fn evacuated_state(one: &v1::EvacuatedWorkload) -> String {
    const PREFIX: &str = "EVACUATED_STATE_";
    let known = v1::EvacuatedState::try_from(one.state);
    lower(known.map_or("EVACUATED_STATE_UNKNOWN", |state| state.as_str_name()), PREFIX)
}
