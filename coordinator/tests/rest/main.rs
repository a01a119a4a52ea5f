//! REST against the real coordinator over real TLS.
#![expect(clippy::unwrap_used, reason = "a panic is the report")]

mod client;
#[path = "../world/mod.rs"]
mod world;

use std::time::{Duration, Instant};

use axum::body::Body;
use axum::http::Request;
use client::Rest;
use podferry_common::identity::{IdentityFiles, LocalCa, Peer};
use podferry_proto::v1;
use rustix::process::Signal;
use serde_json::{Value, json};
use world::{Client, Coordinator, Copy, Fault, PATIENCE, World};

/// A world whose coordinator listens for REST, too.
async fn stage() -> (World, Coordinator, Client, Rest) {
    let world = World::new().await;
    let config = std::fs::read_to_string(world.configuration()).unwrap();
    std::fs::write(world.configuration(), format!("rest_listen = \"127.0.0.1:0\"\n{config}")).unwrap();
    let (coordinator, client) = world.coordinator().await;
    let rest = rest(&world, &coordinator, &Peer::client("tester").unwrap());
    (world, coordinator, client, rest)
}

fn rest(world: &World, coordinator: &Coordinator, who: &Peer) -> Rest {
    Rest::new(&client::address(&coordinator.log.lock().unwrap()), world.identity(who).files(), true)
}

/// Asks for a migration of `shop` that stands still while the target reserves.
async fn stuck(world: &World, rest: &Rest) -> String {
    world.fault("b", "Prepare", Fault::Hang, 1);
    let accepted = rest.post("/api/v1/migrations", r#"{"workload": "shop", "target": "b"}"#).await;
    assert_eq!(accepted.status, 201, "{accepted:?}");
    world.called("b Prepare").await;
    accepted.json()["id"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn a_migration_is_asked_for_watched_to_its_end_and_listed() {
    let (world, coordinator, mut grpc, rest) = stage().await;
    let request = json!({"workload": "shop", "target": "b", "strategy": "live", "downtime_budget_ms": 50});
    let accepted = rest.post("/api/v1/migrations", request.to_string()).await;
    assert_eq!((accepted.status, accepted.header("content-type")), (201, "application/json"), "{accepted:?}");
    let id = accepted.json()["id"].as_str().unwrap().to_owned();
    assert_eq!(accepted.header("location"), format!("/api/v1/migrations/{id}"));
    assert_eq!(accepted.header("cache-control"), "no-store");
    let audit = ["migration accepted".to_owned(), "\"peer\":\"client tester\"".to_owned(), id.clone()];
    coordinator.said(|line| audit.iter().all(|words| line.contains(words))).await;

    let events = rest.watch(&id).await;
    let (last, others) = events.split_last().unwrap();
    assert!(events.iter().all(|event| event.name == "migration" && event.data["id"] == *id), "{events:?}");
    assert!(others.iter().all(|event| event.id.is_empty() && event.data["phase"] != "succeeded"), "{others:?}");
    assert_eq!((last.id.as_str(), &last.data["phase"]), ("end", &json!("succeeded")));
    assert_eq!((&last.data["strategy"], &last.data["decision"]), (&json!("live"), &json!("commit")));
    assert_eq!((&last.data["problem"], &last.data["rounds"][0]["pages"]), (&Value::Null, &json!(16_000)));
    assert_eq!((world.copy("a", "cart"), world.copy("b", "cart")), (None, Some(Copy::Running)));
    assert_eq!(world.shared.lock().freezes[0].pre_copy.unwrap().downtime_budget_ms.to_bits(), 50.0_f64.to_bits());

    // Who has seen the end is told to stay away: otherwise a browser would come back for ever.
    let path = format!("/api/v1/migrations/{id}/watch");
    let again = Request::get(&path).header("last-event-id", "end").body(Body::empty()).unwrap();
    assert_eq!(rest.ask(again).await.unwrap().status, 204);
    assert_eq!(rest.watch(&id).await.len(), 1, "the end, for who has not");

    let shown = rest.get(&format!("/api/v1/migrations/{id}")).await.json();
    assert_eq!(shown, last.data);
    assert_eq!(rest.get("/api/v1/migrations").await.json(), json!({"migrations": [shown]}));
    assert_eq!(rest.get("/api/v1/migrations?workload=redis").await.json(), json!({"migrations": []}));
    assert_eq!(rest.get("/api/v1/migrations?active=true&workload=shop").await.json(), json!({"migrations": []}));
    let by_grpc = grpc.get_migration(v1::GetMigrationRequest { id }).await.unwrap().into_inner().migration.unwrap();
    let keys_of_the_command_line = serde_json::to_value(podferry_proto::json::Migration::from(&by_grpc)).unwrap();
    for (key, value) in keys_of_the_command_line.as_object().unwrap() {
        assert_eq!(&shown[key], value, "{key}");
    }
}

#[tokio::test]
async fn a_node_is_emptied_and_that_is_watched_to_its_end() {
    let (world, _coordinator, mut grpc, rest) = stage().await;
    let request = json!({"node": "a", "strategy": "warm", "priorities": {"shop": 3}, "concurrency": 1});
    let accepted = rest.post("/api/v1/evacuations", request.to_string()).await;
    assert_eq!(accepted.status, 201, "{accepted:?}");
    let id = accepted.json()["id"].as_str().unwrap().to_owned();
    assert_eq!(accepted.header("location"), format!("/api/v1/evacuations/{id}"));
    let path = format!("/api/v1/evacuations/{id}");
    let events = rest.watch_at(&format!("{path}/watch")).await;
    assert!(events.iter().all(|event| event.name == "evacuation" && event.data["id"] == *id), "{events:?}");
    let last = events.last().unwrap();
    assert_eq!((last.id.as_str(), &last.data["phase"], &last.data["moved"]), ("end", &json!("complete"), &json!(2)));
    let order: Vec<_> = last.data["workloads"].as_array().unwrap().iter().map(|one| &one["workload"]).collect();
    assert_eq!(order, ["shop", "redis"]);
    assert_eq!(world.copy("a", "cart"), None);
    assert_eq!(rest.get(&path).await.json(), last.data);
    let list = rest.get("/api/v1/evacuations?node=a").await.json();
    assert_eq!((&list["evacuations"][0]["id"], &list["evacuations"][0]["workloads"]), (&json!(id), &json!([])));
    assert_eq!(rest.get("/api/v1/evacuations?active=true").await.json(), json!({"evacuations": []}));
    let by_grpc = grpc.get_evacuation(v1::GetEvacuationRequest { id }).await.unwrap().into_inner().evacuation.unwrap();
    assert_eq!(serde_json::to_value(podferry_proto::json::Evacuation::from(&by_grpc)).unwrap(), last.data);

    let over = rest.post(&format!("{path}/cancel"), "{}").await;
    assert_eq!((over.status, &over.json()["code"]), (409, &json!("FAILED_PRECONDITION")), "{over:?}");
    let nobody = rest.post("/api/v1/evacuations", r#"{"node": "z"}"#).await;
    assert_eq!(nobody.status, 404, "{nobody:?}");
}

#[tokio::test]
async fn nodes_workloads_and_the_document_are_answered() {
    let (mut world, _coordinator, _grpc, rest) = stage().await;
    world.stop_agent("c");
    let nodes = rest.get("/api/v1/nodes").await.json();
    let reachable: Vec<_> = nodes["nodes"].as_array().unwrap().iter().map(|node| &node["reachable"]).collect();
    assert_eq!(reachable, [&json!(true), &json!(true), &json!(false)]);
    let workloads = rest.get("/api/v1/workloads").await.json();
    assert_eq!((&workloads["workloads"][1]["name"], &workloads["workloads"][1]["node"]), (&json!("shop"), &json!("a")));
    assert_eq!(rest.get("/api/v1/workloads?node=b").await.json(), json!({"workloads": []}));
    let silent = rest.get("/api/v1/workloads?node=c").await;
    assert_eq!((silent.status, &silent.json()["node"]), (503, &json!("c")), "{silent:?}");
    let document = rest.get("/api/v1/openapi.json").await;
    assert!(document.json()["paths"]["/api/v1/migrations"]["post"].is_object(), "{document:?}");
    let page = rest.get("/").await;
    let policy = page.header("content-security-policy");
    assert!(page.text.contains("page.js") && policy.starts_with("default-src 'none'"), "{page:?}");
    assert_eq!(rest.get("/page.js").await.header("content-type"), "text/javascript; charset=utf-8");
    let version = rest.get("/api/v1/version").await.json();
    assert_eq!(version, json!({"coordinator_version": env!("CARGO_PKG_VERSION")}));
    let head = rest.ask(Request::head("/api/v1/nodes").body(Body::empty()).unwrap()).await.unwrap();
    assert_eq!((head.status, head.text.as_str()), (200, ""));
}

#[tokio::test]
async fn a_cancel_undoes_what_is_not_committed_and_nothing_else() {
    let (world, _coordinator, _grpc, rest) = stage().await;
    let id = stuck(&world, &rest).await;
    let active = rest.get("/api/v1/migrations?active=true").await.json();
    assert_eq!(active["migrations"][0]["id"], *id);
    let busy = rest.post("/api/v1/migrations", r#"{"workload": "shop"}"#).await;
    assert_eq!((busy.status, &busy.json()["code"]), (409, &json!("ALREADY_EXISTS")), "{busy:?}");
    let cancelled = rest.post(&format!("/api/v1/migrations/{id}/cancel"), "").await;
    assert_eq!(cancelled.status, 202, "{cancelled:?}");
    world.heal("b", "Prepare");
    let end = rest.watch(&id).await.pop().unwrap();
    assert_eq!((end.id.as_str(), &end.data["phase"]), ("end", &json!("cancelled")));
    assert!(end.data["reason"].as_str().unwrap().contains("client tester"), "{end:?}");
    assert_eq!(world.copy("a", "cart"), Some(Copy::Running));
    let late = rest.post(&format!("/api/v1/migrations/{id}/cancel"), "").await;
    assert_eq!((late.status, &late.json()["phase"]), (409, &json!("cancelled")), "{late:?}");
}

#[tokio::test]
async fn what_makes_no_sense_is_refused_with_what_to_do() {
    let (world, _coordinator, _grpc, rest) = stage().await;
    let mut said = Vec::new();
    for body in [
        "",
        "{",
        r#"["shop", "b", null, false, null, null, false, false, false, null]"#,
        r#"{"target": "b"}"#,
        r#"{"workload": "shop", "tarjet": "b"}"#,
        r#"{"workload": "shop", "workload": "redis"}"#,
        r#"{"workload": 7}"#,
        r#"{"workload": "shop", "strategy": "warp"}"#,
        r#"{"workload": "shop", "strategy": "live", "downtime_budget_ms": 1e999}"#,
        r#"{"workload": "shop", "strategy": "live", "downtime_budget_ms": -1}"#,
        r#"{"workload": "shop", "bandwidth_limit": -1}"#,
        r#"{"workload": "shop", "strategy": "postcopy"}"#,
        r#"{"workload": "shop", "strategy": "application"}"#,
        r#"{"workload": "nothing"}"#,
        r#"{"workload": "shop", "target": "a"}"#,
        "{\"workload\": \"shop\"}\u{feff}",
    ] {
        said.push(problem(&rest.post("/api/v1/migrations", body).await));
    }
    said.push(problem(&rest.post("/api/v1/migrations", vec![b'['; 20_000]).await));
    for content_type in ["text/plain", "application/x-www-form-urlencoded"] {
        let request = Request::post("/api/v1/migrations").header("content-type", content_type);
        said.push(problem(&rest.ask(request.body(r#"{"workload": "shop"}"#.into()).unwrap()).await.unwrap()));
    }
    for path in [
        "/page",
        "/api/v1/node",
        "/api/v1/migrations/",
        "/api/v1/migrations/../nodes",
        "/api/v1/migrations/%ff",
        "/api/v1/migrations/0199aa00000070008000000000000001",
        "/api/v1/migrations/0199aa00000070008000000000000001/watch",
        "/api/v1/migrations/x%2fcancel",
        "/api/v1/migrations?active=yes",
        "/api/v1/migrations?all=true",
        "/api/v1/migrations?workload=nothing",
        "/api/v1/workloads?node=nowhere",
        "/api/v1/migrations/x/cancel",
    ] {
        said.push(format!("{path}: {}", problem(&rest.get(path).await)));
    }
    insta::assert_snapshot!(said.join("\n"), @r#"
    400 INVALID_ARGUMENT the body is no JSON object; what to do: see /api/v1/openapi.json
    400 INVALID_ARGUMENT the body is wrong: EOF while parsing an object at line 1 column 1; what to do: see /api/v1/openapi.json
    400 INVALID_ARGUMENT the body is no JSON object; what to do: see /api/v1/openapi.json
    400 INVALID_ARGUMENT the body is wrong: missing field `workload` at line 1 column 15; what to do: see /api/v1/openapi.json
    400 INVALID_ARGUMENT the body is wrong: unknown field `tarjet`, expected one of `workload`, `target`, `strategy`, `no_compression`, `downtime_budget_ms`, `bandwidth_limit`, `verify`, `throttle`, `accept_loss`, `allow_restart`, `grace_period_s`, `connections`, `connections_deadline_s` at line 1 column 29; what to do: see /api/v1/openapi.json
    400 INVALID_ARGUMENT the body is wrong: duplicate field `workload` at line 1 column 31; what to do: see /api/v1/openapi.json
    400 INVALID_ARGUMENT the body is wrong: invalid type: integer `7`, expected a string at line 1 column 14; what to do: see /api/v1/openapi.json
    400 INVALID_ARGUMENT the body is wrong: unknown variant `warp`, expected one of `auto`, `cold`, `warm`, `live`, `postcopy`, `hybrid`, `application` at line 1 column 39; what to do: see /api/v1/openapi.json
    400 INVALID_ARGUMENT the body is wrong: number out of range at line 1 column 68; what to do: see /api/v1/openapi.json
    400 INVALID_ARGUMENT -1 ms is no downtime that can be aimed at: it is between 1 and 60000 ms; what to do: give another one, or none
    400 INVALID_ARGUMENT the body is wrong: invalid value: integer `-1`, expected u64 at line 1 column 42; what to do: see /api/v1/openapi.json
    400 INVALID_ARGUMENT the strategy postcopy risks the workload: from its resume on the target until the last page is across, losing either node, or the link between them for too long, loses it; what to do: accept that risk (--accept-loss), or use live
    409 FAILED_PRECONDITION no node can take the workload (a: the workload runs there already; b: its agent does not know this kind of migration; c: its agent does not know this kind of migration); what to do: make room on a node or add one
    404 NOT_FOUND there is no workload "nothing" in the inventory; what to do: name one of: redis, shop
    400 INVALID_ARGUMENT node a cannot take the workload: the workload runs there already; what to do: name another node, or none
    400 INVALID_ARGUMENT the body is wrong: trailing characters at line 1 column 21; what to do: see /api/v1/openapi.json
    413 INVALID_ARGUMENT the body has more than 16384 bytes
    415 INVALID_ARGUMENT the body is not said to be JSON; what to do: send it with `Content-Type: application/json`
    415 INVALID_ARGUMENT the body is not said to be JSON; what to do: send it with `Content-Type: application/json`
    /page: 404 NOT_FOUND there is nothing at this path; what to do: see /api/v1/openapi.json
    /api/v1/node: 404 NOT_FOUND there is nothing at this path; what to do: see /api/v1/openapi.json
    /api/v1/migrations/: 404 NOT_FOUND there is nothing at this path; what to do: see /api/v1/openapi.json
    /api/v1/migrations/../nodes: 404 NOT_FOUND there is nothing at this path; what to do: see /api/v1/openapi.json
    /api/v1/migrations/%ff: 400 INVALID_ARGUMENT the path is wrong: Invalid URL: Invalid UTF-8 in `id`; what to do: see /api/v1/openapi.json
    /api/v1/migrations/0199aa00000070008000000000000001: 404 NOT_FOUND there is no migration 0199aa00000070008000000000000001; what to do: see `podferry migrations`
    /api/v1/migrations/0199aa00000070008000000000000001/watch: 404 NOT_FOUND there is no migration 0199aa00000070008000000000000001; what to do: see `podferry migrations`
    /api/v1/migrations/x%2fcancel: 400 INVALID_ARGUMENT "x/cancel" is no migration id; one has 32 hexadecimal digits, as `podferry migrations` shows
    /api/v1/migrations?active=yes: 400 INVALID_ARGUMENT the query is wrong: Failed to deserialize query string: active: provided string was not `true` or `false`; what to do: see /api/v1/openapi.json
    /api/v1/migrations?all=true: 400 INVALID_ARGUMENT the query is wrong: Failed to deserialize query string: all: unknown field `all`, expected `workload` or `active`; what to do: see /api/v1/openapi.json
    /api/v1/migrations?workload=nothing: 404 NOT_FOUND there is no workload "nothing" in the inventory; what to do: name one of: redis, shop
    /api/v1/workloads?node=nowhere: 404 NOT_FOUND there is no node "nowhere" in the inventory; what to do: name one of: a, b, c
    /api/v1/migrations/x/cancel: 405 UNIMPLEMENTED this path does not take this method; what to do: see /api/v1/openapi.json
    "#);
    assert_eq!(world.calls(), Vec::<String>::new(), "nothing was touched");
    assert_eq!(rest.get("/api/v1/migrations").await.json(), json!({"migrations": []}), "nothing was recorded");
}

/// Status, code, text and remedy of a refusal, which has to be a problem.
fn problem(answer: &client::Answer) -> String {
    assert_eq!(answer.header("content-type"), "application/problem+json", "{answer:?}");
    let problem = answer.json();
    assert_eq!(problem["status"], answer.status);
    let remedy = problem["remedy"].as_str().map(|remedy| format!("; what to do: {remedy}")).unwrap_or_default();
    format!("{} {} {}{remedy}", answer.status, problem["code"].as_str().unwrap(), problem["detail"].as_str().unwrap())
}

#[tokio::test]
async fn callers_are_who_their_certificates_say_and_may_do_what_grpc_lets_them() {
    let (world, coordinator, _grpc, tester) = stage().await;
    let agent = rest(&world, &coordinator, &Peer::Agent("a".parse().unwrap()));
    assert_eq!(agent.get("/api/v1/version").await.status, 200, "as with Hello");
    let impostor = rest(&world, &coordinator, &Peer::Coordinator);
    for caller in [&agent, &impostor] {
        for path in
            ["/", "/page.js", "/api/v1/nodes", "/api/v1/workloads", "/api/v1/migrations", "/api/v1/migrations/x/watch"]
        {
            let denied = caller.get(path).await;
            assert_eq!((denied.status, &denied.json()["code"]), (403, &json!("PERMISSION_DENIED")), "{path}");
        }
        for path in ["/api/v1/migrations", "/api/v1/migrations/x/cancel"] {
            assert_eq!(caller.post(path, r#"{"workload": "shop"}"#).await.status, 403, "{path}");
        }
    }
    assert_eq!(impostor.get("/api/v1/version").await.status, 403);
    let cross = Request::post("/api/v1/migrations").header("content-type", "application/json");
    let cross = cross.header("sec-fetch-site", "cross-site").body(r#"{"workload": "shop"}"#.into()).unwrap();
    assert_eq!(tester.ask(cross).await.unwrap().status, 403);
    assert_eq!(world.calls(), Vec::<String>::new(), "nothing was touched");

    let mine = world.identity(&Peer::client("tester").unwrap());
    let nobody = Rest::new(&tester.address, mine.files(), false);
    let request = || Request::get("/api/v1/nodes").body(Body::empty()).unwrap();
    nobody.send(request()).await.unwrap_err();
    let folder = tempfile::tempdir().unwrap();
    let other = LocalCa::create(folder.path()).unwrap();
    let files = IdentityFiles::in_folder(folder.path().join("me"));
    other.issue(&Peer::client("mallory").unwrap(), Duration::from_secs(3600), &files).unwrap();
    std::fs::copy(&mine.files().ca, &files.ca).unwrap();
    Rest::new(&tester.address, &files, true).send(request()).await.unwrap_err();
    let mut grpc_only = rest(&world, &coordinator, &Peer::client("tester").unwrap());
    grpc_only.config.alpn_protocols = vec![b"h2".to_vec()];
    assert!(grpc_only.connect().await.is_err(), "it speaks HTTP/1.1 alone");
    grpc_only.config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    assert_eq!(grpc_only.get("/api/v1/nodes").await.status, 200, "as curl asks");
}

/// What stands in the column of states of `/proc/net/tcp`.
const TABLE_HEAD: &str = "st";
const LISTEN: &str = "0A";
const TIME_WAIT: &str = "06";

/// Connections of the listener at this address that are not over on both sides.
fn connections(address: &str) -> usize {
    let port: u16 = address.rsplit_once(':').unwrap().1.parse().unwrap();
    let local = format!(":{port:04X}");
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let columns = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    columns.filter(|line| line[1].ends_with(&local) && ![TABLE_HEAD, LISTEN, TIME_WAIT].contains(&line[3])).count()
}

#[tokio::test]
async fn a_watch_ends_when_its_caller_goes() {
    let (world, _coordinator, _grpc, rest) = stage().await;
    let id = stuck(&world, &rest).await;
    let path = format!("/api/v1/migrations/{id}/watch");
    let mut watches = Vec::new();
    for _ in 0..5 {
        watches.push(rest.send(Request::get(&path).body(Body::empty()).unwrap()).await.unwrap());
    }
    assert!(connections(&rest.address) >= watches.len());
    drop(watches);
    let begun = Instant::now();
    while connections(&rest.address) > 0 {
        assert!(begun.elapsed() < PATIENCE, "{} connections stay", connections(&rest.address));
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    world.heal("b", "Prepare");
    assert_eq!(rest.watch(&id).await.pop().unwrap().data["phase"], "succeeded");
}

#[tokio::test]
async fn open_connections_and_watches_keep_no_coordinator_from_stopping() {
    let (world, mut coordinator, _grpc, rest) = stage().await;
    let id = stuck(&world, &rest).await;
    let idle = rest.connect().await.unwrap();
    let (events, ended) = tokio::join!(rest.watch(&id), async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        coordinator.signal(Signal::TERM);
        let begun = Instant::now();
        let status = coordinator.end().await;
        assert!(status.success(), "{status}");
        begun.elapsed()
    });
    let end = events.last().unwrap();
    assert_eq!((end.id.as_str(), &end.data["phase"]), ("end", &json!("cancelled")), "{events:?}");
    assert!(ended < Duration::from_secs(15), "{ended:?}");
    drop(idle);
}
