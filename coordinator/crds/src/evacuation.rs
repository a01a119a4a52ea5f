//! `NodeEvacuation`.

#![allow(unreachable_pub, reason = "the derived schema repeats the type inside a function")]

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, LabelSelector, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::migration::{Problem, Writer};
use crate::schema::{any_object, unchanged};
use crate::wishes::Wishes;

/// The most pods that an object can ask to be moved at a time.
pub const MAX_CONCURRENT: i32 = 100;

/// Moves everything that can be moved off one node.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "podferry.dev",
    version = "v1alpha1",
    kind = "NodeEvacuation",
    status = "NodeEvacuationStatus",
    derive = "PartialEq",
    shortname = "pfe",
    category = "podferry",
    doc = "Moves everything that can be moved off one node. What it asks for cannot be changed but for its deadline; it can be cancelled.",
    printcolumn(name = "Node", type_ = "string", json_path = ".spec.nodeName"),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Pods", type_ = "integer", json_path = ".status.total"),
    printcolumn(name = "Moved", type_ = "integer", json_path = ".status.moved"),
    printcolumn(name = "Failed", type_ = "integer", json_path = ".status.failed"),
    printcolumn(name = "Deadline", type_ = "date", json_path = ".spec.deadline"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.reason", priority = 1),
    validation = Rule::new("self.spec.nodeName == oldSelf.spec.nodeName")
        .message("an evacuation is of one node: make a new NodeEvacuation for another"),
    validation = Rule::new(unchanged(&[
        "cordon", "maxConcurrent", "order", "podSelector", "podPriorities", "strategy", "downtimeBudgetMs", "bandwidthLimit", "verify", "throttle",
        "acceptLoss", "allowRestart", "gracePeriodSeconds", "connections", "connectionsDeadlineSeconds", "compress",
    ])).message("how a node is emptied cannot be changed on the way: cancel this NodeEvacuation and make a new one"),
    validation = Rule::new("!oldSelf.spec.cancel || self.spec.cancel")
        .message("a cancel cannot be taken back: make a new NodeEvacuation"),
)]
#[serde(rename_all = "camelCase")]
pub struct NodeEvacuationSpec {
    /// The node.
    #[schemars(length(min = 1, max = 253))]
    pub node_name: String,
    /// When the node will be gone, as after a spot notice: faster strategies are taken as it comes near. It may be moved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline: Option<Time>,
    /// Whether the node is marked unschedulable, so that nothing new comes. It stays so afterwards, as after `kubectl drain`.
    #[serde(default = "yes")]
    pub cordon: bool,
    /// How many pods are moved at a time, at most; the coordinator's limits count as well.
    #[serde(default = "max_concurrent")]
    #[schemars(range(min = 1, max = MAX_CONCURRENT))]
    pub max_concurrent: i32,
    /// Which pods come first, by the value of their `PriorityClass`.
    #[serde(default)]
    pub order: Order,
    /// Only these pods, of all namespaces; all pods when there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod_selector: Option<LabelSelector>,
    /// By `NAMESPACE/POD`: counts instead of the value of its `PriorityClass`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 512))]
    pub pod_priorities: BTreeMap<String, i32>,
    /// How they are moved. With a strategy the wishes that it knows count; what is moved in a faster one, because the deadline is near, keeps
    /// `acceptLoss` and `bandwidthLimit`.
    #[serde(flatten)]
    pub wishes: Wishes,
    /// Set it to begin no more migrations and undo those that are not committed yet. It cannot be taken back.
    #[serde(default)]
    pub cancel: bool,
    /// Seconds after its end after which this object is deleted; it stays when there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub ttl_seconds_after_finished: Option<i32>,
}

fn yes() -> bool {
    true
}

fn max_concurrent() -> i32 {
    2
}

/// Which pods of a node come first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Order {
    /// Those of the highest priority: with a deadline they are the ones that must not be left behind.
    #[default]
    HighestPriorityFirst,
    /// Those of the lowest priority: what matters most moves when others have tried the way.
    LowestPriorityFirst,
}

/// How an evacuation stands. Only the coordinator writes it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct NodeEvacuationStatus {
    /// The generation that was looked at last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// `Accepted` and `Finished`: see `docs/kubernetes-api.md`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
    /// The evacuation's id, for logs and the command line.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub id: String,
    /// `pending`, `running` or `cancelling`; at the end `complete`, `incomplete` (some pods are still there, or it is not known what is) or
    /// `cancelled`; `refused` when it never began.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub phase: String,
    /// Why it was refused, waits, or does not know any more what is on the node.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// The same in parts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub problem: Option<Problem>,
    /// Who asked for it, as the coordinator knows them.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub requested_by: String,
    /// The pods that were there or came meanwhile.
    pub total: i32,
    /// Those that run elsewhere now.
    pub moved: i32,
    /// Those that are being moved.
    pub moving: i32,
    /// Those that could not be moved, or were lost.
    pub failed: i32,
    /// Those that have moved away, by this evacuation or before it, and have connections that still need the node: it waits for these, until its
    /// deadline at most.
    pub homes: i32,
    /// When it began.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Time>,
    /// When it ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub completed_at: Option<Time>,
    /// What became of each pod, those that could not be moved first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 512))]
    pub pods: Vec<EvacuatedPod>,
    /// The coordinator's own record: what a coordinator that is started again goes on with. Of no meaning to anybody else.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "any_object")]
    pub record: Option<serde_json::Value>,
    /// Which write of which coordinator this is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub written_by: Option<Writer>,
}

/// What became of a pod.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct EvacuatedPod {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// `waiting`, `moving`, `moved`, `left_behind`, `lost`, `not_running`, or `elsewhere`: it was not there in the end, whoever did that.
    pub outcome: String,
    /// Why it could not be moved, and what to do; or why it waits.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// The id of its last migration.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub migration: String,
    /// The node that it went to.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub target: String,
    /// How long it stood still, in milliseconds.
    pub downtime_ms: f64,
}
