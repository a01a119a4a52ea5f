//! Evacuations that are asked for by objects, and recorded in them.

use std::time::{Duration, Instant};

use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement};
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::runtime::wait::{await_condition, conditions};
use kube::{Api, ResourceExt as _};
use podferry_crds::{
    EVACUATION_FINALIZER, EVACUATION_ID_ANNOTATION, NodeEvacuation, NodeEvacuationSpec, NodeEvacuationStatus, Order,
    Strategy, Wishes,
};
use podferry_proto::v1;
use serde_json::json;
use tokio::time::timeout;

use crate::cluster::{Cluster, PATIENCE};
use crate::world::{Copy, Fault};

/// The `NodeEvacuation` objects of a cluster, which are in no namespace.
struct Evacuations(Api<NodeEvacuation>, Api<Event>);

fn spec(node: &str) -> NodeEvacuationSpec {
    let wishes = Wishes { strategy: Some(Strategy::Warm), ..Wishes::default() };
    NodeEvacuationSpec { node_name: node.to_owned(), max_concurrent: 2, wishes, ..NodeEvacuationSpec::default() }
}

fn condition(object: &NodeEvacuation, kind: &str) -> (String, String) {
    let all = &object.status.as_ref().unwrap().conditions;
    let found = all.iter().find(|condition| condition.type_ == kind).unwrap_or_else(|| panic!("no {kind} in {all:?}"));
    (found.status.clone(), found.reason.clone())
}

impl Evacuations {
    fn of(cluster: &Cluster) -> Self {
        Self(Api::all(cluster.kube()), Api::all(cluster.kube()))
    }

    async fn try_make(&self, name: &str, spec: NodeEvacuationSpec) -> Result<NodeEvacuation, String> {
        let object = NodeEvacuation::new(name, spec);
        self.0.create(&PostParams::default(), &object).await.map_err(|error| error.to_string())
    }

    async fn make(&self, name: &str, spec: NodeEvacuationSpec) {
        self.try_make(name, spec).await.unwrap();
    }

    async fn patch(&self, name: &str, patch: serde_json::Value) -> Result<NodeEvacuation, String> {
        let patched = self.0.patch(name, &PatchParams::default(), &Patch::Merge(patch)).await;
        patched.map_err(|error| error.to_string())
    }

    async fn until(&self, name: &str, what: &str, such: impl Fn(&NodeEvacuation) -> bool) -> NodeEvacuation {
        let such = |object: Option<&NodeEvacuation>| object.is_some_and(&such);
        let Ok(found) = timeout(PATIENCE, await_condition(self.0.clone(), name, such)).await else {
            panic!("{name} does not come to {what}: {:#?}", self.0.get_opt(name).await)
        };
        found.unwrap().unwrap()
    }

    async fn phase(&self, name: &str, phase: &str) -> NodeEvacuation {
        self.until(name, phase, |object| object.status.as_ref().is_some_and(|status| status.phase == phase)).await
    }

    async fn delete_and_wait(&self, name: &str) {
        let uid = self.0.get(name).await.unwrap().uid().unwrap();
        self.0.delete(name, &DeleteParams::default()).await.unwrap();
        let gone = timeout(PATIENCE, await_condition(self.0.clone(), name, conditions::is_deleted(&uid))).await;
        assert!(gone.is_ok(), "{name} stays: {:#?}", self.0.get_opt(name).await);
    }

    /// Events of what is in no namespace are in `default`.
    async fn event(&self, name: &str, reason: &str) {
        let end = Instant::now() + PATIENCE;
        loop {
            let all = self.1.list(&ListParams::default()).await.unwrap().items;
            let of = |event: &&Event| {
                event.regarding.as_ref().is_some_and(|about| {
                    about.name.as_deref() == Some(name) && about.kind.as_deref() == Some("NodeEvacuation")
                })
            };
            let reasons: Vec<_> = all.iter().filter(of).filter_map(|event| event.reason.as_deref()).collect();
            if reasons.contains(&reason) {
                return;
            }
            assert!(Instant::now() < end, "no event of {name} is {reason}: {reasons:?}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

fn status(object: &NodeEvacuation) -> NodeEvacuationStatus {
    object.status.clone().unwrap()
}

#[tokio::test]
#[ignore = "needs an API server: make test-kubernetes"]
async fn an_object_empties_a_node_and_says_what_became_of_each_pod() {
    let cluster = Cluster::new().await;
    let _coordinator = cluster.coordinator().await;
    let evacuations = Evacuations::of(&cluster);
    evacuations.make("one", spec("a")).await;
    let ended = evacuations.phase("one", "complete").await;
    let said = status(&ended);
    // One of them is no pod, and counts as one of the coordinator's own namespace.
    assert_eq!((said.total, said.moved, said.moving, said.failed), (2, 2, 0, 0));
    let pod = said.pods.iter().find(|pod| pod.name == "cart").unwrap();
    assert_eq!(pod.outcome, "moved");
    assert_eq!(cluster.workload("cart"), format!("{}/{}", pod.namespace, pod.name));
    assert_eq!((cluster.world.copy("a", "cart"), cluster.world.copy(&pod.target, "cart")), (None, Some(Copy::Running)));
    let migrations = cluster.list().await;
    assert!(migrations.iter().any(|one| one.status.as_ref().is_some_and(|status| status.id == pod.migration)));
    assert_eq!(condition(&ended, "Accepted").0, "True");
    assert_eq!(condition(&ended, "Finished"), ("True".to_owned(), "Complete".to_owned()));
    assert!(said.started_at.is_some() && said.completed_at.is_some() && said.id.starts_with("evac-"), "{said:?}");
    evacuations.until("one", "its finalizer is gone", |object| object.metadata.finalizers.is_none()).await;
    evacuations.event("one", "Accepted").await;
    evacuations.event("one", "Complete").await;
    evacuations.delete_and_wait("one").await;
}

#[tokio::test]
#[ignore = "needs an API server: make test-kubernetes"]
async fn an_evacuation_that_cannot_be_is_refused_and_what_it_asks_for_stays() {
    let cluster = Cluster::new().await;
    let _coordinator = cluster.coordinator().await;
    let evacuations = Evacuations::of(&cluster);
    evacuations.make("nowhere", spec("nowhere")).await;
    let refused = evacuations.phase("nowhere", "refused").await;
    assert_eq!(condition(&refused, "Accepted"), ("False".to_owned(), "NotFound".to_owned()));
    assert_eq!(condition(&refused, "Finished").0, "True");
    assert!(status(&refused).reason.contains("nowhere"));
    evacuations.event("nowhere", "Refused").await;
    let mut senseless = spec("a");
    let wrong = LabelSelectorRequirement { key: "app".to_owned(), operator: "Like".to_owned(), values: None };
    senseless.pod_selector = Some(LabelSelector { match_expressions: Some(vec![wrong]), ..LabelSelector::default() });
    evacuations.make("senseless", senseless).await;
    let refused = evacuations.phase("senseless", "refused").await;
    assert!(status(&refused).reason.contains("selector"), "{}", status(&refused).reason);

    let mut none = spec("a");
    let labels = [("app".to_owned(), "none".to_owned())].into();
    none.pod_selector = Some(LabelSelector { match_labels: Some(labels), ..LabelSelector::default() });
    evacuations.make("none", none).await;
    assert_eq!(status(&evacuations.phase("none", "complete").await).total, 0);
    assert_eq!(cluster.world.copy("a", "cart"), Some(Copy::Running), "nothing that is not selected is moved");
    for (change, said) in [
        (json!({"nodeName": "b"}), "make a new NodeEvacuation"),
        (json!({"maxConcurrent": 5}), "cannot be changed on the way"),
        (json!({"strategy": "Live"}), "cannot be changed on the way"),
        (json!({"podSelector": null}), "cannot be changed on the way"),
    ] {
        let answer = evacuations.patch("none", json!({ "spec": change })).await.unwrap_err();
        assert!(answer.contains(said), "{answer}");
    }
    for name in ["nowhere", "senseless", "none"] {
        evacuations.delete_and_wait(name).await;
    }
}

#[tokio::test]
#[ignore = "needs an API server: make test-kubernetes"]
async fn a_cancel_and_a_deletion_stop_an_evacuation_and_its_deadline_moves() {
    let cluster = Cluster::new().await;
    let _coordinator = cluster.coordinator().await;
    let evacuations = Evacuations::of(&cluster);
    for node in ["b", "c"] {
        cluster.world.fault(node, "Restore", Fault::Hang, 2);
    }
    let moving = |object: &NodeEvacuation| object.status.as_ref().is_some_and(|status| status.moving > 0);
    evacuations.make("cancelled", spec("a")).await;
    evacuations.until("cancelled", "a pod is moving", moving).await;
    let deadline = "2100-01-01T00:00:00Z";
    evacuations.patch("cancelled", json!({"spec": {"deadline": deadline}})).await.unwrap();
    let told = |object: &NodeEvacuation| {
        let record = object.status.as_ref().and_then(|status| status.record.as_ref());
        record.is_some_and(|record| record["terms"]["deadline_at"] == deadline)
    };
    evacuations.until("cancelled", "its deadline is known", told).await;
    evacuations.patch("cancelled", json!({"spec": {"cancel": true}})).await.unwrap();
    let ended = evacuations.phase("cancelled", "cancelled").await;
    let pod = status(&ended).pods.remove(0);
    assert!(pod.outcome == "left_behind" && pod.reason.contains("cancelled by"), "{pod:?}");
    assert_eq!(cluster.world.copy("a", "cart"), Some(Copy::Running));
    let said = evacuations.patch("cancelled", json!({"spec": {"cancel": false}})).await.unwrap_err();
    assert!(said.contains("cannot be taken back"), "{said}");

    evacuations.make("deleted", spec("a")).await;
    evacuations.until("deleted", "a pod is moving", moving).await;
    let finalizers = evacuations.0.get("deleted").await.unwrap().metadata.finalizers;
    assert_eq!(finalizers, Some(vec![EVACUATION_FINALIZER.to_owned()]));
    evacuations.delete_and_wait("deleted").await;
    assert_eq!(cluster.world.copy("a", "cart"), Some(Copy::Running));
}

#[tokio::test]
#[ignore = "needs an API server: make test-kubernetes"]
async fn an_evacuation_that_was_asked_for_over_grpc_is_an_object_and_outlives_its_coordinator() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator().await;
    let evacuations = Evacuations::of(&cluster);
    for node in ["b", "c"] {
        cluster.world.fault(node, "Restore", Fault::Hang, 1);
    }
    let mut client = cluster.client(&coordinator).await;
    let wanted = v1::EvacuateRequest {
        node: "a".to_owned(),
        strategy: v1::Strategy::Warm.into(),
        deadline_s: 3600,
        concurrency: 3,
        order: v1::EvacuationOrder::LowestFirst.into(),
        selector: "app!=none".to_owned(),
        ..v1::EvacuateRequest::default()
    };
    let begun = client.evacuate(wanted.clone()).await.unwrap().into_inner().evacuation.unwrap();
    let objects = evacuations.0.list(&ListParams::default()).await.unwrap().items;
    let object = objects.iter().find(|one| one.annotations().get(EVACUATION_ID_ANNOTATION) == Some(&begun.id)).unwrap();
    let asked = &object.spec;
    assert_eq!((asked.node_name.as_str(), asked.max_concurrent, asked.cordon), ("a", 3, false));
    assert_eq!((asked.wishes.strategy, asked.deadline.is_some()), (Some(Strategy::Warm), true));
    assert_eq!((asked.order, asked.pod_selector.is_some()), (Order::LowestPriorityFirst, true));
    let name = object.name_any();
    evacuations.make("second", spec("a")).await;
    let waits = evacuations.phase("second", "pending").await;
    assert!(status(&waits).reason.contains(&begun.id), "a node is evacuated once at a time");
    evacuations.until(&name, "a pod is moving", |object| status(object).moving > 0).await;
    coordinator.kill().await;
    for node in ["b", "c"] {
        cluster.world.heal(node, "Restore");
    }
    let coordinator = cluster.coordinator().await;
    let ended = evacuations.phase(&name, "complete").await;
    assert_eq!(cluster.world.copy("a", "cart"), None);
    let mut client = cluster.client(&coordinator).await;
    let id = status(&ended).id;
    let found = client.get_evacuation(v1::GetEvacuationRequest { id }).await.unwrap().into_inner().evacuation.unwrap();
    assert_eq!((found.id, found.moved), (begun.id, 2));
    // The one that waited finds nothing left to do.
    assert_eq!(status(&evacuations.phase("second", "complete").await).moved, 0);
    for name in ["second", &name] {
        evacuations.delete_and_wait(name).await;
    }
}
