//! The memory engine with real CRIU: one machine, no agents, no containers, no network.
//!
//! [`live`] migrates a process tree the way live migration does it, [`stop_and_copy`] the way CRIU does it alone; [`observer`]
//! measures from outside for how long the process stood still. The steps are those of the engine's field notes, variant D.

pub mod error;
pub mod live;
pub mod observer;
pub mod pages;
pub mod restored;
pub mod stop_and_copy;
pub mod tools;
pub mod tree;
pub mod victim;
