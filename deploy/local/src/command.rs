//! Running programs with a deadline and with errors that say what was run.

use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::process;

/// How long a program that only sets something up may take.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// What a program that ended left.
#[derive(Debug, Clone)]
pub struct Output {
    /// The command line, for messages.
    pub command: String,
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output, invalid UTF-8 replaced.
    pub stdout: String,
    /// Its standard error, invalid UTF-8 replaced.
    pub stderr: String,
}

impl Output {
    /// Its standard output when it ended with 0, else [`Error::Command`].
    pub fn success(self) -> Result<String> {
        if self.status.success() {
            return Ok(self.stdout);
        }
        let words = if self.stderr.trim().is_empty() { &self.stdout } else { &self.stderr };
        Err(Error::Command {
            command: self.command,
            status: describe_status(self.status),
            stderr: words.trim().to_owned(),
        })
    }
}

fn describe_status(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => status.to_string(),
    }
}

/// The command line as a person would type it, without quoting.
pub(crate) fn line(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|argument| argument.to_string_lossy().into_owned()));
    words.join(" ")
}

/// Runs `command` to its end, at most [`DEADLINE`], and collects what it wrote. Standard input is empty.
pub fn run(command: &mut Command) -> Result<Output> {
    run_within(command, DEADLINE)
}

/// As [`run`], with a deadline of one's own. What is still running then is killed, also below `nsenter`.
pub fn run_within(command: &mut Command, deadline: Duration) -> Result<Output> {
    let text = line(command);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|source| Error::Start { command: text.clone(), source })?;
    let stdout = child.stdout.take().map(collect);
    let stderr = child.stderr.take().map(collect);
    let Some(status) = wait_within(&mut child, deadline) else {
        process::kill_tree(child.id());
        let _ = child.wait();
        return Err(Error::Timeout { command: text, seconds: deadline.as_secs() });
    };
    Ok(Output { command: text, status, stdout: joined(stdout), stderr: joined(stderr) })
}

fn collect(mut stream: impl Read + Send + 'static) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        // A stream that breaks off still shows what came before.
        let _ = stream.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

fn joined(reader: Option<thread::JoinHandle<String>>) -> String {
    reader.and_then(|handle| handle.join().ok()).unwrap_or_default()
}

/// Waits for a child; `None` when the deadline passed first.
pub(crate) fn wait_within(child: &mut Child, deadline: Duration) -> Option<ExitStatus> {
    let end = Instant::now() + deadline;
    let mut pause = Duration::from_micros(500);
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status),
            // Cannot happen for a child of ours that nobody else waits for; treated as hanging.
            Err(_) => return None,
            Ok(None) if Instant::now() >= end => return None,
            Ok(None) => thread::sleep(pause),
        }
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

/// Runs an `ip` command given as words separated by blanks.
pub(crate) fn ip(words: &str) -> Result<String> {
    run(Command::new("ip").args(words.split_whitespace()))?.success()
}
