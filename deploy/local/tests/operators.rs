//! What operators ask of a cluster: whether its nodes are fit, whether its agents serve, and to empty a node.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

mod support;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;

use podferry_common::identity::{Identity, Peer};
use podferry_common::tls;
use podferry_local::{AGENT_PORT, LocalCluster, Output, REST_PORT, Signal};
use serde_json::{Value, json};
use support::{Line, NODES, Stage, inside, redis};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

/// Exit codes of the command line, as its help lists them.
const DONE: i32 = 0;
const FAILED: i32 = 1;
const REFUSED: i32 = 3;
const NOT_FOUND: i32 = 4;
const UNREACHABLE: i32 = 5;

/// What runs, each with an address of its own.
const RUNNING: [&str; 4] = ["four", "one", "three", "two"];
/// What does not.
const STOPPED: &str = "stopped";

/// Runs the command line with JSON; it has to end with this code.
fn ask(cluster: &LocalCluster, words: &[&str], code: i32) -> Output {
    let output = cluster.podferry(words.iter().copied().chain(["--output", "json"])).unwrap();
    assert_eq!(output.status.code(), Some(code), "{words:?}: {}{}", output.stdout, output.stderr);
    output
}

/// The same, and its answer: one line of JSON.
fn answer(cluster: &LocalCluster, words: &[&str], code: i32) -> Value {
    let output = ask(cluster, words, code);
    serde_json::from_str(output.stdout.trim()).unwrap_or_else(|error| panic!("{error}: {}", output.stdout))
}

/// The error that it ended with.
fn error(cluster: &LocalCluster, words: &[&str], code: i32) -> Value {
    let output = ask(cluster, words, code);
    let last = output.stderr.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()).next_back();
    last.unwrap_or_else(|| panic!("no error in JSON: {}", output.stderr))["error"].clone()
}

#[test]
fn check_tells_the_fit_from_the_unreachable_and_agents_answer_health_and_reflection() {
    let stage = Stage::up(&[]);
    let cluster = &stage.cluster;
    let nodes = answer(cluster, &["check"], DONE);
    assert_eq!(nodes.as_array().unwrap().len(), NODES.len());
    for (node, name) in nodes.as_array().unwrap().iter().zip(NODES) {
        assert_eq!((&node["name"], &node["reachable"], &node["fit"]), (&json!(name), &json!(true), &json!(true)));
        assert_eq!(node["complaints"], json!([]));
        assert!(node["criu_version"].as_str().unwrap().starts_with("4."), "{node}");
        assert_eq!(node["architecture"], std::env::consts::ARCH);
    }
    let shown = cluster.podferry(["check"]).unwrap().success().unwrap();
    assert!(NODES.iter().all(|name| shown.contains(name)), "{shown}");

    for name in NODES {
        health_and_reflection(&stage, name);
    }
    assert_eq!(by_curl(cluster, "nodes").as_array().unwrap().len(), NODES.len());
    assert_eq!(by_curl(cluster, "workloads"), answer(cluster, &["workloads"], DONE));

    stage.node(NODES[1]).kill_agent(Signal::KILL).unwrap();
    let nodes = answer(cluster, &["check"], FAILED);
    assert_eq!(nodes[0]["reachable"], true);
    assert_eq!((&nodes[1]["reachable"], &nodes[1]["fit"]), (&json!(false), &json!(false)));
    assert!(nodes[1]["complaints"].to_string().contains(NODES[1]), "{nodes}");

    cluster.coordinator().kill(Signal::KILL).unwrap();
    let error = error(cluster, &["check"], UNREACHABLE);
    assert!(error["message"].as_str().unwrap().contains(&cluster.coordinator().address()), "{error}");
    assert!(!error["remedy"].as_str().unwrap().is_empty());
}

/// A list, as `curl` gets it over REST on the client side.
fn by_curl(cluster: &LocalCluster, list: &str) -> Value {
    let name = Peer::Coordinator.dns_name();
    let files = cluster.client_identity();
    let mut curl = cluster.client().command("curl");
    curl.args(["--silent", "--show-error", "--fail-with-body", "--max-time", "20"]);
    curl.args(["--connect-to", &format!("{name}:{REST_PORT}:{}", cluster.coordinator().rest_address())]);
    curl.arg("--cacert").arg(files.ca).arg("--cert").arg(files.certificate).arg("--key").arg(files.key);
    let output = curl.arg(format!("https://{name}:{REST_PORT}/api/v1/{list}")).output().unwrap();
    let (said, complaint) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}{complaint}");
    serde_json::from_str::<Value>(&said).unwrap()[list].clone()
}

/// As a monitor or `grpcurl` asks, with a client's certificate.
fn health_and_reflection(stage: &Stage, name: &str) {
    let identity = Identity::load(stage.cluster.client_identity()).unwrap();
    let address = format!("{}:{AGENT_PORT}", stage.node(name).address());
    let expected = Peer::Agent(name.parse().unwrap());
    let asking = async {
        let channel = tls::connect(&address, &identity, &expected).await.unwrap();
        let mut health = HealthClient::new(channel.clone());
        for service in ["podferry.v1.AgentService", ""] {
            let request = HealthCheckRequest { service: service.to_owned() };
            let answer = health.check(request).await.unwrap().into_inner();
            assert_eq!(answer.status(), ServingStatus::Serving, "{service:?}");
        }
        let unknown = HealthCheckRequest { service: "podferry.v1.Nothing".to_owned() };
        assert_eq!(health.check(unknown).await.unwrap_err().code(), tonic::Code::NotFound);

        let mut reflection = ServerReflectionClient::new(channel);
        let mut ask = async |question| {
            let request = ServerReflectionRequest { host: String::new(), message_request: Some(question) };
            let answers = reflection.server_reflection_info(tokio_stream::once(request)).await;
            answers.unwrap().into_inner().message().await.unwrap().unwrap().message_response.unwrap()
        };
        let MessageResponse::ListServicesResponse(list) = ask(MessageRequest::ListServices(String::new())).await else {
            panic!("reflection does not list the services")
        };
        let served: Vec<&str> = list.service.iter().map(|service| service.name.as_str()).collect();
        for service in ["podferry.v1.AgentService", "podferry.v1.TransferService", "grpc.health.v1.Health"] {
            assert!(served.contains(&service), "{service} is not among {served:?}");
            let symbol = MessageRequest::FileContainingSymbol(service.to_owned());
            let described = ask(symbol).await;
            assert!(matches!(described, MessageResponse::FileDescriptorResponse(_)), "{service}: {described:?}");
        }
    };
    let namespace = Path::new("/run/netns").join(stage.cluster.client().netns());
    inside(&namespace, || {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(asking);
    });
}

fn address(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 88, 0, 100 + number)
}

/// All on the first node, each with a connection and something to remember.
fn crowd(stage: &Stage) -> Vec<Line> {
    let mut lines = Vec::new();
    for (name, number) in RUNNING.into_iter().zip(0..) {
        stage.start(&redis(name, address(number)));
        let mut line = stage.connect(SocketAddr::new(address(number).into(), 6379));
        assert_eq!(line.ask(&format!("SET name {name}")), "+OK");
        lines.push(line);
    }
    let dead = stage.start(&redis(STOPPED, address(9)));
    assert!(dead.process.signal(Signal::KILL));
    assert!(dead.process.wait_gone(std::time::Duration::from_secs(10)));
    lines
}

/// Who was moved, where to, and how that ended, in the order of their names.
fn moved(report: &Value) -> Vec<[&str; 3]> {
    let migrations = report["migrations"].as_array().unwrap().iter();
    let mut moved: Vec<_> =
        migrations.map(|one| ["workload", "target", "phase"].map(|key| one[key].as_str().unwrap())).collect();
    moved.sort_unstable();
    moved
}

fn assert_alive(lines: &mut [Line]) {
    for (line, name) in lines.iter_mut().zip(RUNNING) {
        assert_eq!(line.ask_bulk("GET name"), name);
    }
}

#[test]
fn drain_empties_a_node_and_names_what_it_has_to_leave() {
    let workloads: Vec<&str> = RUNNING.into_iter().chain([STOPPED]).collect();
    let stage = Stage::up(&workloads);
    let cluster = &stage.cluster;
    let [first, second] = NODES;
    let mut lines = crowd(&stage);
    let unknown = error(cluster, &["drain", "node-z"], NOT_FOUND);
    assert!(unknown["message"].as_str().unwrap().contains("node-z"), "{unknown}");

    // One after the other, in the order of what was asked for.
    let ordered = "--concurrency 1 --priority three=3 --priority one=2 --priority four=1 --priority two=-1";
    let words: Vec<_> = ["drain", first].into_iter().chain(ordered.split_whitespace()).collect();
    let report = answer(cluster, &words, DONE);
    assert_eq!(moved(&report), RUNNING.map(|name| [name, second, "succeeded"]));
    let order: Vec<_> = report["migrations"].as_array().unwrap().iter().map(|one| one["workload"].clone()).collect();
    assert_eq!(order, ["three", "one", "four", "two"]);
    assert_eq!((&report["node"], &report["left_behind"]), (&json!(first), &json!([])));
    for name in RUNNING {
        assert_eq!(stage.places(name), [second]);
    }
    assert_alive(&mut lines);

    let again = answer(cluster, &["drain", first], DONE);
    assert_eq!((moved(&again), &again["left_behind"]), (Vec::new(), &json!([])));

    // One cannot go back, and keeps nobody else from it: two at a time.
    stage.node(first).remove_workload("three").unwrap();
    let report = answer(cluster, &["drain", second], FAILED);
    let back: Vec<_> = moved(&report).into_iter().filter(|[name, ..]| *name != "three").collect();
    assert_eq!(back, ["four", "one", "two"].map(|name| [name, first, "succeeded"]));
    let left = report["left_behind"].as_array().unwrap();
    assert_eq!(left.len(), 1, "{report:#}");
    assert_eq!(left[0]["workload"], "three");
    let why = &left[0]["error"];
    assert!(why["message"].as_str().unwrap().contains("config.json is missing"), "{why}");
    assert!(why["remedy"].as_str().unwrap().contains("bundle"), "{why}");
    assert_eq!(stage.places("three"), [second]);
    assert_alive(&mut lines);

    let evacuations = answer(cluster, &["evacuations"], DONE);
    let phases: Vec<_> = evacuations.as_array().unwrap().iter().map(|one| [&one["node"], &one["phase"]]).collect();
    assert_eq!(phases, [[second, "incomplete"], [first, "complete"], [first, "complete"]]);
    assert_eq!(by_curl(cluster, "evacuations"), evacuations);

    // Nobody can go anywhere; for people.
    stage.node(first).kill_agent(Signal::KILL).unwrap();
    let output = cluster.podferry(["drain", second]).unwrap();
    assert_eq!(output.status.code(), Some(FAILED), "{}{}", output.stdout, output.stderr);
    assert!(output.stdout.contains("node-b is not drained: 0 workloads moved, 1 left: three"), "{}", output.stdout);
    assert!(output.stderr.contains(first), "{}", output.stderr);
    assert_alive(&mut lines);

    // A silent node is no empty one.
    let silent = error(cluster, &["drain", first], REFUSED);
    assert_eq!((&silent["code"], &silent["node"]), (&json!("UNAVAILABLE"), &json!(first)));
    assert!(silent["message"].as_str().unwrap().contains(first), "{silent}");
}
