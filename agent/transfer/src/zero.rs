//! Zero pages: found before they are sent, and not sent.

use bytes::Bytes;

use crate::limits::PAGE_SIZE;

/// Bytes looked at in one go: a few vector registers.
const STRIDE: usize = 128;

/// Whether a page holds nothing but zeros.
pub fn is_zero(page: &[u8]) -> bool {
    let (strides, rest) = page.as_chunks::<STRIDE>();
    let zero = |bytes: &[u8]| bytes.iter().fold(0, |seen, byte| seen | byte) == 0;
    // Most pages that are not zero show it at once; comparing stride by stride ends there.
    strides.iter().all(|stride| zero(stride)) && zero(rest)
}

/// The pages that are not zero, one after the other, written to where `room` has as many bytes.
pub(crate) fn gather(pages: &[u8], zero: &ZeroMap, room: &mut [u8]) {
    let full = pages.chunks_exact(PAGE_SIZE).enumerate().filter(|(page, _)| !zero.is_zero(*page));
    for (to, (_, from)) in room.chunks_exact_mut(PAGE_SIZE).zip(full) {
        to.copy_from_slice(from);
    }
}

/// Which pages of a run are zero: bit n of byte n / 8, lowest bit first. Empty when none is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ZeroMap(Bytes);

impl ZeroMap {
    /// Looks at every page of a run.
    pub fn find(pages: &[u8]) -> Self {
        let mut bits = Vec::new();
        for (index, _) in pages.chunks(PAGE_SIZE).enumerate().filter(|(_, page)| is_zero(page)) {
            if bits.is_empty() {
                bits.resize(pages.len().div_ceil(PAGE_SIZE).div_ceil(8), 0);
            }
            bits[index / 8] |= 1 << (index % 8);
        }
        Self(Bytes::from(bits))
    }

    /// The map of a run of `count` pages as it was sent; none if its length is wrong, a bit past the end is set, or none
    /// is set at all.
    pub(crate) fn from_wire(bits: Bytes, count: usize) -> Option<Self> {
        if bits.is_empty() {
            return Some(Self(bits));
        }
        let past_end = if count.is_multiple_of(8) { 0 } else { 0xff_u8 << (count % 8) };
        let fits = bits.len() == count.div_ceil(8) && bits.last().is_some_and(|last| last & past_end == 0);
        (fits && bits.iter().any(|byte| *byte != 0)).then_some(Self(bits))
    }

    /// As it is sent.
    pub fn to_wire(&self) -> Bytes {
        self.0.clone()
    }

    /// Whether that page of the run is zero.
    pub fn is_zero(&self, page: usize) -> bool {
        self.0.get(page / 8).is_some_and(|byte| byte & (1 << (page % 8)) != 0)
    }

    /// The map of a part: `count` pages from `first` on.
    pub(crate) fn part(&self, first: usize, count: usize) -> Self {
        let mut bits = vec![0; count.div_ceil(8)];
        for page in (0..count).filter(|page| self.is_zero(first + page)) {
            bits[page / 8] |= 1 << (page % 8);
        }
        let any = bits.iter().any(|byte| *byte != 0);
        Self(if any { Bytes::from(bits) } else { Bytes::new() })
    }

    /// How many pages are zero.
    pub fn count(&self) -> usize {
        self.0.iter().map(|byte| byte.count_ones() as usize).sum()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn one_byte_anywhere_makes_a_page_not_zero() {
        let mut page = vec![0; PAGE_SIZE];
        assert!(is_zero(&page));
        for at in 0..PAGE_SIZE {
            page[at] = 1;
            assert!(!is_zero(&page), "{at}");
            page[at] = 0;
        }
    }

    #[test]
    fn a_map_that_does_not_fit_its_run_is_refused() {
        assert!(ZeroMap::from_wire(Bytes::from_static(&[1]), 9).is_none(), "too short");
        assert!(ZeroMap::from_wire(Bytes::from_static(&[1, 0, 0]), 9).is_none(), "too long");
        assert!(ZeroMap::from_wire(Bytes::from_static(&[0, 2]), 9).is_none(), "past the end");
        assert!(ZeroMap::from_wire(Bytes::from_static(&[0, 0]), 9).is_none(), "says nothing");
        assert_eq!(ZeroMap::from_wire(Bytes::from_static(&[0x80, 1]), 9).map(|map| map.count()), Some(2));
    }

    proptest! {
        #[test]
        fn the_map_says_what_the_pages_are(zeros in proptest::collection::vec(any::<bool>(), 1..64)) {
            let pages: Vec<u8> = zeros.iter().flat_map(|zero| [u8::from(!zero); PAGE_SIZE]).collect();
            let map = ZeroMap::find(&pages);
            let seen: Vec<bool> = (0..zeros.len()).map(|page| map.is_zero(page)).collect();
            prop_assert_eq!(&seen, &zeros);
            prop_assert_eq!(map.count(), zeros.iter().filter(|zero| **zero).count());
            prop_assert_eq!(ZeroMap::from_wire(map.to_wire(), zeros.len()), Some(map));
        }
    }
}
