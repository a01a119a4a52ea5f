//! Clients that put a workload under load and notice whatever goes wrong with it.
//!
//! Each client has one TCP connection and sends its next request about 1 ms after the answer to the one before (a closed
//! loop; [`Kind::Pipeline`] alone has many under way), so that a pause of the workload shows as a gap between two answers, at 1 ms resolution. Each answer is checked
//! against what the client knows. A connection that breaks is counted and its reason noted; only then is another one
//! opened, to find out what was lost.

mod bulk;
mod cart;
mod catalogue;
mod connection;
mod feed;
mod lines;
mod pipeline;
mod recorder;
mod redis_client;
pub mod redis_data;
mod report;
pub mod samples;
pub mod sql;
mod sse;
mod throughput;

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{
    sync::Notify,
    task::JoinSet,
    time::{MissedTickBehavior, timeout},
};
use tokio_util::sync::CancellationToken;

pub use self::{
    recorder::{Fault, GAP_FLOOR, Recorder, milliseconds},
    report::{ClientReport, Event, Gap, Kind, LoadReport},
    throughput::{SLICE, Throughput},
};

/// Time between an answer and the next request.
const PACE: Duration = Duration::from_millis(1);
/// How long an answer may take before the connection counts as broken. Longer than any migration's freeze here.
const ANSWER_DEADLINE: Duration = Duration::from_secs(60);
/// How long the last answer may take once the clients are told to end, when nothing is being moved.
const END_DEADLINE: Duration = Duration::from_secs(10);
/// How long the final checks may take, some of which look at all memory.
const CHECKS_DEADLINE: Duration = Duration::from_secs(30);
/// How long and at what distance a connection is tried again after it broke, and how long one try may take.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);
const CONNECT_TRY: Duration = Duration::from_secs(5);
const CONNECT_PAUSE: Duration = Duration::from_millis(100);

/// One client of a workload.
trait Client: Send {
    /// Opens the connection, the first or another one.
    fn connect(&mut self) -> impl Future<Output = Result<(), Fault>> + Send;
    /// One request and its answer, checked; of a client with many requests under way the answers that come next.
    fn step(&mut self) -> impl Future<Output = Result<(), Fault>> + Send;
    /// Checks at the end that all that was confirmed is there.
    fn finish(&mut self) -> impl Future<Output = Vec<Fault>> + Send;
    /// Whether the client sends at its own pace, or takes what comes as it comes.
    fn is_paced(&self) -> bool {
        true
    }
    /// How many answers the last step brought.
    fn answers(&self) -> u64 {
        1
    }
    /// Whether the next step sends once more what has been sent before.
    fn retries(&self) -> bool {
        false
    }
}

/// When a client sends its next request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Pace {
    /// About every millisecond, and at once when an answer took longer.
    #[default]
    EachMillisecond,
    /// So long after the answer to the one before.
    Think(Duration),
}

/// What to run.
#[derive(Debug, Clone, Copy)]
pub struct LoadOptions {
    /// Where the workload listens.
    pub target: SocketAddr,
    /// What the clients do.
    pub kind: Kind,
    /// How many clients there are.
    pub clients: u32,
    /// How many requests a client of [`Kind::Pipeline`] has under way.
    pub depth: usize,
    /// How a client that sends at its own pace does so.
    pub pace: Pace,
    /// Whether each answer is noted with the time it took.
    pub samples: bool,
}

/// Counts the clients that have had an answer, or have ended without one, and the requests of each.
#[derive(Debug)]
pub struct Readiness {
    missing: AtomicU32,
    notify: Notify,
    requests: Vec<AtomicU64>,
}

impl Readiness {
    /// Nobody of `clients` is ready yet.
    pub fn new(clients: u32) -> Arc<Self> {
        let requests = (0..clients).map(|_| AtomicU64::new(0)).collect();
        Arc::new(Self { missing: AtomicU32::new(clients), notify: Notify::new(), requests })
    }

    /// How many requests each client is done with, whatever came of them.
    pub fn requests(&self) -> Vec<u64> {
        self.requests.iter().map(|requests| requests.load(Ordering::Acquire)).collect()
    }

    fn request_done(&self, client: u32) {
        if let Some(requests) = usize::try_from(client).ok().and_then(|client| self.requests.get(client)) {
            requests.fetch_add(1, Ordering::Release);
        }
    }

    fn one_more(&self) {
        if self.missing.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.notify.notify_one();
        }
    }

    /// Waits until no client is missing. For one waiter.
    pub async fn all(&self) {
        if self.missing.load(Ordering::Acquire) > 0 {
            self.notify.notified().await;
        }
    }
}

/// Runs the clients until `stop` is cancelled, or until none of them has a connection any more.
pub async fn run(options: LoadOptions, stop: CancellationToken, ready: Arc<Readiness>) -> LoadReport {
    let mut clients = JoinSet::new();
    for number in 0..options.clients {
        let (stop, ready) = (stop.clone(), Arc::clone(&ready));
        clients.spawn(async move {
            let recorder = Recorder::new(options.kind, number).with_samples(options.samples);
            let conduct = Conduct { number, pace: options.pace };
            let target = options.target;
            match options.kind {
                Kind::Catalogue => {
                    drive(catalogue::CatalogueClient::new(target, number), conduct, recorder, stop, ready).await
                }
                Kind::Cart => drive(cart::CartClient::new(target, number), conduct, recorder, stop, ready).await,
                Kind::Feed => drive(feed::FeedClient::new(target), conduct, recorder, stop, ready).await,
                Kind::Sql => drive(sql::SqlClient::new(target, number), conduct, recorder, stop, ready).await,
                Kind::Lines => {
                    drive(lines::LineClient::new(target, options.clients == 1), conduct, recorder, stop, ready).await
                }
                Kind::Bulk => drive(bulk::BulkClient::new(target, number), conduct, recorder, stop, ready).await,
                Kind::Pipeline => {
                    let client = pipeline::PipelineClient::new(target, number, options.depth);
                    drive(client, conduct, recorder, stop, ready).await
                }
                Kind::Redis => {
                    drive(redis_client::RedisClient::new(target, number), conduct, recorder, stop, ready).await
                }
            }
        });
    }
    let mut reports = clients.join_all().await;
    reports.sort_by_key(|report| report.client);
    LoadReport { clients: reports }
}

/// Tells that the client is ready once, at the first answer or when the client ends.
struct TellReady(Option<Arc<Readiness>>);

impl TellReady {
    fn tell(&mut self) {
        if let Some(ready) = self.0.take() {
            ready.one_more();
        }
    }
}

impl Drop for TellReady {
    fn drop(&mut self) {
        self.tell();
    }
}

/// How one client goes about it.
#[derive(Debug, Clone, Copy)]
struct Conduct {
    number: u32,
    pace: Pace,
}

/// Waits for the time of the next request.
struct Pacer {
    pace: Pace,
    interval: tokio::time::Interval,
}

impl Pacer {
    fn new(pace: Pace) -> Self {
        let mut interval = tokio::time::interval(PACE);
        interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self { pace, interval }
    }

    async fn wait(&mut self) {
        match self.pace {
            Pace::EachMillisecond => drop(self.interval.tick().await),
            Pace::Think(Duration::ZERO) => tokio::task::yield_now().await,
            Pace::Think(time) => tokio::time::sleep(time).await,
        }
    }
}

async fn drive<C: Client>(
    mut client: C,
    conduct: Conduct,
    mut recorder: Recorder,
    stop: CancellationToken,
    readiness: Arc<Readiness>,
) -> ClientReport {
    let mut ready = TellReady(Some(Arc::clone(&readiness)));
    let mut connected = open(&mut client, &mut recorder).await;
    let mut pacer = Pacer::new(conduct.pace);
    while connected && !stop.is_cancelled() {
        if client.is_paced() {
            pacer.wait().await;
        }
        if client.retries() {
            recorder.retried();
        }
        let asked = Instant::now();
        match answer_in_time(client.step(), &stop).await {
            Ok(()) => {
                let now = Instant::now();
                recorder.answered(now, client.answers());
                recorder.took(now, now - asked);
                ready.tell();
            }
            Err(fault) => {
                recorder.fault(&fault);
                if matches!(fault, Fault::Broken(_)) {
                    connected = open(&mut client, &mut recorder).await;
                }
            }
        }
        readiness.request_done(conduct.number);
    }
    let end = Instant::now();
    if connected {
        let late =
            || vec![Fault::Broken(format!("the final checks did not end within {} s", CHECKS_DEADLINE.as_secs()))];
        for fault in timeout(CHECKS_DEADLINE, client.finish()).await.unwrap_or_else(|_| late()) {
            recorder.fault(&fault);
        }
    }
    recorder.finish(end)
}

/// Waits for an answer as long as a move may take, but not as long once the end is wanted.
async fn answer_in_time(step: impl Future<Output = Result<(), Fault>>, stop: &CancellationToken) -> Result<(), Fault> {
    let late =
        |after: Duration, when: &str| Err(Fault::Broken(format!("no answer within {} s{when}", after.as_secs())));
    let ended = async {
        stop.cancelled().await;
        tokio::time::sleep(END_DEADLINE).await;
    };
    tokio::select! {
        answered = timeout(ANSWER_DEADLINE, step) => answered.unwrap_or_else(|_| late(ANSWER_DEADLINE, "")),
        () = ended => late(END_DEADLINE, " of the end of all moves"),
    }
}

/// Opens a connection, trying for a few seconds. A client that cannot get one at all has failed.
async fn open<C: Client>(client: &mut C, recorder: &mut Recorder) -> bool {
    let began = Instant::now();
    let mut last = Fault::Broken(format!("no connection within {} s", CONNECT_TRY.as_secs()));
    while began.elapsed() < CONNECT_DEADLINE {
        match timeout(CONNECT_TRY, client.connect()).await {
            Ok(Ok(())) => return true,
            Ok(Err(fault)) => last = fault,
            Err(_) => {}
        }
        tokio::time::sleep(CONNECT_PAUSE).await;
    }
    recorder.fault(&Fault::Wrong(format!("no connection in {} s: {last:?}", CONNECT_DEADLINE.as_secs())));
    false
}
