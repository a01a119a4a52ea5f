//! A small cluster for the coordinator's tests: the real coordinator as a process, and agents that keep the protocol's
//! rules over real mutual TLS but whose containers are entries in a table, so that faults can be put anywhere.
#![allow(dead_code, reason = "each test binary uses its part of the world")]
#![expect(clippy::unwrap_used, reason = "helpers of tests: a panic is the report")]

mod agent;
mod process;

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use podferry_common::Failure;
use podferry_common::identity::{Identity, IdentityFiles, LocalCa, Peer};
use podferry_common::tls::{self, Incoming};
use podferry_proto::v1::coordinator_service_client::CoordinatorServiceClient;
use podferry_proto::v1::{self, Finding, Migration};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::runtime::{self, Runtime};
use tokio::sync::Notify;
use tokio::time::timeout;
use tonic::transport::Channel;

pub(crate) use process::Coordinator;

pub(crate) type Client = CoordinatorServiceClient<Channel>;

/// How long anything in these tests may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// What a copy of a container does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Copy {
    Running,
    Frozen,
    Held,
}

/// What an agent does instead of its duty.
#[derive(Clone, Debug)]
pub(crate) enum Fault {
    /// Answers with that failure.
    Fail(Failure),
    /// Does its duty, and then answers with that failure.
    FailAfterwards(Failure),
    /// Does nothing until the fault is taken away.
    Hang,
    /// A preflight that finds something.
    Find(Finding),
}

/// A part of a migration on a node, as the protocol has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    Prepared,
    PreCopying,
    Frozen,
    Held,
    Sealed,
    Over,
}

/// A node as its agent knows it.
#[derive(Debug)]
pub(crate) struct NodeState {
    pub(crate) description: v1::DescribeResponse,
    pub(crate) containers: BTreeMap<String, Copy>,
    pub(crate) network: v1::NetworkKind,
    /// What of its containers' connections a relay could carry.
    pub(crate) relayed: Option<v1::Relayed>,
    /// What of relays is there.
    pub(crate) relays: Vec<v1::RelayEnd>,
    /// Those of its containers.
    pub(crate) volumes: Vec<v1::Volume>,
    pub(crate) parts: HashMap<String, (Part, String)>,
}

/// Everything, behind one lock.
#[derive(Debug, Default)]
pub(crate) struct State {
    pub(crate) nodes: BTreeMap<String, NodeState>,
    pub(crate) log: Vec<String>,
    pub(crate) faults: HashMap<(String, &'static str), (Fault, usize)>,
    /// Migrations whose data is with the target.
    pub(crate) transferred: Vec<String>,
    /// What targets were asked,
    pub(crate) asked_targets: Vec<v1::PreflightTargetRequest>,
    /// and told to prepare for.
    pub(crate) prepares: Vec<v1::PrepareRequest>,
    /// What sources were asked for.
    pub(crate) freezes: Vec<v1::FreezeRequest>,
    /// How many rounds of pre-copy come after the first; one, unless set.
    pub(crate) further_rounds: Option<usize>,
    /// Sources freeze without a word that they have converged.
    pub(crate) no_word_of_convergence: bool,
    /// Sources do not know that memory can be compared.
    pub(crate) no_verification: bool,
    /// What sources say of whose memory can be followed, to those who ask.
    pub(crate) tracking: Option<v1::Tracking>,
    /// The strategies that preflights were about, by node.
    pub(crate) asked: Vec<(String, v1::Strategy)>,
    pub(crate) violations: Vec<String>,
}

impl State {
    /// Takes down every moment with two running copies.
    pub(crate) fn check(&mut self) {
        let ids: Vec<_> = self.nodes.values().flat_map(|node| node.containers.keys().cloned()).collect();
        for id in ids {
            let running = self.nodes.iter().filter(|(_, node)| node.containers.get(&id) == Some(&Copy::Running));
            let running: Vec<_> = running.map(|(name, _)| name.clone()).collect();
            if running.len() > 1 {
                self.violations.push(format!("{id} runs on {running:?} after {:?}", self.log.last()));
            }
        }
    }
}

/// What all agents share.
#[derive(Default)]
pub(crate) struct Shared {
    state: Mutex<State>,
    pub(crate) changed: Notify,
}

impl Shared {
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The cluster: nodes `a`, `b` and `c`, and containers `cart` and `redis`, which run on `a`.
pub(crate) struct World {
    pub(crate) shared: Arc<Shared>,
    pub(crate) ca: LocalCa,
    pub(crate) folder: TempDir,
    /// Address and runtime of each agent. A runtime of its own can be ended with everything in it, connections too.
    agents: HashMap<String, (String, Option<Runtime>)>,
}

const NODES: [&str; 3] = ["a", "b", "c"];
const DAY: Duration = Duration::from_secs(86_400);

impl World {
    pub(crate) async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let ca = LocalCa::create(&folder.path().join("ca")).unwrap();
        let mut world = Self { shared: Arc::default(), ca, folder, agents: HashMap::new() };
        for name in NODES {
            world.shared.lock().nodes.insert(name.to_owned(), node(name));
            world.start_agent(name).await;
        }
        for container in ["cart", "redis"] {
            world.node("a", |node| node.containers.insert(container.to_owned(), Copy::Running));
        }
        world.write_configuration();
        world
    }

    /// Starts a node's agent, at the address it had if it was stopped before.
    pub(crate) async fn start_agent(&mut self, name: &str) {
        let identity = self.identity(&Peer::Agent(name.parse().unwrap()));
        let address = self.agents.get(name).map_or("127.0.0.1:0".to_owned(), |(address, _)| address.clone());
        let runtime = runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let (node, shared) = (name.to_owned(), Arc::clone(&self.shared));
        let listening = runtime.spawn(async move {
            let incoming = Incoming::new(TcpListener::bind(&address).await.unwrap(), &identity);
            let address = incoming.local_addr().unwrap().to_string();
            tokio::spawn(agent::serve(node, shared, incoming));
            address
        });
        self.agents.insert(name.to_owned(), (listening.await.unwrap(), Some(runtime)));
    }

    /// Kills a node's agent: connections break, what it knows stays.
    pub(crate) fn stop_agent(&mut self, name: &str) {
        let (_, runtime) = self.agents.get_mut(name).unwrap();
        runtime.take().unwrap().shutdown_background();
    }

    pub(crate) fn identity(&self, peer: &Peer) -> Identity {
        let files = IdentityFiles::in_folder(self.folder.path().join(peer.dns_name()));
        self.ca.issue(peer, DAY, &files).unwrap();
        Identity::load(files).unwrap()
    }

    fn write_configuration(&self) {
        self.identity(&Peer::Coordinator);
        let nodes = NODES.map(|name| {
            let address = &self.agents[name].0;
            format!("[[nodes]]\nname = \"{name}\"\naddress = \"{address}\"\n")
        });
        let workloads =
            "[[workloads]]\nname = \"shop\"\ncontainer = \"cart\"\nnode = \"a\"\n\n[[workloads]]\nname = \"redis\"\n";
        std::fs::write(self.folder.path().join("inventory.toml"), format!("{}\n{workloads}", nodes.join("\n")))
            .unwrap();
        let dns = Peer::Coordinator.dns_name();
        let configuration = format!(
            "listen = \"127.0.0.1:0\"\nstate_dir = \"state\"\ninventory = \"inventory.toml\"\n\
             [identity]\nca = \"{dns}/ca.pem\"\ncertificate = \"{dns}/cert.pem\"\nkey = \"{dns}/key.pem\"\n\
             [deadlines]\npreflight = 2\nprepare = 2\nprecopy = 3\nfreeze = 3\ncommit = 2\nrelease = 1\nresume = 1\nfill = 1\n\
             abort = 1\nsurvey = 2\n"
        );
        std::fs::write(self.configuration(), configuration).unwrap();
    }

    pub(crate) fn configuration(&self) -> PathBuf {
        self.folder.path().join("coordinator.toml")
    }

    /// Starts the coordinator and a client of it.
    pub(crate) async fn coordinator(&self) -> (Coordinator, Client) {
        let coordinator = Coordinator::start(&self.configuration()).await;
        let client = self.client(&coordinator, &Peer::client("tester").unwrap()).await;
        (coordinator, client)
    }

    pub(crate) async fn client(&self, coordinator: &Coordinator, who: &Peer) -> Client {
        let identity = self.identity(who);
        let channel = tls::connect(&coordinator.address, &identity, &Peer::Coordinator).await.unwrap();
        CoordinatorServiceClient::new(channel)
    }

    pub(crate) fn node<T>(&self, name: &str, change: impl FnOnce(&mut NodeState) -> T) -> T {
        change(self.shared.lock().nodes.get_mut(name).unwrap())
    }

    /// Puts a fault before the next `times` calls of that method.
    pub(crate) fn fault(&self, node: &str, method: &'static str, fault: Fault, times: usize) {
        self.shared.lock().faults.insert((node.to_owned(), method), (fault, times));
    }

    pub(crate) fn heal(&self, node: &str, method: &'static str) {
        self.shared.lock().faults.remove(&(node.to_owned(), method));
        self.shared.changed.notify_waiters();
    }

    pub(crate) fn copy(&self, node: &str, container: &str) -> Option<Copy> {
        self.node(node, |node| node.containers.get(container).copied())
    }

    /// The calls so far, but for those that only look.
    pub(crate) fn calls(&self) -> Vec<String> {
        let looks = ["Describe", "ListContainers"];
        let log = self.shared.lock().log.clone();
        log.into_iter().filter(|line| !looks.iter().any(|look| line.ends_with(look))).collect()
    }

    /// Waits until an agent has seen that call.
    pub(crate) async fn called(&self, what: &str) {
        let seen = async {
            loop {
                if self.shared.lock().log.iter().any(|line| line == what) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(PATIENCE, seen).await.unwrap_or_else(|_| panic!("no call {what:?} in {:?}", self.calls()));
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for (_, runtime) in self.agents.drain().map(|(_, agent)| agent) {
            runtime.into_iter().for_each(Runtime::shutdown_background);
        }
        let violations = std::mem::take(&mut self.shared.lock().violations);
        assert!(violations.is_empty() || std::thread::panicking(), "{violations:?}");
    }
}

fn node(name: &str) -> NodeState {
    let description = v1::DescribeResponse {
        version: Some(podferry_proto::Version::OURS.into()),
        node: name.to_owned(),
        architecture: "x86_64".to_owned(),
        cpu_features: ["sse2", "avx2"].map(str::to_owned).into(),
        memory_total: 8 << 30,
        memory_available: 4 << 30,
        images_free: 4 << 30,
        layers_free: 4 << 30,
        criu_version: "4.2.1".to_owned(),
        runc_version: "1.3.6".to_owned(),
        fit: true,
        ..v1::DescribeResponse::default()
    };
    let (containers, parts) = (BTreeMap::new(), HashMap::new());
    NodeState {
        description,
        containers,
        network: v1::NetworkKind::Path,
        relayed: None,
        relays: Vec::new(),
        volumes: Vec::new(),
        parts,
    }
}

/// Asks for a migration.
pub(crate) async fn migrate(client: &mut Client, workload: &str, target: &str) -> Result<Migration, Failure> {
    request(
        client,
        v1::MigrateRequest { workload: workload.to_owned(), target: target.to_owned(), ..Default::default() },
    )
    .await
}

/// Asks for a migration with all that can be said about it.
pub(crate) async fn request(client: &mut Client, request: v1::MigrateRequest) -> Result<Migration, Failure> {
    let answer = timeout(PATIENCE, client.migrate(request)).await.expect("Migrate hangs");
    Ok(answer.map_err(Failure::from)?.into_inner().migration.unwrap())
}

/// Watches a migration to its end; all states that were seen.
pub(crate) async fn watch(client: &mut Client, id: &str) -> Vec<Migration> {
    let all = async {
        let request = v1::WatchMigrationRequest { id: id.to_owned() };
        let mut stream = client.watch_migration(request).await.unwrap().into_inner();
        let mut seen = Vec::new();
        while let Some(answer) = stream.message().await.unwrap() {
            seen.push(answer.migration.unwrap());
        }
        seen
    };
    timeout(PATIENCE, all).await.expect("the migration does not end")
}

/// The last state of a migration.
pub(crate) async fn outcome(client: &mut Client, id: &str) -> Migration {
    watch(client, id).await.pop().unwrap()
}
