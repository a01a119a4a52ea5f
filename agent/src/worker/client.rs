//! The agent's side of a dump worker: starting it, following it, giving it orders.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use podferry_common::failure::{Failure, FailureCode};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::process::Command;
use tokio::sync::{Mutex, watch};
use tokio::time::{Instant, sleep, timeout};

use super::messages::{DumpJob, Order, Stage};
use super::record;

/// How long a started worker gets until it listens.
const START_TIMEOUT: Duration = Duration::from_secs(10);
/// Between two tries to connect.
const RETRY: Duration = Duration::from_millis(2);

/// What the agent knows of a worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum View {
    /// The newest it said.
    Stage(Stage),
    /// It ended without a last word.
    Lost,
}

impl View {
    /// Whether nothing comes after it.
    pub fn is_last(&self) -> bool {
        match self {
            Self::Lost => true,
            Self::Stage(stage) => stage.is_last(),
        }
    }
}

/// A connection to a worker.
#[derive(Clone, Debug)]
pub struct Worker {
    view: watch::Receiver<View>,
    orders: Arc<Mutex<OwnedWriteHalf>>,
}

impl Worker {
    /// Starts a worker and connects to it.
    ///
    /// `job_file` is where the job is written, `pages` the socket at which the caller waits for CRIU's page stream,
    /// `log` what the worker's own log is appended to.
    ///
    /// # Errors
    /// When it does not start or does not listen in time.
    pub async fn start(
        program: &Path,
        job: &DumpJob,
        job_file: PathBuf,
        pages: &Path,
        log: &Path,
    ) -> Result<Self, Failure> {
        let failed = |what: &str, error: std::io::Error| {
            Failure::new(FailureCode::Internal, format!("{what}: {error}")).in_phase("freeze")
        };
        record::store(&job_file, job).map_err(|error| failed("the dump's job cannot be written", error))?;
        let log_file = std::fs::OpenOptions::new().create(true).append(true).open(log);
        let log_file = log_file.map_err(|error| failed("the dump worker's log cannot be opened", error))?;
        let mut child = Command::new(program)
            .arg(&job_file)
            .arg(pages)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log_file)
            .spawn()
            .map_err(|error| failed(&format!("{} cannot be started", program.display()), error))?;
        let begun = Instant::now();
        loop {
            if let Ok(connection) = UnixStream::connect(&job.control).await {
                tokio::spawn(async move { child.wait().await });
                return Ok(Self::over(connection));
            }
            if let Ok(Some(status)) = child.try_wait() {
                let said = std::fs::read_to_string(log).unwrap_or_default();
                let said = said.lines().last().unwrap_or("nothing").to_owned();
                let message = format!("the dump worker ended at once ({status}); it said: {said}");
                return Err(Failure::new(FailureCode::Internal, message).in_phase("freeze"));
            }
            if begun.elapsed() > START_TIMEOUT {
                let _gone_already = child.start_kill();
                let message = "the dump worker does not listen";
                return Err(Failure::new(FailureCode::DeadlineExceeded, message).in_phase("freeze"));
            }
            sleep(RETRY).await;
        }
    }

    /// Whether anybody may have started a worker for this job.
    pub fn was_started(job_file: &Path) -> bool {
        // What cannot be looked at may be there.
        job_file.try_exists().unwrap_or(true)
    }

    /// Connects to a worker that another agent started; none when nobody listens there.
    pub async fn reconnect(control: &Path) -> Option<Self> {
        let connection = UnixStream::connect(control).await.ok()?;
        let worker = Self::over(connection);
        // The worker says at once how far it is.
        worker.until(Duration::from_secs(1), |view| *view != View::Stage(Stage::Freezing)).await;
        Some(worker)
    }

    fn over(connection: UnixStream) -> Self {
        let (read, write) = connection.into_split();
        let (sender, view) = watch::channel(View::Stage(Stage::Freezing));
        tokio::spawn(follow(read, sender));
        Self { view, orders: Arc::new(Mutex::new(write)) }
    }

    /// What the worker said last.
    pub fn view(&self) -> View {
        self.view.borrow().clone()
    }

    /// Waits until the worker has said something that fits, or its last word; gives up after `patience` with whatever
    /// it said last.
    pub async fn until(&self, patience: Duration, fits: impl Fn(&View) -> bool) -> View {
        let mut view = self.view.clone();
        let waiting = view.wait_for(|view| fits(view) || view.is_last());
        match timeout(patience, waiting).await {
            Ok(Ok(view)) => view.clone(),
            Ok(Err(_)) => View::Lost,
            Err(_) => self.view(),
        }
    }

    /// Waits until the worker has ended and with it CRIU.
    pub async fn gone(&self) {
        let mut view = self.view.clone();
        while view.changed().await.is_ok() {}
    }

    /// Gives an order. That it was carried out is for [`Worker::until`] to see; a worker that is gone shows there too.
    pub async fn order(&self, order: &Order) {
        let Ok(mut line) = serde_json::to_vec(order) else { return };
        line.push(b'\n');
        if let Err(error) = self.orders.lock().await.write_all(&line).await {
            tracing::warn!(%error, ?order, "the dump worker cannot be given an order");
        }
    }
}

async fn follow(read: OwnedReadHalf, view: watch::Sender<View>) {
    let mut lines = BufReader::new(read).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        match serde_json::from_str(&line) {
            Ok(stage) => view.send_replace(View::Stage(stage)),
            Err(error) => {
                tracing::error!(%error, line, "the dump worker said what nobody understands");
                continue;
            }
        };
    }
    if !view.borrow().is_last() {
        view.send_replace(View::Lost);
    }
}
