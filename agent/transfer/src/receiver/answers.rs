//! The response: answers as they come, and how it ended in the trailers.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame};
use podferry_common::{Failure, FailureCode};
use podferry_proto::v1::transfer_response::Kind;
use podferry_proto::v1::{TransferAcknowledgement, TransferFinished, TransferResponse, TransferWelcome};
use tokio::sync::{mpsc, oneshot};
use tonic::Status;

use crate::message;

/// Answers that may wait for a sender which reads slowly; it gets no acknowledgements then.
const WAITING: usize = 16;

/// Where answers are given.
pub(super) struct Answers {
    messages: mpsc::Sender<Bytes>,
    status: oneshot::Sender<Status>,
}

impl Answers {
    pub(super) fn new() -> (Self, AnswerBody) {
        let (messages, waiting) = mpsc::channel(WAITING);
        let (status, ended) = oneshot::channel();
        (Self { messages, status }, AnswerBody { waiting, status: Some(ended) })
    }

    pub(super) fn welcome(&self, welcome: TransferWelcome) {
        self.send(Kind::Welcome(welcome));
    }

    pub(super) fn acknowledge(&self, reached: TransferAcknowledgement) {
        // One place is kept for Finished.
        if self.messages.capacity() > 1 {
            self.send(Kind::Acknowledgement(reached));
        }
    }

    pub(super) fn finish(self, finished: TransferFinished) {
        self.send(Kind::Finished(finished));
        self.end(Status::ok(""));
    }

    pub(super) fn fail(self, failure: Failure) {
        tracing::warn!(%failure, "a transfer failed");
        self.end(failure.into_status());
    }

    fn end(self, status: Status) {
        if self.status.send(status).is_err() {
            tracing::debug!("the sender of a transfer is gone and does not hear how it ended");
        }
    }

    fn send(&self, kind: Kind) {
        if self.messages.try_send(message::encode(&TransferResponse { kind: Some(kind) })).is_err() {
            tracing::debug!("the sender of a transfer does not listen");
        }
    }
}

/// The body of the response.
pub(super) struct AnswerBody {
    waiting: mpsc::Receiver<Bytes>,
    status: Option<oneshot::Receiver<Status>>,
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if let Some(message) = ready!(self.waiting.poll_recv(cx)) {
            return Poll::Ready(Some(Ok(Frame::data(message))));
        }
        let Some(status) = &mut self.status else { return Poll::Ready(None) };
        // No status: the store's thread panicked.
        let panicked =
            |_| Failure::new(FailureCode::Internal, "the receiver's store failed unexpectedly").into_status();
        let status = ready!(Pin::new(status).poll(cx)).unwrap_or_else(panicked);
        self.status = None;
        let mut trailers = HeaderMap::new();
        if let Err(error) = status.add_header(&mut trailers) {
            tracing::error!(%error, "a status does not fit into headers");
            trailers.insert(Status::GRPC_STATUS, http::HeaderValue::from_static("13"));
        }
        Poll::Ready(Some(Ok(Frame::trailers(trailers))))
    }
}
