//! What is made of one run: how each number of a [`Measurement`] is taken. `docs/experiments.md` says the same for people.

use podferry_report::results::{Clients, Cost, Latency, Measurement, Outcome, Phase, Round, Scenario, Slice, Strategy};

use super::{scenario, watch::Seen};
use crate::{
    load::{
        LoadReport,
        samples::{Percentiles, Sample, Samples, percentiles},
    },
    migration::{MigrationRecord, Span},
};

/// How finely the timeline is cut, in ms.
const SLICE_MS: f64 = 50.0;
/// Bytes of a page.
const PAGE_BYTES: u64 = 4096;
/// How many of a client's problems are told: the counts have all of them.
const MOST_PROBLEMS: usize = 2;

/// The times of one run, in ms since 1970.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Times {
    /// Since when nothing but the clients was at work.
    pub(super) quiet_since: f64,
    /// When the move was asked for.
    pub(super) asked: f64,
    /// When the answer was there.
    pub(super) answered: f64,
    /// When the clients were told to end.
    pub(super) ended: f64,
}

/// How a run was moved, as the one says who did it.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Moved {
    /// Time in each phase; starts are relative to when it was asked for.
    pub(super) phases: Vec<Phase>,
    /// Rounds, that of the freeze last.
    pub(super) rounds: Vec<Round>,
    /// Bytes of pages and files before packing.
    pub(super) raw_bytes: Option<u64>,
    /// Downtime as the one who moved it saw it, in ms.
    pub(super) own_downtime_ms: Option<f64>,
    /// How long laying in what was missing took behind the resume, in ms.
    pub(super) fill_ms: f64,
    /// CPU seconds of source and target that are in no process of the nodes' own: of programs that were started from outside.
    pub(super) started_cpu_s: [f64; 2],
    /// When memory was copied while the workload ran, in ms since 1970.
    pub(super) precopy: Option<Span>,
    /// What a person should know.
    pub(super) notes: Vec<String>,
}

impl Moved {
    /// Out of podferry's record of a migration that was asked for at this time (ms since 1970).
    pub(super) fn of_record(record: &MigrationRecord, asked: f64) -> Self {
        let rounds: Vec<Round> = record
            .rounds
            .iter()
            .map(|round| Round { pages: round.pages, raw_bytes: round.raw_bytes, duration_ms: round.duration_ms })
            .collect();
        let sent: u64 = rounds.iter().map(|round| round.raw_bytes).sum();
        let raw = sent + fetched_pages(record) * PAGE_BYTES;
        let created = record.created_unix_ms().map_or(0.0, |created| (created - asked).max(0.0));
        let mut notes = record.notes.clone();
        if !record.strategy_reason.is_empty() {
            notes.push(format!("chose {}: {}", record.strategy, record.strategy_reason));
        }
        Self {
            phases: phases(record, created),
            rounds,
            raw_bytes: (raw > 0).then_some(raw),
            own_downtime_ms: Some(record.downtime_ms),
            fill_ms: record.timings.fill,
            started_cpu_s: [0.0; 2],
            precopy: record.precopy_span(),
            notes,
        }
    }
}

/// Pages that were fetched behind the resume: all that were laid in, but for those that were sent in rounds before.
fn fetched_pages(record: &MigrationRecord) -> u64 {
    let sent: u64 = record.precopy_rounds().iter().map(|round| round.pages).sum();
    match record.strategy.as_str() {
        "postcopy" | "hybrid" => record.laid_in().pages.saturating_sub(sent),
        _ => 0,
    }
}

/// podferry's phases one behind the other, but for the transfer, which goes on beside the dump. The restore ends where the commit begins.
fn phases(record: &MigrationRecord, created: f64) -> Vec<Phase> {
    let timings = &record.timings;
    let mut all = Vec::new();
    let mut at = created;
    let mut add = |name: &str, start_ms: f64, duration_ms: f64| {
        if duration_ms > 0.0 {
            all.push(Phase { name: name.to_owned(), start_ms, duration_ms });
        }
        start_ms + duration_ms
    };
    at = add("preflight", at, timings.preflight);
    at = add("prepare", at, timings.prepare);
    at = add("precopy", at, timings.precopy);
    at = add("freeze", at, timings.freeze);
    let dumped = add("dump", at, timings.dump);
    let carried = add("transfer", at, timings.transfer);
    at = add("restore", dumped.max(carried), timings.restore);
    at = add("commit", at, timings.commit);
    at = add("resume", at, timings.resume);
    add("fill", at, timings.fill);
    all
}

/// All that is known of a run.
#[derive(Debug)]
pub(super) struct Facts<'a> {
    /// What was run, and its number among the repeats.
    pub(super) scenario: &'a Scenario,
    pub(super) repeat: u32,
    pub(super) times: Times,
    /// How it was moved, or why not.
    pub(super) moved: Result<Moved, Outcome>,
    pub(super) seen: Seen,
    pub(super) cost: Option<[Cost; 2]>,
    pub(super) resident_bytes: Option<u64>,
    pub(super) wire_bytes: Option<u64>,
    pub(super) report: LoadReport,
}

impl Facts<'_> {
    /// The line that is written down.
    pub(super) fn measurement(self) -> Measurement {
        let clients = Some(clients(&self.report, self.times, self.moved.as_ref().ok().and_then(|moved| moved.precopy)));
        let mut measurement = Measurement {
            scenario: self.scenario.clone(),
            repeat: self.repeat,
            began_unix_ms: self.times.asked,
            outcome: Outcome::Moved,
            resident_bytes: self.resident_bytes,
            downtime_ms: None,
            total_ms: Some(self.times.answered - self.times.asked),
            deployment_ms: None,
            phases: Vec::new(),
            rounds: Vec::new(),
            raw_bytes: None,
            wire_bytes: self.wire_bytes,
            cost: self.cost,
            clients,
            notes: self
                .report
                .clients
                .iter()
                .flat_map(|client| client.problems.iter().take(MOST_PROBLEMS).cloned())
                .collect(),
        };
        match self.moved {
            Ok(moved) => {
                let first_answer = first_answer_behind(&self.report, self.seen.ran_at);
                fill_in(&mut measurement, moved, self.seen, first_answer);
            }
            Err(outcome) => measurement.outcome = outcome,
        }
        measurement
    }
}

fn fill_in(measurement: &mut Measurement, moved: Moved, seen: Seen, first_answer: Option<f64>) {
    let is_taken_over = measurement.scenario.strategy == Strategy::Application;
    // Where both instances run for a while, no process stands still: what is left is the word of whoever moved it.
    let outside = if is_taken_over { None } else { seen.downtime_ms() };
    measurement.downtime_ms = outside.or(moved.own_downtime_ms);
    measurement.notes.extend(moved.notes);
    match (outside, moved.own_downtime_ms) {
        (Some(_), Some(own)) => measurement.notes.push(format!("downtime as the one who moved it saw it: {own:.1} ms")),
        (None, Some(_)) => measurement.notes.push("downtime is as the one who moved it saw it".to_owned()),
        _ => {}
    }
    measurement.deployment_ms = operational(measurement, moved.fill_ms, seen, first_answer);
    if let Some(cost) = &mut measurement.cost {
        cost.iter_mut().zip(moved.started_cpu_s).for_each(|(cost, started)| cost.cpu_s += started);
    }
    measurement.phases = moved.phases;
    measurement.rounds = moved.rounds;
    measurement.raw_bytes = moved.raw_bytes;
}

/// When the workload was fully operational on the target, in ms from the request on: with the last of its memory there, or, where it starts anew,
/// with its first right answer.
fn operational(measurement: &Measurement, fill_ms: f64, seen: Seen, first_answer: Option<f64>) -> Option<f64> {
    let began = measurement.began_unix_ms;
    match measurement.scenario.strategy {
        // It answers before it is reached; what counts is that nothing is left to be done.
        Strategy::Application => measurement.total_ms,
        Strategy::Cold => first_answer.map(|at| at - began),
        _ => seen.ran_at.map(|at| at - began + fill_ms),
    }
}

/// When any client had the first right answer behind this time, in ms since 1970.
fn first_answer_behind(report: &LoadReport, at: Option<f64>) -> Option<f64> {
    let at = at?;
    let samples = report.clients.iter().filter_map(|client| client.samples.as_ref());
    samples.filter_map(|samples| samples.all().map(|sample| sample.unix_ms).find(|came| *came >= at)).reduce(f64::min)
}

fn clients(report: &LoadReport, times: Times, precopy: Option<Span>) -> Clients {
    let samples: Vec<&Samples> = report.clients.iter().filter_map(|client| client.samples.as_ref()).collect();
    let within = Span { start: times.asked, end: times.answered };
    let before = Span { start: times.quiet_since, end: times.asked };
    let after = Span { start: times.answered, end: times.ended };
    Clients {
        requests: report.requests(),
        failed_requests: report.failed_requests(),
        retried_requests: report.retried_requests(),
        connection_resets: report.connection_resets(),
        lost_items: report.lost_items(),
        gaps_ms: samples.iter().filter_map(|samples| samples.longest_gap(within, times.ended)).collect(),
        latency: [before, within, after].map(|span| latency(percentiles(samples.iter().copied(), span))),
        throughput: [rate(&samples, Some(before)), rate(&samples, precopy)],
        timeline: timeline(&samples, times),
    }
}

fn latency(found: Percentiles) -> Latency {
    let Percentiles { count, p50_ms, p90_ms, p99_ms, max_ms } = found;
    Latency { count, p50_ms, p90_ms, p99_ms, max_ms }
}

/// Answers in a second; absent when there was no time to count any.
fn rate(samples: &[&Samples], span: Option<Span>) -> Option<f64> {
    let span = span.filter(|span| span.length() >= SLICE_MS)?;
    let answers: usize = samples.iter().map(|samples| samples.within(span).count()).sum();
    Some(crate::moves::whole(answers as u64) / (span.length() / 1e3))
}

/// Slices from the quiet time on to the end of the clients.
fn timeline(samples: &[&Samples], times: Times) -> Vec<Slice> {
    let start = ((times.quiet_since - times.asked) / SLICE_MS).ceil();
    let count = slices(start, (times.ended - times.asked) / SLICE_MS);
    let mut all: Vec<Slice> = (0..count)
        .map(|number| Slice {
            start_ms: (start + crate::moves::whole(number as u64)) * SLICE_MS,
            worst_ms: None,
            answers: 0,
        })
        .collect();
    for Sample { unix_ms, took_ms } in samples.iter().flat_map(|samples| samples.all()) {
        let number = (unix_ms - times.asked) / SLICE_MS - start;
        if let Some(slice) = (number >= 0.0).then(|| all.get_mut(slices(0.0, number.floor()))).flatten() {
            slice.answers += 1;
            slice.worst_ms = Some(slice.worst_ms.unwrap_or(0.0).max(took_ms));
        }
    }
    all
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to what a run can have of them")]
fn slices(start: f64, end: f64) -> usize {
    (end - start).clamp(0.0, 1e6) as usize
}

/// Why a run counts as failed, if it does: it was undone after the freeze, or clients lost what they must not lose. What another tool cannot do
/// is a result.
pub(super) fn failure(measurement: &Measurement) -> Option<String> {
    if scenario::is_peer(measurement.scenario.strategy) {
        return None;
    }
    if let Outcome::Failed(reason) = &measurement.outcome {
        return Some(reason.clone());
    }
    let clients = measurement.clients.as_ref()?;
    let faults = clients.lost_items + clients.failed_requests + clients.connection_resets;
    let strategy = measurement.scenario.strategy;
    let must_keep = scenario::keeps_memory(strategy) && strategy != Strategy::Auto;
    (must_keep && faults > 0).then(|| {
        format!(
            "clients saw {} lost items, {} failed requests and {} resets",
            clients.lost_items, clients.failed_requests, clients.connection_resets
        )
    })
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{
        load::{ClientReport, Kind},
        migration::Timings,
    };

    pub(crate) fn scenario(strategy: Strategy) -> Scenario {
        Scenario {
            workload: podferry_report::results::Workload::Redis,
            strategy,
            memory_mib: 16,
            dirty_percent: None,
            clients: 1,
            think_ms: 1,
            cpu_limit: None,
            memory_limit_mib: None,
            link_mbit: None,
            link_rtt_ms: 0.0,
        }
    }

    const TIMES: Times = Times { quiet_since: 1000.0, asked: 2000.0, answered: 2600.0, ended: 3500.0 };

    /// An answer each ms, but for 120 ms from 2200 on.
    fn client() -> ClientReport {
        let mut samples = Samples::default();
        for ms in (1000..=2200).chain(2320..3500) {
            let took = if ms == 2320 { 119_500 } else { 300 };
            samples.note(Duration::from_millis(ms), Duration::from_micros(took));
        }
        ClientReport { kind: Kind::Redis, requests: 2381, samples: Some(samples), ..ClientReport::default() }
    }

    fn record() -> MigrationRecord {
        let timings = Timings {
            preflight: 20.0,
            prepare: 30.0,
            precopy: 100.0,
            freeze: 5.0,
            dump: 20.0,
            transfer: 35.0,
            restore: 40.0,
            commit: 2.0,
            resume: 10.0,
            fill: 50.0,
        };
        let rounds = vec![crate::migration::Round { pages: 10, raw_bytes: 40_960, ..Default::default() }; 2];
        MigrationRecord { strategy: "live".to_owned(), downtime_ms: 110.0, timings, rounds, ..Default::default() }
    }

    pub(crate) fn measured(strategy: Strategy, moved: Result<Moved, Outcome>) -> Measurement {
        let scenario = scenario(strategy);
        let facts = Facts {
            scenario: &scenario,
            repeat: 0,
            times: TIMES,
            moved,
            seen: Seen { still_since: Some(2205.0), ran_at: Some(2310.0) },
            cost: None,
            resident_bytes: None,
            wire_bytes: None,
            report: LoadReport { clients: vec![client()] },
        };
        facts.measurement()
    }

    fn close(value: Option<f64>, expected: f64) {
        assert!(value.is_some_and(|value| (value - expected).abs() < 0.01), "{value:?} {expected}");
    }

    #[test]
    fn numbers_are_taken_as_they_are_defined() {
        let moved = measured(Strategy::Live, Ok(Moved::of_record(&record(), 2000.0)));
        close(moved.downtime_ms, 105.0);
        close(moved.total_ms, 600.0);
        close(moved.deployment_ms, 360.0);
        assert_eq!(moved.raw_bytes, Some(81_920));
        let names: Vec<&str> = moved.phases.iter().map(|phase| phase.name.as_str()).collect();
        assert_eq!(
            names,
            ["preflight", "prepare", "precopy", "freeze", "dump", "transfer", "restore", "commit", "resume", "fill"]
        );
        close(moved.phases.iter().find(|phase| phase.name == "restore").map(|phase| phase.start_ms), 190.0);
        let clients = moved.clients.unwrap();
        close(Some(clients.gaps_ms[0]), 120.0);
        close(Some(clients.latency[1].max_ms), 119.5);
        assert_eq!((clients.latency[0].count, clients.latency[2].count), (1000, 900));
        close(clients.throughput[0], 1000.0);
        assert!(failure(&measured(Strategy::Live, Ok(Moved::default()))).is_none());
    }

    #[test]
    fn the_timeline_has_every_answer_and_the_gap() {
        let clients = measured(Strategy::Live, Ok(Moved::default())).clients.unwrap();
        assert_eq!(clients.timeline.first().map(|slice| slice.start_ms), Some(-1000.0));
        assert_eq!(clients.timeline.iter().map(|slice| slice.answers).sum::<u64>(), 2381);
        let silent: Vec<f64> =
            clients.timeline.iter().filter(|slice| slice.worst_ms.is_none()).map(|slice| slice.start_ms).collect();
        assert_eq!(silent, [250.0]);
    }

    #[test]
    fn a_take_over_has_the_coordinators_downtime_and_says_so() {
        let moved = Moved { own_downtime_ms: Some(33.0), ..Moved::default() };
        let measured = measured(Strategy::Application, Ok(moved));
        close(measured.downtime_ms, 33.0);
        close(measured.deployment_ms, 600.0);
        close(super::tests::measured(Strategy::Cold, Ok(Moved::default())).deployment_ms, 320.0);
        assert!(measured.notes.iter().any(|note| note.contains("as the one who moved it saw it")));
    }

    #[test]
    fn a_refusal_is_no_failure_and_a_loss_is_one_unless_it_lies_in_the_strategy() {
        let refused = measured(Strategy::Live, Err(Outcome::Refused("it does not converge".to_owned())));
        assert_eq!((failure(&refused), refused.downtime_ms), (None, None));
        assert!(failure(&measured(Strategy::Live, Err(Outcome::Failed("CRIU".to_owned())))).is_some());
        assert_eq!(failure(&measured(Strategy::PeerRunc, Err(Outcome::Failed("CRIU".to_owned())))), None);
        for (strategy, fails) in [(Strategy::Warm, true), (Strategy::Cold, false), (Strategy::PeerRunc, false)] {
            let mut lossy = measured(strategy, Ok(Moved::default()));
            lossy.clients.as_mut().unwrap().lost_items = 1;
            assert_eq!(failure(&lossy).is_some(), fails, "{strategy:?}");
        }
    }
}
