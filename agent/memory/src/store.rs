//! Pages of one process on its way, in chunks of 2 MiB keyed by address.
//!
//! A page that is put twice replaces itself, so the store takes at most as much memory as the process had at different
//! addresses. What the process unmapped meanwhile stays until [`Store::retain`] is told what there is in the end.

use std::collections::HashMap;
use std::io;

use thiserror::Error;

use crate::PAGE_SIZE;
use crate::range::{PageRange, PageRanges};
use crate::sys::sparse::SparseMemory;

/// Bytes of a chunk.
const CHUNK: u64 = 2 << 20;
#[expect(clippy::cast_possible_truncation, reason = "2 MiB")]
const CHUNK_LENGTH: usize = CHUNK as usize;
const CHUNK_PAGES: usize = (CHUNK / PAGE_SIZE) as usize;

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

#[derive(Debug)]
struct Chunk {
    /// Its place in the memory, counted in chunks.
    place: usize,
    /// One bit for each page that is there.
    pages: [u64; CHUNK_PAGES / 64],
}

impl Store {
    /// A store for up to `bytes` bytes of pages, each 2 MiB of addresses counting whole.
    pub fn new(bytes: u64) -> Result<Self, StoreError> {
        let capacity = usize::try_from(bytes.div_ceil(CHUNK)).unwrap_or(usize::MAX).max(1);
        let length = capacity.checked_mul(CHUNK_LENGTH).ok_or(StoreError::Full { chunks: capacity })?;
        Ok(Self { memory: SparseMemory::new("podferry-pages", length)?, chunks: HashMap::new(), capacity })
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
            chunk.mark(piece);
            self.memory.write(offset, now)?;
        }
        Ok(())
    }

    /// The longest run of kept pages that begins here and is at most as long as the range; `None` when not even the first
    /// page is there.
    pub fn run(&self, range: PageRange) -> Option<&[u8]> {
        let piece = pieces(range).next()?;
        let chunk = self.chunks.get(&(piece.start / CHUNK))?;
        let first = within(piece.start) / PAGE;
        let most = usize::try_from(piece.pages()).unwrap_or(0);
        let pages = (first..first + most).take_while(|page| chunk.has(*page)).count();
        let offset = chunk.place * CHUNK_LENGTH + first * PAGE;
        (pages > 0).then(|| self.memory.slice(offset, pages * PAGE))
    }

    /// Of these, the pages that are not kept.
    #[must_use]
    pub fn missing(&self, ranges: &PageRanges) -> PageRanges {
        ranges.difference(&self.ranges())
    }

    /// All kept pages.
    #[must_use]
    pub fn ranges(&self) -> PageRanges {
        let mut keys: Vec<&u64> = self.chunks.keys().collect();
        keys.sort_unstable();
        let mut all = PageRanges::new();
        for key in keys {
            for page in (0..CHUNK_PAGES).filter(|page| self.chunks[key].has(*page)) {
                let start = key * CHUNK + (page * PAGE) as u64;
                all.push(PageRange::new(start, start + PAGE_SIZE));
            }
        }
        all
    }

    /// Forgets all pages but these, and gives the memory back.
    pub fn retain(&mut self, ranges: &PageRanges) -> Result<(), StoreError> {
        for range in &self.ranges().difference(ranges) {
            self.forget(range)?;
        }
        Ok(())
    }

    /// Forgets pages and gives their memory back.
    pub fn forget(&mut self, range: PageRange) -> Result<(), StoreError> {
        for piece in pieces(range) {
            let Some(chunk) = self.chunks.get_mut(&(piece.start / CHUNK)) else { continue };
            chunk.clear(piece);
            let length = usize::try_from(piece.length()).unwrap_or(0);
            self.memory.release(chunk.place * CHUNK_LENGTH + within(piece.start), length)?;
        }
        Ok(())
    }

    /// Bytes of memory that the kept pages take.
    pub fn used(&self) -> Result<u64, StoreError> {
        Ok(self.memory.used()?)
    }

    fn chunk(&mut self, address: u64) -> Result<&mut Chunk, StoreError> {
        let (key, place) = (address / CHUNK, self.chunks.len());
        if place >= self.capacity && !self.chunks.contains_key(&key) {
            return Err(StoreError::Full { chunks: self.capacity });
        }
        Ok(self.chunks.entry(key).or_insert(Chunk { place, pages: [0; CHUNK_PAGES / 64] }))
    }
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

impl Chunk {
    fn has(&self, page: usize) -> bool {
        self.pages[page / 64] >> (page % 64) & 1 == 1
    }

    fn mark(&mut self, piece: PageRange) {
        bits(piece).for_each(|page| self.pages[page / 64] |= 1 << (page % 64));
    }

    fn clear(&mut self, piece: PageRange) {
        bits(piece).for_each(|page| self.pages[page / 64] &= !(1 << (page % 64)));
    }
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
    fn more_than_expected_is_refused() {
        let mut store = Store::new(1).unwrap();
        store.put(range(0, 1), &[1; PAGE]).unwrap();
        let refused = store.put(range(512, 513), &[1; PAGE]);
        assert!(matches!(refused, Err(StoreError::Full { chunks: 1 })), "{refused:?}");
    }
}
