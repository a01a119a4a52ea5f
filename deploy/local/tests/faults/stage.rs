//! A cluster with a Redis that is counted on, and migrations that are stopped in a chosen phase.

use std::fmt::Write as _;
use std::fs;
use std::time::{Duration, Instant};

use podferry_common::identity::{Identity, IdentityFiles, Peer};
use podferry_local::faults::links::{self, Slow};
use podferry_local::faults::scene::{self, restart_agent, restart_coordinator};
pub use podferry_local::faults::{LogTail, NODES, Scene, Stopped, journal::standing};
pub use podferry_local::{FIRST_CONTAINER_ADDRESS, LocalCluster, Node, Output, ProcessId, Strategy};
use serde_json::Value;
use tempfile::TempDir;

use super::client::{Counting, Redis, inside};
use super::leftovers::{self, Inventory};
use super::sampler::{Sampler, running};
use super::{PATIENCE, options, redis, wait_every};

/// The workload.
pub const NAME: &str = "redis";
/// Its program.
pub const PROGRAM: &str = "redis-server";
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
        Redis::connect(cluster.client(), FIRST_CONTAINER_ADDRESS).unwrap().fill(mib).unwrap();
        let counting = Some(Counting::start(cluster.client(), FIRST_CONTAINER_ADDRESS).unwrap());
        let sampler = Sampler::start(cluster.nodes(), NAME, PROGRAM);
        Self { counting, sampler, at: 0, strategy: Strategy::Warm, clean: Default::default(), cluster, folder }
    }

    /// The workload where it is now.
    pub fn scene(&self) -> Scene<'_> {
        Scene { cluster: &self.cluster, workload: NAME, at: self.at, strategy: self.strategy }
    }

    pub fn source(&self) -> Node {
        self.scene().source().unwrap()
    }

    pub fn target(&self) -> Node {
        self.scene().target().unwrap()
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
        Begun(self.scene().begin().unwrap())
    }

    /// The migration as it is now; none while the coordinator does not answer.
    pub fn describe(&self, id: &str) -> Option<Value> {
        self.scene().describe(id)
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

    /// The connection counts on.
    pub fn assert_alive(&self, when: &str) {
        self.counting.as_ref().unwrap().alive().unwrap_or_else(|trouble| panic!("{when}: {trouble}"));
    }

    /// One copy runs, its connection lives, and nothing is left behind.
    pub fn assert_sound(&self, when: &str) {
        self.assert_alive(when);
        self.assert_one_copy(when);
        self.assert_clean(when);
    }

    /// Nothing is there that was not there before.
    pub fn assert_clean(&self, when: &str) {
        let begun = Instant::now();
        loop {
            let left = leftovers::difference(&self.clean[self.at], &leftovers::inventory(&self.cluster).unwrap());
            if left.is_empty() {
                return;
            }
            assert!(begun.elapsed() < PATIENCE, "left {when}: {left:#?}\n{}", self.logs());
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// What there is now is what is wanted from now on.
    pub fn take_stock(&mut self) {
        self.clean[self.at] = leftovers::settled(&self.cluster).unwrap();
    }

    /// A new connection counts on.
    pub fn reconnect(&mut self) {
        let counting = self.counting.take().unwrap();
        let (counting, lost) = counting.reconnected(self.cluster.client(), FIRST_CONTAINER_ADDRESS).unwrap();
        assert_eq!(lost, None);
        self.counting = Some(counting);
    }

    /// Limits what goes to a node, until the limit is dropped.
    pub fn slow_down(&self, node: &Node) -> Slow {
        Slow::down(&self.cluster, node.name(), links::TESTS_RATE).unwrap()
    }

    /// Does this on the client side's network.
    pub fn run_inside<T: Send>(&self, work: impl Future<Output = T> + Send) -> T {
        inside(self.cluster.client(), move || {
            tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
        })
        .unwrap()
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
        links::unplug(&self.cluster, node.name(), off).unwrap();
    }

    /// The first process of the workload is stopped by CRIU.
    pub fn is_stopped(&self) -> bool {
        self.scene().is_stopped().unwrap()
    }

    /// Restarts an agent after it was killed.
    pub fn restart_agent(node: &Node) {
        restart_agent(node).unwrap();
    }

    /// Restarts the coordinator after it was killed.
    pub fn restart_coordinator(&self) {
        restart_coordinator(&self.cluster).unwrap();
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
pub struct Begun(podferry_local::faults::Begun);

impl Begun {
    /// Waits until the coordinator has taken it, and says its id.
    pub fn id(&self) -> String {
        self.0.id().unwrap()
    }

    /// Waits until it is in a phase.
    pub fn wait_phase(&self, phase: &str) {
        self.0.wait_phase(phase).unwrap();
    }
}

/// The process of an agent.
pub fn agent(node: &Node) -> ProcessId {
    scene::agent(node).unwrap()
}

/// Most of the memory went before the freeze: the processes were followed.
fn assert_pre_copied(record: &str) {
    let record: Value = serde_json::from_str(record).unwrap();
    let pages = |round: &Value| round["pages"].as_u64().unwrap_or_default();
    let rounds: Vec<u64> = record["rounds"].as_array().into_iter().flatten().map(pages).collect();
    let last = rounds.last().copied().unwrap_or_default();
    assert!(rounds.len() >= 2 && rounds[0] > 1000 && last * 2 < rounds[0], "{record:#}");
}
