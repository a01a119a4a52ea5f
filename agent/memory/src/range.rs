//! Ranges of a process's addresses.

use std::fmt;

use crate::PAGE_SIZE;

/// Addresses from `start` to before `end`; both are multiples of [`PAGE_SIZE`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageRange {
    /// The first address.
    pub start: u64,
    /// The first address behind.
    pub end: u64,
}

impl PageRange {
    /// The range from `start` to before `end`.
    pub const fn new(start: u64, end: u64) -> Self {
        debug_assert!(start <= end && start.is_multiple_of(PAGE_SIZE) && end.is_multiple_of(PAGE_SIZE));
        Self { start, end }
    }

    /// Bytes.
    pub const fn length(self) -> u64 {
        self.end - self.start
    }

    /// Pages.
    pub const fn pages(self) -> u64 {
        self.length() / PAGE_SIZE
    }

    /// Its pages, one by one.
    pub fn single_pages(self) -> impl Iterator<Item = Self> {
        (self.start / PAGE_SIZE..self.end / PAGE_SIZE).map(|page| Self::new(page * PAGE_SIZE, (page + 1) * PAGE_SIZE))
    }

    /// The same in pieces of so many bytes, a multiple of the page's; the last one may be shorter.
    pub fn cut(self, most: u64) -> impl Iterator<Item = Self> {
        debug_assert!(most > 0 && most.is_multiple_of(PAGE_SIZE));
        let mut start = self.start;
        std::iter::from_fn(move || {
            let piece = Self::new(start, self.end.min(start + most));
            start = piece.end;
            (!piece.is_empty()).then_some(piece)
        })
    }

    /// Whether there is nothing in it.
    pub const fn is_empty(self) -> bool {
        self.start == self.end
    }

    /// What is in both; `None` when that is nothing.
    pub fn intersection(self, other: Self) -> Option<Self> {
        let (start, end) = (self.start.max(other.start), self.end.min(other.end));
        (start < end).then_some(Self { start, end })
    }
}

impl fmt::Display for PageRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}-{:#x}", self.start, self.end)
    }
}

/// Ranges in ascending order that neither overlap nor touch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageRanges {
    ranges: Vec<PageRange>,
    pages: u64,
}

impl PageRanges {
    /// No ranges.
    pub const fn new() -> Self {
        Self { ranges: Vec::new(), pages: 0 }
    }

    /// Adds a range. Cheap when it lies behind all others, which it joins when it touches the last one.
    pub fn push(&mut self, range: PageRange) {
        if range.is_empty() {
            return;
        }
        match self.ranges.last_mut() {
            Some(last) if range.start < last.start => self.insert(range),
            Some(last) if range.start <= last.end => {
                self.pages += range.end.saturating_sub(last.end) / PAGE_SIZE;
                last.end = last.end.max(range.end);
            }
            _ => {
                self.pages += range.pages();
                self.ranges.push(range);
            }
        }
    }

    /// Adds a range that begins before the last one.
    fn insert(&mut self, range: PageRange) {
        let first = self.ranges.partition_point(|other| other.end < range.start);
        let behind = self.ranges.partition_point(|other| other.start <= range.end);
        let joined = self.ranges[first..behind].iter().fold(range, |joined, other| PageRange {
            start: joined.start.min(other.start),
            end: joined.end.max(other.end),
        });
        let before: u64 = self.ranges[first..behind].iter().map(|other| other.pages()).sum();
        self.pages += joined.pages() - before;
        self.ranges.splice(first..behind, [joined]);
    }

    /// Forgets what lies behind an address.
    pub fn truncate(&mut self, end: u64) {
        while let Some(last) = self.ranges.pop_if(|last| last.end > end) {
            self.pages -= last.pages();
            if last.start < end {
                self.push(PageRange::new(last.start, end));
                return;
            }
        }
    }

    /// Pages of all ranges.
    pub const fn pages(&self) -> u64 {
        self.pages
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// The ranges, ascending.
    pub fn as_slice(&self) -> &[PageRange] {
        &self.ranges
    }

    /// The ranges, ascending.
    pub fn iter(&self) -> std::iter::Copied<std::slice::Iter<'_, PageRange>> {
        self.ranges.iter().copied()
    }

    /// What of these lies in `other`, too.
    #[must_use]
    pub fn intersection(&self, other: &Self) -> Self {
        let (mut mine, mut theirs) = (self.ranges.iter().peekable(), other.ranges.iter().peekable());
        let mut both = Self::new();
        while let (Some(one), Some(two)) = (mine.peek(), theirs.peek()) {
            if let Some(common) = one.intersection(**two) {
                both.push(common);
            }
            if one.end <= two.end {
                mine.next();
            } else {
                theirs.next();
            }
        }
        both
    }

    /// What of these does not lie in `other`.
    #[must_use]
    pub fn difference(&self, other: &Self) -> Self {
        let mut theirs = other.ranges.iter().peekable();
        let mut left = Self::new();
        for range in &self.ranges {
            let mut start = range.start;
            while let Some(hole) = theirs.next_if(|hole| hole.end <= range.end) {
                left.push(PageRange::new(start.min(hole.start.max(start)), hole.start.max(start)));
                start = start.max(hole.end);
            }
            let end = theirs.peek().map_or(range.end, |hole| hole.start.clamp(start, range.end));
            left.push(PageRange::new(start, end));
        }
        left
    }

    /// Whether a page is in one of them.
    pub fn contains(&self, address: u64) -> bool {
        let behind = self.ranges.partition_point(|range| range.start <= address);
        behind > 0 && address < self.ranges[behind - 1].end
    }
}

impl FromIterator<PageRange> for PageRanges {
    /// The union of ranges in any order.
    fn from_iter<I: IntoIterator<Item = PageRange>>(ranges: I) -> Self {
        let mut all = Self::new();
        for range in ranges {
            all.push(range);
        }
        all
    }
}

impl<'a> IntoIterator for &'a PageRanges {
    type Item = PageRange;
    type IntoIter = std::iter::Copied<std::slice::Iter<'a, PageRange>>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn range(start: u64, end: u64) -> PageRange {
        PageRange::new(start * PAGE_SIZE, end * PAGE_SIZE)
    }

    fn pages(ranges: &PageRanges) -> BTreeSet<u64> {
        ranges.into_iter().flat_map(|range| (range.start / PAGE_SIZE)..(range.end / PAGE_SIZE)).collect()
    }

    fn some() -> impl Strategy<Value = PageRanges> {
        prop::collection::vec((0_u64..64, 1_u64..9), 0..12)
            .prop_map(|all| all.into_iter().map(|(start, length)| range(start, start + length)).collect())
    }

    fn well_formed(ranges: &PageRanges) -> bool {
        ranges.as_slice().windows(2).all(|two| two[0].end < two[1].start)
            && ranges.into_iter().all(|range| !range.is_empty())
            && ranges.pages() == pages(ranges).len() as u64
    }

    #[test]
    fn a_tail_told_again_adds_what_is_new_in_it() {
        let mut ranges = PageRanges::new();
        for (start, end) in [(1, 4), (8, 9), (12, 13), (3, 4), (6, 7), (8, 10), (12, 13), (13, 14)] {
            ranges.push(range(start, end));
        }
        assert_eq!(ranges.as_slice(), [range(1, 4), range(6, 7), range(8, 10), range(12, 14)]);
        assert_eq!(ranges.pages(), 8);
    }

    proptest! {
        #[test]
        fn set_operations_are_those_of_the_pages(one in some(), two in some()) {
            let both = one.intersection(&two);
            let left = one.difference(&two);
            prop_assert!(well_formed(&one) && well_formed(&both) && well_formed(&left));
            prop_assert_eq!(pages(&both), &pages(&one) & &pages(&two));
            prop_assert_eq!(pages(&left), &pages(&one) - &pages(&two));
            let mut cut = one.clone();
            cut.truncate(30 * PAGE_SIZE);
            prop_assert!(well_formed(&cut));
            prop_assert_eq!(pages(&cut), pages(&one).into_iter().filter(|page| *page < 30).collect::<BTreeSet<_>>());
            for page in 0..80 {
                prop_assert_eq!(one.contains(page * PAGE_SIZE), pages(&one).contains(&page));
            }
        }
    }
}
