//! The pager: a process of its own that lays memory in behind the processes of a restored container.
//!
//! When the last holder of a userfaultfd closes it, the kernel gives zeros for what is missing, silently. So the pager outlives the
//! agent, and there are two of them: the second takes over when the first is gone, and starts another second. How that goes
//! without losing anything is in [`podferry_memory::pager`].
//!
//! ```text
//!  agent ──starts, listener──▶ first ──starts, link──▶ second
//!    └───looks at status file ◀──┘ writes                └─ becomes the first
//!
//!  Starting ─▶ Waiting ─▶ Serving ─▶ Filling ─▶ Done
//!                 └──────────┴─▶ Failed  └─────▶ Lost
//! ```
//!
//! - [`client::start`] before the restore is begun, with the socket that CRIU connects to already listening.
//! - Until the restore is complete nothing is given up: after `Failed` the same handover can be restored again.
//! - [`client::wait_filled`] for as long as the container's memory is on its way, also by an agent that was started later. It is
//!   also what ends the container when both holders were killed at the same moment: nobody else is left to do so.

pub mod client;
pub mod ending;
pub mod messages;
pub mod run;
