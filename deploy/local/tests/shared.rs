//! Shared memory moves before the freeze, too, and only what changed of it moves in the freeze.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

mod support;

use std::fs;
use std::net::SocketAddr;

use podferry_local::{FIRST_CONTAINER_ADDRESS, Signal, Workload};
use serde_json::Value;
use support::{Line, NODES, Stage, image, verified};

/// A budget that two shared cores keep.
const LIVE: [&str; 4] = ["--strategy", "live", "--downtime-budget", "5000"];
/// MiB of shared memory, and the pages that it has.
const MIB: u64 = 96;
const PAGES: u64 = MIB * 256;
const LIBRARY: &str = "libpodferry_criu_shim.so";

/// A program that writes `percent` of its shared memory each second and knows what every page of it has to hold.
fn start(stage: &Stage, percent: &str) -> Line {
    let mib = MIB.to_string();
    let words =
        ["/usr/bin/podferry-hard-load", "--backing", "shared", "--mib", &mib, "--percent", percent, "--threads", "2"];
    stage.start(&Workload::new(
        "load",
        image(stage.folder.path(), "load", "podferry-hard-load", &[]),
        words,
        FIRST_CONTAINER_ADDRESS,
    ));
    stage.connect(SocketAddr::new(FIRST_CONTAINER_ADDRESS.into(), 7000))
}

fn pages(record: &Value) -> Vec<u64> {
    let rounds = record["rounds"].as_array().unwrap();
    rounds.iter().map(|round| round["pages"].as_u64().unwrap()).collect()
}

#[test]
fn shared_memory_is_sent_before_the_freeze_and_every_page_of_it_is_right_after_each_hop() {
    let stage = Stage::up(&["load"]);
    let mut line = start(&stage, "3");
    let mut after_two = None;
    for hop in 1..=4 {
        let record = stage.migrate_with("load", NODES[hop % 2], &[&LIVE[..], &["--verify"]].concat());
        assert_eq!(line.ask("check-all"), "ok", "after hop {hop}: {record:#}");
        assert!(verified(&record) >= MIB << 20, "{record:#}");
        let rounds = pages(&record);
        assert!(rounds[0] >= PAGES, "the first round had not all of it: {record:#}");
        assert!(rounds.last().unwrap() * 4 < PAGES, "the freeze had most of it: {record:#}");
        println!("hop {hop}: downtime {} ms, pages {rounds:?}", record["downtime_ms"]);
        if hop == 2 {
            after_two = Some(stage.settled_census());
        }
    }
    stage.assert_census(&after_two.unwrap(), |change| change.area == "tmpfs bytes" && change.after < change.before);
    // What moved this way moves in every other.
    for (hop, strategy) in [(5, &["--strategy", "warm"][..]), (6, &["--strategy", "postcopy", "--accept-loss"])] {
        let record = stage.migrate_with("load", NODES[hop % 2], strategy);
        assert_eq!(line.ask("check-all"), "ok", "after hop {hop}: {record:#}");
    }
}

#[test]
fn shared_memory_that_alone_takes_longer_than_the_budget_is_refused_before_the_freeze() {
    let stage = Stage::up(&["load"]);
    let mut line = start(&stage, "1");
    let record = stage.try_migrate_with("load", NODES[1], &["--strategy", "live", "--downtime-budget", "5"]).unwrap();
    assert_eq!(record["phase"], "failed", "{record:#}");
    let reason = record["reason"].as_str().unwrap();
    assert!(reason.contains("for all shared memory") && reason.contains("precopy"), "{record:#}");
    assert_eq!(record["downtime_ms"].as_f64(), Some(0.0), "{record:#}");
    assert_eq!(stage.places("load"), [NODES[0]]);
    assert_eq!(line.ask("check-all"), "ok");
}

/// CRIU makes the segment, and nobody fills it.
#[test]
fn shared_memory_that_the_target_cannot_lay_in_undoes_the_migration() {
    let stage = Stage::up(&["load"]);
    let mut line = start(&stage, "1");
    let target = stage.node(NODES[1]);
    let config = fs::read_to_string(target.agent_config()).unwrap();
    let ours = podferry_local::default_binaries().canonicalize().unwrap().join(LIBRARY);
    // One that does no harm, and nothing else.
    let other = stage.folder.path().join("other.so");
    fs::copy("/lib/x86_64-linux-gnu/libm.so.6", &other).unwrap();
    let changed = config.replace(&ours.display().to_string(), &other.display().to_string());
    assert_ne!(changed, config);
    fs::write(target.agent_config(), changed).unwrap();
    target.kill_agent(Signal::TERM).unwrap();
    target.start_agent().unwrap();
    target.wait_ready().unwrap();
    let record = stage.try_migrate_with("load", NODES[1], &LIVE).unwrap();
    assert_eq!(record["phase"], "failed", "{record:#}");
    let reason = record["reason"].as_str().unwrap();
    assert!(reason.contains("without what was sent of it") && reason.contains("criu_shim"), "{record:#}");
    assert_eq!(stage.places("load"), [NODES[0]]);
    assert_eq!(line.ask("check-all"), "ok");
}
