//! The same questions and answers as JSON over HTTP/1.1 and mutual TLS, with an `OpenAPI` document that is made from the handlers.
//!
//! - `routes`, `evacuations`: one handler for each question,
//! - `types`: what requests and answers hold,
//! - `request`: reading what callers send, within limits,
//! - `problem`: refusals, as RFC 9457 has them,
//! - `page`: the page that asks this API,
//! - `browser`: what keeps other sites' pages from using the certificate of a browser,
//! - `server`: connections.

mod browser;
mod evacuations;
mod page;
mod problem;
mod request;
mod routes;
mod server;
mod types;

use std::time::Duration;

pub use server::serve;

/// How much callers may take. The defaults are the coordinator's.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections at a time. More wait until one has ended.
    pub connections: usize,
    /// How long a request's head may take, from the end of the answer before it: a connection that stays silent for so long is closed.
    pub head: Duration,
    /// How long a request's body may take.
    pub body: Duration,
    /// How long a caller that takes nothing of what it is sent stays connected.
    pub silence: Duration,
    /// How often a watch says that it is there, when there is nothing else to say.
    pub heartbeat: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 256,
            head: Duration::from_secs(10),
            body: Duration::from_secs(10),
            silence: Duration::from_secs(20),
            heartbeat: Duration::from_secs(10),
        }
    }
}
