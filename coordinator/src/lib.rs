//! The podferry coordinator: one leader that takes migrations through their phases.
//!
//! - [`migration`]: one migration as a pure state machine,
//! - [`strategy`]: which phases, in which order,
//! - [`placement`]: which target, and why not the others,
//! - [`cluster`]: where nodes and workloads come from,
//! - [`store`]: where migrations are recorded.

#![expect(clippy::result_large_err, reason = "a failure is what a person reads, once: its size does not matter")]

pub mod cluster;
pub mod migration;
pub mod placement;
pub mod store;
pub mod strategy;
