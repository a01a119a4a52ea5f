//! An agent that keeps the protocol's rules on containers that are entries in a table.

use std::sync::Arc;

use podferry_common::tls::Incoming;
use podferry_common::{Failure, FailureCode};
use podferry_proto::v1::agent_service_server::{AgentService, AgentServiceServer};
use podferry_proto::v1::freeze_event::Event;
use podferry_proto::v1::*;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status};

use super::{Copy, Fault, Part, Shared, State};

const MEMORY: u64 = 64 << 20;

pub(super) async fn serve(node: String, shared: Arc<Shared>, incoming: Incoming) {
    let agent = Agent { node, shared };
    tonic::transport::Server::builder()
        .add_service(AgentServiceServer::new(agent))
        .serve_with_incoming(incoming)
        .await
        .unwrap();
}

#[derive(Clone)]
struct Agent {
    node: String,
    shared: Arc<Shared>,
}

fn refused(what: &str) -> Status {
    Failure::new(FailureCode::FailedPrecondition, what).into()
}

impl Agent {
    /// Takes the call down and does what its fault says. What comes back is to be answered after the duty.
    async fn enter(&self, method: &'static str) -> Result<After, Status> {
        self.shared.lock().log.push(format!("{} {method}", self.node));
        self.shared.changed.notify_waiters();
        loop {
            let changed = self.shared.changed.notified();
            let fault = self.take_fault(method);
            match fault {
                None => return Ok(After::Answer),
                Some(Fault::Fail(failure)) => return Err(failure.into()),
                Some(Fault::FailAfterwards(failure)) => return Ok(After::Fail(failure)),
                Some(Fault::Find(finding)) => return Ok(After::Find(finding)),
                Some(Fault::Hang) => changed.await,
            }
        }
    }

    fn take_fault(&self, method: &'static str) -> Option<Fault> {
        let mut state = self.shared.lock();
        let key = (self.node.clone(), method);
        let (fault, times) = state.faults.get_mut(&key)?;
        let fault = fault.clone();
        if !matches!(fault, Fault::Hang) {
            *times -= 1;
            if *times == 0 {
                state.faults.remove(&key);
            }
        }
        Some(fault)
    }

    /// Takes down which strategy a preflight is about. An agent is never left to choose.
    fn take_strategy(&self, strategy: Strategy) {
        assert!(!matches!(strategy, Strategy::Unspecified | Strategy::Auto), "{strategy:?}");
        self.shared.lock().asked.push((self.node.clone(), strategy));
    }

    /// Changes the world, under its lock and its rule.
    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.shared.lock();
        let value = change(&mut state);
        state.check();
        drop(state);
        self.shared.changed.notify_waiters();
        value
    }

    fn part(&self, id: &str) -> Option<(Part, String)> {
        self.shared.lock().nodes[&self.node].parts.get(id).cloned()
    }

    /// Moves a part and its copy: `None` takes the copy away.
    fn set(&self, id: &str, container: &str, part: Part, copy: Option<Copy>) {
        self.change(|state| {
            let node = state.nodes.get_mut(&self.node).unwrap();
            node.parts.insert(id.to_owned(), (part, container.to_owned()));
            match copy {
                Some(copy) => node.containers.insert(container.to_owned(), copy),
                None => node.containers.remove(container),
            };
        });
    }
}

type Events = mpsc::Sender<Result<FreezeEvent, Status>>;

impl Agent {
    /// What the stream of a freeze says. An error ends it.
    async fn send_all(&self, request: &FreezeRequest, after: After, events: &Events) -> Result<(), Status> {
        let send = |event| events.send(Ok(FreezeEvent { event: Some(event) }));
        let id = &request.migration_id;
        if request.pre_copy.is_some() {
            self.pre_copy(request, events).await?;
        }
        let _gone = send(Event::Frozen(Frozen { freeze_ms: 1.5, killed: false })).await;
        let half = Progress { raw_bytes: MEMORY / 2, wire_bytes: MEMORY / 4 };
        let _gone = send(Event::Progress(half)).await;
        self.enter("Transfer").await?.answer(())?;
        after.answer(())?;
        self.change(|state| state.transferred.push(id.clone()));
        let last_round =
            Round { pages: 3, raw_bytes: 3 << 12, wire_bytes: 1 << 12, duration_ms: 2.0, ..Round::default() };
        let sent = Transferred {
            pages: MEMORY / 4096,
            raw_bytes: MEMORY,
            wire_bytes: MEMORY / 2,
            dump_ms: 20.0,
            transfer_ms: 5.0,
            last_round: request.pre_copy.map(|_| last_round),
            verified: self.verified(request),
            ..Transferred::default()
        };
        let _gone = send(Event::Transferred(sent)).await;
        Ok(())
    }

    fn verified(&self, request: &FreezeRequest) -> Option<Verified> {
        let wanted = request.pre_copy.is_some_and(|pre_copy| pre_copy.verify);
        let heeded = wanted && !self.shared.lock().no_verification;
        heeded.then_some(Verified { bytes: MEMORY, verify_ms: 12.5 })
    }

    async fn pre_copy(&self, request: &FreezeRequest, events: &Events) -> Result<(), Status> {
        let send = |event| events.send(Ok(FreezeEvent { event: Some(event) }));
        let round = |pages: u64, predicted_ms| {
            let (raw_bytes, wire_bytes) = (pages << 12, pages << 11);
            Event::Round(Round {
                pages,
                raw_bytes,
                wire_bytes,
                duration_ms: 9.0,
                dirty_rate: 700.0,
                predicted_ms,
                cpu_limit: 0.0,
            })
        };
        let _gone = send(round(16_000, 90.0)).await;
        self.enter("PreCopy").await?.answer(())?;
        let (more, tells) = {
            let state = self.shared.lock();
            (state.further_rounds.unwrap_or(1), !state.no_word_of_convergence)
        };
        for _ in 0..more {
            let _gone = send(round(300, 4.5)).await;
        }
        self.stop(&request.migration_id)?;
        if tells {
            let notes = vec!["process 1: 2 rounds".to_owned()];
            let _gone = send(Event::Converged(Converged { predicted_ms: 4.5, notes })).await;
        }
        Ok(())
    }

    /// Freezes what is still being copied.
    fn stop(&self, id: &str) -> Result<(), Status> {
        let stopped = self.change(|state| {
            let node = state.nodes.get_mut(&self.node).unwrap();
            let Some((part @ Part::PreCopying, container)) = node.parts.get_mut(id) else { return false };
            *part = Part::Frozen;
            node.containers.insert(container.clone(), Copy::Frozen);
            true
        });
        if stopped { Ok(()) } else { Err(Failure::new(FailureCode::Aborted, "pre-copy was aborted").into()) }
    }
}

enum After {
    Answer,
    Fail(Failure),
    Find(Finding),
}

impl After {
    fn answer<T>(self, message: T) -> Result<Response<T>, Status> {
        match self {
            Self::Fail(failure) => Err(failure.into()),
            Self::Answer | Self::Find(_) => Ok(Response::new(message)),
        }
    }

    fn findings(&self) -> Vec<Finding> {
        match self {
            Self::Find(finding) => vec![finding.clone()],
            Self::Answer | Self::Fail(_) => Vec::new(),
        }
    }
}

#[tonic::async_trait]
impl AgentService for Agent {
    async fn describe(&self, _: Request<DescribeRequest>) -> Result<Response<DescribeResponse>, Status> {
        let after = self.enter("Describe").await?;
        let description = self.shared.lock().nodes[&self.node].description.clone();
        after.answer(description)
    }

    async fn list_containers(
        &self,
        _: Request<ListContainersRequest>,
    ) -> Result<Response<ListContainersResponse>, Status> {
        let after = self.enter("ListContainers").await?;
        let state = self.shared.lock();
        let list = state.nodes[&self.node].containers.keys().map(|id| Container {
            id: id.clone(),
            status: "running".to_owned(),
            memory_bytes: MEMORY,
            processes: 2,
            addresses: vec!["10.9.0.5".to_owned()],
            ..Container::default()
        });
        after.answer(ListContainersResponse { containers: list.collect() })
    }

    async fn list_relays(&self, _: Request<ListRelaysRequest>) -> Result<Response<ListRelaysResponse>, Status> {
        let after = self.enter("ListRelays").await?;
        let ends = self.shared.lock().nodes[&self.node].relays.clone();
        after.answer(ListRelaysResponse { ends })
    }

    async fn preflight_source(
        &self,
        request: Request<PreflightSourceRequest>,
    ) -> Result<Response<PreflightSourceResponse>, Status> {
        self.take_strategy(request.get_ref().strategy());
        let after = self.enter("PreflightSource").await?;
        let tracking = self.shared.lock().tracking.clone().filter(|_| request.get_ref().look_at_tracking);
        let (network, volumes, relayed) = {
            let state = self.shared.lock();
            let node = &state.nodes[&self.node];
            if node.containers.get(&request.get_ref().workload) != Some(&Copy::Running) {
                return Err(refused("the container does not run"));
            }
            (node.network, node.volumes.clone(), node.relayed.clone())
        };
        let findings = after.findings();
        after.answer(PreflightSourceResponse {
            findings,
            memory_bytes: MEMORY,
            network: network.into(),
            tcp_connections: 3,
            processes: 2,
            volumes,
            relayed,
            tracking,
            ..PreflightSourceResponse::default()
        })
    }

    async fn preflight_target(
        &self,
        request: Request<PreflightTargetRequest>,
    ) -> Result<Response<PreflightTargetResponse>, Status> {
        assert_eq!(request.get_ref().memory_bytes, MEMORY, "the target is asked about what the source said");
        self.take_strategy(request.get_ref().strategy());
        let after = self.enter("PreflightTarget").await?;
        self.shared.lock().asked_targets.push(request.into_inner());
        let findings = after.findings();
        after.answer(PreflightTargetResponse { findings })
    }

    async fn prepare(&self, request: Request<PrepareRequest>) -> Result<Response<PrepareResponse>, Status> {
        let after = self.enter("Prepare").await?;
        self.shared.lock().prepares.push(request.get_ref().clone());
        let PrepareRequest { migration_id, workload, deadline_ms, .. } = request.into_inner();
        assert!(deadline_ms >= 5_000, "an unsealed part outlives the phases before its seal");
        if self.part(&migration_id).is_some() {
            return Err(refused("prepared or ended already"));
        }
        if self.shared.lock().nodes[&self.node].containers.contains_key(&workload) {
            return Err(refused("the container is there"));
        }
        self.set(&migration_id, &workload, Part::Prepared, None);
        after.answer(PrepareResponse::default())
    }

    type FreezeStream = ReceiverStream<Result<FreezeEvent, Status>>;

    async fn freeze(&self, request: Request<FreezeRequest>) -> Result<Response<Self::FreezeStream>, Status> {
        let request = request.into_inner();
        let (events, stream) = mpsc::channel(8);
        let after = self.enter("Freeze").await?;
        if self.part(&request.migration_id).is_some() {
            return Err(refused("frozen or ended already"));
        }
        let (part, copy) = match &request.pre_copy {
            Some(_) => (Part::PreCopying, Copy::Running),
            None => (Part::Frozen, Copy::Frozen),
        };
        self.set(&request.migration_id, &request.workload, part, Some(copy));
        self.shared.lock().freezes.push(request.clone());
        let agent = self.clone();
        tokio::spawn(async move {
            if let Err(status) = agent.send_all(&request, after, &events).await {
                let _gone = events.send(Err(status)).await;
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn restore(&self, request: Request<RestoreRequest>) -> Result<Response<RestoreResponse>, Status> {
        let id = request.into_inner().migration_id;
        let after = self.enter("Restore").await?;
        let Some((Part::Prepared, container)) = self.part(&id) else { return Err(refused("not prepared")) };
        loop {
            let changed = self.shared.changed.notified();
            if self.part(&id).is_none_or(|(part, _)| part != Part::Prepared) {
                return Err(Failure::new(FailureCode::Aborted, "the restore was aborted").into());
            }
            if self.shared.lock().transferred.contains(&id) {
                break;
            }
            changed.await;
        }
        self.set(&id, &container, Part::Held, Some(Copy::Held));
        after.answer(RestoreResponse { restore_ms: 30.0 })
    }

    async fn seal(&self, request: Request<SealRequest>) -> Result<Response<SealResponse>, Status> {
        let id = request.into_inner().migration_id;
        let after = self.enter("Seal").await?;
        match self.part(&id) {
            Some((Part::Frozen, container)) => self.set(&id, &container, Part::Sealed, Some(Copy::Frozen)),
            Some((Part::Held, container)) => self.set(&id, &container, Part::Sealed, Some(Copy::Held)),
            Some((Part::Sealed, _)) => {}
            _ => return Err(refused("nothing to seal")),
        }
        after.answer(SealResponse {})
    }

    async fn release(&self, request: Request<ReleaseRequest>) -> Result<Response<ReleaseResponse>, Status> {
        let id = request.into_inner().migration_id;
        let after = self.enter("Release").await?;
        match self.part(&id) {
            Some((Part::Sealed, container)) => self.set(&id, &container, Part::Over, None),
            Some((Part::Over, _)) => {}
            _ => return Err(refused("nothing to release")),
        }
        after.answer(ReleaseResponse { release_ms: 2.0 })
    }

    async fn resume(&self, request: Request<ResumeRequest>) -> Result<Response<ResumeResponse>, Status> {
        let id = request.into_inner().migration_id;
        let after = self.enter("Resume").await?;
        match self.part(&id) {
            Some((Part::Sealed, container)) => self.set(&id, &container, Part::Over, Some(Copy::Running)),
            Some((Part::Over, _)) => {}
            _ => return Err(refused("nothing to resume")),
        }
        after.answer(ResumeResponse { resume_ms: 4.0, pid: 4711 })
    }

    async fn fill(&self, request: Request<FillRequest>) -> Result<Response<FillResponse>, Status> {
        let id = request.into_inner().migration_id;
        let entered = self.enter("Fill").await;
        let part = self.part(&id);
        if let (Err(status), Some((Part::Over, container))) = (&entered, &part)
            && status.code() == Code::DataLoss
            && Failure::from_status(status).node.as_ref() == Some(&self.node)
        {
            self.set(&id, container, Part::Over, None);
        }
        let after = entered?;
        match part {
            Some((Part::Over, _)) => after.answer(FillResponse { pages: 100, faults: 3, fill_ms: 6.0 }),
            _ => Err(refused("nothing to fill")),
        }
    }

    async fn abort(&self, request: Request<AbortRequest>) -> Result<Response<AbortResponse>, Status> {
        let AbortRequest { migration_id: id, reason } = request.into_inner();
        assert!(!reason.is_empty(), "an agent is told why");
        let after = self.enter("Abort").await?;
        let copy = self.part(&id).map(|(_, container)| (self.copy_of(&container), container));
        match copy {
            Some((Some(Copy::Frozen | Copy::Running), container)) => {
                self.set(&id, &container, Part::Over, Some(Copy::Running));
            }
            Some((Some(Copy::Held) | None, container)) => self.set(&id, &container, Part::Over, None),
            // A call that comes late must not begin it.
            None => self.set(&id, "", Part::Over, None),
        }
        after.answer(AbortResponse {})
    }

    async fn part_status(&self, _: Request<PartStatusRequest>) -> Result<Response<PartStatusResponse>, Status> {
        Err(Status::unimplemented("nobody asks in these tests"))
    }
}

impl Agent {
    fn copy_of(&self, container: &str) -> Option<Copy> {
        self.shared.lock().nodes[&self.node].containers.get(container).copied()
    }
}
