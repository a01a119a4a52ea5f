//! `RelayService`: connections of a pod whose old address is elsewhere.

use std::pin::Pin;
use std::sync::Arc;

use futures::Stream;
use podferry_common::failure::{Failure, FailureCode, chain};
use podferry_common::tls::PeerInfo;
use podferry_proto::v1::carry_request::Kind;
use podferry_proto::v1::carry_response::Kind as Answer;
use podferry_proto::v1::relay_service_server::RelayService;
use podferry_proto::v1::{CarryReady, CarryRequest, CarryResponse};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::migration_of;
use crate::context::Context;
use crate::relay::{Away, Leaves, QUEUE, batch, bytes_of, message};

/// The service.
#[derive(Clone, Debug)]
pub struct Relay {
    context: Context,
}

impl Relay {
    /// For the relays of this node.
    pub fn new(context: Context) -> Self {
        Self { context }
    }

    /// That which this peer may send for.
    fn away(&self, first: Option<CarryRequest>, peer: Option<&PeerInfo>) -> Result<Arc<Away>, Failure> {
        let Some(CarryRequest { kind: Some(Kind::Begin(begin)) }) = first else {
            return Err(self.context.refusal(FailureCode::InvalidArgument, "the first message is not Begin"));
        };
        let found = self.context.aways.get(migration_of(&begin.migration_id)?);
        let Some(away) = found else {
            return Err(self.context.refusal(FailureCode::NotFound, "this node has no relay of that migration"));
        };
        if !away.is_of(peer.map(|info| &info.peer)) {
            tracing::warn!(peer = ?peer.map(|info| &info.peer), migration = begin.migration_id, "packets are refused");
            let message = "this node does not expect that relay from you";
            return Err(self.context.refusal(FailureCode::PermissionDenied, message));
        }
        Ok(away)
    }
}

#[tonic::async_trait]
impl RelayService for Relay {
    type CarryStream = Pin<Box<dyn Stream<Item = Result<CarryResponse, Status>> + Send>>;

    async fn carry(&self, request: Request<Streaming<CarryRequest>>) -> Result<Response<Self::CarryStream>, Status> {
        let peer = request.extensions().get::<PeerInfo>().cloned();
        let mut packets = request.into_inner();
        let away = self.away(packets.message().await?, peer.as_ref()).map_err(Failure::into_status)?;
        let (answers, receiver) = mpsc::channel(QUEUE);
        let _never_full = answers.try_send(Ok(answer(Answer::Ready(CarryReady {}))));
        tokio::spawn(async move {
            if let Err(status) = carry(&away, packets, &answers).await {
                let _gone = answers.send(Err(status)).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

/// Both ways, until the relay ends, the stream breaks, or there is a newer one.
async fn carry(
    away: &Away,
    mut packets: Streaming<CarryRequest>,
    answers: &mpsc::Sender<Result<CarryResponse, Status>>,
) -> Result<(), Status> {
    let (number, mut newest) = away.take_over();
    let mut leaves = away.leaves();
    let mut room = None;
    loop {
        let word = *leaves.borrow_and_update();
        if word == Leaves::Over {
            return Ok(());
        }
        tokio::select! {
            biased;
            // Dropped with the relay alone, which says so first.
            _ = leaves.changed() => {}
            _ = newest.wait_for(|newest| *newest != number) => {
                return Err(Status::aborted("another stream has taken this one's place"));
            }
            message = packets.message() => match message? {
                Some(CarryRequest { kind: Some(Kind::Packets(packets)) }) => {
                    packets.packets.iter().for_each(|packet| away.put(packet));
                }
                Some(_) => return Err(Status::invalid_argument("only Packets may follow Begin")),
                None => return Ok(()),
            },
            permit = answers.reserve(), if word != Leaves::NotYet && room.is_none() => match permit {
                Ok(permit) => room = Some(permit),
                Err(_) => return Ok(()),
            },
            packet = away.next(), if word != Leaves::NotYet && room.is_some() => {
                let gathered = packet.and_then(|first| batch(first, || away.try_next()));
                let gathered = gathered.map_err(|error| Status::internal(chain(&error)))?;
                away.sent(bytes_of(&gathered));
                if let Some(permit) = room.take() {
                    permit.send(Ok(answer(Answer::Packets(message(gathered)))));
                }
            }
        }
    }
}

fn answer(kind: Answer) -> CarryResponse {
    CarryResponse { kind: Some(kind) }
}
