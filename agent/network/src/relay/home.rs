//! The namespace that a container left: its address is still there, and what comes for it is carried away.

use std::fs;
use std::io;
use std::net::IpAddr;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::neighbour::{NeighbourAttribute, NeighbourFlags, NeighbourMessage};
use netlink_packet_route::rule::RuleMessage;
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use super::connections::has_bound;
use super::settings::{self, Setting};
use super::tun::Tun;
use super::{End, device, policy};
use crate::discover;
use crate::error::{Error, Result, link_error};
use crate::netlink::{Netlink, errno, open_for};
use crate::netns::Netns;

const END: End = End::Home;
const DEVICE: &str = END.device();

/// A home: what has to be known to divert from it, and to undo everything. It can be stored, and used by another process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Home {
    /// The interface that has the addresses, such as `eth0`.
    pub interface: String,
    /// The addresses that are relayed.
    pub addresses: Vec<IpAddr>,
    /// The interface's MTU. The device at the other end may not have a larger one: what is too large for this interface would be
    /// complained about to this namespace, and nobody in it listens.
    pub mtu: u32,
    /// The settings that were changed, as they were.
    pub settings: Vec<Setting>,
}

/// Whether a namespace can be a home of these addresses of an interface; looks, and changes nothing.
///
/// # Errors
/// [`Error::NotRelayable`] when it cannot.
pub fn check_home(netns: &Netns, interface: &str, addresses: &[IpAddr]) -> Result<()> {
    let home = Home { interface: interface.into(), addresses: addresses.into(), mtu: 0, settings: Vec::new() };
    netns.run(|| {
        let mut netlink = open_for(interface)?;
        let index = netlink.link(interface)?.index();
        check(&mut netlink, &home, index)?;
        let failed = |source| Error::Connections { netns: netns.path().to_owned(), source };
        if has_bound(addresses).map_err(failed)? {
            // It could not be silenced.
            let why = "a connection of it is bound to an interface (SO_BINDTODEVICE)".into();
            return Err(Error::NotRelayable { interface: interface.into(), why });
        }
        Ok(())
    })?
}

/// Makes all that a home needs, before the container is frozen. Traffic flows as before.
///
/// Doing it again is no error, also by another process and also while packets are diverted: the answer is the same, with the
/// settings as they were before the first time. When the first call fails, what it has made is undone.
pub fn prepare_home(netns: &Netns, interface: &str, addresses: &[IpAddr]) -> Result<(Home, Tun)> {
    let is_new = netns.run(|| device::find(&mut open_for(DEVICE)?, END))??.is_none();
    let tun = Tun::open(netns, END)?;
    let mut home = Home { interface: interface.into(), addresses: addresses.into(), mtu: 0, settings: Vec::new() };
    match netns.run(|| prepare(&mut home)).flatten() {
        Ok(()) => Ok((home, tun)),
        Err(error) => {
            if is_new && let Err(error) = dismantle_home(netns, &home) {
                tracing::warn!(%error, "a relay's home is left behind");
            }
            Err(error)
        }
    }
}

/// From now on what comes for the addresses goes to the device instead of the sockets, and nothing that the sockets say with
/// one of them leaves. For the moment when the container is frozen: it blocks, well under a millisecond.
///
/// Doing it again is no error. When something fails, nothing is diverted.
pub fn divert(netns: &Netns, home: &Home) -> Result<()> {
    divert_by(netns, home, &policy::silences(&home.addresses))
}

/// As [`divert`], but the sockets go on speaking: what comes for them has to be handed to them, by way of [`Tun::send`].
pub fn intercept(netns: &Netns, home: &Home) -> Result<()> {
    divert_by(netns, home, &[])
}

fn divert_by(netns: &Netns, home: &Home, silences: &[RuleMessage]) -> Result<()> {
    let interface = home.interface.as_str();
    netns.run(|| {
        let mut netlink = open_for(interface)?;
        let diverted = policy::families(&home.addresses)
            .into_iter()
            .try_for_each(|family| divert_family(&mut netlink, home, silences, family))
            .map_err(link_error("divert what comes for", interface));
        diverted.inspect_err(|_| {
            if let Err(error) = undivert_here(&mut netlink, home) {
                tracing::warn!(%error, "packets are still diverted");
            }
        })
    })?
}

/// The sockets are reached again. That nothing was diverted is no error.
pub fn undivert(netns: &Netns, home: &Home) -> Result<()> {
    netns.run(|| undivert_here(&mut open_for(&home.interface)?, home))?
}

/// Whether what comes for all of the addresses is diverted.
pub fn is_diverted(netns: &Netns, home: &Home) -> Result<bool> {
    let interface = home.interface.as_str();
    netns.run(|| {
        let mut netlink = open_for(interface)?;
        look(&mut netlink, home).map_err(link_error("look up what is diverted from", interface))
    })?
}

/// Undoes everything: the sockets are reached, the device is gone, and rules, routes and settings are as before. Doing it
/// again is no error. Whoever still has the device open cannot use it any more.
pub fn dismantle_home(netns: &Netns, home: &Home) -> Result<()> {
    netns.run(|| {
        let mut netlink = open_for(&home.interface)?;
        undivert_here(&mut netlink, home)?;
        remove_policy(&mut netlink, home).map_err(link_error("undo the relay of", &home.interface))?;
        settings::restore(&home.settings)?;
        // Last: the settings of before are kept with it.
        device::remove(&mut netlink, END)?;
        for family in policy::families(&home.addresses) {
            policy::remove_routes(&mut netlink, END, family).map_err(link_error("remove the routes over", DEVICE))?;
        }
        Ok(())
    })?
}

/// Runs in the namespace.
fn prepare(home: &mut Home) -> Result<()> {
    let interface = home.interface.clone();
    let mut netlink = open_for(&interface)?;
    let link = netlink.link(&interface)?;
    home.mtu = link.mtu().unwrap_or_default();
    let families = check(&mut netlink, home, link.index())?;

    let wanted = wanted(&interface, &families)?;
    let kept = device::find(&mut netlink, END)?.as_ref().and_then(device::remembered);
    home.settings = match kept {
        Some(kept) => kept,
        None => before(&wanted, &families)?,
    };
    device::remember(&mut netlink, END, &home.settings)?;
    let device = device::configure(&mut netlink, END, home.mtu)?;
    settings::apply(&of_device(&families))?;
    settings::apply(&wanted)?;
    add_policy(&mut netlink, home, device).map_err(link_error("prepare the relay of", &interface))?;
    for address in home.addresses.iter().filter(|address| address.is_ipv6()) {
        let message = RouteNetlinkMessage::NewNeighbour(proxy(*address, link.index()));
        let added = netlink.ask(message, NLM_F_CREATE | NLM_F_REPLACE);
        added.map_err(link_error("keep answering to the neighbours of", &interface))?;
    }
    Ok(())
}

/// Refuses what would be diverted wrongly; returns the addresses' families.
fn check(netlink: &mut Netlink, home: &Home, index: u32) -> Result<Vec<AddressFamily>> {
    let interface = home.interface.as_str();
    let refused = |why: String| Error::NotRelayable { interface: interface.into(), why };
    let found = discover::addresses(netlink, index).map_err(link_error("look up the addresses of", interface))?;
    let has = |address: &IpAddr| found.iter().any(|found| found.addr() == *address);
    if let Some(address) = home.addresses.iter().find(|address| !has(address)) {
        return Err(refused(format!("it does not have the address {address}")));
    }
    let families = policy::families(&home.addresses);
    for family in &families {
        let rules = policy::rules(netlink, *family).map_err(link_error("look up the rules beside", interface))?;
        let is_there = |rule| policy::has(&rules, &rule);
        if !is_there(policy::local_first(*family)) && !is_there(policy::local_late(*family)) {
            return Err(refused("its namespace has rules of its own for what is local (ip rule)".into()));
        }
    }
    Ok(families)
}

/// Everything is there before the freeze, and has no effect as long as what is local is looked up first.
fn add_policy(netlink: &mut Netlink, home: &Home, device: u32) -> io::Result<()> {
    for family in policy::families(&home.addresses) {
        policy::add_routes(netlink, END, family, device)?;
        policy::add_rule(netlink, policy::local_late(family))?;
    }
    policy::diversions(&home.interface, &home.addresses)
        .into_iter()
        .try_for_each(|rule| policy::add_rule(netlink, rule))
}

fn remove_policy(netlink: &mut Netlink, home: &Home) -> io::Result<()> {
    for rule in policy::diversions(&home.interface, &home.addresses) {
        policy::remove_rule(netlink, rule)?;
    }
    for family in policy::families(&home.addresses) {
        policy::remove_rule(netlink, policy::local_late(family))?;
    }
    // With the interface its neighbours are gone.
    let Ok(link) = netlink.link(&home.interface) else { return Ok(()) };
    for address in home.addresses.iter().filter(|address| address.is_ipv6()) {
        match netlink.ask(RouteNetlinkMessage::DelNeighbour(proxy(*address, link.index())), 0) {
            Err(error) if errno(&error) == Errno::ENOENT => {}
            removed => drop(removed?),
        }
    }
    Ok(())
}

/// Silences the sockets first, and takes their packets then. The look before the change costs no lock of the kernel, a change does.
fn divert_family(
    netlink: &mut Netlink,
    home: &Home,
    silences: &[RuleMessage],
    family: AddressFamily,
) -> io::Result<()> {
    let of_family = |rule: &RuleMessage| rule.header.family == family;
    let found = policy::rules(netlink, family)?;
    let rest = policy::diversions(&home.interface, &home.addresses);
    let wanted = silences.iter().cloned().chain(rest).filter(of_family).chain([policy::local_late(family)]);
    for rule in wanted.filter(|rule| !policy::has(&found, rule)) {
        policy::add_rule(netlink, rule)?;
    }
    let first = policy::local_first(family);
    if policy::has(&found, &first) {
        policy::remove_rule(netlink, first)?;
    }
    Ok(())
}

/// The sockets hear first, and may speak then.
fn undivert_here(netlink: &mut Netlink, home: &Home) -> Result<()> {
    let mut undo = || -> io::Result<()> {
        for family in policy::families(&home.addresses) {
            policy::add_rule(netlink, policy::local_first(family))?;
        }
        policy::silences(&home.addresses).into_iter().try_for_each(|rule| policy::remove_rule(netlink, rule))
    };
    undo().map_err(link_error("stop to divert what comes for", &home.interface))
}

fn look(netlink: &mut Netlink, home: &Home) -> io::Result<bool> {
    let diversions = policy::diversions(&home.interface, &home.addresses);
    for family in policy::families(&home.addresses) {
        let found = policy::rules(netlink, family)?;
        let is_missing = |rule: &RuleMessage| rule.header.family == family && !policy::has(&found, rule);
        if policy::has(&found, &policy::local_first(family)) || diversions.iter().any(is_missing) {
            return Ok(false);
        }
    }
    Ok(!home.addresses.is_empty())
}

/// Neighbour discovery's unicast messages are ICMP as well, and have to stay: what is forwarded to an address with such an
/// entry is looked at for them, and these are taken here (`ip6_forward`).
fn proxy(address: IpAddr, index: u32) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Inet6;
    message.header.ifindex = index;
    message.header.flags = NeighbourFlags::Proxy;
    message.attributes.push(NeighbourAttribute::Destination(address.into()));
    message
}

/// The settings of the namespace that a home needs.
fn wanted(interface: &str, families: &[AddressFamily]) -> Result<Vec<Setting>> {
    // Early demultiplexing hands packets to sockets before any rule is asked; the switch is that of both families.
    let mut wanted = vec![Setting::new("ipv4/ip_early_demux", "0")];
    if families.contains(&AddressFamily::Inet) {
        wanted.extend([
            Setting::new(format!("ipv4/conf/{interface}/forwarding"), "1"),
            // The larger one of this and the device's own counts, and the relayed packets' source is nowhere behind the device.
            Setting::new("ipv4/conf/all/rp_filter", "0"),
            Setting::new("ipv4/conf/all/send_redirects", "0"),
            Setting::new(format!("ipv4/conf/{interface}/send_redirects"), "0"),
        ]);
    }
    if families.contains(&AddressFamily::Inet6) {
        // A router obeys no router's advertisements, unless it is told to.
        if settings::read(&format!("ipv6/conf/{interface}/accept_ra"))? == "1" {
            wanted.push(Setting::new(format!("ipv6/conf/{interface}/accept_ra"), "2"));
        }
        wanted.push(Setting::new("ipv6/conf/all/proxy_ndp", "1"));
        // Only the whole namespace can forward, not one interface. Last, so that advertised routes stay.
        wanted.push(Setting::new("ipv6/conf/all/forwarding", "1"));
    }
    Ok(wanted)
}

/// What has to be put back. Changing all interfaces' forwarding changes each one's, so those that differed are noted too: before
/// it, because it is put back first.
fn before(wanted: &[Setting], families: &[AddressFamily]) -> Result<Vec<Setting>> {
    let mut before = settings::differing(wanted)?;
    let changes_all = before.last().is_some_and(|last| last.name == "ipv6/conf/all/forwarding");
    if families.contains(&AddressFamily::Inet6) && changes_all {
        let differing = forwarding_alone()?;
        let at = before.len() - 1;
        before.splice(at..at, differing);
    }
    Ok(before)
}

/// The interfaces that forward IPv6 although not all of them do.
fn forwarding_alone() -> Result<Vec<Setting>> {
    const FOLDER: &str = "ipv6/conf";
    let failed = |source| Error::Setting { doing: "list", name: FOLDER.into(), source };
    let ours = [End::Home, End::Away].map(End::device);
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc/sys/net/ipv6/conf").map_err(failed)? {
        let name = entry.map_err(failed)?.file_name().to_string_lossy().into_owned();
        let setting = format!("{FOLDER}/{name}/forwarding");
        if !ours.contains(&name.as_str()) && name != "all" && settings::read(&setting)? != "0" {
            found.push(Setting::new(setting, "1"));
        }
    }
    Ok(found)
}

/// Those of the device, which go with it.
fn of_device(families: &[AddressFamily]) -> Vec<Setting> {
    let own = |family, name: &str, value| Setting::new(format!("{family}/conf/{DEVICE}/{name}"), value);
    let mut wanted = Vec::new();
    if families.contains(&AddressFamily::Inet) {
        wanted.extend([
            own("ipv4", "forwarding", "1"),
            // What comes back has the source that this namespace has too.
            own("ipv4", "accept_local", "1"),
            own("ipv4", "rp_filter", "0"),
        ]);
    }
    if families.contains(&AddressFamily::Inet6) {
        wanted.push(own("ipv6", "accept_ra", "0"));
    }
    wanted
}
