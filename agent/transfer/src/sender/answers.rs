//! What the receiver answers.

use http::Response;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use podferry_common::Failure;
use podferry_proto::v1::TransferResponse;
use podferry_proto::v1::transfer_response::Kind;
use prost::Message as _;
use tonic::{Code, Status};

use crate::error::TransferError;
use crate::limits::MAX_RESPONSE_LENGTH;
use crate::message::Messages;

/// The response, message by message.
pub(super) struct Answers {
    body: Incoming,
    messages: Messages,
    status: Option<Status>,
}

impl Answers {
    pub(super) fn new(response: Response<Incoming>) -> Result<Self, TransferError> {
        let (head, body) = response.into_parts();
        if head.status != http::StatusCode::OK {
            return Err(TransferError::Protocol { reason: format!("HTTP status {}", head.status) });
        }
        // An error that is known at once comes with the headers.
        if let Some(status) = Status::from_header_map(&head.headers) {
            check(&status)?;
        }
        Ok(Self { body, messages: Messages::new(MAX_RESPONSE_LENGTH), status: None })
    }

    /// The next answer; none when the receiver ended well. What it says of a failure is the error.
    pub(super) async fn next(&mut self) -> Result<Option<Kind>, TransferError> {
        loop {
            if let Some(message) = self.messages.next().map_err(|error| TransferError::protocol(&error))? {
                let message = TransferResponse::decode(message).map_err(|error| TransferError::protocol(&error))?;
                // An answer that a newer receiver has and this version does not know is none that it needs.
                if let Some(kind) = message.kind {
                    return Ok(Some(kind));
                }
                continue;
            }
            if !self.more().await? {
                return self.status().map(|()| None);
            }
        }
    }

    /// Reads to the end, which must be a good one.
    pub(super) async fn end(&mut self) -> Result<(), TransferError> {
        while self.more().await? {}
        self.status()
    }

    /// Reads the next chunk or the trailers; false at the end.
    async fn more(&mut self) -> Result<bool, TransferError> {
        let Some(frame) = self.body.frame().await else { return Ok(false) };
        let frame = frame.map_err(|error| TransferError::broken(&error))?;
        match frame.into_data() {
            Ok(chunk) => self.messages.push(chunk),
            Err(frame) => self.status = frame.trailers_ref().and_then(Status::from_header_map),
        }
        Ok(true)
    }

    fn status(&self) -> Result<(), TransferError> {
        match &self.status {
            Some(status) => check(status),
            None => Err(TransferError::Broken { reason: "the answers ended without a status".to_owned() }),
        }
    }
}

fn check(status: &Status) -> Result<(), TransferError> {
    if status.code() == Code::Ok { Ok(()) } else { Err(TransferError::Refused(Box::new(Failure::from_status(status)))) }
}
