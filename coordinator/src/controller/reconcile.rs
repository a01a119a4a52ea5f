//! What an object asks for now.

use std::sync::Arc;

use jiff::Timestamp;
use kube::runtime::controller::Action;
use kube::runtime::reflector::ObjectRef;
use kube::{Api, ResourceExt as _};
use podferry_common::{Failure, MigrationId};
use podferry_crds::{FINALIZER, ID_ANNOTATION, Migration, MigrationStatus};
use podferry_proto::v1;

use super::objects::{
    LATER, PENDING, REFUSED, after_the_end, cancelled_early, failed, has, judge_refused, judge_waiting, keep,
    never_recorded, problem,
};
use super::{Controller, ControllerError};
use crate::access::{Action as Asked, Verb};
use crate::api::{Bounds, may_pass};
use crate::pods::policy::{PolicyError, policies_of, request_of};
use crate::store::{Objects, Record, SUCCEEDED, time, workload_of};

impl Controller {
    /// Does what an object asks for, as far as it is not done.
    pub(super) async fn reconcile(self: Arc<Self>, object: Arc<Migration>) -> Result<Action, ControllerError> {
        let uid = object.uid().unwrap_or_default();
        match self.objects.of_object(&uid) {
            Some(record) => self.go_on(&object, &record).await,
            // It is as it was seen long ago: what has a record is forgotten only at its end.
            None if has_record(&object) && !Objects::is_at_its_end(&object) => Ok(Action::requeue(LATER)),
            // Nobody wants it; it was refused; or it has ended so long ago that it is forgotten.
            None if is_deleted(&object) || phase(&object) == REFUSED || has_record(&object) => {
                self.after_the_end(&object).await
            }
            None => self.begin(&object).await,
        }
    }

    /// A migration that has a record.
    async fn go_on(self: &Arc<Self>, object: &Migration, record: &Record) -> Result<Action, ControllerError> {
        if record.state.is_final() || Objects::is_at_its_end(object) {
            // Who goes on with its pod after a restart needs the record.
            let namespace = object.namespace().unwrap_or_default();
            if has(object, FINALIZER) && self.has_pod_left(&namespace, record.id).await? {
                return Ok(Action::requeue(LATER));
            }
            return self.after_the_end(object).await;
        }
        self.follow(object, record.id);
        let unwanted = object.spec.cancel || is_deleted(object);
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
        self.cancelled(object, cancelled).await
    }

    /// An object that nobody needs any more stays only as long as it is to.
    async fn after_the_end(&self, object: &Migration) -> Result<Action, ControllerError> {
        let ended = object.status.as_ref().and_then(|status| status.completed_at.as_ref());
        let ttl = object.spec.ttl_seconds_after_finished;
        after_the_end(&self.api(object), object, FINALIZER, ttl, ended).await
    }

    /// A request.
    async fn begin(self: &Arc<Self>, object: &Migration) -> Result<Action, ControllerError> {
        if let Some(id) = object.annotations().get(ID_ANNOTATION) {
            return self.is_no_request(object, id).await;
        }
        if object.spec.cancel {
            return self.refuse(object, &cancelled_early()).await;
        }
        let kept = keep(&self.api(object), object, FINALIZER).await?;
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
        self.refuse(object, &never_recorded()).await
    }

    /// Says that it will never begin.
    async fn refuse(&self, object: &Migration, failure: &Failure) -> Result<Action, ControllerError> {
        let mut status = said(object, REFUSED, failure);
        judge_refused(&mut status.conditions, object.metadata.generation, failure, Some(SUCCEEDED));
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
            judge_waiting(&mut status.conditions, object.metadata.generation, failure);
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

fn is_deleted(object: &Migration) -> bool {
    object.metadata.deletion_timestamp.is_some()
}

fn phase(object: &Migration) -> &str {
    object.status.as_ref().map_or("", |status| status.phase.as_str())
}

fn has_record(object: &Migration) -> bool {
    object.status.as_ref().is_some_and(|status| status.record.is_some())
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
    use podferry_common::FailureCode;

    use super::*;

    #[test]
    fn what_may_pass_waits_and_what_makes_no_sense_does_not() {
        let waits = |code| may_pass(&Failure::new(code, "no"));
        assert!(waits(FailureCode::Unavailable) && waits(FailureCode::ResourceExhausted));
        assert!(!waits(FailureCode::InvalidArgument) && !waits(FailureCode::PermissionDenied));
    }
}
