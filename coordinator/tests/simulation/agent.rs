//! The agent: which call it takes, what it undoes, and what it does when it is started again.
//!
//! The rules are the agent's own ([`podferry_part`]). What stands around them here is a model, and says which function it mirrors; each
//! of its steps ends where the real one waits for something or writes, so that it may be killed there.

use podferry_common::FailureCode;
use podferry_coordinator::migration::{Call, Decision, Side as CallSide};
use podferry_part::{Authority, Known, May, Settle, Side, Standing, Step, TakeUp, Word, may, settle, take_up};

use crate::coordinator::JobId;
use crate::faults::Broken;
use crate::network::{Message, Place};
use crate::node::{Act, At, Entry, Inbox, Pagers, Part, Process, Stage};
use crate::world::{Event, MS, Number, SECOND, Time, World};

/// `RETRY` and `SETTLE_AFTER` of `agent/src/recovery.rs`
const RETRY: Time = SECOND;
const SETTLE_AFTER: Time = 5 * SECOND;
/// A real part asks every second. Here it asks more and more seldom, so that a dead coordinator costs few steps.
const LONGEST_RETRY: Time = 30 * SECOND;

impl World {
    pub(crate) fn at(&self, node: usize, number: Number) -> At {
        At { node, number, life: self.nodes[node].life }
    }

    pub(crate) fn again(&mut self, at: At, act: Act, after: Time) {
        self.schedule(after, Event::Act { at, act });
    }

    /// The next step of it, behind a write or something else that takes a little.
    pub(crate) fn next(&mut self, at: At, act: Act) {
        let after = self.little();
        self.again(at, act, after);
    }

    /// Looks again, the more seldom the longer it takes.
    pub(crate) fn poll(&mut self, at: At, act: Act, since: Time) {
        let after = 2 * MS + (self.now - since) / 3;
        self.again(at, act, after);
    }

    pub(crate) fn act(&mut self, at: At, act: Act) {
        if !self.nodes[at.node].up || self.nodes[at.node].life != at.life {
            return;
        }
        match act {
            Act::Prepare { job, stage, since } => self.act_prepare(at, job, stage, since),
            Act::Freeze { job, stage } => self.act_freeze(at, job, stage),
            Act::Run(run) => self.act_run(at, run),
            Act::Restore { job, stage, since } => self.act_restore(at, job, stage, since),
            Act::Seal { job, stage, since } => match self.side(at) {
                Some(Side::Source) => self.seal_source(at, job, stage, since),
                Some(Side::Target) => self.seal_target(at, job, stage, since),
                None => self.answer(at, job, Err(FailureCode::FailedPrecondition)),
            },
            Act::Release { job, stage, since } => self.act_release(at, job, stage, since),
            Act::Resume { job, stage, since, tries } => self.act_resume(at, job, stage, since, tries),
            Act::Fill { job, since } => self.act_fill(at, job, since),
            Act::Abort { job, authority, stage, since, then } => {
                self.act_abort(at, (job, authority, then), stage, since);
            }
            Act::Tidy => self.act_tidy(at),
            Act::Settle { pause } => self.act_settle(at, pause),
            Act::Watch => self.act_watch(at),
            Act::Deadline => self.act_deadline(at),
        }
    }

    pub(crate) fn part(&mut self, at: At) -> Option<&mut Part> {
        self.nodes[at.node].part(at.number)
    }

    fn side(&mut self, at: At) -> Option<Side> {
        self.part(at).map(|part| part.side)
    }

    pub(crate) fn answer(&mut self, at: At, job: JobId, result: Result<(), FailureCode>) {
        self.send(Place::Node(at.node), Place::Coordinator, Message::Answer { job, result });
    }

    pub(crate) fn answer_if_asked(&mut self, at: At, job: Option<JobId>, result: Result<(), FailureCode>) {
        if let Some(job) = job {
            self.answer(at, job, result);
        }
    }

    /// Takes the ledger's lock, and says what the rules say to a step then. `None`: somebody else has it.
    pub(crate) fn lock(&mut self, at: At, step: Step) -> Option<May> {
        let forsakes = self.is_broken(Broken::UndoesWhatIsSealed);
        let part = self.part(at)?;
        if part.locked {
            return None;
        }
        let step = match step {
            Step::Abort(Authority::Own) if forsakes => Step::Abort(Authority::Coordinator),
            other => other,
        };
        let answer = may(part.side, part.standing, step);
        part.locked = answer == May::Take;
        Some(answer)
    }

    pub(crate) fn unlock(&mut self, at: At) {
        if let Some(part) = self.part(at) {
            part.locked = false;
        }
    }

    /// `Ledger::change`: first on the disk.
    pub(crate) fn note_standing(&mut self, at: At, standing: Standing) {
        if let Some(journal) = &mut self.nodes[at.node].journal[at.number] {
            journal.standing = standing;
        }
        if let Some(part) = self.part(at) {
            part.standing = standing;
        }
        self.say(|| format!("node {} notes {standing:?} of {}", at.node, at.number));
    }

    /// `Parts::ended`
    pub(crate) fn end_part(&mut self, at: At, standing: Standing) {
        self.nodes[at.node].entries[at.number] = Entry::Ended(standing);
    }

    /// `Parts::reserve`
    pub(crate) fn reserve(&mut self, at: At) -> bool {
        let entries = &mut self.nodes[at.node].entries;
        if !matches!(entries[at.number], Entry::None) || entries.iter().any(Entry::is_busy) {
            return false;
        }
        entries[at.number] = Entry::Beginning;
        true
    }

    /// `AgentService`, its calls: `agent/src/service/mod.rs`
    pub(crate) fn request(&mut self, node: usize, job: JobId, number: Number, call: Call) {
        let at = self.at(node, number);
        let since = self.now;
        let entry = self.nodes[node].entries[number];
        let refused = Err(FailureCode::FailedPrecondition);
        match call {
            Call::PreflightSource => {
                let runs = self.nodes[node].runs();
                self.answer(at, job, if runs { Ok(()) } else { refused });
            }
            Call::PreflightTarget => {
                let free = self.nodes[node].container.is_none();
                self.answer(at, job, if free { Ok(()) } else { refused });
            }
            Call::Prepare => self.next(at, Act::Prepare { job, stage: 0, since }),
            Call::Freeze => self.next(at, Act::Freeze { job, stage: 0 }),
            Call::Restore => self.next(at, Act::Restore { job, stage: 0, since }),
            Call::Seal(_) => self.next(at, Act::Seal { job, stage: 0, since }),
            Call::Release => match entry {
                Entry::Ended(Standing::Released) => self.answer(at, job, Ok(())),
                Entry::Alive(Part { side: Side::Source, .. }) => {
                    self.next(at, Act::Release { job: Some(job), stage: 0, since });
                }
                _ => self.answer(at, job, refused),
            },
            Call::Resume => match entry {
                Entry::Ended(Standing::Resumed) | Entry::Filling => self.answer(at, job, Ok(())),
                Entry::Alive(Part { side: Side::Target, .. }) => {
                    self.next(at, Act::Resume { job, stage: 0, since, tries: 0 });
                }
                _ => self.answer(at, job, refused),
            },
            Call::Fill => match entry {
                Entry::Ended(Standing::Resumed) | Entry::Filling => self.next(at, Act::Fill { job, since }),
                _ => self.answer(at, job, refused),
            },
            Call::Abort(_) => self.take_abort(at, job, entry),
        }
    }

    /// `Agent::undo`
    fn take_abort(&mut self, at: At, job: JobId, entry: Entry) {
        let since = self.now;
        match entry {
            Entry::Ended(Standing::Released | Standing::Resumed) | Entry::Filling => {
                self.answer(at, job, Err(FailureCode::FailedPrecondition));
            }
            // `Parts::get_or_abort`: what arrives late must not begin.
            Entry::None => {
                self.end_part(at, Standing::Aborted);
                self.answer(at, job, Ok(()));
            }
            Entry::Beginning | Entry::Broken => self.answer(at, job, Err(FailureCode::Unavailable)),
            Entry::Ended(_) => self.answer(at, job, Ok(())),
            Entry::Alive(_) => {
                let authority = Authority::Coordinator;
                self.next(at, Act::Abort { job: Some(job), authority, stage: 0, since, then: None });
            }
        }
    }

    /// Undoes a part by itself: `recovery::undo`. `then` is what the stream of a freeze says when that is done.
    pub(crate) fn undo(&mut self, at: At, authority: Authority, then: Option<FailureCode>) {
        let since = self.now;
        self.next(at, Act::Abort { job: None, authority, stage: 0, since, then });
    }

    fn act_abort(&mut self, at: At, asked: (Option<JobId>, Authority, Option<FailureCode>), stage: u8, since: Time) {
        let (job, authority, then) = asked;
        let Some(side) = self.side(at) else {
            // It has ended meanwhile.
            let undone = matches!(self.nodes[at.node].entries[at.number], Entry::Ended(Standing::Aborted));
            self.answer_if_asked(at, job, if undone { Ok(()) } else { Err(FailureCode::FailedPrecondition) });
            self.tell_of_a_freeze(at, then);
            return;
        };
        let act = |stage, since| Act::Abort { job, authority, stage, since, then };
        if stage == 0 {
            match self.lock(at, Step::Abort(authority)) {
                None => return self.poll(at, act(0, since), since),
                Some(May::Taken) => return self.undone(at, job, then),
                Some(May::Refuse) => return self.not_undone(at, asked),
                Some(May::Take) => {}
            }
            self.say(|| format!("node {} undoes {} ({authority:?})", at.node, at.number));
            if let Some(part) = self.part(at) {
                part.cancelled = true;
            }
        }
        let done = match side {
            Side::Source => self.abort_source(at, stage, since),
            Side::Target => self.abort_target(at, stage),
        };
        match done {
            Undoing::Next => {
                let now = self.now;
                self.next(at, act(stage + 1, now));
            }
            Undoing::Look => self.poll(at, act(stage, since), since),
            Undoing::Failed => {
                self.unlock(at);
                self.not_undone(at, asked);
            }
            Undoing::Done => {
                self.note_standing(at, Standing::Aborted);
                self.unlock(at);
                self.undone(at, job, then);
            }
        }
    }

    fn undone(&mut self, at: At, job: Option<JobId>, then: Option<FailureCode>) {
        self.end_part(at, Standing::Aborted);
        self.answer_if_asked(at, job, Ok(()));
        self.tell_of_a_freeze(at, then);
    }

    fn not_undone(&mut self, at: At, (job, authority, then): (Option<JobId>, Authority, Option<FailureCode>)) {
        if job.is_some() {
            return self.answer_if_asked(at, job, Err(FailureCode::FailedPrecondition));
        }
        let standing = self.part(at).map(|part| part.standing);
        if standing.is_some_and(|standing| podferry_part::is_let_be(standing, authority)) {
            self.tell_of_a_freeze(at, then);
            return;
        }
        let since = self.now;
        self.again(at, Act::Abort { job: None, authority, stage: 0, since, then }, RETRY);
    }

    fn tell_of_a_freeze(&mut self, at: At, then: Option<FailureCode>) {
        let stream = self.coordinator.jobs.iter().rposition(|job| job.number == at.number && job.call == Call::Freeze);
        if let (Some(code), Some(job)) = (then, stream) {
            self.answer(at, job, Err(code));
        }
    }

    /// `Agent::watch_deadline`
    fn act_deadline(&mut self, at: At) {
        let forsakes = self.is_broken(Broken::UndoesWhatIsSealed);
        let Some(part) = self.part(at) else { return };
        if part.standing == Standing::Open || (forsakes && part.standing == Standing::Sealed) {
            self.say(|| format!("the deadline of node {} has passed", at.node));
            self.undo(at, Authority::Own, None);
        }
    }

    /// `recovery::settle_later`
    pub(crate) fn settle_later(&mut self, at: At) {
        self.again(at, Act::Settle { pause: RETRY }, SETTLE_AFTER);
    }

    /// `recovery::settle_sealed`: asks the coordinator.
    fn act_settle(&mut self, at: At, pause: Time) {
        let Some(part) = self.part(at) else { return };
        if part.standing != Standing::Sealed || part.awaits {
            return;
        }
        self.send(Place::Node(at.node), Place::Coordinator, Message::Ask { number: at.number });
        self.again(at, Act::Settle { pause: (pause * 2).min(LONGEST_RETRY) }, pause);
    }

    /// `recovery::settle_sealed`: has been told.
    pub(crate) fn told(&mut self, node: usize, number: Number, decision: Decision) {
        let at = self.at(node, number);
        let keeps = self.moves[number].path.post_copy && !self.is_broken(Broken::ReleasesBeforeFill);
        let takes_for_abort = self.is_broken(Broken::TakesUndecidedForAbort);
        let goes_by_itself = self.is_broken(Broken::ResumesByItself);
        let since = self.now;
        let Some(part) = self.part(at) else { return };
        if part.standing != Standing::Sealed || part.locked {
            return;
        }
        let known = match decision {
            Decision::Commit if goes_by_itself && part.side == Side::Target => Known::Said(Word::Commit),
            Decision::Commit => Known::Recorded(Word::Commit),
            Decision::Undecided if !takes_for_abort => Known::Nothing,
            Decision::Abort | Decision::Undecided => Known::Recorded(Word::Abort),
        };
        match settle(part.side, known, keeps && part.side == Side::Source) {
            Settle::Undo => self.undo(at, Authority::Coordinator, None),
            Settle::Await => part.awaits = true,
            Settle::Release => self.next(at, Act::Release { job: None, stage: 0, since }),
            Settle::Resume => {
                let job = JobId::MAX;
                self.next(at, Act::Resume { job, stage: 0, since, tries: 0 });
            }
            Settle::AskAgain => {}
        }
    }

    /// The stream of a freeze has no listener any more: `Agent::begin_freeze`
    pub(crate) fn hung_up(&mut self, node: usize, number: Number, job: JobId) {
        let at = self.at(node, number);
        if let Some(part) = self.part(at)
            && part.stream == Some(job)
        {
            part.forsaken = true;
        }
    }

    /// `kill -9`: what it knew is gone. Who was connected to it notices, here or on the other side.
    pub(crate) fn kill_agent(&mut self, node: usize) {
        self.nodes[node].up = false;
        self.nodes[node].life += 1;
        self.nodes[node].entries = [Entry::None; crate::world::MOST];
        for number in 0..self.moves.len() {
            if let Some(worker) = &mut self.nodes[node].workers[number] {
                worker.connected = false;
                let after = self.rng.u64(..25 * MS);
                self.schedule(after, Event::Process { node, number, what: Process::Look });
            }
            if self.nodes[node].restores[number].is_some() {
                let after = self.rng.u64(..5 * MS);
                self.schedule(after, Event::Process { node, number, what: Process::HookLooks });
            }
            self.break_transfer(node, number);
        }
        for (job, number) in self.jobs_at(node) {
            let broken = Message::Answer { job, result: Err(FailureCode::Unavailable) };
            self.say(|| format!("  (a call of {number} breaks)"));
            self.send(Place::Node(node), Place::Coordinator, broken);
        }
    }

    /// The other end of a transfer sees it break, sooner or later or not at all.
    pub(crate) fn break_transfer(&mut self, node: usize, number: Number) {
        let crate::world::Move { source, target, .. } = self.moves[number];
        if node == source
            && self.reaches(source, target)
            && let Some(part) = self.nodes[target].part(number)
            && part.inbox == Inbox::Waiting
            && part.peer_life.is_some()
        {
            part.inbox = Inbox::Broken;
        }
    }

    /// `recovery::recover`
    pub(crate) fn start_agent(&mut self, node: usize) {
        self.nodes[node].up = true;
        for number in 0..self.moves.len() {
            let Some(journal) = self.nodes[node].journal[number] else { continue };
            let at = self.at(node, number);
            if journal.standing == Standing::Released && !journal.tidied {
                self.remove_released(at);
            }
            let filling = self.nodes[node].pagers[number].is_some_and(Pagers::is_under_way);
            if journal.standing == Standing::Resumed && filling {
                self.nodes[node].entries[number] = Entry::Filling;
                self.next(at, Act::Watch);
                continue;
            }
            if take_up(journal.standing, false) == TakeUp::Nothing {
                self.end_part(at, journal.standing);
                self.nodes[node].images[number] = None;
                continue;
            }
            self.take_up(at, journal.side, journal.standing);
        }
    }

    /// `recovery::take_up`
    fn take_up(&mut self, at: At, side: Side, standing: Standing) {
        let At { node, number, .. } = at;
        if !self.reserve(at) {
            self.nodes[node].entries[number] = Entry::Broken;
            self.fail(format!("node {node} cannot take up its part of {number}: its workload has another"));
            return;
        }
        if let Some(worker) = &mut self.nodes[node].workers[number] {
            if matches!(worker.stage, Stage::Released | Stage::Undone) {
                // It has ended, and nobody listens there.
                self.nodes[node].workers[number] = None;
            } else {
                worker.connected = true;
            }
        }
        let todo = take_up(standing, side == Side::Source && self.nodes[node].notes[number].sealed);
        let mut part = Part::new(side);
        part.inbox = Inbox::None;
        part.standing = if todo == TakeUp::Settle { Standing::Sealed } else { standing };
        part.created = self.moves[number].is_cold() && part.standing == Standing::Sealed;
        self.nodes[node].entries[number] = Entry::Alive(part);
        let undoes = todo == TakeUp::Undo || self.is_broken(Broken::UndoesWhatIsSealed);
        self.say(|| format!("node {node} takes {number} up: {standing:?}, {todo:?}"));
        if undoes {
            self.undo(at, Authority::Own, None);
        } else {
            self.act_settle(at, RETRY);
        }
    }

    fn jobs_at(&self, node: usize) -> Vec<(JobId, Number)> {
        let jobs = self.coordinator.jobs.iter().enumerate();
        let there = jobs.filter(|(_, job)| job.is_waited_for());
        let there = there.filter(|(_, job)| {
            let planned = &self.moves[job.number];
            node == if job.call.side() == CallSide::Source { planned.source } else { planned.target }
        });
        there.map(|(id, job)| (id, job.number)).collect()
    }
}

/// How far an undoing is.
pub(crate) enum Undoing {
    /// The next step of it.
    Next,
    /// The same step again, in a while.
    Look,
    /// Everything but the note is done.
    Done,
    /// To be tried again.
    Failed,
}
