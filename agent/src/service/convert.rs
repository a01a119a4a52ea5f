//! Between the protocol's messages and the agent's own types. What comes in is checked here.

use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::time::{Duration, SystemTime};

use podferry_common::NodeName;
use podferry_common::failure::{Failure, FailureCode};
use podferry_network::{ContainerLink, IpNet, MacAddress, Route};
use podferry_proto::v1::{self, PartState, freeze_event};

use crate::journal::Standing;
use crate::relay;
use crate::source::{FreezeEvent, PreCopyOrder, Round, SourcePart, Verified};
use crate::target::{Relayed, TargetPart};

/// The most addresses and routes of a link.
const MOST_ADDRESSES: usize = 16;
const MOST_ROUTES: usize = 64;
/// What IPv6 asks for, or with IPv4 alone a link can do with, and what the length of a packet can say.
const MTU: RangeInclusive<u32> = 576..=65_535;
/// The most rounds of a pre-copy.
const MOST_ROUNDS: u32 = 100;
/// The downtime that is aimed at when what was asked for makes no sense.
const DEFAULT_BUDGET: Duration = Duration::from_millis(100);
/// The most characters of a note.
const LONGEST_NOTE: usize = 250;

/// A node's name.
pub(crate) fn node_name(text: &str) -> Result<NodeName, Failure> {
    text.parse().map_err(|error| Failure::from_error(FailureCode::InvalidArgument, &error))
}

/// A link as the network code has it. Its plan checks it further.
pub(crate) fn link_of(message: v1::Link) -> Result<ContainerLink, Failure> {
    if message.addresses.len() > MOST_ADDRESSES || message.routes.len() > MOST_ROUTES {
        return Err(invalid("a link has more addresses or routes than are taken"));
    }
    let mac: [u8; 6] = message.mac.as_ref().try_into().map_err(|_| invalid("a MAC address has six bytes"))?;
    let addresses = message.addresses.iter().map(address_of).collect::<Result<_, _>>()?;
    let routes = message.routes.iter().map(route_of).collect::<Result<_, _>>()?;
    Ok(ContainerLink {
        interface: message.interface,
        mac: MacAddress(mac),
        mtu: message.mtu,
        addresses,
        routes,
        peer: None,
    })
}

/// A link as the protocol has it.
pub(crate) fn link_message(link: &ContainerLink) -> v1::Link {
    let address = |net: &IpNet| v1::Address { ip: net.addr().to_string(), prefix: net.prefix_len().into() };
    let route = |route: &Route| v1::Route {
        destination: route.destination.to_string(),
        gateway: route.gateway.map(|gateway| gateway.to_string()).unwrap_or_default(),
    };
    v1::Link {
        interface: link.interface.clone(),
        mac: link.mac.0.to_vec().into(),
        mtu: link.mtu,
        addresses: link.addresses.iter().map(address).collect(),
        routes: link.routes.iter().map(route).collect(),
    }
}

/// Addresses whose connections a relay carries.
pub(crate) fn relayed_of(message: &v1::Relayed) -> Result<Relayed, Failure> {
    if message.addresses.is_empty() || message.addresses.len() > relay::MOST_ADDRESSES {
        return Err(invalid("a relay has no addresses, or more than are taken"));
    }
    if !MTU.contains(&message.mtu) {
        return Err(invalid(format!("{} is no MTU", message.mtu)));
    }
    let address = |text: &String| text.parse().map_err(|_| invalid(format!("{text:?} is no address")));
    let addresses = message.addresses.iter().map(address).collect::<Result<_, _>>()?;
    Ok(Relayed { addresses, mtu: message.mtu, lifetime_s: message.lifetime_s })
}

fn address_of(message: &v1::Address) -> Result<IpNet, Failure> {
    let ip: IpAddr = message.ip.parse().map_err(|_| invalid(format!("{:?} is no address", message.ip)))?;
    let prefix = u8::try_from(message.prefix).ok().and_then(|prefix| IpNet::new(ip, prefix).ok());
    prefix.ok_or_else(|| invalid(format!("{} is no prefix of {ip}", message.prefix)))
}

fn route_of(message: &v1::Route) -> Result<Route, Failure> {
    let gateway = match message.gateway.as_str() {
        "" => None,
        text => Some(text.parse().map_err(|_| invalid(format!("{text:?} is no gateway")))?),
    };
    let destination = match (message.destination.as_str(), gateway) {
        ("default", Some(IpAddr::V6(_))) => "::/0",
        ("default", _) => "0.0.0.0/0",
        (text, _) => text,
    };
    let destination = destination.parse().map_err(|_| invalid(format!("{destination:?} is no destination")))?;
    Ok(Route { destination, gateway })
}

/// `IoUring` as `io-uring`.
pub(crate) fn kebab(name: &str) -> String {
    let mut word = String::with_capacity(name.len() + 4);
    for letter in name.chars() {
        if letter.is_ascii_uppercase() && !word.is_empty() {
            word.push('-');
        }
        word.push(letter.to_ascii_lowercase());
    }
    word
}

fn invalid(message: impl Into<String>) -> Failure {
    Failure::new(FailureCode::InvalidArgument, message)
}

/// An event of a freeze.
pub(crate) fn event(event: FreezeEvent) -> v1::FreezeEvent {
    let event = match event {
        FreezeEvent::Frozen { freeze_ms, killed } => freeze_event::Event::Frozen(v1::Frozen { freeze_ms, killed }),
        FreezeEvent::Progress { raw_bytes, wire_bytes } => {
            freeze_event::Event::Progress(v1::Progress { raw_bytes, wire_bytes })
        }
        FreezeEvent::Round(round) => freeze_event::Event::Round(round_message(round)),
        FreezeEvent::Converged { predicted_ms, notes } => {
            let notes = notes.iter().map(|note| note.chars().take(LONGEST_NOTE).collect()).collect();
            freeze_event::Event::Converged(v1::Converged { predicted_ms, notes })
        }
        FreezeEvent::Transferred {
            pages,
            raw_bytes,
            zero_bytes,
            wire_bytes,
            dump_ms,
            transfer_ms,
            last_round,
            verified,
        } => freeze_event::Event::Transferred(v1::Transferred {
            pages,
            raw_bytes,
            zero_bytes,
            wire_bytes,
            dump_ms,
            transfer_ms,
            last_round: last_round.map(round_message),
            verified: verified
                .map(|Verified { bytes, duration }| v1::Verified { bytes, verify_ms: duration.as_secs_f64() * 1e3 }),
        }),
    };
    v1::FreezeEvent { event: Some(event) }
}

fn round_message(round: Round) -> v1::Round {
    v1::Round {
        pages: round.pages,
        raw_bytes: round.raw_bytes,
        wire_bytes: round.wire_bytes,
        duration_ms: round.duration.as_secs_f64() * 1e3,
        dirty_rate: round.dirty_rate,
        predicted_ms: round.predicted.as_secs_f64() * 1e3,
        cpu_limit: round.throttle.map_or(0.0, |rate| Duration::from_micros(rate).as_secs_f64()),
    }
}

/// How to pre-copy, within what is taken.
pub(crate) fn pre_copy_of(message: &v1::PreCopy, deadline: SystemTime) -> PreCopyOrder {
    let budget = Duration::try_from_secs_f64(message.downtime_budget_ms / 1e3).unwrap_or(DEFAULT_BUDGET);
    let max_rounds = message.max_rounds.clamp(1, MOST_ROUNDS);
    PreCopyOrder { budget, max_rounds, deadline, verify: message.verify, throttle: message.throttle }
}

/// How a part ended.
pub(crate) fn ended(standing: Standing) -> PartState {
    match standing {
        Standing::Released => PartState::Released,
        Standing::Resumed => PartState::Resumed,
        Standing::Aborted => PartState::Aborted,
        Standing::Open | Standing::Sealed => PartState::Unknown,
    }
}

/// Where a source stands.
pub(crate) fn source_state(part: &SourcePart) -> PartState {
    match part.standing() {
        Standing::Open if part.is_frozen() => PartState::Frozen,
        Standing::Open if part.is_pre_copying() => PartState::Precopying,
        Standing::Open => PartState::Freezing,
        Standing::Sealed => PartState::Sealed,
        last => ended(last),
    }
}

/// Where a target stands.
pub(crate) fn target_state(part: &TargetPart) -> PartState {
    match part.standing() {
        Standing::Open if part.is_held() => PartState::Held,
        Standing::Open if part.is_restoring() => PartState::Restoring,
        Standing::Open => PartState::Prepared,
        Standing::Sealed => PartState::Sealed,
        last => ended(last),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link() -> v1::Link {
        v1::Link {
            interface: "eth0".to_owned(),
            mac: vec![2, 0, 0, 0, 0, 7].into(),
            mtu: 1500,
            addresses: vec![v1::Address { ip: "10.1.2.3".to_owned(), prefix: 24 }],
            routes: vec![v1::Route { destination: "default".to_owned(), gateway: "10.1.2.1".to_owned() }],
        }
    }

    #[test]
    fn a_link_survives_the_way_there_and_back() {
        let there = link_of(link()).unwrap();
        let back = link_message(&there);
        assert_eq!(back.addresses, link().addresses);
        assert_eq!(back.routes[0].destination, "0.0.0.0/0");
        assert_eq!(link_of(back).unwrap(), there);
    }

    #[test]
    fn kinds_become_words() {
        assert_eq!(kebab("ExternalUnixSocket"), "external-unix-socket");
    }

    #[test]
    fn a_link_that_lies_is_refused() {
        let broken: [fn(&mut v1::Link); 5] = [
            |link| link.mac = vec![1].into(),
            |link| link.addresses[0].prefix = 99,
            |link| link.addresses[0].ip = "x".to_owned(),
            |link| link.routes[0].gateway = "x".to_owned(),
            |link| link.addresses = vec![link.addresses[0].clone(); 17],
        ];
        for breaking in broken {
            let mut link = link();
            breaking(&mut link);
            assert!(link_of(link).is_err());
        }
    }
}
