//! After the commit: an agent that knows nothing of its part any more.
#![expect(clippy::unwrap_used, reason = "a panic is the report")]

mod world;

use std::time::Duration;

use podferry_common::{Failure, FailureCode};
use podferry_proto::v1::{GetMigrationRequest, Migration, Phase};
use tokio::time::{sleep, timeout};
use world::{Client, Copy, Fault, PATIENCE, World, migrate, outcome};

const FOREVER: usize = usize::MAX;

/// What an agent says of a migration that it does not know.
fn forgotten(node: &str) -> Fault {
    Fault::Fail(Failure::new(FailureCode::NotFound, "this node has no part of that migration").on(node))
}

/// Waits for a note on the migration that has that text in it.
async fn noted(client: &mut Client, id: &str, text: &str) -> Migration {
    let noted = async {
        loop {
            let request = GetMigrationRequest { id: id.to_owned() };
            let migration = client.get_migration(request).await.unwrap().into_inner().migration.unwrap();
            if migration.notes.iter().any(|note| note.contains(text)) {
                return migration;
            }
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, noted).await.unwrap_or_else(|_| panic!("nobody notes {text:?}"))
}

fn resumes(world: &World) -> usize {
    world.calls().iter().filter(|call| *call == "b Resume").count()
}

#[tokio::test]
async fn a_source_that_nobody_knows_is_released_when_no_copy_is_there() {
    let world = World::new().await;
    let (_coordinator, mut client) = world.coordinator().await;
    world.fault("a", "Release", forgotten("a"), FOREVER);
    let begun = migrate(&mut client, "shop", "b").await.unwrap();
    let waiting = noted(&mut client, &begun.id, "has a container \"cart\" (running, 2 processes)").await;
    assert_eq!(waiting.phase(), Phase::Release);
    insta::assert_snapshot!(waiting.notes.join("\n"), @r#"release is repeated until it is confirmed: node a knows nothing of this migration any more, and has a container "cart" (running, 2 processes), which may be the frozen source: the target runs when it is gone (on a, in release); what to do: see "An agent has lost its part" in docs/operations.md"#);
    world.called("a ListContainers").await;
    assert_eq!((world.copy("b", "cart"), resumes(&world)), (Some(Copy::Held), 0), "a copy may be the frozen source");
    // Its list says nothing while it cannot be had.
    world.fault("a", "ListContainers", Fault::Fail(Failure::new(FailureCode::Internal, "no list").on("a")), FOREVER);
    world.node("a", |node| node.containers.remove("cart"));
    noted(&mut client, &begun.id, "no list").await;
    assert_eq!(resumes(&world), 0);
    world.heal("a", "ListContainers");
    let end = outcome(&mut client, &begun.id).await;
    assert_eq!((end.phase(), end.notes), (Phase::Succeeded, Vec::<String>::new()));
    assert_eq!(world.copy("b", "cart"), Some(Copy::Running));
}

#[tokio::test]
async fn only_the_agents_own_word_counts() {
    let world = World::new().await;
    let (_coordinator, mut client) = world.coordinator().await;
    // Of whoever stands between, or of another node's agent.
    for stranger in
        [Failure::new(FailureCode::NotFound, "no such page"), Failure::new(FailureCode::NotFound, "x").on("c")]
    {
        world.shared.lock().log.clear();
        world.fault("a", "Release", Fault::Fail(stranger.clone()), FOREVER);
        let begun = migrate(&mut client, "shop", "b").await.unwrap();
        world.called("a Release").await;
        let frozen = world.node("a", |node| node.containers.remove("cart"));
        noted(&mut client, &begun.id, &stranger.message).await;
        sleep(Duration::from_millis(500)).await;
        assert_eq!((frozen, resumes(&world)), (Some(Copy::Frozen), 0));
        world.heal("a", "Release");
        assert_eq!(outcome(&mut client, &begun.id).await.phase(), Phase::Succeeded);
        let back = migrate(&mut client, "shop", "a").await.unwrap();
        assert_eq!(outcome(&mut client, &back.id).await.phase(), Phase::Succeeded);
    }
}

#[tokio::test]
async fn a_target_that_nobody_knows_is_not_taken_for_running() {
    let world = World::new().await;
    let (_coordinator, mut client) = world.coordinator().await;
    world.fault("b", "Resume", forgotten("b"), FOREVER);
    let begun = migrate(&mut client, "shop", "b").await.unwrap();
    let waiting = noted(&mut client, &begun.id, "which may still be held").await;
    assert_eq!(waiting.phase(), Phase::Resume);
    insta::assert_snapshot!(waiting.notes.join("\n"), @r#"resume is repeated until it is confirmed: node b knows nothing of this migration any more, and has a container "cart" (running, 2 processes), which may still be held (on b, in resume); what to do: see "An agent has lost its part" in docs/operations.md"#);
    let again = migrate(&mut client, "shop", "c").await.unwrap_err();
    assert_eq!(again.code, FailureCode::AlreadyExists, "a held copy is not moved on: {again}");
    let copy = world.node("b", |node| node.containers.remove("cart")).unwrap();
    noted(&mut client, &begun.id, "has no container \"cart\"").await;
    world.node("b", |node| node.containers.insert("cart".to_owned(), copy));
    world.heal("b", "Resume");
    let end = outcome(&mut client, &begun.id).await;
    assert_eq!((end.phase(), end.notes), (Phase::Succeeded, Vec::<String>::new()));
}
