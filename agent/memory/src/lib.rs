//! Memory of running processes: which pages change, what they hold, and how they get into another process.
//!
//! Pre-copy repeats one step while the process runs: ask a [`tracker`] which pages were written since it was last asked,
//! and read those with a [`copier::Copier`]. [`convergence`] says when to stop. Everything is told as [`range::PageRange`]s of the
//! process's addresses. Which mappings can be handled that way, [`maps`] decides, and which processes, [`hazard`]; what cannot is
//! left to CRIU, which dumps it while the process is frozen. Whether two nodes have the same memory in the end, [`digest`] finds out,
//! and whether a file is in anybody's memory to be written to, [`writers`].
//!
//! Only the modules of `sys` have `unsafe` code.

mod bitmap;
pub mod convergence;
pub mod copier;
pub mod digest;
pub mod fetch;
pub mod flags;
pub mod handover;
pub mod hazard;
pub mod hide;
pub mod inject;
pub mod maps;
mod moves;
pub mod pager;
pub mod parallel;
mod pending;
pub mod previous;
pub mod range;
pub mod shared;
pub mod store;
mod sys;
pub mod tracker;
pub mod writers;

/// Bytes of a page, of the only size that podferry moves.
pub const PAGE_SIZE: u64 = 4096;
