//! An application-level migration's source: a new instance takes this one's place, which is untouched until it has to be.
//!
//! ```text
//! stateful   runs ──────────────────────────│ link cut, quiesced ── exported ──│ sealed ──▶ killed
//! stateless  runs ──────────────────────────────────────────────────────────── │ sealed ──▶ nobody new gets in, told to end, killed
//! target            new instance ready, caught up │        imports, catches up, is verified, promoted │
//! ```
//!
//! That it is quiesced is noted before it is done: an abort, also one by an agent that was started later, runs `unquiesce` then, and joins
//! the link.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use podferry_common::failure::{Failure, FailureCode, chain};
use podferry_common::tls;
use podferry_proto::v1::application_service_client::ApplicationServiceClient;
use podferry_proto::v1::import_request::Kind as Import;
use podferry_proto::v1::{BringUpRequest, BringUpResponse, ImportBegin, ImportEnd, ImportRequest};
use podferry_runtime::{Container, Inbound, Init};
use podferry_transfer::Sender;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Code;
use tonic::transport::Channel;

use super::cold::{end_all, until_ended};
use super::order::{FreezeEvent, FreezeOrder};
use super::{SourcePart, init_lives, io_failed, ms, patience, sweep};
use crate::application::hook::{Flow, Instance};
use crate::application::{Application, Hook, HookName, Kind, http};
use crate::context::blocking;
use crate::journal::{PartRecord, Role, Standing, TakeOverNote};
use crate::worker::messages::WorkerRecord;

/// How long a hook gets that only changes a mode.
pub(crate) const HOOK_LIMIT: Duration = Duration::from_secs(60);
/// Ports that a target is told at most.
const MOST_PORTS: usize = 64;
/// How long connections that are being made get to be accepted before the instance is told to end.
const ACCEPTED: Duration = Duration::from_secs(1);
/// And how long those who are connected get to go by themselves: a program that is told to end may close a connection on which it has not
/// seen a request yet. Who keeps a connection open for the next request is not waited for longer.
const LEFT: Duration = Duration::from_millis(300);
/// Between two looks at them.
const LOOK: Duration = Duration::from_millis(5);
/// Pieces of an export that may wait for the target.
const QUEUE: usize = 8;
/// The most bytes of a piece.
const PIECE: usize = 1 << 20;

impl SourcePart {
    /// Has a new instance take this one's place. Returns when it has all that this one had.
    pub(super) async fn hand_over(
        &self,
        order: &FreezeOrder,
        sender: Arc<Sender>,
        events: &mpsc::Sender<FreezeEvent>,
    ) -> Result<(), Failure> {
        let application = self.application_of(&order.container)?;
        let channel = tls::connect(&order.target_address, &self.context.identity, &order.target).await;
        let channel = channel.map_err(|error| self.transfer_failed(&error))?;
        self.pre_copying.store(true, Ordering::Relaxed);
        let up = self.bring_up(order, &application, channel.clone()).await?;
        self.pre_copying.store(false, Ordering::Relaxed);
        let notes = vec![brought_up(&up)];
        let _nobody_watches = events.send(FreezeEvent::Converged { predicted_ms: 0.0, notes }).await;
        let begun = Instant::now();
        self.watch_arrivals(order);
        if application.kind() == Kind::Stateful {
            self.cut_off(order, &application).await?;
        }
        let frozen = Instant::now();
        let _nobody_watches = events.send(FreezeEvent::Frozen { freeze_ms: ms(begun, frozen), killed: false }).await;
        let exported = match application.hook(HookName::Export) {
            Some(hook) => self.export(order, &application, hook, channel).await?,
            None => 0,
        };
        let Some(sender) = Arc::into_inner(sender) else {
            return Err(self.context.refusal(FailureCode::Internal, "the transfer is still used").in_phase("transfer"));
        };
        // Empty: for the target it says that nothing changes here any more.
        let stats = sender.finish().await.map_err(|error| self.transfer_failed(&error))?;
        self.stopped.store(true, Ordering::Relaxed);
        let done = FreezeEvent::Transferred {
            pages: 0,
            raw_bytes: exported,
            zero_bytes: 0,
            wire_bytes: stats.wire_bytes + exported,
            dump_ms: 0.0,
            transfer_ms: ms(frozen, Instant::now()),
            last_round: None,
            verified: None,
        };
        let _nobody_watches = events.send(done).await;
        Ok(())
    }

    fn application_of(&self, container: &Container) -> Result<Application, Failure> {
        Application::of(&container.annotations).map_err(|error| {
            self.context.failure(FailureCode::FailedPrecondition, "the workload is not moved by itself", &error)
        })
    }

    async fn bring_up(
        &self,
        order: &FreezeOrder,
        application: &Application,
        channel: Channel,
    ) -> Result<BringUpResponse, Failure> {
        let listening_ports = match application.hook(HookName::Ready) {
            Some(_) => Vec::new(),
            None => self.listening_ports(&order.container)?,
        };
        let request =
            BringUpRequest { migration_id: order.migration.to_string(), listening_ports, method: application.method() };
        let deadline = order.pre_copy.map_or_else(SystemTime::now, |wish| wish.deadline);
        let mut client = ApplicationServiceClient::new(channel);
        let Ok(answer) = tokio::time::timeout(patience(deadline), client.bring_up(request)).await else {
            let message = format!("the new instance on {} was not ready before the deadline", order.target);
            let failure = self.context.refusal(FailureCode::DeadlineExceeded, message).in_phase("precopy");
            let remedy = "see why in the log of the container there, or give it longer (deadlines.precopy)";
            return Err(failure.remedy(remedy));
        };
        answer.map(tonic::Response::into_inner).map_err(|status| Failure::from_status(&status))
    }

    fn listening_ports(&self, container: &Container) -> Result<Vec<u32>, Failure> {
        let inbound = container.inbound().map_err(|error| {
            let what = "where the workload listens cannot be read";
            self.context.failure(FailureCode::FailedPrecondition, what, &error).in_phase("precopy")
        })?;
        Ok(inbound.ports.into_iter().map(u32::from).take(MOST_PORTS).collect())
    }

    fn instance(&self, container: &Container, application: &Application) -> Result<Instance, Failure> {
        Instance::of(&self.context, container, application.port()).map_err(|error| {
            let what = "the workload's network cannot be entered";
            self.context.failure(FailureCode::Internal, what, &error)
        })
    }

    /// What this instance has acknowledged by now is all that it will have acknowledged.
    async fn cut_off(&self, order: &FreezeOrder, application: &Application) -> Result<(), Failure> {
        self.note_quiesced().await?;
        let at = SystemTime::now();
        self.cut_link(order).await?;
        if let Some(arrivals) = self.arrivals.get() {
            arrivals.link_was_cut(at);
        }
        let Some(hook) = application.hook(HookName::Quiesce).cloned() else { return Ok(()) };
        let instance = self.instance(&order.container, application)?;
        // An abort waits for this guard: what quiesces must have ended before what undoes it begins.
        let guard = Arc::clone(&self.followers).lock_owned().await;
        if self.cancelled.is_cancelled() {
            return Err(self.context.refusal(FailureCode::Aborted, "the migration was aborted").in_phase("freeze"));
        }
        let running = tokio::spawn(async move {
            let _guard = guard;
            instance.run(HookName::Quiesce, &hook, Flow::default(), HOOK_LIMIT).await
        });
        let what = "the workload cannot be quiesced";
        let failed = |error: &(dyn std::error::Error + 'static)| {
            self.context.failure(FailureCode::FailedPrecondition, what, error).in_phase("freeze")
        };
        running.await.map_err(|error| failed(&error))?.map_err(|error| failed(&error))
    }

    async fn note_quiesced(&self) -> Result<(), Failure> {
        let mut record = self.ledger.lock().await;
        if self.cancelled.is_cancelled() || record.standing != Standing::Open {
            return Err(self.context.refusal(FailureCode::Aborted, "the migration was aborted").in_phase("freeze"));
        }
        if !init_lives(&record) {
            let message = format!("{} has ended by itself: there is nothing to move", record.workload);
            return Err(self.context.refusal(FailureCode::FailedPrecondition, message).in_phase("freeze"));
        }
        let noted = self.ledger.change(&mut record, |record| record.note_take_over(|note| note.quiesced = true));
        noted.map_err(|error| io_failed(&self.context, &error))
    }

    /// Sends what the application says is its state; gives how many bytes that was.
    async fn export(
        &self,
        order: &FreezeOrder,
        application: &Application,
        hook: &Hook,
        channel: Channel,
    ) -> Result<u64, Failure> {
        let instance = self.instance(&order.container, application)?;
        let (output, taken) = mpsc::channel(QUEUE);
        let (requests, outgoing) = mpsc::channel(QUEUE);
        let begin = Import::Begin(ImportBegin { migration_id: order.migration.to_string() });
        let export = async move {
            let _hung_up = requests.send(ImportRequest { kind: Some(begin) }).await;
            let flow = Flow { input: None, output: Some(output) };
            let (ended, bytes) =
                tokio::join!(instance.run(HookName::Export, hook, flow, Duration::MAX), forward(taken, &requests));
            ended?;
            let _hung_up = requests.send(ImportRequest { kind: Some(Import::End(ImportEnd { bytes })) }).await;
            Ok::<u64, crate::application::hook::HookError>(bytes)
        };
        let mut client = ApplicationServiceClient::new(channel);
        let (exported, imported) = tokio::join!(export, client.import(ReceiverStream::new(outgoing)));
        let own = |error| {
            let what = "the workload's state cannot be exported";
            self.context.failure(FailureCode::Aborted, what, &error).in_phase("transfer")
        };
        match (exported, imported) {
            (Ok(bytes), Ok(answer)) if answer.get_ref().bytes == bytes => Ok(bytes),
            (Ok(bytes), Ok(answer)) => {
                let message = format!("{bytes} bytes were exported, and {} imported", answer.into_inner().bytes);
                Err(self.context.refusal(FailureCode::Internal, message).in_phase("transfer"))
            }
            // The target says so when this end has broken off.
            (Err(error), Err(status)) if status.code() == Code::Cancelled => Err(own(error)),
            (_, Err(status)) => Err(Failure::from_status(&status)),
            (Err(error), Ok(_)) => Err(own(error)),
        }
    }

    /// Fails unless the new instance has all, and this one has not ended meanwhile.
    pub(super) fn check_handed_over(&self, record: &PartRecord) -> Result<(), Failure> {
        let refused =
            |message: &str| Err(self.context.refusal(FailureCode::FailedPrecondition, message).in_phase("commit"));
        if !self.stopped.load(Ordering::Relaxed) {
            return refused("the new instance does not have all of the workload's state yet");
        }
        if init_lives(record) { Ok(()) } else { refused("the workload has ended by itself meanwhile") }
    }

    /// Committed: ends the instance whose place another has taken. A stateless one ends what it is being asked.
    pub(super) async fn end_replaced(&self, record: &PartRecord, note: TakeOverNote) -> Result<(), Failure> {
        let Role::Source { init_pid, init_start, ref link, .. } = record.role else { return Ok(()) };
        let init = Init { pid: init_pid, start_time: init_start };
        let container = self.known_unless_dead(record)?;
        if let (true, Some(container)) = (note.stateless && init.is_alive(), &container) {
            self.drain(container, init, link.as_ref(), note).await;
        }
        let (context, link) = (self.context.clone(), link.clone());
        let cut_at = SystemTime::now();
        blocking(move || {
            if let Some(container) = &container {
                end_all(&context, container)?;
            }
            // Before the target answers at that address. It went with its container, or with a restart of the node, otherwise.
            match link.as_ref().map(podferry_network::cut) {
                None | Some(Ok(_) | Err(podferry_network::Error::NoInterface { .. })) => Ok(()),
                Some(Err(error)) => {
                    let what = "the ended instance's link cannot be cut";
                    Err(context.failure(FailureCode::Internal, what, &error).in_phase("release"))
                }
            }
        })
        .await?;
        if let (true, Some(arrivals)) = (note.stateless, self.arrivals.get()) {
            arrivals.link_was_cut(cut_at);
        }
        Ok(())
    }

    /// Nobody new gets in; who is in is served, as far as the program does that at its stop signal.
    async fn drain(
        &self,
        container: &Container,
        init: Init,
        link: Option<&podferry_network::LinkHandle>,
        note: TakeOverNote,
    ) {
        if let Some(Err(error)) = link.map(podferry_network::hold_new_connections) {
            tracing::warn!(
                error = chain(&error),
                "new connections are not held, and may be refused while the workload ends"
            );
        }
        until_none(container, ACCEPTED, |inbound| inbound.arriving).await;
        until_none(container, LEFT, |inbound| inbound.arriving + inbound.open).await;
        init.terminate(note.signal);
        if tokio::time::timeout(note.grace, until_ended(init)).await.is_err() {
            tracing::warn!(id = container.id, grace = ?note.grace, "the workload did not end in its grace period; it is killed");
        }
    }

    /// Undoes that it was cut off, if it was begun: it takes changes again, at its address, when this returns. Idempotent.
    pub(super) async fn unquiesce(&self, record: &PartRecord) -> Result<(), Failure> {
        if record.take_over().is_none_or(|note| !note.quiesced) {
            return Ok(());
        }
        let known = self.known_unless_dead(record)?.filter(Container::is_alive);
        if let Some(container) = &known {
            self.run_unquiesce(container).await?;
        }
        let Role::Source { link, .. } = &record.role else { return Ok(()) };
        sweep::free_container(&self.context, None, WorkerRecord::default(), link.clone()).await
    }

    async fn run_unquiesce(&self, container: &Container) -> Result<(), Failure> {
        let application = self.application_of(container)?;
        let Some(hook) = application.hook(HookName::Unquiesce) else { return Ok(()) };
        let instance = self.instance(container, &application)?;
        let undone = instance.run(HookName::Unquiesce, hook, Flow::default(), HOOK_LIMIT).await;
        undone.map_err(|error| {
            let what = "the workload stays quiesced";
            let failure = self.context.failure(FailureCode::Internal, what, &error).in_phase("rollback");
            failure.remedy("it is tried again; or do by hand in the container what the hook does")
        })
    }

    /// A connection to this instance, for the new one, and what ends it.
    ///
    /// # Errors
    /// When its container names no port, or nobody listens there.
    pub async fn reached(&self) -> Result<(TcpStream, CancellationToken), Failure> {
        let gone = || self.context.refusal(FailureCode::FailedPrecondition, "this instance cannot be reached");
        let container = self.container.as_ref().ok_or_else(gone)?;
        let application = self.application_of(container)?;
        let port = application.port().ok_or_else(gone)?;
        let instance = self.instance(container, &application)?;
        let connected = http::connect(instance.netns(), port).await;
        let stream = connected.map_err(|error| {
            self.context.failure(FailureCode::Unavailable, "the old instance cannot be reached", &error)
        })?;
        Ok((stream, self.cancelled.clone()))
    }

    /// Which node has the instance that takes this one's place.
    pub fn replaced_on(&self) -> Option<&podferry_common::identity::Peer> {
        self.replaced_on.as_ref()
    }
}

fn brought_up(up: &BringUpResponse) -> String {
    let ready = format!("the new instance was ready after {:.0} ms", up.ready_ms);
    if up.caught_up_ms > 0.0 { format!("{ready}, and had caught up {:.0} ms later", up.caught_up_ms) } else { ready }
}

/// Waits until a container has no more such connections, for so long at most.
async fn until_none(container: &Container, patience: Duration, which: impl Fn(&Inbound) -> u64) {
    let end = Instant::now() + patience;
    while Instant::now() < end && container.inbound().is_ok_and(|inbound| which(&inbound) > 0) {
        tokio::time::sleep(LOOK).await;
    }
}

/// Sends what comes, in pieces; gives how many bytes that was.
async fn forward(mut taken: mpsc::Receiver<Bytes>, requests: &mpsc::Sender<ImportRequest>) -> u64 {
    let mut bytes = 0;
    while let Some(mut data) = taken.recv().await {
        while !data.is_empty() {
            let piece = data.split_to(data.len().min(PIECE));
            bytes += piece.len() as u64;
            if requests.send(ImportRequest { kind: Some(Import::Data(piece)) }).await.is_err() {
                return bytes;
            }
        }
    }
    bytes
}
