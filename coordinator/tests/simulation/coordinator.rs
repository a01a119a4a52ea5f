//! The coordinator: the real machine and the real record, in a model of their shell (`coordinator/src/runner/driver.rs`) on a model disk.
//!
//! What of the shell is a model says which function it mirrors.

use std::collections::VecDeque;
use std::time::Duration;

use podferry_common::{Failure, FailureCode};
use podferry_coordinator::migration::{Call, Command, Decision, Durability, Event as Step, Side, State};
use podferry_coordinator::runner::Deadlines;
use podferry_coordinator::store::Record;

use crate::faults::Broken;
use crate::network::{Message, Place};
use crate::world::{Event, MOST, MS, Move, Number, SECOND, Time, World};

/// Which call, of all that were made.
pub(crate) type JobId = usize;

/// `FIRST_PAUSE` and `LONGEST_PAUSE` of the driver.
const FIRST_PAUSE: Time = 100 * MS;
const LONGEST_PAUSE: Time = 5 * SECOND;

/// Shorter than a cluster's, in about the same proportions: so a component that stays dead past every deadline costs few steps.
pub(crate) fn deadlines() -> Deadlines {
    let seconds = Duration::from_secs;
    Deadlines {
        preflight: seconds(10),
        prepare: seconds(10),
        precopy: seconds(40),
        freeze: seconds(25),
        commit: seconds(10),
        release: seconds(8),
        resume: seconds(10),
        fill: seconds(10),
        abort: seconds(8),
        survey: seconds(5),
    }
}

pub(crate) fn micros(duration: Duration) -> Time {
    Time::try_from(duration.as_micros()).unwrap_or(Time::MAX)
}

/// What is on the disk of one migration's record.
#[derive(Debug, Default)]
pub(crate) struct Disk {
    /// What a restart finds.
    durable: Option<Vec<u8>>,
    /// What a reader finds. A restart does not, unless a later write has made it durable: redb's `Durability::None`.
    newest: Option<Vec<u8>>,
    /// The decisions in the two, so that not every look parses them.
    pub(crate) decided: Option<Decision>,
    read: Option<Decision>,
    /// Somebody has been told of a decision.
    pub(crate) told: Option<Decision>,
}

/// What comes to a driver.
#[derive(Clone, Copy, Debug)]
enum Input {
    Answered(Call, Result<(), FailureCode>),
    Converged,
    Frozen,
    Late(u32),
    Cancel,
}

/// A write under way, and what is to be done behind it.
struct Writing {
    text: Vec<u8>,
    decision: Decision,
    before: bool,
    commands: Vec<Command>,
    changed: bool,
    cancel: bool,
}

/// A migration's task.
pub(crate) struct Driver {
    record: Record,
    inbox: VecDeque<Input>,
    writing: Option<Writing>,
    attempts: Vec<(Call, u32)>,
    /// Counts phases, so that a deadline of an earlier one is not taken for this one's.
    turn: u32,
}

impl Driver {
    pub(crate) fn new(record: Record) -> Self {
        Self { record, inbox: VecDeque::new(), writing: None, attempts: Vec::new(), turn: 0 }
    }

    /// Whether its migration has no outcome yet, or none on disk.
    pub(crate) fn is_open(&self) -> bool {
        !self.record.state.is_settled() || self.writing.is_some()
    }
}

/// A call.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Job {
    pub(crate) number: Number,
    pub(crate) call: Call,
    life: u32,
    /// Somebody waits for what comes.
    open: bool,
    sent: bool,
    /// Everything that matters has been said.
    complete: bool,
}

impl Job {
    /// Whether its answer is still under way.
    pub(crate) fn is_waited_for(&self) -> bool {
        self.open && self.sent && !self.complete
    }
}

pub(crate) struct Coordinator {
    pub(crate) up: bool,
    life: u32,
    pub(crate) drivers: [Option<Driver>; MOST],
    pub(crate) disks: [Disk; MOST],
    pub(crate) jobs: Vec<Job>,
    /// Cancels that were answered with yes.
    pub(crate) cancelled: [bool; MOST],
    /// Targets that have been asked to undo and have answered in any way, or whose connection broke.
    undone_target: [bool; MOST],
}

impl Coordinator {
    pub(crate) fn new() -> Self {
        Self {
            up: true,
            life: 0,
            drivers: std::array::from_fn(|_| None),
            disks: std::array::from_fn(|_| Disk::default()),
            jobs: Vec::with_capacity(32),
            cancelled: [false; MOST],
            undone_target: [false; MOST],
        }
    }

    /// The record that a restart would find.
    pub(crate) fn durable(&self, number: Number) -> Option<Record> {
        let text = self.disks[number].durable.as_ref()?;
        Some(serde_json::from_slice(text).expect("a record that was written can be read"))
    }

    pub(crate) fn newest(&self, number: Number) -> Option<Record> {
        let text = self.disks[number].newest.as_ref()?;
        Some(serde_json::from_slice(text).expect("a record that was written can be read"))
    }

    pub(crate) fn is_driven(&self, number: Number) -> bool {
        self.drivers[number].is_some()
    }

    /// Where a driver that lives thinks it is.
    pub(crate) fn state(&self, number: Number) -> Option<&State> {
        self.drivers[number].as_ref().map(|driver| &driver.record.state)
    }
}

impl World {
    /// `Driver::cancel`
    pub(crate) fn take_cancel(&mut self, number: Number) {
        if self.coordinator.up && number < MOST && self.coordinator.drivers[number].is_some() {
            self.say(|| format!("a user cancels {number}"));
            self.take(number, Input::Cancel);
        }
    }

    /// What has come to the coordinator's process.
    pub(crate) fn hear(&mut self, message: Message) {
        let (Message::Answer { job: id, .. } | Message::Converged { job: id } | Message::Frozen { job: id }) = message
        else {
            return;
        };
        let job = self.coordinator.jobs[id];
        if !self.coordinator.up || job.life != self.coordinator.life || !job.open {
            return;
        }
        match message {
            Message::Converged { .. } => self.take(job.number, Input::Converged),
            Message::Frozen { .. } => self.take(job.number, Input::Frozen),
            Message::Answer { result, .. } => {
                self.say(|| format!("{:?} of {}: {result:?}", job.call, job.number));
                // `Job::freeze`: the stream stays open behind its last word. Others answer once; who repeats it is heard, too.
                let job = &mut self.coordinator.jobs[id];
                if result.is_ok() {
                    job.complete = true;
                } else if job.call != Call::Freeze || !job.complete {
                    job.open = false;
                }
                if job.call == Call::Abort(Side::Target) {
                    self.coordinator.undone_target[self.coordinator.jobs[id].number] = true;
                }
                let job = self.coordinator.jobs[id];
                self.take(job.number, Input::Answered(job.call, result));
            }
            _ => {}
        }
    }

    /// `Job::run`: no answer in the time of such a call.
    pub(crate) fn time_out(&mut self, id: JobId) {
        let job = self.coordinator.jobs[id];
        if job.life != self.coordinator.life || !job.open || job.complete {
            return;
        }
        self.say(|| format!("no answer in time: {:?} of {}", job.call, job.number));
        self.close(id);
        if job.call == Call::Abort(Side::Target) {
            self.coordinator.undone_target[job.number] = true;
        }
        self.take(job.number, Input::Answered(job.call, Err(FailureCode::DeadlineExceeded)));
    }

    /// Nobody listens to that call any more.
    fn close(&mut self, id: JobId) {
        let job = &mut self.coordinator.jobs[id];
        let listened = std::mem::replace(&mut job.open, false);
        let job = *job;
        if listened && job.sent && job.call == Call::Freeze {
            let source = Place::Node(self.moves[job.number].source);
            self.send(Place::Coordinator, source, Message::HangUp { number: job.number, job: id });
        }
    }

    /// `Driver::run`: one input after the other, none while a write is under way.
    fn take(&mut self, number: Number, input: Input) {
        let Some(driver) = &mut self.coordinator.drivers[number] else { return };
        driver.inbox.push_back(input);
        self.drive(number);
    }

    fn drive(&mut self, number: Number) {
        loop {
            let Some(driver) = &mut self.coordinator.drivers[number] else { return };
            if driver.writing.is_some() {
                return;
            }
            let Some(input) = driver.inbox.pop_front() else { return };
            let (turn, phase) = (driver.turn, driver.record.state.phase());
            match input {
                Input::Answered(call, Ok(())) => self.apply(number, &Step::Succeeded(call), false),
                Input::Answered(call, Err(code)) => self.apply(number, &Step::Failed(call, failure(code)), false),
                Input::Converged => self.apply(number, &Step::Converged, false),
                Input::Frozen => self.apply(number, &Step::Frozen, false),
                Input::Late(of) if of == turn => {
                    self.apply(number, &Step::DeadlinePassed(phase, failure(FailureCode::DeadlineExceeded)), false);
                }
                Input::Late(_) => {}
                Input::Cancel if driver.record.state.can_be_cancelled() => {
                    self.apply(number, &Step::CancelRequested(failure(FailureCode::Aborted)), true);
                }
                Input::Cancel => {
                    if driver.record.state.decision() == Decision::Undecided {
                        self.fail(format!("{number} cannot be cancelled before its commit"));
                    }
                }
            }
        }
    }

    /// `Driver::apply`: steps the machine, writes when it has to be written, and executes.
    fn apply(&mut self, number: Number, event: &Step, cancel: bool) {
        let Some(driver) = &mut self.coordinator.drivers[number] else { return };
        let before = driver.record.state.phase();
        let state = driver.record.state.clone();
        let mut step = state.step(event.clone(), driver.record.strategy.path());
        if let Some(broken) = self.broken {
            step = misled(broken, &driver.record, event, step);
        }
        let changed = step.state.phase() != before;
        let moved = driver.record.state != step.state;
        driver.record.state = step.state;
        if changed {
            self.plan.enter(driver.record.state.phase(), self.steps);
        }
        if moved {
            let state = format!("{:?}", driver.record.state);
            self.say(|| format!("{number} is {state}, {:?}, then {:?}", step.durability, step.commands));
        }
        match step.durability {
            Durability::Before => self.write(number, true, step.commands, changed, cancel),
            Durability::Behind => {
                self.execute(number, &step.commands);
                self.write(number, false, Vec::new(), changed, cancel);
            }
            Durability::Unchanged => self.execute(number, &step.commands),
        }
    }

    pub(crate) fn write(&mut self, number: Number, before: bool, commands: Vec<Command>, changed: bool, cancel: bool) {
        let Some(driver) = &mut self.coordinator.drivers[number] else { return };
        let text = serde_json::to_vec(&driver.record).expect("a record can be written");
        let decision = driver.record.state.decision();
        driver.writing = Some(Writing { text, decision, before, commands, changed, cancel });
        let life = self.coordinator.life;
        let takes = if before { self.little() } else { 50 };
        self.schedule(takes, Event::Written { number, life });
    }

    pub(crate) fn written(&mut self, number: Number, life: u32) {
        if !self.coordinator.up || life != self.coordinator.life {
            return;
        }
        let Some(driver) = &mut self.coordinator.drivers[number] else { return };
        let Some(writing) = driver.writing.take() else { return };
        let (first, is_final) = (self.coordinator.disks[number].newest.is_none(), driver.record.state.is_final());
        self.store(number, writing.text, writing.decision);
        if writing.before {
            self.sync();
        }
        if writing.cancel {
            self.coordinator.cancelled[number] = true;
        }
        if writing.changed {
            self.enter_phase(number);
        }
        if first {
            self.apply(number, &Step::Started, false);
        }
        self.execute(number, &writing.commands);
        if is_final {
            self.end_driver(number);
        }
        self.drive(number);
    }

    fn store(&mut self, number: Number, text: Vec<u8>, decision: Decision) {
        let disk = &mut self.coordinator.disks[number];
        disk.newest = Some(text);
        disk.read = Some(decision);
    }

    /// A durable write takes along all that were written before it.
    fn sync(&mut self) {
        for number in 0..self.moves.len() {
            let disk = &mut self.coordinator.disks[number];
            let (old, new) = (disk.decided, disk.read);
            disk.durable.clone_from(&disk.newest);
            disk.decided = new;
            if old.is_some_and(|old| old != Decision::Undecided) && old != new {
                self.fail(format!("the decision on {number} was revised from {old:?} to {new:?}"));
            }
        }
    }

    /// The driver ends, and its calls with it.
    fn end_driver(&mut self, number: Number) {
        self.coordinator.drivers[number] = None;
        for id in 0..self.coordinator.jobs.len() {
            if self.coordinator.jobs[id].number == number {
                self.close(id);
            }
        }
        self.schedule(SECOND, Event::Wish);
    }

    /// `Driver::enter_phase`
    fn enter_phase(&mut self, number: Number) {
        let grace = Duration::from_micros(self.moves[number].grace);
        let Some(driver) = &mut self.coordinator.drivers[number] else { return };
        driver.turn += 1;
        let (turn, life) = (driver.turn, self.coordinator.life);
        let limit = self.deadlines.with_grace(grace).of_phase(driver.record.state.phase());
        if let Some(limit) = limit {
            self.schedule(micros(limit), Event::PhaseLate { number, turn, life });
        }
    }

    pub(crate) fn phase_late(&mut self, number: Number, turn: u32, life: u32) {
        if self.coordinator.up && life == self.coordinator.life {
            self.take(number, Input::Late(turn));
        }
    }

    /// `Driver::execute`
    fn execute(&mut self, number: Number, commands: &[Command]) {
        for command in commands {
            let (call, pause) = match *command {
                Command::Call(call) => (call, 0),
                Command::Retry(call) => (call, self.pause(number, call)),
            };
            let id = self.coordinator.jobs.len();
            let life = self.coordinator.life;
            self.coordinator.jobs.push(Job { number, call, life, open: true, sent: false, complete: false });
            self.schedule(pause, Event::Send(id));
        }
    }

    /// `Driver::pause`
    fn pause(&mut self, number: Number, call: Call) -> Time {
        let Some(driver) = &mut self.coordinator.drivers[number] else { return FIRST_PAUSE };
        let known = driver.attempts.iter().position(|(of, _)| *of == call);
        let index = known.unwrap_or_else(|| {
            driver.attempts.push((call, 0));
            driver.attempts.len() - 1
        });
        let attempts = &mut driver.attempts[index].1;
        let pause = (FIRST_PAUSE << (*attempts).min(10)).min(LONGEST_PAUSE);
        *attempts += 1;
        pause
    }

    pub(crate) fn send_call(&mut self, id: JobId) {
        let job = self.coordinator.jobs[id];
        if !self.coordinator.up || job.life != self.coordinator.life || !job.open {
            return;
        }
        self.coordinator.jobs[id].sent = true;
        self.check_told(job.number, job.call);
        let Move { source, target, path, grace, .. } = self.moves[job.number];
        let limit = self.deadlines.with_grace(Duration::from_micros(grace)).of_call(job.call, path);
        self.schedule(micros(limit), Event::TimeOut(id));
        let node = if job.call.side() == Side::Source { source } else { target };
        let request = Message::Request { job: id, number: job.number, call: job.call };
        self.send(Place::Coordinator, Place::Node(node), request);
    }

    /// What an agent is told is what the record says, and the record is on disk.
    fn check_told(&mut self, number: Number, call: Call) {
        let decided = self.coordinator.disks[number].decided;
        let wanted = match call {
            Call::Release | Call::Resume | Call::Fill => Some(Decision::Commit),
            Call::Abort(_) => Some(Decision::Abort),
            _ => None,
        };
        if decided.is_none() || wanted.is_some_and(|wanted| decided != Some(wanted)) {
            self.fail(format!("{call:?} of {number} is sent, and on disk is {decided:?}"));
        }
        if call == Call::Abort(Side::Source) && !self.coordinator.undone_target[number] && !self.was_recovered(number) {
            self.fail(format!("the source of {number} is undone before its target was told"));
        }
        if wanted.is_some() {
            self.coordinator.disks[number].told = wanted;
        }
    }

    /// A coordinator that was started again knows from its record alone how far its target was.
    fn was_recovered(&self, number: Number) -> bool {
        self.coordinator.jobs.iter().any(|job| job.number == number && job.life != self.coordinator.life)
    }

    /// `Store::decision`, as agents ask it.
    pub(crate) fn read_decision(&mut self, number: Number) -> Decision {
        let disk = &mut self.coordinator.disks[number];
        let decision = disk.read.unwrap_or(Decision::Undecided);
        if decision != Decision::Undecided {
            disk.told = Some(decision);
            if disk.decided != Some(decision) {
                self.fail(format!("an agent is told {decision:?} of {number}, which is not on disk"));
            }
        }
        decision
    }

    /// Everything that was not on disk is gone; a write that was under way is on disk, or not.
    pub(crate) fn kill_coordinator(&mut self) {
        for number in 0..self.moves.len() {
            let Some(driver) = self.coordinator.drivers[number].take() else { continue };
            if let Some(writing) = driver.writing
                && writing.before
                && self.rng.bool()
            {
                self.say(|| format!("the write of {number} that was under way is on disk"));
                self.store(number, writing.text, writing.decision);
                self.sync();
            }
        }
        for disk in &mut self.coordinator.disks {
            disk.newest.clone_from(&disk.durable);
            disk.read = disk.decided;
        }
        for id in 0..self.coordinator.jobs.len() {
            self.close(id);
        }
        self.coordinator.up = false;
        self.coordinator.life += 1;
    }

    /// `Runner::recover`
    pub(crate) fn start_coordinator(&mut self) {
        self.coordinator.up = true;
        for number in 0..self.moves.len() {
            let Some(record) = self.coordinator.durable(number) else { continue };
            if self.coordinator.disks[number].told.is_some_and(|told| told != record.state.decision()) {
                self.fail(format!("what was told of {number} is not what the record says: {:?}", record.state));
            }
            if record.state.is_final() {
                continue;
            }
            self.say(|| format!("{number} is taken up as {:?}", record.state));
            self.coordinator.drivers[number] = Some(Driver::new(record));
            self.enter_phase(number);
            self.apply(number, &Step::Restarted(failure(FailureCode::Aborted)), false);
            self.drive(number);
        }
    }
}

/// What a coordinator does whose rule is broken.
fn misled(
    broken: Broken,
    record: &Record,
    event: &Step,
    mut step: podferry_coordinator::migration::Step,
) -> podferry_coordinator::migration::Step {
    let was = record.state.decision();
    let commits = was == Decision::Undecided && step.state.decision() == Decision::Commit;
    match broken {
        Broken::ResumesBeforeRelease if commits && step.state == State::Releasing => {
            step.commands = vec![Command::Call(Call::Resume), Command::Call(Call::Release)];
        }
        Broken::CommitsBehind if commits => step.durability = Durability::Behind,
        Broken::UndoesTheSourceFirst if step.commands == [Command::Call(Call::Abort(Side::Target))] => {
            step.commands.insert(0, Command::Call(Call::Abort(Side::Source)));
        }
        Broken::GivesUpBehindTheCommit if was == Decision::Commit && matches!(event, Step::Failed(..)) => {
            step.commands.clear();
        }
        Broken::AbortsBehindTheCommit if was == Decision::Commit && matches!(event, Step::Restarted(_)) => {
            let undone = State::Sealing { source: true, target: true };
            return undone.step(event.clone(), record.strategy.path());
        }
        _ => {}
    }
    step
}

fn failure(code: FailureCode) -> Failure {
    Failure::new(code, String::new())
}
