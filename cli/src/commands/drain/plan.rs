//! Who is moved next, and how, when a node has to be empty by a certain time. Pure: it judges sizes and times.

use std::collections::HashMap;
use std::time::Duration;

use podferry_proto::v1::Workload;

use crate::arguments::Strategy;

/// Bytes of memory per second that a migration gets through, until one was seen: what a link of 1 Gbit/s takes.
const RATE: f64 = 110e6;
/// What a migration takes whatever its size: preflight, freeze, commit and all calls between.
const FIXED: Duration = Duration::from_secs(2);
/// How many times the memory a live migration sends, in the end: once, and what was written meanwhile again.
const LIVE_TIMES: f64 = 2.0;

/// The workloads in the order in which they are to leave: the highest priority first, 0 where none is given, then the smallest, so that
/// as many as possible are away by a deadline. What is under way already leaves by itself, and comes last. Otherwise as they were.
pub(super) fn order(mut workloads: Vec<Workload>, priorities: &HashMap<String, i32>) -> Vec<Workload> {
    let priority = |workload: &Workload| priorities.get(&workload.name).copied().unwrap_or_default();
    workloads.sort_by_key(|workload| {
        let under_way = !workload.migration_id.is_empty();
        (under_way, std::cmp::Reverse(priority(workload)), workload.memory_bytes)
    });
    workloads
}

/// How fast memory leaves the node, by the migrations that were seen.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Pace {
    bytes: f64,
    seconds: f64,
}

impl Pace {
    /// A migration of so much memory took so long.
    #[expect(clippy::cast_precision_loss, reason = "an estimate")]
    pub(super) fn saw(&mut self, bytes: u64, took: Duration) {
        self.bytes += bytes as f64;
        // What is not the memory's time is more than all of it for small ones: they say little.
        self.seconds += took.saturating_sub(FIXED).max(took / 10).as_secs_f64();
    }

    /// Bytes per second.
    fn rate(self) -> f64 {
        // As much again as was assumed counts for as much as was seen: one small migration must not decide.
        const ASSUMED: f64 = (64 << 20) as f64;
        (self.bytes + ASSUMED) / (self.seconds + ASSUMED / RATE)
    }

    /// How long so much memory takes when it is sent so many times.
    #[expect(clippy::cast_precision_loss, reason = "an estimate")]
    fn needed(self, bytes: u64, times: f64) -> Duration {
        let sending = Duration::try_from_secs_f64(bytes as f64 * times / self.rate()).unwrap_or(Duration::MAX);
        FIXED.saturating_add(sending)
    }
}

/// How the next workload is moved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// As it was asked for.
    AsAsked,
    /// In another way, because time is short; says why.
    Faster { strategy: Strategy, why: String },
    /// Not at all: the deadline has passed.
    TooLate,
}

/// How a workload of that size is moved in the time that is `left`; `None` is all the time there is. Only what copies memory
/// beforehand, or may do so, is replaced: by warm, and where not even that is expected to end in time and a loss is accepted, by post-copy,
/// which lets the workload go at once. An expectation may be wrong, so what is expected to be late is begun all the same.
pub(super) fn next(asked: Strategy, accept_loss: bool, bytes: u64, left: Option<Duration>, pace: Pace) -> Next {
    let Some(left) = left else { return Next::AsAsked };
    if left.is_zero() {
        return Next::TooLate;
    }
    let (live, warm) = (pace.needed(bytes, LIVE_TIMES), pace.needed(bytes, 1.0));
    let may_copy_beforehand = matches!(asked, Strategy::Auto | Strategy::Live | Strategy::Hybrid);
    if !may_copy_beforehand || live <= left {
        return Next::AsAsked;
    }
    let said = |what: &str, needed: Duration| {
        format!("{what} would take about {} s, and {} s are left", needed.as_secs(), left.as_secs())
    };
    if accept_loss && warm > left {
        let why = format!("even {}, and a loss is accepted", said("warm", warm));
        return Next::Faster { strategy: Strategy::Postcopy, why };
    }
    Next::Faster { strategy: Strategy::Warm, why: said("copying it while it runs", live) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::strategy::Strategy as _;

    use super::*;
    use crate::arguments::Strategy;

    const MIB: u64 = 1 << 20;

    fn workload(name: &str, mib: u64, migration: &str) -> Workload {
        let (name, migration_id) = (name.to_owned(), migration.to_owned());
        Workload { name, memory_bytes: mib * MIB, migration_id, ..Workload::default() }
    }

    #[test]
    fn priority_comes_before_size_and_what_leaves_by_itself_comes_last() {
        let all = [("big", 900, ""), ("busy", 1, "m1"), ("small", 10, ""), ("vital", 5000, ""), ("spare", 1, "")];
        let all = all.map(|(name, mib, migration)| workload(name, mib, migration)).to_vec();
        let priorities = [("vital", 10), ("spare", -1)].map(|(name, number)| (name.to_owned(), number)).into();
        let names: Vec<_> = order(all, &priorities).into_iter().map(|workload| workload.name).collect();
        assert_eq!(names, ["vital", "small", "big", "spare", "busy"]);
    }

    #[test]
    fn time_that_is_short_makes_it_faster_and_none_ends_it() {
        let seconds = |seconds| Some(Duration::from_secs(seconds));
        let of = |asked, accept_loss, left| next(asked, accept_loss, 10_000 * MIB, left, Pace::default());
        // About 190 s live, and 97 s warm.
        assert_eq!(of(Strategy::Auto, false, None), Next::AsAsked);
        assert_eq!(of(Strategy::Auto, false, seconds(250)), Next::AsAsked);
        assert!(matches!(of(Strategy::Auto, false, seconds(120)), Next::Faster { strategy: Strategy::Warm, .. }));
        assert!(matches!(of(Strategy::Live, true, seconds(120)), Next::Faster { strategy: Strategy::Warm, .. }));
        assert!(matches!(of(Strategy::Auto, true, seconds(30)), Next::Faster { strategy: Strategy::Postcopy, .. }));
        assert!(matches!(of(Strategy::Auto, false, seconds(30)), Next::Faster { strategy: Strategy::Warm, .. }));
        assert_eq!(of(Strategy::Cold, true, seconds(1)), Next::AsAsked, "who names another one gets it");
        assert_eq!(of(Strategy::Warm, false, seconds(0)), Next::TooLate);
    }

    #[test]
    fn what_was_seen_corrects_what_was_assumed() {
        let mut slow = Pace::default();
        slow.saw(1000 * MIB, Duration::from_secs(102));
        let needed = slow.needed(1000 * MIB, 1.0);
        assert!((80..=110).contains(&needed.as_secs()), "{needed:?}");
        let mut small = Pace::default();
        small.saw(MIB, Duration::from_secs(1));
        let needed = small.needed(1000 * MIB, 1.0).as_secs();
        assert!((8..=20).contains(&needed), "one small one says little: {needed} s");
    }

    proptest! {
        #[test]
        fn nobody_is_at_risk_who_did_not_accept_it_and_less_time_is_never_slower(
            bytes in 0_u64..1 << 40,
            seen in prop::collection::vec((0_u64..1 << 36, 0_u64..10_000), 0..4),
            (shorter, longer) in (1_u64..5000, 0_u64..5000).prop_map(|(short, more)| (short, short + more)),
            accept_loss: bool,
        ) {
            let mut pace = Pace::default();
            for (bytes, seconds) in seen {
                pace.saw(bytes, Duration::from_secs(seconds));
            }
            let speed = |left| match next(Strategy::Auto, accept_loss, bytes, Some(Duration::from_secs(left)), pace) {
                Next::AsAsked => 0,
                Next::Faster { strategy: Strategy::Warm, .. } => 1,
                Next::Faster { strategy: Strategy::Postcopy, .. } if accept_loss => 2,
                other => panic!("{other:?}"),
            };
            prop_assert!(speed(shorter) >= speed(longer));
        }
    }
}
