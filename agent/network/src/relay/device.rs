//! What the relay's device is set to, and what is remembered with it.

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkMessage};

use super::End;
use super::settings::Setting;
use crate::create::{give_no_address_by_itself, set_up};
use crate::error::{Error, Result, link_error};
use crate::netlink::{Link, Netlink};

/// How many packets wait in the device for whoever reads it: what comes within a freeze, if it is no flood.
const QUEUE: u32 = 8192;
/// `IFALIASZ`, the kernel's limit of the text.
const ALIAS_MAX: usize = 256;
const ALIAS_BEGIN: &str = "podferry";

/// The device, if it is there.
pub(super) fn find(netlink: &mut Netlink, end: End) -> Result<Option<Link>> {
    match netlink.link(end.device()) {
        Err(Error::NoInterface { .. }) => Ok(None),
        link => link.map(Some),
    }
}

/// Sets the device to what a relay needs and brings it up; returns its index.
pub(super) fn configure(netlink: &mut Netlink, end: End, mtu: u32) -> Result<u32> {
    let index = netlink.link(end.device())?.index();
    change(netlink, end, index, vec![LinkAttribute::Mtu(mtu), LinkAttribute::TxQueueLen(QUEUE)])?;
    give_no_address_by_itself(netlink, end.device())?;
    set_up(netlink, end.device())?;
    Ok(index)
}

/// Deletes the device, and with it its addresses and routes. That it is not there is no error.
pub(super) fn remove(netlink: &mut Netlink, end: End) -> Result<()> {
    let Some(link) = find(netlink, end)? else { return Ok(()) };
    if !link.is(&InfoKind::Tun) {
        return Err(Error::WrongKind { interface: end.device().into(), what: "no TUN device, so it is not deleted" });
    }
    let mut message = LinkMessage::default();
    message.header.index = link.index();
    match netlink.ask(RouteNetlinkMessage::DelLink(message), 0).map_err(link_error("delete", end.device())) {
        Ok(_) | Err(Error::NoInterface { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Leaves the settings as they were with the device: whoever comes next knows them, even when the record of them was lost
/// with its process.
pub(super) fn remember(netlink: &mut Netlink, end: End, before: &[Setting]) -> Result<()> {
    let parts = before.iter().map(|setting| format!(",{}={}", shortened(&setting.name), setting.value));
    let text = format!("{ALIAS_BEGIN}{}", parts.collect::<String>());
    if text.len() >= ALIAS_MAX {
        tracing::warn!(%text, "too many settings to be kept with the relay's device: only its record has them");
        return Ok(());
    }
    let index = netlink.link(end.device())?.index();
    change(netlink, end, index, vec![LinkAttribute::IfAlias(text)])
}

/// The settings that were left with the device; none when none were.
pub(super) fn remembered(link: &Link) -> Option<Vec<Setting>> {
    let parts = link.alias()?.strip_prefix(ALIAS_BEGIN)?.split(',').filter(|part| !part.is_empty());
    parts.map(|part| part.rsplit_once('=').map(|(name, value)| Setting::new(lengthened(name), value))).collect()
}

fn change(netlink: &mut Netlink, end: End, index: u32, attributes: Vec<LinkAttribute>) -> Result<()> {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes = attributes;
    netlink.ask(RouteNetlinkMessage::SetLink(message), 0).map(drop).map_err(link_error("set up", end.device()))
}

const SHORT: [(&str, &str); 2] = [("ipv4/conf/", "4:"), ("ipv6/conf/", "6:")];

fn shortened(name: &str) -> String {
    let short = SHORT.iter().find_map(|(long, short)| name.strip_prefix(long).map(|rest| format!("{short}{rest}")));
    short.unwrap_or_else(|| name.to_owned())
}

fn lengthened(name: &str) -> String {
    let long = SHORT.iter().find_map(|(long, short)| name.strip_prefix(short).map(|rest| format!("{long}{rest}")));
    long.unwrap_or_else(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_settings_survive_their_shortening() {
        for name in ["ipv4/ip_early_demux", "ipv4/conf/all/rp_filter", "ipv6/conf/eth0.7/accept_ra"] {
            assert_eq!(lengthened(&shortened(name)), name);
        }
        assert_eq!(shortened("ipv6/conf/all/forwarding"), "6:all/forwarding");
    }
}
