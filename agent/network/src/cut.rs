//! Holding back all frames of a container: quickly, both ways, and so that it can be undone.
//!
//! A filter at the host interface drops what comes and what goes (`clsact` with `cls_bpf`, tc-bpf(8)). It works with and
//! without a bridge, and whatever happens to the link does not undo it. Putting the bridge's port into the state
//! *disabled* would be one message instead of three, but the bridge puts it back to *forwarding* at the next change it
//! is told of (`br_port_carrier_check`), even one that sets the state itself by `RTM_NEWLINK`; and a bridge that speaks the
//! spanning tree protocol does not let it be set.

use std::io;

use netlink_packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{TcAttribute, TcFilterBpfOption, TcHandle, TcMessage, TcOption};
use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result, link_error};
use crate::netlink::{Link, Netlink, open_for};

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
        let message = RouteNetlinkMessage::NewTrafficFilter(drop_filter(index, direction));
        let added = netlink.ask(message, NLM_F_CREATE | NLM_F_EXCL);
        ignore(added, Errno::EEXIST).map_err(|source| {
            // Half a cut is none: what passes one way only confuses both ends.
            let _ = uncut(&state);
            match errno(&source) {
                Errno::ENOENT => Error::NoClassifier { interface: interface.into(), source },
                _ => link_error("cut", interface)(source),
            }
        })?;
    }
    if !made_qdisc {
        // It may be of a first cut whose maker was killed, even before the first filter; when it serves nothing else, it is.
        state.made_qdisc = !serves_others(&mut netlink, index).map_err(link_error("cut", interface))?;
    }
    Ok(state)
}

/// Undoes a cut. That the link is not cut any more, or does not exist any more, is no error.
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
/// Marks our filter among others of the first priority.
const FILTER_HANDLE: TcHandle = TcHandle { major: 0, minor: 0x7066 };
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

fn filter(index: u32, direction: TcHandle) -> TcMessage {
    let mut message = TcMessage::default();
    message.header.index = signed(index);
    message.header.handle = FILTER_HANDLE;
    message.header.parent = direction;
    message.header.info = FILTER_INFO;
    message.attributes.push(TcAttribute::Kind("bpf".into()));
    message
}

/// One classic BPF instruction, "return `TC_ACT_SHOT`", whose result is the verdict. The classifier `cls_bpf` is built
/// where `matchall` and the action `gact` are not, and needs no module beside it.
fn drop_filter(index: u32, direction: TcHandle) -> TcMessage {
    const TCA_BPF_OPS_LEN: u16 = 4;
    const TCA_BPF_OPS: u16 = 5;
    const TCA_BPF_FLAGS: u16 = 8;
    const TCA_BPF_FLAG_ACT_DIRECT: u32 = 1;
    const BPF_RET_K: u16 = 0x06;
    const TC_ACT_SHOT: u32 = 2;
    let mut instruction = [0; 8];
    instruction[..2].copy_from_slice(&BPF_RET_K.to_ne_bytes());
    instruction[4..].copy_from_slice(&TC_ACT_SHOT.to_ne_bytes());
    let options = [
        (TCA_BPF_OPS_LEN, 1_u16.to_ne_bytes().to_vec()),
        (TCA_BPF_OPS, instruction.to_vec()),
        (TCA_BPF_FLAGS, TCA_BPF_FLAG_ACT_DIRECT.to_ne_bytes().to_vec()),
    ];
    let option = |(kind, value)| TcOption::Bpf(TcFilterBpfOption::Other(DefaultNla::new(kind, value)));
    let mut message = filter(index, direction);
    message.attributes.push(TcAttribute::Options(options.into_iter().map(option).collect()));
    message
}

fn has_filters(netlink: &mut Netlink, index: u32) -> io::Result<bool> {
    for direction in DIRECTIONS {
        let message = RouteNetlinkMessage::GetTrafficFilter(filter(index, direction));
        if !unless_gone(netlink.ask(message, 0))? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether the interface's hooks have filters that are not ours. A dump names each filter's chain with the handle 0 first.
fn serves_others(netlink: &mut Netlink, index: u32) -> io::Result<bool> {
    let ours = |found: &TcMessage| {
        found.header.info == FILTER_INFO && [TcHandle::UNSPEC, FILTER_HANDLE].contains(&found.header.handle)
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
    for direction in DIRECTIONS {
        let message = RouteNetlinkMessage::DelTrafficFilter(filter(state.index, direction));
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

/// True when the kernel did it, false when it answered with the error that means it is done already.
fn ignore<T>(result: io::Result<T>, done: Errno) -> io::Result<bool> {
    match result {
        Ok(_) => Ok(true),
        Err(error) if errno(&error) == done => Ok(false),
        Err(error) => Err(error),
    }
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(0))
}

/// The kernel's indexes are positive numbers of an `int`.
fn signed(index: u32) -> i32 {
    i32::try_from(index).unwrap_or(i32::MAX)
}
