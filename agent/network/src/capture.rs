//! Keeping what arrives for a container while its link is cut.
//!
//! A packet socket sees a packet where it enters the node, before the bridge hands it to the port that is cut; what the
//! node itself sends is seen where it leaves for the bridge. A filter in the kernel (packet(7), and Documentation/
//! networking/filter.rst of the kernel) passes on what is for the container's addresses only.

use std::collections::hash_map::{Entry, RandomState};
use std::collections::{HashMap, VecDeque};
use std::hash::BuildHasher;
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use netlink_packet_route::link::InfoKind;
use nix::libc;
use nix::sys::socket::sockopt::{RcvBuf, RcvBufForce, ReceiveTimestampns};
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, bind,
    getsockname, recvmsg, setsockopt, socket,
};
use nix::sys::time::TimeSpec;
use socket2::{SockFilter, SockRef};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::OnceCell;

use crate::error::{Error, Result, link_error};
use crate::netlink::{Link, open_for};
use crate::segment::{self, without_padding};

/// What the kernel may keep until it is read. It takes memory for what is kept only, but more than the bytes of it.
const KEPT: usize = 32 << 20;
/// The largest IP packet, if it is no jumbogram, with the header that IPv6 does not count.
const PACKET_MAX: usize = (64 << 10) + 40;

/// A packet that arrived for a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Captured {
    /// When the kernel saw it.
    pub at: SystemTime,
    /// The packet from its IP header on, as the kernel held it: see [`segments`](crate::segments).
    pub packet: Vec<u8>,
}

impl Captured {
    /// Whether it is a segment of a TCP connection that exists already. A socket takes such a one only when it fits the connection,
    /// which the node's firewall has let through when it was made.
    pub fn continues_connection(&self) -> bool {
        segment::continues_connection(&self.packet)
    }
}

/// Captures what arrives for one container on the node whose namespace it was opened in.
///
/// It begins with [`open`](Self::open), and what the kernel keeps is bounded: so it has to be read all the time, also before
/// the cut. What came before the cut has reached the container, and is told by its [time](Captured::at): take the
/// clock's right before [`cut`](crate::cut()), so that at worst a packet comes twice, and none is lost. The first packets
/// after the opening may have the time at which they were read instead.
///
/// It sees packets where they enter the node: a rule of the node's firewall that would drop a packet between there and the
/// container has not been asked.
#[derive(Debug)]
pub struct Capture {
    socket: Arc<OwnedFd>,
    /// The same, once it is waited for: only then there surely is a runtime.
    waiting: OnceCell<AsyncFd<Arc<OwnedFd>>>,
    receiver: Mutex<Receiver>,
}

impl Capture {
    /// Begins to capture what any interface of this namespace receives for these addresses, and what its bridges send to
    /// them. The interface that is excepted is the container's own host interface, which has to exist.
    pub fn open(addresses: &[IpAddr], except_interface: &str) -> Result<Self> {
        let mut netlink = open_for(except_interface)?;
        let except = netlink.link(except_interface)?.index();
        let links = netlink.links().map_err(link_error("list the interfaces beside", except_interface))?;
        let bridges: Vec<u32> = links.iter().filter(|link| link.is(&InfoKind::Bridge)).map(Link::index).collect();
        let socket = open_socket(&filter(addresses, except, &bridges))?;
        Ok(Self { socket: Arc::new(socket), waiting: OnceCell::new(), receiver: Mutex::default() })
    }

    /// Waits for the next packet. It can be called from any task of one runtime; a call that is given up takes no packet
    /// with it.
    pub async fn next(&self) -> Result<Captured> {
        let failed = |source| Error::Capture { doing: "read", source };
        let waiting = self.waiting.get_or_try_init(|| async { self.registered() }).await.map_err(failed)?;
        loop {
            let mut ready = waiting.readable().await.map_err(failed)?;
            if let Ok(received) = ready.try_io(|socket| self.receive(socket.get_ref()))
                && let Some(captured) = received.map_err(failed)?
            {
                return Ok(captured);
            }
        }
    }

    /// The next packet of those that have arrived; none when all were given.
    pub fn try_next(&self) -> Result<Option<Captured>> {
        loop {
            match self.receive(&self.socket) {
                Ok(None) => {}
                Ok(captured) => return Ok(captured),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(source) => return Err(Error::Capture { doing: "read", source }),
            }
        }
    }

    #[expect(deprecated, reason = "its successor is unsafe; the descriptor of an `OwnedFd` stays the same")]
    fn registered(&self) -> io::Result<AsyncFd<Arc<OwnedFd>>> {
        AsyncFd::with_interest(Arc::clone(&self.socket), Interest::READABLE)
    }

    /// Takes one packet from the socket; none when it is not to be given.
    fn receive(&self, socket: &OwnedFd) -> io::Result<Option<Captured>> {
        self.receiver.lock().unwrap_or_else(PoisonError::into_inner).receive(socket)
    }
}

/// Opened for no protocol, a packet socket receives nothing: so nothing gets past the filter before it is there.
fn open_socket(filter: &[SockFilter]) -> Result<OwnedFd> {
    let failed = |doing| move |source: io::Error| Error::Capture { doing, source };
    let packet_socket = |protocol: Option<SockProtocol>| {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        socket(AddressFamily::Packet, SockType::Datagram, flags, protocol)
    };
    let opened = packet_socket(None).map_err(io::Error::from).map_err(failed("open"))?;
    SockRef::from(&opened).attach_filter(filter).map_err(failed("filter for"))?;
    // Only with the capability it is more than the system's limit.
    setsockopt(&opened, RcvBufForce, &KEPT)
        .or_else(|_| setsockopt(&opened, RcvBuf, &KEPT))
        .and_then(|()| setsockopt(&opened, ReceiveTimestampns, &true))
        .map_err(|errno| failed("set up")(errno.into()))?;
    // The address that is bound to says the protocol. A socket that was opened for it has that address.
    packet_socket(Some(SockProtocol::EthAll))
        .and_then(|model| getsockname::<SockaddrStorage>(model.as_raw_fd()))
        .and_then(|every_protocol| bind(opened.as_raw_fd(), &every_protocol))
        .map_err(|errno| failed("bind")(errno.into()))?;
    Ok(opened)
}

/// What is needed to receive a packet, and to know whether it was received before.
#[derive(Debug)]
struct Receiver {
    buffer: Vec<u8>,
    times: Vec<u8>,
    seen: Seen,
}

impl Default for Receiver {
    fn default() -> Self {
        Self { buffer: vec![0; PACKET_MAX], times: nix::cmsg_space!(TimeSpec), seen: Seen::default() }
    }
}

impl Receiver {
    fn receive(&mut self, socket: &OwnedFd) -> io::Result<Option<Captured>> {
        let mut buffers = [IoSliceMut::new(&mut self.buffer)];
        let flags = MsgFlags::empty();
        let message = recvmsg::<LinkAddr>(socket.as_raw_fd(), &mut buffers, Some(&mut self.times), flags)?;
        let (length, is_whole) = (message.bytes, !message.flags.contains(MsgFlags::MSG_TRUNC));
        let place = message.address.map(|from| Place { interface: from.ifindex(), kind: from.pkttype() });
        let at = message.cmsgs()?.find_map(|part| match part {
            ControlMessageOwned::ScmTimestampns(time) => Some(SystemTime::UNIX_EPOCH + Duration::from(time)),
            _ => None,
        });
        let packet = self.buffer.get(..length).filter(|_| is_whole).and_then(without_padding);
        let (Some(packet), Some(place)) = (packet, place) else { return Ok(None) };
        if self.seen.is_copy(packet, place) {
            return Ok(None);
        }
        Ok(Some(Captured { at: at.unwrap_or_else(SystemTime::now), packet: packet.to_vec() }))
    }
}

/// Where a packet was seen: the interface, and on which of its ways through there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    interface: usize,
    kind: u8,
}

/// The last packets that were given, by hash, with the place where each was seen first.
///
/// On its way through a node a packet is seen on a network card, on the bond that the card is part of, on a VLAN of that, on
/// a bridge. What is seen once more at a place where its like was seen first is no such copy, but another packet.
#[derive(Debug, Default)]
struct Seen {
    hashing: RandomState,
    places: HashMap<u64, Place>,
    order: VecDeque<u64>,
}

impl Seen {
    /// How many packets are remembered: the places of one follow each other within microseconds.
    const REMEMBERED: usize = 4096;

    /// Whether a packet is one that was seen elsewhere before.
    fn is_copy(&mut self, packet: &[u8], place: Place) -> bool {
        let hash = self.hashing.hash_one(unchanging(packet));
        match self.places.entry(hash) {
            Entry::Occupied(first) => *first.get() != place,
            Entry::Vacant(free) => {
                free.insert(place);
                self.order.push_back(hash);
                if self.order.len() > Self::REMEMBERED
                    && let Some(oldest) = self.order.pop_front()
                {
                    self.places.remove(&oldest);
                }
                false
            }
        }
    }
}

/// The parts of a packet that stay as they are when the node forwards it: all but the hops it has left, and what follows
/// from those.
fn unchanging(packet: &[u8]) -> [&[u8]; 3] {
    let hops_and_checksum =
        if packet.first().is_some_and(|first| first >> 4 == 4) { [8, 9, 10, 12] } else { [7, 8, 8, 8] };
    let [hops, after_hops, checksum, after_checksum] = hops_and_checksum;
    let part = |from: usize, to: usize| packet.get(from..to).unwrap_or_default();
    [part(0, hops), part(after_hops, checksum), part(after_checksum, packet.len())]
}

/// Instructions of classic BPF (`include/uapi/linux/bpf_common.h` and `filter.h`).
mod instruction {
    use socket2::SockFilter;

    /// Beyond the packet: what the kernel knows of it.
    const ANCILLARY: u32 = 0xffff_f000;
    pub(super) const PROTOCOL: u32 = ANCILLARY;
    pub(super) const KIND: u32 = ANCILLARY + 4;
    pub(super) const INTERFACE: u32 = ANCILLARY + 8;

    /// Loads a word of the packet.
    pub(super) const fn load(at: u32) -> SockFilter {
        SockFilter::new(0x20, 0, 0, at)
    }

    /// Skips so many instructions when the word is this one, and so many when it is not.
    pub(super) const fn equal(value: u32, then: u8, otherwise: u8) -> SockFilter {
        SockFilter::new(0x15, then, otherwise, value)
    }

    /// Skips so many instructions, which may be many.
    pub(super) fn skip(instructions: &[SockFilter]) -> SockFilter {
        SockFilter::new(0x05, 0, 0, u32::try_from(instructions.len()).unwrap_or(u32::MAX))
    }

    pub(super) const PASS: SockFilter = SockFilter::new(0x06, 0, 0, u32::MAX);
    pub(super) const DROP: SockFilter = SockFilter::new(0x06, 0, 0, 0);
}

/// A program that passes what is for one of these addresses, unless it is on the excepted interface, is for many hosts, or
/// leaves an interface that is not one of these bridges.
fn filter(addresses: &[IpAddr], except: u32, bridges: &[u32]) -> Vec<SockFilter> {
    use instruction::{DROP, INTERFACE, KIND, PROTOCOL, equal, load, skip};
    const TO_US: u32 = libc::PACKET_HOST as u32;
    const TO_ANOTHER: u32 = libc::PACKET_OTHERHOST as u32;
    const LEAVING: u32 = libc::PACKET_OUTGOING as u32;
    const IPV4: u32 = libc::ETH_P_IP as u32;
    const IPV6: u32 = libc::ETH_P_IPV6 as u32;

    let (mut ipv4, mut ipv6) = (Vec::new(), Vec::new());
    for address in addresses {
        match address {
            IpAddr::V4(address) => ipv4.extend(to_ipv4(*address)),
            IpAddr::V6(address) => ipv6.extend(to_ipv6(*address)),
        }
    }
    ipv4.push(DROP);
    ipv6.push(DROP);

    // Each bridge's test is followed by the way past those that come after it.
    let mut leaving = vec![DROP];
    for bridge in bridges {
        let past_the_others = skip(&leaving);
        leaving.splice(0..0, [equal(*bridge, 0, 1), past_the_others]);
    }
    leaving.insert(0, load(INTERFACE));

    let mut program = vec![load(INTERFACE), equal(except, 0, 1), DROP, load(KIND)];
    program.extend([equal(TO_US, 3, 0), equal(TO_ANOTHER, 2, 0), equal(LEAVING, 2, 0), DROP, skip(&leaving)]);
    program.extend(leaving);
    program.extend([load(PROTOCOL), equal(IPV4, 3, 0), equal(IPV6, 1, 0), DROP, skip(&ipv4)]);
    program.extend(ipv4);
    program.extend(ipv6);
    program
}

/// Passes a packet to this address.
fn to_ipv4(address: Ipv4Addr) -> [SockFilter; 3] {
    const DESTINATION: u32 = 16;
    [instruction::load(DESTINATION), instruction::equal(address.to_bits(), 0, 1), instruction::PASS]
}

/// The same, word by word: one that differs skips to the end.
fn to_ipv6(address: Ipv6Addr) -> Vec<SockFilter> {
    const DESTINATION: u32 = 24;
    let octets = address.octets();
    let (words, _) = octets.as_chunks::<4>();
    let tests = words.iter().zip([(0, 7), (4, 5), (8, 3), (12, 1)]).flat_map(|(word, (offset, to_the_end))| {
        let word = u32::from_be_bytes(*word);
        [instruction::load(DESTINATION + offset), instruction::equal(word, 0, to_the_end)]
    });
    tests.chain([instruction::PASS]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_one_that_was_seen_elsewhere_first() {
        let mut seen = Seen::default();
        let (card, bond) = (Place { interface: 2, kind: 3 }, Place { interface: 5, kind: 0 });
        let mut packet = [0x45; 40];
        assert!(!seen.is_copy(&packet, card) && seen.is_copy(&packet, bond));
        // The same bytes once more: senders do that.
        assert!(!seen.is_copy(&packet, card) && seen.is_copy(&packet, bond));
        // Forwarded, so with one hop less.
        (packet[8], packet[10], packet[11]) = (0x44, 0x46, 0x45);
        assert!(seen.is_copy(&packet, bond) && !seen.is_copy(&packet, card));
        packet[9] = 0x46;
        assert!(!seen.is_copy(&packet, bond));
        packet[0] = 0x65;
        assert!(!seen.is_copy(&packet, card));
        packet[7] = 0x44;
        assert!(seen.is_copy(&packet, bond));
        assert!(!seen.is_copy(&[], bond), "nothing at all is no reason to panic");
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut seen = Seen::default();
        let packet = |number: u32| number.to_be_bytes().repeat(10);
        for number in 0..20_000 {
            assert!(!seen.is_copy(&packet(number), Place { interface: 1, kind: 0 }));
        }
        assert_eq!((seen.places.len(), seen.order.len()), (Seen::REMEMBERED, Seen::REMEMBERED));
        assert!(seen.is_copy(&packet(19_999), Place { interface: 2, kind: 0 }));
    }
}
