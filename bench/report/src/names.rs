//! What things are called and how they look, the same in every figure and table.

use kuva::prelude::MarkerShape;

use crate::results::{Scenario, Strategy, Workload};

/// All strategies, in the order of figures and tables; peers last.
pub(crate) const STRATEGIES: [Strategy; 10] = [
    Strategy::Cold,
    Strategy::Warm,
    Strategy::Live,
    Strategy::PostCopy,
    Strategy::Hybrid,
    Strategy::Application,
    Strategy::Auto,
    Strategy::PeerCriu,
    Strategy::PeerRunc,
    Strategy::PeerPodman,
];

/// How a strategy is shown. Shape and name tell it from others, too: colours alone do not for everybody, nor on paper.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Look {
    /// Its name.
    pub(crate) name: &'static str,
    /// Its colour, of the page's style sheet.
    pub(crate) colour: &'static str,
    /// Its mark in figures.
    pub(crate) marker: MarkerShape,
    /// The same mark in text.
    pub(crate) sign: &'static str,
}

/// How a strategy is shown.
pub(crate) fn look(strategy: Strategy) -> Look {
    use MarkerShape::{Circle, Cross, Diamond, Plus, Square, Triangle, TriangleDown};
    let (name, colour, marker, sign) = match strategy {
        Strategy::Cold => ("cold", "var(--cold)", Square, "■"),
        Strategy::Warm => ("warm", "var(--warm)", Circle, "●"),
        Strategy::Live => ("live", "var(--live)", Triangle, "▲"),
        Strategy::PostCopy => ("post-copy", "var(--postcopy)", Diamond, "◆"),
        Strategy::Hybrid => ("hybrid", "var(--hybrid)", TriangleDown, "▼"),
        Strategy::Application => ("application", "var(--application)", Plus, "✚"),
        Strategy::Auto => ("auto", "var(--auto)", Cross, "✖"),
        Strategy::PeerCriu => ("criu", "var(--peer-criu)", Circle, "○"),
        Strategy::PeerRunc => ("runc", "var(--peer-runc)", Square, "□"),
        Strategy::PeerPodman => ("podman", "var(--peer-podman)", Diamond, "◇"),
    };
    Look { name, colour, marker, sign }
}

/// Whether somebody else's tool does it.
pub(crate) fn is_peer(strategy: Strategy) -> bool {
    matches!(strategy, Strategy::PeerCriu | Strategy::PeerRunc | Strategy::PeerPodman)
}

/// Whether the workload is lost when a node or the link fails at the wrong moment: podferry wants `--accept-loss` for it.
pub(crate) fn risks_loss(strategy: Strategy) -> bool {
    matches!(strategy, Strategy::PostCopy | Strategy::Hybrid)
}

/// A workload's name.
pub(crate) fn workload(workload: Workload) -> &'static str {
    match workload {
        Workload::Catalogue => "catalogue",
        Workload::Cart => "cart",
        Workload::Redis => "Redis",
        Workload::Postgres => "PostgreSQL",
        Workload::Java => "Java",
        Workload::Node => "Node.js",
        Workload::Go => "Go",
        Workload::Synthetic => "synthetic",
    }
}

/// The kind of application that a workload stands for.
pub(crate) fn kind(workload: Workload) -> &'static str {
    match workload {
        Workload::Catalogue => "Stateless service over HTTP",
        Workload::Cart => "Sessions in the service's own memory",
        Workload::Redis => "Store in memory",
        Workload::Postgres => "Database with files and transactions",
        Workload::Java => "Service on the Java virtual machine",
        Workload::Node => "Service on Node.js",
        Workload::Go => "Service in Go",
        Workload::Synthetic => "Made-up writer with a set dirty rate",
    }
}

/// What is held the same in a comparison of strategies: everything but the strategy. A part that varies is left out by the caller.
pub(crate) fn situation(scenario: &Scenario, without: &[Part]) -> String {
    let parts = Part::ALL.into_iter().filter(|part| !without.contains(part));
    let parts: Vec<String> = parts.filter_map(|part| part.say(scenario)).collect();
    format!("{}: {}", workload(scenario.workload), parts.join(", "))
}

/// A part of a situation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// Memory held.
    Memory,
    /// Dirty rate.
    Dirty,
    /// Clients at once.
    Clients,
    /// How long they think between requests.
    Think,
    /// Limits of the container.
    Limits,
    /// Bandwidth of the link.
    Bandwidth,
    /// Round-trip time of the link.
    RoundTrip,
}

impl Part {
    /// All, in the order in which they are said.
    pub(crate) const ALL: [Self; 7] =
        [Self::Memory, Self::Dirty, Self::Clients, Self::Think, Self::Limits, Self::Bandwidth, Self::RoundTrip];

    fn say(self, of: &Scenario) -> Option<String> {
        match self {
            Self::Memory => Some(format!("{} MiB", of.memory_mib)),
            Self::Dirty => of.dirty_percent.map(|percent| format!("{percent} %/s dirty")),
            Self::Clients => Some(if of.clients == 1 { "1 client".into() } else { format!("{} clients", of.clients) }),
            Self::Think => (of.think_ms > 0).then(|| format!("{} ms think time", of.think_ms)),
            Self::Limits => limits(of),
            Self::Bandwidth => Some(of.link_mbit.map_or("link not shaped".into(), |mbit| format!("{mbit} Mbit/s"))),
            Self::RoundTrip => (of.link_rtt_ms > 0.0).then(|| format!("{} ms round trip", of.link_rtt_ms)),
        }
    }
}

fn limits(of: &Scenario) -> Option<String> {
    let cpu = of.cpu_limit.map(|cpus| format!("at most {cpus} CPU"));
    let memory = of.memory_limit_mib.map(|mib| format!("memory limit {mib} MiB"));
    let limits: Vec<String> = cpu.into_iter().chain(memory).collect();
    (!limits.is_empty()).then(|| limits.join(", "))
}
