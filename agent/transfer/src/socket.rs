//! What the sender's socket is told.

use std::io;
use std::time::Duration;

use socket2::SockRef;
use tokio::net::TcpStream;

/// BBR, the default of some distributions, paces a stream inside a data centre to half of what cubic sends
/// (`docs/performance.md`).
const CONGESTION_CONTROL: &[u8] = b"cubic";
/// How long sent bytes may stay unacknowledged before the connection counts as broken.
const ACKNOWLEDGED_WITHIN: Duration = Duration::from_secs(20);

pub(crate) fn tune(socket: &TcpStream) -> io::Result<()> {
    let socket = SockRef::from(socket);
    if let Err(error) = socket.set_tcp_congestion(CONGESTION_CONTROL) {
        tracing::debug!(%error, "no cubic in this kernel: the transfer keeps the default congestion control");
    }
    socket.set_tcp_user_timeout(Some(ACKNOWLEDGED_WITHIN))
}
