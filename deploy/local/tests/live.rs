//! Live migrations of whole containers: memory is copied while they run, and nothing of it is lost.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

mod support;

use std::net::{Ipv4Addr, SocketAddr};

use podferry_local::{FIRST_CONTAINER_ADDRESS, Workload};
use serde_json::Value;
use support::counter::{Counter, digest};
use support::noise::Noise;
use support::{NODES, Stage, churn, image, redis_address};

/// As `--strategy live`; a budget that two shared cores keep.
const LIVE: [&str; 4] = ["--strategy", "live", "--downtime-budget", "1000"];
/// Pages of 1000 bytes of values of which 60 000 are there, roughly.
const POPULATED_PAGES: u64 = 15_000;

fn number(record: &Value, path: &str) -> f64 {
    record.pointer(path).and_then(Value::as_f64).unwrap_or_else(|| panic!("no {path} in {record:#}"))
}

fn pages(record: &Value) -> Vec<u64> {
    let rounds = record["rounds"].as_array().unwrap();
    rounds.iter().map(|round| round["pages"].as_u64().unwrap()).collect()
}

#[test]
fn redis_moves_live_on_one_connection_and_most_of_its_memory_before_the_freeze() {
    let stage = Stage::up(&["redis"]);
    let counter = Counter::on_redis(&stage, 60000);
    let first_digest = counter.between(digest);
    let mut after_two = None;
    for hop in 1..=6 {
        let before = counter.between(|_, counted| counted);
        let record = stage.migrate_with("redis", NODES[hop % 2], &LIVE);
        let (digest, counted) = counter.between(|line, counted| (digest(line, counted), counted));
        assert_eq!(digest, first_digest, "after hop {hop}: {record:#}");
        assert!(counted > before, "nothing was counted during hop {hop}");
        let rounds = pages(&record);
        assert!(rounds.len() >= 2 && rounds[0] > POPULATED_PAGES, "{record:#}");
        assert!(rounds.last().unwrap() * 4 < rounds[0], "the freeze had most of the memory: {record:#}");
        assert!(number(&record, "/timings/precopy") > 0.0 && number(&record, "/timings/fill") > 0.0, "{record:#}");
        if hop == 2 {
            after_two = Some(stage.settled_census());
        }
    }
    let (counted, longest) = counter.stop();
    println!("6 hops, {counted} increments, the longest took {} ms", longest.as_millis());
    stage.assert_census(&after_two.unwrap(), |change| change.area == "tmpfs bytes" && change.after < change.before);
}

#[test]
fn a_container_that_moved_live_moves_warm_and_live_again() {
    let stage = Stage::up(&["redis"]);
    let counter = Counter::on_redis(&stage, 20000);
    let first_digest = counter.between(digest);
    for (hop, more) in [&LIVE[..], &["--strategy", "warm"], &LIVE, &LIVE].into_iter().enumerate() {
        let record = stage.migrate_with("redis", NODES[(hop + 1) % 2], more);
        assert_eq!(counter.between(digest), first_digest, "after hop {hop}: {record:#}");
    }
    counter.stop();
}

#[test]
fn memory_that_is_written_faster_than_it_is_sent_is_refused_before_the_freeze() {
    let stage = Stage::up(&["redis"]);
    let counter = Counter::on_redis(&stage, 20000);
    let noise = Noise::start(stage.connect(redis_address()), 1500);
    // 6 MB of noise are written anew all the time: over this link they take a second and a half.
    let narrow = ["--strategy", "live", "--downtime-budget", "100", "--bandwidth-limit", "4M", "--no-compression"];
    let before = counter.between(|_, counted| counted);
    let record = stage.try_migrate_with("redis", NODES[1], &narrow).unwrap();
    assert_eq!(record["phase"], "failed", "{record:#}");
    let reason = record["reason"].as_str().unwrap();
    assert!(reason.contains("--downtime-budget") && reason.contains("precopy"), "{record:#}");
    assert!(number(&record, "/downtime_ms") == 0.0, "{record:#}");
    assert_eq!(stage.places("redis"), [NODES[0]]);
    assert!(counter.between(|_, counted| counted) > before);
    noise.stop();
    // The same container moves when it may.
    stage.migrate_with("redis", NODES[1], &LIVE);
    let (_, longest) = counter.stop();
    println!("the longest increment took {} ms", longest.as_millis());
}

/// Nobody says how: the default.
#[test]
fn auto_moves_redis_live_and_what_cannot_be_followed_warm_and_says_why() {
    let stage = Stage::up(&["redis", "direct"]);
    let counter = Counter::on_redis(&stage, 20000);
    let address = Ipv4Addr::from_bits(FIRST_CONTAINER_ADDRESS.to_bits() + 1);
    let program = "/usr/bin/podferry-hard-load";
    let words = [program, "--mib", "32", "--direct", program];
    let rootfs = image(stage.folder.path(), "load", "podferry-hard-load", &[]);
    stage.start(&Workload::new("direct", rootfs, words, address));
    let mut line = stage.connect(SocketAddr::new(address.into(), 7000));
    let first_digest = counter.between(digest);

    let live = stage.migrate_with("redis", NODES[1], &[]);
    let reason = live["strategy_reason"].as_str().unwrap();
    println!("{reason}");
    assert!(live["strategy"] == "live" && pages(&live).len() >= 2, "{live:#}");
    assert!(reason.starts_with("live: ") && reason.contains("followed by userfaultfd"), "{reason}");
    assert_eq!(counter.between(digest), first_digest);
    counter.stop();

    let warm = stage.migrate_with("direct", NODES[1], &[]);
    let reason = warm["strategy_reason"].as_str().unwrap();
    println!("{reason}");
    assert!(warm["strategy"] == "warm" && pages(&warm).len() == 1, "{warm:#}");
    assert!(reason.starts_with("warm: ") && reason.contains("O_DIRECT"), "{reason}");
    assert_eq!(line.ask("check-all"), "ok");
    let described = stage.cluster.podferry(["describe", warm["id"].as_str().unwrap()]).unwrap().stdout;
    assert!(described.contains(&format!("\nchosen       {reason}\n")), "{described}");
}

/// What is written in a second to so much memory is not sent in one on a busy machine.
#[test]
fn a_process_that_checks_all_its_memory_finds_nothing_wrong_after_six_hops() {
    churn::hop(6, &["--strategy", "live", "--downtime-budget", "10000"], |hop, record| {
        let rounds = pages(record);
        assert!(rounds.len() >= 2 && rounds[0] > 1000, "hop {hop}: {record:#}");
    });
}
