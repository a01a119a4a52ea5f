//! The gRPC service, mountable beside others in tonic's router.
//!
//! Without tonic's codec: that copies every payload once more, and a page stream is nothing but payload.

use std::convert::Infallible;
use std::fmt;
use std::future::{Ready, ready};
use std::io;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures::Stream;
use http::{HeaderValue, Request, Response};
use http_body_util::BodyExt as _;
use podferry_common::identity::{Identity, Peer};
use podferry_common::tls::{self, KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT, PeerInfo};
use podferry_common::{Failure, FailureCode};
use podferry_proto::Version;
use podferry_proto::v1::{TransferBegin, TransferWelcome};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tonic::body::Body;
use tonic::server::NamedService;
use tonic::transport::Server;
use tower::Service;

use super::answers::{AnswerBody, Answers};
use super::{Authorize, Item, Receiving, cut_off, refusal, session};
use crate::connection::{IncomingConnection, fast};
use crate::frame::Received;
use crate::limits::{GREETING_TIMEOUT, MAX_HTTP2_FRAME, MAX_MESSAGE_LENGTH, MAX_RAW_LENGTH, QUEUE, WINDOW};
use crate::message::Messages;
use crate::sender::{Introduction, PATH};
use crate::session::{Event, Session};

/// A server that takes transfers as fast as it can, and the connections that it is to serve: with the windows and frames that a
/// transfer needs, and with big reads. The two belong together; without either a transfer works, at half the speed.
///
/// Whoever serves it should also use an allocator that keeps big buffers, as mimalloc does: glibc's gives them back to the kernel, and
/// pays a page fault for every 4 KiB of the next.
pub fn server(
    listener: TcpListener,
    identity: &Identity,
) -> (Server, impl Stream<Item = io::Result<IncomingConnection>> + use<>) {
    let server = Server::builder()
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .max_frame_size(MAX_HTTP2_FRAME)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT));
    (server, fast(tls::Incoming::new(listener, identity)))
}

/// `podferry.v1.TransferService`. Serve it with [`server`], whose connections say who is there.
#[derive(Clone)]
pub struct TransferServer {
    authorize: Arc<dyn Authorize>,
}

impl TransferServer {
    /// Transfers that `authorize` admits go where it says.
    pub fn new(authorize: Arc<dyn Authorize>) -> Self {
        Self { authorize }
    }
}

impl fmt::Debug for TransferServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TransferServer").finish_non_exhaustive()
    }
}

impl NamedService for TransferServer {
    const NAME: &'static str = "podferry.v1.TransferService";
}

impl Service<Request<Body>> for TransferServer {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Ready<Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let (answers, body) = Answers::new();
        match admissible(&request) {
            Ok(peer) => {
                let authorize = Arc::clone(&self.authorize);
                tokio::spawn(serve(request.into_body(), answers, authorize, peer));
            }
            Err(failure) => answers.fail(failure),
        }
        ready(Ok(response(body)))
    }
}

fn admissible(request: &Request<Body>) -> Result<PeerInfo, Failure> {
    if request.uri().path() != PATH {
        let path = request.uri().path();
        return Err(Failure::new(FailureCode::Unimplemented, format!("there is no method {path}")));
    }
    let unknown = || Failure::new(FailureCode::PermissionDenied, "transfers come over mutual TLS only");
    request.extensions().get::<PeerInfo>().cloned().ok_or_else(unknown)
}

fn response(body: AnswerBody) -> Response<Body> {
    let mut response = Response::new(Body::new(body));
    response.headers_mut().insert(http::header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    response
}

async fn serve(body: Body, answers: Answers, authorize: Arc<dyn Authorize>, peer: PeerInfo) {
    let mut incoming = Incoming { body, messages: Messages::new(MAX_MESSAGE_LENGTH) };
    let greeting = timeout(GREETING_TIMEOUT, greet(&mut incoming, &peer)).await;
    let late = || Failure::new(FailureCode::DeadlineExceeded, "the transfer's first frame did not come in time");
    let (session, introduction, welcome) = match greeting.unwrap_or_else(|_| Err(late())) {
        Ok(greeted) => greeted,
        Err(failure) => return answers.fail(failure),
    };
    let (items, waiting) = mpsc::channel(QUEUE);
    tokio::task::spawn_blocking(move || match authorize.admit(&peer, &introduction) {
        Ok(sink) => {
            answers.welcome(welcome);
            Receiving::new(session, waiting, answers).run(sink);
        }
        Err(failure) => answers.fail(failure),
    });
    read(incoming, items).await;
}

/// Takes the first frame and checks it against the certificate.
async fn greet(incoming: &mut Incoming, peer: &PeerInfo) -> Result<(Session, Introduction, TransferWelcome), Failure> {
    let message = incoming.next().await?.ok_or_else(cut_off)?;
    let frame = Received::parse(&message).map_err(|error| refusal(&error))?;
    let mut session = session()?;
    let Event::Begin(begin) = session.take(&frame).map_err(|error| refusal(&error))? else {
        return Err(cut_off());
    };
    let introduction = introduction(&begin)?;
    let version = Version::OURS.agree(begin.version.as_ref());
    let version = version.map_err(|error| Failure::from_error(FailureCode::Unimplemented, &error))?;
    if peer.peer != Peer::Agent(introduction.source_node.clone()) {
        let Introduction { source_node, .. } = introduction;
        let message = format!("{} introduces itself as the agent of {source_node}", peer.peer);
        return Err(Failure::new(FailureCode::PermissionDenied, message));
    }
    let max_raw_length = u32::try_from(MAX_RAW_LENGTH).expect("1 MiB");
    Ok((session, introduction, TransferWelcome { version, max_raw_length }))
}

fn introduction(begin: &TransferBegin) -> Result<Introduction, Failure> {
    let invalid = |error: &(dyn std::error::Error + 'static)| Failure::from_error(FailureCode::InvalidArgument, error);
    Ok(Introduction {
        migration_id: begin.migration.parse().map_err(|error| invalid(&error))?,
        source_node: begin.source_node.parse().map_err(|error| invalid(&error))?,
        version: begin.version.unwrap_or_default().into(),
    })
}

/// Hands frames to the store's thread, as fast as that takes them. They are verified here, as long as the processor that
/// has decrypted them has them in its cache.
async fn read(mut incoming: Incoming, items: mpsc::Sender<Item>) {
    let verify = |message: Bytes| match Received::parse(&message) {
        Ok(frame) => Ok((frame, message.len())),
        Err(error) => Err(refusal(&error)),
    };
    loop {
        let Some(message) = incoming.next().await.transpose() else { return };
        let item = message.and_then(verify);
        let last = item.is_err();
        // The receiver is gone when the transfer failed for another reason.
        if items.send(item).await.is_err() || last {
            return;
        }
    }
}

/// The request, message by message.
struct Incoming {
    body: Body,
    messages: Messages,
}

impl Incoming {
    /// The next message; none when the sender closed its side.
    async fn next(&mut self) -> Result<Option<Bytes>, Failure> {
        loop {
            let message = self.messages.next();
            let message = message.map_err(|error| Failure::from_error(FailureCode::InvalidArgument, &error))?;
            if message.is_some() {
                return Ok(message);
            }
            let Some(frame) = self.body.frame().await else {
                return if self.messages.is_partial() { Err(cut_off()) } else { Ok(None) };
            };
            let broken = |status| {
                let cause = Failure::from_status(&status).message;
                Failure::new(FailureCode::Unavailable, format!("{}: {cause}", cut_off().message))
            };
            if let Ok(chunk) = frame.map_err(broken)?.into_data() {
                self.messages.push(chunk);
            }
        }
    }
}
