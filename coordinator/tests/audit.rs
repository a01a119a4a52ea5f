//! The audit log of a real coordinator.
#![expect(clippy::unwrap_used, reason = "helpers of tests: a panic is the report")]

mod world;

use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use podferry_common::identity::Peer;
use podferry_proto::v1;
use serde_json::Value;
use world::{Fault, PATIENCE, World, migrate, outcome};

const POLICY: &str = r#"
[[grants]]
clients = ["tester"]
role = "admin"
"#;

fn log(world: &World) -> Vec<Value> {
    let text = std::fs::read_to_string(world.folder.path().join("state/audit.log")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// What is told of a migration, in order.
fn course(world: &World, id: &str) -> Vec<String> {
    let of_it = log(world).into_iter().filter(|line| line["event"] == "migration" && line["migration"] == id);
    of_it.map(|line| line["what"].as_str().unwrap().to_owned()).collect()
}

/// Waits until that is told of a migration: its end is written behind the answer.
async fn told(world: &World, id: &str, what: &[&str]) {
    let told = async {
        while course(world, id) != what {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let waited = tokio::time::timeout(PATIENCE, told).await;
    waited.unwrap_or_else(|_| panic!("{:?} instead of {what:?}", course(world, id)));
}

fn with_policy(world: &World) {
    std::fs::write(world.folder.path().join("access.toml"), POLICY).unwrap();
    let config = std::fs::read_to_string(world.configuration()).unwrap();
    std::fs::write(world.configuration(), format!("access = \"access.toml\"\n{config}")).unwrap();
}

#[tokio::test]
async fn every_decision_is_written_down_with_who_what_and_why() {
    let world = World::new().await;
    with_policy(&world);
    let (coordinator, mut client) = world.coordinator().await;
    let mut eve = world.client(&coordinator, &Peer::client("eve").unwrap()).await;
    migrate(&mut eve, "shop", "b").await.unwrap_err();
    // What is denied is in the file when the answer comes.
    let denied = log(&world).pop().unwrap();
    assert_eq!(
        [&denied["event"], &denied["peer"], &denied["action"], &denied["workload"], &denied["target"]],
        ["request", "eve.client.podferry.internal", "migrate", "shop", "b"]
    );
    assert_eq!(
        (&denied["allowed"], denied["why"].as_str().unwrap()),
        (&Value::Bool(false), "no grant of the access policy names this client")
    );

    let moved = migrate(&mut client, "shop", "b").await.unwrap();
    assert_eq!(moved.requested_by, "tester.client.podferry.internal");
    let accepted = log(&world).into_iter().find(|line| line["migration"] == moved.id.as_str()).unwrap();
    assert_eq!(
        [&accepted["what"], &accepted["source"], &accepted["target"], &accepted["strategy"]],
        ["accepted", "a", "b", "warm"]
    );
    let asked = log(&world).into_iter().find(|line| line["peer"] == moved.requested_by.as_str()).unwrap();
    assert_eq!([&asked["action"], &asked["why"]], ["migrate", "role admin, granted on line 4"]);
    assert_eq!(asked["allowed"], true);
    assert_eq!(accepted["requested_by"], "tester.client.podferry.internal");
    assert_eq!(outcome(&mut client, &moved.id).await.phase(), v1::Phase::Succeeded);
    told(&world, &moved.id, &["accepted", "committed", "succeeded"]).await;

    world.fault("a", "Prepare", Fault::Hang, 1);
    let cancelled = migrate(&mut client, "shop", "a").await.unwrap();
    world.called("a Prepare").await;
    client.cancel_migration(v1::CancelMigrationRequest { id: cancelled.id.clone() }).await.unwrap();
    world.heal("a", "Prepare");
    assert_eq!(outcome(&mut client, &cancelled.id).await.phase(), v1::Phase::Cancelled);
    told(&world, &cancelled.id, &["accepted", "rolling_back", "cancelled"]).await;
    let ended = log(&world).into_iter().find(|line| line["what"] == "cancelled").unwrap();
    let why = ended["reason"].as_str().unwrap();
    assert!(why.contains("cancelled by client tester"), "{why}");

    migrate(&mut client, "shop", "nowhere").await.unwrap_err();
    let refused = log(&world).pop().unwrap();
    assert_eq!((&refused["what"], &refused["target"]), (&"refused".into(), &"nowhere".into()));
    assert!(refused["reason"].as_str().unwrap().starts_with("NOT_FOUND: "), "{refused}");

    let mode = std::fs::metadata(world.folder.path().join("state/audit.log")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[tokio::test]
async fn what_was_answered_is_in_the_log_of_a_killed_coordinator() {
    let world = World::new().await;
    let (coordinator, mut client) = world.coordinator().await;
    world.fault("b", "Prepare", Fault::Hang, 1);
    let moving = migrate(&mut client, "shop", "b").await.unwrap();
    world.called("b Prepare").await;
    let before = log(&world).len();
    coordinator.kill().await;
    // As if the kill had come in the middle of a line.
    let path = world.folder.path().join("state/audit.log");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, format!("{text}{{\"at\":\"2026-")).unwrap();
    world.heal("b", "Prepare");

    let (_coordinator, mut client) = world.coordinator().await;
    assert_eq!(outcome(&mut client, &moving.id).await.phase(), v1::Phase::Failed);
    let ended = async {
        loop {
            let text = std::fs::read_to_string(&path).unwrap();
            let lines: Vec<_> = text.lines().map(serde_json::from_str::<Value>).collect();
            let bad: Vec<_> = (0..lines.len()).filter(|&number| lines[number].is_err()).collect();
            assert_eq!(bad, [before], "the line that was cut off, and no other");
            let of_it = lines.iter().flatten().filter(|line| line["what"] != Value::Null);
            let what: Vec<_> = of_it.map(|line| line["what"].clone()).collect();
            if what == ["accepted", "taken_up", "rolling_back", "rolled_back"] {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, ended).await.expect("the log does not tell the end");
}

#[tokio::test]
async fn without_a_log_nothing_is_changed_and_looking_goes_on() {
    let world = World::new().await;
    let config = std::fs::read_to_string(world.configuration()).unwrap();
    // Every write fails there, as on a full disk.
    std::fs::write(world.configuration(), format!("audit_log = \"/dev/full\"\n{config}")).unwrap();
    let (_coordinator, mut client) = world.coordinator().await;
    let failure = migrate(&mut client, "shop", "b").await.unwrap_err();
    assert!(failure.message.contains("cannot write to the audit log /dev/full"), "{failure}");
    assert_eq!(world.calls(), Vec::<String>::new(), "nothing was touched");
    client.list_nodes(v1::ListNodesRequest {}).await.unwrap();
}
