//! A server's incoming connections: handshakes run side by side, and no caller can end or stall the stream.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::Stream;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsStream;
use tonic::transport::server::Connected;
use tracing::{debug, warn};

use super::{PeerInfo, Protocol, TlsError, accept_speaking};
use crate::failure::chain;
use crate::identity::Identity;

/// How many handshakes run at once. Whoever opens more waits in the kernel's queue.
const MAX_HANDSHAKES: usize = 256;
/// How many finished connections wait for the server to take them.
const QUEUE: usize = 64;
/// The pause after an accept that failed for lack of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// The connections that come in at a listener, after their handshakes: give it to tonic's `serve_with_incoming`.
///
/// Each handshake has [`super::HANDSHAKE_TIMEOUT`]. One that fails is logged and dropped; the stream goes on. Dropping the
/// stream closes the listener.
pub struct Incoming {
    connections: mpsc::Receiver<TlsConnection>,
    acceptor: JoinHandle<()>,
    local: io::Result<SocketAddr>,
}

impl Incoming {
    /// Begins to accept connections for gRPC. Must be called inside a tokio runtime.
    pub fn new(listener: TcpListener, identity: &Identity) -> Self {
        Self::speaking(Protocol::Grpc, listener, identity)
    }

    /// Begins to accept connections that speak this protocol. Must be called inside a tokio runtime.
    pub fn speaking(protocol: Protocol, listener: TcpListener, identity: &Identity) -> Self {
        let local = listener.local_addr();
        let (done, connections) = mpsc::channel(QUEUE);
        let acceptor = tokio::spawn(accept_all(protocol, listener, identity.clone(), done));
        Self { connections, acceptor, local }
    }

    /// The listener's address.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        match &self.local {
            Ok(addr) => Ok(*addr),
            Err(error) => Err(error.kind().into()),
        }
    }
}

impl Stream for Incoming {
    type Item = Result<TlsConnection, io::Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.connections.poll_recv(cx).map(|connection| connection.map(Ok))
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        self.acceptor.abort();
    }
}

/// Accepts until it is aborted, or the receiver is gone. Its handshakes end with it: the set aborts them.
async fn accept_all(protocol: Protocol, listener: TcpListener, identity: Identity, done: mpsc::Sender<TlsConnection>) {
    let slots = Arc::new(Semaphore::new(MAX_HANDSHAKES));
    let mut handshakes = JoinSet::new();
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        while handshakes.try_join_next().is_some() {}
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((tcp, _)) => {
                    handshakes.spawn(handshake(protocol, tcp, identity.clone(), done.clone(), slot));
                }
                Err(error) => {
                    warn!(%error, "cannot accept a connection; the limit of open files may be too low");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            () = done.closed() => return,
        }
    }
}

async fn handshake(
    protocol: Protocol,
    tcp: TcpStream,
    identity: Identity,
    done: mpsc::Sender<TlsConnection>,
    slot: OwnedSemaphorePermit,
) {
    // Held until the server took the connection, so that a server which takes none collects none.
    let _slot = slot;
    match accept_speaking(protocol, tcp, &identity).await {
        Ok((stream, info)) => {
            debug!(peer = %info.peer, addr = %info.addr, "connection accepted");
            // The receiver is gone when the server stops: then nobody wants the connection.
            let _stopped = done.send(TlsConnection { stream, info }).await;
        }
        Err(error) if is_probe(&error) => debug!(error = %chain(&error), "connection without handshake"),
        Err(error) => warn!(error = %chain(&error), "connection refused"),
    }
}

/// Whether somebody only looked if the port is open: health checks do that all day.
fn is_probe(error: &TlsError) -> bool {
    let quiet = [io::ErrorKind::UnexpectedEof, io::ErrorKind::ConnectionReset, io::ErrorKind::BrokenPipe];
    match error {
        TlsError::ServerHandshake { source, .. } | TlsError::Socket { source, .. } => quiet.contains(&source.kind()),
        _ => false,
    }
}

/// An incoming connection after its handshake. tonic puts its [`PeerInfo`] into every request's extensions.
#[derive(Debug)]
pub struct TlsConnection {
    stream: TlsStream<TcpStream>,
    info: PeerInfo,
}

impl TlsConnection {
    /// Who is at the other end.
    pub fn peer_info(&self) -> &PeerInfo {
        &self.info
    }

    /// The stream itself.
    pub fn into_inner(self) -> TlsStream<TcpStream> {
        self.stream
    }
}

impl Connected for TlsConnection {
    type ConnectInfo = PeerInfo;

    fn connect_info(&self) -> PeerInfo {
        self.info.clone()
    }
}

impl AsyncRead for TlsConnection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for TlsConnection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
