//! What several modules' tests need.

use std::path::Path;
use std::time::Duration;

use jiff::Timestamp;
use podferry_common::MigrationId;
use podferry_common::identity::{Identity, IdentityFiles, LocalCa, Peer};
use tokio_util::sync::CancellationToken;

use crate::audit::{AuditLog, Bounds};
use crate::cluster::Agents;
use crate::metrics::Metrics;
use crate::migration::State;
use crate::runner::{Deadlines, Limits, Runner};
use crate::store::{Record, Report, Store};
use crate::strategy::{Connections, Strategy};

/// A coordinator's identity of a new authority, and no agent that would know it.
pub(crate) fn agents(folder: &Path) -> Agents {
    let ca = LocalCa::create(&folder.join("ca")).unwrap();
    let files = IdentityFiles::in_folder(folder.join("me"));
    ca.issue(&Peer::Coordinator, Duration::from_secs(3600), &files).unwrap();
    Agents::new(Identity::load(files).unwrap())
}

/// A runner on that store.
pub(crate) fn runner(agents: &Agents, store: &Store, audit: &AuditLog) -> Runner {
    Runner::new(
        store.clone(),
        agents.clone(),
        audit.clone(),
        Metrics::default(),
        Deadlines::default(),
        Limits::of_nodes(2),
        CancellationToken::new(),
    )
}

/// An audit log in that folder.
pub(crate) fn audit(folder: &Path) -> AuditLog {
    AuditLog::open(&folder.join("audit.log"), Bounds { bytes: 1 << 20, files: 1 }, Metrics::default()).unwrap()
}

/// A migration between nodes on whose addresses nobody listens.
pub(crate) fn record(workload: &str, source: &str, target: &str) -> Record {
    Record {
        id: MigrationId::new(),
        workload: workload.parse().unwrap(),
        container: workload.to_owned(),
        pod: None,
        strategy: Strategy::Warm,
        auto: None,
        strategy_reason: String::new(),
        source: source.parse().unwrap(),
        source_address: "127.0.0.1:1".to_owned(),
        target: target.parse().unwrap(),
        target_address: "127.0.0.1:2".to_owned(),
        compress: true,
        downtime_budget_ms: 0.0,
        bandwidth_limit: 0,
        verify: false,
        throttle: false,
        grace_period_s: 0,
        connections: Connections::default(),
        requested_by: None,
        created_at: Timestamp::now(),
        frozen_at: None,
        state: State::new(),
        report: Report::default(),
    }
}

/// Changes an object as a JSON of it says: what it names is set, the rest stays.
pub(crate) fn merge(into: &mut serde_json::Value, change: serde_json::Value) {
    match (into, change) {
        (serde_json::Value::Object(into), serde_json::Value::Object(change)) => {
            for (name, value) in change {
                merge(into.entry(name).or_insert(serde_json::Value::Null), value);
            }
        }
        (into, change) => *into = change,
    }
}
