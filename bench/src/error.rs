//! What can go wrong in the demo and the measurements.

use std::{io, path::PathBuf, process::ExitStatus};

/// A step of the demo or of a measurement that failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The local cluster could not be made, used or removed.
    #[error(transparent)]
    Cluster(#[from] podferry_local::Error),
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
    /// An image could not be made.
    #[error("`{command}` ended with {status}; it says why above; `deploy/setup/setup.sh` installs what it needs")]
    Image {
        /// The command line.
        command: String,
        /// How it ended.
        status: ExitStatus,
    },
    /// A program that runs on the client side did not do what it should.
    #[error("the {what} against {target}: {problem}; its workload's log is in the cluster's folder")]
    Client {
        /// What it does.
        what: String,
        /// The workload's address.
        target: String,
        /// What went wrong.
        problem: String,
    },
    /// The page stream could not be measured.
    #[error(transparent)]
    Stream(#[from] crate::stream::Error),
    /// A suite of experiments cannot be used.
    #[error(transparent)]
    Suite(#[from] crate::experiments::SuiteError),
    /// Results of experiments cannot be kept.
    #[error(transparent)]
    Store(#[from] crate::experiments::StoreError),
    /// No report can be made of them.
    #[error(transparent)]
    Report(#[from] podferry_report::ReportError),
    /// Somebody asked for the end.
    #[error("interrupted")]
    Interrupted,
    /// A result could not be written as JSON.
    #[error("cannot write the result: {0}")]
    Json(#[from] serde_json::Error),
    /// The command line would not begin; its words.
    #[error("{0}")]
    Refused(String),
    /// A workload runs where it should not, or not where it should.
    #[error("{0}")]
    Misplaced(String),
}

/// Results of the demo and the measurements.
pub type Result<T, E = Error> = std::result::Result<T, E>;
