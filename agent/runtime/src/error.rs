//! What can go wrong here, each saying what was tried, where, and what helps.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A failure of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file operation failed.
    #[error("could not {action} {}: {source}", path.display())]
    Io {
        /// What was tried, as a verb phrase: `read`, `start`.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// Whoever started runc is gone, and it is not known what became of it.
    #[error("{source}")]
    LauncherGone {
        /// Who that was.
        source: io::Error,
    },
    /// No runc root has a container with this name.
    #[error("no container {id} under {}; `runc --root DIR list` shows what runs", list(roots))]
    NotFound {
        /// The container that was asked for.
        id: String,
        /// Where it was searched.
        roots: Vec<PathBuf>,
    },
    /// The name cannot be a container's: it would leave runc's root directory.
    #[error("{id:?} is no container name: letters, digits and _+-. only, and neither \".\" nor \"..\"")]
    BadId {
        /// What was given.
        id: String,
    },
    /// runc's `state.json`, or runc's answer, is not what this version of runc writes.
    #[error("{} is not what runc writes: {source}", path.display())]
    State {
        /// The file.
        path: PathBuf,
        /// Where it differs.
        source: serde_json::Error,
    },
    /// The state names no bundle, so the container's OCI configuration cannot be found.
    #[error("{} has no label `bundle`; the container was not made by runc 1.0 or newer", path.display())]
    NoBundle {
        /// The state file.
        path: PathBuf,
    },
    /// The bundle's `config.json` is not a valid OCI runtime configuration.
    #[error("{} is no OCI runtime configuration: {source}", path.display())]
    Spec {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: oci_spec::OciSpecError,
    },
    /// `/proc` could not be read or understood.
    #[error("could not read {what} of process {pid}: {source}")]
    Proc {
        /// The process, in the host's pid namespace; 0 for the whole machine.
        pid: i32,
        /// The file below `/proc/PID`.
        what: &'static str,
        /// Why it failed.
        source: procfs::ProcError,
    },
    /// The container has no process to look at.
    #[error("container {id} is not running")]
    NotRunning {
        /// The container.
        id: String,
    },
    /// The container cannot be frozen: it has no freezer cgroup.
    #[error(
        "the container has no freezer cgroup (only: {known}); mount the v1 freezer controller or use cgroup v2, and \
         start it again"
    )]
    NoFreezer {
        /// The controllers that it does have.
        known: String,
    },
    /// The tasks were not all frozen, or thawed, in time.
    #[error("{} is still {state} {after:?} after {wanted} was asked for", dir.display())]
    FreezerTimeout {
        /// The cgroup's directory.
        dir: PathBuf,
        /// The state that was asked for.
        wanted: &'static str,
        /// The state it is in.
        state: &'static str,
        /// How long was waited.
        after: Duration,
    },
    /// The freezer's state file holds an unknown word.
    #[error("{} says {state:?}, which is no freezer state", path.display())]
    FreezerState {
        /// The file.
        path: PathBuf,
        /// Its content.
        state: String,
    },
    /// The container's CPU time cannot be limited: its cgroup has no cpu controller.
    #[error(
        "no cpu controller in {place}; write +cpu to cgroup.subtree_control of the cgroups above it (v2), or mount the v1 cpu \
         controller and start the container again"
    )]
    NoCpuController {
        /// Where it was looked for.
        place: String,
    },
    /// A file of the cpu controller holds what nobody understands.
    #[error("{} says {text:?}, which is no CPU limit or time", path.display())]
    CpuFile {
        /// The file.
        path: PathBuf,
        /// Its content, as much of it as tells.
        text: String,
    },
    /// runc failed.
    #[error("`runc {command}` failed ({status}): {detail}")]
    Runc {
        /// Its subcommand and the container's name.
        command: String,
        /// How it ended.
        status: String,
        /// What it wrote to its log or to stderr.
        detail: String,
    },
    /// `runc restore` failed; CRIU's log usually says why.
    #[error("restoring container {id} failed ({status}): {detail}")]
    Restore {
        /// The container.
        id: String,
        /// How runc ended.
        status: String,
        /// runc's log and the lines in CRIU's `restore.log` that report errors.
        detail: String,
    },
    /// Processes of a restore that was killed do not go away.
    #[error(
        "processes {pids:?} of the killed restore of {id} are still there; look at /proc/PID/stack, then try again"
    )]
    Parked {
        /// The container.
        id: String,
        /// The processes, in the host's pid namespace.
        pids: Vec<i32>,
    },
    /// Something is still mounted in the container's state directory. Deleting that would delete what is mounted.
    #[error("{} is still mounted; deleting {} would empty it: unmount it first", mount.display(), dir.display())]
    StillMounted {
        /// runc's directory for the container.
        dir: PathBuf,
        /// The mount point in it.
        mount: PathBuf,
    },
    /// A clean-up would kill processes that are not the container's.
    #[error(
        "the cgroup of {id} holds process {pid}, which is no container's: nothing was killed; look at linux.cgroupsPath"
    )]
    SharedCgroup {
        /// The container.
        id: String,
        /// This process, or the system's init.
        pid: i32,
    },
    /// A path that must be absolute is not: runc changes its working directory to the bundle.
    #[error("{} must be an absolute path: runc changes its working directory to the bundle", path.display())]
    RelativePath {
        /// The path.
        path: PathBuf,
    },
    /// The stdio keeper did not start.
    #[error("{} did not start for {}: {detail}", keeper.display(), log.display())]
    Keeper {
        /// The keeper's program.
        keeper: PathBuf,
        /// The log that it should have written.
        log: PathBuf,
        /// Its own words.
        detail: String,
    },
    /// The kernel's list of unix sockets could not be had.
    #[error("could not list the unix sockets in the network namespace of process {pid}: {source}")]
    SockDiag {
        /// A process in that namespace.
        pid: i32,
        /// Why it failed.
        source: io::Error,
    },
}

impl Error {
    /// Wraps an I/O error with what was tried on which path.
    pub(crate) fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Self {
        let path = path.as_ref().to_owned();
        move |source| Self::Io { action, path, source }
    }

    /// Wraps an error in reading `/proc/PID/what`.
    pub(crate) fn proc(pid: i32, what: &'static str) -> impl FnOnce(procfs::ProcError) -> Self {
        move |source| Self::Proc { pid, what, source }
    }

    /// Whether the process or file went away while it was being looked at, which is no failure of anybody.
    pub(crate) fn is_gone(&self) -> bool {
        match self {
            Self::Io { source, .. } => source.kind() == io::ErrorKind::NotFound || source.raw_os_error() == Some(ESRCH),
            Self::Proc { source: procfs::ProcError::NotFound(_), .. } => true,
            Self::Proc { source: procfs::ProcError::Io(source, _), .. } => source.raw_os_error() == Some(ESRCH),
            _ => false,
        }
    }

    /// Whether this failed because the process with this pid has ended, which is no failure of anybody either.
    ///
    /// The links below `/proc/PID` are then refused with `EACCES` where they were found before that end (`proc_ns_readlink` and
    /// `proc_pid_readlink` in the kernel).
    pub(crate) fn says_ended(&self, pid: i32) -> bool {
        let refused = matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::PermissionDenied);
        self.is_gone() || (refused && crate::process::has_stopped_for_good(pid))
    }
}

/// What reading from `/proc/PID` gives once that process has been reaped.
const ESRCH: i32 = rustix::io::Errno::SRCH.raw_os_error();

fn list(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use rustix::fs::{CWD, Mode, OFlags, openat, readlinkat};

    use super::*;

    #[test]
    fn a_link_that_is_refused_because_its_process_ended_says_so() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let links: Vec<_> = ["ns/cgroup", "ns/mnt", "fd/0", "exe"]
            .map(|name| format!("/proc/{pid}/{name}"))
            .map(|path| (openat(CWD, &path, OFlags::PATH | OFlags::NOFOLLOW, Mode::empty()).unwrap(), path))
            .into();
        let refused = |path: &String| Error::io("read the link", path)(io::ErrorKind::PermissionDenied.into());
        assert!(!refused(&links[0].1).says_ended(pid), "it runs: something else refuses");
        child.kill().unwrap();
        child.wait().unwrap();
        for (link, path) in links {
            let errno = readlinkat(&link, "", Vec::new()).unwrap_err();
            assert!(Error::io("read the link", &path)(errno.into()).says_ended(pid), "{path}: {errno}");
        }
    }
}
