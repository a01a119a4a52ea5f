//! Two or more podferry nodes, a coordinator and a client side on one machine, each in its own namespaces.
//!
//! ```text
//!   pf-S-fabric: bridge br0, 10.88.0.1/24
//!     ├─ eth0 in pf-S-coordinator 10.88.0.2     podferry-coordinator
//!     ├─ eth0 in pf-S-client      10.88.0.3     load generators, `podferry`
//!     ├─ eth0 in pf-S-node-a ── bridge pf0 10.88.0.11 ── containers 10.88.0.100 and up
//!     └─ eth0 in pf-S-node-b ── bridge pf0 10.88.0.12 ── containers
//! ```
//! It is one flat network, so a container keeps its address on any node. A node also has its own mount, pid, uts and ipc
//! namespaces, whose first process is `podferry-node-init`: `/proc`, `/run` (with runc's state and the names of network
//! namespaces) and the images of migrations are its own, files elsewhere are the machine's. Its containers' cgroups are
//! below `/podferry-local-S-NODE`. Nothing is made in the machine's own network namespace. Everybody has a certificate of
//! the cluster's own authority for a day, and a new one after half of it.
//!
//! ```no_run
//! use podferry_local::{LocalCluster, Options, Workload};
//!
//! # fn main() -> podferry_local::Result<()> {
//! let mut cluster = LocalCluster::up(&Options::new("/tmp/podferry"))?;
//! let address = podferry_local::FIRST_CONTAINER_ADDRESS;
//! let workload = Workload::new("redis", "/images/redis", ["/bin/redis-server", "--protected-mode", "no"], address);
//! cluster.start_workload("node-a", &workload)?;
//! cluster.prepare_workload("node-b", &workload)?;
//! cluster.podferry(["migrate", "redis", "--to", "node-b", "--wait"])?.success()?;
//! cluster.down()
//! # }
//! ```

mod census;
mod certificates;
mod cgroup;
mod cluster;
pub mod command;
mod config;
mod container;
mod daemon;
mod error;
pub mod faults;
mod network;
mod node;
mod place;
mod process;
mod state;
mod strategy;
mod workload;

use std::path::{Path, PathBuf};

pub use oci_spec;
pub use rustix::process::Signal;

pub use census::{Census, Change, Counts, Difference};
pub use certificates::{CLIENT_USER, keep_certificates};
pub use cluster::{COORDINATOR_PORT, Coordinator, LocalCluster, Options, REST_PORT};
pub use command::Output;
pub use container::{Container, RUNC_ROOT};
pub use error::{Error, Result};
pub use network::{
    CLIENT_ADDRESS, COORDINATOR_ADDRESS, FABRIC_BRIDGE, FIRST_CONTAINER_ADDRESS, FIRST_NODE_ADDRESS, GATEWAY,
    NODE_BRIDGE, PREFIX_LENGTH,
};
pub use node::{AGENT_PORT, Node};
pub use place::{Place, Running};
pub use process::ProcessId;
pub use strategy::Strategy;
pub use workload::{BindMount, Network, Workload};

/// The folder of the workspace that this program was built from.
pub fn workspace_root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).unwrap_or(here).to_owned()
}

/// The folder of criu and runc: `PODFERRY_TOOLS` or `bin` in it, else what `deploy/setup/setup.sh` made in the workspace.
pub fn default_tools() -> PathBuf {
    let folder =
        std::env::var_os("PODFERRY_TOOLS").map_or_else(|| workspace_root().join(".podferry/tools"), Into::into);
    let bin = folder.join("bin");
    if bin.is_dir() { bin } else { folder }
}

/// The folder of podferry's own programs: `PODFERRY_BINARIES`, else the one this program was built into.
pub fn default_binaries() -> PathBuf {
    if let Some(folder) = std::env::var_os("PODFERRY_BINARIES") {
        return PathBuf::from(folder);
    }
    let program = std::env::current_exe().unwrap_or_default();
    let folder = program.parent().unwrap_or(Path::new("/"));
    // Tests are built into `deps` (examples into `examples`) below it.
    match folder.file_name().and_then(|name| name.to_str()) {
        Some("deps" | "examples") => folder.parent().unwrap_or(folder).to_owned(),
        _ => folder.to_owned(),
    }
}
