//! A node of the cluster: its namespaces, its agent and its containers.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::net::Ipv4Addr;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use rustix::process::Signal;

use crate::command;
use crate::daemon::Daemon;
use crate::error::{Error, FileContext, Result};
use crate::network;
use crate::place::Place;
use crate::process::ProcessId;
use crate::state::{Layout, NodeState, State};

/// The port that agents listen on.
pub const AGENT_PORT: u16 = 7443;
/// How long a node's first process may take to set itself up.
const INIT_DEADLINE: Duration = Duration::from_secs(30);
/// How long an agent may take to listen.
pub(crate) const READY_DEADLINE: Duration = Duration::from_secs(30);

/// Handle of a node. Cheap to clone; all handles of a node see the same.
#[derive(Debug, Clone)]
pub struct Node {
    place: Place,
    address: Ipv4Addr,
    folder: PathBuf,
    pub(crate) cgroup: String,
    pub(crate) binaries: PathBuf,
    pub(crate) tools: PathBuf,
    pub(crate) agent: Daemon,
}

/// A node is a place where programs run.
impl Deref for Node {
    type Target = Place;

    fn deref(&self) -> &Place {
        &self.place
    }
}

impl Node {
    pub(crate) fn new(layout: &Layout, state: &State, node: &NodeState) -> Self {
        let folder = layout.node(&node.name);
        // The launcher is the first, init the second.
        let init = node.processes.get(1).copied();
        let agent = Daemon {
            what: format!("the agent of {}", node.name),
            pid_file: folder.join("agent.pid"),
            log: layout.logs().join(format!("{}-agent.log", node.name)),
            port: AGENT_PORT,
            forked: true,
        };
        Self {
            place: Place::new(&node.name, state.netns(&node.name), init, &state.tools),
            address: node.address,
            folder,
            cgroup: state.cgroup(&node.name),
            binaries: state.binaries.clone(),
            tools: state.tools.clone(),
            agent,
        }
    }

    /// Its address on the flat network.
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// The folder of the node's own files; the same path on the machine and on the node.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Where its containers' bundles are, as the node sees it.
    pub fn bundles(&self) -> PathBuf {
        self.folder.join("bundles")
    }

    /// Where containers' volumes are, the same path on the machine and on the node: they move with them.
    pub fn volumes(&self) -> PathBuf {
        self.folder.join("volumes")
    }

    /// Where images of a migration are kept: a tmpfs that only the node sees.
    pub fn images(&self) -> PathBuf {
        self.folder.join("images")
    }

    /// Where the agent keeps its state.
    pub fn agent_state(&self) -> PathBuf {
        self.folder.join("state")
    }

    /// Where containers' output is written.
    pub fn container_logs(&self) -> PathBuf {
        self.folder.join("logs")
    }

    /// Where the agent's certificate is.
    pub fn identity(&self) -> PathBuf {
        self.folder.join("identity")
    }

    /// The agent's configuration file.
    pub fn agent_config(&self) -> PathBuf {
        self.folder.join("agent.toml")
    }

    /// The agent's log file.
    pub fn agent_log(&self) -> &Path {
        &self.agent.log
    }

    /// How the machine sees a path of the node, its own mounts (tmpfs, overlays, `/proc`, `/run`) included.
    pub fn on_machine(&self, path: &Path) -> PathBuf {
        let init = self.init().map_or(0, |init| init.pid);
        Path::new(&format!("/proc/{init}/root")).join(path.strip_prefix("/").unwrap_or(path))
    }

    /// The agent's number in the machine's pid namespace, while it runs.
    pub fn agent_pid(&self) -> Option<u32> {
        self.agent.process().map(|process| process.pid)
    }

    /// Starts the agent unless it runs. Use [`Node::wait_ready`] next.
    pub fn start_agent(&self) -> Result<ProcessId> {
        let mut command = self.command(self.binaries.join("podferry-agent"));
        command.arg("--config").arg(self.agent_config());
        self.agent.start(&mut command)
    }

    /// Sends the agent a signal and, when that ends it, waits for its end.
    pub fn kill_agent(&self, signal: Signal) -> Result<()> {
        self.agent.kill(signal)
    }

    /// Waits until the agent listens, at most 30 s.
    pub fn wait_ready(&self) -> Result<()> {
        self.agent.wait_ready(READY_DEADLINE)
    }

    pub(crate) fn make_folders(&self) -> Result<()> {
        let folders = [self.bundles(), self.volumes(), self.images(), self.agent_state(), self.container_logs()];
        for folder in folders.into_iter().chain([self.identity()]) {
            fs::create_dir_all(&folder).at("create the folder", &folder)?;
        }
        Ok(())
    }
}

/// Starts a node's namespaces. `record` is told who launcher and init are before init may live without its creator.
pub(crate) fn launch(
    state: &State,
    layout: &Layout,
    name: &str,
    record: impl FnOnce(Vec<ProcessId>) -> Result<()>,
) -> Result<()> {
    let log_path = layout.logs().join(format!("{name}-init.log"));
    let log = File::options().create(true).append(true).open(&log_path).at("open the log", &log_path)?;
    let folder = layout.node(name);
    let mut command = Command::new(state.binaries.join("podferry-node-init"));
    command
        .args(["launch", "--hostname", name, "--netns"])
        .arg(network::netns_file(&state.netns(name)))
        .arg("--tmpfs")
        .arg(folder.join("images"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(log);
    if state.bundles_on_tmpfs {
        command.arg("--tmpfs").arg(folder.join("bundles"));
    }
    let text = command::line(&command);
    let mut launcher = command.spawn().map_err(|source| Error::Start { command: text, source })?;
    let (stdin, stdout) = (launcher.stdin.take(), launcher.stdout.take());
    let launcher_id = launcher.id();
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut line = String::new();
        let _ = stdout.map(|stream| BufReader::new(stream).read_line(&mut line));
        let _ = sender.send(line);
        // Somebody has to collect it, whenever it ends.
        launcher.wait()
    });
    let line = receiver.recv_timeout(INIT_DEADLINE).unwrap_or_default();
    let init = line.trim().parse().ok().and_then(ProcessId::of);
    let (Some(launcher), Some(init), Some(mut stdin)) = (ProcessId::of(launcher_id), init, stdin) else {
        let tail = fs::read_to_string(&log_path).unwrap_or_default();
        let reason = "its first process could not be started".to_owned();
        return Err(Error::NotReady { what: format!("node {name}"), reason, log: log_path, tail });
    };
    record(vec![launcher, init])?;
    writeln!(stdin, "go").at("answer", &log_path)
}
