//! `criu restore`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::unistd::Pid;
use podferry_criu::{CriuLog, ImageGate};

use crate::error::{Error, Result, file};
use crate::tools;

/// How long CRIU may take to start, and to restore.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often is looked whether it has ended.
const POLL: Duration = Duration::from_micros(500);

/// Restores from `FOLDER/images`. The processes come into a cgroup, if one is given. Gives the number of the first process.
pub fn restore(folder: &Path, cgroup: Option<&Path>) -> Result<Pid> {
    outcome(start(folder, &folder.join("images"), false, cgroup)?, folder)
}

/// A `criu restore` that has started and waits for its images. It ends when this is dropped.
#[derive(Debug)]
pub struct Waiting {
    folder: PathBuf,
    gate: Option<ImageGate>,
    restore: Option<Child>,
}

impl Waiting {
    /// Starts it. The processes come into a cgroup, if one is given. It asks at `FOLDER/restore/lazy-pages.socket` for the pages that the images call lazy.
    pub fn start(folder: &Path, cgroup: Option<&Path>) -> Result<Self> {
        let images = folder.join("target");
        fs::create_dir_all(&images).map_err(file("make", &images))?;
        let gate = ImageGate::new(&images)?;
        let restore = start(folder, &images, true, cgroup)?;
        Ok(Self { folder: folder.to_owned(), gate: Some(gate), restore: Some(restore) })
    }

    /// Waits until it waits. One that has failed is found later, by [`Waiting::finish`].
    pub fn wait(&mut self) -> Result<()> {
        let (Some(gate), Some(restore)) = (&mut self.gate, &mut self.restore) else { return Ok(()) };
        gate.wait(PATIENCE, || restore.try_wait().is_ok_and(|ended| ended.is_none()))?;
        Ok(())
    }

    /// Restores from `FOLDER/images`. Gives the number of the first process.
    pub fn finish(mut self) -> Result<Pid> {
        let (images, target) = (self.folder.join("images"), self.folder.join("target"));
        let mut inventory = Vec::new();
        for image in fs::read_dir(&images).map_err(file("read", &images))? {
            let image = image.map_err(file("read", &images))?;
            let path = image.path();
            if image.file_name() == "inventory.img" {
                inventory = fs::read(&path).map_err(file("read", &path))?;
            } else {
                fs::hard_link(&path, target.join(image.file_name())).map_err(file("link", &path))?;
            }
        }
        let missing = || Error::Program { program: "criu restore", problem: "it was not started".to_owned() };
        self.gate.take().ok_or_else(missing)?.open(&inventory)?;
        outcome(self.restore.take().ok_or_else(missing)?, &self.folder)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        drop(self.gate.take());
        if let Some(mut restore) = self.restore.take() {
            let _failed = restore.wait();
        }
    }
}

fn start(folder: &Path, images: &Path, lazy: bool, cgroup: Option<&Path>) -> Result<Child> {
    let (work, number) = (folder.join("restore"), folder.join("restore/pid"));
    let mut command = within(cgroup, &tools::criu()?);
    command.args(["restore", "--restore-detached", "--manage-cgroups=ignore", "-v1", "--log-file", "restore.log"]);
    command.arg("--pidfile").arg(&number).arg("--images-dir").arg(images).arg("--work-dir").arg(&work);
    if lazy {
        command.arg("--lazy-pages");
    }
    let started = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    started.map_err(file("start", Path::new("criu")))
}

fn outcome(mut restore: Child, folder: &Path) -> Result<Pid> {
    let (work, number) = (folder.join("restore"), folder.join("restore/pid"));
    let status = ended(&mut restore).map_err(file("wait for", Path::new("criu")))?;
    if !status.success() {
        return Err(Error::Restore(CriuLog::of_restore(&work).failure_or(&status.to_string())));
    }
    let text = fs::read_to_string(&number).map_err(file("read", &number))?;
    text.trim().parse().map(Pid::from_raw).map_err(|_| Error::Program { program: "criu", problem: "no pid".to_owned() })
}

/// Waits for the end of a restore, and makes one of what does not end: a CRIU that loses a thread while it lets go of it (the process
/// ran another program at once) kills what it restored, and may then wait for ever for that thread to be reaped.
fn ended(restore: &mut Child) -> std::io::Result<ExitStatus> {
    let begun = Instant::now();
    loop {
        if let Some(status) = restore.try_wait()? {
            return Ok(status);
        }
        if begun.elapsed() > PATIENCE {
            restore.kill()?;
        }
        std::thread::sleep(POLL);
    }
}

/// A program that runs in a cgroup.
fn within(cgroup: Option<&Path>, program: &Path) -> Command {
    let Some(cgroup) = cgroup else { return Command::new(program) };
    let mut command = Command::new("sh");
    command.args(["-c", "echo $$ >\"$1/cgroup.procs\" && shift && exec \"$@\"", "sh"]).arg(cgroup).arg(program);
    command
}
