//! States, events, commands, and the one function that ties them together.

use std::fmt;

use podferry_common::{Failure, FailureCode};
use serde::{Deserialize, Serialize};

/// One of the two nodes that take part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// The node the workload runs on when the migration starts.
    Source,
    /// The node it is to run on afterwards.
    Target,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Source => "source",
            Self::Target => "target",
        })
    }
}

/// A request to one of the agents. Every one of them is idempotent for the same migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Call {
    /// Source: can this container be dumped?
    PreflightSource,
    /// Target: could it be restored here?
    PreflightTarget,
    /// Target: reserve, and expect the transfer from this source.
    Prepare,
    /// Source: pre-copy if the path has it, freeze, dump, send; the answer is a stream that ends when everything has been
    /// sent.
    Freeze,
    /// Target: restore; answered when the container is held before its first instruction.
    Restore,
    /// Either: from now on do not roll back by yourself, ask for the decision.
    Seal(Side),
    /// Source: destroy the container; answered when its init is confirmed dead.
    Release,
    /// Target: let the container run.
    Resume,
    /// Target: answered when all of the container's memory is in place.
    Fill,
    /// Either: undo this part. On the source this thaws.
    Abort(Side),
}

impl Call {
    /// The side whose agent is called.
    pub fn side(self) -> Side {
        match self {
            Self::PreflightSource | Self::Freeze | Self::Release => Side::Source,
            Self::PreflightTarget | Self::Prepare | Self::Restore | Self::Resume | Self::Fill => Side::Target,
            Self::Seal(side) | Self::Abort(side) => side,
        }
    }
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The record is on disk; begin.
    Started,
    /// The source's memory has been copied as far as it helps: it freezes now.
    Converged,
    /// The source's processes stand still.
    Frozen,
    /// An agent confirmed a call.
    Succeeded(Call),
    /// A call failed, was refused, or got no answer in its own time.
    Failed(Call, Failure),
    /// The phase took longer than its deadline.
    DeadlinePassed(Phase, Failure),
    /// Somebody asked to stop.
    CancelRequested(Failure),
    /// The coordinator was started again and found this record.
    Restarted(Failure),
}

/// What sets one strategy's way through the machine apart from another's. It follows from the strategy that a migration's
/// record has, and is the same in each step of one migration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Path {
    /// Memory is copied before the freeze, while the workload runs.
    pub pre_copy: bool,
    /// The target may be let go before all of its memory is in place.
    pub fill: bool,
    /// Some of that memory stays with the source meanwhile, which stands still and is destroyed when the target has all.
    pub post_copy: bool,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Call an agent now.
    Call(Call),
    /// Call an agent again, after a pause that grows with the number of attempts.
    Retry(Call),
}

/// The phase as users see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Both agents look whether it can be done; nothing is touched.
    Preflight,
    /// The target reserves.
    Prepare,
    /// The workload's memory is copied while it runs.
    PreCopy,
    /// The workload stands still, is dumped, sent and restored.
    Freeze,
    /// Both parts are sealed and the decision is written.
    Commit,
    /// The source is destroyed.
    Release,
    /// The target is let go.
    Resume,
    /// The target runs, and the rest of its memory is laid in behind it.
    Fill,
    /// Both parts are being undone.
    RollingBack,
    /// The workload runs on the target.
    Succeeded,
    /// Undone: the workload runs on the source, as before. Or lost behind the commit: see [`State::Lost`].
    Failed,
    /// Undone on request: the workload runs on the source, as before.
    Cancelled,
}

impl Phase {
    /// Its name in JSON, logs and the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Preflight => "preflight",
            Self::Prepare => "prepare",
            Self::PreCopy => "precopy",
            Self::Freeze => "freeze",
            Self::Commit => "commit",
            Self::Release => "release",
            Self::Resume => "resume",
            Self::Fill => "fill",
            Self::RollingBack => "rolling_back",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What an agent is told when it asks how a migration was decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// The target is the truth.
    Commit,
    /// The source is the truth.
    Abort,
    /// Not decided; ask again.
    Undecided,
}

/// What is known inside the freeze phase. All of it may be forgotten: a restart aborts from here in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Freezing {
    /// The source's processes stand still.
    pub frozen: bool,
    /// The source has sent everything.
    pub sent: bool,
    /// The target holds the restored container.
    pub held: bool,
}

/// How far the target's part has been undone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PartAbort {
    /// Asked, no answer of any kind yet.
    Asked,
    /// At least one attempt failed: its part is fenced by the durable decision, and is asked again.
    Unconfirmed,
    /// Undone, or there never was a part.
    Confirmed,
}

/// How far the source's part has been undone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SourceAbort {
    /// Waits for the first answer of the target.
    Due,
    /// Asked; repeated until confirmed.
    Asked,
    /// It runs as before, or was never touched.
    Confirmed,
}

/// Why a migration is undone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Why {
    /// What failed, where, why, what to do.
    pub failure: Failure,
    /// Somebody asked for it.
    pub cancelled: bool,
}

impl Why {
    fn is_outranked_by(&self, late: &Failure) -> bool {
        !self.cancelled && self.failure.criu_line.is_none() && late.criu_line.is_some()
    }
}

impl From<Failure> for Why {
    fn from(failure: Failure) -> Self {
        Self { failure, cancelled: false }
    }
}

/// Where a migration stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Asking both agents; neither has changed anything.
    Preflight {
        /// The source can be dumped; what it said is what the target is asked about.
        source: bool,
    },
    /// The target reserves; the source has not been touched.
    Preparing,
    /// The source's memory is copied while it runs; the target keeps what comes.
    PreCopying,
    /// Dump, transfer and restore.
    Freezing(Freezing),
    /// Both parts are complete and give up deciding for themselves.
    Sealing {
        /// The source has confirmed.
        source: bool,
        /// The target has confirmed.
        target: bool,
    },
    /// Committed. The source is being destroyed; with post-copy that comes last.
    Releasing,
    /// The source will never run again. The target is being let go.
    Resuming,
    /// The target runs. The rest of its memory is being laid in behind it.
    Filling,
    /// Committed, and the target's memory is lost as in [`State::Lost`]. The source, which had the rest of it, is being destroyed.
    Losing {
        /// Why.
        why: Why,
    },
    /// The workload runs on the target.
    Completed,
    /// Committed, and then memory that the target still needed was lost for good. Its agent has stopped the copy, and the
    /// source is long dead: the workload runs nowhere.
    Lost {
        /// Why.
        why: Why,
    },
    /// Decided against. Both parts are being undone, the target's first.
    Aborting {
        /// The target's part.
        target: PartAbort,
        /// The source's part.
        source: SourceAbort,
        /// Why.
        why: Why,
    },
    /// The source runs as before; the target could not be reached and is still asked to clean up.
    RolledBack {
        /// Why.
        why: Why,
    },
    /// The source runs as before, the target keeps nothing.
    Aborted {
        /// Why.
        why: Why,
    },
}

/// When a step's new state has to be on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// Before the first of its commands is executed.
    Before,
    /// At any time: a restart from the old state is safe too. Keeps writes off the path on which the workload stands still.
    Behind,
    /// Nothing changed.
    Unchanged,
}

/// The answer of [`State::step`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// The new state.
    pub state: State,
    /// When it has to be on disk.
    pub durability: Durability,
    /// What to do then, in this order.
    pub commands: Vec<Command>,
}

impl Step {
    fn to(state: State, durability: Durability, commands: Vec<Command>) -> Self {
        Self { state, durability, commands }
    }
}

impl State {
    /// The first state of every migration.
    pub fn new() -> Self {
        Self::Preflight { source: false }
    }

    /// The phase as users see it.
    pub fn phase(&self) -> Phase {
        match self {
            Self::Preflight { .. } => Phase::Preflight,
            Self::Preparing => Phase::Prepare,
            Self::PreCopying => Phase::PreCopy,
            Self::Freezing(_) => Phase::Freeze,
            Self::Sealing { .. } => Phase::Commit,
            Self::Releasing => Phase::Release,
            Self::Resuming => Phase::Resume,
            Self::Filling => Phase::Fill,
            Self::Completed => Phase::Succeeded,
            Self::Aborting { .. } => Phase::RollingBack,
            Self::RolledBack { why } | Self::Aborted { why } if why.cancelled => Phase::Cancelled,
            Self::RolledBack { .. } | Self::Aborted { .. } | Self::Losing { .. } | Self::Lost { .. } => Phase::Failed,
        }
    }

    /// What an agent that asks is told, given that this state is on disk.
    pub fn decision(&self) -> Decision {
        match self {
            Self::Preflight { .. } | Self::Preparing | Self::PreCopying | Self::Freezing(_) | Self::Sealing { .. } => {
                Decision::Undecided
            }
            Self::Releasing
            | Self::Resuming
            | Self::Filling
            | Self::Completed
            | Self::Losing { .. }
            | Self::Lost { .. } => Decision::Commit,
            Self::Aborting { .. } | Self::RolledBack { .. } | Self::Aborted { .. } => Decision::Abort,
        }
    }

    /// Whether the outcome is known, and the workload runs if it still can: another migration of it may start.
    pub fn is_settled(&self) -> bool {
        self.is_final() || matches!(self, Self::Losing { .. } | Self::RolledBack { .. })
    }

    /// Whether nothing is left to do.
    pub fn is_final(&self) -> bool {
        matches!(self, Self::Completed | Self::Lost { .. } | Self::Aborted { .. })
    }

    /// Whether a cancel would still have an effect.
    pub fn can_be_cancelled(&self) -> bool {
        self.decision() == Decision::Undecided
    }

    /// Why it was aborted, or lost.
    pub fn failure(&self) -> Option<&Failure> {
        match self {
            Self::Aborting { why, .. }
            | Self::RolledBack { why }
            | Self::Aborted { why }
            | Self::Losing { why }
            | Self::Lost { why } => Some(&why.failure),
            _ => None,
        }
    }

    /// The next state on that path. Events that do not belong to the state (late, repeated, out of order) change nothing.
    #[must_use]
    pub fn step(self, event: Event, path: Path) -> Step {
        match self {
            Self::Preflight { .. } | Self::Preparing | Self::PreCopying | Self::Freezing(_) | Self::Sealing { .. } => {
                self.undecided(event, path)
            }
            Self::Releasing | Self::Resuming | Self::Filling | Self::Losing { .. } => self.committed(&event, path),
            Self::Aborting { .. } | Self::RolledBack { .. } => self.aborted(event),
            Self::Completed | Self::Lost { .. } | Self::Aborted { .. } => self.unchanged(),
        }
    }

    fn unchanged(self) -> Step {
        Step::to(self, Durability::Unchanged, Vec::new())
    }

    fn undecided(self, event: Event, path: Path) -> Step {
        match event {
            Event::CancelRequested(failure) => self.abort(Why { failure, cancelled: true }),
            Event::Restarted(failure) => self.abort(failure.into()),
            // A failed call that this state did not make is an answer of the past.
            Event::Failed(call, failure) if self.awaits(call) => self.abort(failure.into()),
            Event::DeadlinePassed(phase, failure) if phase == self.phase() => self.abort(failure.into()),
            Event::Started => self.start(),
            Event::Converged if self == Self::PreCopying => Self::freeze(Freezing::default()),
            Event::Frozen => self.frozen(Freezing { frozen: true, ..Freezing::default() }),
            Event::Succeeded(Call::Freeze) => self.frozen(Freezing { frozen: true, sent: true, held: false }),
            Event::Succeeded(call) => self.advance(call, path),
            Event::Converged | Event::Failed(..) | Event::DeadlinePassed(..) => self.unchanged(),
        }
    }

    /// Whether an answer to `call` is being waited for. A freeze that has been sent in full, and a target that holds,
    /// are still watched: until both parts are sealed either may break.
    fn awaits(&self, call: Call) -> bool {
        match self {
            Self::Preflight { source } => call == if *source { Call::PreflightTarget } else { Call::PreflightSource },
            Self::Preparing => call == Call::Prepare,
            Self::PreCopying => call == Call::Freeze,
            Self::Freezing(_) => matches!(call, Call::Freeze | Call::Restore),
            Self::Sealing { .. } => matches!(call, Call::Freeze | Call::Restore | Call::Seal(_)),
            _ => false,
        }
    }

    fn start(self) -> Step {
        if self != Self::new() {
            return self.unchanged();
        }
        Step::to(self, Durability::Before, vec![Command::Call(Call::PreflightSource)])
    }

    /// A step forwards, before the commit: `call` was confirmed.
    fn advance(self, call: Call, path: Path) -> Step {
        match (self, call) {
            (Self::Preflight { source: false }, Call::PreflightSource) => {
                let ask = vec![Command::Call(Call::PreflightTarget)];
                Step::to(Self::Preflight { source: true }, Durability::Behind, ask)
            }
            (Self::Preflight { source: true }, Call::PreflightTarget) => {
                Step::to(Self::Preparing, Durability::Before, vec![Command::Call(Call::Prepare)])
            }
            // The target restores when there is something to restore: its call does not wait for hours.
            (Self::Preparing, Call::Prepare) if path.pre_copy => {
                Step::to(Self::PreCopying, Durability::Before, vec![Command::Call(Call::Freeze)])
            }
            (Self::Preparing, Call::Prepare) => Step::to(
                Self::Freezing(Freezing::default()),
                Durability::Before,
                vec![Command::Call(Call::Restore), Command::Call(Call::Freeze)],
            ),
            (Self::Freezing(now), Call::Restore) => Self::freezing(Freezing { held: true, ..now }),
            (Self::Sealing { target, .. }, Call::Seal(Side::Source)) => Self::sealing(true, target, path),
            (Self::Sealing { source, .. }, Call::Seal(Side::Target)) => Self::sealing(source, true, path),
            (state, _) => state.unchanged(),
        }
    }

    /// The source says that it stands still, or that it has sent everything. While pre-copy is under way that means that it
    /// has ended, too: a workload that stands still must not wait for a word that its agent has left out.
    fn frozen(self, said: Freezing) -> Step {
        match self {
            Self::PreCopying => Self::freeze(said),
            Self::Freezing(now) => Self::freezing(Freezing { sent: now.sent || said.sent, frozen: true, ..now }),
            other => other.unchanged(),
        }
    }

    /// Pre-copy is over. A restart from either of the two states aborts both parts.
    fn freeze(now: Freezing) -> Step {
        Step::to(Self::Freezing(now), Durability::Behind, vec![Command::Call(Call::Restore)])
    }

    fn freezing(now: Freezing) -> Step {
        if now.sent && now.held {
            let seals = vec![Command::Call(Call::Seal(Side::Target)), Command::Call(Call::Seal(Side::Source))];
            // A restart from either of the two aborts both parts, sealed or not.
            return Step::to(Self::Sealing { source: false, target: false }, Durability::Behind, seals);
        }
        Step::to(Self::Freezing(now), Durability::Behind, Vec::new())
    }

    fn sealing(source: bool, target: bool, path: Path) -> Step {
        if source && target && path.post_copy {
            // THE commit, too: a sealed source runs on for an abort only, and from here on there is none.
            return Step::to(Self::Resuming, Durability::Before, vec![Command::Call(Call::Resume)]);
        }
        if source && target {
            // THE commit: this state on disk is the decision.
            return Step::to(Self::Releasing, Durability::Before, vec![Command::Call(Call::Release)]);
        }
        Step::to(Self::Sealing { source, target }, Durability::Behind, Vec::new())
    }

    /// Decides against it. Only parts that may have been touched are asked to undo.
    fn abort(self, why: Why) -> Step {
        let source = match self {
            Self::Preflight { .. } => return Step::to(Self::Aborted { why }, Durability::Before, Vec::new()),
            Self::Preparing => SourceAbort::Confirmed,
            _ => SourceAbort::Due,
        };
        Step::to(
            Self::Aborting { target: PartAbort::Asked, source, why },
            Durability::Before,
            vec![Command::Call(Call::Abort(Side::Target))],
        )
    }

    /// After the commit: forwards, or again.
    fn committed(self, event: &Event, path: Path) -> Step {
        match (&self, event) {
            (Self::Releasing, Event::Succeeded(Call::Release)) if path.post_copy => {
                Step::to(Self::Completed, Durability::Before, Vec::new())
            }
            // Behind: a restart from Releasing repeats the release of a source that is gone, and comes back here.
            (Self::Releasing, Event::Succeeded(Call::Release)) => {
                Step::to(Self::Resuming, Durability::Behind, vec![Command::Call(Call::Resume)])
            }
            (Self::Resuming, Event::Succeeded(Call::Resume)) if path.fill => {
                Step::to(Self::Filling, Durability::Before, vec![Command::Call(Call::Fill)])
            }
            // Before: it is on disk that the target has all memory when the source gives its own up.
            (Self::Filling, Event::Succeeded(Call::Fill)) if path.post_copy => {
                Step::to(Self::Releasing, Durability::Before, vec![Command::Call(Call::Release)])
            }
            (Self::Resuming, Event::Succeeded(Call::Resume)) | (Self::Filling, Event::Succeeded(Call::Fill)) => {
                Step::to(Self::Completed, Durability::Before, Vec::new())
            }
            (Self::Filling, Event::Failed(Call::Fill, failure))
                if failure.code == FailureCode::DataLoss && path.post_copy =>
            {
                let why = failure.clone().into();
                Step::to(Self::Losing { why }, Durability::Before, vec![Command::Call(Call::Release)])
            }
            (Self::Losing { why }, Event::Succeeded(Call::Release)) => {
                Step::to(Self::Lost { why: why.clone() }, Durability::Before, Vec::new())
            }
            (Self::Filling, Event::Failed(Call::Fill, failure)) if failure.code == FailureCode::DataLoss => {
                let why = failure.clone().into();
                Step::to(Self::Lost { why }, Durability::Before, Vec::new())
            }
            (Self::Releasing | Self::Losing { .. }, Event::Failed(Call::Release, _)) => {
                self.again(Command::Retry(Call::Release))
            }
            (Self::Resuming, Event::Failed(Call::Resume, _)) => self.again(Command::Retry(Call::Resume)),
            (Self::Filling, Event::Failed(Call::Fill, _)) => self.again(Command::Retry(Call::Fill)),
            (Self::Releasing | Self::Losing { .. }, Event::Restarted(_)) => self.again(Command::Call(Call::Release)),
            (Self::Resuming, Event::Restarted(_)) => self.again(Command::Call(Call::Resume)),
            (Self::Filling, Event::Restarted(_)) => self.again(Command::Call(Call::Fill)),
            _ => self.unchanged(),
        }
    }

    fn again(self, command: Command) -> Step {
        Step::to(self, Durability::Unchanged, vec![command])
    }

    /// After the decision against: undo until both have confirmed. A repetition that changes nothing is not written: a
    /// target that is gone for good is asked for ever.
    fn aborted(self, event: Event) -> Step {
        let before = self.clone();
        let step = self.undone(event);
        let durability = if step.state == before { Durability::Unchanged } else { step.durability };
        Step { durability, ..step }
    }

    fn undone(self, event: Event) -> Step {
        const TARGET: Call = Call::Abort(Side::Target);
        const SOURCE: Call = Call::Abort(Side::Source);
        let (target, source, why) = match self {
            Self::Aborting { target, source, why } => (target, source, why),
            Self::RolledBack { why } => (PartAbort::Unconfirmed, SourceAbort::Confirmed, why),
            other => return other.unchanged(),
        };
        match event {
            Event::Succeeded(TARGET) => Self::undo(PartAbort::Confirmed, source, why, Vec::new()),
            Event::Failed(TARGET, _) if target != PartAbort::Confirmed => {
                Self::undo(PartAbort::Unconfirmed, source, why, vec![Command::Retry(TARGET)])
            }
            Event::Succeeded(SOURCE) => Self::undo(target, SourceAbort::Confirmed, why, Vec::new()),
            Event::Failed(SOURCE, _) if source == SourceAbort::Asked => {
                Self::undo(target, source, why, vec![Command::Retry(SOURCE)])
            }
            // The two agents see one accident from both ends: the one that quotes CRIU knows more.
            Event::Failed(Call::Freeze | Call::Restore, late) if why.is_outranked_by(&late) => {
                Self::undo(target, source, late.into(), Vec::new())
            }
            Event::Restarted(_) => Self::undo_after_restart(target, source, why),
            _ => Self::undo(target, source, why, Vec::new()),
        }
    }

    fn undo_after_restart(target: PartAbort, source: SourceAbort, why: Why) -> Step {
        let mut commands = Vec::new();
        if target != PartAbort::Confirmed {
            commands.push(Command::Call(Call::Abort(Side::Target)));
        }
        if source == SourceAbort::Asked {
            commands.push(Command::Call(Call::Abort(Side::Source)));
        }
        Self::undo(target, source, why, commands)
    }

    /// The state for what is known of both parts; asks the source once the target has answered in any way. It need not
    /// wait for more than that: no target is ever resumed without a commit, and that is now out of reach.
    fn undo(target: PartAbort, mut source: SourceAbort, why: Why, mut commands: Vec<Command>) -> Step {
        if source == SourceAbort::Due && target != PartAbort::Asked {
            source = SourceAbort::Asked;
            commands.push(Command::Call(Call::Abort(Side::Source)));
        }
        let state = match (target, source) {
            (PartAbort::Confirmed, SourceAbort::Confirmed) => Self::Aborted { why },
            (PartAbort::Unconfirmed, SourceAbort::Confirmed) => Self::RolledBack { why },
            _ => Self::Aborting { target, source, why },
        };
        // The decision itself is on disk since the first abort; the rest may be asked twice.
        let durability = if state.is_settled() { Durability::Before } else { Durability::Behind };
        Step::to(state, durability, commands)
    }
}

impl Default for State {
    fn default() -> Self {
        Self::new()
    }
}
