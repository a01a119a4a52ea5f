//! Migration of Redis at several sizes by one strategy: what the phases take, and what a client sees of it.

use std::{fs, path::PathBuf, time::Duration};

use podferry_workloads::ballast::noise;
use serde::Serialize;

use crate::{
    clients::{self, LoadProcess},
    error::{Error, Result},
    load::{Kind, LoadReport},
    migration::{Hop, MigrationRecord, median},
    stage::{Interrupt, NODES, Program, Stage, Strategy},
};

/// Sizes of the data set in MiB, and how often each is moved.
const SIZES: [u64; 3] = [16, 256, 1024];
const RUNS: usize = 6;
/// The same when it is to be quick.
const QUICK_SIZES: [u64; 2] = [16, 64];
const QUICK_RUNS: usize = 2;
/// Sizes of what is in files, in MiB, and of the data set beside it.
const LAYERS: [u64; 3] = [0, 256, 1024];
const QUICK_LAYERS: [u64; 2] = [0, 64];
const BESIDE_LAYER: u64 = 16;
/// The files that it is in.
const FILES: u64 = 8;
/// Load between two moves.
const BETWEEN: Duration = Duration::from_millis(500);

/// What was measured at one size. Times are in ms, medians of all runs unless they say otherwise.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SizeResult {
    /// Size of the data set, in MiB.
    pub mib: u64,
    /// What was written into files of the container's, in MiB.
    pub layer_mib: u64,
    /// Resident memory of the process before the first move, in MiB.
    pub resident_mib: u64,
    /// Moves that succeeded.
    pub runs: u64,
    /// Copying memory while the process ran.
    pub precopy_ms: f64,
    /// Until all tasks stood still.
    pub freeze_ms: f64,
    /// Writing the images, which are sent while they are written.
    pub dump_ms: f64,
    /// Carrying them over; overlaps with the dump.
    pub transfer_ms: f64,
    /// Making the processes on the target.
    pub restore_ms: f64,
    /// From freeze to resume, as the coordinator saw it.
    pub downtime_ms: f64,
    /// Laying in what was missing behind the running process.
    pub fill_ms: f64,
    /// MiB that were laid in then. Those that were fetched from the source, with post-copy all of them, are not in `wire_mib`.
    pub laid_in_mib: f64,
    /// How often the process waited for a page of them.
    pub waits: f64,
    /// From the request to the end.
    pub total_ms: f64,
    /// Longest time without an answer that a client saw in a move.
    pub client_gap_ms: f64,
    /// The longest of all moves.
    pub client_gap_ms_max: f64,
    /// MiB that crossed the network in a move.
    pub wire_mib: f64,
    /// Moves that failed, and faults that clients saw; whether the data are the same after all moves.
    pub failed: u64,
    /// Lost items, failed requests and connection resets.
    pub faults: u64,
    /// Whether Redis and the files hold the same after the last move as before the first.
    pub digest_equal: bool,
}

impl SizeResult {
    fn holds(&self) -> bool {
        self.runs > 0 && self.failed == 0 && self.faults == 0 && self.digest_equal
    }
}

/// What was measured at all sizes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MovesResult {
    /// How it was moved.
    pub strategy: Strategy,
    /// One result for each size.
    pub sizes: Vec<SizeResult>,
}

impl MovesResult {
    /// Whether every move succeeded and no client saw a fault.
    pub fn holds(&self) -> bool {
        !self.sizes.is_empty() && self.sizes.iter().all(SizeResult::holds)
    }
}

/// Runs the measurement, telling of it on standard output; the result is printed as a table and, last, as JSON.
pub fn run(strategy: Strategy, quick: bool, interrupt: &Interrupt) -> Result<MovesResult> {
    let (sizes, runs) = if quick { (&QUICK_SIZES[..], QUICK_RUNS) } else { (&SIZES[..], RUNS) };
    let sizes: Vec<Size> = sizes.iter().map(|mib| Size { mib: *mib, layer_mib: 0 }).collect();
    run_sizes(strategy.name(), strategy, &sizes, runs, interrupt)
}

/// As [`run`], of live migrations with writable layers of several sizes.
pub fn run_layers(quick: bool, interrupt: &Interrupt) -> Result<MovesResult> {
    let (layers, runs) = if quick { (&QUICK_LAYERS[..], QUICK_RUNS) } else { (&LAYERS[..], RUNS) };
    let sizes: Vec<Size> = layers.iter().map(|layer_mib| Size { mib: BESIDE_LAYER, layer_mib: *layer_mib }).collect();
    run_sizes("layers", Strategy::Live, &sizes, runs, interrupt)
}

/// How much is moved, in MiB.
#[derive(Debug, Clone, Copy)]
struct Size {
    /// In memory.
    mib: u64,
    /// In files.
    layer_mib: u64,
}

fn run_sizes(
    name: &str,
    strategy: Strategy,
    sizes: &[Size],
    runs: usize,
    interrupt: &Interrupt,
) -> Result<MovesResult> {
    let stage = Stage::up(name, interrupt)?;
    let measured: Result<Vec<SizeResult>> =
        sizes.iter().map(|size| measure(&stage, strategy, *size, runs, interrupt)).collect();
    let result =
        MovesResult { strategy, sizes: measured.inspect_err(|_| println!("logs: {}", stage.logs().display()))? };
    stage.finish(result.holds())?;
    println!("\n{}", table(&result));
    println!("{}", serde_json::to_string(&result)?);
    Ok(result)
}

fn measure(stage: &Stage, strategy: Strategy, size: Size, runs: usize, interrupt: &Interrupt) -> Result<SizeResult> {
    let redis = Program::Redis;
    let Size { mib, layer_mib } = size;
    stage.start(redis, &stage.image(redis)?)?;
    let client = stage.cluster().client();
    let before = clients::fill_redis(client, redis.address(), mib)?;
    write_files(stage, layer_mib)?;
    let resident_mib = resident_mib(stage)?;
    println!("{mib} MiB of data, {resident_mib} MiB resident, {layer_mib} MiB in files");
    let load = LoadProcess::start(client, Kind::Redis, 1, redis.address())?;
    let mut hops = Vec::new();
    let mut place = 0;
    for _ in 0..runs {
        interrupt.check()?;
        std::thread::sleep(BETWEEN);
        let target = (place + 1) % NODES.len();
        let hop = stage.migrate(redis, strategy, NODES[place], NODES[target])?;
        match &hop.outcome {
            Ok(record) => {
                place = target;
                println!("  down {:>5.0} ms of {:>5.0} ms", record.downtime_ms, record.total_ms);
            }
            Err(problem) => println!("  FAILED: {problem}"),
        }
        hops.push(hop);
    }
    let report = load.stop()?;
    let after = clients::redis_state(client, redis.address())?;
    let digest_equal = before.digest == after.digest && files_are_whole(stage, NODES[place], layer_mib)?;
    stage.remove(redis)?;
    Ok(SizeResult { mib, layer_mib, resident_mib, digest_equal, ..evaluate(&hops, &report) })
}

/// The container's files on a node, as this machine sees them, with what each holds: noise that follows from its number.
fn files(stage: &Stage, node: &str, mib: u64) -> Result<impl Iterator<Item = (PathBuf, Vec<u8>)> + use<>> {
    let node = stage.cluster().node(node)?;
    let folder = node.on_machine(&node.bundle(Program::Redis.name()).join("rootfs/data"));
    let length = usize::try_from((mib << 20) / FILES).unwrap_or(usize::MAX);
    Ok((0..FILES)
        .filter(move |_| mib > 0)
        .map(move |number| (folder.join(format!("file-{number}")), noise(length, number))))
}

fn write_files(stage: &Stage, mib: u64) -> Result<()> {
    for (path, content) in files(stage, NODES[0], mib)? {
        fs::write(&path, content).map_err(|source| Error::File { action: "write", path, source })?;
    }
    Ok(())
}

fn files_are_whole(stage: &Stage, node: &str, mib: u64) -> Result<bool> {
    for (path, content) in files(stage, node, mib)? {
        let found = fs::read(&path).map_err(|source| Error::File { action: "read", path, source })?;
        if found != content {
            return Ok(false);
        }
    }
    Ok(true)
}

/// As the kernel says: what CRIU has to carry.
pub(crate) fn resident_mib(stage: &Stage) -> Result<u64> {
    let process = stage.cluster().node(NODES[0])?.container_process(Program::Redis.name())?;
    let path = format!("/proc/{}/status", process.pid);
    let status =
        fs::read_to_string(&path).map_err(|source| Error::File { action: "read", path: path.into(), source })?;
    let kib =
        status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next()?.parse::<u64>().ok());
    Ok(kib.unwrap_or(0) / 1024)
}

fn evaluate(hops: &[Hop], report: &LoadReport) -> SizeResult {
    let records: Vec<&MigrationRecord> = hops.iter().filter_map(Hop::record).collect();
    let middle = |of: fn(&MigrationRecord) -> f64| tenths(median(records.iter().map(|record| of(record))));
    let moved = hops.iter().filter(|hop| hop.record().is_some());
    let gaps: Vec<f64> = moved.map(|hop| report.longest_gap_within(hop.start_unix_ms, hop.end_unix_ms)).collect();
    SizeResult {
        mib: 0,
        layer_mib: 0,
        resident_mib: 0,
        runs: records.len() as u64,
        precopy_ms: middle(|record| record.timings.precopy),
        freeze_ms: middle(|record| record.timings.freeze),
        dump_ms: middle(|record| record.timings.dump),
        transfer_ms: middle(|record| record.timings.transfer),
        restore_ms: middle(|record| record.timings.restore),
        downtime_ms: middle(|record| record.downtime_ms),
        fill_ms: middle(|record| record.timings.fill),
        laid_in_mib: middle(|record| mebibytes(record.laid_in().pages * PAGE_BYTES)),
        waits: middle(|record| whole(record.laid_in().waits)),
        total_ms: middle(|record| record.total_ms),
        client_gap_ms: tenths(median(gaps.iter().copied())),
        client_gap_ms_max: tenths(gaps.iter().copied().reduce(f64::max)),
        wire_mib: middle(|record| mebibytes(record.wire_bytes)),
        failed: (hops.len() - records.len()) as u64,
        faults: report.lost_items() + report.failed_requests() + report.connection_resets(),
        digest_equal: false,
    }
}

/// Bytes of a page.
const PAGE_BYTES: u64 = 4096;

#[expect(clippy::cast_precision_loss, reason = "exact up to 2^53")]
pub(crate) fn whole(value: u64) -> f64 {
    value as f64
}

pub(crate) fn mebibytes(bytes: u64) -> f64 {
    whole(bytes) / f64::from(1 << 20)
}

/// Rounded to tenths; nothing is 0.
pub(crate) fn tenths(value: Option<f64>) -> f64 {
    (value.unwrap_or(0.0) * 10.0).round() / 10.0
}

/// The result as a table in Markdown.
pub fn table(result: &MovesResult) -> String {
    let titles = [
        "data",
        "in files",
        "resident",
        "runs",
        "pre-copy",
        "freeze",
        "dump",
        "transfer",
        "restore",
        "downtime",
        "client gap",
        "longest gap",
        "fill",
        "laid in",
        "waits",
        "on the wire",
    ];
    let ms = |value: f64| format!("{value:.0} ms");
    let cells = |size: &SizeResult| {
        [
            format!("{} MiB", size.mib),
            format!("{} MiB", size.layer_mib),
            format!("{} MiB", size.resident_mib),
            size.runs.to_string(),
            ms(size.precopy_ms),
            ms(size.freeze_ms),
            ms(size.dump_ms),
            ms(size.transfer_ms),
            ms(size.restore_ms),
            ms(size.downtime_ms),
            ms(size.client_gap_ms),
            ms(size.client_gap_ms_max),
            ms(size.fill_ms),
            format!("{:.0} MiB", size.laid_in_mib),
            format!("{:.0}", size.waits),
            format!("{:.0} MiB", size.wire_mib),
        ]
    };
    let mut rows = vec![titles.map(str::to_owned), titles.map(|_| "---:".to_owned())];
    rows.extend(result.sizes.iter().map(cells));
    rows.iter().map(|row| format!("| {} |", row.join(" | "))).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        load::{ClientReport, Gap},
        migration::Timings,
    };

    fn hop(start_unix_ms: f64, downtime_ms: f64, outcome: bool) -> Hop {
        let timings = Timings { dump: downtime_ms / 2.0, ..Timings::default() };
        let record = MigrationRecord { downtime_ms, timings, wire_bytes: 3 << 19, ..MigrationRecord::default() };
        Hop {
            workload: "redis".to_owned(),
            source: "node-a".to_owned(),
            target: "node-b".to_owned(),
            start_unix_ms,
            end_unix_ms: start_unix_ms + 900.0,
            outcome: if outcome { Ok(record) } else { Err("no".to_owned()) },
        }
    }

    fn gaps(gaps: &[(f64, f64)]) -> LoadReport {
        let gaps = gaps.iter().map(|&(start_unix_ms, gap_ms)| Gap { start_unix_ms, gap_ms }).collect();
        LoadReport { clients: vec![ClientReport { gaps, ..ClientReport::default() }] }
    }

    #[test]
    fn medians_are_of_moves_that_succeeded_only() {
        let hops = [hop(0.0, 100.0, true), hop(1000.0, 9000.0, false), hop(2000.0, 120.0, true)];
        let report = gaps(&[(10.0, 130.0), (1100.0, 700.0), (2100.0, 150.0)]);
        let size = evaluate(&hops, &report);
        assert_eq!((size.runs, size.failed, size.faults), (2, 1, 0));
        let close = |value: f64, expected: f64| assert!((value - expected).abs() < 0.01, "{value} {expected}");
        close(size.downtime_ms, 110.0);
        close(size.dump_ms, 55.0);
        close(size.client_gap_ms, 140.0);
        close(size.client_gap_ms_max, 150.0);
        close(size.wire_mib, 1.5);
    }

    #[test]
    fn any_fault_fails_the_measurement() {
        let good = SizeResult { digest_equal: true, ..evaluate(&[hop(0.0, 1.0, true)], &gaps(&[])) };
        let holds = |size: &SizeResult| MovesResult { strategy: Strategy::Warm, sizes: vec![size.clone()] }.holds();
        assert!(holds(&good));
        assert!(!MovesResult { strategy: Strategy::Warm, sizes: vec![] }.holds());
        assert!(!holds(&SizeResult { digest_equal: false, ..good.clone() }));
        assert!(!holds(&SizeResult { faults: 1, ..good.clone() }));
        assert!(!holds(&SizeResult { failed: 1, ..good.clone() }));
        assert!(!holds(&SizeResult { runs: 0, ..good }));
    }

    #[test]
    fn the_table_has_a_column_for_each_title() {
        let size = SizeResult { mib: 256, resident_mib: 290, ..evaluate(&[hop(0.0, 81.4, true)], &gaps(&[])) };
        let table = table(&MovesResult { strategy: Strategy::Warm, sizes: vec![size] });
        let counts: Vec<usize> = table.lines().map(|line| line.matches('|').count()).collect();
        assert_eq!(counts, [17, 17, 17]);
        assert!(table.contains("| 256 MiB") && table.contains("| 81 ms"));
    }
}
