//! A page of memory that a pager shares with the process that takes over from it.
//!
//! The pager has the kernel write each event straight into it. A pager that is killed after the kernel let the process go on has
//! left the event there: nothing that was read is lost with its reader, but for the descriptor of a fork.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mlock, mmap, munmap};

use super::userfaultfd::{self, Event, Told};

const LENGTH: usize = 4096;
const WORDS: usize = LENGTH / 8;
/// The task whose event is read, plus one; 0 when nothing is open.
const TASK: usize = 0;
/// Counts events.
const SEQUENCE: usize = 1;
/// 1 while CRIU's connection is taken.
const ACCEPTING: usize = 2;
/// Where the kernel writes `struct uffd_msg`.
const MESSAGE: usize = 4;

/// The page.
#[derive(Debug)]
pub struct Slot {
    start: NonNull<AtomicU64>,
}

// SAFETY: the mapping belongs to this value alone, and all of it is atomic.
unsafe impl Send for Slot {}

impl Slot {
    /// One that is shared with nobody.
    pub fn alone() -> io::Result<Self> {
        Self::of(&File::from(memfd_create("podferry-slot", MemfdFlags::CLOEXEC)?))
    }

    /// One that is shared with all who have the file, which should lie on a tmpfs.
    pub fn of(file: &File) -> io::Result<Self> {
        ftruncate(file, LENGTH as u64)?;
        // SAFETY: the kernel chooses an address that nothing else uses, and the file is as long as the mapping.
        let start = unsafe {
            mmap(std::ptr::null_mut(), LENGTH, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, file, 0)
        }?;
        // SAFETY: the range is the mapping above; locking changes nothing but whether it can be swapped out. Where that is not
        // allowed it stays in memory because it was written a moment before the kernel writes to it.
        let _unlocked = unsafe { mlock(start, LENGTH) };
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { start })
    }

    /// The next event of a task; `None` when there is none now. It stays open until [`Slot::close`].
    pub(crate) fn read(&self, userfaultfd: BorrowedFd<'_>, task: u32, sequence: u64) -> io::Result<Option<Event>> {
        self.words()[MESSAGE].store(0, Ordering::SeqCst);
        self.words()[SEQUENCE].store(sequence, Ordering::SeqCst);
        self.words()[TASK].store(u64::from(task) + 1, Ordering::SeqCst);
        let place = self.words()[MESSAGE..].as_ptr();
        // SAFETY: behind `place` the page has more than the bytes of a message, all of them atomic integers, for which every
        // value is valid and which others may change at any time.
        let length = unsafe { libc::read(userfaultfd.as_raw_fd(), place.cast_mut().cast(), userfaultfd::MESSAGE) };
        match usize::try_from(length) {
            // SAFETY: this process has just read the message.
            Ok(userfaultfd::MESSAGE) => Ok(Some(unsafe { userfaultfd::adopt(self.told()) })),
            Ok(0) => Ok(None),
            Ok(length) => Err(io::Error::other(format!("a message of {length} bytes"))),
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
                error if error.kind() == io::ErrorKind::Interrupted => Ok(None),
                error => Err(error),
            },
        }
    }

    /// The event was dealt with, or there was none.
    pub(crate) fn close(&self) {
        self.words()[TASK].store(0, Ordering::SeqCst);
    }

    /// What its reader left open: the task, the number of the event and the event, if the kernel has told one.
    pub(crate) fn left(&self) -> Option<(u32, u64, Told)> {
        let task = u32::try_from(self.words()[TASK].load(Ordering::SeqCst).checked_sub(1)?).ok()?;
        let told = self.words()[MESSAGE].load(Ordering::SeqCst) != 0;
        told.then(|| (task, self.words()[SEQUENCE].load(Ordering::SeqCst), self.told()))
    }

    /// Says that CRIU's connection is being taken, or was.
    pub(crate) fn set_accepting(&self, accepting: bool) {
        self.words()[ACCEPTING].store(u64::from(accepting), Ordering::SeqCst);
    }

    /// Whether CRIU's connection may have been taken without anybody having been told.
    pub(crate) fn is_accepting(&self) -> bool {
        self.words()[ACCEPTING].load(Ordering::SeqCst) != 0
    }

    fn told(&self) -> Told {
        let word = |index: usize| self.words()[MESSAGE + index].load(Ordering::SeqCst);
        userfaultfd::parse([word(0), word(1), word(2), word(3)])
    }

    fn words(&self) -> &[AtomicU64; WORDS] {
        // SAFETY: the mapping has that many, lives as long as `self` and is aligned to a page; who else changes it, in this
        // process or another, does so atomically, but for the kernel, whose write ends before anybody reads.
        unsafe { self.start.cast::<[AtomicU64; WORDS]>().as_ref() }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        // SAFETY: the mapping was made with this length, and no reference to it lives longer than `self`.
        let unmapped = unsafe { munmap(self.start.as_ptr().cast(), LENGTH) };
        debug_assert_eq!(unmapped, Ok(()));
    }
}
