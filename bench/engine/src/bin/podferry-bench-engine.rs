//! `make bench-engine`: live migration against CRIU's stop-and-copy, by turns, at several sizes.

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use podferry_engine_bench::error::Result;
use podferry_engine_bench::live::{self, Migrated};
use podferry_engine_bench::observer::Observer;
use podferry_engine_bench::victim::Victim;
use podferry_engine_bench::{stop_and_copy, tools};
use serde::Serialize;

/// Measures for how long a process stands still when it is migrated on this machine: with CRIU alone, and live.
#[derive(Debug, Parser)]
#[command(name = "podferry-bench-engine", version)]
struct Arguments {
    /// Small sizes, few runs.
    #[arg(long, env = "QUICK", value_parser = clap::builder::FalseyValueParser::new(), action = clap::ArgAction::SetTrue)]
    quick: bool,
    /// Resident memory, in MiB.
    #[arg(long = "mib", value_delimiter = ',')]
    sizes: Vec<u64>,
    /// How often each size is migrated, each way.
    #[arg(long)]
    runs: Option<usize>,
    /// How much of the memory is written in a second, in per cent.
    #[arg(long, default_value_t = 1.0)]
    dirty_percent: f64,
    /// Compare all memory of the frozen process with what was kept of it. The freeze is longer then.
    #[arg(long)]
    verify: bool,
    /// Only live.
    #[arg(long)]
    live_only: bool,
}

/// The last line. All lists have one entry for each size; times are in ms, medians unless they say otherwise.
#[derive(Debug, Default, Serialize)]
struct Report {
    resident_mib: Vec<u64>,
    criu_ms: Vec<f64>,
    live_ms: Vec<f64>,
    ratio: Vec<f64>,
    live_ms_max: Vec<f64>,
    prefill_ms: Vec<f64>,
}

/// A run before the process is used again, so that it has settled.
const PAUSE: Duration = Duration::from_millis(300);

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("podferry-bench-engine: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let (usual, usual_runs): (&[u64], usize) =
        if arguments.quick { (&[64, 256], 2) } else { (&[64, 256, 1024, 4096], 5) };
    let sizes = if arguments.sizes.is_empty() { usual } else { &arguments.sizes };
    let runs = arguments.runs.unwrap_or(usual_runs);
    let mut report = Report::default();
    println!("| resident | CRIU | live | of CRIU | longest live | last round | dump | restore | fill | faults |");
    println!("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |");
    for mib in sizes {
        measure(*mib, runs, arguments, &mut report)?;
    }
    println!("{}", serde_json::to_string(&report).unwrap_or_default());
    Ok(())
}

fn measure(mib: u64, runs: usize, arguments: &Arguments, report: &mut Report) -> Result<()> {
    let load = tools::built("podferry-engine-load")?;
    let mut victim = Victim::start(&load, &[mib.to_string(), arguments.dirty_percent.to_string()])?;
    let (mut alone, mut lives, mut details) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..runs {
        if !arguments.live_only {
            alone.push(observed(&mut victim, |victim| stop_and_copy::migrate(victim).map(drop))?.0);
        }
        let (gap, migrated) = observed(&mut victim, |victim| live::migrate(victim, arguments.verify))?;
        lives.push(gap);
        details.push(migrated);
    }
    let live = median(&lives);
    let of = |part: fn(&Migrated) -> Duration| {
        median(&details.iter().map(|run| milliseconds(part(run))).collect::<Vec<_>>())
    };
    let criu = median(&alone);
    let longest = lives.iter().copied().fold(0.0, f64::max);
    let fill = of(|run| run.paged.fill);
    let faults = details.iter().map(|run| run.paged.faults).max().unwrap_or(0);
    println!(
        "| {mib} MiB | {criu:.0} ms | {live:.1} ms | 1/{:.0} | {longest:.1} ms | {:.1} ms | {:.1} ms | {:.1} ms | {fill:.0} ms | {faults} |",
        criu / live,
        of(|run| run.last_round),
        of(|run| run.dump),
        of(|run| run.restore),
    );
    report.resident_mib.push(mib);
    report.criu_ms.push(criu);
    report.live_ms.push(live);
    report.ratio.push(criu / live);
    report.live_ms_max.push(longest);
    report.prefill_ms.push(fill);
    Ok(())
}

/// Migrates, and gives for how long the process's counter stood still.
fn observed<T>(victim: &mut Victim, migrate: impl FnOnce(&mut Victim) -> Result<T>) -> Result<(f64, T)> {
    std::thread::sleep(PAUSE);
    let observer = Observer::watch(&victim.sign())?;
    let outcome = migrate(victim);
    std::thread::sleep(PAUSE);
    let gap = observer.longest_gap();
    victim.check()?;
    Ok((milliseconds(gap), outcome?))
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        length if length % 2 == 0 => f64::midpoint(sorted[middle - 1], sorted[middle]),
        _ => sorted[middle],
    }
}
