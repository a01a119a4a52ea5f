//! The whole cluster: up, down, attach, sweep.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use podferry_common::identity::{IdentityFiles, Peer};
use rustix::process::Signal;

use crate::certificates::{self, document};
use crate::cgroup;
use crate::command::{self, Output};
use crate::config;
use crate::container::Container;
use crate::daemon::Daemon;
use crate::error::{Error, FileContext, Result};
use crate::network;
use crate::node::{self, Node, READY_DEADLINE};
use crate::place::Place;
use crate::process::{self, ProcessId};
use crate::state::{Layout, NodeState, State};
use crate::workload::{Workload, check_label};

/// The port that the coordinator listens on.
pub const COORDINATOR_PORT: u16 = 7443;
/// The port that it listens on for REST.
pub const REST_PORT: u16 = 7444;
/// How long processes and cgroups may take to go away.
const GONE_DEADLINE: Duration = Duration::from_secs(15);
/// The longest call of the command-line client: a migration that waits.
const CLIENT_DEADLINE: Duration = Duration::from_secs(600);
/// Names of nodes are parts of names of links, which have 15 characters.
const LONGEST_NODE_NAME: usize = 12;

/// How a cluster shall be.
#[derive(Debug, Clone)]
pub struct Options {
    /// Tells clusters of one machine apart; in the names of network namespaces and cgroups. At most 24 characters.
    pub suffix: String,
    /// Everything of the cluster lies here; made when missing.
    pub folder: PathBuf,
    /// The nodes' names, in the order of their addresses.
    pub nodes: Vec<String>,
    /// Names of workloads that the coordinator's inventory has from the start; [`LocalCluster::start_workload`] adds
    /// others.
    pub workloads: Vec<String>,
    /// The folder of podferry's own programs.
    pub binaries: PathBuf,
    /// The folder of criu and runc.
    pub tools: PathBuf,
    /// Whether to start agents and coordinator and wait until they are ready.
    pub start_agents: bool,
    /// How long each certificate is valid, 24 h unless changed and at least 30 s. With agents, certificates are issued
    /// anew when half of it is over.
    pub certificate_lifetime: Duration,
    /// The coordinator's deadlines that are not its defaults, in seconds, by the names that `coordinator.toml` has for them.
    pub deadlines: BTreeMap<String, u64>,
    /// For so many seconds a post-copy's target tries a source that does not answer; the agents' default unless given.
    pub recover_within_s: Option<u64>,
}

impl Options {
    /// Two nodes, `node-a` and `node-b`, with the programs and tools of this workspace and a suffix that no other
    /// cluster of this process or of any other that runs has.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        Self {
            suffix: format!("{}-{count}", std::process::id()),
            folder: folder.into(),
            nodes: vec!["node-a".to_owned(), "node-b".to_owned()],
            workloads: Vec::new(),
            binaries: crate::default_binaries(),
            tools: crate::default_tools(),
            start_agents: true,
            certificate_lifetime: certificates::LIFETIME,
            deadlines: BTreeMap::new(),
            recover_within_s: None,
        }
    }

    /// The same with another suffix.
    #[must_use]
    pub fn with_suffix(mut self, suffix: impl Into<String>) -> Self {
        self.suffix = suffix.into();
        self
    }

    /// The same without agents and coordinator: namespaces, network and configuration only.
    #[must_use]
    pub fn without_agents(mut self) -> Self {
        self.start_agents = false;
        self
    }

    fn check(&self) -> Result<()> {
        if !nix::unistd::geteuid().is_root() {
            return Err(Error::Invalid("a local cluster needs root: namespaces, CRIU and runc do too".to_owned()));
        }
        check_label("the suffix", &self.suffix, 24)?;
        self.workloads.iter().try_for_each(|name| check_label("the workload's name", name, 63))?;
        for (index, name) in self.nodes.iter().enumerate() {
            check_label("the node name", name, LONGEST_NODE_NAME)?;
            if self.nodes[..index].contains(name) || ["fabric", "coordinator", "client"].contains(&name.as_str()) {
                return Err(Error::Invalid(format!("the node name {name:?} is taken; give each node its own")));
            }
        }
        if self.nodes.is_empty() || self.nodes.len() > 80 {
            return Err(Error::Invalid(format!("{} nodes will not do: 1 to 80 have addresses", self.nodes.len())));
        }
        if self.certificate_lifetime < certificates::SHORTEST_LIFETIME {
            let words =
                format!("certificates for {:?} would end before agents take new ones", self.certificate_lifetime);
            return Err(Error::Invalid(words));
        }
        self.check_programs()
    }

    fn check_programs(&self) -> Result<()> {
        let build = "build it with `cargo build --workspace`, or name another folder of binaries";
        let set_up = "run deploy/setup/setup.sh, or name another folder of tools";
        let daemons = ["podferry-agent", "podferry-coordinator", "podferry-hook", "podferry-dump-worker"];
        let wanted = if self.start_agents { &daemons[..] } else { &[] };
        let own = wanted
            .iter()
            .chain(&["podferry-node-init", "podferry-stdio-keeper"])
            .map(|name| (self.binaries.join(name), build));
        let tools = ["criu", "runc"].map(|name| (self.tools.join(name), set_up));
        match own.chain(tools).find(|(path, _)| !path.is_file()) {
            Some((path, hint)) => Err(Error::MissingProgram { path, hint }),
            None => Ok(()),
        }
    }
}

/// A running cluster. Dropping it takes it down, unless it was made with [`LocalCluster::up_detached`] or found with
/// [`LocalCluster::attach`].
#[derive(Debug)]
pub struct LocalCluster {
    layout: Layout,
    pub(crate) state: State,
    nodes: Vec<Node>,
    coordinator: Coordinator,
    client: Place,
    fabric: Place,
    owned: bool,
}

impl LocalCluster {
    /// Brings a cluster up that goes down with this value.
    pub fn up(options: &Options) -> Result<Self> {
        options.check()?;
        let (layout, mut state) = claim(options)?;
        let made = make(&layout, &mut state, options).and_then(|()| {
            let cluster = Self::of(layout.clone(), state.clone());
            cluster.start_daemons()?;
            Ok(cluster)
        });
        match made {
            Ok(mut cluster) => {
                cluster.owned = true;
                Ok(cluster)
            }
            Err(error) => {
                // What cannot be removed now stays in the state file for `sweep`; the first failure is what counts.
                let _ = tear_down(&layout, &state);
                Err(error)
            }
        }
    }

    /// Brings a cluster up that outlives this process. [`LocalCluster::attach`] finds it again.
    pub fn up_detached(options: &Options) -> Result<Self> {
        Self::up(options).map(|mut cluster| {
            cluster.owned = false;
            cluster
        })
    }

    /// The cluster in a folder, brought up by somebody else.
    pub fn attach(folder: &Path) -> Result<Self> {
        let layout = Layout { folder: folder.canonicalize().at("find the folder", folder)? };
        let state = State::load(&layout.folder)?.ok_or_else(|| Error::NotUp { folder: layout.folder.clone() })?;
        let alive = |node: &NodeState| node.processes.len() == 2 && node.processes.iter().all(ProcessId::is_alive);
        if let Some(node) = state.nodes.iter().find(|node| !alive(node)) {
            return Err(Error::NotRunning { what: format!("the first process of {}", node.name) });
        }
        let cluster = Self::of(layout, state);
        cluster.keep_certificates()?;
        Ok(cluster)
    }

    /// Removes what a cluster left in a folder, whoever made it and however it ended. Nothing there is fine.
    pub fn sweep(folder: &Path) -> Result<()> {
        if !folder.exists() {
            return Ok(());
        }
        let layout = Layout { folder: folder.canonicalize().at("find the folder", folder)? };
        match State::load(&layout.folder)? {
            Some(state) => tear_down(&layout, &state),
            None => Ok(()),
        }
    }

    fn of(layout: Layout, state: State) -> Self {
        let nodes = state.nodes.iter().map(|node| Node::new(&layout, &state, node)).collect();
        let place = |name: &str| Place::new(name, state.netns(name), None, &state.tools);
        let (client, fabric) = (place("client"), place("fabric"));
        let coordinator = Coordinator::new(&layout, place("coordinator"), state.binaries.clone());
        Self { layout, state, nodes, coordinator, client, fabric, owned: false }
    }

    /// Sees that somebody issues certificates anew, if there is anybody who uses them.
    fn keep_certificates(&self) -> Result<()> {
        if !self.state.start_agents {
            return Ok(());
        }
        certificates::start_keeper(&self.layout, &self.state, self.coordinator.place())
    }

    fn start_daemons(&self) -> Result<()> {
        if !self.state.start_agents {
            return Ok(());
        }
        self.keep_certificates()?;
        self.coordinator.start()?;
        for node in &self.nodes {
            node.start_agent()?;
        }
        self.coordinator.wait_ready()?;
        self.nodes.iter().try_for_each(Node::wait_ready)
    }

    /// Takes it down. A second time does nothing. Logs stay in the folder.
    pub fn down(&mut self) -> Result<()> {
        self.owned = false;
        tear_down(&self.layout, &self.state)
    }

    /// Where everything of the cluster lies.
    pub fn folder(&self) -> &Path {
        &self.layout.folder
    }

    /// Where the log files are.
    pub fn logs(&self) -> PathBuf {
        self.layout.logs()
    }

    /// What tells it apart from other clusters of the machine.
    pub fn suffix(&self) -> &str {
        &self.state.suffix
    }

    /// All nodes.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The node with this name.
    pub fn node(&self, name: &str) -> Result<Node> {
        self.nodes.iter().find(|node| node.name() == name).cloned().ok_or_else(|| {
            let known: Vec<&str> = self.nodes.iter().map(|node| node.name()).collect();
            Error::UnknownNode { name: name.to_owned(), known: known.join(", ") }
        })
    }

    /// Names a workload in the coordinator's inventory and starts it on a node.
    pub fn start_workload(&self, node: &str, workload: &Workload) -> Result<Container> {
        let node = self.node(node)?;
        self.register_workloads([&workload.name])?;
        node.start_workload(workload)
    }

    /// Names workloads that are started with [`Node::start_workload`] or in another way. The coordinator knows them from
    /// its next request on.
    pub fn register_workloads<N: AsRef<str>>(&self, names: impl IntoIterator<Item = N>) -> Result<()> {
        for name in names {
            check_label("the workload's name", name.as_ref(), 63)?;
            config::register(&self.coordinator.inventory(), name.as_ref())?;
        }
        Ok(())
    }

    /// Makes a node ready to take a workload, see [`Node::prepare_workload`].
    pub fn prepare_workload(&self, node: &str, workload: &Workload) -> Result<PathBuf> {
        self.node(node)?.prepare_workload(workload)
    }

    /// The coordinator.
    pub fn coordinator(&self) -> &Coordinator {
        &self.coordinator
    }

    /// The client side: its own network namespace on the fabric, everything else as on the machine.
    pub fn client(&self) -> &Place {
        &self.client
    }

    /// The namespace of the bridge that joins all: for `tc` and for listening in.
    pub fn fabric(&self) -> &Place {
        &self.fabric
    }

    /// The client side's certificate, key and authority.
    pub fn client_identity(&self) -> IdentityFiles {
        IdentityFiles::in_folder(self.client_identity_folder())
    }

    fn client_identity_folder(&self) -> PathBuf {
        self.layout.client_identity()
    }

    /// Issues a certificate of the cluster's own authority.
    pub fn issue(&self, peer: &Peer, lifetime: Duration, files: &IdentityFiles) -> Result<()> {
        let authority = certificates::authority(&self.layout)?;
        authority.issue(peer, lifetime, files).map_err(|error| document("a certificate", &error))
    }

    /// A command that runs podferry's command-line client on the client side with the client's identity.
    pub fn podferry_command(&self) -> Command {
        let mut command = self.client.command(self.state.binaries.join("podferry"));
        command
            .env("PODFERRY_COORDINATOR", self.coordinator.address())
            .env("PODFERRY_IDENTITY", self.client_identity_folder());
        command
    }

    /// Runs podferry's command-line client on the client side with the client's identity, at most ten minutes.
    pub fn podferry<W: AsRef<std::ffi::OsStr>>(&self, arguments: impl IntoIterator<Item = W>) -> Result<Output> {
        command::run_within(self.podferry_command().args(arguments), CLIENT_DEADLINE)
    }
}

impl Drop for LocalCluster {
    fn drop(&mut self) {
        if self.owned
            && let Err(error) = self.down()
        {
            eprintln!("podferry-local: {error}; remove it with LocalCluster::sweep on {}", self.folder().display());
        }
    }
}

/// Handle of the coordinator.
#[derive(Debug, Clone)]
pub struct Coordinator {
    place: Place,
    folder: PathBuf,
    binaries: PathBuf,
    daemon: Daemon,
}

impl Coordinator {
    fn new(layout: &Layout, place: Place, binaries: PathBuf) -> Self {
        let folder = layout.coordinator();
        let daemon = Daemon {
            what: "the coordinator".to_owned(),
            pid_file: folder.join("coordinator.pid"),
            log: layout.logs().join("coordinator.log"),
            port: COORDINATOR_PORT,
            forked: false,
        };
        Self { place, folder, binaries, daemon }
    }

    /// Where it runs.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Its address and port, as clients and agents reach it.
    pub fn address(&self) -> String {
        format!("{}:{COORDINATOR_PORT}", network::COORDINATOR_ADDRESS)
    }

    /// Its address and port for REST.
    pub fn rest_address(&self) -> String {
        format!("{}:{REST_PORT}", network::COORDINATOR_ADDRESS)
    }

    /// The folder of its configuration, identity and state.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Its configuration file.
    pub fn config(&self) -> PathBuf {
        self.folder.join("coordinator.toml")
    }

    /// Its inventory of nodes.
    pub fn inventory(&self) -> PathBuf {
        self.folder.join("inventory.toml")
    }

    /// Its log file.
    pub fn log(&self) -> &Path {
        &self.daemon.log
    }

    /// Its process, while it runs.
    pub fn process(&self) -> Option<ProcessId> {
        self.daemon.process()
    }

    /// Starts it unless it runs. Use [`Coordinator::wait_ready`] next.
    pub fn start(&self) -> Result<ProcessId> {
        let mut command = self.place.command(self.binaries.join("podferry-coordinator"));
        command.arg("--config").arg(self.config());
        self.daemon.start(&mut command)
    }

    /// Sends it a signal and, when that ends it, waits for its end.
    pub fn kill(&self, signal: Signal) -> Result<()> {
        self.daemon.kill(signal)
    }

    /// Ends it, starts it again and waits until it listens.
    pub fn restart(&self) -> Result<()> {
        self.kill(Signal::TERM)?;
        self.start()?;
        self.wait_ready()
    }

    /// Waits until it listens, at most 30 s.
    pub fn wait_ready(&self) -> Result<()> {
        self.daemon.wait_ready(READY_DEADLINE)
    }
}

/// Writes the state file, which makes the folder and the names in it this cluster's own.
fn claim(options: &Options) -> Result<(Layout, State)> {
    fs::create_dir_all(&options.folder).at("create the folder", &options.folder)?;
    let real = |path: &Path| path.canonicalize().at("find the folder", path);
    let layout = Layout { folder: real(&options.folder)? };
    if State::load(&layout.folder)?.is_some() {
        return Err(Error::AlreadyUp { folder: layout.folder });
    }
    let (binaries, tools) = (real(&options.binaries)?, real(&options.tools)?);
    if let Some(hidden) = [&layout.folder, &binaries, &tools].into_iter().find(|path| path.starts_with("/run")) {
        let words = format!("{} will not do: nodes have a /run of their own; use another folder", hidden.display());
        return Err(Error::Invalid(words));
    }
    let nodes = options.nodes.iter().zip(0..).map(|(name, index)| NodeState {
        name: name.clone(),
        address: network::node_address(index),
        processes: Vec::new(),
    });
    let state = State {
        suffix: options.suffix.clone(),
        binaries,
        tools,
        start_agents: options.start_agents,
        certificate_lifetime: options.certificate_lifetime,
        bundles_on_tmpfs: is_overlay(&layout.folder),
        nodes: nodes.collect(),
    };
    // Before the claim: a sweep of this folder must never remove what is another cluster's.
    if let Some(taken) = network::named("").into_iter().find(|name| state.all_netns().contains(name)) {
        let words = format!("the network namespace {taken} exists: another cluster has the suffix {}", state.suffix);
        return Err(Error::Invalid(words));
    }
    state.nodes.iter().try_for_each(|node| cgroup::check_free(&state.cgroup(&node.name)))?;
    state.claim(&layout.folder)?;
    Ok((layout, state))
}

/// The writable layer of an overlay cannot lie on another overlay: so it is inside most containers.
fn is_overlay(folder: &Path) -> bool {
    nix::sys::statfs::statfs(folder)
        .is_ok_and(|status| status.filesystem_type() == nix::sys::statfs::OVERLAYFS_SUPER_MAGIC)
}

fn make(layout: &Layout, state: &mut State, options: &Options) -> Result<()> {
    let logs = layout.logs();
    fs::create_dir_all(&logs).at("create the folder", &logs)?;
    write_configuration(layout, state, options)?;
    make_network(state)?;
    for index in 0..state.nodes.len() {
        let name = state.nodes[index].name.clone();
        let planned = state.clone();
        node::launch(&planned, layout, &name, |processes| {
            state.nodes[index].processes = processes;
            state.save(&layout.folder)
        })?;
    }
    Ok(())
}

fn make_network(state: &State) -> Result<()> {
    let fabric = state.fabric();
    network::make_fabric(&fabric)?;
    for (name, address) in [("coordinator", network::COORDINATOR_ADDRESS), ("client", network::CLIENT_ADDRESS)] {
        network::attach(&fabric, &state.netns(name), name)?;
        network::address_host(&state.netns(name), address)?;
    }
    for node in &state.nodes {
        network::attach(&fabric, &state.netns(&node.name), &node.name)?;
        network::address_node(&state.netns(&node.name), node.address)?;
    }
    Ok(())
}

fn write_configuration(layout: &Layout, state: &State, options: &Options) -> Result<()> {
    for node in &state.nodes {
        let handle = Node::new(layout, state, node);
        handle.make_folders()?;
        config::write(&handle.agent_config(), &config::agent(&handle, state, options.recover_within_s))?;
    }
    let folder = layout.coordinator();
    let identity = IdentityFiles::in_folder(layout.coordinator_identity());
    certificates::make(layout, state)?;
    config::write(&folder.join("inventory.toml"), &config::inventory(state, &options.workloads))?;
    config::write(&folder.join("coordinator.toml"), &config::coordinator(&folder, identity, options.deadlines.clone()))
}

/// Removes all that the state names. Can be repeated after any failure; the state file goes last.
fn tear_down(layout: &Layout, state: &State) -> Result<()> {
    if State::load(&layout.folder)?.is_none_or(|found| found.suffix != state.suffix) {
        return Ok(());
    }
    for node in &state.nodes {
        cgroup::thaw(&state.cgroup(&node.name));
    }
    // Init before anything else: the kernel then kills all of a node at once, and nothing can start anew.
    let recorded: Vec<ProcessId> = state.nodes.iter().flat_map(|node| node.processes.iter().rev().copied()).collect();
    process::kill_all(&recorded, GONE_DEADLINE)?;
    end_processes(state)?;
    for name in state.all_netns() {
        network::remove_namespace(&name)?;
    }
    for node in &state.nodes {
        cgroup::remove(&state.cgroup(&node.name), GONE_DEADLINE)?;
    }
    for folder in [layout.nodes(), layout.coordinator(), layout.identity()] {
        remove_folder(&folder)?;
    }
    network::put_folder_back()?;
    State::remove(&layout.folder)
}

/// Ends what runs in the cluster's network namespaces: clients, the coordinator, a launcher that was never recorded.
fn end_processes(state: &State) -> Result<()> {
    let files = state.netns_files();
    for _ in 0..20 {
        let left = process::in_network_namespaces(&files);
        if left.is_empty() {
            return Ok(());
        }
        process::kill_all(&left, GONE_DEADLINE)?;
    }
    let what = "processes in the cluster's network namespaces, which somebody starts again and again".to_owned();
    Err(Error::LeftBehind { what, seconds: GONE_DEADLINE.as_secs() })
}

fn remove_folder(folder: &Path) -> Result<()> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").at("read", Path::new("/proc/self/mountinfo"))?;
    let mut points = mounts.lines().filter_map(|line| line.split_whitespace().nth(4));
    if let Some(point) = points.find(|point| Path::new(point).starts_with(folder)) {
        // Removing would empty what somebody mounted there.
        return Err(Error::Invalid(format!("{point} is mounted in the cluster's folder; unmount it first")));
    }
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error).at("remove the folder", folder),
        _ => Ok(()),
    }
}
