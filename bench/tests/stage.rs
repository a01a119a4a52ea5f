//! The demo's workloads in real containers of a local cluster, and its clients on the client side. Without agents: what
//! is tested is the stage, not the migration.

use std::time::Duration;

use podferry_bench::{
    clients::{self, LoadProcess},
    load::LoadReport,
    stage::{Interrupt, NODES, Program, Stage},
};
use podferry_local::Options;

fn stage() -> Stage {
    Stage::up_as("test-stage", &Interrupt::default(), Options::without_agents).expect("the cluster comes up")
}

#[test]
fn workloads_in_containers_serve_the_client_side_and_leave_nothing() {
    let stage = stage();
    let client = stage.cluster().client();
    for program in Program::ALL {
        stage.start(program, &stage.image(program).unwrap()).unwrap();
    }
    let before = clients::fill_redis(client, Program::Redis.address(), 2).unwrap();
    let mut load = Vec::new();
    for program in Program::ALL {
        for &(kind, count) in program.clients() {
            load.push(LoadProcess::start(client, kind, count, program.address()).unwrap());
        }
    }
    std::thread::sleep(Duration::from_millis(500));
    let mut report = LoadReport::default();
    for process in load {
        report.merge(process.stop().unwrap());
    }
    assert!(report.is_clean(), "{report:#?}");
    assert_eq!(report.clients.len(), 7);
    assert!(report.clients.iter().all(|client| client.requests > 20), "{report:#?}");
    assert_eq!(clients::redis_state(client, Program::Redis.address()).unwrap(), {
        let mut expected = before.clone();
        expected.used_bytes = clients::redis_state(client, Program::Redis.address()).unwrap().used_bytes;
        expected
    });
    let logs = stage.logs();
    stage.down().unwrap();
    assert!(!logs.exists());
}

#[test]
fn a_migration_that_cannot_be_asked_for_is_a_failed_hop() {
    let stage = stage();
    // There is no coordinator: the command line cannot reach one.
    let hop = stage.migrate(Program::Redis, NODES[0], NODES[1]).unwrap();
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
