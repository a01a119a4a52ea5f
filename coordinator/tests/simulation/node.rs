//! What there is on a node: the container, the agent's disk and memory, and the processes that outlive it.

use podferry_common::FailureCode;
use podferry_part::{Authority, Side, Standing};

use crate::coordinator::JobId;
use crate::world::{MOST, Number, Time};

/// A container's processes, as the kernel has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "each stops it by itself")]
pub(crate) struct Container {
    /// It has processes. Without, it is what runc keeps of a stopped one.
    pub(crate) alive: bool,
    /// Its cgroup is frozen.
    pub(crate) fenced: bool,
    /// CRIU stops it, to dump it.
    pub(crate) traced: bool,
    /// It waits at its first instruction: at the hook, or at runc's fifo.
    pub(crate) held: bool,
    /// Up to which run of the workload it has what that did.
    pub(crate) version: u32,
    /// When it was made: which container of that name it is.
    pub(crate) born: Time,
}

impl Container {
    pub(crate) fn running(version: u32, born: Time) -> Self {
        Self { alive: true, fenced: false, traced: false, held: false, version, born }
    }

    /// Whether it can execute an instruction.
    pub(crate) fn runs(&self) -> bool {
        self.alive && !self.fenced && !self.traced && !self.held
    }
}

/// `part.json`: `agent/src/journal.rs`
#[derive(Clone, Copy, Debug)]
pub(crate) struct Journal {
    pub(crate) side: Side,
    pub(crate) standing: Standing,
    pub(crate) tidied: bool,
    pub(crate) going: bool,
    /// Cold: when the container was to be told to end,
    pub(crate) begun: Option<Time>,
    /// and that it was.
    pub(crate) told: bool,
}

/// What has come of the transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Inbox {
    Waiting,
    Complete,
    Broken,
    /// Of an agent that was started again.
    None,
}

/// A part in an agent's memory: `agent/src/source`, `agent/src/target`
#[derive(Clone, Copy, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "as the agent's own")]
pub(crate) struct Part {
    pub(crate) side: Side,
    /// Of the ledger, which is never ahead of the disk.
    pub(crate) standing: Standing,
    /// Somebody has the ledger's lock.
    pub(crate) locked: bool,
    pub(crate) cancelled: bool,
    /// Source: its freeze goes on,
    pub(crate) runs: bool,
    /// and nobody listens to it any more.
    pub(crate) forsaken: bool,
    /// The call whose stream tells of it.
    pub(crate) stream: Option<JobId>,
    /// Cold: it has ended, and its files are with the target.
    pub(crate) stopped: bool,
    pub(crate) inbox: Inbox,
    /// Which life of the other agent the transfer is with, once it has begun.
    pub(crate) peer_life: Option<u32>,
    /// Target, cold: it has been created.
    pub(crate) created: bool,
    /// Does not ask any more: waits for the coordinator's `Release`.
    pub(crate) awaits: bool,
    /// When it undoes itself, if it is not sealed.
    pub(crate) deadline: Time,
}

impl Part {
    pub(crate) fn new(side: Side) -> Self {
        Self {
            side,
            standing: Standing::Open,
            locked: false,
            cancelled: false,
            runs: false,
            forsaken: false,
            stream: None,
            stopped: false,
            inbox: if side == Side::Target { Inbox::Waiting } else { Inbox::None },
            peer_life: None,
            created: false,
            awaits: false,
            deadline: Time::MAX,
        }
    }
}

/// A place in the registry: `agent/src/parts.rs`
#[derive(Clone, Copy, Debug)]
pub(crate) enum Entry {
    None,
    Beginning,
    Alive(Part),
    Filling,
    Broken,
    Ended(Standing),
}

impl Entry {
    /// Whether its workload is taken.
    pub(crate) fn is_busy(&self) -> bool {
        matches!(self, Self::Beginning | Self::Alive(_) | Self::Filling | Self::Broken)
    }
}

/// How far a dump worker is: `agent/src/worker/messages.rs`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    Freezing,
    Frozen,
    Dumped,
    /// The fence is up, and the seal not noted yet.
    Sealing,
    Sealed,
    NotSealed,
    Released,
    Undone,
}

/// A dump worker with its CRIU: processes of their own.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Worker {
    pub(crate) stage: Stage,
    pub(crate) criu: bool,
    pub(crate) connected: bool,
    pub(crate) deadline: Time,
    /// What the images have.
    pub(crate) version: u32,
}

/// `job.json` and `worker.json`
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct WorkerNote {
    pub(crate) started: bool,
    pub(crate) sealed: bool,
}

/// `runc restore` with its CRIU and its hook: processes of their own.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Restore {
    pub(crate) sealed: bool,
    /// Which life of the agent the hook was connected to.
    pub(crate) agent: u32,
}

/// How far the pagers are, in `pager.json`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pager {
    /// The container is held.
    Waiting,
    /// So much is missing.
    Filling(u8),
    Done,
    /// Ended with a restore that came to nothing.
    Stopped,
    Lost,
}

/// The pagers of a restored container, with the file that they keep.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pagers {
    pub(crate) state: Pager,
    /// One of the two lives.
    pub(crate) alive: bool,
}

impl Pagers {
    /// `pager::client::is_well`
    pub(crate) fn is_well(self) -> bool {
        match self.state {
            Pager::Done => true,
            Pager::Stopped | Pager::Lost => false,
            Pager::Waiting | Pager::Filling(_) => self.alive,
        }
    }

    /// `fill::is_under_way`
    pub(crate) fn is_under_way(self) -> bool {
        matches!(self.state, Pager::Waiting | Pager::Filling(_))
    }
}

/// One step of what an agent does.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Act {
    Prepare { job: JobId, stage: u8, since: Time },
    Freeze { job: JobId, stage: u8 },
    Run(Run),
    Restore { job: JobId, stage: u8, since: Time },
    Seal { job: JobId, stage: u8, since: Time },
    Release { job: Option<JobId>, stage: u8, since: Time },
    Resume { job: JobId, stage: u8, since: Time, tries: u8 },
    Fill { job: JobId, since: Time },
    Abort { job: Option<JobId>, authority: Authority, stage: u8, since: Time, then: Option<FailureCode> },
    Tidy,
    Settle { pause: Time },
    Watch,
    Deadline,
}

/// How far a freeze is: `SourcePart::run`
#[derive(Clone, Copy, Debug)]
pub(crate) enum Run {
    Round {
        left: u8,
        until: Time,
    },
    Converged,
    Dump {
        since: Time,
        told: bool,
    },
    Sent {
        version: u32,
    },
    /// Cold: that it will be told to end is noted,
    Tell,
    /// it is told,
    Told,
    /// and has ended, or is killed.
    Ended {
        since: Time,
    },
}

/// What processes beside the agent do, and what happens to them.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Process {
    Stop,
    Dump,
    Order(podferry_part::Order),
    Sealed,
    Look,
    LetGo,
    /// A cold container, made then, heeds its signal.
    Ends(Time),
    HookLooks,
    Fill,
    KillWorker,
    KillCriu,
    KillRestore,
    KillPagers,
}

/// Where an act takes place.
#[derive(Clone, Copy, Debug)]
pub(crate) struct At {
    pub(crate) node: usize,
    pub(crate) number: Number,
    /// Of the agent: what an agent was about to do ends with it.
    pub(crate) life: u32,
}

pub(crate) struct Node {
    /// Its agent lives,
    pub(crate) up: bool,
    pub(crate) life: u32,
    /// with this in its memory,
    pub(crate) entries: [Entry; MOST],
    /// and this on its disk.
    pub(crate) journal: [Option<Journal>; MOST],
    pub(crate) container: Option<Container>,
    pub(crate) workers: [Option<Worker>; MOST],
    pub(crate) notes: [WorkerNote; MOST],
    pub(crate) restores: [Option<Restore>; MOST],
    pub(crate) pagers: [Option<Pagers>; MOST],
    /// Images or files that came: up to which run.
    pub(crate) images: [Option<u32>; MOST],
}

impl Node {
    pub(crate) fn new(is_home: bool) -> Self {
        Self {
            up: true,
            life: 0,
            entries: [Entry::None; MOST],
            journal: [None; MOST],
            container: is_home.then_some(Container::running(1, 0)),
            workers: [None; MOST],
            notes: [WorkerNote::default(); MOST],
            restores: [None; MOST],
            pagers: [None; MOST],
            images: [None; MOST],
        }
    }

    pub(crate) fn part(&mut self, number: Number) -> Option<&mut Part> {
        match &mut self.entries[number] {
            Entry::Alive(part) => Some(part),
            _ => None,
        }
    }

    pub(crate) fn runs(&self) -> bool {
        self.container.is_some_and(|container| container.runs())
    }

    pub(crate) fn holds(&self) -> bool {
        self.container.is_some_and(|container| container.alive && container.held)
    }

    pub(crate) fn is_alive(&self) -> bool {
        self.container.is_some_and(|container| container.alive)
    }
}
