//! New instances that take the place of old ones: nothing that was acknowledged is lost, nobody who asks for the first time is refused, and
//! what fails on the way leaves the old one as it was.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

mod support;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use podferry_local::{FIRST_CONTAINER_ADDRESS, Network, Signal, Workload};
use serde_json::Value;
use support::{NODES, Stage, eventually, image, inside, redis, redis_address, redis_rootfs};

const APPLICATION: &[&str] = &["--strategy", "application"];
const PATIENCE: Duration = Duration::from_secs(60);

fn annotated(workload: Workload, annotations: &[(&str, &str)]) -> Workload {
    let named = |(name, value): &(&str, &str)| {
        let suffix = if name.is_empty() { String::new() } else { format!(".{name}") };
        (format!("podferry.dev/application{suffix}"), (*value).to_owned())
    };
    Workload { annotations: annotations.iter().map(named).collect(), ..workload }
}

fn client_netns(stage: &Stage) -> PathBuf {
    PathBuf::from("/run/netns").join(stage.cluster.client().netns())
}

fn phase(record: &Value) -> &str {
    record["phase"].as_str().unwrap()
}

/// Asks Redis something over a connection of its own.
fn ask_redis(netns: &Path, question: &str) -> Result<String, String> {
    Connection::open(netns, redis_address()).and_then(|mut connection| connection.ask(question))
}

/// A connection that may break.
struct Connection(TcpStream);

impl Connection {
    fn open(netns: &Path, address: SocketAddr) -> Result<Self, String> {
        let dialled = inside(netns, || TcpStream::connect_timeout(&address, Duration::from_secs(10)));
        let stream = dialled.map_err(|error| format!("it cannot be connected to: {error}"))?;
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.set_nodelay(true).unwrap();
        Ok(Self(stream))
    }

    /// One line and the answer's first bytes, without their end.
    fn ask(&mut self, question: &str) -> Result<String, String> {
        self.0.write_all(format!("{question}\r\n").as_bytes()).map_err(|error| error.to_string())?;
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n") {
            let mut byte = [0];
            let read = self.0.read(&mut byte).map_err(|error| error.to_string())?;
            if read == 0 {
                return Err("it was closed".to_owned());
            }
            answer.push(byte[0]);
        }
        Ok(String::from_utf8_lossy(&answer).trim_end().to_owned())
    }
}

/// Does something again and again until it is told to stop; gives what came of it.
struct Loop<T> {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<T>,
}

impl<T: Send + 'static> Loop<T> {
    fn start(work: impl FnOnce(&dyn Fn() -> bool) -> T + Send + 'static) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        Self { stop, thread: thread::spawn(move || work(&|| told.load(Ordering::Relaxed))) }
    }

    fn end(self) -> T {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

/// What a writer has seen.
#[derive(Debug, Default)]
struct Written {
    /// Keys up to this one were acknowledged.
    acknowledged: u64,
    breaks: u64,
    longest: Duration,
}

/// Sets keys one after the other; one without an answer is set again over another connection.
fn write_keys(netns: PathBuf) -> Loop<Written> {
    Loop::start(move |stopped| {
        let mut written = Written::default();
        let mut connection = None;
        let mut last = Instant::now();
        while !stopped() {
            let key = written.acknowledged + 1;
            let answer = match &mut connection {
                Some(open) => Connection::ask(open, &format!("SET key:{key} {key}")),
                None => match Connection::open(&netns, redis_address()) {
                    Ok(open) => {
                        connection = Some(open);
                        continue;
                    }
                    Err(error) => Err(error),
                },
            };
            match answer.as_deref() {
                Ok("+OK") => {
                    written.acknowledged = key;
                    written.longest = written.longest.max(last.elapsed());
                    last = Instant::now();
                }
                Ok(other) => panic!("{other}"),
                Err(_) => {
                    written.breaks += 1;
                    connection = None;
                    thread::sleep(Duration::from_millis(5));
                }
            }
        }
        written
    })
}

fn assert_all_there(netns: &Path, written: &Written) {
    let mut connection = Connection::open(netns, redis_address()).unwrap();
    for key in 1..=written.acknowledged {
        let head = connection.ask(&format!("GET key:{key}")).unwrap();
        assert_eq!(head, format!("${}", key.to_string().len()), "key:{key} of {written:?}");
        let mut rest = vec![0; key.to_string().len() + 2];
        connection.0.read_exact(&mut rest).unwrap();
        assert_eq!(String::from_utf8_lossy(&rest).trim_end(), key.to_string());
    }
}

#[test]
fn a_stock_redis_is_replaced_by_a_replica_and_loses_no_write() {
    let stage = Stage::up(&["redis"]);
    stage.start(&annotated(redis("redis", FIRST_CONTAINER_ADDRESS), &[("", "redis")]));
    let netns = client_netns(&stage);
    eventually(PATIENCE, || ask_redis(&netns, "PING"));
    for filler in 0..20 {
        ask_redis(&netns, &format!("SETRANGE filler:{filler} 1000000 x")).unwrap();
    }
    let writer = write_keys(netns.clone());
    let mut clean = None;
    for to in [NODES[1], NODES[0], NODES[1]] {
        let record = stage.migrate_with("redis", to, APPLICATION);
        println!("{} ms down: {}", record["downtime_ms"], record["notes"]);
        let census = stage.settled_census();
        if let (true, Some(before)) = (to == NODES[1], &clean) {
            stage.assert_census(before, |change| change.area == "agent descriptors" && change.item == "socket");
        }
        if to == NODES[1] {
            clean = Some(census);
        }
    }
    let written = writer.end();
    println!("{written:?}");
    assert!(written.acknowledged > 100 && written.breaks >= 3, "{written:?}");
    assert_all_there(&netns, &written);
    assert_eq!(ask_redis(&netns, "STRLEN filler:19").as_deref(), Ok(":1000001"));
    let role = ask_redis(&netns, "ROLE").unwrap();
    assert_eq!(role, "*3", "a master has three words to say, a replica five");
}

/// Everything comes by its own hooks, asked by HTTP.
#[test]
fn a_cart_goes_on_where_another_instance_was() {
    let stage = Stage::up(&["cart"]);
    let rootfs = image(stage.folder.path(), "cart", "shopping-cart", &[]);
    let workload = Workload::new("cart", rootfs, ["/bin/shopping-cart"], FIRST_CONTAINER_ADDRESS);
    stage.start(&annotated(
        workload,
        &[
            ("", "hooks"),
            ("ready", "http://127.0.0.1:8080/healthz"),
            ("export", "http://127.0.0.1:8080/state"),
            ("import", "http://127.0.0.1:8080/state"),
        ],
    ));
    let netns = client_netns(&stage);
    eventually(PATIENCE, || http(&netns, "GET", "/healthz", ""));
    let mut operation = 0;
    let mut operate = |body: &str| {
        operation += 1;
        http(&netns, "PUT", &format!("/carts/a/operations/{operation}"), body).unwrap()
    };
    let add = r#"{"kind":"add","product":3,"count":2}"#;
    for to in [NODES[1], NODES[0]] {
        operate(add);
        operate(r#"{"kind":"order"}"#);
        let before = operate(add);
        let record = stage.migrate_with("cart", to, APPLICATION);
        println!("{} ms down: {}", record["downtime_ms"], record["notes"]);
        let cart = http(&netns, "GET", "/carts/a", "").unwrap();
        assert!(before.contains(&cart), "{cart}, not {before}");
    }
    let log: Value = serde_json::from_str(&http(&netns, "GET", "/orders/log", "").unwrap()).unwrap();
    assert_eq!(log["last_sequence"], 2, "{log:#}");
}

/// One request over a connection of its own; its answer's body when it is a good one.
fn http(netns: &Path, method: &str, path: &str, body: &str) -> Result<String, String> {
    let address = SocketAddr::new(FIRST_CONTAINER_ADDRESS.into(), 8080);
    let mut connection = Connection::open(netns, address)?;
    let head = "host: test\r\nconnection: close\r\ncontent-type: application/json";
    let request = format!("{method} {path} HTTP/1.1\r\n{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    connection.0.write_all(request.as_bytes()).map_err(|error| error.to_string())?;
    let mut answer = String::new();
    connection.0.read_to_string(&mut answer).map_err(|error| format!("{error} behind {answer:?}"))?;
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(|| format!("no whole answer: {answer:?}"))?;
    if head.starts_with("HTTP/1.1 2") { Ok(body.to_owned()) } else { Err(answer) }
}

#[test]
fn nobody_who_asks_a_stateless_service_is_refused() {
    let stage = Stage::up(&["catalogue"]);
    let rootfs = image(stage.folder.path(), "catalogue", "catalogue", &[]);
    let workload = Workload::new("catalogue", rootfs, ["/bin/catalogue"], FIRST_CONTAINER_ADDRESS);
    stage.start(&annotated(workload, &[("", "stateless")]));
    let netns = client_netns(&stage);
    eventually(PATIENCE, || http(&netns, "GET", "/products/7", ""));
    let askers: Vec<_> = (0..4)
        .map(|_| {
            let netns = netns.clone();
            Loop::start(move |stopped| {
                let (mut asked, mut longest, mut failed) = (0_u64, Duration::ZERO, Vec::new());
                while !stopped() {
                    let begun = Instant::now();
                    failed.extend(http(&netns, "GET", "/products/7", "").err());
                    longest = longest.max(begun.elapsed());
                    asked += 1;
                }
                (asked, longest, failed)
            })
        })
        .collect();
    for to in [NODES[1], NODES[0], NODES[1], NODES[0]] {
        let record = stage.migrate_with("catalogue", to, APPLICATION);
        println!("{} ms down: {}", record["downtime_ms"], record["notes"]);
        thread::sleep(Duration::from_millis(500));
    }
    for asker in askers {
        let (asked, longest, failed) = asker.end();
        println!("{asked} requests, the longest {longest:?}");
        assert_eq!(failed, Vec::<String>::new(), "of {asked} requests");
        assert!(asked > 50, "{asked}");
    }
}

/// The old instance takes writes at its address, and nothing of another one is left.
fn assert_undone(stage: &Stage, netns: &Path, before: &podferry_local::Census, when: &str) {
    let wrote = eventually(PATIENCE, || ask_redis(netns, &format!("SET undone {}", when.len())));
    assert_eq!(wrote, "+OK", "{when}");
    assert_eq!(stage.places("redis"), [NODES[0]], "{when}");
    stage.assert_census(before, |change| change.area == "agent descriptors" && change.item == "socket");
}

#[test]
fn whatever_fails_on_the_way_leaves_the_old_instance_as_it_was() {
    let stage = Stage::up(&["redis"]);
    // Fails when it is told to by a key, and takes as long as another says.
    let verify = "[ \"$(redis-cli GET bad)\" != yes ] || { echo it is bad >&2; exit 3; }; sleep $(redis-cli GET wait)";
    let workload = annotated(redis("redis", FIRST_CONTAINER_ADDRESS), &[("", "redis"), ("verify", verify)]);
    stage.start(&workload);
    let netns = client_netns(&stage);
    eventually(PATIENCE, || ask_redis(&netns, "SET wait 0"));
    ask_redis(&netns, "SET bad yes").unwrap();
    let begin = || {
        let words = [&["migrate", "redis", "--to", NODES[1], "--output", "json"], APPLICATION].concat();
        let output = stage.cluster.podferry(words).unwrap();
        let record: Value = serde_json::from_str(output.stdout.trim()).unwrap_or_else(|_| panic!("{}", output.stderr));
        record["id"].as_str().unwrap().to_owned()
    };
    let record_of = |id: &str| {
        let output = stage.cluster.podferry(["describe", id, "--output", "json"]).unwrap();
        serde_json::from_str::<Value>(output.stdout.trim()).map_err(|error| error.to_string())
    };
    let ended = |id: &str| {
        eventually(PATIENCE, || {
            let record = record_of(id)?;
            let done = matches!(phase(&record), "succeeded" | "failed" | "cancelled");
            if done { Ok(record) } else { Err(format!("it does not end: {record:#}")) }
        })
    };
    // The first failure leaves what agents make once.
    let record = ended(&begin());
    assert_eq!(phase(&record), "failed");
    let clean = stage.settled_census();

    let record = ended(&begin());
    let reason = record["reason"].to_string();
    assert!(reason.contains("the hook verify failed") && reason.contains("it is bad"), "{record:#}");
    assert_undone(&stage, &netns, &clean, "after a hook that failed");

    ask_redis(&netns, "SET bad no").unwrap();
    ask_redis(&netns, "SET wait 20").unwrap();
    let is_quiesced = |id: &str| {
        eventually(PATIENCE, || {
            let record = record_of(id)?;
            if phase(&record) == "freeze" { Ok(()) } else { Err(format!("{record:#}")) }
        });
        thread::sleep(Duration::from_millis(500));
    };
    let id = begin();
    is_quiesced(&id);
    stage.cluster.podferry(["cancel", &id]).unwrap().success().unwrap();
    assert_eq!(phase(&ended(&id)), "cancelled");
    assert_undone(&stage, &netns, &clean, "after a cancel");

    for (node, killed) in [(NODES[0], "the source's agent"), (NODES[1], "the target's agent")] {
        let id = begin();
        is_quiesced(&id);
        stage.node(node).kill_agent(Signal::KILL).unwrap();
        stage.node(node).start_agent().unwrap();
        assert_eq!(phase(&ended(&id)), "failed", "after {killed} was killed");
        assert_undone(&stage, &netns, &clean, &format!("after {killed} was killed"));
    }

    ask_redis(&netns, "SET wait 0").unwrap();
    stage.migrate_with("redis", NODES[1], APPLICATION);
}

#[test]
fn what_does_not_say_how_or_has_no_address_is_refused() {
    let refused = |annotations: &[(&str, &str)], network, words: &str| {
        let stage = Stage::up(&["redis"]);
        let workload = Workload { network, ..redis("redis", FIRST_CONTAINER_ADDRESS) };
        stage.start(&annotated(workload, annotations));
        let record = stage.try_migrate_with("redis", NODES[1], APPLICATION).unwrap();
        let reason = record["reason"].to_string();
        assert!(phase(&record) == "failed" && reason.contains(words), "{record:#}");
        assert_eq!(stage.places("redis"), [NODES[0]]);
    };
    refused(&[], Network::Linked, "no annotation podferry.dev/application");
    refused(&[("", "hooks"), ("export", "true")], Network::Linked, "export needs import");
    refused(&[("", "redis")], Network::OfNode, "no address moves");
}

/// One node would begin with nothing while the other waits for nobody: what was written would be lost.
#[test]
fn nodes_that_move_the_state_in_different_ways_and_replicas_are_refused() {
    for (there, command, words) in [
        ("stateless", "PING", "the state moves here stateless, and on the source with replicate"),
        ("redis", "REPLICAOF 192.0.2.1 6379", "the old instance is a slave itself"),
    ] {
        let stage = Stage::up(&["redis"]);
        let workload = |kind| annotated(redis("redis", FIRST_CONTAINER_ADDRESS), &[("", kind)]);
        stage.cluster.start_workload(NODES[0], &workload("redis")).unwrap();
        stage.cluster.prepare_workload(NODES[1], &workload(there)).unwrap();
        let netns = client_netns(&stage);
        eventually(PATIENCE, || ask_redis(&netns, "SET k v"));
        ask_redis(&netns, command).unwrap();
        let record = stage.try_migrate_with("redis", NODES[1], APPLICATION).unwrap();
        assert!(phase(&record) == "failed" && record["reason"].to_string().contains(words), "{record:#}");
        assert_eq!(stage.places("redis"), [NODES[0]], "{words}");
        assert_eq!(ask_redis(&netns, "STRLEN k").as_deref(), Ok(":1"), "{words}");
    }
}

/// An instance of it that ends by itself is no instance.
#[test]
fn a_new_instance_that_does_not_stay_is_given_up() {
    let stage = Stage::up(&["shell"]);
    let shell = |script| {
        let workload = Workload::new("shell", redis_rootfs(), ["/bin/sh", "-c", script], FIRST_CONTAINER_ADDRESS);
        annotated(workload, &[("", "stateless"), ("ready", "false")])
    };
    stage.cluster.start_workload(NODES[0], &shell("while :; do sleep 1; done")).unwrap();
    stage.cluster.prepare_workload(NODES[1], &shell("echo no >&2; exit 7")).unwrap();
    let record = stage.try_migrate_with("shell", NODES[1], APPLICATION).unwrap();
    let reason = record["reason"].to_string();
    assert!(phase(&record) == "failed" && reason.contains("ended by itself"), "{record:#}");
    assert_eq!(stage.places("shell"), [NODES[0]]);
}
