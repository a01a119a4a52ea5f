//! Live migrations of whole containers: memory is copied while they run, and nothing of it is lost.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

mod support;

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};

use podferry_local::{FIRST_CONTAINER_ADDRESS, Node, Signal, Workload};
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

/// Where an agent lets itself be read, on its node's loopback.
const METRICS: &str = "127.0.0.1:9464";

/// Has an agent let itself be read.
fn export(node: &Node) {
    let config = fs::read_to_string(node.agent_config()).unwrap();
    fs::write(node.agent_config(), format!("metrics_listen = \"{METRICS}\"\n{config}")).unwrap();
    node.kill_agent(Signal::TERM).unwrap();
    node.start_agent().unwrap();
    node.wait_ready().unwrap();
}

/// An agent's figures.
fn figures(node: &Node) -> String {
    let (host, port) = METRICS.split_once(':').unwrap();
    let ask = format!(
        "exec 3<>/dev/tcp/{host}/{port}; printf 'GET /metrics HTTP/1.1\\r\\nhost: x\\r\\nconnection: close\\r\\n\\r\\n' >&3; cat <&3"
    );
    node.check(["bash", "-c", &ask]).unwrap()
}

/// A figure of an agent; 0 when there is none.
fn figure(figures: &str, series: &str) -> f64 {
    let line = figures.lines().find(|line| line.starts_with(&format!("podferry_agent_{series} ")));
    line.map_or(0.0, |line| line.rsplit(' ').next().unwrap().parse().unwrap())
}

/// That both agents have counted what the reports say.
fn assert_counted(stage: &Stage, records: &[Value]) {
    for (name, other) in [(NODES[0], NODES[1]), (NODES[1], NODES[0])] {
        let (seen, others) = (figures(&stage.node(name)), figures(&stage.node(other)));
        let left: Vec<_> = records.iter().filter(|record| record["source"] == name).collect();
        let came: Vec<_> = records.iter().filter(|record| record["target"] == name).collect();
        let sum = |records: &[&Value], path: &str| records.iter().map(|record| number(record, path)).sum::<f64>();
        let rounds = || left.iter().flat_map(|record| record["rounds"].as_array().unwrap());
        let of_rounds = |key: &str| rounds().map(|round| round[key].as_f64().unwrap()).sum::<f64>();
        let counts = |count: usize| f64::from(u32::try_from(count).unwrap());
        let expected = [
            ("sent_wire_bytes_total", sum(&left, "/wire_bytes")),
            ("rounds_total", counts(rounds().count())),
            ("pages_total", of_rounds("pages")),
            ("round_seconds_sum", of_rounds("duration_ms") / 1e3),
            ("round_dirty_pages_per_second_sum", of_rounds("dirty_rate")),
            ("freezes_total", counts(left.len())),
            ("stage_seconds_sum{stage=\"freeze\"}", sum(&left, "/timings/freeze") / 1e3),
            ("stage_seconds_sum{stage=\"dump\"}", sum(&left, "/timings/dump") / 1e3),
            ("stage_seconds_sum{stage=\"transfer\"}", sum(&left, "/timings/transfer") / 1e3),
            ("stage_seconds_sum{stage=\"restore\"}", sum(&came, "/timings/restore") / 1e3),
            ("stage_seconds_sum{stage=\"fill\"}", sum(&came, "/timings/fill") / 1e3),
            ("stage_seconds_count{stage=\"release\"}", counts(left.len())),
            ("stage_seconds_count{stage=\"resume\"}", counts(came.len())),
        ];
        for (series, reported) in expected {
            let counted = figure(&seen, series);
            // Times are shown to the microsecond, and rates to the thousandth.
            let slack = if series.contains("dirty") { 1e-2 } else { 1e-4 };
            assert!((counted - reported).abs() < slack, "{name} {series}: {counted}, reported {reported}\n{seen}");
        }
        let (sent, received) = (figure(&others, "sent_wire_bytes_total"), figure(&seen, "received_wire_bytes_total"));
        assert!(
            sent > 0.0 && (sent - received).abs() < sent / 100.0,
            "{other} sent {sent}, {name} received {received}"
        );
        assert!(
            figure(&seen, "received_raw_bytes_total") > received && figure(&seen, "connections_total") > 0.0,
            "{seen}"
        );
        assert!(!seen.contains("podferry_agent_failures_total{"), "{seen}");
    }
}

#[test]
fn a_container_that_moved_live_moves_warm_and_live_again() {
    let stage = Stage::up(&["redis"]);
    for name in NODES {
        export(&stage.node(name));
    }
    let mut records = Vec::new();
    let counter = Counter::on_redis(&stage, 20000);
    let first_digest = counter.between(digest);
    for (hop, more) in [&LIVE[..], &["--strategy", "warm"], &LIVE, &LIVE].into_iter().enumerate() {
        let record = stage.migrate_with("redis", NODES[(hop + 1) % 2], more);
        assert_eq!(counter.between(digest), first_digest, "after hop {hop}: {record:#}");
        records.push(record);
    }
    counter.stop();
    assert_counted(&stage, &records);
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
