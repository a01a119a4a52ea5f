//! Deltas of pages that are sent together, at both ends.

use std::hash::Hasher as _;

use bytes::Bytes;
use podferry_proto::v1::TransferDeltas;
use thiserror::Error;
use twox_hash::XxHash3_64;

use crate::delta::{self, InvalidDelta, MAX_DELTA_LENGTH, Page, put_varint, take_varint};
use crate::frame::FrameError;
use crate::limits::{MAX_RAW_LENGTH, PAGE_SIZE};
use crate::scatter::{self, Place};
use crate::session::Scattered;

/// The most pages of one frame.
const MOST_PAGES: usize = MAX_RAW_LENGTH / PAGE_SIZE;

const _: () = assert!(MOST_PAGES * MAX_DELTA_LENGTH <= MAX_RAW_LENGTH);

/// Changed pages on their way out: what one frame carries, collected page by page.
#[derive(Default)]
pub struct Changes {
    places: Vec<Place>,
    pages: usize,
    lengths: Vec<u8>,
    deltas: Vec<u8>,
    digest: XxHash3_64,
}

impl Changes {
    /// Adds the page at `vaddr`, which has to lie behind those that are there. Says `false`, and does not take it, when it has to be
    /// sent whole: too much of it has changed, or the frame is full.
    pub fn add(&mut self, vaddr: u64, previous: &Page, now: &Page) -> bool {
        let before = self.deltas.len();
        if self.pages == MOST_PAGES || !delta::encode(previous, now, &mut self.deltas) {
            return false;
        }
        put_varint(&mut self.lengths, self.deltas.len() - before);
        self.digest.write(now);
        self.pages += 1;
        match self.places.last_mut() {
            Some(last) if last.end() == vaddr => last.count += 1,
            _ => self.places.push(Place { vaddr, count: 1 }),
        }
        true
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.pages == 0
    }

    /// How many pages they are of.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Where they lie.
    pub(crate) fn places(&self) -> &[Place] {
        &self.places
    }

    /// The frame's words and its payload.
    pub(crate) fn into_wire(self) -> (TransferDeltas, Bytes) {
        let (runs, lengths, digest) = (scatter::encode(&self.places), self.lengths.into(), self.digest.finish());
        (TransferDeltas { runs, lengths, digest }, self.deltas.into())
    }
}

/// Why changes cannot be applied.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ApplyError {
    /// A page is not there.
    #[error("changes came of the page at {vaddr:#x}, which did not come before")]
    Missing {
        /// Its address.
        vaddr: u64,
    },
    /// What it came to is not what the sender has.
    #[error(
        "changes of {count} pages from {vaddr:#x} on do not fit what came before: the pages' digest is {found:x}, not {said:x}"
    )]
    Digest {
        /// The first address.
        vaddr: u64,
        /// How many pages.
        count: usize,
        /// The digest that the sender says.
        said: u64,
        /// That of what the changes made.
        found: u64,
    },
    /// What came is no delta.
    #[error(transparent)]
    Invalid(#[from] InvalidDelta),
}

/// Changes of pages of one object that came in one frame. That they are deltas has been checked; whether they are of the pages that
/// the receiver has, only [`Deltas::apply`] can tell.
#[derive(Debug, Clone, PartialEq)]
pub struct Deltas {
    object: u32,
    places: Vec<Place>,
    /// Bytes of each page's delta.
    lengths: Vec<usize>,
    digest: u64,
    bytes: Bytes,
}

impl Deltas {
    /// What arrives when these changes are sent for an object. For tests of stores.
    pub fn arrived(object: u32, changes: Changes) -> Result<Self, FrameError> {
        let (said, bytes) = changes.into_wire();
        let (deltas, _) = Self::announced(object, &said)?;
        deltas.with(bytes)
    }

    /// Of an object, without the deltas themselves, and how many bytes those have.
    pub(crate) fn announced(object: u32, said: &TransferDeltas) -> Result<(Self, usize), FrameError> {
        let places = scatter::decode(&said.runs, MOST_PAGES as u64).filter(|places| !places.is_empty());
        let places = places.ok_or(FrameError::NotCanonical)?;
        let pages = places.iter().map(|place| place.count).sum::<u64>();
        let lengths = lengths(&said.lengths).filter(|lengths| lengths.len() as u64 == pages);
        let lengths = lengths.ok_or(FrameError::NotCanonical)?;
        let total = lengths.iter().sum();
        Ok((Self { object, places, lengths, digest: said.digest, bytes: Bytes::new() }, total))
    }

    /// Takes the deltas, which have the announced length, if that is what they are.
    pub(crate) fn with(self, bytes: Bytes) -> Result<Self, FrameError> {
        let this = Self { bytes, ..self };
        this.each().try_for_each(|(_, delta)| delta::check(delta)).map_err(|_| FrameError::NotCanonical)?;
        Ok(this)
    }

    /// The object's number in this transfer.
    pub fn object(&self) -> u32 {
        self.object
    }

    /// Bytes of the pages, not of their deltas.
    pub(crate) fn length(&self) -> u64 {
        (self.lengths.len() * PAGE_SIZE) as u64
    }

    /// What the pages hold now. `previous` writes what came last of the page at an address, and says whether there was anything.
    pub fn apply(&self, mut previous: impl FnMut(u64, &mut Page) -> bool) -> Result<Scattered, ApplyError> {
        let mut pages = Vec::with_capacity(self.lengths.len() * PAGE_SIZE);
        for (vaddr, delta) in self.each() {
            let mut page = [0; PAGE_SIZE];
            if !previous(vaddr, &mut page) {
                return Err(ApplyError::Missing { vaddr });
            }
            delta::decode(&mut page, delta)?;
            pages.extend_from_slice(&page);
        }
        let found = XxHash3_64::oneshot(&pages);
        if found != self.digest {
            let vaddr = self.places.first().map_or(0, |place| place.vaddr);
            return Err(ApplyError::Digest { vaddr, count: self.lengths.len(), said: self.digest, found });
        }
        Ok(Scattered::of(self.object, self.places.clone(), pages))
    }

    /// Each page's address and delta.
    fn each(&self) -> impl Iterator<Item = (u64, &[u8])> {
        let page = PAGE_SIZE as u64;
        let addresses =
            self.places.iter().flat_map(move |place| (0..place.count).map(move |index| place.vaddr + index * page));
        let mut rest: &[u8] = &self.bytes;
        let deltas = self.lengths.iter().map(move |length| rest.split_off(..*length).unwrap_or_default());
        addresses.zip(deltas)
    }
}

/// The lengths of deltas as they were sent; none when one is too long or not in its shortest encoding.
fn lengths(wire: &[u8]) -> Option<Vec<usize>> {
    let mut rest = wire;
    let mut lengths = Vec::new();
    while !rest.is_empty() {
        lengths.push(take_varint(&mut rest).filter(|length| *length <= MAX_DELTA_LENGTH)?);
    }
    Some(lengths)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = PAGE_SIZE as u64;

    /// Changes of the pages at these addresses, each full of its number, whose first byte becomes `new`.
    fn changes(addresses: &[u64], new: u8) -> Changes {
        let mut changes = Changes::default();
        for address in addresses {
            let previous = previous(*address);
            let mut now = previous;
            now[0] = new;
            assert!(changes.add(*address, &previous, &now), "{address:#x}");
        }
        changes
    }

    fn previous(address: u64) -> Page {
        [u8::try_from(address / PAGE % 100 + 1).unwrap(); PAGE_SIZE]
    }

    fn arrived(changes: Changes) -> Result<Deltas, FrameError> {
        Deltas::arrived(3, changes)
    }

    #[test]
    fn changes_arrive_where_they_belong() {
        let addresses = [0x3000, 0x4000, 0x9000];
        let deltas = arrived(changes(&addresses, 200)).unwrap();
        assert_eq!((deltas.object(), deltas.length()), (3, 3 * PAGE));
        let runs: Vec<_> = deltas
            .apply(|vaddr, page| {
                *page = previous(vaddr);
                true
            })
            .unwrap()
            .runs()
            .collect();
        assert_eq!(runs.iter().map(|run| (run.vaddr, run.count)).collect::<Vec<_>>(), [(0x3000, 2), (0x9000, 1)]);
        let pages = runs.iter().flat_map(|run| run.bytes.chunks(PAGE_SIZE));
        for (page, address) in pages.zip(addresses) {
            assert_eq!(page[0], 200);
            assert_eq!(page[1..], previous(address)[1..]);
        }
    }

    #[test]
    fn a_page_that_becomes_zero_is_known_to_be() {
        let mut previous = [0; PAGE_SIZE];
        previous[100] = 1;
        let mut changes = Changes::default();
        assert!(changes.add(PAGE, &previous, &[0; PAGE_SIZE]));
        assert!(changes.add(2 * PAGE, &previous, &previous));
        let read = |_, page: &mut Page| {
            *page = previous;
            true
        };
        let run = arrived(changes).unwrap().apply(read).unwrap().runs().next().unwrap();
        assert!(run.count == 2 && run.zero.is_zero(0) && !run.zero.is_zero(1));
        assert_eq!(run.bytes, previous[..]);
    }

    #[test]
    fn changes_of_other_pages_are_noticed() {
        let deltas = arrived(changes(&[0x3000, 0x9000], 200)).unwrap();
        let missing = deltas.apply(|vaddr, page| {
            *page = previous(vaddr);
            vaddr != 0x9000
        });
        assert_eq!(missing, Err(ApplyError::Missing { vaddr: 0x9000 }));
        let other = deltas.apply(|vaddr, page| {
            *page = previous(vaddr);
            page[PAGE_SIZE - 1] ^= 1;
            true
        });
        assert!(matches!(other, Err(ApplyError::Digest { vaddr: 0x3000, count: 2, .. })), "{other:?}");
    }

    #[test]
    fn a_frame_takes_only_so_many() {
        let mut changes = changes(&(0..256).map(|page| page * PAGE).collect::<Vec<_>>(), 200);
        let page = previous(0);
        assert!(!changes.add(256 * PAGE, &page, &page), "one more than fits");
        assert_eq!((changes.pages(), changes.places().len(), changes.is_empty()), (256, 1, false));
        assert!(arrived(changes).is_ok());
    }
}
