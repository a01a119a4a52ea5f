//! A container's stdio that outlives the agent and that CRIU can dump.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::pipe::{PipeFlags, pipe_with};

use crate::error::Error;

/// The three descriptors to give to a container.
#[derive(Debug)]
pub struct ContainerStdio {
    /// `/dev/null`.
    pub stdin: OwnedFd,
    /// The keeper's pipe.
    pub stdout: OwnedFd,
    /// The same pipe.
    pub stderr: OwnedFd,
}

/// Starts a `podferry-stdio-keeper` that appends to `log_path` what is written to the returned stdout and stderr. It
/// ends by itself when the container and everybody else has closed them, so the caller has to drop its copies.
pub fn spawn_keeper(keeper_bin: &Path, log_path: &Path) -> Result<ContainerStdio, Error> {
    let (read, write) =
        pipe_with(PipeFlags::CLOEXEC).map_err(|errno| Error::io("make a pipe for", log_path)(errno.into()))?;
    let stderr = write.try_clone().map_err(Error::io("duplicate the pipe for", log_path))?;
    let stdin = File::open("/dev/null").map_err(Error::io("open", "/dev/null"))?;
    let output = Command::new(keeper_bin)
        .arg(log_path)
        .stdin(read)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .output()
        .map_err(Error::io("start", keeper_bin))?;
    if !output.status.success() {
        return Err(Error::Keeper {
            keeper: keeper_bin.to_owned(),
            log: log_path.to_owned(),
            detail: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        });
    }
    Ok(ContainerStdio { stdin: stdin.into(), stdout: write, stderr })
}
