//! Whether a request's wishes make sense, for themselves and together.

use std::ops::RangeInclusive;

use podferry_common::{Failure, FailureCode};
use podferry_proto::v1;

use crate::strategy::{Asked, Strategy, Wishes};

/// Downtimes that can be aimed at, in milliseconds.
const DOWNTIME_BUDGETS: RangeInclusive<f64> = 1.0..=60_000.0;
/// The least bandwidth that a migration can be held to, in bytes per second.
const LEAST_BANDWIDTH: u64 = 64 << 10;
/// Seconds that a workload gets to end, when nobody says how many; as in Kubernetes.
const GRACE_PERIOD_S: u32 = 30;
/// The most of them.
const LONGEST_GRACE_PERIOD_S: u32 = 3600;

/// What a request asks of the way a workload is moved, if that makes sense.
pub(super) fn wishes(request: &v1::MigrateRequest) -> Result<Wishes, Failure> {
    let asked = Asked::of(request.strategy)?;
    let strategy = asked.at_least();
    let refused = |message: String, remedy: &str| {
        Err(Failure::new(FailureCode::InvalidArgument, message).in_phase("preflight").remedy(remedy))
    };
    let (budget, limit) = (request.downtime_budget_ms, request.bandwidth_limit);
    // Zero is no wish. What is not a number is not in the range either.
    let no_budget = budget.abs() < f64::MIN_POSITIVE;
    if !no_budget && !DOWNTIME_BUDGETS.contains(&budget) {
        let (least, most) = (DOWNTIME_BUDGETS.start(), DOWNTIME_BUDGETS.end());
        let message = format!("{budget} ms is no downtime that can be aimed at: it is between {least} and {most} ms");
        return refused(message, "give another one, or none");
    }
    if limit > 0 && limit < LEAST_BANDWIDTH {
        let message = format!("{limit} bytes per second are too little: the least limit is {LEAST_BANDWIDTH}");
        return refused(message, "give a larger limit, or none");
    }
    if asked == Asked::Auto {
        return Ok(Wishes { strategy, bandwidth_limit: limit });
    }
    if request.allow_restart && strategy != Strategy::Cold {
        let message = format!("the strategy {strategy} does not restart the workload, whatever is allowed");
        return refused(message, "use auto, or cold, or do not allow a restart");
    }
    if !no_budget && !strategy.copies_memory_beforehand() {
        let message = format!("the strategy {strategy} cannot aim at a downtime: {}", without_rounds(strategy));
        return refused(message, "use live, or give no downtime");
    }
    if strategy.path().post_copy && !request.accept_loss {
        let message = format!(
            "the strategy {strategy} risks the workload: from its resume on the target until the last page is across, losing either \
             node, or the link between them for too long, loses it"
        );
        return refused(message, "accept that risk (--accept-loss), or use live");
    }
    if request.verify && strategy.path().post_copy {
        let message = format!(
            "the strategy {strategy} cannot verify: what is fetched after the resume is not there to be compared"
        );
        return refused(message, "leave the verification away, or use live");
    }
    if request.verify && strategy.starts_anew() {
        return refused(
            format!("the strategy {strategy} has nothing to verify: it moves no memory"),
            "leave the verification away, or use live",
        );
    }
    if request.verify && !strategy.copies_memory_beforehand() {
        let message = format!(
            "the strategy {strategy} has nothing to verify: all memory is read while the workload is frozen, and each piece of it \
             travels with a check sum"
        );
        return refused(message, "leave the verification away, or use live");
    }
    if request.throttle && !strategy.copies_memory_beforehand() {
        let message = format!("the strategy {strategy} cannot throttle a workload: {}", without_rounds(strategy));
        return refused(message, "use live, or do not throttle");
    }
    Ok(Wishes { strategy, bandwidth_limit: limit })
}

/// Why a strategy does nothing to memory while the workload runs.
fn without_rounds(strategy: Strategy) -> &'static str {
    if strategy.starts_anew() { "it moves no memory" } else { "it freezes the workload at once" }
}

/// How long a workload gets to end, in seconds, where it is stopped.
pub(super) fn grace_period_s_of(request: &v1::MigrateRequest, strategy: Strategy) -> Result<u32, Failure> {
    let refused = |message: String, remedy: &str| {
        Err(Failure::new(FailureCode::InvalidArgument, message).in_phase("preflight").remedy(remedy))
    };
    let auto = Asked::of(request.strategy)? == Asked::Auto;
    let may_stop = strategy.starts_anew() || (auto && request.allow_restart);
    match request.grace_period_s {
        Some(_) if auto && !may_stop => refused(
            "no workload is stopped unless that is allowed".to_owned(),
            "give no grace period, or --allow-restart",
        ),
        Some(_) if !may_stop => refused(
            format!("the strategy {strategy} stops no workload"),
            "give no grace period, or use cold or application",
        ),
        Some(asked) if asked > LONGEST_GRACE_PERIOD_S => refused(
            format!("{asked} s are no grace period: it is at most {LONGEST_GRACE_PERIOD_S} s"),
            "give a shorter one, or none",
        ),
        None if may_stop => Ok(GRACE_PERIOD_S),
        asked => Ok(asked.unwrap_or_default()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(strategy: v1::Strategy, downtime_budget_ms: f64, bandwidth_limit: u64) -> Result<Wishes, String> {
        let strategy = strategy.into();
        let request =
            v1::MigrateRequest { strategy, downtime_budget_ms, bandwidth_limit, ..v1::MigrateRequest::default() };
        wishes(&request).map_err(|failure| format!("{} {failure}", failure.code))
    }

    fn throttled(strategy: v1::Strategy) -> Result<Wishes, String> {
        let request = v1::MigrateRequest { strategy: strategy.into(), throttle: true, ..v1::MigrateRequest::default() };
        wishes(&request).map_err(|failure| format!("{} {failure}", failure.code))
    }

    #[test]
    fn wishes_that_make_no_sense_are_refused() {
        let live = Wishes { strategy: Strategy::Live, bandwidth_limit: 0 };
        for budget in [0.0, 1.0, 0.5e3, 60_000.0] {
            assert_eq!(asked(v1::Strategy::Live, budget, 0), Ok(live));
        }
        let limited = Wishes { strategy: Strategy::Warm, bandwidth_limit: LEAST_BANDWIDTH };
        assert_eq!(asked(v1::Strategy::Unspecified, 0.0, LEAST_BANDWIDTH), Ok(limited));
        let refused = [
            asked(v1::Strategy::Live, 0.5, 0),
            asked(v1::Strategy::Live, -1.0, 0),
            asked(v1::Strategy::Live, 60_001.0, 0),
            asked(v1::Strategy::Live, f64::NAN, 0),
            asked(v1::Strategy::Warm, 100.0, 0),
            asked(v1::Strategy::Postcopy, 100.0, 0),
            asked(v1::Strategy::Live, 100.0, LEAST_BANDWIDTH - 1),
            asked(v1::Strategy::Postcopy, 0.0, 0),
            asked(v1::Strategy::Hybrid, 100.0, 0),
            throttled(v1::Strategy::Warm),
            throttled(v1::Strategy::Cold),
            asked(v1::Strategy::Cold, 100.0, 0),
        ];
        assert_eq!(throttled(v1::Strategy::Live), Ok(live));
        let said: Vec<_> = refused.into_iter().map(Result::unwrap_err).collect();
        insta::assert_snapshot!(said.join("\n"), @r#"
        INVALID_ARGUMENT 0.5 ms is no downtime that can be aimed at: it is between 1 and 60000 ms (in preflight); what to do: give another one, or none
        INVALID_ARGUMENT -1 ms is no downtime that can be aimed at: it is between 1 and 60000 ms (in preflight); what to do: give another one, or none
        INVALID_ARGUMENT 60001 ms is no downtime that can be aimed at: it is between 1 and 60000 ms (in preflight); what to do: give another one, or none
        INVALID_ARGUMENT NaN ms is no downtime that can be aimed at: it is between 1 and 60000 ms (in preflight); what to do: give another one, or none
        INVALID_ARGUMENT the strategy warm cannot aim at a downtime: it freezes the workload at once (in preflight); what to do: use live, or give no downtime
        INVALID_ARGUMENT the strategy postcopy cannot aim at a downtime: it freezes the workload at once (in preflight); what to do: use live, or give no downtime
        INVALID_ARGUMENT 65535 bytes per second are too little: the least limit is 65536 (in preflight); what to do: give a larger limit, or none
        INVALID_ARGUMENT the strategy postcopy risks the workload: from its resume on the target until the last page is across, losing either node, or the link between them for too long, loses it (in preflight); what to do: accept that risk (--accept-loss), or use live
        INVALID_ARGUMENT the strategy hybrid risks the workload: from its resume on the target until the last page is across, losing either node, or the link between them for too long, loses it (in preflight); what to do: accept that risk (--accept-loss), or use live
        INVALID_ARGUMENT the strategy warm cannot throttle a workload: it freezes the workload at once (in preflight); what to do: use live, or do not throttle
        INVALID_ARGUMENT the strategy cold cannot throttle a workload: it moves no memory (in preflight); what to do: use live, or do not throttle
        INVALID_ARGUMENT the strategy cold cannot aim at a downtime: it moves no memory (in preflight); what to do: use live, or give no downtime
        "#);
        let (strategy, accept_loss) = (v1::Strategy::Hybrid.into(), true);
        let accepted = v1::MigrateRequest { strategy, accept_loss, ..v1::MigrateRequest::default() };
        assert_eq!(wishes(&accepted).map(|wishes| wishes.strategy), Ok(Strategy::Hybrid));
    }

    #[test]
    fn only_memory_that_is_copied_beforehand_is_verified() {
        let asked = |strategy: v1::Strategy| {
            wishes(&v1::MigrateRequest { strategy: strategy.into(), verify: true, ..v1::MigrateRequest::default() })
        };
        assert!(asked(v1::Strategy::Live).is_ok());
        let nothing = asked(v1::Strategy::Cold).unwrap_err();
        assert_eq!(nothing.message, "the strategy cold has nothing to verify: it moves no memory");
        let refused = asked(v1::Strategy::Warm).unwrap_err();
        insta::assert_snapshot!(format!("{} {refused}", refused.code), @"INVALID_ARGUMENT the strategy warm has nothing to verify: all memory is read while the workload is frozen, and each piece of it travels with a check sum (in preflight); what to do: leave the verification away, or use live");
    }

    #[test]
    fn only_a_workload_that_is_stopped_gets_a_grace_period() {
        let asked = |strategy, grace_period_s| {
            let request = v1::MigrateRequest { grace_period_s, ..v1::MigrateRequest::default() };
            grace_period_s_of(&request, strategy)
        };
        assert_eq!(asked(Strategy::Cold, None), Ok(30));
        assert_eq!(asked(Strategy::Cold, Some(0)), Ok(0));
        assert_eq!(asked(Strategy::Cold, Some(3600)), Ok(3600));
        assert_eq!(asked(Strategy::Live, None), Ok(0));
        let refused = [asked(Strategy::Cold, Some(3601)), asked(Strategy::Warm, Some(30))].map(Result::unwrap_err);
        insta::assert_snapshot!(refused.map(|failure| format!("{} {failure}", failure.code)).join("\n"), @r"
        INVALID_ARGUMENT 3601 s are no grace period: it is at most 3600 s (in preflight); what to do: give a shorter one, or none
        INVALID_ARGUMENT the strategy warm stops no workload (in preflight); what to do: give no grace period, or use cold or application
        ");
    }

    #[test]
    fn only_what_is_asked_for_needs_a_newer_agent() {
        let versions = |strategy, bandwidth_limit| {
            let wishes = Wishes { strategy, bandwidth_limit };
            (wishes.of_source(), wishes.of_target())
        };
        assert_eq!(versions(Strategy::Warm, 0), (1, 1));
        assert_eq!(versions(Strategy::Warm, 1 << 20), (2, 1), "an older source would not keep to it");
        assert_eq!(versions(Strategy::Live, 0), (2, 2));
        assert_eq!(versions(Strategy::Cold, 0), (2, 2));
    }
}
