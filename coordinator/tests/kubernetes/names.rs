//! Pods that keep their names, with the real controller of their StatefulSet, which wants the name as well. No node is there: what is made is
//! looked at as the API server has it.

use std::time::{Duration, Instant};

use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::{Api, ResourceExt};
use podferry_common::MigrationId;
use podferry_coordinator::pods::{Pods, target_name};
use podferry_coordinator::store::PodMove;
use serde_json::json;

use crate::cluster::{Cluster, PATIENCE};

const MARK: &str = "podferry.dev/migration";

/// A StatefulSet's one pod that is to move to node b.
struct Named {
    api: Api<Pod>,
    pods: Pods,
    id: MigrationId,
    moved: PodMove,
    source: Pod,
}

impl Named {
    async fn new(cluster: &Cluster) -> Self {
        let sets: Api<StatefulSet> = Api::namespaced(cluster.kube(), cluster.namespace());
        // No node has the label: nothing waits for a kubelet.
        let set = json!({
            "metadata": { "name": "cart" },
            "spec": {
                "serviceName": "cart",
                "selector": { "matchLabels": { "app": "cart" } },
                "template": {
                    "metadata": { "labels": { "app": "cart" } },
                    "spec": {
                        "runtimeClassName": "podferry",
                        "nodeSelector": { "podferry.test/nowhere": "true" },
                        "containers": [{ "name": "main", "image": "podferry.test/none:1" }],
                    },
                },
            },
        });
        sets.create(&PostParams::default(), &serde_json::from_value(set).unwrap()).await.unwrap();
        let api: Api<Pod> = Api::namespaced(cluster.kube(), cluster.namespace());
        let source = there(&api, "cart-0", |_| true).await;
        let id = MigrationId::new();
        let moved = PodMove {
            namespace: cluster.namespace().to_owned(),
            name: "cart-0".to_owned(),
            uid: source.uid().unwrap(),
            container: "main".to_owned(),
            target_name: target_name("cart", id),
            keeps_name: true,
        };
        let pods = Pods::new(cluster.kube());
        pods.make_target(id, &"b".parse().unwrap(), &moved).await.unwrap();
        Self { api, pods, id, moved, source }
    }

    /// The pod of its name, which `take_name` has made.
    async fn taken(&self, uid: &str) {
        let named = self.api.get("cart-0").await.unwrap();
        assert_eq!(named.uid().as_deref(), Some(uid));
        assert_ne!(named.uid(), self.source.uid());
        assert_eq!(named.owner_references(), self.source.owner_references());
        assert_eq!(named.spec.as_ref().unwrap().node_name.as_deref(), Some("b"));
        assert_eq!(named.annotations()[MARK], self.id.to_string(), "its container comes");
    }

    /// Nothing of the migration is left, and the set has made no pod beside it.
    async fn ends(&self, uid: &str) {
        Box::pin(self.pods.complete(self.id, &self.moved)).await.unwrap();
        let named = self.api.get("cart-0").await.unwrap();
        assert_eq!(named.uid().as_deref(), Some(uid));
        assert!(!named.labels().contains_key(MARK) && !named.annotations().contains_key(MARK));
        assert_eq!(named.labels(), self.source.labels());
        let all = self.api.list(&ListParams::default()).await.unwrap();
        let stay = all.iter().filter(|pod| pod.metadata.deletion_timestamp.is_none());
        assert_eq!(stay.map(ResourceExt::name_any).collect::<Vec<_>>(), ["cart-0"], "what stood in for it goes");
    }
}

async fn there(api: &Api<Pod>, name: &str, is: impl Fn(&Pod) -> bool) -> Pod {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(pod) = api.get_opt(name).await.unwrap().filter(&is) {
            return pod;
        }
        assert!(Instant::now() < end, "{name} does not come");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
#[ignore = "needs an API server: make test-kubernetes"]
async fn a_name_is_taken_over_in_the_moment_in_which_it_is_free_and_only_once() {
    let cluster = Cluster::new().await;
    let named = Named::new(&cluster).await;
    let before = named.api.get("cart-0").await.unwrap();
    assert_eq!(before.uid(), named.source.uid(), "before the commit nothing happens to the source");
    let uid = named.pods.take_name(named.id, &named.moved).await.unwrap();
    named.taken(&uid).await;
    assert_eq!(named.pods.take_name(named.id, &named.moved).await.unwrap(), uid);
    named.ends(&uid).await;
    named.ends(&uid).await;
}

#[tokio::test]
#[ignore = "needs an API server: make test-kubernetes"]
async fn a_pod_that_the_sets_controller_has_made_meanwhile_goes_again() {
    let cluster = Cluster::new().await;
    let named = Named::new(&cluster).await;
    named.api.delete("cart-0", &DeleteParams::default().grace_period(0)).await.unwrap();
    let other = there(&named.api, "cart-0", |pod| pod.uid() != named.source.uid()).await;
    let uid = named.pods.take_name(named.id, &named.moved).await.unwrap();
    assert_ne!(Some(&uid), other.uid().as_ref());
    named.taken(&uid).await;
    named.ends(&uid).await;
}

#[tokio::test]
#[ignore = "needs an API server: make test-kubernetes"]
async fn a_pod_that_a_node_has_taken_already_has_to_end_there_first() {
    let cluster = Cluster::new().await;
    let named = Named::new(&cluster).await;
    named.api.delete("cart-0", &DeleteParams::default().grace_period(0)).await.unwrap();
    let other = there(&named.api, "cart-0", |pod| pod.uid() != named.source.uid()).await;
    let binding = json!({ "metadata": { "name": "cart-0" }, "target": { "kind": "Node", "name": "elsewhere" } });
    let _status: serde_json::Value =
        named.api.create_subresource("binding", "cart-0", &PostParams::default(), &binding).await.unwrap();
    let (pods, id, moved) = (named.pods.clone(), named.id, named.moved.clone());
    let taking = tokio::spawn(async move { pods.take_name(id, &moved).await });
    there(&named.api, "cart-0", |pod| pod.metadata.deletion_timestamp.is_some()).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let ending = named.api.get("cart-0").await.unwrap();
    assert_eq!(ending.uid(), other.uid(), "there would be two of that name");
    assert!(!taking.is_finished());
    // As its kubelet says that it has ended.
    named.api.delete("cart-0", &DeleteParams::default().grace_period(0)).await.unwrap();
    let uid = taking.await.unwrap().unwrap();
    named.taken(&uid).await;
}

#[tokio::test]
#[ignore = "needs an API server: make test-kubernetes"]
async fn a_pod_that_its_node_refuses_behind_the_commit_is_made_again_and_the_reason_told() {
    let cluster = Cluster::new().await;
    let named = Named::new(&cluster).await;
    let first = named.pods.take_name(named.id, &named.moved).await.unwrap();
    let refused = json!({ "status": { "phase": "Failed", "reason": "OutOfcpu", "message": "no cpu" } });
    named.api.patch_status("cart-0", &PatchParams::default(), &Patch::Merge(&refused)).await.unwrap();
    let failure = named.pods.take_name(named.id, &named.moved).await.unwrap_err().to_string();
    assert!(failure.contains("OutOfcpu") && failure.contains("make room"), "{failure}");
    // No kubelet confirms that it has ended.
    named.api.delete("cart-0", &DeleteParams::default().grace_period(0)).await.ok();
    let end = Instant::now() + PATIENCE;
    let second = loop {
        match named.pods.take_name(named.id, &named.moved).await {
            Ok(uid) => break uid,
            Err(failure) => assert!(Instant::now() < end, "{failure}"),
        }
    };
    assert_ne!(first, second);
    named.taken(&second).await;
}

#[tokio::test]
#[ignore = "needs an API server: make test-kubernetes"]
async fn a_migration_that_is_undone_leaves_the_named_pod_alone() {
    let cluster = Cluster::new().await;
    let named = Named::new(&cluster).await;
    named.pods.discard_target(named.id, &named.moved).await.unwrap();
    let source = named.api.get("cart-0").await.unwrap();
    assert_eq!((source.uid(), source.metadata.deletion_timestamp), (named.source.uid(), None));
}
