//! Pages of one process on its way, in chunks of 2 MiB keyed by address.
//!
//! A page that is put twice replaces itself, so the store takes at most as much memory as the process had at different
//! addresses. What the process unmapped meanwhile stays until [`Store::retain`] is told what there is in the end.
//!
//! With a file in memory, another process can go on with the same pages: see [`crate::handover`].

use std::collections::HashMap;
use std::fs::File;
use std::io;

use thiserror::Error;

use crate::PAGE_SIZE;
use crate::bitmap::{BITS, Bitmap};
use crate::range::{PageRange, PageRanges};
use crate::sys::sparse::SparseMemory;

/// Bytes of a chunk.
const CHUNK: u64 = 2 << 20;
#[expect(clippy::cast_possible_truncation, reason = "2 MiB")]
const CHUNK_LENGTH: usize = CHUNK as usize;
const _: () = assert!(BITS as u64 == CHUNK / PAGE_SIZE);
/// What pages of zeros hold, a part at a time.
static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

/// Why a page cannot be kept.
#[derive(Debug, Error)]
pub enum StoreError {
    /// The memory cannot be made or written.
    #[error("cannot keep pages in memory: {0}; is there enough memory for the process on this node?")]
    Memory(#[from] io::Error),
    /// More pages than the store was made for.
    #[error("the process has pages in more than the {chunks} pieces of 2 MiB that were expected of it")]
    Full {
        /// How many there may be.
        chunks: usize,
    },
}

/// Pages of one process.
#[derive(Debug)]
pub struct Store {
    memory: SparseMemory,
    chunks: HashMap<u64, Chunk>,
    capacity: usize,
}

/// What is known of 2 MiB of addresses.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Chunk {
    /// Its place in the memory, counted in chunks.
    pub(crate) place: usize,
    /// The pages that are there,
    pub(crate) pages: Bitmap,
    /// and those of them that are zero: they take no memory.
    pub(crate) zeros: Bitmap,
}

/// Where pages lie that follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placed {
    /// The address of the first.
    pub address: u64,
    /// Where it begins in the store's file.
    pub place: u64,
    /// Bytes.
    pub length: u64,
}

/// What pages hold.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Contents<'a> {
    /// These bytes.
    Bytes(&'a [u8]),
    /// So many bytes that are all zero.
    Zeros(usize),
}

impl Store {
    /// A store for up to `bytes` bytes of pages, each 2 MiB of addresses counting whole.
    pub fn new(bytes: u64) -> Result<Self, StoreError> {
        let capacity = capacity(bytes);
        Ok(Self { memory: SparseMemory::new("podferry-pages", length(capacity)?)?, chunks: HashMap::new(), capacity })
    }

    /// As [`Store::new`], with the pages in `file`, which has to be empty, readable and writable, and should lie on a tmpfs.
    pub fn in_file(file: File, bytes: u64) -> Result<Self, StoreError> {
        Self::with_chunks(file, capacity(bytes), HashMap::new())
    }

    pub(crate) fn with_chunks(file: File, capacity: usize, chunks: HashMap<u64, Chunk>) -> Result<Self, StoreError> {
        Ok(Self { memory: SparseMemory::of(file, length(capacity)?)?, chunks, capacity })
    }

    /// How many chunks it can have, and those that it has, by their addresses divided by their size.
    pub(crate) fn chunks(&self) -> (usize, &HashMap<u64, Chunk>) {
        (self.capacity, &self.chunks)
    }

    /// Keeps pages; `contents` are those of the range.
    pub fn put(&mut self, range: PageRange, contents: &[u8]) -> Result<(), StoreError> {
        debug_assert_eq!(range.length(), contents.len() as u64);
        let mut rest = contents;
        for piece in pieces(range) {
            let (now, later) = rest.split_at(usize::try_from(piece.length()).unwrap_or(rest.len()));
            rest = later;
            let chunk = self.chunk(piece.start)?;
            let offset = chunk.place * CHUNK_LENGTH + within(piece.start);
            chunk.pages.set(bits(piece));
            chunk.zeros.clear(bits(piece));
            self.memory.write(offset, now)?;
        }
        Ok(())
    }

    /// Keeps pages that are zero. They take no memory, and what was kept of them takes none any more.
    pub fn put_zero(&mut self, range: PageRange) -> Result<(), StoreError> {
        for piece in pieces(range) {
            let chunk = self.chunk(piece.start)?;
            let before = *chunk;
            chunk.pages.set(bits(piece));
            chunk.zeros.set(bits(piece));
            // A hole is punched only where something may lie: most zero pages were never anything else.
            let mut others = before.pages.without(&before.zeros);
            others.clear(0..bits(piece).start);
            others.clear(bits(piece).end..BITS);
            self.release(before.place, &others)?;
        }
        Ok(())
    }

    /// The longest run of kept pages that begins here and is at most as long as the range; `None` when not even the first
    /// page is there. Of zero pages it may be less than there is.
    pub fn run(&self, range: PageRange) -> Option<&[u8]> {
        match self.contents(range)? {
            Contents::Bytes(bytes) => Some(bytes),
            Contents::Zeros(length) => Some(&ZEROS[..length.min(ZEROS.len())]),
        }
    }

    /// As [`Store::run`], of pages that are all zero or all not known to be.
    pub(crate) fn contents(&self, range: PageRange) -> Option<Contents<'_>> {
        let piece = pieces(range).next()?;
        let chunk = self.chunks.get(&(piece.start / CHUNK))?;
        let bits = bits(piece);
        let there = chunk.pages.run_from(bits.start).min(bits.len());
        if there == 0 {
            return None;
        }
        let zeros = chunk.zeros.run_from(bits.start).min(there);
        if zeros > 0 {
            return Some(Contents::Zeros(zeros * PAGE));
        }
        let pages = chunk.zeros.gap_from(bits.start).min(there);
        let offset = chunk.place * CHUNK_LENGTH + bits.start * PAGE;
        Some(Contents::Bytes(self.memory.slice(offset, pages * PAGE)))
    }

    /// The pages that are not kept from the first of the range on, up to its end or the first that is.
    pub(crate) fn gap(&self, range: PageRange) -> PageRange {
        let mut end = range.start;
        for piece in pieces(range) {
            let gap = match self.chunks.get(&(piece.start / CHUNK)) {
                Some(chunk) => chunk.pages.gap_from(bits(piece).start).min(bits(piece).len()),
                None => bits(piece).len(),
            };
            end = piece.start + (gap * PAGE) as u64;
            if end < piece.end {
                break;
            }
        }
        PageRange::new(range.start, end)
    }

    /// Of these, the pages that are not kept.
    #[must_use]
    pub fn missing(&self, ranges: &PageRanges) -> PageRanges {
        ranges.difference(&self.ranges())
    }

    /// All kept pages.
    #[must_use]
    pub fn ranges(&self) -> PageRanges {
        let mut keys: Vec<u64> = self.chunks.keys().copied().collect();
        keys.sort_unstable();
        let mut all = PageRanges::new();
        for key in keys {
            let address = |page: usize| key * CHUNK + (page * PAGE) as u64;
            for run in self.chunks[&key].pages.runs() {
                all.push(PageRange::new(address(run.start), address(run.end)));
            }
        }
        all
    }

    /// Where the pages that are not zero lie in the store's file, by ascending address.
    #[must_use]
    pub fn placed(&self) -> Vec<Placed> {
        let mut keys: Vec<u64> = self.chunks.keys().copied().collect();
        keys.sort_unstable();
        let runs = keys.into_iter().flat_map(|key| {
            let chunk = self.chunks[&key];
            let bytes = |pages: usize| (pages * PAGE) as u64;
            chunk
                .pages
                .without(&chunk.zeros)
                .runs()
                .map(move |run| Placed {
                    address: key * CHUNK + bytes(run.start),
                    place: (chunk.place * CHUNK_LENGTH) as u64 + bytes(run.start),
                    length: bytes(run.len()),
                })
                .collect::<Vec<_>>()
        });
        runs.collect()
    }

    /// Forgets all pages but these, and gives the memory back.
    pub fn retain(&mut self, ranges: &PageRanges) -> Result<(), StoreError> {
        let mut wanted: HashMap<u64, Bitmap> = HashMap::with_capacity(self.chunks.len());
        for piece in ranges.into_iter().flat_map(pieces) {
            wanted.entry(piece.start / CHUNK).or_default().set(bits(piece));
        }
        let mut released = Vec::new();
        for (key, chunk) in &mut self.chunks {
            let wanted = wanted.get(key).copied().unwrap_or_default();
            let forgotten = chunk.pages.without(&wanted);
            if forgotten.is_empty() {
                continue;
            }
            chunk.pages = chunk.pages.without(&forgotten);
            released.push((chunk.place, forgotten.without(&chunk.zeros)));
            chunk.zeros = chunk.zeros.without(&forgotten);
        }
        released.into_iter().try_for_each(|(place, pages)| self.release(place, &pages))
    }

    /// Forgets pages and gives their memory back.
    pub fn forget(&mut self, range: PageRange) -> Result<(), StoreError> {
        for piece in pieces(range) {
            let Some(chunk) = self.chunks.get_mut(&(piece.start / CHUNK)) else { continue };
            chunk.pages.clear(bits(piece));
            chunk.zeros.clear(bits(piece));
            let length = usize::try_from(piece.length()).unwrap_or(0);
            self.memory.release(chunk.place * CHUNK_LENGTH + within(piece.start), length)?;
        }
        Ok(())
    }

    /// Bytes of memory that the kept pages take.
    pub fn used(&self) -> Result<u64, StoreError> {
        Ok(self.memory.used()?)
    }

    /// Gives memory back, of pages of one chunk.
    fn release(&mut self, place: usize, pages: &Bitmap) -> Result<(), StoreError> {
        for run in pages.runs() {
            self.memory.release(place * CHUNK_LENGTH + run.start * PAGE, run.len() * PAGE)?;
        }
        Ok(())
    }

    fn chunk(&mut self, address: u64) -> Result<&mut Chunk, StoreError> {
        let (key, place) = (address / CHUNK, self.chunks.len());
        if place >= self.capacity && !self.chunks.contains_key(&key) {
            return Err(StoreError::Full { chunks: self.capacity });
        }
        let new = Chunk { place, pages: Bitmap::default(), zeros: Bitmap::default() };
        Ok(self.chunks.entry(key).or_insert(new))
    }
}

/// Chunks that so many bytes take.
fn capacity(bytes: u64) -> usize {
    usize::try_from(bytes.div_ceil(CHUNK)).unwrap_or(usize::MAX).max(1)
}

fn length(capacity: usize) -> Result<usize, StoreError> {
    capacity.checked_mul(CHUNK_LENGTH).ok_or(StoreError::Full { chunks: capacity })
}

#[expect(clippy::cast_possible_truncation, reason = "4096")]
const PAGE: usize = PAGE_SIZE as usize;

/// The offset of an address in its chunk.
fn within(address: u64) -> usize {
    usize::try_from(address % CHUNK).unwrap_or(0)
}

/// A range, cut where chunks end.
fn pieces(range: PageRange) -> impl Iterator<Item = PageRange> {
    let mut start = range.start;
    std::iter::from_fn(move || {
        let end = range.end.min((start / CHUNK + 1) * CHUNK);
        let piece = (start < end).then(|| PageRange::new(start, end));
        start = end;
        piece
    })
}

fn bits(piece: PageRange) -> std::ops::Range<usize> {
    let first = within(piece.start) / PAGE;
    first..first + usize::try_from(piece.pages()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> PageRange {
        PageRange::new(start * PAGE_SIZE, end * PAGE_SIZE)
    }

    fn contents(range: PageRange, version: u8) -> Vec<u8> {
        let pages = range.start / PAGE_SIZE..range.end / PAGE_SIZE;
        pages.flat_map(|page| vec![u8::try_from(page % 200).unwrap() ^ version; PAGE]).collect()
    }

    #[test]
    fn the_last_version_of_a_page_is_kept_across_chunks() {
        let mut store = Store::new(8 << 20).unwrap();
        let whole = range(500, 1100);
        store.put(whole, &contents(whole, 0)).unwrap();
        let again = range(510, 514);
        store.put(again, &contents(again, 0xff)).unwrap();
        let mut found = Vec::new();
        let mut start = whole.start;
        while start < whole.end {
            let run = store.run(PageRange::new(start, whole.end)).unwrap();
            found.extend_from_slice(run);
            start += run.len() as u64;
        }
        let expected: Vec<u8> = [(range(500, 510), 0), (again, 0xff), (range(514, 1100), 0)]
            .into_iter()
            .flat_map(|(range, version)| contents(range, version))
            .collect();
        assert!(found == expected);
        assert_eq!(store.run(range(1100, 1200)), None);
        assert_eq!(store.missing(&[range(400, 501)].into_iter().collect()).as_slice(), [range(400, 500)]);
        assert_eq!(store.gap(range(400, 600)), range(400, 500));
        assert_eq!(store.gap(range(500, 600)), range(500, 500));
        assert_eq!(store.gap(range(1000, 5000)), range(1000, 1000));
        assert_eq!(store.gap(range(1100, 5000)), range(1100, 5000));
    }

    #[test]
    fn what_is_forgotten_takes_no_memory() {
        let mut store = Store::new(8 << 20).unwrap();
        let whole = range(0, 1024);
        store.put(whole, &contents(whole, 0)).unwrap();
        assert_eq!(store.used().unwrap(), whole.length());
        store.retain(&[range(10, 20), range(600, 700)].into_iter().collect()).unwrap();
        assert_eq!(store.used().unwrap(), 110 * PAGE_SIZE);
        assert_eq!(store.ranges().as_slice(), [range(10, 20), range(600, 700)]);
    }

    #[test]
    fn zero_pages_take_no_memory_and_replace_what_was_kept() {
        let mut store = Store::in_file(tempfile::tempfile().unwrap(), 8 << 20).unwrap();
        let whole = range(500, 540);
        store.put(whole, &contents(whole, 0)).unwrap();
        store.put_zero(range(510, 600)).unwrap();
        assert_eq!(store.used().unwrap(), 10 * PAGE_SIZE);
        assert_eq!(store.ranges().as_slice(), [range(500, 600)]);
        assert_eq!(store.contents(range(500, 600)), Some(Contents::Bytes(&contents(range(500, 510), 0))));
        assert_eq!(store.contents(range(510, 512)), Some(Contents::Zeros(2 * PAGE)));
        assert_eq!(store.run(range(512, 700)).unwrap(), &ZEROS[..]);
        let again = range(511, 513);
        store.put(again, &contents(again, 3)).unwrap();
        assert_eq!(store.run(range(511, 512)).unwrap(), contents(range(511, 512), 3));
        store.retain(&[range(505, 520)].into_iter().collect()).unwrap();
        assert_eq!(store.used().unwrap(), 7 * PAGE_SIZE);
        assert_eq!(store.ranges().as_slice(), [range(505, 520)]);
    }

    #[test]
    fn more_than_expected_is_refused() {
        let mut store = Store::new(1).unwrap();
        store.put(range(0, 1), &[1; PAGE]).unwrap();
        let refused = store.put(range(512, 513), &[1; PAGE]);
        assert!(matches!(refused, Err(StoreError::Full { chunks: 1 })), "{refused:?}");
    }
}
