//! The source's part: `agent/src/source`.

use podferry_common::FailureCode;
use podferry_part::{Authority, May, Order, Side, Standing, Step};

use crate::agent::Undoing;
use crate::coordinator::{JobId, micros};
use crate::faults::Broken;
use crate::network::{Message, Place};
use crate::node::{Act, At, Container, Entry, Inbox, Journal, Part, Process, Run, Stage, Worker, WorkerNote};
use crate::world::{Event, MS, SECOND, Time, World};

/// `SEAL_TIMEOUT`, `UNDO_TIMEOUT` and `RELEASE_TIMEOUT` of `agent/src/source/mod.rs`
const SEAL_TIMEOUT: Time = 5 * SECOND;
const UNDO_TIMEOUT: Time = 30 * SECOND;
const RELEASE_TIMEOUT: Time = 60 * SECOND;

impl World {
    /// `Agent::begin_freeze`
    pub(crate) fn act_freeze(&mut self, at: At, job: JobId, stage: u8) {
        let At { node, number, .. } = at;
        let planned = self.moves[number];
        match stage {
            0 if !self.reserve(at) => self.answer(at, job, Err(FailureCode::AlreadyExists)),
            0 => self.next(at, Act::Freeze { job, stage: 1 }),
            1 if !self.nodes[node].runs() => {
                self.nodes[node].entries[number] = Entry::None;
                self.answer(at, job, Err(FailureCode::FailedPrecondition));
            }
            1 => {
                self.nodes[node].journal[number] = Some(journal(Side::Source));
                self.next(at, Act::Freeze { job, stage: 2 });
            }
            _ => {
                // A target that cannot be reached is to cost the tasks nothing.
                let target = planned.target;
                let (life, ours) = (self.nodes[target].life, at.life);
                let reached = self.nodes[target].up && self.reaches(node, target);
                let admitted = self.nodes[target].part(number).filter(|part| {
                    reached
                        && part.side == Side::Target
                        && part.standing == Standing::Open
                        && part.inbox == Inbox::Waiting
                });
                let Some(admitted) = admitted else {
                    self.nodes[node].journal[number] = None;
                    self.nodes[node].entries[number] = Entry::None;
                    return self.answer(at, job, Err(FailureCode::Unavailable));
                };
                admitted.peer_life = Some(ours);
                let mut part = Part::new(Side::Source);
                (part.runs, part.stream, part.peer_life) = (true, Some(job), Some(life));
                let limits = self.deadlines.with_grace(std::time::Duration::from_micros(planned.grace));
                let copying = if planned.path.pre_copy { micros(limits.precopy) } else { 0 };
                let patience = micros(limits.of_part(podferry_coordinator::migration::Call::Freeze, planned.path));
                part.deadline = self.now + copying + patience;
                self.nodes[node].entries[number] = Entry::Alive(part);
                self.again(at, Act::Deadline, copying + patience);
                let (left, until) = (self.rng.u8(1..4), self.now + copying);
                let run = if planned.path.pre_copy { Run::Round { left, until } } else { Run::Converged };
                self.next(at, Act::Run(run));
            }
        }
    }

    /// `SourcePart::run`
    pub(crate) fn act_run(&mut self, at: At, run: Run) {
        let At { node, number, .. } = at;
        let Some(part) = self.part(at).copied() else { return };
        // Between the signal's note and the signal nothing is waited for.
        if (part.cancelled || part.forsaken) && !matches!(run, Run::Told) {
            return self.end_run(at, FailureCode::Aborted);
        }
        let planned = self.moves[number];
        match run {
            Run::Round { left, until } => {
                let converges = !self.chance(self.failures());
                if !self.transfers(&part, at) {
                    return self.end_run(at, FailureCode::Unavailable);
                }
                if self.now > until || !converges {
                    return self.end_run(at, FailureCode::FailedPrecondition);
                }
                let takes =
                    if self.chance(30) { self.rng.u64(SECOND..50 * SECOND) } else { self.rng.u64(10 * MS..SECOND) };
                let run = if left == 0 { Run::Converged } else { Run::Round { left: left - 1, until } };
                self.again(at, Act::Run(run), takes);
            }
            Run::Converged => {
                // One that leaves the word out is followed.
                if planned.path.pre_copy && self.rng.u8(..10) > 0 {
                    self.stream(at, |job| Message::Converged { job });
                }
                if planned.is_cold() {
                    return self.next(at, Act::Run(Run::Tell));
                }
                // Followers' lock: an abort has it, or waits for this.
                self.nodes[node].notes[number] = WorkerNote { started: true, sealed: false };
                let deadline = part.deadline;
                let worker = Worker { stage: Stage::Freezing, criu: true, connected: true, deadline, version: 0 };
                self.nodes[node].workers[number] = Some(worker);
                let (stops, dumps) = (self.rng.u64(MS..20 * MS), self.rng.u64(20 * MS..300 * MS));
                self.schedule(stops, Event::Process { node, number, what: Process::Stop });
                self.schedule(dumps, Event::Process { node, number, what: Process::Dump });
                self.schedule(
                    deadline.saturating_sub(self.now) + 1,
                    Event::Process { node, number, what: Process::Look },
                );
                let since = self.now;
                self.next(at, Act::Run(Run::Dump { since, told: false }));
            }
            Run::Dump { since, told } => {
                let stage = self.nodes[node].workers[number].map(|worker| worker.stage);
                let told = match stage {
                    None | Some(Stage::Undone | Stage::Released) => return self.end_run(at, FailureCode::Aborted),
                    Some(Stage::Freezing) => told,
                    Some(_) => {
                        if !told {
                            self.stream(at, |job| Message::Frozen { job });
                        }
                        true
                    }
                };
                if !self.transfers(&part, at) {
                    return self.end_run(at, FailureCode::Unavailable);
                }
                match self.nodes[node].workers[number] {
                    Some(Worker { stage: Stage::Dumped, version, .. }) => {
                        let takes = self.rng.u64(MS..400 * MS);
                        self.again(at, Act::Run(Run::Sent { version }), takes);
                    }
                    _ => self.poll(at, Act::Run(Run::Dump { since, told }), since),
                }
            }
            Run::Tell => self.tell_to_end(at),
            Run::Told => {
                // `init.terminate`, and the note behind it.
                self.signal(node, number);
                if let Some(journal) = &mut self.nodes[node].journal[number] {
                    journal.told = true;
                }
                self.unlock(at);
                let since = self.now;
                self.next(at, Act::Run(Run::Ended { since }));
            }
            Run::Ended { since } => {
                if self.nodes[node].is_alive() {
                    if self.now < since + planned.grace {
                        return self.poll(at, Act::Run(run), since);
                    }
                    self.end_container(node);
                }
                self.stream(at, |job| Message::Frozen { job });
                let version = self.nodes[node].container.map_or(0, |container| container.version);
                let takes = self.rng.u64(MS..400 * MS);
                self.again(at, Act::Run(Run::Sent { version }), takes);
            }
            Run::Sent { version } => self.sent(at, part, version),
        }
    }

    /// Everything is with the target.
    fn sent(&mut self, at: At, part: Part, version: u32) {
        let target = self.moves[at.number].target;
        if !self.transfers(&part, at) {
            return self.end_run(at, FailureCode::Unavailable);
        }
        let cold = self.moves[at.number].is_cold();
        if let Some(arrived) = self.nodes[target].part(at.number) {
            arrived.inbox = Inbox::Complete;
        }
        self.nodes[target].images[at.number] = Some(version);
        if let Some(part) = self.part(at) {
            (part.runs, part.stopped) = (false, cold);
        }
        self.say(|| format!("node {target} has everything, of run {version}"));
        self.stream(at, |job| Message::Answer { job, result: Ok(()) });
    }

    /// Whether the transfer has not broken.
    fn transfers(&mut self, part: &Part, at: At) -> bool {
        let target = self.moves[at.number].target;
        let there = self.nodes[target].up && Some(self.nodes[target].life) == part.peer_life;
        let open = self.nodes[target].part(at.number).is_some_and(|part| part.inbox == Inbox::Waiting);
        there && open && self.reaches(at.node, target)
    }

    fn stream(&mut self, at: At, message: impl FnOnce(JobId) -> Message) {
        let stream = self.part(at).and_then(|part| part.stream);
        if let Some(job) = stream {
            self.send(Place::Node(at.node), Place::Coordinator, message(job));
        }
    }

    /// A freeze that failed is undone, and said then.
    fn end_run(&mut self, at: At, code: FailureCode) {
        self.say(|| format!("the freeze of {} fails: {code:?}", at.number));
        if let Some(part) = self.part(at) {
            part.runs = false;
        }
        self.break_transfer(at.node, at.number);
        self.undo(at, Authority::Own, Some(code));
    }

    /// `tell_to_end` of `agent/src/source/cold.rs`: first the note.
    fn tell_to_end(&mut self, at: At) {
        let (now, alive) = (self.now, self.nodes[at.node].is_alive());
        let Some(part) = self.part(at) else { return };
        if part.locked {
            return self.again(at, Act::Run(Run::Tell), 2 * MS);
        }
        if part.standing != Standing::Open || !alive {
            return self.end_run(at, FailureCode::Aborted);
        }
        part.locked = true;
        if let Some(journal) = &mut self.nodes[at.node].journal[at.number] {
            journal.begun = Some(now);
        }
        // Nothing is waited for between the two, but an agent may be killed there.
        self.again(at, Act::Run(Run::Told), 20);
    }

    /// A container is asked to end. Nine of ten heed that.
    fn signal(&mut self, node: usize, number: usize) {
        let Some(container) = self.nodes[node].container else { return };
        if container.alive && self.rng.u8(..10) > 0 {
            let after = self.rng.u64(..12 * SECOND);
            self.schedule(after, Event::Process { node, number, what: Process::Ends(container.born) });
        }
    }

    /// All processes of a container end.
    pub(crate) fn end_container(&mut self, node: usize) {
        if let Some(container) = &mut self.nodes[node].container {
            *container = Container { alive: false, fenced: false, traced: false, ..*container };
        }
    }

    /// `SourcePart::seal`
    pub(crate) fn seal_source(&mut self, at: At, job: JobId, stage: u8, since: Time) {
        let At { node, number, .. } = at;
        let refused = Err(FailureCode::FailedPrecondition);
        let worker = self.nodes[node].workers[number].map(|worker| worker.stage);
        match stage {
            0 => match self.lock(at, Step::Seal) {
                None => self.poll(at, Act::Seal { job, stage, since }, since),
                Some(May::Taken) => self.answer(at, job, Ok(())),
                Some(May::Refuse) => self.answer(at, job, refused),
                Some(May::Take) if self.moves[number].is_cold() => {
                    // `check_stopped`
                    let stopped = self.part(at).is_some_and(|part| part.stopped) && !self.nodes[node].is_alive();
                    if stopped {
                        return self.next(at, Act::Seal { job, stage: 2, since });
                    }
                    self.unlock(at);
                    self.answer(at, job, refused);
                }
                Some(May::Take) if worker != Some(Stage::Dumped) => {
                    self.unlock(at);
                    self.answer(at, job, refused);
                }
                Some(May::Take) => {
                    self.order(at, Order::Seal);
                    let since = self.now;
                    self.next(at, Act::Seal { job, stage: 1, since });
                }
            },
            1 => match worker {
                Some(Stage::Sealed) => self.next(at, Act::Seal { job, stage: 2, since }),
                Some(Stage::Dumped | Stage::Sealing) if self.now < since + SEAL_TIMEOUT => {
                    self.poll(at, Act::Seal { job, stage, since }, since);
                }
                _ => {
                    self.unlock(at);
                    self.answer(at, job, refused);
                }
            },
            2 => {
                self.note_sealed(at);
                self.next(at, Act::Seal { job, stage: 3, since });
            }
            _ => {
                self.unlock(at);
                self.answer(at, job, Ok(()));
                self.settle_later(at);
            }
        }
    }

    /// The note that has to be on the disk before the answer.
    pub(crate) fn note_sealed(&mut self, at: At) {
        if self.is_broken(Broken::SealsWithoutNoting) {
            if let Some(part) = self.part(at) {
                part.standing = Standing::Sealed;
            }
            return;
        }
        self.note_standing(at, Standing::Sealed);
    }

    pub(crate) fn order(&mut self, at: At, order: Order) {
        let after = self.rng.u64(20..MS);
        self.schedule(after, Event::Process { node: at.node, number: at.number, what: Process::Order(order) });
    }

    /// `SourcePart::release`
    pub(crate) fn act_release(&mut self, at: At, job: Option<JobId>, stage: u8, since: Time) {
        let At { node, number, .. } = at;
        let refused = Err(FailureCode::FailedPrecondition);
        let worker = self.nodes[node].workers[number].map(|worker| worker.stage);
        match stage {
            0 => match self.lock(at, Step::Release) {
                None if self.part(at).is_none() => self.answer_if_asked(at, job, refused),
                None => self.poll(at, Act::Release { job, stage, since }, since),
                Some(May::Taken) => self.answer_if_asked(at, job, Ok(())),
                Some(May::Refuse) => self.answer_if_asked(at, job, refused),
                Some(May::Take) => {
                    if worker.is_some() {
                        self.order(at, Order::Release);
                    }
                    let since = self.now;
                    self.next(at, Act::Release { job, stage: 1, since });
                }
            },
            1 => match worker {
                Some(Stage::Released) => self.next(at, Act::Release { job, stage: 2, since }),
                Some(_) if self.now < since + RELEASE_TIMEOUT => {
                    self.poll(at, Act::Release { job, stage, since }, since);
                }
                // `check_absent`
                None if self.moves[number].is_cold() && !self.nodes[node].is_alive() => {
                    self.next(at, Act::Release { job, stage: 2, since });
                }
                None if !self.moves[number].is_cold() => {
                    // `kill_orphans`
                    self.end_container(node);
                    self.next(at, Act::Release { job, stage: 2, since });
                }
                _ => {
                    self.unlock(at);
                    self.answer_if_asked(at, job, refused);
                }
            },
            2 => {
                self.note_standing(at, Standing::Released);
                self.next(at, Act::Release { job, stage: 3, since });
            }
            _ => {
                self.unlock(at);
                self.answer_if_asked(at, job, Ok(()));
                self.next(at, Act::Tidy);
            }
        }
    }

    /// `recovery::tidy`
    pub(crate) fn act_tidy(&mut self, at: At) {
        self.remove_released(at);
        self.end_part(at, Standing::Released);
    }

    /// `SourcePart::tidy`
    pub(crate) fn remove_released(&mut self, at: At) {
        let At { node, number, .. } = at;
        let Some(journal) = &mut self.nodes[node].journal[number] else { return };
        // The workload may have come back since.
        if journal.tidied {
            return;
        }
        journal.tidied = true;
        self.nodes[node].workers[number] = None;
        self.nodes[node].container = None;
        self.say(|| format!("node {node} has removed what {number} left"));
    }

    /// `SourcePart::abort`, behind its lock.
    pub(crate) fn abort_source(&mut self, at: At, stage: u8, since: Time) -> Undoing {
        let At { node, number, .. } = at;
        let worker = self.nodes[node].workers[number].map(|worker| worker.stage);
        let cold = self.moves[number].is_cold();
        match stage {
            0 => {
                if worker.is_some() {
                    self.order(at, Order::Abort);
                }
                Undoing::Next
            }
            1 => match worker {
                Some(Stage::Undone) => Undoing::Next,
                Some(Stage::Released) => Undoing::Failed,
                Some(_) if self.now < since + UNDO_TIMEOUT => Undoing::Look,
                Some(_) => Undoing::Failed,
                None if cold || !self.nodes[node].notes[number].started => Undoing::Next,
                None => self.free_orphans(node),
            },
            // `start_again`
            2 if cold => self.see_through(at),
            _ => {
                self.nodes[node].workers[number] = None;
                Undoing::Done
            }
        }
    }

    /// The worker was killed: waits until its CRIU has let go, then thaws.
    fn free_orphans(&mut self, node: usize) -> Undoing {
        match &mut self.nodes[node].container {
            Some(container) if container.traced => Undoing::Look,
            Some(container) => {
                container.fenced = false;
                Undoing::Next
            }
            None => Undoing::Next,
        }
    }

    /// `see_through` and `Stage::start` of `agent/src/source/cold.rs`
    fn see_through(&mut self, at: At) -> Undoing {
        let At { node, number, .. } = at;
        let (grace, now) = (self.moves[number].grace, self.now);
        let Some(journal) = &mut self.nodes[node].journal[number] else { return Undoing::Next };
        let Some(begun) = journal.begun else { return Undoing::Next };
        if !journal.told {
            // An agent that was killed may not have come to it.
            journal.told = true;
            self.signal(node, number);
        }
        if self.nodes[node].is_alive() && now < begun + grace {
            return Undoing::Look;
        }
        let version = self.nodes[node].container.map_or(0, |container| container.version);
        self.nodes[node].container = Some(Container::running(version, now));
        self.say(|| format!("node {node} has started the workload again"));
        Undoing::Next
    }
}

pub(crate) fn journal(side: Side) -> Journal {
    Journal { side, standing: Standing::Open, tidied: false, going: false, begun: None, told: false }
}
