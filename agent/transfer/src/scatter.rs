//! Where the pages of one frame lie when they lie apart: runs of pages, ascending.
//!
//! On the wire each run is two varints: how many pages lie between the end of the run before it (address 0 for the first) and its
//! beginning, and how many pages it has. What a running process writes to is scattered; with a frame for each run, the frames would
//! cost more than the pages.

use bytes::Bytes;
use prost::encoding::{decode_varint, encode_varint};

use crate::limits::PAGE_SIZE;

/// A run of pages: the address of the first, and how many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The first address; a multiple of [`PAGE_SIZE`].
    pub vaddr: u64,
    /// How many pages; at least 1.
    pub count: u64,
}

const PAGE: u64 = PAGE_SIZE as u64;

impl Place {
    /// The first address behind it.
    pub fn end(&self) -> u64 {
        self.vaddr + self.count * PAGE
    }
}

/// The runs as they are sent. They must ascend and not overlap.
pub(crate) fn encode(places: &[Place]) -> Bytes {
    let mut wire = Vec::with_capacity(places.len() * 4);
    let mut cursor = 0;
    for place in places {
        let first = place.vaddr / PAGE;
        encode_varint(first - cursor, &mut wire);
        encode_varint(place.count, &mut wire);
        cursor = first + place.count;
    }
    Bytes::from(wire)
}

/// The runs that were sent; none if they are not in their only encoding, reach past the last address, or have more than
/// `most` pages.
pub(crate) fn decode(wire: &Bytes, most: u64) -> Option<Vec<Place>> {
    let mut rest = wire.clone();
    let (mut places, mut cursor, mut pages) = (Vec::new(), 0_u64, 0_u64);
    while !rest.is_empty() {
        let gap = decode_varint(&mut rest).ok()?;
        let count = decode_varint(&mut rest).ok().filter(|count| *count > 0)?;
        // Two runs that touch are one.
        (places.is_empty() || gap > 0).then_some(())?;
        pages = pages.checked_add(count).filter(|pages| *pages <= most)?;
        let first = cursor.checked_add(gap)?;
        cursor = first.checked_add(count).filter(|end| *end <= u64::MAX / PAGE)?;
        places.push(Place { vaddr: first * PAGE, count });
    }
    (encode(&places) == wire).then_some(places)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn places() -> impl Strategy<Value = Vec<Place>> {
        let run = (1..1_u64 << 20, 1..40_u64);
        prop::collection::vec(run, 0..20).prop_map(|runs| {
            let mut cursor = 0;
            let place = |(gap, count): (u64, u64)| {
                let place = Place { vaddr: (cursor + gap) * PAGE, count };
                cursor += gap + count;
                place
            };
            runs.into_iter().map(place).collect()
        })
    }

    proptest! {
        #[test]
        fn places_survive_the_wire(places in places()) {
            let pages = places.iter().map(|place| place.count).sum();
            prop_assert_eq!(decode(&encode(&places), pages), Some(places.clone()));
            if pages > 0 {
                prop_assert_eq!(decode(&encode(&places), pages - 1), None);
            }
        }

        #[test]
        fn noise_is_refused_or_is_places(noise in prop::collection::vec(any::<u8>(), 0..40)) {
            let wire = Bytes::from(noise);
            if let Some(places) = decode(&wire, 256) {
                prop_assert_eq!(encode(&places), wire);
                prop_assert!(places.windows(2).all(|two| two[0].vaddr + two[0].count * PAGE < two[1].vaddr));
            }
        }
    }
}
