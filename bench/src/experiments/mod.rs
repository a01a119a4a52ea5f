//! `podferry-bench experiments`: what a migration costs, measured so that anyone can repeat it.
//!
//! A [`suite`](Suite) says which scenarios are run. Each run appends one line to `results.jsonl` in the results folder
//! ([format](podferry_report::results)); an experiment that was broken off goes on where it was.

mod cost;
pub mod delay;
mod environment;
pub mod link;
mod measure;
pub mod peers;
mod plan;
mod progress;
mod run;
mod scenario;
mod store;
mod subject;
mod suite;
mod watch;

use std::path::PathBuf;

use podferry_report::results::Measurement;
use serde::Serialize;

pub use self::{
    plan::Plan,
    store::StoreError,
    suite::{LeftOut, Suite, SuiteError, Wanted},
    watch::{Arrival, Seen, Watch},
};
use self::{progress::Progress, run::Theatre, store::Store, subject::Subject};
use crate::{
    error::{Error, Result},
    stage::{Interrupt, Stage},
};

/// After so many runs in a row that could not be measured at all the rest is not tried.
const MOST_ERRORS: u32 = 3;

/// What to run, and where to.
#[derive(Debug, Clone)]
pub struct Options {
    /// The suite's file.
    pub suite: PathBuf,
    /// The folder for results; below `.podferry/experiments` unless it is named.
    pub results: Option<PathBuf>,
    /// Only show what would be done.
    pub plan_only: bool,
}

/// The suite that comes along under this name.
pub fn suite_of(name: &str) -> PathBuf {
    podferry_local::workspace_root().join("bench/suites").join(name).with_extension("toml")
}

/// The last line that is printed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// Scenarios that were run.
    pub scenarios: usize,
    /// Those of them of which a run failed.
    pub failed: usize,
    /// Where the report is.
    pub report: PathBuf,
}

/// Runs a suite, telling of it on standard output; the summary is printed as the last line. Whether nothing failed.
pub fn run(options: &Options, interrupt: &Interrupt) -> Result<bool> {
    let suite = Suite::read(&options.suite)?;
    let folder = options.results.clone().unwrap_or_else(|| run::default_folder(&suite.name));
    let plan = Plan::of(&suite, &store::keys(&Store::look(&folder)?));
    print!("{}", plan::describe(&suite, &plan));
    if options.plan_only {
        return Ok(true);
    }
    let mut store = Store::open(&folder, &suite)?;
    println!("results: {}", folder.display());
    store.describe(&environment::look())?;
    if plan.runs() > 0 {
        make(&plan, &mut store, interrupt)?;
    }
    let summary = summarize(&suite, store.measurements(), podferry_report::report(&folder)?);
    println!("{}", serde_json::to_string(&summary)?);
    Ok(summary.failed == 0)
}

fn make(plan: &Plan, store: &mut Store, interrupt: &Interrupt) -> Result<()> {
    let stage = Stage::up_as("experiments-stage", interrupt, |mut options| {
        options.workloads = Subject::names();
        Ok(options)
    })?;
    let made = make_on(&stage, plan, store, interrupt);
    stage.finish(made.is_ok() || matches!(made, Err(Error::Interrupted)))?;
    made
}

fn make_on(stage: &Stage, plan: &Plan, store: &mut Store, interrupt: &Interrupt) -> Result<()> {
    let mut theatre = Theatre::new(stage, interrupt)?;
    let mut progress = Progress::new(plan.runs(), plan.estimate());
    let mut errors = 0;
    for run in plan.groups.iter().flat_map(|group| &group.runs) {
        match theatre.run(run) {
            Ok(measurement) => {
                errors = 0;
                progress.done(&measurement, plan::run_seconds(&run.scenario));
                store.add(measurement)?;
            }
            Err(Error::Interrupted) => return Err(Error::Interrupted),
            // Nothing is written down, so it is run again when the experiment is gone on with.
            Err(error) => {
                println!("{}: cannot be measured: {error}", scenario::name(&run.scenario));
                theatre.remove()?;
                errors += 1;
                if errors == MOST_ERRORS {
                    return Err(error);
                }
            }
        }
    }
    theatre.remove()
}

/// A scenario has failed when one of its runs has, or is missing.
fn summarize(suite: &Suite, measurements: &[Measurement], report: PathBuf) -> Summary {
    let has_failed = |wanted: &&Wanted| {
        let name = scenario::name(&wanted.scenario);
        let runs: Vec<_> = measurements.iter().filter(|one| scenario::name(&one.scenario) == name).collect();
        let there = (0..wanted.repeats).all(|repeat| runs.iter().any(|run| run.repeat == repeat));
        !there || runs.iter().any(|run| measure::failure(run).is_some())
    };
    let failed = suite.wanted.iter().filter(has_failed).count();
    Summary { scenarios: suite.wanted.len(), failed, report }
}

#[cfg(test)]
mod tests {
    use podferry_report::results::{Outcome, Strategy};

    use super::{measure::tests::measured, *};
    use crate::experiments::measure::Moved;

    #[test]
    fn a_scenario_fails_with_any_of_its_runs_and_when_one_is_missing() {
        let text =
            "[[sweep]]\nquestion = \"q\"\nworkload = [\"redis\"]\nstrategy = [\"live\", \"warm\"]\nmemory_mib = [16]\n";
        let suite = Suite::parse("test", text).unwrap();
        let failed = |measurements: &[Measurement]| summarize(&suite, measurements, "x".into()).failed;
        let (live, warm) =
            (measured(Strategy::Live, Ok(Moved::default())), measured(Strategy::Warm, Ok(Moved::default())));
        assert_eq!(failed(&[live.clone(), warm.clone()]), 0);
        assert_eq!(failed(std::slice::from_ref(&live)), 1);
        assert_eq!(failed(&[live, Measurement { outcome: Outcome::Failed("x".to_owned()), ..warm }]), 1);
    }

    #[test]
    fn the_last_line_is_for_scripts() {
        let summary = Summary { scenarios: 3, failed: 0, report: "/tmp/x".into() };
        assert_eq!(serde_json::to_string(&summary).unwrap(), r#"{"scenarios":3,"failed":0,"report":"/tmp/x"}"#);
    }
}
