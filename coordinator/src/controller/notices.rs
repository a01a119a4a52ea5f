//! Nodes that are marked to go: whoever knows that a node will be gone (a handler of spot notices, an autoscaler, an operator) taints it, and it is evacuated.
//!
//! Each notice becomes a `NodeEvacuation` of its own, once for as long as the taint is there. Which notices have been answered is said by labels of those
//! objects, so that another coordinator does not answer them again.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use kube::api::{ListParams, Patch, PatchParams, PostParams};
use kube::{Api, Client, ResourceExt as _};
use podferry_common::NodeName;
use podferry_crds::{MAX_CONCURRENT, NodeEvacuation, NodeEvacuationSpec, Wishes};
use serde_json::json;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::AGAIN;
use crate::cluster::Node;
use crate::kubernetes::Notice;
use crate::pods::Watched;
use crate::store::time;

/// Of the evacuation that answers a notice: the node's uid. Names of nodes come again.
const NODE_LABEL: &str = "podferry.dev/notice-node";
/// Its taint.
const TAINT_ANNOTATION: &str = "podferry.dev/notice-taint";
/// The pause between two looks: pods change all the time.
const REST: Duration = Duration::from_millis(250);
/// Seconds that the object of an evacuation that has ended stays.
const KEPT_S: i32 = 86_400;

/// A taint that says that a node goes: the node's uid, and the taint's key.
type Given = (String, String);

/// Answers the notices that are wanted, until it is stopped.
pub(super) async fn answer(client: Client, watched: Watched, wanted: Vec<Notice>, stop: CancellationToken) {
    if !wanted.is_empty() {
        let _stopped = stop.run_until_cancelled(Answering { api: Api::all(client), watched, wanted }.go()).await;
    }
}

struct Answering {
    api: Api<NodeEvacuation>,
    watched: Watched,
    wanted: Vec<Notice>,
}

impl Answering {
    async fn go(self) {
        let mut answered = self.answered().await;
        let mut changes = self.watched.changes();
        loop {
            changes.mark_unchanged();
            let done = self.look(&mut answered).await;
            if let Err(error) = &done {
                tracing::warn!(error = podferry_common::chain(error), "a node that goes is not evacuated yet");
            }
            let pause = if done.is_ok() { REST } else { AGAIN };
            sleep(pause).await;
            // The sender lives as long as the watch.
            if done.is_ok() && changes.changed().await.is_err() {
                return;
            }
        }
    }

    /// What has been answered before this coordinator led.
    async fn answered(&self) -> BTreeSet<Given> {
        loop {
            match self.api.list(&ListParams::default().labels(NODE_LABEL)).await {
                Ok(found) => return found.items.iter().filter_map(given_of).collect(),
                Err(error) => tracing::warn!(%error, "NodeEvacuations are not listed: trying again"),
            }
            sleep(AGAIN).await;
        }
    }

    async fn look(&self, answered: &mut BTreeSet<Given>) -> Result<(), kube::Error> {
        let now = given(&self.watched.nodes(), &self.wanted);
        let over: Vec<_> = answered.iter().filter(|one| !now.contains_key(*one)).cloned().collect();
        for one in over {
            self.forget(&one).await?;
            answered.remove(&one);
        }
        for (one, (node, notice)) in now {
            if !answered.contains(&one) {
                self.evacuate(&one, &node, notice).await?;
                answered.insert(one);
            }
        }
        Ok(())
    }

    async fn evacuate(&self, (uid, taint): &Given, node: &NodeName, notice: &Notice) -> Result<(), kube::Error> {
        let object = object_of(uid, node, notice);
        let made = self.api.create(&PostParams::default(), &object).await?;
        tracing::info!(%node, taint, object = made.name_any(), "a node goes: it is evacuated");
        Ok(())
    }

    /// The taint is gone: the next one is another notice.
    async fn forget(&self, given: &Given) -> Result<(), kube::Error> {
        let of_node = ListParams::default().labels(&format!("{NODE_LABEL}={}", given.0));
        for object in self.api.list(&of_node).await?.items {
            if given_of(&object).as_ref() == Some(given) {
                let patch = Patch::Merge(json!({ "metadata": { "labels": { NODE_LABEL: null } } }));
                match self.api.patch(&object.name_any(), &PatchParams::default(), &patch).await {
                    Ok(_) => {}
                    Err(kube::Error::Api(status)) if status.is_not_found() => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }
}

/// The notices that are given now, each with its node.
fn given<'n>(nodes: &[(String, Node)], wanted: &'n [Notice]) -> BTreeMap<Given, (NodeName, &'n Notice)> {
    let mut given = BTreeMap::new();
    for (uid, node) in nodes {
        let has = |notice: &&Notice| node.traits.taints.iter().any(|taint| taint.key == notice.taint);
        for notice in wanted.iter().filter(has) {
            given.insert((uid.clone(), notice.taint.clone()), (node.name.clone(), notice));
        }
    }
    given
}

/// The notice that an evacuation answers.
fn given_of(object: &NodeEvacuation) -> Option<Given> {
    Some((object.labels().get(NODE_LABEL)?.clone(), object.annotations().get(TAINT_ANNOTATION)?.clone()))
}

fn object_of(uid: &str, node: &NodeName, notice: &Notice) -> NodeEvacuation {
    let deadline = SignedDuration::from_secs(notice.deadline_s.into());
    let wishes = Wishes { accept_loss: notice.accept_loss.then_some(true), ..Wishes::default() };
    let spec = NodeEvacuationSpec {
        node_name: node.to_string(),
        deadline: (!deadline.is_zero()).then(|| time(Timestamp::now() + deadline)),
        // The limits of nodes count as well.
        max_concurrent: MAX_CONCURRENT,
        wishes,
        ttl_seconds_after_finished: Some(KEPT_S),
        ..NodeEvacuationSpec::default()
    };
    let mut object = NodeEvacuation::new("", spec);
    let room = 200.min(node.as_str().len());
    object.metadata.name = None;
    object.metadata.generate_name = Some(format!("{}-", &node.as_str()[..room]));
    object.labels_mut().insert(NODE_LABEL.to_owned(), uid.to_owned());
    object.annotations_mut().insert(TAINT_ANNOTATION.to_owned(), notice.taint.clone());
    object
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::placement::{Effect, NodeTraits, Taint};

    #[test]
    fn a_notice_is_of_one_node_and_one_taint_and_its_evacuation_says_which() {
        let notice = |taint: &str| Notice { taint: taint.to_owned(), deadline_s: 110, accept_loss: true };
        let wanted = [notice("spot"), notice("scale-in")];
        let taint = |key: &&str| Taint { key: (*key).to_owned(), value: String::new(), effect: Effect::NoSchedule };
        let node = |uid: &str, name: &str, taints: &[&str]| {
            let traits = NodeTraits { taints: taints.iter().map(taint).collect(), ..NodeTraits::default() };
            (uid.to_owned(), Node { name: name.parse().unwrap(), address: String::new(), traits })
        };
        let nodes = [node("u1", "n1", &["spot", "other"]), node("u2", "n2", &["other"]), node("u3", "n3", &[])];
        let found = given(&nodes, &wanted);
        let given: Vec<_> = found.keys().cloned().collect();
        assert_eq!(given, [("u1".to_owned(), "spot".to_owned())]);
        let object = object_of("u1", &"n1".parse().unwrap(), &wanted[0]);
        assert_eq!(given_of(&object), Some(given[0].clone()));
        assert_eq!((object.spec.node_name.as_str(), object.spec.cordon), ("n1", false));
        assert_eq!(object.spec.wishes.accept_loss, Some(true));
        let left = object.spec.deadline.unwrap().0.as_second() - Timestamp::now().as_second();
        assert!((108..=110).contains(&left), "{left}");
        let unhurried = Notice { deadline_s: 0, ..notice("spot") };
        assert_eq!(object_of("u1", &"n1".parse().unwrap(), &unhurried).spec.deadline, None);
    }
}
