//! The target's part: `agent/src/target`.

use podferry_common::FailureCode;
use podferry_coordinator::migration::Call;
use podferry_part::{May, Side, Standing, Step};

use crate::agent::Undoing;
use crate::coordinator::{JobId, micros};
use crate::node::{Act, At, Container, Entry, Inbox, Pager, Pagers, Part, Process, Restore};
use crate::source::journal;
use crate::world::{Event, MS, SECOND, Time, World};

/// How long the removal of a released container is waited for: `TIDY_TIMEOUT` of `agent/src/parts.rs`
const TIDY_TIMEOUT: Time = 10 * SECOND;
/// `RESTORE_TRIES` of `agent/src/target/resume.rs`
const TRIES: u8 = 3;

impl World {
    /// `Agent::begin_prepare`
    pub(crate) fn act_prepare(&mut self, at: At, job: JobId, stage: u8, since: Time) {
        let At { node, number, .. } = at;
        match stage {
            0 => {
                // `Parts::tidied`: an earlier migration's source of this workload is still being removed.
                let released = |entry: &Entry| {
                    matches!(entry, Entry::Alive(Part { side: Side::Source, standing: Standing::Released, .. }))
                };
                if self.nodes[node].entries.iter().any(released) && self.now < since + TIDY_TIMEOUT {
                    return self.poll(at, Act::Prepare { job, stage, since }, since);
                }
                if !self.reserve(at) {
                    return self.answer(at, job, Err(FailureCode::AlreadyExists));
                }
                self.next(at, Act::Prepare { job, stage: 1, since });
            }
            1 => {
                // `preflight::refuse`
                if self.nodes[node].container.is_some() {
                    self.nodes[node].entries[number] = Entry::None;
                    return self.answer(at, job, Err(FailureCode::FailedPrecondition));
                }
                self.nodes[node].journal[number] = Some(journal(Side::Target));
                self.next(at, Act::Prepare { job, stage: 2, since });
            }
            _ => {
                let planned = self.moves[number];
                let limits = self.deadlines.with_grace(std::time::Duration::from_micros(planned.grace));
                let patience = micros(limits.of_part(Call::Prepare, planned.path));
                let mut part = Part::new(Side::Target);
                part.deadline = self.now + patience;
                self.nodes[node].entries[number] = Entry::Alive(part);
                self.again(at, Act::Deadline, patience);
                self.answer(at, job, Ok(()));
            }
        }
    }

    /// `TargetPart::restore`, and `create` of `agent/src/target/cold.rs`
    pub(crate) fn act_restore(&mut self, at: At, job: JobId, stage: u8, since: Time) {
        let At { node, number, .. } = at;
        let planned = self.moves[number];
        let refused = Err(FailureCode::FailedPrecondition);
        let Some(part) = self.part(at).copied() else { return self.answer(at, job, refused) };
        if part.side == Side::Source || part.standing != Standing::Open || part.cancelled {
            return self.answer(at, job, Err(FailureCode::Aborted));
        }
        if stage == 0 {
            let patience = self.deadlines.with_grace(std::time::Duration::from_micros(planned.grace));
            if self.now > since + micros(patience.of_part(Call::Restore, planned.path)) {
                return self.answer(at, job, Err(FailureCode::DeadlineExceeded));
            }
            return match part.inbox {
                Inbox::Waiting => self.poll(at, Act::Restore { job, stage, since }, since),
                Inbox::Broken | Inbox::None => self.answer(at, job, Err(FailureCode::Unavailable)),
                // This migration is being restored, or has been.
                Inbox::Complete if self.nodes[node].restores[number].is_some() || part.created => {
                    self.answer(at, job, refused);
                }
                Inbox::Complete if self.chance(self.failures()) => self.answer(at, job, Err(FailureCode::Aborted)),
                Inbox::Complete => {
                    self.start_restore(at);
                    let takes = self.rng.u64(2 * MS..200 * MS);
                    self.again(at, Act::Restore { job, stage: 1, since }, takes);
                }
            };
        }
        let started = self.nodes[node].restores[number].is_some() || planned.is_cold();
        if !started || self.nodes[node].container.is_some() {
            return self.answer(at, job, refused);
        }
        self.hold_container(at);
        self.answer(at, job, Ok(()));
    }

    fn start_restore(&mut self, at: At) {
        let At { node, number, life } = at;
        let planned = self.moves[number];
        if !planned.is_cold() {
            self.nodes[node].restores[number] = Some(Restore { sealed: false, agent: life });
        }
        if planned.path.fill {
            self.nodes[node].pagers[number] = Some(Pagers { state: Pager::Waiting, alive: true });
        }
    }

    /// It is there, before its first instruction.
    fn hold_container(&mut self, at: At) {
        let At { node, number, .. } = at;
        let version = self.nodes[node].images[number].unwrap_or_default();
        self.nodes[node].container = Some(Container { held: true, ..Container::running(version, self.now) });
        if self.moves[number].is_cold()
            && let Some(part) = self.part(at)
        {
            part.created = true;
        }
        self.say(|| format!("node {node} holds {number}, of run {version}"));
    }

    /// Whether what is held may go on being held: its restore lives, or cold: what was created waits.
    fn is_held_well(&self, at: At) -> bool {
        let node = &self.nodes[at.node];
        let restored = self.moves[at.number].is_cold() || node.restores[at.number].is_some();
        node.holds() && restored
    }

    fn pagers_are_well(&self, at: At) -> bool {
        self.nodes[at.node].pagers[at.number].is_none_or(Pagers::is_well)
    }

    /// `TargetPart::seal`
    pub(crate) fn seal_target(&mut self, at: At, job: JobId, stage: u8, since: Time) {
        let At { node, number, .. } = at;
        let refused = Err(FailureCode::FailedPrecondition);
        match stage {
            0 => match self.lock(at, Step::Seal) {
                None => self.poll(at, Act::Seal { job, stage, since }, since),
                Some(May::Taken) => self.answer(at, job, Ok(())),
                Some(May::Refuse) => self.answer(at, job, refused),
                Some(May::Take) => self.next(at, Act::Seal { job, stage: 1, since }),
            },
            1 => {
                if !self.is_held_well(at) || !self.pagers_are_well(at) {
                    self.unlock(at);
                    return self.answer(at, job, refused);
                }
                if let Some(restore) = &mut self.nodes[node].restores[number] {
                    restore.sealed = true;
                }
                self.next(at, Act::Seal { job, stage: 2, since });
            }
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

    /// `TargetPart::resume`: `let_go` and `go_once`, or cold `start_created`
    pub(crate) fn act_resume(&mut self, at: At, job: JobId, stage: u8, since: Time, tries: u8) {
        let node = at.node;
        let asked = Some(job).filter(|job| *job != JobId::MAX);
        let act = |stage, tries| Act::Resume { job, stage, since, tries };
        let refused = Err(FailureCode::FailedPrecondition);
        match stage {
            0 => match self.lock(at, Step::Resume) {
                None if self.part(at).is_none() => self.answer_if_asked(at, asked, refused),
                None => self.poll(at, act(0, tries), since),
                Some(May::Taken) => self.answer_if_asked(at, asked, Ok(())),
                Some(May::Refuse) => self.answer_if_asked(at, asked, refused),
                Some(May::Take) => self.next(at, act(1, tries)),
            },
            1 => self.look_at_held(at, asked, act(2, tries), act(4, tries), act(3, tries + 1), tries),
            2 => {
                if self.is_held_well(at) {
                    self.let_go(at);
                    return self.next(at, act(4, tries));
                }
                // It has died just now.
                self.next(at, act(1, tries));
            }
            3 => {
                // `restore_again`
                if self.nodes[node].container.is_none() {
                    self.hold_container(at);
                }
                self.next(at, act(1, tries));
            }
            4 => {
                self.note_standing(at, Standing::Resumed);
                self.next(at, act(5, tries));
            }
            _ => {
                self.unlock(at);
                self.fill_behind(at);
                self.answer_if_asked(at, asked, Ok(()));
            }
        }
    }

    /// What there is of a committed copy, and so what is next: let it go, take it for running, or restore it again.
    fn look_at_held(&mut self, at: At, asked: Option<JobId>, go: Act, done: Act, again: Act, tries: u8) {
        let At { node, number, .. } = at;
        let going = self.nodes[node].journal[number].is_some_and(|journal| journal.going);
        if self.is_held_well(at) && self.pagers_are_well(at) {
            self.note_going(at, true);
            return self.next(at, go);
        }
        if going && self.nodes[node].is_alive() && !self.nodes[node].holds() {
            // An agent that was killed has let it go, or its pagers have died since: whoever fills it sees that.
            return self.next(at, done);
        }
        // It died, or would read zeros: it is given up, and restored from its images.
        if self.nodes[node].holds() {
            self.nodes[node].container = None;
        }
        self.nodes[node].restores[number] = None;
        let state = self.nodes[node].pagers[number].map(|pagers| pagers.state);
        if matches!(state, Some(Pager::Done | Pager::Lost)) && going {
            // `has_given_pages_up`
            self.nodes[node].pagers[number] = Some(Pagers { state: Pager::Lost, alive: false });
            self.nodes[node].container = None;
            return self.next(at, done);
        }
        if tries >= TRIES {
            self.unlock(at);
            return self.answer_if_asked(at, asked, Err(FailureCode::Internal));
        }
        self.say(|| format!("node {node} restores {number} again"));
        self.note_going(at, false);
        self.start_restore(at);
        let takes = self.rng.u64(2 * MS..200 * MS);
        self.again(at, again, takes);
    }

    fn note_going(&mut self, at: At, going: bool) {
        if let Some(journal) = &mut self.nodes[at.node].journal[at.number] {
            journal.going = going;
        }
    }

    /// The hook is told `go`, or runc starts what it has created.
    fn let_go(&mut self, at: At) {
        let At { node, number, .. } = at;
        if let Some(container) = &mut self.nodes[node].container {
            container.held = false;
        }
        self.nodes[node].restores[number] = None;
        if let Some(pagers) = &mut self.nodes[node].pagers[number] {
            pagers.state = Pager::Filling(self.rng.u8(1..6));
            self.schedule(MS, Event::Process { node, number, what: Process::Fill });
        }
        self.say(|| format!("node {node} lets {number} go"));
    }

    /// `recovery::fill_behind`
    fn fill_behind(&mut self, at: At) {
        let At { node, number, .. } = at;
        if self.nodes[node].pagers[number].is_some_and(Pagers::is_under_way) {
            self.nodes[node].entries[number] = Entry::Filling;
            return self.next(at, Act::Watch);
        }
        self.nodes[node].images[number] = None;
        self.end_part(at, Standing::Resumed);
    }

    /// `fill::watch`, with `pager::client::wait_filled`
    pub(crate) fn act_watch(&mut self, at: At) {
        let At { node, number, .. } = at;
        let Some(pagers) = self.nodes[node].pagers[number] else { return };
        if pagers.is_under_way() {
            if pagers.alive {
                return self.again(at, Act::Watch, 300 * MS);
            }
            self.lose_memory(node, number);
        }
        self.nodes[node].images[number] = None;
        self.end_part(at, Standing::Resumed);
    }

    /// A copy whose memory is lost is ended, and that is said.
    pub(crate) fn lose_memory(&mut self, node: usize, number: usize) {
        self.say(|| format!("node {node} has lost memory of {number}, and ends it"));
        self.nodes[node].container = None;
        self.nodes[node].pagers[number] = Some(Pagers { state: Pager::Lost, alive: false });
    }

    /// `AgentService::fill`
    pub(crate) fn act_fill(&mut self, at: At, job: JobId, since: Time) {
        let At { node, number, .. } = at;
        match self.nodes[node].pagers[number].map(|pagers| pagers.state) {
            None | Some(Pager::Done) => self.answer(at, job, Ok(())),
            Some(Pager::Lost) => self.answer(at, job, Err(FailureCode::DataLoss)),
            Some(Pager::Stopped) => self.answer(at, job, Err(FailureCode::Internal)),
            Some(Pager::Waiting | Pager::Filling(_)) => {
                // Its caller has gone by then.
                if self.now < since + micros(self.deadlines.fill) {
                    self.poll(at, Act::Fill { job, since }, since);
                }
            }
        }
    }

    /// `TargetPart::abort`, behind its lock.
    pub(crate) fn abort_target(&mut self, at: At, stage: u8) -> Undoing {
        let At { node, number, .. } = at;
        match stage {
            0 => {
                if let Some(part) = self.part(at)
                    && part.inbox != Inbox::None
                {
                    part.inbox = Inbox::Broken;
                }
                Undoing::Next
            }
            1 => {
                // `hook.abort` and `clean_restore`: what has another origin is not ours to kill.
                let ours = self.nodes[node].restores[number].take().is_some() || self.moves[number].is_cold();
                if ours && self.nodes[node].holds() {
                    self.nodes[node].container = None;
                }
                if let Some(pagers) = &mut self.nodes[node].pagers[number] {
                    *pagers = Pagers { state: Pager::Stopped, alive: false };
                }
                if self.nodes[node].is_alive() {
                    return Undoing::Failed;
                }
                self.nodes[node].images[number] = None;
                Undoing::Next
            }
            _ => Undoing::Done,
        }
    }
}
