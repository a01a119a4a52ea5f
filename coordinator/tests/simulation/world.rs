//! The whole: virtual time, what is due, and the parts of the model on one clock.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use fastrand::Rng;
use podferry_coordinator::migration::Path;
use podferry_coordinator::runner::Deadlines;
use podferry_coordinator::strategy::Strategy;

use crate::coordinator::{Coordinator, JobId};
use crate::faults::{Broken, Component, Plan};
use crate::network::{Message, Network, Place};
use crate::node::{Act, At, Node, Process};

/// Microseconds since the seed began.
pub(crate) type Time = u64;
pub(crate) const MS: Time = 1_000;
pub(crate) const SECOND: Time = 1_000 * MS;

/// Which migration of the seed.
pub(crate) type Number = usize;
/// Migrations of one seed, all of the same workload.
pub(crate) const MOST: usize = 3;
/// Nodes of one seed.
pub(crate) const NODES: usize = 3;
/// Where the workload runs at first.
pub(crate) const HOME: usize = 0;

/// What has nothing left to go wrong ends within this time: the longest life of a part that nobody knows of, twice.
const PATIENCE: Time = 400 * SECOND;
/// A seed that takes more steps than this goes round in circles.
const MOST_STEPS: usize = 20_000;

/// What happens at one instant. All that comes of it at once is one step.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Event {
    /// A user asks for the next migration.
    Wish,
    /// A user cancels.
    Cancel(Number),
    /// The coordinator's disk has taken a record.
    Written { number: Number, life: u32 },
    /// A phase has come to its deadline.
    PhaseLate { number: Number, turn: u32, life: u32 },
    /// A call's pause is over.
    Send(JobId),
    /// A call's patience is over.
    TimeOut(JobId),
    /// A message is tried again whose link was cut.
    Carry { from: Place, to: Place, message: Message },
    /// A message is there.
    Arrive { from: Place, to: Place, message: Message },
    /// An agent takes the next step of what it does.
    Act { at: At, act: Act },
    /// A process beside the agent does something.
    Process { node: usize, number: Number, what: Process },
    /// A component is started again.
    Revive(Component),
    /// A link is whole again.
    Heal { from: Place, to: Place },
}

struct Due {
    at: Time,
    order: u64,
    event: Event,
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        self.order == other.order
    }
}

impl Eq for Due {}

impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Due {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

/// One migration, as the user asked for it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Move {
    pub(crate) strategy: Strategy,
    pub(crate) path: Path,
    pub(crate) source: usize,
    pub(crate) target: usize,
    /// From the signal that asks a cold workload to end, to the one that ends it.
    pub(crate) grace: Time,
}

impl Move {
    pub(crate) fn is_cold(&self) -> bool {
        self.strategy == Strategy::Cold
    }
}

/// What a seed came to.
pub(crate) struct Ended {
    pub(crate) violation: Option<String>,
    pub(crate) steps: usize,
    pub(crate) migrations: usize,
    pub(crate) outcomes: Vec<&'static str>,
    pub(crate) trace: Vec<String>,
}

pub(crate) struct World {
    pub(crate) rng: Rng,
    pub(crate) now: Time,
    pub(crate) steps: usize,
    order: u64,
    queue: BinaryHeap<Reverse<Due>>,
    pub(crate) deadlines: Deadlines,
    pub(crate) network: Network,
    pub(crate) coordinator: Coordinator,
    pub(crate) nodes: [Node; NODES],
    /// Those that were asked for.
    pub(crate) moves: Vec<Move>,
    /// Migrations that are still to be asked for.
    pub(crate) wishes: usize,
    pub(crate) plan: Plan,
    pub(crate) broken: Option<Broken>,
    /// How often a copy of the workload has begun to run: what it has done by then is in no older copy.
    pub(crate) latest: u32,
    pub(crate) ran: [bool; NODES],
    /// Calls that may still arrive.
    calls: usize,
    calm_since: Option<Time>,
    /// How each migration ended, as users see it.
    pub(crate) outcomes: Vec<&'static str>,
    violation: Option<String>,
    trace: Option<Vec<String>>,
}

impl World {
    pub(crate) fn new(seed: u64, broken: Option<Broken>, traced: bool) -> Self {
        let mut rng = Rng::with_seed(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let plan = Plan::draw(&mut rng);
        let wishes = if rng.u8(..100) < 70 { 1 } else { rng.usize(2..=MOST) };
        let mut world = Self {
            now: 0,
            steps: 0,
            order: 0,
            queue: BinaryHeap::with_capacity(64),
            deadlines: crate::coordinator::deadlines(),
            network: Network::default(),
            coordinator: Coordinator::new(),
            nodes: std::array::from_fn(|number| Node::new(number == HOME)),
            moves: Vec::with_capacity(MOST),
            wishes,
            plan,
            broken,
            latest: 1,
            ran: std::array::from_fn(|number| number == HOME),
            calls: 0,
            calm_since: None,
            outcomes: Vec::new(),
            violation: None,
            trace: traced.then(Vec::new),
            rng,
        };
        world.schedule(0, Event::Wish);
        world
    }

    /// From the first wish until nothing is left to happen, or a rule is broken.
    pub(crate) fn run(mut self) -> Ended {
        while let Some(Reverse(due)) = self.queue.pop() {
            self.now = due.at;
            self.steps += 1;
            self.calls -= usize::from(is_call(&due.event));
            self.fault();
            self.handle(due.event);
            self.check();
            if self.violation.is_some() || self.is_over() {
                break;
            }
            self.check_patience();
        }
        if self.violation.is_none() {
            self.check_end();
        }
        Ended {
            violation: self.violation,
            steps: self.steps,
            migrations: self.moves.len(),
            outcomes: self.outcomes,
            trace: self.trace.unwrap_or_default(),
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Wish => self.wish(),
            Event::Cancel(number) => self.take_cancel(number),
            Event::Written { number, life } => self.written(number, life),
            Event::PhaseLate { number, turn, life } => self.phase_late(number, turn, life),
            Event::Send(job) => self.send_call(job),
            Event::TimeOut(job) => self.time_out(job),
            Event::Carry { from, to, message } => self.send(from, to, message),
            Event::Arrive { from, to, message } => self.arrive(from, to, message),
            Event::Act { at, act } => self.act(at, act),
            Event::Process { node, number, what } => self.process(node, number, what),
            Event::Revive(component) => self.revive(component),
            Event::Heal { from, to } => self.heal(from, to),
        }
    }

    pub(crate) fn schedule(&mut self, after: Time, event: Event) {
        self.order += 1;
        self.calls += usize::from(is_call(&event));
        self.queue.push(Reverse(Due { at: self.now + after, order: self.order, event }));
    }

    /// Nothing goes wrong from here on: what was begun has to come to its end.
    pub(crate) fn is_calm(&self) -> bool {
        self.calm_since.is_some()
    }

    /// Whether no call is on its way that might begin something.
    pub(crate) fn is_silent(&self) -> bool {
        self.calls == 0
    }

    fn check_patience(&mut self) {
        if self.calm_since.is_none() && self.plan.is_spent(self.steps) && self.plan.hurt == 0 {
            self.calm_since = Some(self.now);
            self.say(|| "from here on nothing goes wrong any more".to_owned());
        }
        let waited = self.calm_since.map_or(0, |since| self.now - since);
        if waited > PATIENCE || self.steps > MOST_STEPS {
            let left = self.leftovers();
            self.fail(format!("no end: {} s after the last fault {left}", waited / SECOND));
        }
    }

    /// Takes down a broken rule. The first counts.
    pub(crate) fn fail(&mut self, what: String) {
        self.say(|| format!("BROKEN: {what}"));
        self.violation.get_or_insert(what);
    }

    pub(crate) fn say(&mut self, what: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            let (seconds, micros) = (self.now / SECOND, self.now % SECOND);
            trace.push(format!("{:>4} {seconds:>5}.{micros:06} {}", self.steps, what()));
        }
    }

    pub(crate) fn is_broken(&self, rule: Broken) -> bool {
        self.broken == Some(rule)
    }

    /// True in so many of a thousand cases.
    pub(crate) fn chance(&mut self, of_a_thousand: u32) -> bool {
        of_a_thousand > 0 && self.rng.u32(..1000) < of_a_thousand
    }

    /// How long a small thing takes that an agent does: the time of a write to its own disk, which may be slow.
    pub(crate) fn little(&mut self) -> Time {
        if !self.is_calm() && self.rng.u32(..1000) < self.plan.slow_disk {
            return self.rng.u64(100 * MS..40 * SECOND);
        }
        self.rng.u64(50..3 * MS)
    }
}

fn is_call(event: &Event) -> bool {
    matches!(
        event,
        Event::Arrive { message: Message::Request { .. }, .. } | Event::Carry { message: Message::Request { .. }, .. }
    )
}
