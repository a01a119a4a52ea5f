//! The machine against a model of both agents and of a coordinator that may die at any instant: whatever the order of
//! events, no two copies can run, and with fair events every migration ends.

use podferry_common::{Failure, FailureCode};
use proptest::prelude::*;

use super::*;

/// What a node's agent does with its part, as the specification of `podferry_proto::agent` has it. `Running` means that
/// the node holds a copy that executes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    None,
    Working,
    Ready,
    Sealed,
    Undone,
    Finished,
}

#[derive(Debug)]
struct World {
    /// What is on disk.
    disk: State,
    /// What the coordinator's process has in memory; `None` while it is dead.
    memory: Option<State>,
    /// Calls that were made and not answered; they survive the coordinator as messages under way.
    calls: Vec<Call>,
    /// Answers under way to the coordinator.
    answers: Vec<Event>,
    source: Part,
    target: Part,
    writes: usize,
}

fn failure(message: &str) -> Failure {
    Failure::new(FailureCode::Unavailable, message)
}

impl World {
    fn new() -> Self {
        let mut world = Self {
            disk: State::new(),
            memory: Some(State::new()),
            calls: Vec::new(),
            answers: Vec::new(),
            source: Part::None,
            target: Part::None,
            writes: 0,
        };
        world.feed(Event::Started, Flush::All);
        world
    }

    /// The source's copy executes unless its part holds it or it is gone.
    fn source_runs(&self) -> bool {
        matches!(self.source, Part::None | Part::Undone)
    }

    fn target_runs(&self) -> bool {
        self.target == Part::Finished
    }

    /// Gives the coordinator an event. `flush` says how much of what is to be done happens before it dies.
    fn feed(&mut self, event: Event, flush: Flush) {
        let Some(state) = self.memory.take() else { return };
        let before = state.clone();
        let step = state.step(event);
        match step.durability {
            Durability::Unchanged => assert_eq!(step.state, before, "an unchanged step must not change the state"),
            Durability::Before => {
                if flush == Flush::Nothing {
                    return;
                }
                self.write(&step.state);
            }
            Durability::Behind if flush == Flush::All => self.write(&step.state),
            Durability::Behind => {}
        }
        if flush == Flush::NoCommands {
            return;
        }
        self.calls.extend(step.commands.iter().map(|(Command::Call(call) | Command::Retry(call))| *call));
        if flush != Flush::CommandsWithoutLazyWrite {
            self.memory = Some(step.state);
        }
    }

    fn write(&mut self, state: &State) {
        let (old, new) = (self.disk.decision(), state.decision());
        assert!(old == Decision::Undecided || old == new, "a decision must not be revised: {:?} {state:?}", self.disk);
        self.disk = state.clone();
        self.writes += 1;
    }

    fn restart(&mut self) {
        self.memory = Some(self.disk.clone());
        self.feed(Event::Restarted(failure("the coordinator was restarted")), Flush::All);
    }

    /// An agent handles the call at `index`; it stays under way when `again` (a duplicate).
    fn deliver(&mut self, index: usize, again: bool) {
        if self.calls.is_empty() {
            return;
        }
        let index = index % self.calls.len();
        let call = if again { self.calls[index] } else { self.calls.remove(index) };
        let answer = self.handle(call);
        self.answers.push(answer);
    }

    fn lose_call(&mut self, index: usize) {
        if !self.calls.is_empty() {
            let call = self.calls.remove(index % self.calls.len());
            self.answers.push(Event::Failed(call, failure("lost")));
        }
    }

    fn lose_answer(&mut self, index: usize) {
        if !self.answers.is_empty() {
            let lost = self.answers.remove(index % self.answers.len());
            // The caller of a lost answer sees its connection break.
            self.answers.push(match lost {
                Event::Succeeded(call) => Event::Failed(call, failure("answer lost")),
                seen => seen,
            });
        }
    }

    /// An agent's own rules.
    fn handle(&mut self, call: Call) -> Event {
        let part = match call.side() {
            Side::Source => &mut self.source,
            Side::Target => &mut self.target,
        };
        let ok = match (call, *part) {
            (Call::Prepare, Part::None) => {
                *part = Part::Working;
                true
            }
            (Call::Freeze, Part::None) | (Call::Restore, Part::Working) => {
                *part = Part::Ready;
                true
            }
            (Call::Seal(_), Part::Ready | Part::Sealed) => {
                *part = Part::Sealed;
                true
            }
            (Call::Release | Call::Resume, Part::Sealed | Part::Finished) => {
                *part = Part::Finished;
                true
            }
            // Nothing to undo; a call that comes late still makes a part.
            (Call::PreflightSource | Call::PreflightTarget, _) | (Call::Abort(_), Part::None) => true,
            (Call::Abort(_), Part::Working | Part::Ready | Part::Sealed | Part::Undone) => {
                *part = Part::Undone;
                true
            }
            _ => false,
        };
        if ok { Event::Succeeded(call) } else { Event::Failed(call, failure("does not fit the part's state")) }
    }

    /// An agent's deadline, death or broken connection: unsealed parts undo themselves, sealed ones ask.
    fn agent_gives_up(&mut self, side: Side) {
        let decision = self.disk.decision();
        let part = match side {
            Side::Source => &mut self.source,
            Side::Target => &mut self.target,
        };
        match *part {
            Part::Working | Part::Ready => *part = Part::Undone,
            Part::Sealed if decision == Decision::Abort => *part = Part::Undone,
            _ => {}
        }
    }

    fn check(&self) {
        assert!(!(self.source_runs() && self.target_runs()), "two copies run: {self:?}");
        if self.target_runs() {
            assert_eq!(self.disk.decision(), Decision::Commit, "the target runs without a commit: {self:?}");
            assert_eq!(self.source, Part::Finished, "the target runs before the source is dead: {self:?}");
        }
        if self.source == Part::Finished {
            assert_eq!(self.disk.decision(), Decision::Commit, "the source was destroyed without a commit: {self:?}");
        }
        if self.source == Part::Undone {
            assert_ne!(self.disk.decision(), Decision::Commit, "the source thawed after the commit: {self:?}");
        }
        if let Some(memory) = &self.memory
            && self.disk.decision() != Decision::Undecided
        {
            assert_eq!(memory.decision(), self.disk.decision(), "memory and disk disagree: {self:?}");
        }
    }

    /// From here on nothing is lost any more.
    fn be_fair(&mut self) {
        if self.memory.is_none() {
            self.restart();
        }
        for _ in 0..200 {
            while !self.calls.is_empty() {
                self.deliver(0, false);
                self.check();
            }
            if self.answers.is_empty() {
                break;
            }
            let answer = self.answers.remove(0);
            self.feed(answer, Flush::All);
            self.check();
        }
        // A part made by a call that came late ends by its deadline, or by asking.
        self.agent_gives_up(Side::Source);
        self.agent_gives_up(Side::Target);
        let phase = self.memory.as_ref().map(State::phase).unwrap();
        self.feed(Event::DeadlinePassed(phase, failure("deadline")), Flush::All);
        self.check();
    }
}

/// Where in the handling of an event the coordinator dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flush {
    /// It does not.
    All,
    /// Before anything.
    Nothing,
    /// After the write, before the first command.
    NoCommands,
    /// After the commands, before a write that may be behind.
    CommandsWithoutLazyWrite,
}

#[derive(Clone, Copy, Debug)]
enum Action {
    Answer { index: usize, flush: Flush, keep: bool },
    Deliver { index: usize, again: bool },
    LoseCall(usize),
    LoseAnswer(usize),
    Frozen,
    Deadline,
    Cancel,
    GiveUp(Side),
    Restart,
}

fn flush() -> impl Strategy<Value = Flush> {
    prop_oneof![
        20 => Just(Flush::All),
        1 => Just(Flush::Nothing),
        1 => Just(Flush::NoCommands),
        1 => Just(Flush::CommandsWithoutLazyWrite),
    ]
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        30 => (0..8_usize, flush(), prop::bool::weighted(0.1))
            .prop_map(|(index, flush, keep)| Action::Answer { index, flush, keep }),
        30 => (0..8_usize, prop::bool::weighted(0.1)).prop_map(|(index, again)| Action::Deliver { index, again }),
        2 => (0..8_usize).prop_map(Action::LoseCall),
        2 => (0..8_usize).prop_map(Action::LoseAnswer),
        3 => Just(Action::Frozen),
        1 => Just(Action::Deadline),
        1 => Just(Action::Cancel),
        1 => prop_oneof![Just(Side::Source), Just(Side::Target)].prop_map(Action::GiveUp),
        2 => Just(Action::Restart),
    ]
}

fn perform(world: &mut World, action: Action) {
    match action {
        Action::Answer { index, flush, keep } if !world.answers.is_empty() => {
            let index = index % world.answers.len();
            let answer = if keep { world.answers[index].clone() } else { world.answers.remove(index) };
            world.feed(answer, flush);
        }
        Action::Answer { .. } => {}
        Action::Deliver { index, again } => world.deliver(index, again),
        Action::LoseCall(index) => world.lose_call(index),
        Action::LoseAnswer(index) => world.lose_answer(index),
        Action::Frozen => world.feed(Event::Frozen, Flush::All),
        Action::Deadline => {
            if let Some(phase) = world.memory.as_ref().map(State::phase) {
                world.feed(Event::DeadlinePassed(phase, failure("too slow")), Flush::All);
            }
        }
        Action::Cancel => world.feed(Event::CancelRequested(failure("cancelled")), Flush::All),
        Action::GiveUp(side) => world.agent_gives_up(side),
        Action::Restart => world.restart(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20_000, ..ProptestConfig::default() })]

    #[test]
    fn never_two_copies_and_every_path_ends(actions in prop::collection::vec(action(), 0..90)) {
        let mut world = World::new();
        for action in actions {
            perform(&mut world, action);
            world.check();
        }
        world.be_fair();
        world.be_fair();
        let end = world.memory.clone().unwrap();
        prop_assert!(end.is_final(), "stuck: {world:?}");
        prop_assert_eq!(world.source_runs(), end.decision() == Decision::Abort);
        prop_assert_eq!(world.target_runs(), end.decision() == Decision::Commit);
        prop_assert_eq!(world.disk, end);
    }

    #[test]
    fn ended_migrations_ignore_everything(actions in prop::collection::vec(action(), 0..30)) {
        let mut world = World::new();
        world.be_fair();
        prop_assert_eq!(world.memory.as_ref(), Some(&State::Completed));
        for action in actions {
            perform(&mut world, action);
            world.check();
        }
        world.be_fair();
        prop_assert_eq!(&world.disk, &State::Completed);
    }
}

#[test]
fn the_freeze_waits_for_one_write_only() {
    let mut world = World::new();
    while world.memory != Some(State::Freezing(Freezing::default())) {
        world.deliver(0, false);
        let answer = world.answers.remove(0);
        world.feed(answer, Flush::All);
    }
    let mut waited = 0;
    while !world.memory.as_ref().unwrap().is_settled() {
        while !world.calls.is_empty() {
            world.deliver(0, false);
        }
        let answer = world.answers.remove(0);
        let step = world.memory.clone().unwrap().step(answer.clone());
        waited += usize::from(step.durability == Durability::Before && !step.commands.is_empty());
        world.feed(answer, Flush::All);
    }
    assert_eq!((waited, world.memory), (1, Some(State::Completed)));
}

#[test]
fn a_refusal_in_preflight_asks_nobody_to_undo() {
    let step = State::new().step(Event::Failed(Call::PreflightSource, failure("io_uring")));
    assert!(matches!(step.state, State::Aborted { .. }), "{step:?}");
    assert!(step.commands.is_empty());
}

#[test]
fn the_target_is_undone_first_and_an_unreachable_one_does_not_keep_the_source_frozen() {
    let frozen = State::Freezing(Freezing { frozen: true, ..Freezing::default() });
    let step = frozen.step(Event::Failed(Call::Restore, failure("disk full")));
    assert_eq!(step.commands, [Command::Call(Call::Abort(Side::Target))]);
    let step = step.state.step(Event::Failed(Call::Abort(Side::Target), failure("unreachable")));
    let source = Command::Call(Call::Abort(Side::Source));
    assert_eq!(step.commands, [Command::Retry(Call::Abort(Side::Target)), source]);
    let step = step.state.step(Event::Succeeded(Call::Abort(Side::Source)));
    assert!(matches!(step.state, State::RolledBack { .. }) && step.state.is_settled() && !step.state.is_final());
    let step = step.state.step(Event::Succeeded(Call::Abort(Side::Target)));
    assert!(step.state.is_final());
}

#[test]
fn a_repetition_that_changes_nothing_is_not_written() {
    let why = Why { failure: failure("disk full"), cancelled: false };
    let (target, source) = (Call::Abort(Side::Target), Call::Abort(Side::Source));
    let undoing = |target, source| State::Aborting { target, source, why: why.clone() };
    let repeated = [
        (State::RolledBack { why: why.clone() }, target),
        (undoing(PartAbort::Unconfirmed, SourceAbort::Asked), target),
        (undoing(PartAbort::Unconfirmed, SourceAbort::Asked), source),
        (undoing(PartAbort::Confirmed, SourceAbort::Asked), source),
    ];
    for (state, call) in repeated {
        let step = state.clone().step(Event::Failed(call, failure("unreachable")));
        assert_eq!((step.state, step.durability), (state, Durability::Unchanged));
        assert_eq!(step.commands, [Command::Retry(call)]);
    }
    let first = undoing(PartAbort::Asked, SourceAbort::Confirmed).step(Event::Failed(target, failure("unreachable")));
    assert_eq!(first.durability, Durability::Before, "that the source runs again is an outcome");
    let restarted = State::RolledBack { why: why.clone() }.step(Event::Restarted(failure("restarted")));
    assert_eq!((restarted.durability, restarted.commands), (Durability::Unchanged, vec![Command::Call(target)]));
}

#[test]
fn the_end_that_quotes_criu_gives_the_reason() {
    let step = State::Freezing(Freezing::default()).step(Event::Failed(Call::Freeze, failure("connection reset")));
    let line = failure("the restore failed").criu_line("Error (criu/files.c:1): no such file");
    let step = step.state.step(Event::Failed(Call::Restore, line.clone()));
    assert_eq!(step.state.failure(), Some(&line));
    let cancelled = State::Freezing(Freezing::default()).step(Event::CancelRequested(failure("cancelled")));
    let step = cancelled.state.step(Event::Failed(Call::Restore, line));
    assert_eq!(step.state.failure(), Some(&failure("cancelled")));
}

#[test]
fn a_cancel_after_the_commit_changes_nothing() {
    for state in [State::Releasing, State::Resuming, State::Completed] {
        let step = state.clone().step(Event::CancelRequested(failure("cancelled")));
        assert_eq!((step.state, step.durability, step.commands), (state, Durability::Unchanged, Vec::new()));
    }
}
