//! Signals to processes that may already be gone.

use std::fs;
use std::path::Path;

use procfs::ProcError;
use procfs::process::Process;
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::container::Init;
use crate::error::Error;

impl Init {
    /// Names the process that has this pid now.
    pub fn of_pid(pid: i32) -> Option<Self> {
        let stat = Process::new(pid).and_then(|process| process.stat()).ok()?;
        Some(Self { pid, start_time: stat.starttime })
    }

    /// Kills exactly this process, not a later one with its pid. That it is gone already is no error.
    pub(crate) fn kill(self) {
        self.send(Signal::KILL);
    }

    /// Asks exactly this process to end, with the signal of this number; a number of none is SIGTERM. That it is gone already is no error.
    pub fn terminate(self, signal: i32) {
        self.send(Signal::from_named_raw(signal).unwrap_or(Signal::TERM));
    }

    fn send(self, signal: Signal) {
        let Some(pid) = Pid::from_raw(self.pid) else { return };
        // The descriptor pins the process; the look at the start time after it makes sure that it is the right one.
        let Ok(descriptor) = pidfd_open(pid, PidfdFlags::empty()) else { return };
        if self.is_alive()
            && let Err(errno) = pidfd_send_signal(&descriptor, signal)
        {
            tracing::debug!(pid = self.pid, ?signal, %errno, "could not be sent its signal");
        }
    }
}

/// Whether a killed process will not run another instruction of its program: each of its threads is dead, or has begun to exit.
///
/// That is long before it is gone: giving back its memory takes some 150 ms for each GiB. Only a process that was sent its end may
/// be asked about; another could have new threads meanwhile.
pub fn has_stopped_for_good(pid: i32) -> bool {
    /// `include/linux/sched.h`; set by `exit_signals`, behind the last instruction and before memory and files are given back.
    const PF_EXITING: u32 = 0x4;
    let threads = match Process::new(pid).and_then(|process| process.tasks()) {
        Ok(threads) => threads,
        Err(error) => return says_gone(&error),
    };
    threads.map(|thread| thread.and_then(|thread| thread.stat())).all(|stat| match stat {
        Ok(stat) => stat.flags & PF_EXITING != 0 || matches!(stat.state, 'Z' | 'X' | 'x'),
        Err(error) => says_gone(&error),
    })
}

fn says_gone(error: &ProcError) -> bool {
    match error {
        ProcError::NotFound(_) => true,
        ProcError::Io(error, _) => error.raw_os_error() == Some(Errno::SRCH.raw_os_error()),
        _ => false,
    }
}

/// Reads a small text file; its absence is no error.
pub(crate) fn read_if_there(path: &Path) -> Result<Option<String>, Error> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io("read", path)(error)),
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn only_a_process_that_was_ended_has_stopped_for_good() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        assert!(!has_stopped_for_good(pid));
        rustix::process::kill_process(Pid::from_raw(pid).unwrap(), Signal::STOP).unwrap();
        while !Process::new(pid).unwrap().stat().unwrap().state.eq(&'T') {
            std::thread::yield_now();
        }
        assert!(!has_stopped_for_good(pid), "it may be continued");
        child.kill().unwrap();
        while Process::new(pid).unwrap().stat().unwrap().state != 'Z' {
            std::thread::yield_now();
        }
        assert!(has_stopped_for_good(pid));
        child.wait().unwrap();
        assert!(has_stopped_for_good(pid));
    }
}
