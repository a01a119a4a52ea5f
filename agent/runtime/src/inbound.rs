//! Who is connected, or is about to be, to where a container listens.

use std::collections::BTreeSet;

use procfs::net::{TcpNetEntry, TcpState};
use procfs::process::Process;

use crate::container::Container;
use crate::error::Error;

/// TCP connections that others have opened to a container.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inbound {
    /// The ports on which somebody listens.
    pub ports: BTreeSet<u16>,
    /// Connections that are being made, and those that are made and that nobody has accepted yet (`rx_queue` of a listening socket in
    /// `/proc/net/tcp`).
    pub arriving: u64,
    /// Connections whose other end has not closed them.
    pub open: u64,
}

impl Container {
    /// What there is in its network namespace, others in that included; nothing when its init is gone.
    ///
    /// # Errors
    /// When the kernel's list cannot be read.
    pub fn inbound(&self) -> Result<Inbound, Error> {
        let Some(init) = self.init.filter(|init| init.is_alive()) else { return Ok(Inbound::default()) };
        let process = Process::new(init.pid).map_err(Error::proc(init.pid, "stat"))?;
        let ipv4 = process.tcp().map_err(Error::proc(init.pid, "net/tcp"))?;
        let ipv6 = process.tcp6().map_err(Error::proc(init.pid, "net/tcp6"))?;
        Ok(Inbound::of(&[ipv4, ipv6].concat()))
    }
}

impl Inbound {
    fn of(sockets: &[TcpNetEntry]) -> Self {
        let port = |socket: &TcpNetEntry| socket.local_address.port();
        let listening = || sockets.iter().filter(|socket| socket.state == TcpState::Listen);
        let ports: BTreeSet<u16> = listening().map(port).collect();
        let is_theirs = |socket: &&TcpNetEntry| ports.contains(&port(socket));
        let count = |state| sockets.iter().filter(is_theirs).filter(|socket| socket.state == state).count() as u64;
        let waiting: u64 = listening().map(|socket| u64::from(socket.rx_queue)).sum();
        let (arriving, open) = (waiting + count(TcpState::SynRecv), count(TcpState::Established));
        Self { ports, arriving, open }
    }
}
