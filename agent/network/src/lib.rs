//! A container's link and address, and how they move from one node to another.
//!
//! A container sits in a network namespace of its own, on one end of a veth pair; the other end, the *host interface*, is a
//! port of the node's bridge. Moving it means: [`discover`] what the container has; [`create`] the same on the target,
//! with the host interface off the bridge, so that nothing reaches the copy; [`cut`] the source's host interface while
//! the container is frozen, so that no packet meets sockets that are being dumped; and at the commit [`attach`] the
//! target's to its bridge and [announce](Announcer) the address there. A migration that fails [`uncut`]s the source.
//!
//! What clients send while the link is cut would come only when they repeat it, a fifth of a second later or more. So a
//! [`Capture`] on the source keeps what arrives for the container from before the cut on, and once the container runs and
//! its link is whole, a [`Replayer`] hands it over: on the target after [`attach`], or on the source after [`uncut`].
//!
//! Where the address cannot move along, because another node has other addresses, the [`relay`] carries the packets of the old
//! one to the new node.
//!
//! [`cut`], [`uncut`], [`is_cut`] and [`attach`] are plain blocking calls of well under a millisecond, free of an async
//! runtime, because they stand in the gap that clients see; the small processes that CRIU runs as hooks call them too.
//! They act in the network namespace of the calling thread; [`Netns::run`] gives them another one.

mod announce;
mod attach;
mod capture;
mod create;
mod cut;
mod discover;
mod error;
mod link;
mod mtu;
mod netlink;
mod netns;
mod probe;
pub mod relay;
mod replay;
mod segment;
mod unmoved;

pub use announce::Announcer;
pub use attach::{BridgeFacts, attach, detach, look_at_bridge};
pub use capture::{Capture, Captured};
pub use create::{bring_loopback_up, create, destroy};
pub use cut::{LinkHandle, LinkState, cut, hold_new_connections, is_cut, uncut};
pub use discover::discover;
pub use error::{Error, Result};
pub use link::{ContainerLink, MacAddress, NetworkPlan, Route};
pub use mtu::set_mtu;
pub use netns::Netns;
pub use probe::{Capability, probe};
pub use replay::Replayer;
pub use segment::segments;
pub use unmoved::{Unmoved, unmoved};

pub use ipnet::IpNet;
