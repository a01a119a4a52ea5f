//! What the demo found, as one line of JSON and as a table.

use std::fmt::Write as _;

use serde::Serialize;

use crate::{
    load::LoadReport,
    migration::{Hop, median},
};

/// All that was seen of one workload.
#[derive(Debug, Clone, PartialEq)]
pub struct Observed {
    /// Its name.
    pub workload: String,
    /// What its clients saw, from before the first hop until after the last.
    pub load: LoadReport,
}

/// All that was seen.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Findings {
    /// The moves, in order.
    pub hops: Vec<Hop>,
    /// The workloads.
    pub observed: Vec<Observed>,
    /// Digest of all that Redis held before the first hop and after the last; `None` when it could not be asked.
    pub redis_digests: Option<(String, String)>,
    /// What else went wrong.
    pub problems: Vec<String>,
}

/// The demo's last line. The order of its fields is fixed: people read it, too.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// Moves that were tried.
    pub migrations: u64,
    /// Moves that did not succeed.
    pub failed: u64,
    /// Items that were confirmed to a client and are gone, or are there twice.
    pub lost_items: u64,
    /// Requests with a wrong answer or none.
    pub failed_requests: u64,
    /// Connections that were closed, reset or silent for too long.
    pub connection_resets: u64,
    /// Whether Redis holds the same after the last hop as before the first.
    pub redis_digest_equal: bool,
    /// Median of the downtimes that the coordinator measured, in ms; `null` when nothing was moved.
    pub downtime_ms_median: Option<f64>,
    /// The longest time that any client was without an answer, in ms.
    pub client_gap_ms_max: f64,
}

impl Summary {
    /// Counts all that was found.
    pub fn of(findings: &Findings) -> Self {
        let loads = || findings.observed.iter().map(|observed| &observed.load);
        let longest = loads().flat_map(|load| &load.clients).map(|client| client.gap_ms_max).fold(0.0, f64::max);
        Self {
            migrations: findings.hops.len() as u64,
            failed: findings.hops.iter().filter(|hop| hop.record().is_none()).count() as u64,
            lost_items: loads().map(LoadReport::lost_items).sum(),
            failed_requests: loads().map(LoadReport::failed_requests).sum(),
            connection_resets: loads().map(LoadReport::connection_resets).sum(),
            redis_digest_equal: findings.redis_digests.as_ref().is_some_and(|(before, after)| before == after),
            downtime_ms_median: median(downtimes(&findings.hops)).map(tenths),
            client_gap_ms_max: tenths(longest),
        }
    }

    /// Whether everything moved and nothing was lost. Nothing moved is no success.
    pub fn holds(&self) -> bool {
        // A digest that could not be asked for is not an equal one.
        let faults = self.failed + self.lost_items + self.failed_requests + self.connection_resets;
        self.migrations > 0 && faults == 0 && self.redis_digest_equal
    }
}

fn downtimes(hops: &[Hop]) -> impl Iterator<Item = f64> + '_ {
    hops.iter().filter_map(Hop::record).map(|record| record.downtime_ms)
}

fn tenths(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

/// Lays rows out in columns: the first to the left, all others to the right.
pub fn columns(rows: &[Vec<String>]) -> String {
    let count = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..count).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
            // Writing into a string cannot fail.
            let _ = if column == 0 { write!(line, "{cell:<width$}") } else { write!(line, "  {cell:>width$}") };
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// The table at the end of the demo, and below it whatever went wrong.
pub fn table(findings: &Findings) -> String {
    let titles = ["workload", "moved", "downtime", "client gap", "longest", "requests", "failed", "resets", "lost"];
    let mut rows = vec![titles.map(str::to_owned).to_vec()];
    rows.extend(findings.observed.iter().map(|observed| row(observed, &findings.hops)));
    let mut text = columns(&rows);
    text.push_str(
        "\ndowntime: median, as the coordinator measured it; client gap: median and longest time in a move that\n",
    );
    text.push_str("a client was without an answer\n");
    if let Some((before, after)) = &findings.redis_digests {
        let words = if before == after { "the same" } else { "NOT the same" };
        let _ = writeln!(text, "Redis's data after all moves: {words} ({before}, {after})");
    }
    for problem in problems(findings) {
        let _ = writeln!(text, "PROBLEM {problem}");
    }
    text
}

fn row(observed: &Observed, hops: &[Hop]) -> Vec<String> {
    let load = &observed.load;
    let of_this = || hops.iter().filter(|hop| hop.workload == observed.workload);
    let moved: Vec<&Hop> = of_this().filter(|hop| hop.record().is_some()).collect();
    let gaps: Vec<f64> = moved.iter().map(|hop| load.longest_gap_within(hop.start_unix_ms, hop.end_unix_ms)).collect();
    let downtime = median(moved.iter().filter_map(|hop| hop.record()).map(|record| record.downtime_ms));
    vec![
        observed.workload.clone(),
        format!("{} of {}", moved.len(), of_this().count()),
        whole_ms(downtime),
        whole_ms(median(gaps.iter().copied())),
        whole_ms(gaps.iter().copied().reduce(f64::max)),
        load.requests().to_string(),
        load.failed_requests().to_string(),
        load.connection_resets().to_string(),
        load.lost_items().to_string(),
    ]
}

fn whole_ms(value: Option<f64>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.0} ms"))
}

fn problems(findings: &Findings) -> Vec<String> {
    let hops = findings.hops.iter().filter_map(|hop| {
        let problem = hop.outcome.as_ref().err()?;
        Some(format!("{} from {} to {}: {problem}", hop.workload, hop.source, hop.target))
    });
    let clients = findings.observed.iter().flat_map(|observed| {
        observed.load.clients.iter().flat_map(move |client| {
            client.problems.iter().map(move |problem| {
                format!("{}: {:?} client {}: {problem}", observed.workload, client.kind, client.client)
            })
        })
    });
    hops.chain(clients).chain(findings.problems.iter().cloned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        load::{ClientReport, Gap},
        migration::MigrationRecord,
    };

    fn hop(workload: &str, start_unix_ms: f64, downtime_ms: f64) -> Hop {
        Hop {
            workload: workload.to_owned(),
            source: "node-a".to_owned(),
            target: "node-b".to_owned(),
            start_unix_ms,
            end_unix_ms: start_unix_ms + 500.0,
            outcome: Ok(MigrationRecord { downtime_ms, ..MigrationRecord::default() }),
        }
    }

    fn good() -> Findings {
        let gaps = vec![Gap { start_unix_ms: 1100.0, gap_ms: 91.26 }, Gap { start_unix_ms: 5000.0, gap_ms: 400.0 }];
        let client = ClientReport { requests: 900, gap_ms_max: 400.04, gaps, ..ClientReport::default() };
        let load = LoadReport { clients: vec![client] };
        Findings {
            hops: vec![hop("redis", 1000.0, 80.0), hop("redis", 2000.0, 90.0)],
            observed: vec![Observed { workload: "redis".to_owned(), load }],
            redis_digests: Some(("d1".to_owned(), "d1".to_owned())),
            problems: Vec::new(),
        }
    }

    #[test]
    fn the_last_line_is_as_documented() {
        let summary = Summary::of(&good());
        assert!(summary.holds());
        assert_eq!(
            serde_json::to_string(&summary).unwrap(),
            r#"{"migrations":2,"failed":0,"lost_items":0,"failed_requests":0,"connection_resets":0,"redis_digest_equal":true,"downtime_ms_median":85.0,"client_gap_ms_max":400.0}"#
        );
    }

    #[test]
    fn every_single_fault_fails_the_demo() {
        let mut cases = vec![Findings::default()];
        let mut case = |change: fn(&mut Findings)| {
            let mut findings = good();
            change(&mut findings);
            cases.push(findings);
        };
        case(|findings| findings.hops.clear());
        case(|findings| findings.hops[1].outcome = Err("refused".to_owned()));
        case(|findings| findings.observed[0].load.clients[0].lost_items = 1);
        case(|findings| findings.observed[0].load.clients[0].failed_requests = 1);
        case(|findings| findings.observed[0].load.clients[0].connection_resets = 1);
        case(|findings| findings.redis_digests = None);
        case(|findings| findings.redis_digests = Some(("d1".to_owned(), "d2".to_owned())));
        for findings in cases {
            assert!(!Summary::of(&findings).holds(), "{findings:?}");
        }
    }

    #[test]
    fn the_table_attributes_gaps_to_moves_and_names_problems() {
        let mut findings = good();
        findings.hops[1].outcome = Err("CRIU said no".to_owned());
        findings.observed[0].load.clients[0].problems = vec!["connection lost: reset".to_owned()];
        findings.problems = vec!["Redis does not answer".to_owned()];
        let table = table(&findings);
        assert!(table.contains("PROBLEM Redis does not answer"));
        let row = table.lines().find(|line| line.starts_with("redis ")).unwrap();
        let cells: Vec<&str> = row.split_whitespace().collect();
        assert_eq!(cells, ["redis", "1", "of", "2", "80", "ms", "91", "ms", "91", "ms", "900", "0", "0", "0"]);
        assert!(table.contains("PROBLEM redis from node-a to node-b: CRIU said no"));
        assert!(table.contains("PROBLEM redis: Catalogue client 0: connection lost: reset"));
        assert!(table.contains("the same (d1, d1)"));
    }

    #[test]
    fn columns_line_up() {
        let rows = [["a", "1"], ["long", "1000"]].map(|row| row.map(str::to_owned).to_vec());
        assert_eq!(columns(&rows), "a        1\nlong  1000\n");
    }
}
