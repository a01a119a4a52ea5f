//! Pre-copy: memory goes to the target while the container runs.
//!
//! ```text
//! container   runs ────────────────────────────────────▶│ frozen ·········
//! tracker     attach, round 1,  round 2,  …  round n    │ last round
//! transfer            └ memory  └ memory     └ memory   │  └ memory, existing
//! ```
//!
//! Each process of the container's tree is followed by a tracker of its own. A round asks each what was written since the one
//! before (the first time: all there is), and sends that. What large files of the writable layer and of volumes hold is sent [beside it](seeds). What is
//! left when the container is frozen is sent in the freeze. CRIU does not see the memory that is moved this way; all of a process that
//! cannot be followed is left to it.

mod seeds;
mod shared;
mod verify;

use std::collections::{BTreeSet, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use nix::unistd::Pid;
use podferry_common::failure::{Failure, FailureCode, chain};
use podferry_criu::CriuError;
use podferry_memory::convergence::{Convergence, Plan, RoundFacts, Verdict};
use podferry_memory::copier::Copier;
use podferry_memory::hide;
use podferry_memory::maps::{self, MovedError};
use podferry_memory::previous::{Budget, PreviousPages};
use podferry_memory::range::PageRanges;
use podferry_memory::tracker::{self, NotFollowed, Preference, TrackError, Untracked, WriteTracker};
use podferry_runtime::{Container, Member};
use podferry_transfer::{Object, ObjectWriter, Owner, Pool, Sender, TransferError};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use self::shared::Segments;
use super::FreezeEvent;
use super::batch::Parted;
use super::courtesy::Courtesy;
use crate::context::Context;
use crate::throttle::Throttle;
use crate::volumes::MovedFiles;
use seeds::Seeds;

/// Bytes that are read and sent at a time: one frame of the transfer.
const BATCH: usize = 1 << 20;

/// How long and how often to pre-copy.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PreCopyOrder {
    /// The downtime that is aimed at.
    pub budget: Duration,
    /// No more rounds than this.
    pub max_rounds: u32,
    /// When it is given up.
    pub deadline: SystemTime,
    /// Whether all of the memory is compared with the target's in the freeze.
    pub verify: bool,
    /// Whether the container gets less CPU time when it would be given up otherwise.
    pub throttle: bool,
}

/// One pass over the memory.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Round {
    /// Pages that were sent.
    pub pages: u64,
    /// Their bytes, and those of files.
    pub raw_bytes: u64,
    /// Bytes on the wire.
    pub wire_bytes: u64,
    /// How long it took.
    pub duration: Duration,
    /// Pages written a second.
    pub dirty_rate: f64,
    /// What the memory that is written meanwhile would add to the downtime.
    pub predicted: Duration,
    /// The CPU time that the container was held to meanwhile, in microseconds per second; none when it was not throttled.
    pub throttle: Option<u64>,
}

/// Why memory cannot be sent.
#[derive(Debug, thiserror::Error)]
pub(super) enum SendError {
    /// The process's memory cannot be read.
    #[error("cannot read the memory of process {pid}: {source}")]
    Read {
        /// The process.
        pid: i32,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// Its writes cannot be followed any more.
    #[error(transparent)]
    Track(#[from] TrackError),
    /// Something came in the last moment to where CRIU does not look.
    #[error(transparent)]
    Moved(#[from] MovedError),
    /// What CRIU wrote cannot be read.
    #[error(transparent)]
    Images(#[from] CriuError),
    /// The transfer is broken.
    #[error(transparent)]
    Transfer(#[from] TransferError),
    /// The writable layer or a volume cannot be gone over, or what its files hold cannot be sent.
    #[error(transparent)]
    Layer(#[from] podferry_filesystem::Error),
    /// The migration was aborted.
    #[error("the migration was aborted")]
    Aborted,
}

impl From<std::io::Error> for SendError {
    fn from(source: std::io::Error) -> Self {
        Self::Read { pid: 0, source }
    }
}

impl SendError {
    /// Whether it is about one process, and the others may go on.
    fn is_of_a_process(&self) -> bool {
        matches!(self, Self::Read { .. } | Self::Track(_))
    }

    /// The same, with the process whose memory was read.
    fn of_process(self, pid: i32) -> Self {
        match self {
            Self::Read { source, .. } => Self::Read { pid, source },
            other => other,
        }
    }
}

/// The way to the target, for as long as somebody waits for the transfer.
#[derive(Clone)]
pub(super) struct Way {
    /// Weak: who gives the transfer up ends it at once.
    pub(super) sender: Weak<Sender>,
    /// The migration was aborted.
    pub(super) cancelled: CancellationToken,
    /// Towards a workload that still runs.
    pub(super) courtesy: Option<Arc<Courtesy>>,
}

impl Way {
    /// To be called between two batches: rests if that is called for. Blocks.
    ///
    /// # Errors
    /// When the migration was aborted.
    fn pause(&self) -> Result<(), SendError> {
        self.rest();
        if self.cancelled.is_cancelled() { Err(SendError::Aborted) } else { Ok(()) }
    }

    fn rest(&self) {
        if let Some(courtesy) = &self.courtesy {
            courtesy.rest();
        }
    }

    fn rested(&self) -> Duration {
        self.courtesy.as_ref().map_or(Duration::ZERO, |courtesy| courtesy.rested())
    }

    fn sender(&self) -> Result<Arc<Sender>, SendError> {
        if self.cancelled.is_cancelled() {
            return Err(SendError::Aborted);
        }
        self.sender.upgrade().ok_or(SendError::Aborted)
    }

    fn open(&self, object: &Object) -> Result<(ObjectWriter, Pool), SendError> {
        let sender = self.sender()?;
        Ok((sender.open_blocking(object)?, sender.pool()))
    }

    pub(super) fn wire_bytes(&self) -> u64 {
        self.sender.upgrade().map_or(0, |sender| sender.stats().wire_bytes)
    }
}

/// All that a pre-copy needs.
pub(super) struct Job {
    pub(super) context: Context,
    pub(super) container: Container,
    pub(super) files: MovedFiles,
    pub(super) order: PreCopyOrder,
    /// What does not converge stays here for the target to fetch.
    pub(super) post_copy: bool,
    pub(super) way: Way,
    pub(super) events: mpsc::Sender<FreezeEvent>,
    /// Where the container's own CPU limit is noted before it is throttled.
    pub(super) throttle_file: PathBuf,
}

/// What pre-copy came to.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Converged {
    /// Pages that were sent.
    pub(super) pages: u64,
    /// What the memory that is left will add to the downtime.
    pub(super) predicted: Duration,
    /// What becomes of it.
    pub(super) rest: Rest,
}

/// What becomes of memory that was written since the last round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Rest {
    /// It is sent in the freeze.
    #[default]
    Sent,
    /// It stays here, for the target to fetch when the container runs there.
    Fetched,
}

/// The processes that are followed. Dropping it ends the following, at 20 to 35 ms for each GiB during which they cannot change
/// their mappings.
#[derive(Debug, Default)]
pub(super) struct Followers {
    followed: Vec<Followed>,
    /// Those that are left to CRIU.
    left: HashSet<Member>,
    /// What they share.
    shared: Segments,
    /// What a person should know.
    notes: BTreeSet<String>,
    round: u32,
    /// What of the files was sent.
    pub(super) seeds: Seeds,
    /// How much of what was sent may be kept, of all processes together.
    budget: Budget,
    /// Why the container is not throttled, or not further, though that was asked for.
    throttle_note: Option<String>,
}

/// A process that is followed.
#[derive(Debug)]
struct Followed {
    member: Member,
    tracker: Box<dyn WriteTracker + Send>,
    copier: Copier,
    /// What the target has of pages that may be sent again.
    previous: PreviousPages,
    /// What CRIU does not see.
    hidden: PageRanges,
    /// What of it exists, once it is frozen.
    existing: PageRanges,
}

impl Followers {
    /// Sends memory round by round until what is left is little enough for a freeze. Blocks.
    ///
    /// # Errors
    /// When the transfer breaks, the container ends, the memory is written faster than it is sent, or time runs out. The container
    /// has not been frozen then.
    pub(super) fn pre_copy(&mut self, job: &Job) -> Result<Converged, Failure> {
        let plan = Plan { most_rounds: job.order.max_rounds, ..Plan::new(job.order.budget) };
        let mut convergence = Convergence::new(plan);
        let mut throttle = self.throttle_of(job);
        if let Some(throttle) = &throttle {
            convergence = convergence.with_throttle(throttle.least());
        }
        let mut pages = 0;
        let mut before = Duration::ZERO;
        loop {
            let new = self.follow_new(job);
            let new = new.map_err(|error| job.failed("the container's processes", &error))?;
            if job.post_copy {
                announce(&self.followed[self.followed.len() - new..], &job.way)
                    .map_err(|error| job.failed("pre-copy", &error))?;
            }
            let begun = Instant::now();
            let way = if self.round == 0 { self.courteous(job) } else { job.way.clone() };
            let mut round = self.one_round(job, &way, before).map_err(|error| job.failed("pre-copy", &error))?;
            let mut facts = facts(&round, way.rested(), self.shared.cost() + self.seeds.cost());
            if let Some(throttle) = &mut throttle {
                throttle.wait_for_some_periods(begun);
                (round.duration, round.throttle) = (begun.elapsed(), throttle.held());
                (facts.duration, facts.cpu_rate) = (round.duration, throttle.cpu_rate());
            }
            let verdict = convergence.after_round(facts);
            (pages, before) = (pages + round.pages, round.duration);
            round.predicted = convergence.predicted().saturating_sub(plan.fixed);
            tracing::debug!(number = self.round, ?round, ?verdict, "a round of pre-copy");
            // Who watches may have gone; whoever waits for the end has not.
            let _nobody_watches = job.events.blocking_send(FreezeEvent::Round(round));
            match verdict {
                Verdict::Freeze { predicted } => {
                    if let Some(throttled) = convergence.throttled() {
                        self.notes.insert(format!("the processes were throttled to {throttled}"));
                    }
                    return Ok(self.converged(job, pages, predicted.saturating_sub(plan.fixed)));
                }
                Verdict::Throttle { rate } => {
                    if let Some(Err(error)) = throttle.as_mut().map(|throttle| throttle.hold(rate)) {
                        convergence.cannot_throttle();
                        self.not_throttled(&error);
                    }
                }
                Verdict::GiveUp { why } if job.post_copy => {
                    self.notes.insert(format!("the rest of the memory is fetched after the resume: {why}"));
                    return Ok(Converged { rest: Rest::Fetched, ..self.converged(job, pages, Duration::ZERO) });
                }
                Verdict::GiveUp { why } => {
                    let why = self.throttle_note.iter().fold(why, |why, note| format!("{why}; {note}"));
                    return Err(job.context.refusal(FailureCode::FailedPrecondition, why).in_phase("precopy"));
                }
                Verdict::Another => {}
            }
            if SystemTime::now() > job.order.deadline {
                let message = "pre-copy did not end before its deadline";
                return Err(job.context.refusal(FailureCode::DeadlineExceeded, message).in_phase("precopy"));
            }
        }
    }

    /// The way of the first round. Who asks for a throttle wants the memory there sooner than that.
    fn courteous(&self, job: &Job) -> Way {
        if job.order.throttle || !job.context.config.give_way || self.followed.is_empty() {
            return job.way.clone();
        }
        let pids = self.followed.iter().map(|followed| followed.member.pid).collect();
        // Half of the time has to be enough.
        let time = job.order.deadline.duration_since(SystemTime::now()).unwrap_or_default() / 2;
        let courtesy = Courtesy::towards(pids, Instant::now() + time);
        Way { courtesy: Some(Arc::new(courtesy)), ..job.way.clone() }
    }

    /// How the container can be throttled, if that is wanted and possible. It is not touched yet.
    fn throttle_of(&mut self, job: &Job) -> Option<Throttle> {
        if !job.order.throttle {
            return None;
        }
        let throttle = Throttle::of(&job.container, job.throttle_file.clone());
        throttle.inspect_err(|error| self.not_throttled(error)).ok()
    }

    /// The migration goes on without; a person is told why.
    fn not_throttled(&mut self, error: &(dyn std::error::Error + 'static)) {
        let why = chain(error);
        tracing::warn!(why, "the container cannot be throttled");
        self.throttle_note = Some(format!("the workload cannot be throttled: {why}"));
    }

    fn converged(&self, job: &Job, pages: u64, predicted: Duration) -> Converged {
        let followed = self.followed.iter().map(|followed| followed.tracker.choice().to_string());
        let notes: BTreeSet<String> =
            followed.chain(self.notes.iter().cloned()).chain(self.throttle_note.clone()).collect();
        let notes = notes.into_iter().collect();
        let told = FreezeEvent::Converged { predicted_ms: predicted.as_secs_f64() * 1e3, notes };
        let _nobody_watches = job.events.blocking_send(told);
        Converged { pages, predicted, rest: Rest::Sent }
    }

    /// Does not follow anybody: all memory stays here. The target is told whose that is. Blocks.
    ///
    /// # Errors
    /// When the transfer breaks, or the container has ended.
    pub(super) fn stand_by(
        &mut self,
        context: &Context,
        container: &Container,
        way: &Way,
    ) -> Result<Converged, Failure> {
        let failed = |error: &(dyn std::error::Error + 'static)| {
            failed(context, "asking for the container's processes", error).in_phase("freeze")
        };
        let why = "all memory is fetched after the resume";
        for member in container.tree().map_err(|error| failed(&error))? {
            self.followed.push(Followed::untracked(member, why.to_owned()));
        }
        announce(&self.followed, way).map_err(|error| failed(&error))?;
        Ok(Converged { rest: Rest::Fetched, ..Converged::default() })
    }

    /// Begins to follow processes that are new; gives how many, which are the last. One that cannot be followed is left to CRIU, or
    /// to post-copy.
    fn follow_new(&mut self, job: &Job) -> Result<usize, podferry_runtime::Error> {
        self.followed.retain(|followed| followed.member.is_alive());
        let known = self.followed.len();
        let members = job.container.tree()?;
        self.shared.find(&members, &self.budget);
        for member in members {
            let known = self.followed.iter().any(|followed| followed.member == member);
            if known || self.left.contains(&member) {
                continue;
            }
            match Followed::new(member, job.context.config.tracker.into(), &self.budget) {
                Ok(followed) => self.followed.push(followed),
                Err(error) if job.post_copy && member.is_alive() => {
                    self.followed.push(Followed::untracked(member, chain(&error)));
                }
                Err(error) => self.leave(member, &error),
            }
        }
        Ok(self.followed.len() - known)
    }

    fn leave(&mut self, member: Member, error: &(dyn std::error::Error + 'static)) {
        if !member.is_alive() {
            return;
        }
        let why = chain(error);
        tracing::warn!(pid = member.pid, why, "a process's writes cannot be followed");
        self.notes.insert(format!("all memory of process {} is moved in the freeze: {why}", member.pid));
        self.left.insert(member);
    }

    fn one_round(&mut self, job: &Job, way: &Way, before: Duration) -> Result<Round, SendError> {
        self.round += 1;
        let (begun, wire_before) = (Instant::now(), way.wire_bytes());
        let number = self.round;
        let files = self.seeds.round(&job.files, way)?;
        let mut round = Round::default();
        let mut lost = Vec::new();
        for (index, followed) in self.followed.iter_mut().enumerate() {
            match followed.round(number, way) {
                Ok(pages) => round.pages += pages,
                Err(error) if error.is_of_a_process() => lost.push((index, error)),
                Err(error) => return Err(error),
            }
        }
        for (index, error) in lost.into_iter().rev() {
            let followed = self.followed.remove(index);
            // One that runs another program now can be followed anew.
            let again = matches!(&error, SendError::Track(TrackError::Replaced { .. }));
            if !again {
                self.leave(followed.member, &error);
            }
        }
        let (pages, left) = self.shared.round(number, way)?;
        round.pages += pages;
        self.notes.extend(left);
        round.raw_bytes = round.pages * podferry_memory::PAGE_SIZE + files.data_bytes;
        round.wire_bytes = way.wire_bytes() - wire_before;
        round.duration = begun.elapsed();
        // What this round sent was written during the one before; the first sends all there is and says nothing of that.
        #[expect(clippy::cast_precision_loss, reason = "below 2^52 pages")]
        if !before.is_zero() {
            round.dirty_rate = round.pages as f64 / before.as_secs_f64();
        }
        Ok(round)
    }

    /// Writes down what CRIU is not to see: what can be moved now.
    pub(super) fn hide(&mut self, file: &Path) -> std::io::Result<()> {
        for followed in &mut self.followed {
            // One that has ended has nothing to hide.
            followed.hidden = maps::followable(followed.pid()).unwrap_or_default();
        }
        let ranges = self.followed.iter().flat_map(|followed| {
            let pid = followed.member.pid;
            followed.hidden.iter().map(move |range| (pid, range))
        });
        std::fs::write(file, hide::describe(ranges, self.shared.files()?))
    }

    /// Sends what was written since the last round, or which pages these are, and which pages there are; and what is new in files. The
    /// container must stand still. Blocks.
    ///
    /// # Errors
    /// When the transfer breaks, or something came where CRIU does not look.
    pub(super) fn last_round(
        &mut self,
        context: &Context,
        files: &MovedFiles,
        way: &Way,
        rest: Rest,
    ) -> Result<u64, Failure> {
        let failed = |error: &SendError| failed(context, "the last round", error).in_phase("transfer");
        self.round += 1;
        let number = self.round;
        let mut pages = 0;
        for followed in self.followed.iter_mut().filter(|followed| followed.member.is_alive()) {
            let sent = followed.last_round(number, way, rest);
            pages += sent.map_err(|error| failed(&error))?;
        }
        let shared = self.shared.last_round(number, way);
        pages += shared.map_err(|error| failed(&error))?;
        self.seeds.last_round(files, way).map_err(|error| failed(&error))?;
        Ok(pages)
    }
}

/// Tells the target of whom memory comes, also of whom none may come before the freeze.
fn announce(followed: &[Followed], way: &Way) -> Result<(), SendError> {
    for followed in followed {
        let (writer, _) = way.open(&Object::Memory { owner: followed.owner(), round: 0 })?;
        writer.close_blocking()?;
    }
    Ok(())
}

/// What convergence has to know of a round, which rested for so long: nobody rests in a freeze.
fn facts(round: &Round, rested: Duration, beside: Duration) -> RoundFacts {
    let seconds = round.duration.saturating_sub(rested).as_secs_f64();
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "a rate, from positive numbers"
    )]
    let wire_rate = if seconds > 0.0 { (round.wire_bytes as f64 / seconds) as u64 } else { 0 };
    // What files hold has to be sent like memory.
    let pages = round.raw_bytes.div_ceil(podferry_memory::PAGE_SIZE);
    RoundFacts { pages, bytes: round.wire_bytes, duration: round.duration, wire_rate, cpu_rate: 0, beside }
}

impl Job {
    fn failed(&self, what: &str, error: &(dyn std::error::Error + 'static)) -> Failure {
        failed(&self.context, what, error).in_phase("precopy")
    }
}

fn failed(context: &Context, what: &str, error: &(dyn std::error::Error + 'static)) -> Failure {
    context.failure(FailureCode::Unavailable, &format!("{what} failed"), error)
}

/// Sends which pages these are.
fn send_list(object: &Object, ranges: &PageRanges, way: &Way) -> Result<(), SendError> {
    let (mut writer, _) = way.open(object)?;
    let list: Vec<u8> =
        ranges.iter().flat_map(|range| [range.start.to_le_bytes(), range.end.to_le_bytes()]).flatten().collect();
    writer.data_blocking(Bytes::from(list))?;
    Ok(writer.close_blocking()?)
}

impl Followed {
    fn new(member: Member, preference: Preference, budget: &Budget) -> Result<Self, NotFollowed> {
        let pid = Pid::from_raw(member.pid);
        let tracker = tracker::attach_as(pid, preference)?;
        Ok(Self::by(member, tracker, budget.clone()))
    }

    fn untracked(member: Member, why: String) -> Self {
        let tracker = Untracked::of(Pid::from_raw(member.pid), why);
        Self::by(member, Box::new(tracker), Budget::default())
    }

    fn by(member: Member, tracker: Box<dyn WriteTracker + Send>, budget: Budget) -> Self {
        let copier = Copier::new(Pid::from_raw(member.pid), BATCH);
        Self {
            member,
            tracker,
            copier,
            previous: PreviousPages::new(budget),
            hidden: PageRanges::new(),
            existing: PageRanges::new(),
        }
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.member.pid)
    }

    fn process(&self) -> u32 {
        self.member.inner.unsigned_abs()
    }

    fn owner(&self) -> Owner {
        Owner::Process(self.process())
    }

    fn round(&mut self, number: u32, way: &Way) -> Result<u64, SendError> {
        let written = self.tracker.round()?;
        self.previous.begin_round();
        self.send(&written, number, way)
    }

    fn send(&mut self, pages: &PageRanges, round: u32, way: &Way) -> Result<u64, SendError> {
        if pages.is_empty() {
            return Ok(0);
        }
        let (mut writer, pool) = way.open(&Object::Memory { owner: self.owner(), round })?;
        let pid = self.member.pid;
        let previous = &mut self.previous;
        let take = |ranges: &[_], contents| {
            way.pause()?;
            Ok(Parted::of(ranges, contents, previous, &pool).send(&mut writer, &pool)?)
        };
        let copied = self.copier.read_into::<SendError>(pages, || pool.take(BATCH), take);
        if copied.is_err() {
            // Of a part it is not certain that it arrives.
            self.previous.clear();
        }
        let copied = copied.map_err(|error| error.of_process(pid));
        // Also after an error: the object has to be closed for the transfer to go on without this process.
        writer.close_blocking()?;
        let copied = copied?;
        self.previous.forget(&copied.vanished);
        self.tracker.tell_again(&copied.vanished);
        Ok(copied.pages)
    }

    fn last_round(&mut self, number: u32, way: &Way, rest: Rest) -> Result<u64, SendError> {
        let moved = maps::moved(self.pid(), &self.hidden)?;
        let frozen = self.tracker.frozen(&moved)?;
        let process = self.process();
        let pages = match rest {
            Rest::Sent => {
                self.previous.begin_last_round();
                self.send(&frozen.written, number, way)?
            }
            Rest::Fetched => {
                send_list(&Object::Later { process }, &frozen.written, way)?;
                0
            }
        };
        self.existing = frozen.existing;
        send_list(&Object::Existing { owner: self.owner() }, &self.existing, way)?;
        Ok(pages)
    }
}
