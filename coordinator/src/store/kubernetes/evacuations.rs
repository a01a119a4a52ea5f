//! Evacuations in the API server: each in the status of its `NodeEvacuation` object. As with migrations ([`super`]), what is there is
//! read once, only the leader writes, and a write that somebody else was faster with stops it.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::{Client, ResourceExt as _};
use podferry_crds::{
    EVACUATION_FINALIZER, EVACUATION_ID_ANNOTATION, EvacuatedPod, MAX_CONCURRENT, NodeEvacuation, NodeEvacuationSpec,
    NodeEvacuationStatus, Order, Strategy as Wanted, Wishes,
};
use podferry_proto::json;
use tokio::runtime::Handle;

use super::status::{ACCEPTED, FINISHED, Judgement, camel_case, judge, problem, saturated, time};
use super::write::{self, Pen, Unwritten};
use super::{LAZINESS, all, home_of, kept_or_closed, names, wanted, whole};
use crate::evacuation::{self, Entry, Evacuation, EvacuationId, Phase, Standing};
use crate::store::evacuations::KEPT;
use crate::store::{EvacuationConflict, StoreError};

/// The most pods that are shown.
const MAX_PODS: usize = 512;
/// How long ago an evacuation has ended at least that is long over, in seconds: everybody who watches its object knows of its end.
const LONG_S: i64 = 60;

/// The evacuations in the API server. Clones share them.
#[derive(Clone)]
pub struct Evacuations {
    shared: Arc<Shared>,
}

struct Shared {
    pen: Pen,
    known: Mutex<BTreeMap<EvacuationId, Known>>,
    /// Objects that await the record of the evacuation that they asked for.
    claims: Mutex<HashMap<EvacuationId, NodeEvacuation>>,
    /// Where writes are made that are called from threads which may wait.
    runtime: Handle,
}

/// An evacuation as it is known here.
struct Known {
    /// The newest state. What of it is not written yet is what may be lost.
    evacuation: Evacuation,
    /// That has more than the object.
    lazy: bool,
    /// The object's uid,
    uid: String,
    /// and its name.
    name: String,
    /// The coordinator has made it.
    made_here: bool,
    /// The object as it was seen last. Held while it is written.
    object: Arc<tokio::sync::Mutex<NodeEvacuation>>,
}

impl Known {
    fn of(evacuation: Evacuation, object: NodeEvacuation) -> Self {
        let (uid, name) = (object.uid().unwrap_or_default(), object.name_any());
        let made_here = object.annotations().contains_key(EVACUATION_ID_ANNOTATION);
        Self { evacuation, lazy: false, uid, name, made_here, object: Arc::new(tokio::sync::Mutex::new(object)) }
    }
}

impl Evacuations {
    /// Reads all of them. `writer` is what this process is called, as no other one ever is.
    ///
    /// # Errors
    /// When the API server does not list them, or a record cannot be read: what it says of a node would be forgotten.
    pub async fn open(client: Client, writer: &str) -> Result<Self, StoreError> {
        let mut known = BTreeMap::new();
        for object in all::<NodeEvacuation>(&client).await? {
            let broken = |source| StoreError::Broken { id: write::title(&object), source };
            if let Some(evacuation) = record_of(&object).map_err(broken)? {
                known.insert(evacuation.id, Known::of(evacuation, object));
            }
        }
        let (pen, known, claims) = (Pen::new(client, writer), Mutex::new(known), Mutex::default());
        Ok(Self { shared: Arc::new(Shared { pen, known, claims, runtime: Handle::current() }) })
    }

    /// The record of the evacuation of that id, when it is created, goes into this object.
    pub fn claim(&self, id: EvacuationId, object: NodeEvacuation) {
        self.claims().insert(id, object);
    }

    /// An evacuation that was claimed for was not begun.
    pub fn unclaim(&self, id: EvacuationId) {
        self.claims().remove(&id);
    }

    /// Writes the status of an object that has no record; it is on the API server on return.
    ///
    /// # Errors
    /// When it is not taken.
    pub async fn mark(
        &self,
        mut object: NodeEvacuation,
        status: NodeEvacuationStatus,
    ) -> Result<NodeEvacuation, StoreError> {
        let written = self.shared.pen.write(&mut object, status).await;
        written.map_err(|unwritten| unwritten.fatal("refuse an evacuation", &object))?;
        Ok(object)
    }

    pub(crate) fn create(&self, new: &Evacuation) -> Result<Result<(), EvacuationConflict>, StoreError> {
        if let Some(conflict) = self.reserve(new) {
            return Ok(Err(conflict));
        }
        let made = self.shared.runtime.block_on(self.begin(new));
        if matches!(made, Ok(Ok(()))) {
            let evacuations = self.clone();
            self.shared.runtime.spawn(async move { evacuations.forget_the_oldest().await });
        } else {
            self.known().remove(&new.id);
        }
        made
    }

    /// Takes the node, before anything is written.
    fn reserve(&self, new: &Evacuation) -> Option<EvacuationConflict> {
        let mut known = self.known();
        let mut others = known.values().map(|known| &known.evacuation);
        if let Some(other) = others.find(|other| other.node == new.node && !other.has_ended()) {
            return Some(EvacuationConflict::Node { id: other.id });
        }
        known.insert(new.id, Known::of(new.clone(), empty()));
        None
    }

    async fn begin(&self, new: &Evacuation) -> Result<Result<(), EvacuationConflict>, StoreError> {
        let claimed = self.claims().remove(&new.id);
        let object = match claimed {
            Some(object) => Ok(object),
            None => self.shared.pen.make(&object_of(new)).await,
        };
        let begun = match object {
            Ok(object) => self.first_write(object, new).await,
            Err(unwritten) => Err(unwritten),
        };
        match begun {
            Ok(()) => Ok(Ok(())),
            Err(Unwritten::Refused(error)) => Ok(Err(EvacuationConflict::Object { why: error.to_string() })),
            Err(Unwritten::Gone) => Ok(Err(EvacuationConflict::Object { why: "it has been deleted".to_owned() })),
            Err(Unwritten::Stale) => Ok(Err(EvacuationConflict::Changed)),
            Err(Unwritten::Store(error)) => Err(error),
        }
    }

    async fn first_write(&self, mut object: NodeEvacuation, new: &Evacuation) -> Result<(), Unwritten> {
        self.write(&mut object, new).await?;
        self.known().insert(new.id, Known::of(new.clone(), object));
        Ok(())
    }

    async fn write(&self, object: &mut NodeEvacuation, evacuation: &Evacuation) -> Result<(), Unwritten> {
        let status = status(object, evacuation).map_err(Unwritten::Store)?;
        self.shared.pen.write(object, status).await
    }

    pub(crate) fn update(&self, evacuation: &Evacuation) -> Result<(), StoreError> {
        self.shared.runtime.block_on(self.write_now(evacuation))
    }

    async fn write_now(&self, evacuation: &Evacuation) -> Result<(), StoreError> {
        let id = evacuation.id;
        let object = self.object(id).ok_or_else(|| StoreError::Unknown { id: id.to_string() })?;
        let mut object = object.lock().await;
        let written = self
            .shared
            .pen
            .write_surely(&mut *object, |object| status(object, evacuation), || object_of(evacuation))
            .await;
        written.map_err(|unwritten| unwritten.fatal("update an evacuation", &*object))?;
        if let Some(known) = self.known().get_mut(&id) {
            known.evacuation.clone_from(evacuation);
            known.lazy = false;
            (known.uid, known.name) = (object.uid().unwrap_or_default(), object.name_any());
            known.made_here = object.annotations().contains_key(EVACUATION_ID_ANNOTATION);
        }
        Ok(())
    }

    pub(crate) fn update_lazily(&self, evacuation: &Evacuation) -> Result<(), StoreError> {
        let id = evacuation.id;
        let mut all = self.known();
        let known = all.get_mut(&id).ok_or_else(|| StoreError::Unknown { id: id.to_string() })?;
        let waits = std::mem::replace(&mut known.lazy, true);
        known.evacuation.clone_from(evacuation);
        drop(all);
        if !waits {
            let evacuations = self.clone();
            self.shared.runtime.spawn(async move {
                tokio::time::sleep(LAZINESS).await;
                if let Err(error) = evacuations.write_what_is_lazy(id).await {
                    tracing::warn!(evacuation = %id, %error, "a state is not shown yet: it is written with the next");
                }
            });
        }
        Ok(())
    }

    /// Writes what the object lacks of an evacuation.
    async fn write_what_is_lazy(&self, id: EvacuationId) -> Result<(), StoreError> {
        let Some(object) = self.object(id) else { return Ok(()) };
        let mut object = object.lock().await;
        let due = {
            let mut all = self.known();
            let known = all.get_mut(&id).filter(|known| known.lazy);
            known.map(|known| {
                known.lazy = false;
                known.evacuation.clone()
            })
        };
        let Some(evacuation) = due else { return Ok(()) };
        let written = self.write(&mut object, &evacuation).await;
        written.map_err(|unwritten| unwritten.fatal("show an evacuation", &*object))
    }

    /// Deletes the objects of the oldest evacuations that have ended, of those that the coordinator has made.
    async fn forget_the_oldest(&self) {
        let ended: Vec<_> = {
            let known = self.known();
            let ended = known.values().filter(|known| known.made_here && known.evacuation.has_ended());
            ended.map(|known| (known.evacuation.id, known.name.clone(), known.uid.clone())).collect()
        };
        for (id, name, uid) in &ended[..ended.len().saturating_sub(KEPT)] {
            if self.shared.pen.delete::<NodeEvacuation>("", name, uid.clone()).await {
                self.known().remove(id);
            }
        }
    }

    /// Forgets the evacuations that have ended a while ago and of whose objects, by name, it is not said that they are still there. What has ended
    /// just now may not have been seen yet.
    pub fn forget_all_but(&self, is_there: impl Fn(&str) -> bool) {
        let now = Timestamp::now();
        let is_long_over =
            |evacuation: &Evacuation| evacuation.ended_at.is_some_and(|at| now.duration_since(at).as_secs() > LONG_S);
        self.known().retain(|_, known| !is_long_over(&known.evacuation) || is_there(&known.name));
    }

    /// Whether an evacuation of that id has a record, or is about to have one.
    pub fn is_known(&self, id: EvacuationId) -> bool {
        self.known().contains_key(&id)
    }

    /// The evacuation that an object is of, also when the object as it was seen does not say so yet.
    pub fn of_object(&self, uid: &str) -> Option<Evacuation> {
        self.known().values().find(|known| known.uid == uid).map(|known| known.evacuation.clone())
    }

    /// Whether an object says that its evacuation has ended.
    pub(crate) fn is_at_its_end(object: &NodeEvacuation) -> bool {
        record_of(object).is_ok_and(|record| record.is_some_and(|record| record.has_ended()))
    }

    pub(crate) fn get(&self, id: EvacuationId) -> Option<Evacuation> {
        self.known().get(&id).map(|known| known.evacuation.clone())
    }

    /// All of them, newest first.
    pub(crate) fn list(&self) -> Vec<Evacuation> {
        self.known().values().rev().map(|known| known.evacuation.clone()).collect()
    }

    fn object(&self, id: EvacuationId) -> Option<Arc<tokio::sync::Mutex<NodeEvacuation>>> {
        self.known().get(&id).map(|known| Arc::clone(&known.object))
    }

    fn known(&self) -> MutexGuard<'_, BTreeMap<EvacuationId, Known>> {
        self.shared.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn claims(&self) -> MutexGuard<'_, HashMap<EvacuationId, NodeEvacuation>> {
        self.shared.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn empty() -> NodeEvacuation {
    NodeEvacuation::new("", NodeEvacuationSpec::default())
}

/// The record in an object, if there is one.
fn record_of(object: &NodeEvacuation) -> Result<Option<Evacuation>, serde_json::Error> {
    let record = object.status.as_ref().and_then(|status| status.record.clone());
    record.map(serde_json::from_value).transpose()
}

/// The object of an evacuation that was asked for otherwise.
fn object_of(evacuation: &Evacuation) -> NodeEvacuation {
    let id = evacuation.id.to_string();
    let mut object = NodeEvacuation::new(&names::object_name(evacuation.node.as_str(), &id), spec_of(evacuation));
    object.annotations_mut().insert(EVACUATION_ID_ANNOTATION.to_owned(), id);
    object.finalizers_mut().push(EVACUATION_FINALIZER.to_owned());
    object
}

/// What somebody has asked for otherwise than by an object, as an object says it.
fn spec_of(evacuation: &Evacuation) -> NodeEvacuationSpec {
    let terms = &evacuation.terms;
    let manner = &terms.manner;
    let wishes = Wishes {
        strategy: Some(terms.strategy.map_or(Wanted::Auto, wanted)),
        downtime_budget_ms: whole(manner.downtime_budget_ms),
        bandwidth_limit: i64::try_from(terms.bandwidth_limit).ok().filter(|limit| *limit > 0),
        verify: manner.verify.then_some(true),
        throttle: manner.throttle.then_some(true),
        accept_loss: terms.accept_loss.then_some(true),
        allow_restart: terms.allow_restart.then_some(true),
        grace_period_seconds: manner.grace_period_s.and_then(|seconds| i32::try_from(seconds).ok()),
        connections: kept_or_closed(manner.connections.fate),
        connections_deadline_seconds: i32::try_from(manner.connections.deadline_s).ok().filter(|seconds| *seconds > 0),
        compress: manner.no_compression.then_some(false),
    };
    NodeEvacuationSpec {
        node_name: evacuation.node.to_string(),
        deadline: terms.deadline_at.map(time),
        cordon: terms.cordon,
        max_concurrent: terms
            .concurrency
            .map_or(MAX_CONCURRENT, |count| i32::try_from(count).unwrap_or(MAX_CONCURRENT).clamp(1, MAX_CONCURRENT)),
        order: match terms.order {
            evacuation::Order::HighestFirst => Order::HighestPriorityFirst,
            evacuation::Order::LowestFirst => Order::LowestPriorityFirst,
        },
        pod_selector: terms.selector.clone(),
        pod_priorities: terms.priorities.iter().map(|(name, priority)| (name.to_string(), *priority)).collect(),
        wishes,
        cancel: false,
        ttl_seconds_after_finished: None,
    }
}

fn status(object: &NodeEvacuation, evacuation: &Evacuation) -> Result<NodeEvacuationStatus, StoreError> {
    let broken = |source| StoreError::Broken { id: evacuation.id.to_string(), source };
    status_of(object, evacuation).map_err(broken)
}

/// The status of an object with that evacuation in it, but for who writes it. `object` is how it was seen last.
fn status_of(object: &NodeEvacuation, evacuation: &Evacuation) -> Result<NodeEvacuationStatus, serde_json::Error> {
    let wire = evacuation.to_list_entry();
    let before = object.status.clone().unwrap_or_default();
    let mut conditions = before.conditions;
    for found in judgements(evacuation) {
        judge(&mut conditions, object.metadata.generation, found);
    }
    let count = |of: fn(&Standing) -> bool| {
        let found = evacuation.entries.iter().filter(|entry| of(&entry.standing)).count();
        i32::try_from(found).unwrap_or(i32::MAX)
    };
    Ok(NodeEvacuationStatus {
        observed_generation: object.metadata.generation,
        conditions,
        id: wire.id.clone(),
        phase: json::evacuation_phase(&wire),
        reason: evacuation.trouble.as_ref().map(ToString::to_string).unwrap_or_default(),
        problem: wire.problem.as_ref().map(problem),
        requested_by: wire.requested_by,
        total: count(|_| true),
        moved: count(|standing| *standing == Standing::Moved),
        moving: count(|standing| matches!(standing, Standing::Moving { .. })),
        failed: count(|standing| matches!(standing, Standing::LeftBehind { .. } | Standing::Lost)),
        homes: i32::try_from(wire.homes).unwrap_or(i32::MAX),
        started_at: Some(time(evacuation.created_at)),
        completed_at: evacuation.ended_at.map(time),
        pods: pods(evacuation),
        record: Some(saturated(serde_json::to_value(evacuation)?)),
        written_by: before.written_by,
    })
}

/// What became of each, those that could not be moved first.
fn pods(evacuation: &Evacuation) -> Vec<EvacuatedPod> {
    let mut entries = evacuation.in_order();
    entries.sort_by_key(|entry| !matches!(entry.standing, Standing::LeftBehind { .. } | Standing::Lost));
    entries.into_iter().take(MAX_PODS).map(pod).collect()
}

fn pod(entry: &Entry) -> EvacuatedPod {
    let (namespace, name) = home_of(&entry.workload, "");
    let waits = || entry.late.clone().or_else(|| entry.waits_for.clone()).unwrap_or_default();
    let reason = match &entry.standing {
        Standing::LeftBehind { failure } => failure.to_string(),
        standing if standing.is_settled() => String::new(),
        _ => waits(),
    };
    EvacuatedPod {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        outcome: json::evacuated_state(&entry.to_wire()),
        reason,
        migration: entry.migrations.last().map(ToString::to_string).unwrap_or_default(),
        target: entry.target.as_ref().map(ToString::to_string).unwrap_or_default(),
        downtime_ms: entry.downtime_ms,
    }
}

fn judgements(evacuation: &Evacuation) -> [Judgement; 2] {
    let wire = evacuation.to_list_entry();
    let reason = camel_case(&json::evacuation_phase(&wire));
    let (moved, failed, remaining) = (wire.moved, wire.failed, wire.remaining);
    let ended = evacuation.has_ended();
    let trouble = evacuation.trouble.as_ref().map(|failure| format!("; {failure}")).unwrap_or_default();
    let message = match &evacuation.phase {
        Phase::Ended(_) => format!("{moved} moved, {failed} could not be moved{trouble}"),
        _ => format!("{moved} moved, {remaining} still to be moved, {failed} could not be moved{trouble}"),
    };
    let way = format!("what is on {} is moved away", evacuation.node);
    [
        Judgement { kind: ACCEPTED, holds: Some(true), reason: "Accepted".to_owned(), message: way },
        Judgement { kind: FINISHED, holds: Some(ended), reason, message },
    ]
}

/// When the node goes away, as a spec says it.
pub(crate) fn deadline_of(time: &Time) -> Option<Timestamp> {
    Timestamp::from_second(time.0.as_second()).ok()
}

#[cfg(test)]
mod tests {
    use podferry_common::identity::Peer;
    use podferry_common::{Failure, FailureCode};

    use super::*;
    use crate::evacuation::{Event, Found, Terms};

    fn evacuation() -> Evacuation {
        let mut evacuation = Evacuation::new("n1".parse().unwrap(), Terms::default(), Peer::client("ada").unwrap());
        let found = |name: &str| Found {
            workload: name.parse().unwrap(),
            priority: 0,
            memory_bytes: 1,
            runs: true,
            placed_elsewhere: false,
            migration: None,
        };
        evacuation.apply(Event::Seen(vec![found("shop/one"), found("shop/two")]));
        evacuation
    }

    #[test]
    fn an_object_says_what_became_of_each_pod_and_gives_its_record_back() {
        let mut evacuation = evacuation();
        let failure = Failure::new(FailureCode::FailedPrecondition, "it has two containers").remedy("delete it");
        evacuation.apply(Event::Refused("shop/two".parse().unwrap(), failure));
        let mut object = object_of(&evacuation);
        object.status = Some(status_of(&object, &evacuation).unwrap());
        let status = object.status.as_ref().unwrap();
        assert_eq!((status.phase.as_str(), status.total, status.failed), ("running", 2, 1));
        let said: Vec<_> = status.pods.iter().map(|pod| (pod.name.as_str(), pod.outcome.as_str())).collect();
        assert_eq!(said, [("two", "left_behind"), ("one", "waiting")]);
        assert!(status.pods[0].reason.contains("two containers") && status.pods[0].reason.contains("delete it"));
        assert_eq!(record_of(&object).unwrap(), Some(evacuation.clone()));
        let holds: Vec<_> = status.conditions.iter().map(|found| (&*found.type_, &*found.status)).collect();
        assert_eq!(holds, [(ACCEPTED, "True"), (FINISHED, "False")]);
        evacuation.apply(Event::CancelRequested("ada".to_owned()));
        evacuation.apply(Event::Done(Timestamp::now()));
        let ended = status_of(&object, &evacuation).unwrap();
        assert_eq!((ended.phase.as_str(), ended.conditions[1].reason.as_str()), ("cancelled", "Cancelled"));
        assert!(ended.completed_at.is_some());
        object.status = Some(ended);
        assert!(Evacuations::is_at_its_end(&object));
    }
}
