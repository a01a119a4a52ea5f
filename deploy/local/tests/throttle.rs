//! Containers that write their memory faster than it is sent: with a throttle they move live, and they have their own CPU limit again
//! however that ends.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use podferry_local::{FIRST_CONTAINER_ADDRESS, Node, Signal, Workload};
use serde_json::Value;
use support::counter::{Counter, digest};
use support::noise::Noise;
use support::{NODES, Stage, eventually, redis, redis_address};

/// Values of 4000 bytes that are written anew all the time.
const NOISE: usize = 1000;
/// Over this link they take two seconds. With a tenth of a CPU they are written faster than that, and with a fiftieth slower.
const NARROW: [&str; 5] = ["--strategy", "live", "--bandwidth-limit", "2M", "--no-compression"];
/// A quarter of them can be sent in it.
const IN_REACH: [&str; 2] = ["--downtime-budget", "500"];
/// Not kept by a Redis that has any CPU time at all: it is throttled until somebody ends it, or to the last step.
const OUT_OF_REACH: [&str; 2] = ["--downtime-budget", "1"];
const THROTTLE: &str = "--throttle";
/// The container's own limit, in microseconds of each 100 ms.
const OWN: i64 = 90_000;

/// The file that has a container's CPU limit on a node, in the version of cgroups that the cpu controller has here.
fn limit_file(node: &Node, name: &str) -> PathBuf {
    let cgroup = node.cgroups_path(name);
    let below = |mount: &str| Path::new(mount).join(cgroup.strip_prefix("/").unwrap());
    let files = [
        below("/sys/fs/cgroup/cpu").join("cpu.cfs_quota_us"),
        below("/sys/fs/cgroup/cpu,cpuacct").join("cpu.cfs_quota_us"),
        below("/sys/fs/cgroup").join("cpu.max"),
    ];
    let found = files.iter().find(|file| file.exists());
    found.unwrap_or_else(|| panic!("{name} has no cpu controller on {}: {files:?}", node.name())).clone()
}

/// The limit as its file has it.
fn limit(file: &Path) -> String {
    fs::read_to_string(file).unwrap().trim().to_owned()
}

/// The quota that a limit says.
fn quota(limit: &str) -> i64 {
    limit.split(' ').next().unwrap().parse().unwrap()
}

/// A Redis with a limit of its own, what counts in it, what writes to it, and the file of its limit.
struct Busy {
    counter: Counter,
    noise: Noise,
    file: PathBuf,
    own: String,
}

impl Busy {
    fn start(stage: &Stage) -> Self {
        stage.start(&Workload { cpu_quota: Some(OWN), ..redis("redis", FIRST_CONTAINER_ADDRESS) });
        let mut line = stage.connect(redis_address());
        assert_eq!(line.ask("DEBUG POPULATE 2000 key 1000"), "+OK");
        assert_eq!(line.ask("SET counter 0"), "+OK");
        let file = limit_file(&stage.node(NODES[0]), "redis");
        let own = limit(&file);
        assert_eq!(quota(&own), OWN);
        let (counter, noise) = (Counter::start(line), Noise::start(stage.connect(redis_address()), NOISE));
        Self { counter, noise, file, own }
    }

    /// Begins a migration that would be given up without a throttle and that goes on for half a minute with one. Gives its id once
    /// the container has much less CPU time than before.
    fn begin_throttled(&self, stage: &Stage) -> String {
        let words = ["migrate", "redis", "--to", NODES[1], THROTTLE, "--output", "json"];
        let output = stage.cluster.podferry([&words[..], &NARROW, &OUT_OF_REACH].concat()).unwrap();
        let begun: Value = serde_json::from_str(output.stdout.trim()).unwrap_or_else(|_| panic!("{}", output.stderr));
        let id = begun["id"].as_str().unwrap().to_owned();
        eventually(Duration::from_secs(60), || {
            let now = limit(&self.file);
            if quota(&now) < OWN / 4 { Ok(()) } else { Err(format!("it is not throttled: {now}")) }
        });
        id
    }

    fn assert_own_limit(&self) {
        eventually(Duration::from_secs(30), || {
            let now = limit(&self.file);
            if now == self.own { Ok(()) } else { Err(format!("{now} instead of {}", self.own)) }
        });
    }

    /// It still counts, at more than a crawl.
    fn assert_counts(&self) {
        let before = self.counter.between(|_, counted| counted);
        eventually(Duration::from_secs(10), || {
            let now = self.counter.between(|_, counted| counted);
            if now > before + 200 { Ok(()) } else { Err(format!("it hardly counts: {before}, {now}")) }
        });
    }
}

fn ended(stage: &Stage, id: &str) -> Value {
    eventually(Duration::from_secs(60), || {
        let output = stage.cluster.podferry(["describe", id, "--output", "json"]).unwrap();
        let now: Value = serde_json::from_str(output.stdout.trim()).unwrap_or_default();
        let phase = now["phase"].as_str().unwrap_or_default();
        if ["succeeded", "failed", "cancelled"].contains(&phase) { Ok(now) } else { Err(format!("{id}: {now:#}")) }
    })
}

/// What each round of pre-copy was held to, in CPUs.
fn held(record: &Value) -> Vec<f64> {
    let rounds = record["rounds"].as_array().unwrap();
    rounds.iter().map(|round| round["cpu_limit"].as_f64().unwrap()).filter(|limit| *limit > 0.0).collect()
}

#[test]
fn what_does_not_converge_arrives_with_a_throttle_and_has_its_own_limit_there() {
    let stage = Stage::up(&["redis"]);
    let busy = Busy::start(&stage);
    let flags = [&NARROW[..], &IN_REACH].concat();

    let record = stage.try_migrate_with("redis", NODES[1], &flags).unwrap();
    assert_eq!(record["phase"], "failed", "it converges by itself: {record:#}");
    assert_eq!(held(&record), [0.0; 0]);
    assert_eq!(limit(&busy.file), busy.own);

    let record = stage.migrate_with("redis", NODES[1], &[&flags[..], &[THROTTLE]].concat());
    let steps = held(&record);
    println!("throttled to {steps:?} CPUs; {}; {}", record["timings"], record["notes"]);
    assert!(!steps.is_empty() && steps.is_sorted_by(|before, next| before >= next), "{record:#}");
    let notes = record["notes"].to_string();
    assert!(notes.contains("the processes were throttled to"), "{record:#}");
    // runc has made the cgroup from the target's bundle.
    assert_eq!(limit(&limit_file(&stage.node(NODES[1]), "redis")), busy.own);
    busy.assert_counts();
    busy.noise.stop();
    let (counted, longest) = busy.counter.stop();
    println!("{counted} increments, the longest took {} ms", longest.as_millis());
}

#[test]
fn a_cancel_while_it_is_throttled_gives_the_container_its_own_limit_back() {
    let stage = Stage::up(&["redis"]);
    let busy = Busy::start(&stage);
    let id = busy.begin_throttled(&stage);
    let output = stage.cluster.podferry(["cancel", &id]).unwrap();
    assert!(output.status.success(), "{}{}", output.stdout, output.stderr);
    let record = ended(&stage, &id);
    assert_eq!(record["phase"], "cancelled", "{record:#}");
    // At once: it is part of the undoing.
    assert_eq!(limit(&busy.file), busy.own);
    assert_eq!(stage.places("redis"), [NODES[0]]);
    busy.assert_counts();
    busy.noise.stop();
    let first = busy.counter.between(digest);
    stage.migrate_with("redis", NODES[1], &["--strategy", "live", "--downtime-budget", "1000"]);
    assert_eq!(busy.counter.between(digest), first);
    busy.counter.stop();
}

#[test]
fn an_agent_that_is_started_after_one_was_killed_releases_what_that_one_throttled() {
    let stage = Stage::up(&["redis"]);
    let busy = Busy::start(&stage);
    let id = busy.begin_throttled(&stage);
    let node = stage.node(NODES[0]);
    node.kill_agent(Signal::KILL).unwrap();
    assert_ne!(limit(&busy.file), busy.own, "nobody is there who could have released it");
    node.start_agent().unwrap();
    node.wait_ready().unwrap();
    busy.assert_own_limit();
    let record = ended(&stage, &id);
    assert_eq!(record["phase"], "failed", "{record:#}");
    assert_eq!(stage.places("redis"), [NODES[0]]);
    busy.assert_counts();
    busy.noise.stop();
    let record = stage.migrate_with("redis", NODES[1], &["--strategy", "live", "--downtime-budget", "1000"]);
    assert_eq!(limit(&limit_file(&stage.node(NODES[1]), "redis")), busy.own, "{record:#}");
    busy.counter.stop();
}

#[test]
fn what_even_a_throttle_does_not_help_is_refused_with_its_own_limit() {
    let stage = Stage::up(&["redis"]);
    let busy = Busy::start(&stage);
    let id = busy.begin_throttled(&stage);
    let record = ended(&stage, &id);
    assert_eq!(record["phase"], "failed", "{record:#}");
    let reason = record["reason"].as_str().unwrap();
    println!("{reason}");
    assert!(reason.contains("although they were throttled to") && reason.contains("precopy"), "{record:#}");
    assert_eq!(limit(&busy.file), busy.own);
    busy.assert_counts();
    busy.noise.stop();
    busy.counter.stop();
}
