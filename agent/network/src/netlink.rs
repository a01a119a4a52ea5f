//! rtnetlink (rtnetlink(7)) as blocking calls: one question, its answers, in the calling thread's network namespace.

use std::io;

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
pub(crate) use netlink_packet_route::link::BridgePortState;
use netlink_packet_route::link::{
    BridgeStpState, InfoBridge, InfoBridgePort, InfoData, InfoKind, InfoPortData, LinkAttribute, LinkInfo, LinkMessage,
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use nix::errno::Errno;

use crate::error::{Result, link_error};
use crate::link::MacAddress;

/// The kernel fills at most 32 KiB of a dump into one message.
const RECEIVE: usize = 64 * 1024;
const ALIGNMENT: usize = 4;

pub(crate) struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    pub(crate) fn open() -> io::Result<Self> {
        let socket = Socket::new(NETLINK_ROUTE)?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Sends one message and returns what the kernel answers before its acknowledgement.
    pub(crate) fn request(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<Vec<RouteNetlinkMessage>> {
        self.sequence += 1;
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let mut request = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        self.answers()
    }

    /// A change, or a question with one answer.
    pub(crate) fn ask(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<Vec<RouteNetlinkMessage>> {
        self.request(message, flags | NLM_F_ACK)
    }

    /// A question about all of a kind.
    pub(crate) fn dump(&mut self, message: RouteNetlinkMessage) -> io::Result<Vec<RouteNetlinkMessage>> {
        self.request(message, NLM_F_DUMP)
    }

    fn answers(&self) -> io::Result<Vec<RouteNetlinkMessage>> {
        let mut answers = Vec::new();
        loop {
            let mut buffer = Vec::with_capacity(RECEIVE);
            self.socket.recv(&mut buffer, 0)?;
            if self.read(&buffer, &mut answers)? {
                return Ok(answers);
            }
        }
    }

    /// Reads one datagram; true when it holds the end of the answers.
    fn read(&self, mut datagram: &[u8], answers: &mut Vec<RouteNetlinkMessage>) -> io::Result<bool> {
        while !datagram.is_empty() {
            let invalid = |error| io::Error::new(io::ErrorKind::InvalidData, error);
            let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(datagram).map_err(invalid)?;
            let length = (message.header.length as usize).next_multiple_of(ALIGNMENT);
            datagram = datagram.get(length..).unwrap_or_default();
            if message.header.sequence_number != self.sequence {
                continue;
            }
            match message.payload {
                NetlinkPayload::Error(error) => {
                    return error.code.map_or(Ok(true), |code| Err(io::Error::from_raw_os_error(code.get().abs())));
                }
                NetlinkPayload::Done(_) => return Ok(true),
                NetlinkPayload::InnerMessage(answer) => answers.push(answer),
                _ => {}
            }
        }
        Ok(false)
    }

    /// An interface by its name.
    pub(crate) fn link(&mut self, interface: &str) -> Result<Link> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(interface.into()));
        self.find(message).map_err(link_error("look up", interface))
    }

    /// An interface by its index.
    pub(crate) fn link_at(&mut self, index: u32) -> io::Result<Link> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        self.find(message)
    }

    /// All interfaces.
    pub(crate) fn links(&mut self) -> io::Result<Vec<Link>> {
        let answers = self.dump(RouteNetlinkMessage::GetLink(LinkMessage::default()))?;
        Ok(answers.into_iter().filter_map(Link::read).collect())
    }

    fn find(&mut self, message: LinkMessage) -> io::Result<Link> {
        let answers = self.ask(RouteNetlinkMessage::GetLink(message), 0)?;
        let link = answers.into_iter().find_map(Link::read);
        link.ok_or_else(|| io::Error::from(Errno::ENODEV))
    }
}

/// Opens a socket for work on one interface.
pub(crate) fn open_for(interface: &str) -> Result<Netlink> {
    Netlink::open().map_err(link_error("open a netlink socket for", interface))
}

/// True when the kernel did it, false when it answered with the error that means it is done already.
pub(crate) fn ignore<T>(result: io::Result<T>, done: Errno) -> io::Result<bool> {
    match result {
        Ok(_) => Ok(true),
        Err(error) if errno(&error) == done => Ok(false),
        Err(error) => Err(error),
    }
}

pub(crate) fn errno(error: &io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(0))
}

/// What the kernel says of an interface.
pub(crate) struct Link(LinkMessage);

impl Link {
    fn read(answer: RouteNetlinkMessage) -> Option<Self> {
        match answer {
            RouteNetlinkMessage::NewLink(link) => Some(Self(link)),
            _ => None,
        }
    }

    pub(crate) fn index(&self) -> u32 {
        self.0.header.index
    }

    pub(crate) fn is_up(&self) -> bool {
        self.0.header.flags.contains(netlink_packet_route::link::LinkFlags::Up)
    }

    pub(crate) fn name(&self) -> Option<&str> {
        self.find(|attribute| match attribute {
            LinkAttribute::IfName(name) => Some(name.as_str()),
            _ => None,
        })
    }

    pub(crate) fn mac(&self) -> Option<MacAddress> {
        self.find(|attribute| match attribute {
            LinkAttribute::Address(bytes) => <[u8; 6]>::try_from(bytes.as_slice()).ok().map(MacAddress),
            _ => None,
        })
    }

    pub(crate) fn mtu(&self) -> Option<u32> {
        self.find(|attribute| match attribute {
            LinkAttribute::Mtu(mtu) => Some(*mtu),
            _ => None,
        })
    }

    /// The text that was left with it (`IFLA_IFALIAS`).
    pub(crate) fn alias(&self) -> Option<&str> {
        self.find(|attribute| match attribute {
            LinkAttribute::IfAlias(text) => Some(text.as_str()),
            _ => None,
        })
    }

    /// The index of the other end, in that end's namespace (`IFLA_LINK`).
    pub(crate) fn peer_index(&self) -> Option<u32> {
        self.find(|attribute| match attribute {
            LinkAttribute::Link(index) => Some(*index),
            _ => None,
        })
    }

    /// The number by which this namespace knows that of the other end (`IFLA_LINK_NETNSID`); none when it is the same.
    pub(crate) fn peer_netns_id(&self) -> Option<i32> {
        self.find(|attribute| match attribute {
            LinkAttribute::LinkNetNsId(id) => Some(*id),
            _ => None,
        })
    }

    /// The index of the bridge or bond that it is a port of.
    pub(crate) fn controller(&self) -> Option<u32> {
        self.find(|attribute| match attribute {
            LinkAttribute::Controller(index) => Some(*index),
            _ => None,
        })
    }

    pub(crate) fn is(&self, kind: &InfoKind) -> bool {
        self.infos().any(|info| matches!(info, LinkInfo::Kind(found) if found == kind))
    }

    /// The state of a bridge's port; none when it is no bridge's port.
    pub(crate) fn port_state(&self) -> Option<BridgePortState> {
        self.infos().find_map(|info| match info {
            LinkInfo::PortData(InfoPortData::BridgePort(facts)) => facts.iter().find_map(|fact| match fact {
                InfoBridgePort::State(state) => Some(*state),
                _ => None,
            }),
            _ => None,
        })
    }

    /// Whether a bridge speaks the spanning tree protocol, itself or through a daemon.
    pub(crate) fn speaks_spanning_tree(&self) -> bool {
        let off = |fact: &InfoBridge| matches!(fact, InfoBridge::StpState(BridgeStpState::Disabled));
        let state = |fact: &InfoBridge| matches!(fact, InfoBridge::StpState(_)) && !off(fact);
        self.infos().any(|info| matches!(info, LinkInfo::Data(InfoData::Bridge(facts)) if facts.iter().any(state)))
    }

    fn infos(&self) -> impl Iterator<Item = &LinkInfo> {
        let infos = self.find(|attribute| match attribute {
            LinkAttribute::LinkInfo(infos) => Some(infos.as_slice()),
            _ => None,
        });
        infos.unwrap_or_default().iter()
    }

    fn find<'a, T>(&'a self, pick: impl FnMut(&'a LinkAttribute) -> Option<T>) -> Option<T> {
        self.0.attributes.iter().find_map(pick)
    }
}
