//! Telling the network where an address is now.
//!
//! Switches and bridges learn from any frame with the container's Ethernet address; neighbours that hold another Ethernet
//! address for the container's IP correct it on a gratuitous ARP (RFC 5227, section 3) or an unsolicited neighbour
//! advertisement (RFC 4861, section 7.2.6). Frames get lost, so it is said more than once.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::sys::socket::{AddressFamily, LinkAddr, MsgFlags, SockFlag, SockType, SockaddrStorage, sendto, socket};

use crate::discover::addresses;
use crate::error::{Error, Result, link_error};
use crate::link::MacAddress;
use crate::netlink::open_for;
use crate::netns::Netns;

const ETHERTYPE_ARP: u16 = 0x0806;
pub(crate) const ETHERTYPE_IPV6: u16 = 0x86dd;
/// The shortest Ethernet frame, without its checksum.
const FRAME_MIN: usize = 60;

/// Announces the addresses of one container. It is opened ahead of time: sending is then one system call per frame.
#[derive(Debug)]
pub struct Announcer {
    interface: String,
    socket: OwnedFd,
    link: LinkAddr,
    frames: Vec<Vec<u8>>,
}

impl Announcer {
    /// Prepares the announcement of all addresses that an interface has now.
    pub fn open(container: &Netns, interface: &str) -> Result<Self> {
        container.run(|| Self::open_here(interface))?
    }

    fn open_here(interface: &str) -> Result<Self> {
        let failed = |source| Error::Announce { interface: interface.into(), source };
        let mut netlink = open_for(interface)?;
        let link = netlink.link(interface)?;
        let mac = link.mac().ok_or(Error::WrongKind { interface: interface.into(), what: "no Ethernet interface" })?;
        let addresses =
            addresses(&mut netlink, link.index()).map_err(link_error("read the addresses of", interface))?;
        let frames = addresses.iter().flat_map(|address| announcements(address.addr(), mac)).collect();
        // Protocol 0: this socket sends, and receives nothing.
        let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)
            .map_err(|errno| failed(errno.into()))?;
        Ok(Self { interface: interface.into(), socket, link: link_address(interface).map_err(failed)?, frames })
    }

    /// Sends every announcement once, from the container's interface.
    pub fn send(&self) -> Result<()> {
        for frame in &self.frames {
            sendto(self.socket.as_raw_fd(), frame, &self.link, MsgFlags::empty())
                .map_err(|errno| Error::Announce { interface: self.interface.clone(), source: errno.into() })?;
        }
        Ok(())
    }

    /// Sends them so many times, with a pause between, the first ones at once.
    pub async fn repeat(&self, rounds: u32, pause: Duration) -> Result<()> {
        for round in 0..rounds {
            if round > 0 {
                tokio::time::sleep(pause).await;
            }
            self.send()?;
        }
        Ok(())
    }
}

/// The interface as an address that a packet socket sends to.
pub(crate) fn link_address(interface: &str) -> io::Result<LinkAddr> {
    let packet = |address: SockaddrStorage| address.as_link_addr().copied();
    let found = getifaddrs()?
        .filter(|entry| entry.interface_name == interface)
        .find_map(|entry| entry.address.and_then(packet));
    found.ok_or_else(|| Errno::ENODEV.into())
}

fn announcements(address: IpAddr, mac: MacAddress) -> Vec<Vec<u8>> {
    match address {
        // Some listen to requests only, some to replies only.
        IpAddr::V4(address) => vec![arp(1, address, mac), arp(2, address, mac)],
        IpAddr::V6(address) => vec![neighbour_advertisement(address, mac)],
    }
}

/// RFC 826: hardware Ethernet (1) with 6 bytes, protocol IPv4 with 4, the operation, sender, target.
fn arp(operation: u16, address: Ipv4Addr, mac: MacAddress) -> Vec<u8> {
    const BROADCAST: [u8; 6] = [0xff; 6];
    let mut frame = ethernet(BROADCAST, mac, ETHERTYPE_ARP);
    frame.extend([0, 1, 0x08, 0, 6, 4]);
    frame.extend(operation.to_be_bytes());
    frame.extend(mac.0);
    frame.extend(address.octets());
    frame.extend(if operation == 1 { [0; 6] } else { BROADCAST });
    frame.extend(address.octets());
    frame.resize(frame.len().max(FRAME_MIN), 0);
    frame
}

/// RFC 4861, section 4.4, to all nodes: not solicited, overriding, with the link-layer address as option 2.
fn neighbour_advertisement(address: Ipv6Addr, mac: MacAddress) -> Vec<u8> {
    const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    const ALL_NODES_MAC: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];
    const ICMPV6: u8 = 58;
    const HOP_LIMIT: u8 = 255;
    const OVERRIDE: u8 = 0x20;
    let mut message = vec![136, 0, 0, 0, OVERRIDE, 0, 0, 0];
    message.extend(address.octets());
    message.extend([2, 1]);
    message.extend(mac.0);
    let length = u16::try_from(message.len()).unwrap_or(0).to_be_bytes();

    let mut pseudo_header = [address.octets(), ALL_NODES.octets()].concat();
    pseudo_header.extend([0, 0, length[0], length[1], 0, 0, 0, ICMPV6]);
    let checksum = internet_checksum(&[pseudo_header, message.clone()].concat());
    message[2..4].copy_from_slice(&checksum.to_be_bytes());

    let mut frame = ethernet(ALL_NODES_MAC, mac, ETHERTYPE_IPV6);
    frame.extend([0x60, 0, 0, 0, length[0], length[1], ICMPV6, HOP_LIMIT]);
    frame.extend(address.octets());
    frame.extend(ALL_NODES.octets());
    frame.extend(message);
    frame
}

pub(crate) fn ethernet(to: [u8; 6], from: MacAddress, kind: u16) -> Vec<u8> {
    [&to[..], &from.0, &kind.to_be_bytes()].concat()
}

/// RFC 1071, over an even number of bytes.
fn internet_checksum(bytes: &[u8]) -> u16 {
    let sum: u32 = bytes.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let folded = (folded & 0xffff) + (folded >> 16);
    !u16::try_from(folded).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_that_of_rfc_1071() {
        // The example of its section 3: the sum is ddf2.
        assert_eq!(internet_checksum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), !0xddf2);
    }
}
