//! How long a live migration of idle memory takes in all, against the page stream alone with as many bytes over the same network.

use std::{net::SocketAddr, thread::sleep, time::Duration};

use podferry_local::FIRST_CONTAINER_ADDRESS;
use serde::Serialize;
use tokio::runtime::Handle;

use crate::{
    clients::LoadProcess,
    error::{Error, Result},
    load::Kind,
    loads::{self, Footprint},
    migration::MigrationRecord,
    moves::{mebibytes, whole},
    processor::Snapshot,
    spread::Spread,
    stage::{Interrupt, NODES, Stage},
    stream::{Contents, Ends, How, Pack, Pair as Sending, Run},
};

/// What the project demands: at most so many times as long as the stream alone.
const MOST_OF_STREAM: f64 = 1.3;
/// Memory of the container in MiB, and how often it is moved.
const MIB: u64 = 1024;
const PAIRS: usize = 6;
/// The same when it is to be quick.
const QUICK_MIB: u64 = 256;
const QUICK_PAIRS: usize = 2;
/// What is moved.
const WORKLOAD: &str = "idle";
/// Where the stream alone is received: not where the agent listens.
const STREAM_PORT: u16 = 7450;
/// How long the container may take to write its memory.
const PATIENCE: Duration = Duration::from_secs(120);
/// What was measured before is over by then.
const SETTLE: Duration = Duration::from_secs(1);

/// One migration and the stream alone, one after the other.
#[derive(Debug, Clone)]
struct Pair {
    /// How much the stream alone sent, in MiB.
    mib: u64,
    stream: Run,
    record: MigrationRecord,
    /// Processor time of both nodes in the migration, in seconds.
    nodes_cpu_seconds: f64,
}

impl Pair {
    fn gib(&self) -> f64 {
        whole(self.mib) / 1024.0
    }

    fn stream_ms(&self) -> f64 {
        self.gib() / self.stream.gib_per_second * 1e3
    }
}

/// What was measured. Times are in ms; spreads are of all pairs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TotalResult {
    /// What this is.
    pub name: &'static str,
    /// Whether it was as fast as demanded, and all memory is right.
    pub passed: bool,
    /// Memory that the container asked for, in MiB.
    pub mib: u64,
    /// Resident memory of it, which is what the stream alone sent, in MiB.
    pub resident_mib: u64,
    /// Migrations, and as often the stream alone.
    pub pairs: u64,
    /// Whether no byte of the container's memory was wrong after the last migration.
    pub memory_right: bool,
    /// The stream alone.
    pub stream_ms: Spread,
    /// A migration from the request to its end.
    pub total_ms: Spread,
    /// Copying memory while the container ran.
    pub precopy_ms: Spread,
    /// From freeze to resume.
    pub downtime_ms: Spread,
    /// Laying in what was missing behind the running container.
    pub fill_ms: Spread,
    /// All of a migration by the stream alone, pair by pair.
    pub of_stream: Spread,
    /// Pre-copy alone by the stream alone, pair by pair.
    pub precopy_of_stream: Spread,
    /// MiB that crossed the network in a migration.
    pub wire_mib: Spread,
    /// Processor seconds for a GiB, both ends of the stream alone together.
    pub stream_cpu_seconds_per_gib: Spread,
    /// The same of both nodes in a migration: agents, CRIU, and what else they start.
    pub nodes_cpu_seconds_per_gib: Spread,
}

impl TotalResult {
    fn of(pairs: &[Pair]) -> Self {
        let spread = |of: fn(&Pair) -> f64| Spread::of(pairs.iter().map(of));
        Self {
            name: "total",
            passed: false,
            mib: 0,
            resident_mib: 0,
            pairs: pairs.len() as u64,
            memory_right: false,
            stream_ms: spread(Pair::stream_ms),
            total_ms: spread(|pair| pair.record.total_ms),
            precopy_ms: spread(|pair| pair.record.timings.precopy),
            downtime_ms: spread(|pair| pair.record.downtime_ms),
            fill_ms: spread(|pair| pair.record.timings.fill),
            of_stream: spread(|pair| pair.record.total_ms / pair.stream_ms()),
            precopy_of_stream: spread(|pair| pair.record.timings.precopy / pair.stream_ms()),
            wire_mib: spread(|pair| mebibytes(pair.record.wire_bytes)),
            stream_cpu_seconds_per_gib: spread(|pair| pair.stream.cpu_seconds_per_gib),
            nodes_cpu_seconds_per_gib: spread(|pair| pair.nodes_cpu_seconds / pair.gib()),
        }
    }

    fn judged(self) -> Self {
        let passed = self.memory_right && self.pairs > 0 && self.of_stream.median <= MOST_OF_STREAM;
        Self { passed, ..self }
    }
}

/// Runs the measurement, telling of it on standard output; the result is printed as a table and, last, as JSON.
pub fn run(quick: bool, interrupt: &Interrupt) -> Result<TotalResult> {
    let (mib, pairs) = if quick { (QUICK_MIB, QUICK_PAIRS) } else { (MIB, PAIRS) };
    let stage = Stage::up_as("total", interrupt, |mut options| {
        options.workloads = vec![WORKLOAD.to_owned()];
        Ok(options)
    })?;
    let measured = measure(&stage, mib, pairs, interrupt);
    let result = measured.inspect_err(|_| println!("logs: {}", stage.logs().display()))?;
    stage.finish(result.memory_right)?;
    println!("\n{}", table(&result));
    println!("{}", serde_json::to_string(&result)?);
    Ok(result)
}

fn measure(stage: &Stage, mib: u64, pairs: usize, interrupt: &Interrupt) -> Result<TotalResult> {
    start_container(stage, mib)?;
    let resident_mib = Footprint::of(stage.cluster(), WORKLOAD)?.resident_mib;
    println!("{mib} MiB of idle memory, {resident_mib} MiB resident");
    let measuring = Measuring { stage, sending: Sending::new()?, mib: resident_mib, interrupt };
    let mut measured = Vec::new();
    for number in 0..pairs {
        let pair = measuring.pair(number)?;
        println!("  stream alone {:>5.0} ms, migration {:>5.0} ms", pair.stream_ms(), pair.record.total_ms);
        measured.push(pair);
    }
    let memory_right = look_at_memory(stage)?;
    stage.remove_container(WORKLOAD)?;
    Ok(TotalResult { mib, resident_mib, memory_right, ..TotalResult::of(&measured) }.judged())
}

/// Nothing writes its memory and nothing looks at it once it is filled.
fn start_container(stage: &Stage, mib: u64) -> Result<()> {
    let mib = mib.to_string();
    let arguments = ["--mib", &mib, "--percent", "0", "--looked-at", "0"];
    let workload = loads::made_up(stage.cluster().folder(), WORKLOAD, &arguments, FIRST_CONTAINER_ADDRESS)?;
    stage.start_container(&workload, loads::PORT, PATIENCE)
}

/// A client that comes when all is over: in the end it has every page looked at.
fn look_at_memory(stage: &Stage) -> Result<bool> {
    let address = SocketAddr::from((FIRST_CONTAINER_ADDRESS, loads::PORT));
    let report = LoadProcess::start(stage.cluster().client(), Kind::Lines, 1, address)?.stop()?;
    report.clients.iter().flat_map(|client| &client.problems).for_each(|problem| println!("PROBLEM {problem}"));
    Ok(report.is_clean())
}

struct Measuring<'a> {
    stage: &'a Stage,
    sending: Sending,
    mib: u64,
    interrupt: &'a Interrupt,
}

impl Measuring<'_> {
    /// The first of two finds the machine in another state than the second: each is first as often as the other.
    fn pair(&self, number: usize) -> Result<Pair> {
        let (source, target) = (NODES[number % 2], NODES[1 - number % 2]);
        let (stream, (record, nodes_cpu_seconds)) = if number.is_multiple_of(2) {
            (self.stream(source, target)?, self.migrate(source, target)?)
        } else {
            let migrated = self.migrate(source, target)?;
            (self.stream(source, target)?, migrated)
        };
        Ok(Pair { mib: self.mib, stream, record, nodes_cpu_seconds })
    }

    fn settle(&self) -> Result<()> {
        sleep(SETTLE);
        self.interrupt.check()
    }

    /// From node to node, as agents send: over the same bridges, and packed when it pays.
    fn stream(&self, source: &str, target: &str) -> Result<Run> {
        self.settle()?;
        let (source, target) = (self.stage.cluster().node(source)?, self.stage.cluster().node(target)?);
        let address = SocketAddr::from((target.address(), STREAM_PORT)).to_string();
        let ends = Ends { source: source.netns().to_owned(), target: target.netns().to_owned(), address };
        let sent = self.sending.measure(&ends, How::Stream, Contents::Noise, Pack::Auto, self.mib);
        Ok(Handle::current().block_on(sent)?)
    }

    /// The record, and the seconds of processor time that both nodes used.
    fn migrate(&self, source: &str, target: &str) -> Result<(MigrationRecord, f64)> {
        self.settle()?;
        let before = self.nodes_cpu_seconds()?;
        let record = self.stage.ask(WORKLOAD, &["--strategy", "live"], target)?;
        if !record.succeeded() {
            return Err(Error::Misplaced(format!("{}: {}", record.phase, record.reason)));
        }
        self.stage.check_place(WORKLOAD, source, target)?;
        Ok((record, self.nodes_cpu_seconds()? - before))
    }

    /// The container is on a node, too, and uses hardly any.
    fn nodes_cpu_seconds(&self) -> Result<f64> {
        let snapshot = Snapshot::take();
        let inits: Vec<u32> = self.stage.cluster().nodes().iter().filter_map(|node| Some(node.init()?.pid)).collect();
        let all = || Error::Misplaced("a node has no process of its own".to_owned());
        (inits.len() == NODES.len()).then(|| inits.iter().map(|pid| snapshot.node(*pid)).sum()).ok_or_else(all)
    }
}

/// The result as a table in Markdown.
pub fn table(result: &TotalResult) -> String {
    let seconds = |ms: Spread| Spread { median: ms.median / 1e3, min: ms.min / 1e3, max: ms.max / 1e3 }.to_string();
    let row = |cells: [&str; 4]| format!("| {} |\n", cells.join(" | "));
    let one = "1";
    let [stream_cpu, nodes_cpu] =
        [result.stream_cpu_seconds_per_gib, result.nodes_cpu_seconds_per_gib].map(|spread| spread.to_string());
    let rows = [
        row(["", "s", "of the stream alone", "CPU s/GiB, both nodes"]),
        row(["---", "---:", "---:", "---:"]),
        row(["the stream alone", &seconds(result.stream_ms), one, &stream_cpu]),
        row(["live migration, all of it", &seconds(result.total_ms), &result.of_stream.to_string(), &nodes_cpu]),
        row(["its pre-copy", &seconds(result.precopy_ms), &result.precopy_of_stream.to_string(), ""]),
        row(["its downtime", &seconds(result.downtime_ms), "", ""]),
        row(["its fill", &seconds(result.fill_ms), "", ""]),
    ];
    let TotalResult { mib, resident_mib, pairs, .. } = result;
    let (wire, verdict) = (result.wire_mib.digits(0), if result.passed { "met" } else { "NOT met" });
    format!(
        "{mib} MiB of idle memory, {resident_mib} MiB resident and sent by the stream alone; {pairs} pairs, median (lowest–highest)\n\n{}\n\
         on the wire in a migration: {wire} MiB\ngoal, at most {MOST_OF_STREAM} of the stream alone: {verdict}\n",
        rows.concat()
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration::Timings;

    fn pair(stream_seconds: f64, total_ms: f64) -> Pair {
        let timings = Timings { precopy: total_ms / 2.0, ..Timings::default() };
        let record = MigrationRecord { total_ms, timings, wire_bytes: 3 << 29, ..MigrationRecord::default() };
        Pair { mib: 1536, stream: Run::of(1.5, stream_seconds, 3.0), record, nodes_cpu_seconds: 6.0 }
    }

    fn result(pairs: &[Pair]) -> TotalResult {
        TotalResult { memory_right: true, ..TotalResult::of(pairs) }.judged()
    }

    #[test]
    fn ratios_are_of_pairs_and_for_the_same_bytes() {
        let result = result(&[pair(1.0, 1200.0), pair(2.0, 2200.0), pair(4.0, 5600.0)]);
        let close = |value: f64, expected: f64| assert!((value - expected).abs() < 1e-9, "{value} {expected}");
        close(result.stream_ms.median, 2000.0);
        close(result.of_stream.median, 1.2);
        close(result.of_stream.min, 1.1);
        close(result.of_stream.max, 1.4);
        close(result.precopy_of_stream.median, 0.6);
        close(result.stream_cpu_seconds_per_gib.median, 2.0);
        close(result.nodes_cpu_seconds_per_gib.median, 4.0);
        close(result.wire_mib.median, 1536.0);
        assert!(result.passed);
    }

    #[test]
    fn slow_or_wrong_or_nothing_does_not_pass() {
        assert!(!result(&[pair(1.0, 1400.0)]).passed);
        assert!(!result(&[]).passed);
        let wrong = TotalResult { memory_right: false, ..result(&[pair(1.0, 1000.0)]) };
        assert!(!wrong.judged().passed);
    }

    #[test]
    fn the_table_has_a_cell_for_each_title() {
        let text = table(&result(&[pair(1.0, 1400.0)]));
        let bars: Vec<usize> =
            text.lines().filter(|line| line.starts_with('|')).map(|line| line.matches('|').count()).collect();
        assert_eq!(bars, [5; 7], "{text}");
        assert!(text.contains("1.40 (1.40–1.40)") && text.contains("NOT met"), "{text}");
    }
}
