//! The podferry coordinator: one leader that takes migrations through their phases.
//!
//! - [`migration`]: one migration as a pure state machine,
//! - [`strategy`]: which phases, in which order,
//! - [`placement`]: which target, and why not the others,
//! - [`cluster`]: where nodes and workloads come from,
//! - [`store`]: where migrations are recorded,
//! - [`runner`]: the I/O shell that takes migrations through their phases,
//! - [`api`]: what callers can ask, and gRPC and REST on it,
//! - [`config`]: the file `coordinator.toml`.

pub mod api;
pub mod cluster;
pub mod config;
pub mod migration;
pub mod placement;
pub mod runner;
pub mod store;
pub mod strategy;
#[cfg(test)]
mod testing;
