//! Finding, inspecting, throttling, freezing, restoring and deleting runc containers.

mod cgroup;
mod container;
mod create;
mod error;
mod externals;
mod freezer;
pub mod hook;
mod host;
mod leftovers;
mod preflight;
mod process;
mod quota;
mod restore;
mod runc;
pub mod stdio;
mod stop_signal;
mod tree;
mod volumes;

pub use cgroup::CgroupPaths;
pub use container::{Container, ContainerMount, Init, NamespaceKind, Status, discover, find};
pub use create::CreateRequest;
pub use error::Error;
pub use externals::{DESCRIPTORS, Externals, network_namespace};
pub use freezer::{Freezer, FreezerState};
pub use hook::criu_config;
pub use host::{CgroupVersion, CpuFeatures, HostFacts};
pub use leftovers::cgroups_of_bundle;
pub use preflight::{DeletedFile, Facts, Finding, FindingKind, NetworkKind, Report, Severity, preflight};
pub use process::has_stopped_for_good;
pub use quota::{CpuLimit, CpuQuota};
pub use restore::{CgroupsMode, RestoreRequest, RestoreStdio, RunningRestore};
pub use runc::Runc;
pub use stop_signal::{STOP_SIGNAL, UnknownSignal, stop_signal};
pub use tree::Member;
pub use volumes::{BindMount, Storage, bind_mounts};
