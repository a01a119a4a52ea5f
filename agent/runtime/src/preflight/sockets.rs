//! Sockets: protocols that CRIU does not know, unix sockets that lead out of the container, and how many connections there
//! are.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::unix::{ShowFlags, StateFlags, UnixRequest, UnixResponse};
use netlink_sys::protocols::NETLINK_SOCK_DIAG;
use netlink_sys::{Socket as Netlink, SocketAddr};
use procfs::net::TcpState;
use procfs::process::Process;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::error::Error;
use crate::process::has_stopped_for_good;

use super::descriptors::Socket;
use super::{Finding, FindingKind};

/// The kernel's names of the protocols that CRIU restores (`struct proto`, read by the xattr below).
const KNOWN: [&str; 14] = [
    "UNIX",
    "UNIX-STREAM",
    "TCP",
    "TCPv6",
    "UDP",
    "UDPv6",
    "UDP-Lite",
    "UDPLITEv6",
    "PING",
    "PINGv6",
    "RAW",
    "RAWv6",
    "NETLINK",
    "PACKET",
];

/// Looks at all sockets of a container; returns how many are TCP connections.
pub(super) fn look(sockets: &[Socket], findings: &mut Vec<Finding>) -> Result<usize, Error> {
    let mut unix = Vec::new();
    for socket in sockets {
        let Some(protocol) = protocol_of(socket) else { continue };
        if protocol.starts_with("UNIX") {
            unix.push(*socket);
        }
        findings.extend(judge_protocol(&protocol).map(|finding| finding.of_descriptor(socket.pid, socket.fd)));
    }
    let namespaces = network_namespaces(sockets);
    let inodes: BTreeSet<u64> = sockets.iter().map(|socket| socket.inode).collect();
    if !unix.is_empty() {
        look_at_unix(&unix, &inodes, &namespaces, findings)?;
    }
    let mut connections: BTreeSet<u64> = BTreeSet::new();
    for &pid in namespaces.values() {
        match connections_of(pid) {
            Ok(of_namespace) => connections.extend(of_namespace.intersection(&inodes)),
            Err(error) if error.says_ended(pid) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(connections.len())
}

/// The name of a socket's protocol, without touching it: sockets have this extended attribute (`net/socket.c`). None when
/// the descriptor was closed meanwhile.
fn protocol_of(socket: &Socket) -> Option<String> {
    let path = format!("/proc/{}/fd/{}", socket.pid, socket.fd);
    let mut name = [0; 64];
    let length = rustix::fs::getxattr(path, "system.sockprotoname", &mut name[..]).ok()?;
    Some(String::from_utf8_lossy(&name[..length]).trim_end_matches('\0').to_owned())
}

fn judge_protocol(protocol: &str) -> Option<Finding> {
    if protocol.starts_with("MPTCP") {
        return Some(Finding::blocking(
            FindingKind::Mptcp,
            "has an MPTCP socket, which CRIU cannot dump".to_owned(),
            "make the program use TCP (Go: GODEBUG=multipathtcp=0; others: do not run it under mptcpize)",
        ));
    }
    (!KNOWN.contains(&protocol)).then(|| {
        Finding::blocking(
            FindingKind::SocketProtocol,
            format!("has a socket of protocol {protocol}, which CRIU cannot dump"),
            "turn off the part of the program that uses it",
        )
    })
}

/// One process for each network namespace that the sockets' owners are in: the one of the lowest pid, which is likely to stay.
fn network_namespaces(sockets: &[Socket]) -> BTreeMap<PathBuf, i32> {
    let pids: BTreeSet<i32> = sockets.iter().map(|socket| socket.pid).collect();
    pids.into_iter().rev().filter_map(|pid| Some((fs::read_link(format!("/proc/{pid}/ns/net")).ok()?, pid))).collect()
}

/// The inodes of the connections in a process's network namespace.
fn connections_of(pid: i32) -> Result<BTreeSet<u64>, Error> {
    let process = Process::new(pid).map_err(Error::proc(pid, "stat"))?;
    // Without IPv6 there is no such file.
    let six = process.tcp6().unwrap_or_default();
    let entries = process.tcp().map_err(Error::proc(pid, "net/tcp"))?.into_iter().chain(six);
    Ok(entries
        .filter(|entry| !matches!(entry.state, TcpState::Listen | TcpState::Close | TcpState::TimeWait))
        .map(|entry| entry.inode)
        .collect())
}

fn look_at_unix(
    sockets: &[Socket],
    inodes: &BTreeSet<u64>,
    namespaces: &BTreeMap<PathBuf, i32>,
    findings: &mut Vec<Finding>,
) -> Result<(), Error> {
    let mut table = BTreeMap::new();
    for &pid in namespaces.values() {
        let listed = match unix_sockets(pid) {
            Ok(listed) => listed,
            Err(_) if has_stopped_for_good(pid) => continue,
            Err(source) => return Err(Error::SockDiag { pid, source }),
        };
        table.extend(listed.into_iter().map(|entry| (u64::from(entry.header.inode), entry)));
    }
    let waiting: BTreeSet<u64> = inodes
        .iter()
        .filter_map(|inode| table.get(inode))
        .filter_map(UnixResponse::pending_connections)
        .flat_map(|pending| pending.iter().copied().map(u64::from))
        .collect();
    for socket in sockets {
        let outside = match table.get(&socket.inode) {
            None => Some("belongs to another network namespace than the container's".to_owned()),
            Some(entry) => other_end(socket.pid, entry, inodes, &waiting),
        };
        findings.extend(outside.map(|what| {
            Finding::blocking(
                FindingKind::ExternalUnixSocket,
                format!("has a unix socket that {what}"),
                "close the connection, or put the other side into the container",
            )
            .of_descriptor(socket.pid, socket.fd)
        }));
    }
    Ok(())
}

/// Where a socket is connected to, if that is outside of the container.
fn other_end(pid: i32, entry: &UnixResponse, inodes: &BTreeSet<u64>, waiting: &BTreeSet<u64>) -> Option<String> {
    let own = u64::from(entry.header.inode);
    match entry.peer().map(u64::from)? {
        // The other end has no inode: it was closed (then this end is shut down), or nobody has accepted it yet.
        0 if entry.shutdown_state().unwrap_or(0) == 0 && !waiting.contains(&own) => {
            Some("waits to be accepted outside of the container".to_owned())
        }
        0 => None,
        peer if inodes.contains(&peer) => None,
        peer => {
            let name = name_of(pid, peer).map(|name| format!(" ({name})")).unwrap_or_default();
            Some(format!("is connected to socket {peer}{name} outside of the container"))
        }
    }
}

/// The path to which a socket is bound that a process is connected to; an accepted one shows its listener's. An accepted
/// socket lies in the network namespace of its client, one of a pair or a datagram socket maybe in the host's.
fn name_of(pid: i32, inode: u64) -> Option<String> {
    let inode = inode.to_string();
    [format!("/proc/{pid}/net/unix"), "/proc/net/unix".to_owned()].iter().find_map(|table| {
        let text = fs::read(table).ok()?;
        String::from_utf8_lossy(&text).lines().find_map(|line| {
            let mut fields = line.split_whitespace().skip(6);
            (fields.next()? == inode).then(|| fields.next().map(str::to_owned))?
        })
    })
}

/// All unix sockets in a process's network namespace. A thread goes there, so that this one stays where it is.
fn unix_sockets(pid: i32) -> io::Result<Vec<UnixResponse>> {
    let namespace = File::open(format!("/proc/{pid}/ns/net"))?;
    std::thread::scope(|scope| {
        let list = scope.spawn(|| {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
            list_unix()
        });
        list.join().unwrap_or_else(|_| Err(io::Error::other("the listing thread panicked")))
    })
}

fn list_unix() -> io::Result<Vec<UnixResponse>> {
    let mut netlink = Netlink::new(NETLINK_SOCK_DIAG)?;
    netlink.bind_auto()?;
    netlink.connect(&SocketAddr::new(0, 0))?;
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    let request = UnixRequest {
        // Every state: an unconnected datagram socket is in TCP_CLOSE, which the crate does not name.
        state_flags: StateFlags::from_bits_retain(u32::MAX),
        inode: 0,
        show_flags: ShowFlags::PEER | ShowFlags::ICONS,
        cookie: [0xff; 8],
    };
    let mut message = NetlinkMessage::new(header, SockDiagMessage::UnixRequest(request).into());
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    netlink.send(&bytes, 0)?;
    let mut found = Vec::new();
    loop {
        let (datagram, _) = netlink.recv_from_full()?;
        if !read_datagram(&datagram, &mut found)? {
            return Ok(found);
        }
    }
}

/// Reads the messages of one datagram; `false` after the last one of the answer.
fn read_datagram(datagram: &[u8], found: &mut Vec<UnixResponse>) -> io::Result<bool> {
    let mut rest = datagram;
    while !rest.is_empty() {
        let message = NetlinkMessage::<SockDiagMessage>::deserialize(rest)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?;
        // Messages are padded to four bytes.
        let length = (message.header.length as usize).next_multiple_of(4);
        match message.payload {
            NetlinkPayload::InnerMessage(SockDiagMessage::UnixResponse(response)) => found.push(*response),
            NetlinkPayload::Done(_) => return Ok(false),
            NetlinkPayload::Error(error) => return Err(error.to_io()),
            _ => {}
        }
        rest = rest.get(length..).unwrap_or_default();
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

    use super::*;

    fn socket(descriptor: &impl AsRawFd) -> Socket {
        let (pid, fd) = (std::process::id().cast_signed(), descriptor.as_raw_fd());
        let link = fs::read_link(format!("/proc/self/fd/{fd}")).unwrap();
        let inode = link.to_str().unwrap().trim_start_matches("socket:[").trim_end_matches(']').parse().unwrap();
        Socket { pid, fd, inode }
    }

    fn kinds(sockets: &[Socket]) -> Vec<FindingKind> {
        let mut findings = Vec::new();
        look(sockets, &mut findings).unwrap();
        findings.into_iter().map(|finding| finding.kind).collect()
    }

    #[test]
    fn a_pair_is_external_only_when_one_end_is_missing() {
        let (left, right) = UnixStream::pair().unwrap();
        assert_eq!(kinds(&[socket(&left), socket(&right)]), []);
        assert_eq!(kinds(&[socket(&left)]), [FindingKind::ExternalUnixSocket]);
        let (one, other) = UnixStream::pair().unwrap();
        drop(other);
        assert_eq!(kinds(&[socket(&one)]), [], "its other end is closed");
        let free = UnixDatagram::unbound().unwrap();
        assert_eq!(kinds(&[socket(&free)]), []);
    }

    #[test]
    fn a_connection_that_waits_belongs_to_its_listener() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sock");
        let listener = UnixListener::bind(&path).unwrap();
        let client = UnixStream::connect(&path).unwrap();
        assert_eq!(kinds(&[socket(&listener), socket(&client)]), []);
        assert_eq!(kinds(&[socket(&client)]), [FindingKind::ExternalUnixSocket]);
        let (accepted, _) = listener.accept().unwrap();
        let mut findings = Vec::new();
        look(&[socket(&client)], &mut findings).unwrap();
        assert!(findings[0].message.contains(path.to_str().unwrap()), "{findings:?}");
        assert_eq!(kinds(&[socket(&client), socket(&accepted)]), []);
    }

    #[test]
    fn connections_are_counted_and_listeners_are_not() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        let sockets = [socket(&listener), socket(&client), socket(&accepted)];
        assert_eq!(look(&sockets, &mut Vec::new()).unwrap(), 2);
    }

    #[test]
    fn unknown_protocols_are_found() {
        assert_eq!(judge_protocol("MPTCPv6").unwrap().kind, FindingKind::Mptcp);
        assert_eq!(judge_protocol("AF_VSOCK").unwrap().kind, FindingKind::SocketProtocol);
        for known in ["TCP", "UNIX-STREAM", "NETLINK", "PACKET"] {
            assert_eq!(judge_protocol(known), None);
        }
    }
}
