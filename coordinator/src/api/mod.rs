//! What callers can ask: the core behind every front, and gRPC on it.

mod core;
mod current;
mod grpc;

pub use core::Core;
pub use current::Current;
pub use grpc::{GrpcService, ServeError, serve};
