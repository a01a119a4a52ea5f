//! Containers that are hard to move, moved live, and what becomes of each: figures, or why it was refused.
//!
//! What cannot converge is refused before the freeze. That is a result: it is tried again with a throttle, and with hybrid.

mod footprint;
mod load;
mod result;

use std::time::Duration;

use self::result::Attempt;
pub(crate) use self::{
    footprint::Footprint,
    load::{PORT, made_up},
};
pub use self::{
    load::Load,
    result::{LoadsResult, Row, table},
};
use crate::{
    clients::LoadProcess,
    error::{Error, Result},
    stage::{Interrupt, NODES, Stage, unix_ms},
};

/// How often each load is moved live, there and back together.
pub const MOVES: usize = 4;
/// The same when it is to be quick, and how often what was refused is moved in another way.
const FEW_MOVES: usize = 2;
/// After so many failed moves of a load no further ones are tried.
const MOST_FAILURES: usize = 2;
/// Load between two moves.
const BETWEEN: Duration = Duration::from_millis(500);
/// How long a load may take until it listens: it writes all of its memory before.
const PATIENCE: Duration = Duration::from_secs(120);

/// How a load is moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Way {
    /// Live, as without any further flag.
    Live,
    /// Live with a throttle.
    Throttle,
    /// Hybrid, its loss accepted.
    Hybrid,
}

impl Way {
    /// What stands in the table.
    pub fn name(self) -> &'static str {
        match self {
            Self::Live => "live",
            Self::Throttle => "live --throttle",
            Self::Hybrid => "hybrid",
        }
    }

    fn words(self) -> &'static [&'static str] {
        match self {
            Self::Live => &["--strategy", "live"],
            Self::Throttle => &["--strategy", "live", "--throttle"],
            Self::Hybrid => &["--strategy", "hybrid", "--accept-loss"],
        }
    }
}

/// Runs the measurement of these loads, telling of it on standard output; the result is printed as a table and, last, as JSON.
pub fn run(loads: &[Load], quick: bool, interrupt: &Interrupt) -> Result<LoadsResult> {
    let names = loads.iter().map(|load| load.name().to_owned()).collect();
    let stage = Stage::up_as("loads", interrupt, |mut options| {
        options.workloads = names;
        Ok(options)
    })?;
    let moves = if quick { FEW_MOVES } else { MOVES };
    let mut rows = Vec::new();
    for load in loads {
        let measured = measure(&stage, *load, moves, interrupt);
        rows.extend(measured.inspect_err(|_| println!("logs: {}", stage.logs().display()))?);
    }
    let result = LoadsResult { rows };
    stage.finish(result.holds())?;
    println!("\n{}", table(&result));
    println!("{}", serde_json::to_string(&result)?);
    Ok(result)
}

/// One load from its start to its end: live, and in other ways what was refused.
fn measure(stage: &Stage, load: Load, moves: usize, interrupt: &Interrupt) -> Result<Vec<Row>> {
    println!("{}: {}", load.name(), load.description());
    stage.start_container(&load.workload(stage.cluster().folder())?, load.address().port(), PATIENCE)?;
    load.prepare(stage.cluster().client())?;
    let moving = Moving { stage, load, interrupt };
    let mut rows = vec![moving.row(Way::Live, moves)?];
    if rows[0].refused > 0 {
        for way in [Way::Throttle, Way::Hybrid] {
            rows.push(moving.row(way, FEW_MOVES)?);
        }
    }
    stage.remove_container(load.name())?;
    Ok(rows)
}

/// A load that runs.
struct Moving<'a> {
    stage: &'a Stage,
    load: Load,
    interrupt: &'a Interrupt,
}

impl Moving<'_> {
    /// Moves it so often in this way, under a client of its own.
    fn row(&self, way: Way, moves: usize) -> Result<Row> {
        let name = self.load.name();
        let footprint = Footprint::of(self.stage.cluster(), name)?;
        let client = LoadProcess::start(self.stage.cluster().client(), self.load.kind(), 1, self.load.address())?;
        let mut attempts: Vec<Attempt> = Vec::new();
        for _ in 0..moves {
            std::thread::sleep(BETWEEN);
            self.interrupt.check()?;
            // One that is nowhere, or twice, cannot be moved any more. The client tells of what that did to it.
            let Some(place) = self.stage.place(name) else { break };
            let attempt = self.attempt(way, place)?;
            println!("  {:<15} {} -> {}  {attempt}", way.name(), NODES[place], NODES[1 - place]);
            attempts.push(attempt);
            if attempts.iter().filter(|attempt| attempt.has_failed()).count() == MOST_FAILURES {
                break;
            }
        }
        std::thread::sleep(BETWEEN);
        Ok(Row::new(name, way, footprint, &attempts, &client.stop()?))
    }

    fn attempt(&self, way: Way, place: usize) -> Result<Attempt> {
        let (source, target) = (NODES[place], NODES[1 - place]);
        let start_unix_ms = unix_ms();
        let asked = self.stage.ask(self.load.name(), way.words(), target);
        let end_unix_ms = unix_ms();
        self.interrupt.check()?;
        let outcome = match asked {
            Ok(record) if record.succeeded() => {
                self.stage.check_place(self.load.name(), source, target)?;
                result::Outcome::Moved(Box::new(record))
            }
            Ok(record) if record.was_frozen() => result::Outcome::Failed(record.reason),
            Ok(record) => result::Outcome::Refused(record.reason),
            Err(Error::Refused(words)) => result::Outcome::Refused(words),
            Err(error) => result::Outcome::Failed(error.to_string()),
        };
        Ok(Attempt { start_unix_ms, end_unix_ms, outcome })
    }
}
