//! Migrations that are asked for by objects, and recorded in them, with a real API server and the agents of `tests/world`.
//!
//! `KUBECONFIG=… cargo test -p podferry-coordinator --test kubernetes -- --ignored --test-threads=1`: see `make test-kubernetes`.
#![expect(clippy::unwrap_used, reason = "a panic is the report")]

mod account;
mod cluster;
mod evacuations;
mod evictions;
mod names;
#[path = "../world/mod.rs"]
mod world;

use std::time::Duration;

use cluster::{Cluster, condition, spec};
use podferry_common::{Failure, FailureCode};
use podferry_crds::{Connections, FINALIZER, ID_ANNOTATION, Limits, Migration, MigrationPolicySpec, Strategy, Wishes};
use podferry_proto::v1::{self, Phase};
use rustix::process::Signal;
use serde_json::json;
use world::{Copy, Fault, migrate, outcome};

#[tokio::test]
#[ignore = "needs an API server: make test-kubernetes"]
async fn an_object_moves_its_pod_and_says_how() {
    let cluster = Cluster::new().await;
    let _coordinator = cluster.coordinator().await;
    cluster.make("one", spec("cart", Strategy::Warm)).await;
    let ended = cluster.phase("one", "succeeded").await;
    assert_eq!((cluster.world.copy("a", "cart"), cluster.world.copy("b", "cart")), (None, Some(Copy::Running)));
    let status = ended.status.clone().unwrap();
    assert_eq!((status.source.as_str(), status.target.as_str(), status.strategy.as_str()), ("a", "b", "warm"));
    assert_eq!(
        (status.decision.as_str(), status.requested_by.as_str()),
        ("commit", "kubernetes.client.podferry.internal")
    );
    assert!(status.downtime_ms > 0.0 && status.rounds.len() == 1 && status.completed_at.is_some(), "{status:?}");
    let what: Vec<_> = status.history.iter().map(|entry| entry.what.as_str()).collect();
    assert_eq!(what.first().zip(what.last()), Some((&"accepted", &"succeeded")), "{what:?}");
    for (kind, holds) in [("Accepted", "True"), ("Committed", "True"), ("Succeeded", "True"), ("Finished", "True")] {
        let found = condition(&ended, kind);
        assert_eq!((found.0.as_str(), found.2), (holds, ended.metadata.generation), "{kind}");
    }
    cluster.until("one", "its finalizer is gone", |object| object.metadata.finalizers.is_none()).await;
    cluster.event("one", "Accepted").await;
    cluster.event("one", "Succeeded").await;
}

#[tokio::test]
#[ignore = "needs an API server: make test-kubernetes"]
async fn what_cannot_be_is_refused_with_a_reason_and_a_remedy() {
    let cluster = Cluster::new().await;
    let _coordinator = cluster.coordinator().await;
    cluster.make("nobody", spec("nobody", Strategy::Warm)).await;
    let refused = cluster.phase("nobody", "refused").await;
    let status = refused.status.clone().unwrap();
    assert!(status.reason.contains("nobody") && status.reason.contains("what to do"), "{}", status.reason);
    let (holds, reason, _) = condition(&refused, "Accepted");
    assert_eq!((holds.as_str(), reason.as_str()), ("False", "NotFound"));
    assert_eq!(condition(&refused, "Finished").0, "True");
    cluster.event("nobody", "Refused").await;
    cluster.delete("nobody").await;
    cluster.gone("nobody").await;
    let mut hybrid = spec("cart", Strategy::Hybrid);
    let said = cluster.try_make("risky", hybrid.clone()).await.unwrap_err();
    assert!(said.contains("acceptLoss"), "{said}");
    hybrid.wishes.accept_loss = Some(true);
    hybrid.target_node = Some("a".to_owned());
    cluster.make("risky", hybrid).await;
    assert_eq!(condition(&cluster.phase("risky", "refused").await, "Succeeded").0, "False");
    let mut restarted = spec("cart", Strategy::Auto);
    (restarted.wishes.allow_restart, restarted.wishes.connections) = (Some(true), Some(Connections::Keep));
    let said = cluster.try_make("torn", restarted).await.unwrap_err();
    assert!(said.contains("close connections"), "{said}");
    let said = cluster.patch("risky", json!({"spec": {"targetNode": "b"}})).await.unwrap_err();
    assert!(said.contains("make a new Migration"), "{said}");
}

#[tokio::test]
#[ignore = "needs an API server: make test-kubernetes"]
async fn what_is_asked_for_over_grpc_is_an_object_too() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator().await;
    let mut client = cluster.client(&coordinator).await;
    let pod = cluster.workload("cart");
    let accepted = migrate(&mut client, &pod, "b").await.unwrap();
    assert_eq!(outcome(&mut client, &accepted.id).await.phase(), Phase::Succeeded);
    let objects = cluster.list().await;
    let object =
        objects.iter().find(|object| object.status.as_ref().is_some_and(|status| status.id == accepted.id)).unwrap();
    assert_eq!(object.metadata.annotations.as_ref().unwrap()[ID_ANNOTATION], accepted.id);
    assert_eq!((object.spec.pod_name.as_str(), object.spec.wishes.strategy), ("cart", Some(Strategy::Warm)));
    let name = object.metadata.name.clone().unwrap();
    // Another coordinator finds it as it was.
    coordinator.kill().await;
    let coordinator = cluster.coordinator().await;
    let mut client = cluster.client(&coordinator).await;
    let list = v1::ListMigrationsRequest { workload: pod, active_only: false };
    let listed = client.list_migrations(list).await.unwrap().into_inner().migrations;
    assert_eq!(
        listed.iter().map(|migration| (migration.id.as_str(), migration.phase())).collect::<Vec<_>>(),
        [(accepted.id.as_str(), Phase::Succeeded)]
    );
    cluster.delete(&name).await;
    cluster.gone(&name).await;
}

#[tokio::test]
#[ignore = "needs an API server: make test-kubernetes"]
async fn an_object_can_say_all_that_grpc_can() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator().await;
    let mut client = cluster.client(&coordinator).await;
    let all = v1::MigrateRequest {
        workload: cluster.workload("cart"),
        target: "b".to_owned(),
        strategy: v1::Strategy::Auto.into(),
        no_compression: true,
        downtime_budget_ms: 50.4,
        bandwidth_limit: 1 << 20,
        verify: true,
        accept_loss: true,
        throttle: true,
        grace_period_s: Some(10),
        allow_restart: true,
        connections: v1::Connections::Unspecified.into(),
        connections_deadline_s: 7200,
    };
    let accepted = world::request(&mut client, all).await.unwrap();
    outcome(&mut client, &accepted.id).await;
    let said = cluster.list().await.remove(0).spec.wishes;
    let expected = Wishes {
        strategy: Some(Strategy::Auto),
        downtime_budget_ms: Some(50),
        bandwidth_limit: Some(1 << 20),
        verify: Some(true),
        throttle: Some(true),
        accept_loss: Some(true),
        allow_restart: Some(true),
        grace_period_seconds: Some(10),
        connections: None,
        connections_deadline_seconds: Some(7200),
        compress: Some(false),
    };
    assert_eq!(said, expected);
}

#[tokio::test]
#[ignore = "needs an API server: make test-kubernetes"]
async fn a_coordinator_that_is_killed_before_the_commit_undoes_and_one_that_is_killed_after_it_goes_on() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator().await;
    cluster.world.fault("b", "Restore", Fault::Hang, 1);
    cluster.make("undone", spec("cart", Strategy::Warm)).await;
    cluster.world.called("b Restore").await;
    coordinator.kill().await;
    cluster.world.heal("b", "Restore");
    let coordinator = cluster.coordinator().await;
    let ended = cluster.phase("undone", "failed").await;
    assert_eq!(condition(&ended, "Committed").0, "False");
    assert_eq!((cluster.world.copy("a", "cart"), cluster.world.copy("b", "cart")), (Some(Copy::Running), None));

    cluster.world.fault("a", "Release", Fault::Hang, 1);
    cluster.make("done", spec("cart", Strategy::Warm)).await;
    cluster.world.called("a Release").await;
    coordinator.kill().await;
    cluster.world.heal("a", "Release");
    let _coordinator = cluster.coordinator().await;
    assert_eq!(condition(&cluster.phase("done", "succeeded").await, "Committed").0, "True");
    assert_eq!((cluster.world.copy("a", "cart"), cluster.world.copy("b", "cart")), (None, Some(Copy::Running)));
}

#[tokio::test]
#[ignore = "needs an API server: make test-kubernetes"]
async fn a_cancel_and_a_deletion_undo_what_is_not_committed() {
    let cluster = Cluster::new().await;
    let _coordinator = cluster.coordinator().await;
    cluster.world.fault("b", "Restore", Fault::Hang, 1);
    cluster.make("cancelled", spec("cart", Strategy::Warm)).await;
    cluster.phase("cancelled", "freeze").await;
    cluster.patch("cancelled", json!({"spec": {"cancel": true}})).await.unwrap();
    let ended = cluster.phase("cancelled", "cancelled").await;
    assert!(ended.status.unwrap().reason.contains("cancelled by client kubernetes"));
    assert_eq!(cluster.world.copy("a", "cart"), Some(Copy::Running));
    let said = cluster.patch("cancelled", json!({"spec": {"cancel": false}})).await.unwrap_err();
    assert!(said.contains("cannot be taken back"), "{said}");

    cluster.make("deleted", spec("cart", Strategy::Warm)).await;
    cluster.phase("deleted", "freeze").await;
    cluster.delete("deleted").await;
    cluster.gone("deleted").await;
    assert_eq!((cluster.world.copy("a", "cart"), cluster.world.copy("b", "cart")), (Some(Copy::Running), None));
}

#[tokio::test]
#[ignore = "needs an API server: make test-kubernetes"]
async fn a_deleted_object_of_a_committed_migration_stays_until_its_end() {
    let cluster = Cluster::new().await;
    let _coordinator = cluster.coordinator().await;
    cluster.world.fault("a", "Release", Fault::Hang, 1);
    cluster.make("committed", spec("cart", Strategy::Warm)).await;
    cluster.world.called("a Release").await;
    cluster.delete("committed").await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(cluster.get("committed").await.unwrap().metadata.finalizers.unwrap().contains(&FINALIZER.to_owned()));
    cluster.world.heal("a", "Release");
    cluster.gone("committed").await;
    assert_eq!((cluster.world.copy("a", "cart"), cluster.world.copy("b", "cart")), (None, Some(Copy::Running)));
}

#[tokio::test]
#[ignore = "needs an API server: make test-kubernetes"]
async fn a_record_outlives_its_object_being_torn_away() {
    let cluster = Cluster::new().await;
    let coordinator = cluster.coordinator().await;
    cluster.world.fault("a", "Release", Fault::Hang, 1);
    cluster.make("torn", spec("cart", Strategy::Warm)).await;
    cluster.world.called("a Release").await;
    cluster.delete("torn").await;
    cluster.patch("torn", json!({"metadata": {"finalizers": null}})).await.unwrap();
    cluster.gone("torn").await;
    cluster.world.heal("a", "Release");
    let ended = |object: &&Migration| object.status.as_ref().is_some_and(|status| status.phase == "succeeded");
    for _ in 0..100 {
        if cluster.list().await.iter().any(|object| ended(&object)) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(cluster.list().await.iter().any(|object| ended(&object)), "{:?}", cluster.list().await);
    drop(coordinator);
}

#[tokio::test]
#[ignore = "needs an API server: make test-kubernetes"]
async fn what_a_policy_says_counts_where_the_object_says_nothing() {
    let cluster = Cluster::new().await;
    let _coordinator = cluster.coordinator().await;
    let defaults = Wishes { strategy: Some(Strategy::Live), ..Wishes::default() };
    cluster.policy("all", MigrationPolicySpec { defaults, ..MigrationPolicySpec::default() }).await;
    let mut silent = spec("cart", Strategy::Auto);
    silent.wishes.strategy = None;
    cluster.make("by-policy", silent).await;
    assert_eq!(cluster.phase("by-policy", "succeeded").await.status.unwrap().strategy, "live");
    let limits = Limits { movable: Some(false), ..Limits::default() };
    cluster.policy("none", MigrationPolicySpec { limits, ..MigrationPolicySpec::default() }).await;
    let mut back = spec("cart", Strategy::Warm);
    back.target_node = Some("a".to_owned());
    cluster.make("forbidden", back).await;
    let refused = cluster.phase("forbidden", "refused").await;
    assert!(refused.status.unwrap().reason.contains("does not allow that this pod is moved"));
}

#[tokio::test]
#[ignore = "needs an API server: make test-kubernetes"]
async fn what_may_pass_waits_and_begins_by_itself() {
    let cluster = Cluster::new().await;
    let _coordinator = cluster.coordinator().await;
    cluster.world.fault("b", "Restore", Fault::Hang, 1);
    cluster.make("first", spec("cart", Strategy::Warm)).await;
    cluster.phase("first", "freeze").await;
    let mut second = spec("cart", Strategy::Warm);
    second.target_node = Some("c".to_owned());
    second.ttl_seconds_after_finished = Some(1);
    cluster.make("second", second).await;
    let waits = cluster.phase("second", "pending").await;
    let (holds, reason, _) = condition(&waits, "Accepted");
    assert_eq!((holds.as_str(), reason.as_str()), ("Unknown", "AlreadyExists"));
    cluster.patch("first", json!({"spec": {"cancel": true}})).await.unwrap();
    cluster.phase("first", "cancelled").await;
    // It is deleted a second after its end, as it asks for.
    cluster.gone("second").await;
    assert_eq!(cluster.world.copy("c", "cart"), Some(Copy::Running));
}

#[tokio::test]
#[ignore = "needs an API server: make test-kubernetes"]
async fn another_coordinator_takes_over_and_the_deposed_one_cannot_commit() {
    let cluster = Cluster::new().await;
    let mut first = cluster.coordinator().await;
    let second = cluster.configuration("second");
    cluster.world.fault("b", "Seal", Fault::Hang, 1);
    cluster.make("contested", spec("cart", Strategy::Warm)).await;
    cluster.world.called("b Seal").await;
    // The next thing that it does would be the commit.
    first.signal(Signal::STOP);
    cluster.world.heal("b", "Seal");
    let second = world::Coordinator::start(&second).await;
    let undone = cluster.phase("contested", "failed").await;
    assert_eq!(condition(&undone, "Committed").0, "False");
    first.signal(Signal::CONT);
    assert!(!first.end().await.success(), "it stops, and says why");
    let said = first.log.lock().unwrap().join("\n");
    assert!(said.contains("another coordinator leads") || said.contains("is held by"), "{said}");
    assert_eq!((cluster.world.copy("a", "cart"), cluster.world.copy("b", "cart")), (Some(Copy::Running), None));
    assert_eq!(cluster.get("contested").await.unwrap().status.unwrap().decision, "abort");
    drop(second);
}

#[tokio::test]
#[ignore = "needs an API server: make test-kubernetes"]
async fn a_coordinator_that_ends_gives_way_at_once() {
    let cluster = Cluster::new().await;
    let mut first = cluster.coordinator().await;
    let second = cluster.configuration("second");
    let waiting = tokio::spawn(async move { world::Coordinator::start(&second).await });
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(!waiting.is_finished(), "it waits");
    first.signal(Signal::TERM);
    assert!(first.end().await.success());
    let second =
        tokio::time::timeout(Duration::from_secs(5), waiting).await.expect("it waits for the lease to lapse").unwrap();
    cluster.make("later", spec("cart", Strategy::Warm)).await;
    cluster.phase("later", "succeeded").await;
    drop(second);
}

#[tokio::test]
#[ignore = "needs an API server: make test-kubernetes"]
async fn a_coordinator_that_is_started_again_in_its_pod_waits_for_nobody() {
    let cluster = Cluster::new().await;
    let pod = [(podferry_coordinator::kubernetes::POD_VARIABLE, "coordinator-0")];
    let first = world::Coordinator::start_with(&cluster.world.configuration(), &pod).await;
    cluster.world.fault("a", "Release", Fault::Hang, 1);
    cluster.make("one", spec("cart", Strategy::Warm)).await;
    cluster.world.called("a Release").await;
    first.kill().await;
    cluster.world.heal("a", "Release");
    let began = std::time::Instant::now();
    let _again = world::Coordinator::start_with(&cluster.world.configuration(), &pod).await;
    cluster.phase("one", "succeeded").await;
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}: it waited for its own lease to lapse", began.elapsed());
}

#[tokio::test]
#[ignore = "needs an API server: make test-kubernetes"]
async fn a_failed_migration_says_why_in_parts() {
    let cluster = Cluster::new().await;
    let _coordinator = cluster.coordinator().await;
    let failure = Failure::new(FailureCode::Internal, "the disk is on fire")
        .criu_line("Error (criu/x.c:7): no")
        .remedy("put it out");
    cluster.world.fault("b", "Restore", Fault::Fail(failure), 1);
    cluster.make("burnt", spec("cart", Strategy::Warm)).await;
    let problem = cluster.phase("burnt", "failed").await.status.unwrap().problem.unwrap();
    assert_eq!(
        (problem.code.as_str(), problem.criu_line.as_str(), problem.remedy.as_str()),
        ("INTERNAL", "Error (criu/x.c:7): no", "put it out")
    );
}

/// `PODFERRY_TESTCLUSTER` is the command that the cluster is driven by.
#[tokio::test]
#[ignore = "needs a test cluster: make test-kubernetes"]
async fn an_api_server_that_is_restarted_in_the_freeze_or_at_the_commit_costs_time_alone() {
    let cluster = Cluster::new().await;
    let _coordinator = cluster.coordinator().await;
    let command = std::env::var("PODFERRY_TESTCLUSTER").expect("PODFERRY_TESTCLUSTER drives the test cluster");
    for (node, held, name) in [("b", "Restore", "in-freeze"), ("c", "Seal", "at-commit")] {
        cluster.world.fault(node, held, Fault::Hang, 1);
        let mut spec = spec("cart", Strategy::Warm);
        spec.target_node = Some(node.to_owned());
        cluster.make(name, spec).await;
        cluster.world.called(&format!("{node} {held}")).await;
        // The commit falls into the time in which nobody answers.
        let killed = shell(&format!("{command} stop control kube-apiserver --signal 9")).await;
        assert!(killed, "the API server is killed");
        cluster.world.heal(node, held);
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(shell(&format!("{command} start control kube-apiserver")).await, "it is started");
        cluster.phase(name, "succeeded").await;
        assert_eq!(cluster.world.copy(node, "cart"), Some(Copy::Running));
    }
}

async fn shell(command: &str) -> bool {
    tokio::process::Command::new("sh").arg("-c").arg(command).status().await.unwrap().success()
}
