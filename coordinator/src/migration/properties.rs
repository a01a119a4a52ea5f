//! The machine against a model of both agents and of a coordinator that may die at any instant: whatever the order of
//! events, no two copies can run, and with fair events every migration ends.

use podferry_common::{Failure, FailureCode};
use proptest::prelude::*;

use super::*;

/// What a node's agent does with its part, as the specification of `podferry_proto::agent` has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    None,
    /// The source copies memory while the workload runs; the target has prepared.
    Working,
    Ready,
    Sealed,
    Undone,
    /// The target runs, and lacks memory.
    Filling,
    Finished,
    /// The target's memory is lost, and its copy stopped.
    Lost,
}

#[derive(Debug)]
struct World {
    path: Path,
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
    fn new(path: Path) -> Self {
        let mut world = Self {
            path,
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
        matches!(self.source, Part::None | Part::Working | Part::Undone)
    }

    fn target_runs(&self) -> bool {
        matches!(self.target, Part::Filling | Part::Finished)
    }

    /// Gives the coordinator an event. `flush` says how much of what is to be done happens before it dies.
    fn feed(&mut self, event: Event, flush: Flush) {
        let Some(state) = self.memory.take() else { return };
        let before = state.clone();
        let step = state.step(event, self.path);
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
        self.answers.extend(answer);
    }

    /// The source has copied enough, and freezes. What its stream says then comes in any order.
    fn converge(&mut self) {
        if self.source == Part::Working {
            self.source = Part::Ready;
            self.answers.extend([Event::Converged, Event::Frozen, Event::Succeeded(Call::Freeze)]);
        }
    }

    fn lose_memory(&mut self) {
        if self.target == Part::Filling {
            self.target = Part::Lost;
        }
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
            // The caller of a lost answer sees its connection break. What a stream said on the way may be missing.
            self.answers.extend(match lost {
                Event::Succeeded(call) => Some(Event::Failed(call, failure("answer lost"))),
                Event::Converged | Event::Frozen => None,
                seen => Some(seen),
            });
        }
    }

    /// An agent's own rules. `None`: it answers later.
    fn handle(&mut self, call: Call) -> Option<Event> {
        let path = self.path;
        let part = match call.side() {
            Side::Source => &mut self.source,
            Side::Target => &mut self.target,
        };
        let ok = match (call, *part) {
            (Call::Prepare, Part::None) => {
                *part = Part::Working;
                true
            }
            (Call::Freeze, Part::None) if path.pre_copy => {
                *part = Part::Working;
                return None;
            }
            (Call::Freeze, Part::None) | (Call::Restore, Part::Working) => {
                *part = Part::Ready;
                true
            }
            (Call::Seal(_), Part::Ready | Part::Sealed) => {
                *part = Part::Sealed;
                true
            }
            (Call::Resume, Part::Sealed) if path.fill => {
                *part = Part::Filling;
                true
            }
            (Call::Release | Call::Resume, Part::Sealed) | (Call::Fill, Part::Filling) => {
                *part = Part::Finished;
                true
            }
            (Call::Fill, Part::Lost) => return Some(Event::Failed(call, Failure::new(FailureCode::DataLoss, "lost"))),
            // Repetitions; and nothing to undo, where a call that comes late still makes a part.
            (Call::Release | Call::Fill, Part::Finished)
            | (Call::Resume, Part::Filling | Part::Finished | Part::Lost)
            | (Call::PreflightSource | Call::PreflightTarget, _)
            | (Call::Abort(_), Part::None) => true,
            (Call::Abort(_), Part::Working | Part::Ready | Part::Sealed | Part::Undone) => {
                *part = Part::Undone;
                true
            }
            _ => false,
        };
        Some(if ok { Event::Succeeded(call) } else { Event::Failed(call, failure("does not fit the part's state")) })
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
            let stopped = self.source == Part::Finished || self.path.post_copy && self.source == Part::Sealed;
            assert!(stopped, "the target runs before the source has stopped for good: {self:?}");
        }
        if self.path.post_copy && matches!(self.target, Part::Ready | Part::Sealed | Part::Filling) {
            assert_ne!(self.source, Part::Finished, "the source is gone with memory that the target needs: {self:?}");
        }
        if self.source == Part::Finished {
            assert_eq!(self.disk.decision(), Decision::Commit, "the source was destroyed without a commit: {self:?}");
        }
        if self.source == Part::Undone {
            assert_ne!(self.disk.decision(), Decision::Commit, "the source thawed after the commit: {self:?}");
        }
        match self.disk {
            State::Completed => assert_eq!(self.target, Part::Finished, "memory is missing: {self:?}"),
            State::Losing { .. } | State::Lost { .. } => {
                assert_eq!(self.target, Part::Lost, "given up for lost while it runs: {self:?}");
            }
            _ => {}
        }
        if matches!(self.disk, State::Completed | State::Lost { .. }) {
            assert_eq!(self.source, Part::Finished, "over while the source is still there: {self:?}");
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
                self.converge();
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
    Converged,
    Frozen,
    Converge,
    LoseMemory,
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
        1 => Just(Action::Converged),
        3 => Just(Action::Frozen),
        10 => Just(Action::Converge),
        3 => Just(Action::LoseMemory),
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
        Action::Converged => world.feed(Event::Converged, Flush::All),
        Action::Frozen => world.feed(Event::Frozen, Flush::All),
        Action::Converge => world.converge(),
        Action::LoseMemory => world.lose_memory(),
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

const WARM: Path = Path { pre_copy: false, fill: false, post_copy: false };
const COLD: Path = Path { pre_copy: true, fill: false, post_copy: false };
const LIVE: Path = Path { pre_copy: true, fill: true, post_copy: false };
const HYBRID: Path = Path { pre_copy: true, fill: true, post_copy: true };

/// Every path that a strategy could have, those of cold, warm and live among them.
fn path() -> impl Strategy<Value = Path> {
    let path = (any::<bool>(), any::<bool>(), any::<bool>());
    // What is fetched afterwards is filled in.
    path.prop_map(|(pre_copy, fill, post_copy)| Path { pre_copy, fill: fill || post_copy, post_copy })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20_000, ..ProptestConfig::default() })]

    #[test]
    fn never_two_copies_and_every_path_ends(path in path(), actions in prop::collection::vec(action(), 0..110)) {
        let mut world = World::new(path);
        for action in actions {
            perform(&mut world, action);
            world.check();
        }
        world.be_fair();
        world.be_fair();
        let end = world.memory.clone().unwrap();
        prop_assert!(end.is_final(), "stuck: {world:?}");
        prop_assert_eq!(world.source_runs(), end.decision() == Decision::Abort);
        prop_assert_eq!(world.target_runs(), end == State::Completed);
        prop_assert_eq!(world.disk, end);
    }

    #[test]
    fn ended_migrations_ignore_everything(path in path(), actions in prop::collection::vec(action(), 0..30)) {
        let mut world = World::new(path);
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
    let begun = [(WARM, State::Freezing(Freezing::default())), (COLD, State::PreCopying), (LIVE, State::PreCopying)];
    for (path, before) in begun {
        let mut world = World::new(path);
        while world.memory.as_ref() != Some(&before) {
            world.deliver(0, false);
            let answer = world.answers.remove(0);
            world.feed(answer, Flush::All);
        }
        let mut waited = 0;
        while !world.target_runs() {
            while !world.calls.is_empty() {
                world.deliver(0, false);
            }
            world.converge();
            if world.target_runs() {
                break;
            }
            let answer = world.answers.remove(0);
            let step = world.memory.clone().unwrap().step(answer.clone(), path);
            waited += usize::from(step.durability == Durability::Before && !step.commands.is_empty());
            world.feed(answer, Flush::All);
        }
        world.be_fair();
        assert_eq!((waited, world.memory), (1, Some(State::Completed)), "{path:?}");
    }
}

/// What a state becomes by an event on the path of live, and what is done.
fn live(state: &State, event: Event) -> (State, Durability, Vec<Command>) {
    let step = state.clone().step(event, LIVE);
    (step.state, step.durability, step.commands)
}

#[test]
fn a_target_restores_when_the_source_has_copied_enough() {
    let begun = live(&State::Preparing, Event::Succeeded(Call::Prepare));
    assert_eq!(begun, (State::PreCopying, Durability::Before, vec![Command::Call(Call::Freeze)]));
    let restore = vec![Command::Call(Call::Restore)];
    let converged = live(&State::PreCopying, Event::Converged);
    assert_eq!(converged, (State::Freezing(Freezing::default()), Durability::Behind, restore.clone()));
    // An agent that leaves the word out does not leave its workload frozen.
    let frozen = Freezing { frozen: true, ..Freezing::default() };
    let implied = live(&State::PreCopying, Event::Frozen);
    assert_eq!(implied, (State::Freezing(frozen), Durability::Behind, restore.clone()));
    assert_eq!(live(&implied.0, Event::Converged), (implied.0.clone(), Durability::Unchanged, Vec::new()));
    let sent = Freezing { sent: true, ..frozen };
    let implied = live(&State::PreCopying, Event::Succeeded(Call::Freeze));
    assert_eq!(implied, (State::Freezing(sent), Durability::Behind, restore));
    assert_eq!(live(&implied.0, Event::Frozen).0, State::Freezing(sent), "what is known stays known");
}

#[test]
fn whatever_goes_wrong_in_pre_copy_undoes_both_parts() {
    let ends = [
        Event::Failed(Call::Freeze, failure("the link broke")),
        Event::DeadlinePassed(Phase::PreCopy, failure("too slow")),
        Event::CancelRequested(failure("cancelled")),
        Event::Restarted(failure("restarted")),
    ];
    for end in ends {
        let (state, durability, commands) = live(&State::PreCopying, end.clone());
        let due = matches!(state, State::Aborting { source: SourceAbort::Due, target: PartAbort::Asked, .. });
        assert!(due && durability == Durability::Before, "{end:?} {state:?}");
        assert_eq!(commands, [Command::Call(Call::Abort(Side::Target))]);
    }
    let ignored = [
        Event::DeadlinePassed(Phase::Freeze, failure("of another phase")),
        Event::Failed(Call::Restore, failure("not asked for yet")),
    ];
    for other in ignored {
        assert_eq!(live(&State::PreCopying, other).1, Durability::Unchanged);
    }
}

#[test]
fn a_fill_is_repeated_until_it_is_confirmed_or_the_memory_is_lost() {
    let fill = Call::Fill;
    let begun = live(&State::Resuming, Event::Succeeded(Call::Resume));
    assert_eq!(begun, (State::Filling, Durability::Before, vec![Command::Call(fill)]));
    assert!(!State::Filling.is_settled() && !State::Filling.can_be_cancelled());
    assert_eq!(State::Filling.decision(), Decision::Commit);
    let same = |commands| (State::Filling, Durability::Unchanged, commands);
    assert_eq!(live(&State::Filling, Event::Failed(fill, failure("slow"))), same(vec![Command::Retry(fill)]));
    assert_eq!(live(&State::Filling, Event::Restarted(failure("x"))), same(vec![Command::Call(fill)]));
    assert_eq!(live(&State::Filling, Event::CancelRequested(failure("x"))), same(Vec::new()));
    let done = live(&State::Filling, Event::Succeeded(fill));
    assert_eq!(done, (State::Completed, Durability::Before, Vec::new()));

    let lost = Failure::new(FailureCode::DataLoss, "a page is gone");
    let (end, durability, commands) = live(&State::Filling, Event::Failed(fill, lost.clone()));
    assert_eq!((&end, durability, commands), (&State::Lost { why: lost.clone().into() }, Durability::Before, vec![]));
    assert!(end.is_settled() && end.is_final());
    assert_eq!((end.phase(), end.decision(), end.failure()), (Phase::Failed, Decision::Commit, Some(&lost)));
    // Such a word about another call is a failure like any other.
    let early = live(&State::Resuming, Event::Failed(Call::Resume, lost.clone()));
    assert_eq!(early, (State::Resuming, Durability::Unchanged, vec![Command::Retry(Call::Resume)]));
    let undone = live(&State::PreCopying, Event::Failed(Call::Freeze, lost));
    assert_eq!(undone.0.decision(), Decision::Abort);
}

#[test]
fn a_source_that_has_the_targets_memory_is_destroyed_last() {
    let hybrid = |state: State, event| {
        let step = state.step(event, HYBRID);
        (step.state, step.durability, step.commands)
    };
    let sealing = State::Sealing { source: true, target: false };
    let committed = hybrid(sealing, Event::Succeeded(Call::Seal(Side::Target)));
    assert_eq!(committed, (State::Resuming, Durability::Before, vec![Command::Call(Call::Resume)]));
    let filled = hybrid(State::Filling, Event::Succeeded(Call::Fill));
    assert_eq!(filled, (State::Releasing, Durability::Before, vec![Command::Call(Call::Release)]));
    let released = hybrid(State::Releasing, Event::Succeeded(Call::Release));
    assert_eq!(released, (State::Completed, Durability::Before, Vec::new()));

    let lost = Failure::new(FailureCode::DataLoss, "the source is gone");
    let losing = State::Losing { why: lost.clone().into() };
    let release = Command::Call(Call::Release);
    let given_up = hybrid(State::Filling, Event::Failed(Call::Fill, lost.clone()));
    assert_eq!(given_up, (losing.clone(), Durability::Before, vec![release]));
    assert!(losing.is_settled() && !losing.is_final() && losing.decision() == Decision::Commit);
    assert_eq!((losing.phase(), losing.failure()), (Phase::Failed, Some(&lost)));
    let again = hybrid(losing.clone(), Event::Failed(Call::Release, failure("unreachable")));
    assert_eq!(again, (losing.clone(), Durability::Unchanged, vec![Command::Retry(Call::Release)]));
    let restarted = hybrid(losing.clone(), Event::Restarted(failure("restarted")));
    assert_eq!(restarted, (losing.clone(), Durability::Unchanged, vec![release]));
    let over = hybrid(losing, Event::Succeeded(Call::Release));
    assert_eq!(over, (State::Lost { why: lost.into() }, Durability::Before, Vec::new()));
}

#[test]
fn cold_copies_beforehand_releases_the_source_first_and_fills_nothing() {
    let cold = |state: State, event| {
        let step = state.step(event, COLD);
        (step.state, step.durability, step.commands)
    };
    let begun = cold(State::Preparing, Event::Succeeded(Call::Prepare));
    assert_eq!(begun, (State::PreCopying, Durability::Before, vec![Command::Call(Call::Freeze)]));
    let copied = cold(State::PreCopying, Event::Converged);
    let freezing = State::Freezing(Freezing::default());
    assert_eq!(copied, (freezing.clone(), Durability::Behind, vec![Command::Call(Call::Restore)]));
    // While the source waits for the container's end it can be cancelled, and both parts are undone.
    let cancelled = cold(freezing, Event::CancelRequested(failure("cancelled")));
    assert!(matches!(cancelled.0, State::Aborting { source: SourceAbort::Due, .. }), "{cancelled:?}");
    assert_eq!((cancelled.1, cancelled.2), (Durability::Before, vec![Command::Call(Call::Abort(Side::Target))]));
    let sealing = State::Sealing { source: true, target: false };
    let committed = cold(sealing, Event::Succeeded(Call::Seal(Side::Target)));
    assert_eq!(committed, (State::Releasing, Durability::Before, vec![Command::Call(Call::Release)]));
    let released = cold(State::Releasing, Event::Succeeded(Call::Release));
    assert_eq!(released, (State::Resuming, Durability::Behind, vec![Command::Call(Call::Resume)]));
    let resumed = cold(State::Resuming, Event::Succeeded(Call::Resume));
    assert_eq!(resumed, (State::Completed, Durability::Before, Vec::new()));
}

#[test]
fn the_words_of_other_paths_change_nothing_on_warms() {
    let freezing = State::Freezing(Freezing::default());
    for state in [State::Preparing, freezing, State::Sealing { source: false, target: true }, State::Resuming] {
        for event in [Event::Converged, Event::Succeeded(Call::Fill), Event::Failed(Call::Fill, failure("x"))] {
            let step = state.clone().step(event, WARM);
            assert_eq!((step.state, step.durability, step.commands), (state.clone(), Durability::Unchanged, vec![]));
        }
    }
    let resumed = State::Resuming.step(Event::Succeeded(Call::Resume), WARM);
    assert_eq!(resumed.state, State::Completed);
}

#[test]
fn a_refusal_in_preflight_asks_nobody_to_undo() {
    let step = State::new().step(Event::Failed(Call::PreflightSource, failure("io_uring")), WARM);
    assert!(matches!(step.state, State::Aborted { .. }), "{step:?}");
    assert!(step.commands.is_empty());
}

#[test]
fn the_target_is_undone_first_and_an_unreachable_one_does_not_keep_the_source_frozen() {
    let frozen = State::Freezing(Freezing { frozen: true, ..Freezing::default() });
    let step = frozen.step(Event::Failed(Call::Restore, failure("disk full")), WARM);
    assert_eq!(step.commands, [Command::Call(Call::Abort(Side::Target))]);
    let step = step.state.step(Event::Failed(Call::Abort(Side::Target), failure("unreachable")), WARM);
    let source = Command::Call(Call::Abort(Side::Source));
    assert_eq!(step.commands, [Command::Retry(Call::Abort(Side::Target)), source]);
    let step = step.state.step(Event::Succeeded(Call::Abort(Side::Source)), WARM);
    assert!(matches!(step.state, State::RolledBack { .. }) && step.state.is_settled() && !step.state.is_final());
    let step = step.state.step(Event::Succeeded(Call::Abort(Side::Target)), WARM);
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
        let step = state.clone().step(Event::Failed(call, failure("unreachable")), WARM);
        assert_eq!((step.state, step.durability), (state, Durability::Unchanged));
        assert_eq!(step.commands, [Command::Retry(call)]);
    }
    let first =
        undoing(PartAbort::Asked, SourceAbort::Confirmed).step(Event::Failed(target, failure("unreachable")), WARM);
    assert_eq!(first.durability, Durability::Before, "that the source runs again is an outcome");
    let restarted = State::RolledBack { why: why.clone() }.step(Event::Restarted(failure("restarted")), WARM);
    assert_eq!((restarted.durability, restarted.commands), (Durability::Unchanged, vec![Command::Call(target)]));
}

#[test]
fn the_end_that_quotes_criu_gives_the_reason() {
    let step =
        State::Freezing(Freezing::default()).step(Event::Failed(Call::Freeze, failure("connection reset")), WARM);
    let line = failure("the restore failed").criu_line("Error (criu/files.c:1): no such file");
    let step = step.state.step(Event::Failed(Call::Restore, line.clone()), WARM);
    assert_eq!(step.state.failure(), Some(&line));
    let cancelled = State::Freezing(Freezing::default()).step(Event::CancelRequested(failure("cancelled")), WARM);
    let step = cancelled.state.step(Event::Failed(Call::Restore, line), WARM);
    assert_eq!(step.state.failure(), Some(&failure("cancelled")));
}

#[test]
fn a_cancel_after_the_commit_changes_nothing() {
    for state in [State::Releasing, State::Resuming, State::Filling, State::Completed] {
        let step = state.clone().step(Event::CancelRequested(failure("cancelled")), WARM);
        assert_eq!((step.state, step.durability, step.commands), (state, Durability::Unchanged, Vec::new()));
    }
}
