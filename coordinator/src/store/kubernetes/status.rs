//! What a record looks like in an object's status.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use podferry_common::{Failure, FailureCode};
use podferry_crds::{self as crds, Migration, MigrationStatus};
use podferry_proto::{json, v1};
use serde_json::Value;

use crate::migration::{Decision, Phase, State};
use crate::store::{HistoryEntry, Record};

/// The condition that the coordinator goes about it.
pub(crate) const ACCEPTED: &str = "Accepted";
/// The condition that the target's copy is the right one, for good.
const COMMITTED: &str = "Committed";
/// The condition that the pod runs on the target.
pub(crate) const SUCCEEDED: &str = "Succeeded";
/// The condition that the outcome is known.
pub(crate) const FINISHED: &str = "Finished";

/// The last rounds that are shown.
const MAX_ROUNDS: usize = 32;
/// The last notes that are shown.
const MAX_NOTES: usize = 32;
/// What happened last, as far as it is kept.
pub(super) const MAX_HISTORY: usize = 64;
/// Bytes of a condition's message that the API server takes.
const MAX_MESSAGE: usize = 32_768;

/// A condition that has been found.
pub(crate) struct Judgement {
    /// Which.
    pub(crate) kind: &'static str,
    /// Whether it holds; none when that is not known yet.
    pub(crate) holds: Option<bool>,
    /// A word for machines.
    pub(crate) reason: String,
    /// For a person.
    pub(crate) message: String,
}

/// Sets a condition of an object of that generation. The time of its last change stays as long as it says the same.
pub(crate) fn judge(conditions: &mut Vec<Condition>, generation: Option<i64>, found: Judgement) {
    let status = found.holds.map_or("Unknown", |holds| if holds { "True" } else { "False" });
    let old = conditions.iter().position(|condition| condition.type_ == found.kind);
    let same = old.map(|at| &conditions[at]).filter(|condition| condition.status == status);
    let new = Condition {
        last_transition_time: same
            .map_or_else(|| time(Timestamp::now()), |condition| condition.last_transition_time.clone()),
        message: found.message.chars().take(MAX_MESSAGE / 4).collect(),
        observed_generation: generation,
        reason: found.reason,
        status: status.to_owned(),
        type_: found.kind.to_owned(),
    };
    match old {
        Some(at) => conditions[at] = new,
        None => conditions.push(new),
    }
}

/// The status of an object with that record in it, but for who writes it. `object` is how it was seen last.
pub(super) fn status_of(
    object: &Migration,
    record: &Record,
    history: &[HistoryEntry],
) -> Result<MigrationStatus, serde_json::Error> {
    let wire = record.to_wire();
    let shown = json::Migration::from(&wire);
    let before = object.status.clone().unwrap_or_default();
    let mut conditions = before.conditions;
    for found in judgements(record) {
        judge(&mut conditions, object.metadata.generation, found);
    }
    let settled = record.state.is_settled().then(|| before.completed_at.unwrap_or_else(|| time(Timestamp::now())));
    Ok(MigrationStatus {
        observed_generation: object.metadata.generation,
        conditions,
        id: shown.id,
        phase: shown.phase,
        decision: json::decision(&wire),
        strategy: shown.strategy,
        strategy_reason: shown.strategy_reason,
        source: shown.source,
        target: shown.target,
        reason: shown.reason,
        problem: wire.problem.as_ref().map(problem),
        downtime_ms: shown.downtime_ms,
        total_ms: shown.total_ms,
        wire_bytes: signed(shown.wire_bytes),
        rounds: last(shown.rounds, MAX_ROUNDS).iter().map(round).collect(),
        timings: Some(timings(&shown.timings)),
        progress: wire.progress.as_ref().map(progress),
        keeps_connections: shown.keeps_connections,
        notes: last(shown.notes, MAX_NOTES),
        requested_by: shown.requested_by,
        started_at: Some(time(record.created_at)),
        completed_at: settled,
        history: history.iter().map(happened).collect(),
        record: Some(saturated(serde_json::to_value(record)?)),
        written_by: before.written_by,
    })
}

/// The record in an object, if there is one.
pub(super) fn record_of(object: &Migration) -> Result<Option<Record>, serde_json::Error> {
    let record = object.status.as_ref().and_then(|status| status.record.clone());
    record.map(serde_json::from_value).transpose()
}

/// What happened, as an object has it. A time that cannot be read is left out with what happened then.
pub(super) fn history_of(object: &Migration) -> Vec<HistoryEntry> {
    let all = object.status.iter().flat_map(|status| &status.history);
    all.filter_map(|entry| Some(HistoryEntry { at: entry.at.parse().ok()?, what: entry.what.clone() })).collect()
}

fn judgements(record: &Record) -> [Judgement; 4] {
    let state = &record.state;
    let phase = camel_case(state.phase().as_str());
    let why = state.failure().map(ToString::to_string).unwrap_or_default();
    let way = format!("{} is moved from {} to {}", record.workload, record.source, record.target);
    let (committed, decided) = match state.decision() {
        Decision::Commit => (Some(true), "the target's copy is the right one; nothing is undone any more"),
        Decision::Abort => (Some(false), "the source's copy is the right one"),
        Decision::Undecided => (None, "until the commit everything can be undone"),
    };
    let settled = state.is_settled();
    let succeeded = settled.then(|| *state == State::Completed);
    let (source, target) = (&record.source, &record.target);
    let outcome = match (state.phase(), state.decision()) {
        (Phase::Succeeded, _) => format!("the pod runs on {target}"),
        (_, Decision::Commit) if settled => format!("the pod's memory is lost, and it runs nowhere: {why}"),
        _ if settled => format!("the pod runs on {source}, as before: {why}"),
        _ if why.is_empty() => format!("in the phase {}", state.phase()),
        _ => format!("in the phase {}: {why}", state.phase()),
    };
    let found =
        |kind, holds, reason: &str, message: String| Judgement { kind, holds, reason: reason.to_owned(), message };
    [
        found(ACCEPTED, Some(true), "Accepted", way),
        found(COMMITTED, committed, &phase, decided.to_owned()),
        found(SUCCEEDED, succeeded, &phase, outcome.clone()),
        found(FINISHED, Some(settled), &phase, outcome),
    ]
}

/// `ROLLING_BACK` and `rolling_back` as `RollingBack`: what a condition's reason looks like.
pub(super) fn camel_case(word: &str) -> String {
    let part = |part: &str| {
        let mut letters = part.chars();
        let first = letters.next().map(|letter| letter.to_ascii_uppercase());
        first.into_iter().chain(letters.map(|letter| letter.to_ascii_lowercase())).collect::<String>()
    };
    word.split('_').map(part).collect()
}

/// A refusal as a condition's reason.
pub(crate) fn reason_of(failure: &Failure) -> String {
    camel_case(FailureCode::as_str(failure.code))
}

/// A time in Kubernetes' own type. It has another version of the same library.
pub(crate) fn time(at: Timestamp) -> Time {
    Time(k8s_openapi::jiff::Timestamp::from_second(at.as_second()).unwrap_or_default())
}

fn happened(entry: &HistoryEntry) -> crds::HistoryEntry {
    crds::HistoryEntry { at: entry.at.to_string(), what: entry.what.clone() }
}

pub(super) fn problem(problem: &v1::Problem) -> crds::Problem {
    crds::Problem {
        code: problem.code.clone(),
        node: problem.node.clone(),
        phase: problem.phase.clone(),
        message: problem.message.clone(),
        criu_line: problem.criu_line.clone(),
        remedy: problem.remedy.clone(),
    }
}

fn round(round: &json::Round) -> crds::Round {
    crds::Round {
        pages: signed(round.pages),
        raw_bytes: signed(round.raw_bytes),
        wire_bytes: signed(round.wire_bytes),
        duration_ms: round.duration_ms,
        dirty_rate: round.dirty_rate,
        predicted_ms: round.predicted_ms,
        cpu_limit: round.cpu_limit,
    }
}

fn timings(timings: &json::Timings) -> crds::Timings {
    crds::Timings {
        preflight: timings.preflight,
        prepare: timings.prepare,
        precopy: timings.precopy,
        freeze: timings.freeze,
        dump: timings.dump,
        transfer: timings.transfer,
        restore: timings.restore,
        commit: timings.commit,
        resume: timings.resume,
        fill: timings.fill,
    }
}

fn progress(progress: &v1::TransferProgress) -> crds::Progress {
    crds::Progress {
        raw_bytes: signed(progress.raw_bytes),
        wire_bytes: signed(progress.wire_bytes),
        expected_bytes: signed(progress.expected_bytes),
    }
}

fn last<T>(mut all: Vec<T>, most: usize) -> Vec<T> {
    all.split_off(all.len().saturating_sub(most))
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// Whole numbers that the API server would keep as floats, and hand out as none that can be read, become the largest that it keeps.
pub(super) fn saturated(value: Value) -> Value {
    match value {
        Value::Number(number) if number.is_u64() && number.as_i64().is_none() => i64::MAX.into(),
        Value::Array(all) => all.into_iter().map(saturated).collect(),
        Value::Object(all) => all.into_iter().map(|(key, value)| (key, saturated(value))).collect(),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    fn conditions(status: &MigrationStatus) -> Vec<String> {
        let all = status.conditions.iter();
        all.map(|condition| {
            format!("{}={} {}: {}", condition.type_, condition.status, condition.reason, condition.message)
        })
        .collect()
    }

    #[test]
    fn a_record_is_read_back_from_the_status_it_was_written_to() {
        let mut record = testing::record("shop/cart-0", "a", "b");
        (record.bandwidth_limit, record.report.wire_bytes, record.report.downtime_ms) =
            (u64::MAX, u64::MAX, 1e300 / 3.0);
        let history = [HistoryEntry { at: Timestamp::now(), what: "accepted".to_owned() }];
        let mut object = Migration::default();
        object.status = Some(status_of(&object, &record, &history).unwrap());
        let text = serde_json::to_string(&object).unwrap();
        let read: Migration = serde_json::from_str(&text).unwrap();
        let most = u64::try_from(i64::MAX).unwrap();
        (record.bandwidth_limit, record.report.wire_bytes) = (most, most);
        assert_eq!((record_of(&read).unwrap(), history_of(&read)), (Some(record), history.to_vec()));
    }

    #[test]
    fn conditions_say_what_was_decided_and_what_came_of_it() {
        let mut record = testing::record("shop/cart-0", "a", "b");
        let failure = Failure::new(FailureCode::FailedPrecondition, "no room").on("b").remedy("make some");
        let mut object = Migration::default();
        let mut said = Vec::new();
        for state in [State::new(), State::Releasing, State::Completed, State::Aborted { why: failure.into() }] {
            record.state = state;
            let status = status_of(&object, &record, &[]).unwrap();
            said.extend(conditions(&status));
            object.status = Some(status);
        }
        insta::assert_snapshot!(said.join("\n"), @"
        Accepted=True Accepted: shop/cart-0 is moved from a to b
        Committed=Unknown Preflight: until the commit everything can be undone
        Succeeded=Unknown Preflight: in the phase preflight
        Finished=False Preflight: in the phase preflight
        Accepted=True Accepted: shop/cart-0 is moved from a to b
        Committed=True Release: the target's copy is the right one; nothing is undone any more
        Succeeded=Unknown Release: in the phase release
        Finished=False Release: in the phase release
        Accepted=True Accepted: shop/cart-0 is moved from a to b
        Committed=True Succeeded: the target's copy is the right one; nothing is undone any more
        Succeeded=True Succeeded: the pod runs on b
        Finished=True Succeeded: the pod runs on b
        Accepted=True Accepted: shop/cart-0 is moved from a to b
        Committed=False Failed: the source's copy is the right one
        Succeeded=False Failed: the pod runs on a, as before: no room (on b); what to do: make some
        Finished=True Failed: the pod runs on a, as before: no room (on b); what to do: make some
        ");
    }

    #[test]
    fn the_time_of_a_condition_is_that_of_its_last_change() {
        let found =
            |holds, message: &str| Judgement { kind: ACCEPTED, holds, reason: "X".into(), message: message.into() };
        let mut all = Vec::new();
        judge(&mut all, Some(1), found(None, "first"));
        let long_ago = time(Timestamp::UNIX_EPOCH);
        all[0].last_transition_time = long_ago.clone();
        judge(&mut all, Some(2), found(None, "second"));
        assert_eq!((all.len(), &all[0].last_transition_time, all[0].message.as_str()), (1, &long_ago, "second"));
        judge(&mut all, Some(2), found(Some(true), "third"));
        assert!(all[0].last_transition_time != long_ago);
    }

    #[test]
    fn reasons_are_words_that_kubernetes_takes() {
        assert_eq!(
            (camel_case("rolling_back"), camel_case("FAILED_PRECONDITION")),
            ("RollingBack".into(), "FailedPrecondition".into())
        );
    }
}
