//! A migration's steps with the API server.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams, Preconditions};
use kube::runtime::wait::await_condition;
use kube::{Client, Error};
use podferry_common::{Failure, FailureCode, MigrationId, NodeName};
use podferry_proto::v1;
use tokio::time::{Instant, sleep, timeout};

use super::follow::Due;
use super::plan::{self, Adoption, Holder};
use super::{policy, refused, room};
use crate::store::PodMove;
use crate::strategy::Strategy;

/// Between two looks at a pod that has to come.
const LOOK: Duration = Duration::from_millis(500);
/// How long a target pod gets to be ready before it is looked whether it may be adopted without.
const READY_TIMEOUT: Duration = Duration::from_secs(20);
/// Who has changed a pod, in its managed fields.
const MANAGER: &str = "podferry";
/// Seconds that a pod gets to end whose container has ended.
const GRACE_S: u32 = 1;
/// Between two tries to have a name that is about to be free. Its controller is as quick as the API server tells it.
const NAME_PAUSE: Duration = Duration::from_millis(2);
/// So many at a time: a try takes the API server some milliseconds.
const NAME_RACERS: u32 = 4;
/// How long it is tried until it is said that it takes so long.
const NAME_TIMEOUT: Duration = Duration::from_secs(15);

/// What a migration does with the API server. Clones share the connection, and what is being done.
#[derive(Clone)]
pub struct Pods {
    client: Client,
    due: Arc<Mutex<HashMap<MigrationId, Due>>>,
}

impl Pods {
    /// On this connection.
    pub fn new(client: Client) -> Self {
        Self { client, due: Arc::default() }
    }

    /// What is being done for migrations until it is done.
    pub(super) fn due(&self) -> MutexGuard<'_, HashMap<MigrationId, Due>> {
        self.due.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn api(&self, namespace: &str) -> Api<Pod> {
        Api::namespaced(self.client.clone(), namespace)
    }

    /// All pods that are marked: each of them belongs to a migration that has not ended, or of which something is still to be done.
    pub(super) async fn marked(&self) -> Result<Vec<Pod>, Failure> {
        let marked = Api::<Pod>::all(self.client.clone()).list(&ListParams::default().labels(plan::MIGRATION)).await;
        Ok(marked.map_err(|error| refused("pods cannot be listed", &error))?.items)
    }

    /// Whether a pod of that namespace is still marked by a migration.
    ///
    /// # Errors
    /// When pods cannot be listed.
    pub async fn has_marked(&self, namespace: &str, id: MigrationId) -> Result<bool, kube::Error> {
        let wanted = ListParams::default().labels(&format!("{}={id}", plan::MIGRATION)).limit(1);
        Ok(!self.api(namespace).list_metadata(&wanted).await?.items.is_empty())
    }

    /// A request as the policies of its pod have it. `of_many`: the same was wished of other pods, too.
    ///
    /// # Errors
    /// When a policy forbids it, or they cannot be read.
    pub(crate) async fn as_policies_say(
        &self,
        asked: &v1::MigrateRequest,
        of_many: bool,
    ) -> Result<v1::MigrateRequest, Failure> {
        policy::as_policies_say(&self.client, asked, of_many).await
    }

    /// Marks a node unschedulable. Idempotent.
    ///
    /// # Errors
    /// When it cannot be marked. One that is gone needs no mark.
    pub async fn cordon(&self, node: &NodeName) -> Result<(), Failure> {
        let patch = Patch::Merge(serde_json::json!({ "spec": { "unschedulable": true } }));
        let nodes: Api<Node> = Api::all(self.client.clone());
        match nodes.patch(node.as_str(), &PatchParams::default(), &patch).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
            Err(error) => {
                Err(refused(&format!("node {node} cannot be marked unschedulable"), &error).on(node.as_str()))
            }
        }
    }

    /// Whether a pod is there, and can be moved in that way.
    ///
    /// # Errors
    /// When it cannot, with all that speaks against it.
    pub async fn check(&self, namespace: &str, name: &str, strategy: Strategy) -> Result<(), Failure> {
        let pod = self.api(namespace).get(name).await;
        let what = format!("pod {namespace}/{name} cannot be read");
        plan::check_movable(&pod.map_err(|error| refused(&what, &error).in_phase("preflight"))?, strategy)
    }

    /// Creates the target pod, unless it is there; its uid.
    ///
    /// # Errors
    /// When the source is not there any more, or the API server does not take the target pod.
    pub async fn make_target(&self, id: MigrationId, node: &NodeName, moved: &PodMove) -> Result<String, Failure> {
        let api = self.api(&moved.namespace);
        let failed = |error: &Error| {
            let what = format!("the target pod {}/{} cannot be created", moved.namespace, moved.target_name);
            refused(&what, error).in_phase("prepare")
        };
        let source = self.source(moved).await?.ok_or_else(|| gone(moved).in_phase("prepare"))?;
        let target = plan::target_pod(&source, moved, node.as_str(), id);
        let target = target.map_err(|error| Failure::from_error(FailureCode::Internal, &error).in_phase("prepare"))?;
        let parameters = PostParams { field_manager: Some(MANAGER.to_owned()), ..PostParams::default() };
        let uid = match api.create(&parameters, &target).await {
            Ok(created) => created.metadata.uid.unwrap_or_default(),
            Err(Error::Api(status)) if status.reason == "AlreadyExists" => {
                let there = self.target(id, moved).await?;
                let taken = || failed(&Error::Api(status.clone()));
                there.and_then(|pod| pod.metadata.uid).ok_or_else(taken)?
            }
            Err(error) => return Err(failed(&error)),
        };
        if moved.keeps_name {
            // With the one that stands in for it there already: nobody is given its room meanwhile.
            self.check_room(node, &target).await?;
        }
        Ok(uid)
    }

    /// Whether a node has room for a pod more like this one.
    async fn check_room(&self, node: &NodeName, pod: &Pod) -> Result<(), Failure> {
        let failed =
            |error: Error| refused(&format!("it cannot be seen what room node {node} has"), &error).in_phase("prepare");
        let by_name = ListParams::default().fields(&format!("metadata.name={node}"));
        let bound = ListParams::default().fields(&format!("spec.nodeName={node}"));
        let nodes = Api::<Node>::all(self.client.clone()).list(&by_name).await.map_err(failed)?;
        let there = Api::<Pod>::all(self.client.clone()).list(&bound).await.map_err(failed)?;
        let lacks = nodes.items.first().map(|it| room::lacks(it, &there.items, pod)).unwrap_or_default();
        if lacks.is_empty() {
            return Ok(());
        }
        let message = format!(
            "node {node} has no room for the pod and the one that stands in for it until its name is free: it lacks {}",
            lacks.join(", ")
        );
        let failure = Failure::new(FailureCode::FailedPrecondition, message).on(node.as_str()).in_phase("prepare");
        Err(failure.remedy("choose another target, or make room there"))
    }

    /// Waits until it is known that the target pod does not come. To be dropped when it has.
    pub async fn target_fails(&self, moved: &PodMove) -> Failure {
        let api = self.api(&moved.namespace);
        let why = loop {
            match api.get_opt(&moved.target_name).await {
                Ok(Some(pod)) => {
                    if let Some(why) = plan::does_not_come(&pod) {
                        break why;
                    }
                }
                Ok(None) => break "it was deleted".to_owned(),
                // The agent waits for it, whatever the API server does.
                Err(error) => tracing::warn!(%error, pod = moved.target_name, "a target pod cannot be looked at"),
            }
            sleep(LOOK).await;
        };
        let message = format!("the target pod {}/{} does not come: {why}", moved.namespace, moved.target_name);
        let failure = Failure::new(FailureCode::FailedPrecondition, message).in_phase("prepare");
        failure.remedy("choose another target, or make room there")
    }

    /// Deletes the target pod of a migration that is undone.
    ///
    /// # Errors
    /// When the API server does not; to be called again.
    pub async fn discard_target(&self, id: MigrationId, moved: &PodMove) -> Result<(), Failure> {
        let Some(target) = self.target(id, moved).await? else { return Ok(()) };
        self.delete(moved, &moved.target_name, &target.metadata.uid.unwrap_or_default()).await
    }

    /// Lets Services send new connections to the target, as soon as it is ready. To the source they go until its kubelet says that it is not: a
    /// Service without any pod would refuse them, and what comes for the source's address reaches the target.
    ///
    /// # Errors
    /// When the API server does not; to be called again.
    pub async fn expose(&self, id: MigrationId, moved: &PodMove) -> Result<(), Failure> {
        if moved.keeps_name {
            return Ok(());
        }
        let Some(target) = self.target(id, moved).await? else { return Ok(()) };
        let exposed = Adoption::of_target(&target).and_then(|adoption| adoption.exposed());
        if let Some(labels) = exposed {
            let uid = target.metadata.uid.unwrap_or_default();
            let patch = serde_json::json!({ "metadata": { "uid": uid, "labels": labels } });
            self.patch(moved, &moved.target_name, &uid, &patch).await?;
        }
        Ok(())
    }

    /// The Job that counts the source counts the target in its place; of pods of others nothing changes.
    ///
    /// # Errors
    /// When the API server does not answer; to be called again.
    pub async fn hand_over(&self, id: MigrationId, moved: &PodMove) -> Result<(), Failure> {
        let Some(target) = self.target(id, moved).await? else { return Ok(()) };
        match Adoption::of_target(&target).filter(Adoption::is_of_job) {
            Some(adoption) => self.count_instead(moved, &adoption, &target.metadata.uid.unwrap_or_default()).await,
            None => Ok(()),
        }
    }

    /// Nothing comes in between: its controller looks a second after the first of the two changes.
    async fn count_instead(&self, moved: &PodMove, adoption: &Adoption, uid: &str) -> Result<(), Failure> {
        if let Some(patch) = self.source(moved).await?.as_ref().and_then(plan::let_go) {
            self.patch(moved, &moved.name, &moved.uid, &patch).await?;
        }
        self.patch(moved, &moved.target_name, uid, &plan::adopted(adoption, uid)).await
    }

    /// Makes the pod in which a workload runs in the end that keeps its pod's name: the source's goes, whose container has stopped for good, and
    /// one of the same name is made on the target. Its uid.
    ///
    /// # Errors
    /// When the API server does not answer, or another pod of that name is still ending; to be called again.
    pub async fn take_name(&self, id: MigrationId, moved: &PodMove) -> Result<String, Failure> {
        let until = Instant::now() + NAME_TIMEOUT;
        while Instant::now() < until {
            let there = self.get(moved, &moved.name).await?;
            let uid = there.as_ref().and_then(|pod| pod.metadata.uid.clone()).unwrap_or_default();
            match plan::holder(there.as_ref(), moved, id) {
                Holder::Named(None) => return Ok(uid),
                Holder::Named(Some(why)) => {
                    self.delete(moved, &moved.name, &uid).await?;
                    return Err(not_taken(moved, &why));
                }
                Holder::Taken => {
                    self.hold_name(moved, &uid).await?;
                    sleep(LOOK).await;
                }
                free_soon => {
                    if let Some(uid) = Box::pin(self.race(id, moved, there.as_ref(), free_soon)).await? {
                        return Ok(uid);
                    }
                    tracing::info!(migration = %id, pod = moved.name, "its controller was quicker: the pod that it has made goes again");
                }
            }
        }
        Err(not_free(moved))
    }

    /// Frees the name and makes the pod that is to have it, in the same moment: the pod's controller makes one, too. Its uid; none when the
    /// controller was quicker.
    async fn race(
        &self,
        id: MigrationId,
        moved: &PodMove,
        there: Option<&Pod>,
        holder: Holder,
    ) -> Result<Option<String>, Failure> {
        let Some(stand_in) = self.target(id, moved).await? else { return Err(no_stand_in(moved)) };
        let named = plan::named_pod(&stand_in, moved, id);
        let is_free = AtomicBool::new(false);
        let racer = |place| self.make_named(moved, &named, NAME_PAUSE * place, &is_free);
        let mut racers: FuturesUnordered<_> = (0..NAME_RACERS).map(racer).collect();
        let freed = async {
            let freed = self.free_name(moved, there, holder).await;
            is_free.store(true, Ordering::Relaxed);
            freed
        };
        let raced = async {
            while let Some(made) = racers.next().await {
                if let Some(uid) = made? {
                    return Ok(Some(uid));
                }
            }
            Ok(None)
        };
        let (freed, made) = tokio::join!(freed, raced);
        freed?;
        made
    }

    /// The source goes at once: behind the commit, nothing of it can run again. So does what its controller has made since, unless a node
    /// has taken it meanwhile, or as soon as the node has said that it has ended: there are never two of that name.
    async fn free_name(&self, moved: &PodMove, there: Option<&Pod>, holder: Holder) -> Result<(), Failure> {
        let Some(metadata) = there.map(|pod| &pod.metadata) else { return Ok(()) };
        let uid = metadata.uid.clone();
        let as_seen = Preconditions { uid: uid.clone(), resource_version: metadata.resource_version.clone() };
        match holder {
            Holder::Source => self.delete_if(moved, Preconditions { uid, resource_version: None }).await,
            Holder::Nobodys => self.delete_if(moved, as_seen).await,
            Holder::Ended => self.patch(moved, &moved.name, &uid.unwrap_or_default(), &plan::released(metadata)).await,
            Holder::None | Holder::Taken | Holder::Named(_) => Ok(()),
        }
    }

    /// Tries until it is made, which is when the name is free; none when somebody else has it behind that.
    async fn make_named(
        &self,
        moved: &PodMove,
        named: &Pod,
        start: Duration,
        is_free: &AtomicBool,
    ) -> Result<Option<String>, Failure> {
        sleep(start).await;
        let parameters = PostParams { field_manager: Some(MANAGER.to_owned()), ..PostParams::default() };
        loop {
            // This try begins behind it.
            let last = is_free.load(Ordering::Relaxed);
            match self.api(&moved.namespace).create(&parameters, named).await {
                Ok(created) => return Ok(created.metadata.uid),
                Err(Error::Api(status)) if status.reason == "AlreadyExists" && last => return Ok(None),
                Err(Error::Api(status)) if status.reason == "AlreadyExists" => sleep(NAME_PAUSE).await,
                Err(error) => {
                    let what = format!("pod {}/{} cannot be created on the target", moved.namespace, moved.name);
                    return Err(refused(&what, &error).in_phase("resume"));
                }
            }
        }
    }

    /// Ends a pod that a node has taken, and keeps its name until it is given away. Idempotent.
    async fn hold_name(&self, moved: &PodMove, uid: &str) -> Result<(), Failure> {
        self.patch(moved, &moved.name, uid, &plan::held(uid)).await?;
        self.delete(moved, &moved.name, uid).await
    }

    /// Deletes whoever has the name, if it is as it was seen, without waiting for a node.
    async fn delete_if(&self, moved: &PodMove, as_seen: Preconditions) -> Result<(), Failure> {
        let parameters =
            DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default().preconditions(as_seen) };
        match self.api(&moved.namespace).delete(&moved.name, &parameters).await {
            Ok(_) => Ok(()),
            Err(Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(()),
            Err(error) => Err(refused(&format!("pod {}/{} cannot be deleted", moved.namespace, moved.name), &error)),
        }
    }

    /// The target pod takes the source's place, and the source is deleted.
    ///
    /// # Errors
    /// When the API server does not answer, or the target would be deleted by its ReplicaSet; to be called again.
    pub async fn complete(&self, id: MigrationId, moved: &PodMove) -> Result<(), Failure> {
        if moved.keeps_name {
            return self.complete_named(id, moved).await;
        }
        let Some(target) = self.target(id, moved).await? else { return self.delete_source(moved).await };
        let adoption = Adoption::of_target(&target).unwrap_or_default();
        let uid = target.metadata.uid.clone().unwrap_or_default();
        if adoption.is_of_job() {
            // It may have ended by now: then that is what its Job counts.
            self.count_instead(moved, &adoption, &uid).await?;
        } else {
            if !adoption.owners.is_empty() && self.has_ended(id, moved, target).await? {
                // Its ReplicaSet begins it anew when both are gone.
                self.delete_source(moved).await?;
                return self.delete(moved, &moved.target_name, &uid).await;
            }
            self.patch(moved, &moved.target_name, &uid, &plan::adopted(&adoption, &uid)).await?;
        }
        self.delete_source(moved).await?;
        self.patch(moved, &moved.target_name, &uid, &plan::unmarked(&adoption, &uid)).await
    }

    /// What stood in for it goes, and the source should the workload have been lost.
    async fn complete_named(&self, id: MigrationId, moved: &PodMove) -> Result<(), Failure> {
        self.delete_source(moved).await?;
        self.discard_target(id, moved).await?;
        if let Some(other) = self.get(moved, &moved.name).await?.filter(plan::is_held) {
            let uid = other.metadata.uid.clone().unwrap_or_default();
            self.patch(moved, &moved.name, &uid, &plan::released(&other.metadata)).await?;
        }
        let Some(named) = self.get(moved, &moved.name).await?.filter(|pod| plan::is_marked(pod, id)) else {
            return Ok(());
        };
        let uid = named.metadata.uid.clone().unwrap_or_default();
        let adoption = Adoption::of_target(&named).unwrap_or_default();
        self.patch(moved, &moved.name, &uid, &plan::unmarked(&adoption, &uid)).await
    }

    /// Waits for the target to be ready. Whether its workload has ended there instead.
    ///
    /// # Errors
    /// When it is neither, and would be deleted by its ReplicaSet.
    async fn has_ended(&self, id: MigrationId, moved: &PodMove, mut target: Pod) -> Result<bool, Failure> {
        let ready = |pod: Option<&Pod>| pod.is_none_or(|pod| plan::is_ready(pod) || plan::does_not_come(pod).is_some());
        let waiting = await_condition(self.api(&moved.namespace), &moved.target_name, ready);
        if let Ok(Ok(Some(seen))) = timeout(READY_TIMEOUT, waiting).await {
            target = seen;
        }
        if let Some(why) = plan::does_not_come(&target) {
            tracing::warn!(migration = %id, pod = moved.target_name, why, "a pod has ended before it was adopted");
            return Ok(true);
        }
        let source = self.source(moved).await?;
        if plan::would_be_kept(&target, source.as_ref()) { Ok(false) } else { Err(not_ready(moved)) }
    }

    /// The target pod, when it is this migration's.
    async fn target(&self, id: MigrationId, moved: &PodMove) -> Result<Option<Pod>, Failure> {
        let found = self.get(moved, &moved.target_name).await?;
        Ok(found.filter(|pod| plan::is_marked(pod, id)))
    }

    /// The source pod, unless another has its name.
    async fn source(&self, moved: &PodMove) -> Result<Option<Pod>, Failure> {
        let found = self.get(moved, &moved.name).await?;
        Ok(found.filter(|pod| pod.metadata.uid.as_ref() == Some(&moved.uid)))
    }

    async fn get(&self, moved: &PodMove, name: &str) -> Result<Option<Pod>, Failure> {
        let found = self.api(&moved.namespace).get_opt(name).await;
        found.map_err(|error| refused(&format!("pod {}/{name} cannot be read", moved.namespace), &error))
    }

    async fn delete_source(&self, moved: &PodMove) -> Result<(), Failure> {
        self.delete(moved, &moved.name, &moved.uid).await
    }

    async fn delete(&self, moved: &PodMove, name: &str, uid: &str) -> Result<(), Failure> {
        let preconditions = Preconditions { uid: Some(uid.to_owned()), resource_version: None };
        let parameters = DeleteParams {
            grace_period_seconds: Some(GRACE_S),
            ..DeleteParams::default().preconditions(preconditions)
        };
        let deleted = self.api(&moved.namespace).delete(name, &parameters).await.map(drop);
        let deleted = self.unless_gone(moved, name, uid, deleted).await;
        deleted.map_err(|error| refused(&format!("pod {}/{name} cannot be deleted", moved.namespace), &error))
    }

    /// Changes the pod of that name and uid by a strategic merge.
    async fn patch(&self, moved: &PodMove, name: &str, uid: &str, patch: &serde_json::Value) -> Result<(), Failure> {
        let parameters = PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() };
        let patched = self.api(&moved.namespace).patch(name, &parameters, &Patch::Strategic(patch)).await.map(drop);
        // Whoever deletes it now deletes the workload, as anybody may.
        let patched = self.unless_gone(moved, name, uid, patched).await;
        patched.map_err(|error| refused(&format!("pod {}/{name} cannot be changed", moved.namespace), &error))
    }

    /// What was done with a pod; when it is gone, or another has its name, there is nothing to do. A conflict may mean that, or that
    /// somebody else changed it in that moment.
    async fn unless_gone(&self, moved: &PodMove, name: &str, uid: &str, done: Result<(), Error>) -> Result<(), Error> {
        let Err(Error::Api(status)) = &done else { return done };
        match status.code {
            404 => Ok(()),
            409 => {
                let there = self.api(&moved.namespace).get_opt(name).await?;
                if there.is_some_and(|pod| pod.metadata.uid.as_deref() == Some(uid)) { done } else { Ok(()) }
            }
            _ => done,
        }
    }
}

fn gone(moved: &PodMove) -> Failure {
    let message = format!("pod {}/{} is not there any more", moved.namespace, moved.name);
    Failure::new(FailureCode::NotFound, message).remedy("see `kubectl get pods`")
}

fn no_stand_in(moved: &PodMove) -> Failure {
    let message = format!("pod {}/{} is not there any more", moved.namespace, moved.target_name);
    let failure = Failure::new(FailureCode::FailedPrecondition, message).in_phase("resume");
    failure.remedy(
        "somebody has deleted it, and with it what had come; see \"An agent has lost its part\" in docs/operations.md",
    )
}

fn not_taken(moved: &PodMove, why: &str) -> Failure {
    let message =
        format!("pod {}/{} does not come on the target: {why}; it is made again", moved.namespace, moved.name);
    let failure = Failure::new(FailureCode::Unavailable, message).in_phase("resume");
    failure.remedy("make room there; what has come is kept until it can run")
}

fn not_free(moved: &PodMove) -> Failure {
    let message =
        format!("the name of pod {}/{} is not free: another of that name is still ending", moved.namespace, moved.name);
    let failure = Failure::new(FailureCode::Unavailable, message).in_phase("resume");
    failure.remedy(
        "see `kubectl get pod -o wide` for its node, and whether that answers; what has come is kept until it can run",
    )
}

fn not_ready(moved: &PodMove) -> Failure {
    let message = format!(
        "the target pod {}/{} runs and is not ready, so its ReplicaSet would delete it instead of the source",
        moved.namespace, moved.target_name
    );
    Failure::new(FailureCode::Unavailable, message).remedy("see `kubectl describe pod` for its readiness probe")
}
