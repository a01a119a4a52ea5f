//! Packing payloads with zstd, and unpacking what a stranger packed.

use std::io;
use std::time::{Duration, Instant};

use bytes::Bytes;
use zstd::bulk;
use zstd::zstd_safe::CParameter;

use crate::frame::{FrameError, Received};
use crate::limits::PAGE_SIZE;
use crate::pool::Pool;

/// How hard a sender packs, fastest first. Process memory (see `docs/performance.md`) gains nothing from more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Level {
    /// zstd -5.
    Fastest,
    /// zstd -1.
    Fast,
    /// zstd 1.
    Middle,
    /// zstd 3.
    Small,
}

impl Level {
    /// All of them, fastest first.
    pub const ALL: [Self; 4] = [Self::Fastest, Self::Fast, Self::Middle, Self::Small];

    /// zstd's number for it.
    pub fn zstd(self) -> i32 {
        match self {
            Self::Fastest => -5,
            Self::Fast => -1,
            Self::Middle => 1,
            Self::Small => 3,
        }
    }
}

/// What packing one payload took and gave.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Packing {
    /// Bytes before.
    pub raw: usize,
    /// Bytes after; as many as before when it was not worth it.
    pub packed: usize,
    /// How long it took.
    pub took: Duration,
}

/// How many pieces of a payload are tried before all of it, and how long each is.
const SAMPLES: usize = 3;
const SAMPLE_LENGTH: usize = PAGE_SIZE;
/// Packing counts as worth it when it saves one part in this many.
const WORTH: usize = 16;

/// Packs payloads, one after the other; keeps zstd's working memory between them.
pub struct Packer {
    context: bulk::Compressor<'static>,
    level: Level,
    sample: Vec<u8>,
    pool: Pool,
}

impl Packer {
    /// Its outputs are buffers of the pool.
    pub fn new(pool: Pool) -> io::Result<Self> {
        let mut context = bulk::Compressor::new(Level::Fastest.zstd())?;
        // What is unpacked is then known to be what was packed: the frame's checksum covers only the packed bytes.
        context.set_parameter(CParameter::ChecksumFlag(true))?;
        Ok(Self { context, level: Level::Fastest, sample: Vec::new(), pool })
    }

    /// Packs `raw`, unless that is not worth it: then the answer is none. Pieces are tried first, so that incompressible
    /// bytes cost a twentieth of packing them.
    pub fn pack(&mut self, raw: &[u8], level: Level) -> io::Result<(Option<Bytes>, Packing)> {
        let begun = Instant::now();
        let packed = self.try_pack(raw, level)?;
        let length = packed.as_ref().map_or(raw.len(), Bytes::len);
        Ok((packed, Packing { raw: raw.len(), packed: length, took: begun.elapsed() }))
    }

    /// How many bytes a level makes of `raw`, and how long that takes.
    pub fn measure(&mut self, raw: &[u8], level: Level) -> io::Result<Packing> {
        self.set_level(level)?;
        let begun = Instant::now();
        let packed = self.sample_length(raw)?.min(raw.len());
        Ok(Packing { raw: raw.len(), packed, took: begun.elapsed() })
    }

    fn try_pack(&mut self, raw: &[u8], level: Level) -> io::Result<Option<Bytes>> {
        self.set_level(level)?;
        if !self.is_promising(raw)? {
            return Ok(None);
        }
        let mut buffer = self.pool.take(zstd::zstd_safe::compress_bound(raw.len()));
        let length = self.context.compress_to_buffer(raw, &mut buffer[..])?;
        buffer.truncate(length);
        // Also when it is dropped at once: so the buffer goes back.
        let packed = self.pool.share(buffer);
        Ok((packed.len() < worth(raw.len())).then_some(packed))
    }

    fn is_promising(&mut self, raw: &[u8]) -> io::Result<bool> {
        if raw.len() < 4 * SAMPLES * SAMPLE_LENGTH {
            return Ok(true);
        }
        let step = raw.len() / SAMPLES;
        let mut packed = 0;
        for at in (0..SAMPLES).map(|sample| sample * step + step / 2) {
            packed += self.sample_length(&raw[at..at + SAMPLE_LENGTH])?;
        }
        Ok(packed < worth(SAMPLES * SAMPLE_LENGTH))
    }

    fn sample_length(&mut self, raw: &[u8]) -> io::Result<usize> {
        self.sample.resize(zstd::zstd_safe::compress_bound(raw.len()), 0);
        self.context.compress_to_buffer(raw, &mut self.sample[..])
    }

    fn set_level(&mut self, level: Level) -> io::Result<()> {
        if self.level != level {
            self.context.set_parameter(CParameter::CompressionLevel(level.zstd()))?;
            self.level = level;
        }
        Ok(())
    }
}

fn worth(raw: usize) -> usize {
    raw - raw / WORTH
}

/// Unpacks payloads, one after the other.
pub struct Unpacker {
    context: bulk::Decompressor<'static>,
    pool: Pool,
}

impl Unpacker {
    /// Its outputs are buffers of the pool.
    pub fn new(pool: Pool) -> io::Result<Self> {
        Ok(Self { context: bulk::Decompressor::new()?, pool })
    }

    /// The frame's raw bytes. Takes memory for what the frame says, which is within the limit, and never for more.
    pub fn unpack(&mut self, frame: &Received) -> Result<Bytes, FrameError> {
        if !frame.packed {
            return Ok(frame.payload.clone());
        }
        let unpacked = self.unpack_bytes(&frame.payload, frame.raw_length);
        unpacked.map_err(|reason| FrameError::Unpack { sequence: frame.sequence, reason })
    }

    /// So many raw bytes, or why they are not. Takes memory for as many, and never for more.
    pub fn unpack_bytes(&mut self, packed: &[u8], raw_length: usize) -> Result<Bytes, String> {
        let mut buffer = self.pool.take(raw_length);
        let unpacked = self.context.decompress_to_buffer(packed, &mut buffer[..]);
        let buffer = self.pool.share(buffer);
        let length = unpacked.map_err(|error| error.to_string())?;
        if length != raw_length {
            return Err(format!("it holds {length} bytes, not {raw_length}"));
        }
        Ok(buffer)
    }
}

#[cfg(test)]
#[expect(clippy::similar_names, reason = "packer and packed, unpacker and unpacked")]
mod tests {
    use podferry_proto::v1::transfer_request::Kind;
    use podferry_proto::v1::{TransferCompression, TransferData};

    use super::*;
    use crate::frame::Frame;
    use crate::message::PREFIX_LENGTH;

    fn text(length: usize) -> Vec<u8> {
        (0..).flat_map(|line: u32| format!("{{\"user\": {line}}}\n").into_bytes()).take(length).collect()
    }

    fn noise(length: usize) -> Vec<u8> {
        let mut state = 1_u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            state.to_be_bytes()[0]
        };
        (0..length).map(|_| next()).collect()
    }

    fn received(raw_length: usize, payload: Bytes) -> Received {
        use bytes::Buf as _;
        let kind = Kind::Data(TransferData { offset: 0 });
        let raw_length = u32::try_from(raw_length).unwrap();
        let mut wire = Frame::with_payload(1, kind, TransferCompression::Zstd, raw_length, payload).encode(0);
        Received::parse(&wire.copy_to_bytes(wire.remaining()).slice(PREFIX_LENGTH..)).unwrap()
    }

    #[test]
    fn what_is_packed_is_what_is_unpacked_at_every_level() {
        let pool = Pool::new(2);
        let mut packer = Packer::new(pool.clone()).unwrap();
        let mut unpacker = Unpacker::new(pool.clone()).unwrap();
        let raw = text(300_000);
        for level in Level::ALL {
            let (packed, packing) = packer.pack(&raw, level).unwrap();
            let packed = packed.unwrap();
            assert!(packed.len() < raw.len() / 2 && packed.len() == packing.packed, "{level:?}");
            assert_eq!(unpacker.unpack(&received(raw.len(), packed)).unwrap(), raw, "{level:?}");
        }
        assert_eq!(pool.shared(), 0);
    }

    #[test]
    fn noise_is_left_as_it_is() {
        let mut packer = Packer::new(Pool::new(2)).unwrap();
        for length in [1, 4096, 1 << 20] {
            assert_eq!(packer.pack(&noise(length), Level::Small).unwrap().0, None);
        }
    }

    #[test]
    fn a_payload_that_lies_about_its_length_is_refused() {
        let pool = Pool::new(2);
        let mut packer = Packer::new(pool.clone()).unwrap();
        let mut unpacker = Unpacker::new(pool).unwrap();
        let packed = packer.pack(&text(100_000), Level::Fast).unwrap().0.unwrap();
        for length in [packed.len(), 99_999, 100_001] {
            assert!(unpacker.unpack(&received(length, packed.clone())).is_err(), "{length}");
        }
    }

    #[test]
    fn a_packed_payload_proves_its_contents() {
        let pool = Pool::new(2);
        let mut packer = Packer::new(pool.clone()).unwrap();
        let mut unpacker = Unpacker::new(pool).unwrap();
        let raw = text(5_000);
        let packed = packer.pack(&raw, Level::Fast).unwrap().0.unwrap();
        for at in 0..packed.len() {
            let mut changed = packed.to_vec();
            changed[at] ^= 0x10;
            // A sender with a broken packer computes its frame's checksum over the broken bytes.
            let unpacked = unpacker.unpack(&received(raw.len(), changed.into()));
            assert!(unpacked.is_err() || unpacked == Ok(Bytes::from(raw.clone())), "byte {at}");
        }
    }
}
