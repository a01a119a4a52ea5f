//! Containers that are stopped, moved and started anew: their layer is whole, they got their SIGTERM, and whatever fails or is killed on
//! the way, one copy runs.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

mod faults;
mod support;

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use faults::sampler::Sampler;
use faults::stage::{LogTail, Stopped, agent, standing};
use podferry_local::{Change, FIRST_CONTAINER_ADDRESS, Network, Node, Signal, Workload, workspace_root};
use serde_json::Value;
use support::{NODES, Stage, eventually, redis_address, redis_rootfs};

/// The workload.
const NAME: &str = "shell";
/// Its program.
const PROGRAM: &str = "busybox";
const COLD: &[&str] = &["--strategy", "cold"];
const PATIENCE: Duration = Duration::from_secs(60);

/// Writes a large file once, a line at each start, and all the time how often it has been round; `at_end` is what a SIGTERM does.
fn script(at_end: &str) -> String {
    format!(
        "trap '{at_end}' TERM
         trap 'echo quit >>/data/log; exit 0' QUIT
         [ -e /data/big ] || dd if=/dev/urandom of=/data/big bs=1M count=12 2>/dev/null
         [ -p /data/fifo ] || busybox mkfifo /data/fifo
         exec 3<>/data/fifo
         echo start >>/data/log
         turn=0
         while :; do turn=$((turn + 1)); echo $turn >/data/turn; read -t 0.1 -u 3 nothing; done"
    )
}

/// Says goodbye to its files, and ends.
const POLITE: &str = "echo term >>/data/log; exit 0";
/// Needs a while for that.
const SLOW: &str = "echo asked >>/data/log; sleep 3; echo term >>/data/log; exit 0";
/// Does not hear it.
const DEAF: &str = "";

fn shell(at_end: &str) -> Workload {
    Workload::new(NAME, redis_rootfs(), ["/bin/sh", "-c", &script(at_end)], FIRST_CONTAINER_ADDRESS)
}

struct Shell {
    stage: Stage,
    sampler: Sampler,
}

impl Shell {
    fn up(at_end: &str) -> Self {
        Self::up_as(&shell(at_end))
    }

    fn up_as(workload: &Workload) -> Self {
        let stage = Stage::up(&[NAME]);
        stage.start(workload);
        let sampler = Sampler::start(stage.cluster.nodes(), NAME, PROGRAM);
        let shell = Self { stage, sampler };
        shell.assert_log(0, &["start"]);
        shell.assert_runs(0, "in the beginning");
        shell
    }

    fn file(&self, at: usize, name: &str) -> PathBuf {
        let node = self.stage.node(NODES[at]);
        node.on_machine(&node.bundle(NAME).join("upper/data").join(name))
    }

    fn log(&self, at: usize) -> Vec<String> {
        let text = fs::read_to_string(self.file(at, "log")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    fn assert_log(&self, at: usize, wanted: &[&str]) {
        eventually(PATIENCE, || {
            let log = self.log(at);
            if log == wanted { Ok(()) } else { Err(format!("on {}: {log:?}, not {wanted:?}", NODES[at])) }
        });
    }

    /// One copy runs, on that node, and works; on the other one is nothing.
    fn assert_runs(&self, at: usize, when: &str) {
        eventually(PATIENCE, || {
            let places = self.stage.places(NAME);
            if places == [NODES[at]] { Ok(()) } else { Err(format!("it is on {places:?} {when}")) }
        });
        let turn = || fs::read_to_string(self.file(at, "turn")).unwrap_or_default();
        let before = turn();
        eventually(PATIENCE, || if turn() == before { Err(format!("it does nothing {when}")) } else { Ok(()) });
        eventually(PATIENCE, || {
            let left: Vec<_> = fs::read_dir(self.file(1 - at, ".")).into_iter().flatten().flatten().collect();
            if left.is_empty() { Ok(()) } else { Err(format!("{left:?} is left on {} {when}", NODES[1 - at])) }
        });
        assert_eq!(self.sampler.doubles(), Vec::<String>::new(), "two copies ran {when}");
    }

    /// Asks for a migration, and does not wait for its end; gives its id.
    fn begin(&self, to: usize, more: &[&str]) -> String {
        let words = [&["migrate", NAME, "--to", NODES[to], "--output", "json"], COLD, more].concat();
        let output = self.stage.cluster.podferry(words).unwrap();
        let record: Value = serde_json::from_str(output.stdout.trim()).unwrap_or_else(|_| panic!("{}", output.stderr));
        record["id"].as_str().unwrap().to_owned()
    }

    fn describe(&self, id: &str) -> Option<Value> {
        let output = self.stage.cluster.podferry(["describe", id, "--output", "json"]).unwrap();
        serde_json::from_str(output.stdout.trim()).ok()
    }

    fn ended(&self, id: &str) -> Value {
        eventually(Duration::from_secs(120), || {
            let record = self.describe(id).ok_or_else(|| format!("{id} is not described"))?;
            let phase = record["phase"].as_str().unwrap_or_default();
            let done = matches!(phase, "succeeded" | "failed" | "cancelled");
            if done { Ok(record) } else { Err(format!("it does not end: {record:#}")) }
        })
    }
}

/// An agent that was started anew, or has met its first migration, has another number of connections with the coordinator.
fn is_of_the_coordinators(change: &Change) -> bool {
    change.area == "agent descriptors" && change.item == "socket"
}

fn phase(record: &Value) -> &str {
    record["phase"].as_str().unwrap()
}

fn notes(record: &Value) -> String {
    record["notes"].to_string()
}

/// What runc says of the container.
fn status(node: &Node) -> Option<String> {
    let output = node.runc(&["state", NAME]).ok()?.success().ok()?;
    let state: Value = serde_json::from_str(&output).ok()?;
    state["status"].as_str().map(str::to_owned)
}

#[test]
fn a_stopped_container_is_there_and_back_with_its_layer_and_its_last_words() {
    let shell = Shell::up(POLITE);
    let big = fs::read(shell.file(0, "big")).unwrap();
    let mut log = vec!["start"];
    let mut clean = None;
    for hop in 0..4 {
        let to = (hop + 1) % 2;
        let record = shell.stage.migrate_with(NAME, NODES[to], COLD);
        log.extend(["term", "start"]);
        shell.assert_log(to, &log);
        shell.assert_runs(to, &format!("after hop {hop}"));
        assert!(fs::read(shell.file(to, "big")).unwrap() == big, "after hop {hop}");
        let rounds = record["rounds"].as_array().unwrap();
        let bytes: Vec<u64> = rounds.iter().map(|round| round["raw_bytes"].as_u64().unwrap()).collect();
        assert!(bytes[0] >= 12 << 20 && *bytes.last().unwrap() < 1 << 20, "most goes before the stop: {record:#}");
        assert_eq!(notes(&record), "[]", "{record:#}");
        println!("hop {hop}: {} ms down, rounds {bytes:?}", record["downtime_ms"]);
        let census = shell.stage.settled_census();
        if let (1, Some(before)) = (to, &clean) {
            shell.stage.assert_census(before, |_| false);
        }
        if to == 1 {
            clean = Some(census);
        }
    }
}

/// What is on its disk is there at the same address; who was connected has to come again.
#[test]
fn a_redis_that_saves_at_its_end_answers_at_its_address_with_all_it_had() {
    let stage = Stage::up(&["redis"]);
    let mut arguments = vec!["/bin/redis-server", "--protected-mode", "no", "--dir", "/data"];
    arguments.extend(["--save", "3600 1"]);
    stage.start(&Workload::new("redis", redis_rootfs(), arguments, FIRST_CONTAINER_ADDRESS));
    let mut line = stage.connect(redis_address());
    assert_eq!(line.ask("SET k v1"), "+OK");
    for to in [NODES[1], NODES[0]] {
        let record = stage.migrate_with("redis", to, COLD);
        assert!(notes(&record).contains("1 established TCP connections are closed"), "{record:#}");
        line.assert_closed(PATIENCE);
        line = stage.connect(redis_address());
        assert_eq!(line.ask_bulk("GET k"), "v1", "on {to}");
    }
}

#[test]
fn one_that_ignores_its_sigterm_is_killed_when_its_time_is_over() {
    let shell = Shell::up(DEAF);
    let begun = Instant::now();
    let record = shell.stage.migrate_with(NAME, NODES[1], &["--strategy", "cold", "--grace-period", "2"]);
    assert!(begun.elapsed() >= Duration::from_secs(2), "{:?}", begun.elapsed());
    assert!(notes(&record).contains("did not end within 2 s of its stop signal, and was killed"), "{record:#}");
    let downtime = record["downtime_ms"].as_f64().unwrap();
    assert!((2000.0..20_000.0).contains(&downtime), "{record:#}");
    shell.assert_log(1, &["start", "start"]);
    shell.assert_runs(1, "after it was killed");
    let record = shell.stage.migrate_with(NAME, NODES[0], &["--strategy", "cold", "--grace-period", "0"]);
    assert!(notes(&record).contains("within 0 s"), "{record:#}");
    shell.assert_runs(0, "after it was killed at once");
    // Another signal it heeds, and its image says so.
    let node = shell.stage.node(NODES[0]);
    let config = node.on_machine(&node.bundle(NAME).join("config.json"));
    let mut spec: Value = serde_json::from_str(&fs::read_to_string(&config).unwrap()).unwrap();
    spec["annotations"]["org.opencontainers.image.stopSignal"] = "SIGQUIT".into();
    fs::write(&config, spec.to_string()).unwrap();
    let record = shell.stage.migrate_with(NAME, NODES[1], COLD);
    assert!(!notes(&record).contains("killed"), "{record:#}");
    shell.assert_log(1, &["start", "start", "start", "quit", "start"]);
}

#[test]
fn what_cannot_be_created_on_the_target_is_started_again_where_it_was() {
    let shell = Shell::up(POLITE);
    let before = shell.stage.settled_census();
    let target = shell.stage.node(NODES[1]);
    let config = target.on_machine(&target.bundle(NAME).join("config.json"));
    let good = fs::read_to_string(&config).unwrap();
    fs::write(&config, good.replace("\"/bin/sh\"", "\"/bin/none\"")).unwrap();
    let record = shell.stage.try_migrate_with(NAME, NODES[1], COLD).unwrap();
    let reason = record["reason"].as_str().unwrap();
    assert!(phase(&record) == "failed" && reason.contains("/bin/none"), "{record:#}");
    println!("{reason}");
    shell.assert_log(0, &["start", "term", "start"]);
    shell.assert_runs(0, "after its target could not create it");
    shell.stage.assert_census(&before, is_of_the_coordinators);
    fs::write(&config, good).unwrap();
    shell.stage.migrate_with(NAME, NODES[1], COLD);
    shell.assert_log(1, &["start", "term", "start", "term", "start"]);
    shell.assert_runs(1, "after the target was put right");
}

#[test]
fn a_cancel_while_it_ends_starts_it_again() {
    let shell = Shell::up(SLOW);
    let before = shell.stage.settled_census();
    let id = shell.begin(1, &[]);
    shell.assert_log(0, &["start", "asked"]);
    let output = shell.stage.cluster.podferry(["cancel", &id]).unwrap();
    assert!(output.status.success(), "{}{}", output.stdout, output.stderr);
    let record = shell.ended(&id);
    assert_eq!(phase(&record), "cancelled", "{record:#}");
    shell.assert_log(0, &["start", "asked", "term", "start"]);
    shell.assert_runs(0, "after the cancel");
    shell.stage.assert_census(&before, is_of_the_coordinators);
    shell.stage.migrate_with(NAME, NODES[1], COLD);
    shell.assert_runs(1, "after the migration that followed");
}

#[test]
fn a_cancel_while_its_layer_is_copied_beforehand_does_not_touch_it() {
    let shell = Shell::up(POLITE);
    let before = shell.stage.settled_census();
    let process = shell.stage.node(NODES[0]).container_process(NAME).unwrap();
    let id = shell.begin(1, &["--bandwidth-limit", "1M", "--no-compression"]);
    let target = shell.stage.node(NODES[1]);
    let seeds = target.on_machine(&target.bundle(NAME).join("seeds"));
    until("its files to come in", || fs::read_dir(&seeds).is_ok_and(|mut files| files.next().is_some()));
    let output = shell.stage.cluster.podferry(["cancel", &id]).unwrap();
    assert!(output.status.success(), "{}{}", output.stdout, output.stderr);
    assert_eq!(phase(&shell.ended(&id)), "cancelled");
    shell.assert_log(0, &["start"]);
    shell.assert_runs(0, "after the cancel");
    assert!(process.is_alive(), "it is another one");
    shell.stage.assert_census(&before, is_of_the_coordinators);
}

/// What CRIU cannot dump, and what it would have carried along.
#[test]
fn what_criu_cannot_dump_moves_all_the_same() {
    let stage = Stage::up(&["perl"]);
    let image = stage.folder.path().join("image");
    let mut make = Command::new(workspace_root().join("deploy/setup/image.sh"));
    assert!(make.arg("perl").arg(&image).args(["--", "/usr/bin/perl"]).status().unwrap().success());
    // io_uring_setup(2), and IPPROTO_MPTCP of linux/in.h.
    let program = "$| = 1; $SIG{TERM} = sub { exit 0 }; my $p = \"\\0\" x 120; syscall(425, 4, $p) >= 0 or die $!; \
                   socket(my $s, 2, 1, 262) or die $!; print \"ready\\n\"; sleep 1 while 1;";
    let workload =
        Workload::new("perl", image.join("rootfs"), ["/usr/bin/perl", "-e", program], FIRST_CONTAINER_ADDRESS);
    let container = stage.start(&workload);
    let said = |log: &PathBuf| fs::read_to_string(log).unwrap_or_default().matches("ready").count();
    eventually(PATIENCE, || if said(&container.log) == 1 { Ok(()) } else { Err("it is not ready".to_owned()) });
    let refused = stage.try_migrate("perl", NODES[1]).unwrap();
    assert!(phase(&refused) == "failed" && refused["reason"].to_string().contains("io-uring"), "{refused:#}");
    stage.migrate_with("perl", NODES[1], COLD);
    let log = stage.node(NODES[1]).container_logs().join("perl.log");
    eventually(PATIENCE, || if said(&log) == 1 { Ok(()) } else { Err("it is not ready there".to_owned()) });
}

/// They are unfit for everything else.
#[test]
fn nodes_without_criu_take_part() {
    let shell = Shell::up(POLITE);
    for name in NODES {
        let node = shell.stage.node(name);
        let config = node.on_machine(&node.agent_config());
        let text = fs::read_to_string(&config).unwrap();
        let without =
            |line: &str| if line.starts_with("criu =") { "criu = \"/nowhere/criu\"" } else { line }.to_owned();
        fs::write(&config, text.lines().map(without).collect::<Vec<_>>().join("\n")).unwrap();
        node.kill_agent(Signal::TERM).unwrap();
        eventually(PATIENCE, || node.start_agent().and_then(|_| node.wait_ready()).map_err(|error| error.to_string()));
    }
    let nodes = shell.stage.cluster.podferry(["nodes"]).unwrap().stdout;
    let is_unfit = |line: &&str| line.contains("unfit") && line.contains(" cold,application ");
    assert_eq!(nodes.lines().filter(is_unfit).count(), 2, "{nodes}");
    let refused = shell.stage.try_migrate(NAME, NODES[1]).unwrap_err();
    assert!(refused.contains("not fit"), "{refused}");
    shell.stage.migrate_with(NAME, NODES[1], COLD);
    shell.assert_log(1, &["start", "term", "start"]);
    shell.assert_runs(1, "without CRIU");
}

/// runc makes the network there, or there is nothing to make.
#[test]
fn what_has_no_address_of_its_own_is_moved_too() {
    for network in [Network::Lonely, Network::OfNode] {
        let shell = Shell::up_as(&Workload { network, ..shell(POLITE) });
        for to in [1, 0] {
            shell.stage.migrate_with(NAME, NODES[to], COLD);
            shell.assert_runs(to, &format!("with {network:?}"));
        }
    }
}

#[test]
fn a_terminal_that_nobody_would_take_is_refused() {
    let shell = Shell::up_as(&Workload { terminal: true, ..shell(POLITE) });
    let record = shell.stage.try_migrate_with(NAME, NODES[1], COLD).unwrap();
    assert!(phase(&record) == "failed" && record["reason"].to_string().contains("terminal"), "{record:#}");
    shell.assert_log(0, &["start"]);
    shell.assert_runs(0, "after the refusal");
}

/// Wherever the one before was, deleting what is left, creating or starting: the next one goes on.
#[test]
fn an_agent_that_is_killed_again_and_again_starts_it_again_once() {
    let shell = Shell::up(SLOW);
    let source = shell.stage.node(NODES[0]);
    let id = shell.begin(1, &[]);
    until("its end to begin", || shell.log(0).last().is_some_and(|line| line == "asked"));
    source.kill_agent(Signal::KILL).unwrap();
    until("its end", || shell.log(0).last().is_some_and(|line| line == "term"));
    for turn in 0..12 {
        // As late as an agent needs to come to its parts, and up to what it takes to start a container.
        eventually(PATIENCE, || source.start_agent().map(drop).map_err(|error| error.to_string()));
        thread::sleep(Duration::from_millis(60 + 25 * turn));
        source.kill_agent(Signal::KILL).unwrap();
        println!("turn {turn}: {:?} {:?}", status(&source), shell.log(0).last());
    }
    eventually(PATIENCE, || source.start_agent().and_then(|_| source.wait_ready()).map_err(|error| error.to_string()));
    assert_eq!(phase(&shell.ended(&id)), "failed");
    shell.assert_log(0, &["start", "asked", "term", "start"]);
    shell.assert_runs(0, "after all of them");
    shell.stage.migrate_with(NAME, NODES[1], COLD);
    shell.assert_runs(1, "after the migration that followed");
}

/// Who is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    SourceAgent,
    TargetAgent,
    Coordinator,
}

/// When.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Moment {
    /// It has its SIGTERM, and has not ended yet.
    Ending,
    /// It has ended, and its layer is on its way.
    Transfer,
    /// The target has created it, and the coordinator does not know that yet.
    Created,
    /// Both parts are sealed; the coordinator does not know it.
    Sealed,
    /// The commit is on disk; the source is not released yet.
    Committed,
}

const VICTIMS: [Victim; 3] = [Victim::SourceAgent, Victim::TargetAgent, Victim::Coordinator];

/// How it may end.
fn allowed(moment: Moment, victim: Victim) -> &'static [&'static str] {
    match (moment, victim) {
        (Moment::Committed, _) => &["succeeded"],
        (Moment::Sealed, Victim::SourceAgent | Victim::TargetAgent) => &["succeeded", "failed"],
        _ => &["failed"],
    }
}

fn until(what: &str, seen: impl Fn() -> bool) {
    eventually(PATIENCE, || if seen() { Ok(()) } else { Err(format!("waited in vain for {what}")) });
}

/// Begins a migration, and comes back in that moment, in which it stands still.
fn halt_at(shell: &Shell, at: usize, moment: Moment, stopped: &Stopped) -> String {
    let (source, target) = (shell.stage.node(NODES[at]), shell.stage.node(NODES[1 - at]));
    let log = LogTail::of(shell.stage.cluster.coordinator().log().to_owned());
    let slow: &[&str] =
        if moment == Moment::Transfer { &["--bandwidth-limit", "256K", "--no-compression"] } else { &[] };
    let id = shell.begin(1 - at, slow);
    match moment {
        Moment::Ending => until("its end to begin", || shell.log(at).last().is_some_and(|line| line == "asked")),
        Moment::Transfer => until("its end", || status(&source).as_deref() == Some("stopped")),
        Moment::Created | Moment::Sealed | Moment::Committed => {
            let coordinator = shell.stage.cluster.coordinator().process().unwrap();
            log.wait("phase=freeze ").unwrap();
            // The target has to hear that it is to restore; the workload takes seconds to end.
            thread::sleep(Duration::from_millis(400));
            stopped.stop(coordinator).unwrap();
            until("it to be created", || status(&target).as_deref() == Some("created"));
            // The agent has to hear of it, too.
            thread::sleep(Duration::from_millis(200));
        }
    }
    if moment >= Moment::Sealed {
        seal(shell, [&source, &target], &log, &id, stopped);
    }
    if moment == Moment::Committed {
        stopped.stop(agent(&source)).unwrap();
        stopped.go_on(shell.stage.cluster.coordinator().process().unwrap());
        log.wait("phase=release ").unwrap();
        thread::sleep(Duration::from_millis(50));
    }
    id
}

/// Lets the coordinator seal both parts, and stops it before it hears of the second.
fn seal(shell: &Shell, [source, target]: [&Node; 2], log: &LogTail, id: &str, stopped: &Stopped) {
    let coordinator = shell.stage.cluster.coordinator().process().unwrap();
    let is_sealed = |node: &Node| standing(node, id).as_deref() == Some("sealed");
    stopped.stop(agent(source)).unwrap();
    stopped.go_on(coordinator);
    log.wait("phase=commit ").unwrap();
    until("the target to be sealed", || is_sealed(target));
    thread::sleep(Duration::from_millis(50));
    stopped.stop(coordinator).unwrap();
    stopped.go_on(agent(source));
    until("the source to be sealed", || is_sealed(source));
}

/// Kills the victim, lets the others go on, and starts it again, as whoever supervises it does.
fn kill(stage: &Stage, at: usize, victim: Victim, stopped: &Stopped) {
    let node = match victim {
        Victim::SourceAgent => stage.node(NODES[at]),
        Victim::TargetAgent => stage.node(NODES[1 - at]),
        Victim::Coordinator => {
            let coordinator = stage.cluster.coordinator();
            coordinator.kill(Signal::KILL).unwrap();
            stopped.all_go_on();
            return eventually(PATIENCE, || {
                let started = coordinator.start().and_then(|_| coordinator.wait_ready());
                started.map_err(|error| error.to_string())
            });
        }
    };
    node.kill_agent(Signal::KILL).unwrap();
    stopped.all_go_on();
    eventually(PATIENCE, || node.start_agent().and_then(|_| node.wait_ready()).map_err(|error| error.to_string()));
}

/// So many small files that they go in the freeze, and take seconds on a slow link.
fn write_small_files(shell: &Shell) {
    let (folder, noise) = (shell.file(0, "small"), fs::read(shell.file(0, "big")).unwrap());
    fs::create_dir(&folder).unwrap();
    for (number, part) in noise.chunks(40_000).take(40).enumerate() {
        fs::write(folder.join(number.to_string()), part).unwrap();
    }
}

fn cases(moment: Moment) {
    let shell = Shell::up(SLOW);
    write_small_files(&shell);
    let mut clean = [None, None];
    for to in [1, 0] {
        shell.stage.migrate_with(NAME, NODES[to], COLD);
        shell.assert_runs(to, "after the first migrations");
        clean[to] = Some(shell.stage.settled_census());
    }
    let mut at = 0;
    for victim in VICTIMS {
        let what = format!("after the kill of {victim:?} at {moment:?}");
        let stopped = Stopped::default();
        let id = halt_at(&shell, at, moment, &stopped);
        kill(&shell.stage, at, victim, &stopped);
        let record = shell.ended(&id);
        println!("{what}: {} {}", phase(&record), record["reason"]);
        assert!(allowed(moment, victim).contains(&phase(&record)), "{what}: {record:#}");
        if phase(&record) == "succeeded" {
            at = 1 - at;
        }
        shell.assert_runs(at, &what);
        let log = shell.log(at);
        let in_turn = log.windows(2).all(|pair| pair[0] != pair[1]) && log.last().is_some_and(|last| last == "start");
        assert!(in_turn, "each end was one, and was followed by a start {what}: {log:?}");
        shell.stage.assert_census(clean[at].as_ref().unwrap(), is_of_the_coordinators);
    }
    shell.stage.migrate_with(NAME, NODES[1 - at], COLD);
    shell.assert_runs(1 - at, "after the last migration");
}

#[test]
fn whoever_is_killed_while_it_ends_it_is_started_again() {
    cases(Moment::Ending);
}

#[test]
fn whoever_is_killed_while_its_layer_is_sent_it_is_started_again() {
    cases(Moment::Transfer);
}

#[test]
fn whoever_is_killed_when_it_is_created_it_is_started_again() {
    cases(Moment::Created);
}

#[test]
fn whoever_is_killed_when_both_parts_are_sealed_one_copy_runs() {
    cases(Moment::Sealed);
}

#[test]
fn whoever_is_killed_behind_the_commit_it_runs_on_the_target() {
    cases(Moment::Committed);
}
