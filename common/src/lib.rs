//! What agent, coordinator and CLI share: ids, TLS identity, errors' common ground, telemetry.
//!
//! - [`id`]: the names of nodes, workloads and migrations, valid by construction.
//! - [`failure`]: what failed, where, why and what to do, in one shape that survives gRPC.
//! - [`identity`]: who a process is: certificate files, their rotation, and a local certificate authority.
//! - [`tls`]: connections that know both ends by name: mutual TLS 1.3 and nothing else.
//! - [`listen`]: listening where a predecessor may just be ending.
//! - [`metrics`]: figures for Prometheus.
//! - [`room`]: how much room a node needs for a workload that comes to it.
//! - [`telemetry`]: where log lines go.

pub mod failure;
pub mod id;
pub mod identity;
pub mod listen;
pub mod metrics;
pub mod room;
pub mod telemetry;
pub mod tls;

pub use failure::{Failure, FailureCode, chain};
pub use id::{MigrationId, NodeName, WorkloadName};
