//! The processes beside the agent, which outlive it: the dump worker with its CRIU, the hook with its restore, the pagers.

use podferry_part::{Dump, Next, Order};

use crate::faults::Broken;
use crate::node::{Entry, Pager, Part, Process, Stage};
use crate::world::{Event, MS, Number, SECOND, World};

impl World {
    pub(crate) fn process(&mut self, node: usize, number: Number, what: Process) {
        match what {
            Process::Stop => self.stop_tasks(node, number),
            Process::Dump => self.dump_tasks(node, number),
            Process::Order(order) => self.take_order(node, number, order),
            Process::Sealed => self.seal_worker(node, number),
            Process::Look => self.look_around(node, number),
            Process::LetGo => self.let_tasks_go(node),
            Process::Ends(born) => {
                let container = self.nodes[node].container;
                if container.is_some_and(|container| container.born == born && container.runs()) {
                    self.say(|| format!("the workload on node {node} heeds its signal"));
                    self.end_container(node);
                }
            }
            Process::HookLooks => self.hook_looks(node, number),
            Process::Fill => self.fill_pages(node, number),
            Process::KillWorker => self.kill_worker(node, number),
            Process::KillCriu => self.kill_criu(node, number),
            Process::KillRestore => self.kill_restore(node, number),
            Process::KillPagers => self.kill_pagers(node, number),
        }
    }

    /// `Dump::on_frozen` of `agent/src/worker/run.rs`
    fn stop_tasks(&mut self, node: usize, number: Number) {
        let Some(worker) = &mut self.nodes[node].workers[number] else { return };
        if worker.stage != Stage::Freezing || !worker.criu {
            return;
        }
        // `unless_aborted`
        if !worker.connected {
            return self.give_up(node, number);
        }
        worker.stage = Stage::Frozen;
        if let Some(container) = &mut self.nodes[node].container {
            container.traced = true;
        }
    }

    fn dump_tasks(&mut self, node: usize, number: Number) {
        let version = self.nodes[node].container.map_or(0, |container| container.version);
        let Some(worker) = &mut self.nodes[node].workers[number] else { return };
        if worker.stage == Stage::Frozen && worker.criu {
            (worker.stage, worker.version) = (Stage::Dumped, version);
            self.look_around(node, number);
        }
    }

    /// `Dump::hold`, with an order.
    fn take_order(&mut self, node: usize, number: Number, order: Order) {
        let late = self.now;
        let Some(worker) = &mut self.nodes[node].workers[number] else { return };
        match (worker.stage, order) {
            // It does one thing after the other.
            (Stage::Sealing, _) => {
                return self.schedule(MS, Event::Process { node, number, what: Process::Order(order) });
            }
            // `unless_aborted`: any other order came too early, or too late.
            (Stage::Freezing | Stage::Frozen, Order::Abort) => return self.give_up(node, number),
            (Stage::Freezing | Stage::Frozen | Stage::Released | Stage::Undone, _) => return,
            (Stage::Dumped | Stage::Sealed | Stage::NotSealed, _) => {}
        }
        let sealed = worker.stage == Stage::Sealed;
        let dump = Dump { sealed, criu_lives: worker.criu, late: late > worker.deadline, abandoned: !worker.connected };
        match dump.next(Some(order)) {
            Next::Seal if sealed => {}
            Next::Seal => {
                worker.stage = Stage::Sealing;
                if let Some(container) = &mut self.nodes[node].container {
                    container.fenced = true;
                }
                let after = self.rng.u64(20..2 * MS);
                self.schedule(after, Event::Process { node, number, what: Process::Sealed });
            }
            Next::Release => {
                worker.stage = Stage::Released;
                self.say(|| format!("the tasks on node {node} die"));
                self.end_container(node);
            }
            Next::GiveUp(_) => self.give_up(node, number),
            Next::Ignore | Next::Wait => {}
        }
    }

    /// `Dump::seal`, behind the fence.
    fn seal_worker(&mut self, node: usize, number: Number) {
        let careless = self.is_broken(Broken::SealsWhatRanOn);
        let Some(worker) = &mut self.nodes[node].workers[number] else { return };
        if worker.stage != Stage::Sealing {
            return;
        }
        if worker.criu || careless {
            worker.stage = Stage::Sealed;
            self.nodes[node].notes[number].sealed = true;
            return;
        }
        worker.stage = Stage::NotSealed;
        if let Some(container) = &mut self.nodes[node].container {
            container.fenced = false;
        }
        let after = self.rng.u64(..25 * MS);
        self.schedule(after, Event::Process { node, number, what: Process::Look });
    }

    /// `Dump::hold`, without an order; before the dump is complete `unless_aborted`.
    fn look_around(&mut self, node: usize, number: Number) {
        let (now, forsakes) = (self.now, self.is_broken(Broken::WorkerForsakesItsSeal));
        let Some(worker) = self.nodes[node].workers[number] else { return };
        let sealed = matches!(worker.stage, Stage::Sealing | Stage::Sealed) && !forsakes;
        if matches!(worker.stage, Stage::Released | Stage::Undone) {
            return;
        }
        let (late, abandoned) = (now > worker.deadline, !worker.connected);
        let dump = Dump { sealed, criu_lives: worker.criu, late, abandoned };
        if let Next::GiveUp(_) = dump.next(None) {
            self.give_up(node, number);
        }
    }

    /// `Dump::give_up` and `undone`: the tasks run on.
    fn give_up(&mut self, node: usize, number: Number) {
        if let Some(worker) = &mut self.nodes[node].workers[number] {
            worker.stage = Stage::Undone;
            self.say(|| format!("the dump worker on node {node} gives up: the tasks run on"));
        }
        if let Some(container) = &mut self.nodes[node].container {
            (container.traced, container.fenced) = (false, false);
        }
    }

    fn let_tasks_go(&mut self, node: usize) {
        if let Some(container) = &mut self.nodes[node].container {
            container.traced = false;
        }
    }

    /// CRIU takes a lost asker for a no: it resumes the tasks. What is fenced stays so.
    fn kill_worker(&mut self, node: usize, number: Number) {
        let Some(worker) = self.nodes[node].workers[number] else { return };
        if matches!(worker.stage, Stage::Released | Stage::Undone) {
            return;
        }
        self.say(|| format!("FAULT: the dump worker on node {node} is killed"));
        self.nodes[node].workers[number] = None;
        if worker.criu {
            let after = self.rng.u64(..5 * MS);
            self.schedule(after, Event::Process { node, number, what: Process::LetGo });
        }
    }

    /// The kernel lets the tasks of a dead CRIU go at once.
    fn kill_criu(&mut self, node: usize, number: Number) {
        let Some(worker) = &mut self.nodes[node].workers[number] else { return };
        if !worker.criu || matches!(worker.stage, Stage::Released | Stage::Undone) {
            return;
        }
        worker.criu = false;
        self.say(|| format!("FAULT: the CRIU that dumps on node {node} is killed"));
        self.let_tasks_go(node);
        let after = self.rng.u64(..25 * MS);
        self.schedule(after, Event::Process { node, number, what: Process::Look });
    }

    /// `podferry-hook`: before its seal the end of the connection means abort.
    fn hook_looks(&mut self, node: usize, number: Number) {
        let Some(restore) = self.nodes[node].restores[number] else { return };
        if restore.sealed || restore.agent == self.nodes[node].life {
            return;
        }
        self.nodes[node].restores[number] = None;
        if self.nodes[node].holds() {
            self.nodes[node].container = None;
        }
        self.say(|| format!("the hook on node {node} has no agent any more: the restore is undone"));
    }

    fn kill_restore(&mut self, node: usize, number: Number) {
        let cold = self.moves.get(number).is_some_and(crate::world::Move::is_cold);
        let is_ours =
            matches!(self.nodes[node].entries[number], Entry::Alive(Part { side: podferry_part::Side::Target, .. }));
        let restored = self.nodes[node].restores[number].take().is_some();
        if restored || (cold && is_ours && self.nodes[node].holds()) {
            self.say(|| format!("FAULT: what is restored on node {node} is killed"));
            if self.nodes[node].holds() {
                self.nodes[node].container = None;
            }
        }
    }

    fn kill_pagers(&mut self, node: usize, number: Number) {
        if let Some(pagers) = &mut self.nodes[node].pagers[number]
            && pagers.alive
            && pagers.is_under_way()
        {
            pagers.alive = false;
            self.say(|| format!("FAULT: both pagers on node {node} are killed"));
        }
    }

    /// The pagers lay in what is missing. In post-copy they need their own agent, the source's, and the link; and for what is gone
    /// there the container ends. `Fetch::part` of `agent/src/service/fetch.rs` answers.
    fn fill_pages(&mut self, node: usize, number: Number) {
        let Some(pagers) = self.nodes[node].pagers[number] else { return };
        let Pager::Filling(left) = pagers.state else { return };
        if !pagers.alive {
            return;
        }
        let planned = self.moves[number];
        if planned.path.post_copy {
            let source = planned.source;
            let reached = self.nodes[node].up && self.nodes[source].up && self.reaches(node, source);
            let still = self.nodes[source].container.is_some_and(|container| container.alive && !container.runs());
            match self.nodes[source].entries[number] {
                Entry::Ended(_) if reached => return self.lose_memory(node, number),
                Entry::Alive(_) if reached && still => {}
                Entry::Alive(_) if reached && !still => return self.lose_memory(node, number),
                _ => return self.schedule(2 * SECOND, Event::Process { node, number, what: Process::Fill }),
            }
        }
        let state = if left == 0 { Pager::Done } else { Pager::Filling(left - 1) };
        let alive = state != Pager::Done;
        self.nodes[node].pagers[number] = Some(crate::node::Pagers { state, alive });
        if alive {
            let after = self.rng.u64(MS..3 * SECOND);
            self.schedule(after, Event::Process { node, number, what: Process::Fill });
        } else {
            self.say(|| format!("node {node} has all memory of {number}"));
        }
    }
}
