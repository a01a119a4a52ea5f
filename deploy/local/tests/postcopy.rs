//! Migrations whose memory comes after the resume: nothing of it is lost while both nodes live, and the loss is said when not.

mod support;

use serde_json::Value;
use support::counter::{Counter, digest};
use support::noise::Noise;
use support::{NODES, Stage, churn, redis_address};

const POSTCOPY: [&str; 3] = ["--strategy", "postcopy", "--accept-loss"];

fn number(record: &Value, path: &str) -> f64 {
    record.pointer(path).and_then(Value::as_f64).unwrap_or_else(|| panic!("no {path} in {record:#}"))
}

#[test]
fn redis_moves_before_its_memory_on_one_connection_and_nothing_is_lost() {
    let stage = Stage::up(&["redis"]);
    let counter = Counter::on_redis(&stage, 60000);
    let first_digest = counter.between(digest);
    let mut after_two = None;
    for hop in 1..=4 {
        let before = counter.between(|_, counted| counted);
        let record = stage.migrate_with("redis", NODES[hop % 2], &POSTCOPY);
        let (digest, counted) = counter.between(|line, counted| (digest(line, counted), counted));
        assert_eq!(digest, first_digest, "after hop {hop}: {record:#}");
        assert!(counted > before, "nothing was counted during hop {hop}");
        assert!(number(&record, "/timings/fill") > 0.0, "{record:#}");
        if hop == 2 {
            after_two = Some(stage.settled_census());
        }
    }
    let (counted, longest) = counter.stop();
    println!("4 hops, {counted} increments, the longest took {} ms", longest.as_millis());
    stage.assert_census(&after_two.unwrap(), |change| change.area == "tmpfs bytes" && change.after < change.before);
}

#[test]
fn what_does_not_converge_is_fetched_afterwards_when_the_loss_is_accepted() {
    let stage = Stage::up(&["redis"]);
    let counter = Counter::on_redis(&stage, 20000);
    let noise = Noise::start(stage.connect(redis_address()), 1500);
    // See the test of live that is refused for this load.
    let narrow = ["--strategy", "hybrid", "--downtime-budget", "100", "--bandwidth-limit", "4M", "--no-compression"];
    let refused = stage.try_migrate_with("redis", NODES[1], &narrow).unwrap_err();
    assert!(refused.contains("--accept-loss"), "{refused}");
    let before = counter.between(|_, counted| counted);
    let record = stage.migrate_with("redis", NODES[1], &[&narrow[..], &["--accept-loss"]].concat());
    let notes = record["notes"].to_string();
    assert!(notes.contains("fetched after the resume"), "{record:#}");
    assert!(counter.between(|_, counted| counted) > before);
    noise.stop();
    let first_digest = counter.between(digest);
    // What converges is sent in the freeze.
    let record = stage.migrate_with("redis", NODES[0], &["--strategy", "hybrid", "--accept-loss"]);
    assert!(!record["notes"].to_string().contains("fetched after the resume"), "{record:#}");
    assert_eq!(counter.between(digest), first_digest, "{record:#}");
    counter.stop();
}

#[test]
fn a_process_that_checks_all_its_memory_finds_nothing_wrong_when_it_comes_afterwards() {
    churn::hop(3, &POSTCOPY, |hop, record| {
        assert!(number(record, "/timings/fill") > 0.0, "hop {hop}: {record:#}");
    });
}
