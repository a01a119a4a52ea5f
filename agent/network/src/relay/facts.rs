//! What can be relayed, and whose a packet is.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use super::HEADER;
use crate::discover;
use crate::error::{Result, link_error};
use crate::netlink::open_for;
use crate::netns::Netns;

/// Where TUN devices are made.
const CLONE_DEVICE: &str = "/dev/net/tun";

/// Whether this node can make the device.
pub fn is_possible() -> bool {
    Path::new(CLONE_DEVICE).exists()
}

/// The addresses of an interface that others can reach, and its MTU.
pub fn addresses_of(netns: &Netns, interface: &str) -> Result<(Vec<IpAddr>, u32)> {
    netns.run(|| {
        let mut netlink = open_for(interface)?;
        let link = netlink.link(interface)?;
        let found = discover::addresses(&mut netlink, link.index());
        let found = found.map_err(link_error("look up the addresses of", interface))?;
        let addresses = found.iter().map(ipnet::IpNet::addr).filter(|address| !is_of_the_link(address)).collect();
        Ok((addresses, link.mtu().unwrap_or_default()))
    })?
}

/// Each namespace has such a one of its own.
fn is_of_the_link(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    }
}

/// Who sends a packet that has its header in front; none when it is no whole packet.
pub fn source_of(packet: &[u8]) -> Option<IpAddr> {
    address_at(packet, 12, 8)
}

/// Whom it is for.
pub fn destination_of(packet: &[u8]) -> Option<IpAddr> {
    address_at(packet, 16, 24)
}

fn address_at(packet: &[u8], of_ipv4: usize, of_ipv6: usize) -> Option<IpAddr> {
    let ip = packet.get(HEADER..)?;
    match ip.first()? >> 4 {
        4 => Some(Ipv4Addr::from(*ip.get(of_ipv4..)?.first_chunk::<4>()?).into()),
        6 => Some(Ipv6Addr::from(*ip.get(of_ipv6..)?.first_chunk::<16>()?).into()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_says_who_sends_it_and_whom_it_is_for() {
        let mut packet = [&[0; HEADER][..], &[0x45], &[0; 19]].concat();
        packet[HEADER + 12..HEADER + 20].copy_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2]);
        assert_eq!(source_of(&packet), Some("10.0.0.1".parse().unwrap()));
        assert_eq!(destination_of(&packet), Some("10.0.0.2".parse().unwrap()));
        assert_eq!(destination_of(&packet[..HEADER + 19]), None);
        let mut packet = [&[0; HEADER][..], &[0x60], &[0; 39]].concat();
        (packet[HEADER + 23], packet[HEADER + 39]) = (1, 2);
        assert_eq!(
            (source_of(&packet), destination_of(&packet)),
            (Some("::1".parse().unwrap()), Some("::2".parse().unwrap()))
        );
        assert_eq!(source_of(&[]), None);
        assert_eq!(source_of(&[0; 60]), None);
    }
}
