//! Freezing a container through its cgroup, in either version.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use procfs::process::Process;

use crate::cgroup::CgroupPaths;
use crate::container::Container;
use crate::error::Error;

/// Whether a cgroup's tasks run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FreezerState {
    /// They run.
    Thawed,
    /// Some are stopped, some are not yet.
    Freezing,
    /// All are stopped.
    Frozen,
}

impl FreezerState {
    fn name(self) -> &'static str {
        match self {
            Self::Thawed => "thawed",
            Self::Freezing => "freezing",
            Self::Frozen => "frozen",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    /// `freezer.state` holds THAWED, FREEZING or FROZEN.
    V1,
    /// `cgroup.freeze` is written, `cgroup.events` tells when it is done.
    V2,
}

/// Stops and continues all tasks of a cgroup.
#[derive(Debug, Clone)]
pub struct Freezer {
    dir: PathBuf,
    version: Version,
    cgroups: CgroupPaths,
}

/// Between two looks at the freezer. Freezing an idle container takes well below a millisecond.
const POLL: Duration = Duration::from_micros(200);

/// A v1 freezer can stay FREEZING while tasks fork; the kernel's documentation says to write FROZEN again.
const AGAIN: Duration = Duration::from_millis(20);

impl Freezer {
    /// The freezer of a container.
    pub fn of(container: &Container) -> Result<Self, Error> {
        Self::at(container.cgroups.clone())
    }

    /// The freezer of a cgroup.
    pub fn at(cgroups: CgroupPaths) -> Result<Self, Error> {
        let (dir, version) = match &cgroups {
            CgroupPaths::V2(dir) => (dir.clone(), Version::V2),
            CgroupPaths::V1(paths) => {
                let known = || paths.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
                let dir = paths.get("freezer").ok_or_else(|| Error::NoFreezer { known: known() })?;
                (dir.clone(), Version::V1)
            }
        };
        Ok(Self { dir, version, cgroups })
    }

    /// The cgroup's directory, as CRIU's `freeze_cgroup` wants it.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Stops all tasks and waits until they are stopped. If that takes longer than `timeout`, they are let go again.
    pub fn freeze(&self, timeout: Duration) -> Result<(), Error> {
        let frozen = self.reach(FreezerState::Frozen, timeout);
        if frozen.is_err()
            && let Err(error) = self.request(FreezerState::Thawed)
        {
            tracing::error!(cgroup = %self.dir.display(), %error, "tasks stay frozen after a failed freeze");
        }
        frozen
    }

    /// Lets all tasks go on and waits until they do.
    pub fn thaw(&self, timeout: Duration) -> Result<(), Error> {
        self.reach(FreezerState::Thawed, timeout)
    }

    /// What the tasks are in now.
    pub fn state(&self) -> Result<FreezerState, Error> {
        match self.version {
            Version::V1 => self.state_v1(),
            Version::V2 => self.state_v2(),
        }
    }

    /// Whether a task of the cgroup has been killed and cannot die, because it is frozen: a v1 freezer holds even
    /// those, until it is thawed.
    pub fn holds_killed_tasks(&self) -> Result<bool, Error> {
        if self.state()? == FreezerState::Thawed {
            return Ok(false);
        }
        Ok(self.cgroups.processes()?.into_iter().any(has_pending_kill))
    }

    fn reach(&self, wanted: FreezerState, timeout: Duration) -> Result<(), Error> {
        let start = Instant::now();
        let mut asked = start;
        self.request(wanted)?;
        loop {
            let state = self.state()?;
            if state == wanted {
                return Ok(());
            }
            if start.elapsed() >= timeout {
                return Err(Error::FreezerTimeout {
                    dir: self.dir.clone(),
                    wanted: wanted.name(),
                    state: state.name(),
                    after: timeout,
                });
            }
            sleep(POLL);
            if asked.elapsed() >= AGAIN {
                asked = Instant::now();
                self.request(wanted)?;
            }
        }
    }

    fn request(&self, state: FreezerState) -> Result<(), Error> {
        let freeze = state != FreezerState::Thawed;
        let (file, word) = match self.version {
            Version::V1 => ("freezer.state", if freeze { "FROZEN" } else { "THAWED" }),
            Version::V2 => ("cgroup.freeze", if freeze { "1" } else { "0" }),
        };
        let path = self.dir.join(file);
        fs::write(&path, word).map_err(Error::io("write", path))
    }

    fn state_v1(&self) -> Result<FreezerState, Error> {
        let path = self.dir.join("freezer.state");
        let text = fs::read_to_string(&path).map_err(Error::io("read", &path))?;
        match text.trim() {
            "THAWED" => Ok(FreezerState::Thawed),
            "FREEZING" => Ok(FreezerState::Freezing),
            "FROZEN" => Ok(FreezerState::Frozen),
            other => Err(Error::FreezerState { path, state: other.to_owned() }),
        }
    }

    fn state_v2(&self) -> Result<FreezerState, Error> {
        let path = self.dir.join("cgroup.freeze");
        let asked = fs::read_to_string(&path).map_err(Error::io("read", &path))?;
        let path = self.dir.join("cgroup.events");
        let events = fs::read_to_string(&path).map_err(Error::io("read", &path))?;
        let frozen = events.lines().any(|line| line == "frozen 1");
        match (asked.trim(), frozen) {
            (_, true) => Ok(FreezerState::Frozen),
            ("0", false) => Ok(FreezerState::Thawed),
            ("1", false) => Ok(FreezerState::Freezing),
            (other, false) => {
                Err(Error::FreezerState { path: self.dir.join("cgroup.freeze"), state: other.to_owned() })
            }
        }
    }
}

/// Whether SIGKILL waits for any of the process's threads.
fn has_pending_kill(pid: i32) -> bool {
    const KILL: u64 = 1 << (9 - 1);
    let Ok(tasks) = Process::new(pid).and_then(|process| process.tasks()) else { return false };
    tasks.flatten().filter_map(|task| task.status().ok()).any(|status| (status.sigpnd | status.shdpnd) & KILL != 0)
}
