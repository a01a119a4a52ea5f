//! A container's link as data: what the source has, and what the target shall make.

use std::collections::HashSet;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The most addresses a plan may have.
const MAX_ADDRESSES: usize = 64;
/// The most routes a plan may have.
const MAX_ROUTES: usize = 256;
/// `IFNAMSIZ` without the byte that ends a name.
const NAME_MAX: usize = 15;
/// The smallest MTU of IPv4 (RFC 791) and of IPv6 (RFC 8200).
const MTU_MIN: (u32, u32) = (68, 1280);
const MTU_MAX: u32 = 65535;

/// An Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// Whether an interface can have it: neither a group's nor all zeros.
    pub fn is_unicast(self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes: Vec<String> = self.0.iter().map(|byte| format!("{byte:02x}")).collect();
        out.write_str(&bytes.join(":"))
    }
}

impl FromStr for MacAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let strict = |part: &str| part.len() == 2 && part.bytes().all(|digit| digit.is_ascii_hexdigit());
        let byte = |part: &str| u8::from_str_radix(part, 16).ok().filter(|_| strict(part));
        let bytes: Option<Vec<u8>> = text.split(':').map(byte).collect();
        let bytes = bytes.and_then(|bytes| <[u8; 6]>::try_from(bytes).ok());
        bytes.map(Self).ok_or_else(|| format!("{text:?} is no Ethernet address such as 02:00:5e:10:00:01"))
    }
}

impl From<MacAddress> for String {
    fn from(mac: MacAddress) -> Self {
        mac.to_string()
    }
}

impl TryFrom<String> for MacAddress {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

/// One route of the main table over a container's interface. The routes that the kernel makes for the interface's own
/// addresses are not among them.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Route {
    /// Where to; a prefix length of 0 makes it the default route.
    pub destination: IpNet,
    /// By way of whom; none when the destination is on the link itself.
    pub gateway: Option<IpAddr>,
}

/// What a container has on the node it runs on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerLink {
    /// The interface's name in the container's namespace.
    pub interface: String,
    /// Its Ethernet address.
    pub mac: MacAddress,
    /// The largest packet it sends, in bytes.
    pub mtu: u32,
    /// Its addresses with the lengths of their networks' prefixes.
    pub addresses: Vec<IpNet>,
    /// The routes over it.
    pub routes: Vec<Route>,
    /// The host interface: the other end of the pair; none when that is in neither namespace looked at.
    pub peer: Option<String>,
}

impl ContainerLink {
    /// Another MTU than its own, in bytes, for the time of a restore: see [`set_mtu`](crate::set_mtu).
    ///
    /// One byte lower, or higher where that would be below the smallest: the kernel takes all IPv6 addresses away from an
    /// interface whose MTU falls below 1280 (`addrconf_notify`), and refuses one below 68.
    pub fn mtu_during_restore(&self) -> u32 {
        if self.mtu > smallest_mtu(&self.addresses) { self.mtu - 1 } else { self.mtu + 1 }
    }

    /// What another node has to make for this link: the same in the container, and the given names outside it.
    pub fn plan(&self, bridge: &str, host_interface: &str) -> NetworkPlan {
        NetworkPlan {
            interface: self.interface.clone(),
            mac: self.mac,
            mtu: self.mtu,
            addresses: self.addresses.clone(),
            routes: self.routes.clone(),
            host_interface: host_interface.into(),
            bridge: bridge.into(),
        }
    }
}

/// A link to make. All but the last two fields come from the source, so [`check`](Self::check) it first;
/// [`create`](crate::create) does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkPlan {
    /// The interface's name in the container's namespace.
    pub interface: String,
    /// Its Ethernet address.
    pub mac: MacAddress,
    /// The largest packet it sends, in bytes.
    pub mtu: u32,
    /// Its addresses with the lengths of their networks' prefixes.
    pub addresses: Vec<IpNet>,
    /// The routes over it.
    pub routes: Vec<Route>,
    /// The name of the other end in the node's namespace: this node's choice.
    pub host_interface: String,
    /// The bridge it will be attached to: this node's choice.
    pub bridge: String,
}

impl NetworkPlan {
    /// Refuses what no honest source sends and no interface can have.
    pub fn check(&self) -> Result<()> {
        self.broken_rule().map_or(Ok(()), |why| Err(Error::Plan { interface: self.interface.clone(), why }))
    }

    fn broken_rule(&self) -> Option<String> {
        let names = [&self.interface, &self.host_interface, &self.bridge];
        if let Some(name) = names.into_iter().find(|name| !is_interface_name(name)) {
            return Some(format!("{name:?} is no interface's name"));
        }
        if self.interface == "lo" {
            return Some("the loopback interface is not moved".into());
        }
        if !self.mac.is_unicast() {
            return Some(format!("{} is not the address of one interface", self.mac));
        }
        let smallest = smallest_mtu(&self.addresses);
        if !(smallest..=MTU_MAX).contains(&self.mtu) {
            return Some(format!("an MTU of {} is not between {smallest} and {MTU_MAX}", self.mtu));
        }
        self.broken_address().or_else(|| self.broken_route())
    }

    fn broken_address(&self) -> Option<String> {
        if self.addresses.len() > MAX_ADDRESSES {
            return Some(format!("more than {MAX_ADDRESSES} addresses"));
        }
        let mut seen = HashSet::new();
        let mut broken =
            |address: &&IpNet| !is_host(address.addr()) || address.prefix_len() == 0 || !seen.insert(address.addr());
        let broken = self.addresses.iter().find(|address| broken(address));
        broken.map(|address| format!("{address} is not the address of one host, or comes twice"))
    }

    fn broken_route(&self) -> Option<String> {
        if self.routes.len() > MAX_ROUTES {
            return Some(format!("more than {MAX_ROUTES} routes"));
        }
        let broken = |route: &&Route| {
            let destination = route.destination.addr();
            let mixed = route.gateway.is_some_and(|gateway| gateway.is_ipv4() != destination.is_ipv4());
            mixed || destination.is_multicast() || route.gateway.is_some_and(|gateway| !is_host(gateway))
        };
        self.routes.iter().find(broken).map(|route| format!("the route to {} leads nowhere", route.destination))
    }
}

fn smallest_mtu(addresses: &[IpNet]) -> u32 {
    let has_v6 = addresses.iter().any(|address| matches!(address, IpNet::V6(_)));
    if has_v6 { MTU_MIN.1 } else { MTU_MIN.0 }
}

fn is_host(address: IpAddr) -> bool {
    let broadcast = matches!(address, IpAddr::V4(v4) if v4.is_broadcast());
    !(address.is_unspecified() || address.is_loopback() || address.is_multicast() || broadcast)
}

/// The kernel's rule (`dev_valid_name`): short, and safe as a name below /proc/sys/net.
fn is_interface_name(name: &str) -> bool {
    (1..=NAME_MAX).contains(&name.len())
        && !matches!(name, "." | "..")
        && name.bytes().all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'/' | b':'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> NetworkPlan {
        NetworkPlan {
            interface: "eth0".into(),
            mac: MacAddress([2, 0, 0, 0, 0, 1]),
            mtu: 1500,
            addresses: vec!["10.1.0.2/24".parse().unwrap(), "fd00::2/64".parse().unwrap()],
            routes: vec![Route { destination: "0.0.0.0/0".parse().unwrap(), gateway: Some([10, 1, 0, 1].into()) }],
            host_interface: "pf-1".into(),
            bridge: "br0".into(),
        }
    }

    #[test]
    fn a_sound_plan_passes_and_survives_json() {
        plan().check().unwrap();
        let text = serde_json::to_string(&plan()).unwrap();
        assert!(text.contains(r#""mac":"02:00:00:00:00:01""#), "{text}");
        assert_eq!(serde_json::from_str::<NetworkPlan>(&text).unwrap(), plan());
    }

    #[test]
    fn what_no_link_can_have_is_refused() {
        type Breaker = (&'static str, fn(&mut NetworkPlan));
        let breakers: [Breaker; 12] = [
            ("name", |plan| plan.interface = "../../etc".into()),
            ("name", |plan| plan.host_interface = "sixteen-letters-".into()),
            ("name", |plan| plan.bridge = String::new()),
            ("loopback", |plan| plan.interface = "lo".into()),
            ("one interface", |plan| plan.mac = MacAddress([1, 0, 0, 0, 0, 1])),
            ("MTU", |plan| plan.mtu = 1279),
            ("MTU", |plan| plan.mtu = 70_000),
            ("one host", |plan| plan.addresses[0] = "127.0.0.1/8".parse().unwrap()),
            ("one host", |plan| plan.addresses[1] = plan.addresses[0]),
            ("addresses", |plan| plan.addresses = vec!["10.0.0.1/8".parse().unwrap(); 65]),
            ("nowhere", |plan| plan.routes[0].gateway = Some("fd00::1".parse().unwrap())),
            ("routes", |plan| plan.routes = vec![plan.routes[0].clone(); 257]),
        ];
        for (why, break_it) in breakers {
            let mut plan = plan();
            break_it(&mut plan);
            let error = plan.check().unwrap_err().to_string();
            assert!(error.contains(why), "{why}: {error}");
        }
    }

    #[test]
    fn ethernet_addresses_are_read_strictly() {
        for text in
            ["", "02:00:00:00:00", "02:00:00:00:00:01:02", "2:0:0:0:0:1", "02-00-00-00-00-01", "+2:00:00:00:00:01"]
        {
            assert!(text.parse::<MacAddress>().is_err(), "{text}");
        }
    }
}
