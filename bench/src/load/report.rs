//! What the clients saw, as data.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::{Throughput, samples::Samples};
use crate::migration::Span;

/// What a client does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Reads products of the catalogue.
    #[default]
    Catalogue,
    /// Fills, empties and orders a shopping cart.
    Cart,
    /// Reads the shopping cart's feed.
    Feed,
    /// Counts, writes and reads in Redis.
    Redis,
    /// Writes and reads in Redis, with many requests under way.
    Pipeline,
    /// Writes and reads a value of 1 MiB in Redis.
    Bulk,
    /// Counts and checks in a service that answers lines.
    Lines,
    /// Inserts, updates and reads in `PostgreSQL`.
    Sql,
}

/// A pause between two right answers.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Gap {
    /// When the answer before it came, in ms since 1970.
    pub start_unix_ms: f64,
    /// How long it was, in ms.
    pub gap_ms: f64,
}

/// What one client saw.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ClientReport {
    /// What the client did.
    pub kind: Kind,
    /// Its number among those of its kind.
    pub client: u32,
    /// Requests that were sent (for the feed: events that came).
    pub requests: u64,
    /// Requests that got a wrong answer or none.
    pub failed_requests: u64,
    /// Requests that were sent once more, because their first answer never came.
    #[serde(default)]
    pub retried_requests: u64,
    /// How often the connection was closed or reset by the other side, or silent for too long.
    pub connection_resets: u64,
    /// Items that were confirmed and are gone, or are there twice.
    pub lost_items: u64,
    /// Longest time between two right answers, in ms.
    pub gap_ms_max: f64,
    /// The pauses longer than [`GAP_FLOOR`](super::GAP_FLOOR).
    pub gaps: Vec<Gap>,
    /// The first faults, in words.
    pub problems: Vec<String>,
    /// How many answers came when, of clients whose throughput counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub throughput: Option<Throughput>,
    /// Every answer, of clients that were asked to note them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub samples: Option<Samples>,
}

/// What all clients of one run saw.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct LoadReport {
    /// One report each.
    pub clients: Vec<ClientReport>,
}

impl LoadReport {
    /// Requests of all clients.
    pub fn requests(&self) -> u64 {
        self.clients.iter().map(|client| client.requests).sum()
    }

    /// Failed requests of all clients.
    pub fn failed_requests(&self) -> u64 {
        self.clients.iter().map(|client| client.failed_requests).sum()
    }

    /// Connection resets of all clients.
    pub fn connection_resets(&self) -> u64 {
        self.clients.iter().map(|client| client.connection_resets).sum()
    }

    /// Requests that all clients sent once more.
    pub fn retried_requests(&self) -> u64 {
        self.clients.iter().map(|client| client.retried_requests).sum()
    }

    /// Lost or doubled items of all clients.
    pub fn lost_items(&self) -> u64 {
        self.clients.iter().map(|client| client.lost_items).sum()
    }

    /// Whether nothing at all went wrong.
    pub fn is_clean(&self) -> bool {
        self.failed_requests() + self.connection_resets() + self.lost_items() == 0
    }

    /// Answers in a second that all clients together had within this time; `None` unless each counted them all the while.
    pub fn rate_within(&self, span: Span) -> Option<f64> {
        let rate = |client: &ClientReport| client.throughput.as_ref()?.rate_within(span);
        self.clients.iter().map(rate).sum()
    }

    /// Adds the clients of another run.
    pub fn merge(&mut self, other: Self) {
        self.clients.extend(other.clients);
    }

    /// The longest gap of any client that overlaps with the time from `start` to `end` (ms since 1970); 0 when none was
    /// longer than [`GAP_FLOOR`](super::GAP_FLOOR).
    pub fn longest_gap_within(&self, start: f64, end: f64) -> f64 {
        self.clients
            .iter()
            .flat_map(|client| &client.gaps)
            .filter(|gap| gap.start_unix_ms < end && gap.start_unix_ms + gap.gap_ms > start)
            .map(|gap| gap.gap_ms)
            .fold(0.0, f64::max)
    }
}

/// A line that `podferry-bench load` prints.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "lowercase")]
pub enum Event {
    /// Every client has had its first answer.
    Ready,
    /// The clients have ended.
    Report(LoadReport),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::throughput::SLICE;

    fn with_gaps(gaps: &[(f64, f64)]) -> LoadReport {
        let gaps = gaps.iter().map(|&(start_unix_ms, gap_ms)| Gap { start_unix_ms, gap_ms }).collect();
        LoadReport { clients: vec![ClientReport { gaps, ..ClientReport::default() }] }
    }

    #[test]
    fn gaps_are_attributed_to_the_time_they_overlap_with() {
        let mut report = with_gaps(&[(100.0, 50.0), (200.0, 20.0)]);
        report.merge(with_gaps(&[(205.0, 30.0), (500.0, 900.0)]));
        let gap = |start, end| report.longest_gap_within(start, end);
        assert!((gap(120.0, 130.0) - 50.0).abs() < f64::EPSILON);
        assert!((gap(190.0, 300.0) - 30.0).abs() < f64::EPSILON);
        assert!((gap(0.0, 2000.0) - 900.0).abs() < f64::EPSILON);
        assert!(gap(300.0, 400.0).abs() < f64::EPSILON);
    }

    #[test]
    fn the_rate_is_that_of_all_clients_and_unknown_when_one_did_not_count() {
        let counted = |answers: u64| {
            let mut throughput = Throughput::default();
            (20..40).for_each(|slice| throughput.note(SLICE * slice, answers));
            ClientReport { throughput: Some(throughput), ..ClientReport::default() }
        };
        let span = Span { start: 1100.0, end: 1500.0 };
        let mut report = LoadReport { clients: vec![counted(10), counted(30)] };
        assert_eq!(report.rate_within(span), Some(800.0));
        report.clients.push(ClientReport::default());
        assert_eq!(report.rate_within(span), None);
    }

    #[test]
    fn any_fault_of_any_client_shows_in_the_sums() {
        for (failed_requests, connection_resets, lost_items) in [(1, 0, 0), (0, 1, 0), (0, 0, 1)] {
            let bad = ClientReport { failed_requests, connection_resets, lost_items, ..ClientReport::default() };
            assert!(!LoadReport { clients: vec![ClientReport::default(), bad] }.is_clean());
        }
        assert!(LoadReport { clients: vec![ClientReport::default()] }.is_clean());
    }

    #[test]
    fn lines_are_read_back_as_they_were_written() {
        for event in [Event::Ready, Event::Report(with_gaps(&[(1.5, 7.25)]))] {
            let line = serde_json::to_string(&event).unwrap();
            assert_eq!(serde_json::from_str::<Event>(&line).unwrap(), event);
        }
    }
}
