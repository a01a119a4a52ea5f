//! The podferry node agent: what runs on every node, privileged.
//!
//! - [`service`] answers the coordinator,
//! - [`source`] is a migration's part on the node it leaves, [`target`] on the node it goes to,
//! - [`application`]: what an application's hooks are, and how they are run,
//! - [`throttle`] gives a container less CPU time while its memory is copied, and its own limit back,
//! - [`worker`] is the process that keeps CRIU and the frozen tasks,
//! - [`metrics`]: what Prometheus can read,
//! - [`pager`] is the process that lays memory in behind restored processes,
//! - [`pods`]: containers that are pods', which others start and stop, and [`relay`]: their connections, which outlive their address,
//! - [`parts`] knows which parts there are, [`journal`] remembers them, [`recovery`] takes them up after a restart.

pub mod application;
pub mod config;
pub mod context;
pub mod journal;
pub mod metrics;
pub mod pager;
pub mod parts;
pub mod pods;
pub mod recovery;
pub mod relay;
pub mod server;
pub mod service;
pub mod source;
pub mod target;
pub mod throttle;
pub mod volumes;
pub mod worker;
