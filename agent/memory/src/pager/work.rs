//! What the first holder does.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::process::Child;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::criu::{self, Heard, RESTORE_FINISHED};
use super::fetching::{Arrived, Fetching, WINDOW};
use super::holding::{Holding, Task};
use super::lay::{Outcome, outcome_of, up_to_border, wake_all};
use super::link::{Link, Note, Origin};
use super::{Ended, Paged, PagerError, Progress, Stop, Surroundings, conversation};
use crate::PAGE_SIZE;
use crate::fetch::LONGEST;
use crate::range::PageRange;
use crate::sys::slot::Slot;
use crate::sys::userfaultfd::{self, Event, Told};

/// Bytes that are laid in with one call in the background: a fault waits for one of them at most.
const PIECE: u64 = 512 * 1024;
/// Bytes that are laid in for a fault: neighbours are likely to be wanted next.
const AROUND_FAULT: u64 = 64 * 1024;
/// From the completion of the restore until pages are laid in that nobody waits for: the first steps of the restored processes
/// are worth more than this time.
const GRACE: Duration = Duration::from_millis(30);
/// From a fault until pages are laid in again that nobody waits for: a process that has just been given one soon wants the next, and
/// waits half a millisecond for it behind a piece, and less than a tenth without.
const LULL: Duration = Duration::from_micros(200);
/// So long at most nothing is laid in, or asked for, in the background because of faults: those of new pages do not come to an end.
const LONGEST_LULL: Duration = Duration::from_millis(20);
/// From a fault until as much is asked for ahead again as there is room for on the way.
const FEW_FAULTS: Duration = Duration::from_millis(2);
/// How long to wait for events when there is nothing to lay in.
const IDLE: Duration = Duration::from_millis(50);
/// How long to leave a process alone that is changing its mappings.
const CHANGING: Duration = Duration::from_micros(50);
/// Where no process has memory (`vm.mmap_min_addr`): the kernel looks whether mappings are changing, and then refuses.
const NOWHERE: PageRange = PageRange::new(PAGE_SIZE, 2 * PAGE_SIZE);
/// Events that are read of one process before it is another's turn.
const MOST_EVENTS: usize = 64;
/// Between two second holders, if the last did not live longer.
const NEW_SECOND: Duration = Duration::from_millis(100);
/// Between two words about what is left.
const TELL: Duration = Duration::from_millis(200);

type Result<T, E = PagerError> = std::result::Result<T, E>;

/// The first holder at work.
pub(super) struct Work<'a> {
    holding: Holding,
    slot: Slot,
    stop: Stop<'a>,
    second: Option<Second>,
    second_tried: Option<Instant>,
    /// It shall be alone.
    alone: bool,
    /// Since when the restore is known to be complete.
    complete_since: Option<Instant>,
    /// The last time that a process waited for a page.
    fault: Option<Instant>,
    /// The last time that something was laid in in the background.
    piece: Option<Instant>,
    /// Whose turn it is in the background.
    turn: usize,
    /// Of pages that are not kept here; none when all are.
    fetching: Option<Fetching>,
    told: Option<(Progress, Instant)>,
    /// When it was looked last who needs nothing any more.
    looked: Option<Instant>,
}

/// The second holder, as the first sees it.
struct Second {
    link: Link,
    process: Child,
}

impl Drop for Second {
    fn drop(&mut self) {
        // All is done, or it is of no use any more.
        let _gone = self.process.kill();
        let _reaped = self.process.wait();
    }
}

/// What something came from.
#[derive(Default)]
struct Ready {
    tasks: Vec<u32>,
    others: Vec<Other>,
}

/// Somebody beside the processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Other {
    Restore,
    /// Who wants it to stop.
    Stop,
    /// The second holder, which says something only by its end.
    Second,
    Fetcher,
}

impl<'a> Work<'a> {
    pub(super) fn new(holding: Holding, slot: Slot, stop: Stop<'a>) -> Self {
        Self {
            holding,
            slot,
            stop,
            second: None,
            second_tried: None,
            alone: false,
            complete_since: None,
            fault: None,
            piece: None,
            turn: 0,
            fetching: None,
            told: None,
            looked: None,
        }
    }

    /// Goes on where a holder was killed.
    pub(super) fn take_over(&mut self) -> Result<()> {
        if self.slot.is_accepting() && self.holding.criu.is_none() {
            return Err(PagerError::Lost { what: "the connection of the restore" });
        }
        if let Some((task, sequence, told)) = self.slot.left()
            && sequence > self.holding.sequence
        {
            self.catch_up(task, sequence, told)?;
        }
        self.slot.close();
        self.slot.set_accepting(false);
        for task in &self.holding.tasks {
            if let Err(error) = wake_all(task.userfaultfd.as_fd()) {
                // Nobody is left to wait where the process has ended.
                tracing::debug!(%error, pid = task.pid, "cannot wake");
            }
        }
        Ok(())
    }

    /// Makes the change that was read and not noted.
    fn catch_up(&mut self, task: u32, sequence: u64, told: Told) -> Result<()> {
        self.holding.sequence = sequence;
        match told {
            Told::Fork { .. } => Err(PagerError::Lost { what: "the memory of a child process" }),
            Told::Moved { from, to } => self.holding.apply(Note::Moved { task, sequence, from, to }),
            Told::GivenUp { range } => self.holding.apply(Note::GivenUp { task, sequence, range }),
            Told::Unmapped { range } => self.holding.apply(Note::Unmapped { task, sequence, range }),
            Told::Fault { .. } | Told::Unknown { .. } => Ok(()),
        }
    }

    pub(super) fn run(mut self, surroundings: &mut dyn Surroundings) -> Ended {
        let outcome = self.work(surroundings);
        self.end(outcome, surroundings)
    }

    /// Ends the processes if they do not have all their pages, and only then closes anything.
    pub(super) fn end(self, outcome: Result<()>, surroundings: &mut dyn Surroundings) -> Ended {
        let fill = self.complete_since.map(|since| since.elapsed()).unwrap_or_default();
        let outcome = outcome.map(|()| Paged { pages: self.holding.pages, faults: self.holding.faults, fill });
        let lost = matches!(outcome, Err(PagerError::Lost { .. }));
        if outcome.is_err() && (lost || !self.holding.tasks.is_empty()) {
            surroundings.end_processes();
        }
        // Without a connection nobody knows how far the restore came.
        let ended = Ended { outcome, complete: self.holding.complete || lost && self.holding.criu.is_none() };
        surroundings.ended(&ended);
        if let Some(second) = &self.second
            && let Err(error) = second.link.send(&Note::Done)
        {
            tracing::debug!(%error, "the second holder is gone");
        }
        ended
    }

    fn work(&mut self, surroundings: &mut dyn Surroundings) -> Result<()> {
        loop {
            self.keep_second(surroundings);
            self.keep_fetcher(surroundings);
            self.tell(surroundings);
            let has_all = self.has_all();
            let heard = self.serve_events(if has_all { Duration::ZERO } else { self.patience() })?;
            if has_all && !heard && self.has_all() {
                return Ok(());
            }
            if self.holding.complete && self.complete_since.is_none() {
                self.complete_since = Some(Instant::now());
            }
            if self.is_filling() && self.lull().is_zero() {
                self.let_go_of_the_rest()?;
                self.ask_ahead();
                self.fill_one_piece()?;
                self.piece = Some(Instant::now());
            }
        }
    }

    fn has_all(&self) -> bool {
        self.holding.complete && self.holding.tasks.iter().all(Task::has_all)
    }

    fn is_filling(&self) -> bool {
        self.complete_since.is_some_and(|since| since.elapsed() >= GRACE)
    }

    /// How long to wait for events.
    fn patience(&self) -> Duration {
        let asked = self.holding.tasks.iter().any(|task| !task.faults.is_empty());
        match self.complete_since {
            _ if asked => Duration::ZERO,
            Some(_) if self.is_filling() && self.only_waits() => IDLE,
            Some(since) => GRACE.saturating_sub(since.elapsed()).max(self.lull()),
            None => IDLE,
        }
    }

    /// Whether there is nothing to lay in but what has to come first.
    fn only_waits(&self) -> bool {
        self.holding.tasks.iter().all(|task| task.pending.is_empty() || task.only_waits())
    }

    /// How long still nothing is to be laid in, or asked for, in the background. What somebody waits for goes through two agents and a
    /// link: whatever these have to do beside that, it waits for.
    fn lull(&self) -> Duration {
        let since = self.piece.or(self.complete_since);
        let most = since.map_or(LONGEST_LULL, |since| LONGEST_LULL.saturating_sub(since.elapsed()));
        if self.fetching.as_ref().is_some_and(Fetching::is_awaited) {
            return most;
        }
        self.fault.map_or(Duration::ZERO, |fault| LULL.saturating_sub(fault.elapsed())).min(most)
    }

    /// Makes a change: the second holder learns it first.
    fn note(&mut self, note: Note) -> Result<()> {
        if let Some(second) = &self.second
            && let Err(error) = second.link.send(&note)
        {
            self.lose_second(&error);
        }
        self.holding.apply(note)
    }

    fn keep_fetcher(&mut self, surroundings: &mut dyn Surroundings) {
        if self.fetching.as_ref().is_some_and(|fetching| !fetching.wants_fetcher()) {
            return;
        }
        let Some(called) = surroundings.fetcher() else { return };
        self.fetching.get_or_insert_default().called(called);
        // What was asked for before did not come.
        self.holding.tasks.iter_mut().for_each(Task::look_again);
    }

    /// Lets go of processes that have all their pages, and of those that have ended: where pages are long in coming, many children may
    /// come and go. To one that has all, the kernel gives zeros for what it never had, as anybody would. But as long as the kernel says
    /// that its mappings are changing, it may be about to tell of a child that lacks more.
    fn let_go_of_the_rest(&mut self) -> Result<()> {
        if self.fetching.is_none() || self.looked.is_some_and(|looked| looked.elapsed() < TELL) {
            return Ok(());
        }
        self.looked = Some(Instant::now());
        let is_done = |task: &&Task| match outcome_of(&userfaultfd::zero(task.userfaultfd.as_fd(), NOWHERE)) {
            Outcome::Ended => task.has_all() || task.only_waits(),
            Outcome::Changing => false,
            _ => task.has_all(),
        };
        let done: Vec<u32> = self.holding.tasks.iter().filter(is_done).map(|task| task.number).collect();
        done.into_iter().try_for_each(|task| self.note(Note::Ended { task }))
    }

    /// Asks for what nobody waits for.
    fn ask_ahead(&mut self) {
        let Some(fetching) = &mut self.fetching else { return };
        let only_waits = |task: &Task| task.pending.is_empty() || task.only_waits();
        // What was not expected anywhere when that was found out, because a mapping was on its way, may be now.
        if fetching.is_idle() && self.holding.tasks.iter().all(only_waits) {
            fetching.forget_ahead();
        }
        if !fetching.knows_ahead() {
            fetching.know_ahead(self.holding.missing().into_iter());
        }
        let many_faults = self.fault.is_some_and(|fault| fault.elapsed() < FEW_FAULTS);
        fetching.ask_ahead(if many_faults { LONGEST } else { WINDOW });
    }

    /// Takes what was fetched.
    fn take_arrived(&mut self) -> Result<()> {
        let Some(fetching) = &mut self.fetching else { return Ok(()) };
        if fetching.is_awaited() {
            // Whoever gets its page soon wants the next.
            self.fault = Some(Instant::now());
        }
        for arrived in fetching.receive() {
            let (pid, range, contents) = match arrived {
                Arrived::Pages(pid, range, contents) => (pid, range, Some(contents)),
                Arrived::Zeros(pid, range) => (pid, range, None),
                Arrived::Lost => return Err(PagerError::NotFetched),
            };
            let Some(process) = self.holding.kept.get_mut(&pid) else { continue };
            match contents {
                Some(contents) => process.store.put(range, &contents)?,
                None => process.store.put_zero(range)?,
            }
            self.holding.tasks.iter_mut().filter(|task| task.pid == pid).for_each(Task::look_again);
        }
        Ok(())
    }

    fn lose_second(&mut self, error: &io::Error) {
        tracing::warn!(%error, "the second holder is gone");
        self.second = None;
    }

    fn keep_second(&mut self, surroundings: &mut dyn Surroundings) {
        let lately = self.second_tried.is_some_and(|tried| tried.elapsed() < NEW_SECOND);
        if self.alone || self.second.is_some() || lately {
            return;
        }
        self.second_tried = Some(Instant::now());
        match self.start_second(surroundings) {
            Ok(second) => {
                self.alone = second.is_none();
                self.second = second;
            }
            Err(error) => {
                tracing::error!(%error, "there is no second holder: what is missing is lost if this one dies");
            }
        }
    }

    fn start_second(&mut self, surroundings: &mut dyn Surroundings) -> io::Result<Option<Second>> {
        let (link, theirs) = Link::pair()?;
        let Some(process) = surroundings.start_second(theirs)? else { return Ok(None) };
        let second = Second { link, process };
        for note in self.holding.notes()? {
            second.link.send(&note)?;
        }
        Ok(Some(second))
    }

    fn tell(&mut self, surroundings: &mut dyn Surroundings) {
        let same = |one: &Progress, two: &Progress| std::mem::discriminant(one) == std::mem::discriminant(two);
        let mut progress = match (&self.holding.criu, self.holding.complete) {
            (_, true) => Progress::Filling { left_pages: 0 },
            (Some(_), false) => Progress::Serving,
            (None, false) => Progress::Waiting,
        };
        let told = self.told.as_ref().filter(|(last, _)| same(last, &progress));
        if told.is_some_and(|(last, when)| !matches!(last, Progress::Filling { .. }) || when.elapsed() < TELL) {
            return;
        }
        if let Progress::Filling { left_pages } = &mut progress {
            *left_pages = self.holding.pending_pages();
        }
        surroundings.progress(progress);
        self.told = Some((progress, Instant::now()));
    }

    /// Waits for events and serves them. Says whether there were any.
    fn serve_events(&mut self, patience: Duration) -> Result<bool> {
        let ready = self.wait(patience).map_err(conversation("wait for events"))?;
        for other in &ready.others {
            match other {
                Other::Stop => return Err(PagerError::Stopped),
                Other::Second => self.lose_second(&io::ErrorKind::BrokenPipe.into()),
                Other::Restore => self.hear()?,
                Other::Fetcher => self.take_arrived()?,
            }
        }
        for task in &ready.tasks {
            self.read_events(*task)?;
        }
        self.answer_faults()?;
        let heard = |other: &Other| matches!(other, Other::Restore | Other::Fetcher);
        Ok(ready.others.iter().any(heard) || !ready.tasks.is_empty())
    }

    fn wait(&self, patience: Duration) -> io::Result<Ready> {
        let holding = &self.holding;
        let restore = match (&holding.criu, &holding.listener) {
            _ if holding.complete => None,
            (Some(criu), _) => Some(criu.as_fd()),
            (None, listener) => listener.as_ref().map(|listener| listener.as_fd()),
        };
        let stop = self.stop.filter(|_| !holding.complete);
        let second = self.second.as_ref().map(|second| second.link.as_fd());
        let fetcher = self.fetching.as_ref().and_then(Fetching::as_fd);
        // Whoever wants it to stop is heard first.
        let others =
            [(Other::Stop, stop), (Other::Second, second), (Other::Restore, restore), (Other::Fetcher, fetcher)];
        let others: Vec<(Other, BorrowedFd<'_>)> =
            others.into_iter().filter_map(|(other, descriptor)| Some((other, descriptor?))).collect();
        let polled = |descriptor| PollFd::from_borrowed_fd(descriptor, PollFlags::IN);
        let mut all: Vec<PollFd<'_>> = others.iter().map(|(_, descriptor)| polled(*descriptor)).collect();
        all.extend(holding.tasks.iter().map(|task| polled(task.userfaultfd.as_fd())));
        let patience = Timespec { tv_sec: 0, tv_nsec: i64::from(patience.subsec_nanos()) };
        match poll(&mut all, Some(&patience)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let mut ready = all.iter().map(|polled| !polled.revents().is_empty());
        let others = others.iter().zip(&mut ready).filter(|(_, ready)| *ready).map(|((other, _), _)| *other).collect();
        let tasks = holding.tasks.iter().zip(ready).filter(|(_, ready)| *ready).map(|(task, _)| task.number).collect();
        Ok(Ready { tasks, others })
    }

    /// Takes CRIU's connection, or one thing that it says.
    fn hear(&mut self) -> Result<()> {
        let Some(criu) = self.holding.criu.as_ref() else { return self.accept() };
        let peer = criu.try_clone().map_err(conversation("keep its connection"))?;
        let failed = conversation("read from it");
        match criu::peek(&peer).map_err(&failed)? {
            Heard::End => return Err(PagerError::RestoreFailed),
            Heard::Word(RESTORE_FINISHED) => {
                self.note(Note::Complete)?;
                criu::take_word(&peer)
            }
            Heard::Word(pid) => {
                if pid > 0 {
                    self.note(Note::Awaiting(pid))?;
                }
                criu::take_word(&peer)
            }
            Heard::Descriptor(userfaultfd) => {
                // Without a name it was noted already, by a holder that did not come to take it.
                if let Some(pid) = self.holding.awaiting {
                    let nonblocking = rustix::io::ioctl_fionbio(&userfaultfd, true);
                    nonblocking.map_err(|error| conversation("set up a userfaultfd")(error.into()))?;
                    self.add(pid, Origin::Restored, userfaultfd, 0)?;
                }
                criu::take_descriptor(&peer)
            }
        }
        .map_err(failed)
    }

    fn accept(&mut self) -> Result<()> {
        let Some(listener) = &self.holding.listener else { return Ok(()) };
        self.slot.set_accepting(true);
        let (criu, _) = listener.accept().map_err(conversation("accept its connection"))?;
        self.note(Note::Connected(criu.into()))?;
        self.slot.set_accepting(false);
        Ok(())
    }

    fn add(&mut self, pid: i32, origin: Origin, userfaultfd: std::os::fd::OwnedFd, sequence: u64) -> Result<()> {
        let task = self.holding.next_task;
        self.note(Note::Task { task, pid, origin, sequence, userfaultfd })
    }

    /// Reads the events that a task has now, but not without end; faults are answered later.
    fn read_events(&mut self, number: u32) -> Result<()> {
        for _ in 0..MOST_EVENTS {
            let sequence = self.holding.sequence + 1;
            let Some(task) = self.holding.task(number) else { return Ok(()) };
            let pid = task.pid;
            let event = self.slot.read(task.userfaultfd.as_fd(), number, sequence);
            let event = event.map_err(conversation("read an event"))?;
            let none = event.is_none();
            match event {
                None => {}
                Some(Event::Fault { address }) => {
                    task.faults.push_back(address & !(PAGE_SIZE - 1));
                    self.holding.faults += 1;
                    self.fault = Some(Instant::now());
                }
                Some(Event::Fork { child }) => self.add(pid, Origin::Forked(number), child, sequence)?,
                Some(Event::Moved { from, to }) => self.note(Note::Moved { task: number, sequence, from, to })?,
                Some(Event::GivenUp { range }) => self.note(Note::GivenUp { task: number, sequence, range })?,
                Some(Event::Unmapped { range }) => self.note(Note::Unmapped { task: number, sequence, range })?,
                Some(Event::Unknown { number }) => tracing::warn!(number, "an unknown event of a userfaultfd"),
            }
            self.slot.close();
            if none {
                return Ok(());
            }
        }
        Ok(())
    }

    fn answer_faults(&mut self) -> Result<()> {
        let numbers: Vec<u32> = self.holding.tasks.iter().map(|task| task.number).collect();
        let mut changing = false;
        for number in numbers {
            while let Some(address) = self.holding.task(number).and_then(|task| task.faults.pop_front()) {
                if !self.answer(number, address)?
                    && let Some(task) = self.holding.task(number)
                {
                    task.faults.push_front(address);
                    changing = true;
                    break;
                }
            }
        }
        if changing {
            // It goes on when its event was read.
            std::thread::sleep(CHANGING);
        }
        Ok(())
    }

    /// Gives what someone waits for; false when that has to be tried again.
    fn answer(&mut self, number: u32, address: u64) -> Result<bool> {
        let page = PageRange::new(address, address + PAGE_SIZE);
        let Some(task) = self.holding.task(number) else { return Ok(true) };
        let pending = task.pending.at(address, AROUND_FAULT);
        let outcome = match pending {
            Some((range, kept)) => self.lay(number, range, kept)?,
            // Never written before the freeze.
            None => outcome_of(&userfaultfd::zero(task.userfaultfd.as_fd(), page)),
        };
        match outcome {
            Outcome::Absent => {
                let length = pending.map_or(PAGE_SIZE, |(range, _)| range.length());
                let kept = pending.map_or(address, |(_, kept)| kept);
                self.await_page(number, address, PageRange::new(kept, kept + length));
                return Ok(true);
            }
            Outcome::Laid | Outcome::Exists | Outcome::Unmapped => {}
            Outcome::Changing => return Ok(false),
            Outcome::Ended => return self.note(Note::Ended { task: number }).map(|()| true),
            Outcome::Failed(source) => return Err(self.refused(number, address, source)),
        }
        if let Some(task) = self.holding.task(number) {
            // It was there already, or its mapping is gone: let the process look again.
            let _gone = userfaultfd::wake(task.userfaultfd.as_fd(), page);
        }
        Ok(true)
    }

    /// Asks for the pages that somebody waits for at this address.
    fn await_page(&mut self, number: u32, address: u64, kept: PageRange) {
        let Some(task) = self.holding.tasks.iter_mut().find(|task| task.number == number) else { return };
        task.waiting.push(address);
        if let (Some(fetching), Some(process)) = (&mut self.fetching, self.holding.kept.get(&task.pid)) {
            fetching.ask(task.pid, process.store.gap(kept));
        }
    }

    fn refused(&mut self, number: u32, address: u64, source: io::Error) -> PagerError {
        let pid = self.holding.task(number).map_or(0, |task| task.pid);
        PagerError::Lay { pid, address, source }
    }

    /// Lays in a piece of the task whose turn it is.
    fn fill_one_piece(&mut self) -> Result<()> {
        let count = self.holding.tasks.len();
        let mut turns = (0..count).map(|offset| (self.turn + offset) % count);
        let has_turn = |task: &Task| !task.pending.is_empty() && !task.only_waits();
        let Some(index) = turns.find(|index| has_turn(&self.holding.tasks[*index])) else { return Ok(()) };
        self.turn = index + 1;
        let task = &mut self.holding.tasks[index];
        let (number, row) = (task.number, task.pending.next(task.cursor));
        let Some((row, kept)) = row else { return self.ask_for_changes(number) };
        let range = PageRange::new(row.start, row.end.min(row.start + PIECE));
        let outcome = self.lay(number, range, kept)?;
        let Some(task) = self.holding.tasks.get_mut(index).filter(|task| task.number == number) else { return Ok(()) };
        if matches!(outcome, Outcome::Absent) {
            let gap = self
                .holding
                .kept
                .get(&task.pid)
                .map(|process| process.store.gap(PageRange::new(kept, kept + row.length())));
            task.cursor = row.start + gap.map_or(0, PageRange::length);
            task.absent += 1;
            return Ok(());
        }
        task.cursor = range.start;
        task.absent = 0;
        match outcome {
            Outcome::Absent | Outcome::Laid | Outcome::Exists | Outcome::Unmapped => Ok(()),
            Outcome::Changing => {
                std::thread::sleep(CHANGING);
                Ok(())
            }
            Outcome::Ended => self.note(Note::Ended { task: number }),
            Outcome::Failed(source) => Err(self.refused(number, range.start, source)),
        }
    }

    /// It is not known where a task expects its last pages: either the event that says so comes, or the kernel says that none does.
    fn ask_for_changes(&mut self, number: u32) -> Result<()> {
        let Some(task) = self.holding.task(number) else { return Ok(()) };
        match outcome_of(&userfaultfd::zero(task.userfaultfd.as_fd(), NOWHERE)) {
            Outcome::Changing => std::thread::sleep(CHANGING),
            Outcome::Ended => return self.note(Note::Ended { task: number }),
            _ => {
                let (pages, faults) = (0, self.holding.faults);
                self.note(Note::Settled { task: number, range: NOWHERE, pages, faults })?;
            }
        }
        Ok(())
    }

    /// Lays in the first kept pages of a range, and takes what was dealt with out of the pending ones.
    fn lay(&mut self, number: u32, range: PageRange, kept: u64) -> Result<Outcome> {
        let Some(task) = self.holding.tasks.iter().find(|task| task.number == number) else {
            return Ok(Outcome::Ended);
        };
        let (pid, kept_range) = (task.pid, PageRange::new(kept, kept + range.length()));
        let contents = self.holding.kept.get(&pid).and_then(|process| process.store.contents(kept_range));
        let contents = match contents {
            Some(contents) => contents,
            None if self.fetching.is_some() => return Ok(Outcome::Absent),
            None => return Err(PagerError::Missing { pid, address: kept }),
        };
        let laid = up_to_border(task.userfaultfd.as_fd(), range.start, &contents);
        let outcome = outcome_of(&laid);
        // A page that is there or has no mapping needs nothing; the next may.
        let settled = match outcome {
            Outcome::Exists | Outcome::Unmapped => PAGE_SIZE,
            _ => laid.length,
        };
        if settled > 0 {
            let range = PageRange::new(range.start, range.start + settled);
            let (pages, faults) = (laid.length / PAGE_SIZE, self.holding.faults);
            self.note(Note::Settled { task: number, range, pages, faults })?;
            self.give_back(pid, number, PageRange::new(kept, kept + settled));
        }
        Ok(outcome)
    }

    /// Gives memory back that nobody needs any more. Until the restore is complete it may be needed by another one.
    fn give_back(&mut self, pid: i32, number: u32, kept: PageRange) {
        if !self.holding.complete || self.holding.is_needed_beside(pid, number) {
            return;
        }
        if let Some(process) = self.holding.kept.get_mut(&pid)
            && let Err(error) = process.store.forget(kept)
        {
            tracing::warn!(%error, pid, "the memory of pages that were laid in cannot be given back");
        }
    }
}
