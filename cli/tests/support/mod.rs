//! A coordinator with scripted answers behind real mutual TLS, and the real program in front of it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use podferry_common::identity::{Identity, IdentityFiles, LocalCa, Peer};
use podferry_common::tls::{Incoming, PeerInfo};
use podferry_common::{Failure, FailureCode};
use podferry_proto::v1::coordinator_service_server::{CoordinatorService, CoordinatorServiceServer};
use podferry_proto::v1::{
    CancelEvacuationRequest, CancelEvacuationResponse, CancelMigrationRequest, CancelMigrationResponse,
    EvacuateRequest, EvacuateResponse, Evacuation, EvacuationPhase, GetDecisionRequest, GetDecisionResponse,
    GetEvacuationRequest, GetEvacuationResponse, GetMigrationRequest, GetMigrationResponse, HelloRequest,
    HelloResponse, ListConnectionsRequest, ListConnectionsResponse, ListEvacuationsRequest, ListEvacuationsResponse,
    ListMigrationsRequest, ListMigrationsResponse, ListNodesRequest, ListNodesResponse, ListWorkloadsRequest,
    ListWorkloadsResponse, MigrateRequest, MigrateResponse, Migration, Node, Phase, ProtocolVersion,
    WatchEvacuationRequest, WatchEvacuationResponse, WatchMigrationRequest, WatchMigrationResponse, Workload,
};
use tempfile::TempDir;
use tokio::net::{TcpListener, TcpStream};
use tokio::process::Command;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

/// No run of the program takes longer, unless it hangs.
const LIMIT: Duration = Duration::from_secs(90);

/// What the coordinator says to a request for a migration, and what a watcher of it then sees.
pub enum Answer {
    Refuse(Failure),
    Accept(Vec<Migration>),
}

/// What the coordinator knows and says.
#[derive(Default)]
pub struct Script {
    pub version: Option<ProtocolVersion>,
    pub nodes: Vec<Node>,
    pub workloads: Vec<Workload>,
    /// By workload.
    pub migrate: HashMap<String, Answer>,
    /// By id: the states that a watcher sees.
    pub migrations: HashMap<String, Vec<Migration>>,
    pub cancel: Option<Failure>,
    /// How many watches break after their first state.
    pub broken_watches: usize,
    /// A watch stays open after its last state.
    pub endless_watches: bool,
    /// Between two states of a watch.
    pub pace: Duration,
    /// What has outlived moves.
    pub connections: ListConnectionsResponse,
    /// By node: the states that a watcher of its evacuation sees, or why it is refused. Without any: as a coordinator from before
    /// evacuations.
    pub evacuations: HashMap<String, Result<Vec<Evacuation>, Failure>>,
    /// What was asked for.
    pub evacuated: Vec<EvacuateRequest>,
}

impl Script {
    /// The workloads on that node, or on their way from or to it; the real coordinator does not guess what is on a silent
    /// one either.
    fn workloads_of(&self, node: &str) -> Result<Vec<Workload>, Failure> {
        if node.is_empty() {
            return Ok(self.workloads.clone());
        }
        let found = self.nodes.iter().find(|known| known.name == node);
        let known = found.ok_or_else(|| Failure::new(FailureCode::NotFound, format!("there is no node {node:?}")))?;
        if !known.reachable {
            let message = format!("the agent of node {node} did not answer in 5 s");
            return Err(Failure::new(FailureCode::Unavailable, message).on(node).remedy("see that it runs"));
        }
        let ends = |migration: &Migration| migration.source == node || migration.target == node;
        let on_its_way = |id: &str| self.migrations.get(id).and_then(|states| states.first()).is_some_and(ends);
        let there = |workload: &&Workload| workload.node == node || on_its_way(&workload.migration_id);
        Ok(self.workloads.iter().filter(there).cloned().collect())
    }
}

impl Script {
    /// What becomes of the evacuation of a node.
    fn states_of(&self, node: &str) -> Result<Vec<Evacuation>, Status> {
        self.knows_evacuations()?;
        match self.evacuations.get(node) {
            None => Err(unknown(&format!("node {node:?}"))),
            Some(Err(failure)) => Err(failure.clone().into()),
            Some(Ok(states)) => Ok(states.clone()),
        }
    }

    fn knows_evacuations(&self) -> Result<(), Status> {
        if self.evacuations.is_empty() { Err(Status::unimplemented("")) } else { Ok(()) }
    }

    fn states_by(&self, id: &str) -> Result<Vec<Evacuation>, Status> {
        self.knows_evacuations()?;
        let of = |states: &&Vec<Evacuation>| states.iter().any(|state| state.id == id);
        let found = self.evacuations.values().filter_map(|states| states.as_ref().ok()).find(of);
        found.cloned().ok_or_else(|| unknown(&format!("evacuation {id:?}")))
    }

    /// Shows a watcher these states, one after the other.
    fn watch<S, U>(&mut self, mut states: Vec<S>, update: fn(S) -> U) -> Response<ReceiverStream<Result<U, Status>>>
    where
        S: Send + 'static,
        U: Send + 'static,
    {
        if self.broken_watches > 0 {
            self.broken_watches -= 1;
            states.truncate(1);
        }
        let (pace, endless) = (self.pace, self.endless_watches);
        let (out, stream) = tokio::sync::mpsc::channel(8);
        tokio::spawn(async move {
            for state in states {
                if out.send(Ok(update(state))).await.is_err() {
                    return;
                }
                tokio::time::sleep(pace).await;
            }
            if endless {
                out.closed().await;
            }
        });
        Response::new(ReceiverStream::new(stream))
    }
}

/// A request that arrived, with who sent it.
#[derive(Debug, Clone, PartialEq)]
pub struct Seen {
    pub peer: Peer,
    pub request: MigrateRequest,
}

struct Service {
    script: Arc<Mutex<Script>>,
    seen: Arc<Mutex<Vec<Seen>>>,
}

fn unknown(what: &str) -> Status {
    Failure::new(FailureCode::NotFound, format!("there is no {what}")).remedy("see `podferry workloads`").into()
}

fn last(states: &[Migration]) -> Option<Migration> {
    states.last().cloned()
}

#[tonic::async_trait]
impl CoordinatorService for Service {
    async fn hello(&self, _: Request<HelloRequest>) -> Result<Response<HelloResponse>, Status> {
        let version = self.script.lock().unwrap().version.unwrap_or(ProtocolVersion { current: 1, oldest: 1 });
        Ok(Response::new(HelloResponse { version: Some(version), coordinator_version: "0.1.0".into() }))
    }

    async fn list_nodes(&self, _: Request<ListNodesRequest>) -> Result<Response<ListNodesResponse>, Status> {
        Ok(Response::new(ListNodesResponse { nodes: self.script.lock().unwrap().nodes.clone() }))
    }

    async fn list_workloads(
        &self,
        request: Request<ListWorkloadsRequest>,
    ) -> Result<Response<ListWorkloadsResponse>, Status> {
        let workloads = self.script.lock().unwrap().workloads_of(&request.into_inner().node)?;
        Ok(Response::new(ListWorkloadsResponse { workloads }))
    }

    async fn list_connections(
        &self,
        _: Request<ListConnectionsRequest>,
    ) -> Result<Response<ListConnectionsResponse>, Status> {
        Ok(Response::new(self.script.lock().unwrap().connections.clone()))
    }

    async fn migrate(&self, request: Request<MigrateRequest>) -> Result<Response<MigrateResponse>, Status> {
        let peer = request.extensions().get::<PeerInfo>().unwrap().peer.clone();
        let request = request.into_inner();
        self.seen.lock().unwrap().push(Seen { peer, request: request.clone() });
        let mut script = self.script.lock().unwrap();
        let states = match script.migrate.get(&request.workload) {
            None => return Err(unknown(&format!("workload {:?}", request.workload))),
            Some(Answer::Refuse(failure)) => return Err(failure.clone().into()),
            Some(Answer::Accept(states)) => states.clone(),
        };
        let first = states[0].clone();
        script.migrations.insert(first.id.clone(), states);
        Ok(Response::new(MigrateResponse { migration: Some(first) }))
    }

    async fn get_migration(
        &self,
        request: Request<GetMigrationRequest>,
    ) -> Result<Response<GetMigrationResponse>, Status> {
        let id = request.into_inner().id;
        let found = self.script.lock().unwrap().migrations.get(&id).and_then(|states| last(states));
        let migration = found.ok_or_else(|| unknown(&format!("migration {id:?}")))?;
        Ok(Response::new(GetMigrationResponse { migration: Some(migration) }))
    }

    async fn list_migrations(
        &self,
        request: Request<ListMigrationsRequest>,
    ) -> Result<Response<ListMigrationsResponse>, Status> {
        let ListMigrationsRequest { workload, active_only } = request.into_inner();
        let ended = |m: &Migration| matches!(m.phase(), Phase::Succeeded | Phase::Failed | Phase::Cancelled);
        let mut migrations: Vec<_> =
            self.script.lock().unwrap().migrations.values().filter_map(|states| last(states)).collect();
        migrations.retain(|m| (workload.is_empty() || m.workload == workload) && !(active_only && ended(m)));
        migrations.sort_by(|a, b| b.id.cmp(&a.id));
        Ok(Response::new(ListMigrationsResponse { migrations }))
    }

    type WatchMigrationStream = ReceiverStream<Result<WatchMigrationResponse, Status>>;

    async fn watch_migration(
        &self,
        request: Request<WatchMigrationRequest>,
    ) -> Result<Response<Self::WatchMigrationStream>, Status> {
        let id = request.into_inner().id;
        let mut script = self.script.lock().unwrap();
        let states = script.migrations.get(&id).cloned().ok_or_else(|| unknown(&format!("migration {id:?}")))?;
        Ok(script.watch(states, |migration| WatchMigrationResponse { migration: Some(migration) }))
    }

    async fn cancel_migration(
        &self,
        request: Request<CancelMigrationRequest>,
    ) -> Result<Response<CancelMigrationResponse>, Status> {
        let script = self.script.lock().unwrap();
        if let Some(failure) = &script.cancel {
            return Err(failure.clone().into());
        }
        let id = request.into_inner().id;
        let found = script.migrations.get(&id).and_then(|states| last(states));
        let migration = found.ok_or_else(|| unknown(&format!("migration {id:?}")))?;
        let migration = Migration { phase: Phase::RollingBack.into(), ..migration };
        Ok(Response::new(CancelMigrationResponse { migration: Some(migration) }))
    }

    async fn evacuate(&self, request: Request<EvacuateRequest>) -> Result<Response<EvacuateResponse>, Status> {
        let request = request.into_inner();
        let mut script = self.script.lock().unwrap();
        script.evacuated.push(request.clone());
        let states = script.states_of(&request.node)?;
        Ok(Response::new(EvacuateResponse { evacuation: states.first().cloned() }))
    }

    async fn get_evacuation(
        &self,
        request: Request<GetEvacuationRequest>,
    ) -> Result<Response<GetEvacuationResponse>, Status> {
        let states = self.script.lock().unwrap().states_by(&request.into_inner().id)?;
        Ok(Response::new(GetEvacuationResponse { evacuation: states.last().cloned() }))
    }

    async fn list_evacuations(
        &self,
        _: Request<ListEvacuationsRequest>,
    ) -> Result<Response<ListEvacuationsResponse>, Status> {
        let script = self.script.lock().unwrap();
        script.knows_evacuations()?;
        let all = script.evacuations.values().filter_map(|states| states.as_ref().ok()?.last().cloned());
        Ok(Response::new(ListEvacuationsResponse { evacuations: all.collect() }))
    }

    type WatchEvacuationStream = ReceiverStream<Result<WatchEvacuationResponse, Status>>;

    async fn watch_evacuation(
        &self,
        request: Request<WatchEvacuationRequest>,
    ) -> Result<Response<Self::WatchEvacuationStream>, Status> {
        let mut script = self.script.lock().unwrap();
        let states = script.states_by(&request.into_inner().id)?;
        Ok(script.watch(states, |evacuation| WatchEvacuationResponse { evacuation: Some(evacuation) }))
    }

    async fn cancel_evacuation(
        &self,
        request: Request<CancelEvacuationRequest>,
    ) -> Result<Response<CancelEvacuationResponse>, Status> {
        let states = self.script.lock().unwrap().states_by(&request.into_inner().id)?;
        let phase = EvacuationPhase::Cancelling.into();
        let evacuation = states.first().cloned().map(|evacuation| Evacuation { phase, ..evacuation });
        Ok(Response::new(CancelEvacuationResponse { evacuation }))
    }

    async fn get_decision(&self, _: Request<GetDecisionRequest>) -> Result<Response<GetDecisionResponse>, Status> {
        Err(Failure::new(FailureCode::PermissionDenied, "only agents may ask").into())
    }
}

/// A running coordinator with a client's identity. Everything goes away with it.
pub struct Cluster {
    folder: TempDir,
    ca: LocalCa,
    pub address: String,
    pub script: Arc<Mutex<Script>>,
    seen: Arc<Mutex<Vec<Seen>>>,
    server: JoinHandle<()>,
}

impl Cluster {
    pub async fn start(script: Script) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let ca = LocalCa::create(&folder.path().join("ca")).unwrap();
        let hour = Duration::from_secs(3600);
        let own = IdentityFiles::in_folder(folder.path().join("coordinator"));
        ca.issue(&Peer::Coordinator, hour, &own).unwrap();
        let client = IdentityFiles::in_folder(folder.path().join("client"));
        ca.issue(&Peer::client("alice").unwrap(), hour, &client).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let incoming = Incoming::new(listener, &Identity::load(own).unwrap());
        let script = Arc::new(Mutex::new(script));
        let seen = Arc::default();
        let service = Service { script: Arc::clone(&script), seen: Arc::clone(&seen) };
        let service = CoordinatorServiceServer::new(service);
        let server = tonic::transport::Server::builder().add_service(service);
        let server = tokio::spawn(async move { server.serve_with_incoming(incoming).await.unwrap() });
        Self { folder, ca, address, script, seen, server }
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn identity(&self) -> PathBuf {
        self.folder.path().join("client")
    }

    /// A further identity of this cluster.
    pub fn issue(&self, peer: &Peer, lifetime: Duration) -> PathBuf {
        let folder = self.folder.path().join(peer.dns_name());
        self.ca.issue(peer, lifetime, &IdentityFiles::in_folder(&folder)).unwrap();
        folder
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    /// The program, with the address and identity set by flags.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = podferry(arguments);
        command.arg("--coordinator").arg(&self.address).arg("--identity").arg(self.identity());
        command
    }

    pub async fn run(&self, arguments: &[&str]) -> Ran {
        run(self.command(arguments)).await
    }

    /// Stops the coordinator and returns when its port is closed: an abort alone leaves a moment in which the listener
    /// still accepts, and resets.
    pub async fn stop(&self) {
        self.server.abort();
        let deadline = tokio::time::Instant::now() + LIMIT;
        while TcpStream::connect(&self.address).await.is_ok() {
            assert!(tokio::time::Instant::now() < deadline, "{} still accepts", self.address);
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.server.abort();
    }
}

/// The program with a clean environment.
pub fn podferry(arguments: &[&str]) -> Command {
    program(Path::new(env!("CARGO_BIN_EXE_podferry")), arguments)
}

/// The same for another path of the program.
pub fn program(path: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(path);
    command.args(arguments).env_clear().env("PATH", "/usr/bin:/bin").kill_on_drop(true).stdin(Stdio::null());
    command
}

/// What a run of the program left.
#[derive(Debug)]
pub struct Ran {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Ran {
    /// Checks the exit code, showing everything if it is another.
    #[track_caller]
    pub fn exits(self, code: i32) -> Self {
        assert_eq!(self.code, code, "{self:#?}");
        self
    }
}

pub async fn run(mut command: Command) -> Ran {
    let output = tokio::time::timeout(LIMIT, command.output()).await.expect("the program ends").unwrap();
    ran(output)
}

pub fn ran(output: Output) -> Ran {
    Ran {
        code: output.status.code().expect("ended by itself"),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}
