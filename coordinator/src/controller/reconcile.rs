//! What an object asks for now.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use kube::runtime::controller::Action;
use kube::runtime::reflector::ObjectRef;
use kube::{Api, Resource, ResourceExt as _};
use podferry_common::{Failure, FailureCode, MigrationId};
use podferry_crds::{FINALIZER, ID_ANNOTATION, Migration, MigrationStatus};
use podferry_proto::v1;
use serde::de::DeserializeOwned;
use serde_json::json;

use super::{Controller, ControllerError};
use crate::access::{Action as Asked, Verb};
use crate::api::{Bounds, may_pass};
use crate::pods::policy::{PolicyError, policies_of, request_of};
use crate::store::{ACCEPTED, FINISHED, Judgement, Objects, Record, SUCCEEDED, judge, reason_of, time, workload_of};

/// When a migration that cannot begin yet is tried again, if nothing is heard of before.
pub(super) const LATER: Duration = Duration::from_secs(10);
/// The phase of one that never began.
pub(super) const REFUSED: &str = "refused";
/// The phase of one that waits to begin.
pub(super) const PENDING: &str = "pending";

impl Controller {
    /// Does what an object asks for, as far as it is not done.
    pub(super) async fn reconcile(self: Arc<Self>, object: Arc<Migration>) -> Result<Action, ControllerError> {
        let uid = object.uid().unwrap_or_default();
        match self.objects.of_object(&uid) {
            Some(record) => self.go_on(&object, &record).await,
            // It is as it was seen long ago: what has a record is forgotten only at its end.
            None if has_record(&object) && !Objects::is_at_its_end(&object) => Ok(Action::requeue(LATER)),
            None if object.metadata.deletion_timestamp.is_some() => self.let_go(&object).await,
            // It was refused; or it has ended so long ago that it is forgotten.
            None if phase(&object) == REFUSED || has_record(&object) => self.after_the_end(&object).await,
            None => self.begin(&object).await,
        }
    }

    /// A migration that has a record.
    async fn go_on(self: &Arc<Self>, object: &Migration, record: &Record) -> Result<Action, ControllerError> {
        if record.state.is_final() || Objects::is_at_its_end(object) {
            // Who goes on with its pod after a restart needs the record.
            let namespace = object.namespace().unwrap_or_default();
            if has_finalizer(object) && self.has_pod_left(&namespace, record.id).await? {
                return Ok(Action::requeue(LATER));
            }
            return self.after_the_end(object).await;
        }
        self.follow(object, record.id);
        let unwanted = object.spec.cancel || object.metadata.deletion_timestamp.is_some();
        if unwanted && record.state.can_be_cancelled() {
            self.cancel(object, record).await?;
        }
        // Its next state changes the object.
        Ok(Action::await_change())
    }

    /// Whether something is still to be done with the pod that came of a migration.
    async fn has_pod_left(&self, namespace: &str, id: MigrationId) -> Result<bool, ControllerError> {
        match self.runner.pods() {
            Some(pods) => pods.has_marked(namespace, id).await.map_err(failed("list the pods")),
            None => Ok(false),
        }
    }

    async fn cancel(&self, object: &Migration, record: &Record) -> Result<(), ControllerError> {
        let id = record.id.to_string();
        let asked = Asked::on_migration(Verb::CancelMigration, &id);
        let cancelled = match self.current.admit_peer(Some(&self.peer), &asked).await {
            Ok(core) => core.cancel(&id, &self.peer).await,
            Err(failure) => Err(failure),
        };
        match cancelled {
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

    /// An object that nobody needs any more stays only as long as it is to.
    async fn after_the_end(&self, object: &Migration) -> Result<Action, ControllerError> {
        if has_finalizer(object) {
            return self.let_go(object).await;
        }
        let ended = object.status.as_ref().and_then(|status| status.completed_at.as_ref());
        delete_when_due(&self.api(object), object, object.spec.ttl_seconds_after_finished, ended).await
    }

    /// Takes the finalizer away.
    async fn let_go(&self, object: &Migration) -> Result<Action, ControllerError> {
        if has_finalizer(object) {
            let others: Vec<_> = object.finalizers().iter().filter(|finalizer| *finalizer != FINALIZER).collect();
            match self.change(object, json!({ "finalizers": others })).await {
                Ok(_) => {}
                Err(kube::Error::Api(status)) if status.is_not_found() => {}
                Err(error) => return Err(failed("let a Migration go")(error)),
            }
        }
        Ok(Action::await_change())
    }

    /// Changes an object's metadata, if it is still as it was seen.
    async fn change(&self, object: &Migration, metadata: serde_json::Value) -> Result<Migration, kube::Error> {
        change(&self.api(object), object, metadata).await
    }

    /// A request.
    async fn begin(self: &Arc<Self>, object: &Migration) -> Result<Action, ControllerError> {
        if let Some(id) = object.annotations().get(ID_ANNOTATION) {
            return self.is_no_request(object, id).await;
        }
        if object.spec.cancel {
            let failure = Failure::new(FailureCode::Aborted, "it was cancelled before it began");
            return self.refuse(object, &failure).await;
        }
        let mut kept = object.clone();
        if !has_finalizer(object) {
            let all: Vec<_> = object.finalizers().iter().map(String::as_str).chain([FINALIZER]).collect();
            let changed = self.change(object, json!({ "finalizers": all })).await;
            kept = changed.map_err(failed("keep a Migration until its end"))?;
        }
        self.forget_what_is_gone();
        let id = MigrationId::new();
        let begun = match self.request(&kept).await? {
            Ok(request) => self.migrate(id, kept.clone(), &request).await,
            Err(failure) => Err(failure),
        };
        match begun {
            Ok(record) => {
                self.follow_from_the_start(&kept, record);
                Ok(Action::await_change())
            }
            Err(failure) if may_pass(&failure) => self.wait(&kept, &failure).await,
            Err(failure) => self.refuse(&kept, &failure).await,
        }
    }

    async fn migrate(
        &self,
        id: MigrationId,
        object: Migration,
        request: &v1::MigrateRequest,
    ) -> Result<Record, Failure> {
        let asked = Asked::migrate(&request.workload, &request.target);
        let core = self.current.admit_peer(Some(&self.peer), &asked).await?;
        self.objects.claim(id, object);
        let begun =
            core.migrate_again(id, request, &self.peer, Bounds { by_policies: true, ..Bounds::default() }).await;
        if begun.is_err() {
            self.objects.unclaim(id);
        }
        begun
    }

    /// What the object asks for, by itself and by its pod's policies.
    async fn request(&self, object: &Migration) -> Result<Result<v1::MigrateRequest, Failure>, ControllerError> {
        let (namespace, pod) = (object.namespace().unwrap_or_default(), &object.spec.pod_name);
        match policies_of(&self.client, &namespace, pod).await {
            Ok(policies) => Ok(request_of(workload_of(&namespace, pod), &object.spec, &policies)),
            Err(PolicyError::Api { action, source }) => Err(failed(action)(source)),
            Err(error @ PolicyError::Selector { .. }) => Ok(Err(error.failure())),
        }
    }

    /// An object that the coordinator has made itself gets its record in a moment, or its coordinator was stopped before that.
    async fn is_no_request(&self, object: &Migration, id: &str) -> Result<Action, ControllerError> {
        if id.parse().is_ok_and(|id| self.objects.owner(id).is_some()) {
            return Ok(Action::requeue(LATER));
        }
        let message = "the coordinator was stopped before the migration was recorded";
        let failure = Failure::new(FailureCode::Aborted, message).remedy("ask for it again");
        self.refuse(object, &failure).await
    }

    /// Says that it will never begin.
    async fn refuse(&self, object: &Migration, failure: &Failure) -> Result<Action, ControllerError> {
        let mut status = said(object, REFUSED, failure);
        let generation = object.metadata.generation;
        let (reason, message) = ("Refused".to_owned(), failure.to_string());
        for (kind, holds) in [(ACCEPTED, false), (SUCCEEDED, false), (FINISHED, true)] {
            let reason = if kind == ACCEPTED { reason_of(failure) } else { reason.clone() };
            judge(
                &mut status.conditions,
                generation,
                Judgement { kind, holds: Some(holds), reason, message: message.clone() },
            );
        }
        status.completed_at = Some(time(Timestamp::now()));
        let object = self.objects.mark(object.clone(), status).await?;
        self.events.refused(&object, "Refused", failure).await;
        Ok(Action::await_change())
    }

    /// Says why it does not begin yet. It is told once as long as it is the same.
    async fn wait(&self, object: &Migration, failure: &Failure) -> Result<Action, ControllerError> {
        let status = object.status.as_ref();
        if status.is_none_or(|status| status.phase != PENDING || status.reason != failure.to_string()) {
            let mut status = said(object, PENDING, failure);
            let (kind, reason, message) = (ACCEPTED, reason_of(failure), failure.to_string());
            judge(&mut status.conditions, object.metadata.generation, Judgement { kind, holds: None, reason, message });
            let object = self.objects.mark(object.clone(), status).await?;
            self.events.refused(&object, "Waiting", failure).await;
        }
        Ok(Action::requeue(LATER))
    }

    /// Migrations that have ended and whose objects are deleted are not listed any more.
    fn forget_what_is_gone(&self) {
        let seen = |namespace: &str, name: &str| self.seen.get(&ObjectRef::new(name).within(namespace)).is_some();
        self.objects.forget_all_but(|owner| seen(&owner.namespace, &owner.name));
    }

    fn api(&self, object: &Migration) -> Api<Migration> {
        Api::namespaced(self.client.clone(), &object.namespace().unwrap_or_default())
    }
}

/// Changes an object's metadata, if it is still as it was seen.
pub(super) async fn change<K>(api: &Api<K>, object: &K, mut metadata: serde_json::Value) -> Result<K, kube::Error>
where
    K: Resource + Clone + Debug + DeserializeOwned,
{
    metadata["resourceVersion"] = object.resource_version().into();
    let patch = Patch::Merge(json!({ "metadata": metadata }));
    api.patch(&object.name_any(), &PatchParams::default(), &patch).await
}

pub(super) fn failed(action: &'static str) -> impl Fn(kube::Error) -> ControllerError {
    move |source| ControllerError::Api { action, source: Box::new(source) }
}

fn phase(object: &Migration) -> &str {
    object.status.as_ref().map_or("", |status| status.phase.as_str())
}

fn has_record(object: &Migration) -> bool {
    object.status.as_ref().is_some_and(|status| status.record.is_some())
}

fn has_finalizer(object: &Migration) -> bool {
    object.finalizers().iter().any(|finalizer| finalizer == FINALIZER)
}

/// Deletes an object that has ended so many seconds ago; looks again when there is time left.
pub(super) async fn delete_when_due<K>(
    api: &Api<K>,
    object: &K,
    ttl: Option<i32>,
    ended: Option<&Time>,
) -> Result<Action, ControllerError>
where
    K: Resource + Clone + Debug + DeserializeOwned,
{
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

/// When what has ended is to be deleted; none when it stays, or has not ended.
fn due(ttl: Option<i32>, ended: Option<&Time>) -> Option<Timestamp> {
    Timestamp::from_second(ended?.0.as_second().saturating_add(ttl?.into())).ok()
}

/// A failure, in parts.
pub(super) fn problem(failure: &Failure) -> podferry_crds::Problem {
    podferry_crds::Problem {
        code: failure.code.to_string(),
        node: failure.node.clone().unwrap_or_default(),
        phase: failure.phase.clone().unwrap_or_default(),
        message: failure.message.clone(),
        criu_line: failure.criu_line.clone().unwrap_or_default(),
        remedy: failure.remedy.clone().unwrap_or_default(),
    }
}

/// The status of an object that has no migration, with the reason why.
fn said(object: &Migration, phase: &str, failure: &Failure) -> MigrationStatus {
    MigrationStatus {
        observed_generation: object.metadata.generation,
        phase: phase.to_owned(),
        reason: failure.to_string(),
        problem: Some(problem(failure)),
        ..object.status.clone().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ended_migration_is_due_when_its_time_has_passed() {
        assert_eq!(due(Some(60), None), None, "it has not ended");
        let ended = time(Timestamp::from_second(1_000_000).unwrap());
        assert_eq!(due(Some(60), Some(&ended)), Timestamp::from_second(1_000_060).ok());
        assert_eq!(due(None, Some(&ended)), None, "it stays");
    }

    #[test]
    fn what_may_pass_waits_and_what_makes_no_sense_does_not() {
        let waits = |code| may_pass(&Failure::new(code, "no"));
        assert!(waits(FailureCode::Unavailable) && waits(FailureCode::ResourceExhausted));
        assert!(!waits(FailureCode::InvalidArgument) && !waits(FailureCode::PermissionDenied));
    }
}
