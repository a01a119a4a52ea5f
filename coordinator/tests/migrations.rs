//! Migrations through the real coordinator: there and back, with faults in every call, and with the coordinator killed.
#![expect(clippy::unwrap_used, reason = "a panic is the report")]

mod world;

use std::time::Duration;

use podferry_common::identity::Peer;
use podferry_common::{Failure, FailureCode};
use podferry_proto::v1::{self, Phase};
use rustix::process::Signal;
use world::{Client, Coordinator, Copy, Fault, World, migrate, outcome, watch};

fn broken() -> Failure {
    Failure::new(FailureCode::Internal, "the disk is on fire").criu_line("Error (criu/x.c:7): no").remedy("put it out")
}

/// The workload runs where it was, and nowhere else is a trace of it.
fn assert_untouched(world: &World) {
    assert_eq!(world.copy("a", "cart"), Some(Copy::Running), "{:?}", world.calls());
    assert_eq!(world.copy("b", "cart"), None, "{:?}", world.calls());
}

fn assert_moved(world: &World) {
    assert_eq!(world.copy("a", "cart"), None, "{:?}", world.calls());
    assert_eq!(world.copy("b", "cart"), Some(Copy::Running), "{:?}", world.calls());
}

#[tokio::test]
async fn there_and_back_with_all_numbers() {
    let world = World::new().await;
    let (coordinator, mut client) = world.coordinator().await;
    let accepted = migrate(&mut client, "shop", "b").await.unwrap();
    let audit = ["migration accepted".to_owned(), "\"peer\":\"client tester\"".to_owned(), accepted.id.clone()];
    coordinator.said(|line| audit.iter().all(|words| line.contains(words))).await;
    assert_eq!((accepted.source.as_str(), accepted.target.as_str()), ("a", "b"));
    let end = outcome(&mut client, &accepted.id).await;
    assert_eq!((end.phase(), end.reason.as_str(), &end.problem), (Phase::Succeeded, "", &None));
    assert_moved(&world);
    let mut calls = world.calls();
    // Freeze and restore are asked for side by side, and so are the two seals.
    calls[3..6].sort();
    calls[6..8].sort();
    insta::assert_snapshot!(calls.join(", "), @r#"a PreflightSource, b PreflightTarget, b Prepare, a Freeze, a Transfer, b Restore, a Seal, b Seal, a Release, b Resume"#);
    let timings = end.timings.unwrap();
    let told = (timings.freeze, timings.dump, timings.transfer, timings.restore);
    assert_eq!(told, (1.5, 20.0, 5.0, 30.0));
    assert!(timings.preflight > 0.0 && timings.prepare > 0.0 && timings.commit > 0.0 && timings.resume > 0.0);
    assert!(end.downtime_ms > 0.0 && end.total_ms > end.downtime_ms, "{end:?}");
    assert_eq!((end.rounds.len(), end.rounds[0].pages, end.wire_bytes), (1, 16_384, 32 << 20));
    assert!(end.keeps_connections);

    let workloads = client.list_workloads(v1::ListWorkloadsRequest::default()).await.unwrap().into_inner().workloads;
    let places: Vec<_> = workloads.iter().map(|w| (w.name.as_str(), w.node.as_str(), w.status.as_str())).collect();
    assert_eq!(places, [("redis", "a", "running"), ("shop", "b", "running")]);

    let back = migrate(&mut client, "shop", "a").await.unwrap();
    assert_eq!(outcome(&mut client, &back.id).await.phase(), Phase::Succeeded);
    assert_eq!((world.copy("a", "cart"), world.copy("b", "cart")), (Some(Copy::Running), None));
    let list = v1::ListMigrationsRequest { workload: "shop".to_owned(), active_only: false };
    let listed = client.list_migrations(list).await.unwrap().into_inner().migrations;
    assert_eq!(listed.iter().map(|m| &m.id).collect::<Vec<_>>(), [&back.id, &accepted.id], "newest first");
    let again = client.get_migration(v1::GetMigrationRequest { id: accepted.id }).await.unwrap().into_inner();
    assert_eq!(again.migration.unwrap().downtime_ms.to_bits(), end.downtime_ms.to_bits());
}

#[tokio::test]
async fn placement_chooses_and_says_why() {
    let world = World::new().await;
    world.node("b", |node| node.containers.insert("other".to_owned(), Copy::Running));
    let (_coordinator, mut client) = world.coordinator().await;
    let accepted = migrate(&mut client, "shop", "").await.unwrap();
    assert_eq!(accepted.target, "c");
    insta::assert_snapshot!(accepted.notes.join("\n"), @r#"
    not to a: the workload runs there already
    not to b: c is better: b has 1 containers, 0 migrations and 4096 MiB free
    "#);
    assert_eq!(outcome(&mut client, &accepted.id).await.phase(), Phase::Succeeded);
}

#[tokio::test]
async fn an_address_that_cannot_move_is_said() {
    let world = World::new().await;
    world.node("a", |node| node.network = v1::NetworkKind::Own);
    let (_coordinator, mut client) = world.coordinator().await;
    let accepted = migrate(&mut client, "shop", "b").await.unwrap();
    let end = outcome(&mut client, &accepted.id).await;
    assert!(!end.keeps_connections && end.notes[0].starts_with("3 established TCP connections are closed"), "{end:?}");
}

fn warm(target: &str) -> v1::MigrateRequest {
    let (workload, target) = ("shop".to_owned(), target.to_owned());
    v1::MigrateRequest { workload, target, ..v1::MigrateRequest::default() }
}

fn last_prepare(world: &World) -> v1::PrepareRequest {
    world.shared.lock().prepares.last().expect("nothing was prepared").clone()
}

#[tokio::test]
async fn connections_are_closed_where_that_is_asked_for_and_the_migration_says_so() {
    let world = World::new().await;
    let (_coordinator, mut client) = world.coordinator().await;
    let closing = v1::MigrateRequest { connections: v1::Connections::Close.into(), ..warm("b") };
    let accepted = world::request(&mut client, closing).await.unwrap();
    let end = outcome(&mut client, &accepted.id).await;
    assert_eq!((end.phase(), end.keeps_connections), (Phase::Succeeded, false));
    assert_eq!(end.notes[0], "3 established TCP connections are closed: that was asked for");
    let frozen = world.shared.lock().freezes[0].keep_connections;
    let asked = (last_prepare(&world).keep_connections, frozen);
    assert_eq!(asked, (false, false));
}

/// Neither on the source, whose namespace says so in preflight, nor for want of a relay on the target, which only its answer to Prepare says.
#[tokio::test]
async fn a_workload_whose_connections_are_to_be_kept_and_cannot_be_is_never_frozen() {
    let world = World::new().await;
    let (_coordinator, mut client) = world.coordinator().await;
    let keeping = v1::MigrateRequest { connections: v1::Connections::Keep.into(), ..warm("b") };
    let accepted = world::request(&mut client, keeping.clone()).await.unwrap();
    assert_eq!(outcome(&mut client, &accepted.id).await.phase(), Phase::Succeeded, "they move along with the address");
    let back = v1::MigrateRequest { target: "a".to_owned(), ..warm("b") };
    let accepted = world::request(&mut client, back).await.unwrap();
    outcome(&mut client, &accepted.id).await;

    let mut said = Vec::new();
    world.node("a", |node| node.network = v1::NetworkKind::Own);
    let relayed = v1::Relayed { addresses: vec!["10.0.0.7".to_owned()], mtu: 1450, lifetime_s: 0 };
    for relayed in [None, Some(relayed)] {
        if relayed.is_some() {
            world.node("a", |node| node.network = v1::NetworkKind::Pod);
        }
        world.node("a", |node| node.relayed.clone_from(&relayed));
        let before = world.calls().len();
        let accepted = world::request(&mut client, keeping.clone()).await.unwrap();
        said.push(outcome(&mut client, &accepted.id).await.reason);
        let calls = world.calls()[before..].join(", ");
        assert!(!calls.contains("Freeze"), "{calls}");
        assert_eq!((world.copy("a", "cart"), world.copy("b", "cart")), (Some(Copy::Running), None));
    }
    assert_eq!(last_prepare(&world).relayed.unwrap().lifetime_s, 0);
    insta::assert_snapshot!(said.join("\n"), @r#"
        its connections are to be kept, and cannot be (3 are established): the container's address cannot move along, because its network namespace is not one given by path (on a, in preflight); what to do: let them be closed (--connections close), or kept where they can be (auto)
        its connections are to be kept, and the target has nothing that carries them (on b, in prepare); what to do: see the log of the target's agent; or let them be closed (--connections close or auto)
        "#);

    let patient = v1::MigrateRequest { connections_deadline_s: 7200, ..warm("b") };
    let accepted = world::request(&mut client, patient).await.unwrap();
    let end = outcome(&mut client, &accepted.id).await;
    assert_eq!(end.phase(), Phase::Succeeded, "without that wish they are closed: {end:?}");
    assert_eq!(last_prepare(&world).relayed.unwrap().lifetime_s, 7200);
}

/// Every call before the commit, by node.
const BEFORE_COMMIT: [(&str, &str); 8] = [
    ("a", "PreflightSource"),
    ("b", "PreflightTarget"),
    ("b", "Prepare"),
    ("a", "Freeze"),
    ("a", "Transfer"),
    ("b", "Restore"),
    ("a", "Seal"),
    ("b", "Seal"),
];

#[tokio::test]
async fn any_failure_before_the_commit_undoes_everything() {
    let world = World::new().await;
    let (_coordinator, mut client) = world.coordinator().await;
    for afterwards in [false, true] {
        for (node, method) in BEFORE_COMMIT {
            let fault = if afterwards { Fault::FailAfterwards(broken()) } else { Fault::Fail(broken()) };
            world.fault(node, method, fault, 1);
            let accepted = migrate(&mut client, "shop", "b").await.unwrap();
            let end = outcome(&mut client, &accepted.id).await;
            assert_eq!(end.phase(), Phase::Failed, "{node} {method}");
            let problem = end.problem.unwrap();
            assert_eq!((problem.code.as_str(), problem.node.as_str()), ("INTERNAL", node), "{method}: {problem:?}");
            assert_eq!(problem.criu_line, "Error (criu/x.c:7): no");
            assert!(end.reason.contains("the disk is on fire") && end.reason.contains("put it out"), "{}", end.reason);
            assert_untouched(&world);
        }
    }
}

#[tokio::test]
async fn a_hanging_agent_is_not_waited_for() {
    let world = World::new().await;
    let (_coordinator, mut client) = world.coordinator().await;
    for (node, method) in
        [("a", "PreflightSource"), ("b", "Prepare"), ("a", "Transfer"), ("b", "Restore"), ("a", "Seal")]
    {
        world.fault(node, method, Fault::Hang, 1);
        let accepted = migrate(&mut client, "shop", "b").await.unwrap();
        let end = outcome(&mut client, &accepted.id).await;
        assert_eq!(end.phase(), Phase::Failed, "{node} {method}");
        assert_eq!(end.problem.unwrap().code, "DEADLINE_EXCEEDED", "{node} {method}");
        assert_eq!(world.copy("a", "cart"), Some(Copy::Running), "{method}");
        world.heal(node, method);
        // The late call finds its part gone, and is refused.
        tokio::time::sleep(Duration::from_millis(50)).await;
        if world.shared.lock().nodes["b"].parts.values().any(|(part, _)| *part == world::Part::Prepared) {
            world.node("b", |node| node.parts.clear());
        }
        assert_untouched(&world);
    }
}

#[tokio::test]
async fn the_target_is_undone_before_the_source_and_findings_are_listed() {
    let world = World::new().await;
    let (_coordinator, mut client) = world.coordinator().await;
    world.fault("b", "Restore", Fault::Fail(broken()), 1);
    let accepted = migrate(&mut client, "shop", "b").await.unwrap();
    outcome(&mut client, &accepted.id).await;
    let aborts: Vec<_> = world.calls().into_iter().filter(|call| call.ends_with("Abort")).collect();
    assert_eq!(aborts, ["b Abort", "a Abort"]);

    let finding = v1::Finding {
        refuses: true,
        kind: "io-uring".to_owned(),
        pid: 71,
        fd: 9,
        message: "a ring is open".to_owned(),
        remedy: "close it".to_owned(),
    };
    world.fault("a", "PreflightSource", Fault::Find(finding.clone()), 1);
    let refused = migrate(&mut client, "shop", "b").await.unwrap();
    insta::assert_snapshot!(outcome(&mut client, &refused.id).await.reason, @r#"the workload cannot be taken from this node: io-uring (pid 71, fd 9): a ring is open (on a, in preflight); what to do: close it"#);
    let warning = v1::Finding { refuses: false, ..finding };
    world.fault("b", "PreflightTarget", Fault::Find(warning), 1);
    let warned = migrate(&mut client, "shop", "b").await.unwrap();
    let end = outcome(&mut client, &warned.id).await;
    assert_eq!(
        (end.phase(), end.notes),
        (Phase::Succeeded, vec!["io-uring (pid 71, fd 9): a ring is open".to_owned()])
    );
}

#[tokio::test]
async fn after_the_commit_it_is_repeated_until_confirmed() {
    let world = World::new().await;
    let (_coordinator, mut client) = world.coordinator().await;
    world.fault("a", "Release", Fault::Fail(broken()), 2);
    world.fault("b", "Resume", Fault::FailAfterwards(broken()), 3);
    let accepted = migrate(&mut client, "shop", "b").await.unwrap();
    assert_eq!(outcome(&mut client, &accepted.id).await.phase(), Phase::Succeeded);
    assert_moved(&world);
    let count = |name: &str| world.calls().iter().filter(|call| *call == name).count();
    assert_eq!((count("a Release"), count("b Resume")), (3, 4));
    assert!(!world.calls().iter().any(|call| call.ends_with("Abort")));
}

#[tokio::test]
async fn an_unreachable_target_does_not_keep_the_source_frozen() {
    let mut world = World::new().await;
    let (_coordinator, mut client) = world.coordinator().await;
    world.fault("a", "Transfer", Fault::Hang, 1);
    let accepted = migrate(&mut client, "shop", "b").await.unwrap();
    world.called("a Transfer").await;
    world.stop_agent("b");
    let end = outcome(&mut client, &accepted.id).await;
    assert_eq!(end.phase(), Phase::Failed);
    let problem = end.problem.unwrap();
    assert_eq!((problem.code.as_str(), problem.node.as_str()), ("UNAVAILABLE", "b"), "{problem:?}");
    assert!(problem.remedy.starts_with("see that the agent of b runs"), "{problem:?}");
    assert_eq!(end.notes, ["node b has not confirmed that it keeps nothing; it is asked until it does"]);
    assert_untouched(&world);
    world.heal("a", "Transfer");
    world.start_agent("b").await;
    world.called("b Abort").await;
}

async fn cancel(client: &mut Client, id: &str) -> Result<v1::Migration, Failure> {
    let answer = client.cancel_migration(v1::CancelMigrationRequest { id: id.to_owned() }).await;
    Ok(answer.map_err(Failure::from)?.into_inner().migration.unwrap())
}

#[tokio::test]
async fn a_cancel_works_until_the_commit() {
    let world = World::new().await;
    let (_coordinator, mut client) = world.coordinator().await;
    world.fault("a", "Transfer", Fault::Hang, 1);
    let accepted = migrate(&mut client, "shop", "b").await.unwrap();
    world.called("a Transfer").await;
    let second = migrate(&mut client, "shop", "c").await.unwrap_err();
    assert_eq!(second.code, FailureCode::AlreadyExists);
    assert!(second.message.contains(&accepted.id), "{second}");
    cancel(&mut client, &accepted.id).await.unwrap();
    let end = outcome(&mut client, &accepted.id).await;
    assert_eq!((end.phase(), end.reason.as_str()), (Phase::Cancelled, "cancelled by client tester (in freeze)"));
    assert_untouched(&world);
    world.heal("a", "Transfer");

    world.fault("a", "Release", Fault::Hang, 1);
    let accepted = migrate(&mut client, "shop", "b").await.unwrap();
    world.called("a Release").await;
    let refused = cancel(&mut client, &accepted.id).await.unwrap_err();
    assert_eq!(refused.code, FailureCode::FailedPrecondition, "{refused}");
    world.heal("a", "Release");
    assert_eq!(outcome(&mut client, &accepted.id).await.phase(), Phase::Succeeded);
    assert_eq!(cancel(&mut client, &accepted.id).await.unwrap_err().code, FailureCode::FailedPrecondition);
    assert_moved(&world);
}

async fn decision(world: &World, coordinator: &Coordinator, id: &str) -> v1::Decision {
    let mut agent = world.client(coordinator, &Peer::Agent("b".parse().unwrap())).await;
    let request = v1::GetDecisionRequest { migration_id: id.to_owned() };
    agent.get_decision(request).await.unwrap().into_inner().decision()
}

#[tokio::test]
async fn a_killed_coordinator_undoes_what_was_not_committed() {
    let world = World::new().await;
    for (node, method) in BEFORE_COMMIT {
        let (coordinator, mut client) = world.coordinator().await;
        world.shared.lock().log.clear();
        world.fault(node, method, Fault::Hang, 1);
        let accepted = migrate(&mut client, "shop", "b").await.unwrap();
        world.called(&format!("{node} {method}")).await;
        assert_eq!(decision(&world, &coordinator, &accepted.id).await, v1::Decision::Undecided, "{method}");
        coordinator.kill().await;
        let (coordinator, mut client) = world.coordinator().await;
        let end = outcome(&mut client, &accepted.id).await;
        assert_eq!(end.phase(), Phase::Failed, "{method}");
        assert!(end.reason.contains("the coordinator was restarted"), "{method}: {}", end.reason);
        assert_eq!(decision(&world, &coordinator, &accepted.id).await, v1::Decision::Abort, "{method}");
        world.heal(node, method);
        world.node("b", |node| node.parts.clear());
        assert_untouched(&world);
    }
}

#[tokio::test]
async fn a_killed_coordinator_completes_what_was_committed() {
    let mut world = World::new().await;
    for (node, method) in [("a", "Release"), ("b", "Resume")] {
        let (coordinator, mut client) = world.coordinator().await;
        world.fault(node, method, Fault::Hang, 1);
        let accepted = migrate(&mut client, "shop", "b").await.unwrap();
        world.called(&format!("{node} {method}")).await;
        assert_eq!(decision(&world, &coordinator, &accepted.id).await, v1::Decision::Commit, "{method}");
        coordinator.kill().await;
        // The agent that has not confirmed is gone as well, for a while.
        world.stop_agent(node);
        let (_coordinator, mut client) = world.coordinator().await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        world.heal(node, method);
        world.start_agent(node).await;
        let end = outcome(&mut client, &accepted.id).await;
        assert_eq!(end.phase(), Phase::Succeeded, "{method}: {}", end.reason);
        assert!(end.downtime_ms >= 300.0, "{method}: the downtime goes on through the restart: {}", end.downtime_ms);
        assert_moved(&world);
        world.shared.lock().log.clear();
        let back = migrate(&mut client, "shop", "a").await.unwrap();
        assert_eq!(outcome(&mut client, &back.id).await.phase(), Phase::Succeeded);
        world.shared.lock().log.clear();
    }
}

#[tokio::test]
async fn a_stop_by_signal_undoes_first() {
    let world = World::new().await;
    let (mut coordinator, mut client) = world.coordinator().await;
    world.fault("a", "Transfer", Fault::Hang, 1);
    let accepted = migrate(&mut client, "shop", "b").await.unwrap();
    world.called("a Transfer").await;
    coordinator.signal(Signal::TERM);
    assert!(coordinator.end().await.success());
    assert_untouched(&world);
    coordinator.said(|line| line.contains("\"stopped\"")).await;
    let (_coordinator, mut client) = world.coordinator().await;
    let seen = watch(&mut client, &accepted.id).await;
    assert_eq!(seen.last().unwrap().phase(), Phase::Cancelled);
}
