//! What became of each load, as data and as a table.

use std::fmt::{self, Write as _};

use serde::Serialize;

use super::{Way, footprint::Footprint};
use crate::{
    load::LoadReport,
    migration::{MigrationRecord, median},
    moves::{mebibytes, tenths, whole},
};

/// What became of one try.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Outcome {
    /// It runs on the target.
    Moved(Box<MigrationRecord>),
    /// It was not frozen, for this reason.
    Refused(String),
    /// It was frozen, and did not arrive.
    Failed(String),
}

/// One try to move a load.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Attempt {
    /// When it was asked for, in ms since 1970.
    pub(super) start_unix_ms: f64,
    /// When the answer was there, in ms since 1970.
    pub(super) end_unix_ms: f64,
    pub(super) outcome: Outcome,
}

impl Attempt {
    pub(super) fn has_failed(&self) -> bool {
        matches!(self.outcome, Outcome::Failed(_))
    }

    fn record(&self) -> Option<&MigrationRecord> {
        match &self.outcome {
            Outcome::Moved(record) => Some(record),
            _ => None,
        }
    }

    fn problem(&self) -> Option<&str> {
        match &self.outcome {
            Outcome::Moved(_) => None,
            Outcome::Refused(why) | Outcome::Failed(why) => Some(why),
        }
    }
}

impl fmt::Display for Attempt {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.outcome {
            Outcome::Moved(record) => write!(
                formatter,
                "down {:>5.0} ms of {:>5.0} ms, {} rounds",
                record.downtime_ms,
                record.total_ms,
                record.rounds.len()
            ),
            Outcome::Refused(why) => write!(formatter, "refused before the freeze: {why}"),
            Outcome::Failed(why) => write!(formatter, "FAILED: {why}"),
        }
    }
}

/// What was measured of one load in one way. Times are in ms, medians of the moves that succeeded unless they say otherwise.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// The load.
    pub load: String,
    /// How it was moved.
    pub way: Way,
    /// Resident memory before the first move, in MiB; what processes share is counted once.
    pub resident_mib: u64,
    /// Processes before the first move.
    pub processes: u64,
    /// Threads of all of them.
    pub threads: u64,
    /// Moves that succeeded.
    pub moved: u64,
    /// Moves that were refused before the freeze.
    pub refused: u64,
    /// Moves that were undone after it, or did not end.
    pub failed: u64,
    /// Rounds, that of the freeze among them.
    pub rounds: f64,
    /// Copying memory while the processes ran.
    pub precopy_ms: f64,
    /// From freeze to resume, as the coordinator saw it.
    pub downtime_ms: f64,
    /// Longest time without an answer that the client saw in a move, rounds included.
    pub client_gap_ms: f64,
    /// The longest of all moves.
    pub client_gap_ms_max: f64,
    /// MiB that crossed the network in a move, without what was fetched behind the resume.
    pub wire_mib: f64,
    /// Laying in what was missing behind the running processes, what was fetched from the source among it.
    pub fill_ms: f64,
    /// The least CPU time that any move was throttled to, in CPUs; 0 without a throttle.
    pub cpu_limit: f64,
    /// Requests that the client had answered.
    pub requests: u64,
    /// Numbers that were lost or doubled.
    pub lost_items: u64,
    /// Requests with a wrong answer or none.
    pub failed_requests: u64,
    /// Connections that were closed, reset or silent for too long.
    pub connection_resets: u64,
    /// Why the first move that did not succeed did not.
    pub reason: String,
    /// What went wrong for the client, in words.
    pub problems: Vec<String>,
}

impl Row {
    pub(super) fn new(load: &str, way: Way, footprint: Footprint, attempts: &[Attempt], report: &LoadReport) -> Self {
        let records: Vec<&MigrationRecord> = attempts.iter().filter_map(Attempt::record).collect();
        let middle = |of: fn(&MigrationRecord) -> f64| tenths(median(records.iter().map(|record| of(record))));
        let moved = attempts.iter().filter(|attempt| attempt.record().is_some());
        let gaps: Vec<f64> =
            moved.map(|move_| report.longest_gap_within(move_.start_unix_ms, move_.end_unix_ms)).collect();
        let refused = attempts.iter().filter(|attempt| matches!(attempt.outcome, Outcome::Refused(_))).count() as u64;
        let limits = records.iter().flat_map(|record| &record.rounds).map(|round| round.cpu_limit);
        Self {
            load: load.to_owned(),
            way,
            resident_mib: footprint.resident_mib,
            processes: footprint.processes,
            threads: footprint.threads,
            moved: records.len() as u64,
            refused,
            failed: attempts.iter().filter(|attempt| attempt.has_failed()).count() as u64,
            rounds: middle(|record| whole(record.rounds.len() as u64)),
            precopy_ms: middle(|record| record.timings.precopy),
            downtime_ms: middle(|record| record.downtime_ms),
            client_gap_ms: tenths(median(gaps.iter().copied())),
            client_gap_ms_max: tenths(gaps.iter().copied().reduce(f64::max)),
            wire_mib: middle(|record| mebibytes(record.wire_bytes)),
            fill_ms: middle(|record| record.timings.fill),
            cpu_limit: limits.filter(|limit| *limit > 0.0).reduce(f64::min).unwrap_or(0.0),
            requests: report.requests(),
            lost_items: report.lost_items(),
            failed_requests: report.failed_requests(),
            connection_resets: report.connection_resets(),
            reason: attempts.iter().find_map(Attempt::problem).unwrap_or_default().to_owned(),
            problems: report.clients.iter().flat_map(|client| client.problems.iter().cloned()).collect(),
        }
    }

    fn faults(&self) -> u64 {
        self.lost_items + self.failed_requests + self.connection_resets
    }
}

/// What was measured of all loads.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LoadsResult {
    /// One row for each load and way.
    pub rows: Vec<Row>,
}

impl LoadsResult {
    /// Whether no client lost anything, had a wrong answer or another connection. That a move is refused, or undone, is a result.
    pub fn holds(&self) -> bool {
        !self.rows.is_empty() && self.rows.iter().all(|row| row.faults() == 0)
    }
}

/// The result as a table in Markdown, and below it whatever did not go well.
pub fn table(result: &LoadsResult) -> String {
    let titles = [
        "load",
        "moved",
        "resident",
        "processes",
        "threads",
        "succeeded",
        "refused",
        "failed",
        "rounds",
        "pre-copy",
        "downtime",
        "client gap",
        "longest gap",
        "on the wire",
        "fill",
    ];
    let numbers = titles.len() - 2;
    let rule = [vec!["---"; 2], vec!["---:"; numbers]].concat();
    let mut rows = vec![titles.map(str::to_owned).to_vec(), rule.into_iter().map(str::to_owned).collect()];
    rows.extend(result.rows.iter().map(cells));
    let lines: Vec<String> = rows.iter().map(|row| format!("| {} |", row.join(" | "))).collect();
    let mut text = lines.join("\n") + "\n";
    for row in &result.rows {
        let what = format!("{}, {}", row.load, row.way.name());
        if row.cpu_limit > 0.0 {
            // Writing into a string cannot fail.
            let _ = writeln!(text, "{what}: throttled to {:.2} CPUs", row.cpu_limit);
        }
        if !row.reason.is_empty() {
            let _ = writeln!(text, "{what}: {}", row.reason);
        }
        row.problems.iter().for_each(|problem| {
            let _ = writeln!(text, "PROBLEM {what}: {problem}");
        });
    }
    text
}

fn cells(row: &Row) -> Vec<String> {
    let if_moved = |cell: String| if row.moved > 0 { cell } else { "–".to_owned() };
    let ms = |value: f64| if_moved(format!("{value:.0} ms"));
    let mib = |value: f64| if_moved(format!("{value:.0} MiB"));
    vec![
        row.load.clone(),
        row.way.name().to_owned(),
        format!("{} MiB", row.resident_mib),
        row.processes.to_string(),
        row.threads.to_string(),
        row.moved.to_string(),
        row.refused.to_string(),
        row.failed.to_string(),
        if_moved(format!("{:.0}", row.rounds)),
        ms(row.precopy_ms),
        ms(row.downtime_ms),
        ms(row.client_gap_ms),
        ms(row.client_gap_ms_max),
        mib(row.wire_mib),
        ms(row.fill_ms),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        load::{ClientReport, Gap},
        migration::Round,
    };

    fn moved(start_unix_ms: f64, downtime_ms: f64) -> Attempt {
        let rounds = vec![Round { pages: 1, cpu_limit: 0.25, ..Round::default() }; 3];
        let record = MigrationRecord { downtime_ms, rounds, wire_bytes: 1 << 20, ..MigrationRecord::default() };
        Attempt { start_unix_ms, end_unix_ms: start_unix_ms + 900.0, outcome: Outcome::Moved(Box::new(record)) }
    }

    fn row(attempts: &[Attempt], client: ClientReport) -> Row {
        let footprint = Footprint { resident_mib: 512, processes: 1, threads: 3 };
        Row::new("dirty-100", Way::Live, footprint, attempts, &LoadReport { clients: vec![client] })
    }

    #[test]
    fn a_refusal_is_a_result_and_a_fault_of_a_client_is_none() {
        let refused = Attempt { outcome: Outcome::Refused("it does not converge".to_owned()), ..moved(1000.0, 0.0) };
        let failed = Attempt { outcome: Outcome::Failed("CRIU said no".to_owned()), ..moved(2000.0, 0.0) };
        let gaps = vec![Gap { start_unix_ms: 10.0, gap_ms: 130.0 }, Gap { start_unix_ms: 1100.0, gap_ms: 700.0 }];
        let client = ClientReport { requests: 9, gaps, ..ClientReport::default() };
        let good = row(&[moved(0.0, 100.0), refused, failed], client);
        assert_eq!((good.moved, good.refused, good.failed, good.requests), (1, 1, 1, 9));
        assert!((good.client_gap_ms_max - 130.0).abs() < 0.01 && (good.rounds - 3.0).abs() < 0.01);
        assert_eq!(good.reason, "it does not converge");
        let holds = |rows: Vec<Row>| LoadsResult { rows }.holds();
        assert!(holds(vec![good.clone()]) && !holds(vec![]));
        assert!(!holds(vec![Row { lost_items: 1, ..good.clone() }]));
        assert!(!holds(vec![Row { failed_requests: 1, ..good.clone() }]));
        assert!(!holds(vec![good.clone(), Row { connection_resets: 1, ..good }]));
    }

    #[test]
    fn the_table_has_a_column_for_each_title_and_the_reasons_below() {
        let refused = Attempt { outcome: Outcome::Refused("too fast".to_owned()), ..moved(0.0, 0.0) };
        let mut rows =
            vec![row(&[moved(0.0, 81.4)], ClientReport::default()), row(&[refused], ClientReport::default())];
        rows[1].problems.push("connection lost".to_owned());
        let text = table(&LoadsResult { rows });
        let bars: Vec<usize> = text.lines().take(4).map(|line| line.matches('|').count()).collect();
        assert_eq!(bars, [16; 4], "{text}");
        assert!(text.contains("| 81 ms |") && text.contains("| – |"), "{text}");
        assert!(text.contains("dirty-100, live: too fast\nPROBLEM dirty-100, live: connection lost\n"), "{text}");
        assert!(text.contains("throttled to 0.25 CPUs"), "{text}");
    }
}
