//! `drain` and `evacuations`: what is asked for, what is told of what becomes of it, and what is not called done.

use std::process::Stdio;

use podferry_common::{Failure, FailureCode};
use podferry_proto::v1::{
    Connections, EvacuatedState, EvacuatedWorkload, Evacuation, EvacuationOrder, EvacuationPhase, Migration, Problem,
    Strategy,
};

use super::support::{Cluster, Script, ran};
use super::{failed, lost, succeeded};

const ID: &str = "evac-0123456789abcdef0123456789abcdef";

fn one(workload: &str, state: EvacuatedState, migrations: &[&str]) -> EvacuatedWorkload {
    let migration_ids = migrations.iter().map(ToString::to_string).collect();
    EvacuatedWorkload { workload: workload.into(), state: state.into(), migration_ids, ..Default::default() }
}

fn left(workload: &str, code: &str, message: &str, migrations: &[&str]) -> EvacuatedWorkload {
    let problem = Problem { code: code.into(), message: message.into(), ..Default::default() };
    EvacuatedWorkload { problem: Some(problem), ..one(workload, EvacuatedState::LeftBehind, migrations) }
}

fn at(phase: EvacuationPhase, workloads: Vec<EvacuatedWorkload>) -> Evacuation {
    let ended = !matches!(phase, EvacuationPhase::Running | EvacuationPhase::Cancelling);
    Evacuation {
        id: ID.into(),
        node: "n1".into(),
        phase: phase.into(),
        strategy: Strategy::Auto.into(),
        created_at: "2026-11-30T12:00:00Z".into(),
        ended_at: if ended { "2026-11-30T12:01:00Z".into() } else { String::new() },
        requested_by: "ada.client.podferry.internal".into(),
        workloads,
        ..Default::default()
    }
}

/// A node whose evacuation goes through these states, and how its migrations end.
fn script(states: Vec<Evacuation>, migrations: &[(&str, &str, Migration)]) -> Script {
    let ends = migrations.iter().map(|(id, workload, end)| {
        let named = Migration { id: (*id).into(), workload: (*workload).into(), ..end.clone() };
        ((*id).to_owned(), vec![named])
    });
    Script { evacuations: [("n1".to_owned(), Ok(states))].into(), migrations: ends.collect(), ..Default::default() }
}

fn running(workloads: Vec<EvacuatedWorkload>) -> Evacuation {
    at(EvacuationPhase::Running, workloads)
}

#[tokio::test]
async fn drain_tells_what_becomes_of_each_workload_and_what_is_left() {
    use EvacuatedState::{Moved, Moving, NotRunning, Waiting};
    let begun = running(vec![one("redis", Moving, &["m1"]), one("cart", Waiting, &[]), one("old", NotRunning, &[])]);
    let left = left("cart", "INTERNAL", "CRIU failed", &["m2"]);
    let ended = at(
        EvacuationPhase::Incomplete,
        vec![
            one("redis", Moved, &["m1"]),
            left,
            one("old", NotRunning, &[]),
            one("late", EvacuatedState::Elsewhere, &[]),
        ],
    );
    let ends = [("m1", "redis", succeeded()), ("m2", "cart", failed("restore", "INTERNAL"))];
    let cluster = Cluster::start(script(vec![begun, ended], &ends)).await;
    let ran = cluster.run(&["drain", "n1"]).await.exits(1);
    insta::assert_snapshot!("table", ran.out);
    assert!(ran.err.contains(&format!("n1 is being emptied by {ID}")), "{}", ran.err);
    assert!(ran.err.contains("error: CRIU failed"), "{}", ran.err);

    let ran = cluster.run(&["drain", "n1", "--output", "json"]).await.exits(1);
    let report: serde_json::Value = serde_json::from_str(&ran.out).unwrap();
    assert_eq!((&report["node"], &report["evacuation"]), (&"n1".into(), &ID.into()));
    assert_eq!(report["migrations"].as_array().unwrap().len(), 2, "{report:#}");
    assert_eq!(report["left_behind"][0]["workload"], "cart");
    assert_eq!(report["left_behind"][0]["migrated"], true);
    assert_eq!(report["not_running"][0], "old");
    cluster.run(&["drain", "n9"]).await.exits(4);
}

#[tokio::test]
async fn what_is_asked_for_is_what_the_flags_say() {
    let cluster = Cluster::start(script(vec![at(EvacuationPhase::Complete, Vec::new())], &[])).await;
    cluster.run(&["drain", "n1"]).await.exits(0);
    let flags = "drain n1 --strategy live --accept-loss --allow-restart --deadline 2m --priority redis=5 --priority cart=-1 \
                 --concurrency 3 --bandwidth-limit 10M --cordon --lowest-first -l app=shop --downtime-budget 50 --verify --throttle \
                 --grace-period 7 --no-compression --connections close";
    cluster.run(&flags.split_whitespace().collect::<Vec<_>>()).await.exits(0);
    let asked = std::mem::take(&mut cluster.script.lock().unwrap().evacuated);
    assert_eq!((asked[0].strategy(), asked[0].deadline_s, asked[0].concurrency), (Strategy::Auto, 0, 0));
    assert!(!asked[0].accept_loss && !asked[0].allow_restart && asked[0].priorities.is_empty());
    assert_eq!((asked[1].strategy(), asked[1].deadline_s, asked[1].concurrency), (Strategy::Live, 120, 3));
    assert!(asked[1].accept_loss && asked[1].allow_restart);
    assert_eq!((asked[0].connections(), asked[1].connections()), (Connections::Unspecified, Connections::Close));
    assert_eq!(asked[1].priorities, [("redis".to_owned(), 5), ("cart".to_owned(), -1)].into());
    assert_eq!(asked[1].bandwidth_limit, 10 << 20);
    assert!(!asked[0].cordon && asked[0].order() == EvacuationOrder::HighestFirst && asked[0].selector.is_empty());
    assert!(asked[1].cordon && asked[1].verify && asked[1].throttle && asked[1].no_compression);
    assert_eq!((asked[1].order(), asked[1].selector.as_str()), (EvacuationOrder::LowestFirst, "app=shop"));
    assert_eq!((asked[0].grace_period_s, asked[1].grace_period_s), (None, Some(7)));
    assert!((asked[1].downtime_budget_ms - 50.0).abs() < 1e-9);
    for wrong in [["--deadline", "soon"], ["--priority", "redis"], ["--concurrency", "0"]] {
        cluster.run(&["drain", "n1", wrong[0], wrong[1]]).await.exits(2);
    }
}

#[tokio::test]
async fn a_silent_node_is_refused_with_its_name() {
    let silent = Failure::new(FailureCode::Unavailable, "node n1 did not answer").on("n1").remedy("see that it runs");
    let evacuations = [("n1".to_owned(), Err(silent))].into();
    let cluster = Cluster::start(Script { evacuations, ..Default::default() }).await;
    let ran = cluster.run(&["drain", "n1"]).await.exits(3);
    assert_eq!(ran.out, "");
    assert!(ran.err.contains("node n1 did not answer") && ran.err.contains("what to do"), "{}", ran.err);
    let ran = cluster.run(&["drain", "n1", "-o", "json"]).await.exits(3);
    let error: serde_json::Value = serde_json::from_str(&ran.err).unwrap();
    assert_eq!((&error["error"]["code"], &error["error"]["node"]), (&"UNAVAILABLE".into(), &"n1".into()));
}

#[tokio::test]
async fn an_older_coordinator_is_told_apart() {
    let cluster = Cluster::start(Script::default()).await;
    for words in [vec!["drain", "n1"], vec!["evacuations"], vec!["watch", ID], vec!["cancel", ID]] {
        let ran = cluster.run(&words).await.exits(3);
        assert!(ran.err.contains("from before evacuations"), "{}", ran.err);
        assert!(ran.err.contains("podferry workloads --node NODE"), "{}", ran.err);
    }
}

#[tokio::test]
async fn a_node_that_fell_silent_is_not_called_drained() {
    let mut ended = at(EvacuationPhase::Incomplete, vec![one("redis", EvacuatedState::Moved, &["m1"])]);
    ended.problem = Some(Problem { code: "UNAVAILABLE".into(), message: "n1 is silent".into(), ..Default::default() });
    let cluster = Cluster::start(script(vec![ended], &[("m1", "redis", succeeded())])).await;
    let ran = cluster.run(&["drain", "n1"]).await.exits(1);
    assert!(ran.out.contains("n1 may not be empty: 1 workloads moved"), "{}", ran.out);
}

#[tokio::test]
async fn what_is_lost_on_the_way_is_named_and_not_left_behind() {
    let workloads = vec![one("redis", EvacuatedState::Moved, &["m1"]), one("cart", EvacuatedState::Lost, &["m2"])];
    let ended = at(EvacuationPhase::Incomplete, workloads);
    let ends = [("m1", "redis", succeeded()), ("m2", "cart", lost())];
    let cluster = Cluster::start(script(vec![ended], &ends)).await;
    let ran = cluster.run(&["drain", "n1"]).await.exits(8);
    assert!(ran.out.ends_with("n1 is empty: 1 workloads moved, 1 lost: cart\n"), "{}", ran.out);
    assert!(ran.out.contains("cart was lost on its way: it runs nowhere\n"), "{}", ran.out);
}

#[tokio::test]
async fn what_is_hurried_and_what_will_be_late_is_said_at_once() {
    let hurried = EvacuatedWorkload {
        hurried_strategy: Strategy::Warm.into(),
        hurried_why: "time is short".into(),
        ..one("redis", EvacuatedState::Moving, &["m1"])
    };
    let late = EvacuatedWorkload { late: "it is huge".into(), ..one("huge", EvacuatedState::Waiting, &[]) };
    let mut ended = at(
        EvacuationPhase::Incomplete,
        vec![
            EvacuatedWorkload { state: EvacuatedState::Moved.into(), ..hurried.clone() },
            left("huge", "DEADLINE_EXCEEDED", "huge was not begun: the deadline of 60 s has passed", &[]),
        ],
    );
    ended.deadline_at = "2026-11-30T12:01:00Z".into();
    let states = vec![running(vec![hurried, late]), ended];
    let cluster = Cluster::start(script(states, &[("m1", "redis", succeeded())])).await;
    let ran = cluster.run(&["drain", "n1", "--deadline", "60"]).await.exits(1);
    assert!(ran.err.contains("redis moves warm: time is short"), "{}", ran.err);
    assert!(ran.err.contains("huge is not expected to be away by the deadline: it is huge"), "{}", ran.err);
    let ran = cluster.run(&["drain", "n1", "--deadline", "60", "-o", "json"]).await.exits(1);
    let report: serde_json::Value = serde_json::from_str(&ran.out).unwrap();
    assert_eq!((&report["hurried"][0]["strategy"], &report["late"][0]["workload"]), (&"warm".into(), &"huge".into()));
    assert_eq!(report["left_behind"][0]["error"]["code"], "DEADLINE_EXCEEDED");
}

#[tokio::test]
async fn a_drain_goes_on_over_a_broken_watch_and_one_that_was_cancelled_says_so() {
    let begun = running(vec![one("redis", EvacuatedState::Waiting, &[])]);
    let ended = at(EvacuationPhase::Cancelled, vec![left("redis", "ABORTED", "cancelled by client bob", &[])]);
    let broken = Script { broken_watches: 2, ..script(vec![begun, ended], &[]) };
    let ran = Cluster::start(broken).await.run(&["drain", "n1"]).await.exits(6);
    assert!(ran.out.contains("n1 is not drained: it was cancelled; 0 workloads moved, 1 left: redis"), "{}", ran.out);
    assert_eq!(ran.err.matches("cancelled by client bob").count(), 1, "{}", ran.err);
}

#[tokio::test]
async fn who_does_not_wait_gets_the_id_and_finds_it_again() {
    let waiting = EvacuatedWorkload { waits_for: "n2 is full".into(), ..one("cart", EvacuatedState::Waiting, &[]) };
    let moved = EvacuatedWorkload {
        target: "n2".into(),
        memory_bytes: 64 << 20,
        downtime_ms: 81.5,
        total_ms: 1250.0,
        ..one("redis", EvacuatedState::Moved, &["m1"])
    };
    let state = Evacuation { moved: 1, remaining: 1, ..running(vec![moved, waiting]) };
    let cluster = Cluster::start(script(vec![state], &[("m1", "redis", succeeded())])).await;
    let begun = cluster.run(&["drain", "n1", "--no-wait", "-o", "json"]).await.exits(0);
    let begun: serde_json::Value = serde_json::from_str(&begun.out).unwrap();
    assert_eq!((&begun["id"], &begun["phase"], &begun["remaining"]), (&ID.into(), &"running".into(), &1.into()));
    let list = cluster.run(&["evacuations"]).await.exits(0).out;
    let shown = cluster.run(&["describe", ID]).await.exits(0).out;
    let cancelled = cluster.run(&["cancel", ID]).await.exits(0).out;
    assert!(cancelled.contains("cancelling"), "{cancelled}");
    insta::assert_snapshot!("evacuation", format!("{list}\n{shown}"));
}

#[tokio::test]
async fn ctrl_c_ends_the_watch_and_not_the_evacuation() {
    let begun = running(vec![one("redis", EvacuatedState::Waiting, &[])]);
    let cluster = Cluster::start(Script { endless_watches: true, ..script(vec![begun], &[]) }).await;
    let mut command = cluster.command(&["watch", ID]);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    let interrupted = std::process::Command::new("kill").args(["-INT", &child.id().unwrap().to_string()]).status();
    assert!(interrupted.unwrap().success());
    let ran = ran(child.wait_with_output().await.unwrap()).exits(130);
    assert!(ran.err.contains(&format!("podferry cancel {ID}")), "{}", ran.err);
}
