//! What Prometheus can read of this agent. `docs/operations.md` lists it.
//!
//! The source's figures follow the events that it tells the coordinator, so they agree with a migration's report; unlike
//! that they grow while the migration goes on, and keep what was sent by one that broke. There is no label with a
//! migration's id or a container's: see `podferry_coordinator::metrics`.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use podferry_common::failure::Failure;
use podferry_common::metrics::{PREFIX, in_seconds, page_rates, seconds};
use podferry_network::relay::End;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::source::{FreezeEvent, Round};

/// What an agent does in a migration, and is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Source: from the request to the container standing still.
    Freeze,
    /// Source: from there until CRIU had written everything.
    Dump,
    /// Source: from there until the target had everything.
    Transfer,
    /// Target: from there until the container was held.
    Restore,
    /// Source: until no process was left.
    Release,
    /// Target: until the container ran.
    Resume,
    /// Target: from there until all memory was in place.
    Fill,
}

impl Stage {
    fn as_str(self) -> &'static str {
        match self {
            Self::Freeze => "freeze",
            Self::Dump => "dump",
            Self::Transfer => "transfer",
            Self::Restore => "restore",
            Self::Release => "release",
            Self::Resume => "resume",
            Self::Fill => "fill",
        }
    }
}

/// Labels of a stage.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct InStage {
    stage: &'static str,
}

/// Labels of what failed.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Failed {
    stage: &'static str,
    code: &'static str,
}

/// The figures. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Metrics(Arc<Figures>);

#[derive(Debug)]
struct Figures {
    sent_wire_bytes: Counter,
    sent_raw_bytes: Counter,
    received_wire_bytes: Counter,
    received_raw_bytes: Counter,
    pages: Counter,
    rounds: Counter,
    round_duration: Histogram,
    dirty_rate: Histogram,
    freezes: Counter,
    stages: Family<InStage, Histogram, fn() -> Histogram>,
    failures: Family<Failed, Counter>,
    criu_failures: Family<InStage, Counter>,
    filled_pages: Counter,
    connections: Counter,
    relays: Family<AtEnd, Gauge>,
    relayed_connections: Gauge,
    relayed_bytes: Family<Towards, Counter>,
}

/// Labels of a relay.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct AtEnd {
    end: &'static str,
}

/// Labels of what a relay carries.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Towards {
    to: &'static str,
}

impl Default for Figures {
    fn default() -> Self {
        Self {
            sent_wire_bytes: Counter::default(),
            sent_raw_bytes: Counter::default(),
            received_wire_bytes: Counter::default(),
            received_raw_bytes: Counter::default(),
            pages: Counter::default(),
            rounds: Counter::default(),
            round_duration: seconds(),
            dirty_rate: page_rates(),
            freezes: Counter::default(),
            stages: Family::new_with_constructor(seconds),
            failures: Family::default(),
            criu_failures: Family::default(),
            filled_pages: Counter::default(),
            connections: Counter::default(),
            relays: Family::default(),
            relayed_connections: Gauge::default(),
            relayed_bytes: Family::default(),
        }
    }
}

impl Metrics {
    /// A registry with all figures.
    pub fn registry(&self) -> Registry {
        let mut registry = Registry::with_prefix(PREFIX);
        let (of, to) = (&self.0, &mut registry);
        let help = "Bytes sent over the network in migrations, as far as they have been told";
        to.register("agent_sent_wire_bytes", help, of.sent_wire_bytes.clone());
        let help = "Bytes of workloads sent in migrations, before compression";
        to.register("agent_sent_raw_bytes", help, of.sent_raw_bytes.clone());
        let help = "Bytes received in transfers of migrations";
        to.register("agent_received_wire_bytes", help, of.received_wire_bytes.clone());
        let help = "Bytes of what was received whole in transfers of migrations, unpacked";
        to.register("agent_received_raw_bytes", help, of.received_raw_bytes.clone());
        to.register("agent_pages", "Pages sent in rounds", of.pages.clone());
        to.register("agent_rounds", "Passes over the memory, the one in the freeze included", of.rounds.clone());
        to.register("agent_round_seconds", "Seconds that a round took", of.round_duration.clone());
        let help = "Pages per second that a workload wrote during a round";
        to.register("agent_round_dirty_pages_per_second", help, of.dirty_rate.clone());
        to.register("agent_freezes", "Containers that were frozen or stopped for a migration", of.freezes.clone());
        to.register(
            "agent_stage_seconds",
            "Seconds that this agent spent in a stage of a migration",
            of.stages.clone(),
        );
        to.register("agent_failures", "Stages of migrations that failed on this node, by code", of.failures.clone());
        let help = "Stages of migrations that failed with a line of CRIU's log";
        to.register("agent_criu_failures", help, of.criu_failures.clone());
        let help = "Pages laid in behind containers that ran already";
        to.register("agent_filled_pages", help, of.filled_pages.clone());
        let help = "Connections accepted on the agent's port, whose handshake succeeded";
        to.register("agent_connections", help, of.connections.clone());
        let help =
            "Relays between the old address of a pod that has moved and the pod, by which of the two is on this node";
        to.register("agent_relays", help, of.relays.clone());
        let help = "Connections of pods on this node to addresses that they had elsewhere";
        to.register("agent_relayed_connections", help, of.relayed_connections.clone());
        let help = "Bytes of packets that this node has sent through relays, to the pod or to its old address";
        to.register("agent_relayed_bytes", help, of.relayed_bytes.clone());
        registry
    }

    /// A stage has taken that many milliseconds.
    pub fn spent(&self, stage: Stage, milliseconds: f64) {
        let labels = InStage { stage: stage.as_str() };
        self.0.stages.get_or_create(&labels).observe(in_seconds(milliseconds));
    }

    /// A stage has failed.
    pub fn failed(&self, stage: Stage, failure: &Failure) {
        let (stage, code) = (stage.as_str(), failure.code.as_str());
        self.0.failures.get_or_create(&Failed { stage, code }).inc();
        if failure.criu_line.is_some() {
            self.0.criu_failures.get_or_create(&InStage { stage }).inc();
        }
    }

    /// That many bytes of a transfer have come.
    pub fn received(&self, wire_bytes: u64) {
        self.0.received_wire_bytes.inc_by(wire_bytes);
    }

    /// Something has come whole that has that many bytes.
    pub fn received_whole(&self, raw_bytes: u64) {
        self.0.received_raw_bytes.inc_by(raw_bytes);
    }

    /// That many pages were laid in behind a container that ran already.
    pub fn filled(&self, pages: u64) {
        self.0.filled_pages.inc_by(pages);
    }

    /// There is one relay more that has this end here, until what this gives is dropped.
    pub fn relay(&self, end: End) -> Relaying {
        let end = match end {
            End::Home => "home",
            End::Away => "away",
        };
        self.0.relays.get_or_create(&AtEnd { end }).inc();
        Relaying { metrics: self.clone(), end, connections: AtomicI64::new(0) }
    }

    /// Somebody has connected.
    pub fn connected(&self) {
        self.0.connections.inc();
    }
}

/// Counts what one relay does.
#[derive(Debug)]
pub struct Relaying {
    metrics: Metrics,
    end: &'static str,
    /// What was counted of this relay.
    connections: AtomicI64,
}

impl Relaying {
    /// So many connections live on.
    pub fn lives(&self, connections: usize) {
        let now = i64::try_from(connections).unwrap_or(i64::MAX);
        let before = self.connections.swap(now, Ordering::Relaxed);
        self.metrics.0.relayed_connections.inc_by(now - before);
    }

    /// So many bytes were sent to the other end.
    pub fn sent(&self, bytes: usize) {
        let to = if self.end == "home" { "pod" } else { "address" };
        self.metrics.0.relayed_bytes.get_or_create(&Towards { to }).inc_by(bytes as u64);
    }
}

impl Drop for Relaying {
    fn drop(&mut self) {
        self.lives(0);
        self.metrics.0.relays.get_or_create(&AtEnd { end: self.end }).dec();
    }
}

/// Counts what one migration's source tells.
#[derive(Debug)]
pub struct Sending {
    metrics: Metrics,
    /// What was counted of this migration: events tell sums.
    raw_bytes: u64,
    wire_bytes: u64,
    /// The sums of the rounds alone.
    of_rounds: (u64, u64),
    rounds: u64,
}

impl Sending {
    /// Nothing has been told yet.
    pub fn new(metrics: &Metrics) -> Self {
        Self { metrics: metrics.clone(), raw_bytes: 0, wire_bytes: 0, of_rounds: (0, 0), rounds: 0 }
    }

    /// The source tells that.
    pub fn told(&mut self, event: &FreezeEvent) {
        match event {
            FreezeEvent::Round(round) => {
                self.round(round);
                let (raw_bytes, wire_bytes) = self.of_rounds;
                self.sent(raw_bytes, wire_bytes);
            }
            FreezeEvent::Frozen { freeze_ms, .. } => {
                self.metrics.0.freezes.inc();
                self.metrics.spent(Stage::Freeze, *freeze_ms);
            }
            FreezeEvent::Progress { raw_bytes, wire_bytes } => self.sent(*raw_bytes, *wire_bytes),
            FreezeEvent::Transferred { raw_bytes, wire_bytes, dump_ms, transfer_ms, last_round, pages, .. } => {
                self.sent(*raw_bytes, *wire_bytes);
                self.metrics.spent(Stage::Dump, *dump_ms);
                self.metrics.spent(Stage::Transfer, *transfer_ms);
                let whole = || {
                    let duration = Duration::try_from_secs_f64((dump_ms + transfer_ms) / 1e3).unwrap_or_default();
                    Round {
                        pages: *pages,
                        raw_bytes: *raw_bytes,
                        wire_bytes: *wire_bytes,
                        duration,
                        ..Round::default()
                    }
                };
                // As in the report: without rounds before the freeze all that was sent is one.
                match last_round {
                    Some(last) => self.round(last),
                    None if self.rounds == 0 => self.round(&whole()),
                    None => {}
                }
            }
            FreezeEvent::Converged { .. } => {}
        }
    }

    fn round(&mut self, round: &Round) {
        let figures = &self.metrics.0;
        figures.rounds.inc();
        figures.pages.inc_by(round.pages);
        figures.round_duration.observe(round.duration.as_secs_f64());
        figures.dirty_rate.observe(round.dirty_rate);
        self.rounds += 1;
        let (raw_bytes, wire_bytes) = self.of_rounds;
        self.of_rounds = (raw_bytes.saturating_add(round.raw_bytes), wire_bytes.saturating_add(round.wire_bytes));
    }

    /// So much has been sent since the migration began. What is told late, and is less, is known already.
    fn sent(&mut self, raw_bytes: u64, wire_bytes: u64) {
        let figures = &self.metrics.0;
        figures.sent_raw_bytes.inc_by(raw_bytes.saturating_sub(self.raw_bytes));
        figures.sent_wire_bytes.inc_by(wire_bytes.saturating_sub(self.wire_bytes));
        self.raw_bytes = self.raw_bytes.max(raw_bytes);
        self.wire_bytes = self.wire_bytes.max(wire_bytes);
    }
}

#[cfg(test)]
mod tests {
    use podferry_common::failure::FailureCode;
    use podferry_common::metrics::encode;

    use super::*;

    /// What dashboards and alerts rely on.
    const NAMES: &str = r#"# HELP podferry_agent_sent_wire_bytes_total Bytes sent over the network in migrations, as far as they have been told.
# TYPE podferry_agent_sent_wire_bytes_total counter
podferry_agent_sent_wire_bytes_total 0
# HELP podferry_agent_sent_raw_bytes_total Bytes of workloads sent in migrations, before compression.
# TYPE podferry_agent_sent_raw_bytes_total counter
podferry_agent_sent_raw_bytes_total 0
# HELP podferry_agent_received_wire_bytes_total Bytes received in transfers of migrations.
# TYPE podferry_agent_received_wire_bytes_total counter
podferry_agent_received_wire_bytes_total 0
# HELP podferry_agent_received_raw_bytes_total Bytes of what was received whole in transfers of migrations, unpacked.
# TYPE podferry_agent_received_raw_bytes_total counter
podferry_agent_received_raw_bytes_total 0
# HELP podferry_agent_pages_total Pages sent in rounds.
# TYPE podferry_agent_pages_total counter
podferry_agent_pages_total 0
# HELP podferry_agent_rounds_total Passes over the memory, the one in the freeze included.
# TYPE podferry_agent_rounds_total counter
podferry_agent_rounds_total 0
# HELP podferry_agent_round_seconds Seconds that a round took.
# TYPE podferry_agent_round_seconds histogram
podferry_agent_round_seconds_sum 0.0
podferry_agent_round_seconds_count 0
# HELP podferry_agent_round_dirty_pages_per_second Pages per second that a workload wrote during a round.
# TYPE podferry_agent_round_dirty_pages_per_second histogram
podferry_agent_round_dirty_pages_per_second_sum 0.0
podferry_agent_round_dirty_pages_per_second_count 0
# HELP podferry_agent_freezes_total Containers that were frozen or stopped for a migration.
# TYPE podferry_agent_freezes_total counter
podferry_agent_freezes_total 0
# HELP podferry_agent_stage_seconds Seconds that this agent spent in a stage of a migration.
# TYPE podferry_agent_stage_seconds histogram
podferry_agent_stage_seconds_sum{stage="dump"} 0.25
podferry_agent_stage_seconds_count{stage="dump"} 1
# HELP podferry_agent_failures_total Stages of migrations that failed on this node, by code.
# TYPE podferry_agent_failures_total counter
podferry_agent_failures_total{stage="restore",code="INTERNAL"} 2
# HELP podferry_agent_criu_failures_total Stages of migrations that failed with a line of CRIU's log.
# TYPE podferry_agent_criu_failures_total counter
podferry_agent_criu_failures_total{stage="restore"} 1
# HELP podferry_agent_filled_pages_total Pages laid in behind containers that ran already.
# TYPE podferry_agent_filled_pages_total counter
podferry_agent_filled_pages_total 0
# HELP podferry_agent_connections_total Connections accepted on the agent's port, whose handshake succeeded.
# TYPE podferry_agent_connections_total counter
podferry_agent_connections_total 1
# HELP podferry_agent_relays Relays between the old address of a pod that has moved and the pod, by which of the two is on this node.
# TYPE podferry_agent_relays gauge
podferry_agent_relays{end="away"} 1
# HELP podferry_agent_relayed_connections Connections of pods on this node to addresses that they had elsewhere.
# TYPE podferry_agent_relayed_connections gauge
podferry_agent_relayed_connections 3
# HELP podferry_agent_relayed_bytes_total Bytes of packets that this node has sent through relays, to the pod or to its old address.
# TYPE podferry_agent_relayed_bytes_total counter
podferry_agent_relayed_bytes_total{to="address"} 100
"#;

    fn lines(metrics: &Metrics) -> String {
        let text = encode(&metrics.registry()).unwrap();
        text.split_inclusive('\n').filter(|line| !line.contains("_bucket{")).collect()
    }

    fn value(metrics: &Metrics, series: &str) -> f64 {
        let text = lines(metrics);
        let line = text.lines().find(|line| line.starts_with(&format!("podferry_agent_{series} ")));
        line.unwrap_or_else(|| panic!("no {series} in {text}")).rsplit(' ').next().unwrap().parse().unwrap()
    }

    fn transferred(raw_bytes: u64, wire_bytes: u64, last_round: Option<Round>) -> FreezeEvent {
        let (dump_ms, transfer_ms) = (100.0, 50.0);
        let (pages, zero_bytes, verified) = (9, 0, None);
        FreezeEvent::Transferred {
            pages,
            raw_bytes,
            zero_bytes,
            wire_bytes,
            dump_ms,
            transfer_ms,
            last_round,
            verified,
        }
    }

    #[test]
    fn sums_are_counted_once_and_rounds_as_in_the_report() {
        let metrics = Metrics::default();
        let mut sending = Sending::new(&metrics);
        let round = |pages| Round {
            pages,
            raw_bytes: 100 * pages,
            wire_bytes: 10 * pages,
            dirty_rate: 4.0,
            ..Round::default()
        };
        sending.told(&FreezeEvent::Progress { raw_bytes: 50, wire_bytes: 5 });
        sending.told(&FreezeEvent::Round(round(3)));
        sending.told(&FreezeEvent::Progress { raw_bytes: 200, wire_bytes: 20 });
        sending.told(&FreezeEvent::Frozen { freeze_ms: 2.0, killed: false });
        sending.told(&transferred(450, 45, Some(round(1))));
        for (series, expected) in [
            ("sent_raw_bytes_total", 450.0),
            ("sent_wire_bytes_total", 45.0),
            ("rounds_total", 2.0),
            ("pages_total", 4.0),
            ("freezes_total", 1.0),
            ("round_dirty_pages_per_second_sum", 8.0),
            ("stage_seconds_sum{stage=\"transfer\"}", 0.05),
        ] {
            assert!((value(&metrics, series) - expected).abs() < 1e-9, "{series}");
        }

        let mut other = Sending::new(&metrics);
        other.told(&transferred(1000, 100, None));
        assert!((value(&metrics, "sent_raw_bytes_total") - 1450.0).abs() < 1e-9);
        assert!(
            (value(&metrics, "rounds_total") - 3.0).abs() < 1e-9
                && (value(&metrics, "pages_total") - 13.0).abs() < 1e-9
        );
    }

    #[test]
    fn names_labels_and_help_texts_are_fixed() {
        let metrics = Metrics::default();
        metrics.spent(Stage::Dump, 250.0);
        let failure = Failure::new(FailureCode::Internal, "x");
        metrics.failed(Stage::Restore, &failure.clone().criu_line("Error"));
        metrics.failed(Stage::Restore, &failure);
        metrics.connected();
        let relay = metrics.relay(End::Away);
        relay.lives(5);
        relay.lives(3);
        relay.sent(100);
        assert_eq!(lines(&metrics), NAMES);
        drop(relay);
        assert!(
            value(&metrics, "relays{end=\"away\"}").abs() < 1e-9 && value(&metrics, "relayed_connections").abs() < 1e-9
        );
    }
}
