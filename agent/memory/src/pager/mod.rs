//! Laying the pages of a restored process in behind it, while it runs.
//!
//! `criu restore --lazy-pages` makes the process without the pages that its images call lazy, registers them with a
//! userfaultfd and hands that over on the socket `lazy-pages.socket` of its working directory:
//!
//! | from CRIU | what |
//! |---|---|
//! | for each task: 4 bytes | its process id inside its namespace; negative for a zombie, which has no memory |
//! | … then one byte and a descriptor | its userfaultfd |
//! | at the end: 4 bytes, `0x52535446` | the restore is complete; the tasks run next |
//!
//! Faults are served at once: also CRIU itself faults while it restores. Everything else is laid in 30 ms after the restore is
//! complete, a piece of each process in turn, faults first. Until then no kept page is given up: a restore that ends before its
//! tasks ran can be done again from the same pages.
//!
//! # Pages that are kept elsewhere
//!
//! In post-copy some pages are still on the node that the container has left. Someone [fetches](crate::fetch) them: at once what somebody
//! waits for, and from the completion on everything else. What came is kept until it is laid in, like any other page. A fetcher that
//! hangs up is called again, for as long as it takes; one that says that nothing more will come ends the processes.
//!
//! # The second holder
//!
//! **When the last holder of a userfaultfd closes it, the kernel gives zeros for every page that is missing, silently.** So a
//! second process holds all that the first does, and takes over when the first is gone:
//!
//! ```text
//!   CRIU ──peek──▶ first ── note, descriptor ──▶ second ──(the first is gone)──▶ is the first, starts another second
//!   kernel ─event─▶ slot ─┘      (link)            │
//!                    └── what was read and not noted ┘
//! ```
//!
//! Everything that changes what the first knows goes through a *note*: it is sent to the second and then applied, by the same code
//! in both. What a killed pager may have taken without noting it:
//!
//! - *words and descriptors of CRIU*: they are looked at without taking them, noted, and taken then;
//! - *CRIU's connection*: the slot says that it is being taken; if it was not noted, the processes are ended;
//! - *a fault*: the thread sleeps; at a take-over everybody who sleeps is woken, and faults again;
//! - *a move or unmapping*: the process has gone on, so a page laid in at its old place would be wrong. The kernel writes the
//!   event into the [`Slot`](slot::Slot), where the second finds it;
//! - *a fork*: the child's userfaultfd is gone with its reader and cannot be had again: the processes are ended;
//! - *a page that was laid in and not noted*: the kernel answers `EEXIST` to the second.
//!
//! A pager that fails ends the processes before it closes anything. When both holders are killed at the same moment, nobody is left
//! to do so: whoever started them has to (the agent looks whether they live).

mod criu;
mod fetching;
mod holding;
mod lay;
mod link;
mod work;

use std::collections::HashMap;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Child;
use std::time::Duration;

use thiserror::Error;

use crate::range::PageRanges;
use crate::store::{Store, StoreError};
pub use crate::sys::slot;
use crate::sys::slot::Slot;
use holding::Holding;
use link::{Link, Note};
use work::Work;

/// Why pages cannot be laid in.
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
    /// It was told to stop before the restore was complete.
    #[error("the pager was told to stop")]
    Stopped,
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
    /// Pages that are kept elsewhere do not come any more.
    #[error("the rest of the memory cannot be had from the node that the container has left")]
    NotFetched,
    /// A pager was killed with something that only it had.
    #[error("a pager was killed, and with it {what} was lost")]
    Lost {
        /// What.
        what: &'static str,
    },
    /// The first pager does not say what it should.
    #[error("the first pager is not understood: {0}")]
    Link(io::Error),
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
    /// From the completion of the restore until the last page was in place; of a pager that took over afterwards, from then on.
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

/// The pages of all processes of a restore, by their ids inside their namespace.
pub type AllKept = HashMap<i32, Kept>;

/// How far a pager is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// No restore has connected yet.
    Waiting,
    /// The restore goes on; faults are served.
    Serving,
    /// The restored processes run.
    Filling {
        /// Pages that they do not have yet.
        left_pages: u64,
    },
}

/// How it ended.
#[derive(Debug)]
pub struct Ended {
    /// What was done, or why it cannot be done.
    pub outcome: Result<Paged, PagerError>,
    /// Whether the restore was complete: its processes may have run.
    pub complete: bool,
}

/// What a pager needs of those around it.
pub trait Surroundings {
    /// Starts a process that calls [`serve_second`] with this end of the link; none for a pager that shall be alone.
    fn start_second(&mut self, link: OwnedFd) -> io::Result<Option<Child>>;

    /// A new connection to whoever [fetches](crate::fetch) pages that are not kept; none when all are.
    fn fetcher(&mut self) -> Option<io::Result<UnixStream>> {
        None
    }

    /// It has come this far. Told at every change, and from time to time while pages are laid in.
    fn progress(&mut self, progress: Progress);

    /// Kills all restored processes; returns when none will run any more. Pages of theirs are missing.
    fn end_processes(&mut self);

    /// It has ended. The other holder does not know yet: it would take over now.
    fn ended(&mut self, ended: &Ended);
}

/// What may end a pager before the restore is complete: it stops when something can be read there.
pub type Stop<'a> = Option<BorrowedFd<'a>>;

/// Waits for the restore on `listener`, serves its processes and lays in all pages, as the first of two holders. `kept` has every
/// process of the images, by its id inside its namespace; the slot is that of both holders.
pub fn serve_first(
    listener: UnixListener,
    kept: AllKept,
    slot: Slot,
    stop: Stop<'_>,
    surroundings: &mut dyn Surroundings,
) -> Ended {
    Work::new(Holding::new(Some(listener), kept), slot, stop).run(surroundings)
}

/// Holds what the first holder has, and takes over when that is gone. `None` when it ended well.
///
/// # Errors
/// When the first is there but cannot be understood. Then this process has no part in the matter any more.
pub fn serve_second(
    link: OwnedFd,
    kept: AllKept,
    slot: Slot,
    stop: Stop<'_>,
    surroundings: &mut dyn Surroundings,
) -> Result<Option<Ended>, PagerError> {
    let link = Link::over(link);
    let mut holding = Holding::new(None, kept);
    while let Some(note) = link.receive().map_err(PagerError::Link)? {
        if matches!(note, Note::Done) {
            return Ok(None);
        }
        holding.apply(note)?;
    }
    tracing::warn!("the other pager is gone: taking over");
    let mut work = Work::new(holding, slot, stop);
    let taken = work.take_over();
    Ok(Some(match taken {
        Ok(()) => work.run(surroundings),
        Err(error) => work.end(Err(error), surroundings),
    }))
}

/// The pager of one restore, in this process alone.
#[derive(Debug)]
pub struct Pager;

impl Pager {
    /// As [`serve_first`], without a second holder.
    ///
    /// # Errors
    /// After an error the caller must end the processes: pages of theirs are missing, and zero from now on.
    pub fn serve(listener: UnixListener, kept: AllKept, stop: Stop<'_>) -> Result<Paged, PagerError> {
        let slot = Slot::alone().map_err(conversation("set up a slot"))?;
        serve_first(listener, kept, slot, stop, &mut Alone).outcome
    }
}

/// Nobody is around.
struct Alone;

impl Surroundings for Alone {
    fn start_second(&mut self, _link: OwnedFd) -> io::Result<Option<Child>> {
        Ok(None)
    }

    fn progress(&mut self, _progress: Progress) {}

    fn end_processes(&mut self) {}

    fn ended(&mut self, _ended: &Ended) {}
}

fn conversation(what: &'static str) -> impl Fn(io::Error) -> PagerError {
    move |source| PagerError::Conversation { what, source }
}
