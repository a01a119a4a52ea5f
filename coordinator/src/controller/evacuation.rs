//! What a `NodeEvacuation` asks for now.

use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, MutexGuard, PoisonError};

use jiff::Timestamp;
use kube::runtime::controller::Action;
use kube::runtime::reflector::ObjectRef;
use kube::{Api, ResourceExt as _};
use podferry_common::{Failure, FailureCode, WorkloadName};
use podferry_crds::{
    EVACUATION_FINALIZER, EVACUATION_ID_ANNOTATION, NodeEvacuation, NodeEvacuationSpec, NodeEvacuationStatus, Order,
    Strategy as Wanted,
};

use super::objects::{
    LATER, PENDING, REFUSED, after_the_end, cancelled_early, judge_refused, judge_waiting, keep, never_recorded,
    problem,
};
use super::{Controller, ControllerError};
use crate::access::{Action as Asked, Verb};
use crate::api::may_pass;
use crate::evacuation::{self, Evacuation, EvacuationId, Manner, Phase, Terms, Wish};
use crate::pods::policy::{fate, seconds, wire};
use crate::store::{Evacuations, deadline_of, time};
use crate::strategy::{Asked as Way, Connections, Strategy};

impl Controller {
    /// Does what an object asks for, as far as it is not done.
    pub(super) async fn reconcile_evacuation(
        self: Arc<Self>,
        object: Arc<NodeEvacuation>,
    ) -> Result<Action, ControllerError> {
        let uid = object.uid().unwrap_or_default();
        match self.evacuations.of_object(&uid) {
            // An object says its end before the store knows of it.
            Some(evacuation) if evacuation.has_ended() || Evacuations::is_at_its_end(&object) => {
                self.after_an_evacuation(&object).await
            }
            Some(evacuation) => self.go_on_evacuating(&object, &evacuation).await,
            // It is as it was seen long ago: what has a record is forgotten only at its end.
            None if has_record(&object) && !Evacuations::is_at_its_end(&object) => Ok(Action::requeue(LATER)),
            None if is_deleted(&object) || phase(&object) == REFUSED || has_record(&object) => {
                self.after_an_evacuation(&object).await
            }
            None => self.begin_evacuating(&object).await,
        }
    }

    /// An evacuation that has a record and has not ended.
    async fn go_on_evacuating(
        self: &Arc<Self>,
        object: &NodeEvacuation,
        evacuation: &Evacuation,
    ) -> Result<Action, ControllerError> {
        self.await_the_end(object, evacuation.id);
        let running = evacuation.phase == Phase::Running;
        let unwanted = object.spec.cancel || is_deleted(object);
        if unwanted && running {
            self.cancel_evacuation(object, evacuation).await?;
        }
        let deadline = object.spec.deadline.as_ref().and_then(deadline_of);
        let second = |at: Option<Timestamp>| at.map(Timestamp::as_second);
        if running && second(deadline) != second(evacuation.terms.deadline_at) {
            self.evacuator.wish(evacuation.id, Wish::Deadline(deadline));
        }
        // Its next state changes the object.
        Ok(Action::await_change())
    }

    async fn cancel_evacuation(&self, object: &NodeEvacuation, evacuation: &Evacuation) -> Result<(), ControllerError> {
        let id = evacuation.id.to_string();
        let asked = Asked::on_migration(Verb::CancelEvacuation, &id);
        let cancelled = match self.current.admit_peer(Some(&self.peer), &asked).await {
            Ok(core) => core.cancel_evacuation(&id, &self.peer).await,
            Err(failure) => Err(failure),
        };
        self.cancelled(object, cancelled).await
    }

    /// An object that nobody needs any more stays only as long as it is to.
    async fn after_an_evacuation(&self, object: &NodeEvacuation) -> Result<Action, ControllerError> {
        let ended = object.status.as_ref().and_then(|status| status.completed_at.as_ref());
        let ttl = object.spec.ttl_seconds_after_finished;
        after_the_end(&self.node_evacuations(), object, EVACUATION_FINALIZER, ttl, ended).await
    }

    /// A request.
    async fn begin_evacuating(self: &Arc<Self>, object: &NodeEvacuation) -> Result<Action, ControllerError> {
        if let Some(id) = object.annotations().get(EVACUATION_ID_ANNOTATION) {
            return self.is_no_request_to_evacuate(object, id).await;
        }
        if object.spec.cancel {
            return self.refuse_evacuation(object, &cancelled_early()).await;
        }
        let kept = keep(&self.node_evacuations(), object, EVACUATION_FINALIZER).await?;
        let seen = |name: &str| self.seen_evacuations.get(&ObjectRef::new(name)).is_some();
        self.evacuations.forget_all_but(seen);
        match self.evacuate(kept.clone()).await {
            Ok(evacuation) => {
                self.events.evacuating(&kept, &evacuation).await;
                self.await_the_end(&kept, evacuation.id);
                Ok(Action::await_change())
            }
            Err(failure) if may_pass(&failure) => self.wait_to_evacuate(&kept, &failure).await,
            Err(failure) => self.refuse_evacuation(&kept, &failure).await,
        }
    }

    async fn evacuate(&self, object: NodeEvacuation) -> Result<Evacuation, Failure> {
        let node = object.spec.node_name.clone();
        let core = self.current.admit_peer(Some(&self.peer), &Asked::evacuate(&node)).await?;
        let (id, terms) = (EvacuationId::new(), terms_of(&object.spec)?);
        self.evacuations.claim(id, object);
        let begun = core.evacuate_on(id, &node, terms, &self.peer).await;
        if begun.is_err() {
            self.evacuations.unclaim(id);
        }
        begun
    }

    /// An object that the coordinator has made itself gets its record in a moment, or its coordinator was stopped before that.
    async fn is_no_request_to_evacuate(&self, object: &NodeEvacuation, id: &str) -> Result<Action, ControllerError> {
        if id.parse().is_ok_and(|id| self.evacuations.is_known(id)) {
            return Ok(Action::requeue(LATER));
        }
        self.refuse_evacuation(object, &never_recorded()).await
    }

    /// Says that it will never begin.
    async fn refuse_evacuation(&self, object: &NodeEvacuation, failure: &Failure) -> Result<Action, ControllerError> {
        let mut status = said(object, REFUSED, failure);
        judge_refused(&mut status.conditions, object.metadata.generation, failure, None);
        status.completed_at = Some(time(Timestamp::now()));
        let object = self.evacuations.mark(object.clone(), status).await?;
        self.events.refused(&object, "Refused", failure).await;
        Ok(Action::await_change())
    }

    /// Says why it does not begin yet. It is told once as long as it is the same.
    async fn wait_to_evacuate(&self, object: &NodeEvacuation, failure: &Failure) -> Result<Action, ControllerError> {
        let told = object.status.as_ref();
        if told.is_none_or(|status| status.phase != PENDING || status.reason != failure.to_string()) {
            let mut status = said(object, PENDING, failure);
            judge_waiting(&mut status.conditions, object.metadata.generation, failure);
            let object = self.evacuations.mark(object.clone(), status).await?;
            self.events.refused(&object, "Waiting", failure).await;
        }
        Ok(Action::requeue(LATER))
    }

    /// Tells the end, unless somebody does already.
    fn await_the_end(self: &Arc<Self>, object: &NodeEvacuation, id: EvacuationId) {
        let Some(mut view) = self.evacuator.watch(id) else { return };
        if !self.awaited().insert(id) {
            return;
        }
        let (controller, object) = (Arc::clone(self), object.clone());
        tokio::spawn(async move {
            let ended = view.wait_for(Evacuation::has_ended).await.map(|ended| ended.clone());
            // A driver that is gone without an end goes on in the next process.
            if let Ok(ended) = ended {
                controller.events.evacuated(&object, &ended).await;
            }
            controller.awaited().remove(&id);
        });
    }

    fn awaited(&self) -> MutexGuard<'_, HashSet<EvacuationId>> {
        self.awaited.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn node_evacuations(&self) -> Api<NodeEvacuation> {
        Api::all(self.client.clone())
    }
}

/// What an object asks for.
///
/// # Errors
/// When it makes no sense.
fn terms_of(spec: &NodeEvacuationSpec) -> Result<Terms, Failure> {
    let wishes = &spec.wishes;
    let said = |flag: Option<bool>| flag.unwrap_or_default();
    let strategy: Option<Strategy> = match Way::of(wire(wishes.strategy.unwrap_or(Wanted::Auto)).into())? {
        Way::Auto => None,
        Way::This(strategy) => Some(strategy),
    };
    Ok(Terms {
        strategy,
        accept_loss: said(wishes.accept_loss),
        allow_restart: said(wishes.allow_restart),
        deadline_at: spec.deadline.as_ref().and_then(deadline_of),
        priorities: priorities_of(spec)?,
        concurrency: usize::try_from(spec.max_concurrent).ok().filter(|count| *count > 0),
        bandwidth_limit: wishes.bandwidth_limit.and_then(|limit| u64::try_from(limit).ok()).unwrap_or_default(),
        manner: Manner {
            downtime_budget_ms: wishes.downtime_budget_ms.map_or(0.0, f64::from),
            verify: said(wishes.verify),
            throttle: said(wishes.throttle),
            grace_period_s: wishes.grace_period_seconds.and_then(|seconds| u32::try_from(seconds).ok()),
            no_compression: wishes.compress == Some(false),
            connections: Connections {
                fate: fate(wishes.connections).into(),
                deadline_s: seconds(wishes.connections_deadline_seconds),
            },
        },
        order: match spec.order {
            Order::HighestPriorityFirst => evacuation::Order::HighestFirst,
            Order::LowestPriorityFirst => evacuation::Order::LowestFirst,
        },
        selector: spec.pod_selector.clone(),
        cordon: spec.cordon,
    })
}

/// Pods may not be there yet, or any more.
fn priorities_of(spec: &NodeEvacuationSpec) -> Result<BTreeMap<WorkloadName, i32>, Failure> {
    let name = |name: &String| name.parse().map_err(|error| Failure::from_error(FailureCode::InvalidArgument, &error));
    spec.pod_priorities.iter().map(|(pod, priority)| Ok((name(pod)?, *priority))).collect()
}

fn is_deleted(object: &NodeEvacuation) -> bool {
    object.metadata.deletion_timestamp.is_some()
}

fn phase(object: &NodeEvacuation) -> &str {
    object.status.as_ref().map_or("", |status| status.phase.as_str())
}

fn has_record(object: &NodeEvacuation) -> bool {
    object.status.as_ref().is_some_and(|status| status.record.is_some())
}

/// The status of an object that has no evacuation, with the reason why.
fn said(object: &NodeEvacuation, phase: &str, failure: &Failure) -> NodeEvacuationStatus {
    NodeEvacuationStatus {
        observed_generation: object.metadata.generation,
        phase: phase.to_owned(),
        reason: failure.to_string(),
        problem: Some(problem(failure)),
        ..object.status.clone().unwrap_or_default()
    }
}
