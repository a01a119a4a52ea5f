//! What can go wrong while a local cluster is made, used or removed.

use std::io;
use std::path::{Path, PathBuf};

/// A step of the local cluster that failed: what, where, why and what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file operation failed.
    #[error("cannot {action} {}: {source}", path.display())]
    File {
        /// What was tried, as a verb: `read`, `create the folder`.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A program could not be started at all.
    #[error("cannot start `{command}`: {source}")]
    Start {
        /// The whole command line.
        command: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A program ran and failed.
    #[error("`{command}` ended with {status}: {stderr}")]
    Command {
        /// The whole command line.
        command: String,
        /// Exit code or signal.
        status: String,
        /// What it wrote to standard error (and output, when there was nothing else), trimmed.
        stderr: String,
    },
    /// A program did not end in time and was killed.
    #[error("`{command}` did not end within {seconds} s and was killed")]
    Timeout {
        /// The whole command line.
        command: String,
        /// The deadline in seconds.
        seconds: u64,
    },
    /// Options or arguments that cannot work.
    #[error("{0}")]
    Invalid(String),
    /// The folder already holds a cluster.
    #[error(
        "{} already holds a cluster: take it down first (LocalCluster::sweep does it for one whose creator was killed)",
        folder.display()
    )]
    AlreadyUp {
        /// The cluster's folder.
        folder: PathBuf,
    },
    /// The folder holds no cluster.
    #[error("{} holds no cluster: there is no {}; bring one up first", folder.display(), crate::state::FILE_NAME)]
    NotUp {
        /// The cluster's folder.
        folder: PathBuf,
    },
    /// A program that the cluster needs is not there.
    #[error("{} is missing: {hint}", path.display())]
    MissingProgram {
        /// Where it was looked for.
        path: PathBuf,
        /// How to get it.
        hint: &'static str,
    },
    /// A daemon ended or did not listen in time.
    #[error("{what} did not become ready: {reason}; the end of {}:\n{tail}", log.display())]
    NotReady {
        /// Which daemon.
        what: String,
        /// Ended, or the deadline passed.
        reason: String,
        /// Its log file.
        log: PathBuf,
        /// The last lines of the log.
        tail: String,
    },
    /// No node has this name.
    #[error("there is no node {name:?} in this cluster; it has {known}")]
    UnknownNode {
        /// The name asked for.
        name: String,
        /// The names that exist, comma separated.
        known: String,
    },
    /// A daemon that should run does not.
    #[error("{what} is not running; start it first")]
    NotRunning {
        /// Which daemon.
        what: String,
    },
    /// A document could not be written or read (state file, configuration, OCI specification).
    #[error("{what} is not valid: {reason}")]
    Document {
        /// Which document.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Something of the cluster did not go away.
    #[error("left behind after {seconds} s: {what}")]
    LeftBehind {
        /// What is still there.
        what: String,
        /// How long it was tried, in seconds.
        seconds: u64,
    },
    /// Something that had to come did not.
    #[error("waited {seconds} s in vain for {what}")]
    Waited {
        /// What did not come.
        what: String,
        /// How long it was waited for, in seconds.
        seconds: u64,
    },
    /// The coordinator would not begin a migration.
    #[error("the migration was refused: {words}")]
    Refused {
        /// What its log says.
        words: String,
    },
    /// A client of a workload could not talk to it, or was answered wrongly.
    #[error("{what}: {source}")]
    Client {
        /// What it asked.
        what: String,
        /// What came of it.
        source: io::Error,
    },
}

/// Results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Adds the path and the verb to an I/O error.
pub(crate) trait FileContext<T> {
    /// Names the action and the path of a failed file operation.
    fn at(self, action: &'static str, path: &Path) -> Result<T>;
}

impl<T, E: Into<io::Error>> FileContext<T> for std::result::Result<T, E> {
    fn at(self, action: &'static str, path: &Path) -> Result<T> {
        self.map_err(|source| Error::File { action, path: path.to_owned(), source: source.into() })
    }
}
