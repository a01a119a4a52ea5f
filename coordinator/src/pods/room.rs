//! Whether a node has room for a pod more, by what pods request: as its kubelet counts. Pure.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Node, Pod, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use super::plan::phase;

/// Thousandths of each resource, by its name.
type Amounts = BTreeMap<String, i128>;

/// The resource of which each pod takes one.
const PODS: &str = "pods";

/// What a node lacks for a pod more like this one, beside `there`, the pods that are bound to it; empty when it has room. A quantity that nobody
/// can read counts as none: the kubelet has the last word.
pub(super) fn lacks(node: &Node, there: &[Pod], pod: &Pod) -> Vec<String> {
    let allocatable = node.status.as_ref().and_then(|status| status.allocatable.as_ref());
    let mut free = allocatable.map(amounts).unwrap_or_default();
    for taken in there.iter().filter(|pod| !matches!(phase(pod), "Succeeded" | "Failed")).map(requests) {
        for (name, amount) in taken {
            *free.entry(name).or_default() -= amount;
        }
    }
    let short = |(name, needed): (String, i128)| {
        let free = free.get(&name).copied().unwrap_or_default();
        (needed > free).then(|| format!("{name} (requests {}, {} are free)", written(needed), written(free.max(0))))
    };
    requests(pod).into_iter().filter_map(short).collect()
}

/// What a pod requests at the most at any time: its containers together, or one of those that run before them, with what its runtime takes.
fn requests(pod: &Pod) -> Amounts {
    let Some(spec) = &pod.spec else { return Amounts::new() };
    let (mut sum, mut most) = (Amounts::new(), Amounts::new());
    for init in spec.init_containers.iter().flatten() {
        let own = of_container(init);
        if init.restart_policy.as_deref() == Some("Always") {
            add(&mut sum, &own);
        } else {
            let mut beside = sum.clone();
            add(&mut beside, &own);
            raise(&mut most, beside);
        }
    }
    for container in &spec.containers {
        add(&mut sum, &of_container(container));
    }
    raise(&mut most, sum);
    // What the pod says of itself as a whole is what counts.
    most.extend(spec.resources.as_ref().map(of_resources).unwrap_or_default());
    add(&mut most, &spec.overhead.as_ref().map(amounts).unwrap_or_default());
    most.insert(PODS.to_owned(), 1000);
    most
}

fn of_container(container: &Container) -> Amounts {
    container.resources.as_ref().map(of_resources).unwrap_or_default()
}

/// The API server has filled in what limits imply.
fn of_resources(resources: &ResourceRequirements) -> Amounts {
    resources.requests.as_ref().map(amounts).unwrap_or_default()
}

fn amounts(of: &BTreeMap<String, Quantity>) -> Amounts {
    of.iter().filter_map(|(name, quantity)| Some((name.clone(), thousandths(&quantity.0)?))).collect()
}

fn add(to: &mut Amounts, more: &Amounts) {
    for (name, amount) in more {
        *to.entry(name.clone()).or_default() += amount;
    }
}

fn raise(to: &mut Amounts, other: Amounts) {
    for (name, amount) in other {
        let there = to.entry(name).or_default();
        *there = (*there).max(amount);
    }
}

/// A quantity as Kubernetes writes them (`apimachinery/pkg/api/resource`), in thousandths, rounded up as its schedulers do: `250m`, `1.5Gi`,
/// `2e3`. None when it is none, or larger than any.
fn thousandths(text: &str) -> Option<i128> {
    let end = text.find(|letter: char| !letter.is_ascii_digit() && !"+-.".contains(letter)).unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let (numerator, denominator) = factor(suffix)?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits: i128 = format!("{whole}{fraction}").parse().ok()?;
    let places = 10_i128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    let above = digits.checked_mul(numerator)?.checked_mul(1000)?;
    let below = places.checked_mul(denominator)?;
    Some(above.div_euclid(below) + i128::from(above.rem_euclid(below) != 0))
}

/// What a suffix multiplies by, as a fraction.
fn factor(suffix: &str) -> Option<(i128, i128)> {
    const DECIMAL: [&str; 7] = ["", "k", "M", "G", "T", "P", "E"];
    const BINARY: [&str; 6] = ["Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    const SMALL: [&str; 3] = ["m", "u", "n"];
    let power = |base: i128, place: usize| base.checked_pow(u32::try_from(place).ok()?);
    if let Some(place) = DECIMAL.iter().position(|word| *word == suffix) {
        return Some((power(1000, place)?, 1));
    }
    if let Some(place) = BINARY.iter().position(|word| *word == suffix) {
        return Some((power(1024, place + 1)?, 1));
    }
    if let Some(place) = SMALL.iter().position(|word| *word == suffix) {
        return Some((1, power(1000, place + 1)?));
    }
    let exponent: i32 = suffix.strip_prefix(['e', 'E'])?.parse().ok()?;
    let power = 10_i128.checked_pow(exponent.unsigned_abs())?;
    Some(if exponent < 0 { (1, power) } else { (power, 1) })
}

/// For a person: thousandths where there are any.
fn written(amount: i128) -> String {
    if amount % 1000 == 0 { (amount / 1000).to_string() } else { format!("{amount}m") }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn quantities_are_read_as_kubernetes_writes_them() {
        for (text, wanted) in [
            ("0", 0),
            ("1", 1000),
            ("250m", 250),
            ("1.5", 1500),
            (".5", 500),
            ("1.5Gi", 1_610_612_736_000),
            ("128Mi", 134_217_728_000),
            ("2k", 2_000_000),
            ("1e3", 1_000_000),
            ("12E-1", 1200),
            ("1E", 1_000_000_000_000_000_000_000),
            ("1u", 1),
            ("100n", 1),
            ("-1500m", -1500),
        ] {
            assert_eq!(thousandths(text), Some(wanted), "{text}");
        }
        for text in ["", ".", "Mi", "1.2.3", "1Xi", "1e", "ten", "1 Gi", "1e99", "--1"] {
            assert_eq!(thousandths(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn no_text_is_too_much(text in ".{0,24}") {
            thousandths(&text);
        }
    }

    fn node(allocatable: &Value) -> Node {
        serde_json::from_value(json!({ "status": { "allocatable": allocatable } })).unwrap()
    }

    fn pod(containers: &Value, more: &Value) -> Pod {
        let mut spec = json!({ "containers": containers });
        spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        serde_json::from_value(json!({ "spec": spec, "status": { "phase": "Running" } })).unwrap()
    }

    fn container(requests: &Value) -> Value {
        json!({ "name": "c", "resources": { "requests": requests } })
    }

    #[test]
    fn what_is_requested_there_and_by_the_pod_has_to_fit() {
        let node = node(&json!({ "cpu": "2", "memory": "1Gi", "pods": "3" }));
        let half = pod(&json!([container(&json!({ "cpu": "900m", "memory": "100Mi" }))]), &json!({}));
        assert_eq!(lacks(&node, &[], &half), Vec::<String>::new());
        assert_eq!(lacks(&node, std::slice::from_ref(&half), &half), Vec::<String>::new());
        let short = lacks(&node, &[half.clone(), half.clone()], &half);
        assert_eq!(short, ["cpu (requests 900m, 200m are free)"]);
        let short = lacks(&node, &[half.clone(), half.clone(), half.clone()], &half);
        assert_eq!(short.len(), 2, "{short:?}");
        assert!(short[1].starts_with("pods (requests 1, 0"), "{short:?}");
        // Who has ended takes nothing.
        let mut ended = half.clone();
        ended.status.as_mut().unwrap().phase = Some("Succeeded".to_owned());
        assert_eq!(lacks(&node, &[ended.clone(), ended, half.clone()], &half), Vec::<String>::new());
        // Of what the node does not have at all there is none.
        let special = pod(&json!([container(&json!({ "vendor.example/gpu": "1" }))]), &json!({}));
        assert_eq!(lacks(&node, &[], &special), ["vendor.example/gpu (requests 1, 0 are free)"]);
    }

    #[test]
    fn a_pod_requests_what_it_takes_at_the_most_at_any_time() {
        let cpu = |pod: &Pod| requests(pod)["cpu"];
        let two = json!([container(&json!({ "cpu": "1" })), container(&json!({ "cpu": "500m" }))]);
        assert_eq!(cpu(&pod(&two, &json!({}))), 1500);
        let larger = json!({ "initContainers": [container(&json!({ "cpu": "2" }))], "overhead": { "cpu": "250m" } });
        assert_eq!(cpu(&pod(&two, &larger)), 2250);
        let mut sidecar = container(&json!({ "cpu": "1" }));
        sidecar["restartPolicy"] = json!("Always");
        let beside = json!({ "initContainers": [sidecar, container(&json!({ "cpu": "2" }))] });
        assert_eq!(cpu(&pod(&two, &beside)), 3000);
        let whole = json!({ "resources": { "requests": { "cpu": "4" } } });
        assert_eq!(cpu(&pod(&two, &whole)), 4000);
    }
}
