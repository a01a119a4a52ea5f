//! What nodes can do, as labels of theirs: a pod that needs to be moved in some way can ask for a node that can.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::api::core::v1::Node;
use kube::api::{ListParams, Patch, PatchParams};
use kube::{Api, Client, ResourceExt as _};
use podferry_proto::strategies::offered;
use podferry_proto::v1;
use serde_json::{Value, json};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::api::Current;
use crate::pods::Watched;

/// What stands before the name of a strategy.
const PREFIX: &str = "podferry.dev/strategy-";
/// The ways in which pods are moved. Where the first is not, none is.
const OF_PODS: [&str; 4] = ["warm", "live", "postcopy", "hybrid"];
/// How often it is looked whether that has changed: an agent was updated, or a node has come.
const INTERVAL: Duration = Duration::from_secs(60);
/// How soon it is looked again when an agent has not answered: it may be about to start. Each time later.
const AGAIN: Duration = Duration::from_secs(5);

/// Keeps the labels true until it is stopped.
pub(super) async fn keep(client: Client, watched: Watched, current: Current, stop: CancellationToken) {
    let nodes: Api<Node> = Api::all(client);
    let keeping = async {
        let mut pause = AGAIN;
        loop {
            let all_answer = look(&nodes, &watched, &current).await;
            if let Err(error) = &all_answer {
                tracing::warn!(%error, "the labels of nodes cannot be kept true: trying again");
            }
            sleep(if all_answer.is_ok_and(|all| all) { INTERVAL } else { pause }).await;
            pause = (pause * 2).min(INTERVAL);
        }
    };
    let _stopped = stop.run_until_cancelled(keeping).await;
}

/// Whether all agents have answered.
async fn look(api: &Api<Node>, watched: &Watched, current: &Current) -> Result<bool, kube::Error> {
    let seen: BTreeMap<_, _> = watched.nodes().into_iter().map(|(_, node)| (node.name.to_string(), node)).collect();
    let nodes = current.nodes().await;
    // One that does not answer for a while can do afterwards what it could before.
    for node in nodes.iter().filter(|node| node.reachable) {
        let there = seen.get(&node.name).map(|node| &node.traits.labels);
        if let Some(labels) = there.and_then(|there| change(&wanted(node), there)) {
            patch(api, &node.name, &labels).await?;
        }
    }
    let labelled = ListParams::default().labels(&format!("{PREFIX}{}", OF_PODS[0]));
    for node in api.list_metadata(&labelled).await?.items {
        let name = node.name_any();
        // It takes part no more.
        if !seen.contains_key(&name)
            && let Some(labels) = change(&[], node.labels())
        {
            patch(api, &name, &labels).await?;
        }
    }
    Ok(nodes.iter().all(|node| node.reachable))
}

async fn patch(api: &Api<Node>, name: &str, labels: &Value) -> Result<(), kube::Error> {
    let patch = Patch::Merge(json!({ "metadata": { "labels": labels } }));
    match api.patch_metadata(name, &PatchParams::default(), &patch).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
        Err(error) => Err(error),
    }
}

fn wanted(node: &v1::Node) -> Vec<&'static str> {
    let offered = offered(node.fit, &node.features);
    OF_PODS.into_iter().filter(|strategy| offered.contains(strategy)).collect()
}

/// What has to be changed of a node's labels so that they say this; none: nothing.
fn change(wanted: &[&str], there: &BTreeMap<String, String>) -> Option<Value> {
    let mut labels = serde_json::Map::new();
    for strategy in OF_PODS {
        let name = format!("{PREFIX}{strategy}");
        let (wanted, there) = (wanted.contains(&strategy), there.get(&name).map(String::as_str));
        if wanted && there != Some("true") {
            labels.insert(name, json!("true"));
        } else if !wanted && there.is_some() {
            labels.insert(name, Value::Null);
        }
    }
    (!labels.is_empty()).then_some(Value::Object(labels))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_has_changed_is_written() {
        let labels = |all: &[(&str, &str)]| {
            all.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect::<BTreeMap<_, _>>()
        };
        let there = labels(&[("podferry.dev/strategy-warm", "true"), ("podferry.dev/enabled", "true")]);
        assert_eq!(change(&["warm"], &there), None);
        assert_eq!(change(&["warm", "live"], &there), Some(json!({ "podferry.dev/strategy-live": "true" })));
        assert_eq!(change(&[], &there), Some(json!({ "podferry.dev/strategy-warm": null })));
        let wrong = labels(&[("podferry.dev/strategy-warm", "maybe")]);
        assert_eq!(change(&["warm"], &wrong), Some(json!({ "podferry.dev/strategy-warm": "true" })));
        let node = v1::Node { fit: true, features: vec!["kernel:write_tracking".to_owned()], ..v1::Node::default() };
        assert_eq!(wanted(&node), ["warm", "live"]);
    }
}
