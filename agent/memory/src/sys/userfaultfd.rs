//! Requests to a userfaultfd (`ioctl_userfaultfd(2)`).

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use crate::range::PageRange;

/// `UFFD_API`.
const API: u64 = 0xaa;

/// Features that are asked for when a userfaultfd is opened (`include/uapi/linux/userfaultfd.h`).
pub(crate) mod feature {
    /// Faults tell whether write protection caused them. The three below need it.
    pub(crate) const PAGEFAULT_FLAG_WP: u64 = 1 << 0;
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
