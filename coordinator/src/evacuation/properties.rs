//! The plan: whom it begins, how, and in which order.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use podferry_common::MigrationId;
use podferry_common::identity::Peer;
use proptest::prelude::*;

use super::plan::{Command, Room, is_done, next};
use super::record::{Entry, Evacuation, Hurried, Order, Standing, Terms};
use super::{Ending, Event};
use crate::strategy::Strategy as How;

const MIB: u64 = 1 << 20;

/// Workloads of these names, priorities and MiB, all waiting.
fn of(all: &[(&str, i32, u64)]) -> Evacuation {
    let mut evacuation = Evacuation::new("n1".parse().unwrap(), Terms::default(), Peer::client("ada").unwrap());
    let entry = |(name, priority, mib): &(&str, i32, u64)| Entry::new(name.parse().unwrap(), *priority, mib * MIB);
    evacuation.entries = all.iter().map(entry).collect();
    evacuation
}

fn within(mut evacuation: Evacuation, seconds: u64) -> (Evacuation, Room) {
    let left = Duration::from_secs(seconds);
    evacuation.terms.deadline_at = Some(evacuation.created_at + SignedDuration::try_from(left).unwrap());
    (evacuation, Room { per_node: 1, left: Some(left), ..Room::default() })
}

fn begun(commands: &[Command]) -> Vec<(String, Option<How>)> {
    let begins = commands.iter().filter_map(|command| match command {
        Command::Begin { workload, strategy, .. } => Some((workload.to_string(), *strategy)),
        _ => None,
    });
    begins.collect()
}

fn names(commands: &[Command]) -> Vec<String> {
    begun(commands).into_iter().map(|(name, _)| name).collect()
}

fn late(commands: &[Command]) -> Vec<String> {
    let late = commands.iter().filter_map(|command| match command {
        Command::Late(workload, Some(_)) => Some(workload.to_string()),
        _ => None,
    });
    late.collect()
}

fn move_all(evacuation: &mut Evacuation, room: &Room) -> Vec<String> {
    let mut order = Vec::new();
    while !is_done(evacuation, None) {
        let (name, _) = begun(&next(evacuation, room)).remove(0);
        order.push(name.clone());
        let (workload, migration) = (name.parse::<podferry_common::WorkloadName>().unwrap(), MigrationId::new());
        evacuation.apply(Event::Begun(workload.clone(), migration));
        let target = "n2".parse().unwrap();
        let ending = Ending { migration, target, failure: None, committed: true, downtime_ms: 1.0, total_ms: 1000.0 };
        evacuation.apply(Event::Ended(workload, ending));
    }
    order
}

#[test]
fn priority_comes_first_then_the_largest_and_under_a_deadline_the_smallest() {
    let all = [("big", 0, 900), ("small", 0, 10), ("vital", 10, 50), ("spare", -1, 5000)];
    let room = Room { per_node: 1, ..Room::default() };
    assert_eq!(move_all(&mut of(&all), &room), ["vital", "big", "small", "spare"]);
    let (mut hurried, room) = within(of(&all), 3600);
    assert_eq!(move_all(&mut hurried, &room), ["vital", "small", "big", "spare"]);
    let mut reversed = of(&all);
    reversed.terms.order = Order::LowestFirst;
    let room = Room { per_node: 1, ..Room::default() };
    assert_eq!(move_all(&mut reversed, &room), ["spare", "big", "small", "vital"]);
}

#[test]
fn limits_of_the_node_and_of_the_evacuation_hold() {
    let all = of(&[("a", 0, 1), ("b", 0, 1), ("c", 0, 1), ("d", 0, 1)]);
    let room = |on_node, per_node| Room { on_node, per_node, ..Room::default() };
    assert_eq!(names(&next(&all, &room(0, 3))).len(), 3);
    assert_eq!(names(&next(&all, &room(2, 3))).len(), 1);
    assert_eq!(names(&next(&all, &room(3, 3))).len(), 0);
    let mut few = all;
    few.terms.concurrency = Some(2);
    assert_eq!(names(&next(&few, &room(0, 3))).len(), 2);
    few.apply(Event::Begun("a".parse().unwrap(), MigrationId::new()));
    assert_eq!(names(&next(&few, &room(1, 3))), ["b"]);
}

#[test]
fn one_that_rests_lets_the_next_one_pass() {
    let all = of(&[("a", 1, 1), ("b", 0, 1)]);
    let room = Room { per_node: 1, resting: vec!["a".parse().unwrap()], ..Room::default() };
    assert_eq!(names(&next(&all, &room)), ["b"]);
}

#[test]
fn time_that_is_short_makes_it_faster_and_none_ends_it() {
    // About 192 s live, and 97 s warm.
    let of = |terms: Terms, seconds| {
        let mut evacuation = of(&[("one", 0, 10_000)]);
        evacuation.terms = terms;
        let (evacuation, room) = within(evacuation, seconds);
        next(&evacuation, &room)
    };
    let how = |terms, seconds| begun(&of(terms, seconds)).pop().unwrap().1;
    let loss = || Terms { accept_loss: true, ..Terms::default() };
    let asked = |strategy| Terms { strategy: Some(strategy), ..loss() };
    assert_eq!(how(Terms::default(), 250), None);
    assert_eq!(how(Terms::default(), 120), Some(How::Warm));
    assert_eq!(how(asked(How::Live), 120), Some(How::Warm));
    assert_eq!(how(loss(), 30), Some(How::Postcopy));
    assert_eq!(how(Terms::default(), 30), Some(How::Warm), "an expectation may be wrong: it is begun all the same");
    assert_eq!(how(asked(How::Cold), 1), Some(How::Cold), "who names another one gets it");
    assert_eq!(late(&of(Terms::default(), 30)), ["one"]);
    assert_eq!(of(Terms::default(), 0), [Command::DeadlinePassed]);
}

#[test]
fn what_cannot_be_away_in_time_is_named_at_once_and_lets_the_others_go_first() {
    // 12 s, 12 s and 97 s when each is sent once.
    let (mut evacuation, room) = within(of(&[("a", 0, 1000), ("b", 0, 1000), ("huge", 9, 10_000)]), 40);
    let commands = next(&evacuation, &room);
    assert_eq!(late(&commands), ["huge"]);
    assert_eq!(names(&commands), ["a"]);
    evacuation.apply(Event::Late("huge".parse().unwrap(), Some("it is huge".to_owned())));
    assert_eq!(late(&next(&evacuation, &room)), [""; 0], "it is said once");
    evacuation.apply(Event::Begun("a".parse().unwrap(), MigrationId::new()));
    let beside = Room { per_node: 2, on_node: 1, ..room };
    assert_eq!(names(&next(&evacuation, &beside)), ["b"]);
}

#[test]
fn one_is_copied_while_it_runs_only_if_that_costs_no_other_one_its_time() {
    // Each about 21 s live and 12 s warm.
    let both = || of(&[("a", 1, 1000), ("b", 0, 1000)]);
    let how = |seconds| {
        let (evacuation, room) = within(both(), seconds);
        begun(&next(&evacuation, &room)).remove(0)
    };
    assert_eq!(how(60), ("a".to_owned(), None));
    assert_eq!(how(28), ("a".to_owned(), Some(How::Warm)));
    let (evacuation, room) = within(both(), 28);
    let commands = next(&evacuation, &room);
    let Some(Command::Begin { hurried: Some(hurried), .. }) = commands.first() else { panic!("{commands:?}") };
    assert_eq!(hurried.why, "copying it while it runs would take about 21 s, and 28 s are left for 2 workloads");
}

#[test]
fn migrations_that_were_slow_make_the_next_ones_faster() {
    let (mut evacuation, room) = within(of(&[("seen", 0, 1000), ("next", 0, 1000)]), 100);
    assert_eq!(begun(&next(&evacuation, &room)), [("next".to_owned(), None)]);
    let seen = &mut evacuation.entries[0];
    (seen.standing, seen.total_ms) = (Standing::Moved, 62_000.0);
    assert_eq!(begun(&next(&evacuation, &room)), [("next".to_owned(), Some(How::Warm))]);
}

#[test]
fn what_is_hurried_already_moves_so_and_is_not_announced_again() {
    let mut evacuation = of(&[("one", 0, 10)]);
    evacuation.entries[0].hurried = Some(Hurried { strategy: How::Warm, why: "it writes too much".to_owned() });
    let commands = next(&evacuation, &Room { per_node: 1, ..Room::default() });
    let workload = "one".parse().unwrap();
    assert_eq!(commands, [Command::Begin { workload, strategy: Some(How::Warm), hurried: None }]);
}

#[test]
fn a_cancel_undoes_its_own_migrations_and_waits_for_no_others() {
    let mut evacuation = of(&[("mine", 0, 10), ("theirs", 0, 10), ("waits", 0, 10)]);
    let mine = MigrationId::new();
    evacuation.apply(Event::Begun("mine".parse().unwrap(), mine));
    let migration = MigrationId::new();
    evacuation.entries[1].standing = Standing::Moving { migration, ours: false, interrupted: false };
    evacuation.apply(Event::CancelRequested("client ada".to_owned()));
    assert_eq!(next(&evacuation, &Room { per_node: 9, ..Room::default() }), [Command::Cancel(mine)]);
    assert!(!is_done(&evacuation, None));
    evacuation.entries[0].standing = Standing::Moved;
    assert!(is_done(&evacuation, None));
    evacuation.apply(Event::Done(Timestamp::now()));
    assert!(evacuation.entries.iter().all(|entry| entry.standing.is_settled()));
}

fn any_evacuation() -> impl Strategy<Value = (Evacuation, Room)> {
    let entry = (0..40_u64, -2..3_i32, 0..6);
    let entries = prop::collection::vec(entry, 0..8);
    (entries, prop::option::of(0..200_u64), any::<bool>(), 1..4_usize, 0..4_usize).prop_map(
        |(entries, left, accept_loss, per_node, on_node)| {
            let mut evacuation = of(&[]);
            evacuation.terms.accept_loss = accept_loss;
            for (number, (hundreds, priority, kind)) in entries.into_iter().enumerate() {
                let name = format!("w{number}").parse().unwrap();
                let mut entry = Entry::new(name, priority, hundreds * 100 * MIB);
                entry.standing = match kind {
                    0 => Standing::Moved,
                    1 => Standing::Moving { migration: MigrationId::new(), ours: true, interrupted: false },
                    2 => Standing::NotRunning,
                    _ => Standing::Waiting,
                };
                evacuation.entries.push(entry);
            }
            let left = left.map(Duration::from_secs);
            let deadline = left.map(|left| evacuation.created_at + SignedDuration::try_from(left).unwrap());
            evacuation.terms.deadline_at = deadline;
            (evacuation, Room { on_node, per_node, left, ..Room::default() })
        },
    )
}

proptest! {
    #[test]
    fn what_begins_waited_fits_the_limits_and_nobody_is_at_risk_who_did_not_accept_it((evacuation, room) in any_evacuation()) {
        let commands = next(&evacuation, &room);
        let begun = begun(&commands);
        prop_assert!(begun.len() + room.on_node <= room.per_node.max(room.on_node));
        for (name, how) in &begun {
            let entry = evacuation.entry(&name.parse().unwrap()).unwrap();
            prop_assert_eq!(&entry.standing, &Standing::Waiting);
            prop_assert!(*how != Some(How::Postcopy) || evacuation.terms.accept_loss);
            prop_assert!(how.is_none() || room.left.is_some());
        }
        let mut once: Vec<_> = begun.iter().map(|(name, _)| name.clone()).collect();
        once.sort();
        once.dedup();
        prop_assert_eq!(once.len(), begun.len());
    }

    #[test]
    fn something_goes_on_or_it_is_done((evacuation, mut room) in any_evacuation()) {
        // Nobody else uses the node.
        let moving = evacuation.entries.iter().filter(|entry| entry.migration().is_some()).count();
        room.on_node = moving;
        prop_assert!(is_done(&evacuation, room.left) || moving > 0 || !next(&evacuation, &room).is_empty());
    }

    #[test]
    fn of_those_that_begin_none_has_a_lower_priority_than_one_that_is_in_time_and_waits((evacuation, room) in any_evacuation()) {
        let commands = next(&evacuation, &room);
        let (begun, late) = (names(&commands), late(&commands));
        let priority = |name: &String| evacuation.entry(&name.parse().unwrap()).unwrap().priority;
        let lowest = begun.iter().filter(|name| !late.contains(name)).map(&priority).min();
        let waiting = evacuation.entries.iter().filter(|entry| entry.standing == Standing::Waiting);
        let left_out = waiting.map(|entry| entry.workload.to_string()).filter(|name| !begun.contains(name) && !late.contains(name));
        if let (Some(lowest), Some(highest)) = (lowest, left_out.map(|name| priority(&name)).max()) {
            prop_assert!(lowest >= highest);
        }
    }

    #[test]
    fn for_one_alone_less_time_is_never_slower(
        mib in 0_u64..100_000, (shorter, longer) in (1_u64..5000, 0_u64..5000).prop_map(|(short, more)| (short, short + more)),
        accept_loss: bool,
    ) {
        let speed = |seconds| {
            let mut evacuation = of(&[("one", 0, mib)]);
            evacuation.terms.accept_loss = accept_loss;
            let (evacuation, room) = within(evacuation, seconds);
            match begun(&next(&evacuation, &room)).pop().unwrap().1 {
                None => 0,
                Some(How::Warm) => 1,
                Some(How::Postcopy) if accept_loss => 2,
                other => panic!("{other:?}"),
            }
        };
        prop_assert!(speed(shorter) >= speed(longer));
    }
}
