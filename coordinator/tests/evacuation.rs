//! Nodes that are emptied by the real coordinator: in which order, what is left, and what a restart does to that.
#![expect(clippy::unwrap_used, reason = "a panic is the report")]

mod world;

use std::time::Duration;

use podferry_common::{Failure, FailureCode};
use podferry_proto::v1::{
    self, CancelEvacuationRequest, EvacuateRequest, EvacuatedState, EvacuatedWorkload, Evacuation, EvacuationOrder,
    EvacuationPhase, GetEvacuationRequest, ListEvacuationsRequest, Phase, Strategy, WatchEvacuationRequest,
};
use rustix::process::Signal;
use tokio::time::timeout;
use world::{Client, Copy, Fault, PATIENCE, World, migrate};

/// Adds to the inventory, of which `[[workloads]]` is the end.
fn inventory(world: &World, more: &str) {
    let path = world.folder.path().join("inventory.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, format!("{text}\n{more}")).unwrap();
}

/// Further workloads on `a`, with these lines each.
fn crowd(world: &World, workloads: &[(&str, &str)]) {
    for (name, lines) in workloads {
        inventory(world, &format!("[[workloads]]\nname = \"{name}\"\n{lines}\n"));
        world.node("a", |node| node.containers.insert((*name).to_owned(), Copy::Running));
    }
}

fn configure(world: &World, line: &str) {
    let text = std::fs::read_to_string(world.configuration()).unwrap();
    std::fs::write(world.configuration(), format!("{line}\n{text}")).unwrap();
}

fn of(node: &str) -> EvacuateRequest {
    EvacuateRequest { node: node.to_owned(), strategy: Strategy::Warm.into(), ..EvacuateRequest::default() }
}

async fn evacuate(client: &mut Client, request: EvacuateRequest) -> Result<Evacuation, Failure> {
    let answer = timeout(PATIENCE, client.evacuate(request)).await.expect("Evacuate hangs");
    Ok(answer.map_err(Failure::from)?.into_inner().evacuation.unwrap())
}

async fn states(client: &mut Client, id: &str) -> Vec<Evacuation> {
    let all = async {
        let request = WatchEvacuationRequest { id: id.to_owned() };
        let mut stream = client.watch_evacuation(request).await.unwrap().into_inner();
        let mut seen = Vec::new();
        while let Some(answer) = stream.message().await.unwrap() {
            seen.push(answer.evacuation.unwrap());
        }
        seen
    };
    timeout(PATIENCE, all).await.expect("the evacuation does not end")
}

async fn end(client: &mut Client, id: &str) -> Evacuation {
    states(client, id).await.pop().unwrap()
}

/// How many migrations an evacuation has begun.
async fn begun_of(client: &mut Client, id: &str) -> usize {
    let now = client.get_evacuation(GetEvacuationRequest { id: id.to_owned() }).await.unwrap().into_inner().evacuation;
    now.unwrap().workloads.iter().map(|one| one.migration_ids.len()).sum()
}

fn one<'a>(evacuation: &'a Evacuation, workload: &str) -> &'a EvacuatedWorkload {
    evacuation.workloads.iter().find(|one| one.workload == workload).unwrap()
}

/// In the order in which the source was asked about them.
async fn begun(client: &mut Client) -> Vec<String> {
    let all = client.list_migrations(v1::ListMigrationsRequest::default()).await.unwrap().into_inner().migrations;
    all.iter().rev().map(|migration| migration.workload.clone()).collect()
}

#[tokio::test]
async fn a_node_is_emptied_by_priority_and_what_cannot_move_is_named_with_the_reason() {
    let world = World::new().await;
    crowd(
        &world,
        &[
            ("stuck", "priority = 9\nnode_selector = { disk = \"ssd\" }"),
            ("vital", "priority = 5"),
            ("spare", "priority = -1"),
        ],
    );
    let (_coordinator, mut client) = world.coordinator().await;
    let accepted = evacuate(&mut client, EvacuateRequest { concurrency: 1, ..of("a") }).await.unwrap();
    assert_eq!(
        (accepted.phase(), accepted.requested_by.as_str()),
        (EvacuationPhase::Running, "tester.client.podferry.internal")
    );
    let ended = end(&mut client, &accepted.id).await;
    assert_eq!((ended.phase(), ended.moved, ended.remaining, ended.failed), (EvacuationPhase::Incomplete, 4, 0, 1));
    assert_eq!(begun(&mut client).await, ["vital", "redis", "shop", "spare"]);
    let stuck = one(&ended, "stuck");
    let problem = stuck.problem.as_ref().unwrap();
    assert_eq!((stuck.state(), problem.code.as_str()), (EvacuatedState::LeftBehind, "FAILED_PRECONDITION"));
    assert!(problem.message.contains("b: it has no label disk=ssd, which node_selector wants"), "{}", problem.message);
    let vital = one(&ended, "vital");
    assert_eq!((vital.state(), vital.priority, vital.migration_ids.len()), (EvacuatedState::Moved, 5, 1));
    assert!(vital.downtime_ms > 0.0 && ["b", "c"].contains(&vital.target.as_str()), "{vital:?}");
    let left: Vec<_> = world.node("a", |node| node.containers.keys().cloned().collect());
    assert_eq!(left, ["stuck"]);

    // Again, there is one left; and it is listed.
    let again = evacuate(&mut client, of("a")).await.unwrap();
    assert_eq!(end(&mut client, &again.id).await.workloads.len(), 1);
    let listed = client.list_evacuations(ListEvacuationsRequest::default()).await.unwrap().into_inner().evacuations;
    assert_eq!(listed.iter().map(|one| one.id.as_str()).collect::<Vec<_>>(), [&again.id, &accepted.id]);
    assert!(listed[0].workloads.is_empty());
}

#[tokio::test]
async fn only_what_is_selected_leaves_and_in_the_order_that_is_asked_for() {
    let world = World::new().await;
    crowd(
        &world,
        &[
            ("first", "priority = 5\nlabels = { tier = \"front\" }"),
            ("last", "priority = -5\nlabels = { tier = \"front\" }"),
            ("stays", "labels = { tier = \"back\" }"),
        ],
    );
    let (_coordinator, mut client) = world.coordinator().await;
    let wanted = EvacuateRequest {
        concurrency: 1,
        selector: "tier in (front, middle)".to_owned(),
        order: EvacuationOrder::LowestFirst.into(),
        ..of("a")
    };
    let accepted = evacuate(&mut client, wanted.clone()).await.unwrap();
    let ended = end(&mut client, &accepted.id).await;
    assert_eq!((ended.phase(), ended.moved, ended.workloads.len()), (EvacuationPhase::Complete, 2, 2));
    assert_eq!(begun(&mut client).await, ["last", "first"]);
    assert!(world.node("a", |node| node.containers.contains_key("stays")));

    let refused = evacuate(&mut client, EvacuateRequest { selector: "tier in".to_owned(), ..wanted.clone() }).await;
    let refused = refused.unwrap_err();
    assert!(refused.code == FailureCode::InvalidArgument && refused.message.contains("\"tier in\""), "{refused}");
    let refused = evacuate(&mut client, EvacuateRequest { cordon: true, ..wanted }).await.unwrap_err();
    assert!(refused.code == FailureCode::FailedPrecondition && refused.message.contains("Kubernetes"), "{refused}");
}

#[tokio::test]
async fn a_target_that_refuses_in_preflight_does_not_keep_the_others_from_taking_it() {
    let world = World::new().await;
    let (kind, message, remedy) = ("no-bundle".to_owned(), "there is no bundle".to_owned(), "make one".to_owned());
    let finding = v1::Finding { refuses: true, kind, message, remedy, ..v1::Finding::default() };
    world.fault("b", "PreflightTarget", Fault::Find(finding.clone()), 9);
    let (_coordinator, mut client) = world.coordinator().await;
    let accepted = evacuate(&mut client, EvacuateRequest { concurrency: 1, ..of("a") }).await.unwrap();
    let ended = end(&mut client, &accepted.id).await;
    assert_eq!((ended.phase(), ended.moved), (EvacuationPhase::Complete, 2), "{ended:#?}");
    assert!(ended.workloads.iter().all(|one| one.target == "c"), "{ended:#?}");
    // When nobody can, the reason is that of the last one.
    world.fault("a", "PreflightTarget", Fault::Find(finding), 9);
    let back = evacuate(&mut client, of("c")).await.unwrap();
    let ended = end(&mut client, &back.id).await;
    assert_eq!((ended.phase(), ended.failed), (EvacuationPhase::Incomplete, 2), "{ended:#?}");
    let problem = ended.workloads[0].problem.as_ref().unwrap();
    assert!(problem.message.contains("there is no bundle") && problem.remedy == "make one", "{problem:?}");
}

#[tokio::test]
async fn several_move_side_by_side_within_the_limits() {
    let world = World::new().await;
    crowd(&world, &[("third", ""), ("fourth", "")]);
    configure(&world, "migrations_per_node = 3\nmigrations_per_link = 1");
    for node in ["b", "c"] {
        world.fault(node, "Restore", Fault::Hang, 1);
    }
    let (_coordinator, mut client) = world.coordinator().await;
    let accepted = evacuate(&mut client, of("a")).await.unwrap();
    world.called("b Restore").await;
    world.called("c Restore").await;
    let waiting = async {
        loop {
            let now =
                client.get_evacuation(GetEvacuationRequest { id: accepted.id.clone() }).await.unwrap().into_inner();
            let now = now.evacuation.unwrap();
            let moving = now.workloads.iter().filter(|one| one.state() == EvacuatedState::Moving).count();
            if let Some(held) = now.workloads.iter().find(|one| !one.waits_for.is_empty()) {
                return (moving, held.waits_for.clone());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let (moving, why) = timeout(Duration::from_secs(2), waiting).await.expect("nobody waits");
    assert_eq!(moving, 2, "one to each of the other nodes");
    assert!(why.contains("1 migrations go there from the workload's node already"), "{why}");
    for node in ["b", "c"] {
        world.heal(node, "Restore");
    }
    assert_eq!(end(&mut client, &accepted.id).await.phase(), EvacuationPhase::Complete);
}

#[tokio::test]
async fn an_evacuation_outlives_its_client_and_a_killed_coordinator() {
    let world = World::new().await;
    crowd(&world, &[("third", "")]);
    world.fault("a", "PreflightSource", Fault::Hang, 1);
    let (coordinator, mut client) = world.coordinator().await;
    let accepted = evacuate(&mut client, EvacuateRequest { concurrency: 1, ..of("a") }).await.unwrap();
    world.called("a PreflightSource").await;
    // What is shown is on disk.
    while begun_of(&mut client, &accepted.id).await == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    drop(client);
    coordinator.kill().await;
    world.heal("a", "PreflightSource");
    let (_coordinator, mut client) = world.coordinator().await;
    let ended = end(&mut client, &accepted.id).await;
    assert_eq!((ended.phase(), ended.moved), (EvacuationPhase::Complete, 3), "{ended:#?}");
    let tried: usize = ended.workloads.iter().map(|one| one.migration_ids.len()).sum();
    assert_eq!(tried, 4, "the one that the restart undid was begun again: {ended:#?}");
    assert_eq!(world.node("a", |node| node.containers.len()), 0);
}

#[tokio::test]
async fn a_coordinator_that_is_stopped_takes_what_it_undoes_for_no_outcome() {
    let world = World::new().await;
    world.fault("b", "Restore", Fault::Hang, 1);
    world.fault("c", "Restore", Fault::Hang, 1);
    let (mut coordinator, mut client) = world.coordinator().await;
    let accepted = evacuate(&mut client, of("a")).await.unwrap();
    world.called("a Freeze").await;
    coordinator.signal(Signal::TERM);
    coordinator.end().await;
    drop(coordinator);
    world.heal("b", "Restore");
    world.heal("c", "Restore");
    let (_coordinator, mut client) = world.coordinator().await;
    let ended = end(&mut client, &accepted.id).await;
    assert_eq!((ended.phase(), ended.moved), (EvacuationPhase::Complete, 2), "{ended:#?}");
}

#[tokio::test]
async fn nothing_goes_to_a_node_that_is_emptied_and_it_is_emptied_once_at_a_time() {
    let world = World::new().await;
    world.node("b", |node| node.containers.insert("guest".to_owned(), Copy::Running));
    inventory(&world, "[[workloads]]\nname = \"guest\"\n");
    world.fault("a", "PreflightSource", Fault::Hang, 1);
    let (_coordinator, mut client) = world.coordinator().await;
    let accepted = evacuate(&mut client, EvacuateRequest { concurrency: 1, ..of("a") }).await.unwrap();
    world.called("a PreflightSource").await;
    let refused = migrate(&mut client, "guest", "a").await.unwrap_err();
    assert_eq!(refused.code, FailureCode::FailedPrecondition);
    assert!(refused.message.contains(&format!("it is being emptied by {}", accepted.id)), "{refused}");
    let chosen = migrate(&mut client, "guest", "").await.unwrap();
    assert_eq!(chosen.target, "c");
    let second = evacuate(&mut client, of("a")).await.unwrap_err();
    assert_eq!(second.code, FailureCode::AlreadyExists);
    assert!(second.remedy.unwrap().contains(&accepted.id));
    world.heal("a", "PreflightSource");
    assert_eq!(end(&mut client, &accepted.id).await.phase(), EvacuationPhase::Complete);
    assert_eq!(world::outcome(&mut client, &chosen.id).await.phase(), Phase::Succeeded);
    migrate(&mut client, "guest", "a").await.unwrap();
}

#[tokio::test]
async fn a_cancel_undoes_what_is_under_way_and_leaves_the_rest() {
    let world = World::new().await;
    world.fault("a", "Freeze", Fault::Hang, 1);
    let (_coordinator, mut client) = world.coordinator().await;
    let accepted = evacuate(&mut client, EvacuateRequest { concurrency: 1, ..of("a") }).await.unwrap();
    world.called("a Freeze").await;
    let request = CancelEvacuationRequest { id: accepted.id.clone() };
    let cancelling = client.cancel_evacuation(request.clone()).await.unwrap().into_inner().evacuation.unwrap();
    assert!(matches!(cancelling.phase(), EvacuationPhase::Cancelling | EvacuationPhase::Cancelled));
    world.heal("a", "Freeze");
    let ended = end(&mut client, &accepted.id).await;
    assert_eq!((ended.phase(), ended.moved, ended.failed), (EvacuationPhase::Cancelled, 0, 2), "{ended:#?}");
    assert_eq!(world.copy("a", "cart"), Some(Copy::Running));
    assert_eq!(world.copy("a", "redis"), Some(Copy::Running));
    let again = Failure::from(client.cancel_evacuation(request).await.unwrap_err());
    assert_eq!(again.code, FailureCode::FailedPrecondition);
}

#[tokio::test]
async fn a_deadline_that_passes_leaves_what_has_not_begun() {
    let world = World::new().await;
    world.fault("a", "PreflightSource", Fault::Hang, 1);
    let (_coordinator, mut client) = world.coordinator().await;
    let request = EvacuateRequest { concurrency: 1, deadline_s: 1, ..of("a") };
    let accepted = evacuate(&mut client, request).await.unwrap();
    assert!(!accepted.deadline_at.is_empty());
    tokio::time::sleep(Duration::from_millis(1200)).await;
    world.heal("a", "PreflightSource");
    let ended = end(&mut client, &accepted.id).await;
    assert_eq!((ended.phase(), ended.moved, ended.failed), (EvacuationPhase::Incomplete, 1, 1), "{ended:#?}");
    let left = ended.workloads.iter().find(|one| one.state() == EvacuatedState::LeftBehind).unwrap();
    assert_eq!(left.problem.as_ref().unwrap().code, "DEADLINE_EXCEEDED");
    assert!(!left.late.is_empty(), "it was said at once: {left:?}");
}

#[tokio::test]
async fn what_others_are_moving_is_followed_and_what_arrives_is_moved_on() {
    let world = World::new().await;
    world.node("b", |node| node.containers.insert("guest".to_owned(), Copy::Running));
    inventory(&world, "[[workloads]]\nname = \"guest\"\n");
    world.fault("b", "Freeze", Fault::Hang, 1);
    let (_coordinator, mut client) = world.coordinator().await;
    let arriving = migrate(&mut client, "guest", "a").await.unwrap();
    world.called("b Freeze").await;
    let accepted = evacuate(&mut client, of("a")).await.unwrap();
    assert_eq!(one(&accepted, "guest").migration_ids, std::slice::from_ref(&arriving.id));
    world.heal("b", "Freeze");
    let ended = end(&mut client, &accepted.id).await;
    assert_eq!((ended.phase(), ended.moved), (EvacuationPhase::Complete, 3), "{ended:#?}");
    assert_eq!(world.copy("a", "guest"), None);
}

#[tokio::test]
async fn what_makes_no_sense_and_a_silent_node_are_refused_and_nothing_is_recorded() {
    let mut world = World::new().await;
    world.stop_agent("a");
    let (_coordinator, mut client) = world.coordinator().await;
    let silent = evacuate(&mut client, of("a")).await.unwrap_err();
    assert_eq!((silent.code, silent.node.as_deref()), (FailureCode::Unavailable, Some("a")));
    assert_eq!(evacuate(&mut client, of("z")).await.unwrap_err().code, FailureCode::NotFound);
    let risky = EvacuateRequest { strategy: Strategy::Postcopy.into(), ..of("b") };
    assert_eq!(evacuate(&mut client, risky).await.unwrap_err().code, FailureCode::InvalidArgument);
    let priorities = [("nobody".to_owned(), 1)].into();
    let unknown = EvacuateRequest { priorities, ..of("b") };
    assert_eq!(evacuate(&mut client, unknown).await.unwrap_err().code, FailureCode::NotFound);
    let listed = client.list_evacuations(ListEvacuationsRequest::default()).await.unwrap().into_inner().evacuations;
    assert!(listed.is_empty());
    let wrong = client.get_evacuation(GetEvacuationRequest { id: "evac-1".to_owned() }).await.unwrap_err();
    assert_eq!(Failure::from(wrong).code, FailureCode::InvalidArgument);
}

fn relay(is_home: bool, peer: &str, migration: &str, connections: u32) -> v1::RelayEnd {
    v1::RelayEnd {
        migration_id: migration.to_owned(),
        is_home,
        peer_node: peer.to_owned(),
        addresses: vec!["10.0.0.7".to_owned()],
        since_unix_ms: 1_700_000_000_000,
        until_unix_ms: 1_700_000_600_000,
        connections,
        ..v1::RelayEnd::default()
    }
}

#[tokio::test]
async fn an_evacuation_waits_for_connections_that_need_the_node_and_no_longer_than_to_its_deadline() {
    let world = World::new().await;
    world.node("a", |node| node.relays.push(relay(true, "b", "0199aa00000070008000000000000001", 0)));
    let (_coordinator, mut client) = world.coordinator().await;
    let accepted = evacuate(&mut client, of("a")).await.unwrap();
    let waits = async |client: &mut Client, id: &str| {
        let mut stream =
            client.watch_evacuation(WatchEvacuationRequest { id: id.to_owned() }).await.unwrap().into_inner();
        loop {
            let now = stream.message().await.unwrap().unwrap().evacuation.unwrap();
            assert_eq!(now.phase(), EvacuationPhase::Running, "{now:?}");
            if (now.moved, now.remaining, now.homes) == (2, 0, 1) {
                return;
            }
        }
    };
    timeout(PATIENCE, waits(&mut client, &accepted.id)).await.expect("it does not wait");
    world.node("a", |node| node.relays.clear());
    let ended = end(&mut client, &accepted.id).await;
    assert_eq!((ended.phase(), ended.homes), (EvacuationPhase::Complete, 0));

    world.node("a", |node| node.relays.push(relay(true, "b", "0199aa00000070008000000000000001", 0)));
    let short = evacuate(&mut client, EvacuateRequest { deadline_s: 3, ..of("a") }).await.unwrap();
    let ended = end(&mut client, &short.id).await;
    assert_eq!((ended.phase(), ended.homes), (EvacuationPhase::Complete, 0), "nothing is left to be moved");
}

#[tokio::test]
async fn connections_that_have_outlived_a_move_are_listed_by_what_agents_say() {
    let mut world = World::new().await;
    let (_coordinator, mut client) = world.coordinator().await;
    let moved = migrate(&mut client, "shop", "b").await.unwrap();
    world::outcome(&mut client, &moved.id).await;
    let forgotten = "0199aa00000070008000000000000001";
    let onward = v1::RelayEnd { is_carried_on: true, ..relay(false, "b", forgotten, 0) };
    world.node("a", |node| node.relays = vec![relay(true, "b", &moved.id, 0)]);
    world.node("b", |node| node.relays = vec![relay(false, "a", &moved.id, 7), onward]);
    world.node("c", |node| node.relays = vec![relay(false, "b", forgotten, 1)]);
    let mut list = async |workload: &str, node: &str| {
        let request = v1::ListConnectionsRequest { workload: workload.to_owned(), node: node.to_owned() };
        client.list_connections(request).await.map(tonic::Response::into_inner)
    };
    let all = list("", "").await.unwrap();
    let said: Vec<_> =
        all.kept.iter().map(|kept| (&*kept.workload, &*kept.home_node, &*kept.node, kept.connections)).collect();
    assert_eq!(said, [("", "b", "c", 1), ("shop", "a", "b", 7)]);
    let (since, until) = (all.kept[0].since.as_str(), all.kept[0].until.as_str());
    assert_eq!((since, until), ("2023-11-14T22:13:20Z", "2023-11-14T22:23:20Z"));
    assert_eq!(list("shop", "").await.unwrap().kept.len(), 1);
    assert_eq!(list("", "b").await.unwrap().kept.len(), 2);
    assert_eq!(list("", "a").await.unwrap().kept[0].workload, "shop");
    assert_eq!(list("nothing", "").await.unwrap_err().code(), tonic::Code::NotFound);
    world.stop_agent("c");
    let all = list("", "").await.unwrap();
    assert_eq!((all.kept.len(), &all.silent_nodes[..]), (1, &["c".to_owned()][..]));
}
