//! A wrapper that waits for the agent's word, and runs runc for it.

use std::fmt;
use std::io;
use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use podferry_common::MigrationId;
use podferry_runtime::wrapper::{Hello, Order, Report};
use podferry_runtime::{Invocation, Launched, Launcher};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::runtime::Handle;

use super::Door;

/// How long a wrapper gets to start runc.
const START_TIMEOUT: Duration = Duration::from_secs(5);
/// The longest report, in bytes.
const MOST_REPORT: u64 = 64 << 10;

/// The wrapper, seen from here.
pub struct Visitor {
    /// Who it is.
    pub hello: Hello,
    voice: tokio::sync::Mutex<OwnedWriteHalf>,
    seen: Arc<Seen>,
}

/// What became of the last order.
#[derive(Debug, Default)]
struct Seen {
    state: Mutex<Stage>,
    changed: Condvar,
}

/// How far it is.
#[derive(Debug, Clone, Default)]
enum Stage {
    /// It waits, or has been given an order that it has not answered.
    #[default]
    Waiting,
    /// runc runs, with this pid.
    Runs(u32),
    /// runc does not.
    NotStarted(String),
    /// runc has ended.
    Ended(ExitStatus),
    /// The wrapper is not there any more.
    Gone,
}

impl Visitor {
    pub(super) fn new(hello: Hello, voice: OwnedWriteHalf) -> Self {
        Self { hello, voice: tokio::sync::Mutex::new(voice), seen: Arc::default() }
    }

    pub(super) fn door(&self) -> Door {
        Door { uid: self.hello.uid.clone(), container: self.hello.container.clone() }
    }

    pub(super) fn is_of(&self, migration: MigrationId) -> bool {
        self.hello.migration.parse() == Ok(migration)
    }

    /// Whether it waits here still.
    pub fn is_there(&self) -> bool {
        !matches!(self.seen.stage(), Stage::Gone)
    }

    /// Tells the shim that there will be no container, and why.
    pub async fn fail(&self, message: &str) {
        self.order(&Order::Fail { message: message.to_owned() }).await;
    }

    pub(super) async fn order(&self, order: &Order) {
        if let Err(error) = self.say(order).await {
            tracing::debug!(%error, pod = self.hello.pod, "a wrapper is gone");
            self.seen.set(Stage::Gone);
        }
    }

    async fn say(&self, order: &Order) -> io::Result<()> {
        let mut line = serde_json::to_vec(order)?;
        line.push(b'\n');
        self.voice.lock().await.write_all(&line).await
    }

    /// Takes down what it reports, until it goes.
    pub(super) async fn listen(&self, mut lines: BufReader<OwnedReadHalf>) {
        let mut line = Vec::new();
        loop {
            line.clear();
            match (&mut lines).take(MOST_REPORT).read_until(b'\n', &mut line).await {
                Ok(count) if count > 0 => {}
                _ => break,
            }
            match serde_json::from_slice(&line) {
                Ok(report) => self.seen.set(Stage::of(report)),
                Err(error) => {
                    tracing::error!(%error, pod = self.hello.pod, "a wrapper says what nobody understands");
                    break;
                }
            }
        }
        // How runc ended stays true.
        if !matches!(self.seen.stage(), Stage::Ended(_) | Stage::NotStarted(_)) {
            self.seen.set(Stage::Gone);
        }
    }

    /// What starts runc there.
    pub fn launcher(self: &Arc<Self>) -> Arc<dyn Launcher> {
        Arc::new(ThroughWrapper { visitor: Arc::clone(self), runtime: Handle::current() })
    }
}

impl fmt::Debug for Visitor {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Visitor").field("hello", &self.hello).field("seen", &self.seen).finish_non_exhaustive()
    }
}

impl Stage {
    fn of(report: Report) -> Self {
        match report {
            Report::Started { pid } => Self::Runs(pid),
            Report::NotStarted { message } => Self::NotStarted(message),
            Report::Exited { status } => Self::Ended(ExitStatus::from_raw(status)),
        }
    }
}

impl Seen {
    fn stage(&self) -> Stage {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, stage: Stage) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = stage;
        self.changed.notify_all();
    }

    /// The stage behind waiting; that, when none comes.
    fn wait(&self, patience: Duration) -> Stage {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let waits = |stage: &mut Stage| matches!(stage, Stage::Waiting);
        let waited = self.changed.wait_timeout_while(state, patience, waits);
        waited.unwrap_or_else(PoisonError::into_inner).0.clone()
    }
}

/// Starts runc by the wrapper.
#[derive(Debug)]
struct ThroughWrapper {
    visitor: Arc<Visitor>,
    runtime: Handle,
}

impl Launcher for ThroughWrapper {
    fn launch(&self, invocation: Invocation) -> io::Result<Box<dyn Launched>> {
        let order = Order::restore(invocation).map_err(io::Error::other)?;
        let seen = Arc::clone(&self.visitor.seen);
        match seen.stage() {
            Stage::Gone => return Err(gone()),
            Stage::Runs(pid) => return Err(io::Error::other(format!("runc (pid {pid}) runs there already"))),
            Stage::Waiting | Stage::NotStarted(_) | Stage::Ended(_) => seen.set(Stage::Waiting),
        }
        self.runtime.block_on(self.visitor.order(&order));
        match seen.wait(START_TIMEOUT) {
            Stage::Runs(pid) => Ok(Box::new(ByWrapper { pid, seen })),
            Stage::NotStarted(message) => Err(io::Error::other(message)),
            // It was too quick for both messages to be seen.
            Stage::Ended(_) => Ok(Box::new(ByWrapper { pid: 0, seen })),
            Stage::Gone => Err(gone()),
            Stage::Waiting => Err(io::Error::new(io::ErrorKind::TimedOut, "podferry-runtime does not start runc")),
        }
    }
}

fn gone() -> io::Error {
    io::Error::new(
        io::ErrorKind::BrokenPipe,
        "podferry-runtime, which the shim has started, is gone: the kubelet gave the pod's container up (after its \
         runtimeRequestTimeout?), or was restarted",
    )
}

/// A runc that the wrapper has started.
#[derive(Debug)]
struct ByWrapper {
    pid: u32,
    seen: Arc<Seen>,
}

impl Launched for ByWrapper {
    fn pid(&self) -> u32 {
        self.pid
    }

    fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        match self.seen.stage() {
            Stage::Ended(status) => Ok(Some(status)),
            Stage::Gone => Err(gone()),
            Stage::NotStarted(message) => Err(io::Error::other(message)),
            Stage::Waiting | Stage::Runs(_) => Ok(None),
        }
    }
}
