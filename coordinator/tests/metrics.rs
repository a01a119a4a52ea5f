//! What Prometheus can read of a real coordinator, against what it says otherwise.
#![expect(clippy::unwrap_used, reason = "helpers of tests: a panic is the report")]

mod world;

use std::time::Duration;

use podferry_common::identity::Peer;
use podferry_proto::v1::{self, Phase};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use world::{Coordinator, Fault, PATIENCE, World, migrate, outcome, request};

/// Where the coordinator lets itself be read.
async fn address(coordinator: &Coordinator) -> String {
    coordinator.said(|line| line.contains("metrics can be read")).await;
    let log = coordinator.log.lock().unwrap();
    let line = log.iter().find(|line| line.contains("metrics can be read")).unwrap();
    let line: serde_json::Value = serde_json::from_str(line).unwrap();
    line["address"].as_str().unwrap().to_owned()
}

async fn read(address: &str) -> String {
    let mut connection = TcpStream::connect(address).await.unwrap();
    connection.write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    connection.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    answer
}

/// The value of a series whose line begins so; 0 when there is none.
fn value(text: &str, series: &str) -> f64 {
    let line = text.lines().find(|line| line.starts_with(series));
    line.map_or(0.0, |line| line.rsplit(' ').next().unwrap().parse().unwrap())
}

/// Waits until a series has that value: what ended is counted behind the answer.
async fn reaches(address: &str, series: &str, expected: f64) -> String {
    let reached = async {
        loop {
            let text = read(address).await;
            if (value(&text, series) - expected).abs() < 1e-9 {
                return text;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, reached).await.unwrap_or_else(|_| panic!("{series} is never {expected}"))
}

async fn world() -> World {
    let world = World::new().await;
    std::fs::write(world.folder.path().join("access.toml"), "[[grants]]\nclients = [\"tester\"]\nrole = \"admin\"\n")
        .unwrap();
    let config = std::fs::read_to_string(world.configuration()).unwrap();
    let config = format!("access = \"access.toml\"\nmetrics_listen = \"127.0.0.1:0\"\n{config}");
    std::fs::write(world.configuration(), config).unwrap();
    world
}

#[tokio::test]
async fn every_number_of_a_report_is_in_the_figures() {
    let world = world().await;
    let (coordinator, mut client) = world.coordinator().await;
    let address = address(&coordinator).await;
    let wanted = v1::MigrateRequest {
        workload: "shop".to_owned(),
        target: "b".to_owned(),
        strategy: v1::Strategy::Live.into(),
        ..v1::MigrateRequest::default()
    };
    let accepted = request(&mut client, wanted).await.unwrap();
    let report = outcome(&mut client, &accepted.id).await;
    assert_eq!(report.phase(), Phase::Succeeded);
    let labels = "{strategy=\"live\",outcome=\"succeeded\"}";
    let text = reaches(&address, &format!("podferry_migrations_total{labels}"), 1.0).await;

    let mut compared = 0;
    let mut same = |name: &str, labels: &str, reported: f64| {
        let seen = value(&text, &format!("podferry_migration_{name}{labels} "));
        assert!(
            (seen - reported).abs() <= 1e-9 * reported.abs(),
            "{name}{labels}: {seen}, reported {reported}\n{text}"
        );
        compared += 1;
    };
    #[expect(clippy::cast_precision_loss, reason = "below 2^52")]
    let sum = |of: fn(&v1::Round) -> u64| report.rounds.iter().map(of).sum::<u64>() as f64;
    let sum_ms = |of: fn(&v1::Round) -> f64| report.rounds.iter().map(of).sum::<f64>();
    assert!(report.downtime_ms > 0.0 && report.total_ms > 0.0 && report.rounds.len() == 3, "{report:?}");
    same("downtime_seconds_sum", labels, report.downtime_ms / 1e3);
    same("duration_seconds_sum", labels, report.total_ms / 1e3);
    #[expect(clippy::cast_precision_loss, reason = "below 2^52")]
    same("wire_bytes_total", labels, report.wire_bytes as f64);
    #[expect(clippy::cast_precision_loss, reason = "below 2^52")]
    same("raw_bytes_total", labels, report.progress.unwrap().raw_bytes as f64);
    #[expect(clippy::cast_precision_loss, reason = "below 2^52")]
    same("rounds_total", labels, report.rounds.len() as f64);
    same("round_pages_total", labels, sum(|round| round.pages));
    same("round_raw_bytes_total", labels, sum(|round| round.raw_bytes));
    same("round_wire_bytes_total", labels, sum(|round| round.wire_bytes));
    same("round_seconds_sum", labels, sum_ms(|round| round.duration_ms) / 1e3);
    same("round_dirty_pages_per_second_sum", labels, sum_ms(|round| round.dirty_rate));
    same("round_predicted_seconds_sum", labels, sum_ms(|round| round.predicted_ms) / 1e3);
    same("round_cpu_limit_sum", labels, sum_ms(|round| round.cpu_limit));
    let timings = report.timings.unwrap();
    let stages = [
        ("preflight", timings.preflight),
        ("prepare", timings.prepare),
        ("precopy", timings.precopy),
        ("freeze", timings.freeze),
        ("dump", timings.dump),
        ("transfer", timings.transfer),
        ("restore", timings.restore),
        ("commit", timings.commit),
        ("resume", timings.resume),
        ("fill", timings.fill),
    ];
    for (stage, milliseconds) in stages {
        let labels = format!("{{strategy=\"live\",outcome=\"succeeded\",stage=\"{stage}\"}}");
        same("stage_seconds_sum", &labels, milliseconds / 1e3);
    }
    assert_eq!(compared, 22);
    assert!(stages.iter().filter(|(_, milliseconds)| *milliseconds > 0.0).count() >= 9, "{stages:?}");
    assert!(!text.contains(&accepted.id) && !text.contains("shop"), "no series for each migration or workload");
}

#[tokio::test]
async fn what_is_under_way_denied_undone_or_out_of_reach_is_counted() {
    let mut world = world().await;
    world.stop_agent("c");
    let (coordinator, mut client) = world.coordinator().await;
    let address = address(&coordinator).await;
    reaches(&address, "podferry_agent_reachable{node=\"a\"}", 1.0).await;
    let text = read(&address).await;
    assert!(text.contains("podferry_agent_reachable{node=\"c\"} 0\n"), "{text}");

    let mut eve = world.client(&coordinator, &Peer::client("eve").unwrap()).await;
    migrate(&mut eve, "shop", "b").await.unwrap_err();
    let text = read(&address).await;
    assert!(text.contains("podferry_requests_total{action=\"migrate\",result=\"denied\"} 1\n"), "{text}");

    world.fault("b", "Prepare", Fault::Hang, 1);
    let moving = migrate(&mut client, "shop", "b").await.unwrap();
    world.called("b Prepare").await;
    let under_way = "podferry_migrations_in_flight{strategy=\"warm\",phase=\"prepare\"}";
    reaches(&address, under_way, 1.0).await;
    client.cancel_migration(v1::CancelMigrationRequest { id: moving.id.clone() }).await.unwrap();
    world.heal("b", "Prepare");
    assert_eq!(outcome(&mut client, &moving.id).await.phase(), Phase::Cancelled);
    let text = reaches(&address, "podferry_rollbacks_total{code=\"ABORTED\",phase=\"prepare\"}", 1.0).await;
    assert!(text.contains("podferry_migrations_total{strategy=\"warm\",outcome=\"cancelled\"} 1\n"), "{text}");
    assert!(value(&read(&address).await, under_way).abs() < 1e-9);
}
