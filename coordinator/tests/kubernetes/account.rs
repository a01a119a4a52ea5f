//! A service account that may do what a coordinator needs, and no more.

use std::path::Path;

use k8s_openapi::api::authentication::v1::{TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::ServiceAccount;
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding};
use kube::api::{Patch, PatchParams, PostParams};
use kube::config::Kubeconfig;
use kube::{Api, Client, Resource};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// The one object of its kind that it may change.
pub(crate) const WEBHOOK: &str = "podferry-eviction-test";

const NAME: &str = "podferry-coordinator-test";

/// In all namespaces.
fn cluster_rules() -> Value {
    json!([
        {"apiGroups": ["podferry.dev"], "resources": ["migrations", "nodeevacuations"], "verbs": ["get", "list", "watch", "create", "patch", "delete"]},
        {"apiGroups": ["podferry.dev"], "resources": ["migrations/status", "nodeevacuations/status"], "verbs": ["update"]},
        {"apiGroups": ["podferry.dev"], "resources": ["migrationpolicies"], "verbs": ["list"]},
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["get"]},
        {"apiGroups": ["admissionregistration.k8s.io"], "resources": ["validatingwebhookconfigurations"], "resourceNames": [WEBHOOK], "verbs": ["get", "patch"]},
        {"apiGroups": ["events.k8s.io"], "resources": ["events"], "verbs": ["create", "patch"]},
    ])
}

/// In the coordinator's own namespace.
fn own_rules() -> Value {
    json!([{"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["get", "create", "update"]}])
}

/// Makes the account in that namespace, and writes a kubeconfig of it.
pub(crate) async fn write_kubeconfig(client: &Client, namespace: &str, cluster: &Kubeconfig, path: &Path) {
    let metadata = json!({"name": NAME});
    let of_rules = |rules: Value| json!({"metadata": metadata, "rules": rules});
    let binding = |kind: &str| {
        json!({
            "metadata": metadata,
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": NAME},
            "subjects": [{"kind": "ServiceAccount", "name": NAME, "namespace": namespace}],
        })
    };
    let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), namespace);
    apply(&accounts, json!({"metadata": metadata})).await;
    apply(&Api::<ClusterRole>::all(client.clone()), of_rules(cluster_rules())).await;
    apply(&Api::<ClusterRoleBinding>::all(client.clone()), binding("ClusterRole")).await;
    apply(&Api::<Role>::namespaced(client.clone(), namespace), of_rules(own_rules())).await;
    apply(&Api::<RoleBinding>::namespaced(client.clone(), namespace), binding("Role")).await;
    let spec = TokenRequestSpec { expiration_seconds: Some(3600), ..TokenRequestSpec::default() };
    let request = TokenRequest { spec: Some(spec), ..TokenRequest::default() };
    let answer = accounts.create_token_request(NAME, &PostParams::default(), &request).await.unwrap();
    let there = cluster.clusters[0].cluster.clone().unwrap();
    let kubeconfig = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": NAME,
        "clusters": [{"name": NAME, "cluster": {
            "server": there.server,
            "certificate-authority": there.certificate_authority,
            "certificate-authority-data": there.certificate_authority_data,
        }}],
        "users": [{"name": NAME, "user": {"token": answer.status.unwrap().token}}],
        "contexts": [{"name": NAME, "context": {"cluster": NAME, "user": NAME}}],
    });
    std::fs::write(path, kubeconfig.to_string()).unwrap();
}

async fn apply<K>(api: &Api<K>, mut object: Value)
where
    K: Resource<DynamicType = ()> + Clone + std::fmt::Debug + Serialize + DeserializeOwned,
{
    object["apiVersion"] = K::api_version(&()).into();
    object["kind"] = K::kind(&()).into();
    api.patch(NAME, &PatchParams::apply("podferry-test").force(), &Patch::Apply(&object)).await.unwrap();
}
