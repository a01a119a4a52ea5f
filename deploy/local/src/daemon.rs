//! Agents and the coordinator: long-lived processes with a log file and a pid file.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use std::os::unix::process::CommandExt;

use rustix::process::Signal;

use crate::command;
use crate::error::{Error, FileContext, Result};
use crate::process::{self, ProcessId};

/// How long a daemon may take to end after a signal that ends it.
const END_DEADLINE: Duration = Duration::from_secs(60);
/// How many lines of a log an error shows.
const TAIL_LINES: usize = 30;

/// One daemon of the cluster. It knows nothing in memory: every handle sees the same truth in the pid file.
#[derive(Debug, Clone)]
pub(crate) struct Daemon {
    /// For messages: `the agent of node-a`.
    pub(crate) what: String,
    pub(crate) pid_file: PathBuf,
    pub(crate) log: PathBuf,
    pub(crate) port: u16,
    /// Whether the program that is started (`nsenter`) forks the daemon instead of becoming it.
    pub(crate) forked: bool,
}

impl Daemon {
    pub(crate) fn process(&self) -> Option<ProcessId> {
        process::read_pid_file(&self.pid_file)
    }

    pub(crate) fn require(&self) -> Result<ProcessId> {
        self.process().ok_or_else(|| Error::NotRunning { what: self.what.clone() })
    }

    /// Starts it, unless it runs. Its log goes on where it was.
    pub(crate) fn start(&self, command: &mut Command) -> Result<ProcessId> {
        if let Some(running) = self.process() {
            return Ok(running);
        }
        let log = File::options().create(true).append(true).open(&self.log).at("open the log", &self.log)?;
        let errors = log.try_clone().at("open the log", &self.log)?;
        // A group of its own: the terminal's Ctrl-C is for the one who typed it.
        let mut child = command
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors)
            .process_group(0)
            .spawn()
            .map_err(|source| Error::Start { command: command::line(command), source })?;
        let parent = child.id();
        let process = if self.forked { process::only_child(parent, END_DEADLINE) } else { ProcessId::of(parent) };
        // Somebody has to collect it, whenever it ends.
        thread::spawn(move || child.wait());
        let process = process.ok_or_else(|| self.not_ready("it ended at once"))?;
        process::write_pid_file(&self.pid_file, process)?;
        Ok(process)
    }

    /// Sends a signal; after one that ends a process, waits until it has ended.
    pub(crate) fn kill(&self, signal: Signal) -> Result<()> {
        let process = self.require()?;
        process.signal(signal);
        let ends = [Signal::KILL, Signal::TERM, Signal::INT, Signal::ABORT].contains(&signal);
        if ends && !process.wait_gone(END_DEADLINE) {
            return Err(Error::LeftBehind { what: self.what.clone(), seconds: END_DEADLINE.as_secs() });
        }
        Ok(())
    }

    /// Waits until it listens on its port.
    pub(crate) fn wait_ready(&self, deadline: Duration) -> Result<()> {
        let end = Instant::now() + deadline;
        loop {
            let process = self.process().ok_or_else(|| self.not_ready("it is not running"))?;
            if process::listens(process.pid, self.port) {
                return Ok(());
            }
            if Instant::now() >= end {
                let reason = format!("it does not listen on port {} after {deadline:?}", self.port);
                return Err(self.not_ready(&reason));
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn not_ready(&self, reason: &str) -> Error {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let tail = lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n");
        Error::NotReady { what: self.what.clone(), reason: reason.to_owned(), log: self.log.clone(), tail }
    }
}
