//! The receiving role: a gRPC service that hands what arrives, verified, to a store.

mod answers;
mod service;

use std::time::{Duration, Instant};

use bytes::Bytes;
use podferry_common::tls::PeerInfo;
use podferry_common::{Failure, FailureCode};
use podferry_proto::v1::{TransferAcknowledgement, TransferFinished};
use tokio::sync::mpsc;

pub use service::{TransferServer, server};

use crate::compression::Unpacker;
use crate::deltas::Deltas;
use crate::frame::{FrameError, Received};
use crate::object::Object;
use crate::pool::Pool;
use crate::sender::Introduction;
use crate::session::{Event, PageRun, Session};
use answers::Answers;

/// How many received bytes are acknowledged at the latest,
const ACKNOWLEDGE_BYTES: u64 = 4 << 20;
/// and after how long, so that the sender can measure also a slow link.
const ACKNOWLEDGE_EVERY: Duration = Duration::from_millis(20);

/// Decides whose transfers are taken, and where they go.
pub trait Authorize: Send + Sync + 'static {
    /// Called once for each transfer, on a thread that may block. The introduction's node is known to be the peer's own and
    /// its version to be spoken here; whether the migration is expected from that node is for the implementor to say.
    ///
    /// # Errors
    /// What the sender is told.
    fn admit(&self, peer: &PeerInfo, introduction: &Introduction) -> Result<Box<dyn Sink>, Failure>;
}

/// Stores one transfer. Everything that it is given is verified and within its limits; names are safe as file names.
///
/// Called from one thread, which may block: that is what slows the sender down. Exactly one of [`Sink::end`] and
/// [`Sink::abort`] is called, last; the first failure of another method leads to `abort`.
pub trait Sink: Send + 'static {
    /// An object begins. Numbers are unique, and so are objects.
    ///
    /// # Errors
    /// End the transfer, and the sender is told.
    fn open(&mut self, id: u32, object: &Object) -> Result<(), Failure>;

    /// The next bytes of an image file or layer.
    ///
    /// # Errors
    /// End the transfer, and the sender is told.
    fn data(&mut self, id: u32, offset: u64, bytes: Bytes) -> Result<(), Failure>;

    /// Pages.
    ///
    /// # Errors
    /// End the transfer, and the sender is told.
    fn pages(&mut self, run: PageRun) -> Result<(), Failure>;

    /// Changes of pages that came before. A store that keeps pages applies them to those ([`Deltas::apply`]); any other refuses them.
    ///
    /// # Errors
    /// End the transfer, and the sender is told.
    fn deltas(&mut self, deltas: Deltas) -> Result<(), Failure> {
        let message = format!("changes of pages came for object {}, and this store keeps no pages", deltas.object());
        Err(Failure::new(FailureCode::InvalidArgument, message))
    }

    /// A frame has come, whose message had so many bytes on the network. For those who count; told before what is in it.
    fn received(&mut self, _wire_bytes: u64) {}

    /// An object is complete: its length in bytes and its digest are what the sender says.
    ///
    /// # Errors
    /// End the transfer, and the sender is told.
    fn close(&mut self, id: u32, length: u64, digest: u64) -> Result<(), Failure>;

    /// Everything is complete. The sender is told so when this returns.
    ///
    /// # Errors
    /// The sender is told; what was stored is to be discarded by then.
    fn end(self: Box<Self>) -> Result<(), Failure>;

    /// The transfer failed, for that reason: everything of it is to be discarded.
    fn abort(self: Box<Self>, reason: &Failure);
}

/// A frame and how many bytes its message had, or why no more come.
type Item = Result<(Received, usize), Failure>;

/// Stores one transfer after its introduction, on a blocking thread.
struct Receiving {
    session: Session,
    items: mpsc::Receiver<Item>,
    answers: Answers,
    wire_bytes: u64,
    acknowledged: Instant,
    acknowledged_bytes: u64,
}

/// How a transfer ended that did not fail.
struct Complete {
    length: u64,
}

impl Receiving {
    fn new(session: Session, items: mpsc::Receiver<Item>, answers: Answers) -> Self {
        Self { session, items, answers, wire_bytes: 0, acknowledged: Instant::now(), acknowledged_bytes: 0 }
    }

    /// Runs to the end and says how it was.
    fn run(mut self, mut sink: Box<dyn Sink>) {
        match self.store(&mut *sink) {
            Ok(complete) => {
                let finished = TransferFinished { frames: self.session.frames(), length: complete.length };
                match sink.end() {
                    Ok(()) => self.answers.finish(finished),
                    Err(failure) => self.answers.fail(failure),
                }
            }
            Err(failure) => {
                // First the store, then the sender: whoever hears of the failure finds nothing left of the transfer.
                sink.abort(&failure);
                self.answers.fail(failure);
            }
        }
    }

    fn store(&mut self, sink: &mut dyn Sink) -> Result<Complete, Failure> {
        loop {
            let (frame, length) = self.items.blocking_recv().unwrap_or_else(|| Err(cut_off()))?;
            sink.received(length as u64);
            match self.session.take(&frame).map_err(|error| refusal(&error))? {
                Event::Open { id, object } => sink.open(id, &object)?,
                Event::Data { id, offset, bytes } => sink.data(id, offset, bytes)?,
                Event::Pages(run) => sink.pages(run)?,
                Event::Deltas(deltas) => sink.deltas(deltas)?,
                Event::Scattered(scattered) => scattered.runs().try_for_each(|run| sink.pages(run))?,
                Event::Close { id, length, digest } => sink.close(id, length, digest)?,
                Event::End { length } => return self.nothing_follows().map(|()| Complete { length }),
                Event::Abort { reason } => return Err(Failure::new(FailureCode::Aborted, given_up(&reason))),
                Event::Begin(_) => return Err(cut_off()),
            }
            self.acknowledge(length);
        }
    }

    /// After the last frame the sender closes its side.
    fn nothing_follows(&mut self) -> Result<(), Failure> {
        match self.items.blocking_recv() {
            None => Ok(()),
            Some(Err(failure)) => Err(failure),
            Some(Ok(_)) => Err(refusal(&FrameError::OutOfPlace { what: "a frame", when: "after the end" })),
        }
    }

    fn acknowledge(&mut self, length: usize) {
        self.wire_bytes += length as u64;
        let many = self.wire_bytes - self.acknowledged_bytes >= ACKNOWLEDGE_BYTES;
        if many || self.acknowledged.elapsed() >= ACKNOWLEDGE_EVERY {
            let frames = self.session.frames();
            self.answers.acknowledge(TransferAcknowledgement { frames, wire_bytes: self.wire_bytes });
            (self.acknowledged, self.acknowledged_bytes) = (Instant::now(), self.wire_bytes);
        }
    }
}

fn session() -> Result<Session, Failure> {
    // One is unpacked into while the store may keep the one before.
    let unpacker = Unpacker::new(Pool::new(2));
    unpacker.map(Session::new).map_err(|error| Failure::from_error(FailureCode::ResourceExhausted, &error))
}

fn refusal(error: &FrameError) -> Failure {
    let code = match error {
        FrameError::Checksum { .. } | FrameError::Unpack { .. } | FrameError::Total { .. } => FailureCode::Internal,
        FrameError::UnknownKind | FrameError::UnknownCompression { .. } => FailureCode::Unimplemented,
        _ => FailureCode::InvalidArgument,
    };
    Failure::from_error(code, error)
}

fn cut_off() -> Failure {
    Failure::new(FailureCode::Unavailable, "the transfer ended before its last frame; check the network and the source")
}

fn given_up(reason: &str) -> String {
    format!("the source gave the transfer up: {reason}")
}
