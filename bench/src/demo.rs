//! The demo: three workloads under load, moved between two nodes and back, and nothing of them lost.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use crate::{
    clients::{self, LoadProcess},
    error::{Error, Result},
    load::LoadReport,
    migration::Hop,
    stage::{Interrupt, NODES, Program, Stage, Strategy},
    summary::{Findings, Observed, Summary, table},
};

/// Times that each workload is moved there and back.
const ROUNDS: u32 = 3;
/// The same when it is to be quick.
const QUICK_ROUNDS: u32 = 1;
/// What Redis holds, in MiB.
const REDIS_MIB: u64 = 16;
/// After so many failed moves no further ones are tried: they would only take time.
const MAX_FAILURES: usize = 3;
/// Load between two moves, so that each of them finds the workload at work.
const BETWEEN: Duration = Duration::from_millis(300);

/// Runs the demo, telling of it on standard output; the summary is printed as the last line.
pub fn run(quick: bool, interrupt: &Interrupt) -> Result<Summary> {
    let began = Instant::now();
    say(began, "bringing up two nodes, a coordinator and a client side in network namespaces of this machine");
    let stage = Stage::up("demo", interrupt)?;
    let findings = match play(&stage, quick, interrupt, began) {
        Ok(findings) => findings,
        Err(error) => return Err(end_early(stage, error)),
    };
    let summary = Summary::of(&findings);
    say(began, "taking everything away");
    if summary.holds() {
        stage.down()?;
    } else {
        tell_of_logs(&stage);
        drop(stage);
    }
    println!("\n{}", table(&findings));
    println!("{}", serde_json::to_string(&summary)?);
    Ok(summary)
}

fn play(stage: &Stage, quick: bool, interrupt: &Interrupt, began: Instant) -> Result<Findings> {
    for program in Program::ALL {
        say(began, &format!("starting {} at {} on {}", program.name(), program.address(), NODES[0]));
        stage.start(program, &stage.image(program)?)?;
    }
    let redis = Program::Redis.address();
    let client = stage.cluster().client();
    let before = clients::fill_redis(client, redis, REDIS_MIB)?;
    let mut load = Vec::new();
    for program in Program::ALL {
        for &(kind, count) in program.clients() {
            interrupt.check()?;
            load.push((program, LoadProcess::start(client, kind, count, program.address())?));
        }
    }
    let connections: u32 = Program::ALL.iter().flat_map(|program| program.clients()).map(|(_, count)| count).sum();
    say(began, &format!("{connections} clients at work, each on one connection that has to last"));
    let hops = hop_all(stage, if quick { QUICK_ROUNDS } else { ROUNDS }, interrupt, began)?;
    say(began, "stopping the clients, which check that all that was confirmed to them is there");
    let observed = collect(load)?;
    // A Redis that does not answer any more is a finding, too: the summary is to say so.
    let (redis_digests, problems) = match clients::redis_state(client, redis) {
        Ok(after) => (Some((before.digest, after.digest)), Vec::new()),
        Err(error) => (None, vec![error.to_string()]),
    };
    Ok(Findings { hops, observed, redis_digests, problems })
}

fn hop_all(stage: &Stage, rounds: u32, interrupt: &Interrupt, began: Instant) -> Result<Vec<Hop>> {
    let mut places: HashMap<&str, usize> = HashMap::new();
    let mut hops: Vec<Hop> = Vec::new();
    let moves = rounds as usize * NODES.len();
    let all = moves * Program::ALL.len();
    for program in (0..moves).flat_map(|_| Program::ALL) {
        interrupt.check()?;
        std::thread::sleep(BETWEEN);
        let place = places.entry(program.name()).or_default();
        let target = (*place + 1) % NODES.len();
        let hop = stage.migrate(program, Strategy::Warm, NODES[*place], NODES[target])?;
        *place = if hop.outcome.is_ok() { target } else { stage.place(program.name()).unwrap_or(*place) };
        say(began, &describe(hops.len() + 1, all, &hop));
        hops.push(hop);
        if hops.iter().filter(|hop| hop.outcome.is_err()).count() == MAX_FAILURES {
            say(began, &format!("{MAX_FAILURES} moves have failed: no more are tried"));
            break;
        }
    }
    Ok(hops)
}

fn describe(number: usize, all: usize, hop: &Hop) -> String {
    let what = format!("{number:>2}/{all} {:<13} {} -> {}", hop.workload, hop.source, hop.target);
    match &hop.outcome {
        Ok(record) => {
            let kib = record.wire_bytes / 1024;
            format!("{what}  down {:>4.0} ms of {:>4.0} ms, {kib} KiB", record.downtime_ms, record.total_ms)
        }
        Err(problem) => format!("{what}  FAILED: {problem}"),
    }
}

fn collect(load: Vec<(Program, LoadProcess)>) -> Result<Vec<Observed>> {
    let mut reports: Vec<(Program, LoadReport)> = Vec::new();
    for (program, process) in load {
        reports.push((program, process.stop()?));
    }
    let of = |program: Program| {
        let mut load = LoadReport::default();
        for (_, report) in reports.iter().filter(|(of, _)| *of == program) {
            load.merge(report.clone());
        }
        Observed { workload: program.name().to_owned(), load }
    };
    Ok(Program::ALL.map(of).into())
}

/// After a failure the logs are kept; who interrupted the demo does not want them.
fn end_early(stage: Stage, error: Error) -> Error {
    if !matches!(error, Error::Interrupted) {
        tell_of_logs(&stage);
        return error;
    }
    match stage.down() {
        Ok(()) => error,
        Err(error) => error,
    }
}

fn tell_of_logs(stage: &Stage) {
    println!("until the next demo, the logs of agents and coordinator are kept in {}", stage.logs().display());
}

fn say(began: Instant, what: &str) {
    println!("{:>6.1} s  {what}", began.elapsed().as_secs_f64());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration::MigrationRecord;

    fn hop(outcome: std::result::Result<MigrationRecord, String>) -> Hop {
        Hop {
            workload: "redis".to_owned(),
            source: "node-a".to_owned(),
            target: "node-b".to_owned(),
            start_unix_ms: 0.0,
            end_unix_ms: 1.0,
            outcome,
        }
    }

    #[test]
    fn progress_says_what_was_done() {
        let record =
            MigrationRecord { downtime_ms: 81.6, total_ms: 240.0, wire_bytes: 4096, ..MigrationRecord::default() };
        assert_eq!(
            describe(3, 18, &hop(Ok(record))),
            " 3/18 redis         node-a -> node-b  down   82 ms of  240 ms, 4 KiB"
        );
        assert!(describe(3, 18, &hop(Err("no CRIU".to_owned()))).ends_with("FAILED: no CRIU"));
    }
}
