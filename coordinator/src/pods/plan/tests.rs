//! Pods of each kind, and what becomes of them.

use super::*;
use crate::testing::merge;

fn pod(change: serde_json::Value) -> Pod {
    let mut pod = serde_json::json!({
        "metadata": {
            "name": "web-5f6d-abcde", "generateName": "web-5f6d-", "namespace": "shop", "uid": "u-1",
            "labels": { "app": "web", "pod-template-hash": "5f6d" },
            "annotations": { "note": "kept" },
            "ownerReferences": [{ "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web-5f6d", "uid": "r-1", "controller": true }],
        },
        "spec": {
            "runtimeClassName": "podferry",
            "nodeName": "a",
            "initContainers": [{ "name": "set-up", "image": "i" }],
            "containers": [{ "name": "web", "image": "i" }],
            "volumes": [{ "name": "cache", "emptyDir": {} }, { "name": "token", "projected": {} }],
        },
    });
    merge(&mut pod, change);
    serde_json::from_value(pod).unwrap()
}

fn refusal(change: serde_json::Value) -> String {
    check_movable(&pod(change), Strategy::Live).unwrap_err().to_string()
}

#[test]
fn a_pod_of_a_deployment_moves() {
    check_movable(&pod(serde_json::json!({})), Strategy::Live).unwrap();
    check_movable(&pod(serde_json::json!({ "metadata": { "ownerReferences": null } })), Strategy::Postcopy).unwrap();
}

#[test]
fn what_keeps_a_pod_where_it_is_is_said_all_at_once_with_what_to_do() {
    let all = refusal(serde_json::json!({
        "spec": { "runtimeClassName": null, "hostNetwork": true, "containers": [{ "name": "a" }, { "name": "b" }] },
    }));
    for words in ["the default", "runtimeClassName: podferry", "hostNetwork", "2 containers"] {
        assert!(all.contains(words), "{all}");
    }
    for (change, words) in [
        (serde_json::json!({ "spec": { "volumes": [{ "name": "d", "hostPath": { "path": "/d" } }] } }), "hostPath"),
        (
            serde_json::json!({ "spec": { "volumes": [{ "name": "d", "persistentVolumeClaim": { "claimName": "c" } }] } }),
            "claim",
        ),
        (serde_json::json!({ "metadata": { "deletionTimestamp": "2026-11-30T00:00:00Z" } }), "being deleted"),
        (
            serde_json::json!({ "spec": { "initContainers": [{ "name": "s", "restartPolicy": "Always" }] } }),
            "2 containers",
        ),
        (
            serde_json::json!({ "spec": { "containers": [{ "name": "web", "volumeMounts": [
                { "name": "cache", "mountPath": "/c", "subPath": "x" },
            ] }] } }),
            "subPath",
        ),
    ] {
        let said = refusal(change);
        assert!(said.contains(words), "{said}");
    }
    // The Job has no label of a Job's own: it selects by others.
    for kind in ["DaemonSet", "Job", "Node"] {
        let said = refusal(serde_json::json!({ "metadata": { "ownerReferences": [
            { "apiVersion": "v1", "kind": kind, "name": "o", "uid": "x", "controller": true },
        ] } }));
        assert!(said.contains(kind), "{said}");
    }
    assert!(check_movable(&pod(serde_json::json!({})), Strategy::Cold).is_err());
}

#[test]
fn a_pod_that_has_not_taken_its_predecessors_place_yet_moves_later() {
    let arriving = pod(serde_json::json!({ "metadata": { "annotations": { MIGRATION: "m-1" } } }));
    let refused = check_movable(&arriving, Strategy::Live).unwrap_err();
    assert_eq!(refused.code, FailureCode::AlreadyExists);
    assert!(refused.to_string().contains("m-1"), "{refused}");
}

fn moved() -> (PodMove, MigrationId) {
    let id: MigrationId = "0192d9e07b2a7c3a8000000000abcdef".parse().unwrap();
    let pod = PodMove {
        namespace: "shop".into(),
        name: "web-5f6d-abcde".into(),
        uid: "u-1".into(),
        container: "web".into(),
        target_name: target_name("web-5f6d", id),
        keeps_name: false,
    };
    (pod, id)
}

#[test]
fn the_target_pod_is_known_to_nobody_until_it_is_adopted() {
    let (moved, id) = moved();
    let source = pod(serde_json::json!({}));
    let target = target_pod(&source, &moved, "b", id).unwrap();
    assert_eq!(target.metadata.name.as_deref(), Some("web-5f6d-00abcdef"));
    assert_eq!(target.metadata.labels.as_ref().unwrap().keys().collect::<Vec<_>>(), [MIGRATION]);
    assert_eq!((&target.metadata.owner_references, &target.metadata.generate_name), (&None, &None));
    let spec = target.spec.as_ref().unwrap();
    assert_eq!((spec.node_name.as_deref(), &spec.init_containers), (Some("b"), &None));
    assert_eq!(target.metadata.annotations.as_ref().unwrap()["note"], "kept");

    let adoption = Adoption::of_target(&target).unwrap();
    assert_eq!(adoption.labels, source.metadata.labels.clone().unwrap());
    assert_eq!(adoption.owners, source.metadata.owner_references.clone().unwrap());
    assert_eq!(adoption.exposed().unwrap(), BTreeMap::from([("app".to_owned(), "web".to_owned())]));
    let patch = adopted(&adoption, "u-2");
    assert_eq!(patch["metadata"]["labels"]["pod-template-hash"], "5f6d");
    assert_eq!(patch["metadata"]["uid"], "u-2");
    assert_eq!(patch["metadata"]["labels"].get(MIGRATION), None, "by its label it is found until all is done");
    let patch = unmarked(&adoption, "u-2");
    for (kind, name) in [("labels", MIGRATION), ("annotations", MIGRATION), ("annotations", DELETION_COST)] {
        assert!(patch["metadata"][kind].get(name).unwrap().is_null(), "{kind} {name}");
    }
}

#[test]
fn the_pod_of_a_stateful_set_moves_by_one_that_stands_in_for_the_next_of_its_name() {
    let source = pod(serde_json::json!({ "metadata": {
        "name": "web-0", "generateName": "web-",
        "labels": { "app": "web", "apps.kubernetes.io/pod-index": "0" },
        "ownerReferences": [{ "apiVersion": "apps/v1", "kind": "StatefulSet", "name": "web", "uid": "s-1", "controller": true }],
    }, "spec": { "hostname": "web-0", "subdomain": "web" } }));
    check_movable(&source, Strategy::Live).unwrap();
    check_movable(&source, Strategy::Warm).unwrap();
    for strategy in [Strategy::Postcopy, Strategy::Hybrid] {
        let said = check_movable(&source, strategy).unwrap_err().to_string();
        assert!(said.contains("StatefulSet web") && said.contains("use live or warm"), "{said}");
    }
    assert!(keeps_name(&source) && !keeps_name(&pod(serde_json::json!({}))));

    let (moved, id) = moved();
    let moved = PodMove { name: "web-0".into(), target_name: target_name("web", id), keeps_name: true, ..moved };
    let stand_in = target_pod(&source, &moved, "b", id).unwrap();
    assert_eq!(stand_in.metadata.labels.as_ref().unwrap().len(), 1, "nobody counts it, and no Service knows it");
    let named = named_pod(&stand_in, &moved, id);
    assert_eq!(named.metadata.name, source.metadata.name);
    assert_eq!(named.metadata.owner_references, source.metadata.owner_references);
    let (mut labels, spec) = (named.metadata.labels.clone().unwrap(), named.spec.as_ref().unwrap());
    assert_eq!(labels.remove(MIGRATION), Some(id.to_string()));
    assert_eq!(Some(labels), source.metadata.labels);
    assert_eq!((spec.node_name.as_deref(), spec.hostname.as_deref()), (Some("b"), Some("web-0")));
    assert!(is_marked(&named, id), "its container comes, too");
    let annotations = named.metadata.annotations.unwrap();
    assert!(
        !annotations.contains_key(NAME) && !annotations.contains_key(DELETION_COST) && annotations["note"] == "kept"
    );
}

#[test]
fn a_name_is_free_when_nothing_of_it_can_run_any_more() {
    let (moved, id) = moved();
    let found = |change| holder(Some(&pod(change)), &moved, id);
    assert_eq!(holder(None, &moved, id), Holder::None);
    assert_eq!(found(serde_json::json!({})), Holder::Source);
    let other = |more: serde_json::Value| {
        let mut change = serde_json::json!({ "metadata": { "uid": "u-9" } });
        merge(&mut change, more);
        found(change)
    };
    assert_eq!(other(serde_json::json!({})), Holder::Taken);
    assert_eq!(other(serde_json::json!({ "spec": { "nodeName": null } })), Holder::Nobodys);
    let ending = |grace_s: i64, finalizers: &[&str]| {
        other(serde_json::json!({ "metadata": {
            "deletionTimestamp": "2026-12-01T00:00:00Z", "deletionGracePeriodSeconds": grace_s, "finalizers": finalizers,
        } }))
    };
    assert_eq!(ending(1, &[NAME_HELD]), Holder::Taken);
    assert_eq!(ending(0, &["another.example/one"]), Holder::Taken);
    assert_eq!(ending(0, &[NAME_HELD]), Holder::Ended);
    let named = serde_json::json!({ "metadata": { "annotations": { MIGRATION: id.to_string() } } });
    assert_eq!(other(named.clone()), Holder::Named(None));
    let mut failed = named;
    merge(&mut failed, serde_json::json!({ "status": { "phase": "Failed", "reason": "OutOfcpu" } }));
    assert!(matches!(other(failed), Holder::Named(Some(why)) if why.contains("OutOfcpu")));
}

fn of_job() -> Pod {
    pod(serde_json::json!({ "metadata": {
        "labels": { "app": "web", "batch.kubernetes.io/controller-uid": "j-1", "controller-uid": "j-1", "job-name": "sum" },
        "finalizers": ["batch.kubernetes.io/job-tracking", "somebody.else/own"],
        "ownerReferences": [
            { "apiVersion": "batch/v1", "kind": "Job", "name": "sum", "uid": "j-1", "controller": true },
            { "apiVersion": "v1", "kind": "ConfigMap", "name": "c", "uid": "c-1" },
        ],
    } }))
}

#[test]
fn the_pod_of_a_job_is_let_go_whole_and_its_target_counted_in_its_place() {
    let (moved, id) = moved();
    let mut source = of_job();
    source.metadata.labels.as_mut().unwrap().retain(|name, _| name != TEMPLATE_HASH);
    check_movable(&source, Strategy::Live).unwrap();

    let target = target_pod(&source, &moved, "b", id).unwrap();
    assert_eq!(target.metadata.finalizers, None, "what is discarded must go at once");
    let adoption = Adoption::of_target(&target).unwrap();
    assert!(adoption.is_of_job());
    assert_eq!(adoption.exposed().unwrap().keys().collect::<Vec<_>>(), ["app", "job-name"]);
    let patch = adopted(&adoption, "u-2");
    assert_eq!(
        patch["metadata"]["finalizers"],
        serde_json::json!([JOB_TRACKING]),
        "what is somebody else's stays with the source"
    );
    assert_eq!(patch["metadata"]["labels"]["controller-uid"], "j-1");

    let gone = let_go(&source).unwrap();
    assert_eq!(gone["metadata"]["uid"], "u-1");
    assert_eq!(gone["metadata"]["ownerReferences"], serde_json::json!([{ "$patch": "delete", "uid": "j-1" }]));
    assert!(JOB_UID.iter().all(|name| gone["metadata"]["labels"].get(name).unwrap().is_null()));
    assert_eq!(gone["metadata"]["$deleteFromPrimitiveList/finalizers"], serde_json::json!([JOB_TRACKING]));
    source.metadata.owner_references.as_mut().unwrap().remove(0);
    assert_eq!(let_go(&source), None, "a second time there is nothing to do");
}

#[test]
fn of_a_replica_set_without_a_deployment_nothing_is_exposed_before_it_is_adopted() {
    let (moved, id) = moved();
    let mut source = pod(serde_json::json!({}));
    source.metadata.labels.as_mut().unwrap().remove("pod-template-hash");
    let target = target_pod(&source, &moved, "b", id).unwrap();
    assert_eq!(Adoption::of_target(&target).unwrap().exposed(), None);
}

#[test]
fn a_pod_that_moves_again_keeps_its_first_name() {
    let (moved, id) = moved();
    let bare = pod(serde_json::json!({ "metadata": { "name": "cart", "generateName": null } }));
    assert_eq!(base_name(&bare), "cart");
    let once = target_pod(&bare, &PodMove { target_name: target_name("cart", id), ..moved }, "b", id).unwrap();
    assert_eq!(once.metadata.name.as_deref(), Some("cart-00abcdef"));
    assert_eq!(base_name(&once), "cart");
    assert_eq!(target_name(&"a".repeat(300), id).len(), 209);
}

#[test]
fn only_a_target_that_its_replica_set_would_keep_is_adopted() {
    let state = |phase: &str, ready: &str| {
        pod(serde_json::json!({ "status": { "phase": phase, "conditions": [{ "type": "Ready", "status": ready }] } }))
    };
    let (ready, unready) = (state("Running", "True"), state("Running", "False"));
    assert!(would_be_kept(&ready, Some(&ready)) && would_be_kept(&ready, None));
    assert!(!would_be_kept(&unready, Some(&ready)), "the source would be kept");
    assert!(would_be_kept(&unready, Some(&unready)), "then the cost decides");
    assert!(!would_be_kept(&state("Pending", "False"), None));
}

#[test]
fn a_pod_that_its_node_refuses_says_why() {
    let failed = pod(serde_json::json!({ "status": { "phase": "Failed", "reason": "OutOfcpu", "message": "no cpu" } }));
    assert!(does_not_come(&failed).unwrap().contains("OutOfcpu: no cpu"));
    assert_eq!(does_not_come(&pod(serde_json::json!({ "status": { "phase": "Pending" } }))), None);
}
