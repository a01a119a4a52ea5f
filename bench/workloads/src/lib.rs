//! Workloads that podferry is demonstrated and tested with.
//!
//! Two ordinary axum services, made so that a client can tell whether anything was lost while they moved:
//!
//! - [`catalogue`] holds no state. Every answer is a function of the request, so a client knows each byte beforehand.
//! - [`cart`] holds carts in memory and orders in a file ([`order_log`]). Every change carries a sequence number, every
//!   log line a checksum over all lines before it, and the feed a counter: what is lost, doubled or reordered shows.
//!
//! Both run as process 1 of a container ([`service`]): they reap what is reparented to them and end on SIGTERM. Both
//! can carry [`ballast`], memory of a given size whose digest can be asked for, for experiments on size.

pub mod ballast;
pub mod cart;
pub mod catalogue;
pub mod order_log;
pub mod service;
pub mod shop;
