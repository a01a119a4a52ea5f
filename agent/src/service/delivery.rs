//! `DeliveryService`: what a source's agent hands on of the container's network.

use std::sync::Arc;

use podferry_common::failure::{Failure, FailureCode};
use podferry_common::identity::Peer;
use podferry_common::tls::PeerInfo;
use podferry_proto::v1::deliver_request::Kind;
use podferry_proto::v1::delivery_service_server::DeliveryService;
use podferry_proto::v1::{DeliverRequest, DeliverResponse};
use tonic::{Request, Response, Status, Streaming};

use super::migration_of;
use crate::context::Context;
use crate::parts::{Entry, Part, Parts};
use crate::target::TargetPart;

/// The service.
#[derive(Clone, Debug)]
pub struct Delivery {
    context: Context,
    parts: Parts,
}

impl Delivery {
    /// For the parts of this node.
    pub fn new(context: Context, parts: Parts) -> Self {
        Self { context, parts }
    }

    /// The part that this peer may deliver to.
    fn part(&self, first: Option<DeliverRequest>, peer: Option<&Peer>) -> Result<Arc<TargetPart>, Failure> {
        let Some(DeliverRequest { kind: Some(Kind::Begin(begin)) }) = first else {
            return Err(self.context.refusal(FailureCode::InvalidArgument, "the first message is not Begin"));
        };
        match self.parts.get(migration_of(&begin.migration_id)?) {
            Some(Entry::Alive { part: Part::Target(target), .. }) if peer.is_some() && peer == target.source() => {
                Ok(target)
            }
            _ => {
                tracing::warn!(?peer, migration = begin.migration_id, "packets are refused");
                let message = "this node does not expect that migration from you";
                Err(self.context.refusal(FailureCode::PermissionDenied, message))
            }
        }
    }
}

#[tonic::async_trait]
impl DeliveryService for Delivery {
    async fn deliver(&self, request: Request<Streaming<DeliverRequest>>) -> Result<Response<DeliverResponse>, Status> {
        let peer = request.extensions().get::<PeerInfo>().map(|info| info.peer.clone());
        let mut messages = request.into_inner();
        let part = self.part(messages.message().await?, peer.as_ref()).map_err(Failure::into_status)?;
        // Not the part: it may end before the packets do.
        let doorstep = Arc::clone(part.doorstep());
        drop(part);
        let mut delivered = 0;
        while let Some(message) = messages.message().await? {
            let Some(Kind::Packets(packets)) = message.kind else {
                let message = "only Packets may follow Begin";
                return Err(self.context.refusal(FailureCode::InvalidArgument, message).into_status());
            };
            delivered += packets.packets.iter().filter(|packet| doorstep.put(packet)).count() as u64;
        }
        Ok(Response::new(DeliverResponse { delivered }))
    }
}
