//! A cluster with a Redis that is counted on, and migrations that are stopped in a chosen phase.

use std::cell::RefCell;
use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use podferry_common::identity::{Identity, IdentityFiles, Peer};
use podferry_local::{FIRST_CONTAINER_ADDRESS, LocalCluster, Node, Output, ProcessId, Running, Signal};
use serde_json::Value;
use tempfile::TempDir;

use super::client::{Counting, Redis, inside};
use super::leftovers::{self, Inventory};
use super::processes;
use super::sampler::{Sampler, running};
use super::{PATIENCE, options, redis, wait_every, wait_for};

/// The workload.
pub const NAME: &str = "redis";
/// Its program.
pub const PROGRAM: &str = "redis-server";
/// Both nodes; the workload begins on the first.
pub const NODES: [&str; 2] = ["node-a", "node-b"];
/// A link on which the workload takes seconds.
const SLOW: &str = "16mbit";

/// How a stage migrates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strategy {
    Warm,
    Live,
    Postcopy,
}

impl Strategy {
    /// For the command line; with a budget that two shared cores keep.
    pub fn words(self) -> &'static [&'static str] {
        match self {
            Self::Warm => &["--strategy", "warm"],
            Self::Live => &["--strategy", "live", "--downtime-budget", "1000"],
            Self::Postcopy => &["--strategy", "postcopy", "--accept-loss"],
        }
    }
}

/// Everything a test of faults needs. What was stopped runs on before the cluster goes down.
pub struct Stage {
    pub counting: Option<Counting>,
    pub sampler: Sampler,
    /// On which of [`NODES`] the workload is.
    pub at: usize,
    pub strategy: Strategy,
    /// What there is when the workload is on the one node, and on the other.
    clean: [Inventory; 2],
    pub cluster: LocalCluster,
    pub folder: TempDir,
}

impl Stage {
    /// Brings it up, and moves the workload once there and back, so that all that is made only once is there.
    pub fn up(mib: usize) -> Self {
        Self::up_with(mib, Strategy::Warm)
    }

    /// The same for another strategy.
    pub fn up_with(mib: usize, strategy: Strategy) -> Self {
        let mut stage = Self::up_unmoved(mib);
        stage.strategy = strategy;
        stage.migrate();
        stage.migrate();
        stage.take_stock();
        stage.migrate();
        stage.take_stock();
        stage.migrate();
        stage.assert_sound("in the beginning");
        stage
    }

    /// Brings it up.
    pub fn up_unmoved(mib: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut options = options(folder.path());
        options.workloads = vec![NAME.to_owned()];
        let cluster = LocalCluster::up(&options).unwrap();
        cluster.start_workload(NODES[0], &redis()).unwrap();
        cluster.prepare_workload(NODES[1], &redis()).unwrap();
        Redis::connect(cluster.client(), FIRST_CONTAINER_ADDRESS).fill(mib);
        let counting = Some(Counting::start(cluster.client(), FIRST_CONTAINER_ADDRESS));
        let sampler = Sampler::start(cluster.nodes(), NAME, PROGRAM);
        Self { counting, sampler, at: 0, strategy: Strategy::Warm, clean: Default::default(), cluster, folder }
    }

    pub fn source(&self) -> Node {
        self.cluster.node(NODES[self.at]).unwrap()
    }

    pub fn target(&self) -> Node {
        self.cluster.node(NODES[1 - self.at]).unwrap()
    }

    pub fn podferry(&self, words: &[&str]) -> Output {
        self.cluster.podferry(words).unwrap()
    }

    /// Moves the workload to the other node, which has to succeed.
    pub fn migrate(&mut self) {
        let words = ["migrate", NAME, "--to", NODES[1 - self.at], "--wait", "--output", "json"];
        let output = self.podferry(&[&words, self.strategy.words()].concat());
        assert!(output.status.success(), "{}{}\n{}", output.stdout, output.stderr, self.logs());
        if self.strategy == Strategy::Live {
            assert_pre_copied(&output.stdout);
        }
        self.at = 1 - self.at;
    }

    /// Starts to move the workload to the other node.
    pub fn begin(&self) -> Begun {
        let log = LogTail::of(self.cluster.coordinator().log().to_owned());
        let mut command = self.cluster.podferry_command();
        command.args(["migrate", NAME, "--to", NODES[1 - self.at], "--wait"]).args(self.strategy.words());
        command.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::null());
        command.stderr(std::process::Stdio::null());
        let asking = self.cluster.client().spawn_command(command).unwrap();
        Begun { log, _asking: asking }
    }

    /// The migration as it is now; none while the coordinator does not answer.
    pub fn describe(&self, id: &str) -> Option<Value> {
        let output = self.podferry(&["describe", id, "--output", "json"]);
        serde_json::from_str(&output.stdout).ok().filter(|value: &Value| value["phase"].is_string())
    }

    /// Waits until a migration has ended, and takes note of where the workload is now.
    pub fn ended(&mut self, id: &str) -> (String, String) {
        let begun = Instant::now();
        loop {
            let now = self.describe(id);
            let word = |key: &str| now.as_ref().map(|now| now[key].as_str().unwrap_or_default().to_owned());
            let (phase, reason) = (word("phase").unwrap_or_default(), word("reason").unwrap_or_default());
            if ["succeeded", "failed", "cancelled"].contains(&phase.as_str()) {
                if phase == "succeeded" {
                    self.at = 1 - self.at;
                }
                return (phase, reason);
            }
            assert!(begun.elapsed() < PATIENCE, "{id} does not end; it is in {phase}\n{}", self.logs());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// One copy runs, and it is where it should be.
    pub fn assert_one_copy(&self, when: &str) {
        wait_every(Duration::from_millis(50), &format!("one copy on {} {when}", NODES[self.at]), || {
            let copies = NODES.map(|name| running(&self.cluster.node(name).unwrap(), NAME, PROGRAM).len());
            let wanted = if self.at == 0 { [1, 0] } else { [0, 1] };
            (copies == wanted).then_some(())
        });
        assert_eq!(self.sampler.doubles(), Vec::<String>::new(), "two copies ran {when}");
    }

    /// One copy runs, its connection lives, and nothing is left behind.
    pub fn assert_sound(&self, when: &str) {
        self.counting.as_ref().unwrap().assert_alive(when);
        self.assert_one_copy(when);
        self.assert_clean(when);
    }

    /// Nothing is there that was not there before.
    pub fn assert_clean(&self, when: &str) {
        let begun = Instant::now();
        loop {
            let left = leftovers::difference(&self.clean[self.at], &leftovers::inventory(&self.cluster));
            if left.is_empty() {
                return;
            }
            assert!(begun.elapsed() < PATIENCE, "left {when}: {left:#?}\n{}", self.logs());
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// What there is now is what is wanted from now on.
    pub fn take_stock(&mut self) {
        self.clean[self.at] = leftovers::settled(&self.cluster);
    }

    /// A new connection counts on.
    pub fn reconnect(&mut self) {
        let counting = self.counting.take().unwrap();
        self.counting = Some(counting.reconnected(self.cluster.client(), FIRST_CONTAINER_ADDRESS));
    }

    /// Limits what goes to a node.
    pub fn slow_down(&self, node: &Node) {
        let add = format!("tc qdisc add dev {} root tbf rate {SLOW} burst 64kb latency 100ms", node.name());
        self.cluster.fabric().shell(&add).unwrap();
    }

    /// Ends the limit.
    pub fn speed_up(&self, node: &Node) {
        self.cluster.fabric().shell(&format!("tc qdisc del dev {} root", node.name())).unwrap();
    }

    /// Does this on the client side's network.
    pub fn run_inside<T: Send>(&self, work: impl Future<Output = T> + Send) -> T {
        inside(self.cluster.client(), move || {
            tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
        })
    }

    /// A certificate of the cluster's authority, in a folder of this name.
    pub fn identity(&self, peer: &Peer, folder: &str) -> Identity {
        let files = IdentityFiles::in_folder(self.folder.path().join(folder));
        fs::create_dir_all(self.folder.path().join(folder)).unwrap();
        self.cluster.issue(peer, Duration::from_secs(3600), &files).unwrap();
        Identity::load(files).unwrap()
    }

    /// Takes a node off the net, or puts it back on.
    pub fn cut(&self, node: &Node, off: bool) {
        let word = if off { "down" } else { "up" };
        self.cluster.fabric().shell(&format!("ip link set {} {word}", node.name())).unwrap();
    }

    /// The first process of the workload is stopped by CRIU.
    pub fn is_stopped(&self) -> bool {
        let pids = processes::of_container(&self.source(), NAME);
        !pids.is_empty() && pids.iter().all(|pid| matches!(processes::state(*pid), Some('t' | 'T')))
    }

    /// Restarts an agent after it was killed. Other threads of a killed process hold its port for a moment longer than its
    /// first one; a supervisor tries again, too.
    pub fn restart_agent(node: &Node) {
        wait_every(Duration::from_millis(50), "the agent to start", || {
            node.start_agent().and_then(|_| node.wait_ready()).ok()
        });
    }

    /// Restarts the coordinator after it was killed.
    pub fn restart_coordinator(&self) {
        let coordinator = self.cluster.coordinator();
        wait_every(Duration::from_millis(50), "the coordinator to start", || {
            coordinator.start().and_then(|_| coordinator.wait_ready()).ok()
        });
    }

    /// What agent and coordinator wrote last.
    pub fn logs(&self) -> String {
        let mut all = String::new();
        for name in ["coordinator.log", "node-a-agent.log", "node-b-agent.log"] {
            let text = fs::read_to_string(self.cluster.logs().join(name)).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            let last = &lines[lines.len().saturating_sub(25)..];
            let _ = writeln!(all, "--- {name}\n{}", last.join("\n"));
        }
        all
    }
}

/// A migration that was asked for.
pub struct Begun {
    pub log: LogTail,
    _asking: Running,
}

impl Begun {
    /// Waits until the coordinator has taken it, and says its id.
    pub fn id(&self) -> String {
        let line = self.log.wait("migration accepted");
        let id = line.split("migration=").nth(1).and_then(|rest| rest.split_whitespace().next());
        id.unwrap_or_else(|| panic!("no id in {line:?}")).to_owned()
    }

    /// Waits until it is in a phase.
    pub fn wait_phase(&self, phase: &str) {
        self.log.wait(&format!("phase={phase} "));
    }
}

/// What is written into a log from now on.
pub struct LogTail {
    path: PathBuf,
    begin: usize,
}

impl LogTail {
    pub fn of(path: PathBuf) -> Self {
        let begin = fs::metadata(&path).map(|log| usize::try_from(log.len()).unwrap()).unwrap_or_default();
        Self { path, begin }
    }

    /// The first line that has this in it.
    pub fn find(&self, what: &str) -> Option<String> {
        let text = fs::read_to_string(&self.path).unwrap_or_default();
        let new = text.get(self.begin..)?;
        // The last line may not be whole yet.
        let whole = &new[..=new.rfind('\n')?];
        whole.lines().find(|line| format!("{line} ").contains(what)).map(str::to_owned)
    }

    pub fn wait(&self, what: &str) -> String {
        wait_every(Duration::from_micros(200), &format!("{what:?} in {}", self.path.display()), || self.find(what))
    }
}

/// Processes that were stopped by a signal; they go on when this is dropped.
#[derive(Default)]
pub struct Stopped(RefCell<Vec<Halt>>);

struct Halt {
    process: ProcessId,
    /// `nsenter`, which stops itself with the child that it waits for, and would not reap it for ever.
    parent: Option<ProcessId>,
}

impl Halt {
    fn end(&self) {
        self.process.signal(Signal::CONT);
        if let Some(parent) = self.parent {
            parent.signal(Signal::CONT);
        }
    }
}

impl Stopped {
    pub fn stop(&self, process: ProcessId) {
        let parent = processes::nsenter_of(process.pid);
        self.0.borrow_mut().push(Halt { process, parent });
        assert!(process.signal(Signal::STOP), "{process:?} is gone");
        wait_for("a process to stop", || matches!(processes::state(process.pid), Some('T' | 't')).then_some(()));
    }

    pub fn go_on(&self, process: ProcessId) {
        self.0.borrow_mut().retain(|halt| {
            let other = halt.process != process;
            if !other {
                halt.end();
            }
            other
        });
    }

    pub fn all_go_on(&self) {
        self.0.borrow_mut().drain(..).for_each(|halt| halt.end());
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        self.all_go_on();
    }
}

/// The process of an agent.
pub fn agent(node: &Node) -> ProcessId {
    node.agent_pid().and_then(ProcessId::of).unwrap()
}

/// Most of the memory went before the freeze: the processes were followed.
fn assert_pre_copied(record: &str) {
    let record: Value = serde_json::from_str(record).unwrap();
    let pages = |round: &Value| round["pages"].as_u64().unwrap_or_default();
    let rounds: Vec<u64> = record["rounds"].as_array().into_iter().flatten().map(pages).collect();
    let last = rounds.last().copied().unwrap_or_default();
    assert!(rounds.len() >= 2 && rounds[0] > 1000 && last * 2 < rounds[0], "{record:#}");
}

/// How far the pager of a node's part is, by its own record; empty without one.
pub fn pager_state(node: &Node, id: &str) -> String {
    let text = fs::read_to_string(node.agent_state().join("parts").join(id).join("pager.json")).unwrap_or_default();
    let status: Value = serde_json::from_str(&text).unwrap_or_default();
    status["state"]["state"].as_str().unwrap_or_default().to_owned()
}

/// How far a node's part of a migration is, by the agent's own record.
pub fn standing(node: &Node, id: &str) -> Option<String> {
    let text = fs::read_to_string(node.agent_state().join("parts").join(id).join("part.json")).ok()?;
    let part: Value = serde_json::from_str(&text).ok()?;
    part["standing"].as_str().map(str::to_owned)
}
