//! Connections that know both ends by name: mutual TLS 1.3, nothing older, nothing in the clear.
//!
//! Both sides show a certificate of the cluster's authority, and each certificate names exactly one [`Peer`]. Who dials
//! says whom it expects and is refused by anybody else; who accepts gets the caller's name as [`PeerInfo`] and decides
//! what that caller may do. Every new connection uses the certificate that is current then.

pub(crate) mod config;
mod incoming;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use rustls::pki_types::CertificateDer;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tonic::transport::{Channel, Endpoint};
use tower::service_fn;

pub use incoming::{Incoming, TlsConnection};
pub use tokio_rustls::TlsStream;

use crate::identity::{Identity, InvalidPeer, Peer};

/// How long a handshake may take, and how long a TCP connect.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// After this much silence the other side is asked whether it is still there.
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// How long it has for an answer before the connection counts as broken.
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long [`refusal`] waits for an alert.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(3);

/// What a listener speaks above TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP/2, for gRPC: a caller that has not agreed to it in the handshake is refused.
    Grpc,
    /// HTTP/1.1, for scripts and browsers: a caller that names no protocol is taken to speak it.
    Http1,
}

impl Protocol {
    /// Whether a handshake that agreed to this, or to nothing, will do.
    fn is_met_by(self, agreed: Option<&[u8]>) -> bool {
        match self {
            Self::Grpc => agreed == Some(config::ALPN),
            Self::Http1 => agreed.is_none_or(|agreed| agreed == config::ALPN_HTTP1),
        }
    }

    fn as_str(self) -> &'static str {
        match self {
            Self::Grpc => "HTTP/2",
            Self::Http1 => "HTTP/1.1",
        }
    }
}

/// Who is at the other end. In a tonic handler: `request.extensions().get::<PeerInfo>()`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerInfo {
    /// Whom the verified certificate names.
    pub peer: Peer,
    /// The address the connection comes from or goes to.
    pub addr: SocketAddr,
}

/// Why a connection does not come to be.
#[derive(Debug, Error)]
pub enum TlsError {
    /// The address cannot be resolved, or nobody listens there.
    #[error("cannot connect to {peer} at {address}; is it running, and is the address right?")]
    Connect {
        /// Who was expected there.
        peer: Peer,
        /// The address, `host:port`.
        address: String,
        /// Why not.
        source: io::Error,
    },
    /// The handshake with a server failed.
    #[error("the TLS handshake with {peer} at {address} failed")]
    ClientHandshake {
        /// Who was expected there.
        peer: Peer,
        /// The address, `host:port`.
        address: String,
        /// Why: rustls' error is inside.
        source: io::Error,
    },
    /// The handshake of an incoming connection failed: no TLS, an old version, no certificate, or one not trusted.
    #[error("the TLS handshake of the connection from {address} failed")]
    ServerHandshake {
        /// Where it comes from.
        address: SocketAddr,
        /// Why: rustls' error is inside.
        source: io::Error,
    },
    /// The other side did not finish in time.
    #[error("{what} with {address} did not finish in {} s", HANDSHAKE_TIMEOUT.as_secs())]
    Timeout {
        /// What did not finish.
        what: &'static str,
        /// The other side.
        address: String,
    },
    /// The certificate is trusted but names nobody of podferry's.
    #[error("the certificate of {address} names no peer")]
    Unnamed {
        /// The other side.
        address: String,
        /// What is wrong with the name.
        source: InvalidPeer,
    },
    /// The certificate is trusted but names somebody else.
    #[error("expected {expected} at {address}, but {found} answers there")]
    WrongPeer {
        /// The address, `host:port`.
        address: String,
        /// Who was expected.
        expected: Peer,
        /// Who is there.
        found: Peer,
    },
    /// The other side did not agree to the protocol, so it is none of ours.
    #[error("{address} does not speak {expected} over TLS")]
    Protocol {
        /// The other side.
        address: String,
        /// What it ought to speak.
        expected: &'static str,
    },
    /// The socket failed outside of the handshake.
    #[error("the socket of {address} failed")]
    Socket {
        /// The other side.
        address: String,
        /// Why.
        source: io::Error,
    },
    /// The address is no `host:port`.
    #[error("{address:?} is no address; write it as host:port")]
    Address {
        /// What was given.
        address: String,
        /// What is wrong with it.
        source: tonic::transport::Error,
    },
    /// No gRPC channel came to be; the causes say why.
    #[error("no gRPC channel to {peer} at {address}")]
    Channel {
        /// Who was expected there.
        peer: Peer,
        /// The address, `host:port`.
        address: String,
        /// Why.
        source: tonic::transport::Error,
    },
}

/// Opens a connection to `address` (`host:port`) and returns it once the server has proved to be exactly `expected`.
///
/// TLS 1.3 lets the client finish first: a server that does not trust *us* says so at our first read.
pub async fn dial(address: &str, identity: &Identity, expected: &Peer) -> Result<TlsStream<TcpStream>, TlsError> {
    let late = |what| move |_| TlsError::Timeout { what, address: address.to_owned() };
    let unreachable = |source| TlsError::Connect { peer: expected.clone(), address: address.to_owned(), source };
    let tcp = timeout(HANDSHAKE_TIMEOUT, TcpStream::connect(address)).await;
    let tcp = tcp.map_err(late("connecting"))?.map_err(unreachable)?;
    let socket = |source| TlsError::Socket { address: address.to_owned(), source };
    tcp.set_nodelay(true).map_err(socket)?;
    let name = expected.server_name().map_err(|source| TlsError::Unnamed { address: address.to_owned(), source })?;
    let handshake = TlsConnector::from(identity.client_config()).connect(name, tcp);
    let stream = timeout(HANDSHAKE_TIMEOUT, handshake).await.map_err(late("the TLS handshake"))?;
    let failed = |source| TlsError::ClientHandshake { peer: expected.clone(), address: address.to_owned(), source };
    let stream = stream.map_err(failed)?;
    let session = stream.get_ref().1;
    let found = named(address, Protocol::Grpc, session.alpn_protocol(), session.peer_certificates())?;
    if found != *expected {
        return Err(TlsError::WrongPeer { address: address.to_owned(), expected: expected.clone(), found });
    }
    Ok(stream.into())
}

/// Asks a server why it broke a channel: dials anew, sends nothing, and waits for its alert. `None` when it sends none.
///
/// A channel often cannot say: its first request is on the way when the alert arrives, and fails as cancelled.
pub async fn refusal(address: &str, identity: &Identity, expected: &Peer) -> Option<TlsError> {
    let mut stream = match dial(address, identity, expected).await {
        Ok(stream) => stream,
        Err(error) => return Some(error),
    };
    // A server that trusts us sends its HTTP/2 settings, or waits for ours: neither is a refusal.
    let source = timeout(REFUSAL_TIMEOUT, stream.read_u8()).await.ok()?.err()?;
    let alert = source.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()).is_some();
    alert.then(|| TlsError::ClientHandshake { peer: expected.clone(), address: address.to_owned(), source })
}

/// Does the server's side of the handshake on a fresh TCP connection and says who is there.
pub async fn accept(tcp: TcpStream, identity: &Identity) -> Result<(TlsStream<TcpStream>, PeerInfo), TlsError> {
    accept_speaking(Protocol::Grpc, tcp, identity).await
}

/// The same for a caller that speaks this protocol.
async fn accept_speaking(
    protocol: Protocol,
    tcp: TcpStream,
    identity: &Identity,
) -> Result<(TlsStream<TcpStream>, PeerInfo), TlsError> {
    let unknown = |source| TlsError::Socket { address: "an incoming connection".to_owned(), source };
    let addr = tcp.peer_addr().map_err(unknown)?;
    tcp.set_nodelay(true).map_err(|source| TlsError::Socket { address: addr.to_string(), source })?;
    let handshake = TlsAcceptor::from(identity.server_config(protocol)).accept(tcp);
    let late = |_| TlsError::Timeout { what: "the TLS handshake", address: addr.to_string() };
    let stream = timeout(HANDSHAKE_TIMEOUT, handshake).await.map_err(late)?;
    let stream = stream.map_err(|source| TlsError::ServerHandshake { address: addr, source })?;
    let session = stream.get_ref().1;
    let peer = named(&addr.to_string(), protocol, session.alpn_protocol(), session.peer_certificates())?;
    Ok((stream.into(), PeerInfo { peer, addr }))
}

/// The peer that a finished handshake's certificate names.
fn named(
    address: &str,
    expected: Protocol,
    agreed: Option<&[u8]>,
    certificates: Option<&[CertificateDer<'static>]>,
) -> Result<Peer, TlsError> {
    if !expected.is_met_by(agreed) {
        return Err(TlsError::Protocol { address: address.to_owned(), expected: expected.as_str() });
    }
    let unnamed = |source| TlsError::Unnamed { address: address.to_owned(), source };
    let none = || unnamed(InvalidPeer::Certificate { reason: "there is none".to_owned() });
    let own = certificates.and_then(<[_]>::first).ok_or_else(none)?;
    Peer::from_certificate(own).map_err(unnamed)
}

/// A gRPC channel to `address` (`host:port`), connected now. When its connection breaks it dials again at the next call,
/// with the certificate that is current then.
pub async fn connect(address: &str, identity: &Identity, expected: &Peer) -> Result<Channel, TlsError> {
    connect_by(endpoint(address)?, address, identity, expected, |stream| stream).await
}

/// As [`connect`], with settings of one's own on what [`endpoint`] gives for the same address, and what `over` makes of each
/// connection.
///
/// # Errors
/// As [`connect`].
pub async fn connect_by<S>(
    endpoint: Endpoint,
    address: &str,
    identity: &Identity,
    expected: &Peer,
    over: fn(TlsStream<TcpStream>) -> S,
) -> Result<Channel, TlsError>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let connected = endpoint.connect_with_connector(connector(address, identity, expected, over)).await;
    connected.map_err(|source| TlsError::Channel { peer: expected.clone(), address: address.to_owned(), source })
}

/// As [`connect`], but dials at the first call; calls fail with `Unavailable` while nobody is there.
///
/// Must be called inside a tokio runtime.
pub fn connect_lazy(address: &str, identity: &Identity, expected: &Peer) -> Result<Channel, TlsError> {
    let connector = connector(address, identity, expected, |stream| stream);
    Ok(endpoint(address)?.connect_with_connector_lazy(connector))
}

/// The settings of every gRPC channel: a broken connection is noticed in [`KEEPALIVE_INTERVAL`] +
/// [`KEEPALIVE_TIMEOUT`] also while a call waits.
pub fn endpoint(address: &str) -> Result<Endpoint, TlsError> {
    // The scheme is what tonic sees: TLS is made below it, by the connector.
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .map_err(|source| TlsError::Address { address: address.to_owned(), source })?;
    Ok(endpoint
        .connect_timeout(2 * HANDSHAKE_TIMEOUT)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true))
}

/// What tonic calls to open the connection of a channel.
fn connector<S: 'static>(
    address: &str,
    identity: &Identity,
    expected: &Peer,
    over: fn(TlsStream<TcpStream>) -> S,
) -> impl tower::Service<http::Uri, Response = TokioIo<S>, Error = TlsError, Future: Send> + Send + 'static + use<S> {
    let target: Arc<(String, Identity, Peer)> = Arc::new((address.to_owned(), identity.clone(), expected.clone()));
    service_fn(move |_: http::Uri| {
        let target = Arc::clone(&target);
        async move {
            let (address, identity, expected) = &*target;
            dial(address, identity, expected).await.map(|stream| TokioIo::new(over(stream)))
        }
    })
}
