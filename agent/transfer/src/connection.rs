//! TLS over TCP with big reads and writes.
//!
//! tokio-rustls lets rustls read from the socket, 4 KiB at a time: five system calls and as many wake-ups for a record of
//! 16 KiB. Here the handshake is tokio-rustls' and what follows reads and writes sixteen records at a time.

use std::io::{self, BufRead as _, IoSlice, Write};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures::{Stream, StreamExt as _};
use podferry_common::identity::{Identity, Peer};
use podferry_common::tls::{self, Incoming, PeerInfo, TlsError, TlsStream};
use rustls::Connection as Session;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tonic::transport::server::Connected;
use tonic::transport::{Channel, Endpoint};

/// Bytes of one read, and of the records that are encrypted before one write.
const BUFFER: usize = 256 << 10;

/// The connections of a server that takes transfers: `incoming`'s, with big reads.
pub(crate) fn fast(incoming: Incoming) -> impl Stream<Item = io::Result<IncomingConnection>> {
    incoming.map(|connection| {
        let connection = connection?;
        let info = connection.peer_info().clone();
        Ok(IncomingConnection { connection: Connection::new(connection.into_inner()), info })
    })
}

/// A gRPC channel for whoever is sent much: as [`tls::connect`], with big reads, and with settings of one's own on what
/// [`tls::endpoint`] gives for the same address.
///
/// # Errors
/// As [`tls::connect`].
pub async fn connect(
    endpoint: Endpoint,
    address: &str,
    identity: &Identity,
    expected: &Peer,
) -> Result<Channel, TlsError> {
    tls::connect_by(endpoint, address, identity, expected, Connection::new).await
}

/// A connection after its handshake.
#[derive(Debug)]
pub(crate) struct Connection {
    tcp: TcpStream,
    session: Session,
    /// Records as they came, from `begin` to `end` not yet decrypted.
    records: Vec<u8>,
    begin: usize,
    end: usize,
    ended: bool,
    goodbye: bool,
}

impl Connection {
    pub(crate) fn new(stream: TlsStream<TcpStream>) -> Self {
        let (tcp, mut session) = match stream {
            TlsStream::Client(stream) => {
                let (tcp, session) = stream.into_inner();
                (tcp, Session::from(session))
            }
            TlsStream::Server(stream) => {
                let (tcp, session) = stream.into_inner();
                (tcp, Session::from(session))
            }
        };
        session.set_buffer_limit(Some(BUFFER));
        Self { tcp, session, records: Vec::new(), begin: 0, end: 0, ended: false, goodbye: false }
    }

    pub(crate) fn tcp(&self) -> &TcpStream {
        &self.tcp
    }

    /// Moves what is decrypted; false when nothing is, and true also at the end of the stream.
    fn take_plain(&mut self, buffer: &mut ReadBuf<'_>) -> io::Result<bool> {
        let mut reader = self.session.reader();
        let length = match reader.fill_buf() {
            Ok(plain) => {
                let length = plain.len().min(buffer.remaining());
                buffer.put_slice(&plain[..length]);
                length
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) => return Err(error),
        };
        reader.consume(length);
        Ok(true)
    }

    /// Gives the session the next part of what was read. It takes 4 KiB.
    fn decrypt(&mut self) -> io::Result<()> {
        let mut records = &self.records[self.begin..self.end];
        let taken = self.session.read_tls(&mut records)?;
        self.begin += taken;
        let invalid = |error| io::Error::new(io::ErrorKind::InvalidData, error);
        self.session.process_new_packets().map(|_| ()).map_err(invalid)
    }

    fn poll_records(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.records.resize(BUFFER, 0);
        let mut buffer = ReadBuf::new(&mut self.records);
        ready!(Pin::new(&mut self.tcp).poll_read(cx, &mut buffer))?;
        (self.begin, self.end) = (0, buffer.filled().len());
        self.ended = self.end == 0;
        Poll::Ready(Ok(()))
    }

    /// Writes everything that is encrypted.
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.session.wants_write() {
            ready!(self.tcp.poll_write_ready(cx))?;
            match self.session.write_tls(&mut TryWrite(&self.tcp)) {
                Ok(0) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Ok(_) => {}
                // That has cleared the readiness: the next look at it waits.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        Poll::Ready(Ok(()))
    }

    fn poll_encrypt(
        &mut self,
        cx: &mut Context<'_>,
        encrypt: impl FnOnce(&mut rustls::Writer<'_>) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_drain(cx))?;
        let taken = encrypt(&mut self.session.writer())?;
        // What the socket does not take now, the next write or flush gives it.
        match self.poll_drain(cx) {
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Ready(Ok(())) | Poll::Pending => Poll::Ready(Ok(taken)),
        }
    }
}

/// The socket as rustls writes to it.
struct TryWrite<'a>(&'a TcpStream);

impl Write for TryWrite<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.try_write(bytes)
    }

    fn write_vectored(&mut self, bytes: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0.try_write_vectored(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsyncRead for Connection {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buffer.filled().len();
        loop {
            let filled = buffer.filled().len();
            if this.take_plain(buffer)? && (buffer.filled().len() == filled || buffer.remaining() == 0) {
                return Poll::Ready(Ok(()));
            }
            if buffer.filled().len() > filled {
                continue;
            }
            if this.begin < this.end || this.ended {
                this.decrypt()?;
                continue;
            }
            match this.poll_records(cx)? {
                Poll::Ready(()) => {}
                Poll::Pending if filled > before => return Poll::Ready(Ok(())),
                Poll::Pending => return Poll::Pending,
            }
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.get_mut().poll_encrypt(cx, |writer| writer.write(bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.get_mut().poll_encrypt(cx, |writer| writer.write_vectored(bytes))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().poll_drain(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.goodbye {
            this.session.send_close_notify();
            this.goodbye = true;
        }
        ready!(this.poll_drain(cx))?;
        Pin::new(&mut this.tcp).poll_shutdown(cx)
    }
}

/// A connection of [`crate::server`]'s. tonic puts its [`PeerInfo`] into every request's extensions.
#[derive(Debug)]
pub struct IncomingConnection {
    connection: Connection,
    info: PeerInfo,
}

impl Connected for IncomingConnection {
    type ConnectInfo = PeerInfo;

    fn connect_info(&self) -> PeerInfo {
        self.info.clone()
    }
}

impl AsyncRead for IncomingConnection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_read(cx, buffer)
    }
}

impl AsyncWrite for IncomingConnection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.connection).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.connection).poll_write_vectored(cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_shutdown(cx)
    }
}
