//! Getting a userfaultfd of another process: one of its threads is stopped for some 100 µs, made to call userfaultfd(2), and
//! put back exactly as it was.
//!
//! ```text
//! seize ─▶ interrupt ─▶ block signals ─▶ userfaultfd() ─▶ pidfd_getfd ─▶ close() ─▶ registers, mask ─▶ detach
//!                       └──────────────── the thread stands still, the others run on ───────────────┘
//! ```
//!
//! - No code is written: the system calls are made at a `syscall` instruction that the process has, in its vDSO.
//! - Signals that come first are delivered, and none is while the thread makes calls that are not its own.
//! - A thread that waits in the kernel is interrupted. Most calls are then begun again by the kernel itself; those that it
//!   would end with `EINTR` are begun again here (signal(7), "Interruption of system calls").
//! - When the tracer dies before the first call or after the last, the kernel detaches the thread, which goes on.

#[cfg(target_arch = "x86_64")]
mod tracer;
#[cfg(target_arch = "x86_64")]
mod x86_64;

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use nix::unistd::Pid;
use thiserror::Error;

/// Why no userfaultfd of a process could be got.
#[derive(Debug, Error)]
pub enum InjectError {
    /// A step that the kernel refused.
    #[error("process {process}: cannot {what}: {source}")]
    Step {
        /// The process.
        process: Pid,
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel has no userfaultfd, or does not give it to this process.
    #[error(
        "process {process} gets no userfaultfd: {source}; the kernel needs CONFIG_USERFAULTFD, and a seccomp filter of the \
         process must not forbid it where the kernel cannot suspend the filter (CONFIG_CHECKPOINT_RESTORE)"
    )]
    Refused {
        /// The process.
        process: Pid,
        /// What userfaultfd(2) said there.
        source: io::Error,
    },
    /// A seccomp filter might kill the process for a call that is not its own.
    #[error(
        "process {process} has a seccomp filter, which this kernel cannot suspend (it needs CONFIG_CHECKPOINT_RESTORE, and \
         the agent CAP_SYS_ADMIN)"
    )]
    Seccomp {
        /// The process.
        process: Pid,
    },
    /// No thread came to a stop in time, for example because all wait for a disk.
    #[error("process {process}: none of its threads stopped within {} ms each", .deadline.as_millis())]
    NotStopping {
        /// The process.
        process: Pid,
        /// How long each thread had.
        deadline: Duration,
    },
    /// Its memory holds no `syscall` instruction that could be used.
    #[error("process {process} has no vDSO with a system call in it, at which a call could be made")]
    NoSyscall {
        /// The process.
        process: Pid,
    },
    /// This build is for another architecture.
    #[error("process {process}: on this architecture there is no tracking by userfaultfd yet, only on x86-64")]
    Architecture {
        /// The process.
        process: Pid,
    },
    /// A program of another architecture, 32-bit ones included.
    #[error("process {process} does not run 64-bit code of this machine, which tracking by userfaultfd needs")]
    Foreign {
        /// The process.
        process: Pid,
    },
}

/// A userfaultfd that was made in another process.
#[derive(Debug)]
pub struct Injected {
    /// The userfaultfd: this process's own, the other one has it no more.
    pub userfaultfd: OwnedFd,
    /// The thread that made it.
    pub thread: Pid,
    /// How long that thread stood still.
    pub stopped: Duration,
    /// Whether a system call of the thread was begun again that would have ended with `EINTR`.
    pub began_again: bool,
}

/// Gets a userfaultfd of a process.
///
/// Blocks for about 100 µs, and up to 300 ms for every thread that does not stop. Of a process that is stopped, it stays
/// stopped.
#[cfg(target_arch = "x86_64")]
pub fn userfaultfd(process: Pid) -> Result<Injected, InjectError> {
    // The tracer is a thread, and its end detaches the tracee: so nothing stays attached, whatever goes wrong.
    let thread = std::thread::Builder::new().name("tracer".to_owned()).spawn(move || tracer::inject(process));
    let thread = thread.map_err(tracer::step(process, "start a thread"))?;
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Gets a userfaultfd of a process: not on this architecture.
#[cfg(not(target_arch = "x86_64"))]
pub fn userfaultfd(process: Pid) -> Result<Injected, InjectError> {
    Err(InjectError::Architecture { process })
}
