//! `drain`: what it moves, what it only follows, and what it must not call done.

use podferry_common::{Failure, FailureCode};
use podferry_proto::v1::{Migration, Strategy, Workload};

use super::support::{Answer, Cluster, Meanwhile, Script};
use super::{begun, failed, lost, node, succeeded, workload};

fn of(workload: &str, id: &str, end: Migration) -> Answer {
    let named = |migration: Migration| Migration { id: id.into(), workload: workload.into(), ..migration };
    Answer::Accept(vec![named(begun()), named(end)])
}

#[tokio::test]
async fn drain_moves_everything_one_after_the_other() {
    let stopped = Workload { status: "stopped".into(), ..workload("old", "n1") };
    let busy = Workload { migration_id: "m4".into(), ..workload("busy", "n1") };
    let script = Script {
        nodes: vec![node("n1"), node("n2")],
        workloads: vec![
            workload("redis", "n1"),
            workload("cart", "n1"),
            workload("elsewhere", "n2"),
            workload("catalogue", "n1"),
            busy,
            stopped,
        ],
        migrate: [
            ("redis".to_owned(), of("redis", "m1", succeeded())),
            ("cart".to_owned(), of("cart", "m2", failed("restore", "INTERNAL"))),
            ("catalogue".to_owned(), of("catalogue", "m3", succeeded())),
        ]
        .into(),
        migrations: [("m4".to_owned(), vec![Migration { id: "m4".into(), workload: "busy".into(), ..succeeded() }])]
            .into(),
        ..Default::default()
    };
    let cluster = Cluster::start(script).await;
    let ran = cluster.run(&["drain", "n1"]).await.exits(1);
    insta::assert_snapshot!("table", ran.out);
    assert!(ran.err.contains("criu/cr-restore.c:2391"), "{}", ran.err);
    let asked: Vec<(String, String)> =
        cluster.seen().into_iter().map(|seen| (seen.request.workload, seen.request.target)).collect();
    assert_eq!(asked, [("redis", ""), ("cart", ""), ("catalogue", "")].map(|(w, t)| (w.to_owned(), t.to_owned())));

    let first = &cluster.seen()[0].request;
    assert_eq!((first.strategy(), first.allow_restart), (Strategy::Auto, false));

    let ran = cluster.run(&["drain", "n1", "--output", "json"]).await.exits(1);
    let report: serde_json::Value = serde_json::from_str(&ran.out).unwrap();
    assert_eq!(report["migrations"].as_array().unwrap().len(), 4);
    assert_eq!(report["left_behind"][0]["workload"], "cart");
    assert_eq!(report["not_running"][0], "old");

    let refusal = Failure::new(FailureCode::FailedPrecondition, "no node can take it");
    cluster.script.lock().unwrap().migrate.insert("cart".into(), Answer::Refuse(refusal));
    cluster.run(&["drain", "n1"]).await.exits(1);
    cluster.script.lock().unwrap().migrate.insert("cart".into(), of("cart", "m2", succeeded()));
    cluster.run(&["drain", "n1"]).await.exits(0);
    cluster.run(&["drain", "n9"]).await.exits(4);
}

/// Two nodes, and these workloads; each migration that is asked for succeeds.
fn script(workloads: Vec<Workload>) -> Script {
    let migrate = workloads.iter().map(|w| (w.name.clone(), of(&w.name, &format!("own-{}", w.name), succeeded())));
    Script { nodes: vec![node("n1"), node("n2")], migrate: migrate.collect(), workloads, ..Default::default() }
}

/// A workload that somebody else migrates.
fn moving(name: &str, at: &str, status: &str) -> Workload {
    Workload { migration_id: format!("other-{name}"), status: status.into(), ..workload(name, at) }
}

/// What a watcher of that migration sees.
fn others(script: &mut Script, name: &str, [source, target]: [&str; 2], end: Migration) {
    let id = format!("other-{name}");
    let states = [begun(), end].map(|state| Migration {
        id: id.clone(),
        workload: name.into(),
        source: source.into(),
        target: target.into(),
        ..state
    });
    script.migrations.insert(id, states.into());
}

fn meanwhile(body: impl FnOnce(&mut Script) + Send + 'static) -> Meanwhile {
    Box::new(body)
}

fn asked(cluster: &Cluster) -> Vec<String> {
    cluster.seen().into_iter().map(|seen| seen.request.workload).collect()
}

async fn report(cluster: &Cluster, code: i32) -> serde_json::Value {
    serde_json::from_str(&cluster.run(&["drain", "n1", "-o", "json"]).await.exits(code).out).unwrap()
}

#[tokio::test]
async fn drain_of_a_silent_node_is_refused_with_its_name() {
    let mut script = script(vec![workload("redis", "n1")]);
    script.nodes[0].reachable = false;
    let cluster = Cluster::start(script).await;
    let ran = cluster.run(&["drain", "n1"]).await.exits(3);
    assert_eq!(ran.out, "");
    assert!(ran.err.contains("node n1 did not answer") && ran.err.contains("what to do"), "{}", ran.err);
    let ran = cluster.run(&["drain", "n1", "-o", "json"]).await.exits(3);
    let error: serde_json::Value = serde_json::from_str(&ran.err).unwrap();
    assert_eq!((&error["error"]["code"], &error["error"]["node"]), (&"UNAVAILABLE".into(), &"n1".into()));
    assert_eq!(asked(&cluster), [""; 0]);
}

#[tokio::test]
async fn drain_of_a_node_that_falls_silent_tells_what_was_done_and_does_not_call_it_drained() {
    let silence = || meanwhile(|script| script.nodes[0].reachable = false);
    let mut both = script(vec![workload("redis", "n1"), workload("cart", "n1")]);
    both.meanwhile.insert("redis".into(), silence());
    let cluster = Cluster::start(both).await;
    let report = report(&cluster, 1).await;
    assert_eq!(report["migrations"][0]["workload"], "redis");
    let left = &report["left_behind"];
    assert_eq!((left.as_array().unwrap().len(), &left[0]["workload"]), (1, &"cart".into()));
    assert_eq!((&left[0]["error"]["code"], &left[0]["error"]["node"]), (&"UNAVAILABLE".into(), &"n1".into()));
    assert_eq!(asked(&cluster), ["redis"]);

    let mut one = script(vec![workload("redis", "n1")]);
    one.meanwhile.insert("redis".into(), silence());
    let ran = Cluster::start(one).await.run(&["drain", "n1"]).await.exits(1);
    assert!(ran.out.contains("n1 may not be empty: 1 workloads moved"), "{}", ran.out);
    assert!(ran.err.contains("node n1 did not answer"), "{}", ran.err);
}

#[tokio::test]
async fn what_is_leaving_is_followed_whatever_its_copies_are() {
    // Committed, so that it counts as the target's already, where it does not run yet.
    let mut script = script(vec![moving("busy", "n1", "paused"), moving("held", "n2", "stopped")]);
    others(&mut script, "busy", ["n1", "n2"], succeeded());
    others(&mut script, "held", ["n1", "n2"], succeeded());
    let cluster = Cluster::start(script).await;
    let ran = cluster.run(&["drain", "n1"]).await.exits(0);
    assert!(ran.out.ends_with("n1 is drained: 2 workloads moved\n"), "{}", ran.out);
    others(&mut cluster.script.lock().unwrap(), "busy", ["n1", "n2"], failed("restore", "INTERNAL"));
    let report = report(&cluster, 1).await;
    assert_eq!(report["left_behind"].as_array().unwrap().len(), 1);
    assert_eq!(report["left_behind"][0]["workload"], "busy");
    assert_eq!(
        (&report["migrations"][1]["id"], &report["not_running"]),
        (&"other-held".into(), &serde_json::json!([]))
    );
    assert_eq!(asked(&cluster), [""; 0], "it is part of a migration");
}

#[tokio::test]
async fn what_is_lost_on_the_way_is_named_and_not_left_behind() {
    let mut script = script(vec![workload("redis", "n1"), workload("cart", "n1"), moving("late", "n2", "running")]);
    script.migrate.insert("cart".into(), of("cart", "m2", lost()));
    others(&mut script, "late", ["n2", "n1"], lost());
    let cluster = Cluster::start(script).await;
    let ran = cluster.run(&["drain", "n1", "--strategy", "live"]).await.exits(8);
    assert!(ran.out.ends_with("n1 is empty: 1 workloads moved, 2 lost: cart, late\n"), "{}", ran.out);
    assert!(ran.out.contains("cart was lost on its way: it runs nowhere\n"), "{}", ran.out);
    let report = report(&cluster, 8).await;
    assert_eq!(
        (&report["lost"], &report["left_behind"]),
        (&serde_json::json!(["cart", "late"]), &serde_json::json!([]))
    );
}

#[tokio::test]
async fn what_is_arriving_is_named_unless_it_stays_away() {
    let mut script = script(vec![workload("redis", "n1"), moving("late", "n2", "running")]);
    others(&mut script, "late", ["n2", "n1"], succeeded());
    let cluster = Cluster::start(script).await;
    let ran = cluster.run(&["drain", "n1"]).await.exits(1);
    assert!(ran.out.ends_with("n1 is not drained: 1 workloads moved, 1 left: late\n"), "{}", ran.out);
    assert!(ran.err.contains("late came to n1 while it was drained"), "{}", ran.err);
    others(&mut cluster.script.lock().unwrap(), "late", ["n2", "n1"], failed("restore", "INTERNAL"));
    let ran = cluster.run(&["drain", "n1"]).await.exits(0);
    assert!(ran.out.contains("late stays on n2"), "{}", ran.out);
    assert!(ran.out.ends_with("n1 is drained: 1 workloads moved\n"), "{}", ran.out);
    assert_eq!(asked(&cluster), ["redis", "redis"]);
}

#[tokio::test]
async fn what_others_do_during_a_drain_is_seen() {
    let mut script = script(vec![workload("redis", "n1"), workload("cart", "n1"), workload("shop", "n1")]);
    let conflict = Failure::new(FailureCode::AlreadyExists, "workload shop is part of migration other-shop already");
    script.migrate.insert("shop".into(), Answer::Refuse(conflict.clone()));
    // Somebody has moved the cart to where it must not be taken from, and begins to move another one here.
    let others_act = meanwhile(|script| {
        script.workloads = vec![workload("cart", "n2"), workload("shop", "n1"), moving("late", "n2", "running")];
        others(script, "late", ["n2", "n1"], succeeded());
    });
    script.meanwhile.insert("redis".into(), others_act);
    // Somebody is faster with the shop.
    let faster = meanwhile(|script| {
        script.workloads[1] = moving("shop", "n1", "running");
        others(script, "shop", ["n1", "n2"], succeeded());
    });
    script.meanwhile.insert("shop".into(), faster);
    let cluster = Cluster::start(script).await;
    let report = report(&cluster, 1).await;
    assert_eq!(asked(&cluster), ["redis", "shop"]);
    let migrations: Vec<_> = report["migrations"].as_array().unwrap().iter().map(|one| one["id"].clone()).collect();
    assert_eq!(migrations, ["own-redis", "other-shop", "other-late"]);
    let left: Vec<_> = report["left_behind"].as_array().unwrap().iter().map(|one| one["workload"].clone()).collect();
    assert_eq!(left, ["late"]);

    // A conflict with nothing that could be followed stands.
    cluster.script.lock().unwrap().workloads = vec![workload("shop", "n1")];
    let ran = cluster.run(&["drain", "n1"]).await.exits(1);
    assert!(ran.err.contains(&conflict.message), "{}", ran.err);
}

#[tokio::test]
async fn a_deadline_makes_large_ones_faster_and_begins_nothing_behind_it() {
    let sized = |name: &str, gib: u64| Workload { memory_bytes: gib << 30, ..workload(name, "n1") };
    let mut script = script(vec![sized("huge", 3), sized("small", 1), sized("vital", 2), sized("last", 4)]);
    // They begin after 0, 4, 8 and 12 s, or later on a machine that lets them wait.
    script.pace = std::time::Duration::from_secs(4);
    let cluster = Cluster::start(script).await;
    let flags = ["drain", "n1", "--deadline", "11s", "--priority", "vital=5", "--priority", "small=1", "-o", "json"];
    let ran = cluster.run(&flags).await.exits(1);
    let report: serde_json::Value = serde_json::from_str(&ran.out).unwrap();
    assert_eq!(asked(&cluster), ["vital", "small", "huge"], "by priority, then by size");
    // The first is expected to take most of a minute; by what was seen of it, the second not three seconds, and the third four.
    let strategies: Vec<_> = cluster.seen().iter().map(|seen| seen.request.strategy()).collect();
    assert_eq!(strategies, [Strategy::Warm, Strategy::Auto, Strategy::Warm]);
    let hurried: Vec<_> = report["hurried"].as_array().unwrap().iter().map(|one| one["workload"].clone()).collect();
    assert_eq!(hurried, ["vital", "huge"]);
    let left = &report["left_behind"];
    assert_eq!((left.as_array().unwrap().len(), &left[0]["workload"]), (1, &"last".into()), "{report:#}");
    assert_eq!((&left[0]["error"]["code"], &left[0]["migrated"]), (&"DEADLINE_EXCEEDED".into(), &false.into()));
    let message = left[0]["error"]["message"].as_str().unwrap();
    assert_eq!(message, "last was not begun: the deadline of 11 s has passed");
    cluster.run(&["drain", "n1", "--deadline", "soon"]).await.exits(2);
    cluster.run(&["drain", "n1", "--priority", "vital"]).await.exits(2);
}

#[tokio::test]
async fn what_auto_gives_up_because_it_writes_too_much_is_moved_warm() {
    let gave_up = |strategy: Strategy| {
        let end = Migration { strategy: strategy.into(), ..failed("precopy", "FAILED_PRECONDITION") };
        of("redis", "m1", end)
    };
    let cluster = Cluster::start(script(vec![workload("redis", "n1")])).await;
    let prepare = |end: Answer| {
        let mut script = cluster.script.lock().unwrap();
        script.migrate.insert("redis".into(), end);
        // The second time that it is asked for.
        let second = meanwhile(|script| {
            script.migrate.insert("redis".into(), of("redis", "m2", succeeded()));
        });
        script
            .meanwhile
            .insert("redis".into(), meanwhile(|script| drop(script.meanwhile.insert("redis".into(), second))));
    };
    prepare(gave_up(Strategy::Live));
    let ran = cluster.run(&["drain", "n1", "-o", "json"]).await.exits(0);
    let report: serde_json::Value = serde_json::from_str(&ran.out).unwrap();
    let strategies: Vec<_> = cluster.seen().iter().map(|seen| seen.request.strategy()).collect();
    assert_eq!(strategies, [Strategy::Auto, Strategy::Warm]);
    assert_eq!(report["migrations"].as_array().unwrap().len(), 2, "{report:#}");
    assert_eq!(
        (&report["hurried"][0]["workload"], &report["hurried"][0]["strategy"]),
        (&"redis".into(), &"warm".into())
    );
    assert_eq!(report["left_behind"], serde_json::json!([]), "{report:#}");
    // Who asks for live gets that or nothing.
    prepare(gave_up(Strategy::Live));
    cluster.run(&["drain", "n1", "--strategy", "live"]).await.exits(1);
    // And another failure is another matter.
    prepare(of("redis", "m1", failed("restore", "INTERNAL")));
    cluster.run(&["drain", "n1"]).await.exits(1);
}
