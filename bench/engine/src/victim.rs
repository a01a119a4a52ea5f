//! A process that is migrated: the first of a pid namespace of its own.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::unistd::Pid;
use rustix::process::{PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::error::{Error, Result, file};

/// How long it may take to begin.
const PATIENCE: Duration = Duration::from_secs(120);

/// The process, and the folder in memory where its migrations keep their images. Everything is gone when it is dropped.
#[derive(Debug)]
pub struct Victim {
    /// The `unshare` that started it; it ends with it.
    launcher: Option<Child>,
    pid: Pid,
    /// Stays its own when its number is given to another.
    handle: OwnedFd,
    folder: tempfile::TempDir,
    hops: u32,
    /// Where its copies are put.
    cgroup: Option<PathBuf>,
}

impl Victim {
    /// Starts a program; its standard error goes to `stderr` in the folder, and the file it is given as its first argument
    /// must appear before it counts as begun.
    pub fn start(program: &Path, arguments: &[String]) -> Result<Self> {
        let memory = Path::new("/dev/shm");
        let folder = tempfile::Builder::new().prefix("podferry-engine-").tempdir_in(memory);
        let folder = folder.map_err(file("make a folder in", memory))?;
        let (sign, errors) = (folder.path().join("sign"), folder.path().join("stderr"));
        // CRIU mounts a /proc of the namespace's own in the working directory: not in one that others share.
        let mut launcher = Command::new("unshare")
            // Its standard error is its own: unshare writes to its one when the process is killed, and CRIU does not restore a
            // file that has grown since.
            .args(["--pid", "--fork", "setsid", "sh", "-c", "exec \"$@\" 2>stderr", "sh"])
            .arg(program)
            .arg(&sign)
            .args(arguments)
            .current_dir(folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(file("start", Path::new("unshare")))?;
        let begun = Instant::now();
        while !sign.exists() {
            let ended = launcher.try_wait().ok().flatten();
            if ended.is_some() || begun.elapsed() > PATIENCE {
                let said = fs::read_to_string(&errors).unwrap_or_default();
                let _gone = launcher.kill();
                return Err(Error::Program { program: "victim", problem: format!("did not begin: {said}") });
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        let children = format!("/proc/{0}/task/{0}/children", launcher.id());
        let list = fs::read_to_string(&children).map_err(file("read", Path::new(&children)))?;
        let number = list.trim().parse().unwrap_or(0);
        let pid = Pid::from_raw(number);
        Ok(Self { launcher: Some(launcher), pid, handle: open(pid)?, folder, hops: 0, cgroup: None })
    }

    /// Puts its copies into a cgroup of their own from now on, which is gone with it. Gives the directory.
    pub fn use_cgroup(&mut self) -> Result<PathBuf> {
        let name = format!("podferry-engine-{}", self.folder.path().file_name().unwrap_or_default().display());
        // Any hierarchy of version 1 will do; with version 2 there is but one.
        let hierarchies = ["/sys/fs/cgroup/pids", "/sys/fs/cgroup/freezer", "/sys/fs/cgroup"].map(Path::new);
        let hierarchy = hierarchies.into_iter().find(|path| path.join("cgroup.procs").exists());
        let path = hierarchy.unwrap_or(Path::new("/sys/fs/cgroup")).join(name);
        fs::create_dir(&path).map_err(file("make", &path))?;
        self.cgroup = Some(path.clone());
        Ok(path)
    }

    /// Where its copies are put.
    pub fn cgroup(&self) -> Option<&Path> {
        self.cgroup.as_deref()
    }

    /// Its number now.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// The file that it was given.
    pub fn sign(&self) -> PathBuf {
        self.folder.path().join("sign")
    }

    /// What it wrote to standard error.
    pub fn errors(&self) -> String {
        fs::read_to_string(self.folder.path().join("stderr")).unwrap_or_default()
    }

    /// Whether it runs.
    pub fn is_alive(&self) -> bool {
        !crate::tree::is_zombie(self.pid) && self.pid.as_raw() > 0
    }

    /// Lets an engine load look at all of its memory; fails when a byte is wrong.
    pub fn check(&self) -> Result<()> {
        let (asked, answer) = (self.sign().with_extension("check"), self.sign().with_extension("checked"));
        File::create(&asked).map_err(file("make", &asked))?;
        let begun = Instant::now();
        let bad = loop {
            match fs::read_to_string(&answer) {
                Ok(bad) => break bad,
                Err(_) if self.is_alive() && begun.elapsed() < PATIENCE => std::thread::sleep(Duration::from_millis(1)),
                Err(error) => return Err(file("read", &answer)(error)),
            }
        };
        fs::remove_file(&answer).map_err(file("remove", &answer))?;
        if bad == "0" {
            return Ok(());
        }
        Err(Error::Program { program: "victim", problem: format!("{bad} of its pages are wrong: {}", self.errors()) })
    }

    /// Where its next migration keeps its images.
    pub fn upcoming_folder(&self) -> PathBuf {
        self.folder.path().join(format!("hop-{}", self.hops + 1))
    }

    /// A fresh folder for the images of its next migration.
    pub fn next_folder(&mut self) -> Result<PathBuf> {
        let folder = self.upcoming_folder();
        self.hops += 1;
        for name in ["images", "work", "restore", "handover"] {
            let path = folder.join(name);
            fs::create_dir_all(&path).map_err(file("make", &path))?;
        }
        Ok(folder)
    }

    /// It is this process from now on.
    pub fn moved(&mut self, pid: Pid) -> Result<()> {
        self.handle = open(pid)?;
        self.pid = pid;
        if let Some(mut launcher) = self.launcher.take() {
            let _reaped = launcher.wait();
        }
        Ok(())
    }
}

fn open(pid: Pid) -> Result<OwnedFd> {
    let path = format!("/proc/{pid}");
    let number = rustix::process::Pid::from_raw(pid.as_raw());
    let number = number.ok_or_else(|| Error::Program { program: "victim", problem: "it is gone".to_owned() })?;
    pidfd_open(number, PidfdFlags::empty()).map_err(|error| file("open", Path::new(&path))(error.into()))
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _gone = pidfd_send_signal(&self.handle, Signal::KILL);
        if let Some(mut launcher) = self.launcher.take() {
            let _gone = launcher.kill();
            let _reaped = launcher.wait();
        }
        if let Some(cgroup) = &self.cgroup {
            let begun = Instant::now();
            while fs::remove_dir(cgroup).is_err() && begun.elapsed() < Duration::from_secs(5) {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }
}
