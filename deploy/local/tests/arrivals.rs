//! What comes for a container while it stands still reaches it, and nobody has to send it again.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

mod support;

use std::fs;
use std::os::unix::fs::symlink;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use podferry_local::FIRST_CONTAINER_ADDRESS;
use support::{Line, NODES, Stage, redis, redis_address};

/// After so long the clients' kernel sends again what was not acknowledged; usually it is 200 ms.
const PATIENCE: Duration = Duration::from_secs(30);
/// Far longer than any downtime here, even on a machine that is busy otherwise.
const LONGEST: Duration = Duration::from_secs(20);
const CLIENTS: usize = 8;
/// From an answer to the next question. Shorter than any downtime, so that each client asks in it; and not nothing, or what it asks
/// would be there before the link is cut.
const PAUSE: Duration = Duration::from_millis(30);

/// Redis on the first node, and clients that do not repeat anything soon.
fn stage() -> Stage {
    let stage = Stage::up(&["redis"]);
    stage.start(&redis("redis", FIRST_CONTAINER_ADDRESS));
    let patience = PATIENCE.as_secs();
    let script = format!(
        "sysctl -qw net.ipv4.tcp_early_retrans=0
        device=$(ip route get {FIRST_CONTAINER_ADDRESS} | sed -n 's/.* dev \\([^ ]*\\).*/\\1/p')
        ip route replace {FIRST_CONTAINER_ADDRESS} dev $device rto_min {patience}s"
    );
    let mut command = Command::new("ip");
    let output =
        command.args(["netns", "exec", stage.cluster.client().netns(), "sh", "-euc", &script]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    stage
}

/// A connection on which one counter is incremented all the time, each time some time after the last answer.
struct Client {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<(Line, Duration)>,
}

impl Client {
    fn start(mut line: Line, name: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut longest = Duration::ZERO;
            let mut counted = line.ask(&format!("INCRBY own:{name} 0"))[1..].parse::<u64>().unwrap();
            while !told.load(Ordering::Relaxed) {
                thread::sleep(PAUSE);
                let asked = Instant::now();
                counted += 1;
                assert_eq!(line.ask(&format!("INCR own:{name}")), format!(":{counted}"));
                longest = longest.max(asked.elapsed());
            }
            (line, longest)
        });
        Self { stop, thread }
    }

    /// Gives the connection, and how long the longest answer took.
    fn stop(self) -> (Line, Duration) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

/// What clients see of some work; fails when one had to send anything again.
fn none_repeats(lines: Vec<Line>, work: impl FnOnce()) -> Vec<Line> {
    let clients: Vec<Client> = lines.into_iter().enumerate().map(|(name, line)| Client::start(line, name)).collect();
    thread::sleep(Duration::from_millis(100));
    work();
    thread::sleep(Duration::from_millis(200));
    let stopped = clients.into_iter().map(Client::stop).map(|(line, longest)| {
        println!("the longest answer took {} ms", longest.as_millis());
        assert!(longest < LONGEST, "what was sent in the freeze was lost: an answer took {longest:?}");
        line
    });
    stopped.collect()
}

#[test]
fn what_clients_send_in_the_freeze_reaches_the_container_on_the_other_node() {
    let stage = stage();
    let mut lines: Vec<Line> = (0..CLIENTS).map(|_| stage.connect(redis_address())).collect();
    let live: &[&str] = &["--strategy", "live", "--downtime-budget", "1000"];
    let warm: &[&str] = &["--strategy", "warm"];
    for (hop, strategy) in [live, warm, live, warm].into_iter().enumerate() {
        lines = none_repeats(lines, || {
            let record = stage.migrate_with("redis", NODES[(hop + 1) % 2], strategy);
            println!("down {} ms", record["downtime_ms"]);
        });
    }
}

#[test]
fn what_clients_send_in_a_freeze_that_is_undone_reaches_the_container_where_it_was() {
    let stage = stage();
    let lines: Vec<Line> = (0..CLIENTS).map(|_| stage.connect(redis_address())).collect();
    // The target lacks what the container has open: the restore fails.
    let node = stage.node(NODES[1]);
    let lower = node.on_machine(&node.bundle("redis")).join("lower");
    let empty = stage.folder.path().join("empty");
    fs::create_dir(&empty).unwrap();
    fs::remove_file(&lower).unwrap();
    symlink(&empty, &lower).unwrap();
    none_repeats(lines, || {
        let record = stage.try_migrate_with("redis", NODES[1], &["--strategy", "warm"]).unwrap();
        assert_ne!(record["phase"], "succeeded", "{record:#}");
        assert!(record["timings"]["dump"].as_f64().unwrap_or_default() > 0.0, "it was not frozen: {record:#}");
    });
}
