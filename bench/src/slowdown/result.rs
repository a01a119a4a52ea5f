//! Throughput in pre-copy beside that before it, as data and as a table.

use std::{fmt::Write as _, thread::available_parallelism};

use serde::Serialize;

use super::Options;
use crate::{
    load::LoadReport,
    migration::{Hop, MigrationRecord, Round, Span},
    moves::{mebibytes, whole},
    spread::Spread,
};

/// What the project demands: at most 10 % slower.
const LEAST_OF_BEFORE: f64 = 0.9;

/// Processor time of those that take part, in seconds, or in seconds for each second: so many processors.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Shares {
    /// Redis itself.
    pub redis: f64,
    /// The clients.
    pub client: f64,
    /// Everything else on the node that Redis is on: the agent and what it starts.
    pub source_node: f64,
    /// Everything on the node that Redis is moved to.
    pub target_node: f64,
}

impl Shares {
    fn combine(self, other: Self, with: impl Fn(f64, f64) -> f64) -> Self {
        Self {
            redis: with(self.redis, other.redis),
            client: with(self.client, other.client),
            source_node: with(self.source_node, other.source_node),
            target_node: with(self.target_node, other.target_node),
        }
    }
}

/// What each had used at one time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Sample {
    pub(super) unix_ms: f64,
    pub(super) used: Shares,
}

/// How many processors each used within this time; `None` unless there are samples before and after it.
fn processors_within(samples: &[Sample], span: Span) -> Option<Shares> {
    let (start, end) = (used_at(samples, span.start)?, used_at(samples, span.end)?);
    Some(end.combine(start, |end, start| (end - start) / (span.length() / 1e3)))
}

/// By the samples on both sides: whoever worked between them worked evenly.
fn used_at(samples: &[Sample], unix_ms: f64) -> Option<Shares> {
    let next = samples.iter().position(|sample| sample.unix_ms >= unix_ms)?;
    let (before, after) = (samples.get(next.checked_sub(1)?)?, samples[next]);
    let part = (unix_ms - before.unix_ms) / (after.unix_ms - before.unix_ms);
    Some(before.used.combine(after.used, |before, after| before + (after - before) * part))
}

/// One migration, and what was noted of it.
#[derive(Debug)]
pub struct Move {
    pub(super) hop: Hop,
    /// Since when nothing else had been going on, in ms since 1970.
    pub(super) quiet_since: f64,
    pub(super) samples: Vec<Sample>,
}

/// An interval of one migration.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Interval {
    /// Answers in a second.
    rate: f64,
    processors: Shares,
}

impl Interval {
    fn of(span: Span, samples: &[Sample], report: &LoadReport) -> Option<Self> {
        Some(Self { rate: report.rate_within(span)?, processors: processors_within(samples, span)? })
    }

    /// Answers for each second that Redis had a processor.
    fn of_redis_time(self) -> f64 {
        self.rate / self.processors.redis
    }
}

/// Pre-copy and as long a time just before the same migration was asked for.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Pair {
    before: Interval,
    precopy: Interval,
}

impl Pair {
    /// `None` of a migration that did not succeed, and where the time before was not quiet for long enough.
    fn of(moved: &Move, report: &LoadReport) -> Option<Self> {
        let record = moved.hop.record()?;
        let precopy = record.precopy_span()?;
        let asked = record.created_unix_ms()?;
        let before = Span { start: asked - precopy.length(), end: asked };
        if before.start < moved.quiet_since {
            return None;
        }
        let interval = |span| Interval::of(span, &moved.samples, report);
        Some(Self { before: interval(before)?, precopy: interval(precopy)? })
    }
}

/// What was measured. Spreads are of the moves that count.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SlowdownResult {
    /// What this is.
    pub name: &'static str,
    /// Whether Redis was as fast as demanded, and nothing went wrong.
    pub passed: bool,
    /// Size of the data set, in MiB.
    pub mib: u64,
    /// Resident memory of Redis before the first move, in MiB.
    pub resident_mib: u64,
    /// Processors that Redis, its clients and both nodes share.
    pub processors: u64,
    /// Connections of the clients.
    pub connections: u32,
    /// Requests that each has under way.
    pub depth: u16,
    /// Moves that count.
    pub moves: u64,
    /// Moves whose pre-copy can be compared with what was before.
    pub compared: u64,
    /// Moves that failed.
    pub failed: u64,
    /// Lost items, failed requests and connection resets.
    pub faults: u64,
    /// Whether Redis holds the same after the last move as before the first.
    pub digest_equal: bool,
    /// Answers in a second before.
    pub before_per_second: Spread,
    /// Answers in a second in pre-copy.
    pub precopy_per_second: Spread,
    /// The second as a part of the first, move by move.
    pub of_before: Spread,
    /// The same for each second that Redis had a processor: without what it lost because others had it.
    pub of_before_per_redis_second: Spread,
    /// How long pre-copy took, in ms.
    pub precopy_ms: Spread,
    /// How many rounds it had.
    pub rounds: Spread,
    /// How fast these were sent, in MiB/s.
    pub rounds_mib_per_second: Spread,
    /// Processors in use before; medians.
    pub processors_before: Shares,
    /// Processors in use in pre-copy; medians.
    pub processors_in_precopy: Shares,
}

impl SlowdownResult {
    pub(super) fn of(options: Options, moves: &[Move], report: &LoadReport) -> Self {
        let records: Vec<&MigrationRecord> = moves.iter().filter_map(|moved| moved.hop.record()).collect();
        let pairs: Vec<Pair> = moves.iter().filter_map(|moved| Pair::of(moved, report)).collect();
        let of_pairs = |of: fn(&Pair) -> f64| Spread::of(pairs.iter().map(of));
        let of_records = |of: fn(&MigrationRecord) -> f64| Spread::of(records.iter().map(|record| of(record)));
        Self {
            name: "slowdown",
            passed: false,
            mib: 0,
            resident_mib: 0,
            processors: available_parallelism().map_or(0, |processors| processors.get() as u64),
            connections: options.connections,
            depth: options.depth,
            moves: moves.len() as u64,
            compared: pairs.len() as u64,
            failed: (moves.len() - records.len()) as u64,
            faults: report.lost_items() + report.failed_requests() + report.connection_resets(),
            digest_equal: false,
            before_per_second: of_pairs(|pair| pair.before.rate),
            precopy_per_second: of_pairs(|pair| pair.precopy.rate),
            of_before: of_pairs(|pair| pair.precopy.rate / pair.before.rate),
            of_before_per_redis_second: of_pairs(|pair| pair.precopy.of_redis_time() / pair.before.of_redis_time()),
            precopy_ms: of_records(|record| record.timings.precopy),
            rounds: of_records(|record| whole(record.precopy_rounds().len() as u64)),
            rounds_mib_per_second: of_records(|record| mib_per_second(record.precopy_rounds())),
            processors_before: middle(&pairs, |pair| pair.before.processors),
            processors_in_precopy: middle(&pairs, |pair| pair.precopy.processors),
        }
    }

    /// Whether every move succeeded and was compared, and no client saw a fault.
    pub fn holds(&self) -> bool {
        let faults = self.failed + self.faults;
        self.moves > 0 && self.compared == self.moves && faults == 0 && self.digest_equal
    }

    /// Whether that is so and Redis was as fast as demanded.
    pub(super) fn judged(self) -> Self {
        let passed = self.holds() && self.of_before.median >= LEAST_OF_BEFORE;
        Self { passed, ..self }
    }
}

fn mib_per_second(rounds: &[Round]) -> f64 {
    let bytes: u64 = rounds.iter().map(|round| round.raw_bytes).sum();
    let ms: f64 = rounds.iter().map(|round| round.duration_ms).sum();
    if ms > 0.0 { mebibytes(bytes) / (ms / 1e3) } else { 0.0 }
}

fn middle(pairs: &[Pair], of: fn(&Pair) -> Shares) -> Shares {
    let median = |one: fn(Shares) -> f64| Spread::of(pairs.iter().map(|pair| one(of(pair)))).median;
    Shares {
        redis: median(|shares| shares.redis),
        client: median(|shares| shares.client),
        source_node: median(|shares| shares.source_node),
        target_node: median(|shares| shares.target_node),
    }
}

/// The result as tables in Markdown.
pub fn table(result: &SlowdownResult) -> String {
    let SlowdownResult { mib, resident_mib, moves, connections, depth, processors, .. } = result;
    let (before, precopy) = (result.processors_before, result.processors_in_precopy);
    let mut text = format!(
        "{mib} MiB of data, {resident_mib} MiB resident, {moves} moves; connections: {connections}, requests under way on each: {depth}\n\
         {processors} processors for Redis, its clients and both nodes; median (lowest–highest)\n\n"
    );
    let mut row = |cells: [&str; 4]| {
        // Writing into a string cannot fail.
        let _ = writeln!(text, "| {} |", cells.join(" | "));
    };
    row(["", "before", "in pre-copy", "of before"]);
    row(["---", "---:", "---:", "---:"]);
    let (rates, rates_in_precopy) = (result.before_per_second.digits(0), result.precopy_per_second.digits(0));
    row(["operations/s", &rates, &rates_in_precopy, &result.of_before.to_string()]);
    row([
        "operations for each second of Redis's processor time",
        "",
        "",
        &result.of_before_per_redis_second.to_string(),
    ]);
    let shares = [
        ("processors: Redis", before.redis, precopy.redis),
        ("its clients", before.client, precopy.client),
        ("the source's node without Redis", before.source_node, precopy.source_node),
        ("the target's node", before.target_node, precopy.target_node),
    ];
    for (title, before, precopy) in shares {
        row([title, &format!("{before:.2}"), &format!("{precopy:.2}"), ""]);
    }
    let (ms, rounds, rate) =
        (result.precopy_ms.digits(0), result.rounds.digits(0), result.rounds_mib_per_second.digits(0));
    let verdict = if result.passed { "met" } else { "NOT met" };
    let _ = writeln!(
        text,
        "\npre-copy: {ms} ms, {rounds} rounds, {rate} MiB/s\ngoal, at least {LEAST_OF_BEFORE:.2} of before: {verdict}"
    );
    text
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{
        load::{ClientReport, Throughput},
        migration::Timings,
    };

    /// What `017f22e279b0` is in decimal digits.
    const CREATED: f64 = 1_645_557_742_000.0;

    fn used(redis: f64) -> Shares {
        Shares { redis, client: redis / 2.0, ..Shares::default() }
    }

    /// Redis has all of a processor before the migration is asked for and half of one behind.
    fn samples() -> Vec<Sample> {
        let at = |ms: f64| Sample { unix_ms: CREATED + ms, used: used(if ms < 0.0 { ms / 1e3 } else { ms / 2e3 }) };
        (-20..20).map(|step| at(f64::from(step) * 100.0)).collect()
    }

    fn moved(quiet_before_ms: f64, precopy: f64) -> Move {
        let id = "017f22e279b07cc398c4dc0c0c07398f".to_owned();
        let timings = Timings { preflight: 60.0, prepare: 40.0, precopy, ..Timings::default() };
        let round = |raw_bytes, duration_ms| Round { raw_bytes, duration_ms, ..Round::default() };
        let rounds = vec![round(300 << 20, 800.0), round(20 << 20, 200.0), round(1 << 20, 1.0)];
        let hop = Hop {
            workload: "redis".to_owned(),
            source: "node-a".to_owned(),
            target: "node-b".to_owned(),
            start_unix_ms: CREATED - 5.0,
            end_unix_ms: CREATED + 1900.0,
            outcome: Ok(MigrationRecord { id, timings, rounds, ..MigrationRecord::default() }),
        };
        Move { hop, quiet_since: CREATED - quiet_before_ms, samples: samples() }
    }

    /// 100 answers in each slice before the migration is asked for, 80 behind.
    fn report() -> LoadReport {
        let mut throughput = Throughput::default();
        for step in 0..80 {
            let unix = Duration::from_millis(0x017f_22e2_79b0 - 2000 + 50 * step);
            throughput.note(unix, if step < 40 { 100 } else { 80 });
        }
        LoadReport { clients: vec![ClientReport { throughput: Some(throughput), ..ClientReport::default() }] }
    }

    fn result(moves: &[Move]) -> SlowdownResult {
        let options = Options { quick: true, connections: 4, depth: 16 };
        SlowdownResult { digest_equal: true, ..SlowdownResult::of(options, moves, &report()) }.judged()
    }

    fn close(value: f64, expected: f64) {
        assert!((value - expected).abs() < 1e-6, "{value} {expected}");
    }

    #[test]
    fn pre_copy_is_compared_with_as_long_a_time_before_the_request() {
        let result = result(&[moved(1500.0, 1000.0)]);
        close(result.before_per_second.median, 2000.0);
        close(result.precopy_per_second.median, 1600.0);
        close(result.of_before.median, 0.8);
        close(result.of_before_per_redis_second.median, 1.6);
        close(result.processors_before.redis, 1.0);
        close(result.processors_in_precopy.client, 0.25);
        close(result.rounds_mib_per_second.median, 320.0);
        assert_eq!((result.moves, result.compared, result.failed), (1, 1, 0));
        assert!(result.holds() && !result.passed, "it is slower by a fifth");
    }

    #[test]
    fn what_cannot_be_compared_does_not_count_as_measured() {
        for (quiet, precopy) in [(900.0, 1000.0), (1500.0, 0.0), (5000.0, 1950.0)] {
            let result = result(&[moved(1500.0, 1000.0), moved(quiet, precopy)]);
            assert_eq!((result.moves, result.compared), (2, 1), "{quiet} {precopy}");
            assert!(!result.holds());
        }
        assert!(!result(&[]).holds());
    }

    #[test]
    fn any_fault_fails_it_and_speed_alone_passes_it() {
        let fast = SlowdownResult { of_before: Spread::of([0.93]), ..result(&[moved(1500.0, 1000.0)]) };
        assert!(fast.clone().judged().passed);
        assert!(!SlowdownResult { of_before: Spread::of([0.89]), ..fast.clone() }.judged().passed);
        assert!(!SlowdownResult { faults: 1, ..fast.clone() }.judged().passed);
        assert!(!SlowdownResult { failed: 1, ..fast.clone() }.judged().passed);
        assert!(!SlowdownResult { digest_equal: false, ..fast }.judged().passed);
    }

    #[test]
    fn between_two_samples_time_is_shared_out() {
        let samples =
            [(0.0, 1.0), (100.0, 2.0), (300.0, 3.0)].map(|(unix_ms, redis)| Sample { unix_ms, used: used(redis) });
        let redis = |start, end| processors_within(&samples, Span { start, end }).map(|shares| shares.redis);
        close(redis(50.0, 200.0).unwrap(), (2.5 - 1.5) / 0.15);
        assert_eq!(redis(50.0, 301.0), None);
        assert_eq!(redis(-1.0, 200.0), None);
    }

    #[test]
    fn the_table_has_a_cell_for_each_title() {
        let text = table(&result(&[moved(1500.0, 1000.0)]));
        let bars: Vec<usize> =
            text.lines().filter(|line| line.starts_with('|')).map(|line| line.matches('|').count()).collect();
        assert_eq!(bars, [5; 8], "{text}");
        assert!(text.contains("0.80 (0.80–0.80)") && text.contains("NOT met"), "{text}");
    }
}
