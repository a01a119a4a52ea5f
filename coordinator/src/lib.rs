//! The podferry coordinator: one leader that takes migrations through their phases.
//!
//! - [`migration`]: one migration as a pure state machine,
//! - [`strategy`]: which phases, in which order,
//! - [`placement`]: which target, and why not the others,
//! - [`evacuation`]: emptying a node,
//! - [`eviction`]: evictions that become migrations,
//! - [`cluster`]: where nodes and workloads come from,
//! - [`store`]: where migrations are recorded,
//! - [`runner`]: the I/O shell that takes migrations through their phases,
//! - [`pods`]: what a migration does with the API server of Kubernetes,
//! - [`access`]: who may ask for what,
//! - [`api`]: what callers can ask, and gRPC and REST on it,
//! - [`kubernetes`]: the API server, and which coordinator leads,
//! - [`controller`]: migrations that are asked for by objects in it,
//! - [`audit`]: who has asked for what, and what became of it,
//! - [`metrics`]: what Prometheus can read,
//! - [`config`]: the file `coordinator.toml`.

pub mod access;
pub mod api;
pub mod audit;
pub mod cluster;
pub mod config;
pub mod controller;
pub mod evacuation;
pub mod eviction;
mod follow;
pub mod kubernetes;
pub mod metrics;
pub mod migration;
pub mod placement;
pub mod pods;
mod problem;
pub mod runner;
pub mod store;
pub mod strategy;
#[cfg(test)]
mod testing;

pub use problem::{FileError, Problem};
