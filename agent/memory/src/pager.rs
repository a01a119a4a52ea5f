//! Laying the pages of a restored process in behind it, while it runs.
//!
//! `criu restore --lazy-pages` makes the process without the pages that its images call lazy, registers them with a
//! userfaultfd and hands that over on the socket `lazy-pages.socket` of its working directory:
//!
//! | from CRIU | what |
//! |---|---|
//! | for each task: 4 bytes | its process id inside its namespace; negative for a zombie, which has no memory |
//! | … then one byte and a descriptor | its userfaultfd |
//! | at the end: 4 bytes, `0x52535446` | the restore is complete |
//!
//! Faults are served at once: also CRIU itself faults while it restores. Everything else is laid in as soon as the restore is
//! complete, a piece at a time, faults first.
//!
//! **When the last holder of a userfaultfd closes it, the kernel gives zeros for every page that is missing, silently.** So a
//! pager must not end before all is laid in, unless the process is ended before.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::rc::Rc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recv, recvmsg};
use thiserror::Error;

use crate::PAGE_SIZE;
use crate::pending::Pending;
use crate::range::{PageRange, PageRanges};
use crate::store::{Store, StoreError};
use crate::sys::userfaultfd::{self, Event, Laid};

/// Why pages cannot be laid in. The processes whose userfaultfds the pager has must be ended.
#[derive(Debug, Error)]
pub enum PagerError {
    /// The conversation with CRIU failed.
    #[error("the restore does not hand over its memory: cannot {what}: {source}")]
    Conversation {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// CRIU ended the conversation before the restore was complete.
    #[error("the restore ended before it was complete")]
    RestoreFailed,
    /// CRIU told of a process that nobody announced.
    #[error("the restore hands over process {pid}, of which no pages are kept")]
    Unannounced {
        /// Its id inside its namespace.
        pid: i32,
    },
    /// A page that the process needs is not kept.
    #[error("process {pid}: the page at {address:#x} was announced and is not kept")]
    Missing {
        /// The process's id inside its namespace.
        pid: i32,
        /// The address it had when the process was frozen.
        address: u64,
    },
    /// The kernel does not take a page.
    #[error("process {pid}: cannot lay in the page at {address:#x}: {source}")]
    Lay {
        /// The process's id inside its namespace.
        pid: i32,
        /// Its address.
        address: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Paged {
    /// Pages that were laid in.
    pub pages: u64,
    /// How often someone waited for a page.
    pub faults: u64,
    /// From the completion of the restore until the last page was in place.
    pub fill: Duration,
}

/// The pages of one process.
#[derive(Debug)]
pub struct Kept {
    /// What they hold, by the addresses they had when the process was frozen.
    pub store: Store,
    /// Those that the images call lazy.
    pub lazy: PageRanges,
}

#[expect(clippy::cast_possible_truncation, reason = "4096")]
const PAGE: usize = PAGE_SIZE as usize;
/// Bytes that are laid in with one call in the background: a fault waits for one of them at most.
const PIECE: u64 = 512 * 1024;
/// Bytes that are laid in for a fault: neighbours are likely to be wanted next.
const AROUND_FAULT: u64 = 64 * 1024;
/// CRIU's `LAZY_PAGES_RESTORE_FINISHED`.
const RESTORE_FINISHED: u32 = 0x5253_5446;
/// From what CRIU calls the completion of the restore until pages are laid in that nobody waits for: the processes have yet to
/// leave CRIU's code and change mappings for that, and who lays in pages holds them up.
const GRACE: Duration = Duration::from_millis(30);
/// How long to wait for events in that time.
const MOMENT: Timespec = Timespec { tv_sec: 0, tv_nsec: 5_000_000 };
/// How long to wait for events when there is nothing to lay in.
const IDLE: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };

/// The pager of one restore.
#[derive(Debug)]
pub struct Pager {
    tasks: Vec<Task>,
    /// Of processes that CRIU has not handed over yet.
    kept: HashMap<i32, Kept>,
    paged: Paged,
}

/// One userfaultfd.
#[derive(Debug)]
struct Task {
    pid: i32,
    userfaultfd: OwnedFd,
    pending: Pending,
    /// Shared with forked children until all of them have what they need.
    store: Rc<RefCell<Store>>,
    /// It has ended, or has everything.
    done: bool,
}

impl Pager {
    /// Waits for the restore on `listener`, serves its processes and lays in all pages. `kept` has the pages of every process that
    /// has lazy ones, by its id inside its namespace.
    ///
    /// # Errors
    /// After an error the caller must end the processes: pages of theirs are missing.
    pub fn serve(listener: &UnixListener, kept: HashMap<i32, Kept>) -> Result<Paged, PagerError> {
        let mut pager = Self { tasks: Vec::new(), paged: Paged::default(), kept };
        let (criu, _) = listener.accept().map_err(conversation("accept its connection"))?;
        pager.serve_restore(&criu)?;
        let since = Instant::now();
        while since.elapsed() < GRACE {
            pager.serve_events(None, Some(&MOMENT))?;
        }
        while pager.fill_one_piece()? {
            pager.serve_events(None, Some(&Timespec::default()))?;
        }
        pager.paged.fill = since.elapsed();
        Ok(pager.paged)
    }

    /// Takes over the processes and serves their faults until CRIU says that the restore is complete.
    fn serve_restore(&mut self, criu: &UnixStream) -> Result<(), PagerError> {
        loop {
            if !self.serve_events(Some(criu.as_fd()), Some(&IDLE))? {
                continue;
            }
            let word = receive_word(criu)?;
            if u32::from_ne_bytes(word) == RESTORE_FINISHED {
                return Ok(());
            }
            self.take_over(criu, i32::from_ne_bytes(word))?;
        }
    }

    fn take_over(&mut self, criu: &UnixStream, pid: i32) -> Result<(), PagerError> {
        if pid < 0 {
            return Ok(());
        }
        let userfaultfd = receive_descriptor(criu).map_err(conversation("receive a userfaultfd"))?;
        let nonblocking = rustix::io::ioctl_fionbio(&userfaultfd, true);
        nonblocking.map_err(|error| conversation("set up a userfaultfd")(error.into()))?;
        let Kept { store, lazy } = self.kept.remove(&pid).ok_or(PagerError::Unannounced { pid })?;
        let pending = Pending::from(&lazy);
        self.tasks.push(Task { pid, userfaultfd, pending, store: Rc::new(RefCell::new(store)), done: false });
        Ok(())
    }

    /// Waits for events and serves them. Says whether there is something to read of `criu`.
    fn serve_events(&mut self, criu: Option<BorrowedFd<'_>>, wait: Option<&Timespec>) -> Result<bool, PagerError> {
        let open: Vec<usize> = (0..self.tasks.len()).filter(|index| !self.tasks[*index].done).collect();
        let mut polled: Vec<PollFd<'_>> = open
            .iter()
            .map(|index| PollFd::from_borrowed_fd(self.tasks[*index].userfaultfd.as_fd(), PollFlags::IN))
            .chain(criu.map(|criu| PollFd::from_borrowed_fd(criu, PollFlags::IN)))
            .collect();
        poll(&mut polled, wait).or_else(again).map_err(conversation("wait for events"))?;
        let ready: Vec<PollFlags> = polled.iter().map(PollFd::revents).collect();
        for (index, flags) in open.iter().zip(&ready) {
            if flags.contains(PollFlags::IN) {
                self.serve_task(*index)?;
            } else if flags.intersects(PollFlags::HUP | PollFlags::ERR) {
                self.tasks[*index].done = true;
            }
        }
        Ok(criu.is_some() && ready.last().is_some_and(|flags| !flags.is_empty()))
    }

    /// Serves all events that a task has now.
    fn serve_task(&mut self, index: usize) -> Result<(), PagerError> {
        loop {
            let task = &mut self.tasks[index];
            let event = userfaultfd::event(task.userfaultfd.as_fd()).map_err(conversation("read an event"))?;
            match event {
                None => return Ok(()),
                Some(Event::Fault { address }) => {
                    self.paged.faults += 1;
                    self.serve_fault(index, address & !(PAGE_SIZE - 1))?;
                }
                Some(Event::Fork { child }) => {
                    let (pid, pending, store) = (task.pid, task.pending.clone(), Rc::clone(&task.store));
                    self.tasks.push(Task { pid, userfaultfd: child, pending, store, done: false });
                }
                Some(Event::Moved { from, to }) => task.pending.shift(from, to),
                Some(Event::Gone { range }) => task.pending.remove(range),
                Some(Event::Unknown { number }) => tracing::warn!(number, "an unknown event of a userfaultfd"),
            }
        }
    }

    fn serve_fault(&mut self, index: usize, address: u64) -> Result<(), PagerError> {
        loop {
            let wanted = self.tasks[index].pending.at(address, AROUND_FAULT);
            let page = PageRange::new(address, address + PAGE_SIZE);
            let outcome = match wanted {
                Some((range, kept)) => self.lay(index, range, kept)?,
                // Never written before the freeze.
                None => outcome_of(&userfaultfd::zero(self.tasks[index].userfaultfd.as_fd(), page)),
            };
            match outcome {
                Outcome::Laid if wanted.is_some() => {}
                // It was there already, or its mapping is gone: let the process look again.
                Outcome::Laid | Outcome::Exists | Outcome::Unmapped => {
                    let _ = userfaultfd::wake(self.tasks[index].userfaultfd.as_fd(), page);
                    return Ok(());
                }
                // The process is changing its mappings, and waits until that is read.
                Outcome::Changing => self.serve_task(index)?,
                Outcome::Ended => {
                    self.tasks[index].done = true;
                    return Ok(());
                }
                Outcome::Failed(source) => {
                    return Err(PagerError::Lay { pid: self.tasks[index].pid, address, source });
                }
            }
            if self.tasks[index].pending.at(address, PAGE_SIZE).is_none() && wanted.is_some() {
                let _ = userfaultfd::wake(self.tasks[index].userfaultfd.as_fd(), page);
                return Ok(());
            }
        }
    }

    /// Lays in a piece of some task; false when all have everything.
    fn fill_one_piece(&mut self) -> Result<bool, PagerError> {
        let Some(index) = self.tasks.iter().position(|task| !task.done) else { return Ok(false) };
        let task = &mut self.tasks[index];
        let Some((range, kept)) = task.pending.first(PIECE) else {
            // Closed only now: until then a fork would need it.
            task.done = true;
            return Ok(true);
        };
        match self.lay(index, range, kept)? {
            Outcome::Laid | Outcome::Exists | Outcome::Unmapped => {}
            Outcome::Changing => self.serve_task(index)?,
            Outcome::Ended => self.tasks[index].done = true,
            Outcome::Failed(source) => {
                return Err(PagerError::Lay { pid: self.tasks[index].pid, address: range.start, source });
            }
        }
        Ok(true)
    }

    /// Lays in the first kept pages of a range, and takes what was dealt with out of the pending ones.
    fn lay(&mut self, index: usize, range: PageRange, kept: u64) -> Result<Outcome, PagerError> {
        let task = &mut self.tasks[index];
        let kept_range = PageRange::new(kept, kept + range.length());
        let alone = Rc::strong_count(&task.store) == 1;
        let mut store = task.store.borrow_mut();
        let Some(contents) = store.run(kept_range) else {
            return Err(PagerError::Missing { pid: task.pid, address: kept });
        };
        let laid = copy_up_to_border(task.userfaultfd.as_fd(), range.start, contents);
        let done = PageRange::new(range.start, range.start + laid.length);
        self.paged.pages += done.pages();
        task.pending.remove(done);
        if alone && !done.is_empty() {
            store.forget(PageRange::new(kept, kept + laid.length))?;
        }
        let outcome = outcome_of(&laid);
        if matches!(outcome, Outcome::Exists | Outcome::Unmapped) {
            // That one page needs nothing; the next may.
            task.pending.remove(PageRange::new(done.end, done.end + PAGE_SIZE));
        }
        Ok(outcome)
    }
}

/// Copies as much as fits into one mapping: the kernel refuses a piece that crosses a border as a whole.
fn copy_up_to_border(userfaultfd: BorrowedFd<'_>, destination: u64, contents: &[u8]) -> Laid {
    let mut length = contents.len();
    loop {
        let laid = userfaultfd::copy(userfaultfd, destination, &contents[..length]);
        let crosses = matches!(outcome_of(&laid), Outcome::Unmapped);
        if !crosses || length <= PAGE {
            return laid;
        }
        length = (length / 2).next_multiple_of(PAGE);
    }
}

/// How the kernel took a piece.
#[derive(Debug)]
enum Outcome {
    /// All, or as much as it says.
    Laid,
    /// The page is there.
    Exists,
    /// There is no mapping any more.
    Unmapped,
    /// The process is changing its mappings.
    Changing,
    /// The process has ended.
    Ended,
    /// Anything else.
    Failed(io::Error),
}

fn outcome_of(laid: &Laid) -> Outcome {
    let Some(error) = &laid.stopped else { return Outcome::Laid };
    match error.raw_os_error() {
        // A part of it: what stopped it comes again with the next piece.
        _ if laid.length > 0 => Outcome::Laid,
        Some(libc::EEXIST) => Outcome::Exists,
        Some(libc::ENOENT | libc::EINVAL) => Outcome::Unmapped,
        Some(libc::EAGAIN) => Outcome::Changing,
        Some(libc::ESRCH) => Outcome::Ended,
        code => Outcome::Failed(code.map_or_else(|| io::Error::other(error.to_string()), io::Error::from_raw_os_error)),
    }
}

fn conversation(what: &'static str) -> impl Fn(io::Error) -> PagerError {
    move |source| PagerError::Conversation { what, source }
}

fn again(error: rustix::io::Errno) -> io::Result<usize> {
    if error == rustix::io::Errno::INTR { Ok(0) } else { Err(error.into()) }
}

fn receive_word(criu: &UnixStream) -> Result<[u8; 4], PagerError> {
    let mut word = [0; 4];
    match recv(criu, &mut word, RecvFlags::WAITALL) {
        Ok((_, 4)) => Ok(word),
        Ok(_) => Err(PagerError::RestoreFailed),
        Err(error) => Err(conversation("read from it")(error.into())),
    }
}

fn receive_descriptor(criu: &UnixStream) -> io::Result<OwnedFd> {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0; 1];
    let received = recvmsg(criu, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    if received.bytes == 0 || received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let descriptor = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    descriptor.ok_or_else(|| io::Error::other("no descriptor came"))
}
