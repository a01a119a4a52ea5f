//! What is written down of an experiment, and how each number is taken.
//!
//! A results folder holds `environment.json` (an [`Environment`]), `suite.toml` as it was run, and `results.jsonl`: one
//! [`Measurement`] a line, appended as soon as it was taken, so that an experiment that was broken off goes on where it was.
//!
//! Times are in ms, sizes in bytes unless a name says otherwise, rates per second. A number that was not taken is absent, never 0.

use serde::{Deserialize, Serialize};

/// What is moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Workload {
    /// Stateless: products over HTTP.
    Catalogue,
    /// Stateful: shopping carts in its own memory, over HTTP.
    Cart,
    /// Redis.
    Redis,
    /// `PostgreSQL` under transactions.
    Postgres,
    /// A service on the Java virtual machine.
    Java,
    /// A service on Node.js.
    Node,
    /// A service in Go.
    Go,
    /// A process that writes to its memory at a rate that is set.
    Synthetic,
}

/// Who moves it, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Strategy {
    /// Stop, move files, start anew.
    Cold,
    /// Pause, transfer, resume.
    Warm,
    /// Iterative pre-copy.
    Live,
    /// Freeze at once, fetch behind.
    #[serde(rename = "postcopy")]
    PostCopy,
    /// Rounds of pre-copy, then post-copy.
    Hybrid,
    /// A new instance takes the application's own state over.
    Application,
    /// What podferry chooses itself.
    Auto,
    /// The peer `criu dump`, copy, `criu restore`.
    PeerCriu,
    /// The peer `runc checkpoint`, copy, `runc restore`.
    PeerRunc,
    /// The peer `podman container checkpoint --export`, copy, `--import`.
    PeerPodman,
}

/// One point of the parameter space.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Scenario {
    /// What is moved.
    pub workload: Workload,
    /// Who moves it, and how.
    pub strategy: Strategy,
    /// What it holds in memory, in MiB.
    pub memory_mib: u64,
    /// Share of that memory which it writes to each second, in percent; absent where the demand decides.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dirty_percent: Option<f64>,
    /// How many clients ask at once.
    pub clients: u32,
    /// How long a client waits between an answer and its next request, in ms.
    #[serde(default)]
    pub think_ms: u64,
    /// The container's CPU limit in CPUs; absent when there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_limit: Option<f64>,
    /// The container's memory limit, in MiB; absent when there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_limit_mib: Option<u64>,
    /// What the link between the nodes carries, in Mbit/s; absent when it is not shaped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link_mbit: Option<u64>,
    /// Round-trip time of that link, in ms.
    #[serde(default)]
    pub link_rtt_ms: f64,
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "outcome", content = "reason")]
pub enum Outcome {
    /// It runs on the target.
    Moved,
    /// It was refused, or given up before the freeze, for this reason. It runs on the source.
    Refused(String),
    /// It failed for this reason.
    Failed(String),
}

/// One run of one scenario.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Measurement {
    /// What was run.
    pub scenario: Scenario,
    /// Its number among the repeats of that scenario, from 0.
    pub repeat: u32,
    /// When it began, in ms since 1970.
    pub began_unix_ms: f64,
    /// How it ended.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// Resident memory of the workload before the move, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resident_bytes: Option<u64>,
    /// Downtime: from the freeze to the first instruction on the target, as seen from outside the process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime_ms: Option<f64>,
    /// The whole migration, from the request to the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_ms: Option<f64>,
    /// Deployment latency: from the request until the workload is fully operational on the target, its last page there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deployment_ms: Option<f64>,
    /// Time in each phase, in the order of the phases. Only those that were gone through.
    #[serde(default)]
    pub phases: Vec<Phase>,
    /// The rounds of pre-copy; the last is that of the freeze.
    #[serde(default)]
    pub rounds: Vec<Round>,
    /// Bytes of pages and files that were moved, before packing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub raw_bytes: Option<u64>,
    /// Bytes on the wire between the nodes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wire_bytes: Option<u64>,
    /// What each side spent: source, then target.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cost: Option<[Cost; 2]>,
    /// What the clients saw.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clients: Option<Clients>,
    /// What a person should know.
    #[serde(default)]
    pub notes: Vec<String>,
}

/// Time in one phase.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Phase {
    /// Its name, as in the protocol: `preflight`, `precopy`, `freeze` and so on. A peer's: `dump`, `copy`, `restore`.
    pub name: String,
    /// When it began, in ms behind [`Measurement::began_unix_ms`].
    pub start_ms: f64,
    /// How long it took.
    pub duration_ms: f64,
}

/// Pages that were sent in one go.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Round {
    /// How many pages.
    pub pages: u64,
    /// Bytes before packing.
    pub raw_bytes: u64,
    /// How long it took.
    pub duration_ms: f64,
}

/// What a node spent on a migration, the workload itself not counted.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// CPU time of the agent and all that it started, in seconds.
    pub cpu_s: f64,
    /// The most memory that they held at once, in bytes.
    pub peak_memory_bytes: u64,
}

/// What the clients saw of one run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Clients {
    /// Requests of all of them.
    pub requests: u64,
    /// Those without a right answer.
    pub failed_requests: u64,
    /// Those that were sent once more.
    pub retried_requests: u64,
    /// How often a connection was closed, reset or silent for too long.
    pub connection_resets: u64,
    /// What was confirmed and is gone, or is there twice.
    pub lost_items: u64,
    /// Service gap: the longest time without a right answer, for each client, seen to 1 ms.
    pub gaps_ms: Vec<f64>,
    /// Latencies before the migration, while it ran, and after it.
    pub latency: [Latency; 3],
    /// Answers in a second of all clients together before the migration and in pre-copy.
    pub throughput: [Option<f64>; 2],
    /// Latency over time: the worst in each slice, for the timeline.
    #[serde(default)]
    pub timeline: Vec<Slice>,
}

/// Percentiles of the time from a request to its answer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Latency {
    /// How many answers.
    pub count: u64,
    /// Half were faster.
    pub p50_ms: f64,
    /// 90 of 100 were faster.
    pub p90_ms: f64,
    /// 99 of 100 were faster.
    pub p99_ms: f64,
    /// The slowest.
    pub max_ms: f64,
}

/// A slice of the time of a run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Slice {
    /// When it began, in ms behind [`Measurement::began_unix_ms`]; before it: negative.
    pub start_ms: f64,
    /// The slowest answer that came in it; absent when none came.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worst_ms: Option<f64>,
    /// How many answers came.
    pub answers: u64,
}

/// On what it was measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Environment {
    /// When the experiment began, in ms since 1970.
    pub began_unix_ms: f64,
    /// podferry's version and the commit that it was built from.
    pub podferry: String,
    /// `uname -r`.
    pub kernel: String,
    /// Model of the processor.
    pub processor: String,
    /// How many CPUs there are.
    pub cpus: u32,
    /// Memory of the machine, in bytes.
    pub memory_bytes: u64,
    /// Names and versions of what took part: CRIU, runc, podman, Redis.
    pub versions: Vec<(String, String)>,
    /// What else may matter: cgroup version, kind of file system, whether the machine is virtual.
    #[serde(default)]
    pub notes: Vec<String>,
}
