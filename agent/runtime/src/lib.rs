//! Finding, inspecting, freezing, restoring and deleting runc containers.

mod cgroup;
mod container;
mod error;
mod freezer;
pub mod hook;
mod host;
pub mod stdio;

pub use cgroup::CgroupPaths;
pub use container::{Container, ContainerMount, Init, NamespaceKind, Status, discover, find};
pub use error::Error;
pub use freezer::{Freezer, FreezerState};
pub use hook::criu_config;
pub use host::{CgroupVersion, CpuFeatures, HostFacts};
