//! Containers whose address cannot move along, because their network namespace is not one given by path: their connections
//! are closed and nothing else is lost, and whoever asks is told so.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

mod support;

use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::time::Duration;

use podferry_local::{FIRST_CONTAINER_ADDRESS, Network, Workload};
use serde_json::Value;
use support::{Line, NODES, Stage, eventually, inside, redis};

const NAME: &str = "redis";
/// How soon a client hears that its connection is closed, once the migration has ended: at once, but not on a machine that
/// is busy with other things. One that nobody closes is silent for ever.
const SOON: Duration = Duration::from_secs(20);
/// What Redis holds: seconds on the slow link.
const KEYS: &str = "DEBUG POPULATE 3000 filler 2000";
const SLOW: &str = "tc qdisc add dev node-b root tbf rate 16mbit burst 64kb latency 100ms";
const FAST: &str = "tc qdisc del dev node-b root";

fn workload(network: Network) -> Workload {
    Workload { network, ..redis(NAME, FIRST_CONTAINER_ADDRESS) }
}

/// What `podferry describe` shows to people.
fn described(stage: &Stage, record: &Value) -> String {
    let id = record["id"].as_str().unwrap();
    stage.cluster.podferry(["describe", id]).unwrap().success().unwrap()
}

fn assert_told(stage: &Stage, record: &Value, connections: usize) {
    let told = described(stage, record);
    let note =
        format!("{connections} established TCP connections are closed: the container's address cannot move along");
    for words in ["are closed\n", &note] {
        assert!(told.contains(words), "{words:?} is missing in:\n{told}");
    }
}

#[test]
fn connections_to_a_nodes_own_address_are_closed_when_its_container_moves() {
    let stage = Stage::up(&[NAME]);
    stage.start(&workload(Network::OfNode));
    let address = |node: &str| SocketAddr::new(stage.node(node).address().into(), 6379);
    let mut line = stage.connect(address(NODES[0]));
    assert_eq!(line.ask(KEYS), "+OK");
    assert_eq!(line.ask("SET kept yes"), "+OK");

    undo_in_the_middle(&stage);
    assert_eq!(line.ask("INCR counter"), ":1", "an undone migration cost its connection");

    for (from, to) in [(NODES[0], NODES[1]), (NODES[1], NODES[0])] {
        let mut idle = stage.connect(address(from));
        let mut waiting = stage.connect(address(from));
        assert_eq!(idle.ask("PING"), "+PONG");
        // Its answer is under way for as long as the migration takes.
        waiting.post("BLPOP nothing 0");
        let record = stage.migrate(NAME, to);
        for mut closed in [line, idle, waiting] {
            closed.assert_closed(SOON);
        }
        assert_told(&stage, &record, 3);
        line = stage.connect(address(to));
        assert_eq!(line.ask_bulk("GET kept"), "yes");
        assert_eq!(line.ask("DBSIZE"), ":3002");
        only_client(&mut line);
    }
}

/// Cancels a migration while the tasks are frozen and their memory is on its way.
fn undo_in_the_middle(stage: &Stage) {
    stage.cluster.fabric().shell(SLOW).unwrap();
    let words = ["migrate", NAME, "--to", NODES[1], "--strategy", "warm", "--no-compression", "--output", "json"];
    let begun: Value = serde_json::from_str(&stage.cluster.podferry(words).unwrap().success().unwrap()).unwrap();
    let id = begun["id"].as_str().unwrap();
    let phase = |wanted: &'static str| {
        eventually(Duration::from_secs(20), || {
            let said = stage.cluster.podferry(["describe", id, "--output", "json"]).unwrap().success().unwrap();
            let now: Value = serde_json::from_str(&said).unwrap();
            (now["phase"] == wanted).then_some(()).ok_or_else(|| format!("{now:#}"))
        });
    };
    phase("freeze");
    // On this link all of it takes four seconds and more. How much is sent is told too late to wait for it.
    std::thread::sleep(Duration::from_secs(1));
    stage.cluster.podferry(["cancel", id]).unwrap().success().unwrap();
    phase("cancelled");
    stage.cluster.fabric().shell(FAST).unwrap();
    assert_eq!(stage.places(NAME), [NODES[0]]);
}

/// Redis sees by itself that the others are gone.
fn only_client(line: &mut Line) {
    eventually(Duration::from_secs(10), || {
        let clients = line.ask_bulk("CLIENT LIST");
        (clients.lines().count() == 1).then_some(()).ok_or(clients)
    });
}

#[test]
fn connections_in_a_network_that_runc_made_are_closed_when_it_moves() {
    let stage = Stage::up(&[NAME]);
    stage.start(&workload(Network::Lonely));
    let connect = |node: &str| {
        let pid = stage.node(node).container_process(NAME).unwrap().pid;
        let namespace = PathBuf::from(format!("/proc/{pid}/ns/net"));
        let connecting = || inside(&namespace, || TcpStream::connect((Ipv4Addr::LOCALHOST, 6379)));
        Line::new(eventually(Duration::from_secs(20), || connecting().map_err(|error| error.to_string())))
    };
    let mut line = connect(NODES[0]);
    assert_eq!(line.ask("SET kept yes"), "+OK");
    for to in [NODES[1], NODES[0]] {
        let record = stage.migrate(NAME, to);
        line.assert_closed(SOON);
        assert_told(&stage, &record, 1);
        line = connect(to);
        assert_eq!(line.ask_bulk("GET kept"), "yes");
        only_client(&mut line);
    }
}
