//! CRIU's pages on their way into the transfer.

use std::fmt;
use std::os::unix::net::UnixStream;
use std::sync::Weak;

use bytes::Bytes;
use podferry_criu::{CriuError, PageSink, Run, page_flags, page_stream};
use podferry_transfer::{Object, ObjectWriter, Pool, Sender};
use tokio_util::sync::CancellationToken;

/// Hands CRIU's pages to the transfer, one object for each owner.
struct Forwarder {
    /// Weak: when whoever waits for the transfer gives it up, it ends at once, and with it this and CRIU's dump.
    sender: Weak<Sender>,
    pool: Pool,
    writer: Option<ObjectWriter>,
    next_id: u32,
}

/// Why pages could not be sent.
#[derive(Debug)]
pub(crate) struct SendFailed(Box<dyn std::error::Error + Send + Sync>);

impl fmt::Display for SendFailed {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("pages cannot be sent")
    }
}

impl std::error::Error for SendFailed {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(self.0.as_ref())
    }
}

fn failed(error: impl std::error::Error + Send + Sync + 'static) -> SendFailed {
    SendFailed(Box::new(error))
}

/// Forwards the page stream until CRIU closes it. Returns how many pages there were. Blocks.
///
/// # Errors
/// When CRIU's stream or the transfer breaks.
pub(crate) fn forward(socket: UnixStream, sender: Weak<Sender>, pool: Pool) -> Result<u64, CriuError> {
    // The pages files are numbered from 1, as CRIU does.
    let mut forwarder = Forwarder { sender, pool, writer: None, next_id: 1 };
    let stats = page_stream::receive(socket, &mut forwarder)?;
    forwarder.close().map_err(|error| CriuError::Sink(Box::new(error)))?;
    Ok(stats.pages)
}

impl Forwarder {
    fn close(&mut self) -> Result<(), SendFailed> {
        self.writer.take().map_or(Ok(()), |writer| writer.close_blocking().map_err(failed))
    }
}

impl PageSink for Forwarder {
    type Error = SendFailed;

    fn open(&mut self, owner: podferry_criu::Owner) -> Result<(), SendFailed> {
        self.close()?;
        let owner = match owner {
            podferry_criu::Owner::Process(pid) => podferry_transfer::Owner::Process(pid),
            podferry_criu::Owner::SharedMemory(id) => podferry_transfer::Owner::SharedMemory(id),
        };
        let object = Object::Pages { owner, id: self.next_id };
        self.next_id += 1;
        let Some(sender) = self.sender.upgrade() else {
            return Err(failed(std::io::Error::other("the transfer was given up")));
        };
        self.writer = Some(sender.open_blocking(&object).map_err(failed)?);
        Ok(())
    }

    fn buffer(&mut self, bytes: usize) -> Vec<u8> {
        self.pool.take(bytes)
    }

    fn run(&mut self, run: Run, data: Vec<u8>) -> Result<(), SendFailed> {
        let Some(writer) = &mut self.writer else {
            return Err(failed(std::io::Error::other("pages came before their owner")));
        };
        if run.flags & page_flags::PRESENT == 0 {
            return Err(failed(std::io::Error::other("CRIU refers to a parent image, and there is none")));
        }
        writer.pages_blocking(run.address, run.flags, self.pool.share(data)).map_err(failed)
    }
}

/// An object of the transfer as something to write into, in pieces of a size that suits it.
pub(crate) struct LayerOut {
    writer: ObjectWriter,
    /// Nothing is sent for a migration that was aborted.
    cancelled: CancellationToken,
    buffer: Vec<u8>,
}

/// Bytes sent at once.
const PIECE: usize = 256 * 1024;

impl LayerOut {
    /// Into this object.
    pub(crate) fn new(writer: ObjectWriter, cancelled: CancellationToken) -> Self {
        Self { writer, cancelled, buffer: Vec::with_capacity(PIECE) }
    }

    /// Sends what is left and closes the object.
    ///
    /// # Errors
    /// When the transfer is broken.
    pub(crate) fn close(mut self) -> std::io::Result<()> {
        self.send()?;
        self.writer.close_blocking().map_err(std::io::Error::other)
    }

    fn send(&mut self) -> std::io::Result<()> {
        if self.cancelled.is_cancelled() {
            return Err(std::io::Error::other("the migration was aborted"));
        }
        if self.buffer.is_empty() {
            return Ok(());
        }
        let piece = std::mem::replace(&mut self.buffer, Vec::with_capacity(PIECE));
        self.writer.data_blocking(Bytes::from(piece)).map_err(std::io::Error::other)
    }
}

impl std::io::Write for LayerOut {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let room = PIECE - self.buffer.len();
        let taken = room.min(bytes.len());
        self.buffer.extend_from_slice(&bytes[..taken]);
        if self.buffer.len() == PIECE {
            self.send()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.send()
    }
}
