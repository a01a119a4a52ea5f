//! The end check: what the target keeps of the followed processes is compared with what they have, page by page.
//!
//! It finds what the last round cannot: a write that no tracker told. It comes when CRIU has dumped everything and let go of the
//! threads, which stand still from then on: all pages are read once more, and a digest of each is sent. The target compares them with
//! its own and ends the transfer when one differs.
//!
//! The last round is not put off for it, so that it is the same with the check and without. CRIU runs its own code in each thread
//! beside it, and the kernel then notes the processor in the thread's `struct rseq`. These few pages are sent again before they are
//! compared: they may differ without anybody's fault.
//!
//! Shared memory is read once more, too, though nobody writes to it since before the last round.

use std::path::Path;

use bytes::Bytes;
use podferry_criu::{RseqArea, rseq_areas};
use podferry_memory::PAGE_SIZE;
use podferry_memory::digest;
use podferry_memory::range::{PageRange, PageRanges};
use podferry_transfer::Object;

use super::{Followed, Followers, SendError, Way};

/// The first address that no process has (57 bits).
const END_OF_ADDRESSES: u64 = 1 << 56;

impl Followers {
    /// Sends digests of all pages that the target is to keep, of every process that is followed. `images` are those of the dump, which
    /// has to be complete; the last round has to be sent. Gives how many pages there are. Blocks.
    ///
    /// # Errors
    /// When memory or images cannot be read, or the transfer breaks: also because the target has found a difference.
    pub(in crate::source) fn verify(&mut self, images: &Path, way: &Way) -> Result<u64, SendError> {
        self.round += 1;
        let again = pages_of(&rseq_areas(images)?);
        let mut pages = 0;
        for followed in self.followed.iter_mut().filter(|followed| followed.member.is_alive()) {
            followed.send(&again.intersection(&followed.existing), self.round, way)?;
            followed.send_digests(way)?;
            pages += followed.existing.pages();
        }
        Ok(pages + self.shared.send_digests(way)?)
    }
}

impl Followed {
    fn send_digests(&self, way: &Way) -> Result<(), SendError> {
        if self.existing.is_empty() {
            return Ok(());
        }
        let (mut writer, _) = way.open(&Object::Digests { owner: self.owner() })?;
        digest::of_process::<SendError>(self.pid(), &self.existing, |digests| {
            way.pause()?;
            Ok(writer.data_blocking(Bytes::from(digests))?)
        })
        .map_err(|error| error.of_process(self.member.pid))?;
        Ok(writer.close_blocking()?)
    }
}

/// The pages that areas lie in.
fn pages_of(areas: &[RseqArea]) -> PageRanges {
    let page = |address: u64| address / PAGE_SIZE * PAGE_SIZE;
    // What lies behind all addresses of processes exists in none.
    let areas = areas.iter().filter(|area| area.address.saturating_add(area.size) <= END_OF_ADDRESSES);
    areas.map(|area| PageRange::new(page(area.address), page(area.address + area.size - 1) + PAGE_SIZE)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_of_areas_are_whole_and_those_of_no_process_are_left_out() {
        let areas = [(0x7000_0000_2fe0, 32), (0x7000_0000_1ff0, 32), (0x7000_0000_9000, 1), (u64::MAX - 40, 32)];
        let pages = pages_of(&areas.map(|(address, size)| RseqArea { address, size }));
        let expected = [(0x7000_0000_1000, 0x7000_0000_3000), (0x7000_0000_9000, 0x7000_0000_a000)];
        assert_eq!(pages.as_slice(), expected.map(|(start, end)| PageRange::new(start, end)));
        assert!(pages_of(&[]).is_empty());
    }
}
