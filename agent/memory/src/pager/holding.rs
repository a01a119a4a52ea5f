//! What a holder knows. Both holders apply the same notes to it.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use super::link::{MOST_PIECES, Note, Origin};
use super::{Kept, PagerError};
use crate::pending::Pending;
use crate::range::{PageRange, PageRanges};

/// One userfaultfd.
#[derive(Debug)]
pub(super) struct Task {
    pub(super) number: u32,
    /// Of the process whose pages are kept; a forked child's is that of its parent.
    pub(super) pid: i32,
    pub(super) userfaultfd: OwnedFd,
    pub(super) pending: Pending,
    /// Addresses that someone waits for: known to the first holder only.
    pub(super) faults: VecDeque<u64>,
    /// Of those, the addresses whose pages have to come first: likewise.
    pub(super) waiting: Vec<u64>,
    /// Where the background goes on: likewise.
    pub(super) cursor: u64,
    /// How many rows of pages in a row, from there backwards, have to come first: likewise.
    pub(super) absent: usize,
}

impl Task {
    /// Looks again at everything that had to come first.
    pub(super) fn look_again(&mut self) {
        self.absent = 0;
        self.faults.extend(self.waiting.drain(..));
    }

    /// Whether nothing is missing, and nobody waits.
    pub(super) fn has_all(&self) -> bool {
        self.pending.is_empty() && self.faults.is_empty() && self.waiting.is_empty()
    }

    /// Whether all pages that are missing have to come first. The row at the cursor may have been met twice.
    pub(super) fn only_waits(&self) -> bool {
        self.absent > self.pending.rows() + 1
    }
}

/// All of a restore.
#[derive(Debug)]
pub(super) struct Holding {
    pub(super) kept: HashMap<i32, Kept>,
    pub(super) listener: Option<UnixListener>,
    pub(super) criu: Option<UnixStream>,
    /// The process whose userfaultfd is next.
    pub(super) awaiting: Option<i32>,
    /// The restore is complete.
    pub(super) complete: bool,
    pub(super) tasks: Vec<Task>,
    /// The number of the last event.
    pub(super) sequence: u64,
    pub(super) next_task: u32,
    pub(super) pages: u64,
    pub(super) faults: u64,
}

impl Holding {
    pub(super) fn new(listener: Option<UnixListener>, kept: HashMap<i32, Kept>) -> Self {
        Self {
            kept,
            listener,
            criu: None,
            awaiting: None,
            complete: false,
            tasks: Vec::new(),
            sequence: 0,
            next_task: 0,
            pages: 0,
            faults: 0,
        }
    }

    pub(super) fn task(&mut self, number: u32) -> Option<&mut Task> {
        self.tasks.iter_mut().find(|task| task.number == number)
    }

    /// Pages that are not there yet.
    pub(super) fn pending_pages(&self) -> u64 {
        self.tasks.iter().map(|task| task.pending.pages()).sum()
    }

    /// Whether a task needs a kept page of this process, besides this one.
    pub(super) fn is_needed_beside(&self, pid: i32, number: u32) -> bool {
        self.tasks.iter().any(|task| task.pid == pid && task.number != number && !task.pending.is_empty())
    }

    /// All pages that are not there yet and are not kept either, of each process in the order of the addresses they are kept under.
    pub(super) fn missing(&self) -> Vec<(i32, PageRange)> {
        let mut missing = Vec::new();
        for (pid, process) in &self.kept {
            let tasks = self.tasks.iter().filter(|task| task.pid == *pid);
            let mut wanted: Vec<PageRange> = tasks
                .flat_map(|task| task.pending.pieces())
                .map(|(range, kept)| PageRange::new(kept, kept + range.length()))
                .collect();
            wanted.sort_unstable();
            let wanted: PageRanges = wanted.into_iter().collect();
            missing.extend(process.store.missing(&wanted).iter().map(|range| (*pid, range)));
        }
        missing
    }

    /// Makes a change; an event counts as dealt with from then on.
    pub(super) fn apply(&mut self, note: Note) -> Result<(), PagerError> {
        match note {
            Note::Listener(listener) => self.listener = Some(listener.into()),
            Note::Connected(criu) => self.criu = Some(criu.into()),
            Note::Awaiting(pid) => self.awaiting = Some(pid),
            Note::Complete => self.complete = true,
            Note::Task { task, pid, origin, sequence, userfaultfd } => {
                self.sequence = self.sequence.max(sequence);
                self.add(task, pid, origin, userfaultfd)?;
            }
            Note::Moved { task, sequence, from, to } => {
                self.sequence = sequence;
                self.change(task, |pending| pending.shift(from, to));
            }
            Note::GivenUp { task, sequence, range } => {
                self.sequence = sequence;
                self.change(task, |pending| pending.give_up(range));
            }
            Note::Unmapped { task, sequence, range } => {
                self.sequence = sequence;
                self.change(task, |pending| pending.unmap(range));
            }
            Note::Settled { task, range, pages, faults } => {
                self.pages += pages;
                self.faults = faults;
                self.change(task, |pending| pending.settle(range));
            }
            Note::Ended { task } => self.tasks.retain(|other| other.number != task),
            Note::Pieces { task, pieces } => {
                self.change(task, |pending| pieces.into_iter().for_each(|(range, kept)| pending.add(range, kept)));
            }
            Note::Served { pages, faults } => (self.pages, self.faults) = (pages, faults),
            Note::Done => {}
        }
        Ok(())
    }

    /// Notes from which another holder learns all of this. Those with descriptors have copies.
    pub(super) fn notes(&self) -> std::io::Result<Vec<Note>> {
        let mut notes = vec![Note::Served { pages: self.pages, faults: self.faults }];
        if let Some(listener) = &self.listener {
            notes.push(Note::Listener(listener.as_fd().try_clone_to_owned()?));
        }
        if let Some(criu) = &self.criu {
            notes.push(Note::Connected(criu.as_fd().try_clone_to_owned()?));
        }
        for task in &self.tasks {
            let userfaultfd = task.userfaultfd.try_clone()?;
            let (number, pid, sequence) = (task.number, task.pid, self.sequence);
            notes.push(Note::Task { task: number, pid, origin: Origin::Noted, sequence, userfaultfd });
            let pieces: Vec<_> = task.pending.pieces().collect();
            let parts = pieces.chunks(MOST_PIECES);
            notes.extend(parts.map(|pieces| Note::Pieces { task: number, pieces: pieces.to_vec() }));
        }
        notes.extend(self.awaiting.map(Note::Awaiting));
        notes.extend(self.complete.then_some(Note::Complete));
        Ok(notes)
    }

    fn change(&mut self, task: u32, how: impl FnOnce(&mut Pending)) {
        if let Some(task) = self.task(task) {
            how(&mut task.pending);
            // What somebody waits for may have been given up, or be expected elsewhere.
            task.faults.extend(task.waiting.drain(..));
        }
    }

    fn add(&mut self, number: u32, pid: i32, origin: Origin, userfaultfd: OwnedFd) -> Result<(), PagerError> {
        let kept = self.kept.get(&pid).ok_or(PagerError::Unannounced { pid })?;
        let pending = match origin {
            Origin::Restored => Pending::from(&kept.lazy),
            Origin::Forked(parent) => self.task(parent).map(|parent| parent.pending.clone()).unwrap_or_default(),
            Origin::Noted => Pending::default(),
        };
        self.next_task = self.next_task.max(number + 1);
        if origin == Origin::Restored {
            self.awaiting = None;
        }
        let (faults, waiting) = (VecDeque::new(), Vec::new());
        self.tasks.push(Task { number, pid, userfaultfd, pending, faults, waiting, cursor: 0, absent: 0 });
        Ok(())
    }
}
