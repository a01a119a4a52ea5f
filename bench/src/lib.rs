//! Workloads under load, the demo, and the measurements.
//!
//! What the clients of a workload see is the only measure: [`load`] checks each of their answers and times each pause.

pub mod load;
