//! What a pager and whoever fetches pages for it say to each other, over a stream socket.
//!
//! | from | bytes | what |
//! |---|---|---|
//! | pager | 24 | process, 1 when somebody waits for these pages or else 0, address, length |
//! | fetcher | 24 | process, what follows, address, length |
//! | … then | as many as its length | with [`Answer::Contents`]: the pages |
//!
//! The first two numbers have four bytes, the others eight, in the machine's order. Addresses are those that the process had when it
//! was frozen. Every request is answered once, in any order.

use crate::PAGE_SIZE;
use crate::range::PageRange;

/// Bytes of a request, and of an answer without its pages.
pub const HEAD: usize = 24;
/// The most bytes of pages in a request.
pub const LONGEST: u64 = 256 * 1024;

/// Pages that a pager wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// The process, by its id inside its namespace.
    pub process: i32,
    /// Whether somebody waits for them.
    pub awaited: bool,
    /// Which; at most [`LONGEST`] bytes.
    pub range: PageRange,
}

/// What comes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The pages follow.
    Contents,
    /// They are all zero.
    Zeros,
    /// Neither these nor any others will come any more.
    Lost,
}

impl Request {
    /// As it is sent.
    pub fn encode(&self) -> [u8; HEAD] {
        encode(self.process, self.awaited.into(), self.range)
    }

    /// None when these are not bytes of [`Request::encode`].
    pub fn decode(bytes: &[u8; HEAD]) -> Option<Self> {
        let (process, awaited, range) = decode(bytes)?;
        let awaited = match awaited {
            0 => false,
            1 => true,
            _ => return None,
        };
        Some(Self { process, awaited, range })
    }
}

impl Answer {
    /// As it is sent, in front of the pages.
    pub fn encode(self, process: i32, range: PageRange) -> [u8; HEAD] {
        let kind = match self {
            Self::Contents => 0,
            Self::Zeros => 1,
            Self::Lost => 2,
        };
        encode(process, kind, range)
    }

    /// None when these are not bytes of [`Answer::encode`].
    pub fn decode(bytes: &[u8; HEAD]) -> Option<(Self, i32, PageRange)> {
        let (process, kind, range) = decode(bytes)?;
        let answer = match kind {
            0 => Self::Contents,
            1 => Self::Zeros,
            2 => Self::Lost,
            _ => return None,
        };
        Some((answer, process, range))
    }
}

fn encode(process: i32, word: u32, range: PageRange) -> [u8; HEAD] {
    let mut bytes = [0; HEAD];
    bytes[..4].copy_from_slice(&process.to_ne_bytes());
    bytes[4..8].copy_from_slice(&word.to_ne_bytes());
    bytes[8..16].copy_from_slice(&range.start.to_ne_bytes());
    bytes[16..].copy_from_slice(&range.length().to_ne_bytes());
    bytes
}

fn decode(bytes: &[u8; HEAD]) -> Option<(i32, u32, PageRange)> {
    let (process, rest) = bytes.split_first_chunk()?;
    let (word, rest) = rest.split_first_chunk()?;
    let (start, length) = rest.split_first_chunk()?;
    let (start, length) = (u64::from_ne_bytes(*start), u64::from_ne_bytes(length.try_into().ok()?));
    let whole = start.is_multiple_of(PAGE_SIZE) && length.is_multiple_of(PAGE_SIZE);
    if !whole || length == 0 || length > LONGEST {
        return None;
    }
    let range = PageRange::new(start, start.checked_add(length)?);
    Some((i32::from_ne_bytes(*process), u32::from_ne_bytes(*word), range))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_said_is_understood() {
        let range = PageRange::new(7 * PAGE_SIZE, 9 * PAGE_SIZE);
        for awaited in [false, true] {
            let request = Request { process: 3, awaited, range };
            assert_eq!(Request::decode(&request.encode()), Some(request));
        }
        for answer in [Answer::Contents, Answer::Zeros, Answer::Lost] {
            assert_eq!(Answer::decode(&answer.encode(3, range)), Some((answer, 3, range)));
        }
        let too_long = PageRange::new(0, LONGEST + PAGE_SIZE);
        assert_eq!(Answer::decode(&Answer::Zeros.encode(3, too_long)), None);
    }

    proptest! {
        #[test]
        fn noise_asks_for_nothing_long(noise in prop::array::uniform24(any::<u8>())) {
            if let Some(request) = Request::decode(&noise) {
                prop_assert!(request.range.length() <= LONGEST && !request.range.is_empty());
            }
        }
    }
}
