//! Requests to a userfaultfd (`ioctl_userfaultfd(2)`).

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};

use rustix::mm::UserfaultfdFlags;

use crate::range::PageRange;

/// `UFFD_API`.
const API: u64 = 0xaa;

/// Features that are asked for when a userfaultfd is opened (`include/uapi/linux/userfaultfd.h`).
pub(crate) mod feature {
    /// Faults tell whether write protection caused them. The three below need it.
    pub(crate) const PAGEFAULT_FLAG_WP: u64 = 1 << 0;
    /// Moves of mappings are told, and do not end their registration.
    pub(crate) const EVENT_REMAP: u64 = 1 << 2;
    /// Write protection of hugetlbfs and shared memory.
    pub(crate) const WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
    /// Pages can be write-protected that are not there yet.
    pub(crate) const WP_UNPOPULATED: u64 = 1 << 13;
    /// The kernel resolves write-protection faults by itself: nobody waits for an answer (Linux 6.7).
    pub(crate) const WP_ASYNC: u64 = 1 << 15;
}

/// `struct uffdio_api`.
#[repr(C)]
struct Handshake {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct Registration {
    start: u64,
    length: u64,
    mode: u64,
    ioctls: u64,
}

/// `UFFDIO_REGISTER_MODE_WP`.
const MODE_WP: u64 = 1 << 1;

nix::ioctl_readwrite!(uffdio_api, 0xaa, 0x3f, Handshake);
nix::ioctl_readwrite!(uffdio_register, 0xaa, 0x00, Registration);

/// Makes one for this process's own memory.
pub(crate) fn own() -> io::Result<OwnedFd> {
    // SAFETY: nothing is registered with it, so no page of this process depends on anybody who answers.
    Ok(unsafe { rustix::mm::userfaultfd(UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK) }?)
}

/// Opens the conversation: the kernel refuses with `EINVAL` when it lacks one of the features.
pub(crate) fn handshake(userfaultfd: BorrowedFd<'_>, features: u64) -> io::Result<()> {
    let mut handshake = Handshake { api: API, features, ioctls: 0 };
    // SAFETY: the argument has the layout of `struct uffdio_api` and outlives the call.
    unsafe { uffdio_api(userfaultfd.as_raw_fd(), &raw mut handshake) }?;
    Ok(())
}

/// Registers all mappings in a range for write protection.
///
/// This changes no mapping's contents. It may split a mapping whose part it is: see `tracker`.
pub(crate) fn register_write_protection(userfaultfd: BorrowedFd<'_>, range: PageRange) -> io::Result<()> {
    let mut registration = Registration { start: range.start, length: range.length(), mode: MODE_WP, ioctls: 0 };
    // SAFETY: the argument has the layout of `struct uffdio_register` and outlives the call. The registered memory is that of
    // the process the userfaultfd was made in; in the mode WP, with asynchronous resolution, nothing of it changes.
    unsafe { uffdio_register(userfaultfd.as_raw_fd(), &raw mut registration) }?;
    Ok(())
}

/// `struct uffdio_range`.
#[repr(C)]
struct Range {
    start: u64,
    length: u64,
}

/// `struct uffdio_writeprotect`.
#[repr(C)]
struct WriteProtect {
    range: Range,
    mode: u64,
}

nix::ioctl_readwrite!(uffdio_writeprotect, 0xaa, 0x06, WriteProtect);

/// Whether the memory that a userfaultfd was made for is still in use by some process.
///
/// Asks for the protection of a range to be lifted, which makes its pages count as written: take one that is never mapped.
pub(crate) fn has_memory(userfaultfd: BorrowedFd<'_>, unused: PageRange) -> bool {
    let mut request = WriteProtect { range: raw(unused), mode: 0 };
    // SAFETY: the argument has the layout of `struct uffdio_writeprotect` and outlives the call, which changes no contents.
    let result = unsafe { uffdio_writeprotect(userfaultfd.as_raw_fd(), &raw mut request) };
    // Memory that is in use answers with ENOENT, for nothing is registered there, or with EAGAIN while a mapping moves.
    result != Err(nix::errno::Errno::ESRCH)
}

/// `struct uffdio_copy`.
#[repr(C)]
struct Copy {
    destination: u64,
    source: u64,
    length: u64,
    mode: u64,
    /// How much was copied; `-EAGAIN` and the like when nothing was.
    copied: i64,
}

/// `struct uffdio_zeropage`.
#[repr(C)]
struct ZeroPage {
    range: Range,
    mode: u64,
    zeroed: i64,
}

nix::ioctl_readwrite!(uffdio_copy, 0xaa, 0x03, Copy);
nix::ioctl_readwrite!(uffdio_zeropage, 0xaa, 0x04, ZeroPage);
nix::ioctl_read!(uffdio_wake, 0xaa, 0x02, Range);

/// How far pages were laid in, and why no further.
#[derive(Debug)]
pub(crate) struct Laid {
    /// Bytes that are in place.
    pub(crate) length: u64,
    /// What stopped it, when it did not get to the end.
    pub(crate) stopped: Option<io::Error>,
}

/// Lays pages into missing memory and wakes who waits for them.
pub(crate) fn copy(userfaultfd: BorrowedFd<'_>, destination: u64, contents: &[u8]) -> Laid {
    let length = contents.len() as u64;
    let mut request = Copy { destination, source: contents.as_ptr() as u64, length, mode: 0, copied: 0 };
    // SAFETY: the argument has the layout of `struct uffdio_copy` and outlives the call; the kernel reads `length` bytes of
    // `contents`. What it writes is memory of another process that is missing there.
    let result = unsafe { uffdio_copy(userfaultfd.as_raw_fd(), &raw mut request) };
    laid(result, request.copied, length)
}

/// Lays in pages of zeros and wakes who waits for them.
pub(crate) fn zero(userfaultfd: BorrowedFd<'_>, range: PageRange) -> Laid {
    let mut request = ZeroPage { range: raw(range), mode: 0, zeroed: 0 };
    // SAFETY: the argument has the layout of `struct uffdio_zeropage` and outlives the call.
    let result = unsafe { uffdio_zeropage(userfaultfd.as_raw_fd(), &raw mut request) };
    laid(result, request.zeroed, range.length())
}

fn laid(result: nix::Result<i32>, done: i64, length: u64) -> Laid {
    match result {
        Ok(_) => Laid { length, stopped: None },
        Err(error) => Laid { length: u64::try_from(done).unwrap_or(0), stopped: Some(error.into()) },
    }
}

/// Wakes who waits for pages in this range, to look again.
pub(crate) fn wake(userfaultfd: BorrowedFd<'_>, range: PageRange) -> io::Result<()> {
    let mut range = raw(range);
    // SAFETY: the argument has the layout of `struct uffdio_range` and outlives the call.
    unsafe { uffdio_wake(userfaultfd.as_raw_fd(), &raw mut range) }?;
    Ok(())
}

fn raw(range: PageRange) -> Range {
    Range { start: range.start, length: range.length() }
}

/// What a userfaultfd tells.
#[derive(Debug)]
pub(crate) enum Event {
    /// Someone touches a missing page.
    Fault {
        /// The address.
        address: u64,
    },
    /// The process forked; the child's memory is told of here.
    Fork {
        /// The child's userfaultfd.
        child: OwnedFd,
    },
    /// A mapping moved.
    Moved {
        /// Where it was.
        from: PageRange,
        /// Where it begins now.
        to: u64,
    },
    /// Pages are about to be given up.
    GivenUp {
        /// Where they are.
        range: PageRange,
    },
    /// Mappings were removed.
    Unmapped {
        /// Where they were.
        range: PageRange,
    },
    /// Something of a newer kernel.
    Unknown {
        /// Its number.
        number: u8,
    },
}

/// A message of a userfaultfd, as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Told {
    /// Someone touches a missing page.
    Fault {
        /// The address.
        address: u64,
    },
    /// The process forked.
    Fork {
        /// The number of the child's userfaultfd in the process that read the message.
        descriptor: i32,
    },
    /// A mapping moved.
    Moved {
        /// Where it was.
        from: PageRange,
        /// Where it begins now.
        to: u64,
    },
    /// Pages are about to be given up.
    GivenUp {
        /// Where they are.
        range: PageRange,
    },
    /// Mappings were removed.
    Unmapped {
        /// Where they were.
        range: PageRange,
    },
    /// Something of a newer kernel.
    Unknown {
        /// Its number.
        number: u8,
    },
}

/// Bytes of `struct uffd_msg`.
pub(crate) const MESSAGE: usize = 32;
const FAULT: u8 = 0x12;
const FORK: u8 = 0x13;
const REMAP: u8 = 0x14;
const REMOVE: u8 = 0x15;
const UNMAP: u8 = 0x16;

/// Understands a `struct uffd_msg`, given as four words.
pub(crate) fn parse(words: [u64; MESSAGE / 8]) -> Told {
    match words[0].to_ne_bytes()[0] {
        FAULT => Told::Fault { address: words[2] },
        FORK => {
            let [a, b, c, d, ..] = words[1].to_ne_bytes();
            Told::Fork { descriptor: i32::from_ne_bytes([a, b, c, d]) }
        }
        REMAP => Told::Moved { from: PageRange::new(words[1], words[1] + words[3]), to: words[2] },
        REMOVE => Told::GivenUp { range: PageRange::new(words[1], words[2]) },
        UNMAP => Told::Unmapped { range: PageRange::new(words[1], words[2]) },
        number => Told::Unknown { number },
    }
}

/// Takes the descriptor that may have come with a message.
///
/// # Safety
/// This process must just have read the message, and must not call this twice for it.
pub(crate) unsafe fn adopt(told: Told) -> Event {
    match told {
        Told::Fault { address } => Event::Fault { address },
        // SAFETY: with this message the kernel has put a descriptor of this number into this process, for its reader.
        Told::Fork { descriptor } => Event::Fork { child: unsafe { OwnedFd::from_raw_fd(descriptor) } },
        Told::Moved { from, to } => Event::Moved { from, to },
        Told::GivenUp { range } => Event::GivenUp { range },
        Told::Unmapped { range } => Event::Unmapped { range },
        Told::Unknown { number } => Event::Unknown { number },
    }
}

/// The next event; `None` when there is none now.
pub(crate) fn event(userfaultfd: BorrowedFd<'_>) -> io::Result<Option<Event>> {
    let mut message = [0_u8; MESSAGE];
    match rustix::io::read(userfaultfd, &mut message) {
        Ok(MESSAGE) => {}
        Ok(0) | Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(None),
        Ok(length) => return Err(io::Error::other(format!("a message of {length} bytes"))),
        Err(error) => return Err(error.into()),
    }
    let word = |index: usize| {
        let bytes = message[8 * index..8 * index + 8].try_into();
        bytes.map(u64::from_ne_bytes).unwrap_or_default()
    };
    // SAFETY: it has just been read.
    Ok(Some(unsafe { adopt(parse([word(0), word(1), word(2), word(3)])) }))
}
