//! The real program against a coordinator with scripted answers, over real mutual TLS: what it prints, and how it ends.
#![expect(clippy::unwrap_used, reason = "the helpers of these tests panic as the tests do")]
#![expect(unreachable_pub, reason = "the helpers are for this file only")]

mod drain;
mod support;

use std::process::Stdio;
use std::time::{Duration, Instant, SystemTime};

use podferry_common::identity::{Identity, IdentityFiles, LocalCa, Peer};
use podferry_common::{Failure, FailureCode, tls};
use podferry_proto::v1::{
    Connections, Decision, KeptConnections, ListConnectionsResponse, Migration, Node, Phase, Problem, ProtocolVersion,
    RelayedConnection, Round, Strategy, Timings, TransferProgress, Workload,
};
use support::{Answer, Cluster, Script, podferry, program, run};
use tokio::io::{AsyncBufReadExt, BufReader};

const MIB: u64 = 1 << 20;
const ID: &str = "0199aa00000070008000000000000001";

fn begun() -> Migration {
    Migration {
        id: ID.into(),
        workload: "redis".into(),
        strategy: Strategy::Warm.into(),
        source: "n1".into(),
        target: "n2".into(),
        phase: Phase::Preflight.into(),
        created_at: "2026-11-23T21:00:00Z".into(),
        keeps_connections: true,
        requested_by: "ada.client.podferry.internal".to_owned(),
        notes: vec!["placement: n2 has 4 GiB free, n3 has no CRIU".into()],
        ..Default::default()
    }
}

fn frozen(raw: u64) -> Migration {
    let progress = TransferProgress { raw_bytes: raw, wire_bytes: raw / 4, expected_bytes: 256 * MIB };
    Migration { phase: Phase::Freeze.into(), progress: Some(progress), ..begun() }
}

fn succeeded() -> Migration {
    let round = Round {
        pages: 65536,
        raw_bytes: 256 * MIB,
        wire_bytes: 64 * MIB,
        duration_ms: 210.123_456,
        ..Round::default()
    };
    let timings = Timings {
        preflight: 12.5,
        prepare: 3.25,
        precopy: 0.0,
        freeze: 412.75,
        dump: 180.0,
        transfer: 210.5,
        restore: 150.125,
        commit: 1.5,
        resume: 4.0,
        fill: 0.0,
    };
    Migration {
        phase: Phase::Succeeded.into(),
        downtime_ms: 431.062_5,
        total_ms: 520.0,
        rounds: vec![round],
        wire_bytes: 64 * MIB + 1234,
        timings: Some(timings),
        ..begun()
    }
}

/// A live migration while memory is copied, after so many rounds.
fn copying(rounds: usize) -> Migration {
    let round = |(pages, dirty_rate, predicted_ms): (u64, f64, f64)| Round {
        pages,
        raw_bytes: pages << 12,
        wire_bytes: pages << 11,
        duration_ms: 80.5,
        dirty_rate,
        predicted_ms,
        cpu_limit: 0.0,
    };
    let all = [(65_536, 3_141.0, 140.25), (3_072, 850.0, 13.6), (700, 0.0, 0.0)];
    let rounds = all.into_iter().take(rounds).map(round).collect();
    Migration { strategy: Strategy::Live.into(), phase: Phase::Precopy.into(), rounds, ..begun() }
}

fn lost() -> Migration {
    let Migration { strategy, rounds, .. } = copying(3);
    let decision = Decision::Commit.into();
    Migration { strategy, rounds, decision, downtime_ms: 14.5, total_ms: 900.0, ..failed("fill", "DATA_LOSS") }
}

fn failed(phase: &str, code: &str) -> Migration {
    let problem = Problem {
        code: code.into(),
        node: "n2".into(),
        phase: phase.into(),
        message: "CRIU cannot restore the process tree".into(),
        criu_line: "Error (criu/cr-restore.c:2391): Can't restore".into(),
        remedy: "update CRIU on n2".into(),
    };
    let reason = problem.message.clone();
    Migration { phase: Phase::Failed.into(), reason, problem: Some(problem), ..begun() }
}

fn node(name: &str) -> Node {
    Node {
        name: name.into(),
        address: format!("{name}:7441"),
        reachable: true,
        fit: true,
        architecture: "x86_64".into(),
        kernel: "6.18.0".into(),
        cpu_model: "AMD EPYC".into(),
        criu_version: "4.2.1".into(),
        runc_version: "1.3.6".into(),
        cgroup_version: 2,
        agent_version: "0.1.0".into(),
        memory_total: 8 << 30,
        memory_available: 4 << 30,
        workloads: vec!["redis".into(), "cart".into()],
        features: ["agent:cold", "agent:post_copy", "criu:mem_dirty_track", "kernel:tcp_repair"]
            .map(String::from)
            .to_vec(),
        complaints: Vec::new(),
    }
}

/// As on a kernel that tells which pages were written.
fn tracking(mut node: Node) -> Node {
    node.features.push("kernel:write_tracking".into());
    node
}

fn workload(name: &str, node: &str) -> Workload {
    Workload {
        name: name.into(),
        node: node.into(),
        status: "running".into(),
        memory_bytes: 256 * MIB,
        processes: 5,
        addresses: vec!["10.0.0.2".into()],
        migration_id: String::new(),
    }
}

fn accepting(states: Vec<Migration>) -> Script {
    Script { migrate: [("redis".to_owned(), Answer::Accept(states))].into(), ..Default::default() }
}

const MOVE: [&str; 5] = ["migrate", "redis", "--to", "n2", "--wait"];
const MOVE_JSON: [&str; 7] = ["migrate", "redis", "--to", "n2", "--wait", "--output", "json"];

#[tokio::test]
async fn the_json_of_a_migration_is_fixed() {
    let cluster = Cluster::start(accepting(vec![begun(), frozen(0), succeeded()])).await;
    let ran = cluster.run(&MOVE_JSON).await.exits(0);
    insta::assert_snapshot!("succeeded_json", ran.out);
    assert_eq!(cluster.run(&["describe", ID, "--output", "json"]).await.exits(0).out, ran.out);
    let listed = cluster.run(&["migrations", "--output", "json"]).await.exits(0).out;
    assert_eq!(listed.trim_end(), format!("[{}]", ran.out.trim_end()));

    let seen = cluster.seen();
    assert_eq!(seen[0].peer, Peer::client("alice").unwrap());
    assert_eq!(seen[0].request.target, "n2");
    assert_eq!((seen[0].request.strategy(), seen[0].request.allow_restart), (Strategy::Auto, false));
}

#[tokio::test]
async fn keys_are_there_before_anything_is_known() {
    let cluster = Cluster::start(accepting(vec![begun()])).await;
    let ran = cluster.run(&["migrate", "redis", "-o", "json", "--strategy", "live", "--no-compression"]).await.exits(0);
    insta::assert_snapshot!("begun_json", ran.out);
    let closing = Migration { keeps_connections: false, notes: Vec::new(), ..succeeded() };
    cluster.script.lock().unwrap().migrations.insert(ID.into(), vec![closing]);
    let ran = cluster.run(&["describe", ID, "-o", "json"]).await.exits(0);
    let end = "\"keeps_connections\":false,\"notes\":[],\"strategy_reason\":\"\",\"requested_by\":\"ada.client.podferry.internal\"}\n";
    assert!(ran.out.ends_with(end), "{}", ran.out);
    let request = cluster.seen()[0].request.clone();
    assert_eq!((request.strategy(), request.target.as_str(), request.no_compression), (Strategy::Live, "", true));
}

#[tokio::test]
async fn people_get_lines_and_a_result() {
    let cluster = Cluster::start(accepting(vec![begun(), frozen(0), frozen(128 * MIB), succeeded()])).await;
    // One line a second at most: twice that is also more than a second on a machine that lets us wait.
    cluster.script.lock().unwrap().pace = Duration::from_secs(2);
    let ran = cluster.run(&MOVE).await.exits(0);
    insta::assert_snapshot!("succeeded_table", ran.out);
    let lines: Vec<&str> = ran.err.lines().collect();
    assert_eq!(lines.len(), 4, "{lines:#?}");
    assert_eq!(lines[0], "redis n1 → n2: preflight");
    assert!(lines[2].contains("freeze 128.00 MiB of 256.00 MiB, ") && lines[2].ends_with(" left"), "{}", lines[2]);
    insta::assert_snapshot!("describe_table", cluster.run(&["describe", ID]).await.exits(0).out);
}

#[tokio::test]
async fn a_live_migration_tells_its_rounds() {
    let end = Migration { strategy: Strategy::Live.into(), rounds: copying(3).rounds, ..succeeded() };
    let cluster = Cluster::start(accepting(vec![begun(), copying(1), copying(2), end])).await;
    cluster.script.lock().unwrap().pace = Duration::from_millis(300);
    let flags = "--strategy live --downtime-budget 40 --bandwidth-limit 100M --verify --connections keep --connections-deadline 2h";
    let flags: Vec<_> = flags.split(' ').collect();
    let ran = cluster.run(&[&MOVE[..], &flags].concat()).await.exits(0);
    insta::assert_snapshot!("live_lines", ran.err);
    let described = cluster.run(&["describe", ID]).await.exits(0).out;
    insta::assert_snapshot!("live_rounds", described.split_once("\nrounds\n").unwrap().1);
    let json = cluster.run(&["describe", ID, "-o", "json"]).await.exits(0).out;
    assert!(json.contains(r#""dirty_rate":850.0,"predicted_ms":13.6,"cpu_limit":0.0}"#), "{json}");
    let request = cluster.seen()[0].request.clone();
    assert_eq!((request.strategy(), request.bandwidth_limit, request.verify), (Strategy::Live, 100 * MIB, true));
    assert!(!request.throttle && !request.accept_loss);
    assert_eq!((request.connections(), request.connections_deadline_s), (Connections::Keep, 7200));
    assert_eq!(request.downtime_budget_ms.to_bits(), 40.0_f64.to_bits());
    for wrong in [["--downtime-budget", "0"], ["--downtime-budget", "60001"], ["--bandwidth-limit", "fast"]] {
        cluster.run(&[&["migrate", "redis"][..], &wrong].concat()).await.exits(2);
    }
}

#[tokio::test]
async fn what_was_chosen_is_told_with_its_reason_and_nothing_before() {
    let undecided = Migration { strategy: Strategy::Unspecified.into(), ..begun() };
    let reason = "live: 256.0 MiB of 256.0 MiB can be copied while it runs. Not cold: needs --allow-restart";
    let end = Migration { strategy: Strategy::Live.into(), strategy_reason: reason.into(), ..succeeded() };
    let cluster = Cluster::start(accepting(vec![undecided.clone(), end.clone()])).await;
    let ran = cluster.run(&[&MOVE[..], &["--allow-restart"]].concat()).await.exits(0);
    assert!(ran.out.ends_with(&format!("\nchosen       {reason}\n")), "{}", ran.out);
    assert!(cluster.seen()[0].request.allow_restart);
    let described = cluster.run(&["describe", ID]).await.exits(0).out;
    assert!(described.contains(&format!("\nconnections  move along\nchosen       {reason}\n")), "{described}");
    let described: serde_json::Value =
        serde_json::from_str(&cluster.run(&["describe", ID, "-o", "json"]).await.exits(0).out).unwrap();
    assert_eq!((&described["strategy"], &described["strategy_reason"]), (&"live".into(), &reason.into()));
    cluster.script.lock().unwrap().migrations.insert(ID.into(), vec![undecided]);
    let described: serde_json::Value =
        serde_json::from_str(&cluster.run(&["describe", ID, "-o", "json"]).await.exits(0).out).unwrap();
    assert_eq!(described["strategy"], "");
    assert!(cluster.run(&["describe", ID]).await.exits(0).out.contains("\nstrategy     -\n"));
}

#[tokio::test]
async fn connections_that_have_outlived_a_move_are_listed_and_are_part_of_its_description() {
    let connection = |port: u16, received_bytes| RelayedConnection {
        local: "10.244.1.7:6379".into(),
        peer: format!("10.244.2.3:{port}"),
        received_bytes,
        sent_bytes: received_bytes.map(|bytes| bytes * 10),
    };
    let kept = KeptConnections {
        migration_id: ID.into(),
        workload: "redis".into(),
        home_node: "n1".into(),
        node: "n2".into(),
        addresses: vec!["10.244.1.7".into()],
        since: "2026-12-01T03:00:00Z".into(),
        until: "2026-12-01T03:10:00Z".into(),
        connections: 3,
        some: vec![connection(40_000, Some(4096)), connection(40_001, None)],
    };
    let cluster = Cluster::start(accepting(vec![begun(), succeeded()])).await;
    assert_eq!(cluster.run(&["connections"]).await.exits(0).out, "no connections to old addresses\n");
    cluster.run(&MOVE).await.exits(0);
    cluster.script.lock().unwrap().connections =
        ListConnectionsResponse { kept: vec![kept], silent_nodes: vec!["n3".into()] };
    let listed = cluster.run(&["connections", "redis", "--node", "n1"]).await.exits(0);
    insta::assert_snapshot!(listed.out, @r#"
    WORKLOAD  WITH              TO               RECEIVED  SENT       THROUGH  NODE  SINCE                 ENDS BY
    redis     10.244.2.3:40000  10.244.1.7:6379  4.00 KiB  40.00 KiB  n1       n2    2026-12-01T03:00:00Z  2026-12-01T03:10:00Z
    redis     10.244.2.3:40001  10.244.1.7:6379  -         -          n1       n2    2026-12-01T03:00:00Z  2026-12-01T03:10:00Z
    redis has 1 more through n1
    "#);
    assert_eq!(listed.err, "n3 does not answer: what lives on there is not known\n");
    let json = cluster.run(&["connections", "-o", "json"]).await.exits(0).out;
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(
        (&json["kept"][0]["some"][1]["sent_bytes"], &json["silent_nodes"][0]),
        (&serde_json::Value::Null, &"n3".into())
    );
    let described = cluster.run(&["describe", ID]).await.exits(0).out;
    assert!(described.contains("\nliving       3 through n1, until 2026-12-01T03:10:00Z at most"), "{described}");
}

#[tokio::test]
async fn a_throttled_migration_tells_what_its_rounds_were_held_to() {
    let throttled = |rounds| {
        let mut migration = copying(rounds);
        if let Some(second) = migration.rounds.get_mut(1) {
            second.cpu_limit = 0.784_32;
        }
        migration
    };
    let end = Migration { strategy: Strategy::Live.into(), rounds: throttled(3).rounds, ..succeeded() };
    let cluster = Cluster::start(accepting(vec![begun(), throttled(2), end])).await;
    cluster.script.lock().unwrap().pace = Duration::from_millis(300);
    let ran = cluster.run(&[&MOVE[..], &["--strategy", "live", "--throttle"]].concat()).await.exits(0);
    assert!(ran.err.contains("freeze would add 14 ms  throttled to 0.78 CPUs\n"), "{}", ran.err);
    let described = cluster.run(&["describe", ID]).await.exits(0).out;
    insta::assert_snapshot!("throttled_rounds", described.split_once("\nrounds\n").unwrap().1);
    let json = cluster.run(&["describe", ID, "-o", "json"]).await.exits(0).out;
    assert!(json.contains(r#""predicted_ms":13.6,"cpu_limit":0.784}"#), "{json}");
    assert!(cluster.seen()[0].request.throttle);
}

#[tokio::test]
async fn a_lost_workload_is_not_said_to_stay_anywhere() {
    let cluster = Cluster::start(accepting(vec![begun(), lost()])).await;
    let ran = cluster.run(&MOVE).await.exits(8);
    assert_eq!(
        ran.out.trim_end(),
        format!(
            "redis was lost on its way from n1 to n2: it runs nowhere; the migration {ID} failed behind its commit"
        )
    );
    cluster.run(&["watch", ID]).await.exits(8);
    let described = cluster.run(&["describe", ID]).await.exits(0).out;
    assert!(described.contains("phase        failed, behind the commit"), "{described}");
    let json = cluster.run(&["describe", ID, "-o", "json"]).await.exits(0).out;
    assert!(json.contains(r#""phase":"failed""#), "{json}");
}

#[tokio::test]
async fn a_terminal_gets_a_bar_with_rate_and_time_left() {
    let states = (0..8).map(|eighth| frozen(eighth * 32 * MIB)).chain([succeeded()]).collect();
    let cluster = Cluster::start(accepting(states)).await;
    cluster.script.lock().unwrap().pace = Duration::from_millis(250);
    let identity = cluster.identity();
    let own = env!("CARGO_BIN_EXE_podferry");
    let line =
        format!("{own} --coordinator {} --identity {} migrate redis --wait", cluster.address, identity.display());
    // `script` gives the program a terminal.
    let mut command = program("script".as_ref(), &["--quiet", "--return", "--command", &line, "/dev/null"]);
    command.env("TERM", "xterm");
    let ran = run(command).await.exits(0);
    assert!(ran.out.contains("256.00 MiB") && ran.out.contains("MiB/s"), "{:?}", ran.out);
    assert!(ran.out.contains(" left") && ran.out.contains('█'), "{:?}", ran.out);
    assert!(ran.out.contains("redis moved from n1 to n2"), "{:?}", ran.out);
    assert!(!ran.out.contains("n2: freeze"), "lines beside the bar: {:?}", ran.out);
}

#[tokio::test]
async fn a_failed_migration_says_what_where_why_and_what_to_do() {
    let cluster = Cluster::start(accepting(vec![begun(), failed("restore", "INTERNAL")])).await;
    let ran = cluster.run(&MOVE).await.exits(1);
    assert!(ran.out.starts_with("redis stays on n1"), "{}", ran.out);
    insta::assert_snapshot!("failure", ran.err.lines().skip(2).collect::<Vec<_>>().join("\n"));

    let ran = cluster.run(&MOVE_JSON).await.exits(1);
    insta::assert_snapshot!("failed_json", ran.out);
    insta::assert_snapshot!("error_json", ran.err.lines().last().unwrap());
    cluster.run(&["watch", ID]).await.exits(1);
    let described = cluster.run(&["describe", ID]).await.exits(0).out;
    assert!(described.contains("criu/cr-restore.c:2391"), "{described}");
}

#[tokio::test]
async fn what_preflight_refuses_is_a_refusal() {
    let refused = failed("preflight", "FAILED_PRECONDITION");
    let cluster = Cluster::start(accepting(vec![begun(), refused])).await;
    cluster.run(&MOVE).await.exits(3);
    let broken = failed("preflight", "UNAVAILABLE");
    let cluster = Cluster::start(accepting(vec![begun(), broken])).await;
    cluster.run(&MOVE).await.exits(1);
}

#[tokio::test]
async fn every_refusal_has_its_exit_code() {
    let cases = [
        (FailureCode::InvalidArgument, 2),
        (FailureCode::FailedPrecondition, 3),
        (FailureCode::AlreadyExists, 3),
        (FailureCode::ResourceExhausted, 3),
        (FailureCode::PermissionDenied, 3),
        (FailureCode::Unimplemented, 3),
        (FailureCode::NotFound, 4),
        // The coordinator answered, and named the node that cannot be reached.
        (FailureCode::Unavailable, 3),
        (FailureCode::DeadlineExceeded, 5),
        (FailureCode::Aborted, 1),
        (FailureCode::Internal, 7),
        (FailureCode::DataLoss, 7),
    ];
    let cluster = Cluster::start(Script::default()).await;
    for (code, exit) in cases {
        let failure = Failure::new(code, "no").on("n1").in_phase("preflight").criu_line("Error: x").remedy("wait");
        cluster.script.lock().unwrap().migrate.insert("redis".into(), Answer::Refuse(failure.clone()));
        let ran = cluster.run(&MOVE).await.exits(exit);
        for part in ["error: no", "node:       n1", "phase:      preflight", "Error: x", "what to do: wait"] {
            assert!(ran.err.contains(part), "{part}: {}", ran.err);
        }
        let ran = cluster.run(&MOVE_JSON).await.exits(exit);
        assert_eq!(ran.err.trim_end(), format!("{{\"error\":{}}}", serde_json::to_string(&failure).unwrap()));
        assert_eq!(ran.out, "");
    }
    let stopping = Failure::new(FailureCode::Unavailable, "the coordinator is stopping");
    cluster.script.lock().unwrap().migrate.insert("redis".into(), Answer::Refuse(stopping));
    cluster.run(&MOVE).await.exits(5);
    cluster.run(&["migrate", "nobody"]).await.exits(4);
    for verb in ["describe", "watch", "cancel"] {
        cluster.run(&[verb, "nothing"]).await.exits(4);
    }
}

#[tokio::test]
async fn a_cancelled_migration_has_its_own_code() {
    let cancelled = Migration { phase: Phase::Cancelled.into(), reason: "cancelled by alice".into(), ..begun() };
    let cluster = Cluster::start(accepting(vec![begun(), cancelled])).await;
    let ran = cluster.run(&MOVE).await.exits(6);
    assert!(ran.out.contains("was cancelled") && ran.err.contains("cancelled by alice"), "{ran:#?}");
    let ran = cluster.run(&["cancel", ID]).await.exits(0);
    assert!(ran.out.contains("rolling_back"), "{}", ran.out);
    cluster.script.lock().unwrap().cancel = Some(Failure::new(FailureCode::FailedPrecondition, "it is committed"));
    cluster.run(&["cancel", ID]).await.exits(3);
}

#[tokio::test]
async fn a_watch_outlives_broken_streams_and_prints_each_state_as_json() {
    let mut script = accepting(vec![begun()]);
    script.migrations.insert(ID.into(), vec![begun(), frozen(MIB), succeeded()]);
    script.broken_watches = 2;
    let cluster = Cluster::start(script).await;
    let ran = cluster.run(&["watch", ID, "--output", "json"]).await.exits(0);
    let phases: Vec<String> = ran
        .out
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["phase"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(phases, ["preflight", "preflight", "preflight", "freeze", "succeeded"]);
}

#[tokio::test]
async fn an_interrupted_wait_leaves_the_migration() {
    let mut script = accepting(vec![begun()]);
    script.endless_watches = true;
    let cluster = Cluster::start(script).await;
    let mut command = cluster.command(&MOVE);
    let mut child = command.stderr(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    assert!(lines.next_line().await.unwrap().unwrap().contains("preflight"));
    let pid = child.id().unwrap().to_string();
    assert!(program("kill".as_ref(), &["-INT", &pid]).status().await.unwrap().success());
    let said = tokio::time::timeout(Duration::from_secs(20), lines.next_line()).await.unwrap().unwrap().unwrap();
    assert!(said.contains(&format!("podferry cancel {ID}")), "{said}");
    assert_eq!(child.wait().await.unwrap().code(), Some(130));
}

#[tokio::test]
async fn lists_are_tables_and_json() {
    let lost = Node {
        reachable: false,
        fit: false,
        complaints: vec!["the agent does not answer".into()],
        name: "n2".into(),
        address: "n2:7441".into(),
        ..Default::default()
    };
    let script = Script {
        nodes: vec![tracking(node("n1")), lost, node("n3"), Node { fit: false, ..node("n4") }],
        workloads: vec![workload("redis", "n1"), workload("cart", "n2")],
        ..Default::default()
    };
    let cluster = Cluster::start(script).await;
    insta::assert_snapshot!("nodes_table", cluster.run(&["nodes"]).await.exits(0).out);
    insta::assert_snapshot!("nodes_json", cluster.run(&["nodes", "-o", "json"]).await.exits(0).out);
    insta::assert_snapshot!("workloads_table", cluster.run(&["workloads"]).await.exits(0).out);
    insta::assert_snapshot!(
        "workloads_json",
        cluster.run(&["workloads", "--node", "n1", "-o", "json"]).await.exits(0).out
    );
    let silent = cluster.run(&["workloads", "--node", "n2"]).await.exits(3);
    assert!(silent.err.contains("node n2 did not answer"), "{}", silent.err);
    assert_eq!(cluster.run(&["migrations", "-o", "json"]).await.exits(0).out, "[]\n");
    cluster.script.lock().unwrap().migrations.insert(ID.into(), vec![succeeded()]);
    insta::assert_snapshot!("migrations_table", cluster.run(&["migrations"]).await.exits(0).out);
    assert_eq!(cluster.run(&["migrations", "--active"]).await.exits(0).out, "no migrations\n");
}

#[tokio::test]
async fn check_fails_if_a_node_is_unfit() {
    let cluster = Cluster::start(Script { nodes: vec![node("n1"), node("n2")], ..Default::default() }).await;
    cluster.run(&["check"]).await.exits(0);
    let old = vec!["CRIU 3.17 is too old for kernel 6.18.0: at least 4.2.1 is needed".to_owned()];
    cluster.script.lock().unwrap().nodes[1] =
        Node { fit: false, criu_version: "3.17".into(), complaints: old, ..node("n2") };
    insta::assert_snapshot!("check_table", cluster.run(&["check"]).await.exits(1).out);
    cluster.run(&["check", "-o", "json"]).await.exits(1);
    cluster.script.lock().unwrap().nodes.clear();
    cluster.run(&["check"]).await.exits(3);
}

#[tokio::test]
async fn who_is_not_trusted_or_not_there_is_unreachable() {
    let cluster = Cluster::start(Script::default()).await;
    let with = |address: &str, identity: &std::path::Path| {
        let mut command = podferry(&["nodes"]);
        command.env("PODFERRY_COORDINATOR", address).env("PODFERRY_IDENTITY", identity);
        run(command)
    };
    with(&cluster.address, &cluster.identity()).await.exits(0);

    // Another authority: neither side trusts the other.
    let other = LocalCa::create(&cluster.folder().join("other")).unwrap();
    let folder = cluster.folder().join("stranger");
    let files = podferry_common::identity::IdentityFiles::in_folder(&folder);
    other.issue(&Peer::client("eve").unwrap(), Duration::from_secs(60), &files).unwrap();
    let ran = with(&cluster.address, &folder).await.exits(5);
    assert!(ran.err.contains("UnknownIssuer") && ran.err.contains("what to do"), "{}", ran.err);

    // It trusts our coordinator, but the coordinator does not trust it.
    std::fs::copy(cluster.identity().join("ca.pem"), folder.join("ca.pem")).unwrap();
    let ran = with(&cluster.address, &folder).await.exits(5);
    assert!(ran.err.contains("trusts this client's certificate"), "{}", ran.err);
    assert!(ran.err.contains("UnknownCA"), "the coordinator's own reason: {}", ran.err);

    // An expired certificate.
    let expired = cluster.issue(&Peer::client("late").unwrap(), Duration::from_secs(1));
    tokio::time::sleep(Duration::from_millis(2100)).await;
    let ran = with(&cluster.address, &expired).await.exits(5);
    // The alert's name, not "expired": our own warning has that word too.
    assert!(ran.err.contains("CertificateExpired"), "the coordinator's own reason: {}", ran.err);

    cluster.stop().await;
    let started = Instant::now();
    let ran = with(&cluster.address, &cluster.identity()).await.exits(5);
    assert!(ran.err.contains(&cluster.address) && ran.err.contains("refused"), "{}", ran.err);
    assert!(started.elapsed() < Duration::from_secs(15), "{:?}", started.elapsed());
}

#[tokio::test]
async fn an_agent_is_no_coordinator() {
    let cluster = Cluster::start(Script::default()).await;
    let agent = cluster.issue(&Peer::Agent("n1".parse().unwrap()), Duration::from_secs(600));
    let identity =
        podferry_common::identity::Identity::load(podferry_common::identity::IdentityFiles::in_folder(agent));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let _incoming = podferry_common::tls::Incoming::new(listener, &identity.unwrap());
    let mut command = podferry(&["nodes", "--coordinator", &address, "--identity"]);
    command.arg(cluster.identity());
    let ran = run(command).await.exits(5);
    assert!(ran.err.contains("not valid for name"), "{}", ran.err);
}

#[tokio::test]
async fn an_older_protocol_is_refused() {
    let version = Some(ProtocolVersion { current: 9, oldest: 8 });
    let cluster = Cluster::start(Script { version, ..Default::default() }).await;
    let ran = cluster.run(&["nodes"]).await.exits(3);
    assert!(ran.err.contains("no common protocol version"), "{}", ran.err);
}

#[tokio::test]
async fn certificates_that_it_makes_are_good_for_connections() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let make = |arguments: &[&str]| {
        let mut command = podferry(&["certificates"]);
        command.args(arguments).current_dir(folder);
        run(command)
    };
    let issue = |name: &str, to: &str| make(&["issue", name, to, "--ca", "authority"]);
    let ran = issue("coordinator.podferry.internal", "c").await.exits(2);
    assert!(ran.err.contains("certificates ca authority"), "{}", ran.err);
    assert!(make(&["ca", "authority"]).await.exits(0).out.contains("keep authority/ca-key.pem to yourself"));
    let ran = make(&["ca", "authority"]).await.exits(3);
    assert!(ran.err.contains("already"), "{}", ran.err);

    issue("coordinator.podferry.internal", "c").await.exits(0);
    let ran =
        make(&["issue", "ada.client.podferry.internal", "ada", "--ca", "authority", "--hours", "2", "-o", "json"]);
    let json = r#"{"name":"ada.client.podferry.internal","ca":"ada/ca.pem","certificate":"ada/cert.pem","key":"ada/key.pem","hours":2}"#;
    assert_eq!(ran.await.exits(0).out.trim_end(), json);
    let load = |name: &str| Identity::load(IdentityFiles::in_folder(folder.join(name))).unwrap();
    let (coordinator, ada) = (load("c"), load("ada"));
    let minutes = |identity: &Identity| identity.not_after().duration_since(SystemTime::now()).unwrap().as_secs() / 60;
    assert_eq!((minutes(&coordinator), minutes(&ada)), (23 * 60 + 59, 60 + 59));

    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let accepting = tokio::spawn(async move { tls::accept(listener.accept().await.unwrap().0, &coordinator).await });
    tls::dial(&address, &ada, &Peer::Coordinator).await.unwrap();
    assert_eq!(accepting.await.unwrap().unwrap().1.peer, Peer::client("ada").unwrap());

    for wrong in ["n1", "coordinator.example.org", ".agent.podferry.internal"] {
        let ran = issue(wrong, "w").await.exits(2);
        assert!(ran.err.contains("peer"), "{}", ran.err);
    }
    make(&["issue", "n1.agent.podferry.internal", "w", "--ca", "authority", "--hours", "0"]).await.exits(2);
    assert!(!folder.join("w").exists());
}

#[tokio::test]
async fn usage_errors_are_2_and_say_what_is_missing() {
    let identity = tempfile::tempdir().unwrap();
    let folder = identity.path().to_str().unwrap();
    let cases: [(&[&str], &str); 7] = [
        (&[], "Usage"),
        (&["fly"], "unrecognized subcommand"),
        (&["migrate"], "<WORKLOAD>"),
        (&["migrate", "redis", "--strategy", "magic"], "hybrid"),
        (&["nodes"], "PODFERRY_COORDINATOR"),
        (&["nodes", "--coordinator", "x:1"], "PODFERRY_IDENTITY"),
        (&["nodes", "--coordinator", "x:1", "--identity", folder], "ca.pem"),
    ];
    for (arguments, said) in cases {
        let ran = run(podferry(arguments)).await.exits(2);
        assert!(ran.err.contains(said), "{arguments:?}: {}", ran.err);
    }
}

#[tokio::test]
async fn help_lists_exit_codes_and_kubectl_gets_its_own_name() {
    let ran = run(podferry(&["--help"])).await.exits(0);
    insta::assert_snapshot!("help", ran.out);
    let documented = include_str!("../../docs/cli.md");
    let (_, codes) = ran.out.split_once("Exit codes:\n").unwrap();
    for line in codes.lines() {
        let (code, meaning) = line.trim().split_once("  ").unwrap();
        assert!(
            documented.contains(&format!("| {code} | {meaning} |")),
            "docs/cli.md lacks exit code {code}: {meaning}"
        );
    }
    let folder = tempfile::tempdir().unwrap();
    let plugin = folder.path().join("kubectl-podferry");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_podferry"), &plugin).unwrap();
    let ran = run(program(&plugin, &["migrate", "--help"])).await.exits(0);
    assert!(ran.out.contains("Usage: kubectl podferry migrate"), "{}", ran.out);

    let cluster = Cluster::start(Script { nodes: vec![node("n1")], ..Default::default() }).await;
    let mut command = program(&plugin, &["nodes", "--coordinator", &cluster.address, "--identity"]);
    command.arg(cluster.identity());
    assert!(run(command).await.exits(0).out.contains("n1"));
}

#[tokio::test]
async fn completions_know_verbs_and_strategies() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let ran = run(podferry(&["completions", shell])).await.exits(0);
        assert!(ran.out.contains("migrate"), "{shell}: {}", ran.out);
        // clap's elvish and powershell completions have no values of flags.
        let values = ["bash", "zsh", "fish"].contains(&shell);
        assert_eq!(ran.out.contains("application"), values, "{shell}: {}", ran.out);
    }
    // bash takes its completions.
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("completions");
    std::fs::write(&file, run(podferry(&["completions", "bash"])).await.out).unwrap();
    let probe = format!(
        "source {}; COMP_WORDS=(podferry dr); COMP_CWORD=1; _podferry podferry dr podferry; echo ${{COMPREPLY[@]}}",
        file.display()
    );
    let ran = run(program("bash".as_ref(), &["-c", &probe])).await.exits(0);
    assert_eq!(ran.out, "drain\n");
}
