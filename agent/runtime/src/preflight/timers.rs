//! Periodic timers (timerfd), which CRIU restores switched off when they have gone off and nobody has looked.
//!
//! The kernel starts a periodic timer again when its tick is read, and says until then that nothing remains of its time
//! (`fs/timerfd.c`). CRIU takes that for a timer that is off: checkpoint-restore/criu#3162.

use std::time::Duration;

use super::{Finding, FindingKind};

/// Below this period a timer is likely to go off between the freeze and the look that CRIU takes at it.
const SHORT: Duration = Duration::from_millis(100);

const REMEDY: &str =
    "if the program relies on it, let it set the timer again when no tick comes, or use another kind of timer";

/// Judges a timer by the `fdinfo` of its descriptor.
pub(super) fn judge(fdinfo: &str) -> Option<Finding> {
    let field = |name: &str| fdinfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim);
    let period = field("it_interval").and_then(time).filter(|period| !period.is_zero())?;
    let remaining = field("it_value").and_then(time)?;
    let ticks: u64 = field("ticks")?.parse().ok()?;
    let told = |message| Some(Finding::warning(FindingKind::Timer, message, REMEDY));
    match (remaining.is_zero(), ticks) {
        (true, 1..) => told(format!(
            "has a timer that goes off every {period:?} and whose tick was not read; dumped like that it ticks once more \
             and never again"
        )),
        // It is off.
        (true, 0) => None,
        _ if period < SHORT => told(format!(
            "has a timer that goes off every {period:?}; dumped with a tick that was not read it ticks once more and never \
             again"
        )),
        _ => None,
    }
}

/// `(seconds, nanoseconds)`.
fn time(pair: &str) -> Option<Duration> {
    let (seconds, nanoseconds) = pair.strip_prefix('(')?.strip_suffix(')')?.split_once(',')?;
    let seconds = Duration::from_secs(seconds.trim().parse().ok()?);
    Some(seconds + Duration::from_nanos(nanoseconds.trim().parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_timers_that_may_stop_are_told() {
        let of = |ticks: u64, value: &str, interval: &str| {
            judge(&format!(
                "pos:\t0\nclockid: 1\nticks: {ticks}\nsettime flags: 00\nit_value: {value}\nit_interval: {interval}\n"
            ))
        };
        let unread = of(1, "(0, 0)", "(3600, 0)").unwrap();
        assert!(unread.message.contains("every 3600s"), "{unread}");
        assert!(of(0, "(0, 4000)", "(0, 20000000)").unwrap().message.contains("every 20ms"));
        for (ticks, value, interval) in [
            (0, "(0, 49406829)", "(1, 0)"),
            (1, "(0, 0)", "(0, 0)"),
            (0, "(0, 49406829)", "(0, 0)"),
            (0, "(0, 0)", "(0, 20000000)"),
        ] {
            assert_eq!(of(ticks, value, interval), None, "{ticks} {value} {interval}");
        }
    }
}
