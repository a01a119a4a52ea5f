//! What Prometheus can read of the coordinator. `docs/operations.md` lists it.
//!
//! A migration is counted when its outcome is known, by the same record that its report is shown from. There is no label
//! with a migration's id or a workload's name: each value of a label is a time series that Prometheus keeps, and these come
//! without end. Of a single migration the report, the audit log and the log tell.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use podferry_common::NodeName;
use podferry_common::metrics::{PREFIX, in_seconds, page_rates, seconds};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric as _};
use prometheus_client::metrics::TypedMetric;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::access::Verb;
use crate::audit::What;
use crate::runner::Runner;
use crate::store::{Record, Report, Round, Timings};

/// Labels of a migration whose outcome is known.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Ended {
    strategy: &'static str,
    outcome: &'static str,
}

/// Labels of what such a migration spent in a stage.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct InStage {
    strategy: &'static str,
    outcome: &'static str,
    stage: &'static str,
}

/// Labels of a migration that was undone.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Broken {
    code: &'static str,
    phase: String,
}

/// Labels of a migration that goes on.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct InFlight {
    strategy: &'static str,
    phase: &'static str,
}

/// Labels of a request.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Asked {
    action: &'static str,
    result: &'static str,
}

/// Labels of an eviction.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Evicted {
    answer: &'static str,
    reason: &'static str,
}

/// Label of a node.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfNode {
    node: String,
}

type Counters = Family<Ended, Counter>;
type Histograms = Family<Ended, Histogram, fn() -> Histogram>;

/// The figures. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Metrics(Arc<Figures>);

#[derive(Debug)]
struct Figures {
    migrations: Counters,
    downtime: Histograms,
    duration: Histograms,
    stages: Family<InStage, Histogram, fn() -> Histogram>,
    wire_bytes: Counters,
    raw_bytes: Counters,
    rounds: Counters,
    round_pages: Counters,
    round_raw_bytes: Counters,
    round_wire_bytes: Counters,
    round_duration: Histograms,
    round_dirty_rate: Histograms,
    round_predicted: Histograms,
    round_cpu_limit: Histograms,
    rollbacks: Family<Broken, Counter>,
    requests: Family<Asked, Counter>,
    evictions: Family<Evicted, Counter>,
    unwritten: Counter,
    reachable: Family<OfNode, Gauge>,
    /// The nodes that `reachable` has.
    nodes: Mutex<HashSet<NodeName>>,
}

impl Default for Figures {
    fn default() -> Self {
        let in_seconds = || Family::new_with_constructor(seconds as fn() -> Histogram);
        Self {
            migrations: Family::default(),
            downtime: in_seconds(),
            duration: in_seconds(),
            stages: Family::new_with_constructor(seconds),
            wire_bytes: Family::default(),
            raw_bytes: Family::default(),
            rounds: Family::default(),
            round_pages: Family::default(),
            round_raw_bytes: Family::default(),
            round_wire_bytes: Family::default(),
            round_duration: in_seconds(),
            round_dirty_rate: Family::new_with_constructor(page_rates),
            round_predicted: in_seconds(),
            round_cpu_limit: Family::new_with_constructor(cpus),
            rollbacks: Family::default(),
            requests: Family::default(),
            evictions: Family::default(),
            unwritten: Counter::default(),
            reachable: Family::default(),
            nodes: Mutex::default(),
        }
    }
}

fn cpus() -> Histogram {
    Histogram::new([0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0])
}

impl Metrics {
    /// A registry with all figures, and with what that runner has under way.
    pub fn registry(&self, runner: &Runner) -> Registry {
        let mut registry = Registry::with_prefix(PREFIX);
        self.register(&mut registry);
        registry.register_collector(Box::new(UnderWay(runner.clone())));
        registry
    }

    fn register(&self, registry: &mut Registry) {
        let of = &self.0;
        registry.register("migrations", "Migrations whose outcome is known", of.migrations.clone());
        let help = "Seconds that a workload stood still, as the coordinator saw it";
        registry.register("migration_downtime_seconds", help, of.downtime.clone());
        let help = "Seconds from the request for a migration to its outcome";
        registry.register("migration_duration_seconds", help, of.duration.clone());
        let help = "Seconds that a migration spent in a stage: the timings of its report";
        registry.register("migration_stage_seconds", help, of.stages.clone());
        let help = "Bytes that migrations sent over the network";
        registry.register("migration_wire_bytes", help, of.wire_bytes.clone());
        let help = "Bytes of workloads that migrations sent, before compression";
        registry.register("migration_raw_bytes", help, of.raw_bytes.clone());
        registry.register(
            "migration_rounds",
            "Passes over the memory, the one in the freeze included",
            of.rounds.clone(),
        );
        registry.register("migration_round_pages", "Pages sent in rounds", of.round_pages.clone());
        let help = "Bytes of workloads sent in rounds, before compression";
        registry.register("migration_round_raw_bytes", help, of.round_raw_bytes.clone());
        registry.register(
            "migration_round_wire_bytes",
            "Bytes sent over the network in rounds",
            of.round_wire_bytes.clone(),
        );
        registry.register("migration_round_seconds", "Seconds that a round took", of.round_duration.clone());
        let help = "Pages per second that a workload wrote during a round";
        registry.register("migration_round_dirty_pages_per_second", help, of.round_dirty_rate.clone());
        let help = "Seconds of downtime that were predicted from what was written during a round";
        registry.register("migration_round_predicted_seconds", help, of.round_predicted.clone());
        let help = "CPUs' time that a throttled workload had during a round";
        registry.register("migration_round_cpu_limit", help, of.round_cpu_limit.clone());
        let help = "Migrations that were undone, by the code and the phase of what stopped them";
        registry.register("rollbacks", help, of.rollbacks.clone());
        registry.register("requests", "Requests by action, allowed or denied", of.requests.clone());
        let help = "Evictions that were denied because the pod is moved, or allowed, by the reason";
        registry.register("evictions", help, of.evictions.clone());
        let help = "Times that entries of the audit log could not be written";
        registry.register("audit_write_failures", help, of.unwritten.clone());
        let help = "Whether the agent of a node of the inventory answered when it was asked last";
        registry.register("agent_reachable", help, of.reachable.clone());
    }

    /// Counts a migration whose outcome is known.
    pub(crate) fn ended(&self, what: What, record: &Record) {
        let outcome = match what {
            What::Succeeded => "succeeded",
            What::RolledBack => "failed",
            What::Cancelled => "cancelled",
            What::Failed => "lost",
            What::Accepted | What::Refused | What::TakenUp | What::Committed | What::RollingBack => return,
        };
        let ended = Ended { strategy: record.strategy_word(), outcome };
        self.0.migrations.get_or_create(&ended).inc();
        self.0.report(&ended, &record.report);
        if let (Some(failure), What::RolledBack | What::Cancelled) = (record.state.failure(), what) {
            let phase = failure.phase.clone().filter(|phase| is_word(phase)).unwrap_or_default();
            self.0.rollbacks.get_or_create(&Broken { code: failure.code.as_str(), phase }).inc();
        }
    }

    /// Counts a request.
    pub(crate) fn asked(&self, verb: Verb, allowed: bool) {
        let result = if allowed { "allowed" } else { "denied" };
        self.0.requests.get_or_create(&Asked { action: verb.as_str(), result }).inc();
    }

    /// Counts an answer to who wants to evict a pod.
    pub(crate) fn evicted(&self, allowed: bool, reason: &'static str) {
        let answer = if allowed { "allowed" } else { "denied" };
        self.0.evictions.get_or_create(&Evicted { answer, reason }).inc();
    }

    /// Counts entries of the audit log that could not be written.
    pub(crate) fn unwritten(&self) {
        self.0.unwritten.inc();
    }

    /// Takes down which agents answer. Nodes that are not named any more are forgotten.
    pub(crate) fn agents(&self, answers: &HashMap<NodeName, bool>) {
        let mut nodes = self.0.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        let of = |node: &NodeName| OfNode { node: node.to_string() };
        for (node, answered) in answers {
            self.0.reachable.get_or_create(&of(node)).set(i64::from(*answered));
        }
        for gone in nodes.iter().filter(|node| !answers.contains_key(*node)) {
            self.0.reachable.remove(&of(gone));
        }
        *nodes = answers.keys().cloned().collect();
    }
}

/// The phase of a failure may be an agent's own word, and so anything: only what looks like one becomes a label.
fn is_word(phase: &str) -> bool {
    !phase.is_empty() && phase.len() <= 16 && phase.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_')
}

impl Figures {
    fn report(&self, ended: &Ended, report: &Report) {
        let observe = |histograms: &Histograms, milliseconds: f64| {
            if milliseconds > 0.0 {
                histograms.get_or_create(ended).observe(in_seconds(milliseconds));
            }
        };
        observe(&self.downtime, report.downtime_ms);
        observe(&self.duration, report.total_ms);
        self.wire_bytes.get_or_create(ended).inc_by(report.wire_bytes);
        self.raw_bytes.get_or_create(ended).inc_by(report.progress.raw_bytes);
        for (stage, milliseconds) in stages(&report.timings) {
            if milliseconds > 0.0 {
                let labels = InStage { strategy: ended.strategy, outcome: ended.outcome, stage };
                self.stages.get_or_create(&labels).observe(in_seconds(milliseconds));
            }
        }
        report.rounds.iter().for_each(|round| self.round(ended, round));
    }

    fn round(&self, ended: &Ended, round: &Round) {
        self.rounds.get_or_create(ended).inc();
        self.round_pages.get_or_create(ended).inc_by(round.pages);
        self.round_raw_bytes.get_or_create(ended).inc_by(round.raw_bytes);
        self.round_wire_bytes.get_or_create(ended).inc_by(round.wire_bytes);
        self.round_duration.get_or_create(ended).observe(in_seconds(round.duration_ms));
        self.round_dirty_rate.get_or_create(ended).observe(round.dirty_rate);
        self.round_predicted.get_or_create(ended).observe(in_seconds(round.predicted_ms));
        if round.cpu_limit > 0.0 {
            self.round_cpu_limit.get_or_create(ended).observe(round.cpu_limit);
        }
    }
}

fn stages(timings: &Timings) -> [(&'static str, f64); 10] {
    [
        ("preflight", timings.preflight),
        ("prepare", timings.prepare),
        ("precopy", timings.precopy),
        ("freeze", timings.freeze),
        ("dump", timings.dump),
        ("transfer", timings.transfer),
        ("restore", timings.restore),
        ("commit", timings.commit),
        ("resume", timings.resume),
        ("fill", timings.fill),
    ]
}

/// What the runner has under way at the moment of the reading.
struct UnderWay(Runner);

impl fmt::Debug for UnderWay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UnderWay").finish_non_exhaustive()
    }
}

impl Collector for UnderWay {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let family: Family<InFlight, Gauge> = Family::default();
        for (strategy, phase) in self.0.in_flight() {
            family.get_or_create(&InFlight { strategy, phase: phase.as_str() }).inc();
        }
        let help = "Migrations that are not over, by the phase that they are in.";
        let kind = <Family<InFlight, Gauge> as TypedMetric>::TYPE;
        family.encode(encoder.encode_descriptor("migrations_in_flight", help, None, kind)?)
    }
}

#[cfg(test)]
mod tests {
    use podferry_common::metrics::encode;
    use podferry_common::{Failure, FailureCode};

    use super::*;
    use crate::migration::{State, Why};
    use crate::testing;

    fn read(metrics: &Metrics) -> String {
        let mut registry = Registry::with_prefix(PREFIX);
        metrics.register(&mut registry);
        encode(&registry).unwrap()
    }

    /// A migration with a figure in every place, which failed all the same.
    fn full() -> Record {
        let mut record = testing::record("shop", "a", "b");
        let failure = Failure::new(FailureCode::Unavailable, "x").in_phase("freeze");
        record.state = State::Aborted { why: Why { failure, cancelled: false } };
        let report = &mut record.report;
        (report.downtime_ms, report.total_ms, report.wire_bytes, report.progress.raw_bytes) = (250.0, 500.0, 10, 20);
        let (dirty_rate, cpu_limit) = (7.0, 0.5);
        let round = Round {
            pages: 1,
            raw_bytes: 2,
            wire_bytes: 3,
            duration_ms: 500.0,
            predicted_ms: 250.0,
            dirty_rate,
            cpu_limit,
        };
        report.rounds = vec![round];
        report.timings.freeze = 125.0;
        record
    }

    #[test]
    fn names_labels_and_help_texts_are_fixed() {
        let metrics = Metrics::default();
        metrics.ended(What::RolledBack, &full());
        metrics.asked(Verb::Migrate, false);
        metrics.evicted(true, "cannot_move");
        metrics.agents(&HashMap::from([("a".parse().unwrap(), true)]));
        let text = read(&metrics);
        let lines: Vec<_> = text.lines().filter(|line| !line.contains("_bucket{")).collect();
        insta::assert_snapshot!(lines.join("\n"), @r#"
        # HELP podferry_migrations_total Migrations whose outcome is known.
        # TYPE podferry_migrations_total counter
        podferry_migrations_total{strategy="warm",outcome="failed"} 1
        # HELP podferry_migration_downtime_seconds Seconds that a workload stood still, as the coordinator saw it.
        # TYPE podferry_migration_downtime_seconds histogram
        podferry_migration_downtime_seconds_sum{strategy="warm",outcome="failed"} 0.25
        podferry_migration_downtime_seconds_count{strategy="warm",outcome="failed"} 1
        # HELP podferry_migration_duration_seconds Seconds from the request for a migration to its outcome.
        # TYPE podferry_migration_duration_seconds histogram
        podferry_migration_duration_seconds_sum{strategy="warm",outcome="failed"} 0.5
        podferry_migration_duration_seconds_count{strategy="warm",outcome="failed"} 1
        # HELP podferry_migration_stage_seconds Seconds that a migration spent in a stage: the timings of its report.
        # TYPE podferry_migration_stage_seconds histogram
        podferry_migration_stage_seconds_sum{strategy="warm",outcome="failed",stage="freeze"} 0.125
        podferry_migration_stage_seconds_count{strategy="warm",outcome="failed",stage="freeze"} 1
        # HELP podferry_migration_wire_bytes_total Bytes that migrations sent over the network.
        # TYPE podferry_migration_wire_bytes_total counter
        podferry_migration_wire_bytes_total{strategy="warm",outcome="failed"} 10
        # HELP podferry_migration_raw_bytes_total Bytes of workloads that migrations sent, before compression.
        # TYPE podferry_migration_raw_bytes_total counter
        podferry_migration_raw_bytes_total{strategy="warm",outcome="failed"} 20
        # HELP podferry_migration_rounds_total Passes over the memory, the one in the freeze included.
        # TYPE podferry_migration_rounds_total counter
        podferry_migration_rounds_total{strategy="warm",outcome="failed"} 1
        # HELP podferry_migration_round_pages_total Pages sent in rounds.
        # TYPE podferry_migration_round_pages_total counter
        podferry_migration_round_pages_total{strategy="warm",outcome="failed"} 1
        # HELP podferry_migration_round_raw_bytes_total Bytes of workloads sent in rounds, before compression.
        # TYPE podferry_migration_round_raw_bytes_total counter
        podferry_migration_round_raw_bytes_total{strategy="warm",outcome="failed"} 2
        # HELP podferry_migration_round_wire_bytes_total Bytes sent over the network in rounds.
        # TYPE podferry_migration_round_wire_bytes_total counter
        podferry_migration_round_wire_bytes_total{strategy="warm",outcome="failed"} 3
        # HELP podferry_migration_round_seconds Seconds that a round took.
        # TYPE podferry_migration_round_seconds histogram
        podferry_migration_round_seconds_sum{strategy="warm",outcome="failed"} 0.5
        podferry_migration_round_seconds_count{strategy="warm",outcome="failed"} 1
        # HELP podferry_migration_round_dirty_pages_per_second Pages per second that a workload wrote during a round.
        # TYPE podferry_migration_round_dirty_pages_per_second histogram
        podferry_migration_round_dirty_pages_per_second_sum{strategy="warm",outcome="failed"} 7.0
        podferry_migration_round_dirty_pages_per_second_count{strategy="warm",outcome="failed"} 1
        # HELP podferry_migration_round_predicted_seconds Seconds of downtime that were predicted from what was written during a round.
        # TYPE podferry_migration_round_predicted_seconds histogram
        podferry_migration_round_predicted_seconds_sum{strategy="warm",outcome="failed"} 0.25
        podferry_migration_round_predicted_seconds_count{strategy="warm",outcome="failed"} 1
        # HELP podferry_migration_round_cpu_limit CPUs' time that a throttled workload had during a round.
        # TYPE podferry_migration_round_cpu_limit histogram
        podferry_migration_round_cpu_limit_sum{strategy="warm",outcome="failed"} 0.5
        podferry_migration_round_cpu_limit_count{strategy="warm",outcome="failed"} 1
        # HELP podferry_rollbacks_total Migrations that were undone, by the code and the phase of what stopped them.
        # TYPE podferry_rollbacks_total counter
        podferry_rollbacks_total{code="UNAVAILABLE",phase="freeze"} 1
        # HELP podferry_requests_total Requests by action, allowed or denied.
        # TYPE podferry_requests_total counter
        podferry_requests_total{action="migrate",result="denied"} 1
        # HELP podferry_evictions_total Evictions that were denied because the pod is moved, or allowed, by the reason.
        # TYPE podferry_evictions_total counter
        podferry_evictions_total{answer="allowed",reason="cannot_move"} 1
        # HELP podferry_audit_write_failures_total Times that entries of the audit log could not be written.
        # TYPE podferry_audit_write_failures_total counter
        podferry_audit_write_failures_total 0
        # HELP podferry_agent_reachable Whether the agent of a node of the inventory answered when it was asked last.
        # TYPE podferry_agent_reachable gauge
        podferry_agent_reachable{node="a"} 1
        "#);
    }

    #[test]
    fn what_an_agent_says_becomes_no_label_unless_it_is_a_word() {
        let metrics = Metrics::default();
        for phase in ["dump", "a\"b", "", &"x".repeat(17), "Ü"] {
            let failure = Failure::new(FailureCode::Internal, "x").in_phase(phase);
            let record = Record {
                state: State::Aborted { why: Why { failure, cancelled: false } },
                ..testing::record("shop", "a", "b")
            };
            metrics.ended(What::RolledBack, &record);
        }
        let text = read(&metrics);
        let counted: Vec<_> = text.lines().filter(|line| line.starts_with("podferry_rollbacks_total")).collect();
        let sum = |label: &str| counted.iter().find(|line| line.contains(label)).map(|line| line.ends_with(" 4"));
        assert_eq!((counted.len(), sum("phase=\"\"")), (2, Some(true)), "{counted:?}");
    }

    #[test]
    fn nodes_that_left_the_inventory_are_forgotten() {
        let metrics = Metrics::default();
        let node = |name: &str| name.parse::<NodeName>().unwrap();
        metrics.agents(&HashMap::from([(node("a"), true), (node("b"), false)]));
        let text = read(&metrics);
        assert!(text.contains("podferry_agent_reachable{node=\"a\"} 1\n"), "{text}");
        assert!(text.contains("podferry_agent_reachable{node=\"b\"} 0\n"), "{text}");
        metrics.agents(&HashMap::from([(node("b"), true)]));
        let text = read(&metrics);
        assert!(!text.contains("node=\"a\"") && text.contains("podferry_agent_reachable{node=\"b\"} 1\n"), "{text}");
    }
}
