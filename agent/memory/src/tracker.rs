//! Which pages of a process were written since the last round.
//!
//! There are two ways to know, behind one trait: a userfaultfd that write-protects asynchronously ([`UserfaultfdTracker`]), and the
//! kernel's soft-dirty marks ([`SoftDirtyTracker`]). [`attach`] chooses. Where all memory is moved behind the freeze nobody has to know
//! ([`Untracked`]).

mod pagemap;
mod soft_dirty;
mod untracked;
mod userfaultfd;

use std::fmt;
use std::io;

use nix::unistd::Pid;
use thiserror::Error;

use crate::hazard::{self, Hazard};
use crate::inject::InjectError;
use crate::range::{PageRange, PageRanges};

pub use soft_dirty::SoftDirtyTracker;
pub use untracked::Untracked;
pub use userfaultfd::UserfaultfdTracker;

/// Why a process's writes cannot be followed, or not any more.
#[derive(Debug, Error)]
pub enum TrackError {
    /// There is no userfaultfd of it.
    #[error(transparent)]
    Inject(#[from] InjectError),
    /// The kernel's userfaultfd cannot do what is needed.
    #[error(
        "process {process}: the kernel does not follow writes asynchronously: {source}; it needs Linux 6.7 or newer with \
         CONFIG_PTE_MARKER_UFFD_WP"
    )]
    NoAsynchronousProtection {
        /// The process.
        process: Pid,
        /// What the kernel said.
        source: io::Error,
    },
    /// Moves of its mappings cannot be read.
    #[error("process {process}: cannot read the moves of its mappings: {source}")]
    Moves {
        /// The process.
        process: Pid,
        /// What the system said.
        source: io::Error,
    },
    /// A file of `/proc` cannot be read.
    #[error("process {process}: cannot read {file}: {source}")]
    Proc {
        /// The process.
        process: Pid,
        /// Which file of its folder.
        file: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel refused to register memory.
    #[error("process {process}: cannot follow writes to {range}: {source}")]
    Register {
        /// The process.
        process: Pid,
        /// Which addresses.
        range: PageRange,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel refused to look for written pages.
    #[error("process {process}: cannot look for written pages in {range}: {source}; this needs Linux 6.7 or newer")]
    Scan {
        /// The process.
        process: Pid,
        /// Which addresses.
        range: PageRange,
        /// What the kernel said.
        source: io::Error,
    },
    /// It has something that may write to its memory without a mark.
    #[error("{0}; its memory is moved while it stands still")]
    Hazard(Hazard),
    /// It runs another program, with other memory (execve(2)).
    #[error(
        "process {process} runs another program now: what was read of its memory is of no use, it has to be followed anew"
    )]
    Replaced {
        /// The process.
        process: Pid,
    },
    /// Somebody else follows its memory.
    #[error(
        "process {process}: writes to its memory are followed already, because it shares its memory with a process that is followed \
         (vfork, CLONE_VM), or because it uses userfaultfd itself; its memory is moved while it stands still"
    )]
    Shared {
        /// The process.
        process: Pid,
    },
    /// It has no memory: it has ended, or is just about to run another program.
    #[error("process {process} has ended, or is about to run another program: it has no memory")]
    Ended {
        /// The process.
        process: Pid,
    },
    /// The kernel makes no soft-dirty marks.
    #[error("the kernel makes no soft-dirty marks; it needs CONFIG_MEM_SOFT_DIRTY")]
    NoSoftDirty,
}

impl TrackError {
    /// Whether only the following of this process has ended. The migration goes on without: its memory is left to CRIU, unless it can
    /// be followed anew ([`attach`] says so).
    pub fn is_end_of_following(&self) -> bool {
        matches!(self, Self::Hazard(_) | Self::Replaced { .. } | Self::Shared { .. } | Self::Ended { .. })
    }

    fn of_file(process: Pid, file: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| match source.raw_os_error() {
            Some(libc::ENOENT | libc::ESRCH) => Self::Ended { process },
            _ => Self::Proc { process, file, source },
        }
    }
}

/// What a frozen process has in some ranges.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Frozen {
    /// All pages that hold something. Every other page of the ranges is zero.
    pub existing: PageRanges,
    /// Those that were written since the last round.
    pub written: PageRanges,
}

/// Follows the writes of one process.
pub trait WriteTracker: fmt::Debug {
    /// The process.
    fn process(&self) -> Pid;

    /// Which tracker this is, and why.
    fn choice(&self) -> &Choice;

    /// Begins a round: gives the pages that pre-copy moves and that were written since the last one, all existing ones the
    /// first time, and follows writes to them from now on.
    ///
    /// Read the pages after this call: a page that is written meanwhile is told again in the next round. After an error, drop the
    /// tracker; where [`TrackError::is_end_of_following`] says so, [`attach`] may give a new one, for a migration of this process's
    /// memory from the beginning.
    fn round(&mut self) -> Result<PageRanges, TrackError>;

    /// Tells these pages again, in the next round or in the last, if they are there then: they could not be read, because the
    /// process was changing its mappings.
    fn tell_again(&mut self, pages: &PageRanges);

    /// What the frozen process has in these ranges, and what of it was written since the last round. If it runs another program
    /// since then, all of it.
    ///
    /// The process must not run: all threads stopped, and no kernel work under way that writes to its memory. After this, only
    /// [`Self::round`] tells moves again that happened before.
    fn frozen(&mut self, ranges: &PageRanges) -> Result<Frozen, TrackError>;
}

/// Which tracker follows a process, and why that one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The tracker's name.
    pub tracker: &'static str,
    /// Why.
    pub reason: String,
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "writes are followed by {}: {}", self.tracker, self.reason)
    }
}

/// Why no tracker can follow a process. Its memory is left to CRIU.
#[derive(Debug, Error)]
pub enum NotFollowed {
    /// Something about the process, for which another tracker would be no better.
    #[error(transparent)]
    Process(#[from] TrackError),
    /// Neither of the two.
    #[error("{userfaultfd}; and not in the other way either: {soft_dirty}")]
    Neither {
        /// Why there is no userfaultfd.
        userfaultfd: TrackError,
        /// Why there are no soft-dirty marks.
        soft_dirty: TrackError,
    },
}

/// Which tracker is wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preference {
    /// The best that kernel and process allow.
    #[default]
    Auto,
    /// The userfaultfd, or none.
    Userfaultfd,
    /// Soft-dirty marks, or none. No thread of the process is stopped for them, and nothing is called in it.
    SoftDirty,
}

/// What follows writes on this kernel in the way that is wanted; `None` when it has nothing for that. No process is touched.
pub fn of_kernel(preference: Preference) -> Option<&'static str> {
    let userfaultfd = || UserfaultfdTracker::try_kernel().is_ok().then_some(userfaultfd::NAME);
    let soft_dirty = || SoftDirtyTracker::try_kernel().unwrap_or(false).then_some(soft_dirty::NAME);
    match preference {
        Preference::Auto => userfaultfd().or_else(soft_dirty),
        Preference::Userfaultfd => userfaultfd(),
        Preference::SoftDirty => soft_dirty(),
    }
}

/// Begins to follow a process in the best way that kernel and process allow.
pub fn attach(process: Pid) -> Result<Box<dyn WriteTracker + Send>, NotFollowed> {
    attach_as(process, Preference::Auto)
}

/// Begins to follow a process in the way that is wanted.
pub fn attach_as(process: Pid, preference: Preference) -> Result<Box<dyn WriteTracker + Send>, NotFollowed> {
    // Before any of its threads is stopped for it.
    refuse_hazards(process)?;
    if preference == Preference::SoftDirty {
        return Ok(Box::new(SoftDirtyTracker::attach(process, "they are asked for".to_owned())?));
    }
    let fall_back = |error: &TrackError| preference == Preference::Auto && may_have_soft_dirty(error);
    match UserfaultfdTracker::attach(process) {
        Ok(tracker) => Ok(Box::new(tracker)),
        Err(error) if fall_back(&error) => match SoftDirtyTracker::attach(process, error.to_string()) {
            Ok(tracker) => Ok(Box::new(tracker)),
            Err(soft_dirty) => Err(NotFollowed::Neither { userfaultfd: error, soft_dirty }),
        },
        Err(error) => Err(NotFollowed::Process(error)),
    }
}

/// Whether soft-dirty marks may do where this was the end of the userfaultfd: what the kernel cannot, or what this process forbids.
/// Who shares memory must not have its marks cleared twice. Who has ended or is about to run another program has none, and what cannot
/// be traced cannot be dumped.
fn may_have_soft_dirty(error: &TrackError) -> bool {
    match error {
        TrackError::Inject(error) => !matches!(error, InjectError::NotStopping { .. } | InjectError::Step { .. }),
        TrackError::NoAsynchronousProtection { .. } => true,
        _ => false,
    }
}

fn refuse_hazards(process: Pid) -> Result<(), TrackError> {
    match hazard::of(process).map_err(TrackError::of_file(process, "maps, status or fdinfo"))? {
        Some(hazard) => Err(TrackError::Hazard(hazard)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn soft_dirty_is_for_what_the_kernel_lacks_or_a_process_forbids() {
        let process = Pid::from_raw(12);
        let source = || io::Error::from_raw_os_error(libc::EINVAL);
        for error in [
            TrackError::NoAsynchronousProtection { process, source: source() },
            TrackError::Inject(InjectError::Seccomp { process }),
            TrackError::Inject(InjectError::Refused { process, source: source() }),
            TrackError::Inject(InjectError::Architecture { process }),
        ] {
            assert!(may_have_soft_dirty(&error), "{error}");
        }
        for error in [TrackError::Shared { process }, TrackError::Ended { process }, TrackError::Replaced { process }] {
            assert!(!may_have_soft_dirty(&error) && error.is_end_of_following(), "{error}");
        }
    }

    #[test]
    fn a_choice_says_why() {
        let choice = Choice { tracker: "soft-dirty marks", reason: "process 12 has a seccomp filter".to_owned() };
        assert_eq!(choice.to_string(), "writes are followed by soft-dirty marks: process 12 has a seccomp filter");
    }
}
