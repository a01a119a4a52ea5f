//! Packets that wait, no more than there is room for.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// The most that waits, in bytes; see the specification.
const MOST_KEPT: usize = 8 << 20;

/// In the order in which they came.
#[derive(Debug, Default)]
pub(super) struct Kept {
    packets: VecDeque<Vec<u8>>,
    bytes: usize,
}

impl Kept {
    /// Keeps one. Where there is no room it is lost, as on any link, and TCP repeats it.
    pub(super) fn push(&mut self, packet: Vec<u8>) {
        if self.bytes + packet.len() <= MOST_KEPT {
            self.bytes += packet.len();
            self.packets.push_back(packet);
        }
    }

    /// All of them; none is left.
    pub(super) fn take(&mut self) -> VecDeque<Vec<u8>> {
        self.bytes = 0;
        std::mem::take(&mut self.packets)
    }

    /// All of them; they stay.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Vec<u8>> {
        self.packets.iter()
    }
}

/// For how long what a container was handed counts as what it may not have read: from its freeze to when that is known here.
const RECENT: Duration = Duration::from_millis(50);
/// The most of that, in bytes.
const MOST_PASSED: usize = 1 << 20;

/// What a container was handed lately.
#[derive(Debug, Default)]
pub(super) struct Passed {
    packets: VecDeque<(Instant, Vec<u8>)>,
    bytes: usize,
}

impl Passed {
    /// It was handed this.
    pub(super) fn push(&mut self, packet: Vec<u8>) {
        self.bytes += packet.len();
        self.packets.push_back((Instant::now(), packet));
        while self.bytes > MOST_PASSED {
            let Some((_, oldest)) = self.packets.pop_front() else { return };
            self.bytes -= oldest.len();
        }
    }

    /// Whether it was handed nothing since that was asked for last.
    pub(super) fn is_empty(&self) -> bool {
        self.packets.is_empty()
    }

    /// What of it is recent; nothing is left.
    pub(super) fn take(&mut self) -> Vec<Vec<u8>> {
        self.bytes = 0;
        let recent = std::mem::take(&mut self.packets).into_iter().filter(|(at, _)| at.elapsed() < RECENT);
        recent.map(|(_, packet)| packet).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_waits_than_there_is_room_for_and_what_was_taken_makes_room() {
        let mut kept = Kept::default();
        let fill = |kept: &mut Kept| (0..1000).for_each(|_| kept.push(vec![0; 60_000]));
        fill(&mut kept);
        assert_eq!(kept.iter().count(), MOST_KEPT / 60_000);
        assert_eq!(kept.take().len(), MOST_KEPT / 60_000);
        assert_eq!(kept.iter().count(), 0);
        fill(&mut kept);
        assert_eq!(kept.take().len(), MOST_KEPT / 60_000);
    }

    #[test]
    fn of_what_was_handed_over_the_newest_is_known_and_the_old_is_not() {
        let mut passed = Passed::default();
        (0..1000_u32).for_each(|number| passed.push(number.to_be_bytes().repeat(15_000)));
        let recent = passed.take();
        assert_eq!(recent.len(), MOST_PASSED / 60_000);
        assert_eq!(recent.last().unwrap()[..4], 999_u32.to_be_bytes());
        assert!(passed.take().is_empty());
        passed.push(vec![1]);
        std::thread::sleep(RECENT);
        assert!(passed.take().is_empty());
    }
}
