//! The largest packet of a container's interface.

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkMessage};

use crate::error::{Result, link_error};
use crate::netlink::open_for;
use crate::netns::Netns;

/// Sets the MTU of an interface in a container's namespace, in bytes.
///
/// Every change makes the kernel look again at what each connection may send: the way to wake restored TCP sockets from
/// the small segments that they are restored with.
pub fn set_mtu(container: &Netns, interface: &str, mtu: u32) -> Result<()> {
    container.run(|| {
        let mut netlink = open_for(interface)?;
        let mut message = LinkMessage::default();
        message.header.index = netlink.link(interface)?.index();
        message.attributes.push(LinkAttribute::Mtu(mtu));
        let set = netlink.ask(RouteNetlinkMessage::SetLink(message), 0);
        set.map(drop).map_err(link_error("set the MTU of", interface))
    })?
}
