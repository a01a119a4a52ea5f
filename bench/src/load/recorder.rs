//! What a client notes down while it runs. No clock of its own: the caller says when.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::{
    report::{ClientReport, Gap, Kind},
    samples::Samples,
    throughput::Throughput,
};

/// Pauses shorter than this are the machine's ordinary unrest, and are not listed one by one.
pub const GAP_FLOOR: Duration = Duration::from_millis(5);
/// How many gaps and problems are listed at most; the counts and the longest gap are always exact.
const MAX_LISTED: usize = 10_000;
const MAX_PROBLEMS: usize = 20;

/// Why a step of a client did not go well.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// The connection was closed or reset, or is silent for too long. The client has to open another one.
    Broken(String),
    /// An answer came, but a wrong one.
    Wrong(String),
    /// Something that was confirmed is gone, or is there twice.
    Lost {
        /// How many items.
        items: u64,
        /// What was expected and what was found.
        what: String,
    },
}

/// The notes of one client.
#[derive(Debug)]
pub struct Recorder {
    report: ClientReport,
    last: Option<Instant>,
    started: Instant,
    started_unix: Duration,
}

impl Recorder {
    /// Begins the notes of client number `client`, now.
    pub fn new(kind: Kind, client: u32) -> Self {
        let started_unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let throughput = (kind == Kind::Pipeline).then(Throughput::default);
        let report = ClientReport { kind, client, throughput, ..ClientReport::default() };
        Self { report, last: None, started: Instant::now(), started_unix }
    }

    /// The same, with every answer noted together with the time it took.
    #[must_use]
    pub fn with_samples(mut self, wanted: bool) -> Self {
        self.report.samples = wanted.then(Samples::default);
        self
    }

    /// A request is sent once more.
    pub fn retried(&mut self) {
        self.report.retried_requests += 1;
    }

    /// The right answer that came at `now` took so long from its request on.
    pub fn took(&mut self, now: Instant, time: Duration) {
        let unix = self.started_unix + now.saturating_duration_since(self.started);
        if let Some(samples) = &mut self.report.samples {
            samples.note(unix, time);
        }
    }

    /// So many right answers came at `now`. The time since the last ones is a gap, however many faults lay between.
    pub fn answered(&mut self, now: Instant, answers: u64) {
        self.report.requests += answers;
        self.note_gap(now);
        self.last = Some(now);
        let unix = self.started_unix + now.saturating_duration_since(self.started);
        if let Some(throughput) = &mut self.report.throughput {
            throughput.note(unix, answers);
        }
    }

    /// Closes the notes: a silence that lasts until `now` counts as a gap, too.
    pub fn finish(mut self, now: Instant) -> ClientReport {
        self.note_gap(now);
        self.report
    }

    /// Notes a fault of a request (`Wrong`, `Broken`) or of what was found (`Lost`).
    pub fn fault(&mut self, fault: &Fault) {
        let problem = match fault {
            Fault::Broken(what) => {
                self.report.requests += 1;
                self.report.failed_requests += 1;
                self.report.connection_resets += 1;
                format!("connection lost: {what}")
            }
            Fault::Wrong(what) => {
                self.report.requests += 1;
                self.report.failed_requests += 1;
                format!("wrong answer: {what}")
            }
            Fault::Lost { items, what } => {
                self.report.lost_items += items;
                format!("lost or doubled: {what}")
            }
        };
        if self.report.problems.len() < MAX_PROBLEMS {
            self.report.problems.push(problem);
        }
    }

    /// Whether any right answer has come yet.
    pub fn has_answer(&self) -> bool {
        self.last.is_some()
    }

    fn note_gap(&mut self, now: Instant) {
        let Some(last) = self.last else { return };
        let gap = now.saturating_duration_since(last);
        let gap_ms = milliseconds(gap);
        self.report.gap_ms_max = self.report.gap_ms_max.max(gap_ms);
        if gap >= GAP_FLOOR && self.report.gaps.len() < MAX_LISTED {
            let since_start = last.saturating_duration_since(self.started);
            self.report.gaps.push(Gap { start_unix_ms: milliseconds(self.started_unix + since_start), gap_ms });
        }
    }
}

/// Milliseconds, rounded to whole microseconds.
pub fn milliseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(recorder: &Recorder, ms: u64) -> Instant {
        recorder.started + Duration::from_millis(ms)
    }

    #[test]
    fn the_longest_time_between_right_answers_is_the_gap() {
        let mut recorder = Recorder::new(Kind::Catalogue, 0);
        for ms in [50, 51, 53, 173, 174] {
            recorder.answered(at(&recorder, ms), 1);
        }
        let end = at(&recorder, 175);
        let base = milliseconds(recorder.started_unix);
        let report = recorder.finish(end);
        assert_eq!((report.requests, report.failed_requests), (5, 0));
        assert!((report.gap_ms_max - 120.0).abs() < 0.01);
        assert_eq!(report.gaps.len(), 1);
        assert!((report.gaps[0].start_unix_ms - base - 53.0).abs() < 0.01);
    }

    #[test]
    fn throughput_is_noted_of_pipelines_only() {
        let throughput = |kind| {
            let mut recorder = Recorder::new(kind, 0);
            recorder.answered(at(&recorder, 10), 7);
            let end = at(&recorder, 20);
            let report = recorder.finish(end);
            assert_eq!(report.requests, 7);
            report.throughput
        };
        assert_eq!(throughput(Kind::Redis), None);
        assert_eq!(throughput(Kind::Pipeline).unwrap().answers(), 7);
    }

    #[test]
    fn faults_do_not_end_a_gap() {
        let mut recorder = Recorder::new(Kind::Catalogue, 0);
        recorder.answered(at(&recorder, 0), 1);
        recorder.fault(&Fault::Wrong("500".to_owned()));
        recorder.fault(&Fault::Broken("reset".to_owned()));
        recorder.answered(at(&recorder, 300), 1);
        let end = at(&recorder, 300);
        let report = recorder.finish(end);
        assert!((report.gap_ms_max - 300.0).abs() < 0.01);
        assert_eq!((report.requests, report.failed_requests, report.connection_resets), (4, 2, 1));
        assert_eq!(report.problems.len(), 2);
    }

    #[test]
    fn silence_until_the_end_is_a_gap() {
        let mut recorder = Recorder::new(Kind::Feed, 0);
        recorder.answered(at(&recorder, 10), 1);
        let end = at(&recorder, 2010);
        assert!((recorder.finish(end).gap_ms_max - 2000.0).abs() < 0.01);
    }

    #[test]
    fn losses_are_summed_and_problems_bounded() {
        let mut recorder = Recorder::new(Kind::Cart, 0);
        for _ in 0..100 {
            recorder.fault(&Fault::Lost { items: 3, what: "x".to_owned() });
        }
        let end = at(&recorder, 1);
        let report = recorder.finish(end);
        assert_eq!((report.lost_items, report.failed_requests), (300, 0));
        assert_eq!(report.problems.len(), MAX_PROBLEMS);
    }
}
