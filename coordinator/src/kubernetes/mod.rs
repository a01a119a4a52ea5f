//! The API server: how it is reached, and which coordinator leads.

mod config;
mod leader;
mod leading;

pub use config::{ConnectError, EvictionConfig, KubernetesConfig, Notice, connect};
pub use leader::{Leader, LeaderError};
pub use leading::{Leading, LeadingError, POD_VARIABLE};
