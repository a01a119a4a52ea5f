//! A deterministic simulation of a coordinator, three agents and the processes beside them, in virtual time.
//!
//! Real are the state machine ([`podferry_coordinator::migration`]), the record as it is written and read, the strategies' paths, the
//! deadlines, placement, and the agents' rules ([`podferry_part`]). A model are the shells around them: what waits, writes and calls.
//!
//! Everything that happens in a seed follows from its number. `PODFERRY_SEED=123` replays one, and shows its steps.
//! `PODFERRY_SEEDS` is how many are tried.
#![expect(clippy::expect_used, clippy::unwrap_used, reason = "a panic is the report")]

mod agent;
mod coordinator;
mod faults;
mod invariants;
mod network;
mod node;
mod processes;
mod source;
mod target;
mod users;
mod world;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

use faults::Broken;
use world::{Ended, World};

/// How many are tried, unless `PODFERRY_SEEDS` says otherwise.
const SEEDS: u64 = 100_000;
/// In how many seeds a broken rule has to be found.
const FEW: u64 = 20_000;
/// Seeds that a thread takes at once.
const BATCH: u64 = 64;

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().expect("a number"))
}

/// What a range of seeds came to.
#[derive(Default)]
struct Sum {
    steps: usize,
    migrations: usize,
    outcomes: BTreeMap<&'static str, usize>,
    /// The lowest seed that broke a rule, and which.
    broken: Option<(u64, String)>,
}

impl Sum {
    fn add(&mut self, seed: u64, ended: Ended) {
        self.steps += ended.steps;
        self.migrations += ended.migrations;
        for outcome in ended.outcomes {
            *self.outcomes.entry(outcome).or_default() += 1;
        }
        if let Some(what) = ended.violation
            && self.broken.as_ref().is_none_or(|(lowest, _)| seed < *lowest)
        {
            self.broken = Some((seed, what));
        }
    }

    fn join(mut self, other: Self) -> Self {
        self.steps += other.steps;
        self.migrations += other.migrations;
        for (outcome, count) in other.outcomes {
            *self.outcomes.entry(outcome).or_default() += count;
        }
        let broken = [self.broken, other.broken].into_iter().flatten().min();
        Self { broken, ..self }
    }
}

/// Tries seeds on all cores, and stops soon behind one that breaks a rule.
fn try_all(seeds: u64, broken: Option<Broken>) -> Sum {
    let (next, stop) = (AtomicU64::new(0), AtomicU64::new(seeds));
    let work = || {
        let mut sum = Sum::default();
        loop {
            let from = next.fetch_add(BATCH, Ordering::Relaxed);
            if from >= stop.load(Ordering::Relaxed) {
                return sum;
            }
            for seed in from..(from + BATCH).min(seeds) {
                let ended = World::new(seed, broken, false).run();
                if ended.violation.is_some() {
                    stop.fetch_min(seed, Ordering::Relaxed);
                }
                sum.add(seed, ended);
            }
        }
    };
    let cores = thread::available_parallelism().map_or(2, usize::from);
    thread::scope(|scope| {
        let threads: Vec<_> = (0..cores).map(|_| scope.spawn(work)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).fold(Sum::default(), Sum::join)
    })
}

fn replay(seed: u64, broken: Option<Broken>) -> Ended {
    World::new(seed, broken, true).run()
}

#[test]
fn no_order_of_faults_makes_two_copies_or_none_and_everything_ends() {
    if let Some(seed) = number("PODFERRY_SEED") {
        let ended = replay(seed, None);
        println!("{}", ended.trace.join("\n"));
        println!("seed {seed}: {} steps, {:?}", ended.steps, ended.outcomes);
        assert_eq!(ended.violation, None);
        return;
    }
    let (seeds, begun) = (number("PODFERRY_SEEDS").unwrap_or(SEEDS), Instant::now());
    let sum = try_all(seeds, None);
    if let Some((seed, what)) = sum.broken {
        let trace = replay(seed, None).trace;
        let last = trace[trace.len().saturating_sub(60)..].join("\n");
        panic!(
            "seed {seed}: {what}\n{last}\nall of it: PODFERRY_SEED={seed} cargo test -p podferry-coordinator --test simulation -- --nocapture no_order"
        );
    }
    let took = begun.elapsed();
    println!(
        "{seeds} seeds, {} migrations, {} steps in {:.1} s: {:?}",
        sum.migrations,
        sum.steps,
        took.as_secs_f64(),
        sum.outcomes
    );
    // A simulation in which nothing happens would find nothing.
    for outcome in ["succeeded", "failed", "cancelled", "lost"] {
        let seen = sum.outcomes.get(outcome).copied().unwrap_or(0);
        assert!(seen as u64 * 1000 > seeds, "{outcome} was seen {seen} times");
    }
}

#[test]
fn each_broken_rule_is_found() {
    for rule in Broken::ALL {
        let sum = try_all(FEW, Some(rule));
        let (seed, what) = sum.broken.unwrap_or_else(|| panic!("{rule:?} is not noticed in {FEW} seeds"));
        println!("{rule:?}: seed {seed}: {what}");
    }
}

#[test]
fn a_seed_is_the_same_each_time() {
    for seed in 0..200 {
        let (first, second) = (replay(seed, None), replay(seed, None));
        assert_eq!(first.trace, second.trace, "seed {seed}");
    }
}
