//! The sending role.

mod answers;
mod body;
mod tasks;
mod writer;

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderValue, Request};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioIo, TokioTimer};
use podferry_common::identity::{Identity, Peer};
use podferry_common::tls::{self, KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT};
use podferry_common::{MigrationId, NodeName};
use podferry_proto::Version;
use podferry_proto::v1::transfer_request::Kind;
use podferry_proto::v1::transfer_response::Kind as Answer;
use podferry_proto::v1::{TransferAbort, TransferBegin, TransferEnd};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, timeout};

pub use writer::ObjectWriter;

use crate::compression::Level;
use crate::connection::Connection;
use crate::error::TransferError;
use crate::frame::Frame;
use crate::limits::{
    FRAME_LENGTH, GREETING_TIMEOUT, MAX_HTTP2_FRAME, MAX_MESSAGE_LENGTH, MAX_OBJECTS, MAX_REASON_LENGTH, QUEUE, WINDOW,
};
use crate::object::Object;
use crate::pool::Pool;
use crate::shares::Shares;
use crate::tuner::Tuner;
use answers::Answers;
use body::FrameBody;
use tasks::Tasks;

/// The method's path.
pub(crate) const PATH: &str = "/podferry.v1.TransferService/Transfer";
/// How long the other side has to take note of an end before its connection is closed.
const GOODBYE_TIMEOUT: Duration = Duration::from_secs(5);
/// How often is looked whether it has.
const GOODBYE_STEP: Duration = Duration::from_millis(1);

/// Who sends, and what it belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Introduction {
    /// The migration.
    pub migration_id: MigrationId,
    /// The sending node, as in its certificate.
    pub source_node: NodeName,
    /// What this side speaks.
    pub version: Version,
}

/// Whether payloads are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compression {
    /// As hard as pays, measured all the time: not at all on fast links.
    #[default]
    Auto,
    /// Never.
    Off,
    /// Always, with this level.
    Fixed(Level),
}

/// How to send.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Options {
    /// Whether payloads are packed.
    pub compression: Compression,
    /// The most bytes per second on the link; none for as many as it takes.
    pub bandwidth_cap: Option<u64>,
    /// What it shares with all that leaves this node; none for no limit of the node's own.
    pub shares: Option<Shares>,
}

/// What was sent so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SenderStats {
    /// Bytes given to be sent, zero pages included.
    pub raw_bytes: u64,
    /// Those of them that are zero pages and were not sent.
    pub zero_bytes: u64,
    /// Bytes of gRPC messages that were handed to the connection.
    pub wire_bytes: u64,
    /// Frames that were handed to the connection.
    pub frames: u64,
    /// Since the connection stood.
    pub duration: Duration,
}

#[derive(Debug, Clone)]
enum State {
    Running,
    Finished,
    Failed(TransferError),
}

/// What sender, writers, body and answers share.
struct Shared {
    options: Options,
    state: watch::Sender<State>,
    tuner: Tuner,
    pool: Pool,
    runtime: Handle,
    begun: Instant,
    raw_bytes: AtomicU64,
    zero_bytes: AtomicU64,
    wire_bytes: AtomicU64,
    frames: AtomicU64,
    waited_nanos: AtomicU64,
    objects: AtomicU32,
    /// Whether somebody stands still for it.
    urgent: Arc<AtomicBool>,
    /// What both sides speak.
    version: OnceLock<u32>,
}

impl Shared {
    fn new(options: Options) -> Self {
        let begun = Instant::now();
        Self {
            options,
            state: watch::Sender::new(State::Running),
            tuner: Tuner::new(begun),
            // As many as can be under way between a writer and the socket.
            pool: Pool::new(2 * QUEUE),
            runtime: Handle::current(),
            begun,
            raw_bytes: AtomicU64::new(0),
            zero_bytes: AtomicU64::new(0),
            wire_bytes: AtomicU64::new(0),
            frames: AtomicU64::new(0),
            waited_nanos: AtomicU64::new(0),
            objects: AtomicU32::new(0),
            urgent: Arc::default(),
            version: OnceLock::new(),
        }
    }

    /// The first failure stays.
    fn fail(&self, error: TransferError) {
        self.state.send_if_modified(|state| {
            let running = matches!(state, State::Running);
            if running {
                *state = State::Failed(error);
            }
            running
        });
    }

    /// Puts a frame into the queue, and measures how long that takes.
    async fn queue(&self, queue: &mpsc::Sender<Frame>, frame: Frame) -> Result<(), TransferError> {
        let frame = match queue.try_send(frame) {
            Ok(()) => return Ok(()),
            Err(mpsc::error::TrySendError::Full(frame) | mpsc::error::TrySendError::Closed(frame)) => frame,
        };
        let begun = Instant::now();
        let sent = queue.send(frame).await;
        let waited = u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.waited_nanos.fetch_add(waited, Ordering::Relaxed);
        match sent {
            Ok(()) => Ok(()),
            Err(_) => Err(self.cause().await),
        }
    }

    /// Why the connection takes no more frames. The queue may close a moment before the reason is known.
    async fn cause(&self) -> TransferError {
        let mut state = self.state.subscribe();
        let known = timeout(GOODBYE_TIMEOUT, state.wait_for(|state| !matches!(state, State::Running))).await;
        if let Ok(Ok(state)) = known
            && let State::Failed(error) = &*state
        {
            return error.clone();
        }
        TransferError::Broken { reason: "it takes no more frames and does not say why".to_owned() }
    }
}

/// Sends one transfer. Dropping it before [`Sender::finish`] breaks the connection, and the receiver discards everything.
pub struct Sender {
    shared: Arc<Shared>,
    queue: Option<mpsc::Sender<Frame>>,
    connection: Tasks,
}

impl Sender {
    /// Dials the target agent at `address` (`host:port`), which must prove to be `peer`, and introduces this side. Returns
    /// once the receiver has admitted the transfer.
    pub async fn connect(
        address: &str,
        identity: &Identity,
        peer: &Peer,
        introduction: &Introduction,
        options: Options,
    ) -> Result<Self, TransferError> {
        let stream = tls::dial(address, identity, peer).await;
        let connection = Connection::new(stream.map_err(|error| TransferError::Connect(Arc::new(error)))?);
        crate::socket::tune(connection.tcp()).map_err(|error| TransferError::Socket(Arc::new(error)))?;
        let shared = Arc::new(Shared::new(options));
        let tasks = Tasks::default();
        let (requests, connection) = http2::Builder::new(tasks.clone())
            .timer(TokioTimer::new())
            .initial_stream_window_size(WINDOW)
            .initial_connection_window_size(WINDOW)
            .max_frame_size(MAX_HTTP2_FRAME)
            .max_send_buf_size(MAX_MESSAGE_LENGTH * 2)
            .keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT)
            .handshake(TokioIo::new(connection))
            .await
            .map_err(|error| TransferError::broken(&error))?;
        tasks.spawn(drive(connection));
        let (queue, frames) = mpsc::channel(QUEUE);
        let sender = Self { shared, queue: Some(queue), connection: tasks };
        let body = FrameBody::new(frames, Arc::clone(&sender.shared));
        let greeted = timeout(GREETING_TIMEOUT, sender.greet(requests, introduction, body)).await;
        let answers = greeted.map_err(|_| TransferError::Timeout)??;
        tokio::spawn(follow(answers, Arc::clone(&sender.shared), sender.connection.clone()));
        Ok(sender)
    }

    async fn greet(
        &self,
        mut requests: http2::SendRequest<FrameBody>,
        introduction: &Introduction,
        body: FrameBody,
    ) -> Result<Answers, TransferError> {
        let begin = TransferBegin {
            version: Some(introduction.version.into()),
            migration: introduction.migration_id.to_string(),
            source_node: introduction.source_node.to_string(),
        };
        self.send(Frame::bare(0, Kind::Begin(begin))).await?;
        let response = requests.send_request(request(body)).await.map_err(|error| TransferError::broken(&error))?;
        let mut answers = Answers::new(response)?;
        match answers.next().await? {
            Some(Answer::Welcome(welcome)) if welcome.max_raw_length as usize >= FRAME_LENGTH => {
                let _only_once = self.shared.version.set(welcome.version);
                Ok(answers)
            }
            Some(other) => Err(TransferError::Protocol { reason: format!("{other:?} in answer to Begin") }),
            None => Err(TransferError::Protocol { reason: "no answer to Begin".to_owned() }),
        }
    }

    /// Begins an object. Several may be open at once, also on different threads.
    pub async fn open(&self, object: &Object) -> Result<ObjectWriter, TransferError> {
        object.check()?;
        let queue = self.queue.clone().ok_or_else(closed)?;
        let id = self.shared.objects.fetch_add(1, Ordering::Relaxed) + 1;
        if id as usize > MAX_OBJECTS {
            return Err(TransferError::TooManyObjects);
        }
        self.send(Frame::bare(id, Kind::Open(object.into()))).await?;
        Ok(ObjectWriter::new(id, object.clone(), queue, Arc::clone(&self.shared)))
    }

    /// As [`Sender::open`], for threads outside of the runtime.
    pub fn open_blocking(&self, object: &Object) -> Result<ObjectWriter, TransferError> {
        self.shared.runtime.block_on(self.open(object))
    }

    /// Ends the transfer. Returns once the receiver has confirmed that everything is verified and stored.
    pub async fn finish(mut self) -> Result<SenderStats, TransferError> {
        let objects = self.shared.objects.load(Ordering::Relaxed);
        let length = self.shared.raw_bytes.load(Ordering::Relaxed);
        self.send(Frame::bare(0, Kind::End(TransferEnd { objects, length }))).await?;
        self.queue = None;
        self.settled().await?;
        let stats = self.stats();
        // The connection says goodbye by itself now; it is no harm when it does not.
        let begun = Instant::now();
        while !self.connection.is_finished() && begun.elapsed() < GOODBYE_TIMEOUT {
            sleep(GOODBYE_STEP).await;
        }
        Ok(stats)
    }

    /// As [`Sender::finish`], for threads outside of the runtime.
    pub fn finish_blocking(self) -> Result<SenderStats, TransferError> {
        let runtime = self.shared.runtime.clone();
        runtime.block_on(self.finish())
    }

    /// Tells the receiver to discard everything, and why. When it cannot be told, the broken connection says it.
    pub async fn abort(mut self, reason: &str) {
        let ends = reason.char_indices().map(|(at, character)| at + character.len_utf8());
        let end = ends.take_while(|end| *end <= MAX_REASON_LENGTH).last().unwrap_or(0);
        let frame = Frame::bare(0, Kind::Abort(TransferAbort { reason: reason[..end].to_owned() }));
        let told = async {
            self.send(frame).await?;
            self.queue = None;
            self.settled().await
        };
        if timeout(GOODBYE_TIMEOUT, told).await.is_err() {
            tracing::debug!("the receiver of an aborted transfer does not answer");
        }
        self.shared.fail(TransferError::Aborted { reason: reason.to_owned() });
    }

    /// What was sent so far.
    pub fn stats(&self) -> SenderStats {
        let shared = &self.shared;
        SenderStats {
            raw_bytes: shared.raw_bytes.load(Ordering::Relaxed),
            zero_bytes: shared.zero_bytes.load(Ordering::Relaxed),
            wire_bytes: shared.wire_bytes.load(Ordering::Relaxed),
            frames: shared.frames.load(Ordering::Relaxed),
            duration: shared.begun.elapsed(),
        }
    }

    /// From now on somebody stands still for what is sent: of what the node may send it comes first.
    pub fn hurry(&self) {
        self.shared.urgent.store(true, Ordering::Relaxed);
        if let Some(shares) = &self.shared.options.shares {
            shares.settle_anew();
        }
    }

    /// The version of the protocol that both sides speak.
    pub fn version(&self) -> u32 {
        self.shared.version.get().copied().unwrap_or_default()
    }

    /// The level that payloads are packed with now; none when they are not.
    pub fn level(&self) -> Option<Level> {
        match self.shared.options.compression {
            Compression::Auto => self.shared.tuner.level(),
            Compression::Off => None,
            Compression::Fixed(level) => Some(level),
        }
    }

    /// Buffers to fill with pages: take one, fill it, share it, and give its bytes to a writer. It comes back when they are
    /// sent.
    pub fn pool(&self) -> Pool {
        self.shared.pool.clone()
    }

    /// Why the transfer failed, if it has.
    pub fn failure(&self) -> Option<TransferError> {
        match &*self.shared.state.borrow() {
            State::Failed(error) => Some(error.clone()),
            State::Running | State::Finished => None,
        }
    }

    /// Ends when the transfer fails, and says why. Never ends for one that does not.
    pub fn failed(&self) -> impl Future<Output = TransferError> + Send + 'static + use<> {
        let mut state = self.shared.state.subscribe();
        async move {
            if let Ok(state) = state.wait_for(|state| matches!(state, State::Failed(_))).await
                && let State::Failed(error) = &*state
            {
                return error.clone();
            }
            std::future::pending().await
        }
    }

    async fn send(&self, frame: Frame) -> Result<(), TransferError> {
        let queue = self.queue.as_ref().ok_or_else(closed)?;
        self.shared.queue(queue, frame).await
    }

    /// Waits until the receiver has said how it ended.
    async fn settled(&self) -> Result<(), TransferError> {
        let mut state = self.shared.state.subscribe();
        let settled = state.wait_for(|state| !matches!(state, State::Running)).await;
        match settled.as_deref() {
            Ok(State::Failed(error)) => Err(error.clone()),
            Ok(State::Finished) => Ok(()),
            Ok(State::Running) | Err(_) => Err(TransferError::Broken { reason: "nobody follows it".to_owned() }),
        }
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        self.shared.fail(TransferError::Aborted { reason: "its sender was dropped".to_owned() });
        self.connection.abort();
    }
}

fn closed() -> TransferError {
    TransferError::Aborted { reason: "it has ended".to_owned() }
}

fn request(body: FrameBody) -> Request<FrameBody> {
    let mut request = Request::new(body);
    *request.method_mut() = http::Method::POST;
    // HTTP/2 needs an authority and a scheme; who is there was settled by the certificate.
    *request.uri_mut() = http::Uri::builder()
        .scheme("https")
        .authority("podferry.internal")
        .path_and_query(PATH)
        .build()
        .expect("constant parts make a URI");
    let headers = request.headers_mut();
    headers.insert(http::header::CONTENT_TYPE, HeaderValue::from_static("application/grpc+proto"));
    headers.insert(http::header::TE, HeaderValue::from_static("trailers"));
    request
}

/// Keeps the connection going. Its end shows in body and answers.
async fn drive(connection: http2::Connection<TokioIo<Connection>, FrameBody, Tasks>) {
    if let Err(error) = connection.await {
        tracing::debug!(error = %podferry_common::chain(&error), "the transfer's connection ended");
    }
}

/// Reads the receiver's answers to their end.
async fn follow(mut answers: Answers, shared: Arc<Shared>, connection: Tasks) {
    let result = loop {
        match answers.next().await {
            Ok(Some(Answer::Acknowledgement(reached))) => {
                let waited = Duration::from_nanos(shared.waited_nanos.load(Ordering::Relaxed));
                shared.tuner.acknowledged(reached.wire_bytes, waited, Instant::now());
            }
            Ok(Some(Answer::Finished(_))) => break answers.end().await,
            Ok(Some(answer @ Answer::Welcome(_))) => {
                break Err(TransferError::Protocol { reason: format!("{answer:?} in the middle") });
            }
            Ok(None) => break Err(TransferError::Protocol { reason: "it ended without Finished".to_owned() }),
            Err(error) => break Err(error),
        }
    };
    match result {
        Ok(()) => {
            shared.state.send_if_modified(|state| {
                let running = matches!(state, State::Running);
                if running {
                    *state = State::Finished;
                }
                running
            });
        }
        Err(error) => {
            shared.fail(error);
            // Wakes whoever waits for the queue.
            connection.abort();
        }
    }
}

/// Bytes of an HTTP/2 chunk in one piece.
pub(crate) type Chunk = bytes::buf::Chain<Bytes, Bytes>;
