//! What callers can ask: the core behind every front, and gRPC and REST on it.

mod core;
mod current;
mod grpc;
pub mod rest;
mod states;

pub use core::Core;
pub(crate) use core::{Bounds, may_pass};
pub use current::Current;
pub use grpc::{GrpcService, ServeError, serve};
