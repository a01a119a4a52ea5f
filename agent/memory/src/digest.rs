//! Digests of pages: whether two nodes have the same memory of a process that stands still.
//!
//! Each page has one of its own, so that a page that differs can be named. They find a mistake, not an adversary: whoever can write
//! to one of the two memories can make pages with equal digests.

use std::io;

use nix::unistd::Pid;
use thiserror::Error;
use twox_hash::XxHash3_64;

use crate::PAGE_SIZE;
use crate::copier::Copier;
use crate::parallel::{threads, together};
use crate::range::{PageRange, PageRanges};
use crate::store::Store;

/// Bytes of a page's digest: XXH3-64 with seed 0, little endian.
pub const DIGEST: usize = 8;
/// The most pages of which digests are handed over at a time: 64 MiB, whose digests take 128 KiB.
const SHARE: u64 = 16 * 1024;
/// The fewest pages that are worth a thread.
const LEAST: usize = 512;
/// Bytes that a thread reads at a time.
const BATCH: usize = 1 << 20;
#[expect(clippy::cast_possible_truncation, reason = "4096")]
const PAGE: usize = PAGE_SIZE as usize;

/// Why digests cannot be compared.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum DigestError {
    /// Bytes that end inside of a digest.
    #[error("{0} bytes are no whole number of digests")]
    Torn(usize),
    /// There is no page that the last of them could be of.
    #[error("there are digests of more pages than the process has")]
    TooMany,
    /// Pages are left of which none came.
    #[error("the digests of {0} pages did not come")]
    TooFew(u64),
}

/// Reads pages of a process that stands still, on as many threads as there are processors, and hands their digests over, ascending.
///
/// # Errors
/// When a page cannot be read or is not there, and what `take` says.
pub fn of_process<E: From<io::Error>>(
    process: Pid,
    pages: &PageRanges,
    mut take: impl FnMut(Vec<u8>) -> Result<(), E>,
) -> Result<(), E> {
    let mut cursor = Cursor::default();
    loop {
        let shares = (0..threads()).map(|_| cursor.take(pages, SHARE));
        let shares: Vec<PageRanges> = shares.filter(|share| !share.is_empty()).collect();
        if shares.is_empty() {
            return Ok(());
        }
        for digests in together(&shares, |share| of_share(process, share)) {
            take(digests?)?;
        }
    }
}

fn of_share(process: Pid, pages: &PageRanges) -> io::Result<Vec<u8>> {
    let mut digests = Vec::with_capacity(usize::try_from(pages.pages()).unwrap_or(0) * DIGEST);
    let copied = Copier::new(process, BATCH).read::<io::Error>(pages, |batch| {
        digests.extend(batch.contents.as_chunks::<PAGE>().0.iter().flat_map(|page| of_page(page)));
        Ok(())
    })?;
    match copied.vanished.as_slice().first() {
        Some(gone) => Err(io::Error::other(format!("the pages {gone} of a process that stands still are gone"))),
        None => Ok(digests),
    }
}

/// The digest of one page.
pub fn of_page(contents: &[u8]) -> [u8; DIGEST] {
    XxHash3_64::oneshot(contents).to_le_bytes()
}

/// What differs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Difference {
    /// How many pages.
    pub pages: u64,
    /// The first run of them; none when there is no difference.
    pub first: Option<PageRange>,
}

impl Difference {
    /// A page behind all others differs.
    fn add(&mut self, page: PageRange) {
        self.join(Self { pages: 1, first: Some(page) });
    }

    /// Adds what differs behind all of this.
    fn join(&mut self, behind: Self) {
        self.pages += behind.pages;
        match (&mut self.first, behind.first) {
            (Some(first), Some(next)) if first.end == next.start => first.end = next.end,
            (none @ None, next) => *none = next,
            _ => {}
        }
    }
}

/// Digests that come, and the pages that they have to be of.
#[derive(Debug)]
pub struct Comparison {
    pages: PageRanges,
    cursor: Cursor,
    difference: Difference,
}

impl Comparison {
    /// Of these pages, and of none else.
    pub fn of(pages: PageRanges) -> Self {
        Self { pages, cursor: Cursor::default(), difference: Difference::default() }
    }

    /// Compares the next pages of a store with digests, on as many threads as there are processors. A page that is not kept differs.
    ///
    /// # Errors
    /// When these cannot be the digests of the next pages.
    pub fn compare(&mut self, store: &Store, digests: &[u8]) -> Result<(), DigestError> {
        let (whole, torn) = digests.as_chunks::<DIGEST>();
        if !torn.is_empty() {
            return Err(DigestError::Torn(digests.len()));
        }
        let share = whole.len().div_ceil(threads()).max(LEAST);
        let mut shares = Vec::new();
        for digests in whole.chunks(share) {
            let pages = self.cursor.take(&self.pages, digests.len() as u64);
            if pages.pages() < digests.len() as u64 {
                return Err(DigestError::TooMany);
            }
            shares.push((pages, digests));
        }
        for group in shares.chunks(threads()) {
            for found in together(group, |(pages, digests)| difference(store, pages, digests)) {
                self.difference.join(found);
            }
        }
        Ok(())
    }

    /// All digests have come: what differs, and how many pages were compared.
    ///
    /// # Errors
    /// When they are not all there.
    pub fn finish(mut self) -> Result<(Difference, u64), DigestError> {
        let left = self.cursor.take(&self.pages, u64::MAX).pages();
        if left > 0 { Err(DigestError::TooFew(left)) } else { Ok((self.difference, self.pages.pages())) }
    }
}

/// What differs of a share. The digests are as many as the pages.
fn difference(store: &Store, pages: &PageRanges, digests: &[[u8; DIGEST]]) -> Difference {
    let mut found = Difference::default();
    for (page, digest) in pages.iter().flat_map(PageRange::single_pages).zip(digests) {
        if store.run(page).is_none_or(|kept| of_page(kept) != *digest) {
            found.add(page);
        }
    }
    found
}

/// How far ranges were handed out.
#[derive(Clone, Copy, Debug, Default)]
struct Cursor {
    /// Which of them is next,
    range: usize,
    /// and from which address on, if that is inside of it.
    address: u64,
}

impl Cursor {
    /// The next pages, so many of them if there are so many.
    fn take(&mut self, ranges: &PageRanges, pages: u64) -> PageRanges {
        let (mut taken, mut left) = (PageRanges::new(), pages.saturating_mul(PAGE_SIZE));
        while left > 0 {
            let Some(range) = ranges.as_slice().get(self.range) else { break };
            let start = range.start.max(self.address);
            let end = range.end.min(start.saturating_add(left));
            taken.push(PageRange::new(start, end));
            left -= end - start;
            self.address = end;
            self.range += usize::from(end == range.end);
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Addresses around the border of two of the store's chunks.
    const START: u64 = (2 << 20) - 300 * PAGE_SIZE;

    fn range(start: u64, end: u64) -> PageRange {
        PageRange::new(START + start * PAGE_SIZE, START + end * PAGE_SIZE)
    }

    fn page(number: u64) -> PageRange {
        range(number, number + 1)
    }

    /// What a page holds: every fifth nothing but zeros.
    fn contents(number: u64) -> [u8; PAGE] {
        if number.is_multiple_of(5) { [0; PAGE] } else { [u8::try_from(number % 251).unwrap() + 1; PAGE] }
    }

    fn numbers(pages: &PageRanges) -> impl Iterator<Item = u64> {
        pages.iter().flat_map(PageRange::single_pages).map(|page| (page.start - START) / PAGE_SIZE)
    }

    /// A store that keeps zero pages as such, as a target does.
    fn store(pages: &PageRanges) -> Store {
        let mut store = Store::new(16 << 20).unwrap();
        for number in numbers(pages) {
            if contents(number) == [0; PAGE] {
                store.put_zero(page(number)).unwrap();
            } else {
                store.put(page(number), &contents(number)).unwrap();
            }
        }
        store
    }

    fn digests(pages: &PageRanges) -> Vec<u8> {
        numbers(pages).flat_map(|number| of_page(&contents(number))).collect()
    }

    /// Compares, with the digests in pieces of so many.
    fn compared(pages: &PageRanges, store: &Store, digests: &[u8], piece: usize) -> (Difference, u64) {
        let mut comparison = Comparison::of(pages.clone());
        digests.chunks(piece * DIGEST).for_each(|piece| comparison.compare(store, piece).unwrap());
        comparison.finish().unwrap()
    }

    fn several() -> PageRanges {
        [range(0, 7), range(10, 640), range(700, 2300)].into_iter().collect()
    }

    #[test]
    fn equal_memory_has_no_difference_whatever_the_pieces_and_also_where_it_is_zero() {
        let pages = several();
        for piece in [1, 600, 5000] {
            let found = compared(&pages, &store(&pages), &digests(&pages), piece);
            assert_eq!(found, (Difference::default(), pages.pages()), "in pieces of {piece}");
        }
    }

    #[test]
    fn one_changed_byte_is_found_at_its_page() {
        let (pages, digests) = (several(), digests(&several()));
        for number in [0, 299, 300, 301, 639, 700, 2299] {
            let mut store = store(&pages);
            let mut changed = contents(number);
            changed[4095] ^= 1;
            store.put(page(number), &changed).unwrap();
            let expected = Difference { pages: 1, first: Some(page(number)) };
            assert_eq!(compared(&pages, &store, &digests, 700), (expected, pages.pages()));
        }
    }

    #[test]
    fn a_page_that_is_zero_here_and_not_there_differs() {
        let pages = several();
        let mut kept = store(&pages);
        kept.put_zero(page(12)).unwrap();
        kept.put(page(15), &contents(16)).unwrap();
        let (found, _) = compared(&pages, &kept, &digests(&pages), 5000);
        assert_eq!(found, Difference { pages: 2, first: Some(page(12)) });
    }

    #[test]
    fn pages_that_are_not_kept_differ_and_the_first_run_of_them_is_told_whole() {
        let pages = several();
        let mut kept = store(&pages);
        kept.forget(range(290, 310)).unwrap();
        kept.forget(range(800, 801)).unwrap();
        for piece in [1, 295, 5000] {
            let (found, _) = compared(&pages, &kept, &digests(&pages), piece);
            assert_eq!(found, Difference { pages: 21, first: Some(range(290, 310)) }, "in pieces of {piece}");
        }
    }

    #[test]
    fn more_or_fewer_digests_than_pages_and_torn_ones_are_refused() {
        let pages: PageRanges = [range(0, 3), range(5, 6)].into_iter().collect();
        let (kept, digests) = (store(&pages), digests(&pages));
        let compare = |digests: &[u8]| Comparison::of(pages.clone()).compare(&kept, digests);
        assert_eq!(compare(&digests[..12]), Err(DigestError::Torn(12)));
        assert_eq!(compare(&[&digests[..], &[0; DIGEST]].concat()), Err(DigestError::TooMany));
        assert_eq!(compare(&vec![0; 1 << 20]), Err(DigestError::TooMany));
        let mut comparison = Comparison::of(pages.clone());
        comparison.compare(&kept, &digests[..DIGEST]).unwrap();
        comparison.compare(&kept, &[]).unwrap();
        assert_eq!(comparison.finish(), Err(DigestError::TooFew(3)));
        assert_eq!(Comparison::of(PageRanges::new()).finish(), Ok((Difference::default(), 0)));
    }

    #[test]
    fn what_a_process_has_is_read_and_compared_and_a_page_that_is_gone_is_an_error() {
        let pages = 3 * usize::try_from(SHARE).unwrap() + 5;
        let mut memory = vec![0_u8; (pages + 1) * PAGE];
        let offset = memory.as_ptr().align_offset(PAGE);
        let own = &mut memory[offset..offset + pages * PAGE];
        for (number, page) in own.chunks_mut(PAGE).enumerate().filter(|(number, _)| number % 3 > 0) {
            page[number % PAGE] = 7;
        }
        let address = own.as_ptr() as u64;
        let all = PageRange::new(address, address + own.len() as u64);
        let ranges: PageRanges = [all].into_iter().collect();
        let mut kept = Store::new(all.length() + (4 << 20)).unwrap();
        kept.put(all, own).unwrap();
        let mut comparison = Comparison::of(ranges.clone());
        of_process::<io::Error>(Pid::this(), &ranges, |digests| {
            comparison.compare(&kept, &digests).map_err(io::Error::other)
        })
        .unwrap();
        assert_eq!(comparison.finish(), Ok((Difference::default(), pages as u64)));
        // The first page of an address space is never mapped.
        let gone: PageRanges = [PageRange::new(0, PAGE_SIZE), all].into_iter().collect();
        let read = of_process::<io::Error>(Pid::this(), &gone, |_| Ok(()));
        assert!(read.unwrap_err().to_string().contains("0x0-0x1000"));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn exactly_the_pages_that_differ_are_counted(
            all in prop::collection::vec((0_u64..1500, 1_u64..60), 1..12), changed in prop::collection::vec(0_u64..1600, 0..8),
            piece in 1_usize..900,
        ) {
            let pages: PageRanges = all.into_iter().map(|(start, length)| range(start, start + length)).collect();
            let mut kept = store(&pages);
            let mut expected: Vec<u64> = changed.into_iter().filter(|number| pages.contains(page(*number).start)).collect();
            expected.sort_unstable();
            expected.dedup();
            for number in &expected {
                kept.put(page(*number), &[255; PAGE]).unwrap();
            }
            let (found, compared) = compared(&pages, &kept, &digests(&pages), piece);
            prop_assert_eq!((found.pages, compared), (expected.len() as u64, pages.pages()));
            prop_assert_eq!(found.first.map(|first| first.start), expected.first().map(|number| page(*number).start));
        }

        #[test]
        fn noise_is_refused_or_differs(noise in prop::collection::vec(any::<u8>(), 1..200)) {
            let pages: PageRanges = [range(3, 6), range(9, 12)].into_iter().collect();
            let mut comparison = Comparison::of(pages.clone());
            if comparison.compare(&store(&pages), &noise).is_ok()
                && let Ok((found, _)) = comparison.finish()
            {
                prop_assert_eq!(found.pages, pages.pages());
            }
        }
    }
}
