//! `FetchService`: what a target's agent fetches of a container that stands still here.

use std::pin::Pin;
use std::sync::Arc;

use futures::Stream;
use podferry_common::failure::{Failure, FailureCode};
use podferry_common::identity::Peer;
use podferry_common::tls::PeerInfo;
use podferry_proto::v1::fetch_request::Kind;
use podferry_proto::v1::fetch_service_server::FetchService;
use podferry_proto::v1::{FetchBegin, FetchRequest, FetchResponse};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::migration_of;
use crate::context::Context;
use crate::parts::{Entry, Part, Parts};
use crate::source::{PageReader, SourcePart};

/// Answers that may wait for a slow link.
const QUEUE: usize = 4;

/// The service.
#[derive(Clone, Debug)]
pub struct Fetch {
    context: Context,
    parts: Parts,
}

type Answers = Pin<Box<dyn Stream<Item = Result<FetchResponse, Status>> + Send>>;

impl Fetch {
    /// For the parts of this node.
    pub fn new(context: Context, parts: Parts) -> Self {
        Self { context, parts }
    }

    /// The part that this peer may fetch from.
    fn part(&self, begin: &FetchBegin, peer: Option<&Peer>) -> Result<Arc<SourcePart>, Failure> {
        match self.parts.get(migration_of(&begin.migration_id)?) {
            Some(Entry::Alive { part: Part::Source(source), .. }) => {
                let named = source.fetched_by().map(|by| Peer::Agent(by.node.clone()));
                if named.is_some() && peer == named.as_ref() { Ok(source) } else { Err(self.refused(begin, peer)) }
            }
            Some(Entry::Ended(standing)) => {
                let message = format!("this node has no pages of that migration any more: its part is {standing:?}");
                Err(self.context.refusal(FailureCode::DataLoss, message).in_phase("fill"))
            }
            Some(Entry::Broken { .. }) => {
                let message = "this node's part of the migration could not be taken up again";
                Err(self.context.refusal(FailureCode::Unavailable, message).in_phase("fill"))
            }
            _ => Err(self.refused(begin, peer)),
        }
    }

    fn refused(&self, begin: &FetchBegin, peer: Option<&Peer>) -> Failure {
        tracing::warn!(?peer, migration = begin.migration_id, "pages are refused");
        let message = "this node has no pages of that migration for you";
        self.context.refusal(FailureCode::PermissionDenied, message).in_phase("fill")
    }

    async fn answer(
        &self,
        mut reader: PageReader,
        mut asked: Streaming<FetchRequest>,
        to: mpsc::Sender<Result<FetchResponse, Status>>,
    ) {
        while let Ok(Some(request)) = asked.message().await {
            let Some(Kind::Pages(pages)) = request.kind else {
                let message = "only Pages may follow Begin";
                let failure = self.context.refusal(FailureCode::InvalidArgument, message);
                let _gone = to.send(Err(failure.into_status())).await;
                return;
            };
            match reader.read(&pages).await {
                Ok((again, response)) => {
                    reader = again;
                    if to.send(Ok(response)).await.is_err() {
                        return;
                    }
                }
                Err(failure) => {
                    tracing::warn!(%failure, "pages cannot be given");
                    let _gone = to.send(Err(failure.into_status())).await;
                    return;
                }
            }
        }
    }
}

#[tonic::async_trait]
impl FetchService for Fetch {
    type FetchStream = Answers;

    async fn fetch(&self, request: Request<Streaming<FetchRequest>>) -> Result<Response<Answers>, Status> {
        let peer = request.extensions().get::<PeerInfo>().map(|info| info.peer.clone());
        let mut asked = request.into_inner();
        let Some(FetchRequest { kind: Some(Kind::Begin(begin)) }) = asked.message().await? else {
            return Err(self.context.refusal(FailureCode::InvalidArgument, "the first message is not Begin").into());
        };
        let part = self.part(&begin, peer.as_ref())?;
        let reader = PageReader::of(&self.context, part, begin.awaited).await?;
        let (to, answers) = mpsc::channel(QUEUE);
        let service = self.clone();
        tokio::spawn(async move { service.answer(reader, asked, to).await });
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }
}
