//! Puts podferry onto a Kubernetes node, and takes it off again.
//!
//! On the node there are, when it is installed:
//!
//! - the bundle in `/opt/podferry/<version>-<digest>`, and `/opt/podferry/current`, a link to it (on Container-Optimized OS in
//!   `/home/kubernetes/bin/podferry`)
//! - the handler `podferry` in the configuration of containerd or CRI-O, which runs `current/bin/podferry-runtime`
//! - `/etc/podferry/agent.toml`
//! - `/opt/podferry/install.json`, the record of all of that
//!
//! Every change is noted in the record before it is made, so installing and uninstalling can be killed at any instruction and done
//! again. The node's own files come back byte for byte.

mod agent_config;
mod block;
mod bundle;
mod busy;
mod check;
mod enter;
mod error;
mod host;
mod install;
mod journal;
mod restart;
mod runtime;
mod uninstall;

pub use agent_config::Settings;
pub use bundle::{Bundle, WrapperConfig};
pub use check::{Report, check};
pub use enter::become_agent;
pub use error::{Error, Result};
pub use host::{Commands, Direct, Entered, Host};
pub use install::{Installed, Options, install};
pub use restart::Restart;
pub use runtime::Runtime;
pub use uninstall::uninstall;

/// An error with all of its causes, on one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}
