//! Live migrations through the real coordinator: memory is copied before the freeze, and filled in behind the resume.
#![expect(clippy::unwrap_used, reason = "a panic is the report")]

mod world;

use std::time::Duration;

use podferry_common::identity::Peer;
use podferry_common::{Failure, FailureCode};
use podferry_proto::v1::{self, Decision, Phase, ProtocolVersion};
use world::{Client, Coordinator, Copy, Fault, World, migrate, outcome, request, watch};

fn live(target: &str) -> v1::MigrateRequest {
    let strategy = v1::Strategy::Live.into();
    v1::MigrateRequest { workload: "shop".to_owned(), target: target.to_owned(), strategy, ..Default::default() }
}

async fn begin(client: &mut Client) -> String {
    request(client, live("b")).await.unwrap().id
}

fn broken() -> Failure {
    Failure::new(FailureCode::Internal, "the disk is on fire")
}

/// What the target says when memory that it needs is gone.
fn lost() -> Failure {
    Failure::new(FailureCode::DataLoss, "12 pages of process 7 did not arrive whole")
}

fn assert_untouched(world: &World) {
    let copies = (world.copy("a", "cart"), world.copy("b", "cart"));
    assert_eq!(copies, (Some(Copy::Running), None), "{:?}", world.calls());
}

fn assert_moved(world: &World) {
    let copies = (world.copy("a", "cart"), world.copy("b", "cart"));
    assert_eq!(copies, (None, Some(Copy::Running)), "{:?}", world.calls());
}

fn fills(world: &World) -> usize {
    world.calls().iter().filter(|call| *call == "b Fill").count()
}

async fn decision(world: &World, coordinator: &Coordinator, id: &str) -> Decision {
    let mut agent = world.client(coordinator, &Peer::Agent("b".parse().unwrap())).await;
    let request = v1::GetDecisionRequest { migration_id: id.to_owned() };
    agent.get_decision(request).await.unwrap().into_inner().decision()
}

async fn cancel(client: &mut Client, id: &str) -> Result<v1::Migration, Failure> {
    let answer = client.cancel_migration(v1::CancelMigrationRequest { id: id.to_owned() }).await;
    Ok(answer.map_err(Failure::from)?.into_inner().migration.unwrap())
}

#[tokio::test]
async fn live_goes_there_with_all_rounds_and_back() {
    let world = World::new().await;
    let (_coordinator, mut client) = world.coordinator().await;
    let wanted = v1::MigrateRequest { downtime_budget_ms: 40.0, bandwidth_limit: 1 << 20, throttle: true, ..live("b") };
    world.fault("a", "PreCopy", Fault::Hang, 1);
    let accepted = request(&mut client, wanted).await.unwrap();
    world.called("a PreCopy").await;
    let copying = async {
        loop {
            let seen = v1::GetMigrationRequest { id: accepted.id.clone() };
            let seen = client.get_migration(seen).await.unwrap().into_inner().migration.unwrap();
            if !seen.rounds.is_empty() {
                return seen;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let copying = tokio::time::timeout(world::PATIENCE, copying).await.expect("a round is shown when it has ended");
    assert_eq!((copying.phase(), copying.rounds[0].pages, copying.wire_bytes), (Phase::Precopy, 16_000, 16_000 << 11));
    assert_eq!(world.copy("a", "cart"), Some(Copy::Running));
    world.heal("a", "PreCopy");
    let end = outcome(&mut client, &accepted.id).await;
    assert_eq!((end.phase(), end.decision(), end.reason.as_str()), (Phase::Succeeded, Decision::Commit, ""));
    assert_moved(&world);
    let mut calls = world.calls();
    // The restore is asked for when the source has converged, which is while it sends; the seals go side by side.
    calls[5..7].sort();
    calls[7..9].sort();
    insta::assert_snapshot!(calls.join(", "), @r#"a PreflightSource, b PreflightTarget, b Prepare, a Freeze, a PreCopy, a Transfer, b Restore, a Seal, b Seal, a Release, b Resume, b Fill"#);
    let rounds: Vec<_> = end.rounds.iter().map(|round| (round.pages, round.predicted_ms)).collect();
    assert_eq!(rounds, [(16_000, 90.0), (300, 4.5), (3, 0.0)]);
    let timings = end.timings.unwrap();
    assert_eq!((timings.freeze, timings.restore, timings.fill), (1.5, 30.0, 6.0));
    assert!(timings.precopy > 0.0 && timings.prepare > 0.0 && end.total_ms > timings.precopy, "{end:?}");
    assert!(end.downtime_ms > 0.0 && end.downtime_ms < end.total_ms - timings.precopy, "{end:?}");
    let notes = [
        "process 1: 2 rounds",
        "100 pages were laid in behind the running container, which had to wait for one 3 times",
    ];
    assert_eq!(end.notes, notes);
    let asked = world.shared.lock().freezes[0].clone();
    let (verify, throttle) = (false, true);
    let pre_copy = v1::PreCopy { downtime_budget_ms: 40.0, max_rounds: 30, deadline_ms: 3000, verify, throttle };
    assert_eq!((asked.pre_copy, asked.bandwidth_limit, asked.deadline_ms), (Some(pre_copy), 1 << 20, 5000));

    let back = request(&mut client, live("a")).await.unwrap();
    assert_eq!(outcome(&mut client, &back.id).await.phase(), Phase::Succeeded);
    assert_untouched(&world);
    let warm = migrate(&mut client, "shop", "b").await.unwrap();
    assert_eq!(outcome(&mut client, &warm.id).await.rounds.len(), 1);
    let freezes = world.shared.lock().freezes.clone();
    assert_eq!(freezes[1].pre_copy.unwrap().downtime_budget_ms.to_bits(), 100.0_f64.to_bits());
    assert_eq!((freezes[2].pre_copy, freezes[2].bandwidth_limit, fills(&world)), (None, 0, 1));
}

#[tokio::test]
async fn what_was_verified_is_told_and_a_source_that_does_not_verify_is_no_source() {
    let world = World::new().await;
    let (_coordinator, mut client) = world.coordinator().await;
    let wanted = |target| v1::MigrateRequest { verify: true, ..live(target) };
    let accepted = request(&mut client, wanted("b")).await.unwrap();
    let end = outcome(&mut client, &accepted.id).await;
    assert_eq!(end.phase(), Phase::Succeeded);
    assert!(world.shared.lock().freezes[0].pre_copy.unwrap().verify);
    insta::assert_snapshot!(end.notes[1], @"verified: 67108864 bytes of memory are on the target as they are on the source; comparing them took 12.5 ms of the downtime");
    assert_moved(&world);

    world.shared.lock().no_verification = true;
    let accepted = request(&mut client, wanted("a")).await.unwrap();
    let end = outcome(&mut client, &accepted.id).await;
    assert_eq!((end.phase(), end.decision()), (Phase::Failed, Decision::Abort));
    insta::assert_snapshot!(end.reason, @"the source's agent did not compare the memory that was copied, although that was asked for (on b, in freeze); what to do: update it, or migrate without verification");
    assert_moved(&world);
}

#[tokio::test]
async fn a_source_that_leaves_out_that_it_converged_is_followed() {
    let world = World::new().await;
    world.shared.lock().no_word_of_convergence = true;
    let (_coordinator, mut client) = world.coordinator().await;
    let id = begin(&mut client).await;
    let end = outcome(&mut client, &id).await;
    assert_eq!((end.phase(), end.rounds.len()), (Phase::Succeeded, 3), "{end:?}");
    assert_moved(&world);
}

#[tokio::test]
async fn whatever_fails_in_pre_copy_leaves_the_workload_running() {
    let world = World::new().await;
    let (_coordinator, mut client) = world.coordinator().await;
    for (fault, code) in [(Fault::Fail(broken()), "INTERNAL"), (Fault::Hang, "DEADLINE_EXCEEDED")] {
        world.fault("a", "PreCopy", fault, 1);
        let id = begin(&mut client).await;
        let seen = watch(&mut client, &id).await;
        assert!(seen.iter().all(|migration| migration.phase() != Phase::Freeze), "{seen:?}");
        let end = seen.last().unwrap();
        assert_eq!((end.phase(), end.decision()), (Phase::Failed, Decision::Abort));
        let problem = end.problem.clone().unwrap();
        assert_eq!((problem.code.as_str(), problem.phase.as_str()), (code, "precopy"), "{problem:?}");
        assert_untouched(&world);
        world.heal("a", "PreCopy");
    }
    world.shared.lock().further_rounds = Some(30);
    let id = begin(&mut client).await;
    let end = outcome(&mut client, &id).await;
    assert!(end.phase() == Phase::Failed && end.reason.contains("more rounds of pre-copy than the 30"), "{end:?}");
    assert_untouched(&world);
    let aborts = world.calls().into_iter().filter(|call| call.ends_with("Abort")).count();
    assert_eq!(aborts, 6, "both parts are undone each time");
}

#[tokio::test]
async fn a_cancel_in_pre_copy_is_heard_at_once() {
    let world = World::new().await;
    let (_coordinator, mut client) = world.coordinator().await;
    world.fault("a", "PreCopy", Fault::Hang, 1);
    let id = begin(&mut client).await;
    world.called("a PreCopy").await;
    cancel(&mut client, &id).await.unwrap();
    let end = outcome(&mut client, &id).await;
    assert_eq!((end.phase(), end.reason.as_str()), (Phase::Cancelled, "cancelled by client tester (in precopy)"));
    assert_untouched(&world);
    world.heal("a", "PreCopy");
}

#[tokio::test]
async fn a_coordinator_killed_in_pre_copy_undoes_it() {
    let world = World::new().await;
    let (coordinator, mut client) = world.coordinator().await;
    world.fault("a", "PreCopy", Fault::Hang, 1);
    let id = begin(&mut client).await;
    world.called("a PreCopy").await;
    assert_eq!(decision(&world, &coordinator, &id).await, Decision::Undecided);
    coordinator.kill().await;
    let (coordinator, mut client) = world.coordinator().await;
    let end = outcome(&mut client, &id).await;
    assert!(end.phase() == Phase::Failed && end.reason.contains("the coordinator was restarted"), "{end:?}");
    assert_eq!(decision(&world, &coordinator, &id).await, Decision::Abort);
    world.heal("a", "PreCopy");
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_untouched(&world);
}

#[tokio::test]
async fn a_coordinator_killed_in_fill_goes_on_with_it() {
    let world = World::new().await;
    let (coordinator, mut client) = world.coordinator().await;
    world.fault("b", "Fill", Fault::Hang, 1);
    let id = begin(&mut client).await;
    world.called("b Fill").await;
    assert_eq!(decision(&world, &coordinator, &id).await, Decision::Commit);
    let again = migrate(&mut client, "shop", "c").await.unwrap_err();
    assert_eq!(again.code, FailureCode::AlreadyExists, "what lacks memory is not moved on: {again}");
    assert_eq!(cancel(&mut client, &id).await.unwrap_err().code, FailureCode::FailedPrecondition);
    let listed = client.list_workloads(v1::ListWorkloadsRequest::default()).await.unwrap().into_inner().workloads;
    let shop = listed.iter().find(|workload| workload.name == "shop").unwrap();
    assert_eq!((shop.node.as_str(), shop.migration_id.as_str()), ("b", id.as_str()));
    coordinator.kill().await;
    let before = fills(&world);
    let (_coordinator, mut client) = world.coordinator().await;
    let filling = client.get_migration(v1::GetMigrationRequest { id: id.clone() }).await.unwrap().into_inner();
    let filling = filling.migration.unwrap();
    assert!(filling.phase() == Phase::Fill && filling.downtime_ms > 0.0, "{filling:?}");
    // Longer than one attempt may take.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    world.heal("b", "Fill");
    let end = outcome(&mut client, &id).await;
    assert_eq!((end.phase(), end.downtime_ms.to_bits()), (Phase::Succeeded, filling.downtime_ms.to_bits()));
    assert!(fills(&world) > before && end.rounds.len() == 3, "{end:?}");
    assert_moved(&world);
}

#[tokio::test]
async fn a_fill_is_repeated_until_it_is_confirmed() {
    let world = World::new().await;
    let (_coordinator, mut client) = world.coordinator().await;
    // The last is of whoever stands between: only the agent itself can say that memory is lost.
    for failure in [broken(), Failure::new(FailureCode::NotFound, "no part").on("b"), lost()] {
        world.fault("b", "Fill", Fault::Fail(failure), 2);
        let id = begin(&mut client).await;
        let seen = watch(&mut client, &id).await;
        let noted = |migration: &v1::Migration| migration.notes.iter().any(|note| note.starts_with("fill is repeated"));
        assert!(seen.iter().any(noted), "{seen:?}");
        let end = seen.last().unwrap();
        assert_eq!((end.phase(), end.notes.len()), (Phase::Succeeded, 2), "{end:?}");
        assert_moved(&world);
        let back = migrate(&mut client, "shop", "a").await.unwrap();
        assert_eq!(outcome(&mut client, &back.id).await.phase(), Phase::Succeeded);
    }
    assert_eq!(fills(&world), 9);
    assert!(!world.calls().iter().any(|call| call.ends_with("Abort")));
}

#[tokio::test]
async fn lost_memory_is_the_end_and_nobody_says_that_the_source_runs() {
    let world = World::new().await;
    let (coordinator, mut client) = world.coordinator().await;
    world.fault("b", "Fill", Fault::Fail(lost().on("b")), 1);
    let id = begin(&mut client).await;
    let end = outcome(&mut client, &id).await;
    assert_eq!((end.phase(), end.decision()), (Phase::Failed, Decision::Commit));
    insta::assert_snapshot!(end.reason, @r#"12 pages of process 7 did not arrive whole (on b, in fill); what to do: start the workload anew, on node b or elsewhere: no copy of it runs"#);
    assert!(end.downtime_ms > 0.0 && end.total_ms > end.downtime_ms);
    assert_eq!((world.copy("a", "cart"), world.copy("b", "cart"), fills(&world)), (None, None, 1));
    assert_eq!(decision(&world, &coordinator, &id).await, Decision::Commit);
    // It is over: the workload is free for another migration, as soon as it runs again.
    assert_eq!(migrate(&mut client, "shop", "c").await.unwrap_err().code, FailureCode::NotFound);
    world.node("b", |node| node.containers.insert("cart".to_owned(), Copy::Running));
    let next = migrate(&mut client, "shop", "c").await.unwrap();
    assert_eq!(outcome(&mut client, &next.id).await.phase(), Phase::Succeeded);
}

#[tokio::test]
async fn an_agent_that_is_too_old_is_named() {
    let world = World::new().await;
    let (_coordinator, mut client) = world.coordinator().await;
    let speaks = |node: &str, current| {
        world.node(node, |node| node.description.version = Some(ProtocolVersion { current, oldest: 1 }));
    };
    speaks("b", 1);
    let target = request(&mut client, live("b")).await.unwrap_err();
    let placed = request(&mut client, live("")).await.unwrap();
    assert_eq!(placed.target, "c");
    assert_eq!(outcome(&mut client, &placed.id).await.phase(), Phase::Succeeded);
    speaks("c", 1);
    let source = request(&mut client, live("a")).await.unwrap_err();
    let limited = v1::MigrateRequest { bandwidth_limit: 1 << 20, strategy: v1::Strategy::Warm.into(), ..live("a") };
    let limited = request(&mut client, limited).await.unwrap_err();
    insta::assert_snapshot!(format!("{target}\n{source}\n{limited}\n{}", placed.notes[1]), @r#"
    node b cannot take the workload: its agent speaks version 1 of the protocol, and what this migration asks for needs version 2 (on b, in preflight); what to do: update the agent, or migrate warm and without a limit on the bandwidth
    the agent of node c speaks version 1 of the protocol, and what this migration asks for needs version 2 (on c, in preflight); what to do: update the agent, or migrate warm and without a limit on the bandwidth
    the agent of node c speaks version 1 of the protocol, and what this migration asks for needs version 2 (on c, in preflight); what to do: update the agent, or migrate warm and without a limit on the bandwidth
    not to b: its agent speaks version 1 of the protocol, and what this migration asks for needs version 2
    "#);
    let warm = migrate(&mut client, "shop", "b").await.unwrap();
    assert_eq!(outcome(&mut client, &warm.id).await.phase(), Phase::Succeeded);
}
