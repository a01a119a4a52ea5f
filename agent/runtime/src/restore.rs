//! `runc restore`, started and then watched: CRIU's hook holds it until the migration is committed.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::mount::{UnmountFlags, mount_bind_recursive, unmount};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::Deserialize;

use crate::container::{Init, check_id};
use crate::error::Error;
use crate::launch::{Invocation, Launched, Launcher};
use crate::leftovers::{self, Record};
use crate::process::read_if_there;
use crate::runc::{Runc, remove_file};

/// What the container's stdin, stdout and stderr become.
#[derive(Debug)]
pub enum RestoreStdio {
    /// `/dev/null`, for a container whose stdio was no pipe.
    Null,
    /// These: they take the place of the pipes that `descriptors.json` names.
    Fds {
        /// Standard input.
        stdin: OwnedFd,
        /// Standard output.
        stdout: OwnedFd,
        /// Standard error.
        stderr: OwnedFd,
    },
}

/// How CRIU treats cgroups (`runc restore --manage-cgroups-mode`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CgroupsMode {
    /// Not at all: the tasks stay in the cgroup that runc made. The fastest.
    #[default]
    Ignore,
    /// Properties are restored if CRIU made the cgroup.
    Soft,
    /// Always restored.
    Full,
    /// Restored, and an existing cgroup is an error.
    Strict,
}

impl CgroupsMode {
    fn name(self) -> &'static str {
        match self {
            Self::Ignore => "ignore",
            Self::Soft => "soft",
            Self::Full => "full",
            Self::Strict => "strict",
        }
    }
}

/// What to restore, and how.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is one independent flag of `runc restore`")]
pub struct RestoreRequest {
    /// The container's name.
    pub id: String,
    /// Its OCI bundle on this machine.
    pub bundle: PathBuf,
    /// CRIU's images. Absolute.
    pub image_path: PathBuf,
    /// Where CRIU logs and keeps `lazy-pages.socket`. Absolute; made if it does not exist.
    pub work_path: PathBuf,
    /// Where runc writes the pid of the restored init.
    pub pid_file: Option<PathBuf>,
    /// Standard descriptors.
    pub stdio: RestoreStdio,
    /// Whether established connections are restored.
    pub tcp_established: bool,
    /// Whether file locks are restored.
    pub file_locks: bool,
    /// Whether missing pages come from a server at `WORK_PATH/lazy-pages.socket`.
    pub lazy_pages: bool,
    /// How CRIU treats cgroups.
    pub cgroups_mode: CgroupsMode,
    /// Environment for runc, CRIU and CRIU's hooks: `CRIU_CONFIG_FILE`, and what `podferry-hook` reads.
    pub env: Vec<(OsString, OsString)>,
    /// Whether runc exits once the container runs. Without it runc stays its parent until it ends, and its exit status is the
    /// container's.
    pub detach: bool,
    /// Who starts it; none for this process. Standard descriptors and pid file are that one's, then.
    pub launcher: Option<Arc<dyn Launcher>>,
}

/// A `runc restore` under way. It has to be waited for, else its process stays a zombie.
#[derive(Debug)]
pub struct RunningRestore {
    /// The pid of the `runc restore` process.
    pub pid: u32,
    runs: Box<dyn Launched>,
    runc: Runc,
    id: String,
    bundle: PathBuf,
    work_path: PathBuf,
}

/// From the end of another process's child to its word of that.
const SAID_SOON: Duration = Duration::from_millis(1);
const RUNC_LOG: &str = "runc-restore.log";
const CRIU_LOG: &str = "restore.log";

impl Runc {
    /// Starts restoring a container, and returns while CRIU is at work.
    pub fn restore(&self, request: RestoreRequest) -> Result<RunningRestore, Error> {
        check_id(&request.id)?;
        for path in [&request.bundle, &request.image_path, &request.work_path].into_iter().chain(&request.pid_file) {
            if !path.is_absolute() {
                return Err(Error::RelativePath { path: path.clone() });
            }
        }
        fs::create_dir_all(&request.work_path).map_err(Error::io("make", &request.work_path))?;
        let log = request.work_path.join(RUNC_LOG);
        // Both are appended to, or left alone when CRIU does not get that far: old words must not explain a new failure.
        remove_file(&log)?;
        remove_file(&request.work_path.join(CRIU_LOG))?;
        Record { work_path: request.work_path.clone() }.write(self, &request.id)?;
        let mut command = self.command();
        command.arg("--log").arg(&log).args(["--log-format", "json", "restore"]);
        command.arg("--bundle").arg(&request.bundle);
        command.arg("--image-path").arg(&request.image_path);
        command.arg("--work-path").arg(&request.work_path);
        command.args(["--manage-cgroups-mode", request.cgroups_mode.name()]);
        if let Some(file) = &request.pid_file {
            command.arg("--pid-file").arg(file);
        }
        for (wanted, flag) in [
            (request.detach, "--detach"),
            (request.tcp_established, "--tcp-established"),
            (request.file_locks, "--file-locks"),
            (request.lazy_pages, "--lazy-pages"),
        ] {
            if wanted {
                command.arg(flag);
            }
        }
        command.arg(&request.id).envs(request.env);
        let runs = match request.launcher {
            Some(launcher) => launcher.launch(Invocation::of(&command)),
            None => spawn(command, request.stdio),
        };
        let runs = runs.map_err(Error::io("start", self.binary()))?;
        Ok(RunningRestore {
            pid: runs.pid(),
            runs,
            runc: self.clone(),
            id: request.id,
            bundle: request.bundle,
            work_path: request.work_path,
        })
    }
}

fn spawn(mut command: Command, stdio: RestoreStdio) -> io::Result<Box<dyn Launched>> {
    let (stdin, stdout, stderr) = match stdio {
        RestoreStdio::Null => (Stdio::null(), Stdio::null(), Stdio::null()),
        RestoreStdio::Fds { stdin, stdout, stderr } => (stdin.into(), stdout.into(), stderr.into()),
    };
    Ok(Box::new(command.stdin(stdin).stdout(stdout).stderr(stderr).spawn()?))
}

impl Runc {
    /// The work folder of the restore of a container that is under way, or was killed or failed and is not cleaned up.
    pub fn restores_from(&self, id: &str) -> Result<Option<PathBuf>, Error> {
        check_id(id)?;
        Ok(Record::read(self, id)?.map(|record| record.work_path))
    }

    /// Removes the note of a restore that has come to its end, for whoever did not start it and so cannot wait for it.
    pub fn forget_restore(&self, id: &str) -> Result<(), Error> {
        check_id(id)?;
        Record::remove(self, id)
    }
}

impl RunningRestore {
    /// Waits until runc exits. An error means that the restore failed and CRIU has undone it.
    pub fn wait(&mut self) -> Result<(), Error> {
        let status = self.status()?;
        self.judge(status)
    }

    fn status(&mut self) -> Result<ExitStatus, Error> {
        loop {
            if let Some(status) = self.runs.try_wait().map_err(Error::io("wait for", self.runc.binary()))? {
                return Ok(status);
            }
            self.poll_exit(None)?;
        }
    }

    /// Whether runc has exited, and well. `false` while it is still at work or held.
    pub fn try_wait(&mut self) -> Result<bool, Error> {
        match self.runs.try_wait() {
            Ok(Some(status)) => self.judge(status).map(|()| true),
            Ok(None) => Ok(false),
            Err(source) if source.kind() == io::ErrorKind::BrokenPipe => Err(Error::LauncherGone { source }),
            Err(source) => Err(Error::io("wait for", self.runc.binary())(source)),
        }
    }

    /// Waits until runc exits, but not beyond `deadline`: `false` means that it is still at work or held.
    pub fn wait_until(&mut self, deadline: Instant) -> Result<bool, Error> {
        loop {
            if self.try_wait()? {
                return Ok(true);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            self.poll_exit(Some(left))?;
        }
    }

    /// Gives CRIU what is mounted on the bundle's root directory now, in place of what was mounted there when runc began. CRIU must
    /// not have come so far as to look: see `podferry_criu::ImageGate`.
    pub fn renew_root(&self, rootfs: &Path) -> Result<(), Error> {
        // runc binds the root there for CRIU, and unmounts it when CRIU is done.
        let point = self.runc.root.join(&self.id).join("criu-root");
        unmount(&point, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
            .and_then(|()| mount_bind_recursive(rootfs, &point))
            .map_err(|errno| Error::io("mount the root filesystem on", &point)(errno.into()))
    }

    /// Ends a restore that does not end by itself, and removes all that it made except the root filesystem's content.
    ///
    /// The gentle way is to let the hook fail; this is for a CRIU that hangs. After a commit it destroys the workload.
    pub fn kill_and_clean(&mut self) -> Result<(), Error> {
        let family = leftovers::family(self.pid.cast_signed());
        if let Some(runc) = Init::of_pid(self.pid.cast_signed())
            && self.runs.try_wait().is_ok_and(|status| status.is_none())
        {
            runc.kill();
        }
        self.status()?;
        family.into_iter().for_each(Init::kill);
        self.runc.cleanup_killed_restore(&self.id, &self.bundle)
    }

    fn poll_exit(&self, left: Option<Duration>) -> Result<(), Error> {
        let failed = |errno: rustix::io::Errno| Error::io("wait for", self.runc.binary())(errno.into());
        // Not known to have ended: the pid of a child is still ours, and another's is at worst that of a later process, for which is
        // waited too long once.
        let Some(pid) = Pid::from_raw(self.pid.cast_signed()) else { return Ok(()) };
        let descriptor = match pidfd_open(pid, PidfdFlags::empty()) {
            // It was another's, and who waits for it is about to say so.
            Err(rustix::io::Errno::SRCH) => {
                sleep(SAID_SOON);
                return Ok(());
            }
            opened => opened.map_err(failed)?,
        };
        let timeout = left.and_then(|left| rustix::event::Timespec::try_from(left).ok());
        match poll(&mut [PollFd::new(&descriptor, PollFlags::IN)], timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(errno) => Err(failed(errno)),
        }
    }

    fn judge(&self, status: ExitStatus) -> Result<(), Error> {
        if status.success() {
            if let Err(error) = Record::remove(&self.runc, &self.id) {
                tracing::warn!(%error, id = self.id, "the note of a restore that succeeded stays");
            }
            return Ok(());
        }
        let mut detail = runc_errors(&self.work_path.join(RUNC_LOG))?;
        detail.extend(criu_errors(&self.work_path.join(CRIU_LOG))?);
        if detail.is_empty() {
            detail.push(format!("no log in {}", self.work_path.display()));
        }
        Err(Error::Restore { id: self.id.clone(), status: status.to_string(), detail: detail.join("; ") })
    }
}

/// Lines of runc's JSON log that report an error.
pub(crate) fn runc_errors(log: &Path) -> Result<Vec<String>, Error> {
    #[derive(Deserialize)]
    struct Line {
        level: String,
        msg: String,
    }
    let text = read_if_there(log)?.unwrap_or_default();
    let lines = text.lines().filter_map(|line| serde_json::from_str::<Line>(line).ok());
    Ok(lines.filter(|line| matches!(line.level.as_str(), "error" | "fatal" | "panic")).map(|line| line.msg).collect())
}

/// Lines of CRIU's log that report an error, and what the hook says; the last ones, for CRIU goes from cause to effect.
fn criu_errors(log: &Path) -> Result<Vec<String>, Error> {
    /// Enough for a cause and what follows from it.
    const MOST: usize = 8;
    let text = read_if_there(log)?.unwrap_or_default();
    let telling = |line: &&str| {
        // Without CAP_SYS_RESOURCE CRIU cannot raise its own limit, says so as an error, and goes on.
        (line.contains("Error (") && !line.contains("Can't setup RLIMIT_NOFILE for self"))
            || line.contains("podferry-hook:")
    };
    let lines: Vec<String> = text.lines().filter(telling).map(|line| line.trim().to_owned()).collect();
    Ok(lines[lines.len().saturating_sub(MOST)..].to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logs_say_why_and_leave_the_harmless_out() {
        let dir = tempfile::tempdir().unwrap();
        let criu = dir.path().join(CRIU_LOG);
        fs::write(
            &criu,
            "(00.01) Error (criu/util.c:1534): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted\n\
             (00.02) mnt: fine\n(00.03) Error (criu/files.c:1): Can't open file\npodferry-hook: restore is aborted: x\n",
        )
        .unwrap();
        assert_eq!(
            criu_errors(&criu).unwrap(),
            ["(00.03) Error (criu/files.c:1): Can't open file", "podferry-hook: restore is aborted: x"]
        );
        let runc = dir.path().join(RUNC_LOG);
        fs::write(
            &runc,
            "{\"level\":\"warning\",\"msg\":\"w\"}\nnoise\n{\"level\":\"error\",\"msg\":\"criu failed\"}\n",
        )
        .unwrap();
        assert_eq!(runc_errors(&runc).unwrap(), ["criu failed"]);
        assert_eq!(runc_errors(&dir.path().join("none")).unwrap(), Vec::<String>::new());
    }
}
