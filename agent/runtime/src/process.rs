//! Signals to processes that may already be gone.

use std::fs;
use std::path::Path;

use procfs::process::Process;
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
        let Some(pid) = Pid::from_raw(self.pid) else { return };
        // The descriptor pins the process; the look at the start time after it makes sure that it is the right one.
        let Ok(descriptor) = pidfd_open(pid, PidfdFlags::empty()) else { return };
        if self.is_alive()
            && let Err(errno) = pidfd_send_signal(&descriptor, Signal::KILL)
        {
            tracing::debug!(pid = self.pid, %errno, "could not be killed");
        }
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
