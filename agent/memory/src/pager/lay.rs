//! Asking the kernel to take pages, and what it answers.

use std::io;
use std::os::fd::BorrowedFd;

use crate::PAGE_SIZE;
use crate::range::PageRange;
use crate::store::Contents;
use crate::sys::userfaultfd::{self, Laid};

/// Below it, no process has memory (`vm.mmap_min_addr`, at most), and the kernel takes no range that begins there.
const LOWEST: u64 = 64 * 1024;
/// The first address behind those of a process without five levels of page tables.
const HIGHEST: u64 = (1 << 47) - PAGE_SIZE;

/// How the kernel took a piece.
#[derive(Debug)]
pub(super) enum Outcome {
    /// All, or as much as it says.
    Laid,
    /// The page has to be fetched first.
    Absent,
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

/// Lays in as much as fits into one mapping: the kernel refuses a piece that crosses a border as a whole.
///
/// That there is no mapping is believed only when it is said twice. The kernel looks whether mappings are changing when it is
/// asked (`userfaultfd_copy` in `fs/userfaultfd.c`), and then for the mapping (`uffd_mfill_lock` in `mm/userfaultfd.c`): one that is
/// moved in between is not found, although its page is still wanted at the new place, of which the event tells that comes. Asked
/// again, the kernel says that mappings are changing until that event has been read.
pub(super) fn up_to_border(userfaultfd: BorrowedFd<'_>, destination: u64, contents: &Contents<'_>) -> Laid {
    let mut length = match contents {
        Contents::Bytes(bytes) => bytes.len(),
        Contents::Zeros(length) => *length,
    };
    let mut said_once = false;
    loop {
        let laid = match contents {
            Contents::Bytes(bytes) => userfaultfd::copy(userfaultfd, destination, &bytes[..length]),
            Contents::Zeros(_) => {
                userfaultfd::zero(userfaultfd, PageRange::new(destination, destination + length as u64))
            }
        };
        if !matches!(outcome_of(&laid), Outcome::Unmapped) {
            return laid;
        }
        if length as u64 <= PAGE_SIZE {
            if said_once {
                return laid;
            }
            said_once = true;
        }
        length = (length / 2).next_multiple_of(usize::try_from(PAGE_SIZE).unwrap_or(length));
    }
}

pub(super) fn outcome_of(laid: &Laid) -> Outcome {
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

/// Wakes everybody who waits for a page of this process, to fault again. Also faults that a pager has read that is gone.
pub(super) fn wake_all(userfaultfd: BorrowedFd<'_>) -> io::Result<()> {
    userfaultfd::wake(userfaultfd, PageRange::new(LOWEST, HIGHEST))
}
