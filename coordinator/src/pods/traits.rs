//! What placement judges of nodes and pods, as their objects say it.

use k8s_openapi::api::core::v1::{
    Node, NodeSelectorRequirement, NodeSelectorTerm, Pod, PodAffinityTerm, Taint as KubeTaint,
    Toleration as KubeToleration,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement};

use crate::placement::{
    AntiAffinity, Effect, NodeTraits, Operator, Requirement, Selector, Taint, Toleration, WorkloadTraits,
};

/// A node's labels and taints. A cordoned one has a taint that says so.
pub(super) fn of_node(node: &Node) -> NodeTraits {
    let taints = node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
    NodeTraits { labels: node.metadata.labels.clone().unwrap_or_default(), taints: taints.filter_map(taint).collect() }
}

/// A pod's labels, its priority, and where it may run. Rules of a kind that is not known here keep it from nothing: the target's
/// kubelet has the last word.
pub(super) fn of_pod(pod: &Pod) -> WorkloadTraits {
    let spec = pod.spec.clone().unwrap_or_default();
    let affinity = spec.affinity.unwrap_or_default();
    let nodes = affinity.node_affinity.and_then(|nodes| nodes.required_during_scheduling_ignored_during_execution);
    let apart = affinity.pod_anti_affinity.and_then(|apart| apart.required_during_scheduling_ignored_during_execution);
    WorkloadTraits {
        labels: pod.metadata.labels.clone().unwrap_or_default(),
        priority: spec.priority.unwrap_or_default(),
        tolerations: spec.tolerations.iter().flatten().map(toleration).collect(),
        node_selector: spec.node_selector.unwrap_or_default(),
        affinity: nodes.iter().flat_map(|nodes| &nodes.node_selector_terms).map(term).collect(),
        anti_affinity: apart.iter().flatten().filter_map(anti_affinity).collect(),
    }
}

fn effect(word: &str) -> Option<Effect> {
    match word {
        "NoSchedule" => Some(Effect::NoSchedule),
        "PreferNoSchedule" => Some(Effect::PreferNoSchedule),
        "NoExecute" => Some(Effect::NoExecute),
        _ => None,
    }
}

fn taint(taint: &KubeTaint) -> Option<Taint> {
    Some(Taint {
        key: taint.key.clone(),
        value: taint.value.clone().unwrap_or_default(),
        effect: effect(&taint.effect)?,
    })
}

fn toleration(toleration: &KubeToleration) -> Toleration {
    let exists = toleration.operator.as_deref() == Some("Exists");
    Toleration {
        key: toleration.key.clone().filter(|key| !key.is_empty()),
        value: (!exists).then(|| toleration.value.clone().unwrap_or_default()),
        effect: toleration.effect.as_deref().and_then(effect),
    }
}

/// Its fields (`metadata.name`, as DaemonSets have it) are left alone: pods of those do not move.
fn term(term: &NodeSelectorTerm) -> Selector {
    Selector(term.match_expressions.iter().flatten().filter_map(of_nodes).collect())
}

fn of_nodes(requirement: &NodeSelectorRequirement) -> Option<Requirement> {
    let values = requirement.values.clone().unwrap_or_default();
    let number = || values.first()?.parse().ok();
    let operator = match requirement.operator.as_str() {
        "Gt" => Operator::Gt(number()?),
        "Lt" => Operator::Lt(number()?),
        word => of_set(word, values.clone())?,
    };
    Some(Requirement { key: requirement.key.clone(), operator })
}

fn of_set(word: &str, values: Vec<String>) -> Option<Operator> {
    match word {
        "In" => Some(Operator::In(values)),
        "NotIn" => Some(Operator::NotIn(values)),
        "Exists" => Some(Operator::Exists),
        "DoesNotExist" => Some(Operator::DoesNotExist),
        _ => None,
    }
}

fn anti_affinity(term: &PodAffinityTerm) -> Option<AntiAffinity> {
    Some(AntiAffinity { workloads: labels(term.label_selector.as_ref()?), topology: term.topology_key.clone() })
}

fn labels(selector: &LabelSelector) -> Selector {
    let equal = selector.match_labels.iter().flatten();
    let equal = equal.map(|(key, value)| Requirement { key: key.clone(), operator: Operator::In(vec![value.clone()]) });
    let expression = |requirement: &LabelSelectorRequirement| {
        let operator = of_set(&requirement.operator, requirement.values.clone().unwrap_or_default())?;
        Some(Requirement { key: requirement.key.clone(), operator })
    };
    Selector(equal.chain(selector.match_expressions.iter().flatten().filter_map(expression)).collect())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn rules_of_the_scheduler_are_those_of_placement() {
        let pod: Pod = serde_json::from_value(serde_json::json!({
            "metadata": { "labels": { "app": "web" } },
            "spec": {
                "containers": [], "priority": 7, "nodeSelector": { "disk": "ssd" },
                "tolerations": [
                    { "key": "spot", "operator": "Equal", "value": "true", "effect": "NoSchedule" },
                    { "operator": "Exists" },
                ],
                "affinity": {
                    "nodeAffinity": { "requiredDuringSchedulingIgnoredDuringExecution": { "nodeSelectorTerms": [
                        { "matchExpressions": [{ "key": "zone", "operator": "In", "values": ["a"] }, { "key": "cores", "operator": "Gt", "values": ["3"] }] },
                    ] } },
                    "podAntiAffinity": { "requiredDuringSchedulingIgnoredDuringExecution": [
                        { "topologyKey": "kubernetes.io/hostname", "labelSelector": { "matchLabels": { "app": "web" } } },
                    ] },
                },
            },
        }))
        .unwrap();
        let traits = of_pod(&pod);
        assert_eq!((traits.priority, &traits.node_selector), (7, &BTreeMap::from([("disk".into(), "ssd".into())])));
        assert_eq!(traits.tolerations[0].value.as_deref(), Some("true"));
        assert_eq!(traits.tolerations[1], Toleration::default(), "it tolerates everything");
        let zone = BTreeMap::from([("zone".to_owned(), "a".to_owned()), ("cores".to_owned(), "4".to_owned())]);
        assert!(traits.affinity[0].is_met_by(&zone) && !traits.affinity[0].is_met_by(&BTreeMap::new()));
        assert!(traits.anti_affinity[0].workloads.is_met_by(&traits.labels));

        let node: Node = serde_json::from_value(serde_json::json!({
            "metadata": { "labels": { "zone": "a" } },
            "spec": { "taints": [{ "key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule" }] },
        }))
        .unwrap();
        assert_eq!(of_node(&node).taints[0].effect, Effect::NoSchedule);
        assert_eq!(of_node(&node).labels["zone"], "a");
    }
}
