//! Requests of ptrace(2) that libraries lack: the signal mask, and signals by number, real-time ones too.

use std::io;

use nix::errno::Errno;
use nix::unistd::Pid;

const PTRACE_GETSIGMASK: libc::c_uint = 0x420a;
const PTRACE_SETSIGMASK: libc::c_uint = 0x420b;
/// Bytes of the kernel's `sigset_t`.
const SIGSET_LENGTH: usize = size_of::<u64>();

/// The signals that a stopped tracee blocks, one bit each.
pub(crate) fn blocked_signals(thread: Pid) -> io::Result<u64> {
    let mut mask = 0_u64;
    // SAFETY: the kernel writes `SIGSET_LENGTH` bytes to `mask`, which has that many and outlives the call.
    let result = unsafe { libc::ptrace(PTRACE_GETSIGMASK, thread.as_raw(), SIGSET_LENGTH, &raw mut mask) };
    Errno::result(result)?;
    Ok(mask)
}

/// Sets the signals that a stopped tracee blocks.
pub(crate) fn block_signals(thread: Pid, mask: u64) -> io::Result<()> {
    // SAFETY: the kernel reads `SIGSET_LENGTH` bytes from `mask`, which has that many and outlives the call.
    let result = unsafe { libc::ptrace(PTRACE_SETSIGMASK, thread.as_raw(), SIGSET_LENGTH, &raw const mask) };
    Errno::result(result)?;
    Ok(())
}

/// How a stopped tracee goes on.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Go {
    /// On its own way.
    Continue,
    /// Until it enters or leaves a system call.
    ToSyscall,
    /// Without a tracer.
    Detach,
}

/// Lets a stopped tracee go on, with the signal of this number; 0 for none.
pub(crate) fn resume(thread: Pid, how: Go, signal: i32) -> io::Result<()> {
    let request = match how {
        Go::Continue => libc::PTRACE_CONT,
        Go::ToSyscall => libc::PTRACE_SYSCALL,
        Go::Detach => libc::PTRACE_DETACH,
    };
    // SAFETY: these requests take no pointers: the third argument is ignored, the fourth is the signal's number.
    let result = unsafe { libc::ptrace(request, thread.as_raw(), 0_usize, libc::c_long::from(signal)) };
    Errno::result(result)?;
    Ok(())
}
