//! Leases on files, fcntl(2).

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use libc::{EACCES, EAGAIN, F_RDLCK, F_SETLEASE, F_UNLCK, SIGURG, c_int, fcntl};

/// Which signal tells of a lease that is broken (`asm-generic/fcntl.h`; libc has it for few targets).
const F_SETSIG: c_int = 10;

/// Takes a read lease on a file that is open for reading, and gives it back at once. False when somebody has it open for writing: then
/// there is none.
pub(crate) fn try_read_lease(file: BorrowedFd<'_>) -> io::Result<bool> {
    // Should somebody open it for writing within these microseconds, the kernel tells the lease's holder by a signal: by one that is
    // ignored unless it is asked for, instead of SIGIO, which ends a process.
    set(file, F_SETSIG, SIGURG)?;
    match set(file, F_SETLEASE, F_RDLCK) {
        Ok(()) => set(file, F_SETLEASE, F_UNLCK).map(|()| true),
        Err(error) if matches!(error.raw_os_error(), Some(EAGAIN | EACCES)) => Ok(false),
        Err(error) => Err(error),
    }
}

fn set(file: BorrowedFd<'_>, what: c_int, value: c_int) -> io::Result<()> {
    // SAFETY: both requests take a number and no pointer, and the descriptor is open for as long as it is borrowed.
    match unsafe { fcntl(file.as_raw_fd(), what, value) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
