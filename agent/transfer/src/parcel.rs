//! Pages in a message of their own, outside of a transfer: see [`podferry_proto::fetch`].

use bytes::Bytes;
use podferry_proto::v1::FetchResponse;
use thiserror::Error;

use crate::compression::{Level, Packer, Unpacker};
use crate::frame::sum;
use crate::limits::PAGE_SIZE;
use crate::zero::{ZeroMap, gather};

/// The most pages of a parcel.
pub const MOST_PAGES: u32 = 256;

/// Why a parcel is not taken.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ParcelError {
    /// More pages than a parcel has, or none.
    #[error("a message of {count} pages; at most {MOST_PAGES} are allowed")]
    Count {
        /// How many it says.
        count: u32,
    },
    /// The list of zero pages is none.
    #[error("a list of zero pages that makes no sense")]
    Zeros,
    /// Contents changed on the way.
    #[error("pages are corrupted: their checksum is {found:016x}, not {said:016x}")]
    Checksum {
        /// What the message says.
        said: u64,
        /// What arrived.
        found: u64,
    },
    /// They cannot be unpacked.
    #[error("pages cannot be unpacked: {0}")]
    Unpack(String),
    /// There are more or fewer bytes than pages.
    #[error("{found} bytes of pages, and not {wanted}")]
    Length {
        /// That many should be there.
        wanted: usize,
        /// That many are.
        found: usize,
    },
}

/// Pages of a process as a message. Without a packer they are sent as they are.
///
/// # Panics
/// When `pages` are not whole pages, or more than [`MOST_PAGES`].
///
/// # Errors
/// When zstd fails.
pub fn pack(process: u32, address: u64, pages: &[u8], packer: Option<&mut Packer>) -> std::io::Result<FetchResponse> {
    assert!(pages.len().is_multiple_of(PAGE_SIZE), "pages are whole");
    let count = u32::try_from(pages.len() / PAGE_SIZE).unwrap_or(u32::MAX);
    assert!(count <= MOST_PAGES, "{count} pages in a parcel");
    let zero = ZeroMap::find(pages);
    let mut full = vec![0; (count as usize - zero.count()) * PAGE_SIZE];
    gather(pages, &zero, &mut full);
    let packed = match packer {
        Some(packer) if !full.is_empty() => packer.pack(&full, Level::Fastest)?.0,
        _ => None,
    };
    let (packed, contents) = packed.map_or_else(|| (false, Bytes::from(full)), |packed| (true, packed));
    let checksum = sum(&contents);
    Ok(FetchResponse { process, address, count, zero: zero.to_wire(), contents, packed, checksum })
}

/// Which of a message's pages are zero, and the others one after the other. Takes memory for what the message says, which is within
/// the limit.
///
/// # Errors
/// When it is not what [`pack`] makes.
pub fn unpack(message: &FetchResponse, unpacker: &mut Unpacker) -> Result<(ZeroMap, Bytes), ParcelError> {
    let count = message.count;
    if count == 0 || count > MOST_PAGES {
        return Err(ParcelError::Count { count });
    }
    let zero = ZeroMap::from_wire(message.zero.clone(), count as usize).ok_or(ParcelError::Zeros)?;
    let (said, found) = (message.checksum, sum(&message.contents));
    if said != found {
        return Err(ParcelError::Checksum { said, found });
    }
    let wanted = (count as usize - zero.count()) * PAGE_SIZE;
    let contents = if message.packed {
        unpacker.unpack_bytes(&message.contents, wanted).map_err(ParcelError::Unpack)?
    } else {
        message.contents.clone()
    };
    let found = contents.len();
    if found != wanted {
        return Err(ParcelError::Length { wanted, found });
    }
    Ok((zero, contents))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::pool::Pool;

    fn unpacker() -> Unpacker {
        Unpacker::new(Pool::new(1)).unwrap()
    }

    fn pages(fills: &[u8]) -> Vec<u8> {
        fills.iter().flat_map(|fill| vec![*fill; PAGE_SIZE]).collect()
    }

    fn whole(zero: &ZeroMap, contents: &[u8], count: usize) -> Vec<u8> {
        let mut full = contents.chunks(PAGE_SIZE);
        (0..count)
            .flat_map(|page| if zero.is_zero(page) { vec![0; PAGE_SIZE] } else { full.next().unwrap().to_vec() })
            .collect()
    }

    proptest! {
        #[test]
        fn what_is_packed_is_what_is_unpacked(fills in prop::collection::vec(0_u8..4, 1..40), packs in any::<bool>()) {
            let pages = pages(&fills);
            let mut packer = Packer::new(Pool::new(1)).unwrap();
            let message = pack(7, 0x1000, &pages, packs.then_some(&mut packer)).unwrap();
            prop_assert!(!message.packed || packs);
            let (zero, contents) = unpack(&message, &mut unpacker()).unwrap();
            prop_assert_eq!(whole(&zero, &contents, fills.len()), pages);
        }
    }

    #[test]
    fn a_message_that_lies_is_refused() {
        let message = pack(7, 0x1000, &pages(&[0, 1, 2]), None).unwrap();
        let mut packer = Packer::new(Pool::new(1)).unwrap();
        let packed = pack(7, 0x1000, &pages(&[0, 1, 2]), Some(&mut packer)).unwrap();
        assert!(packed.packed);
        let contents = Bytes::from(pages(&[1]));
        for lie in [
            FetchResponse { count: 0, ..message.clone() },
            FetchResponse { count: MOST_PAGES + 1, ..message.clone() },
            FetchResponse { count: 2, ..message.clone() },
            FetchResponse { count: 4, ..message.clone() },
            FetchResponse { zero: Bytes::from_static(&[9]), ..message.clone() },
            FetchResponse { checksum: message.checksum ^ 1, ..message.clone() },
            FetchResponse { checksum: sum(&contents), contents, ..message.clone() },
            FetchResponse { packed: true, ..message },
            FetchResponse { count: 4, ..packed.clone() },
            FetchResponse { packed: false, ..packed },
        ] {
            assert!(unpack(&lie, &mut unpacker()).is_err(), "{lie:?}");
        }
    }
}
