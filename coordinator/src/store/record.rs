//! The record of one migration.

use jiff::Timestamp;
use podferry_common::identity::Peer;
use podferry_common::{Failure, MigrationId, NodeName, WorkloadName};
use podferry_proto::v1;
use serde::{Deserialize, Serialize};

use crate::migration::{Decision, Phase, State};
use crate::strategy::{Auto, Connections, Strategy};

/// Notes of one migration that are kept, and the longest of them in bytes.
const MAX_NOTES: usize = 16;
const MAX_NOTE_BYTES: usize = 512;
/// The longest reason of a strategy that is kept, in bytes.
const MAX_REASON_BYTES: usize = 4096;

/// How much of its texts a migration shows.
#[derive(Clone, Copy)]
struct Texts {
    /// Bytes of the message that says what failed.
    message: usize,
    /// Bytes of each other text of a failure.
    detail: usize,
    /// Bytes of the names in a failure.
    name: usize,
    /// The last so many notes.
    notes: usize,
    /// The last so many rounds.
    rounds: usize,
    /// Bytes of each note, and of the reason of a strategy.
    note: usize,
}

impl Texts {
    const WHOLE: Self = Self {
        message: usize::MAX,
        detail: usize::MAX,
        name: usize::MAX,
        notes: usize::MAX,
        rounds: usize::MAX,
        note: usize::MAX,
    };
    /// A migration has 3 KiB then, whatever happened in it: a list of all that are kept fits into one message.
    const IN_A_LIST: Self = Self { message: 300, detail: 200, name: 64, notes: 4, rounds: 4, note: 160 };
}

/// Everything that has to be known of a migration to go on with it, or to tell of it afterwards.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Its id.
    pub id: MigrationId,
    /// The workload's name in the inventory.
    pub workload: WorkloadName,
    /// runc's id of the workload's container, which is what agents know it by.
    pub container: String,
    /// The pod whose container that is; none where there are no pods.
    #[serde(default)]
    pub pod: Option<PodMove>,
    /// How it is moved. As long as that is still to be chosen, what every strategy but cold needs at least: see [`Record::chosen`].
    pub strategy: Strategy,
    /// When the choice was left to the coordinator: by what it is made.
    #[serde(default)]
    pub auto: Option<Auto>,
    /// When the choice was left to the coordinator: what was chosen, and why; empty before.
    #[serde(default)]
    pub strategy_reason: String,
    /// Where it ran at the start.
    pub source: NodeName,
    /// `host:port` of the source's agent, so that a migration can go on when the inventory has changed.
    pub source_address: String,
    /// Where it goes.
    pub target: NodeName,
    /// `host:port` of the target's agent.
    pub target_address: String,
    /// Whether pages may be compressed.
    pub compress: bool,
    /// Live: the downtime that is aimed at, in milliseconds; 0 for the default.
    #[serde(default)]
    pub downtime_budget_ms: f64,
    /// The most bytes per second on the link; 0 for as many as it takes.
    #[serde(default)]
    pub bandwidth_limit: u64,
    /// Live: whether all memory that is copied before the freeze is compared in it.
    #[serde(default)]
    pub verify: bool,
    /// Live: whether the workload gets less CPU time rather than being given up.
    #[serde(default)]
    pub throttle: bool,
    /// Cold: seconds from the workload's SIGTERM to its SIGKILL.
    #[serde(default)]
    pub grace_period_s: u32,
    /// What was asked for its connections.
    #[serde(default)]
    pub connections: Connections,
    /// Who asked for it; `None` when that was not recorded yet.
    #[serde(default)]
    pub requested_by: Option<Peer>,
    /// When it was accepted.
    pub created_at: Timestamp,
    /// When the source's processes stood still, as far as the coordinator saw it.
    #[serde(default)]
    pub frozen_at: Option<Timestamp>,
    /// Where it stands.
    pub state: State,
    /// What was measured.
    pub report: Report,
}

/// A pod that moves, and the one that takes its place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodMove {
    /// The namespace of both.
    pub namespace: String,
    /// The source pod's name
    pub name: String,
    /// and uid.
    pub uid: String,
    /// The container's name in both.
    pub container: String,
    /// The target pod's name.
    pub target_name: String,
    /// The target pod only stands in for one of the source pod's name, which is made behind the commit.
    #[serde(default)]
    pub keeps_name: bool,
}

/// What a migration cost. All times in milliseconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Report {
    /// From the freeze to the target's resume, as the coordinator saw it.
    pub downtime_ms: f64,
    /// From the request to the outcome.
    pub total_ms: f64,
    /// Passes over the memory, the last one in the freeze.
    pub rounds: Vec<Round>,
    /// Bytes that crossed the network.
    pub wire_bytes: u64,
    /// By phase.
    pub timings: Timings,
    /// How far the transfer is.
    pub progress: Progress,
    /// Whether established TCP connections move along.
    pub keeps_connections: bool,
    /// What a person should know.
    pub notes: Vec<String>,
    /// What keeps a committed migration from its end at the moment. Not recorded: it is found out again.
    #[serde(skip)]
    pub obstacle: Option<String>,
}

/// One pass over the memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Round {
    /// Pages sent.
    pub pages: u64,
    /// Bytes before compression.
    pub raw_bytes: u64,
    /// Bytes on the network.
    pub wire_bytes: u64,
    /// Milliseconds.
    pub duration_ms: f64,
    /// Pages a second that the workload wrote meanwhile; 0 when frozen.
    pub dirty_rate: f64,
    /// What the memory that was written meanwhile would add to the downtime, in milliseconds; 0 when frozen.
    #[serde(default)]
    pub predicted_ms: f64,
    /// How many CPUs' time the workload was throttled to meanwhile; 0 when it had its own limit.
    #[serde(default)]
    pub cpu_limit: f64,
}

/// Milliseconds spent in each phase; 0 for one that was not gone through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Timings {
    /// Both agents looking whether it can be done.
    pub preflight: f64,
    /// The target reserving.
    pub prepare: f64,
    /// From the target's reservation to the end of copying while the workload runs.
    pub precopy: f64,
    /// From the request to stop, or the end of pre-copy, to the workload standing still, as the source says.
    pub freeze: f64,
    /// From there to the end of the dump, as the source says.
    pub dump: f64,
    /// From there until the target has everything, as the source says.
    pub transfer: f64,
    /// From there until the container is held, as the target says.
    pub restore: f64,
    /// Sealing both parts, writing the decision, and destroying the source.
    pub commit: f64,
    /// Letting the target go.
    pub resume: f64,
    /// From there until the last page was in place, as the target says.
    pub fill: f64,
}

/// How far a transfer is, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Sent, before compression.
    pub raw_bytes: u64,
    /// Sent, on the network.
    pub wire_bytes: u64,
    /// To be sent, before compression, as preflight saw it.
    pub expected_bytes: u64,
}

impl Record {
    /// The node whose copy is the right one, by the decision.
    pub fn place(&self) -> &NodeName {
        if self.state.decision() == Decision::Commit { &self.target } else { &self.source }
    }

    /// How it is moved; none as long as that is still to be chosen.
    pub fn chosen(&self) -> Option<Strategy> {
        (self.auto.is_none() || !self.strategy_reason.is_empty()).then_some(self.strategy)
    }

    /// The word for how it is moved, in logs and figures: `auto` as long as that is still to be chosen.
    pub fn strategy_word(&self) -> &'static str {
        self.chosen().map_or("auto", |strategy| strategy.as_str())
    }

    /// Takes down what was chosen. What only other strategies do is not asked of it.
    pub fn choose(&mut self, strategy: Strategy, reason: String) {
        (self.strategy, self.strategy_reason) = (strategy, cut(reason, MAX_REASON_BYTES));
        if !strategy.copies_memory_beforehand() {
            (self.verify, self.throttle) = (false, false);
        }
        if strategy != Strategy::Cold {
            self.grace_period_s = 0;
        }
    }

    /// As the API shows it.
    pub fn to_wire(&self) -> v1::Migration {
        self.shown(Texts::WHOLE)
    }

    /// As the API shows it among all others: long texts are cut.
    pub fn to_list_entry(&self) -> v1::Migration {
        self.shown(Texts::IN_A_LIST)
    }

    fn shown(&self, texts: Texts) -> v1::Migration {
        let failure = self.state.failure().map(|failure| shortened(failure, texts));
        v1::Migration {
            id: self.id.to_string(),
            workload: self.workload.to_string(),
            strategy: self.chosen().map_or(v1::Strategy::Unspecified, v1::Strategy::from).into(),
            source: self.source.to_string(),
            target: self.target.to_string(),
            phase: v1::Phase::from(self.state.phase()).into(),
            reason: failure.as_ref().map(ToString::to_string).unwrap_or_default(),
            downtime_ms: self.report.downtime_ms,
            total_ms: self.report.total_ms,
            rounds: self.rounds(texts),
            wire_bytes: self.report.wire_bytes,
            timings: Some(self.report.timings.to_wire()),
            problem: failure.map(|failure| v1::Problem {
                code: failure.code.to_string(),
                node: failure.node.unwrap_or_default(),
                phase: failure.phase.unwrap_or_default(),
                message: failure.message,
                criu_line: failure.criu_line.unwrap_or_default(),
                remedy: failure.remedy.unwrap_or_default(),
            }),
            progress: Some(self.report.progress.to_wire()),
            created_at: self.created_at.to_string(),
            keeps_connections: self.report.keeps_connections,
            notes: self.notes(texts),
            decision: v1::Decision::from(self.state.decision()).into(),
            requested_by: self.requested_by.as_ref().map(Peer::dns_name).unwrap_or_default(),
            strategy_reason: cut(self.strategy_reason.clone(), texts.note),
        }
    }

    fn rounds(&self, texts: Texts) -> Vec<v1::Round> {
        let rounds = &self.report.rounds;
        rounds[rounds.len().saturating_sub(texts.rounds)..].iter().copied().map(Round::to_wire).collect()
    }

    fn notes(&self, texts: Texts) -> Vec<String> {
        let mut notes = self.report.notes.clone();
        if matches!(self.state, State::RolledBack { .. }) {
            let target = &self.target;
            notes.push(format!("node {target} has not confirmed that it keeps nothing; it is asked until it does"));
        }
        notes.extend(self.report.obstacle.clone());
        let last = notes.split_off(notes.len().saturating_sub(texts.notes));
        last.into_iter().map(|note| cut(note, texts.note)).collect()
    }
}

impl Report {
    /// Adds what a person should know. There is an end to it: placement has a note for each node, preflight for each
    /// finding.
    pub fn note(&mut self, note: impl Into<String>) {
        match self.notes.len() {
            ..MAX_NOTES => self.notes.push(cut(note.into(), MAX_NOTE_BYTES)),
            MAX_NOTES => self.notes.push("there are more notes than these".to_owned()),
            _ => {}
        }
    }
}

fn shortened(failure: &Failure, texts: Texts) -> Failure {
    let (detail, name) =
        (|text: &String| cut(text.clone(), texts.detail), |text: &String| cut(text.clone(), texts.name));
    Failure {
        code: failure.code,
        node: failure.node.as_ref().map(name),
        phase: failure.phase.as_ref().map(name),
        message: cut(failure.message.clone(), texts.message),
        criu_line: failure.criu_line.as_ref().map(detail),
        remedy: failure.remedy.as_ref().map(detail),
    }
}

/// `text` in at most so many bytes, with a mark where something was cut off.
fn cut(mut text: String, bytes: usize) -> String {
    const MARK: &str = "…";
    if text.len() > bytes {
        let limit = bytes.saturating_sub(MARK.len());
        let border = (0..=limit).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
        text.truncate(border);
        text.push_str(MARK);
    }
    text
}

/// A number that an agent told, as it can be recorded: JSON has neither infinity nor what is no number, and a record with
/// one could not be read any more.
pub(crate) fn told(number: f64) -> f64 {
    const MOST: f64 = 1e12;
    if number.is_nan() { 0.0 } else { number.clamp(0.0, MOST) }
}

impl Round {
    fn to_wire(self) -> v1::Round {
        v1::Round {
            pages: self.pages,
            raw_bytes: self.raw_bytes,
            wire_bytes: self.wire_bytes,
            duration_ms: self.duration_ms,
            dirty_rate: self.dirty_rate,
            predicted_ms: self.predicted_ms,
            cpu_limit: self.cpu_limit,
        }
    }
}

impl From<v1::Round> for Round {
    fn from(round: v1::Round) -> Self {
        Self {
            pages: round.pages,
            raw_bytes: round.raw_bytes,
            wire_bytes: round.wire_bytes,
            duration_ms: told(round.duration_ms),
            dirty_rate: told(round.dirty_rate),
            predicted_ms: told(round.predicted_ms),
            cpu_limit: told(round.cpu_limit),
        }
    }
}

impl Timings {
    fn to_wire(self) -> v1::Timings {
        v1::Timings {
            preflight: self.preflight,
            prepare: self.prepare,
            precopy: self.precopy,
            freeze: self.freeze,
            dump: self.dump,
            transfer: self.transfer,
            restore: self.restore,
            commit: self.commit,
            resume: self.resume,
            fill: self.fill,
        }
    }
}

impl Progress {
    fn to_wire(self) -> v1::TransferProgress {
        v1::TransferProgress {
            raw_bytes: self.raw_bytes,
            wire_bytes: self.wire_bytes,
            expected_bytes: self.expected_bytes,
        }
    }
}

impl From<Phase> for v1::Phase {
    fn from(phase: Phase) -> Self {
        match phase {
            Phase::Preflight => Self::Preflight,
            Phase::Prepare => Self::Prepare,
            Phase::PreCopy => Self::Precopy,
            Phase::Freeze => Self::Freeze,
            Phase::Commit => Self::Commit,
            Phase::Release => Self::Release,
            Phase::Resume => Self::Resume,
            Phase::Fill => Self::Fill,
            Phase::RollingBack => Self::RollingBack,
            Phase::Succeeded => Self::Succeeded,
            Phase::Failed => Self::Failed,
            Phase::Cancelled => Self::Cancelled,
        }
    }
}

impl From<Decision> for v1::Decision {
    fn from(decision: Decision) -> Self {
        match decision {
            Decision::Commit => Self::Commit,
            Decision::Abort => Self::Abort,
            Decision::Undecided => Self::Undecided,
        }
    }
}

#[cfg(test)]
mod tests {
    use podferry_common::FailureCode;

    use super::*;
    use crate::testing;

    #[test]
    fn notes_have_an_end() {
        let mut report = Report::default();
        report.note("é".repeat(MAX_NOTE_BYTES));
        (0..1000).for_each(|number| report.note(format!("not to n{number}")));
        assert_eq!(report.notes.len(), MAX_NOTES + 1);
        assert!(report.notes[0].len() <= MAX_NOTE_BYTES && report.notes[0].ends_with("é…"), "{:?}", report.notes[0]);
        assert_eq!(report.notes[MAX_NOTES - 1..], ["not to n14", "there are more notes than these"]);
    }

    #[test]
    fn a_record_from_before_live_is_read() {
        let record = testing::record("cart", "a", "b");
        let mut old = serde_json::to_value(&record).unwrap();
        old["report"]["rounds"] = serde_json::json!([
            {"pages": 1, "raw_bytes": 4096, "wire_bytes": 100, "duration_ms": 2.0, "dirty_rate": 0.0}
        ]);
        let fields = old.as_object_mut().unwrap();
        for new in [
            "downtime_budget_ms",
            "bandwidth_limit",
            "verify",
            "throttle",
            "grace_period_s",
            "requested_by",
            "auto",
            "strategy_reason",
        ] {
            fields.remove(new).unwrap();
        }
        for state in ["releasing", "resuming", "completed", "preparing"] {
            old["state"] = state.into();
            let read: Record = serde_json::from_value(old.clone()).unwrap();
            assert_eq!((read.strategy, read.bandwidth_limit, read.verify), (Strategy::Warm, 0, false));
            assert_eq!(read.chosen(), Some(Strategy::Warm));
            assert_eq!(read.report.rounds[0].raw_bytes, 4096);
        }
    }

    #[test]
    fn what_is_not_chosen_yet_is_not_told_and_what_is_asks_for_nothing_that_it_cannot_do() {
        let mut record = testing::record("cart", "a", "b");
        record.auto = Some(Auto { allow_restart: true, ..Auto::default() });
        (record.verify, record.throttle, record.grace_period_s) = (true, true, 30);
        assert_eq!((record.chosen(), record.to_wire().strategy()), (None, v1::Strategy::Unspecified));
        let mut live = record.clone();
        live.choose(Strategy::Live, "live: it is large".to_owned());
        assert_eq!((live.verify, live.throttle, live.grace_period_s), (true, true, 0));
        assert_eq!(
            (live.to_wire().strategy(), live.to_wire().strategy_reason),
            (v1::Strategy::Live, "live: it is large".into())
        );
        record.choose(Strategy::Cold, "é".repeat(MAX_REASON_BYTES));
        assert_eq!((record.verify, record.throttle, record.grace_period_s), (false, false, 30));
        assert!(
            record.strategy_reason.len() <= MAX_REASON_BYTES && record.to_list_entry().strategy_reason.len() <= 160
        );
    }

    #[test]
    fn a_lost_one_is_a_failure_on_the_target_and_says_so() {
        let mut record = testing::record("cart", "a", "b");
        record.state = State::Lost { why: Failure::new(FailureCode::DataLoss, "a page is gone").on("b").into() };
        let shown = record.to_wire();
        assert_eq!((shown.phase(), shown.decision()), (v1::Phase::Failed, v1::Decision::Commit));
        assert_eq!((shown.reason.as_str(), record.place().as_str()), ("a page is gone (on b)", "b"));
        record.state = State::Filling;
        assert_eq!((record.to_wire().phase(), record.place().as_str()), (v1::Phase::Fill, "b"));
    }

    #[test]
    fn whatever_number_an_agent_tells_the_record_can_be_read_again() {
        for number in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1.0, 14.5] {
            let round = v1::Round {
                duration_ms: number,
                dirty_rate: number,
                predicted_ms: number,
                cpu_limit: number,
                ..v1::Round::default()
            };
            let mut record = testing::record("cart", "a", "b");
            record.report.rounds.push(round.into());
            let text = serde_json::to_string(&record).unwrap();
            assert_eq!(serde_json::from_str::<Record>(&text).unwrap(), record, "{number}");
        }
        assert_eq!((told(14.5).to_bits(), told(-1.0).to_bits()), (14.5_f64.to_bits(), 0.0_f64.to_bits()));
    }

    #[test]
    fn a_list_cuts_what_is_long_and_nothing_else() {
        let mut record = testing::record("cart", "a", "b");
        let short =
            Failure::new(FailureCode::Internal, "no").on("a").in_phase("dump").criu_line("Error: x").remedy("y");
        record.report.note("a note");
        record.state = State::Aborted { why: short.clone().into() };
        assert_eq!(record.to_list_entry(), record.to_wire());
        record.state = State::Aborted { why: short.criu_line("x".repeat(1000)).into() };
        let (whole, entry) = (record.to_wire(), record.to_list_entry());
        assert!(whole.reason.contains(&"x".repeat(1000)) && whole.problem.unwrap().criu_line.len() == 1000);
        assert_eq!(entry.problem.unwrap().criu_line, format!("{}…", "x".repeat(197)));
        assert!(entry.reason.len() < 400 && entry.reason.ends_with("what to do: y"), "{}", entry.reason);
    }
}
