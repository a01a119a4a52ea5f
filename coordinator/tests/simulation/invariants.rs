//! What must hold after every step, and at the end.

use podferry_coordinator::migration::{Decision, Phase, State};
use podferry_part::{Side, Standing};

use crate::node::{Pager, Pagers, Stage};
use crate::world::{HOME, MOST, Move, NODES, Number, World};

impl World {
    /// After every step.
    pub(crate) fn check(&mut self) {
        self.check_copies();
        let Some(number) = self.newest() else { return };
        let planned = self.moves[number];
        let decided = self.coordinator.disks[number].decided;
        self.check_sides(number, planned, decided == Some(Decision::Commit));
        self.check_something_is_left(number, planned, decided == Some(Decision::Commit));
        if let (Some(state), Some(decided)) = (self.coordinator.state(number), decided)
            && decided != Decision::Undecided
            && state.decision() != decided
        {
            self.fail(format!("on disk {number} is {decided:?}, and its driver is at {state:?}"));
        }
    }

    /// The last migration whose record is on disk: earlier ones have let go of the workload.
    fn newest(&self) -> Option<Number> {
        (0..self.moves.len()).rev().find(|number| self.coordinator.disks[*number].decided.is_some())
    }

    /// Never two that can execute an instruction; and who begins to run has everything that ran before.
    fn check_copies(&mut self) {
        for node in 0..NODES {
            let runs = self.nodes[node].runs();
            if runs && !self.ran[node] {
                let version = self.nodes[node].container.map_or(0, |container| container.version);
                if version != self.latest {
                    self.fail(format!(
                        "node {node} runs a copy of run {version}, and the workload has run {} times",
                        self.latest
                    ));
                }
                self.latest += 1;
                if let Some(container) = &mut self.nodes[node].container {
                    container.version = self.latest;
                }
            }
            self.ran[node] = runs;
        }
        if self.ran.iter().filter(|runs| **runs).count() > 1 {
            self.fail(format!("two copies run: on nodes {:?}", self.ran));
        }
    }

    /// Which side may run, by the decision that is on disk.
    fn check_sides(&mut self, number: Number, planned: Move, committed: bool) {
        let (source, target) = (&self.nodes[planned.source], &self.nodes[planned.target]);
        if committed && source.runs() {
            return self.fail(format!("the source of {number} runs behind the commit"));
        }
        if !target.runs() {
            return;
        }
        if !committed {
            return self.fail(format!("the target of {number} runs without a commit"));
        }
        if !planned.path.post_copy && source.is_alive() {
            return self.fail(format!("the target of {number} runs before its source is dead"));
        }
        let needs =
            target.pagers[number].is_some_and(|pagers| pagers.alive && matches!(pagers.state, Pager::Filling(_)));
        if planned.path.post_copy && needs && !source.is_alive() {
            self.fail(format!("the source of {number} is gone with memory that the target needs"));
        }
    }

    /// A copy that lives, or can be brought to life, is always there, but when memory was lost that nobody else had.
    fn check_something_is_left(&mut self, number: Number, planned: Move, committed: bool) {
        if self.nodes.iter().any(|node| node.container.is_some_and(|container| container.alive && !container.held)) {
            return;
        }
        let left = if committed {
            let target = &self.nodes[planned.target];
            let sealed = target.journal[number].is_some_and(|journal| journal.standing == Standing::Sealed);
            let lost = target.pagers[number].is_some_and(|pagers| !pagers.alive && pagers.state == Pager::Lost);
            lost || (sealed && target.images[number] == Some(self.latest))
        } else {
            // Cold: who undoes it starts it again.
            let source = &self.nodes[planned.source];
            let begun =
                source.journal[number].is_some_and(|journal| journal.begun.is_some() && !journal.standing.is_last());
            planned.is_cold() && begun && source.container.is_some_and(|container| container.version == self.latest)
        };
        if !left {
            self.fail(format!(
                "no copy is left, and {number} is {}",
                if committed { "committed" } else { "not committed" }
            ));
        }
    }

    /// Whether nothing is left to happen.
    pub(crate) fn is_over(&self) -> bool {
        let asked = self.wishes == 0 || self.moves.len() == MOST;
        asked
            && self.plan.hurt == 0
            && self.is_silent()
            && (0..self.moves.len()).all(|number| !self.coordinator.is_driven(number))
            && self.left().is_none()
    }

    /// What a migration has left on a node: none, when it has ended everywhere.
    fn left(&self) -> Option<(usize, Number)> {
        let all = (0..NODES).flat_map(|node| (0..self.moves.len()).map(move |number| (node, number)));
        all.into_iter().find(|(node, number)| {
            let (node, number) = (&self.nodes[*node], *number);
            node.entries[number].is_busy()
                || node.journal[number].is_some_and(|journal| {
                    !journal.standing.is_last() || (journal.standing == Standing::Released && !journal.tidied)
                })
                || node.workers[number].is_some_and(|worker| !matches!(worker.stage, Stage::Released | Stage::Undone))
                || node.restores[number].is_some()
                || node.pagers[number].is_some_and(Pagers::is_under_way)
                || node.images[number].is_some()
        })
    }

    /// For people.
    pub(crate) fn leftovers(&self) -> String {
        let states = (0..self.moves.len()).map(|number| self.coordinator.durable(number).map(|record| record.state));
        let states: Vec<_> = states.collect();
        let left = self.left().map(|(node, number)| {
            let of = &self.nodes[node];
            let (entry, journal) = (of.entries[number], of.journal[number]);
            format!(
                "node {node} has of {number}: {entry:?}, {journal:?}, {:?}, {:?}, {:?}, {:?}",
                of.workers[number], of.restores[number], of.pagers[number], of.images[number]
            )
        });
        format!("{states:?} {}", left.unwrap_or_default())
    }

    /// When nothing goes wrong any more, everything has ended, and is where the records say.
    pub(crate) fn check_end(&mut self) {
        if let Some((node, number)) = self.left() {
            let left = self.leftovers();
            self.fail(format!("node {node} has something left of {number}: {left}"));
        }
        let mut place = Some(HOME);
        for number in 0..self.moves.len() {
            let Some(record) = self.coordinator.durable(number) else { continue };
            if !record.state.is_final() {
                self.fail(format!("{number} has not ended: {:?}", record.state));
            }
            let outcome =
                if matches!(record.state, State::Lost { .. }) { "lost" } else { record.state.phase().as_str() };
            self.outcomes.push(outcome);
            let planned = self.moves[number];
            place = match (&record.state, record.state.decision()) {
                (State::Lost { .. }, _) => None,
                (_, Decision::Commit) => Some(planned.target),
                _ => Some(planned.source),
            };
            let phase = record.state.phase();
            if self.coordinator.cancelled[number] && phase != Phase::Cancelled {
                self.fail(format!("{number} was cancelled, and is {phase}"));
            }
            self.check_memory(number, &record.state);
        }
        for node in 0..NODES {
            let there = self.nodes[node].container.is_some();
            let runs = self.nodes[node].runs();
            if (there || runs) != (place == Some(node)) || there != runs {
                self.fail(format!(
                    "the workload is to run on {place:?}, and node {node} has {:?}",
                    self.nodes[node].container
                ));
            }
        }
    }

    fn check_memory(&mut self, number: Number, state: &State) {
        let target = &self.nodes[self.moves[number].target];
        let pagers = target.pagers[number].map(|pagers| pagers.state);
        let resumed = target.journal[number]
            .is_some_and(|journal| journal.side == Side::Target && journal.standing == Standing::Resumed);
        let fits = match state {
            State::Completed => resumed && matches!(pagers, None | Some(Pager::Done)),
            State::Lost { .. } => pagers == Some(Pager::Lost),
            _ => !resumed,
        };
        if !fits {
            self.fail(format!("{number} is {state:?}, and on its target are {pagers:?}, {:?}", target.journal[number]));
        }
    }
}
