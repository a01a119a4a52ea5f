//! Where programs of the cluster run: a network namespace (client, coordinator, fabric) or all namespaces of a node.

use std::ffi::OsStr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::Signal;

use crate::command::{self, Output};
use crate::error::{Error, Result};
use crate::network;
use crate::process::{self, ProcessId};

/// How long `nsenter` may take to fork.
const FORK_DEADLINE: Duration = Duration::from_secs(10);

/// A side of the cluster that programs can be run on.
#[derive(Debug, Clone)]
pub struct Place {
    name: String,
    netns: String,
    /// A node's first process, whose namespaces are entered; otherwise only the network namespace is.
    init: Option<ProcessId>,
    tools: PathBuf,
}

impl Place {
    pub(crate) fn new(name: &str, netns: String, init: Option<ProcessId>, tools: &Path) -> Self {
        Self { name: name.to_owned(), netns, init, tools: tools.to_owned() }
    }

    /// What it is called: `client`, `node-a`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The name of its network namespace, as `ip netns` knows it.
    pub fn netns(&self) -> &str {
        &self.netns
    }

    /// The first process of the node's pid namespace; `None` where there is none of its own.
    pub fn init(&self) -> Option<ProcessId> {
        self.init
    }

    /// A command that will run `program` here. The tools (criu, runc) come first in its PATH, its working directory is
    /// `/` on a node.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        match self.init {
            Some(init) => {
                command.args(["--target", &init.pid.to_string(), "--mount", "--uts", "--ipc", "--net", "--pid"]);
            }
            None => {
                command.arg(format!("--net={}", network::netns_file(&self.netns).display()));
            }
        }
        command.arg("--").arg(program).env("PATH", self.search_path());
        command
    }

    fn search_path(&self) -> std::ffi::OsString {
        let mut path = self.tools.clone().into_os_string();
        path.push(":");
        path.push(std::env::var_os("PATH").unwrap_or_default());
        // nft and iptables are in folders that a user's PATH may lack.
        path.push(":/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin");
        path
    }

    /// Runs a program to its end, at most [`command::DEADLINE`].
    pub fn exec<W: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = W>) -> Result<Output> {
        self.exec_within(words, command::DEADLINE)
    }

    /// As [`Place::exec`], with a deadline of one's own.
    pub fn exec_within<W: AsRef<OsStr>>(
        &self,
        words: impl IntoIterator<Item = W>,
        deadline: Duration,
    ) -> Result<Output> {
        command::run_within(&mut self.command_of(words)?, deadline)
    }

    /// Runs a program to its end and fails unless it ends with 0; gives what it wrote.
    pub fn check<W: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = W>) -> Result<String> {
        self.exec(words)?.success()
    }

    /// Runs a shell script with `sh -euc` and fails unless it ends with 0; gives what it wrote.
    pub fn shell(&self, script: &str) -> Result<String> {
        self.check(["sh", "-euc", script])
    }

    /// Starts a program that goes on while the caller does something else. It is killed when the handle is dropped.
    /// Standard input is empty, output goes nowhere: use [`Place::spawn_command`] for pipes or files.
    pub fn spawn<W: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = W>) -> Result<Running> {
        let mut command = self.command_of(words)?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        self.spawn_command(command)
    }

    /// Starts a command that [`Place::command`] made.
    pub fn spawn_command(&self, mut command: Command) -> Result<Running> {
        let text = command::line(&command);
        let started = command.process_group(0).spawn();
        let mut child = started.map_err(|source| Error::Start { command: text.clone(), source })?;
        let process = match self.init {
            Some(_) => process::only_child(child.id(), FORK_DEADLINE),
            None => ProcessId::of(child.id()),
        };
        let Some(process) = process else {
            let status = child.wait().map(|status| status.to_string()).unwrap_or_default();
            return Err(Error::Command { command: text, status, stderr: "it ended at once".to_owned() });
        };
        Ok(Running { child, process })
    }

    fn command_of<W: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = W>) -> Result<Command> {
        let mut words = words.into_iter();
        let program = words.next().ok_or_else(|| Error::Invalid("an empty command cannot be run".to_owned()))?;
        if self.init.is_some_and(|init| !init.is_alive()) {
            return Err(Error::NotRunning { what: format!("the first process of {}", self.name) });
        }
        let mut command = self.command(program);
        command.args(words);
        Ok(command)
    }
}

/// A program that runs on some side of the cluster. Dropping kills it and what it started.
#[derive(Debug)]
pub struct Running {
    child: Child,
    process: ProcessId,
}

impl Running {
    /// Its number in the machine's pid namespace.
    pub fn pid(&self) -> u32 {
        self.process.pid
    }

    /// Its identity.
    pub fn process(&self) -> ProcessId {
        self.process
    }

    /// Whether it still runs.
    pub fn is_alive(&self) -> bool {
        self.process.is_alive()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> bool {
        self.process.signal(signal)
    }

    /// The child whose pipes these are: the program itself, or the `nsenter` that waits for it and ends as it does.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Waits until it ends; `None` when it has not within the deadline.
    pub fn wait(&mut self, deadline: Duration) -> Option<std::process::ExitStatus> {
        command::wait_within(&mut self.child, deadline)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            process::kill_tree(self.child.id());
            let _ = self.child.wait();
        }
    }
}
