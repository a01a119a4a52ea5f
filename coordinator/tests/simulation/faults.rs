//! What goes wrong in a seed, and the rules that are broken to see that the simulation notices.

use fastrand::Rng;
use podferry_coordinator::migration::Phase;

use crate::network::Place;
use crate::node::Process;
use crate::world::{Event, MOST, MS, NODES, Number, SECOND, Time, World};

/// What may be dead for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Component {
    Coordinator,
    Agent(usize),
}

/// A rule that is broken on purpose: the simulation must see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Broken {
    /// A sealed part undoes itself when its deadline passes or its agent is started again.
    UndoesWhatIsSealed,
    /// An agent says that it has sealed without having noted it.
    SealsWithoutNoting,
    /// The coordinator lets the target go before the source is dead.
    ResumesBeforeRelease,
    /// A source destroys itself on the word *commit* with memory that the target still needs.
    ReleasesBeforeFill,
    /// The coordinator does not wait until the commit is on disk.
    CommitsBehind,
    /// The source is undone before the target has been told.
    UndoesTheSourceFirst,
    /// A sealed part takes *undecided* for *abort*.
    TakesUndecidedForAbort,
    /// The dump worker seals tasks whose CRIU died, and which have run on since.
    SealsWhatRanOn,
    /// The coordinator does not repeat what is committed.
    GivesUpBehindTheCommit,
    /// A coordinator that is started again undoes what is committed.
    AbortsBehindTheCommit,
    /// A dump worker that is sealed gives up when its agent dies.
    WorkerForsakesItsSeal,
    /// A target runs on the word *commit* alone.
    ResumesByItself,
}

impl Broken {
    pub(crate) const ALL: [Self; 12] = [
        Self::UndoesWhatIsSealed,
        Self::SealsWithoutNoting,
        Self::ResumesBeforeRelease,
        Self::ReleasesBeforeFill,
        Self::CommitsBehind,
        Self::UndoesTheSourceFirst,
        Self::TakesUndecidedForAbort,
        Self::SealsWhatRanOn,
        Self::GivesUpBehindTheCommit,
        Self::AbortsBehindTheCommit,
        Self::WorkerForsakesItsSeal,
        Self::ResumesByItself,
    ];
}

/// The phases in which more goes wrong than by chance.
const MOMENTS: [Phase; 8] = [
    Phase::Freeze,
    Phase::Commit,
    Phase::Commit,
    Phase::Release,
    Phase::Resume,
    Phase::Resume,
    Phase::Fill,
    Phase::RollingBack,
];

/// What goes wrong in a seed: drawn before it begins.
#[derive(Debug)]
pub(crate) struct Plan {
    /// The steps before which something breaks, the last one first.
    steps: Vec<usize>,
    /// So many steps behind the begin of a phase something breaks, too: what matters most happens in moments.
    moments: Vec<(Phase, usize)>,
    /// Until this step messages are lost, late and repeated, and disks slow.
    storm: usize,
    /// In how many of a thousand cases each.
    pub(crate) loss: u32,
    pub(crate) twice: u32,
    pub(crate) slow_network: u32,
    pub(crate) slow_disk: u32,
    /// What a workload itself may do to its migration: rounds that do not converge, a restore that fails.
    pub(crate) failures: u32,
    /// Components that are dead and links that are cut now.
    pub(crate) hurt: usize,
}

impl Plan {
    pub(crate) fn draw(rng: &mut Rng) -> Self {
        let count = [0, 0, 1, 1, 1, 2, 3, 5][rng.usize(..8)];
        let mut steps: Vec<usize> = (0..count).map(|_| rng.usize(1..140)).collect();
        steps.sort_unstable_by(|a, b| b.cmp(a));
        let moments = (0..rng.usize(..4)).map(|_| (MOMENTS[rng.usize(..MOMENTS.len())], rng.usize(..16))).collect();
        let mut sometimes = |most: u32| if rng.bool() { 0 } else { rng.u32(1..=most) };
        let (loss, twice, slow_network) = (sometimes(25), sometimes(50), sometimes(20));
        let (slow_disk, failures) = (sometimes(10), sometimes(30));
        Self { steps, moments, storm: 250, loss, twice, slow_network, slow_disk, failures, hurt: 0 }
    }

    /// Whether nothing more goes wrong from that step on.
    pub(crate) fn is_spent(&self, step: usize) -> bool {
        self.steps.is_empty() && step > self.storm
    }

    /// A migration enters that phase before that step.
    pub(crate) fn enter(&mut self, phase: Phase, step: usize) {
        let (steps, storm) = (&mut self.steps, self.storm);
        self.moments.retain(|(moment, behind)| {
            let is_now = *moment == phase && step < storm;
            if is_now {
                steps.push(step + behind);
            }
            !is_now
        });
        steps.sort_unstable_by(|a, b| b.cmp(a));
    }
}

impl World {
    /// In how many of a thousand cases a workload is in the way of its own migration.
    pub(crate) fn failures(&self) -> u32 {
        if self.is_calm() { 0 } else { self.plan.failures }
    }

    /// What the plan has for this step.
    pub(crate) fn fault(&mut self) {
        while self.plan.steps.last().is_some_and(|step| *step <= self.steps) {
            self.plan.steps.pop();
            self.break_something();
        }
    }

    fn break_something(&mut self) {
        let node = self.rng.usize(..NODES);
        match self.rng.u32(..100) {
            0..20 => self.kill(Component::Coordinator),
            20..50 => {
                let agent = self.rng.usize(..NODES);
                self.kill(Component::Agent(agent));
            }
            50..58 => self.end_process(node, Process::KillWorker),
            58..66 => self.end_process(node, Process::KillCriu),
            66..72 => self.end_process(node, Process::KillRestore),
            72..78 => (0..NODES).for_each(|node| self.end_process(node, Process::KillPagers)),
            78..85 => {
                let number = self.moves.len().saturating_sub(1);
                self.take_cancel(number);
            }
            85..93 => {
                let (a, b) = (self.any_place(), self.any_place());
                self.cut(a, b);
                if self.rng.bool() {
                    self.cut(b, a);
                }
            }
            _ => {
                // One is alone.
                let alone = self.any_place();
                let others =
                    (0..=NODES).map(|index| if index == NODES { Place::Coordinator } else { Place::Node(index) });
                for other in others {
                    self.cut(alone, other);
                    self.cut(other, alone);
                }
            }
        }
    }

    fn any_place(&mut self) -> Place {
        match self.rng.usize(..=NODES) {
            NODES => Place::Coordinator,
            node => Place::Node(node),
        }
    }

    /// How long something is dead or cut: a moment, seconds, or longer than every deadline.
    fn outage(&mut self) -> Time {
        match self.rng.u32(..100) {
            0..45 => self.rng.u64(MS..500 * MS),
            45..80 => self.rng.u64(SECOND..20 * SECOND),
            _ => self.rng.u64(100 * SECOND..200 * SECOND),
        }
    }

    fn cut(&mut self, from: Place, to: Place) {
        if from == to {
            return;
        }
        let outage = self.outage();
        self.say(|| format!("FAULT: {from:?} to {to:?} is cut for {} ms", outage / MS));
        self.network.cut[from.index()][to.index()] += 1;
        self.plan.hurt += 1;
        self.schedule(outage, Event::Heal { from, to });
    }

    pub(crate) fn heal(&mut self, from: Place, to: Place) {
        self.network.cut[from.index()][to.index()] -= 1;
        self.plan.hurt -= 1;
        self.say(|| format!("{from:?} to {to:?} is whole"));
    }

    pub(crate) fn kill(&mut self, component: Component) {
        let up = match component {
            Component::Coordinator => self.coordinator.up,
            Component::Agent(node) => self.nodes[node].up,
        };
        if !up {
            return;
        }
        let outage = self.outage();
        self.say(|| format!("FAULT: {component:?} is killed, for {} ms", outage / MS));
        match component {
            Component::Coordinator => self.kill_coordinator(),
            Component::Agent(node) => self.kill_agent(node),
        }
        self.plan.hurt += 1;
        self.schedule(outage, Event::Revive(component));
    }

    pub(crate) fn revive(&mut self, component: Component) {
        self.say(|| format!("{component:?} is started again"));
        self.plan.hurt -= 1;
        match component {
            Component::Coordinator => self.start_coordinator(),
            Component::Agent(node) => self.start_agent(node),
        }
    }

    fn end_process(&mut self, node: usize, what: Process) {
        for number in 0..MOST as Number {
            self.process(node, number, what);
        }
    }
}
