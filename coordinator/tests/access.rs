//! Who may ask the coordinator for what, by an access policy.
#![expect(clippy::unwrap_used, reason = "helpers of tests: a panic is the report")]

mod world;

use podferry_common::identity::Peer;
use podferry_common::{Failure, FailureCode};
use podferry_proto::v1;
use world::{Client, Coordinator, Fault, World, migrate, outcome};

const POLICY: &str = r#"
[[grants]]
clients = ["root"]
role = "admin"

[[grants]]
clients = ["watcher"]
role = "viewer"

[[grants]]
clients = ["shop-team"]
role = "operator"
workloads = ["shop"]
nodes = ["a", "b"]
"#;

fn write_policy(world: &World, policy: &str) {
    // By a new name: a file that is half written would be read as it is.
    let path = world.folder.path().join("access.toml");
    std::fs::write(path.with_extension("new"), policy).unwrap();
    std::fs::rename(path.with_extension("new"), path).unwrap();
}

async fn world() -> (World, Coordinator) {
    let world = World::new().await;
    write_policy(&world, POLICY);
    let config = std::fs::read_to_string(world.configuration()).unwrap();
    std::fs::write(world.configuration(), format!("access = \"access.toml\"\n{config}")).unwrap();
    let (coordinator, _) = world.coordinator().await;
    (world, coordinator)
}

async fn client(world: &World, coordinator: &Coordinator, name: &str) -> Client {
    world.client(coordinator, &Peer::client(name).unwrap()).await
}

async fn nodes(client: &mut Client) -> Result<usize, FailureCode> {
    let answer = client.list_nodes(v1::ListNodesRequest {}).await;
    answer.map(|nodes| nodes.into_inner().nodes.len()).map_err(|status| Failure::from(status).code)
}

#[tokio::test]
async fn each_role_may_do_its_own_and_what_is_denied_touches_nothing() {
    let (world, coordinator) = world().await;
    let mut root = client(&world, &coordinator, "root").await;
    let mut watcher = client(&world, &coordinator, "watcher").await;
    let mut team = client(&world, &coordinator, "shop-team").await;
    let mut eve = client(&world, &coordinator, "eve").await;

    assert_eq!(nodes(&mut watcher).await, Ok(3));
    assert_eq!(nodes(&mut eve).await, Err(FailureCode::PermissionDenied));
    eve.hello(v1::HelloRequest { version: Some(podferry_proto::Version::OURS.into()) }).await.unwrap();
    let mut denied = Vec::new();
    for (who, workload, target) in [
        (&watcher, "shop", "b"),
        (&eve, "shop", "b"),
        (&team, "redis", "b"),
        (&team, "shop", "c"),
        (&team, "nothing", "b"),
    ] {
        let failure = migrate(&mut who.clone(), workload, target).await.unwrap_err();
        denied.push(format!("{} {failure}", failure.code));
    }
    insta::assert_snapshot!(denied.join("\n"), @r#"
        PERMISSION_DENIED client watcher may not migrate workload "shop" to node "b": this client's only role is viewer, which looks and changes nothing; what to do: ask whoever keeps the coordinator's access policy for a grant of the role operator
        PERMISSION_DENIED client eve may not migrate workload "shop" to node "b": no grant of the access policy names this client; what to do: ask whoever keeps the coordinator's access policy for a grant of the role operator
        PERMISSION_DENIED client shop-team may not migrate workload "redis" to node "b": none of this client's operator grants (access policy, line 12) covers this workload; what to do: ask whoever keeps the coordinator's access policy to widen one
        PERMISSION_DENIED client shop-team may not migrate workload "shop" to node "c": none of this client's operator grants (access policy, line 12) covers the node that it goes to; what to do: ask whoever keeps the coordinator's access policy to widen one
        PERMISSION_DENIED client shop-team may not migrate workload "nothing" to node "b": none of this client's operator grants (access policy, line 12) covers this workload; what to do: ask whoever keeps the coordinator's access policy to widen one
        "#);
    assert_eq!(world.calls(), Vec::<String>::new(), "nothing was touched");

    world.fault("b", "Prepare", Fault::Hang, 1);
    let moving = migrate(&mut team, "shop", "b").await.unwrap();
    world.called("b Prepare").await;
    let cancel = || v1::CancelMigrationRequest { id: moving.id.clone() };
    let refused = Failure::from(watcher.cancel_migration(cancel()).await.unwrap_err());
    assert_eq!(refused.code, FailureCode::PermissionDenied, "{refused}");
    world.heal("b", "Prepare");
    assert_eq!(outcome(&mut watcher, &moving.id).await.phase(), v1::Phase::Succeeded);

    // Placement chooses among the nodes that the caller may use: c, which has as much room, is not one of them.
    let chosen = migrate(&mut team, "shop", "").await.unwrap();
    assert_eq!(chosen.target, "a");
    assert!(
        chosen.notes.iter().any(|note| note.starts_with("not to c: none of this client's operator grants")),
        "{chosen:?}"
    );
    assert_eq!(outcome(&mut team, &chosen.id).await.phase(), v1::Phase::Succeeded);

    // What has left its nodes is out of its reach.
    let away = migrate(&mut root, "shop", "c").await.unwrap();
    assert_eq!(outcome(&mut root, &away.id).await.phase(), v1::Phase::Succeeded);
    let failure = migrate(&mut team, "shop", "a").await.unwrap_err();
    assert_eq!(failure.code, FailureCode::PermissionDenied);
    assert!(
        failure.message.contains("from node \"c\"") && failure.message.contains("the node that it leaves"),
        "{failure}"
    );
}

#[tokio::test]
async fn a_cancel_is_limited_as_a_migration_is() {
    let (world, coordinator) = world().await;
    let mut root = client(&world, &coordinator, "root").await;
    let mut team = client(&world, &coordinator, "shop-team").await;
    world.fault("b", "Prepare", Fault::Hang, 1);
    let moving = migrate(&mut root, "redis", "b").await.unwrap();
    world.called("b Prepare").await;
    let cancel = || v1::CancelMigrationRequest { id: moving.id.clone() };
    let refused = Failure::from(team.cancel_migration(cancel()).await.unwrap_err());
    assert_eq!(refused.code, FailureCode::PermissionDenied, "{refused}");
    assert!(refused.message.contains("workload \"redis\""), "{refused}");
    root.cancel_migration(cancel()).await.unwrap();
    assert_eq!(outcome(&mut root, &moving.id).await.phase(), v1::Phase::Cancelled);
}

#[tokio::test]
async fn an_edited_policy_counts_at_once_and_a_broken_one_does_not() {
    let (world, coordinator) = world().await;
    let mut eve = client(&world, &coordinator, "eve").await;
    assert_eq!(nodes(&mut eve).await, Err(FailureCode::PermissionDenied));
    write_policy(&world, &format!("{POLICY}[[grants]]\nclients = [\"eve\"]\nrole = \"viewer\"\n"));
    assert_eq!(nodes(&mut eve).await, Ok(3));
    write_policy(&world, "[[grants]]\nclients = [\"*\"]\nrole = \"owner\"\n");
    assert_eq!(nodes(&mut eve).await, Ok(3), "the old one stays");
    let said = |line: &String| line.contains("the old one stays") && line.contains("access.toml:3:8");
    coordinator.said(said).await;
    std::fs::remove_file(world.folder.path().join("access.toml")).unwrap();
    assert_eq!(nodes(&mut eve).await, Ok(3), "the old one stays");
    assert!(migrate(&mut eve, "shop", "b").await.is_err(), "a policy that has gone opens nothing");
    write_policy(&world, POLICY);
    assert_eq!(nodes(&mut eve).await, Err(FailureCode::PermissionDenied));
}
