//! What can go wrong, and what is too much for this program.

use std::io;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

/// The result of everything in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a tree was not packed or unpacked here.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The tree, or the archive's member, is for the real tar.
    #[error("{} {why}", .path.display())]
    NotSimple {
        /// Where it is, from the root of the tree.
        path: PathBuf,
        /// What is the matter with it; it follows the path.
        why: &'static str,
    },
    /// The archive is none that this program understands.
    #[error("the archive {why}")]
    Archive {
        /// What is the matter with it.
        why: &'static str,
    },
    /// The archive cannot be decompressed.
    #[error("the archive cannot be decompressed")]
    Compression(#[source] io::Error),
    /// A system call failed.
    #[error("cannot {doing} {}", .path.display())]
    Io {
        /// The operation, as a verb that the path follows.
        doing: &'static str,
        /// What it was done to.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The archive could not be written to standard output; a part of it may be there.
    #[error("cannot write the archive (free space where the images are stored)")]
    Output(#[source] io::Error),
    /// Something is for the real tar, and there is none.
    #[error("no tar on PATH but this program itself: install GNU tar, or add its folder to PATH")]
    NoRealTar(#[source] Option<io::Error>),
}

/// Turns a failed system call into the error that names it.
pub(crate) fn failed(doing: &'static str, path: &Path) -> impl FnOnce(Errno) -> Error {
    move |errno| Error::Io { doing, path: path.to_owned(), source: errno.into() }
}

/// The error for what is left to the real tar.
pub(crate) fn not_simple(path: &Path, why: &'static str) -> Error {
    Error::NotSimple { path: path.to_owned(), why }
}
