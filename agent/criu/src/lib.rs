//! Driving CRIU: its RPC with the notify callbacks, its page stream, its page images, its log.
//!
//! What is here knows processes and images, nothing of containers, networks or migrations.
//!
//! - [`Session`] is one `criu swrk` and the conversation with it. A caller that answers a notification with
//!   [`Verdict::GiveUp`] makes CRIU fail the dump by itself and resume the tasks: a CRIU that holds tasks is told to
//!   fail, never killed.
//! - [`page_stream::receive`] takes the memory pages from CRIU's page-server client, so that they need not be written
//!   anywhere on the source; [`PageSetWriter`] lays them down on the target as the images that `criu restore` reads.
//! - [`rseq_areas`] says where the kernel writes to a dumped process's memory by itself.
//! - [`ImageGate`] lets a restore be started before its images are there.
//! - [`CriuLog`] finds the line that says why CRIU failed, and what to do about it.
//! - [`Criu::probe`] says which CRIU this is and what the kernel lacks for it, [`Criu::features`] what both can do together.

mod core_image;
mod dump;
mod error;
mod gate;
mod log;
mod page_set;
pub mod page_stream;
mod probe;
mod session;

pub use core_image::{RseqArea, rseq_areas};
pub use dump::{CgroupsMode, DumpRequest, GHOST_LIMIT};
pub use error::CriuError;
pub use gate::ImageGate;
pub use log::{CriuFailure, CriuLog};
pub use page_set::PageSetWriter;
pub use page_stream::{Owner, PageSink, Run};
pub use probe::{Criu, CriuCapabilities, CriuVersion, OLDEST_CRIU};
pub use session::{Notification, Session, Verdict};

/// Bytes in a page of memory on the architectures that podferry runs on.
pub const PAGE_SIZE: usize = 4096;

/// Flags of a run of pages, as in CRIU's `pagemap.proto`.
pub mod page_flags {
    /// The pages are in a parent image.
    pub const PARENT: u32 = 1;
    /// The pages may be restored after the task runs.
    pub const LAZY: u32 = 2;
    /// The pages' contents are in this image.
    pub const PRESENT: u32 = 4;
}
