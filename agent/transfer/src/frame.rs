//! One frame: encoded without touching its payload, and checked before anything believes it.

use std::collections::HashMap;
use std::hash::Hasher as _;

use bytes::buf::Chain;
use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use podferry_proto::v1::transfer_request::Kind;
use podferry_proto::v1::{TransferCompression, TransferRequest};
use prost::Message as _;
use prost::encoding::{encode_varint, encoded_len_varint};
use thiserror::Error;
use twox_hash::XxHash3_64;

use crate::limits::{MAX_HEAD_LENGTH, MAX_MESSAGE_LENGTH, MAX_RAW_LENGTH};
use crate::message::PREFIX_LENGTH;

/// Field 14, eight bytes.
const CHECKSUM_TAG: u8 = 14 << 3 | 1;
/// Field 15, length and bytes.
const PAYLOAD_TAG: u8 = 15 << 3 | 2;
const CHECKSUM_LENGTH: usize = 1 + 8;

/// What is wrong with a frame, or with its place in the stream.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum FrameError {
    /// It is no protobuf message of this kind.
    #[error("a frame cannot be decoded: {reason}")]
    Malformed {
        /// What the decoder says.
        reason: String,
    },
    /// It says the same with other bytes than the specification demands.
    #[error("a frame's encoding is not canonical")]
    NotCanonical,
    /// A byte is not what was sent.
    #[error("frame {sequence} is corrupted: its checksum is {found:016x}, not {said:016x}")]
    Checksum {
        /// The number it claims.
        sequence: u64,
        /// The checksum in it.
        said: u64,
        /// The checksum of what arrived.
        found: u64,
    },
    /// A length is over its limit, or two lengths do not go together.
    #[error("{what} of {length} in a frame; expected {expected}")]
    Length {
        /// The length of what.
        what: &'static str,
        /// What came.
        length: u64,
        /// What would have been right.
        expected: u64,
    },
    /// The packing is none of this version's.
    #[error("a frame is packed with the unknown method {method}; update the older of the two nodes")]
    UnknownCompression {
        /// Its number.
        method: i32,
    },
    /// The kind is none of this version's.
    #[error("a frame of an unknown kind; update the older of the two nodes")]
    UnknownKind,
    /// The payload cannot be unpacked.
    #[error("the payload of frame {sequence} cannot be unpacked: {reason}")]
    Unpack {
        /// The frame's number.
        sequence: u64,
        /// What zstd says.
        reason: String,
    },
    /// A frame is missing, repeated or out of order.
    #[error("frame {found} came where {expected} should")]
    Sequence {
        /// The number that it has.
        found: u64,
        /// The number that it should have.
        expected: u64,
    },
    /// A frame that may not come now.
    #[error("{what} came {when}")]
    OutOfPlace {
        /// What came.
        what: &'static str,
        /// When.
        when: &'static str,
    },
    /// The object is not open, or of another sort.
    #[error("{what} for object {object}, which is {state}")]
    Object {
        /// What came.
        what: &'static str,
        /// The object's number.
        object: u32,
        /// What the object is instead.
        state: &'static str,
    },
    /// The object cannot be taken.
    #[error(transparent)]
    InvalidObject(#[from] crate::object::InvalidObject),
    /// An object arrived, but not as it was sent.
    #[error("the {what} of object {object} is {found:x}, not {said:x}")]
    Total {
        /// Which total: `length` or `digest`.
        what: &'static str,
        /// The object's number; 0 for all together.
        object: u32,
        /// What the sender says.
        said: u64,
        /// What arrived.
        found: u64,
    },
    /// Memory pages at an address where none can be.
    #[error("{count} pages at {vaddr:#x} are no run of pages")]
    Run {
        /// The address.
        vaddr: u64,
        /// How many.
        count: u64,
    },
}

/// The sum over a payload that frames and digests use.
pub(crate) fn sum(bytes: &[u8]) -> u64 {
    XxHash3_64::oneshot(bytes)
}

fn checksum(head: &[u8], payload_sum: u64) -> u64 {
    let mut hasher = XxHash3_64::new();
    hasher.write(head);
    hasher.write(&payload_sum.to_le_bytes());
    hasher.finish()
}

/// A frame that is ready but for its place in the stream.
#[derive(Debug, Clone)]
pub struct Frame {
    head: TransferRequest,
    payload: Bytes,
}

impl Frame {
    /// A frame without payload.
    pub fn bare(object: u32, kind: Kind) -> Self {
        let head = TransferRequest { object, kind: Some(kind), ..TransferRequest::default() };
        Self { head, payload: Bytes::new() }
    }

    /// A frame with payload, which is `raw_length` bytes once unpacked.
    pub fn with_payload(
        object: u32,
        kind: Kind,
        compression: TransferCompression,
        raw_length: u32,
        payload: Bytes,
    ) -> Self {
        let compression = compression.into();
        let head = TransferRequest { object, kind: Some(kind), compression, raw_length, ..TransferRequest::default() };
        Self { head, payload }
    }

    /// The gRPC message at that place in the stream: prefix and head in the first half, the payload, untouched, the second.
    /// A digest in it is sent as it is.
    pub fn encode(self, sequence: u64) -> Chain<Bytes, Bytes> {
        let payload_sum = sum(&self.payload);
        self.encode_with(sequence, payload_sum)
    }

    fn encode_with(mut self, sequence: u64, payload_sum: u64) -> Chain<Bytes, Bytes> {
        self.head.sequence = sequence;
        let head_length = self.head.encoded_len();
        let length = head_length + tail_length(self.payload.len());
        let mut front = BytesMut::with_capacity(PREFIX_LENGTH + length - self.payload.len());
        front.put_u8(0);
        front.put_u32(u32::try_from(length).expect("payloads are at most MAX_RAW_LENGTH"));
        self.head.encode_raw(&mut front);
        let checksum = checksum(&front[PREFIX_LENGTH..], payload_sum);
        put_tail(&mut front, checksum, self.payload.len());
        front.freeze().chain(self.payload)
    }
}

/// Encodes the frames of one transfer in their order: counts them, and puts its digest into each object's Close.
///
/// The sums are made here, on the thread that encrypts the payload next, so that it is read from memory once.
#[derive(Default)]
pub struct Encoder {
    sequence: u64,
    digests: HashMap<u32, XxHash3_64>,
}

impl Encoder {
    /// The gRPC message of the next frame.
    pub fn encode(&mut self, mut frame: Frame) -> Chain<Bytes, Bytes> {
        let payload_sum = sum(&frame.payload);
        let object = frame.head.object;
        match &mut frame.head.kind {
            Some(Kind::Data(_) | Kind::Pages(_) | Kind::Scattered(_) | Kind::Deltas(_)) => {
                self.digests.entry(object).or_default().write(&payload_sum.to_le_bytes());
            }
            Some(Kind::Close(close)) => close.digest = self.digests.remove(&object).unwrap_or_default().finish(),
            _ => {}
        }
        let sequence = self.sequence;
        self.sequence += 1;
        frame.encode_with(sequence, payload_sum)
    }
}

/// Bytes of checksum and payload with their tags.
fn tail_length(payload: usize) -> usize {
    CHECKSUM_LENGTH + if payload == 0 { 0 } else { 1 + encoded_len_varint(payload as u64) + payload }
}

/// Everything of the tail but the payload's bytes.
fn put_tail(buffer: &mut BytesMut, checksum: u64, payload: usize) {
    buffer.put_u8(CHECKSUM_TAG);
    buffer.put_u64_le(checksum);
    if payload != 0 {
        buffer.put_u8(PAYLOAD_TAG);
        encode_varint(payload as u64, buffer);
    }
}

/// A frame that arrived whole and as it was sent. Whether it makes sense is not known yet.
#[derive(Debug, Clone, PartialEq)]
pub struct Received {
    /// Its place in the stream.
    pub sequence: u64,
    /// The object that it belongs to.
    pub object: u32,
    /// What it says.
    pub kind: Kind,
    /// Bytes of the payload once unpacked, at most [`MAX_RAW_LENGTH`].
    pub raw_length: usize,
    /// Whether the payload is packed.
    pub packed: bool,
    /// The payload as it was sent.
    pub payload: Bytes,
    /// The XXH3-64 of the payload.
    pub payload_sum: u64,
}

impl Received {
    /// Takes a message apart (its gRPC prefix is gone already) and checks checksum and lengths. Copies nothing.
    pub fn parse(message: &Bytes) -> Result<Self, FrameError> {
        at_most("a message", message.len(), MAX_MESSAGE_LENGTH)?;
        let mut head = TransferRequest::decode(message.clone())
            .map_err(|error| FrameError::Malformed { reason: error.to_string() })?;
        let payload = std::mem::take(&mut head.payload);
        let payload_sum = verify(message, &head, &payload)?;
        let raw_length = head.raw_length as usize;
        at_most("raw bytes", raw_length, MAX_RAW_LENGTH)?;
        let packed = match TransferCompression::try_from(head.compression) {
            Ok(TransferCompression::Unspecified) => exactly("a payload", payload.len(), raw_length).map(|()| false)?,
            Ok(TransferCompression::Zstd) => at_most("a packed payload", payload.len(), raw_length).map(|()| true)?,
            Err(_) => return Err(FrameError::UnknownCompression { method: head.compression }),
        };
        let kind = head.kind.ok_or(FrameError::UnknownKind)?;
        if !matches!(kind, Kind::Data(_) | Kind::Pages(_) | Kind::Scattered(_) | Kind::Deltas(_)) {
            exactly("a payload where none belongs", raw_length, 0)?;
        }
        Ok(Self { sequence: head.sequence, object: head.object, kind, raw_length, packed, payload, payload_sum })
    }
}

/// Checks that the message ends with checksum and payload as the specification says, and that the checksum holds for every
/// byte. Answers with the payload's sum.
fn verify(message: &Bytes, head: &TransferRequest, payload: &Bytes) -> Result<u64, FrameError> {
    let mut tail = BytesMut::with_capacity(CHECKSUM_LENGTH + 8);
    put_tail(&mut tail, head.checksum, payload.len());
    let head_length = message.len().checked_sub(tail.len() + payload.len()).ok_or(FrameError::NotCanonical)?;
    at_most("a frame's head", head_length, MAX_HEAD_LENGTH)?;
    let (front, rest) = message.split_at(head_length);
    if rest[..tail.len()] != tail {
        return Err(FrameError::NotCanonical);
    }
    let payload_sum = sum(payload);
    let found = checksum(front, payload_sum);
    if found != head.checksum {
        return Err(FrameError::Checksum { sequence: head.sequence, said: head.checksum, found });
    }
    Ok(payload_sum)
}

fn at_most(what: &'static str, length: usize, limit: usize) -> Result<(), FrameError> {
    if length <= limit {
        Ok(())
    } else {
        Err(FrameError::Length { what, length: length as u64, expected: limit as u64 })
    }
}

fn exactly(what: &'static str, length: usize, expected: usize) -> Result<(), FrameError> {
    let right = length == expected;
    if right { Ok(()) } else { Err(FrameError::Length { what, length: length as u64, expected: expected as u64 }) }
}

#[cfg(test)]
mod tests;
