//! The stateless catalogue, as a container's process 1. See [`podferry_workloads::catalogue`] for its interface.

use std::process::ExitCode;

use podferry_workloads::{
    catalogue,
    service::{self, AtEnd},
};

fn main() -> ExitCode {
    service::run("catalogue", || service::serve("catalogue", catalogue::router(), AtEnd::Answer))
}
