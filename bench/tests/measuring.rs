//! The measuring itself: pauses that are known beforehand, an answer that never comes, a workload whose clock stands still.
#![expect(clippy::unwrap_used, reason = "helpers of tests: a panic is how they fail")]

use std::{
    fs,
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Once},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use podferry_bench::{
    experiments::{Arrival, Watch},
    load::{self, Kind, LoadOptions, LoadReport, Pace, Readiness, samples::Samples},
    migration::{Span, median},
};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader as AsyncBufReader},
    net::TcpListener,
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

/// So many pauses are made: a machine that is busy with other things may make one of them longer than was asked for.
const PAUSES: u32 = 15;
const PAUSE: Duration = Duration::from_millis(80);
/// How far a pause may be from what was measured of it, in ms.
const WITHIN_MS: f64 = 1.0;

fn unix_ms() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64() * 1e3
}

/// The catalogue on a port of its own.
struct Victim {
    child: Child,
    address: SocketAddr,
}

impl Victim {
    fn start() -> Self {
        static BUILT: Once = Once::new();
        BUILT.call_once(|| {
            let mut build = Command::new(env!("CARGO"));
            build.args(["build", "--quiet", "--package=podferry-workloads", "--bin=catalogue"]);
            assert!(build.current_dir(podferry_local::workspace_root()).status().unwrap().success());
        });
        let program = podferry_local::default_binaries().join("catalogue");
        let mut command = Command::new(program);
        let mut child = command.env("PORT", "0").stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let address = lines.map_while(Result::ok).find_map(|line| {
            Some(line.split_once("listening on ")?.1.split_whitespace().next()?.parse::<SocketAddr>().ok()?.port())
        });
        Self { child, address: SocketAddr::from(([127, 0, 0, 1], address.unwrap())) }
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().try_into().unwrap()), signal).unwrap();
    }

    /// The process's own clock: CPU time in ticks of 10 ms, fields 14 and 15 of `/proc/PID/stat` (proc(5)).
    fn own_clock(&self) -> u64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        let fields = stat.rsplit_once(')').unwrap().1;
        fields.split_whitespace().skip(11).take(2).map(|field| field.parse::<u64>().unwrap()).sum()
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A cgroup that can be frozen; its processes are put back when it is dropped.
struct Freezer {
    folder: PathBuf,
    unified: bool,
}

impl Freezer {
    fn with(victim: &Victim) -> Self {
        let unified = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
        let hierarchy = if unified { "/sys/fs/cgroup" } else { "/sys/fs/cgroup/freezer" };
        let folder = Path::new(hierarchy).join(format!("podferry-measuring-{}", victim.child.id()));
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("cgroup.procs"), victim.child.id().to_string()).unwrap();
        Self { folder, unified }
    }

    fn set(&self, frozen: bool) {
        match (self.unified, frozen) {
            (true, frozen) => fs::write(self.folder.join("cgroup.freeze"), if frozen { "1" } else { "0" }),
            (false, frozen) => fs::write(self.folder.join("freezer.state"), if frozen { "FROZEN" } else { "THAWED" }),
        }
        .unwrap();
    }
}

impl Drop for Freezer {
    fn drop(&mut self) {
        self.set(false);
        let root = self.folder.parent().unwrap().join("cgroup.procs");
        for pid in fs::read_to_string(self.folder.join("cgroup.procs")).unwrap_or_default().lines() {
            let _ = fs::write(&root, pid);
        }
        let _ = fs::remove_dir(&self.folder);
    }
}

struct Load {
    stop: CancellationToken,
    running: JoinHandle<LoadReport>,
}

impl Load {
    async fn start(kind: Kind, target: SocketAddr, pace: Pace) -> Self {
        let (stop, ready) = (CancellationToken::new(), Readiness::new(1));
        let options = LoadOptions { target, kind, clients: 1, depth: 1, pace, samples: true };
        let running = tokio::spawn(load::run(options, stop.clone(), Arc::clone(&ready)));
        ready.all().await;
        Self { stop, running }
    }

    async fn stop(self) -> LoadReport {
        self.stop.cancel();
        self.running.await.unwrap()
    }
}

fn samples(report: &LoadReport) -> &Samples {
    report.clients[0].samples.as_ref().unwrap()
}

/// Makes pauses by `stand_still` (true: begin, false: end), and gives how far the gap that a client saw is from each, in ms.
async fn errors(victim: &Victim, pace: Pace, stand_still: impl Fn(bool)) -> Vec<f64> {
    let load = Load::start(Kind::Catalogue, victim.address, pace).await;
    let mut pauses = Vec::new();
    for _ in 0..PAUSES {
        tokio::time::sleep(Duration::from_millis(30)).await;
        stand_still(true);
        let (since, start) = (Instant::now(), unix_ms());
        // Not the runtime's timer, which the clients share.
        std::thread::sleep(PAUSE);
        stand_still(false);
        pauses.push((start, since.elapsed().as_secs_f64() * 1e3));
    }
    tokio::time::sleep(Duration::from_millis(30)).await;
    let report = load.stop().await;
    assert!(report.is_clean(), "{report:#?}");
    let gap = |start: f64, length: f64| {
        samples(&report).longest_gap(Span { start: start + 1.0, end: start + length - 1.0 }, unix_ms()).unwrap()
    };
    pauses.into_iter().map(|(start, length)| gap(start, length) - length).collect()
}

fn assert_close(errors: &[f64]) {
    let middle = median(errors.iter().copied()).unwrap();
    assert!(middle.abs() <= WITHIN_MS, "{middle} ms: {errors:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_known_pause_is_found_within_a_millisecond() {
    let victim = Victim::start();
    let stand_still = |still| victim.signal(if still { Signal::SIGSTOP } else { Signal::SIGCONT });
    assert_close(&errors(&victim, Pace::Think(Duration::ZERO), stand_still).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_freeze_is_found_within_a_millisecond_though_the_processs_own_clock_stands_still() {
    let victim = Victim::start();
    let freezer = Freezer::with(&victim);
    let lost = std::cell::Cell::new(0);
    let began = std::cell::Cell::new(0);
    let stand_still = |still| {
        freezer.set(still);
        if still {
            std::thread::sleep(Duration::from_millis(2));
            began.set(victim.own_clock());
        } else {
            lost.set(lost.get() + victim.own_clock() - began.get());
        }
    };
    let errors = errors(&victim, Pace::Think(Duration::ZERO), stand_still).await;
    // `stand_still` takes 2 ms more than the pause itself, before it is timed.
    let without: Vec<f64> = errors.iter().map(|error| error - 2.0).collect();
    assert_close(&without);
    let slept = PAUSE * PAUSES;
    let own = Duration::from_millis(10 * lost.get());
    assert!(own * 4 < slept, "its clock went on by {own:?} in {slept:?}");
}

#[test]
fn a_freeze_is_seen_from_outside_within_a_millisecond() {
    let errors = (0..PAUSES).map(|_| {
        let victim = Victim::start();
        let freezer = Freezer::with(&victim);
        let watch = Watch::start(victim.child.id(), Path::new("/no-such-group"), Arrival::Restored);
        std::thread::sleep(Duration::from_millis(20));
        let frozen = unix_ms();
        freezer.set(true);
        std::thread::sleep(Duration::from_millis(20));
        watch.finish().still_since.expect("it was seen to stand still") - frozen
    });
    assert_close(&errors.collect::<Vec<_>>());
}

/// Answers lines as the services do, but for one answer.
async fn forgetful_server(listener: TcpListener, forgets: u64) {
    let (stream, _) = listener.accept().await.unwrap();
    stream.set_nodelay(true).unwrap();
    let mut lines = AsyncBufReader::new(stream);
    let mut counted = 0;
    for number in 1.. {
        let mut line = String::new();
        if lines.read_line(&mut line).await.unwrap_or(0) == 0 {
            return;
        }
        let answer = if line.trim() == "count" {
            counted += 1;
            format!("{counted}\n")
        } else {
            "ok\n".to_owned()
        };
        if number != forgets {
            lines.get_mut().write_all(answer.as_bytes()).await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_never_comes_is_a_failed_request_and_a_gap_until_the_end() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = tokio::spawn(forgetful_server(listener, 50));
    let load = Load::start(Kind::Lines, address, Pace::EachMillisecond).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let report = load.stop().await;
    server.abort();
    let client = &report.clients[0];
    assert!(client.failed_requests >= 1 && client.connection_resets >= 1, "{client:#?}");
    assert!(client.problems[0].contains("no answer"), "{client:#?}");
    let gap = samples(&report).longest_gap(Span { start: 0.0, end: unix_ms() }, unix_ms()).unwrap();
    assert!(gap > 400.0, "{gap}");
}
