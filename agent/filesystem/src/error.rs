//! What can go wrong with a layer, and what to do about it.

use std::io;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

/// The result of everything in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a layer was not read, written or mounted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The root directory is no overlay mount, so there is no upper directory that is the container's alone.
    #[error(
        "{} is not an overlay mount: what the container wrote cannot be told from its image; \
         mount its root as an overlay, or move its files another way", .rootfs.display()
    )]
    NotAnOverlay {
        /// The container's root directory.
        rootfs: PathBuf,
    },
    /// The overlay's mount options do not lead to its directories.
    #[error("the overlay mounted on {} cannot be understood: {why}", .rootfs.display())]
    MountOptions {
        /// The container's root directory.
        rootfs: PathBuf,
        /// Which option, and what is wrong with it.
        why: String,
    },
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
    /// The file system that receives the layer is full, or its quota is used up.
    #[error("no space left for {} (free some on that file system, or choose another target)", .path.display())]
    NoSpace {
        /// The file that did not fit.
        path: PathBuf,
        /// The system's answer: `ENOSPC` or `EDQUOT`.
        source: io::Error,
    },
    /// The layer's stream broke: the writer or reader that the caller gave failed.
    #[error("the layer's stream broke off")]
    Stream(#[source] io::Error),
    /// The source's layer holds something that cannot be moved.
    #[error("{} cannot be moved: {why}", .path.display())]
    Unsupported {
        /// Where it is, from the container's root.
        path: PathBuf,
        /// What it is, and what to do.
        why: &'static str,
    },
    /// The stream says something an honest source never says. The target must discard what it has unpacked.
    #[error("the layer's stream is refused at {path:?}: {why}")]
    Refused {
        /// The entry's path as it was sent, made printable.
        path: String,
        /// The rule it breaks.
        why: &'static str,
    },
    /// The layer is larger than the receiver, or the format, allows.
    #[error("the layer is too large at {path:?}: more than {limit} {what}")]
    Limit {
        /// The entry at which the limit was reached.
        path: String,
        /// What was counted, with its unit.
        what: &'static str,
        /// The limit.
        limit: u64,
    },
    /// A layer is unpacked into an empty directory only.
    #[error("{} is not empty: a layer is unpacked into an empty directory (wipe it first)", .dir.display())]
    NotEmpty {
        /// The directory.
        dir: PathBuf,
    },
    /// Something is mounted below a directory that should be deleted: deleting would empty what is mounted there.
    #[error("{} is mounted, and nothing below a mount is deleted: unmount it first", .path.display())]
    Mounted {
        /// The mount point.
        path: PathBuf,
    },
}

/// Turns a failed system call into the error that names it; a full file system has its own.
pub(crate) fn failed(doing: &'static str, path: &Path) -> impl FnOnce(Errno) -> Error {
    move |errno| match errno {
        Errno::NOSPC | Errno::DQUOT => Error::NoSpace { path: path.to_owned(), source: errno.into() },
        errno => Error::Io { doing, path: path.to_owned(), source: errno.into() },
    }
}

/// The refusal of an entry by the path it was sent with.
pub(crate) fn refused(path: &[u8], why: &'static str) -> Error {
    Error::Refused { path: printable(path), why }
}

/// The refusal of an entry that is larger than allowed.
pub(crate) fn beyond(path: &[u8], what: &'static str, limit: u64) -> Error {
    Error::Limit { path: printable(path), what, limit }
}

/// A path for a message: as text, and short enough for one line of a log.
fn printable(path: &[u8]) -> String {
    const LONGEST: usize = 256;
    String::from_utf8_lossy(&path[..path.len().min(LONGEST)]).into_owned()
}
