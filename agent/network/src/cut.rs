//! Holding back all frames of a container: quickly, both ways, and so that it can be undone.
//!
//! A filter at the host interface drops what comes and what goes (`clsact` with `cls_bpf`, tc-bpf(8)). It works with and
//! without a bridge, and whatever happens to the link does not undo it. Putting the bridge's port into the state
//! *disabled* would be one message instead of three, but the bridge puts it back to *forwarding* at the next change it
//! is told of (`br_port_carrier_check`), even one that sets the state itself by `RTM_NEWLINK`; and a bridge that speaks the
//! spanning tree protocol does not let it be set.
//!
//! A link can also be [held](hold_new_connections): then only what opens a TCP connection to the container is dropped.

use std::io;

use netlink_packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{TcAttribute, TcFilterBpfOption, TcHandle, TcMessage, TcOption};
use nix::errno::Errno;
use nix::libc::sock_filter;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result, link_error};
use crate::netlink::{Link, Netlink, errno, ignore, open_for};

/// The link to cut.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkHandle {
    /// The host interface: the end of the container's veth pair that is in the node's namespace.
    pub host_interface: String,
}

impl LinkHandle {
    /// The link with this host interface.
    pub fn new(host_interface: impl Into<String>) -> Self {
        Self { host_interface: host_interface.into() }
    }
}

/// A link that was cut, and what to undo. It can be stored, and undone by another process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkState {
    /// The host interface.
    pub host_interface: String,
    /// Its index, which no other interface of its namespace has after it.
    pub index: u32,
    /// Whether the interface got its `clsact` queueing discipline for this, so that undoing removes it.
    pub made_qdisc: bool,
}

/// Cuts a link: no frame passes in or out until [`uncut`]. Cutting what is cut already is no error, and undoing the second
/// cut is as good as undoing the first: so a cut whose state was lost with its process can still be undone.
pub fn cut(handle: &LinkHandle) -> Result<LinkState> {
    let interface = handle.host_interface.as_str();
    let mut netlink = open_for(interface)?;
    let index = netlink.link(interface)?.index();
    let made_qdisc = add_clsact(&mut netlink, index).map_err(link_error("cut", interface))?;
    let mut state = LinkState { host_interface: interface.into(), index, made_qdisc };
    for direction in DIRECTIONS {
        let message = program_filter(index, direction, FILTER_HANDLE, &[instruction::DROP]);
        let message = RouteNetlinkMessage::NewTrafficFilter(message);
        let added = netlink.ask(message, NLM_F_CREATE | NLM_F_EXCL);
        ignore(added, Errno::EEXIST).map_err(|source| {
            // Half a cut is none: what passes one way only confuses both ends.
            let _ = uncut(&state);
            refused("cut", interface)(source)
        })?;
    }
    if !made_qdisc {
        // It may be of a first cut whose maker was killed, even before the first filter; when it serves nothing else, it is.
        state.made_qdisc = !serves_others(&mut netlink, index).map_err(link_error("cut", interface))?;
    }
    Ok(state)
}

/// Drops what would open a TCP connection to the container, and nothing else, until [`uncut`]: who comes newly tries again, and who is being
/// served is served to the end. A link can be held first and cut then; holding what is held is no error.
pub fn hold_new_connections(handle: &LinkHandle) -> Result<LinkState> {
    let interface = handle.host_interface.as_str();
    let mut netlink = open_for(interface)?;
    let index = netlink.link(interface)?.index();
    let made_qdisc = add_clsact(&mut netlink, index).map_err(link_error("hold", interface))?;
    let mut state = LinkState { host_interface: interface.into(), index, made_qdisc };
    let message = program_filter(index, TO_CONTAINER, HOLD_HANDLE, &OPENING_IS_DROPPED);
    let added = netlink.ask(RouteNetlinkMessage::NewTrafficFilter(message), NLM_F_CREATE | NLM_F_EXCL);
    ignore(added, Errno::EEXIST).map_err(|source| {
        let _ = uncut(&state);
        refused("hold", interface)(source)
    })?;
    if !made_qdisc {
        state.made_qdisc = !serves_others(&mut netlink, index).map_err(link_error("hold", interface))?;
    }
    Ok(state)
}

/// Undoes a cut and a hold. That the link is not cut any more, or does not exist any more, is no error.
pub fn uncut(state: &LinkState) -> Result<()> {
    let interface = state.host_interface.as_str();
    let mut netlink = open_for(interface)?;
    if find(&mut netlink, state)?.is_none() {
        return Ok(());
    }
    remove_filters(&mut netlink, state).map_err(link_error("uncut", interface))
}

/// Whether a link is still cut, both ways. One that does not exist any more is.
pub fn is_cut(state: &LinkState) -> Result<bool> {
    let interface = state.host_interface.as_str();
    let mut netlink = open_for(interface)?;
    if find(&mut netlink, state)?.is_none() {
        return Ok(true);
    }
    has_filters(&mut netlink, state.index).map_err(link_error("look up the cut of", interface))
}

fn refused(doing: &'static str, interface: &str) -> impl FnOnce(io::Error) -> Error {
    move |source| match errno(&source) {
        Errno::ENOENT => Error::NoClassifier { interface: interface.into(), source },
        _ => link_error(doing, interface)(source),
    }
}

/// The interface that was cut; none when it is gone.
fn find(netlink: &mut Netlink, state: &LinkState) -> Result<Option<Link>> {
    match netlink.link(&state.host_interface) {
        Err(Error::NoInterface { .. }) => Ok(None),
        Ok(link) if link.index() != state.index => {
            Err(Error::Replaced { interface: state.host_interface.clone(), expected: state.index, found: link.index() })
        }
        link => link.map(Some),
    }
}

const MAJOR: u16 = u16::MAX;
/// `TC_H_CLSACT`, the queueing discipline that has hooks only (`include/uapi/linux/pkt_sched.h`).
const CLSACT: TcHandle = TcHandle { major: MAJOR, minor: 0xfff1 };
/// `TC_H_MIN_INGRESS` and `TC_H_MIN_EGRESS` of it.
const DIRECTIONS: [TcHandle; 2] = [TcHandle { major: MAJOR, minor: 0xfff2 }, TcHandle { major: MAJOR, minor: 0xfff3 }];
/// What leaves the host interface goes to the container.
const TO_CONTAINER: TcHandle = DIRECTIONS[1];
/// Marks our filter among others of the first priority.
const FILTER_HANDLE: TcHandle = TcHandle { major: 0, minor: 0x7066 };
/// And the one that holds new connections.
const HOLD_HANDLE: TcHandle = TcHandle { major: 0, minor: 0x7067 };
/// The first priority, above `ETH_P_ALL` in network byte order.
const FILTER_INFO: u32 = (1 << 16) | (0x0003_u16.to_be() as u32);

/// True when it was not there before.
fn add_clsact(netlink: &mut Netlink, index: u32) -> io::Result<bool> {
    let added = netlink.ask(RouteNetlinkMessage::NewQueueDiscipline(clsact(index)), NLM_F_CREATE | NLM_F_EXCL);
    ignore(added, Errno::EEXIST)
}

fn clsact(index: u32) -> TcMessage {
    let mut message = TcMessage::default();
    message.header.index = signed(index);
    message.header.handle = TcHandle { major: MAJOR, minor: 0 };
    message.header.parent = CLSACT;
    message.attributes.push(TcAttribute::Kind("clsact".into()));
    message
}

fn filter(index: u32, direction: TcHandle, handle: TcHandle) -> TcMessage {
    let mut message = TcMessage::default();
    message.header.index = signed(index);
    message.header.handle = handle;
    message.header.parent = direction;
    message.header.info = FILTER_INFO;
    message.attributes.push(TcAttribute::Kind("bpf".into()));
    message
}

/// A program of classic BPF whose result is the verdict. The classifier `cls_bpf` is built where `matchall` and the action `gact` are not,
/// and needs no module beside it.
fn program_filter(index: u32, direction: TcHandle, handle: TcHandle, program: &[sock_filter]) -> TcMessage {
    const TCA_BPF_OPS_LEN: u16 = 4;
    const TCA_BPF_OPS: u16 = 5;
    const TCA_BPF_FLAGS: u16 = 8;
    const TCA_BPF_FLAG_ACT_DIRECT: u32 = 1;
    let length = u16::try_from(program.len()).unwrap_or(u16::MAX);
    let options = [
        (TCA_BPF_OPS_LEN, length.to_ne_bytes().to_vec()),
        (TCA_BPF_OPS, program.iter().copied().flat_map(instruction::bytes).collect()),
        (TCA_BPF_FLAGS, TCA_BPF_FLAG_ACT_DIRECT.to_ne_bytes().to_vec()),
    ];
    let option = |(kind, value)| TcOption::Bpf(TcFilterBpfOption::Other(DefaultNla::new(kind, value)));
    let mut message = filter(index, direction, handle);
    message.attributes.push(TcAttribute::Options(options.into_iter().map(option).collect()));
    message
}

/// Instructions of classic BPF (`include/uapi/linux/bpf_common.h` and `filter.h`), for frames from their Ethernet header on.
mod instruction {
    use nix::libc::sock_filter;

    /// Returns `TC_ACT_SHOT`.
    pub(super) const DROP: sock_filter = step(0x06, 2);
    /// Returns `TC_ACT_UNSPEC`: whoever comes behind decides.
    pub(super) const LEAVE: sock_filter = step(0x06, u32::MAX);

    /// Loads two bytes of the frame.
    pub(super) const fn half(at: u32) -> sock_filter {
        step(0x28, at)
    }

    /// Loads one.
    pub(super) const fn byte(at: u32) -> sock_filter {
        step(0x30, at)
    }

    /// Loads the one that lies so far behind what the index says.
    pub(super) const fn byte_behind_index(at: u32) -> sock_filter {
        step(0x50, at)
    }

    /// Puts into the index how long the IPv4 header is that begins there.
    pub(super) const fn index_by_ipv4_header(at: u32) -> sock_filter {
        step(0xb1, at)
    }

    /// Masks what was loaded.
    pub(super) const fn and(mask: u32) -> sock_filter {
        step(0x54, mask)
    }

    /// Skips so many instructions.
    pub(super) const fn skip(count: u32) -> sock_filter {
        step(0x05, count)
    }

    /// Skips so many when what was loaded is this, and so many when it is not.
    pub(super) const fn equal(value: u32, then: u8, otherwise: u8) -> sock_filter {
        sock_filter { code: 0x15, jt: then, jf: otherwise, k: value }
    }

    /// The same when it has one of these bits.
    pub(super) const fn any_bit(mask: u32, then: u8, otherwise: u8) -> sock_filter {
        sock_filter { code: 0x45, jt: then, jf: otherwise, k: mask }
    }

    const fn step(code: u16, k: u32) -> sock_filter {
        sock_filter { code, jt: 0, jf: 0, k }
    }

    /// As the kernel takes them.
    pub(super) fn bytes(instruction: sock_filter) -> [u8; 8] {
        let mut bytes = [0; 8];
        bytes[..2].copy_from_slice(&instruction.code.to_ne_bytes());
        [bytes[2], bytes[3]] = [instruction.jt, instruction.jf];
        bytes[4..].copy_from_slice(&instruction.k.to_ne_bytes());
        bytes
    }
}

/// Drops TCP segments with SYN and without ACK. Of IPv6 only those whose TCP header follows at once: nobody opens connections otherwise.
const OPENING_IS_DROPPED: [sock_filter; 17] = {
    use instruction::{DROP, LEAVE, and, any_bit, byte, byte_behind_index, equal, half, index_by_ipv4_header, skip};
    const ETHERNET: u32 = 14;
    const IPV6_HEADER: u32 = 40;
    const TCP: u32 = 6;
    const FLAGS: u32 = 13;
    const SYN: u32 = 0x02;
    const ACK: u32 = 0x10;
    [
        half(12),
        equal(0x86dd, 8, 0),
        equal(0x0800, 0, 13),
        byte(ETHERNET + 9),
        equal(TCP, 0, 11),
        // A fragment behind the first has no TCP header.
        half(ETHERNET + 6),
        any_bit(0x1fff, 9, 0),
        index_by_ipv4_header(ETHERNET),
        byte_behind_index(ETHERNET + FLAGS),
        skip(3),
        byte(ETHERNET + 6),
        equal(TCP, 0, 4),
        byte(ETHERNET + IPV6_HEADER + FLAGS),
        and(SYN | ACK),
        equal(SYN, 0, 1),
        DROP,
        LEAVE,
    ]
};

fn has_filters(netlink: &mut Netlink, index: u32) -> io::Result<bool> {
    for direction in DIRECTIONS {
        let message = RouteNetlinkMessage::GetTrafficFilter(filter(index, direction, FILTER_HANDLE));
        if !unless_gone(netlink.ask(message, 0))? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether the interface's hooks have filters that are not ours. A dump names each filter's chain with the handle 0 first.
fn serves_others(netlink: &mut Netlink, index: u32) -> io::Result<bool> {
    let ours = |found: &TcMessage| {
        found.header.info == FILTER_INFO
            && [TcHandle::UNSPEC, FILTER_HANDLE, HOLD_HANDLE].contains(&found.header.handle)
    };
    for direction in DIRECTIONS {
        let mut message = TcMessage::default();
        message.header.index = signed(index);
        message.header.parent = direction;
        let found = netlink.dump(RouteNetlinkMessage::GetTrafficFilter(message))?;
        let other = |answer: &RouteNetlinkMessage| matches!(answer, RouteNetlinkMessage::NewTrafficFilter(found) if !ours(found));
        if found.iter().any(other) {
            return Ok(true);
        }
    }
    Ok(false)
}

fn remove_filters(netlink: &mut Netlink, state: &LinkState) -> io::Result<()> {
    let cut = DIRECTIONS.map(|direction| (direction, FILTER_HANDLE));
    for (direction, handle) in cut.into_iter().chain([(TO_CONTAINER, HOLD_HANDLE)]) {
        let message = RouteNetlinkMessage::DelTrafficFilter(filter(state.index, direction, handle));
        unless_gone(netlink.ask(message, 0))?;
    }
    if state.made_qdisc {
        unless_gone(netlink.ask(RouteNetlinkMessage::DelQueueDiscipline(clsact(state.index)), 0))?;
    }
    Ok(())
}

/// No such filter is `ENOENT`; without a `clsact` to have one, the kernel calls the question invalid.
fn unless_gone<T>(result: io::Result<T>) -> io::Result<bool> {
    match result {
        Err(error) if matches!(errno(&error), Errno::ENOENT | Errno::EINVAL) => Ok(false),
        result => result.map(|_| true),
    }
}

/// The kernel's indexes are positive numbers of an `int`.
fn signed(index: u32) -> i32 {
    i32::try_from(index).unwrap_or(i32::MAX)
}
