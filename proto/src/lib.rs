//! The `podferry.v1` protocol: its definitions, the code generated from them, and its specification.
//!
//! - [`agent`]: what the coordinator says to a node's agent,
//! - [`coordinator`]: what scripts, the command line and agents say to the coordinator,
//! - [`evacuation`]: and how they have a node emptied,
//! - [`transfer`]: what one agent says to another,
//! - [`delivery`]: and what it hands on of the container's network,
//! - [`relay`]: and what it carries for connections whose address stays behind,
//! - [`fetch`]: and which pages it fetches from the other when the container runs already,
//! - [`application`]: and how a new instance takes the place of an old one.
//!
//! The modules of that name hold no code: their documentation is the specification of the service. `json`, with the feature of
//! that name, is how its answers look in JSON; [`strategies`] is what a node's words mean for the ways to move a workload.

pub mod agent;
pub mod application;
pub mod coordinator;
pub mod delivery;
pub mod evacuation;
pub mod fetch;
#[cfg(feature = "json")]
pub mod json;
pub mod relay;
pub mod strategies;
pub mod transfer;
mod version;

pub use version::{Version, VersionMismatch};

/// The generated messages, clients and servers.
#[allow(missing_docs, unreachable_pub, clippy::pedantic, reason = "generated: the words are in the .proto files")]
pub mod v1 {
    tonic::include_proto!("podferry.v1");
}

/// The encoded `FileDescriptorSet` of the package, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/podferry.v1.bin"));
