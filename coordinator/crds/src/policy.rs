//! `MigrationPolicy`.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::wishes::Wishes;

/// What migrations of some pods of this namespace ask for when they do not say it themselves, and what they may not ask for.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "podferry.dev",
    version = "v1alpha1",
    kind = "MigrationPolicy",
    plural = "migrationpolicies",
    namespaced,
    derive = "PartialEq",
    shortname = "pfp",
    category = "podferry",
    doc = "What migrations of some pods of this namespace ask for when they do not say it themselves, and what they may not ask for.",
    printcolumn(name = "Strategy", type_ = "string", json_path = ".spec.defaults.strategy"),
    printcolumn(name = "Budget-ms", type_ = "integer", json_path = ".spec.defaults.downtimeBudgetMs"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct MigrationPolicySpec {
    /// The pods that it is about; an empty selector is about all of the namespace.
    pub pod_selector: LabelSelector,
    /// What their migrations ask for when they do not say it.
    #[serde(default)]
    pub defaults: Wishes,
    /// What their migrations may not ask for. The limits of all policies that select a pod count.
    #[serde(default)]
    pub limits: Limits,
}

/// What migrations may not ask for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Limits {
    /// Whether these pods are moved at all; yes when it is not said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub movable: Option<bool>,
    /// The largest downtime in milliseconds that may be aimed at.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 60_000))]
    pub max_downtime_budget_ms: Option<i32>,
    /// The most bytes per second on the link: a migration that asks for more, or for no limit, gets this.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 65_536))]
    pub max_bandwidth: Option<i64>,
    /// Whether strategies that risk the pod's memory may be asked for (PostCopy, Hybrid, `acceptLoss`); yes when it is not said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allow_loss: Option<bool>,
    /// Whether strategies that end the pod's processes may be asked for (Cold, Application, `allowRestart`); yes when it is not said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allow_restart: Option<bool>,
}
