//! Which connections of a namespace still need their old address (`sock_diag(7)`).

use std::io;
use std::net::{IpAddr, SocketAddr as Endpoint};

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6, IPPROTO_TCP};
use netlink_packet_sock_diag::inet::nlas::Nla;
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, InetResponse, SocketId, StateFlags};
use netlink_sys::protocols::NETLINK_SOCK_DIAG;
use netlink_sys::{Socket, SocketAddr};
use nix::errno::Errno;

use crate::error::{Error, Result};
use crate::netlink::errno;
use crate::netns::Netns;

const ALIGNMENT: usize = 4;
/// `SOCK_DESTROY` (`include/uapi/linux/sock_diag.h`): takes what asks about a socket, and ends it.
const SOCK_DESTROY: u16 = 21;

/// How many TCP sockets of a namespace have one of these local addresses and can still carry something: all but those that
/// listen, are closed, or wait for what may be late (`TIME-WAIT`).
pub fn connections_of(netns: &Netns, addresses: &[IpAddr]) -> Result<usize> {
    let failed = |source| Error::Connections { netns: netns.path().to_owned(), source };
    netns.run(|| all(addresses, &NOTHING_MORE).map(|found| found.len()))?.map_err(failed)
}

/// A TCP connection, as the namespace that it ends in sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connection {
    /// The address that stays.
    pub local: Endpoint,
    /// Whom it is with.
    pub peer: Endpoint,
    /// Bytes that have come, and bytes that the peer has acknowledged, since the socket was made: for a restored one since the restore. None where
    /// the kernel does not say (4.1 and later do).
    pub bytes: Option<(u64, u64)>,
}

/// The same, one by one, in the order of their addresses.
///
/// # Errors
/// When the kernel does not list them.
pub fn list_connections(netns: &Netns, addresses: &[IpAddr]) -> Result<Vec<Connection>> {
    let failed = |source| Error::Connections { netns: netns.path().to_owned(), source };
    let mut all = netns.run(|| list(addresses))?.map_err(failed)?;
    all.sort_by_key(|connection| (connection.local, connection.peer));
    Ok(all)
}

fn list(addresses: &[IpAddr]) -> io::Result<Vec<Connection>> {
    let end = |address: &IpAddr, port| Endpoint::new(address.to_canonical(), port);
    let of = |socket: Found| Connection {
        local: end(&socket.id.source_address, socket.id.source_port),
        peer: end(&socket.id.destination_address, socket.id.destination_port),
        bytes: socket.bytes,
    };
    Ok(all(addresses, &ExtensionFlags::INFO)?.into_iter().map(|(_, socket)| of(socket)).collect())
}

/// How many connections of a namespace are being opened, or are open and wait for a program to take them.
pub fn not_accepted(netns: &Netns) -> Result<usize> {
    let failed = |source| Error::Connections { netns: netns.path().to_owned(), source };
    let count = || {
        let mut count = 0;
        for (family, id) in FAMILIES {
            // A socket that listens says how many wait in the place of how much.
            let listening = of_family(family, id(), StateFlags::LISTEN, NOTHING_MORE)?;
            count += listening.iter().map(|socket| socket.receive_queue as usize).sum::<usize>();
            count += of_family(family, id(), StateFlags::SYN_RECV, NOTHING_MORE)?.len();
        }
        Ok(count)
    };
    netns.run(count)?.map_err(failed)
}

/// Ends all of them: each tells its peer by a reset, and its program by an error (ss(8), `--kill`). Gives how many there were.
///
/// # Errors
/// When one cannot be ended: a kernel without `CONFIG_INET_DIAG_DESTROY` ends none.
pub fn end_connections(netns: &Netns, addresses: &[IpAddr]) -> Result<usize> {
    let failed = |source| Error::Connections { netns: netns.path().to_owned(), source };
    let end_all = || {
        let found = all(addresses, &NOTHING_MORE)?;
        found.iter().try_for_each(|(family, socket)| end(*family, socket.id.clone()))?;
        Ok(found.len())
    };
    netns.run(end_all)?.map_err(failed)
}

/// Whether one of them may be sent from one interface alone (`SO_BINDTODEVICE`); runs in the namespace.
pub(super) fn has_bound(addresses: &[IpAddr]) -> io::Result<bool> {
    Ok(all(addresses, &NOTHING_MORE)?.iter().any(|(_, socket)| socket.id.interface_id != 0))
}

const FAMILIES: [(u8, fn() -> SocketId); 2] = [(AF_INET, SocketId::new_v4), (AF_INET6, SocketId::new_v6)];

/// Those that can still carry something, each with its family.
fn all(addresses: &[IpAddr], extensions: &ExtensionFlags) -> io::Result<Vec<(u8, Found)>> {
    // Sockets of IPv6 serve IPv4 as well, with addresses that say so.
    let of = |socket: &Found| addresses.contains(&socket.id.source_address.to_canonical());
    let over = StateFlags::LISTEN | StateFlags::CLOSE | StateFlags::TIME_WAIT;
    let mut all = Vec::new();
    for (family, id) in FAMILIES {
        let found = of_family(family, id(), StateFlags::all() - over.clone(), extensions.clone())?;
        all.extend(found.into_iter().filter(of).map(|socket| (family, socket)));
    }
    Ok(all)
}

/// What is asked of a socket here.
struct Found {
    id: SocketId,
    receive_queue: u32,
    /// Received, and acknowledged by the peer.
    bytes: Option<(u64, u64)>,
}

impl Found {
    fn of(socket: &InetResponse) -> Self {
        let info = socket.nlas.iter().find_map(|attribute| match attribute {
            Nla::TcpInfo(info) => Some(info),
            _ => None,
        });
        Self {
            id: socket.header.socket_id.clone(),
            receive_queue: socket.header.recv_queue,
            bytes: info.and_then(|info| Some((counter(info, RECEIVED)?, counter(info, ACKNOWLEDGED)?))),
        }
    }
}

/// Who only counts asks for no more than sockets have anyway: that is done in the freeze, too.
const NOTHING_MORE: ExtensionFlags = ExtensionFlags::empty();

/// Where `tcpi_bytes_acked` and `tcpi_bytes_received` are in `struct tcp_info` (`include/uapi/linux/tcp.h`).
const ACKNOWLEDGED: usize = 120;
const RECEIVED: usize = 128;

fn counter(info: &[u8], at: usize) -> Option<u64> {
    info.get(at..at + size_of::<u64>())?.try_into().ok().map(u64::from_ne_bytes)
}

fn of_family(family: u8, id: SocketId, states: StateFlags, extensions: ExtensionFlags) -> io::Result<Vec<Found>> {
    match sockets(family, id, states, extensions) {
        // A kernel without IPv6.
        Err(error) if errno(&error) == Errno::ENOENT && family == AF_INET6 => Ok(Vec::new()),
        found => found,
    }
}

fn open() -> io::Result<Socket> {
    let mut netlink = Socket::new(NETLINK_SOCK_DIAG)?;
    netlink.bind_auto()?;
    netlink.connect(&SocketAddr::new(0, 0))?;
    Ok(netlink)
}

/// Ends one. It may have ended meanwhile.
fn end(family: u8, socket_id: SocketId) -> io::Result<()> {
    let netlink = open()?;
    let request = InetRequest {
        family,
        protocol: IPPROTO_TCP,
        extensions: ExtensionFlags::empty(),
        states: StateFlags::all(),
        socket_id,
    };
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_ACK;
    let mut message = NetlinkMessage::new(header, SockDiagMessage::InetRequest(request).into());
    message.finalize();
    message.header.message_type = SOCK_DESTROY;
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    netlink.send(&bytes, 0)?;
    let (datagram, _) = netlink.recv_from_full()?;
    match read(&datagram, &mut Vec::new()) {
        Err(error) if errno(&error) == Errno::ENOENT => Ok(()),
        done => done.map(drop),
    }
}

fn sockets(family: u8, socket_id: SocketId, states: StateFlags, extensions: ExtensionFlags) -> io::Result<Vec<Found>> {
    let netlink = open()?;
    let request = InetRequest { family, protocol: IPPROTO_TCP, extensions, states, socket_id };
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    let mut message = NetlinkMessage::new(header, SockDiagMessage::InetRequest(request).into());
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    netlink.send(&bytes, 0)?;
    let mut found = Vec::new();
    loop {
        let (datagram, _) = netlink.recv_from_full()?;
        if read(&datagram, &mut found)? {
            return Ok(found);
        }
    }
}

/// Reads one datagram; true when it holds the end of the answers.
fn read(mut datagram: &[u8], found: &mut Vec<Found>) -> io::Result<bool> {
    while !datagram.is_empty() {
        let invalid = |error| io::Error::new(io::ErrorKind::InvalidData, error);
        let message = NetlinkMessage::<SockDiagMessage>::deserialize(datagram).map_err(invalid)?;
        let length = (message.header.length as usize).next_multiple_of(ALIGNMENT);
        datagram = datagram.get(length..).unwrap_or_default();
        match message.payload {
            NetlinkPayload::Error(error) => {
                return error.code.map_or(Ok(true), |code| Err(io::Error::from_raw_os_error(code.get().abs())));
            }
            NetlinkPayload::Done(_) => return Ok(true),
            NetlinkPayload::InnerMessage(SockDiagMessage::InetResponse(socket)) => {
                found.push(Found::of(&socket));
            }
            _ => {}
        }
    }
    Ok(false)
}
