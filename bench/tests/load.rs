//! The clients against the real services on loopback, in good order and in trouble.
#![expect(clippy::unwrap_used, reason = "helpers of tests: a panic is how they fail")]

mod support;

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use podferry_bench::load::{self, ClientReport, Kind, LoadOptions, LoadReport, Pace, Readiness, redis_data};
use support::{Proxy, Redis, Service};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// How long anything here may take, also on a machine that is busy with other things.
const PATIENCE: Duration = Duration::from_secs(60);
/// So many requests of each client are enough to see whether something is wrong.
const ENOUGH: u64 = 200;
/// Requests that a pipeline has under way.
const DEPTH: usize = 16;
/// Whoever was silent for so long has nothing to read any more.
const QUIET: Duration = Duration::from_millis(300);

/// Clients that run in the background.
struct Load {
    stop: CancellationToken,
    progress: Arc<Readiness>,
    running: JoinHandle<LoadReport>,
}

impl Load {
    async fn start(kind: Kind, target: SocketAddr, clients: u32) -> Self {
        let load = Self::begin(kind, target, clients);
        tokio::time::timeout(PATIENCE, load.progress.all()).await.expect("the clients get answers");
        load
    }

    fn begin(kind: Kind, target: SocketAddr, clients: u32) -> Self {
        let (stop, progress) = (CancellationToken::new(), Readiness::new(clients));
        let options = LoadOptions { target, kind, clients, depth: DEPTH, pace: Pace::default(), samples: true };
        let running = tokio::spawn(load::run(options, stop.clone(), Arc::clone(&progress)));
        Self { stop, progress, running }
    }

    /// Waits until each client has done enough more requests.
    async fn goes_on(&self) {
        self.does(ENOUGH).await;
    }

    /// Waits until each client has done so many more requests, and gives two times between which the last of them ended.
    async fn does(&self, more: u64) -> (Instant, Instant) {
        let (begun, before) = (Instant::now(), self.progress.requests());
        let mut earlier = begun;
        loop {
            let looked = Instant::now();
            let now = self.progress.requests();
            if now.iter().zip(&before).all(|(now, before)| now - before >= more) {
                return (earlier, Instant::now());
            }
            earlier = looked;
            assert!(begun.elapsed() < PATIENCE, "the clients do not go on: {before:?}, {now:?}");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Waits until what was sent to the clients before their service was stopped has been read.
    async fn is_quiet(&self) {
        let begun = Instant::now();
        let (mut last, mut since) = (self.progress.requests(), Instant::now());
        while since.elapsed() < QUIET {
            assert!(begun.elapsed() < PATIENCE, "a stopped service still answers");
            tokio::time::sleep(Duration::from_millis(10)).await;
            let now = self.progress.requests();
            if now != last {
                (last, since) = (now, Instant::now());
            }
        }
    }

    async fn stop(self) -> LoadReport {
        self.stop.cancel();
        tokio::time::timeout(PATIENCE, self.running).await.expect("the clients end").unwrap()
    }
}

fn assert_clean(report: &LoadReport, clients: usize) {
    assert!(report.is_clean(), "{report:#?}");
    assert_eq!(report.clients.len(), clients);
    for client in &report.clients {
        assert!(client.requests > 0, "{client:?}");
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
    for load in [&catalogue_load, &cart_load, &feed_load] {
        load.goes_on().await;
    }
    assert_clean(&cart_load.stop().await, 3);
    assert_clean(&feed_load.stop().await, 2);
    assert_clean(&catalogue_load.stop().await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_service_is_a_gap_of_that_length_and_no_fault() {
    let cart = Service::cart();
    for kind in [Kind::Cart, Kind::Feed] {
        let load = Load::start(kind, cart.address, 1).await;
        load.goes_on().await;
        let (before, _) = load.does(1).await;
        cart.freeze();
        load.is_quiet().await;
        // From here on there was no answer for sure, and from `before` on at most.
        let silent = Instant::now();
        tokio::time::sleep(Duration::from_millis(400)).await;
        let least = silent.elapsed();
        cart.thaw();
        let (_, after) = load.does(1).await;
        let most = after - before;
        load.goes_on().await;
        let report = load.stop().await;
        assert_clean(&report, 1);
        let client = only(report);
        let gaps = client.gaps.iter().map(|gap| Duration::from_secs_f64(gap.gap_ms / 1e3));
        // It notes whole microseconds.
        let is_it = |gap: Duration| gap + Duration::from_micros(1) >= least && gap <= most + Duration::from_micros(1);
        assert!(gaps.into_iter().any(is_it), "none of {least:?} to {most:?}: {client:#?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_connection_is_counted_and_nothing_is_lost_by_it() {
    let cart = Service::cart();
    let proxy = Proxy::start(cart.address).await;
    let load = Load::start(Kind::Cart, proxy.address, 1).await;
    load.goes_on().await;
    proxy.cut_all();
    load.goes_on().await;
    let client = only(load.stop().await);
    assert_eq!((client.connection_resets, client.failed_requests, client.lost_items), (1, 1, 0), "{client:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn carts_that_were_lost_are_noticed() {
    let mut cart = Service::cart();
    let load = Load::start(Kind::Cart, cart.address, 1).await;
    load.goes_on().await;
    // The carts are in memory only; the order log stays.
    cart.restart();
    load.goes_on().await;
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
    let load = Load::begin(Kind::Catalogue, cart.address, 1);
    load.goes_on().await;
    let client = only(load.stop().await);
    assert!(client.failed_requests > 50 && client.failed_requests == client.requests, "{client:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_there_is_a_failure_and_not_a_wait_for_ever() {
    // Bound and not listening: nobody else gets the port meanwhile.
    let nobody = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    nobody.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    let address = nobody.local_addr().unwrap().as_socket().unwrap();
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
    load.goes_on().await;
    let during = redis_data::state(redis.address).await.unwrap();
    assert_ne!(during.digest, before.digest, "the clients write");
    assert_clean(&load.stop().await, 2);
    assert_eq!(redis_data::state(redis.address).await.unwrap().digest, before.digest);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pipeline_counts_its_answers_and_leaves_redis_as_it_was() {
    let redis = Redis::start();
    let before = redis_data::fill(redis.address, 2).await.unwrap();
    let load = Load::start(Kind::Pipeline, redis.address, 2).await;
    load.goes_on().await;
    assert_ne!(redis_data::state(redis.address).await.unwrap().digest, before.digest, "the clients write");
    let report = load.stop().await;
    assert_clean(&report, 2);
    for client in &report.clients {
        assert_eq!(client.throughput.as_ref().map(load::Throughput::answers), Some(client.requests), "{client:#?}");
    }
    assert_eq!(redis_data::state(redis.address).await.unwrap().digest, before.digest);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pipeline_notices_what_was_changed_and_settles_after_a_cut() {
    let redis = Redis::start();
    let proxy = Proxy::start(redis.address).await;
    let load = Load::start(Kind::Pipeline, proxy.address, 1).await;
    load.goes_on().await;
    proxy.cut_all();
    load.goes_on().await;
    let client = only(load.stop().await);
    assert_eq!((client.connection_resets, client.lost_items), (1, 0), "{client:#?}");

    let load = Load::start(Kind::Pipeline, redis.address, 1).await;
    load.goes_on().await;
    redis.forget_everything().await;
    load.goes_on().await;
    let client = only(load.stop().await);
    assert!(client.lost_items > 0, "{client:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_has_gone_silent_is_a_reset_in_the_report() {
    let (cart, redis) = (Service::cart(), Redis::start());
    let loads = [
        Load::start(Kind::Cart, cart.address, 1).await,
        Load::start(Kind::Feed, cart.address, 1).await,
        Load::start(Kind::Redis, redis.address, 1).await,
    ];
    for load in &loads {
        load.goes_on().await;
    }
    cart.freeze();
    redis.freeze();
    // What was sent before the stop still arrives; a client that is asked to end while it reads that has nothing to complain of.
    for load in &loads {
        load.is_quiet().await;
    }
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
    load.goes_on().await;
    redis.increment_all_counters().await;
    load.goes_on().await;
    let client = only(load.stop().await);
    assert_eq!((client.lost_items, client.connection_resets), (1, 0), "{client:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_redis_connection_is_counted_and_settled() {
    let redis = Redis::start();
    let proxy = Proxy::start(redis.address).await;
    let load = Load::start(Kind::Redis, proxy.address, 1).await;
    load.goes_on().await;
    proxy.cut_all();
    load.goes_on().await;
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
    drop(child.stdin.take());
    let load::Event::Report(report) = event() else { panic!("no report") };
    assert_clean(&report, 2);
    assert!(child.wait().unwrap().success());
}
