//! Containers that write their memory faster than it is sent: with a throttle they move live, and they have their own CPU limit again
//! however that ends.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use podferry_local::{FIRST_CONTAINER_ADDRESS, Node, ProcessId, Signal, Workload};
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

/// Writes down what a limit's file says, until that is gone or nobody wants to know any more.
struct Watch {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Vec<String>>,
}

impl Watch {
    fn start(file: PathBuf) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let watching = move || {
            let mut seen: Vec<String> = Vec::new();
            while let (Ok(text), false) = (fs::read_to_string(&file), told.load(Ordering::Relaxed)) {
                if seen.last().is_none_or(|last| *last != text.trim()) {
                    seen.push(text.trim().to_owned());
                }
                thread::sleep(Duration::from_millis(1));
            }
            seen
        };
        Self { stop, thread: thread::spawn(watching) }
    }

    /// All limits, each as often as there was another before it.
    fn stop(self) -> Vec<String> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

/// The dump worker of a migration, as soon as there is one.
fn dump_worker(id: &str) -> ProcessId {
    let end = Instant::now() + Duration::from_secs(90);
    while Instant::now() < end {
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command).into_owned();
            if command.contains("podferry-dump-worker") && command.contains(id) {
                let pid = entry.file_name().to_string_lossy().parse().ok();
                if let Some(process) = pid.and_then(ProcessId::of) {
                    return process;
                }
            }
        }
        thread::sleep(Duration::from_millis(1));
    }
    panic!("{id} has no dump worker");
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
        let id = begin(stage, &OUT_OF_REACH);
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

/// Begins a migration over the narrow link, with a throttle and a budget, and gives its id.
fn begin(stage: &Stage, budget: &[&str]) -> String {
    let words = ["migrate", "redis", "--to", NODES[1], THROTTLE, "--output", "json"];
    let output = stage.cluster.podferry([&words[..], &NARROW, budget].concat()).unwrap();
    let begun: Value = serde_json::from_str(output.stdout.trim()).unwrap_or_else(|_| panic!("{}", output.stderr));
    begun["id"].as_str().unwrap().to_owned()
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

    let watch = Watch::start(busy.file.clone());
    let record = stage.migrate_with("redis", NODES[1], &[&flags[..], &[THROTTLE]].concat());
    let seen = watch.stop();
    println!("limits of the source: {seen:?}");
    // The frozen source has its own again before it is released.
    assert!(seen.len() >= 3 && seen[0] == busy.own && seen[seen.len() - 1] == busy.own, "{seen:?}");
    assert!(seen[1..seen.len() - 1].iter().all(|limit| quota(limit) < OWN), "{seen:?}");
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

/// Its worker is killed as soon as it is there: before the tasks are frozen, most times, or just behind that.
#[test]
fn a_dump_worker_that_is_killed_leaves_no_throttle() {
    let stage = Stage::up(&["redis"]);
    let busy = Busy::start(&stage);
    let id = begin(&stage, &IN_REACH);
    let worker = dump_worker(&id);
    let before = limit(&busy.file);
    assert!(worker.signal(Signal::KILL));
    let record = ended(&stage, &id);
    println!("held to {:?} CPUs, and by {before} at the kill; {}", held(&record), record["reason"]);
    assert_eq!(record["phase"], "failed", "{record:#}");
    assert!(!held(&record).is_empty(), "it was not throttled: {record:#}");
    assert_eq!(limit(&busy.file), busy.own);
    assert_eq!(stage.places("redis"), [NODES[0]]);
    busy.assert_counts();
    busy.noise.stop();
    busy.counter.stop();
}
