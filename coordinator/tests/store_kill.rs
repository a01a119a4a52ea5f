//! The store under `kill -9`: whatever was acknowledged is there afterwards, at any instant of the kill.
#![expect(clippy::unwrap_used, reason = "helpers of tests: a panic is the report")]

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use jiff::Timestamp;
use podferry_common::MigrationId;
use podferry_coordinator::migration::{Decision, State};
use podferry_coordinator::store::{Record, Report, Store};
use podferry_coordinator::strategy::{Connections, Strategy};

const FOLDER: &str = "PODFERRY_TEST_STORE";
const KILLS: usize = 25;

fn record(number: u64) -> Record {
    Record {
        id: MigrationId::new(),
        workload: format!("w{number}").parse().unwrap(),
        container: "c".repeat(64),
        pod: None,
        strategy: Strategy::Warm,
        auto: None,
        strategy_reason: String::new(),
        source: "a".parse().unwrap(),
        source_address: "127.0.0.1:1".to_owned(),
        target: "b".parse().unwrap(),
        target_address: "127.0.0.1:2".to_owned(),
        compress: true,
        downtime_budget_ms: 0.0,
        bandwidth_limit: 0,
        verify: false,
        throttle: false,
        grace_period_s: 0,
        connections: Connections::default(),
        requested_by: None,
        created_at: Timestamp::now(),
        frozen_at: None,
        state: State::new(),
        report: Report::default(),
    }
}

fn acknowledge(record: &Record) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "ack {} {:?}", record.id, record.state.decision()).unwrap();
    out.flush().unwrap();
}

/// Takes migrations through their writes until it is killed.
#[test]
#[ignore = "started and killed by acknowledged_writes_survive"]
fn writer() {
    let folder = std::env::var_os(FOLDER).expect("started by acknowledged_writes_survive");
    let store = Store::open(Path::new(&folder)).unwrap();
    for number in 0.. {
        let mut record = record(number);
        store.create(&record, usize::MAX).unwrap().unwrap();
        acknowledge(&record);
        record.state = State::Sealing { source: false, target: true };
        store.update_lazily(&record, "sealing").unwrap();
        record.state = State::Releasing;
        store.update(&record, "committed").unwrap();
        acknowledge(&record);
        record.state = State::Completed;
        store.update(&record, "completed").unwrap();
    }
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _gone = self.0.kill();
        let _reaped = self.0.wait();
    }
}

/// Runs the writer until it has acknowledged that many writes and a moment longer, kills it, and returns all that it had
/// acknowledged.
fn write_and_kill(folder: &Path, enough: usize, moment: Duration) -> Vec<(MigrationId, String)> {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--ignored", "--exact", "writer", "--nocapture", "--test-threads=1"]).env(FOLDER, folder);
    let mut child = Killed(command.stdout(Stdio::piped()).spawn().unwrap());
    let lines = BufReader::new(child.0.stdout.take().unwrap()).lines().map_while(Result::ok);
    // The test harness prints its own words too, without a line's end before the first acknowledgement.
    let mut said = lines.filter_map(|line| {
        let (id, decision) = line.split_once("ack ")?.1.split_once(' ')?;
        Some((id.parse::<MigrationId>().unwrap(), decision.to_owned()))
    });
    let mut acknowledged: Vec<_> = said.by_ref().take(enough).collect();
    std::thread::sleep(moment);
    child.0.kill().unwrap();
    child.0.wait().unwrap();
    acknowledged.extend(said);
    acknowledged
}

#[test]
fn acknowledged_writes_survive() {
    let folder = tempfile::tempdir().unwrap();
    for round in 0..KILLS {
        // Each round begins with a store of its own: the workload names repeat.
        let folder = folder.path().join(round.to_string());
        let enough = 1 + round * 5 % 17;
        let moment = Duration::from_micros(u64::try_from(round).unwrap() * 379 % 3_000);
        let acknowledged = write_and_kill(&folder, enough, moment);
        assert!(acknowledged.len() >= enough, "the writer of round {round} ended by itself");
        let store = Store::open(&folder).unwrap();
        for (id, said) in &acknowledged {
            let decision = store.decision(*id).unwrap();
            let kept = decision == Decision::Commit || (said == "Undecided" && decision == Decision::Undecided);
            assert!(kept, "{id} was acknowledged as {said} and is {decision:?} after the kill");
            assert!(store.get(*id).unwrap().is_some(), "{id} is gone");
        }
        let open = store.open_migrations().unwrap();
        assert!(open.len() <= 1, "the writer has one migration at a time: {open:?}");
    }
}
