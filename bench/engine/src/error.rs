//! What can go wrong.

use std::io;
use std::path::{Path, PathBuf};

use podferry_criu::{CriuError, CriuFailure};
use podferry_memory::handover::HandoverError;
use podferry_memory::maps::MovedError;
use podferry_memory::pager::PagerError;
use podferry_memory::store::StoreError;
use podferry_memory::tracker::{NotFollowed, TrackError};

/// A step of a migration or a measurement that failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file operation failed.
    #[error("cannot {action} {}: {source}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A program did not do what it should.
    #[error("{program}: {problem}")]
    Program {
        /// Its name.
        program: &'static str,
        /// What went wrong.
        problem: String,
    },
    /// CRIU failed.
    #[error(transparent)]
    Criu(#[from] CriuError),
    /// A restore failed.
    #[error("criu restore failed: {0}")]
    Restore(CriuFailure),
    /// Writes cannot be followed any more.
    #[error(transparent)]
    Track(#[from] TrackError),
    /// Writes cannot be followed.
    #[error(transparent)]
    NotFollowed(#[from] NotFollowed),
    /// Pages cannot be kept.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Pages cannot be read.
    #[error("cannot read the memory of the process: {0}")]
    Copy(#[from] io::Error),
    /// Pages cannot be laid in.
    #[error(transparent)]
    Pager(#[from] PagerError),
    /// Pages cannot be handed over.
    #[error(transparent)]
    Handover(#[from] HandoverError),
    /// A kept page is not what the frozen process has there.
    #[error("process {pid}: the page {page} was kept with other contents")]
    Different {
        /// The process.
        pid: i32,
        /// Where.
        page: String,
    },
    /// The frozen process has something where hidden memory was that cannot be moved this way.
    #[error(transparent)]
    Moved(#[from] MovedError),
    /// A page that exists was not kept.
    #[error("process {pid}: the page at {range} exists and was not copied")]
    Lost {
        /// The process.
        pid: i32,
        /// Where.
        range: String,
    },
}

/// Results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of a file operation.
pub fn file(action: &'static str, path: &Path) -> impl Fn(io::Error) -> Error {
    move |source| Error::File { action, path: path.to_owned(), source }
}
