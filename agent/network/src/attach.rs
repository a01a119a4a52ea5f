//! Joining a host interface to its bridge.

use std::thread;
use std::time::{Duration, Instant};

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkMessage};

use crate::cut::LinkHandle;
use crate::error::{Error, Result, link_error};
use crate::netlink::{BridgePortState, Link, Netlink, open_for};

/// How long the kernel may take to notice that both ends of a pair are up. It has, where the pair was made before.
const CARRIER: Duration = Duration::from_secs(2);
const POLL: Duration = Duration::from_millis(1);

/// A bridge that links can join, as it is now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BridgeFacts {
    /// It speaks the spanning tree protocol: a new port forwards only after twice its forward delay, 30 s unless changed.
    pub spanning_tree: bool,
}

/// Looks whether links can join a bridge: that it exists, is a bridge, and is up.
pub fn look_at_bridge(bridge: &str) -> Result<BridgeFacts> {
    let controller = joinable(&mut open_for(bridge)?, bridge)?;
    Ok(BridgeFacts { spanning_tree: controller.speaks_spanning_tree() })
}

fn joinable(netlink: &mut Netlink, bridge: &str) -> Result<Link> {
    let controller = netlink.link(bridge)?;
    if !controller.is(&InfoKind::Bridge) {
        return Err(Error::WrongKind { interface: bridge.into(), what: "no bridge" });
    }
    if !controller.is_up() {
        return Err(Error::BridgeDown { bridge: bridge.into() });
    }
    Ok(controller)
}

/// Makes a host interface a port of a bridge, and returns when the bridge forwards for it. That it is one already is no
/// error.
pub fn attach(host_interface: &str, bridge: &str) -> Result<LinkHandle> {
    let mut netlink = open_for(host_interface)?;
    let controller = joinable(&mut netlink, bridge)?;
    let not_forwarding = |why| Error::NotForwarding { bridge: bridge.into(), interface: host_interface.into(), why };
    let index = netlink.link(host_interface)?.index();
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    message.attributes.push(LinkAttribute::Controller(controller.index()));
    netlink
        .ask(RouteNetlinkMessage::SetLink(message), 0)
        .map_err(link_error("attach to its bridge", host_interface))?;
    forward(&mut netlink, host_interface)?
        .map_or_else(|| Ok(LinkHandle::new(host_interface)), |why| Err(not_forwarding(why)))
}

/// Takes a host interface off its bridge. That it is on none is no error.
pub fn detach(host_interface: &str) -> Result<()> {
    let mut netlink = open_for(host_interface)?;
    let link = netlink.link(host_interface)?;
    if link.controller().is_none() {
        return Ok(());
    }
    let mut message = LinkMessage::default();
    message.header.index = link.index();
    message.attributes.push(LinkAttribute::Controller(0));
    netlink
        .ask(RouteNetlinkMessage::SetLink(message), 0)
        .map(drop)
        .map_err(link_error("detach from its bridge", host_interface))
}

/// Waits for the port to forward; the reason when it does not. A bridge forwards at once for a port whose link is up at
/// both ends, as it was since it was made.
fn forward(netlink: &mut Netlink, interface: &str) -> Result<Option<&'static str>> {
    let deadline = Instant::now() + CARRIER;
    loop {
        match netlink.link(interface)?.port_state() {
            Some(BridgePortState::Forwarding) => return Ok(None),
            Some(BridgePortState::Listening | BridgePortState::Learning | BridgePortState::Blocking) => {
                return Ok(Some(
                    "it speaks the spanning tree protocol and delays new ports; \
                     switch that off: ip link set BRIDGE type bridge stp_state 0",
                ));
            }
            _ => {}
        }
        if Instant::now() >= deadline {
            return Ok(Some("its port is disabled, or the other end of the pair, in the container, is down"));
        }
        thread::sleep(POLL);
    }
}
