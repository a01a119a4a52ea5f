//! Established connections follow a container to a node where it has another address.
//!
//! The namespace that the container left stays, as the *home* of its address `a`. In the namespace that it came to, *away*, `a`
//! is an address more, and there its connections are restored. What comes for `a` at home is carried away, and what is said
//! away with `a` is carried home and leaves from there. Peers, firewalls and the pod network see one address at one place. Both
//! namespaces have a [TUN device](End::device); who carries packets from one [`Tun`] to the other is the caller's business.
//!
//! # A packet's way to the container
//!
//! 1. It reaches home's interface as always: home answers for `a` on the link (ARP, neighbour discovery).
//! 2. It is not for a socket yet: handing packets over early (`ip_early_demux`) is off.
//! 3. The rule `iif eth0 to a ipproto tcp` ([`DIVERTING`]), or the one for ICMP behind it, sends it to [our table](End::table). That is reached
//!    because the rule for what is local, at 0 by nature, was moved behind them: [`divert`] is this move. ICMP comes along
//!    because path MTU discovery is ICMP. The unicast messages of neighbour discovery are ICMP as well, and stay: the address is
//!    a proxy's (`ip -6 neigh show proxy`), and the kernel takes those out of what it forwards.
//! 4. The table has a default route to the device. When nobody reads the device, the packet is lost; when there is no device, a
//!    blackhole is next. It never falls through to what is local: the old sockets would take it, or home would answer a segment of
//!    a connection that it does not have any more.
//! 5. Away it enters through the device, and `a` is local.
//!
//! # And back
//!
//! 1. Away, the rule `from a` ([`DIVERTING`]) sends it to our table there, and to the device.
//! 2. At home it enters through the device, with a source that home has itself: `accept_local` allows that, and the filter of
//!    reverse paths is off. IPv6 has neither.
//! 3. It is forwarded by the main table like any other packet, and leaves with the right Ethernet address.
//!
//! It passes two routers more than before, home in both ways, so its hop limit is one less in each way.
//!
//! # The sockets at home
//!
//! They are frozen, then they die. Neither they nor what is left of them may say a word: a FIN or a reset would end the connection,
//! a retransmission would come from the past. While packets are diverted the rule `iif lo from a ipproto tcp`
//! ([`SILENCING`]) lets every route of theirs end in a blackhole: a packet that this namespace makes itself counts as one that came
//! in by the loopback, and one that passes through does not. Changing a rule makes every socket look up its route anew. To TCP it is
//! an outage like others: it tries again later, and after [`undivert`] it gets through. One kind of socket gets around it: that of IPv4 which
//! is bound to an interface (`SO_BINDTODEVICE`). When the rules lead such a one nowhere, the kernel takes its peer to be on the link.
//!
//! # In which order
//!
//! [`prepare_home`] and [`prepare_away`] while the container runs. [`intercept`] just before it is frozen, so that connections which
//! have been begun can be taken by the program ([`not_accepted`]) while no further ones come: a connection that no program has
//! taken is part of no process, and is not restored. [`divert`] when it is frozen; what comes from then on waits in the
//! device, or at the caller's, until the connections are restored away. If they are not, [`undivert`], and what has waited
//! is sent to home's own device: the sockets get it as if it had been late. In the end, when [`connections_of`] finds none
//! away, [`dismantle_away`] and [`dismantle_home`]. New connections are told by [`opens_connection`]; who wants the old address to end
//! does not relay them.
//!
//! CRIU restores sockets with small segments, and wakes them by a change of the MTU: make the device away with one byte less than it is to
//! have, and [`set_mtu`](crate::set_mtu) it afterwards.
//!
//! The devices stay when the process that opened them ends, and are attached to again by preparing once more, or by
//! [`Tun::open`]. A namespace can be one home and one away: where a container was that came by a relay, and moved on.

mod away;
mod connections;
mod device;
mod facts;
mod home;
mod policy;
mod settings;
mod tun;

pub use away::{dismantle_away, prepare_away};
pub use connections::{Connection, connections_of, end_connections, list_connections, not_accepted};
pub use facts::{addresses_of, destination_of, is_possible, source_of};
pub use home::{Home, check_home, dismantle_home, divert, intercept, is_diverted, prepare_home, undivert};
pub use settings::Setting;
pub use tun::Tun;

use crate::segment;

/// The number of who made our rules and routes.
const PROTOCOL: u8 = 177;

/// What a namespace is to a relay. One can be both: where a container was that has come by a relay itself, and moved on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Where the address is.
    Home,
    /// Where the container is.
    Away,
}

impl End {
    /// The name of the device.
    pub const fn device(self) -> &'static str {
        match self {
            Self::Home => "podferry-home",
            Self::Away => "podferry-away",
        }
    }

    /// The number of our routing table.
    pub const fn table(self) -> u8 {
        match self {
            Self::Home => 177,
            Self::Away => 178,
        }
    }
}

/// The priority of the rules that silence the sockets at home.
pub const SILENCING: u32 = 9;
/// The priority of the rules that lead to our table; that for ICMP is one behind.
pub const DIVERTING: u32 = 10;
/// The metric of the blackhole in our table.
const LAST_RESORT: u32 = 9999;
/// `virtio_net_hdr`, which every packet has in front.
const HEADER: usize = 10;

/// Whether a packet, with its header in front, would open a TCP connection.
pub fn opens_connection(packet: &[u8]) -> bool {
    packet.get(HEADER..).is_some_and(segment::opens_connection)
}
