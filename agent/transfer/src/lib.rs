//! The agent-to-agent stream: framing, compression, rate, both roles.
//!
//! - [`Sender`] dials a target agent and sends it the objects of one migration, each through an [`ObjectWriter`].
//! - [`TransferServer`] is the other side, a gRPC service: it asks an [`Authorize`] who may send and gives what arrives,
//!   verified, to a [`Sink`].
//!
//! The protocol is specified in [`podferry_proto::transfer`].

pub mod compression;
mod connection;
pub mod delta;
mod deltas;
mod error;
pub mod frame;
pub mod limits;
pub mod message;
pub mod object;
pub mod parcel;
mod pool;
mod receiver;
mod scatter;
mod sender;
pub mod session;
mod shares;
mod socket;
mod tuner;
mod zero;

pub use connection::{IncomingConnection, connect};
pub use deltas::{ApplyError, Changes, Deltas};
pub use error::TransferError;
pub use object::{InvalidObject, Object, Owner};
pub use pool::Pool;
pub use receiver::{Authorize, Sink, TransferServer, server};
pub use scatter::Place;
pub use sender::{Compression, Introduction, ObjectWriter, Options, Sender, SenderStats};
pub use session::{PageRun, Scattered};
pub use shares::{Share, Shares};
pub use zero::{ZeroMap, is_zero};
