//! Evictions by the API server's own eviction API, which asks the coordinator.
//!
//! The test cluster's API server reaches nothing of the host. It asks at a port of its own machine, which this test listens on, and hands on.

use std::net::SocketAddr;
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use http_body_util::BodyExt as _;
use k8s_openapi::api::admissionregistration::v1::ValidatingWebhookConfiguration;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::client::Body;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config, ResourceExt as _};
use podferry_crds::{
    EVICTED_BY_ANNOTATION, EVICTED_LABEL, Limits, Migration, MigrationPolicySpec, MigrationSpec, Strategy, Wishes,
};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::{Value, json};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};

use crate::account::WEBHOOK;
use crate::cluster::{Cluster, PATIENCE};
use crate::world::{Coordinator, Copy, Fault};

/// What comes of an eviction.
#[derive(Debug)]
struct Answer {
    code: u16,
    reason: String,
    message: String,
    warnings: String,
    tells_when: bool,
}

/// A cluster whose evictions are asked about.
struct Evictions {
    cluster: Cluster,
    pods: Api<Pod>,
    evictor: Client,
}

impl Evictions {
    async fn new(patience_s: u32) -> Self {
        let cluster = Cluster::new().await;
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let webhook = hand_on_from(machine("control").await, free);
        let section =
            format!("[kubernetes.eviction]\nlisten = \"{free}\"\nwebhook = \"{WEBHOOK}\"\npatience_s = {patience_s}\n");
        let path = cluster.world.configuration();
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, format!("{text}\n{section}")).unwrap();
        register(&cluster, webhook).await;
        let pods = Api::namespaced(cluster.kube(), cluster.namespace());
        Self { cluster, pods, evictor: evictor().await }
    }

    /// A pod that runs on node a as far as the API server knows.
    async fn pod(&self, name: &str, change: Value) -> Pod {
        let mut pod = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": { "name": name, "labels": { "app": name } },
            "spec": {
                "runtimeClassName": "podferry",
                "nodeName": "a",
                "automountServiceAccountToken": false,
                "containers": [{ "name": "main", "image": "podferry.test/none:1" }],
            },
        });
        merge(&mut pod, change);
        let pod: Pod = serde_json::from_value(pod).unwrap();
        let end = Instant::now() + PATIENCE;
        // A new namespace has no service account yet.
        while let Err(error) = self.pods.create(&PostParams::default(), &pod).await {
            assert!(Instant::now() < end, "{name} is not made: {error}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let runs = Patch::Merge(json!({ "status": { "phase": "Running" } }));
        self.pods.patch_status(name, &PatchParams::default(), &runs).await.unwrap()
    }

    async fn evict(&self, name: &str, dry_run: bool) -> Answer {
        let mut options = json!({ "gracePeriodSeconds": 0 });
        if dry_run {
            options["dryRun"] = json!(["All"]);
        }
        let eviction = json!({
            "apiVersion": "policy/v1", "kind": "Eviction", "metadata": { "name": name }, "deleteOptions": options,
        });
        let path = format!("/api/v1/namespaces/{}/pods/{name}/eviction", self.cluster.namespace());
        let request = axum::http::Request::post(path).header("content-type", "application/json");
        let request = request.body(Body::from(eviction.to_string().into_bytes())).unwrap();
        let answer = self.evictor.send(request).await.unwrap();
        let warnings: Vec<_> = answer.headers().get_all("warning").iter().map(|text| text.to_str().unwrap()).collect();
        let (code, warnings) = (answer.status().as_u16(), warnings.join("\n"));
        let tells_when = answer.headers().contains_key("retry-after");
        let body = answer.into_body().collect().await.unwrap().to_bytes();
        let said: Value = serde_json::from_slice(&body).unwrap();
        let text = |name: &str| said[name].as_str().unwrap_or_default().to_owned();
        Answer { code, reason: text("reason"), message: text("message"), warnings, tells_when }
    }

    /// Waits until the API server asks: it learns of the certificate by a watch. `name` is a pod that could move.
    async fn are_asked_about(&self, name: &str) {
        let end = Instant::now() + PATIENCE;
        loop {
            let answer = self.evict(name, true).await;
            if answer.warnings.contains("podferry would move this pod") {
                return;
            }
            assert!(Instant::now() < end, "the API server does not ask: {answer:?}");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    async fn is_there(&self, name: &str) -> bool {
        self.pods.get_opt(name).await.unwrap().is_some()
    }

    async fn begin(&self) -> Coordinator {
        self.cluster.coordinator().await
    }

    /// Where a restore hangs there is time to look.
    fn hold_up(&self) {
        for node in ["b", "c"] {
            self.cluster.world.fault(node, "Restore", Fault::Hang, 1);
        }
    }

    fn let_go(&self) {
        for node in ["b", "c"] {
            self.cluster.world.heal(node, "Restore");
        }
    }
}

impl Drop for Evictions {
    /// The next API request of another test must not wait for nobody.
    fn drop(&mut self) {
        let client = self.cluster.kube();
        let gone = async move {
            let api: Api<ValidatingWebhookConfiguration> = Api::all(client);
            let _gone_already = api.delete(WEBHOOK, &DeleteParams::default()).await;
        };
        tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(gone));
    }
}

fn merge(into: &mut Value, change: Value) {
    match (into, change) {
        (Value::Object(into), Value::Object(change)) => {
            for (name, value) in change {
                merge(into.entry(name).or_insert(Value::Null), value);
            }
        }
        (into, change) => *into = change,
    }
}

/// A client that hears of each 429. By itself it would try again, as evictors do, and hear of the last one alone.
async fn evictor() -> Client {
    let file = Kubeconfig::read_from(std::env::var_os("KUBECONFIG").unwrap()).unwrap();
    let mut config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.unwrap();
    config.default_retry = false;
    Client::try_from(config).unwrap()
}

/// The process that a machine of the test cluster consists of.
async fn machine(name: &str) -> i64 {
    let command = std::env::var("PODFERRY_TESTCLUSTER").expect("the command of the test cluster, without a verb");
    let told = tokio::process::Command::new("sh").arg("-c").arg(format!("{command} status")).output().await.unwrap();
    let status: Value = serde_json::from_slice(&told.stdout).unwrap();
    status["machines"][name]["init"].as_i64().unwrap()
}

/// A port of that machine behind which is one of the host's.
fn hand_on_from(machine: i64, to: SocketAddr) -> SocketAddr {
    let listening = std::thread::spawn(move || {
        let network = std::fs::File::open(format!("/proc/{machine}/ns/net")).unwrap();
        move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        listener
    });
    let listener = listening.join().unwrap();
    let address = listener.local_addr().unwrap();
    let listener = TcpListener::from_std(listener).unwrap();
    tokio::spawn(async move {
        while let Ok((mut asked, _)) = listener.accept().await {
            tokio::spawn(async move {
                if let Ok(mut there) = TcpStream::connect(to).await {
                    let _broken_off = copy_bidirectional(&mut asked, &mut there).await;
                }
            });
        }
    });
    address
}

/// What the chart makes, but for where it is asked.
async fn register(cluster: &Cluster, at: SocketAddr) {
    let object = json!({
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingWebhookConfiguration",
        "metadata": { "name": WEBHOOK },
        "webhooks": [{
            "name": "eviction.podferry.dev",
            "rules": [{ "apiGroups": [""], "apiVersions": ["v1"], "resources": ["pods/eviction"], "operations": ["CREATE"] }],
            "clientConfig": { "url": format!("https://{at}/") },
            "admissionReviewVersions": ["v1"],
            "sideEffects": "NoneOnDryRun",
            "failurePolicy": "Ignore",
            "timeoutSeconds": 5,
        }],
    });
    let api: Api<ValidatingWebhookConfiguration> = Api::all(cluster.kube());
    let _gone_already = api.delete(WEBHOOK, &DeleteParams::default()).await;
    api.patch(WEBHOOK, &PatchParams::apply("podferry-test").force(), &Patch::Apply(&object)).await.unwrap();
}

fn migration_of(pod: &Pod) -> String {
    format!("evicted-{}", pod.uid().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs an API server: make test-kubernetes"]
async fn an_eviction_becomes_one_migration_and_is_put_off_while_that_is_under_way() {
    let evictions = Evictions::new(600).await;
    let _coordinator = evictions.begin().await;
    let cart = evictions.pod("cart", json!({})).await;
    evictions.are_asked_about("cart").await;
    assert!(evictions.cluster.list().await.is_empty(), "a dry run makes nothing");
    evictions.hold_up();

    let first = evictions.evict("cart", false).await;
    assert_eq!((first.code, first.reason.as_str(), first.tells_when), (429, "TooManyRequests", false), "{first:?}");
    let name = migration_of(&cart);
    assert!(first.message.contains(&name) && first.message.contains("instead"), "{first:?}");
    let object = evictions.cluster.get(&name).await.unwrap();
    assert_eq!((object.spec.pod_name.as_str(), &object.spec.target_node), ("cart", &None));
    assert_eq!(object.labels()[EVICTED_LABEL], cart.uid().unwrap());
    assert!(!object.annotations()[EVICTED_BY_ANNOTATION].is_empty());
    assert!(object.spec.ttl_seconds_after_finished.is_some());

    evictions.cluster.phase(&name, "freeze").await;
    let second = evictions.evict("cart", false).await;
    assert!(second.code == 429 && second.message.contains(&name), "{second:?}");
    assert_eq!(evictions.cluster.list().await.len(), 1);
    assert!(evictions.is_there("cart").await);
    evictions.let_go();
    evictions.cluster.phase(&name, "succeeded").await;
    assert_eq!(evictions.cluster.world.copy("a", "cart"), None);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs an API server: make test-kubernetes"]
async fn an_eviction_waits_for_what_others_have_asked_for() {
    let evictions = Evictions::new(600).await;
    let _coordinator = evictions.begin().await;
    evictions.pod("cart", json!({})).await;
    evictions.are_asked_about("cart").await;
    evictions.hold_up();
    let wishes = Wishes { strategy: Some(Strategy::Warm), ..Wishes::default() };
    let asked = MigrationSpec { pod_name: "cart".to_owned(), wishes, ..MigrationSpec::default() };
    evictions.cluster.make("by-hand", asked).await;
    let moving = evictions.cluster.phase("by-hand", "freeze").await;
    let answer = evictions.evict("cart", false).await;
    assert!(answer.code == 429 && answer.message.contains(&moving.status.unwrap().id), "{answer:?}");
    assert_eq!(evictions.cluster.list().await.len(), 1, "no other one is made");
    evictions.let_go();
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs an API server: make test-kubernetes"]
async fn a_pod_that_podferry_cannot_help_is_evicted_at_once_with_the_reason() {
    let evictions = Evictions::new(600).await;
    let _coordinator = evictions.begin().await;
    evictions.pod("cart", json!({})).await;
    evictions.are_asked_about("cart").await;
    let pod_selector = serde_json::from_value(json!({ "matchLabels": { "app": "stays" } })).unwrap();
    let limits = Limits { movable: Some(false), ..Limits::default() };
    evictions
        .cluster
        .policy("stays", MigrationPolicySpec { pod_selector, limits, ..MigrationPolicySpec::default() })
        .await;
    for (name, change, warning) in [
        ("other", json!({ "spec": { "runtimeClassName": null } }), ""),
        ("shares", json!({ "spec": { "hostNetwork": true } }), "hostNetwork"),
        ("stays", json!({}), "does not allow that this pod is moved"),
        ("elsewhere", json!({ "spec": { "nodeName": "z" } }), "its node does not take part"),
    ] {
        evictions.pod(name, change).await;
        let answer = evictions.evict(name, false).await;
        assert_eq!(answer.code, 201, "{name}: {answer:?}");
        let as_expected =
            if warning.is_empty() { answer.warnings.is_empty() } else { answer.warnings.contains(warning) };
        assert!(as_expected, "{name}: {answer:?}");
        assert!(!evictions.is_there(name).await, "{name} is evicted");
    }
    assert_eq!(evictions.evict("nobody", false).await.code, 404);
    assert!(evictions.cluster.list().await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs an API server: make test-kubernetes"]
async fn a_pod_whose_migration_came_to_nothing_is_evicted() {
    let evictions = Evictions::new(600).await;
    let _coordinator = evictions.begin().await;
    // No container of the world is this pod's.
    let pod = evictions.pod("unknown", json!({})).await;
    evictions.are_asked_about("unknown").await;
    assert_eq!(evictions.evict("unknown", false).await.code, 429);
    let refused: Migration = evictions.cluster.phase(&migration_of(&pod), "refused").await;
    let answer = evictions.evict("unknown", false).await;
    assert_eq!(answer.code, 201, "{answer:?}");
    assert!(
        answer.warnings.contains("was tried already") && answer.warnings.contains(&refused.name_any()),
        "{answer:?}"
    );
    assert!(!evictions.is_there("unknown").await);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs an API server: make test-kubernetes"]
async fn an_eviction_is_put_off_for_no_longer_than_the_patience() {
    // Less than the freeze may take there.
    let evictions = Evictions::new(2).await;
    let _coordinator = evictions.begin().await;
    evictions.pod("cart", json!({})).await;
    evictions.are_asked_about("cart").await;
    evictions.hold_up();
    assert_eq!(evictions.evict("cart", false).await.code, 429);
    tokio::time::sleep(Duration::from_millis(2200)).await;
    let answer = evictions.evict("cart", false).await;
    assert!(answer.code == 201 && answer.warnings.contains("put off no longer"), "{answer:?}");
    assert!(!evictions.is_there("cart").await);
    evictions.let_go();
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs an API server: make test-kubernetes"]
async fn evictions_go_through_while_no_coordinator_answers_and_the_next_one_is_asked() {
    let evictions = Evictions::new(600).await;
    let coordinator = evictions.begin().await;
    evictions.pod("cart", json!({})).await;
    evictions.are_asked_about("cart").await;
    coordinator.kill().await;
    evictions.pod("unlucky", json!({})).await;
    let answer = evictions.evict("unlucky", false).await;
    assert!(answer.code == 201 && answer.warnings.is_empty(), "{answer:?}");
    assert!(!evictions.is_there("unlucky").await);
    // It has another certificate, and another path.
    let _coordinator = evictions.begin().await;
    evictions.are_asked_about("cart").await;
    assert_eq!(evictions.cluster.world.copy("a", "cart"), Some(Copy::Running));
}
