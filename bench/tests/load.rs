//! The clients against the real services on loopback, in good order and in trouble.
#![expect(clippy::unwrap_used, reason = "helpers of tests: a panic is how they fail")]

mod support;

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use podferry_bench::load::{self, ClientReport, Kind, LoadOptions, LoadReport, Readiness, redis_data};
use support::{Proxy, Redis, Service};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Clients that run in the background.
struct Load {
    stop: CancellationToken,
    running: JoinHandle<LoadReport>,
}

impl Load {
    async fn start(kind: Kind, target: SocketAddr, clients: u32) -> Self {
        let (stop, ready) = (CancellationToken::new(), Readiness::new(clients));
        let options = LoadOptions { target, kind, clients };
        let running = tokio::spawn(load::run(options, stop.clone(), Arc::clone(&ready)));
        tokio::time::timeout(Duration::from_secs(20), ready.all()).await.expect("the clients get answers");
        Self { stop, running }
    }

    async fn stop(self) -> LoadReport {
        self.stop.cancel();
        tokio::time::timeout(Duration::from_secs(60), self.running).await.expect("the clients end").unwrap()
    }
}

async fn for_a_while() {
    tokio::time::sleep(Duration::from_millis(700)).await;
}

fn assert_clean(report: &LoadReport, clients: usize) {
    assert!(report.is_clean(), "{report:#?}");
    assert_eq!(report.clients.len(), clients);
    for client in &report.clients {
        assert!(client.requests > 50, "{client:?}");
        assert!(client.gap_ms_max > 0.0);
    }
}

fn only(report: LoadReport) -> ClientReport {
    assert_eq!(report.clients.len(), 1);
    report.clients.into_iter().next().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn undisturbed_clients_have_nothing_to_complain_of() {
    let (catalogue, cart) = (Service::catalogue(), Service::cart());
    let catalogue_load = Load::start(Kind::Catalogue, catalogue.address, 2).await;
    let cart_load = Load::start(Kind::Cart, cart.address, 3).await;
    let feed_load = Load::start(Kind::Feed, cart.address, 2).await;
    for_a_while().await;
    assert_clean(&cart_load.stop().await, 3);
    assert_clean(&feed_load.stop().await, 2);
    assert_clean(&catalogue_load.stop().await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_service_is_a_gap_of_that_length_and_no_fault() {
    let cart = Service::cart();
    let cart_load = Load::start(Kind::Cart, cart.address, 1).await;
    let feed_load = Load::start(Kind::Feed, cart.address, 1).await;
    for_a_while().await;
    let stopped = Instant::now();
    cart.freeze();
    tokio::time::sleep(Duration::from_millis(400)).await;
    cart.thaw();
    let stopped = stopped.elapsed();
    for_a_while().await;
    for load in [cart_load, feed_load] {
        let report = load.stop().await;
        assert_clean(&report, 1);
        let gap = Duration::from_secs_f64(only(report).gap_ms_max / 1e3);
        assert!(gap >= Duration::from_millis(395), "{gap:?}");
        assert!(gap <= stopped + Duration::from_millis(400), "{gap:?} of {stopped:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_connection_is_counted_and_nothing_is_lost_by_it() {
    let cart = Service::cart();
    let proxy = Proxy::start(cart.address).await;
    let load = Load::start(Kind::Cart, proxy.address, 1).await;
    for_a_while().await;
    proxy.cut_all();
    for_a_while().await;
    let client = only(load.stop().await);
    assert_eq!((client.connection_resets, client.failed_requests, client.lost_items), (1, 1, 0), "{client:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn carts_that_were_lost_are_noticed() {
    let mut cart = Service::cart();
    let load = Load::start(Kind::Cart, cart.address, 1).await;
    for_a_while().await;
    // The carts are in memory only; the order log stays.
    cart.restart();
    for_a_while().await;
    let client = only(load.stop().await);
    assert!(client.connection_resets >= 1, "{client:#?}");
    assert!(client.lost_items >= 1, "{client:#?}");
    assert!(client.requests > 100, "{client:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_order_that_vanished_from_the_log_is_noticed() {
    let cart = Service::cart();
    let load = Load::start(Kind::Cart, cart.address, 1).await;
    let log = cart.log_with_orders(2).await;
    // Emptied while the service holds it open: what is written from now on begins in the middle.
    std::fs::File::create(log).unwrap();
    let client = only(load.stop().await);
    assert!(client.lost_items + client.failed_requests > 0, "{client:#?}");
    assert_eq!(client.connection_resets, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_of_the_wrong_service_are_failures() {
    let cart = Service::cart();
    let (stop, ready) = (CancellationToken::new(), Readiness::new(1));
    let options = LoadOptions { target: cart.address, kind: Kind::Catalogue, clients: 1 };
    let running = tokio::spawn(load::run(options, stop.clone(), ready));
    for_a_while().await;
    stop.cancel();
    let client = only(running.await.unwrap());
    assert!(client.failed_requests > 50 && client.failed_requests == client.requests, "{client:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_there_is_a_failure_and_not_a_wait_for_ever() {
    let address = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap()
    };
    let load = Load::start(Kind::Feed, address, 1).await;
    let client = only(load.stop().await);
    assert_eq!(client.failed_requests, 1, "{client:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_is_as_before_when_the_clients_have_gone() {
    let redis = Redis::start();
    let before = redis_data::fill(redis.address, 2).await.unwrap();
    assert_eq!(before.keys, 512);
    assert!(before.used_bytes > 2 << 20);
    let load = Load::start(Kind::Redis, redis.address, 2).await;
    for_a_while().await;
    let during = redis_data::state(redis.address).await.unwrap();
    assert_ne!(during.digest, before.digest, "the clients write");
    assert_clean(&load.stop().await, 2);
    assert_eq!(redis_data::state(redis.address).await.unwrap().digest, before.digest);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_has_gone_silent_is_a_reset_in_the_report() {
    let (cart, redis) = (Service::cart(), Redis::start());
    let loads = [
        Load::start(Kind::Cart, cart.address, 1).await,
        Load::start(Kind::Feed, cart.address, 1).await,
        Load::start(Kind::Redis, redis.address, 1).await,
    ];
    for_a_while().await;
    cart.freeze();
    redis.freeze();
    // What was sent before the stop still arrives; a client that is asked to end while it reads that has nothing to complain of.
    for_a_while().await;
    let reports: Vec<_> = loads.map(|load| tokio::spawn(load.stop())).into();
    for report in reports {
        let client = only(report.await.unwrap());
        assert!(client.connection_resets >= 1 && client.failed_requests >= 1, "{client:#?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_someone_else_changed_is_noticed() {
    let redis = Redis::start();
    let load = Load::start(Kind::Redis, redis.address, 1).await;
    for_a_while().await;
    redis.increment_all_counters().await;
    for_a_while().await;
    let client = only(load.stop().await);
    assert_eq!((client.lost_items, client.connection_resets), (1, 0), "{client:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_redis_connection_is_counted_and_settled() {
    let redis = Redis::start();
    let proxy = Proxy::start(redis.address).await;
    let load = Load::start(Kind::Redis, proxy.address, 1).await;
    for_a_while().await;
    proxy.cut_all();
    for_a_while().await;
    let client = only(load.stop().await);
    assert_eq!((client.connection_resets, client.failed_requests, client.lost_items), (1, 1, 0), "{client:#?}");
}

#[test]
fn the_command_reports_when_its_input_closes() {
    use std::{
        io::{BufRead, BufReader},
        process::{Command, Stdio},
    };
    let catalogue = Service::catalogue();
    let mut child = Command::new(env!("CARGO_BIN_EXE_podferry-bench"))
        .args(["load", "--kind", "catalogue", "--clients", "2", "--until-stdin-closes", "--target"])
        .arg(catalogue.address.to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut event = || serde_json::from_str::<load::Event>(&lines.next().unwrap().unwrap()).unwrap();
    assert_eq!(event(), load::Event::Ready);
    std::thread::sleep(Duration::from_millis(300));
    drop(child.stdin.take());
    let load::Event::Report(report) = event() else { panic!("no report") };
    assert_clean(&report, 2);
    assert!(child.wait().unwrap().success());
}
