//! Names of scenarios and of what is in them, and what a workload or a strategy is by its nature.

use std::fmt::Write as _;

use podferry_report::results::{Scenario, Strategy, Workload};

/// A strategy's name, as suites and results have it.
pub(super) fn strategy_name(strategy: Strategy) -> &'static str {
    match strategy {
        Strategy::Cold => "cold",
        Strategy::Warm => "warm",
        Strategy::Live => "live",
        Strategy::PostCopy => "postcopy",
        Strategy::Hybrid => "hybrid",
        Strategy::Application => "application",
        Strategy::Auto => "auto",
        Strategy::PeerCriu => "peer-criu",
        Strategy::PeerRunc => "peer-runc",
        Strategy::PeerPodman => "peer-podman",
    }
}

/// A workload's name, as suites and results have it.
pub(super) fn workload_name(workload: Workload) -> &'static str {
    match workload {
        Workload::Catalogue => "catalogue",
        Workload::Cart => "cart",
        Workload::Redis => "redis",
        Workload::Postgres => "postgres",
        Workload::Java => "java",
        Workload::Node => "node",
        Workload::Go => "go",
        Workload::Synthetic => "synthetic",
    }
}

/// Names a scenario among all others, in one line: a resumed experiment finds what it has by it.
pub(super) fn name(scenario: &Scenario) -> String {
    let (workload, strategy) = (workload_name(scenario.workload), strategy_name(scenario.strategy));
    let mut text = format!("{workload} {strategy} {} MiB", scenario.memory_mib);
    // Writing into a string cannot fail.
    if let Some(rate) = scenario.dirty_percent {
        let _ = write!(text, ", {rate} %/s written");
    }
    let _ = write!(text, ", {} clients each {} ms", scenario.clients, scenario.think_ms);
    if let Some(cpus) = scenario.cpu_limit {
        let _ = write!(text, ", {cpus} CPUs at most");
    }
    if let Some(mib) = scenario.memory_limit_mib {
        let _ = write!(text, ", {mib} MiB at most");
    }
    if let Some(mbit) = scenario.link_mbit {
        let _ = write!(text, ", {mbit} Mbit/s");
    }
    if scenario.link_rtt_ms > 0.0 {
        let _ = write!(text, ", {} ms away", scenario.link_rtt_ms);
    }
    text
}

/// What a workload holds when nobody can tell it how much, in MiB.
pub(super) fn own_memory_mib(workload: Workload) -> Option<u64> {
    match workload {
        Workload::Java | Workload::Go => Some(256),
        Workload::Node => Some(128),
        Workload::Postgres => Some(512),
        _ => None,
    }
}

/// Whether podferry has a preset for handing the application's own state over, and the workload what that takes.
pub(super) fn has_hooks(workload: Workload) -> bool {
    matches!(workload, Workload::Redis | Workload::Catalogue)
}

/// Whether what the workload holds in memory is to be the same behind the move, and connections are to live on.
pub(super) fn keeps_memory(strategy: Strategy) -> bool {
    !matches!(strategy, Strategy::Cold | Strategy::Application)
}

/// Whether another tool than podferry does it.
pub(super) fn is_peer(strategy: Strategy) -> bool {
    matches!(strategy, Strategy::PeerCriu | Strategy::PeerRunc | Strategy::PeerPodman)
}
