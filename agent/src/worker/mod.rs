//! The dump worker: a process of its own that keeps one CRIU and its frozen tasks.
//!
//! CRIU asks whoever started it what to do when the dump is complete, and takes a lost asker for a no. If that were the
//! agent, an agent killed after the migration was sealed would thaw a source whose target may already run. So a small
//! process stands between: it outlives the agent, and it alone decides by these rules.
//!
//! ```text
//!  FREEZING ─▶ FROZEN ─▶ DUMPED ──Seal──▶ SEALED ──Release──▶ RELEASED
//!      └──────────┴─────────┴──Abort, deadline,──┐  │
//!                               agent gone       ▼  ▼ Abort only
//!                                              UNDONE
//! ```
//!
//! - The link is cut when CRIU reports the tasks frozen, and joined again before they run on.
//! - A container that was throttled in pre-copy has its own CPU limit again as soon as its tasks are frozen.
//! - Unsealed, the worker gives up when told to, when its deadline passes, and when the agent's connection is gone.
//! - Sealed, it holds for ever. It also freezes the container's cgroup, so that the tasks stay where they are even when
//!   CRIU or the worker itself is killed.
//! - It notes in its [`WorkerRecord`](messages::WorkerRecord), beforehand, what somebody has to undo when it is killed: see
//!   [`crate::source`].

pub mod client;
pub mod control;
mod mappings;
pub mod messages;
pub mod record;
pub mod run;
