//! What stands in the audit log: one JSON object a line.

use jiff::Timestamp;
use podferry_common::identity::Peer;
use podferry_common::{Failure, MigrationId, NodeName, WorkloadName};
use serde::Serialize;

use crate::access::{Action, Denial, Grounds};
use crate::migration::{Decision, Phase, State};
use crate::store::Record;

/// Characters of a name that a request may have said; no valid one is longer. What is longer is cut.
const MAX_NAME: usize = 64;
/// The same of a workload, which may be a pod with its namespace.
const MAX_WORKLOAD: usize = 317;
/// Characters of a reason.
const MAX_REASON: usize = 1024;

/// A line of the log.
#[derive(Debug, Serialize)]
pub(super) struct Line<'a> {
    /// RFC 3339, UTC.
    pub(super) at: Timestamp,
    #[serde(flatten)]
    pub(super) entry: &'a Entry<'a>,
}

/// What happened.
#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(super) enum Entry<'a> {
    /// Somebody asked for something.
    Request(RequestEntry<'a>),
    /// A migration was decided about.
    Migration(MigrationEntry<'a>),
}

/// Somebody asked for something.
#[derive(Debug, Serialize)]
pub(super) struct RequestEntry<'a> {
    /// The name in the certificate; `null` without one.
    peer: Option<String>,
    action: &'static str,
    allowed: bool,
    /// The grant, or what is missing.
    why: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    workload: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    source: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    target: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    migration: Option<&'a str>,
}

impl<'a> RequestEntry<'a> {
    pub(super) fn new(peer: Option<&Peer>, action: &Action<'a>, decided: &Result<Grounds, Denial>) -> Self {
        let name = |text: Option<&str>| text.map(|text| cut(text, MAX_NAME));
        Self {
            peer: peer.map(Peer::dns_name),
            action: action.verb.as_str(),
            allowed: decided.is_ok(),
            why: match decided {
                Ok(grounds) => grounds.to_string(),
                Err(denial) => denial.why.clone(),
            },
            workload: action.workload.map(|text| cut(text, MAX_WORKLOAD)),
            source: name(action.source),
            target: name(action.target),
            // An id that is none is not worth keeping.
            migration: action.migration.filter(|id| id.parse::<MigrationId>().is_ok()),
        }
    }
}

/// What became of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum What {
    /// It is recorded, and begins.
    Accepted,
    /// It was not begun: the state of nodes, workload or coordinator does not allow it.
    Refused,
    /// The coordinator was started again, and goes on with it.
    TakenUp,
    /// Decided for: the target's copy is the right one.
    Committed,
    /// Decided against: both parts are being undone.
    RollingBack,
    /// The workload runs on the target.
    Succeeded,
    /// It failed and is undone: the workload runs on the source.
    RolledBack,
    /// It is undone because somebody asked for it: the workload runs on the source.
    Cancelled,
    /// It failed behind its commit: the workload is lost.
    Failed,
}

impl What {
    /// What a step from `before` to `after` decides, if anything.
    pub fn of(before: &State, after: &State) -> Option<Self> {
        if after.is_settled() && !before.is_settled() {
            return Some(match (after.phase(), after.decision()) {
                (Phase::Succeeded, _) => Self::Succeeded,
                (Phase::Cancelled, _) => Self::Cancelled,
                (_, Decision::Commit) => Self::Failed,
                (_, Decision::Abort | Decision::Undecided) => Self::RolledBack,
            });
        }
        match (before.decision(), after.decision()) {
            (Decision::Undecided, Decision::Commit) => Some(Self::Committed),
            (Decision::Undecided, Decision::Abort) => Some(Self::RollingBack),
            _ => None,
        }
    }
}

/// A migration was decided about.
#[derive(Debug, Serialize)]
pub(super) struct MigrationEntry<'a> {
    what: What,
    #[serde(skip_serializing_if = "Option::is_none")]
    migration: Option<MigrationId>,
    workload: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    source: Option<&'a NodeName>,
    #[serde(skip_serializing_if = "Option::is_none")]
    target: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    strategy: Option<&'static str>,
    /// The name in the certificate of who asked for the migration; `null` when that is not known.
    requested_by: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    phase: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

impl<'a> MigrationEntry<'a> {
    pub(super) fn of(what: What, record: &'a Record) -> Self {
        let Record { workload, source, target, requested_by, state, .. } = record;
        Self {
            what,
            migration: Some(record.id),
            workload: WorkloadName::to_string(workload),
            source: Some(source),
            target: Some(target.to_string()),
            strategy: Some(record.strategy_word()),
            requested_by: requested_by.as_ref().map(Peer::dns_name),
            phase: Some(state.phase().as_str()),
            reason: state.failure().map(reason),
        }
    }

    pub(super) fn refused(workload: &str, target: &str, who: &Peer, why: &Failure) -> Self {
        Self {
            what: What::Refused,
            migration: None,
            workload: cut(workload, MAX_WORKLOAD),
            source: None,
            target: (!target.is_empty()).then(|| cut(target, MAX_NAME)),
            strategy: None,
            requested_by: Some(who.dns_name()),
            phase: None,
            reason: Some(reason(why)),
        }
    }
}

fn reason(failure: &Failure) -> String {
    cut(&format!("{}: {failure}", failure.code), MAX_REASON)
}

fn cut(text: &str, characters: usize) -> String {
    text.chars().take(characters).collect()
}

#[cfg(test)]
mod tests {
    use podferry_common::FailureCode;

    use super::*;
    use crate::access::Verb;
    use crate::migration::{PartAbort, SourceAbort, Why};

    #[test]
    fn each_decision_is_told_once() {
        let failure = Failure::new(FailureCode::Aborted, "x");
        let why = |cancelled| Why { failure: failure.clone(), cancelled };
        let aborting = State::Aborting { target: PartAbort::Asked, source: SourceAbort::Due, why: why(false) };
        let sealing = State::Sealing { source: true, target: true };
        let steps = [
            (State::new(), State::Preparing, None),
            (sealing.clone(), State::Releasing, Some(What::Committed)),
            (sealing, State::Resuming, Some(What::Committed)),
            (State::Releasing, State::Resuming, None),
            (State::Resuming, State::Completed, Some(What::Succeeded)),
            (State::Preparing, aborting.clone(), Some(What::RollingBack)),
            (aborting.clone(), State::RolledBack { why: why(false) }, Some(What::RolledBack)),
            (State::RolledBack { why: why(false) }, State::Aborted { why: why(false) }, None),
            (aborting, State::Aborted { why: why(true) }, Some(What::Cancelled)),
            (State::new(), State::Aborted { why: why(false) }, Some(What::RolledBack)),
            (State::Filling, State::Losing { why: why(false) }, Some(What::Failed)),
            (State::Losing { why: why(false) }, State::Lost { why: why(false) }, None),
            (State::Completed, State::Completed, None),
        ];
        for (before, after, what) in steps {
            assert_eq!(What::of(&before, &after), what, "{before:?} -> {after:?}");
        }
    }

    #[test]
    fn what_a_request_says_is_bounded_and_stays_on_its_line() {
        let huge = "\n\"".repeat(1 << 20);
        let action = Action { source: Some(&huge), migration: Some(&huge), ..Action::migrate(&huge, &huge) };
        let denied = Denial { what: String::new(), why: "because".to_owned(), remedy: String::new() };
        let entry = Entry::Request(RequestEntry::new(None, &action, &Err(denied)));
        let line = serde_json::to_string(&Line { at: Timestamp::now(), entry: &entry }).unwrap();
        assert!(line.len() < 1500 && !line.contains('\n'), "{} bytes", line.len());
        let failure = Failure::new(FailureCode::NotFound, &huge);
        let entry = Entry::Migration(MigrationEntry::refused(&huge, &huge, &Peer::Coordinator, &failure));
        let line = serde_json::to_string(&Line { at: Timestamp::now(), entry: &entry }).unwrap();
        assert!(line.len() < 4000 && !line.contains('\n'), "{} bytes", line.len());
    }

    #[test]
    fn lines_have_the_documented_shape() {
        let at = Timestamp::UNIX_EPOCH;
        let ada = Peer::client("ada").unwrap();
        let allowed = Ok(Grounds::NoPolicy);
        let action = Action { migration: Some("0123"), ..Action::migrate("shop", "b") };
        let request = Entry::Request(RequestEntry::new(Some(&ada), &action, &allowed));
        let looked = Entry::Request(RequestEntry::new(None, &Action::new(Verb::ListNodes), &allowed));
        let mut record = crate::testing::record("shop", "a", "b");
        record.id = "01890000000070008000000000000000".parse().unwrap();
        record.requested_by = Some(ada.clone());
        let accepted = Entry::Migration(MigrationEntry::of(What::Accepted, &record));
        let failure = Failure::new(FailureCode::Aborted, "cancelled by client ada");
        let why = Why { failure: failure.clone(), cancelled: true };
        let ended = Record { state: State::Aborted { why }, ..record.clone() };
        let cancelled = Entry::Migration(MigrationEntry::of(What::Cancelled, &ended));
        let open = Record { auto: Some(crate::strategy::Auto::default()), ..record.clone() };
        let to_be_chosen = Entry::Migration(MigrationEntry::of(What::Accepted, &open));
        let refused = Entry::Migration(MigrationEntry::refused("shop", "", &ada, &failure));
        let lines = [request, looked, accepted, cancelled, to_be_chosen, refused]
            .map(|entry| serde_json::to_string(&Line { at, entry: &entry }).unwrap());
        insta::assert_snapshot!(lines.join("\n"), @r#"
        {"at":"1970-01-01T00:00:00Z","event":"request","peer":"ada.client.podferry.internal","action":"migrate","allowed":true,"why":"there is no access policy","workload":"shop","target":"b"}
        {"at":"1970-01-01T00:00:00Z","event":"request","peer":null,"action":"list_nodes","allowed":true,"why":"there is no access policy"}
        {"at":"1970-01-01T00:00:00Z","event":"migration","what":"accepted","migration":"01890000000070008000000000000000","workload":"shop","source":"a","target":"b","strategy":"warm","requested_by":"ada.client.podferry.internal","phase":"preflight"}
        {"at":"1970-01-01T00:00:00Z","event":"migration","what":"cancelled","migration":"01890000000070008000000000000000","workload":"shop","source":"a","target":"b","strategy":"warm","requested_by":"ada.client.podferry.internal","phase":"cancelled","reason":"ABORTED: cancelled by client ada"}
        {"at":"1970-01-01T00:00:00Z","event":"migration","what":"accepted","migration":"01890000000070008000000000000000","workload":"shop","source":"a","target":"b","strategy":"auto","requested_by":"ada.client.podferry.internal","phase":"preflight"}
        {"at":"1970-01-01T00:00:00Z","event":"migration","what":"refused","workload":"shop","requested_by":"ada.client.podferry.internal","reason":"ABORTED: cancelled by client ada"}
        "#);
    }
}
