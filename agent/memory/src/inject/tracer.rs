//! The tracer: stops one thread, lets it make two calls, and puts it back.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use nix::sys::ptrace::{self, Options};
use nix::unistd::Pid;
use rustix::process::{Pid as RustixPid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use super::{InjectError, Injected, x86_64 as arch};
use crate::maps;
use crate::sys::ptrace::{Go, block_signals, blocked_signals, resume};

/// How long a thread may take to stop before another one is tried.
const STOP_DEADLINE: Duration = Duration::from_millis(300);
/// How long one injected call may take. It never waits; this only keeps a broken machine from being waited for for ever.
const CALL_DEADLINE: Duration = Duration::from_secs(5);
/// The most times that a thread says in between that its process was stopped.
const MOST_EVENTS: u32 = 8;
const EVENT_STOP: i32 = libc::PTRACE_EVENT_STOP;
/// How often a stop is looked for before the waiting thread sleeps in between.
const SPINS: u32 = 2000;
/// `O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY`. Without the last one it would need `CAP_SYS_PTRACE` in the process.
const USERFAULTFD_FLAGS: u64 = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64 | 1;

pub(super) fn step(process: Pid, what: &'static str) -> impl Fn(io::Error) -> InjectError {
    move |source| InjectError::Step { process, what, source }
}

pub(super) fn inject(process: Pid) -> Result<Injected, InjectError> {
    let instruction = syscall_instruction(process)?;
    let number = RustixPid::from_raw(process.as_raw()).ok_or(InjectError::NoSyscall { process })?;
    let pidfd = pidfd_open(number, PidfdFlags::empty()).map_err(|error| step(process, "open a pidfd")(error.into()))?;
    for thread in threads(process).map_err(step(process, "list the threads"))? {
        let Some(stopped) = Stopped::stop(process, thread)? else { continue };
        return stopped.open(&pidfd, instruction);
    }
    Err(InjectError::NotStopping { process, deadline: STOP_DEADLINE })
}

/// The threads, those first whose interruption is noticed least.
fn threads(process: Pid) -> io::Result<Vec<Pid>> {
    let mut ranked = Vec::new();
    for entry in fs::read_dir(format!("/proc/{process}/task"))? {
        let entry = entry?;
        let Some(thread) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        // `running`, or the number of the call it waits in; empty when it has ended.
        let waits_in = fs::read_to_string(entry.path().join("syscall")).unwrap_or_default();
        let rank = match waits_in.split_whitespace().next() {
            Some("running") => 0,
            Some(number) if number.parse().is_ok_and(|number| arch::ENDS_WITH_EINTR.contains(&number)) => 2,
            Some(_) => 1,
            None => 3,
        };
        ranked.push((rank, Pid::from_raw(thread)));
    }
    ranked.sort_unstable_by_key(|(rank, thread)| (*rank, thread.as_raw()));
    Ok(ranked.into_iter().map(|(_, thread)| thread).collect())
}

fn syscall_instruction(process: Pid) -> Result<u64, InjectError> {
    let mappings = maps::read(process).map_err(step(process, "read the mappings"))?;
    if mappings.is_empty() {
        // A process that has ended but was not waited for, or a kernel thread.
        return Err(step(process, "read the mappings")(io::Error::from_raw_os_error(libc::ESRCH)));
    }
    let vdso = mappings.iter().find(|mapping| mapping.name == "[vdso]").ok_or(InjectError::NoSyscall { process })?;
    let mut code = vec![0; usize::try_from(vdso.range.length()).unwrap_or(0)];
    crate::copier::read_exact(process, vdso.range.start, &mut code).map_err(step(process, "read the vDSO"))?;
    let offset = code.windows(arch::SYSCALL.len()).position(|bytes| bytes == arch::SYSCALL);
    offset.map(|offset| vdso.range.start + offset as u64).ok_or(InjectError::NoSyscall { process })
}

/// A thread that stands still and is traced by this one.
struct Stopped {
    process: Pid,
    thread: Pid,
    since: Instant,
    mask: u64,
    registers: arch::Registers,
}

impl Stopped {
    /// Stops a thread; `None` when it ended meanwhile or does not stop in time.
    fn stop(process: Pid, thread: Pid) -> Result<Option<Self>, InjectError> {
        if !seize(process, thread)? {
            return Ok(None);
        }
        ptrace::interrupt(thread).map_err(|error| step(process, "interrupt a thread")(error.into()))?;
        let Some(since) = wait_for_interrupt(thread).map_err(step(process, "wait for a thread to stop"))? else {
            return Ok(None);
        };
        let mask = blocked_signals(thread).map_err(step(process, "read a thread's signal mask"))?;
        let registers = arch::read(thread).map_err(step(process, "read a thread's registers"))?;
        let stopped = Self { process, thread, since, mask, registers };
        if !arch::is_native(&stopped.registers) {
            stopped.go_on()?;
            return Err(InjectError::Foreign { process });
        }
        Ok(Some(stopped))
    }

    /// Makes the userfaultfd and lets the thread go on, also when that failed.
    fn open(self, pidfd: &OwnedFd, instruction: u64) -> Result<Injected, InjectError> {
        let (process, thread, since) = (self.process, self.thread, self.since);
        let opened = self.open_and_take(pidfd, instruction);
        let began_again = self.go_on()?;
        let stopped = since.elapsed();
        Ok(Injected { userfaultfd: opened?, thread, stopped, began_again }).inspect(|_| {
            tracing::debug!(%process, %thread, ?stopped, began_again, "userfaultfd injected");
        })
    }

    fn open_and_take(&self, pidfd: &OwnedFd, instruction: u64) -> Result<OwnedFd, InjectError> {
        let process = self.process;
        block_signals(self.thread, u64::MAX).map_err(step(process, "block a thread's signals"))?;
        let number = self.call(instruction, libc::SYS_userfaultfd, USERFAULTFD_FLAGS)?;
        let number = number.map_err(|source| InjectError::Refused { process, source })?;
        let descriptor = i32::try_from(number).unwrap_or(-1);
        let taken = pidfd_getfd(pidfd, descriptor, PidfdGetfdFlags::empty());
        // Whether or not it was taken, the process does not keep it.
        let closed = self.call(instruction, libc::SYS_close, number)?;
        let taken = taken.map_err(|error| step(process, "take the userfaultfd")(error.into()))?;
        closed.map_err(step(process, "close the userfaultfd in it"))?;
        Ok(taken)
    }

    /// Makes one system call with one argument.
    fn call(&self, instruction: u64, number: i64, argument: u64) -> Result<io::Result<u64>, InjectError> {
        let failed = step(self.process, "make a system call in it");
        arch::write(self.thread, arch::with_call(&self.registers, instruction, number, argument)).map_err(&failed)?;
        // Once when it enters the call, once when it leaves it. A thread of a stopped process says so in between.
        let (mut stops, mut others) = (0, 0);
        while stops < 2 {
            resume(self.thread, Go::ToSyscall, 0).map_err(&failed)?;
            let status = wait(self.thread, CALL_DEADLINE).map_err(&failed)?;
            let is_event = status.is_some_and(|status| status >> 16 == EVENT_STOP);
            if status.and_then(stop_signal) == Some(libc::SIGTRAP | 0x80) {
                stops += 1;
            } else if is_event && others < MOST_EVENTS {
                others += 1;
            } else {
                return Err(failed(io::Error::other(format!("an unexpected stop, {status:?}"))));
            }
        }
        let result = arch::result(&arch::read(self.thread).map_err(&failed)?);
        Ok(if (-4095..0).contains(&result) {
            Err(io::Error::from_raw_os_error(i32::try_from(-result).unwrap_or(libc::EIO)))
        } else {
            Ok(result.cast_unsigned())
        })
    }

    /// Puts everything back and detaches. Says whether a system call begins again.
    fn go_on(mut self) -> Result<bool, InjectError> {
        let failed = |what| step(self.process, what);
        let again = arch::would_end_with_eintr(&self.registers) && !self.has_signal();
        if again {
            arch::begin_again(&mut self.registers);
        }
        arch::write(self.thread, self.registers).map_err(failed("put a thread's registers back"))?;
        block_signals(self.thread, self.mask).map_err(failed("put a thread's signal mask back"))?;
        resume(self.thread, Go::Detach, 0).map_err(failed("detach from a thread"))?;
        Ok(again)
    }

    /// Whether a signal waits for the thread that it does not block: then the call is to end with `EINTR`.
    fn has_signal(&self) -> bool {
        let status = fs::read_to_string(format!("/proc/{}/task/{}/status", self.process, self.thread));
        let status = status.unwrap_or_default();
        let set = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|value| u64::from_str_radix(value.trim(), 16).ok()).unwrap_or(0)
        };
        (set("SigPnd:") | set("ShdPnd:")) & !self.mask != 0
    }
}

/// Becomes a thread's tracer; false when it has ended.
fn seize(process: Pid, thread: Pid) -> Result<bool, InjectError> {
    const SUSPEND_SECCOMP: i32 = 1 << 21;
    let options = Options::PTRACE_O_TRACESYSGOOD;
    let with_suspension = Options::from_bits_retain(options.bits() | SUSPEND_SECCOMP);
    match ptrace::seize(thread, with_suspension) {
        Ok(()) => return Ok(true),
        Err(nix::Error::ESRCH) => return Ok(false),
        // It is missing from the kernel, or this process has no CAP_SYS_ADMIN.
        Err(nix::Error::EINVAL | nix::Error::EPERM) => {}
        Err(error) => return Err(step(process, "trace a thread")(error.into())),
    }
    if has_seccomp_filter(process) {
        return Err(InjectError::Seccomp { process });
    }
    match ptrace::seize(thread, options) {
        Ok(()) => Ok(true),
        Err(nix::Error::ESRCH) => Ok(false),
        Err(error) => Err(step(process, "trace a thread")(error.into())),
    }
}

/// In doubt it has.
fn has_seccomp_filter(process: Pid) -> bool {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    status.lines().find_map(|line| line.strip_prefix("Seccomp:")).is_none_or(|mode| mode.trim() != "0")
}

/// Waits until a thread stands still because it was interrupted, and gives since when; `None` when it ended or did not
/// stop in time. Signals that come before are delivered.
fn wait_for_interrupt(thread: Pid) -> io::Result<Option<Instant>> {
    let deadline = Instant::now() + STOP_DEADLINE;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let Some(status) = wait(thread, left)? else { return Ok(None) };
        let since = Instant::now();
        let Some(signal) = stop_signal(status) else { return Ok(None) };
        if status >> 16 == EVENT_STOP {
            return Ok(Some(since));
        }
        resume(thread, Go::Continue, signal)?;
    }
}

/// The signal of a stop; `None` for the status of an end.
fn stop_signal(status: i32) -> Option<i32> {
    libc::WIFSTOPPED(status).then(|| libc::WSTOPSIG(status))
}

/// Waits for a tracee's status; `None` when there is none in time.
fn wait(thread: Pid, deadline: Duration) -> io::Result<Option<i32>> {
    use rustix::process::{WaitOptions, waitpid};
    let options = WaitOptions::NOHANG | WaitOptions::from_bits_retain(libc::__WALL.cast_unsigned());
    let since = Instant::now();
    for round in 0_u32.. {
        if let Some((_, status)) = waitpid(RustixPid::from_raw(thread.as_raw()), options)? {
            return Ok(Some(status.as_raw()));
        }
        if since.elapsed() >= deadline {
            break;
        }
        if round < SPINS {
            std::thread::yield_now();
        } else {
            std::thread::sleep(Duration::from_micros(50));
        }
    }
    Ok(None)
}
