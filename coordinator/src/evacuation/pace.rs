//! How long it takes to move a workload, by those that were moved.

use std::time::Duration;

/// Bytes of memory per second that a node sends, until something was seen: what a link of 1 Gbit/s takes.
const RATE: f64 = 110e6;
/// What a migration takes whatever its size: preflight, freeze, commit and all calls between.
const FIXED: Duration = Duration::from_secs(2);
/// How many times the memory a live migration sends, in the end: once, and what was written meanwhile again.
const LIVE_TIMES: f64 = 2.0;
/// As many bytes as were assumed count for as much as were seen: one small migration must not decide.
const ASSUMED: f64 = (64 << 20) as f64;

/// How fast memory leaves the node in one of the migrations that go side by side.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pace {
    lanes: f64,
    bytes: f64,
    seconds: f64,
}

impl Pace {
    /// Nothing was seen yet of so many migrations at a time.
    pub fn new(lanes: usize) -> Self {
        let lanes = u32::try_from(lanes.max(1)).map_or(f64::from(u32::MAX), f64::from);
        Self { lanes, bytes: 0.0, seconds: 0.0 }
    }

    /// A migration of so much memory took so long, beside the others.
    #[expect(clippy::cast_precision_loss, reason = "an estimate")]
    pub fn saw(&mut self, bytes: u64, took: Duration) {
        self.bytes += bytes as f64;
        // What is not the memory's time is more than all of it for small ones: they say little.
        self.seconds += took.saturating_sub(FIXED).max(took / 10).as_secs_f64();
    }

    /// Bytes per second of one migration.
    fn rate(self) -> f64 {
        (self.bytes + ASSUMED) / (self.seconds + ASSUMED * self.lanes / RATE)
    }

    /// How long so much memory takes when it moves while the workload runs.
    pub fn live(self, bytes: u64) -> Duration {
        self.needed(bytes, LIVE_TIMES)
    }

    /// How long so much memory takes when it is sent once.
    pub fn once(self, bytes: u64) -> Duration {
        self.needed(bytes, 1.0)
    }

    #[expect(clippy::cast_precision_loss, reason = "an estimate")]
    fn needed(self, bytes: u64, times: f64) -> Duration {
        let sending = Duration::try_from_secs_f64(bytes as f64 * times / self.rate()).unwrap_or(Duration::MAX);
        FIXED.saturating_add(sending)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn what_was_seen_corrects_what_was_assumed() {
        let mut slow = Pace::new(1);
        slow.saw(1000 * MIB, Duration::from_secs(102));
        let needed = slow.once(1000 * MIB);
        assert!((80..=110).contains(&needed.as_secs()), "{needed:?}");
        let mut small = Pace::new(1);
        small.saw(MIB, Duration::from_secs(1));
        let needed = small.once(1000 * MIB).as_secs();
        assert!((8..=20).contains(&needed), "one small one says little: {needed} s");
    }

    #[test]
    fn those_that_move_side_by_side_share_the_rate_that_is_assumed() {
        let (alone, beside) = (Pace::new(1).once(1100 * MIB), Pace::new(2).once(1100 * MIB));
        let sending = |needed: Duration| needed.saturating_sub(FIXED).as_secs_f64();
        let ratio = sending(beside) / sending(alone);
        assert!((1.99..2.01).contains(&ratio), "{ratio}");
        assert!(Pace::new(2).live(MIB) > Pace::new(2).once(MIB));
    }
}
