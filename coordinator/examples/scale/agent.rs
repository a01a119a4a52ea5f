//! An agent that keeps the protocol's order on a container that is an entry in a table, and takes a while to send it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use podferry_common::{Failure, FailureCode};
use podferry_proto::v1::agent_service_server::AgentService;
use podferry_proto::v1::freeze_event::Event;
use podferry_proto::v1::{
    AbortRequest, AbortResponse, Container, DescribeRequest, DescribeResponse, FillRequest, FillResponse, FreezeEvent,
    FreezeRequest, Frozen, ListContainersRequest, ListContainersResponse, ListRelaysRequest, ListRelaysResponse,
    NetworkKind, PartStatusRequest, PartStatusResponse, PreflightSourceRequest, PreflightSourceResponse,
    PreflightTargetRequest, PreflightTargetResponse, PrepareRequest, PrepareResponse, Progress, ReleaseRequest,
    ReleaseResponse, RestoreRequest, RestoreResponse, ResumeRequest, ResumeResponse, SealRequest, SealResponse,
    Transferred,
};
use tokio::sync::{Notify, mpsc};
use tokio::time::sleep;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

const MEMORY: u64 = 64 << 20;
/// How often a real agent tells how far a transfer is.
const PROGRESS: Duration = Duration::from_millis(100);

/// What all agents share.
#[derive(Default)]
pub struct Cluster {
    /// How long a transfer takes.
    transfer: Duration,
    /// Calls that agents answered.
    pub calls: AtomicUsize,
    /// Freezes under way now, and the most there were at a time.
    pub under_way: AtomicUsize,
    pub most: AtomicUsize,
    pub resumed: AtomicUsize,
    /// Moments with two running copies, or none behind a resume.
    pub violations: AtomicUsize,
    moves: Mutex<HashMap<String, Arc<Moving>>>,
}

/// One migration, as both of its agents see it.
#[derive(Default)]
struct Moving {
    sent: Notify,
    running: AtomicI32,
}

impl Cluster {
    /// In which each transfer takes so long.
    pub fn new(transfer: Duration) -> Self {
        Self { transfer, ..Self::default() }
    }

    fn moving(&self, id: &str) -> Arc<Moving> {
        let mut moves = self.moves.lock().unwrap_or_else(PoisonError::into_inner);
        let begin = || Arc::new(Moving { sent: Notify::new(), running: AtomicI32::new(1) });
        Arc::clone(moves.entry(id.to_owned()).or_insert_with(begin))
    }
}

/// The agent of one node.
#[derive(Clone)]
pub struct Agent {
    pub node: String,
    pub cluster: Arc<Cluster>,
    /// The container that runs here, if one does.
    pub container: Arc<Mutex<Option<String>>>,
}

impl Agent {
    fn count(&self) {
        self.cluster.calls.fetch_add(1, Ordering::Relaxed);
    }

    fn change(&self, moving: &Moving, by: i32) {
        let now = moving.running.fetch_add(by, Ordering::SeqCst) + by;
        if !(0..=1).contains(&now) {
            self.cluster.violations.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn set(&self, container: Option<String>) {
        *self.container.lock().unwrap_or_else(PoisonError::into_inner) = container;
    }

    async fn send(self, moving: Arc<Moving>, events: mpsc::Sender<Result<FreezeEvent, Status>>) {
        let send = |event| events.send(Ok(FreezeEvent { event: Some(event) }));
        let _gone = send(Event::Frozen(Frozen { freeze_ms: 1.5, killed: false })).await;
        let pieces = (self.cluster.transfer.as_millis() / PROGRESS.as_millis()).max(1);
        for _ in 0..pieces {
            sleep(PROGRESS).await;
            let _gone = send(Event::Progress(Progress { raw_bytes: MEMORY, wire_bytes: MEMORY / 2 })).await;
        }
        moving.sent.notify_one();
        let sent =
            Transferred { pages: MEMORY / 4096, raw_bytes: MEMORY, wire_bytes: MEMORY / 2, ..Transferred::default() };
        let _gone = send(Event::Transferred(sent)).await;
        self.cluster.under_way.fetch_sub(1, Ordering::SeqCst);
    }
}

#[tonic::async_trait]
impl AgentService for Agent {
    type FreezeStream = ReceiverStream<Result<FreezeEvent, Status>>;

    async fn describe(&self, _: Request<DescribeRequest>) -> Result<Response<DescribeResponse>, Status> {
        self.count();
        Ok(Response::new(DescribeResponse {
            version: Some(podferry_proto::Version::OURS.into()),
            node: self.node.clone(),
            architecture: "x86_64".to_owned(),
            cpu_features: ["sse2", "avx2"].map(str::to_owned).into(),
            memory_total: 8 << 30,
            memory_available: 4 << 30,
            images_free: 4 << 30,
            layers_free: 4 << 30,
            fit: true,
            ..DescribeResponse::default()
        }))
    }

    async fn list_containers(
        &self,
        _: Request<ListContainersRequest>,
    ) -> Result<Response<ListContainersResponse>, Status> {
        self.count();
        let id = self.container.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let running = |id| Container {
            id,
            status: "running".to_owned(),
            memory_bytes: MEMORY,
            processes: 2,
            ..Container::default()
        };
        Ok(Response::new(ListContainersResponse { containers: id.map(running).into_iter().collect() }))
    }

    async fn list_relays(&self, _: Request<ListRelaysRequest>) -> Result<Response<ListRelaysResponse>, Status> {
        self.count();
        Ok(Response::new(ListRelaysResponse::default()))
    }

    async fn preflight_source(
        &self,
        _: Request<PreflightSourceRequest>,
    ) -> Result<Response<PreflightSourceResponse>, Status> {
        self.count();
        let network = NetworkKind::Path.into();
        let answer = PreflightSourceResponse { memory_bytes: MEMORY, network, ..PreflightSourceResponse::default() };
        Ok(Response::new(answer))
    }

    async fn preflight_target(
        &self,
        _: Request<PreflightTargetRequest>,
    ) -> Result<Response<PreflightTargetResponse>, Status> {
        self.count();
        Ok(Response::new(PreflightTargetResponse::default()))
    }

    async fn prepare(&self, _: Request<PrepareRequest>) -> Result<Response<PrepareResponse>, Status> {
        self.count();
        Ok(Response::new(PrepareResponse::default()))
    }

    async fn freeze(&self, request: Request<FreezeRequest>) -> Result<Response<Self::FreezeStream>, Status> {
        self.count();
        let moving = self.cluster.moving(&request.get_ref().migration_id);
        self.change(&moving, -1);
        let now = self.cluster.under_way.fetch_add(1, Ordering::SeqCst) + 1;
        self.cluster.most.fetch_max(now, Ordering::SeqCst);
        let (events, stream) = mpsc::channel(16);
        tokio::spawn(self.clone().send(moving, events));
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn restore(&self, request: Request<RestoreRequest>) -> Result<Response<RestoreResponse>, Status> {
        self.count();
        self.cluster.moving(&request.get_ref().migration_id).sent.notified().await;
        Ok(Response::new(RestoreResponse { restore_ms: 30.0 }))
    }

    async fn seal(&self, _: Request<SealRequest>) -> Result<Response<SealResponse>, Status> {
        self.count();
        Ok(Response::new(SealResponse {}))
    }

    async fn release(&self, _: Request<ReleaseRequest>) -> Result<Response<ReleaseResponse>, Status> {
        self.count();
        self.set(None);
        Ok(Response::new(ReleaseResponse { release_ms: 2.0 }))
    }

    async fn resume(&self, request: Request<ResumeRequest>) -> Result<Response<ResumeResponse>, Status> {
        self.count();
        self.change(&self.cluster.moving(&request.get_ref().migration_id), 1);
        self.set(Some("moved".to_owned()));
        self.cluster.resumed.fetch_add(1, Ordering::SeqCst);
        Ok(Response::new(ResumeResponse { resume_ms: 4.0, pid: 4711 }))
    }

    async fn fill(&self, _: Request<FillRequest>) -> Result<Response<FillResponse>, Status> {
        Err(Failure::new(FailureCode::FailedPrecondition, "nothing to fill").into())
    }

    async fn abort(&self, _: Request<AbortRequest>) -> Result<Response<AbortResponse>, Status> {
        self.count();
        Ok(Response::new(AbortResponse {}))
    }

    async fn part_status(&self, _: Request<PartStatusRequest>) -> Result<Response<PartStatusResponse>, Status> {
        Err(Status::unimplemented("nobody asks here"))
    }
}
