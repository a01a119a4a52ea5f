//! Pages that a restored process does not have yet: where it expects them, and under which address they are kept.
//!
//! The process may move, unmap and give up memory while its pages are on their way; the address that a page is kept under stays
//! the one it had when the process was frozen.

use std::collections::BTreeMap;

use crate::PAGE_SIZE;
use crate::range::{PageRange, PageRanges};

/// Pages that are not there yet.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pending {
    /// By first address: the first address behind, and where the first page is kept.
    pieces: BTreeMap<u64, (u64, u64)>,
}

impl From<&PageRanges> for Pending {
    fn from(ranges: &PageRanges) -> Self {
        Self { pieces: ranges.into_iter().map(|range| (range.start, (range.end, range.start))).collect() }
    }
}

impl Pending {
    /// The pages from this address on, up to so many bytes, and where they are kept.
    pub(crate) fn at(&self, address: u64, most: u64) -> Option<(PageRange, u64)> {
        let (start, (end, kept)) = self.pieces.range(..=address).next_back()?;
        let found = PageRange::new(address, (*end).min(address + most).max(address));
        (!found.is_empty()).then(|| (found, kept + (address - start)))
    }

    /// Some pages, up to so many bytes, and where they are kept.
    pub(crate) fn first(&self, most: u64) -> Option<(PageRange, u64)> {
        let (start, (end, kept)) = self.pieces.first_key_value()?;
        Some((PageRange::new(*start, (*end).min(start + most)), *kept))
    }

    /// Whether all are there.
    pub(crate) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// How many.
    pub(crate) fn pages(&self) -> u64 {
        self.pieces.iter().map(|(start, (end, _))| (end - start) / PAGE_SIZE).sum()
    }

    /// All of them, and where they are kept.
    pub(crate) fn pieces(&self) -> impl Iterator<Item = (PageRange, u64)> + '_ {
        self.pieces.iter().map(|(start, (end, kept))| (PageRange::new(*start, *end), *kept))
    }

    /// Expects pages that were not expected yet.
    pub(crate) fn add(&mut self, range: PageRange, kept: u64) {
        self.pieces.insert(range.start, (range.end, kept));
    }

    /// Forgets pages.
    pub(crate) fn remove(&mut self, range: PageRange) {
        self.take(range);
    }

    /// Follows a move; what was expected at the new place is not expected any more.
    pub(crate) fn shift(&mut self, from: PageRange, to: u64) {
        let moved = self.take(from);
        self.remove(PageRange::new(to, to + from.length()));
        for (start, (end, kept)) in moved {
            let start_now = to + (start - from.start);
            self.pieces.insert(start_now, (start_now + (end - start), kept));
        }
    }

    fn take(&mut self, range: PageRange) -> Vec<(u64, (u64, u64))> {
        let first = self.pieces.range(..=range.start).next_back().map_or(range.start, |(start, _)| *start);
        let touched: Vec<u64> = self.pieces.range(first..range.end).map(|(start, _)| *start).collect();
        let mut taken = Vec::new();
        for start in touched {
            let Some((end, kept)) = self.pieces.remove(&start) else { continue };
            if start < range.start.min(end) {
                self.pieces.insert(start, (range.start.min(end), kept));
            }
            if end > range.end {
                self.pieces.insert(range.end, (end, kept + (range.end - start)));
            }
            let (inside, behind) = (start.max(range.start), end.min(range.end));
            if inside < behind {
                taken.push((inside, (behind, kept + (inside - start))));
            }
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Step {
        Remove(u64, u64),
        Shift(u64, u64, u64),
    }

    fn range(start: u64, length: u64) -> PageRange {
        PageRange::new(start * PAGE_SIZE, (start + length) * PAGE_SIZE)
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let remove = (0_u64..60, 1_u64..20).prop_map(|(start, length)| Step::Remove(start, length));
        // A mapping does not move onto itself.
        let shift = (0_u64..40, 1_u64..20, 0_u64..40).prop_map(|(start, length, apart)| {
            let to = start + length + apart;
            Step::Shift(start, length, to)
        });
        prop::collection::vec(prop_oneof![remove, shift], 0..12)
    }

    proptest! {
        #[test]
        fn each_page_is_looked_for_where_it_was_kept(steps in steps()) {
            let all: PageRanges = [range(2, 30), range(40, 10)].into_iter().collect();
            let mut pending = Pending::from(&all);
            let mut model: BTreeMap<u64, u64> = (2..32).chain(40..50).map(|page| (page, page)).collect();
            for step in steps {
                match step {
                    Step::Remove(start, length) => {
                        pending.remove(range(start, length));
                        model.retain(|page, _| !(start..start + length).contains(page));
                    }
                    Step::Shift(start, length, to) => {
                        pending.shift(range(start, length), to * PAGE_SIZE);
                        let moved: Vec<(u64, u64)> =
                            model.range(start..start + length).map(|(page, kept)| (page - start + to, *kept)).collect();
                        model.retain(|page, _| {
                            !(start..start + length).contains(page) && !(to..to + length).contains(page)
                        });
                        model.extend(moved);
                    }
                }
            }
            for page in 0..120 {
                let found = pending.at(page * PAGE_SIZE, PAGE_SIZE).map(|(_, kept)| kept / PAGE_SIZE);
                prop_assert_eq!(found, model.get(&page).copied(), "page {}", page);
            }
            prop_assert_eq!(pending.first(PAGE_SIZE).is_none(), model.is_empty());
            while let Some((found, kept)) = pending.first(3 * PAGE_SIZE) {
                for offset in 0..found.pages() {
                    prop_assert_eq!(model.remove(&(found.start / PAGE_SIZE + offset)), Some(kept / PAGE_SIZE + offset));
                }
                pending.remove(found);
            }
            prop_assert!(model.is_empty());
        }
    }
}
