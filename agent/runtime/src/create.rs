//! `runc create` and `runc start`: a container that is made anew from its bundle, and waits before its first instruction.
//!
//! Between the two its init waits at runc's `exec.fifo` for somebody to read from it. It outlives whoever created it, and all that
//! can be wrong with it but for its own doing has been found: mounts, cgroup, network namespace, a program that is missing.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use procfs::process::{Process, all_processes};

use crate::container::{Container, check_id};
use crate::error::Error;
use crate::leftovers::Record;
use crate::restore::runc_errors;
use crate::runc::{Runc, remove_file};
use crate::stdio::ContainerStdio;

/// Between two looks at runc.
const POLL: Duration = Duration::from_millis(2);
/// How long runc may take to start what it has created: it reads one byte.
const START: Duration = Duration::from_secs(10);

/// What to create.
#[derive(Debug)]
pub struct CreateRequest {
    /// The container's name.
    pub id: String,
    /// Its OCI bundle on this machine. Absolute.
    pub bundle: PathBuf,
    /// Standard descriptors.
    pub stdio: ContainerStdio,
    /// Where runc logs; its own standard error is the container's. Absolute.
    pub log: PathBuf,
    /// Noted beside runc's state until it is started: whose container this is ([`Runc::restores_from`]).
    pub note: Option<PathBuf>,
    /// How long runc may take.
    pub patience: Duration,
}

impl Runc {
    /// Creates a container and returns when its init waits for [`Runc::start`]; blocks. What is left of one that fails is for
    /// [`Runc::cleanup_killed_restore`].
    pub fn create(&self, request: CreateRequest) -> Result<(), Error> {
        let CreateRequest { id, bundle, stdio, log, note, patience } = request;
        check_id(&id)?;
        for path in [&bundle, &log] {
            if !path.is_absolute() {
                return Err(Error::RelativePath { path: path.clone() });
            }
        }
        // It is appended to: old words must not explain a new failure.
        remove_file(&log)?;
        if let Some(work_path) = note {
            Record { work_path }.write(self, &id)?;
        }
        let mut command = self.command();
        command.arg("--log").arg(&log).args(["--log-format", "json", "create", "--bundle"]).arg(&bundle).arg(&id);
        command.stdin(stdio.stdin).stdout(stdio.stdout).stderr(stdio.stderr);
        let ended = self.run_within(command, patience)?;
        judge(ended, &format!("create {id}"), &log)
    }

    /// Lets a created container run; blocks.
    pub fn start(&self, id: &str, log: &Path) -> Result<(), Error> {
        check_id(id)?;
        remove_file(log)?;
        let mut command = self.command();
        command.arg("--log").arg(log).args(["--log-format", "json", "start", id]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let ended = self.run_within(command, START)?;
        judge(ended, &format!("start {id}"), log)?;
        if let Err(error) = Record::remove(self, id) {
            tracing::warn!(%error, id, "the note of a container that was started stays");
        }
        Ok(())
    }

    /// Whether a runc works on this container that somebody else has started, an agent that was killed for example.
    pub fn is_at_work(&self, id: &str) -> bool {
        const COMMANDS: [&str; 3] = ["create", "start", "delete"];
        let (root, binary) = (self.root.to_string_lossy(), self.binary().to_string_lossy());
        let works = |words: Vec<String>| {
            words.first().is_some_and(|first| *first == binary)
                && words.last().is_some_and(|last| last == id)
                && words.contains(&root.clone().into_owned())
                && words.iter().any(|word| COMMANDS.contains(&word.as_str()))
        };
        let Ok(processes) = all_processes() else { return false };
        processes.flatten().any(|process| process.cmdline().is_ok_and(works))
    }

    /// Waits until nobody else's runc works on this container; false when one still does then. Blocks.
    pub fn wait_for_others(&self, id: &str, patience: Duration) -> bool {
        let end = Instant::now() + patience;
        while self.is_at_work(id) {
            if Instant::now() >= end {
                return false;
            }
            sleep(POLL);
        }
        true
    }

    /// `None` when it took too long, and was killed.
    fn run_within(&self, mut command: Command, patience: Duration) -> Result<Option<ExitStatus>, Error> {
        let mut child = command.spawn().map_err(Error::io("start", self.binary()))?;
        // The container's own output is its keeper's to hold, not ours.
        drop(command);
        let waited = self.wait_within(&mut child, patience);
        if !matches!(waited, Ok(Some(_))) {
            let _gone_already = child.kill();
            child.wait().map_err(Error::io("wait for", self.binary()))?;
        }
        waited
    }

    fn wait_within(&self, child: &mut Child, patience: Duration) -> Result<Option<ExitStatus>, Error> {
        let end = Instant::now() + patience;
        loop {
            match child.try_wait().map_err(Error::io("wait for", self.binary()))? {
                None if Instant::now() < end => sleep(POLL),
                ended => return Ok(ended),
            }
        }
    }
}

fn judge(ended: Option<ExitStatus>, command: &str, log: &Path) -> Result<(), Error> {
    let status = match ended {
        Some(status) if status.success() => return Ok(()),
        Some(status) => status.to_string(),
        None => "took too long, and was killed".to_owned(),
    };
    Err(Error::Runc { command: command.to_owned(), status, detail: runc_errors(log)?.join("; ") })
}

impl Container {
    /// Whether its init waits before its first instruction. A `runc start` that was killed may leave the fifo of one that runs.
    pub fn awaits_start(&self) -> bool {
        let Some(init) = self.init.filter(|init| init.is_alive()) else { return false };
        let words = Process::new(init.pid).and_then(|process| process.cmdline()).unwrap_or_default();
        let is_runc = words.len() == 2 && words[0].ends_with("runc") && words[1] == "init";
        is_runc && self.has_fifo()
    }

    /// Whether it was created, and ended before anybody started it.
    pub fn ended_unstarted(&self) -> bool {
        !self.is_alive() && self.has_fifo()
    }

    fn has_fifo(&self) -> bool {
        self.state_dir().join("exec.fifo").exists()
    }
}
