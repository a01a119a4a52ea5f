//! `make chaos`: whatever fails in whatever phase of a migration, one copy runs, and nothing that was confirmed is lost.
//!
//! Redis is moved under load, and in each moment of each strategy each component is killed and stopped, each link is cut, and
//! more. What has to hold is looked at from outside: a sampler looks for two running copies all the while, a client
//! checks that each answer is the one that is due, and a census says what is left.

pub mod case;
mod play;
pub mod report;
mod theatre;

use std::{
    sync::{Mutex, PoisonError},
    time::Instant,
};

use podferry_local::Strategy;

pub(crate) use self::theatre::workload;
use self::{
    case::Case,
    report::{Outcome, describe, table},
    theatre::Theatre,
};
pub use self::{case::all, report::Summary};
use crate::{
    error::{Error, Result},
    stage::Interrupt,
};

/// So many cases share a cluster at most: what several clusters at once have to do is shared evenly.
const BATCH: usize = 24;

/// What is played.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// A few cases of each kind only.
    pub quick: bool,
    /// Only cases that have one of these in their names.
    pub only: Vec<String>,
    /// Who comes back late, and which way a link is cut.
    pub seed: u64,
    /// How often each case is played.
    pub repeat: usize,
    /// How many clusters there are at once.
    pub jobs: usize,
}

/// The cases that are to be played.
pub fn chosen(options: &Options) -> Result<Vec<Case>> {
    let mut cases = all(options.seed);
    if options.quick && options.only.is_empty() {
        cases = case::few(&cases);
    }
    if !options.only.is_empty() {
        cases.retain(|case| options.only.iter().any(|wanted| case.to_string().contains(wanted.as_str())));
    }
    if cases.is_empty() {
        return Err(Error::Misplaced(format!("no case has one of {:?} in its name; --list shows them", options.only)));
    }
    Ok(cases)
}

/// Plays the cases, telling of each on standard output; a table and the sum as JSON come last.
pub fn run(options: &Options, interrupt: &Interrupt) -> Result<Summary> {
    let began = Instant::now();
    let cases = chosen(options)?;
    let mut batches = batches(&cases, options.repeat.max(1));
    println!(
        "{} cases, {} clusters at once",
        batches.iter().map(|(_, cases)| cases.len()).sum::<usize>(),
        options.jobs
    );
    // The next one is taken from the end.
    batches.reverse();
    let (queue, outcomes) = (Mutex::new(batches), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..options.jobs.max(1) {
            scope.spawn(|| {
                loop {
                    // Taken before it is played: the others want one, too.
                    let next = locked(&queue).pop();
                    let Some((strategy, cases)) = next else { return };
                    play_batch(strategy, &cases, interrupt, &outcomes);
                }
            });
        }
    });
    let outcomes = outcomes.into_inner().unwrap_or_else(PoisonError::into_inner);
    let summary = Summary::of(&outcomes, began.elapsed().as_secs());
    println!("\n{}", table(&outcomes));
    println!("{}", serde_json::to_string(&summary)?);
    interrupt.check()?;
    Ok(summary)
}

fn locked<T>(shared: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

fn batches(cases: &[Case], repeat: usize) -> Vec<(Strategy, Vec<Case>)> {
    let mut batches = Vec::new();
    for strategy in Strategy::ALL {
        let own = cases.iter().filter(|case| case.strategy == strategy).copied();
        let all: Vec<Case> = own.flat_map(|case| std::iter::repeat_n(case, repeat)).collect();
        batches.extend(all.chunks(BATCH).enumerate().map(|(number, part)| (number, strategy, part.to_vec())));
    }
    // Something of each strategy first: whoever ends it early has seen more.
    batches.sort_by_key(|(number, ..)| *number);
    batches.into_iter().map(|(_, strategy, part)| (strategy, part)).collect()
}

fn play_batch(strategy: Strategy, cases: &[Case], interrupt: &Interrupt, outcomes: &Mutex<Vec<Outcome>>) {
    let mut theatre = None;
    for case in cases {
        if interrupt.check().is_err() {
            return;
        }
        let (outcome, next) = play_one(theatre.take(), strategy, *case, interrupt);
        if interrupt.check().is_err() {
            return;
        }
        theatre = next;
        let mut outcomes = locked(outcomes);
        print!("{}", describe(&outcome));
        outcomes.push(outcome);
    }
    if let Some(Err(error)) = theatre.map(|theatre| theatre.stage.down()) {
        println!("a cluster could not be taken down: {error}");
    }
}

/// Plays a case in a cluster that is there, or in a new one. It is given back unless it is of no use any more.
fn play_one(
    theatre: Option<Theatre>,
    strategy: Strategy,
    case: Case,
    interrupt: &Interrupt,
) -> (Outcome, Option<Theatre>) {
    let mut theatre = match theatre.map_or_else(|| Theatre::up(strategy, interrupt), Ok) {
        Ok(theatre) => theatre,
        Err(error) => return (Outcome::unplayed(case, &format!("no cluster: {error}")), None),
    };
    let mut outcome =
        play::play(&mut theatre, case, interrupt).unwrap_or_else(|error| Outcome::unplayed(case, &error.to_string()));
    if outcome.passed() && !outcome.declared_loss {
        return (outcome, Some(theatre));
    }
    if outcome.passed() {
        // The workload is gone, and with it what the theatre is for.
        if let Err(error) = theatre.stage.down() {
            outcome.problems.push(report::Problem::Unplayed(format!("the cluster cannot be taken down: {error}")));
        }
        return (outcome, None);
    }
    outcome.logs = Some(theatre.keep(&case.to_string()));
    (outcome, None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cases_are_chosen_by_what_is_in_their_names() {
        let only = |words: &str| Options { only: vec![words.to_owned()], ..Options::default() };
        let found = chosen(&only("live / fill")).unwrap();
        assert!(!found.is_empty() && found.iter().all(|case| case.to_string().starts_with("live / fill / ")));
        assert!(chosen(&only("no such fault")).is_err());
        let quick = Options { quick: true, ..Options::default() };
        assert!(chosen(&quick).unwrap().len() < 20);
    }

    #[test]
    fn every_case_is_in_one_batch_of_its_strategy() {
        let cases = all(0);
        let batches = batches(&cases, 2);
        assert_eq!(batches.iter().map(|(_, part)| part.len()).sum::<usize>(), 2 * cases.len());
        let right = |(strategy, part): &(Strategy, Vec<Case>)| {
            part.len() <= BATCH && part.iter().all(|case| case.strategy == *strategy)
        };
        assert!(batches.iter().all(right));
    }
}
