//! Rules and routes of the routing policy (ip-rule(8)), made so that making and unmaking them twice is no error.

use std::io;
use std::net::IpAddr;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::route::{RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, IpProtocol, RouteNetlinkMessage};
use nix::errno::Errno;

use super::{DIVERTING, End, LAST_RESORT, PROTOCOL, SILENCING};
use crate::create::family;
use crate::netlink::{Netlink, errno, ignore};

/// What is local is looked up first, by the rule with this priority, unless it was diverted.
const LOCAL_FIRST: u32 = 0;
/// The rule's priority when others come before it. The main table's is 32766.
const LOCAL_LATE: u32 = 32_000;
/// `RT_TABLE_LOCAL`.
const TABLE_LOCAL: u8 = 255;
const ICMPV6: i32 = 58;

/// The families of these addresses.
pub(super) fn families(addresses: &[IpAddr]) -> Vec<AddressFamily> {
    let mut families: Vec<AddressFamily> = addresses.iter().map(|address| family(*address)).collect();
    families.sort_unstable_by_key(|family| u8::from(*family));
    families.dedup();
    families
}

/// What arrives at an interface for an address is routed by our table: TCP, and what is said about it.
pub(super) fn diversions(interface: &str, addresses: &[IpAddr]) -> Vec<RuleMessage> {
    let of = |address: IpAddr| {
        let icmp = if address.is_ipv4() { IpProtocol::Icmp } else { IpProtocol::Other(ICMPV6) };
        [(DIVERTING, IpProtocol::Tcp), (DIVERTING + 1, icmp)].map(|(priority, protocol)| {
            let mut rule = to_table(family(address), priority, End::Home.table());
            rule.header.dst_len = length(address);
            rule.attributes.extend([
                RuleAttribute::Iifname(interface.into()),
                RuleAttribute::Destination(address),
                RuleAttribute::IpProtocol(protocol),
            ]);
            rule
        })
    };
    addresses.iter().copied().flat_map(of).collect()
}

/// What the namespace's own sockets say by TCP with an address goes nowhere. A packet that is only passing through came in by
/// another interface than the loopback.
pub(super) fn silences(addresses: &[IpAddr]) -> Vec<RuleMessage> {
    let of = |address: &IpAddr| {
        let mut rule = rule(family(*address), SILENCING, RuleAction::Blackhole);
        rule.header.src_len = length(*address);
        rule.attributes.extend([
            RuleAttribute::Iifname("lo".into()),
            RuleAttribute::Source(*address),
            RuleAttribute::IpProtocol(IpProtocol::Tcp),
        ]);
        rule
    };
    addresses.iter().map(of).collect()
}

/// What says something with an address is routed by our table.
pub(super) fn answers(addresses: &[IpAddr]) -> Vec<RuleMessage> {
    let of = |address: &IpAddr| {
        let mut rule = to_table(family(*address), DIVERTING, End::Away.table());
        rule.header.src_len = length(*address);
        rule.attributes.push(RuleAttribute::Source(*address));
        rule
    };
    addresses.iter().map(of).collect()
}

/// The rule that looks up what is local, at the place where the kernel has it.
pub(super) fn local_first(family: AddressFamily) -> RuleMessage {
    local(family, LOCAL_FIRST)
}

/// The same behind all of ours.
pub(super) fn local_late(family: AddressFamily) -> RuleMessage {
    local(family, LOCAL_LATE)
}

/// The kernel's own rule says that it is the kernel's, and ours shall not differ from it.
fn local(family: AddressFamily, priority: u32) -> RuleMessage {
    let mut rule = to_table(family, priority, TABLE_LOCAL);
    rule.attributes.retain(|attribute| !matches!(attribute, RuleAttribute::Protocol(_)));
    rule.attributes.push(RuleAttribute::Protocol(RouteProtocol::Kernel));
    rule
}

fn to_table(family: AddressFamily, priority: u32, table: u8) -> RuleMessage {
    let mut rule = rule(family, priority, RuleAction::ToTable);
    rule.header.table = table;
    rule
}

fn rule(family: AddressFamily, priority: u32, action: RuleAction) -> RuleMessage {
    let mut rule = RuleMessage::default();
    rule.header.family = family;
    rule.header.action = action;
    rule.attributes.push(RuleAttribute::Priority(priority));
    rule.attributes.push(RuleAttribute::Protocol(RouteProtocol::Other(PROTOCOL)));
    rule
}

fn length(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

/// The rules of a family.
pub(super) fn rules(netlink: &mut Netlink, family: AddressFamily) -> io::Result<Vec<RuleMessage>> {
    let mut message = RuleMessage::default();
    message.header.family = family;
    let rule = |answer| match answer {
        RouteNetlinkMessage::NewRule(rule) => Some(rule),
        _ => None,
    };
    Ok(netlink.dump(RouteNetlinkMessage::GetRule(message))?.into_iter().filter_map(rule).collect())
}

/// Whether a rule is among others, whoever made it.
pub(super) fn has(found: &[RuleMessage], wanted: &RuleMessage) -> bool {
    found.iter().any(|found| {
        found.header.family == wanted.header.family
            && found.header.action == wanted.header.action
            && found.header.table == wanted.header.table
            && found.header.src_len == wanted.header.src_len
            && found.header.dst_len == wanted.header.dst_len
            && wanted.attributes.iter().all(|attribute| has_attribute(found, attribute))
    })
}

/// The kernel does not say the priority when it is 0.
fn has_attribute(rule: &RuleMessage, wanted: &RuleAttribute) -> bool {
    let priority = |attribute: &RuleAttribute| matches!(attribute, RuleAttribute::Priority(_));
    match wanted {
        RuleAttribute::Protocol(_) => true,
        RuleAttribute::Priority(LOCAL_FIRST) => !rule.attributes.iter().any(priority),
        wanted => rule.attributes.contains(wanted),
    }
}

pub(super) fn add_rule(netlink: &mut Netlink, rule: RuleMessage) -> io::Result<()> {
    let added = netlink.ask(RouteNetlinkMessage::NewRule(rule), NLM_F_CREATE | NLM_F_EXCL);
    ignore(added, Errno::EEXIST).map(drop)
}

/// Whoever made it.
pub(super) fn remove_rule(netlink: &mut Netlink, mut rule: RuleMessage) -> io::Result<()> {
    rule.attributes.retain(|attribute| !matches!(attribute, RuleAttribute::Protocol(_)));
    match netlink.ask(RouteNetlinkMessage::DelRule(rule), 0) {
        // Without the interface of its name, or without the family, there is no such rule either.
        Err(error) if matches!(errno(&error), Errno::ENOENT | Errno::EAFNOSUPPORT) => Ok(()),
        removed => removed.map(drop),
    }
}

/// Our table: everything goes to a device, and nowhere when there is none. Without the second a dead relay would be
/// answered for by whoever comes next: by a reset.
pub(super) fn add_routes(netlink: &mut Netlink, end: End, family: AddressFamily, device: u32) -> io::Result<()> {
    for route in [nowhere(end, family), everything(end, family, device)] {
        let added = netlink.ask(RouteNetlinkMessage::NewRoute(route), NLM_F_CREATE | NLM_F_EXCL);
        ignore(added, Errno::EEXIST)?;
    }
    Ok(())
}

/// Removes what stays of our table when its device is gone.
pub(super) fn remove_routes(netlink: &mut Netlink, end: End, family: AddressFamily) -> io::Result<()> {
    match netlink.ask(RouteNetlinkMessage::DelRoute(nowhere(end, family)), 0) {
        Err(error) if matches!(errno(&error), Errno::ESRCH | Errno::ENOENT | Errno::EAFNOSUPPORT) => Ok(()),
        removed => removed.map(drop),
    }
}

fn everything(end: End, family: AddressFamily, device: u32) -> RouteMessage {
    let mut message = route(end, family);
    message.header.kind = RouteType::Unicast;
    message.header.scope = RouteScope::Link;
    message.attributes.push(RouteAttribute::Oif(device));
    message
}

fn nowhere(end: End, family: AddressFamily) -> RouteMessage {
    let mut message = route(end, family);
    message.header.kind = RouteType::BlackHole;
    message.header.scope = RouteScope::Universe;
    message.attributes.push(RouteAttribute::Priority(LAST_RESORT));
    message
}

fn route(end: End, family: AddressFamily) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family;
    message.header.table = end.table();
    message.header.protocol = RouteProtocol::Other(PROTOCOL);
    message
}
