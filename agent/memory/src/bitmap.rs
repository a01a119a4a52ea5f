//! Which pages of a chunk: bits that are looked at 64 at a time.

use std::ops::Range;

/// Bits of a chunk, one for each page.
pub(crate) const BITS: usize = 512;
const WORDS: usize = BITS / 64;

/// A set of the pages of one chunk, by their number in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Bitmap([u64; WORDS]);

impl Bitmap {
    pub(crate) fn set(&mut self, bits: Range<usize>) {
        masks(bits).for_each(|(word, mask)| self.0[word] |= mask);
    }

    pub(crate) fn clear(&mut self, bits: Range<usize>) {
        masks(bits).for_each(|(word, mask)| self.0[word] &= !mask);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0 == [0; WORDS]
    }

    /// Those that are not in `other`.
    pub(crate) fn without(&self, other: &Self) -> Self {
        let mut left = *self;
        left.0.iter_mut().zip(&other.0).for_each(|(word, other)| *word &= !other);
        left
    }

    /// Whether all of these are in `other`.
    pub(crate) fn is_within(&self, other: &Self) -> bool {
        self.without(other).is_empty()
    }

    /// How many follow each other from this one on.
    pub(crate) fn run_from(&self, first: usize) -> usize {
        self.next(first, true) - first
    }

    /// How many are absent from this one on.
    pub(crate) fn gap_from(&self, first: usize) -> usize {
        self.next(first, false) - first
    }

    /// The runs, ascending.
    pub(crate) fn runs(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        let mut from = 0;
        std::iter::from_fn(move || {
            let start = self.next(from, false);
            from = self.next(start, true);
            (start < from).then_some(start..from)
        })
    }

    pub(crate) fn to_bytes(self) -> [u8; BITS / 8] {
        let mut bytes = [0; BITS / 8];
        bytes.chunks_exact_mut(8).zip(self.0).for_each(|(bytes, word)| bytes.copy_from_slice(&word.to_le_bytes()));
        bytes
    }

    pub(crate) fn from_bytes(bytes: &[u8; BITS / 8]) -> Self {
        let mut words = [0; WORDS];
        for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = bytes.try_into().map(u64::from_le_bytes).unwrap_or_default();
        }
        Self(words)
    }

    /// The first bit from `from` on that is not `present`; [`BITS`] when there is none.
    fn next(&self, from: usize, present: bool) -> usize {
        let flip = if present { u64::MAX } else { 0 };
        let mut ignored = u64::MAX << (from % 64);
        for (index, word) in self.0.iter().enumerate().skip(from / 64) {
            let wanted = (word ^ flip) & ignored;
            if wanted != 0 {
                return index * 64 + wanted.trailing_zeros() as usize;
            }
            ignored = u64::MAX;
        }
        BITS
    }
}

/// The words in which bits lie, and which bits of each.
fn masks(bits: Range<usize>) -> impl Iterator<Item = (usize, u64)> {
    (bits.start / 64..bits.end.div_ceil(64)).map(move |word| {
        let (low, high) = (bits.start.max(word * 64) % 64, bits.end.min(word * 64 + 64) - word * 64);
        (word, (u64::MAX << low) & (u64::MAX >> (64 - high)))
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_is_a_set(steps in prop::collection::vec((any::<bool>(), 0_usize..BITS, 1_usize..200), 0..20), at in 0..BITS) {
            let (mut bitmap, mut model) = (Bitmap::default(), BTreeSet::new());
            for (set, start, length) in steps {
                let bits = start..(start + length).min(BITS);
                if set {
                    bitmap.set(bits.clone());
                    model.extend(bits);
                } else {
                    bitmap.clear(bits.clone());
                    model.retain(|bit| !bits.contains(bit));
                }
            }
            prop_assert_eq!(bitmap.runs().flatten().collect::<BTreeSet<_>>(), model.clone());
            prop_assert!(bitmap.runs().zip(bitmap.runs().skip(1)).all(|(one, next)| one.end < next.start));
            prop_assert_eq!(bitmap.run_from(at), (at..BITS).take_while(|bit| model.contains(bit)).count());
            prop_assert_eq!(bitmap.gap_from(at), (at..BITS).take_while(|bit| !model.contains(bit)).count());
            prop_assert_eq!(bitmap.is_empty(), model.is_empty());
            prop_assert_eq!(Bitmap::from_bytes(&bitmap.to_bytes()), bitmap);
            prop_assert!(bitmap.without(&bitmap).is_empty() && bitmap.is_within(&bitmap));
        }
    }
}
