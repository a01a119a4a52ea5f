//! Pages that a restored process does not have yet: where it expects them, and under which address they are kept.
//!
//! The process may move, unmap and give up memory while its pages are on their way; the address that a page is kept under stays
//! the one it had when the process was frozen.
//!
//! The kernel tells of a move or an unmapping when it has been made and its lock is free again. So of two threads the one that comes
//! to a place later may be told first:
//!
//! ```text
//! thread A   munmap(X) ─────────────────────────────── event: X is gone
//! thread B              mremap(Y → X)  event: Y is at X now
//! ```
//!
//! Taken as they come, the pages of Y would be looked for at X and then forgotten. What is at X when something moves there must have
//! gone already, and is only not told yet: it is *overdue*. The next event of that place is of it, and not of what is there now.
//! (It could be of what is there now, if thread B changed that once more before thread A got to queueing its event. The kernel says
//! nothing by which the two could be told apart, and the first takes less of a delay.)

use std::collections::BTreeMap;

use crate::PAGE_SIZE;
use crate::range::{PageRange, PageRanges};

/// Pages that are not there yet.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pending {
    pieces: Pieces,
    /// Where memory is that was restored, as far as is known: at least all places of which pages are or were pending.
    mapped: PageRanges,
    /// Memory that has left its place without a word yet, by the time at which it was found to have, the oldest first.
    overdue: Vec<Overdue>,
}

#[derive(Clone, Debug)]
struct Overdue {
    /// Where it was.
    ranges: PageRanges,
    pieces: Pieces,
    /// Where what came instead is.
    successor: PageRange,
}

impl From<&PageRanges> for Pending {
    fn from(ranges: &PageRanges) -> Self {
        let pieces = ranges.into_iter().map(|range| (range.start, (range.end, range.start))).collect();
        Self { pieces: Pieces(pieces), mapped: ranges.clone(), overdue: Vec::new() }
    }
}

impl Pending {
    /// The pages from this address on, up to so many bytes, and where they are kept.
    pub(crate) fn at(&self, address: u64, most: u64) -> Option<(PageRange, u64)> {
        let (start, (end, kept)) = self.pieces.0.range(..=address).next_back()?;
        let found = PageRange::new(address, (*end).min(address + most).max(address));
        (!found.is_empty()).then(|| (found, kept + (address - start)))
    }

    /// The next pages from this address on, and behind the last the first ones, as far as they lie in a row, and where they are kept.
    /// None also when it is not known yet where any are.
    pub(crate) fn next(&self, address: u64) -> Option<(PageRange, u64)> {
        if let Some(found) = self.at(address, u64::MAX - address) {
            return Some(found);
        }
        let behind = self.pieces.0.range(address..).next();
        let (start, (end, kept)) = behind.or_else(|| self.pieces.0.first_key_value())?;
        Some((PageRange::new(*start, *end), *kept))
    }

    /// How many rows of pages there are of which it is known where they are expected.
    pub(crate) fn rows(&self) -> usize {
        self.pieces.0.len()
    }

    /// Whether all are there.
    pub(crate) fn is_empty(&self) -> bool {
        self.pieces.0.is_empty() && self.overdue.iter().all(|overdue| overdue.pieces.0.is_empty())
    }

    /// How many.
    pub(crate) fn pages(&self) -> u64 {
        self.pieces.pages() + self.overdue.iter().map(|overdue| overdue.pieces.pages()).sum::<u64>()
    }

    /// All of which it is known where they are expected, and where they are kept.
    pub(crate) fn pieces(&self) -> impl Iterator<Item = (PageRange, u64)> + '_ {
        self.pieces.0.iter().map(|(start, (end, kept))| (PageRange::new(*start, *end), *kept))
    }

    /// Expects pages that were not expected yet.
    pub(crate) fn add(&mut self, range: PageRange, kept: u64) {
        self.pieces.0.insert(range.start, (range.end, kept));
        self.mapped.push(range);
    }

    /// Forgets pages that the process gave up (`MADV_DONTNEED`), and which it is told of before they go.
    pub(crate) fn give_up(&mut self, range: PageRange) {
        self.pieces.take(range);
    }

    /// Follows an unmapping.
    pub(crate) fn unmap(&mut self, range: PageRange) {
        self.vacate(range);
    }

    /// Follows a move.
    pub(crate) fn shift(&mut self, from: PageRange, to: u64) {
        let moved = self.vacate(from);
        let destination = PageRange::new(to, to + from.length());
        self.set_aside(destination);
        for (start, (end, kept)) in moved {
            let start_now = to + (start - from.start);
            self.pieces.0.insert(start_now, (start_now + (end - start), kept));
        }
        self.mapped.push(destination);
    }

    /// Forgets pages that were dealt with. The kernel has taken them or said that they have no place, which it does only when all
    /// events were read: nothing is overdue any more.
    pub(crate) fn settle(&mut self, range: PageRange) {
        self.pieces.take(range);
        self.overdue.clear();
    }

    /// Takes the pages of memory that leaves a place: of what left it without a word, if there is such, else of what is there.
    fn vacate(&mut self, range: PageRange) -> Vec<(u64, (u64, u64))> {
        let mut left: PageRanges = [range].into_iter().collect();
        let mut taken = Vec::new();
        for overdue in &mut self.overdue {
            let part = overdue.ranges.intersection(&left);
            if part.is_empty() {
                continue;
            }
            part.iter().for_each(|range| taken.extend(overdue.pieces.take(range)));
            overdue.ranges = overdue.ranges.difference(&part);
            // What came instead stays, also where it is not known that something was there before.
            left = left.difference(&[overdue.successor].into_iter().collect());
        }
        self.overdue.retain(|overdue| !overdue.ranges.is_empty());
        left.iter().for_each(|range| taken.extend(self.pieces.take(range)));
        self.mapped = self.mapped.difference(&left);
        taken
    }

    /// Something comes to a place: what is there has left it already, and is overdue.
    fn set_aside(&mut self, place: PageRange) {
        let ranges = self.mapped.intersection(&[place].into_iter().collect());
        if ranges.is_empty() {
            return;
        }
        let pieces = ranges.iter().flat_map(|range| self.pieces.take(range)).collect();
        self.mapped = self.mapped.difference(&ranges);
        self.overdue.push(Overdue { ranges, pieces: Pieces(pieces), successor: place });
    }
}

/// Runs of pages, by first address: the first address behind, and where the first page is kept.
#[derive(Clone, Debug, Default)]
struct Pieces(BTreeMap<u64, (u64, u64)>);

impl Pieces {
    fn pages(&self) -> u64 {
        self.0.iter().map(|(start, (end, _))| (end - start) / PAGE_SIZE).sum()
    }

    /// Takes what is in a range.
    fn take(&mut self, range: PageRange) -> Vec<(u64, (u64, u64))> {
        let first = self.0.range(..=range.start).next_back().map_or(range.start, |(start, _)| *start);
        let touched: Vec<u64> = self.0.range(first..range.end).map(|(start, _)| *start).collect();
        let mut taken = Vec::new();
        for start in touched {
            let Some((end, kept)) = self.0.remove(&start) else { continue };
            if start < range.start.min(end) {
                self.0.insert(start, (range.start.min(end), kept));
            }
            if end > range.end {
                self.0.insert(range.end, (end, kept + (range.end - start)));
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
    use std::collections::{BTreeMap, VecDeque};

    use proptest::prelude::*;

    use super::*;

    fn range(start: u64, length: u64) -> PageRange {
        PageRange::new(start * PAGE_SIZE, (start + length) * PAGE_SIZE)
    }

    fn first(pending: &Pending, most: u64) -> Option<(PageRange, u64)> {
        let (range, kept) = pending.next(0)?;
        Some((PageRange::new(range.start, range.end.min(range.start + most)), kept))
    }

    /// A step of a process of several threads, or of whoever reads its events. Numbers choose among what there is.
    #[derive(Clone, Debug)]
    enum Step {
        Unmap(usize),
        Move(usize, u64),
        GiveUp(usize, u64, u64),
        /// A thread gets to telling what it did.
        Tell(usize),
        /// An event is read; its thread goes on.
        Read,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            (0_usize..20).prop_map(Step::Unmap),
            (0_usize..20, 0_u64..100).prop_map(|(which, to)| Step::Move(which, to)),
            (0_usize..20, 0_u64..20, 1_u64..9).prop_map(|(which, at, length)| Step::GiveUp(which, at, length)),
            (0_usize..4).prop_map(Step::Tell),
            Just(Step::Read),
        ];
        prop::collection::vec(step, 0..60)
    }

    #[derive(Clone, Debug)]
    enum Told {
        Moved(PageRange, u64),
        Unmapped(PageRange),
    }

    /// A mapping: its first page and length, and where each of its pages is kept that is pending.
    #[derive(Clone, Debug)]
    struct Mapping {
        start: u64,
        length: u64,
        pending: BTreeMap<u64, u64>,
        /// The thread that made it here has not come back, so that nobody knows of it.
        unknown: bool,
    }

    /// What is really there, and the events in the order of their telling.
    #[derive(Debug)]
    struct Kernel {
        mappings: Vec<Mapping>,
        /// Changes that were made and are not told yet.
        untold: Vec<Told>,
        told: VecDeque<Told>,
    }

    impl Kernel {
        fn new(mappings: &[(u64, u64)]) -> Self {
            let mapping = |&(start, length): &(u64, u64)| {
                let pending = (0..length).map(|page| (page, start + page)).collect();
                Mapping { start, length, pending, unknown: false }
            };
            Self { mappings: mappings.iter().map(mapping).collect(), untold: Vec::new(), told: VecDeque::new() }
        }

        fn lazy(&self) -> PageRanges {
            self.mappings.iter().map(|mapping| range(mapping.start, mapping.length)).collect()
        }

        fn known(&self, which: usize) -> Option<usize> {
            let known: Vec<usize> = (0..self.mappings.len()).filter(|index| self.may_change(*index)).collect();
            (!known.is_empty()).then(|| known[which % known.len()])
        }

        /// Not before its thread has come back. And not as long as what was there before is untold: two changes of one place are told
        /// alike, and nobody can know which is which.
        fn may_change(&self, index: usize) -> bool {
            let Mapping { start, length, unknown, .. } = self.mappings[index];
            let left = |told: &Told| match told {
                Told::Moved(from, _) | Told::Unmapped(from) => *from,
            };
            !unknown && self.untold.iter().all(|told| left(told).intersection(range(start, length)).is_none())
        }

        fn unmap(&mut self, which: usize) {
            let Some(index) = self.known(which) else { return };
            let gone = self.mappings.remove(index);
            self.untold.push(Told::Unmapped(range(gone.start, gone.length)));
        }

        fn shift(&mut self, which: usize, to: u64) {
            let Some(index) = self.known(which) else { return };
            let length = self.mappings[index].length;
            let is_free = |other: &Mapping| other.start + other.length <= to || to + length <= other.start;
            if !self.mappings.iter().all(is_free) {
                return;
            }
            let mapping = &mut self.mappings[index];
            self.untold.push(Told::Moved(range(mapping.start, length), to * PAGE_SIZE));
            (mapping.start, mapping.unknown) = (to, true);
        }

        fn tell(&mut self, which: usize) {
            if !self.untold.is_empty() {
                let told = self.untold.remove(which % self.untold.len());
                self.told.push_back(told);
            }
        }

        fn read(&mut self, pending: &mut Pending) {
            match self.told.pop_front() {
                Some(Told::Unmapped(range)) => pending.unmap(range),
                Some(Told::Moved(from, to)) => {
                    pending.shift(from, to);
                    let back = |mapping: &&mut Mapping| mapping.start * PAGE_SIZE == to;
                    // Gone already if its thread gave its place away, which it cannot.
                    self.mappings.iter_mut().find(back).unwrap().unknown = false;
                }
                None => {}
            }
        }

        /// The kernel tells of this before it does it, and the thread waits; it is done only when all else was told.
        fn give_up(&mut self, which: usize, at: u64, length: u64, pending: &mut Pending) {
            let Some(index) = self.known(which) else { return };
            let mapping = &mut self.mappings[index];
            let (at, end) = (at % mapping.length, (at % mapping.length + length).min(mapping.length));
            mapping.pending.retain(|page, _| !(at..end).contains(page));
            pending.give_up(range(mapping.start + at, end - at));
        }
    }

    fn check(pending: &mut Pending, kernel: &Kernel) -> Result<(), TestCaseError> {
        let mut model: BTreeMap<u64, u64> = BTreeMap::new();
        for mapping in &kernel.mappings {
            model.extend(mapping.pending.iter().map(|(page, kept)| (mapping.start + page, *kept)));
        }
        for page in 0..130 {
            let found = pending.at(page * PAGE_SIZE, PAGE_SIZE).map(|(_, kept)| kept / PAGE_SIZE);
            prop_assert_eq!(found, model.get(&page).copied(), "page {}", page);
        }
        prop_assert_eq!(pending.pages(), model.len() as u64);
        while let Some((found, kept)) = first(pending, 3 * PAGE_SIZE) {
            for offset in 0..found.pages() {
                prop_assert_eq!(model.remove(&(found.start / PAGE_SIZE + offset)), Some(kept / PAGE_SIZE + offset));
            }
            pending.settle(found);
        }
        prop_assert!(model.is_empty() && pending.is_empty());
        Ok(())
    }

    const MAPPINGS: [(u64, u64); 5] = [(2, 20), (25, 10), (40, 3), (43, 5), (60, 12)];

    proptest! {
        #[test]
        fn each_page_is_looked_for_where_it_was_kept_in_whatever_order_changes_are_told(steps in steps()) {
            let mut kernel = Kernel::new(&MAPPINGS);
            let mut pending = Pending::from(&kernel.lazy());
            for step in steps {
                match step {
                    Step::Unmap(which) => kernel.unmap(which),
                    Step::Move(which, to) => kernel.shift(which, to),
                    Step::GiveUp(which, at, length) if kernel.untold.is_empty() && kernel.told.is_empty() => {
                        kernel.give_up(which, at, length, &mut pending);
                    }
                    Step::GiveUp(..) => {}
                    Step::Tell(which) => kernel.tell(which),
                    Step::Read => kernel.read(&mut pending),
                }
            }
            while !kernel.untold.is_empty() || !kernel.told.is_empty() {
                kernel.tell(1);
                kernel.read(&mut pending);
            }
            prop_assert!(pending.overdue.is_empty(), "{:?}", pending.overdue);
            check(&mut pending, &kernel)?;
        }
    }

    #[test]
    fn what_is_overdue_is_waited_for_until_the_kernel_says_that_nothing_is() {
        let mut pending = Pending::from(&[range(2, 4), range(10, 4)].into_iter().collect());
        pending.shift(range(2, 4), 10 * PAGE_SIZE);
        let (found, kept) = first(&pending, 64 * PAGE_SIZE).unwrap();
        assert_eq!((found, kept), (range(10, 4), 2 * PAGE_SIZE));
        pending.pieces.take(found);
        assert!(first(&pending, PAGE_SIZE).is_none() && !pending.is_empty() && pending.pages() == 4);
        pending.settle(range(1, 1));
        assert!(pending.is_empty());
    }
}
