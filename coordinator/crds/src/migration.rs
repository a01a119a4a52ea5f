//! `Migration`.

#![allow(unreachable_pub, reason = "the derived schema repeats the type inside a function")]

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::schema::{any_object, unchanged};
use crate::wishes::Wishes;

/// Moves one pod of this namespace to another node, once.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "podferry.dev",
    version = "v1alpha1",
    kind = "Migration",
    namespaced,
    status = "MigrationStatus",
    derive = "PartialEq",
    derive = "Default",
    shortname = "pfm",
    category = "podferry",
    selectable = ".spec.podName",
    doc = "Moves one pod of this namespace to another node, once. What it asks for cannot be changed; it can be cancelled until it is committed.",
    printcolumn(name = "Pod", type_ = "string", json_path = ".spec.podName"),
    printcolumn(name = "Strategy", type_ = "string", json_path = ".status.strategy"),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "From", type_ = "string", json_path = ".status.source"),
    printcolumn(name = "To", type_ = "string", json_path = ".status.target"),
    printcolumn(
        name = "Downtime-ms",
        type_ = "number",
        json_path = ".status.downtimeMs",
        description = "From the freeze to the target's resume."
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.reason", priority = 1),
    validation = Rule::new(unchanged(&["podName", "targetNode", "policy"]))
        .message("a migration moves one pod once: make a new Migration for another pod, node or policy"),
    validation = Rule::new(unchanged(&[
        "strategy", "downtimeBudgetMs", "bandwidthLimit", "verify", "throttle", "acceptLoss", "allowRestart", "gracePeriodSeconds",
        "connections", "connectionsDeadlineSeconds", "compress",
    ])).message("how a pod is moved cannot be changed on the way: cancel this Migration and make a new one"),
    validation = Rule::new("!oldSelf.spec.cancel || self.spec.cancel")
        .message("a cancel cannot be taken back: make a new Migration"),
)]
#[x_kube(
    validation = Rule::new(
        "!(self.?strategy.orValue('Auto') in ['PostCopy', 'Hybrid']) || self.?acceptLoss.orValue(false) || has(self.policy)"
    ).message("PostCopy and Hybrid risk the pod's memory until the last page is across: accept that with acceptLoss, or use Live"),
    validation = Rule::new("!(self.?strategy.orValue('Auto') in ['Warm', 'Live', 'PostCopy', 'Hybrid']) || !has(self.gracePeriodSeconds)")
        .message("Warm, Live, PostCopy and Hybrid stop no pod: leave gracePeriodSeconds away"),
    validation = Rule::new("!(self.?strategy.orValue('Auto') in ['Cold', 'Warm', 'PostCopy', 'Application']) || !has(self.downtimeBudgetMs)")
        .message("only strategies that copy memory while the pod runs can aim at a downtime: use Live, Hybrid or Auto, or leave downtimeBudgetMs away"),
    validation = Rule::new("!(self.?strategy.orValue('Auto') in ['Cold', 'Warm', 'PostCopy', 'Application']) || !self.?throttle.orValue(false)")
        .message("only strategies that copy memory while the pod runs can throttle it: use Live, Hybrid or Auto, or leave throttle away"),
    validation = Rule::new("self.?strategy.orValue('Auto') in ['Auto', 'Live'] || !self.?verify.orValue(false)")
        .message("only Live has memory to verify: use Live or Auto, or leave verify away"),
    validation = Rule::new("self.?strategy.orValue('Auto') in ['Auto', 'Cold'] || !self.?allowRestart.orValue(false)")
        .message("only Auto and Cold restart a pod: use one of them, or leave allowRestart away"),
    validation = Rule::new(
        "self.?connections.orValue('Auto') != 'Keep' || !(self.?strategy.orValue('Auto') in ['Cold', 'Application'] || self.?allowRestart.orValue(false))"
    ).message("Cold, Application and allowRestart close connections: use another strategy, or do not ask that they are kept"),
    validation = Rule::new("!has(self.connectionsDeadlineSeconds) || self.?connections.orValue('Auto') != 'Close'")
        .message("connections that are closed have no deadline: leave connectionsDeadlineSeconds away"),
)]
#[serde(rename_all = "camelCase")]
pub struct MigrationSpec {
    /// The pod, in the Migration's own namespace.
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"))]
    pub pod_name: String,
    /// The node that it goes to; placement chooses when there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub target_node: Option<String>,
    /// The `MigrationPolicy` of this namespace whose defaults count; when there is none, those of all that select the pod, in the order of
    /// their names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub policy: Option<String>,
    /// How it is moved.
    #[serde(flatten)]
    pub wishes: Wishes,
    /// Set it to undo a migration that is not committed yet. It cannot be taken back.
    #[serde(default)]
    pub cancel: bool,
    /// Seconds after its end after which this object is deleted; it stays when there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub ttl_seconds_after_finished: Option<i32>,
}

/// Where a migration stands. Only the coordinator writes it. Times are in milliseconds, sizes in bytes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct MigrationStatus {
    /// The generation that was looked at last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// `Accepted`, `Committed`, `Succeeded`, `Finished`: see `docs/kubernetes-api.md`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
    /// The migration's id, for logs, metrics and the command line.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub id: String,
    /// `preflight`, `prepare`, `precopy`, `freeze`, `commit`, `release`, `resume`, `fill` or `rolling_back`; at the end `succeeded`,
    /// `failed` or `cancelled`; `refused` when it never began.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub phase: String,
    /// Which copy is the right one: `undecided`, `commit` (the target's) or `abort` (the source's).
    #[serde(skip_serializing_if = "String::is_empty")]
    pub decision: String,
    /// How it is moved: `cold`, `warm`, `live`, `postcopy`, `hybrid` or `application`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub strategy: String,
    /// Auto: what was chosen and why, and why not the others.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub strategy_reason: String,
    /// The node that the pod ran on at the start.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub source: String,
    /// The node that it goes to.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub target: String,
    /// Why it failed, was cancelled or was refused.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// The same in parts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub problem: Option<Problem>,
    /// From the freeze to the target's resume, as the coordinator saw it.
    pub downtime_ms: f64,
    /// From the beginning to the end.
    pub total_ms: f64,
    /// What went over the network until the target's resume.
    pub wire_bytes: i64,
    /// The last passes over the memory.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    pub rounds: Vec<Round>,
    /// How long each part took.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timings: Option<Timings>,
    /// How far the transfer is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
    /// Whether TCP connections move along; if not, they are closed, and `notes` says why.
    pub keeps_connections: bool,
    /// What a person should know.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    pub notes: Vec<String>,
    /// Who asked for it, as the coordinator knows them.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub requested_by: String,
    /// When it was accepted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Time>,
    /// When its outcome was known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub completed_at: Option<Time>,
    /// What happened, oldest first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub history: Vec<HistoryEntry>,
    /// The coordinator's own record: what a coordinator that is started again goes on with. Of no meaning to anybody else.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "any_object")]
    pub record: Option<serde_json::Value>,
    /// Which write of which coordinator this is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub written_by: Option<Writer>,
}

/// Which write of which coordinator something is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Writer {
    /// The process: its pod's name and an id that no other process has.
    pub coordinator: String,
    /// Which of all that the process has written, counted from one.
    pub sequence: i64,
}

/// What went wrong, in parts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Problem {
    /// A stable word such as `FAILED_PRECONDITION`.
    pub code: String,
    /// The node where it failed.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub node: String,
    /// The phase in which it failed.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub phase: String,
    /// What failed and why.
    pub message: String,
    /// The line of CRIU's log that says why.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub criu_line: String,
    /// What a person can do about it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub remedy: String,
}

/// One pass over the memory.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Round {
    /// Pages of memory that were sent.
    pub pages: i64,
    /// Bytes that were to be sent.
    pub raw_bytes: i64,
    /// Bytes that went over the network.
    pub wire_bytes: i64,
    /// How long it took.
    pub duration_ms: f64,
    /// Pages per second that the pod wrote meanwhile.
    pub dirty_rate: f64,
    /// What was written meanwhile would have added so much to the downtime.
    pub predicted_ms: f64,
    /// How many CPUs' time the pod was throttled to; 0 when it had its own limit.
    pub cpu_limit: f64,
}

/// Milliseconds in each part of a migration; 0 for one that was not gone through.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Timings {
    /// Both agents looking whether it can be done.
    pub preflight: f64,
    /// The target reserving.
    pub prepare: f64,
    /// Copying while the pod runs.
    pub precopy: f64,
    /// From the request to stop to the pod standing still.
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

/// How far a transfer is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Progress {
    /// Sent, before compression.
    pub raw_bytes: i64,
    /// Sent, on the network.
    pub wire_bytes: i64,
    /// To be sent, before compression, as preflight saw it.
    pub expected_bytes: i64,
}

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct HistoryEntry {
    /// When, RFC 3339.
    pub at: String,
    /// What.
    pub what: String,
}
