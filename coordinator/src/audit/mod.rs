//! The audit log: who asked for what, whether that was allowed and why, and what became of migrations.
//!
//! `docs/operations.md` describes the lines. The store's record decides what is true of a migration; this log is for those
//! who ask afterwards who has done what. One thread writes. It takes all that has come meanwhile at once, so that many
//! requests share one wait for the disk.

mod entry;
mod file;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::Timestamp;
use podferry_common::identity::Peer;
use podferry_common::{Failure, FailureCode};
use thiserror::Error;
use tokio::sync::{mpsc, oneshot};

use crate::access::{Action, Denial, Grounds};
use crate::metrics::Metrics;
use crate::store::Record;
use entry::{Entry, Line, MigrationEntry, RequestEntry};
use file::LogFile;

pub use entry::What;
pub use file::Bounds;

/// Entries that are written at once, at most.
const BATCH: usize = 256;

/// Why the log cannot be written.
#[derive(Clone, Debug, Error)]
pub enum AuditError {
    /// It cannot be opened.
    #[error("cannot open the audit log {}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: Arc<io::Error>,
    },
    /// Something could not be added to it.
    #[error("cannot write to the audit log {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: Arc<io::Error>,
    },
    /// The thread that writes is gone: a fault of the coordinator's own code.
    #[error("nobody writes the audit log any more")]
    Gone,
}

impl From<AuditError> for Failure {
    fn from(error: AuditError) -> Self {
        let remedy = "see that the coordinator can write its audit log: without it nothing is changed";
        Self::from_error(FailureCode::Unavailable, &error).remedy(remedy)
    }
}

/// The log. Clones share it.
#[derive(Clone)]
pub struct AuditLog {
    items: mpsc::UnboundedSender<Item>,
}

/// What is to be written.
struct Item {
    line: Vec<u8>,
    /// It has to be on the disk before it counts as written.
    durable: bool,
    /// Who waits for that.
    done: Option<oneshot::Sender<Result<(), AuditError>>>,
}

impl AuditLog {
    /// Opens the log, or makes it with mode 0600, and begins to write. What cannot be written is counted.
    ///
    /// # Errors
    /// When the file cannot be opened, or no thread can be started.
    pub fn open(path: &Path, bounds: Bounds, metrics: Metrics) -> Result<Self, AuditError> {
        let failed = |source| AuditError::Open { path: path.to_owned(), source: Arc::new(source) };
        let file = LogFile::open(path, bounds).map_err(failed)?;
        let (items, queue) = mpsc::unbounded_channel();
        let path = path.to_owned();
        let writer = std::thread::Builder::new().name("audit".to_owned());
        writer.spawn(move || write(queue, file, &path, &metrics)).map_err(failed)?;
        Ok(Self { items })
    }

    /// Writes down how a request was decided. What changes something, and what is denied, is on the disk on return; the
    /// rest is in the file.
    pub async fn request(
        &self,
        peer: Option<&Peer>,
        action: &Action<'_>,
        decided: &Result<Grounds, Denial>,
    ) -> Result<(), AuditError> {
        let durable = decided.is_err() || action.verb.changes_something();
        // Whoever asks waits for the writing: so nobody's requests make the queue grow.
        self.written(&Entry::Request(RequestEntry::new(peer, action, decided)), durable).await
    }

    /// Writes down that a migration was not begun.
    pub async fn refused(&self, workload: &str, target: &str, who: &Peer, why: &Failure) -> Result<(), AuditError> {
        self.written(&Entry::Migration(MigrationEntry::refused(workload, target, who, why)), true).await
    }

    /// Writes down that a migration begins.
    pub async fn accepted(&self, record: &Record) -> Result<(), AuditError> {
        self.written(&Entry::Migration(MigrationEntry::of(What::Accepted, record)), true).await
    }

    /// Writes down what became of a migration, soon. Nobody waits: a workload may be standing still.
    pub fn migration(&self, what: What, record: &Record) {
        let line = line(&Entry::Migration(MigrationEntry::of(what, record)));
        // Between these and the end the disk is for those whose writes the workload waits for: the end's line syncs them.
        let durable = !matches!(what, What::Committed | What::RollingBack);
        let _gone_with_its_own_word = self.items.send(Item { line, durable, done: None });
    }

    /// Waits until all that was handed over before is on the disk, or could not be written.
    pub async fn flush(&self) {
        let _said_by_the_writer = self.hand_over(Vec::new(), true).await;
    }

    async fn written(&self, entry: &Entry<'_>, durable: bool) -> Result<(), AuditError> {
        self.hand_over(line(entry), durable).await
    }

    async fn hand_over(&self, line: Vec<u8>, durable: bool) -> Result<(), AuditError> {
        let (done, written) = oneshot::channel();
        self.items.send(Item { line, durable, done: Some(done) }).map_err(|_| AuditError::Gone)?;
        written.await.unwrap_or(Err(AuditError::Gone))
    }
}

fn line(entry: &Entry<'_>) -> Vec<u8> {
    let mut line = serde_json::to_vec(&Line { at: Timestamp::now(), entry }).unwrap_or_default();
    line.push(b'\n');
    line
}

/// The thread that writes, until nobody can hand over anything any more.
fn write(mut queue: mpsc::UnboundedReceiver<Item>, mut file: LogFile, path: &Path, metrics: &Metrics) {
    while let Some(first) = queue.blocking_recv() {
        let mut batch = vec![first];
        while batch.len() < BATCH
            && let Ok(item) = queue.try_recv()
        {
            batch.push(item);
        }
        let written = write_batch(&mut file, &batch).map_err(|source| {
            tracing::error!(file = %path.display(), entries = batch.len(), error = %source, "the audit log cannot be written");
            metrics.unwritten();
            AuditError::Write { path: path.to_owned(), source: Arc::new(source) }
        });
        for done in batch.into_iter().filter_map(|item| item.done) {
            // Who asked may have gone.
            let _gone = done.send(written.clone());
        }
    }
}

fn write_batch(file: &mut LogFile, batch: &[Item]) -> io::Result<()> {
    let lines: Vec<u8> = batch.iter().flat_map(|item| item.line.iter().copied()).collect();
    if !lines.is_empty() {
        file.append(&lines)?;
    }
    if batch.iter().any(|item| item.durable) { file.sync() } else { Ok(()) }
}
