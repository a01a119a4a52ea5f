//! Reading what a container has.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::InfoKind;
use netlink_packet_route::nsid::{NsidAttribute, NsidMessage};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use crate::error::{Error, Result, link_error};
use crate::link::{ContainerLink, Route};
use crate::netlink::{Link, Netlink, open_for};
use crate::netns::Netns;

/// Reads one interface of a container's namespace, and looks for its other end in the caller's.
pub async fn discover(container: &Netns, interface: &str) -> Result<ContainerLink> {
    let node = Netns::current()?;
    let name = interface.to_owned();
    let (link, other_end) = container.spawn(move || read(&name)).await??;
    let Some(other_end) = other_end else { return Ok(link) };
    let container = container.clone();
    let peer = node.spawn(move || find_peer(&container, other_end)).await??;
    Ok(ContainerLink { peer, ..link })
}

/// The two indexes of a pair, each in its own end's namespace.
#[derive(Clone, Copy)]
struct Pair {
    container: u32,
    host: u32,
}

fn read(interface: &str) -> Result<(ContainerLink, Option<Pair>)> {
    let mut netlink = open_for(interface)?;
    let link = netlink.link(interface)?;
    let mac = link.mac().ok_or(Error::WrongKind { interface: interface.into(), what: "no Ethernet interface" })?;
    let other_end = link.peer_index().filter(|_| link.is(&InfoKind::Veth));
    let found = ContainerLink {
        interface: interface.into(),
        mac,
        mtu: link.mtu().unwrap_or(0),
        addresses: addresses(&mut netlink, link.index()).map_err(link_error("read the addresses of", interface))?,
        routes: routes(&mut netlink, link.index()).map_err(link_error("read the routes of", interface))?,
        peer: None,
    };
    Ok((found, other_end.map(|host| Pair { container: link.index(), host })))
}

/// The addresses of one interface, in the kernel's order: the first of a network is the one it sends from.
pub(crate) fn addresses(netlink: &mut Netlink, index: u32) -> io::Result<Vec<IpNet>> {
    let answers = netlink.dump(RouteNetlinkMessage::GetAddress(AddressMessage::default()))?;
    Ok(answers.iter().filter_map(|answer| address(answer, index)).collect())
}

fn address(answer: &RouteNetlinkMessage, index: u32) -> Option<IpNet> {
    match answer {
        RouteNetlinkMessage::NewAddress(message) if message.header.index == index => address_of(message),
        _ => None,
    }
}

pub(crate) fn address_of(message: &AddressMessage) -> Option<IpNet> {
    // On IPv4 Local is the interface's own, and Address may be the other end's; IPv6 has Address alone.
    let local = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    });
    let address = local.or_else(|| {
        message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Address(address) => Some(*address),
            _ => None,
        })
    });
    IpNet::new(address?, message.header.prefix_len).ok()
}

fn routes(netlink: &mut Netlink, index: u32) -> io::Result<Vec<Route>> {
    let mut routes = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut message = RouteMessage::default();
        message.header.address_family = family;
        let answers = match netlink.dump(RouteNetlinkMessage::GetRoute(message)) {
            // A kernel without IPv6 has no routes of that kind.
            Err(error) if family == AddressFamily::Inet6 && error.kind() == io::ErrorKind::Unsupported => continue,
            answers => answers?,
        };
        routes.extend(answers.iter().filter_map(|answer| route(answer, index)));
    }
    Ok(routes)
}

fn route(answer: &RouteNetlinkMessage, index: u32) -> Option<Route> {
    let RouteNetlinkMessage::NewRoute(message) = answer else { return None };
    if is_by_itself(message) || !moves(message, index) {
        return None;
    }
    let gateway = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Gateway(address) => address_in(address),
        _ => None,
    });
    Some(Route { destination: destination(message)?, gateway })
}

/// The kernel makes its own routes again for the addresses, a router's advertisement comes again, and what was learnt about
/// single destinations is learnt again.
pub(crate) fn is_by_itself(message: &RouteMessage) -> bool {
    let made = matches!(message.header.protocol, RouteProtocol::Kernel | RouteProtocol::Ra);
    made || message.header.flags.contains(RouteFlags::Cloned)
}

/// Whether it is a route over one interface that another node can make.
pub(crate) fn moves(message: &RouteMessage, index: u32) -> bool {
    let header = &message.header;
    let over_it =
        message.attributes.iter().any(|attribute| matches!(attribute, RouteAttribute::Oif(oif) if *oif == index));
    over_it && header.table == RouteHeader::RT_TABLE_MAIN && header.kind == RouteType::Unicast
}

pub(crate) fn destination(message: &RouteMessage) -> Option<IpNet> {
    let everything = match message.header.address_family {
        AddressFamily::Inet => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        _ => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    let named = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(address) => address_in(address),
        _ => None,
    });
    IpNet::new(named.unwrap_or(everything), message.header.destination_prefix_length).ok()
}

fn address_in(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some(IpAddr::V4(*address)),
        RouteAddress::Inet6(address) => Some(IpAddr::V6(*address)),
        _ => None,
    }
}

/// The name of the pair's other end, when it is in the calling thread's namespace. Indexes repeat between namespaces, so
/// both ends have to point at each other.
fn find_peer(container: &Netns, pair: Pair) -> Result<Option<String>> {
    let failed = link_error("look for the other end of", "the container's interface");
    let search = || -> io::Result<Option<String>> {
        let mut netlink = Netlink::open()?;
        let link = match netlink.link_at(pair.host) {
            Err(error) if error.raw_os_error() == Some(nix::errno::Errno::ENODEV as i32) => return Ok(None),
            link => link?,
        };
        let points_back = link.is(&InfoKind::Veth)
            && link.peer_index() == Some(pair.container)
            && points_into(&mut netlink, &link, container)?;
        Ok(link.name().filter(|_| points_back).map(ToOwned::to_owned))
    };
    search().map_err(failed)
}

/// Whether an interface's other end is in the given namespace.
fn points_into(netlink: &mut Netlink, link: &Link, netns: &Netns) -> io::Result<bool> {
    let Some(other) = link.peer_netns_id() else { return Ok(false) };
    let fd = u32::try_from(netns.raw_fd()).unwrap_or(u32::MAX);
    let mut message = NsidMessage::default();
    message.attributes.push(NsidAttribute::Fd(fd));
    let answers = netlink.ask(RouteNetlinkMessage::GetNsId(message), 0)?;
    Ok(answers.iter().any(|answer| match answer {
        RouteNetlinkMessage::NewNsId(message) => message.attributes.contains(&NsidAttribute::Id(other)),
        _ => false,
    }))
}
