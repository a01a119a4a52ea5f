//! Making a container's namespace and link, and unmaking them.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::net::IpAddr;
use std::path::Path;

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo,
    LinkMessage,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

use crate::error::{Error, Result, link_error};
use crate::link::{MacAddress, NetworkPlan, Route};
use crate::netlink::{Netlink, open_for};
use crate::netns::{Netns, on_own_thread};

/// The first byte of a host interface's address. A bridge without an address of its own takes the smallest of its ports',
/// and changes it with every container that comes or goes; with this it takes ours only when it has no other port.
const HOST_MAC_FIRST: u8 = 0xfe;

/// Makes a network namespace at a path and a link into it, as planned. The host interface is up but off every bridge:
/// nobody reaches the container before [`attach`](crate::attach). When something fails, nothing is left.
pub async fn create(netns_path: &Path, plan: &NetworkPlan) -> Result<()> {
    plan.check()?;
    let (path, plan) = (netns_path.to_owned(), plan.clone());
    let node = Netns::current()?;
    node.spawn(move || {
        make_netns(&path)?;
        make_link(&path, &plan).inspect_err(|_| {
            if let Err(error) = unmake_netns(&path) {
                tracing::warn!(%error, "a network namespace is left behind");
            }
        })
    })
    .await?
}

/// Brings the loopback of a namespace up. runc does so where it makes a namespace, but not where CRIU makes it.
pub fn bring_loopback_up(container: &Netns) -> Result<()> {
    container.run(|| set_up(&mut open_for("lo")?, "lo"))?
}

/// Deletes a container's host interface, and with it its other end, and the namespace's name. What is not there is no
/// error, so it can be called again after a crash.
pub async fn destroy(netns_path: &Path, host_interface: &str) -> Result<()> {
    let (path, interface) = (netns_path.to_owned(), host_interface.to_owned());
    let node = Netns::current()?;
    node.spawn(move || {
        delete_link(&interface)?;
        unmake_netns(&path)
    })
    .await?
}

fn make_netns(path: &Path) -> Result<()> {
    let failed = |source: io::Error| Error::Netns { doing: "make", netns: path.to_owned(), source };
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(failed)?;
    }
    OpenOptions::new().create(true).append(true).open(path).map_err(|source| match source.raw_os_error() {
        // The files of a namespace cannot be opened for writing.
        Some(code) if code == Errno::EACCES as i32 || code == Errno::EPERM as i32 => {
            Error::InUse { what: format!("the network namespace {}", path.display()) }
        }
        _ => failed(source),
    })?;
    if is_netns(path).map_err(failed)? {
        return Err(Error::InUse { what: format!("the network namespace {}", path.display()) });
    }
    let made = on_own_thread(|| {
        unshare(CloneFlags::CLONE_NEWNET)?;
        // A namespace lives as long as something is mounted of it, as `ip netns add` has it.
        let none: Option<&str> = None;
        mount(Some("/proc/thread-self/ns/net"), path, none, MsFlags::MS_BIND, none)
    });
    let made = made.and_then(|result| result.map_err(io::Error::from));
    made.map_err(|source| {
        let _ = fs::remove_file(path);
        failed(source)
    })
}

fn is_netns(path: &Path) -> io::Result<bool> {
    let stat = nix::sys::statfs::fstatfs(File::open(path)?)?;
    Ok(stat.filesystem_type() == nix::sys::statfs::NSFS_MAGIC)
}

fn unmake_netns(path: &Path) -> Result<()> {
    let failed = |source: io::Error| Error::Netns { doing: "remove", netns: path.to_owned(), source };
    match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
        Err(errno) => return Err(failed(errno.into())),
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(error)),
        _ => Ok(()),
    }
}

fn delete_link(interface: &str) -> Result<()> {
    let mut netlink = open_for(interface)?;
    let link = match netlink.link(interface) {
        Err(Error::NoInterface { .. }) => return Ok(()),
        link => link?,
    };
    if !link.is(&InfoKind::Veth) {
        return Err(Error::WrongKind {
            interface: interface.into(),
            what: "no end of a veth pair, so it is not deleted",
        });
    }
    let mut message = LinkMessage::default();
    message.header.index = link.index();
    match netlink.ask(RouteNetlinkMessage::DelLink(message), 0).map_err(link_error("delete", interface)) {
        Ok(_) | Err(Error::NoInterface { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

fn make_link(path: &Path, plan: &NetworkPlan) -> Result<()> {
    let container = Netns::open(path)?;
    make_pair(&container, plan)?;
    let configured = set_up_host(&plan.host_interface).and_then(|()| container.run(|| configure(plan))?);
    configured.inspect_err(|_| {
        if let Err(error) = delete_link(&plan.host_interface) {
            tracing::warn!(%error, "a host interface is left behind");
        }
    })
}

/// An address for the host interface that is never the container's own: with one address at both ends the bridge would
/// keep every frame for itself.
fn host_mac(MacAddress(mut mac): MacAddress) -> MacAddress {
    mac[0] = HOST_MAC_FIRST;
    mac[5] = !mac[5];
    MacAddress(mac)
}

/// Makes both ends at once, each in its namespace: the container's name is never seen on the node.
fn make_pair(container: &Netns, plan: &NetworkPlan) -> Result<()> {
    let host = plan.host_interface.as_str();
    let mut peer = end(&plan.interface, plan.mac, plan.mtu);
    peer.attributes.push(LinkAttribute::NetNsFd(container.raw_fd()));
    let mut pair = end(host, host_mac(plan.mac), plan.mtu);
    pair.attributes.push(LinkAttribute::LinkInfo(vec![
        LinkInfo::Kind(InfoKind::Veth),
        LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
    ]));
    let made = open_for(host)?.ask(RouteNetlinkMessage::NewLink(pair), NLM_F_CREATE | NLM_F_EXCL);
    made.map(drop).map_err(|source| match source.raw_os_error() {
        Some(code) if code == Errno::EEXIST as i32 => Error::InUse { what: format!("the interface {host}") },
        _ => link_error("make", host)(source),
    })
}

/// Brings the node's end up, without the IPv6 address that the kernel would give it: the node has no business on this link.
fn set_up_host(interface: &str) -> Result<()> {
    let mut netlink = open_for(interface)?;
    give_no_address_by_itself(&mut netlink, interface)?;
    set_up(&mut netlink, interface)
}

/// Keeps the kernel from giving an interface an IPv6 address. It takes that wish for an existing interface only, and obeys it
/// only before the interface is up.
pub(crate) fn give_no_address_by_itself(netlink: &mut Netlink, interface: &str) -> Result<()> {
    let mut message = LinkMessage::default();
    message.header.index = netlink.link(interface)?.index();
    let no_address = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
    message.attributes.push(LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![no_address])]));
    match netlink.ask(RouteNetlinkMessage::SetLink(message), 0) {
        // No IPv6 on this kernel, or none on a link with so small an MTU.
        Err(error) if error.raw_os_error() == Some(Errno::EAFNOSUPPORT as i32) => Ok(()),
        set => set.map(drop).map_err(link_error("switch off IPv6 on", interface)),
    }
}

fn end(name: &str, mac: MacAddress, mtu: u32) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(name.into()));
    message.attributes.push(LinkAttribute::Address(mac.0.to_vec()));
    message.attributes.push(LinkAttribute::Mtu(mtu));
    message
}

/// Sets up the container's side; runs in its namespace.
fn configure(plan: &NetworkPlan) -> Result<()> {
    let interface = plan.interface.as_str();
    let mut netlink = open_for(interface)?;
    let index = netlink.link(interface)?.index();
    set_up(&mut netlink, "lo")?;
    for address in &plan.addresses {
        let message = RouteNetlinkMessage::NewAddress(address_message(*address, index));
        netlink.ask(message, NLM_F_CREATE | NLM_F_EXCL).map_err(link_error("give its address to", interface))?;
    }
    set_up(&mut netlink, interface)?;
    // Routes to gateways need the routes to what is on the link.
    let (on_link, by_gateway): (Vec<&Route>, Vec<&Route>) =
        plan.routes.iter().partition(|route| route.gateway.is_none());
    for route in on_link.into_iter().chain(by_gateway) {
        let message = RouteNetlinkMessage::NewRoute(route_message(route, plan, index));
        netlink.ask(message, NLM_F_CREATE).map_err(link_error("set a route over", interface))?;
    }
    Ok(())
}

pub(crate) fn set_up(netlink: &mut Netlink, interface: &str) -> Result<()> {
    let mut message = LinkMessage::default();
    message.header.index = netlink.link(interface)?.index();
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    netlink.ask(RouteNetlinkMessage::SetLink(message), 0).map(drop).map_err(link_error("bring up", interface))
}

pub(crate) fn address_message(address: IpNet, index: u32) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(address.addr());
    message.header.prefix_len = address.prefix_len();
    message.header.index = index;
    message.attributes.push(AddressAttribute::Local(address.addr()));
    message.attributes.push(AddressAttribute::Address(address.addr()));
    if address.addr().is_ipv6() {
        // Duplicate address detection would hold the address back for a second, and the source still has it.
        message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
    }
    message
}

fn route_message(route: &Route, plan: &NetworkPlan, index: u32) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(route.destination.addr());
    message.header.destination_prefix_length = route.destination.prefix_len();
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::Boot;
    message.header.kind = RouteType::Unicast;
    message.header.scope = if route.gateway.is_some() { RouteScope::Universe } else { RouteScope::Link };
    message.attributes.push(RouteAttribute::Oif(index));
    if route.destination.prefix_len() > 0 {
        message.attributes.push(RouteAttribute::Destination(RouteAddress::from(route.destination.addr())));
    }
    if let Some(gateway) = route.gateway {
        message.attributes.push(RouteAttribute::Gateway(RouteAddress::from(gateway)));
        // Some networks have a gateway that no route leads to (Calico's 169.254.1.1): it is on the link all the same.
        if !plan.addresses.iter().any(|address| address.contains(&gateway)) {
            message.header.flags = RouteFlags::Onlink;
        }
    }
    message
}

pub(crate) fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ends_never_have_one_address() {
        for first in 0..=u8::MAX {
            for last in [0, 1, 0x7f, 0x80, 0xff] {
                let container = MacAddress([first, 2, 3, 4, 5, last]);
                assert_ne!(host_mac(container), container);
                assert_eq!(host_mac(container).0[0], HOST_MAC_FIRST);
            }
        }
    }
}
