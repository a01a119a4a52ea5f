//! What is done with objects of either kind that ask for something.

use std::fmt::Debug;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use kube::runtime::controller::Action;
use kube::{Api, Resource, ResourceExt as _};
use podferry_common::{Failure, FailureCode};
use podferry_crds::Problem;
use serde::de::DeserializeOwned;
use serde_json::json;

use super::{Controller, ControllerError};
use crate::store::{ACCEPTED, FINISHED, Judgement, judge, reason_of};

/// When what cannot begin yet is tried again, if nothing is heard of before.
pub(super) const LATER: Duration = Duration::from_secs(10);
/// The phase of one that never began.
pub(super) const REFUSED: &str = "refused";
/// The phase of one that waits to begin.
pub(super) const PENDING: &str = "pending";

/// Keeps an object that is deleted until its finalizer is taken away; gives it as it is then.
pub(super) async fn keep<K>(api: &Api<K>, object: &K, finalizer: &str) -> Result<K, ControllerError>
where
    K: Resource + Clone + Debug + DeserializeOwned,
{
    if has(object, finalizer) {
        return Ok(object.clone());
    }
    let all: Vec<_> = object.finalizers().iter().map(String::as_str).chain([finalizer]).collect();
    change(api, object, &all).await.map_err(failed("keep an object until its end"))
}

/// Takes the finalizer away.
async fn let_go<K>(api: &Api<K>, object: &K, finalizer: &str) -> Result<Action, ControllerError>
where
    K: Resource + Clone + Debug + DeserializeOwned,
{
    if has(object, finalizer) {
        let others: Vec<_> = object.finalizers().iter().map(String::as_str).filter(|name| *name != finalizer).collect();
        match change(api, object, &others).await {
            Ok(_) => {}
            Err(kube::Error::Api(status)) if status.is_not_found() => {}
            Err(error) => return Err(failed("let an object go")(error)),
        }
    }
    Ok(Action::await_change())
}

/// An object that nobody needs any more stays only as long as it is to: `ttl` seconds behind its end, when there is such.
pub(super) async fn after_the_end<K>(
    api: &Api<K>,
    object: &K,
    finalizer: &str,
    ttl: Option<i32>,
    ended: Option<&Time>,
) -> Result<Action, ControllerError>
where
    K: Resource + Clone + Debug + DeserializeOwned,
{
    if has(object, finalizer) {
        return let_go(api, object, finalizer).await;
    }
    let due = due(ttl, ended).filter(|_| object.meta().deletion_timestamp.is_none());
    let Some(due) = due else { return Ok(Action::await_change()) };
    let left = due.duration_since(Timestamp::now());
    if left.is_positive() {
        return Ok(Action::requeue(left.unsigned_abs()));
    }
    let preconditions = Preconditions { uid: object.uid(), resource_version: None };
    let parameters = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() };
    match api.delete(&object.name_any(), &parameters).await {
        Ok(_) => Ok(Action::await_change()),
        Err(kube::Error::Api(status)) if status.is_not_found() || status.code == 409 => Ok(Action::await_change()),
        Err(error) => Err(failed("delete an object that has ended")(error)),
    }
}

/// Sets an object's finalizers, if it is still as it was seen.
async fn change<K>(api: &Api<K>, object: &K, finalizers: &[&str]) -> Result<K, kube::Error>
where
    K: Resource + Clone + Debug + DeserializeOwned,
{
    let metadata = json!({ "finalizers": finalizers, "resourceVersion": object.resource_version() });
    let patch = Patch::Merge(json!({ "metadata": metadata }));
    api.patch(&object.name_any(), &PatchParams::default(), &patch).await
}

pub(super) fn has(object: &impl Resource, finalizer: &str) -> bool {
    object.finalizers().iter().any(|name| name == finalizer)
}

/// When what has ended is to be deleted; none when it stays, or has not ended.
fn due(ttl: Option<i32>, ended: Option<&Time>) -> Option<Timestamp> {
    Timestamp::from_second(ended?.0.as_second().saturating_add(ttl?.into())).ok()
}

pub(super) fn failed(action: &'static str) -> impl Fn(kube::Error) -> ControllerError {
    move |source| ControllerError::Api { action, source: Box::new(source) }
}

impl Controller {
    /// What came of a cancel that an object asks for.
    pub(super) async fn cancelled<T>(
        &self,
        object: &impl Resource<DynamicType = ()>,
        answer: Result<T, Failure>,
    ) -> Result<(), ControllerError> {
        match answer {
            Ok(_) => Ok(()),
            // It was committed, or has ended, meanwhile.
            Err(failure) if failure.code == FailureCode::FailedPrecondition => Ok(()),
            // The access policy forbids it, and goes on to.
            Err(failure) if failure.code == FailureCode::PermissionDenied => {
                self.events.refused(object, "NotCancelled", &failure).await;
                Ok(())
            }
            Err(failure) => Err(ControllerError::NotCancelled(failure)),
        }
    }
}

/// That it was cancelled before it began.
pub(super) fn cancelled_early() -> Failure {
    Failure::new(FailureCode::Aborted, "it was cancelled before it began")
}

/// That an object which the coordinator has made itself has no record.
pub(super) fn never_recorded() -> Failure {
    Failure::new(FailureCode::Aborted, "the coordinator was stopped before this was recorded")
        .remedy("ask for it again")
}

/// The conditions of what is refused for good; `outcome` is the one that says whether it has succeeded, where there is such.
pub(super) fn judge_refused(
    conditions: &mut Vec<Condition>,
    generation: Option<i64>,
    failure: &Failure,
    outcome: Option<&'static str>,
) {
    let refused = |kind, holds| (kind, holds, "Refused".to_owned());
    let all = [(ACCEPTED, false, reason_of(failure)), refused(FINISHED, true)];
    for (kind, holds, reason) in all.into_iter().chain(outcome.map(|kind| refused(kind, false))) {
        let found = Judgement { kind, holds: Some(holds), reason, message: failure.to_string() };
        judge(conditions, generation, found);
    }
}

/// The condition of what does not begin yet.
pub(super) fn judge_waiting(conditions: &mut Vec<Condition>, generation: Option<i64>, failure: &Failure) {
    let (reason, message) = (reason_of(failure), failure.to_string());
    judge(conditions, generation, Judgement { kind: ACCEPTED, holds: None, reason, message });
}

/// A failure, in parts.
pub(super) fn problem(failure: &Failure) -> Problem {
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    Problem {
        code: failure.code.to_string(),
        node: text(&failure.node),
        phase: text(&failure.phase),
        message: failure.message.clone(),
        criu_line: text(&failure.criu_line),
        remedy: text(&failure.remedy),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::time;

    #[test]
    fn what_has_ended_is_due_when_its_time_has_passed() {
        assert_eq!(due(Some(60), None), None, "it has not ended");
        let ended = time(Timestamp::from_second(1_000_000).unwrap());
        assert_eq!(due(Some(60), Some(&ended)), Timestamp::from_second(1_000_060).ok());
        assert_eq!(due(None, Some(&ended)), None, "it stays");
    }

    #[test]
    fn what_is_refused_has_ended_and_what_waits_has_not() {
        let failure = Failure::new(FailureCode::NotFound, "no such node");
        let said = |conditions: &[Condition]| {
            let all = conditions.iter().map(|found| format!("{} {} {}", found.type_, found.status, found.reason));
            all.collect::<Vec<_>>().join(", ")
        };
        let mut conditions = Vec::new();
        judge_waiting(&mut conditions, Some(1), &failure);
        assert_eq!(said(&conditions), "Accepted Unknown NotFound");
        judge_refused(&mut conditions, Some(1), &failure, Some("Succeeded"));
        assert_eq!(said(&conditions), "Accepted False NotFound, Finished True Refused, Succeeded False Refused");
    }
}
