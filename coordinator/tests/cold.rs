//! Cold and application-level migrations through the real coordinator: no connection is kept, nothing is filled.

mod world;

use podferry_common::{Failure, FailureCode};
use podferry_proto::v1::{self, Decision, Phase};
use world::{Copy, Fault, World, migrate, outcome, request};

fn cold(grace_period_s: Option<u32>) -> v1::MigrateRequest {
    let (workload, target) = ("shop".to_owned(), "b".to_owned());
    v1::MigrateRequest { workload, target, strategy: v1::Strategy::Cold.into(), grace_period_s, ..Default::default() }
}

/// A world whose nodes know it; CRIU is on none of them.
async fn without_criu() -> World {
    let world = World::new().await;
    for node in ["a", "b", "c"] {
        world.node(node, |node| {
            node.description.features = vec!["agent:cold".to_owned()];
            (node.description.fit, node.description.complaints) = (false, vec!["no CRIU was found".to_owned()]);
        });
    }
    world
}

#[tokio::test]
async fn cold_moves_between_nodes_without_criu_and_closes_connections() {
    let world = without_criu().await;
    let (_coordinator, mut client) = world.coordinator().await;
    let accepted = request(&mut client, cold(Some(7))).await.unwrap();
    let end = outcome(&mut client, &accepted.id).await;
    assert_eq!((end.phase(), end.decision()), (Phase::Succeeded, Decision::Commit), "{end:?}");
    assert_eq!((world.copy("a", "cart"), world.copy("b", "cart")), (None, Some(Copy::Running)));
    let closed = "3 established TCP connections are closed: the workload is stopped, and started anew";
    assert!(end.notes.iter().any(|note| note == closed), "{:?}", end.notes);
    let mut calls = world.calls();
    calls[5..7].sort();
    calls[7..9].sort();
    insta::assert_snapshot!(calls.join(", "), @"a PreflightSource, b PreflightTarget, b Prepare, a Freeze, a PreCopy, a Transfer, b Restore, a Seal, b Seal, a Release, b Resume");
    let asked = world.shared.lock().freezes[0].clone();
    assert_eq!(asked.stop, Some(v1::Stop { grace_period_ms: 7000 }));
    assert!(!asked.keep_connections && asked.pre_copy.is_some() && !asked.post_copy);
    assert_eq!(asked.deadline_ms, 12_000, "the time that it gets to end is not the transfer's");
    // The others need what these nodes lack.
    let warm = migrate(&mut client, "redis", "b").await.unwrap_err();
    assert_eq!(warm.code, FailureCode::FailedPrecondition, "{warm}");
}

#[tokio::test]
async fn an_agent_that_does_not_know_cold_is_refused_and_nothing_is_touched() {
    let world = World::new().await;
    let (_coordinator, mut client) = world.coordinator().await;
    let refused = request(&mut client, cold(None)).await.unwrap_err();
    insta::assert_snapshot!(refused, @"node b cannot take the workload: its agent does not know this kind of migration (on b, in preflight); what to do: update the agent, or migrate warm and without a limit on the bandwidth");
    world.node("b", |node| node.description.features = vec!["agent:cold".to_owned()]);
    let accepted = request(&mut client, cold(None)).await.unwrap();
    let end = outcome(&mut client, &accepted.id).await;
    insta::assert_snapshot!(end.reason, @"the agent of node a does not know cold migrations (on a, in preflight); what to do: update it, or use warm");
    assert_eq!((world.calls(), world.copy("a", "cart")), (Vec::new(), Some(Copy::Running)));
}

#[tokio::test]
async fn a_target_that_cannot_create_the_container_undoes_it() {
    let world = without_criu().await;
    let (_coordinator, mut client) = world.coordinator().await;
    let missing = Failure::new(FailureCode::Aborted, "exec: \"/bin/shop\": no such file or directory");
    world.fault("b", "Restore", Fault::Fail(missing), 1);
    let accepted = request(&mut client, cold(None)).await.unwrap();
    let end = outcome(&mut client, &accepted.id).await;
    assert_eq!((end.phase(), end.decision()), (Phase::Failed, Decision::Abort));
    assert!(end.reason.contains("no such file or directory"), "{}", end.reason);
    assert_eq!((world.copy("a", "cart"), world.copy("b", "cart")), (Some(Copy::Running), None));
    assert_eq!(world.shared.lock().freezes[0].stop, Some(v1::Stop { grace_period_ms: 30_000 }));
}

#[tokio::test]
async fn a_new_instance_takes_over_and_both_agents_are_told_so() {
    let world = without_criu().await;
    let wish = || v1::MigrateRequest { strategy: v1::Strategy::Application.into(), ..cold(Some(7)) };
    let (_coordinator, mut client) = world.coordinator().await;
    let unknown = request(&mut client, wish()).await.unwrap_err();
    assert!(unknown.message.contains("its agent does not know this kind of migration"), "{unknown}");
    for node in ["a", "b"] {
        world.node(node, |node| node.description.features.push("agent:application".to_owned()));
    }
    let accepted = request(&mut client, wish()).await.unwrap();
    let end = outcome(&mut client, &accepted.id).await;
    assert_eq!((end.phase(), end.decision()), (Phase::Succeeded, Decision::Commit), "{end:?}");
    let closed = "3 established TCP connections are closed: a new instance takes the workload's place";
    assert!(end.notes.iter().any(|note| note == closed), "{:?}", end.notes);
    let asked = world.shared.lock().freezes[0].clone();
    assert_eq!((asked.take_over, asked.stop), (Some(v1::TakeOver { grace_period_ms: 7000 }), None));
    assert!(!asked.keep_connections && asked.pre_copy.is_some());
    let prepared = world.shared.lock().prepares[0].clone();
    assert!(prepared.cold && prepared.application && !prepared.source_address.is_empty(), "{prepared:?}");
}
