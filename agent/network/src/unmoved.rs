//! What a container's network namespace holds beside the link that moves, and what therefore stays behind.

use std::collections::BTreeMap;
use std::io;

use ipnet::IpNet;
use netlink_packet_route::address::AddressMessage;
use netlink_packet_route::route::{RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteType};
use netlink_packet_route::rule::{RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::errno::Errno;

use crate::discover::{address_of, destination, is_by_itself, moves};
use crate::error::{Result, link_error};
use crate::netlink::{Netlink, open_for};
use crate::netns::Netns;

/// What does not move along with a container's link.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Unmoved {
    /// Other interfaces that have addresses, by name, with their addresses. Sockets bound to these cannot be restored
    /// elsewhere.
    pub interfaces: BTreeMap<String, Vec<IpNet>>,
    /// Addresses that the loopback interface has beside those of its own.
    pub loopback: Vec<IpNet>,
    /// Routes, as a person would say them: of other tables, with several gateways, of other kinds than unicast.
    pub routes: Vec<String>,
    /// Rules of the routing policy that the kernel has not made itself.
    pub rules: Vec<String>,
}

/// Looks for what does not move along with `interface` of a container's namespace.
pub async fn unmoved(container: &Netns, interface: &str) -> Result<Unmoved> {
    let interface = interface.to_owned();
    container.spawn(move || look(&interface)).await?
}

fn look(interface: &str) -> Result<Unmoved> {
    let mut netlink = open_for(interface)?;
    let index = netlink.link(interface)?.index();
    let (interfaces, loopback) = addresses(&mut netlink, index).map_err(link_error("look beside", interface))?;
    let routes = routes(&mut netlink, index).map_err(link_error("look for routes beside those of", interface))?;
    let rules = rules(&mut netlink).map_err(link_error("look for the rules beside", interface))?;
    Ok(Unmoved { interfaces, loopback, routes, rules })
}

type Elsewhere = (BTreeMap<String, Vec<IpNet>>, Vec<IpNet>);

fn addresses(netlink: &mut Netlink, moving: u32) -> io::Result<Elsewhere> {
    let (mut interfaces, mut loopback) = (BTreeMap::<String, Vec<IpNet>>::new(), Vec::new());
    for answer in netlink.dump(RouteNetlinkMessage::GetAddress(AddressMessage::default()))? {
        let RouteNetlinkMessage::NewAddress(message) = answer else { continue };
        let index = message.header.index;
        let Some(address) = address_of(&message).filter(|address| index != moving && !address.addr().is_loopback())
        else {
            continue;
        };
        let name = match netlink.link_at(index) {
            // It went meanwhile.
            Err(error) if error.raw_os_error() == Some(Errno::ENODEV as i32) => continue,
            link => link?.name().unwrap_or_default().to_owned(),
        };
        if name == "lo" {
            loopback.push(address);
        } else {
            interfaces.entry(name).or_default().push(address);
        }
    }
    Ok((interfaces, loopback))
}

fn routes(netlink: &mut Netlink, index: u32) -> io::Result<Vec<String>> {
    let ask = |family| {
        let mut message = RouteMessage::default();
        message.header.address_family = family;
        RouteNetlinkMessage::GetRoute(message)
    };
    let stays = |answer: &RouteNetlinkMessage| match answer {
        RouteNetlinkMessage::NewRoute(message) if !is_by_itself(message) && !moves(message, index) => {
            Some(words_of_route(message))
        }
        _ => None,
    };
    Ok(of_both_families(netlink, ask)?.iter().filter_map(stays).collect())
}

fn rules(netlink: &mut Netlink) -> io::Result<Vec<String>> {
    let ask = |family| {
        let mut message = RuleMessage::default();
        message.header.family = family;
        RouteNetlinkMessage::GetRule(message)
    };
    let stays = |answer: &RouteNetlinkMessage| match answer {
        RouteNetlinkMessage::NewRule(message)
            if !message.attributes.contains(&RuleAttribute::Protocol(RouteProtocol::Kernel)) =>
        {
            Some(words_of_rule(message))
        }
        _ => None,
    };
    Ok(of_both_families(netlink, ask)?.iter().filter_map(stays).collect())
}

fn of_both_families(
    netlink: &mut Netlink,
    ask: impl Fn(AddressFamily) -> RouteNetlinkMessage,
) -> io::Result<Vec<RouteNetlinkMessage>> {
    let mut answers = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        match netlink.dump(ask(family)) {
            Err(error) if is_lacking(&error) => {}
            found => answers.extend(found?),
        }
    }
    Ok(answers)
}

/// A kernel without IPv6, or without policy routing, has none of that kind.
fn is_lacking(error: &io::Error) -> bool {
    let errno = Errno::from_raw(error.raw_os_error().unwrap_or(0));
    matches!(errno, Errno::EOPNOTSUPP | Errno::EAFNOSUPPORT)
}

fn words_of_route(message: &RouteMessage) -> String {
    let mut words = match destination(message) {
        Some(to) if to.prefix_len() > 0 => to.to_string(),
        _ => "default".to_owned(),
    };
    if message.header.kind != RouteType::Unicast {
        words = format!("{} {words}", format!("{:?}", message.header.kind).to_lowercase());
    }
    let several = |attribute: &RouteAttribute| matches!(attribute, RouteAttribute::MultiPath(_));
    if message.attributes.iter().any(several) {
        words.push_str(" with several gateways");
    }
    let table = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Table(table) => Some(*table),
        _ => None,
    });
    let table = table.unwrap_or_else(|| message.header.table.into());
    if table != u32::from(RouteHeader::RT_TABLE_MAIN) {
        words = format!("{words} in table {table}");
    }
    words
}

fn words_of_rule(message: &RuleMessage) -> String {
    let pick = |wanted: fn(&RuleAttribute) -> Option<u32>| message.attributes.iter().find_map(wanted);
    let priority = pick(|attribute| match attribute {
        RuleAttribute::Priority(priority) => Some(*priority),
        _ => None,
    });
    let table = pick(|attribute| match attribute {
        RuleAttribute::Table(table) => Some(*table),
        _ => None,
    });
    format!("priority {} to table {}", priority.unwrap_or(0), table.unwrap_or_else(|| message.header.table.into()))
}
