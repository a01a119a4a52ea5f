//! One object on its way out: cut into frames, zero pages left out, packed if that pays.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use bytes::Bytes;
use podferry_proto::v1::transfer_request::Kind;
use podferry_proto::v1::{TransferClose, TransferCompression, TransferData, TransferPages, TransferScattered};
use tokio::sync::mpsc;

use super::{Compression, Shared};
use crate::compression::{Level, Packer};
use crate::deltas::Changes;
use crate::error::TransferError;
use crate::frame::Frame;
use crate::limits::{FRAME_LENGTH, PAGE_SIZE};
use crate::object::Object;
use crate::scatter::{self, Place};
use crate::zero::{self, ZeroMap};

/// Bytes of a payload that levels are measured on.
const SAMPLE_LENGTH: usize = 64 << 10;

/// Sends one object. When it is dropped before [`ObjectWriter::close`], the transfer cannot be finished any more.
///
/// The methods ending in `_blocking` are for threads outside of the runtime; inside they panic.
pub struct ObjectWriter {
    id: u32,
    object: Object,
    queue: mpsc::Sender<Frame>,
    shared: Arc<Shared>,
    length: u64,
    packer: Option<Packer>,
}

impl ObjectWriter {
    pub(super) fn new(id: u32, object: Object, queue: mpsc::Sender<Frame>, shared: Arc<Shared>) -> Self {
        Self { id, object, queue, shared, length: 0, packer: None }
    }

    /// The next bytes of an image file or layer, any number.
    pub async fn data(&mut self, bytes: Bytes) -> Result<(), TransferError> {
        let mut rest = bytes;
        while !rest.is_empty() {
            let raw = rest.split_to(rest.len().min(FRAME_LENGTH));
            let kind = Kind::Data(TransferData { offset: self.length });
            self.send(kind, raw.len(), 0, raw).await?;
        }
        Ok(())
    }

    /// Pages, from `vaddr` on; `bytes` is a multiple of 4096 long. Zero pages are found and not sent.
    pub async fn pages(&mut self, vaddr: u64, flags: u32, bytes: Bytes) -> Result<(), TransferError> {
        let length = bytes.len();
        let fits = length != 0 && length.is_multiple_of(PAGE_SIZE);
        self.check_pages(fits, vaddr, length as u64, length)?;
        let mut rest = bytes;
        let mut vaddr = vaddr;
        while !rest.is_empty() {
            let run = rest.split_to(rest.len().min(FRAME_LENGTH));
            let zero = ZeroMap::find(&run);
            let zero_bytes = zero.count() * PAGE_SIZE;
            let count = (run.len() / PAGE_SIZE) as u64;
            let length = run.len();
            let kind = TransferPages { vaddr, count, flags, zero_pages: zero.to_wire(), absent: false };
            let full = if zero_bytes == 0 { run } else { self.gather(&run, &zero) };
            self.send(Kind::Pages(kind), length, zero_bytes, full).await?;
            vaddr += length as u64;
        }
        Ok(())
    }

    /// Pages of a memory object that lie apart, at most [`FRAME_LENGTH`] bytes together: where, ascending and without overlap, and
    /// what they hold, one after the other. Zero pages are found and not sent.
    pub async fn scattered(&mut self, places: &[Place], bytes: Bytes) -> Result<(), TransferError> {
        let length = bytes.len();
        let pages: u64 = places.iter().map(|place| place.count).sum();
        let fits = matches!(self.object, Object::Memory { .. }) && length <= FRAME_LENGTH && length != 0;
        let vaddr = places.first().map_or(0, |place| place.vaddr);
        self.check_pages(fits && pages * PAGE_SIZE as u64 == length as u64, vaddr, 0, length)?;
        let zero = ZeroMap::find(&bytes);
        let zero_bytes = zero.count() * PAGE_SIZE;
        let kind = TransferScattered { runs: scatter::encode(places), zero_pages: zero.to_wire() };
        let full = if zero_bytes == 0 { bytes } else { self.gather(&bytes, &zero) };
        self.send(Kind::Scattered(kind), length, zero_bytes, full).await
    }

    /// Pages of a memory object as what has changed in them since they were sent last, in this object or an earlier one of the same
    /// process. The receiver compares what they come to; when that is not what it is here, the transfer fails.
    pub async fn deltas(&mut self, changes: Changes) -> Result<(), TransferError> {
        let length = changes.pages() * PAGE_SIZE;
        let vaddr = changes.places().first().map_or(0, |place| place.vaddr);
        let fits = matches!(self.object, Object::Memory { .. }) && !changes.is_empty();
        self.check_pages(fits, vaddr, 0, length)?;
        let (kind, deltas) = changes.into_wire();
        self.send(Kind::Deltas(kind), length, 0, deltas).await
    }

    /// A run of `count` pages without contents: they are elsewhere, and `flags` say where.
    pub async fn absent_pages(&mut self, vaddr: u64, flags: u32, count: u64) -> Result<(), TransferError> {
        let length = count.checked_mul(PAGE_SIZE as u64);
        self.check_pages(count != 0 && length.is_some(), vaddr, length.unwrap_or(u64::MAX), 0)?;
        let kind = TransferPages { vaddr, count, flags, zero_pages: Bytes::new(), absent: true };
        self.send(Kind::Pages(kind), 0, 0, Bytes::new()).await
    }

    /// Completes the object. The receiver compares its length and digest.
    pub async fn close(self) -> Result<(), TransferError> {
        // The encoder, which sees every payload, knows the digest.
        let close = TransferClose { length: self.length, digest: 0 };
        self.shared.queue(&self.queue, Frame::bare(self.id, Kind::Close(close))).await
    }

    /// As [`ObjectWriter::data`].
    pub fn data_blocking(&mut self, bytes: Bytes) -> Result<(), TransferError> {
        let runtime = self.shared.runtime.clone();
        runtime.block_on(self.data(bytes))
    }

    /// As [`ObjectWriter::pages`].
    pub fn pages_blocking(&mut self, vaddr: u64, flags: u32, bytes: Bytes) -> Result<(), TransferError> {
        let runtime = self.shared.runtime.clone();
        runtime.block_on(self.pages(vaddr, flags, bytes))
    }

    /// As [`ObjectWriter::scattered`].
    pub fn scattered_blocking(&mut self, places: &[Place], bytes: Bytes) -> Result<(), TransferError> {
        let runtime = self.shared.runtime.clone();
        runtime.block_on(self.scattered(places, bytes))
    }

    /// As [`ObjectWriter::deltas`].
    pub fn deltas_blocking(&mut self, changes: Changes) -> Result<(), TransferError> {
        let runtime = self.shared.runtime.clone();
        runtime.block_on(self.deltas(changes))
    }

    /// As [`ObjectWriter::absent_pages`].
    pub fn absent_pages_blocking(&mut self, vaddr: u64, flags: u32, count: u64) -> Result<(), TransferError> {
        let runtime = self.shared.runtime.clone();
        runtime.block_on(self.absent_pages(vaddr, flags, count))
    }

    /// As [`ObjectWriter::close`].
    pub fn close_blocking(self) -> Result<(), TransferError> {
        let runtime = self.shared.runtime.clone();
        runtime.block_on(self.close())
    }

    /// Bytes given so far.
    pub fn length(&self) -> u64 {
        self.length
    }

    fn check_pages(&self, fits: bool, vaddr: u64, span: u64, length: usize) -> Result<(), TransferError> {
        let placed = vaddr.is_multiple_of(PAGE_SIZE as u64) && vaddr.checked_add(span).is_some();
        if fits && placed && self.object.has_pages() {
            return Ok(());
        }
        Err(TransferError::NoPages { object: self.object.to_string(), vaddr, length })
    }

    /// The pages that are not zero, one after the other.
    fn gather(&self, run: &[u8], zero: &ZeroMap) -> Bytes {
        let full = run.len() - zero.count() * PAGE_SIZE;
        if full == 0 {
            return Bytes::new();
        }
        let mut buffer = self.shared.pool.take(full);
        zero::gather(run, zero, &mut buffer);
        self.shared.pool.share(buffer)
    }

    async fn send(&mut self, kind: Kind, length: usize, zero: usize, raw: Bytes) -> Result<(), TransferError> {
        let raw_length = u32::try_from(raw.len()).expect("frames are at most FRAME_LENGTH");
        let packed = self.pack(&raw)?;
        let (compression, payload) = match packed {
            Some(packed) => (TransferCompression::Zstd, packed),
            None => (TransferCompression::Unspecified, raw),
        };
        let frame = Frame::with_payload(self.id, kind, compression, raw_length, payload);
        self.length += length as u64;
        self.shared.raw_bytes.fetch_add(length as u64, Ordering::Relaxed);
        self.shared.zero_bytes.fetch_add(zero as u64, Ordering::Relaxed);
        self.shared.queue(&self.queue, frame).await
    }

    fn pack(&mut self, raw: &Bytes) -> Result<Option<Bytes>, TransferError> {
        if raw.is_empty() {
            return Ok(None);
        }
        let level = match self.shared.options.compression {
            Compression::Off => return Ok(None),
            Compression::Fixed(level) => level,
            Compression::Auto => {
                self.sample(raw)?;
                let Some(level) = self.shared.tuner.level() else { return Ok(None) };
                level
            }
        };
        let (packed, packing) = self.packer()?.pack(raw, level).map_err(pack_error)?;
        self.shared.tuner.packed(level, packing);
        Ok(packed)
    }

    /// Lets the tuner see what the levels would make of these bytes, now and then.
    fn sample(&mut self, raw: &Bytes) -> Result<(), TransferError> {
        if raw.len() < SAMPLE_LENGTH / 4 || !self.shared.tuner.wants_samples(Instant::now()) {
            return Ok(());
        }
        let middle = (raw.len() / 2).saturating_sub(SAMPLE_LENGTH / 2);
        let sample = raw.slice(middle..raw.len().min(middle + SAMPLE_LENGTH));
        for level in Level::ALL {
            let packing = self.packer()?.measure(&sample, level).map_err(pack_error)?;
            self.shared.tuner.packed(level, packing);
        }
        Ok(())
    }

    fn packer(&mut self) -> Result<&mut Packer, TransferError> {
        if self.packer.is_none() {
            self.packer = Some(Packer::new(self.shared.pool.clone()).map_err(pack_error)?);
        }
        Ok(self.packer.as_mut().expect("made above"))
    }
}

fn pack_error(error: std::io::Error) -> TransferError {
    TransferError::Pack(Arc::new(error))
}
