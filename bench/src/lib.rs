//! Workloads under load, the demo, and the measurements.
//!
//! What the clients of a workload see is the only measure: [`load`] checks each of their answers and times each pause.

pub mod chaos;
pub mod clients;
pub mod demo;
pub mod error;
pub mod experiments;
pub mod load;
pub mod loads;
pub mod local;
pub mod migration;
pub mod moves;
pub mod processor;
pub mod slowdown;
pub mod soak;
pub mod spread;
pub mod stage;
pub mod stream;
pub mod summary;
pub mod total;
