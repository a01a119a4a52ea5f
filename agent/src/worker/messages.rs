//! What agent and dump worker say to each other: one JSON object a line, over the worker's Unix socket.

use std::path::PathBuf;
use std::time::SystemTime;

use podferry_criu::DumpRequest;
use podferry_network::LinkHandle;
use serde::{Deserialize, Serialize};

use crate::throttle::ThrottleRecord;

/// Everything a dump worker has to know. It is written to a file, which the worker gets as its argument.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DumpJob {
    /// Of the migration; for the log.
    pub migration: String,
    /// CRIU.
    pub criu: PathBuf,
    /// runc's root folder.
    pub root: PathBuf,
    /// runc's id of the container.
    pub container: String,
    /// What CRIU is asked.
    pub request: DumpRequest,
    /// The library that is preloaded into CRIU.
    pub shim: PathBuf,
    /// The folder in which CRIU looks for programs first.
    pub programs: PathBuf,
    /// The file that says which memory CRIU is not to see, since it has been sent: see [`podferry_memory::hide`]. None when CRIU is to
    /// dump all.
    pub hidden: Option<PathBuf>,
    /// The file in which CRIU is told the flags of mappings: see [`podferry_memory::hide::mappings`]. None when it is to ask the kernel.
    #[serde(default)]
    pub mappings: Option<PathBuf>,
    /// The link to cut when the tasks are frozen; none for a container without one.
    pub link: Option<LinkHandle>,
    /// Kubernetes: whose packets go to a relay from the freeze on; none when its connections are closed.
    #[serde(default)]
    pub diverted: Option<Diverted>,
    /// What to release as soon as the tasks are stopped; none when they are not throttled.
    #[serde(default)]
    pub throttled: Option<ThrottleRecord>,
    /// When an unsealed dump is given up.
    pub deadline: SystemTime,
    /// Where the worker listens.
    pub control: PathBuf,
    /// Where it keeps [`WorkerRecord`].
    pub record: PathBuf,
}

/// Addresses whose packets go to a relay instead of to the container.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Diverted {
    /// The pod's network namespace.
    pub netns: PathBuf,
    /// What is ready there.
    pub home: podferry_network::relay::Home,
}

/// What has to be known when the worker itself is gone: written before what it says is done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerRecord {
    /// CRIU's process id, in the worker's pid namespace.
    pub criu_pid: Option<u32>,
    /// The part was sealed.
    pub sealed: bool,
    /// Release was ordered: the tasks die.
    pub released: bool,
}

/// What the agent tells the worker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "order")]
pub enum Order {
    /// Stop rolling back by yourself.
    Seal,
    /// The migration is committed: let the tasks die.
    Release,
    /// Let the tasks run on.
    Abort {
        /// For the log.
        reason: String,
    },
}

impl Order {
    /// What of it the worker's rules are about.
    pub fn kind(&self) -> podferry_part::Order {
        match self {
            Self::Seal => podferry_part::Order::Seal,
            Self::Release => podferry_part::Order::Release,
            Self::Abort { .. } => podferry_part::Order::Abort,
        }
    }
}

/// What the worker tells the agent: how far it is. After connecting it tells the newest at once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "stage")]
pub enum Stage {
    /// CRIU is being started or is freezing the tasks.
    Freezing,
    /// The tasks are frozen and the link is cut.
    Frozen {
        /// What the kernel saw before did reach them.
        cut_at: SystemTime,
    },
    /// CRIU has dumped everything and waits.
    Dumped,
    /// As before, and it waits for ever.
    Sealed,
    /// Sealing failed; the part is as it was before.
    NotSealed {
        /// Why.
        message: String,
    },
    /// The tasks will not run another instruction.
    Released,
    /// The tasks run on.
    Undone {
        /// Why.
        message: String,
        /// CRIU's line, when CRIU failed.
        criu_line: Option<String>,
        /// What to do, when CRIU failed.
        remedy: Option<String>,
        /// What could not be undone, e.g. a link that stays cut.
        left: Vec<String>,
    },
}

impl Stage {
    /// Whether nothing comes after it.
    pub fn is_last(&self) -> bool {
        matches!(self, Self::Released | Self::Undone { .. })
    }
}
