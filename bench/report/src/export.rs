//! The same results for programs: `results.csv` with a line for each run, `summary.json` with the statistics.

use serde::Serialize;

use crate::{
    groups::{Metric, Situation},
    guide::{self, Advice, Auto, Evaluation, Kind, Threshold},
    model::Growth,
    read::{Results, Run},
    results::{Clients, Cost, Environment, Outcome, Scenario, Strategy, Workload},
    stats::Spread,
};

/// A line of `results.csv`. What was not taken is empty.
#[derive(Serialize)]
struct Row<'a> {
    line: usize,
    workload: Workload,
    strategy: Strategy,
    memory_mib: u64,
    dirty_percent: Option<f64>,
    clients: u32,
    think_ms: u64,
    cpu_limit: Option<f64>,
    memory_limit_mib: Option<u64>,
    link_mbit: Option<u64>,
    link_rtt_ms: f64,
    repeat: u32,
    outcome: &'static str,
    reason: &'a str,
    resident_bytes: Option<u64>,
    downtime_ms: Option<f64>,
    total_ms: Option<f64>,
    deployment_ms: Option<f64>,
    rounds: usize,
    raw_bytes: Option<u64>,
    wire_bytes: Option<u64>,
    source_cpu_s: Option<f64>,
    target_cpu_s: Option<f64>,
    source_peak_memory_bytes: Option<u64>,
    target_peak_memory_bytes: Option<u64>,
    requests: Option<u64>,
    failed_requests: Option<u64>,
    retried_requests: Option<u64>,
    connection_resets: Option<u64>,
    lost_items: Option<u64>,
    longest_gap_ms: Option<f64>,
    before_p50_ms: Option<f64>,
    before_p99_ms: Option<f64>,
    during_p50_ms: Option<f64>,
    during_p99_ms: Option<f64>,
    after_p50_ms: Option<f64>,
    after_p99_ms: Option<f64>,
    before_answers_per_s: Option<f64>,
    precopy_answers_per_s: Option<f64>,
    notes: String,
}

/// The text of `results.csv`.
pub(crate) fn csv(runs: &[Run]) -> Result<Vec<u8>, csv::Error> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    for run in runs {
        writer.serialize(row(run))?;
    }
    writer.into_inner().map_err(|error| csv::Error::from(error.into_error()))
}

fn row(run: &Run) -> Row<'_> {
    let Scenario { workload, strategy, memory_mib, dirty_percent, clients, think_ms, .. } = run.of.scenario;
    let Scenario { cpu_limit, memory_limit_mib, link_mbit, link_rtt_ms, .. } = run.of.scenario;
    let (outcome, reason) = outcome(&run.of.outcome);
    let cost = |node: usize| run.of.cost.map(|cost| cost[node]);
    let seen = run.of.clients.as_ref();
    let count = |of: fn(&Clients) -> u64| seen.map(of);
    let latency = |span: usize| seen.map(|seen| seen.latency[span]).filter(|latency| latency.count > 0);
    let rate = |span: usize| seen.and_then(|seen| seen.throughput[span]);
    Row {
        line: run.line,
        workload,
        strategy,
        memory_mib,
        dirty_percent,
        clients,
        think_ms,
        cpu_limit,
        memory_limit_mib,
        link_mbit,
        link_rtt_ms,
        repeat: run.of.repeat,
        outcome,
        reason,
        resident_bytes: run.of.resident_bytes,
        downtime_ms: run.of.downtime_ms,
        total_ms: run.of.total_ms,
        deployment_ms: run.of.deployment_ms,
        rounds: run.of.rounds.len(),
        raw_bytes: run.of.raw_bytes,
        wire_bytes: run.of.wire_bytes,
        source_cpu_s: cost(0).map(|cost: Cost| cost.cpu_s),
        target_cpu_s: cost(1).map(|cost: Cost| cost.cpu_s),
        source_peak_memory_bytes: cost(0).map(|cost: Cost| cost.peak_memory_bytes),
        target_peak_memory_bytes: cost(1).map(|cost: Cost| cost.peak_memory_bytes),
        requests: count(|seen| seen.requests),
        failed_requests: count(|seen| seen.failed_requests),
        retried_requests: count(|seen| seen.retried_requests),
        connection_resets: count(|seen| seen.connection_resets),
        lost_items: count(|seen| seen.lost_items),
        longest_gap_ms: Metric::Gap.of(&run.of),
        before_p50_ms: latency(0).map(|latency| latency.p50_ms),
        before_p99_ms: latency(0).map(|latency| latency.p99_ms),
        during_p50_ms: latency(1).map(|latency| latency.p50_ms),
        during_p99_ms: latency(1).map(|latency| latency.p99_ms),
        after_p50_ms: latency(2).map(|latency| latency.p50_ms),
        after_p99_ms: latency(2).map(|latency| latency.p99_ms),
        before_answers_per_s: rate(0),
        precopy_answers_per_s: rate(1),
        notes: run.of.notes.join("; "),
    }
}

/// An outcome's word, and its reason.
pub(crate) fn outcome(outcome: &Outcome) -> (&'static str, &str) {
    match outcome {
        Outcome::Moved => ("moved", ""),
        Outcome::Refused(reason) => ("refused", reason),
        Outcome::Failed(reason) => ("failed", reason),
    }
}

/// How many runs ended how.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Counts {
    /// All.
    pub(crate) runs: usize,
    /// On the target.
    pub(crate) moved: usize,
    /// Refused, or given up before the freeze.
    pub(crate) refused: usize,
    /// Failed.
    pub(crate) failed: usize,
    /// Confirmed and gone, or there twice.
    pub(crate) lost_items: u64,
    /// Requests without a right answer.
    pub(crate) failed_requests: u64,
    /// Connections that were closed, reset or silent for too long.
    pub(crate) connection_resets: u64,
}

impl Counts {
    /// Of these runs.
    pub(crate) fn of<'a>(runs: impl IntoIterator<Item = &'a Run>) -> Self {
        let mut counts = Self::default();
        for run in runs {
            counts.runs += 1;
            match run.of.outcome {
                Outcome::Moved => counts.moved += 1,
                Outcome::Refused(_) => counts.refused += 1,
                Outcome::Failed(_) => counts.failed += 1,
            }
            if let Some(seen) = &run.of.clients {
                counts.lost_items += seen.lost_items;
                counts.failed_requests += seen.failed_requests;
                counts.connection_resets += seen.connection_resets;
            }
        }
        counts
    }
}

/// `summary.json`.
#[derive(Serialize)]
struct Summary<'a> {
    counts: Counts,
    environment: &'a Environment,
    scenarios: Vec<ScenarioSummary<'a>>,
    guide: &'a [Advice],
    kinds: Vec<Kind>,
    auto: Auto,
    thresholds: &'a [Threshold],
    warm_growth: &'a [Growth],
    notes: &'a [String],
}

/// The statistics of one scenario: of its runs that ended on the target.
#[derive(Serialize)]
struct ScenarioSummary<'a> {
    scenario: &'a Scenario,
    lines: Vec<usize>,
    counts: Counts,
    downtime_ms: Option<Spread>,
    longest_gap_ms: Option<Spread>,
    total_ms: Option<Spread>,
    deployment_ms: Option<Spread>,
    raw_mib: Option<Spread>,
    wire_mib: Option<Spread>,
    cpu_s: Option<Spread>,
    peak_memory_mib: Option<Spread>,
}

/// The text of `summary.json`.
pub(crate) fn summary(
    results: &Results,
    situations: &[Situation<'_>],
    evaluation: Evaluation<'_>,
) -> serde_json::Result<String> {
    let cells = situations.iter().flat_map(|situation| &situation.cells);
    let scenarios = cells.map(|cell| ScenarioSummary {
        scenario: &cell.scenario,
        lines: cell.runs.iter().map(|run| run.line).collect(),
        counts: Counts::of(cell.runs.iter().copied()),
        downtime_ms: cell.spread(Metric::Downtime),
        longest_gap_ms: cell.spread(Metric::Gap),
        total_ms: cell.spread(Metric::Total),
        deployment_ms: cell.spread(Metric::Deployment),
        raw_mib: cell.spread(Metric::Raw),
        wire_mib: cell.spread(Metric::Wire),
        cpu_s: cell.spread(Metric::Cpu),
        peak_memory_mib: cell.spread(Metric::PeakMemory),
    });
    let summary = Summary {
        counts: Counts::of(&results.runs),
        environment: &results.environment,
        scenarios: scenarios.collect(),
        guide: evaluation.advice,
        kinds: guide::kinds(evaluation.advice),
        auto: Auto::of(evaluation.advice),
        thresholds: evaluation.thresholds,
        warm_growth: evaluation.warm_growth,
        notes: &results.notes,
    };
    Ok(serde_json::to_string_pretty(&summary)? + "\n")
}
