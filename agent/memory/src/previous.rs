//! What was sent of pages that are likely to be sent again, so that next time only what has changed in them needs to be.
//!
//! Of the first round nothing is kept: it is all that there is. A page that a later round sends was written between two rounds, and
//! most of what a process writes it writes again soon. The memory for this is bounded by a [`Budget`]; when it is used up, pages make
//! room that no round has sent lately.
//!
//! What is kept must be what the other side has, to the byte. So whoever sends a page tells its new contents
//! ([`PreviousPages::sent`]), whatever way it is sent, and everything is forgotten when it is not certain that it arrives.

use std::collections::HashMap;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::PAGE_SIZE;
use crate::range::{PageRange, PageRanges};

#[expect(clippy::cast_possible_truncation, reason = "4096")]
const PAGE: usize = PAGE_SIZE as usize;

/// The share of the node's memory that is taken for previous pages at most,
const SHARE: u64 = 20;
/// and the most bytes.
const MOST_BYTES: u64 = 512 << 20;
/// For how many rounds a page that was not sent again is kept when others want its room.
const PATIENCE: u32 = 2;

/// How many pages may be kept. Clones share it: what one keeps the others cannot.
#[derive(Clone, Debug)]
pub struct Budget(Arc<AtomicU64>);

impl Budget {
    /// Room for so many bytes of pages.
    pub fn new(bytes: u64) -> Self {
        Self(Arc::new(AtomicU64::new(bytes / PAGE_SIZE)))
    }

    /// A twentieth of this node's memory, and 512 MiB at most; nothing when it is not known how much the node has.
    pub fn of_this_node() -> Self {
        let known = fs::read_to_string("/proc/meminfo").ok().and_then(|text| total(&text));
        Self::new((known.unwrap_or(0) / SHARE).min(MOST_BYTES))
    }

    fn take(&self) -> bool {
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
    }

    fn give(&self, pages: usize) {
        self.0.fetch_add(pages as u64, Ordering::Relaxed);
    }
}

impl Default for Budget {
    fn default() -> Self {
        Self::of_this_node()
    }
}

/// The node's memory in bytes, from the text of `/proc/meminfo`.
fn total(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
}

/// Pages of one process as they were sent last.
#[derive(Debug)]
pub struct PreviousPages {
    pages: HashMap<u64, Sent>,
    budget: Budget,
    round: u32,
    /// A page found no room since the round began.
    full: bool,
    /// No round follows.
    last: bool,
}

#[derive(Debug)]
struct Sent {
    contents: Box<[u8; PAGE]>,
    /// When it was sent last.
    round: u32,
}

impl PreviousPages {
    /// None yet, and before the first round.
    pub fn new(budget: Budget) -> Self {
        Self { pages: HashMap::new(), budget, round: 0, full: false, last: false }
    }

    /// A round begins.
    pub fn begin_round(&mut self) {
        self.round += 1;
        if std::mem::take(&mut self.full) {
            let round = self.round;
            self.forget_unless(|_, sent| round - sent.round <= PATIENCE);
        }
    }

    /// The last round begins: pages that are sent in it are not kept, which would take time while the process stands still.
    pub fn begin_last_round(&mut self) {
        self.begin_round();
        self.last = true;
    }

    /// Whether nothing is kept, and nothing would be of pages that are sent now.
    pub fn keeps_nothing(&self) -> bool {
        self.pages.is_empty() && (self.last || self.round <= 1)
    }

    /// What was sent last of the page at an address.
    pub fn get(&self, address: u64) -> Option<&[u8; PAGE]> {
        self.pages.get(&address).map(|sent| &*sent.contents)
    }

    /// The page at an address is sent with these contents. They are kept if it was kept before, or if there is room and this is not
    /// the first round.
    pub fn sent(&mut self, address: u64, contents: &[u8; PAGE]) {
        if self.last {
            self.forget_one(address);
        } else if let Some(sent) = self.pages.get_mut(&address) {
            *sent.contents = *contents;
            sent.round = self.round;
        } else if self.round > 1 && self.has_room() {
            self.pages.insert(address, Sent { contents: Box::new(*contents), round: self.round });
        }
    }

    fn has_room(&mut self) -> bool {
        let room = self.budget.take();
        self.full |= !room;
        room
    }

    /// Forgets pages of which it is not certain what the other side has.
    pub fn forget(&mut self, ranges: &PageRanges) {
        for page in ranges.iter().flat_map(PageRange::single_pages) {
            self.forget_one(page.start);
        }
    }

    fn forget_one(&mut self, address: u64) {
        if self.pages.remove(&address).is_some() {
            self.budget.give(1);
        }
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.forget_unless(|_, _| false);
    }

    fn forget_unless(&mut self, keep: impl Fn(u64, &Sent) -> bool) {
        let before = self.pages.len();
        self.pages.retain(|address, sent| keep(*address, sent));
        self.budget.give(before - self.pages.len());
    }
}

impl Drop for PreviousPages {
    fn drop(&mut self) {
        self.clear();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ADDRESS: u64 = 0x7000;

    fn left(budget: &Budget) -> u64 {
        budget.0.load(Ordering::Relaxed)
    }

    fn page(number: u8) -> [u8; PAGE] {
        [number; PAGE]
    }

    #[test]
    fn the_first_round_is_not_kept_and_later_ones_are() {
        let mut previous = PreviousPages::new(Budget::new(1 << 20));
        previous.begin_round();
        assert!(previous.keeps_nothing());
        previous.sent(ADDRESS, &page(1));
        assert_eq!(previous.get(ADDRESS), None);
        previous.begin_round();
        assert!(!previous.keeps_nothing());
        for number in [2, 3] {
            previous.sent(ADDRESS, &page(number));
            assert_eq!(previous.get(ADDRESS), Some(&page(number)));
        }
    }

    #[test]
    fn what_is_in_doubt_is_forgotten_and_its_room_is_free() {
        let budget = Budget::new(3 * PAGE_SIZE);
        let mut previous = PreviousPages::new(budget.clone());
        (0..2).for_each(|_| previous.begin_round());
        (0..3).for_each(|index| previous.sent(index * PAGE_SIZE, &page(1)));
        assert_eq!(left(&budget), 0);
        previous.forget(&[PageRange::new(PAGE_SIZE, 9 * PAGE_SIZE)].into_iter().collect());
        assert_eq!((previous.get(0), previous.get(PAGE_SIZE), left(&budget)), (Some(&page(1)), None, 2));
        previous.clear();
        assert_eq!((previous.get(0), left(&budget)), (None, 3));
        previous.sent(0, &page(2));
        drop(previous);
        assert_eq!(left(&budget), 3);
    }

    #[test]
    fn the_last_round_uses_what_is_kept_and_keeps_nothing() {
        let mut previous = PreviousPages::new(Budget::new(1 << 20));
        (0..2).for_each(|_| previous.begin_round());
        previous.sent(ADDRESS, &page(1));
        previous.begin_last_round();
        assert_eq!(previous.get(ADDRESS), Some(&page(1)));
        assert!(!previous.keeps_nothing());
        for address in [ADDRESS, 0] {
            previous.sent(address, &page(2));
            assert_eq!(previous.get(address), None);
        }
        assert!(previous.keeps_nothing());
    }

    #[test]
    fn without_room_old_pages_stay_for_a_while_and_then_make_room() {
        let budget = Budget::new(2 * PAGE_SIZE);
        let mut previous = PreviousPages::new(budget.clone());
        (0..2).for_each(|_| previous.begin_round());
        previous.sent(0, &page(1));
        previous.sent(PAGE_SIZE, &page(1));
        for round in 3..6 {
            previous.begin_round();
            previous.sent(PAGE_SIZE, &page(round));
            previous.sent(ADDRESS, &page(round));
            assert_eq!(previous.get(PAGE_SIZE), Some(&page(round)), "what is there is always up to date");
            assert_eq!([previous.get(0).is_some(), previous.get(ADDRESS).is_some()], [round < 5, round == 5]);
        }
        let mut other = PreviousPages::new(budget);
        (0..2).for_each(|_| other.begin_round());
        other.sent(0, &page(1));
        assert_eq!(other.get(0), None, "the budget is one for all");
    }

    #[test]
    fn the_nodes_memory_is_found() {
        assert_eq!(total("MemTotal:       24617984 kB\nMemFree:  1 kB\n"), Some(24_617_984 << 10));
        assert_eq!(total("MemFree: 1 kB\n"), None);
        assert!(left(&Budget::of_this_node()) > 0);
    }

    proptest! {
        #[test]
        fn whatever_happens_only_what_was_sent_last_is_kept(
            steps in prop::collection::vec((0..12_u8, 0..6_u64, any::<u8>()), 0..200), room in 0..6_u64,
        ) {
            let budget = Budget::new(room * PAGE_SIZE);
            let mut previous = PreviousPages::new(budget.clone());
            let mut other_side = HashMap::new();
            for (step, index, number) in steps {
                let address = index * PAGE_SIZE;
                match step {
                    0 => previous.begin_round(),
                    1 => previous.forget(&[PageRange::new(address, address + PAGE_SIZE)].into_iter().collect()),
                    _ => {
                        previous.sent(address, &page(number));
                        other_side.insert(address, number);
                    }
                }
                for (address, sent) in &previous.pages {
                    prop_assert!(sent.contents[..] == page(other_side[address])[..]);
                }
                prop_assert_eq!(previous.pages.len() as u64 + left(&budget), room);
            }
        }
    }
}
