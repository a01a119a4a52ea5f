use proptest::prelude::*;

use super::*;

/// 1 GiB/s.
const SENT_PER_SECOND: u64 = 262_144;

fn budget(ms: u64) -> Plan {
    Plan::new(Duration::from_millis(ms))
}

fn round(pages: u64, rate: u64) -> RoundFacts {
    let duration = Duration::from_secs_f64(real(pages) / real(rate) + 0.0005);
    RoundFacts {
        pages,
        bytes: pages * PAGE_SIZE,
        duration,
        wire_rate: rate * PAGE_SIZE,
        cpu_rate: 0,
        beside: Duration::ZERO,
    }
}

/// A process with so many pages that writes so many per second, sent at this rate. Gives the rounds and the last verdict.
fn migrate(plan: Plan, all: u64, dirty: u64, rate: u64) -> (u32, Verdict) {
    let mut convergence = Convergence::new(plan);
    let mut pages = all;
    for number in 1.. {
        let facts = round(pages, rate);
        let verdict = convergence.after_round(facts);
        if verdict != Verdict::Another {
            return (number, verdict);
        }
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "pages of a test")]
        let written = (real(dirty) * facts.duration.as_secs_f64()) as u64;
        pages = written.min(all);
    }
    unreachable!("the rounds are limited")
}

#[test]
fn an_idle_process_is_frozen_after_its_second_round() {
    let (rounds, verdict) = migrate(budget(300), SENT_PER_SECOND, 100, SENT_PER_SECOND);
    let Verdict::Freeze { predicted } = verdict else { panic!("{verdict:?}") };
    assert_eq!(rounds, 2);
    assert!(predicted >= Plan::FIXED && predicted < Plan::FIXED + Duration::from_millis(5), "{predicted:?}");
}

#[test]
fn a_small_process_is_frozen_after_its_first_round() {
    assert_eq!(migrate(budget(100), 1000, 500_000, SENT_PER_SECOND).0, 1);
}

/// 4 MiB in four seconds.
#[test]
fn few_pages_on_a_slow_link_are_not_few() {
    let (_, verdict) = migrate(budget(100), 1000, 1_000_000, 256);
    assert!(matches!(verdict, Verdict::GiveUp { .. }), "{verdict:?}");
}

#[test]
fn one_that_writes_at_half_the_rate_converges() {
    let (rounds, verdict) = migrate(budget(100), SENT_PER_SECOND, SENT_PER_SECOND / 2, SENT_PER_SECOND);
    let Verdict::Freeze { predicted } = verdict else { panic!("{verdict:?}") };
    assert!(
        (3..8).contains(&rounds) && predicted <= Plan::FIXED + Duration::from_millis(10),
        "{rounds}: {predicted:?}"
    );
}

#[test]
fn one_that_writes_faster_than_is_sent_is_given_up_with_the_figures() {
    let (rounds, verdict) = migrate(budget(200), SENT_PER_SECOND, 2 * SENT_PER_SECOND, SENT_PER_SECOND);
    let Verdict::GiveUp { why } = verdict else { panic!("{verdict:?}") };
    assert!(rounds <= 5, "{rounds}");
    for part in ["1024.0 MiB/s are sent", "1024.0 MiB would be left", "budget of 200 ms", "--downtime-budget", "warm"] {
        assert!(why.contains(part), "{part}: {why}");
    }
}

#[test]
fn a_working_set_that_fits_the_budget_is_frozen_though_it_never_shrinks() {
    // 64 MiB that are written all the time: 62 ms at this rate; the target of the budget of 100 ms is 10 ms.
    let mut convergence = Convergence::new(budget(100));
    assert_eq!(convergence.after_round(round(SENT_PER_SECOND, SENT_PER_SECOND)), Verdict::Another);
    let mut rounds = 1;
    let verdict = loop {
        rounds += 1;
        match convergence.after_round(round(16_384, SENT_PER_SECOND)) {
            Verdict::Another => {}
            verdict => break verdict,
        }
    };
    let Verdict::Freeze { predicted } = verdict else { panic!("{verdict:?}") };
    assert!(rounds <= 5 && predicted > Duration::from_millis(100), "{rounds}: {predicted:?}");
}

#[test]
fn a_budget_below_the_fixed_part_leaves_a_tenth_and_five_milliseconds() {
    assert_eq!(budget(40).target(), Duration::from_millis(5));
    assert_eq!(budget(62).target(), Duration::from_micros(6200));
    assert_eq!(budget(300).target(), Duration::from_millis(120));
}

#[test]
fn there_are_no_more_rounds_than_planned() {
    let plan = Plan { most_rounds: 1, ..budget(100) };
    let (rounds, verdict) = migrate(plan, SENT_PER_SECOND, 1, SENT_PER_SECOND);
    assert!(rounds == 1 && matches!(verdict, Verdict::GiveUp { .. }), "{verdict:?}");
}

/// As [`migrate`], of processes that use this much CPU time per second and write as much as they have of it, and that may be
/// throttled. Gives the steps and the last verdict.
fn migrate_throttled(plan: Plan, all: u64, dirty: u64, rate: u64, used: u64) -> (Vec<u64>, Verdict) {
    let mut convergence = Convergence::new(plan).with_throttle(10_000);
    let (mut pages, mut cpu, mut steps) = (all, used, Vec::new());
    loop {
        let facts = RoundFacts { cpu_rate: cpu, ..round(pages, rate) };
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "pages of a test")]
        let written = (real(dirty) * facts.duration.as_secs_f64() * real(cpu) / real(used)) as u64;
        match convergence.after_round(facts) {
            Verdict::Another => {}
            Verdict::Throttle { rate } => {
                steps.push(rate);
                cpu = rate;
            }
            last => return (steps, last),
        }
        pages = written.min(all);
    }
}

#[test]
fn one_that_writes_too_fast_is_throttled_until_it_fits() {
    // Twice as fast as is sent, and ten times.
    for (times, most_steps) in [(2, 3), (10, 6)] {
        let plan = budget(200);
        let (steps, verdict) =
            migrate_throttled(plan, SENT_PER_SECOND, times * SENT_PER_SECOND, SENT_PER_SECOND, 1_000_000);
        assert!(matches!(verdict, Verdict::Freeze { .. }), "{steps:?} {verdict:?}");
        assert!(steps[0] == 800_000 && steps.len() <= most_steps, "{steps:?}");
    }
}

#[test]
fn one_that_converges_is_not_throttled() {
    let (steps, verdict) =
        migrate_throttled(budget(100), SENT_PER_SECOND, SENT_PER_SECOND / 2, SENT_PER_SECOND, 1_000_000);
    assert!(matches!(verdict, Verdict::Freeze { .. }) && steps.is_empty(), "{steps:?} {verdict:?}");
}

/// A thousand times as fast: a hundredth of it is still too much.
#[test]
fn one_that_is_too_fast_even_at_the_last_step_is_given_up_and_that_is_said() {
    let (steps, verdict) =
        migrate_throttled(budget(200), 8 * SENT_PER_SECOND, 1000 * SENT_PER_SECOND, SENT_PER_SECOND, 2_000_000);
    let Verdict::GiveUp { why } = verdict else { panic!("{verdict:?}") };
    assert_eq!(steps, [1_600_000, 800_000, 400_000, 200_000, 100_000, 50_000, 25_000, 20_000]);
    assert!(why.contains("although they were throttled to 0.02 of the 2.00 CPUs that they used (1 %)"), "{why}");
}

#[test]
fn one_that_hardly_uses_the_processor_is_not_throttled() {
    for used in [1, 5_000, 10_000] {
        let (steps, verdict) =
            migrate_throttled(budget(200), SENT_PER_SECOND, 4 * SENT_PER_SECOND, SENT_PER_SECOND, used);
        assert!(steps.is_empty() && matches!(verdict, Verdict::GiveUp { .. }), "{used}: {steps:?} {verdict:?}");
    }
}

#[test]
fn shared_memory_that_takes_longer_than_the_budget_by_itself_is_said_after_two_rounds() {
    let mut convergence = Convergence::new(budget(200)).with_throttle(10_000);
    let beside = Duration::from_millis(201);
    let facts = RoundFacts { beside, cpu_rate: 1_000_000, ..round(2000, SENT_PER_SECOND) };
    assert_eq!(convergence.after_round(facts), Verdict::Another);
    let Verdict::GiveUp { why } = convergence.after_round(facts) else { panic!("no round helps, and no throttle") };
    assert!(why.contains("201 ms for all shared memory and open files"), "{why}");
    let mut convergence = Convergence::new(budget(200));
    let little = RoundFacts { beside: Duration::from_millis(50), ..facts };
    assert_eq!(convergence.after_round(little), Verdict::Another);
    let Verdict::Freeze { predicted } = convergence.after_round(RoundFacts { pages: 10, ..little }) else { panic!() };
    assert!(predicted >= Plan::FIXED + little.beside, "{predicted:?}");
}

#[test]
fn who_cannot_be_throttled_any_further_is_given_up() {
    let mut convergence = Convergence::new(budget(200)).with_throttle(10_000);
    let fast = || RoundFacts { cpu_rate: 1_000_000, ..round(SENT_PER_SECOND, SENT_PER_SECOND) };
    assert!((0..5).any(|_| convergence.after_round(fast()) == Verdict::Throttle { rate: 800_000 }));
    convergence.cannot_throttle();
    let (next, then) = (convergence.after_round(fast()), convergence.after_round(fast()));
    assert!(next == Verdict::Another && matches!(then, Verdict::GiveUp { .. }), "{next:?} {then:?}");
}

fn facts() -> impl Strategy<Value = RoundFacts> {
    let or_none = |most: u64| prop_oneof![Just(0), 0..most];
    let numbers =
        (0_u64..1 << 40, 0_u64..1 << 52, 0_u64..1 << 40, or_none(1 << 40), or_none(1 << 30), or_none(1 << 32));
    numbers.prop_map(|(pages, bytes, nanoseconds, wire_rate, cpu_rate, beside)| RoundFacts {
        pages,
        bytes,
        duration: Duration::from_nanos(nanoseconds),
        wire_rate,
        cpu_rate,
        beside: Duration::from_nanos(beside),
    })
}

proptest! {
    #[test]
    fn whatever_the_rounds_are_it_ends_and_keeps_to_the_budget(
        all in prop::collection::vec(facts(), 40), ms in 0_u64..10_000, fixed in 0_u64..1000,
    ) {
        let plan = Plan { budget: Duration::from_millis(ms), fixed: Duration::from_millis(fixed), most_rounds: 30 };
        let mut convergence = Convergence::new(plan);
        let verdicts: Vec<Verdict> = all.into_iter().map(|facts| convergence.after_round(facts)).collect();
        let end = verdicts.iter().position(|verdict| *verdict != Verdict::Another);
        prop_assert!(end.is_some_and(|end| end < 30));
        for verdict in verdicts {
            if let Verdict::Freeze { predicted } = verdict {
                let most = plan.budget.max(Duration::from_millis(5)) + plan.fixed;
                prop_assert!(plan.fixed <= predicted && predicted <= most, "{:?}", predicted);
            }
        }
    }

    #[test]
    fn whoever_is_throttled_is_allowed_to_be_ever_further_and_it_ends(
        all in prop::collection::vec(facts(), 40), ms in 0_u64..10_000, least in prop::option::of(1_u64..100_000),
    ) {
        let plan = budget(ms);
        let mut convergence = Convergence::new(plan);
        if let Some(least) = least {
            convergence = convergence.with_throttle(least);
        }
        let (mut before, mut end) = (None, None);
        for (number, facts) in all.into_iter().enumerate() {
            match convergence.after_round(facts) {
                Verdict::Another => {}
                Verdict::Throttle { rate } => {
                    let least = least.expect("nobody allowed it");
                    let before = before.replace(rate).unwrap_or(facts.cpu_rate);
                    let throttled = convergence.throttled().expect("it was just said");
                    prop_assert!(rate < before && rate >= least, "{} {} {}", rate, before, least);
                    prop_assert!(throttled.rate == rate && rate >= throttled.used / 100);
                }
                Verdict::Freeze { .. } | Verdict::GiveUp { .. } => {
                    end = Some(number);
                    break;
                }
            }
        }
        prop_assert!(end.is_some_and(|end| end < 30));
    }

    #[test]
    fn whoever_may_be_throttled_is_frozen_whenever_it_would_be_without(
        all in 1_u64..1 << 22, dirty in 0_u64..1 << 20, rate in 1000_u64..1 << 20, ms in 1_u64..2000,
    ) {
        let (_, without) = migrate(budget(ms), all, dirty, rate);
        let (steps, with) = migrate_throttled(budget(ms), all, dirty, rate, 1_000_000);
        if matches!(without, Verdict::Freeze { .. }) {
            prop_assert!(steps.is_empty() && with == without, "{:?} {:?}", steps, with);
        }
    }

    #[test]
    fn a_larger_budget_never_takes_more_rounds(
        all in 1_u64..1 << 22, dirty in 0_u64..1 << 20, rate in 1000_u64..1 << 20, ms in 1_u64..2000, more in 0_u64..2000,
    ) {
        let (small, large) = (migrate(budget(ms), all, dirty, rate), migrate(budget(ms + more), all, dirty, rate));
        prop_assert!(large.0 <= small.0, "{:?} {:?}", small, large);
        if matches!(small.1, Verdict::Freeze { .. }) {
            prop_assert!(matches!(large.1, Verdict::Freeze { .. }), "{:?}", large);
        }
    }

    #[test]
    fn what_is_written_at_less_than_half_the_rate_is_always_frozen_within_a_second(
        all in 1_u64..1 << 22, rate in 100_000_u64..1 << 20, percent in 0_u64..50,
    ) {
        let (_, verdict) = migrate(budget(1000), all, rate * percent / 100, rate);
        prop_assert!(matches!(verdict, Verdict::Freeze { .. }), "{:?}", verdict);
    }
}
