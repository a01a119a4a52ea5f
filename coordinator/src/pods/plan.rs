//! Which pods can move, and what the pod is like that takes one's place. Pure.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec, Volume};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use podferry_common::{Failure, FailureCode, MigrationId};
use serde::{Deserialize, Serialize};

use crate::store::PodMove;
use crate::strategy::Strategy;

/// The annotation that says by which migration a pod's container comes. `podferry-runtime` on the node reads it.
pub(super) const MIGRATION: &str = "podferry.dev/migration";
/// The annotation with what the target pod gets when it is adopted.
pub(super) const ADOPT: &str = "podferry.dev/adopt";
/// The annotation with the name that a pod had before it moved for the first time.
const NAME: &str = "podferry.dev/name";
/// The finalizer of a pod whose name is another's to have.
const NAME_HELD: &str = "podferry.dev/name";
/// The runtime class of pods that can move.
pub(super) const RUNTIME_CLASS: &str = "podferry";
/// What a Deployment tells its ReplicaSets' pods apart by.
const TEMPLATE_HASH: &str = "pod-template-hash";
/// What a Job's controller selects its pods by; the second before Kubernetes 1.27, and still set.
const JOB_UID: [&str; 2] = ["batch.kubernetes.io/controller-uid", "controller-uid"];
/// The finalizer by which a Job's controller counts each of its pods once. It stays on a pod until that is counted.
const JOB_TRACKING: &str = "batch.kubernetes.io/job-tracking";
/// What a ReplicaSet looks at when it has to choose among pods.
const DELETION_COST: &str = "controller.kubernetes.io/pod-deletion-cost";
/// Bytes that are left of a pod's name for what comes behind it.
const MAX_BASE: usize = 200;

/// What the target pod gets when it is adopted.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Adoption {
    /// All labels.
    pub(super) labels: BTreeMap<String, String>,
    /// The owner.
    pub(super) owners: Vec<OwnerReference>,
    /// What a ReplicaSet looks at when it chooses, as the pod had it itself.
    #[serde(default)]
    pub(super) deletion_cost: Option<String>,
    /// That of a Job.
    #[serde(default)]
    pub(super) finalizers: Vec<String>,
}

impl Adoption {
    /// What is written on a target pod.
    pub(super) fn of_target(pod: &Pod) -> Option<Self> {
        serde_json::from_str(annotation(pod, ADOPT)?).ok()
    }

    /// The labels by which Services find it and no controller does; none when they cannot be told apart.
    pub(super) fn exposed(&self) -> Option<BTreeMap<String, String>> {
        let mut labels = self.labels.clone();
        labels.retain(|name, _| name != TEMPLATE_HASH && !JOB_UID.contains(&name.as_str()));
        (self.owners.is_empty() || labels.len() < self.labels.len()).then_some(labels)
    }

    /// Whether a Job counts the pod.
    pub(super) fn is_of_job(&self) -> bool {
        self.owners.iter().any(is_job)
    }
}

fn is_stateful_set(owner: &OwnerReference) -> bool {
    owner.controller == Some(true) && owner.kind == "StatefulSet" && owner.api_version.starts_with("apps/")
}

/// Whether only a pod of the same name can take a pod's place.
pub(super) fn keeps_name(pod: &Pod) -> bool {
    pod.metadata.owner_references.iter().flatten().any(is_stateful_set)
}

fn is_job(owner: &OwnerReference) -> bool {
    owner.controller == Some(true) && owner.kind == "Job" && owner.api_version.starts_with("batch/")
}

/// The first part of the names of a pod's successors.
pub(super) fn base_name(pod: &Pod) -> String {
    let kept = annotation(pod, NAME).map(ToOwned::to_owned);
    let generated = pod.metadata.generate_name.as_ref().map(|name| name.trim_end_matches('-').to_owned());
    kept.or(generated).or_else(|| pod.metadata.name.clone()).unwrap_or_default()
}

/// The name of the pod that comes of a migration: the same each time it is asked for.
pub fn target_name(base: &str, id: MigrationId) -> String {
    let (id, base) = (id.to_string(), base.get(..MAX_BASE).unwrap_or(base));
    format!("{}-{}", base.trim_end_matches(['-', '.']), &id[id.len() - 8..])
}

/// Whether a pod can be moved in that way. All that speaks against it is said at once.
///
/// # Errors
/// `FAILED_PRECONDITION`, with what to do.
pub(crate) fn check_movable(pod: &Pod, strategy: Strategy) -> Result<(), Failure> {
    let mut why: Vec<(String, &str)> = Vec::new();
    let spec = pod.spec.clone().unwrap_or_default();
    if !is_of_class(pod) {
        why.push((
            format!("its runtime class is {:?}", spec.runtime_class_name.as_deref().unwrap_or("the default")),
            "set runtimeClassName: podferry in its template, and let it be made anew once",
        ));
    }
    if strategy.starts_anew() {
        why.push((format!("{strategy} does not move pods yet"), "use live, warm, postcopy or hybrid"));
    }
    why.extend(shape(&spec));
    why.extend(owner(pod, strategy));
    why.extend(spec.volumes.iter().flatten().filter_map(volume));
    why.extend(spec.containers.iter().filter_map(|container| sub_path(&spec, container)));
    if pod.metadata.deletion_timestamp.is_some() {
        why.push(("it is being deleted".to_owned(), "move the pod that takes its place"));
    }
    if why.is_empty() {
        return has_arrived(pod);
    }
    let (messages, remedies): (Vec<_>, Vec<_>) = why.into_iter().unzip();
    let mut remedies: Vec<&str> = remedies;
    remedies.dedup();
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let message = format!("pod {namespace}/{name} cannot move: {}", messages.join("; "));
    Err(Failure::new(FailureCode::FailedPrecondition, message).in_phase("preflight").remedy(remedies.join("; ")))
}

/// Refuses a pod that has not taken its predecessor's place yet: its migration would go on with a pod that moves away.
fn has_arrived(pod: &Pod) -> Result<(), Failure> {
    let Some(id) = comes_by(pod) else { return Ok(()) };
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    let message = format!("pod {name} is still taking its predecessor's place in migration {id}");
    Err(Failure::new(FailureCode::AlreadyExists, message).in_phase("preflight").remedy("try again when it has"))
}

/// Whether a pod is of podferry's runtime class.
pub(crate) fn is_of_class(pod: &Pod) -> bool {
    pod.spec.as_ref().is_some_and(|spec| spec.runtime_class_name.as_deref() == Some(RUNTIME_CLASS))
}

/// The migration by which a pod comes that has not taken its predecessor's place yet.
pub(crate) fn comes_by(pod: &Pod) -> Option<&str> {
    annotation(pod, MIGRATION)
}

fn annotation<'a>(pod: &'a Pod, name: &str) -> Option<&'a str> {
    pod.metadata.annotations.as_ref()?.get(name).map(String::as_str)
}

fn shape(spec: &PodSpec) -> Vec<(String, &'static str)> {
    const ALONE: &str = "only pods with one container move yet";
    let sidecars =
        spec.init_containers.iter().flatten().filter(|init| init.restart_policy.as_deref() == Some("Always"));
    let containers = spec.containers.len() + sidecars.count();
    let shares = [
        (spec.host_network, "the node's network (hostNetwork)"),
        (spec.host_pid, "the node's processes (hostPID)"),
        (spec.host_ipc, "the node's IPC (hostIPC)"),
        (spec.share_process_namespace, "process ids among its containers (shareProcessNamespace)"),
    ];
    let mut why: Vec<_> = shares
        .into_iter()
        .filter(|(shared, _)| *shared == Some(true))
        .map(|(_, what)| (format!("it shares {what}"), "let it have its own"))
        .collect();
    if containers != 1 {
        why.push((format!("it has {containers} containers"), ALONE));
    }
    if spec.ephemeral_containers.as_ref().is_some_and(|ephemeral| !ephemeral.is_empty()) {
        why.push(("it has ephemeral containers".to_owned(), "those of `kubectl debug` end with the pod"));
    }
    why
}

fn owner(pod: &Pod, strategy: Strategy) -> Option<(String, &'static str)> {
    let owner = pod.metadata.owner_references.iter().flatten().find(|owner| owner.controller == Some(true))?;
    let has_label = |name: &&str| pod.metadata.labels.as_ref().is_some_and(|labels| labels.contains_key(*name));
    let remedy = match owner.kind.as_str() {
        "ReplicaSet" => return None,
        "Job" if is_job(owner) && JOB_UID.iter().any(has_label) => return None,
        "Job" => "pods of a Job that selects them by labels of its own (manualSelector) do not move",
        "DaemonSet" => "its DaemonSet has one on each node already",
        "StatefulSet" if is_stateful_set(owner) && !strategy.path().post_copy => return None,
        "StatefulSet" => {
            "use live or warm: its pod has to go before the next of its name runs, and with it memory that was not sent"
        }
        "Node" => "static pods belong to their node",
        _ => "only pods of Deployments, ReplicaSets, StatefulSets and Jobs, and those that nobody owns, move yet",
    };
    Some((format!("it belongs to {} {}", owner.kind, owner.name), remedy))
}

/// Which volumes come along, are on each node, or keep the pod where it is.
fn volume(volume: &Volume) -> Option<(String, &'static str)> {
    let anywhere = volume.empty_dir.is_some()
        || volume.config_map.is_some()
        || volume.secret.is_some()
        || volume.projected.is_some()
        || volume.downward_api.is_some()
        || volume.image.is_some()
        || volume.nfs.is_some();
    if anywhere {
        return None;
    }
    let (what, remedy) = if volume.persistent_volume_claim.is_some() {
        ("a persistent volume claim", "pods with claims do not move yet; use emptyDir, or NFS in the pod itself")
    } else if volume.host_path.is_some() {
        ("a folder of its node (hostPath)", "use emptyDir, which moves along")
    } else if volume.ephemeral.is_some() {
        ("an ephemeral claim", "use emptyDir, which moves along")
    } else {
        ("of a kind that podferry does not know", "use emptyDir, configMap, secret, projected, downwardAPI or NFS")
    };
    Some((format!("its volume {} is {what}", volume.name), remedy))
}

/// Part of an `emptyDir` is mounted from elsewhere on the node, and would stay.
fn sub_path(spec: &PodSpec, container: &Container) -> Option<(String, &'static str)> {
    let empty_dir =
        |name: &str| spec.volumes.iter().flatten().any(|volume| volume.name == name && volume.empty_dir.is_some());
    let mount = container
        .volume_mounts
        .iter()
        .flatten()
        .find(|mount| (mount.sub_path.is_some() || mount.sub_path_expr.is_some()) && empty_dir(&mount.name))?;
    let message = format!("it mounts a part (subPath) of its emptyDir {} at {}", mount.name, mount.mount_path);
    Some((message, "mount the whole of it"))
}

/// The pod that takes one's place on that node.
///
/// # Errors
/// When it cannot be written down, which no pod of an API server is.
pub(super) fn target_pod(pod: &Pod, moved: &PodMove, node: &str, id: MigrationId) -> Result<Pod, serde_json::Error> {
    let source = &pod.metadata;
    let labels = source.labels.clone().unwrap_or_default();
    let mut annotations = source.annotations.clone().unwrap_or_default();
    let adoption = Adoption {
        labels,
        owners: source.owner_references.clone().unwrap_or_default(),
        deletion_cost: annotations.get(DELETION_COST).cloned(),
        finalizers: source.finalizers.iter().flatten().filter(|name| *name == JOB_TRACKING).cloned().collect(),
    };
    annotations.insert(MIGRATION.to_owned(), id.to_string());
    annotations.insert(ADOPT.to_owned(), serde_json::to_string(&adoption)?);
    annotations.insert(NAME.to_owned(), base_name(pod));
    annotations.insert(DELETION_COST.to_owned(), i32::MAX.to_string());
    let spec = pod.spec.clone().map(|spec| PodSpec {
        node_name: Some(node.to_owned()),
        // They have run. What they left in volumes comes along.
        init_containers: None,
        ephemeral_containers: None,
        scheduling_gates: None,
        ..spec
    });
    Ok(Pod {
        metadata: ObjectMeta {
            namespace: Some(moved.namespace.clone()),
            name: Some(moved.target_name.clone()),
            labels: Some(BTreeMap::from([(MIGRATION.to_owned(), id.to_string())])),
            annotations: Some(annotations),
            ..ObjectMeta::default()
        },
        spec,
        status: None,
    })
}

/// The pod of the source's name that takes the place of both: the source and the one that stands in for it.
pub(super) fn named_pod(stand_in: &Pod, moved: &PodMove, id: MigrationId) -> Pod {
    let Adoption { mut labels, owners, deletion_cost, finalizers } = Adoption::of_target(stand_in).unwrap_or_default();
    let mut annotations = stand_in.metadata.annotations.clone().unwrap_or_default();
    annotations.retain(|name, _| name != NAME && name != DELETION_COST);
    annotations.extend(deletion_cost.map(|cost| (DELETION_COST.to_owned(), cost)));
    labels.insert(MIGRATION.to_owned(), id.to_string());
    Pod {
        metadata: ObjectMeta {
            namespace: Some(moved.namespace.clone()),
            name: Some(moved.name.clone()),
            labels: Some(labels),
            annotations: Some(annotations),
            owner_references: Some(owners),
            finalizers: Some(finalizers),
            ..ObjectMeta::default()
        },
        spec: stand_in.spec.clone(),
        status: None,
    }
}

/// Who has the name that a pod is to have.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Holder {
    /// Nobody.
    None,
    /// The source, whose container has stopped for good.
    Source,
    /// The pod that is to have it; why it does not come.
    Named(Option<String>),
    /// One that its controller has made since, and that no node has.
    Nobodys,
    /// One that a node has.
    Taken,
    /// One that a node had, and of which nothing is left there.
    Ended,
}

/// Who has the name.
pub(super) fn holder(there: Option<&Pod>, moved: &PodMove, id: MigrationId) -> Holder {
    let Some(pod) = there else { return Holder::None };
    if is_marked(pod, id) {
        return Holder::Named(does_not_come(pod));
    }
    let has_node = pod.spec.as_ref().is_some_and(|spec| spec.node_name.is_some());
    // Its kubelet says so by deleting it at once, which its finalizer outlives.
    let has_ended = pod.metadata.deletion_timestamp.is_some() && pod.metadata.deletion_grace_period_seconds == Some(0);
    match (pod.metadata.uid.as_ref() == Some(&moved.uid), has_node) {
        (true, _) => Holder::Source,
        _ if is_held(pod) && has_ended => Holder::Ended,
        (false, true) => Holder::Taken,
        (false, false) => Holder::Nobodys,
    }
}

/// Whether a pod keeps its name until it is given away.
pub(super) fn is_held(pod: &Pod) -> bool {
    pod.metadata.finalizers.iter().flatten().any(|name| name == NAME_HELD)
}

/// What makes it so: a strategic merge.
pub(super) fn held(uid: &str) -> serde_json::Value {
    serde_json::json!({ "metadata": { "uid": uid, "finalizers": [NAME_HELD] } })
}

/// And what gives its name away.
pub(super) fn released(metadata: &ObjectMeta) -> serde_json::Value {
    serde_json::json!({ "metadata": { "uid": metadata.uid, "$deleteFromPrimitiveList/finalizers": [NAME_HELD] } })
}

/// What an adopted pod is patched with: a strategic merge. It stays marked: somebody has to find it who goes on.
pub(super) fn adopted(adoption: &Adoption, uid: &str) -> serde_json::Value {
    let Adoption { labels, owners, finalizers, .. } = adoption;
    let metadata = serde_json::json!({ "uid": uid, "labels": labels, "ownerReferences": owners });
    let mut patch = serde_json::json!({ "metadata": metadata });
    if !finalizers.is_empty() {
        patch["metadata"]["finalizers"] = serde_json::json!(finalizers);
    }
    patch
}

/// What is taken off a pod, so that its Job neither counts nor replaces it: a strategic merge. None when it has no Job any more.
pub(super) fn let_go(pod: &Pod) -> Option<serde_json::Value> {
    let job = pod.metadata.owner_references.iter().flatten().find(|owner| is_job(owner))?;
    let labels: BTreeMap<&str, Option<&str>> = JOB_UID.into_iter().map(|name| (name, None)).collect();
    Some(serde_json::json!({ "metadata": {
        "uid": pod.metadata.uid,
        "labels": labels,
        "ownerReferences": [{ "$patch": "delete", "uid": job.uid }],
        "$deleteFromPrimitiveList/finalizers": [JOB_TRACKING],
    } }))
}

/// What is taken off a pod whose migration is over.
pub(super) fn unmarked(adoption: &Adoption, uid: &str) -> serde_json::Value {
    serde_json::json!({ "metadata": {
        "uid": uid,
        "labels": { MIGRATION: null },
        "annotations": { MIGRATION: null, ADOPT: null, DELETION_COST: adoption.deletion_cost },
    } })
}

/// Whether a pod is ready.
pub(super) fn is_ready(pod: &Pod) -> bool {
    condition(pod, "Ready") == Some("True")
}

fn condition<'a>(pod: &'a Pod, kind: &str) -> Option<&'a str> {
    let conditions = pod.status.as_ref()?.conditions.as_ref()?;
    conditions.iter().find(|condition| condition.type_ == kind).map(|condition| condition.status.as_str())
}

/// The phase that the kubelet says.
pub(crate) fn phase(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or_default()
}

/// Whether a ReplicaSet that has both would keep the target: see the [module](super).
pub(super) fn would_be_kept(target: &Pod, source: Option<&Pod>) -> bool {
    let source = source.filter(|source| source.metadata.deletion_timestamp.is_none());
    phase(target) == "Running" && (is_ready(target) || source.is_none_or(|source| !is_ready(source)))
}

/// The migration by which a pod's container comes, or came a moment ago.
pub(super) fn is_marked(pod: &Pod, id: MigrationId) -> bool {
    annotation(pod, MIGRATION) == Some(id.to_string().as_str())
}

/// Why a pod that is waited for does not come.
pub(super) fn does_not_come(pod: &Pod) -> Option<String> {
    let status = pod.status.as_ref()?;
    if pod.metadata.deletion_timestamp.is_some() {
        return Some("it was deleted".to_owned());
    }
    matches!(phase(pod), "Failed" | "Succeeded").then(|| {
        let said = [status.reason.as_deref(), status.message.as_deref()];
        let said: Vec<_> = said.into_iter().flatten().collect();
        format!("the kubelet does not take it ({})", said.join(": "))
    })
}

#[cfg(test)]
mod tests;
