//! A namespace of an API server, with the agents of `world`.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Namespace;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{DeleteParams, ListParams, ObjectMeta, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::runtime::wait::{await_condition, conditions};
use kube::{Api, Client, Config, ResourceExt as _};
use podferry_common::identity::Peer;
use podferry_crds::{
    Migration, MigrationPolicy, MigrationPolicySpec, MigrationSpec, NodeEvacuation, Strategy, Wishes, definitions,
};
use serde_json::json;
use tokio::time::timeout;

use crate::account;
use crate::world::{self, Coordinator, World};

/// How long anything may take. A lease of somebody who was killed lapses in 15 s.
pub(crate) const PATIENCE: Duration = Duration::from_secs(40);

pub(crate) struct Cluster {
    pub(crate) world: World,
    client: Client,
    namespace: String,
    /// That of the coordinators: they may do what they need alone.
    kubeconfig: PathBuf,
}

/// What a migration of that pod to node b asks for.
pub(crate) fn spec(pod: &str, strategy: Strategy) -> MigrationSpec {
    let wishes = Wishes { strategy: Some(strategy), ..Wishes::default() };
    MigrationSpec { pod_name: pod.to_owned(), target_node: Some("b".to_owned()), wishes, ..MigrationSpec::default() }
}

/// Status, reason and generation of a condition.
pub(crate) fn condition(object: &Migration, kind: &str) -> (String, String, Option<i64>) {
    let all = &object.status.as_ref().unwrap().conditions;
    let found = all.iter().find(|condition| condition.type_ == kind);
    let found = found.unwrap_or_else(|| panic!("no {kind} in {all:?}"));
    (found.status.clone(), found.reason.clone(), found.observed_generation)
}

impl Cluster {
    /// A new namespace, in which the containers of the world are pods. What former tests have left behind is removed: a coordinator
    /// goes on with all migrations of its cluster.
    pub(crate) async fn new() -> Self {
        let kubeconfig =
            PathBuf::from(std::env::var_os("KUBECONFIG").expect("KUBECONFIG names an API server to test with"));
        let file = Kubeconfig::read_from(&kubeconfig).unwrap();
        let config = Config::from_custom_kubeconfig(file.clone(), &KubeConfigOptions::default()).await.unwrap();
        let client = Client::try_from(config).unwrap();
        install(&client).await;
        sweep(&client).await;
        let namespaces: Api<Namespace> = Api::all(client.clone());
        let metadata = ObjectMeta { generate_name: Some("podferry-test-".to_owned()), ..ObjectMeta::default() };
        let made =
            namespaces.create(&PostParams::default(), &Namespace { metadata, ..Namespace::default() }).await.unwrap();
        let namespace = made.name_any();
        let world = World::new().await;
        let inventory = world.folder.path().join("inventory.toml");
        let text = std::fs::read_to_string(&inventory).unwrap();
        let text = text.replace("name = \"shop\"", &format!("name = \"{namespace}/cart\""));
        std::fs::write(&inventory, text).unwrap();
        let kubeconfig = world.folder.path().join("kubeconfig");
        account::write_kubeconfig(&client, &namespace, &file, &kubeconfig).await;
        let cluster = Self { world, client, namespace, kubeconfig };
        cluster.configure(&cluster.world.configuration(), "state");
        cluster
    }

    fn configure(&self, path: &std::path::Path, state: &str) {
        let text = std::fs::read_to_string(self.world.configuration()).unwrap();
        let text = text.replace("state_dir = \"state\"", &format!("state_dir = \"{state}\""));
        let (own, _) = text.split_once("[kubernetes]").unwrap_or((&text, ""));
        let (namespace, kubeconfig) = (&self.namespace, self.kubeconfig.display());
        let section = format!("[kubernetes]\nnamespace = \"{namespace}\"\nkubeconfig = \"{kubeconfig}\"\n");
        std::fs::write(path, format!("{own}{section}")).unwrap();
        std::fs::create_dir_all(self.world.folder.path().join(state)).unwrap();
    }

    /// The configuration of another coordinator of the same cluster.
    pub(crate) fn configuration(&self, name: &str) -> PathBuf {
        let path = self.world.folder.path().join(format!("{name}.toml"));
        self.configure(&path, name);
        path
    }

    pub(crate) async fn coordinator(&self) -> Coordinator {
        Coordinator::start(&self.world.configuration()).await
    }

    pub(crate) async fn client(&self, coordinator: &Coordinator) -> world::Client {
        self.world.client(coordinator, &Peer::client("tester").unwrap()).await
    }

    pub(crate) fn workload(&self, pod: &str) -> String {
        format!("{}/{pod}", self.namespace)
    }

    pub(crate) fn namespace(&self) -> &str {
        &self.namespace
    }

    /// As an administrator.
    pub(crate) fn kube(&self) -> Client {
        self.client.clone()
    }

    fn api(&self) -> Api<Migration> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    pub(crate) async fn try_make(&self, name: &str, spec: MigrationSpec) -> Result<Migration, String> {
        let object = Migration::new(name, spec);
        self.api().create(&PostParams::default(), &object).await.map_err(|error| error.to_string())
    }

    pub(crate) async fn make(&self, name: &str, spec: MigrationSpec) {
        self.try_make(name, spec).await.unwrap();
    }

    pub(crate) async fn policy(&self, name: &str, spec: MigrationPolicySpec) {
        let api: Api<MigrationPolicy> = Api::namespaced(self.client.clone(), &self.namespace);
        api.create(&PostParams::default(), &MigrationPolicy::new(name, spec)).await.unwrap();
    }

    pub(crate) async fn patch(&self, name: &str, patch: serde_json::Value) -> Result<Migration, String> {
        let patched = self.api().patch(name, &PatchParams::default(), &Patch::Merge(patch)).await;
        patched.map_err(|error| error.to_string())
    }

    pub(crate) async fn delete(&self, name: &str) {
        self.api().delete(name, &DeleteParams::default()).await.unwrap();
    }

    pub(crate) async fn get(&self, name: &str) -> Option<Migration> {
        self.api().get_opt(name).await.unwrap()
    }

    pub(crate) async fn list(&self) -> Vec<Migration> {
        self.api().list(&ListParams::default()).await.unwrap().items
    }

    /// Waits until an object has come to that phase.
    pub(crate) async fn phase(&self, name: &str, phase: &str) -> Migration {
        let there = |object: &Migration| object.status.as_ref().is_some_and(|status| status.phase == phase);
        self.until(name, phase, there).await
    }

    pub(crate) async fn until(&self, name: &str, what: &str, such: impl Fn(&Migration) -> bool) -> Migration {
        let such = |object: Option<&Migration>| object.is_some_and(&such);
        let found = timeout(PATIENCE, await_condition(self.api(), name, such)).await;
        let Ok(found) = found else { panic!("{name} does not come to {what}: {:#?}", self.get(name).await) };
        found.unwrap().unwrap()
    }

    /// Waits until an object is gone.
    pub(crate) async fn gone(&self, name: &str) {
        let Some(object) = self.get(name).await else { return };
        let uid = object.uid().unwrap();
        let deleted = conditions::is_deleted(&uid);
        let gone = timeout(PATIENCE, await_condition(self.api(), name, deleted)).await;
        assert!(gone.is_ok(), "{name} stays: {:#?}", self.get(name).await);
    }

    /// Waits until there is an event of an object with that reason: events are written beside everything else, and late.
    pub(crate) async fn event(&self, name: &str, reason: &str) {
        let end = Instant::now() + PATIENCE;
        loop {
            let events = self.events(name).await;
            if events.iter().any(|event| event == reason) {
                return;
            }
            assert!(Instant::now() < end, "no event of {name} is {reason}: {events:?}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// The reasons of the events of an object.
    async fn events(&self, name: &str) -> Vec<String> {
        let api: Api<Event> = Api::namespaced(self.client.clone(), &self.namespace);
        let all = api.list(&ListParams::default()).await.unwrap().items;
        let of = |event: &Event| event.regarding.as_ref().is_some_and(|about| about.name.as_deref() == Some(name));
        all.into_iter().filter(of).filter_map(|event| event.reason).collect()
    }
}

/// Installs the definitions.
async fn install(client: &Client) {
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    for (_, definition) in definitions() {
        let name = definition.name_any();
        let parameters = PatchParams::apply("podferry-test").force();
        api.patch(&name, &parameters, &Patch::Apply(&definition)).await.unwrap();
        let established = await_condition(api.clone(), &name, conditions::is_crd_established());
        timeout(PATIENCE, established).await.expect("the API server does not serve a kind").unwrap();
    }
}

async fn sweep(client: &Client) {
    let evacuations: Api<NodeEvacuation> = Api::all(client.clone());
    for object in evacuations.list(&ListParams::default()).await.unwrap() {
        let free = Patch::Merge(json!({"metadata": {"finalizers": null}}));
        let _gone_already = evacuations.delete(&object.name_any(), &DeleteParams::default()).await;
        let _gone_already = evacuations.patch(&object.name_any(), &PatchParams::default(), &free).await;
    }
    let all: Api<Migration> = Api::all(client.clone());
    for object in all.list(&ListParams::default()).await.unwrap() {
        let api: Api<Migration> = Api::namespaced(client.clone(), &object.namespace().unwrap());
        let free = Patch::Merge(json!({"metadata": {"finalizers": null}}));
        let _gone_already = api.delete(&object.name_any(), &DeleteParams::default()).await;
        let _gone_already = api.patch(&object.name_any(), &PatchParams::default(), &free).await;
    }
    let namespaces: Api<Namespace> = Api::all(client.clone());
    for old in namespaces.list(&ListParams::default()).await.unwrap() {
        if old.name_any().starts_with("podferry-test-") && old.metadata.deletion_timestamp.is_none() {
            let _gone_already = namespaces.delete(&old.name_any(), &DeleteParams::default()).await;
        }
    }
}
