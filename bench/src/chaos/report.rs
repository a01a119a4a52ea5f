//! What came of the cases.

use std::{
    fmt::{self, Write as _},
    path::PathBuf,
};

use podferry_local::{Strategy, faults::Moment};
use serde::Serialize;
use serde_json::Value;

use super::case::{Case, Kind};
use crate::summary::columns;

/// Something that does not hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Problem {
    /// Two copies ran at once.
    TwoCopies(String),
    /// No copy runs, or not where it should.
    NoCopy(String),
    /// Something that was confirmed is gone, or is there twice.
    LostWrites(String),
    /// A connection broke that should have lived.
    Connection(String),
    /// Something is left behind, or missing.
    Leaks(Vec<String>),
    /// The migration's record does not say what happened.
    Record(String),
    /// The case could not be played to its end.
    Unplayed(String),
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TwoCopies(words) => write!(f, "TWO COPIES: {words}"),
            Self::NoCopy(words) => write!(f, "no copy: {words}"),
            Self::LostWrites(words) => write!(f, "lost: {words}"),
            Self::Connection(words) => write!(f, "connection: {words}"),
            Self::Leaks(left) => write!(f, "left: {}", left.join("; ")),
            Self::Record(words) => write!(f, "record: {words}"),
            Self::Unplayed(words) => write!(f, "not played: {words}"),
        }
    }
}

/// What came of one case.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// Which.
    pub case: Case,
    /// How the migration ended.
    pub phase: String,
    /// Why, if it failed.
    pub reason: String,
    /// How long the case took.
    pub seconds: f64,
    /// Whether the workload was lost, as was said.
    pub declared_loss: bool,
    /// What does not hold.
    pub problems: Vec<Problem>,
    /// Where the logs of a case are that did not pass.
    pub logs: Option<PathBuf>,
}

impl Outcome {
    /// Of a migration that ended.
    pub fn new(case: Case, record: &Value) -> Self {
        let text = |key: &str| record[key].as_str().unwrap_or_default().to_owned();
        let (phase, reason) = (text("phase"), text("reason"));
        Self { case, phase, reason, seconds: 0.0, declared_loss: false, problems: Vec::new(), logs: None }
    }

    /// Of a case that could not be played to its end.
    pub fn unplayed(case: Case, error: &str) -> Self {
        Self { problems: vec![Problem::Unplayed(error.to_owned())], ..Self::new(case, &Value::Null) }
    }

    /// Whether all holds.
    pub fn passed(&self) -> bool {
        self.problems.is_empty()
    }
}

/// The sum of all cases.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// Cases that were played.
    pub cases: usize,
    /// Cases in which all held.
    pub passed: usize,
    /// Cases in which two copies ran.
    pub two_copies: usize,
    /// Cases behind which no copy ran, without that having been said of a post-copy.
    pub no_copy: usize,
    /// Cases in which something was gone that had been confirmed.
    pub lost_acknowledged_writes: usize,
    /// Cases that left something behind.
    pub leaks: usize,
    /// Cases in which a post-copy said that the workload was lost, as it may.
    pub declared_losses: usize,
    /// Cases in which a connection broke that should have lived.
    pub connections_lost: usize,
    /// Cases whose record did not say what happened.
    pub wrong_records: usize,
    /// Cases that could not be played to their end.
    pub unplayed: usize,
    /// How long it all took.
    pub seconds: u64,
}

impl Summary {
    /// Adds up.
    pub fn of(outcomes: &[Outcome], seconds: u64) -> Self {
        let with = |wanted: fn(&Problem) -> bool| {
            outcomes.iter().filter(|outcome| outcome.problems.iter().any(wanted)).count()
        };
        Self {
            cases: outcomes.len(),
            passed: outcomes.iter().filter(|outcome| outcome.passed()).count(),
            two_copies: with(|problem| matches!(problem, Problem::TwoCopies(_))),
            no_copy: with(|problem| matches!(problem, Problem::NoCopy(_))),
            lost_acknowledged_writes: with(|problem| matches!(problem, Problem::LostWrites(_))),
            leaks: with(|problem| matches!(problem, Problem::Leaks(_))),
            declared_losses: outcomes.iter().filter(|outcome| outcome.declared_loss).count(),
            connections_lost: with(|problem| matches!(problem, Problem::Connection(_))),
            wrong_records: with(|problem| matches!(problem, Problem::Record(_))),
            unplayed: with(|problem| matches!(problem, Problem::Unplayed(_))),
            seconds,
        }
    }

    /// Whether all cases passed, and there were any.
    pub fn holds(&self) -> bool {
        self.cases > 0 && self.passed == self.cases
    }
}

/// How many of each kind passed, by strategy and moment; what did not hold, below it.
pub fn table(outcomes: &[Outcome]) -> String {
    let mut head = vec!["strategy".to_owned(), "moment".to_owned()];
    head.extend(Kind::ALL.map(|(_, title)| title.to_owned()));
    let mut rows = vec![head];
    for strategy in Strategy::ALL {
        for moment in Moment::ALL {
            let here = || outcomes.iter().filter(|o| o.case.strategy == strategy && o.case.moment == moment);
            if here().next().is_none() {
                continue;
            }
            let mut row = vec![strategy.to_string(), moment.words(strategy).to_owned()];
            row.extend(Kind::ALL.map(|(kind, _)| {
                let of_kind: Vec<&Outcome> = here().filter(|outcome| outcome.case.fault.kind() == kind).collect();
                match of_kind.len() {
                    0 => "-".to_owned(),
                    all => format!("{}/{all}", of_kind.iter().filter(|outcome| outcome.passed()).count()),
                }
            }));
            rows.push(row);
        }
    }
    let mut text = columns(&rows);
    for outcome in outcomes.iter().filter(|outcome| !outcome.passed()) {
        text.push_str(&describe(outcome));
    }
    text
}

/// A case in one line, and what does not hold in further ones.
pub fn describe(outcome: &Outcome) -> String {
    let Outcome { case, phase, reason, seconds, .. } = outcome;
    let verdict = match outcome {
        _ if !outcome.passed() => "FAILED",
        Outcome { declared_loss: true, .. } => "declared loss",
        _ => "ok",
    };
    let why = if reason.is_empty() { String::new() } else { format!(": {}", first_line(reason)) };
    // Writing into a text cannot fail.
    let mut text = format!("{verdict:<6} {seconds:>5.1} s  {case}  -> {phase}{why}\n");
    for problem in &outcome.problems {
        let _ = writeln!(text, "       {problem}");
    }
    if let Some(logs) = &outcome.logs {
        let _ = writeln!(text, "       logs: {}", logs.display());
    }
    text
}

fn first_line(text: &str) -> String {
    let line: String = text.lines().next().unwrap_or_default().chars().take(160).collect();
    if line.len() < text.len() { format!("{line} …") } else { line }
}

#[cfg(test)]
mod tests {
    use podferry_local::faults::Victim;

    use super::*;
    use crate::chaos::case::Fault;

    fn outcome(problems: Vec<Problem>) -> Outcome {
        let fault = Fault::Stall(Victim::Coordinator);
        let case = Case { strategy: Strategy::Live, moment: Moment::PreCopy, fault };
        Outcome { problems, ..Outcome::new(case, &serde_json::json!({ "phase": "failed", "reason": "a\nb" })) }
    }

    #[test]
    fn any_problem_fails_the_whole_and_is_counted_once_a_case() {
        let twice = vec![Problem::TwoCopies("a".to_owned()), Problem::TwoCopies("b".to_owned())];
        let all = [outcome(vec![]), outcome(twice), outcome(vec![Problem::Leaks(vec!["x".to_owned()])])];
        let summary = Summary::of(&all, 7);
        assert_eq!((summary.cases, summary.passed, summary.two_copies, summary.leaks), (3, 1, 1, 1));
        assert!(!summary.holds());
        assert!(Summary::of(&all[..1], 1).holds());
        assert!(!Summary::of(&[], 1).holds(), "nothing was tried");
        let json = serde_json::to_string(&summary).unwrap();
        assert!(
            json.starts_with(
                r#"{"cases":3,"passed":1,"two_copies":1,"no_copy":0,"lost_acknowledged_writes":0,"leaks":1"#
            )
        );
    }

    #[test]
    fn the_table_shows_how_many_passed_and_what_did_not_hold() {
        let text = table(&[outcome(vec![]), outcome(vec![Problem::NoCopy("none".to_owned())])]);
        assert!(
            text.contains("1/2")
                && text.contains("no copy: none")
                && text.contains("live / precopy / stop coordinator")
        );
        assert!(describe(&outcome(vec![])).starts_with("ok"), "{}", describe(&outcome(vec![])));
    }
}
