//! Pages that were read together, on their way: those of which little has changed since they were sent last go as deltas.

use podferry_memory::PAGE_SIZE;
use podferry_memory::previous::PreviousPages;
use podferry_memory::range::PageRange;
use podferry_transfer::{Changes, ObjectWriter, Place, Pool, TransferError};

#[expect(clippy::cast_possible_truncation, reason = "4096")]
const PAGE: usize = PAGE_SIZE as usize;

/// Pages, by the way that they are sent.
pub(super) struct Parted {
    /// Where those lie that are sent whole,
    places: Vec<Place>,
    /// and what they hold.
    contents: Vec<u8>,
    changes: Changes,
}

impl Parted {
    /// Parts at most 256 pages, and notes what the other side will have of them. Where all go whole, they stay where they are;
    /// otherwise those that do are put together in a buffer of the pool's.
    pub(super) fn of(ranges: &[PageRange], contents: Vec<u8>, previous: &mut PreviousPages, pool: &Pool) -> Self {
        if previous.keeps_nothing() {
            let places = ranges.iter().map(|range| Place { vaddr: range.start, count: range.pages() }).collect();
            return Self { places, contents, changes: Changes::default() };
        }
        let mut parted = Self { places: Vec::new(), contents: pool.take(0), changes: Changes::default() };
        let pages = ranges.iter().flat_map(|range| range.single_pages());
        for (page, now) in pages.zip(contents.as_chunks::<PAGE>().0) {
            let address = page.start;
            if !previous.get(address).is_some_and(|before| parted.changes.add(address, before, now)) {
                parted.add_whole(address, now);
            }
            previous.sent(address, now);
        }
        // Back to the pool.
        drop(pool.share(contents));
        parted
    }

    fn add_whole(&mut self, address: u64, contents: &[u8]) {
        self.contents.extend_from_slice(contents);
        match self.places.last_mut() {
            Some(last) if last.end() == address => last.count += 1,
            _ => self.places.push(Place { vaddr: address, count: 1 }),
        }
    }

    /// Sends them all.
    pub(super) fn send(self, writer: &mut ObjectWriter, pool: &Pool) -> Result<(), TransferError> {
        // Shared also when there are none: so the buffer goes back.
        let whole = pool.share(self.contents);
        if !whole.is_empty() {
            writer.scattered_blocking(&self.places, whole)?;
        }
        if self.changes.is_empty() { Ok(()) } else { writer.deltas_blocking(self.changes) }
    }
}

#[cfg(test)]
mod tests {
    use podferry_memory::previous::Budget;

    use super::*;

    fn part(ranges: &[PageRange], contents: &[u8], previous: &mut PreviousPages) -> Parted {
        previous.begin_round();
        Parted::of(ranges, contents.to_vec(), previous, &Pool::new(1))
    }

    #[test]
    fn what_changed_a_little_goes_as_deltas_and_all_else_whole() {
        let ranges = [PageRange::new(0x1000, 0x4000), PageRange::new(0x8000, 0x9000)];
        let mut pages: Vec<u8> = (1..=4_u8).flat_map(|number| [number; PAGE]).collect();
        let mut previous = PreviousPages::new(Budget::new(1 << 20));
        // In the first nothing is kept, so all of it stays in its buffer; in the second it is sorted.
        for round in 1..=2 {
            let parted = part(&ranges, &pages, &mut previous);
            let expected = [Place { vaddr: 0x1000, count: 3 }, Place { vaddr: 0x8000, count: 1 }];
            assert!(
                parted.changes.is_empty() && parted.places == expected && parted.contents == pages,
                "round {round}"
            );
        }
        // One page changes a little, one wholly, two not at all.
        pages[100] = 77;
        pages[2 * PAGE..3 * PAGE].fill(99);
        let parted = part(&ranges, &pages, &mut previous);
        assert_eq!((parted.changes.pages(), parted.places), (3, vec![Place { vaddr: 0x3000, count: 1 }]));
        assert_eq!(parted.contents, [99; PAGE]);
        for (address, page) in [0x1000, 0x2000, 0x3000, 0x8000].into_iter().zip(pages.chunks(PAGE)) {
            assert_eq!(previous.get(address).map(|kept| &kept[..]), Some(page), "{address:#x}");
        }
    }
}
