//! Workloads under load, the demo, and the measurements.
