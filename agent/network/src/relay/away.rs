//! The namespace that a container came to: it has the old address too, on the relay's device.

use std::io;
use std::net::IpAddr;

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use nix::errno::Errno;

use super::settings::{self, Setting};
use super::tun::Tun;
use super::{End, device, policy};
use crate::create::address_message;
use crate::error::{Result, link_error};
use crate::netlink::{Netlink, ignore, open_for};
use crate::netns::Netns;

const END: End = End::Away;
const DEVICE: &str = END.device();

/// Makes all that is needed to have a connection's old address, before the connection is restored.
///
/// The MTU is the device's, so that of what these connections send: [`Home::mtu`](super::Home::mtu) or less. Doing it again is no
/// error, also by another process. When the first call fails, what it has made is undone.
pub fn prepare_away(netns: &Netns, addresses: &[IpAddr], mtu: u32) -> Result<Tun> {
    let is_new = netns.run(|| device::find(&mut open_for(DEVICE)?, END))??.is_none();
    let tun = Tun::open(netns, END)?;
    match netns.run(|| prepare(addresses, mtu)).flatten() {
        Ok(()) => Ok(tun),
        Err(error) => {
            if is_new && let Err(error) = dismantle_away(netns, addresses) {
                tracing::warn!(%error, "a relay's device is left behind");
            }
            Err(error)
        }
    }
}

/// Undoes it. Doing it again is no error.
pub fn dismantle_away(netns: &Netns, addresses: &[IpAddr]) -> Result<()> {
    netns.run(|| {
        let mut netlink = open_for(DEVICE)?;
        if let Some(before) = device::find(&mut netlink, END)?.as_ref().and_then(device::remembered) {
            settings::restore(&before)?;
        }
        device::remove(&mut netlink, END)?;
        remove_policy(&mut netlink, addresses).map_err(link_error("remove the routes over", DEVICE))
    })?
}

/// Runs in the namespace.
fn prepare(addresses: &[IpAddr], mtu: u32) -> Result<()> {
    let mut netlink = open_for(DEVICE)?;
    let wanted = wanted(addresses);
    let before = match device::find(&mut netlink, END)?.as_ref().and_then(device::remembered) {
        Some(before) => before,
        None => settings::differing(&wanted)?,
    };
    device::remember(&mut netlink, END, &before)?;
    settings::apply(&wanted)?;
    let index = device::configure(&mut netlink, END, mtu)?;
    for address in addresses {
        let message = RouteNetlinkMessage::NewAddress(address_message(IpNet::from(*address), index));
        let added = netlink.ask(message, NLM_F_CREATE | NLM_F_EXCL);
        ignore(added, Errno::EEXIST).map_err(link_error("give its address to", DEVICE))?;
    }
    add_policy(&mut netlink, addresses, index).map_err(link_error("set the routes over", DEVICE))
}

/// Only the home answers for the address on a link: both may be on one, where a network spans the nodes.
fn wanted(addresses: &[IpAddr]) -> Vec<Setting> {
    let answers = addresses.iter().any(IpAddr::is_ipv4).then(|| Setting::new("ipv4/conf/all/arp_ignore", "1"));
    answers.into_iter().collect()
}

fn add_policy(netlink: &mut Netlink, addresses: &[IpAddr], device: u32) -> io::Result<()> {
    for family in policy::families(addresses) {
        policy::add_routes(netlink, END, family, device)?;
    }
    policy::answers(addresses).into_iter().try_for_each(|rule| policy::add_rule(netlink, rule))
}

fn remove_policy(netlink: &mut Netlink, addresses: &[IpAddr]) -> io::Result<()> {
    for rule in policy::answers(addresses) {
        policy::remove_rule(netlink, rule)?;
    }
    policy::families(addresses).into_iter().try_for_each(|family| policy::remove_routes(netlink, END, family))
}
