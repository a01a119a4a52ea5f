//! gRPC's own framing: messages out of the chunks that HTTP/2 delivers.

use std::collections::VecDeque;

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use thiserror::Error;

/// In front of every message: a byte that says whether it is compressed, and its length in four, big endian.
pub const PREFIX_LENGTH: usize = 5;

/// What is wrong with a stream of messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum MessageError {
    /// Compression of whole messages was never offered.
    #[error("a message is compressed as a whole (flag {flag}), which was not negotiated")]
    Compressed {
        /// The prefix's first byte.
        flag: u8,
    },
    /// The message is longer than any may be.
    #[error("a message of {length} bytes; at most {limit} are allowed")]
    TooLong {
        /// What its prefix says.
        length: usize,
        /// The limit.
        limit: usize,
    },
}

/// Chunks in, messages out. A message that lies in one chunk is a slice of it; only one that does not is copied together,
/// and memory for that is taken as its bytes come, never for what a prefix promises.
#[derive(Debug)]
pub struct Messages {
    chunks: VecDeque<Bytes>,
    length: usize,
    limit: usize,
}

impl Messages {
    /// For messages of at most `limit` bytes.
    pub fn new(limit: usize) -> Self {
        Self { chunks: VecDeque::new(), length: 0, limit }
    }

    /// Adds what arrived.
    pub fn push(&mut self, chunk: Bytes) {
        if !chunk.is_empty() {
            self.length += chunk.len();
            self.chunks.push_back(chunk);
        }
    }

    /// The next message without its prefix, if it is all there.
    #[expect(clippy::should_implement_trait, reason = "an iterator that ends and goes on again would mislead")]
    pub fn next(&mut self) -> Result<Option<Bytes>, MessageError> {
        let Some(prefix) = self.prefix() else { return Ok(None) };
        let [flag, length @ ..] = prefix;
        if flag != 0 {
            return Err(MessageError::Compressed { flag });
        }
        let length = u32::from_be_bytes(length) as usize;
        if length > self.limit {
            return Err(MessageError::TooLong { length, limit: self.limit });
        }
        if self.length < PREFIX_LENGTH + length {
            return Ok(None);
        }
        self.take(PREFIX_LENGTH);
        Ok(Some(self.take(length)))
    }

    /// Whether a message has begun but not ended.
    pub fn is_partial(&self) -> bool {
        self.length != 0
    }

    fn prefix(&self) -> Option<[u8; PREFIX_LENGTH]> {
        let mut prefix = [0; PREFIX_LENGTH];
        let mut bytes = self.chunks.iter().flatten();
        for place in &mut prefix {
            *place = *bytes.next()?;
        }
        Some(prefix)
    }

    /// The next `length` bytes, which are there.
    fn take(&mut self, length: usize) -> Bytes {
        self.length -= length;
        if let Some(chunk) = self.chunks.front_mut().filter(|chunk| chunk.len() >= length) {
            let taken = chunk.split_to(length);
            self.drop_empty();
            return taken;
        }
        let mut taken = BytesMut::with_capacity(length);
        while taken.len() < length {
            let Some(chunk) = self.chunks.front_mut() else { break };
            let part = chunk.len().min(length - taken.len());
            taken.put_slice(&chunk[..part]);
            chunk.advance(part);
            self.drop_empty();
        }
        taken.freeze()
    }

    fn drop_empty(&mut self) {
        if self.chunks.front().is_some_and(Bytes::is_empty) {
            self.chunks.pop_front();
        }
    }
}

/// A message with its prefix.
pub fn encode(message: &impl prost::Message) -> Bytes {
    let length = message.encoded_len();
    let mut bytes = BytesMut::with_capacity(PREFIX_LENGTH + length);
    bytes.put_u8(0);
    bytes.put_u32(u32::try_from(length).expect("messages without payload are short"));
    message.encode_raw(&mut bytes);
    bytes.freeze()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_promise_takes_no_memory() {
        let mut messages = Messages::new(1 << 20);
        messages.push(Bytes::from_static(&[0, 0xff, 0xff, 0xff, 0xff]));
        assert_eq!(messages.next(), Err(MessageError::TooLong { length: 0xffff_ffff, limit: 1 << 20 }));
    }

    #[test]
    fn a_message_in_one_chunk_is_not_copied() {
        let chunk = Bytes::from(vec![0, 0, 0, 0, 2, 7, 8, 0]);
        let mut messages = Messages::new(10);
        messages.push(chunk.clone());
        assert_eq!(messages.next().unwrap().unwrap().as_ptr(), chunk[5..].as_ptr());
        assert!(messages.is_partial());
    }

    proptest! {
        #[test]
        fn however_it_is_cut_the_messages_are_the_same(
            sent in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..40), 0..8),
            cuts in proptest::collection::vec(1_usize..30, 1..20),
        ) {
            let mut wire = Vec::new();
            for message in &sent {
                wire.put_u8(0);
                wire.put_u32(u32::try_from(message.len()).unwrap());
                wire.put_slice(message);
            }
            let mut messages = Messages::new(40);
            let mut received = Vec::new();
            let mut rest = &wire[..];
            for cut in cuts.iter().cycle() {
                let (chunk, after) = rest.split_at((*cut).min(rest.len()));
                messages.push(Bytes::copy_from_slice(chunk));
                while let Some(message) = messages.next().unwrap() {
                    received.push(message.to_vec());
                }
                rest = after;
                if rest.is_empty() {
                    break;
                }
            }
            prop_assert_eq!(received, sent);
            prop_assert!(!messages.is_partial());
        }
    }
}
