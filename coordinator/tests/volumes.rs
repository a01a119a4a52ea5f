//! Volumes through the real coordinator: both agents are told the same, and who does not know them gets no container that has some.

mod world;

use podferry_proto::v1::{self, Phase};
use world::{Copy, World, migrate, outcome};

/// Two that move around one that is shared.
async fn world() -> World {
    let world = World::new().await;
    let moving = |destination: &str| v1::Volume { destination: destination.to_owned(), bytes: 7, ..Default::default() };
    let shared = v1::Volume {
        destination: "/shared".to_owned(),
        bytes: 0,
        shared_filesystem: "nfs4".to_owned(),
        shared_place: "server:/export".to_owned(),
    };
    world.node("a", |node| node.volumes = vec![moving("/data"), shared.clone(), moving("/logs")]);
    world
}

fn destinations(volumes: &[v1::Volume]) -> Vec<&str> {
    volumes.iter().map(|volume| volume.destination.as_str()).collect()
}

#[tokio::test]
async fn both_agents_are_told_the_same_volumes_and_the_target_is_asked_about_all() {
    let world = world().await;
    world.node("b", |node| node.description.features = vec!["agent:volumes".to_owned()]);
    let (_coordinator, mut client) = world.coordinator().await;
    let accepted = migrate(&mut client, "shop", "b").await.unwrap();
    let end = outcome(&mut client, &accepted.id).await;
    assert_eq!(end.phase(), Phase::Succeeded, "{end:?}");
    let state = world.shared.lock();
    assert_eq!(destinations(&state.asked_targets[0].volumes), ["/data", "/shared", "/logs"]);
    assert_eq!(state.asked_targets[0].volumes[1].shared_place, "server:/export");
    assert_eq!(destinations(&state.prepares[0].volumes), ["/data", "/logs"]);
    assert_eq!(state.prepares[0].volumes, state.freezes[0].volumes);
}

#[tokio::test]
async fn an_agent_that_does_not_know_volumes_gets_no_container_that_has_some() {
    let world = world().await;
    let (_coordinator, mut client) = world.coordinator().await;
    let accepted = migrate(&mut client, "shop", "b").await.unwrap();
    let end = outcome(&mut client, &accepted.id).await;
    insta::assert_snapshot!(end.reason, @"the workload has volumes (/data, /logs), and the agent of node b does not know them (on b, in preflight); what to do: update it, or choose another target");
    assert_eq!((end.phase(), world.copy("a", "cart")), (Phase::Failed, Some(Copy::Running)));
    assert!(world.calls().iter().all(|call| call.contains("PreflightSource")), "{:?}", world.calls());
}
