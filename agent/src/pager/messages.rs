//! What agent and pager have to say to each other, in files.

use std::path::PathBuf;

use podferry_runtime::Init;
use serde::{Deserialize, Serialize};

/// Everything a pager has to know. It is written to a file, which the pager gets as its argument.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PagerJob {
    /// Of the migration; for the log.
    pub migration: String,
    /// The folder of the [`podferry_memory::handover::Handover`]. Its files are removed when all is laid in.
    pub handover: PathBuf,
    /// Where the pager keeps its [`PagerStatus`].
    pub status: PathBuf,
    /// Where someone listens who fetches the pages that the handover lacks; none when it lacks none.
    #[serde(default)]
    pub fetch: Option<PathBuf>,
    /// Whose memory it is.
    pub container: PagedContainer,
}

/// A container that is ended when pages of it are lost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PagedContainer {
    /// runc's root folder.
    pub root: PathBuf,
    /// runc's id of it.
    pub id: String,
    /// The directories of its cgroup, for the time before runc knows it.
    pub cgroups: Vec<PathBuf>,
}

/// A process, and not a later one with its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Its number.
    pub pid: i32,
    /// Clock ticks since boot.
    pub start_time: u64,
}

impl Holder {
    /// The process that has this number now.
    pub fn of_pid(pid: u32) -> Option<Self> {
        let Init { pid, start_time } = Init::of_pid(pid.cast_signed())?;
        Some(Self { pid, start_time })
    }

    /// Whether it lives.
    pub fn is_alive(self) -> bool {
        Init { pid: self.pid, start_time: self.start_time }.is_alive()
    }
}

/// How far a pager is. The file is there whole or not at all, and complete before anybody is told to end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PagerStatus {
    /// The processes that hold the memory, the first first.
    pub holders: Vec<Holder>,
    /// Whose memory it is.
    pub container: PagedContainer,
    /// How far they are.
    pub state: PagerState,
}

/// How far a pager is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum PagerState {
    /// It is being started.
    Starting,
    /// No restore has connected yet.
    Waiting,
    /// The restore goes on, or is held; faults are served.
    Serving,
    /// The restored processes run.
    Filling {
        /// Pages that they do not have yet.
        left_pages: u64,
    },
    /// All pages are in place.
    Done {
        /// How many were laid in.
        pages: u64,
        /// How often someone waited for a page.
        faults: u64,
        /// Milliseconds from the completion of the restore until the last page was in place.
        fill_ms: u64,
    },
    /// The restore failed before its processes ran, or was given up. The handover is as it was.
    Failed {
        /// Why.
        message: String,
    },
    /// Pages were lost after the processes may have run: they were ended.
    Lost {
        /// How.
        message: String,
    },
}

impl PagerState {
    /// Whether nothing comes after it.
    pub fn is_last(&self) -> bool {
        matches!(self, Self::Done { .. } | Self::Failed { .. } | Self::Lost { .. })
    }
}
