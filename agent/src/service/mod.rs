//! `AgentService`: the coordinator's calls. What each means is written in `podferry_proto::agent`.

mod application;
mod convert;
mod delivery;
mod describe;
mod fetch;
mod network;
mod preflight;
mod relay;
mod tracking;
mod volumes;

use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use futures::Stream;
use podferry_common::MigrationId;
use podferry_common::failure::{Failure, FailureCode};
use podferry_common::identity::Peer;
use podferry_common::tls::PeerInfo;
use podferry_proto::v1::agent_service_server::AgentService;
use podferry_proto::v1::{self, NetworkKind, PartState};
use podferry_runtime::{Container, stop_signal};
use tokio::sync::{Mutex, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::application::Kind;
use crate::context::{Context, blocking};
use crate::journal::{Standing, StopNote, TakeOverNote};
use crate::metrics::{Sending, Stage};
use crate::parts::{Authority, Entry, Part, Parts};
use crate::pods::{Door, Visitor};
use crate::recovery;
use crate::source::{Connections, FreezeOrder, SourcePart};
use crate::target::application::TakeOver;
use crate::target::{PrepareOrder, TargetPart, fill};
use crate::volumes::{MovedFiles, Volume};

pub use application::Application;
pub use delivery::Delivery;
pub use fetch::Fetch;
pub use relay::Relay;

/// The shortest and the longest deadline that is taken.
const DEADLINES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(24 * 3600));
/// Between two looks whether a migration whose pod is waited for is still wanted.
const VISITOR_LOOK: Duration = Duration::from_millis(200);
/// Events that may wait for a slow coordinator.
const EVENT_QUEUE: usize = 16;

/// The service.
#[derive(Clone, Debug)]
pub struct Agent {
    context: Context,
    parts: Parts,
    capabilities: Arc<describe::Capabilities>,
    /// Held while a target's part is made.
    preparing: Arc<Mutex<()>>,
}

type Events = Pin<Box<dyn Stream<Item = Result<v1::FreezeEvent, Status>> + Send>>;

impl Agent {
    /// Of this node; looks at CRIU and runc.
    pub async fn new(context: Context, parts: Parts) -> Self {
        let capabilities = Arc::new(describe::Capabilities::probe(&context).await);
        Self { context, parts, capabilities, preparing: Arc::default() }
    }

    fn part(&self, migration: MigrationId) -> Result<Part, Failure> {
        match self.parts.get(migration) {
            Some(Entry::Alive { part, .. }) => Ok(part),
            Some(Entry::Beginning { .. }) => {
                Err(self.context.refusal(FailureCode::FailedPrecondition, "the part is still being made"))
            }
            Some(Entry::Ended(standing)) => {
                let message = format!("this node's part of the migration has ended: {standing:?}");
                Err(self.context.refusal(FailureCode::FailedPrecondition, message))
            }
            Some(Entry::Filling { .. }) => {
                let message = "the container runs, and the rest of its memory is being laid in";
                Err(self.context.refusal(FailureCode::FailedPrecondition, message))
            }
            Some(Entry::Broken { .. }) => Err(self.broken()),
            None => Err(self.context.refusal(FailureCode::NotFound, "this node has no part of that migration")),
        }
    }

    fn broken(&self) -> Failure {
        let message = "this node's part of the migration could not be taken up again";
        let failure = self.context.refusal(FailureCode::Unavailable, message);
        failure.remedy("see the agent's log, put right what it names, and restart the agent")
    }

    fn source(&self, migration: MigrationId) -> Result<Arc<SourcePart>, Failure> {
        match self.part(migration)? {
            Part::Source(source) => Ok(source),
            Part::Target(_) => Err(self.wrong_role("target")),
        }
    }

    fn target(&self, migration: MigrationId) -> Result<Arc<TargetPart>, Failure> {
        match self.part(migration)? {
            Part::Target(target) => Ok(target),
            Part::Source(_) => Err(self.wrong_role("source")),
        }
    }

    /// Takes down how long a stage took, in milliseconds, or that it failed.
    fn timed(&self, stage: Stage, done: Result<f64, Failure>) -> Result<f64, Failure> {
        match &done {
            Ok(milliseconds) => self.context.metrics.spent(stage, *milliseconds),
            Err(failure) => self.context.metrics.failed(stage, failure),
        }
        done
    }

    fn wrong_role(&self, role: &str) -> Failure {
        let message = format!("this node is the migration's {role}");
        self.context.refusal(FailureCode::FailedPrecondition, message)
    }

    fn ended(&self, migration: MigrationId) -> Option<Standing> {
        match self.parts.get(migration) {
            Some(Entry::Ended(standing)) => Some(standing),
            Some(Entry::Filling { .. }) => Some(Standing::Resumed),
            _ => None,
        }
    }

    /// Undoes a part whose deadline passes before it is sealed.
    fn watch_deadline(&self, migration: MigrationId, deadline: SystemTime) {
        let parts = self.parts.clone();
        tokio::spawn(async move {
            tokio::time::sleep(deadline.duration_since(SystemTime::now()).unwrap_or_default()).await;
            // Looked up only now: a part that has ended by then is not to keep its sockets open until its deadline.
            let Some(Entry::Alive { part, .. }) = parts.get(migration) else { return };
            if part.standing() == Standing::Open {
                tracing::warn!(%migration, "the migration's deadline has passed; undoing this node's part");
                let reason = "the migration's deadline has passed";
                recovery::undo(&parts, &part, migration, reason, Authority::Own).await;
            }
        });
    }

    /// Whether its connections are taken through a relay.
    async fn begin_prepare(&self, request: v1::PrepareRequest) -> Result<bool, Failure> {
        let migration = migration_of(&request.migration_id)?;
        let source = Peer::Agent(convert::node_name(&request.source_node)?);
        let visitor = match &request.pod {
            Some(pod) => Some(self.visitor(migration, pod).await?),
            None => None,
        };
        let stands_in = request.pod.as_ref().is_some_and(|pod| pod.stands_in);
        let request = match &visitor {
            // Here it has another id than there.
            Some(visitor) => v1::PrepareRequest { workload: visitor.hello.id.clone(), ..request },
            None => request,
        };
        self.parts.tidied(&request.workload).await;
        let reservation = self.parts.reserve(migration, &request.workload)?;
        let bundle = visitor.as_ref().map(|visitor| visitor.hello.bundle.clone());
        preflight::refuse(&self.context, &preflight::Wish::of_prepare(request.clone(), bundle.clone())).await?;
        let moves = request.network() == NetworkKind::Path;
        let volumes = {
            let bundle = bundle.unwrap_or_else(|| self.context.config.runtime.bundles_dir.join(&request.workload));
            let (context, named) = (self.context.clone(), request.volumes);
            blocking(move || volumes::of_target(&context, &bundle, &named)).await?
        };
        let take_over = if request.application {
            Some(self.take_over_of(&request.workload, &request.source_address).await?)
        } else {
            None
        };
        let order = PrepareOrder {
            migration,
            workload: request.workload.clone(),
            source,
            source_node: request.source_node.clone(),
            link: request.link.filter(|_| moves).map(convert::link_of).transpose()?,
            keep_connections: request.keep_connections,
            fetch_from: Some(request.source_address).filter(|address| !address.is_empty() && take_over.is_none()),
            cold: request.cold,
            take_over,
            volumes,
            visitor,
            stands_in,
            relayed: request.relayed.as_ref().map(convert::relayed_of).transpose()?,
        };
        // Until this one is known as well.
        let _one_at_a_time = self.preparing.lock().await;
        self.parts.check_volumes(&order.volumes)?;
        let part = Arc::new(TargetPart::prepare(&self.context, order).await?);
        let relays = part.relays();
        reservation.fill(Part::Target(part));
        self.watch_deadline(migration, deadline_of(request.deadline_ms));
        Ok(relays)
    }

    /// What waits on this node to become that pod's container.
    async fn visitor(&self, migration: MigrationId, pod: &v1::PodPlace) -> Result<Arc<Visitor>, Failure> {
        let refused = |code, message: String| self.context.refusal(code, message).in_phase("prepare");
        let Some(kubernetes) = &self.context.config.kubernetes else {
            let message = "a pod is to come, and this agent is none of Kubernetes".to_owned();
            return Err(refused(FailureCode::FailedPrecondition, message).remedy("write [kubernetes] into agent.toml"));
        };
        let door = door_of(pod);
        let until = Instant::now() + kubernetes.arrive_within();
        loop {
            if let Some(visitor) = self.context.visitors.wait(&door, migration, VISITOR_LOOK).await {
                return self.fitting(visitor);
            }
            // Whoever undoes it does not wait for the pod.
            if self.parts.get(migration).is_some() {
                return Err(refused(FailureCode::Aborted, "the migration was aborted".to_owned()));
            }
            if Instant::now() >= until {
                let message = format!(
                    "container {} of pod {}/{} did not come within {} s",
                    pod.container, pod.namespace, pod.name, kubernetes.arrive_within_s
                );
                let remedy = format!("see `kubectl describe pod -n {} {}`", pod.namespace, pod.name);
                return Err(refused(FailureCode::DeadlineExceeded, message).remedy(remedy));
            }
        }
    }

    fn fitting(&self, visitor: Arc<Visitor>) -> Result<Arc<Visitor>, Failure> {
        let (theirs, ours) = (&visitor.hello.root, self.context.config.runc_root());
        if theirs == ours {
            return Ok(visitor);
        }
        let message =
            format!("the pod's container is made below {}, and not below {}", theirs.display(), ours.display());
        let failure = self.context.refusal(FailureCode::FailedPrecondition, message).in_phase("prepare");
        Err(failure.remedy("name that folder first in runtime.roots of agent.toml"))
    }

    async fn begin_freeze(
        &self,
        request: v1::FreezeRequest,
    ) -> Result<mpsc::Receiver<Result<v1::FreezeEvent, Status>>, Failure> {
        let migration = migration_of(&request.migration_id)?;
        let target = Peer::Agent(convert::node_name(&request.target_node)?);
        let reservation = self.parts.reserve(migration, &request.workload)?;
        let found = preflight::container(&self.context, &request.workload).await?;
        let link = preflight::link_of(&self.context, &found).await?;
        let stop = request.stop.map(|stop| self.stop_of(&found, stop)).transpose()?;
        let take_over = request.take_over.map(|take_over| self.replacement_of(&found, take_over)).transpose()?;
        let (volumes, files) = self.files_of(&found, request.volumes).await?;
        let order = FreezeOrder {
            migration,
            container: found,
            volumes,
            files,
            link: link.map(|found| found.link),
            target,
            target_address: request.target_address,
            connections: match (request.keep_connections, request.relay) {
                (_, true) => Connections::Relay { lifetime_s: request.relay_lifetime_s },
                (true, false) => Connections::Keep,
                (false, false) => Connections::Close,
            },
            compress: request.compress,
            bandwidth_limit: Some(request.bandwidth_limit).filter(|limit| *limit > 0),
            pre_copy: request
                .pre_copy
                .map(|pre_copy| convert::pre_copy_of(&pre_copy, deadline_of(pre_copy.deadline_ms))),
            post_copy: request.post_copy,
            stop,
            take_over,
            patience: patience_of(request.deadline_ms),
        };
        let (part, connected) = SourcePart::begin(&self.context, &order).await?;
        let part = Arc::new(part);
        reservation.fill(Part::Source(Arc::clone(&part)));
        self.watch_deadline(migration, order.deadline());

        let (answers, receiver) = mpsc::channel(EVENT_QUEUE);
        let (events, mut incoming) = mpsc::channel(EVENT_QUEUE);
        let (parts, metrics) = (self.parts.clone(), self.context.metrics.clone());
        // A task of its own: it does not end when the coordinator's connection does.
        tokio::spawn(async move {
            let mut sending = Sending::new(&metrics);
            let lost = Failure::new(FailureCode::Aborted, "the coordinator's connection broke").in_phase("freeze");
            let ended = {
                let running = part.run(&order, connected, &events);
                tokio::pin!(running);
                loop {
                    tokio::select! {
                        ended = &mut running => break ended,
                        // Nobody waits for the end any more, and nobody may come back before the deadline.
                        () = answers.closed() => break Err(lost),
                        Some(event) = incoming.recv() => {
                            sending.told(&event);
                            let _ = answers.send(Ok(convert::event(event))).await;
                        }
                    }
                }
            };
            while let Ok(event) = incoming.try_recv() {
                sending.told(&event);
                let _ = answers.send(Ok(convert::event(event))).await;
            }
            if let Err(failure) = ended {
                metrics.failed(Stage::Freeze, &failure);
                tracing::warn!(%migration, %failure, "the freeze failed; undoing it");
                let part = Part::Source(part);
                recovery::undo(&parts, &part, migration, &failure.message, Authority::Own).await;
                let _ = answers.send(Err(failure.into_status())).await;
            }
        });
        Ok(receiver)
    }

    /// How a container is stopped.
    fn stop_of(&self, container: &Container, stop: v1::Stop) -> Result<StopNote, Failure> {
        let signal = stop_signal(&container.annotations).map_err(|error| {
            self.context.refusal(FailureCode::FailedPrecondition, error.to_string()).in_phase("freeze")
        })?;
        let grace = Duration::from_millis(stop.grace_period_ms).min(DEADLINES.1);
        Ok(StopNote { signal, grace, begun: None, told: false })
    }

    /// How a container is replaced.
    fn replacement_of(&self, container: &Container, take_over: v1::TakeOver) -> Result<TakeOverNote, Failure> {
        let refused = |error: &(dyn std::error::Error + 'static)| {
            let what = "the workload cannot be replaced by a new instance";
            self.context.failure(FailureCode::FailedPrecondition, what, error).in_phase("freeze")
        };
        let application =
            crate::application::Application::of(&container.annotations).map_err(|error| refused(&error))?;
        let signal = stop_signal(&container.annotations).map_err(|error| refused(&error))?;
        let grace = Duration::from_millis(take_over.grace_period_ms).min(DEADLINES.1);
        Ok(TakeOverNote { stateless: application.kind() == Kind::Stateless, signal, grace, quiesced: false })
    }

    /// What a new instance is brought up with on this node.
    async fn take_over_of(&self, workload: &str, source_address: &str) -> Result<TakeOver, Failure> {
        let (context, workload) = (self.context.clone(), workload.to_owned());
        let application = blocking(move || preflight::application_here(&context, &workload)).await?;
        Ok(TakeOver::new(application, source_address.to_owned()))
    }

    /// What of a container's files moves: these volumes, and with its layer.
    async fn files_of(
        &self,
        container: &Container,
        named: Vec<v1::Volume>,
    ) -> Result<(Vec<Volume>, MovedFiles), Failure> {
        let (context, container) = (self.context.clone(), container.clone());
        blocking(move || {
            let volumes = volumes::of_source(&context, &container, &named)?;
            let files = MovedFiles::of(&container, &volumes).map_err(|error| {
                let what = "the container's writable layer is not found";
                context.failure(FailureCode::FailedPrecondition, what, &error).in_phase("freeze")
            })?;
            Ok((volumes, files))
        })
        .await
    }

    async fn undo(&self, request: v1::AbortRequest) -> Result<(), Failure> {
        let migration = migration_of(&request.migration_id)?;
        if matches!(self.ended(migration), Some(Standing::Released | Standing::Resumed)) {
            let message = "the migration is committed on this node: it cannot be aborted";
            return Err(self.context.refusal(FailureCode::FailedPrecondition, message));
        }
        // A migration that never came here is aborted too: what arrives late must not begin.
        match self.parts.get_or_abort(migration) {
            Some(Entry::Alive { part: Part::Source(source), .. }) => {
                source.abort(&request.reason, Authority::Coordinator).await?;
            }
            Some(Entry::Alive { part: Part::Target(target), .. }) => target.abort(Authority::Coordinator).await?,
            Some(Entry::Beginning { .. }) => {
                return Err(self.context.refusal(FailureCode::Unavailable, "the part is still being made"));
            }
            Some(Entry::Broken { .. }) => return Err(self.broken()),
            // Answered above; but a pod's container may have come that no part has waited for.
            Some(Entry::Filling { .. } | Entry::Ended(_)) | None => {
                self.context.visitors.dismiss(migration).await;
                return Ok(());
            }
        }
        self.parts.ended(migration, Standing::Aborted);
        Ok(())
    }
}

#[tonic::async_trait]
impl AgentService for Agent {
    type FreezeStream = Events;

    async fn describe(&self, request: Request<v1::DescribeRequest>) -> Result<Response<v1::DescribeResponse>, Status> {
        self.only_coordinator_or_client(&request)?;
        podferry_proto::Version::OURS.agree(request.get_ref().version.as_ref()).map_err(|mismatch| {
            self.context.refusal(FailureCode::FailedPrecondition, mismatch.to_string()).into_status()
        })?;
        Ok(Response::new(self.capabilities.describe(&self.context).await?))
    }

    async fn list_containers(
        &self,
        request: Request<v1::ListContainersRequest>,
    ) -> Result<Response<v1::ListContainersResponse>, Status> {
        self.only_coordinator(&request)?;
        let mut containers = Vec::new();
        for container in describe::containers(&self.context).await? {
            // A dead one that is just being removed would keep its workload from coming back at once.
            if !self.parts.is_released(&container.id) {
                containers.push(container);
            }
        }
        Ok(Response::new(v1::ListContainersResponse { containers }))
    }

    async fn list_relays(
        &self,
        request: Request<v1::ListRelaysRequest>,
    ) -> Result<Response<v1::ListRelaysResponse>, Status> {
        self.only_coordinator(&request)?;
        let context = self.context.clone();
        let ends = tokio::task::spawn_blocking(move || crate::relay::list(&context)).await;
        let ends = ends.map_err(|error| Status::internal(format!("the task that lists relays ended: {error}")))?;
        Ok(Response::new(v1::ListRelaysResponse { ends }))
    }

    async fn preflight_source(
        &self,
        request: Request<v1::PreflightSourceRequest>,
    ) -> Result<Response<v1::PreflightSourceResponse>, Status> {
        self.only_coordinator(&request)?;
        let request = request.into_inner();
        let way = preflight::Way::of(request.strategy());
        let mut answer = preflight::source(&self.context, &request.workload, way).await?;
        if request.look_at_tracking && way == preflight::Way::Carried {
            answer.tracking = Some(preflight::tracking(&self.context, &request.workload).await?);
        }
        Ok(Response::new(answer))
    }

    async fn preflight_target(
        &self,
        request: Request<v1::PreflightTargetRequest>,
    ) -> Result<Response<v1::PreflightTargetResponse>, Status> {
        self.only_coordinator(&request)?;
        let request = request.into_inner();
        self.parts.tidied(&request.workload).await;
        let lazy = [v1::Strategy::Live, v1::Strategy::Postcopy, v1::Strategy::Hybrid].contains(&request.strategy());
        let wish = preflight::Wish::from(request);
        let mut findings = preflight::target(&self.context, &wish).await?;
        findings.extend(self.capabilities.findings(wish.way != preflight::Way::Carried));
        findings.extend(self.capabilities.lazy_findings().filter(|_| lazy));
        Ok(Response::new(v1::PreflightTargetResponse { findings }))
    }

    async fn prepare(&self, request: Request<v1::PrepareRequest>) -> Result<Response<v1::PrepareResponse>, Status> {
        self.only_coordinator(&request)?;
        let agent = self.clone();
        let relays = to_its_end(async move { agent.begin_prepare(request.into_inner()).await }).await?;
        Ok(Response::new(v1::PrepareResponse { relays }))
    }

    async fn freeze(&self, request: Request<v1::FreezeRequest>) -> Result<Response<Events>, Status> {
        self.only_coordinator(&request)?;
        let agent = self.clone();
        let events = to_its_end(async move { agent.begin_freeze(request.into_inner()).await }).await?;
        Ok(Response::new(Box::pin(ReceiverStream::new(events))))
    }

    async fn restore(&self, request: Request<v1::RestoreRequest>) -> Result<Response<v1::RestoreResponse>, Status> {
        self.only_coordinator(&request)?;
        let request = request.into_inner();
        let target = self.target(migration_of(&request.migration_id)?)?;
        let restored = target.restore(deadline_of(request.deadline_ms)).await;
        let restore_ms = self.timed(Stage::Restore, restored)?;
        Ok(Response::new(v1::RestoreResponse { restore_ms }))
    }

    async fn seal(&self, request: Request<v1::SealRequest>) -> Result<Response<v1::SealResponse>, Status> {
        self.only_coordinator(&request)?;
        let migration = migration_of(&request.get_ref().migration_id)?;
        let part = self.part(migration)?;
        let agent = self.clone();
        to_its_end(async move {
            match part {
                Part::Source(source) => source.seal().await?,
                Part::Target(target) => target.seal().await?,
            }
            recovery::settle_later(&agent.context, &agent.parts, migration);
            Ok(())
        })
        .await?;
        Ok(Response::new(v1::SealResponse {}))
    }

    async fn release(&self, request: Request<v1::ReleaseRequest>) -> Result<Response<v1::ReleaseResponse>, Status> {
        self.only_coordinator(&request)?;
        let migration = migration_of(&request.get_ref().migration_id)?;
        let begun = Instant::now();
        if self.ended(migration) != Some(Standing::Released) {
            let source = self.source(migration)?;
            let parts = self.parts.clone();
            to_its_end(async move {
                source.release().await?;
                tokio::spawn(async move { recovery::tidy(&parts, &source, migration).await });
                Ok(())
            })
            .await?;
            self.context.metrics.spent(Stage::Release, milliseconds_since(begun));
        }
        let release_ms = milliseconds_since(begun);
        Ok(Response::new(v1::ReleaseResponse { release_ms }))
    }

    async fn resume(&self, request: Request<v1::ResumeRequest>) -> Result<Response<v1::ResumeResponse>, Status> {
        self.only_coordinator(&request)?;
        let migration = migration_of(&request.get_ref().migration_id)?;
        let begun = Instant::now();
        let mut pid = 0;
        if self.ended(migration) != Some(Standing::Resumed) {
            let (target, parts, context) = (self.target(migration)?, self.parts.clone(), self.context.clone());
            let door = request.get_ref().pod.as_ref().map(door_of);
            pid = to_its_end(async move { recovery::resume(&context, &parts, &target, door.as_ref()).await }).await?;
            self.context.metrics.spent(Stage::Resume, milliseconds_since(begun));
        }
        let resume_ms = milliseconds_since(begun);
        Ok(Response::new(v1::ResumeResponse { resume_ms, pid: pid.unsigned_abs() }))
    }

    async fn fill(&self, request: Request<v1::FillRequest>) -> Result<Response<v1::FillResponse>, Status> {
        self.only_coordinator(&request)?;
        let migration = migration_of(&request.get_ref().migration_id)?;
        if self.ended(migration) != Some(Standing::Resumed) {
            // Says what it is instead.
            self.part(migration)?;
            let message = "the container has not been resumed yet";
            return Err(self.context.refusal(FailureCode::FailedPrecondition, message).into_status());
        }
        let filled = fill::wait(&self.context, migration).await?;
        #[expect(clippy::cast_precision_loss, reason = "below 2^52 ms")]
        let fill_ms = filled.fill_ms as f64;
        self.context.metrics.spent(Stage::Fill, fill_ms);
        self.context.metrics.filled(filled.pages);
        Ok(Response::new(v1::FillResponse { pages: filled.pages, faults: filled.faults, fill_ms }))
    }

    async fn abort(&self, request: Request<v1::AbortRequest>) -> Result<Response<v1::AbortResponse>, Status> {
        self.only_coordinator(&request)?;
        let agent = self.clone();
        to_its_end(async move { agent.undo(request.into_inner()).await }).await?;
        Ok(Response::new(v1::AbortResponse {}))
    }

    async fn part_status(
        &self,
        request: Request<v1::PartStatusRequest>,
    ) -> Result<Response<v1::PartStatusResponse>, Status> {
        self.only_coordinator(&request)?;
        let migration = migration_of(&request.get_ref().migration_id)?;
        let (state, role) = match self.parts.get(migration) {
            None => (PartState::Unknown, ""),
            Some(Entry::Beginning { .. } | Entry::Broken { .. }) => (PartState::Unspecified, ""),
            Some(Entry::Ended(standing)) => (convert::ended(standing), ""),
            Some(Entry::Filling { .. }) => (PartState::Filling, "target"),
            Some(Entry::Alive { part: Part::Source(source), .. }) => (convert::source_state(&source), "source"),
            Some(Entry::Alive { part: Part::Target(target), .. }) => (convert::target_state(&target), "target"),
        };
        Ok(Response::new(v1::PartStatusResponse { state: state.into(), role: role.to_owned() }))
    }
}

impl Agent {
    fn only_coordinator<T>(&self, request: &Request<T>) -> Result<(), Status> {
        self.only(request, |peer| *peer == Peer::Coordinator)
    }

    fn only_coordinator_or_client<T>(&self, request: &Request<T>) -> Result<(), Status> {
        self.only(request, |peer| matches!(peer, Peer::Coordinator | Peer::Client(_)))
    }

    fn only<T>(&self, request: &Request<T>, may: impl Fn(&Peer) -> bool) -> Result<(), Status> {
        let peer = request.extensions().get::<PeerInfo>();
        match peer {
            Some(info) if may(&info.peer) => Ok(()),
            _ => {
                tracing::warn!(?peer, "a call is refused: its certificate is not the coordinator's");
                let message = "only the coordinator may call this";
                Err(self.context.refusal(FailureCode::PermissionDenied, message).into_status())
            }
        }
    }
}

/// Does the work also when its caller goes away meanwhile: tonic drops the call then, and half a step is neither done nor
/// undone.
async fn to_its_end<T: Send + 'static>(
    work: impl Future<Output = Result<T, Failure>> + Send + 'static,
) -> Result<T, Failure> {
    match tokio::spawn(work).await {
        Ok(result) => result,
        Err(error) => Err(Failure::new(FailureCode::Internal, format!("a task of the agent panicked: {error}"))),
    }
}

fn milliseconds_since(begun: Instant) -> f64 {
    begun.elapsed().as_secs_f64() * 1e3
}

fn door_of(pod: &v1::PodPlace) -> Door {
    Door { uid: pod.uid.clone(), container: pod.container.clone() }
}

fn migration_of(text: &str) -> Result<MigrationId, Failure> {
    text.parse().map_err(|error| Failure::from_error(FailureCode::InvalidArgument, &error))
}

fn deadline_of(ms: u64) -> SystemTime {
    SystemTime::now() + patience_of(ms)
}

fn patience_of(ms: u64) -> Duration {
    Duration::from_millis(ms).clamp(DEADLINES.0, DEADLINES.1)
}
