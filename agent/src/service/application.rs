//! `ApplicationService`: what the agents of an application-level migration say to each other.

use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use futures::Stream;
use podferry_common::failure::{Failure, FailureCode};
use podferry_common::identity::Peer;
use podferry_common::tls::PeerInfo;
use podferry_proto::v1::application_service_server::ApplicationService;
use podferry_proto::v1::import_request::Kind as Import;
use podferry_proto::v1::relay_request::Kind as Relayed;
use podferry_proto::v1::{BringUpRequest, BringUpResponse, ImportRequest, ImportResponse, RelayRequest, RelayResponse};
use tokio::sync::mpsc;
use tonic::{Request, Response, Status, Streaming};

use super::{migration_of, to_its_end};
use crate::application::relay;
use crate::context::Context;
use crate::parts::{Entry, Part, Parts};
use crate::source::SourcePart;
use crate::target::TargetPart;

/// Pieces of an import that may wait for its hook.
const QUEUE: usize = 8;
/// The most ports that are waited for.
const MOST_PORTS: usize = 64;

/// The service.
#[derive(Clone, Debug)]
pub struct Application {
    context: Context,
    parts: Parts,
}

type Answers = Pin<Box<dyn Stream<Item = Result<RelayResponse, Status>> + Send>>;

impl Application {
    /// For the parts of this node.
    pub fn new(context: Context, parts: Parts) -> Self {
        Self { context, parts }
    }

    /// The target's part whose source this peer is.
    fn target(&self, migration: &str, peer: Option<&Peer>) -> Result<Arc<TargetPart>, Failure> {
        match self.parts.get(migration_of(migration)?) {
            Some(Entry::Alive { part: Part::Target(target), .. }) if peer.is_some() && peer == target.source() => {
                Ok(target)
            }
            _ => Err(self.denied(migration, peer)),
        }
    }

    /// The source's part whose instance is replaced on this peer's node, as long as it is there.
    fn source(&self, migration: &str, peer: Option<&Peer>) -> Result<Arc<SourcePart>, Failure> {
        match self.parts.get(migration_of(migration)?) {
            Some(Entry::Alive { part: Part::Source(source), .. })
                if peer.is_some() && peer == source.replaced_on() && !source.standing().is_last() =>
            {
                Ok(source)
            }
            _ => Err(self.denied(migration, peer)),
        }
    }

    fn denied(&self, migration: &str, peer: Option<&Peer>) -> Failure {
        tracing::warn!(?peer, migration, "a call about a new instance is refused");
        let message = "this node has no part of that migration with you";
        self.context.refusal(FailureCode::PermissionDenied, message)
    }

    fn invalid(&self, message: &str) -> Failure {
        self.context.refusal(FailureCode::InvalidArgument, message)
    }

    /// Hands on what comes until its end; gives how many bytes that was.
    async fn take(&self, mut messages: Streaming<ImportRequest>, to: &mpsc::Sender<Bytes>) -> Result<u64, Status> {
        let broken = |status: &Status| Status::cancelled(format!("the export broke off: {}", status.message()));
        let mut bytes = 0;
        while let Some(message) = messages.message().await.map_err(|status| broken(&status))? {
            match message.kind {
                Some(Import::Data(data)) => {
                    bytes += data.len() as u64;
                    if to.send(data).await.is_err() {
                        // It has ended, and says itself how.
                        std::future::pending::<()>().await;
                    }
                }
                Some(Import::End(end)) if end.bytes == bytes => return Ok(bytes),
                Some(Import::End(end)) => {
                    return Err(self.invalid(&format!("{} bytes were to come, and {bytes} have", end.bytes)).into());
                }
                _ => return Err(self.invalid("only data and End may follow Begin").into()),
            }
        }
        Err(Status::cancelled("the export broke off"))
    }
}

fn peer_of<T>(request: &Request<T>) -> Option<Peer> {
    request.extensions().get::<PeerInfo>().map(|info| info.peer.clone())
}

#[tonic::async_trait]
impl ApplicationService for Application {
    type RelayStream = Answers;

    async fn bring_up(&self, request: Request<BringUpRequest>) -> Result<Response<BringUpResponse>, Status> {
        let peer = peer_of(&request);
        let BringUpRequest { migration_id, listening_ports, method } = request.into_inner();
        let target = self.target(&migration_id, peer.as_ref())?;
        if listening_ports.len() > MOST_PORTS {
            return Err(self.invalid("more ports are named than are waited for").into());
        }
        let ports: Result<Vec<u16>, _> = listening_ports.into_iter().map(u16::try_from).collect();
        let ports = ports.map_err(|_| self.invalid("a port is above 65535"))?;
        // Half a start is neither done nor undone; an abort ends it.
        let up = to_its_end(async move { target.bring_up(ports, &method).await }).await?;
        Ok(Response::new(up))
    }

    async fn import(&self, request: Request<Streaming<ImportRequest>>) -> Result<Response<ImportResponse>, Status> {
        let peer = peer_of(&request);
        let mut messages = request.into_inner();
        let Some(ImportRequest { kind: Some(Import::Begin(begin)) }) = messages.message().await? else {
            return Err(self.invalid("the first message is not Begin").into());
        };
        let target = self.target(&begin.migration_id, peer.as_ref())?;
        let (to, input) = mpsc::channel(QUEUE);
        let importing = target.import(input);
        tokio::pin!(importing);
        // The hook sees the end of its input only when all has come; what breaks off drops it.
        let bytes = tokio::select! {
            taken = self.take(messages, &to) => taken?,
            ended = &mut importing => {
                ended?;
                let message = "the hook import ended before its input did";
                return Err(self.context.refusal(FailureCode::Aborted, message).in_phase("transfer").into());
            }
        };
        drop(to);
        importing.await?;
        Ok(Response::new(ImportResponse { bytes }))
    }

    async fn relay(&self, request: Request<Streaming<RelayRequest>>) -> Result<Response<Answers>, Status> {
        let peer = peer_of(&request);
        let mut messages = request.into_inner();
        let Some(RelayRequest { kind: Some(Relayed::Begin(begin)) }) = messages.message().await? else {
            return Err(self.invalid("the first message is not Begin").into());
        };
        let source = self.source(&begin.migration_id, peer.as_ref())?;
        let (stream, ended) = source.reached().await?;
        Ok(Response::new(Box::pin(relay::answer(stream, messages, ended))))
    }
}
