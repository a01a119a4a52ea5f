//! The demo's workloads in real containers of a local cluster, and its clients on the client side. Without agents: what
//! is tested is the stage, not the migration.
#![expect(clippy::unwrap_used, reason = "helpers of tests: a panic is how they fail")]

use std::{
    process::{Command, Stdio},
    sync::Once,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use podferry_bench::{
    clients::{self, LoadProcess},
    experiments::link::{LinkKind, ShapedLink},
    load::LoadReport,
    stage::{Interrupt, NODES, Program, Stage, Strategy},
};
use podferry_local::Place;

/// Builds what a cluster is made of: cargo builds only this package's own programs for its tests.
fn build_programs() {
    static BUILT: Once = Once::new();
    BUILT.call_once(|| {
        let of_podferry = ["podferry", "podferry-agent", "podferry-coordinator", "podferry-local", "podferry-runtime"];
        let mut podferry = vec!["--bins".to_owned()];
        podferry.extend(of_podferry.map(|package| format!("--package={package}")));
        let workloads = ["--package=podferry-workloads", "--bin=catalogue", "--bin=shopping-cart"];
        for arguments in [podferry, workloads.map(str::to_owned).into()] {
            let mut build = Command::new(env!("CARGO"));
            build.args(["build", "--quiet"]).args(arguments).current_dir(podferry_local::workspace_root());
            let built = build.status().expect("cargo runs");
            assert!(built.success(), "podferry's programs do not build");
        }
    });
}

fn stage() -> Stage {
    build_programs();
    Stage::up_as("test-stage", &Interrupt::default(), |options| Ok(options.without_agents()))
        .expect("the cluster comes up")
}

/// What all clients of all workloads saw in this time.
fn loaded(client: &Place, time: Duration) -> LoadReport {
    let mut load = Vec::new();
    for program in Program::ALL {
        for &(kind, count) in program.clients() {
            load.push(LoadProcess::start(client, kind, count, program.address()).unwrap());
        }
    }
    std::thread::sleep(time);
    let mut report = LoadReport::default();
    for process in load {
        report.merge(process.stop().unwrap());
    }
    report
}

#[test]
fn workloads_in_containers_serve_the_client_side_and_leave_nothing() {
    let stage = stage();
    let client = stage.cluster().client();
    for program in Program::ALL {
        stage.start(program, &stage.image(program).unwrap()).unwrap();
    }
    let before = clients::fill_redis(client, Program::Redis.address(), 2).unwrap();
    // Longer from time to time: the machine may be busy with other things.
    let is_served = [500, 2_000, 8_000, 32_000].into_iter().any(|milliseconds| {
        let report = loaded(client, Duration::from_millis(milliseconds));
        assert!(report.is_clean(), "{report:#?}");
        assert_eq!(report.clients.len(), 7);
        report.clients.iter().all(|client| client.requests > 20)
    });
    assert!(is_served, "a client had next to no answers");
    // Not the memory in use: that changes with every connection.
    let after = clients::redis_state(client, Program::Redis.address()).unwrap();
    assert_eq!((after.digest, after.keys), (before.digest, before.keys));
    let logs = stage.logs();
    stage.down().unwrap();
    assert!(!logs.exists());
}

#[test]
fn a_migration_that_cannot_be_asked_for_is_a_failed_hop() {
    let stage = stage();
    // There is no coordinator: the command line cannot reach one.
    let hop = stage.migrate(Program::Redis, Strategy::Warm, NODES[0], NODES[1]).unwrap();
    let problem = hop.outcome.unwrap_err();
    assert!(!problem.is_empty());
    assert!(hop.end_unix_ms >= hop.start_unix_ms);
    stage.down().unwrap();
}

#[test]
fn a_workload_can_be_removed_and_started_again() {
    let stage = stage();
    let image = stage.image(Program::Redis).unwrap();
    for _ in 0..2 {
        stage.start(Program::Redis, &image).unwrap();
        let redis = clients::fill_redis(stage.cluster().client(), Program::Redis.address(), 1).unwrap();
        assert_eq!(redis.keys, 256);
        stage.remove(Program::Redis).unwrap();
    }
    stage.down().unwrap();
}

#[test]
fn an_interrupted_demo_takes_everything_away() {
    build_programs();
    let mut demo = Command::new(env!("CARGO_BIN_EXE_podferry-bench"))
        .args(["demo", "--quick"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let id = demo.id();
    let prefix = format!("pf-{id}-");
    let namespaces = || {
        let entries = std::fs::read_dir("/run/netns").into_iter().flatten().flatten();
        entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix)).count()
    };
    let folders = || {
        let demos = podferry_local::workspace_root().join(".podferry/demo");
        let own = format!("{id}-");
        let entries = std::fs::read_dir(demos).into_iter().flatten().flatten();
        entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(&own)).count()
    };
    let since = Instant::now();
    while namespaces() < 5 && since.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(10));
    }
    let (up, folder) = (namespaces(), folders());
    // Into the middle of the moves.
    std::thread::sleep(Duration::from_secs(3));
    kill(Pid::from_raw(id.try_into().unwrap()), Signal::SIGINT).unwrap();
    let asked = Instant::now();
    let mut status = demo.try_wait().unwrap();
    while status.is_none() && asked.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(50));
        status = demo.try_wait().unwrap();
    }
    if status.is_none() {
        let _ = demo.kill();
        let _ = demo.wait();
    }
    assert_eq!((up, folder), (5, 1));
    assert!(!status.expect("it ends within a minute").success());
    assert_eq!((namespaces(), folders()), (0, 0));
}

/// How long it takes until a closed port of the second node answers, in ms: the least of some tries, so one round trip.
fn round_trip_ms(from: &Place, to: std::net::Ipv4Addr) -> f64 {
    let script = format!(
        "for try in 1 2 3 4 5; do
             since=$EPOCHREALTIME; (echo > /dev/tcp/{to}/9) 2>/dev/null && exit 1
             until=$EPOCHREALTIME; echo $((${{until/./}} - ${{since/./}}))
         done"
    );
    let said = from.check(["bash", "-c", &script]).unwrap();
    let micros = said.lines().map(|line| line.trim().parse::<f64>().unwrap());
    micros.reduce(f64::min).expect("it was tried") / 1e3
}

#[test]
fn a_far_node_is_far_from_the_other_node_alone_and_near_again_behind_it() {
    let stage = stage();
    let cluster = stage.cluster();
    let (near, far) = (cluster.node(NODES[0]).unwrap(), cluster.node(NODES[1]).unwrap());
    let between = || round_trip_ms(&near, far.address());
    // What a shell takes to start is in each of them.
    let at_first = between();
    for mbit in [None, Some(100)] {
        let link = ShapedLink::new(cluster, LinkKind { mbit, rtt_ms: 40.0 }).unwrap();
        let (between_nodes, from_client) = (between(), round_trip_ms(cluster.client(), far.address()));
        assert!((40.0..60.0 + at_first).contains(&between_nodes), "{between_nodes} ms, {at_first} ms without it");
        assert!(from_client < 30.0 + at_first, "{from_client} ms");
        drop(link);
        let back = between();
        assert!(back < 30.0 + at_first, "{back} ms");
    }
    stage.down().unwrap();
}
