//! What the transfer's sockets are told.

use std::io;
use std::time::Duration;

use podferry_common::tls::TlsStream;
use socket2::SockRef;
use tokio::net::TcpStream;

/// BBR, the default of some distributions, paces a stream inside a data centre to half of what cubic sends
/// (`docs/performance.md`).
const CONGESTION_CONTROL: &[u8] = b"cubic";
/// How long sent bytes may stay unacknowledged before the connection counts as broken.
const ACKNOWLEDGED_WITHIN: Duration = Duration::from_secs(20);
/// How much rustls encrypts before it writes: a system call for every few records costs more than the buffer.
const TLS_BUFFER: usize = 256 << 10;

/// Sets up the sender's end.
pub(crate) fn tune(stream: &mut TlsStream<TcpStream>) -> io::Result<()> {
    let socket = SockRef::from(stream.get_ref().0);
    if let Err(error) = socket.set_tcp_congestion(CONGESTION_CONTROL) {
        tracing::debug!(%error, "no cubic in this kernel: the transfer keeps the default congestion control");
    }
    socket.set_tcp_user_timeout(Some(ACKNOWLEDGED_WITHIN))?;
    match stream {
        TlsStream::Client(stream) => stream.get_mut().1.set_buffer_limit(Some(TLS_BUFFER)),
        TlsStream::Server(stream) => stream.get_mut().1.set_buffer_limit(Some(TLS_BUFFER)),
    }
    Ok(())
}
