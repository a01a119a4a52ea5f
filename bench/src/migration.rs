//! What `podferry migrate --wait --output json` answers, and what became of a hop.

use serde::{Deserialize, Serialize};

use crate::moves::whole;

/// The phase of a migration that came to its good end.
const SUCCEEDED: &str = "succeeded";

/// Digits of a `UUIDv7` that are the milliseconds since 1970 at which it was made (RFC 9562).
const ID_TIME_DIGITS: usize = 12;

/// A time from when until when, in ms since 1970.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Span {
    /// Its beginning.
    pub start: f64,
    /// Its end.
    pub end: f64,
}

impl Span {
    /// How long it is, in ms.
    pub fn length(self) -> f64 {
        self.end - self.start
    }
}

/// Time spent in each phase, in ms; 0 for a phase that was not gone through.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Timings {
    /// Looking whether it can be done.
    pub preflight: f64,
    /// Reserving on the target.
    pub prepare: f64,
    /// Copying memory while the workload ran.
    pub precopy: f64,
    /// From the request to freeze until all tasks stood still.
    pub freeze: f64,
    /// Writing the images.
    pub dump: f64,
    /// Carrying the images over.
    pub transfer: f64,
    /// Making the processes on the target.
    pub restore: f64,
    /// Deciding.
    pub commit: f64,
    /// Letting the target run.
    pub resume: f64,
    /// Fetching what was missing behind the running target.
    pub fill: f64,
}

/// A migration as the command line tells of it. Fields that are not named here are passed over.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct MigrationRecord {
    /// Its id.
    pub id: String,
    /// What was moved.
    pub workload: String,
    /// By which strategy, with `auto` the one that was chosen.
    #[serde(default)]
    pub strategy: String,
    /// Why the coordinator chose it, when it did.
    #[serde(default)]
    pub strategy_reason: String,
    /// From which node.
    pub source: String,
    /// To which node.
    pub target: String,
    /// How it ended.
    pub phase: String,
    /// Why, when it did not end well.
    #[serde(default)]
    pub reason: String,
    /// From freeze to resume as the coordinator saw it, in ms.
    pub downtime_ms: f64,
    /// From the request to the end, in ms.
    pub total_ms: f64,
    /// Bytes that crossed the network.
    pub wire_bytes: u64,
    /// Time spent in each phase.
    pub timings: Timings,
    /// The rounds of pre-copy, and that of the freeze as the last.
    #[serde(default)]
    pub rounds: Vec<Round>,
    /// What a person should know.
    #[serde(default)]
    pub notes: Vec<String>,
}

/// Pages that were sent in one go.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Round {
    /// How many pages were sent.
    pub pages: u64,
    /// Bytes that were sent of memory and files, before packing.
    pub raw_bytes: u64,
    /// How long it took, in ms.
    pub duration_ms: f64,
    /// How many CPUs' time the workload was held to; 0 when it had its own limit.
    pub cpu_limit: f64,
}

/// What was laid in behind the running workload.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LaidIn {
    /// Pages; with post-copy they were fetched from the source.
    pub pages: u64,
    /// How often the workload waited for one.
    pub waits: u64,
}

impl MigrationRecord {
    /// Whether its processes were asked to stand still.
    pub fn was_frozen(&self) -> bool {
        self.timings.freeze > 0.0
    }

    /// What was laid in behind the running workload, as a note says; nothing without such a note.
    pub fn laid_in(&self) -> LaidIn {
        self.notes.iter().find_map(|note| laid_in(note)).unwrap_or_default()
    }

    /// When it was recorded by the coordinator, in ms since 1970: the time that its id begins with (`UUIDv7`).
    pub fn created_unix_ms(&self) -> Option<f64> {
        let time = u64::from_str_radix(self.id.get(..ID_TIME_DIGITS)?, 16).ok()?;
        Some(whole(time))
    }

    /// From when until when memory was copied while the workload ran, in ms since 1970. What the coordinator needs to write the
    /// record down is not in the times of its phases, so this may be a few ms too early, and never reaches into the freeze.
    pub fn precopy_span(&self) -> Option<Span> {
        let start = self.created_unix_ms()? + self.timings.preflight + self.timings.prepare;
        (self.timings.precopy > 0.0).then_some(Span { start, end: start + self.timings.precopy })
    }

    /// The rounds of pre-copy, without that of the freeze.
    pub fn precopy_rounds(&self) -> &[Round] {
        self.rounds.split_last().map_or(&[], |(_, before)| before)
    }

    /// Whether the workload runs on the target now.
    pub fn succeeded(&self) -> bool {
        self.phase.eq_ignore_ascii_case(SUCCEEDED)
    }
}

/// Reads the coordinator's note: `N pages were laid in behind the running container, which had to wait for one M times`.
fn laid_in(note: &str) -> Option<LaidIn> {
    let (pages, waits) =
        note.split_once(" pages were laid in behind the running container, which had to wait for one ")?;
    Some(LaidIn { pages: pages.parse().ok()?, waits: waits.strip_suffix(" times")?.parse().ok()? })
}

/// Reads what the command line printed: one object, or lines of them of which the last counts.
pub fn parse_record(output: &str) -> Result<MigrationRecord, serde_json::Error> {
    let whole = output.trim();
    serde_json::from_str(whole).or_else(|error| {
        let last = whole.lines().next_back().unwrap_or_default();
        serde_json::from_str(last).map_err(|_| error)
    })
}

#[derive(Debug, Deserialize)]
struct Refused {
    error: Refusal,
}

#[derive(Debug, Deserialize)]
struct Refusal {
    code: String,
    message: String,
    #[serde(default)]
    remedy: String,
}

/// What the command line said when nothing was begun, in words; `None` when it said something else.
pub fn parse_refusal(output: &str) -> Option<String> {
    let Refused { error: Refusal { code, message, remedy } } = serde_json::from_str(output.trim()).ok()?;
    Some(if remedy.is_empty() { format!("{code}: {message}") } else { format!("{code}: {message}; {remedy}") })
}

/// One move of one workload.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Hop {
    /// What was to be moved.
    pub workload: String,
    /// From which node.
    pub source: String,
    /// To which node.
    pub target: String,
    /// When it was asked for, in ms since 1970.
    pub start_unix_ms: f64,
    /// When the answer was there, in ms since 1970.
    pub end_unix_ms: f64,
    /// What podferry says of it, or what went wrong.
    pub outcome: Result<MigrationRecord, String>,
}

impl Hop {
    /// What podferry says of it when it succeeded.
    pub fn record(&self) -> Option<&MigrationRecord> {
        self.outcome.as_ref().ok()
    }
}

/// The median, `None` of nothing.
pub fn median(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    let upper = *values.get(middle)?;
    if values.len() % 2 == 1 {
        return Some(upper);
    }
    values.get(middle - 1).map(|lower| f64::midpoint(*lower, upper))
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECORD: &str = r#"{"id":"0197","workload":"redis","strategy":"warm","source":"node-a","target":"node-b",
        "phase":"succeeded","reason":"","downtime_ms":81.5,"total_ms":240,"rounds":[{"pages":1}],"wire_bytes":4096,
        "timings":{"freeze":3.5,"dump":20,"transfer":22,"restore":31}}"#;

    #[test]
    fn the_documented_json_is_read() {
        let record = parse_record(RECORD).unwrap();
        assert!(record.succeeded());
        assert_eq!((record.workload.as_str(), record.target.as_str()), ("redis", "node-b"));
        assert!(
            (record.downtime_ms - 81.5).abs() < f64::EPSILON && (record.timings.restore - 31.0).abs() < f64::EPSILON
        );
        assert!(record.timings.fill.abs() < f64::EPSILON);
        assert_eq!((record.rounds.len(), record.rounds[0].pages), (1, 1));
        assert_eq!(record.laid_in(), LaidIn::default());
    }

    #[test]
    fn what_was_laid_in_is_read_from_the_notes() {
        let note = "3072 pages were laid in behind the running container, which had to wait for one 17 times";
        let notes = vec!["node-b: it has room".to_owned(), note.to_owned()];
        let record = MigrationRecord { notes, ..MigrationRecord::default() };
        assert_eq!(record.laid_in(), LaidIn { pages: 3072, waits: 17 });
    }

    #[test]
    fn pre_copy_lies_behind_the_phases_before_it() {
        let timings = Timings { preflight: 20.0, prepare: 30.0, precopy: 400.0, freeze: 9.0, ..Timings::default() };
        // 2022-02-22 19:22:22 UTC, the example of RFC 9562.
        let id = "017f22e279b07cc398c4dc0c0c07398f".to_owned();
        let record = MigrationRecord { id, timings, ..MigrationRecord::default() };
        let created = 1_645_557_742_000.0;
        assert_eq!(record.created_unix_ms(), Some(created));
        assert_eq!(record.precopy_span(), Some(Span { start: created + 50.0, end: created + 450.0 }));
        let without = MigrationRecord { timings: Timings::default(), ..record.clone() };
        assert_eq!(without.precopy_span(), None);
        assert_eq!(MigrationRecord { id: "é".repeat(9), ..record }.precopy_span(), None);
    }

    #[test]
    fn the_last_round_is_that_of_the_freeze() {
        let rounds = [3, 2, 1].map(|pages| Round { pages, ..Round::default() }).to_vec();
        let record = MigrationRecord { rounds, ..MigrationRecord::default() };
        assert_eq!(record.precopy_rounds().iter().map(|round| round.pages).collect::<Vec<_>>(), [3, 2]);
        assert!(MigrationRecord::default().precopy_rounds().is_empty());
    }

    #[test]
    fn of_several_lines_the_last_counts() {
        let line = RECORD.replace('\n', "");
        let lines = format!("{}\n{line}\n", line.replace("succeeded", "freeze"));
        assert!(parse_record(&lines).unwrap().succeeded());
        assert!(!parse_record(&line.replace("succeeded", "failed")).unwrap().succeeded());
        assert!(parse_record("error: no such workload").is_err());
        assert!(parse_record("").is_err());
    }

    #[test]
    fn a_refusal_is_told_in_words() {
        let said = r#"{"error":{"code":"NOT_FOUND","message":"no workload \"x\"","remedy":"name one of: redis"}}"#;
        assert_eq!(parse_refusal(said).unwrap(), "NOT_FOUND: no workload \"x\"; name one of: redis");
        assert_eq!(parse_refusal(RECORD), None);
        assert_eq!(parse_refusal("killed"), None);
    }

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(median([]), None);
        assert_eq!(median([7.0]), Some(7.0));
        assert_eq!(median([9.0, 1.0, 5.0]), Some(5.0));
        assert_eq!(median([4.0, 1.0, 9.0, 6.0]), Some(5.0));
    }
}
