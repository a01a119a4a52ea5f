//! Workloads that podferry is demonstrated and tested with.
