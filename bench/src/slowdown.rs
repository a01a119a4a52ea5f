//! How much slower Redis gets while its memory is copied: its throughput in pre-copy against that just before the same migration.
//!
//! Clients keep a pipeline of requests full all the while and note how many answers come in each 50 ms. The freeze and what comes
//! behind it are left out: they are the downtime and the fill, which other measurements show.

mod result;
mod sampler;

use std::time::{Duration, Instant};

pub use self::result::{Move, Shares, SlowdownResult, table};
use self::sampler::{Sampler, Watched};
use crate::{
    clients::{self, LoadProcess},
    error::{Error, Result},
    load::Kind,
    moves::resident_mib,
    stage::{Interrupt, NODES, Program, Stage, Strategy, unix_ms},
};

/// Size of the data set in MiB, and how many moves count.
const MIB: u64 = 1024;
const MOVES: usize = 6;
/// The same when it is to be quick.
const QUICK_MIB: u64 = 128;
const QUICK_MOVES: usize = 2;
/// What a migration leaves behind (memory that is given back) is over by then.
const SETTLE: Duration = Duration::from_secs(1);
/// How much longer than the longest pre-copy so far the load goes on before the next migration.
const MARGIN: f64 = 2.0;
/// How often is looked whether somebody wants the end.
const POLL: Duration = Duration::from_millis(200);

/// What to measure.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Fewer moves, less data.
    pub quick: bool,
    /// Connections of the clients.
    pub connections: u32,
    /// Requests that each has under way.
    pub depth: u16,
}

/// Runs the measurement, telling of it on standard output; the result is printed as a table and, last, as JSON.
pub fn run(options: Options, interrupt: &Interrupt) -> Result<SlowdownResult> {
    let stage = Stage::up("slowdown", interrupt)?;
    let measured = measure(&stage, options, interrupt);
    let result = measured.inspect_err(|_| println!("logs: {}", stage.logs().display()))?;
    stage.finish(result.holds())?;
    println!("\n{}", table(&result));
    println!("{}", serde_json::to_string(&result)?);
    Ok(result)
}

fn measure(stage: &Stage, options: Options, interrupt: &Interrupt) -> Result<SlowdownResult> {
    let redis = Program::Redis;
    let (mib, moves) = if options.quick { (QUICK_MIB, QUICK_MOVES) } else { (MIB, MOVES) };
    stage.start(redis, &stage.image(redis)?)?;
    let client = stage.cluster().client();
    let before = clients::fill_redis(client, redis.address(), mib)?;
    let resident_mib = resident_mib(stage)?;
    println!("{mib} MiB of data, {resident_mib} MiB resident");
    let depth = options.depth.to_string();
    let words = ["--depth", &depth];
    let load = LoadProcess::start_with(client, Kind::Pipeline, options.connections, redis.address(), &words)?;
    let mut measuring = Measuring { stage, interrupt, client_pid: load.pid(), place: 0, longest: Duration::ZERO };
    // How long a pre-copy takes is known after the first; it is not counted.
    measuring.next()?;
    let moved: Vec<Move> = (0..moves).map(|_| measuring.next()).collect::<Result<_>>()?;
    let report = load.stop()?;
    let after = clients::redis_state(client, redis.address())?;
    stage.remove(redis)?;
    let digest_equal = before.digest == after.digest;
    let result = SlowdownResult { mib, resident_mib, digest_equal, ..SlowdownResult::of(options, &moved, &report) };
    Ok(result.judged())
}

/// Redis under load, on one of the nodes.
struct Measuring<'a> {
    stage: &'a Stage,
    interrupt: &'a Interrupt,
    client_pid: u32,
    place: usize,
    longest: Duration,
}

impl Measuring<'_> {
    /// Rests for longer than a pre-copy takes, and moves Redis to the other node.
    fn next(&mut self) -> Result<Move> {
        let redis = Program::Redis;
        let (source, target) = (NODES[self.place], NODES[1 - self.place]);
        self.rest(SETTLE)?;
        let sampler = Sampler::start(self.watched(source, target)?);
        let quiet_since = unix_ms();
        self.rest(self.longest.mul_f64(MARGIN))?;
        let hop = self.stage.migrate(redis, Strategy::Live, source, target)?;
        let samples = sampler.stop();
        match &hop.outcome {
            Ok(record) => {
                self.place = 1 - self.place;
                self.longest = self.longest.max(Duration::from_secs_f64(record.timings.precopy / 1e3));
                println!("  pre-copy {:>5.0} ms of {:>5.0} ms", record.timings.precopy, record.total_ms);
            }
            Err(problem) => println!("  FAILED: {problem}"),
        }
        Ok(Move { hop, quiet_since, samples })
    }

    fn rest(&self, time: Duration) -> Result<()> {
        let since = Instant::now();
        while since.elapsed() < time {
            self.interrupt.check()?;
            std::thread::sleep(POLL.min(time.saturating_sub(since.elapsed())));
        }
        Ok(())
    }

    fn watched(&self, source: &str, target: &str) -> Result<Watched> {
        let first_process = |name: &str| {
            let init = self.stage.cluster().node(name)?.init();
            init.map(|init| init.pid).ok_or_else(|| Error::Misplaced(format!("{name} has no process of its own")))
        };
        Ok(Watched {
            redis: self.stage.cluster().node(source)?.container_process(Program::Redis.name())?.pid,
            client: self.client_pid,
            source: first_process(source)?,
            target: first_process(target)?,
        })
    }
}
