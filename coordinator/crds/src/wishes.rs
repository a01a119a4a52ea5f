//! How a pod is to be moved: the same wishes for a migration, a policy's defaults, and an evacuation.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The ways to move a pod.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Strategy {
    /// The coordinator chooses one of the others in preflight, and says why.
    #[default]
    Auto,
    /// Stop, copy the files, start anew.
    Cold,
    /// Freeze, send all memory, resume.
    Warm,
    /// Copy memory while the pod runs, freeze for the rest.
    Live,
    /// Resume first, fetch memory afterwards. Needs `acceptLoss`.
    PostCopy,
    /// Copy first, then resume, then fetch what was missing. Needs `acceptLoss`.
    Hybrid,
    /// A new instance takes over by the application's own means.
    Application,
}

/// What becomes of a pod's established connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Connections {
    /// They live on where they can, and are closed where they cannot, which the status says.
    #[default]
    Auto,
    /// The pod moves only if they live on.
    Keep,
    /// They are closed.
    Close,
}

/// How a pod is to be moved. What is left out is taken from a `MigrationPolicy`, or else is the default that stands with each.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Wishes {
    /// How it is moved; Auto when nobody says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub strategy: Option<Strategy>,
    /// The downtime that is aimed at, in milliseconds; 100 when nobody says. Only with strategies that copy memory while the pod runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 60_000))]
    pub downtime_budget_ms: Option<i32>,
    /// The most bytes per second on the link; as many as it takes when nobody says.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 65_536))]
    pub bandwidth_limit: Option<i64>,
    /// Whether all memory that was copied while the pod ran is compared in the freeze, which takes time for each GiB; no when nobody says.
    /// Only with Live, and Auto when it chooses that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verify: Option<bool>,
    /// Whether a pod that writes memory faster than it is sent gets less CPU time instead of being given up; no when nobody says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub throttle: Option<bool>,
    /// That losing either node, or the link between them for too long, from the resume until the last page is across loses the pod's
    /// memory: whoever takes `PostCopy` or Hybrid accepts it, and Auto takes those only with it. No when nobody says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accept_loss: Option<bool>,
    /// Whether Auto may stop the pod and start it anew (Cold) when nothing else can work, which loses its memory and closes its
    /// connections; no when nobody says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allow_restart: Option<bool>,
    /// Seconds that a pod gets to end where it is stopped, before it is killed; 30 when nobody says.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 3600))]
    pub grace_period_seconds: Option<i32>,
    /// What becomes of its established connections; Auto when nobody says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connections: Option<Connections>,
    /// Seconds that connections to the old address live on through a relay, at most; as long as the nodes are set to when nobody says, which is
    /// ten minutes by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 604_800))]
    pub connections_deadline_seconds: Option<i32>,
    /// Whether pages may be compressed; yes when nobody says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compress: Option<bool>,
}

impl Wishes {
    /// These, and what they leave out by `others`.
    #[must_use]
    pub fn or(&self, others: &Self) -> Self {
        Self {
            strategy: self.strategy.or(others.strategy),
            downtime_budget_ms: self.downtime_budget_ms.or(others.downtime_budget_ms),
            bandwidth_limit: self.bandwidth_limit.or(others.bandwidth_limit),
            verify: self.verify.or(others.verify),
            throttle: self.throttle.or(others.throttle),
            accept_loss: self.accept_loss.or(others.accept_loss),
            allow_restart: self.allow_restart.or(others.allow_restart),
            grace_period_seconds: self.grace_period_seconds.or(others.grace_period_seconds),
            connections: self.connections.or(others.connections),
            connections_deadline_seconds: self.connections_deadline_seconds.or(others.connections_deadline_seconds),
            compress: self.compress.or(others.compress),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_stays_and_what_is_left_out_is_taken() {
        let said = Wishes { strategy: Some(Strategy::Live), verify: Some(false), ..Wishes::default() };
        let others = Wishes { verify: Some(true), compress: Some(false), ..Wishes::default() };
        let both = said.or(&others);
        assert_eq!((both.strategy, both.verify, both.compress), (Some(Strategy::Live), Some(false), Some(false)));
    }
}
