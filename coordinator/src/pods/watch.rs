//! The inventory of a cluster of Kubernetes, kept by two watches: nodes that take part, and pods that can move.

use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};

use futures::StreamExt as _;
use k8s_openapi::api::core::v1::{Node as KubeNode, Pod};
use kube::Client;
use kube::api::Api;
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, Event, watcher};
use podferry_common::NodeName;
use tokio::sync::watch;

use super::plan::{RUNTIME_CLASS, base_name, keeps_name, phase};
use super::{ENABLED, traits};
use crate::cluster::{Inventory, Node, PodRef, Workload};
use crate::store::workload_of;

/// What is seen now, and when that changes. Clones share it.
#[derive(Clone)]
pub struct Watched {
    seen: Arc<Mutex<Seen>>,
    changed: Arc<watch::Sender<u64>>,
}

/// Both tables, and which of them have been read as a whole.
#[derive(Default)]
struct Seen {
    nodes: Table<Node>,
    pods: Table<Workload>,
}

/// Objects by uid.
struct Table<T> {
    there: BTreeMap<String, T>,
    /// While all are listed anew: what has come of them.
    listed: Option<BTreeMap<String, T>>,
    whole: bool,
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self { there: BTreeMap::new(), listed: None, whole: false }
    }
}

impl<T> Table<T> {
    /// Takes an event in; `read` is none for an object that does not count.
    fn take<K: kube::Resource>(&mut self, event: Event<K>, read: impl Fn(&K) -> Option<T>) {
        let uid = |object: &K| object.meta().uid.clone().unwrap_or_default();
        match event {
            Event::Init => self.listed = Some(BTreeMap::new()),
            Event::InitApply(object) => {
                if let (Some(listed), Some(item)) = (&mut self.listed, read(&object)) {
                    listed.insert(uid(&object), item);
                }
            }
            Event::InitDone => {
                self.there = self.listed.take().unwrap_or_default();
                self.whole = true;
            }
            Event::Apply(object) => match read(&object) {
                Some(item) => drop(self.there.insert(uid(&object), item)),
                None => drop(self.there.remove(&uid(&object))),
            },
            Event::Delete(object) => drop(self.there.remove(&uid(&object))),
        }
    }
}

/// The workload that a pod is, while its container runs and it is of podferry's runtime class.
fn read_pod(pod: &Pod) -> Option<Workload> {
    let (metadata, spec) = (&pod.metadata, pod.spec.as_ref()?);
    let counts = spec.runtime_class_name.as_deref() == Some(RUNTIME_CLASS)
        && metadata.deletion_timestamp.is_none()
        && phase(pod) == "Running";
    let (namespace, name) = (metadata.namespace.clone()?, metadata.name.clone()?);
    let container = spec.containers.first().filter(|_| counts)?.name.clone();
    let statuses = pod.status.as_ref()?.container_statuses.as_ref()?;
    let status = statuses.iter().find(|status| status.name == container)?;
    // `containerd://ID`.
    let (_, id) = status.container_id.as_ref()?.split_once("://")?;
    Some(Workload {
        name: workload_of(&namespace, &name).parse().ok()?,
        container: id.to_owned(),
        node: spec.node_name.as_ref().and_then(|node| node.parse().ok()),
        traits: traits::of_pod(pod),
        pod: Some(PodRef {
            namespace,
            name,
            uid: metadata.uid.clone()?,
            container,
            base: base_name(pod),
            keeps_name: keeps_name(pod),
        }),
    })
}

/// A node that takes part, with the address of its agent.
fn read_node(node: &KubeNode, port: u16) -> Option<Node> {
    let name: NodeName = node.metadata.name.as_ref()?.parse().ok()?;
    let addresses = node.status.as_ref()?.addresses.as_ref()?;
    let address = &addresses.iter().find(|address| address.type_ == "InternalIP")?.address;
    let host = if address.contains(':') { format!("[{address}]") } else { address.clone() };
    Some(Node { name, address: format!("{host}:{port}"), traits: traits::of_node(node) })
}

impl Watched {
    /// Begins to watch, and goes on until the process ends. `port` is where agents listen. Must be called inside a tokio runtime.
    pub fn begin(client: Client, port: u16) -> Self {
        let watched = Self { seen: Arc::default(), changed: Arc::new(watch::Sender::new(0)) };
        let nodes = Api::<KubeNode>::all(client.clone());
        let (us, them) = (watched.clone(), watcher::Config::default().labels(&format!("{ENABLED}=true")));
        tokio::spawn(async move {
            us.follow(nodes, them, |seen, event| seen.nodes.take(event, |node| read_node(node, port))).await;
        });
        let (us, pods) = (watched.clone(), Api::<Pod>::all(client));
        // What has ended does not come back.
        let running = watcher::Config::default().fields("status.phase!=Succeeded,status.phase!=Failed");
        tokio::spawn(async move {
            us.follow(pods, running, |seen, event| seen.pods.take(event, read_pod)).await;
        });
        watched
    }

    async fn follow<K>(&self, api: Api<K>, config: watcher::Config, take: impl Fn(&mut Seen, Event<K>))
    where
        K: kube::Resource + Clone + std::fmt::Debug + serde::de::DeserializeOwned + Send + 'static,
    {
        // It is begun anew for ever, with growing pauses.
        let mut events = pin!(watcher(api, config).default_backoff());
        while let Some(event) = events.next().await {
            match event {
                Ok(event) => {
                    take(&mut self.lock(), event);
                    self.changed.send_modify(|version| *version += 1);
                }
                Err(error) => tracing::warn!(%error, "a watch of the API server broke; it is begun anew"),
            }
        }
    }

    /// Which version of the inventory it is.
    pub fn version(&self) -> u64 {
        *self.changed.borrow()
    }

    /// Tells of every change.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// All nodes that take part, each with its uid.
    pub(crate) fn nodes(&self) -> Vec<(String, Node)> {
        self.lock().nodes.there.iter().map(|(uid, node)| (uid.clone(), node.clone())).collect()
    }

    /// Waits until nodes and pods have been read once.
    pub async fn is_whole(&self) {
        let mut changes = self.changed.subscribe();
        // The sender is ours.
        let _never_gone = changes.wait_for(|_| self.lock().nodes.whole && self.lock().pods.whole).await.map(drop);
    }

    /// What there is now.
    pub fn inventory(&self) -> Inventory {
        let seen = self.lock();
        Inventory::of(seen.nodes.there.values().cloned(), seen.pods.there.values().cloned())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(phase: &str, class: &str) -> Pod {
        serde_json::from_value(serde_json::json!({
            "metadata": { "name": "redis", "namespace": "shop", "uid": "u-1" },
            "spec": { "runtimeClassName": class, "nodeName": "ip-10-0-0-1.ec2.internal", "containers": [{ "name": "main" }] },
            "status": { "phase": phase, "containerStatuses": [
                { "name": "main", "image": "i", "imageID": "", "ready": true, "restartCount": 0, "containerID": "containerd://c0ffee" },
            ] },
        }))
        .unwrap()
    }

    #[test]
    fn a_running_pod_of_the_class_is_a_workload_and_no_other() {
        let workload = read_pod(&pod("Running", "podferry")).unwrap();
        assert_eq!((workload.name.as_str(), workload.container.as_str()), ("shop/redis", "c0ffee"));
        assert_eq!(workload.node.unwrap().as_str(), "ip-10-0-0-1.ec2.internal");
        assert_eq!(workload.pod.unwrap().container, "main");
        assert_eq!(read_pod(&pod("Pending", "podferry")), None);
        assert_eq!(read_pod(&pod("Running", "runc")), None);
    }

    #[test]
    fn a_list_that_is_read_anew_forgets_what_went_meanwhile() {
        let mut table = Table::default();
        let named = |uid: &str| {
            let mut pod = pod("Running", "podferry");
            pod.metadata.uid = Some(uid.to_owned());
            pod
        };
        let feed = |table: &mut Table<Workload>, events: Vec<Event<Pod>>| {
            for event in events {
                table.take(event, read_pod);
            }
        };
        feed(&mut table, vec![Event::Init, Event::InitApply(named("1")), Event::InitApply(named("2"))]);
        assert!(!table.whole && table.there.is_empty(), "half a list is none");
        feed(&mut table, vec![Event::InitDone, Event::Apply(named("3")), Event::Delete(named("2"))]);
        assert_eq!(table.there.keys().collect::<Vec<_>>(), ["1", "3"]);
        feed(&mut table, vec![Event::Init, Event::InitApply(named("3")), Event::InitDone]);
        assert_eq!(table.there.keys().collect::<Vec<_>>(), ["3"]);
        feed(
            &mut table,
            vec![Event::Apply({
                let mut ended = pod("Failed", "podferry");
                ended.metadata.uid = Some("3".into());
                ended
            })],
        );
        assert!(table.there.is_empty(), "what does not count any more is gone");
    }

    #[test]
    fn agents_are_found_at_their_nodes_addresses() {
        let node = |address: &str| {
            serde_json::from_value::<KubeNode>(serde_json::json!({
                "metadata": { "name": "n1" },
                "status": { "addresses": [{ "type": "Hostname", "address": "n1" }, { "type": "InternalIP", "address": address }] },
            }))
            .unwrap()
        };
        assert_eq!(read_node(&node("10.0.0.1"), 7443).unwrap().address, "10.0.0.1:7443");
        assert_eq!(read_node(&node("fd00::1"), 7443).unwrap().address, "[fd00::1]:7443");
    }
}
