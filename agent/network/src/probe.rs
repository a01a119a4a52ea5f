//! What this kernel has of what the rest of the crate needs, found out by using it in a namespace that goes right away.

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socket, sockopt::TcpRepair};

use crate::cut::{LinkHandle, cut, uncut};
use crate::error::{Error, Result, link_error};
use crate::netlink::open_for;
use crate::netns::Netns;

/// Something that the kernel has to have.
#[derive(Debug)]
pub struct Capability {
    /// Its name: `veth`, `bridge`, `link_cut` (the queueing discipline `clsact` with the classifier `cls_bpf`),
    /// `tcp_repair`.
    pub name: &'static str,
    /// Why it cannot be used.
    pub missing: Option<Error>,
}

/// Tries everything once.
pub fn probe() -> Result<Vec<Capability>> {
    type Trial = fn() -> Result<()>;
    let trials: [(&'static str, Trial); 4] = [
        ("bridge", || make(InfoKind::Bridge)),
        ("link_cut", try_cut),
        ("tcp_repair", try_tcp_repair),
        ("veth", || make(InfoKind::Veth)),
    ];
    Netns::anonymous()?
        .run(|| trials.into_iter().map(|(name, trial)| Capability { name, missing: trial().err() }).collect())
}

fn make(kind: InfoKind) -> Result<()> {
    const NAME: &str = "pf-probe";
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(format!("{NAME}-{kind}")));
    message.attributes.push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind)]));
    let made = open_for(NAME)?.ask(RouteNetlinkMessage::NewLink(message), NLM_F_CREATE | NLM_F_EXCL);
    made.map(drop).map_err(link_error("make", NAME))
}

/// Any interface will do; this one every namespace has.
fn try_cut() -> Result<()> {
    uncut(&cut(&LinkHandle::new("lo"))?)
}

fn try_tcp_repair() -> Result<()> {
    const ON: u32 = 1;
    let repair = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
        .and_then(|socket| setsockopt(&socket, TcpRepair, &ON));
    repair.map_err(|errno| link_error("repair the TCP connections of", "a container")(errno.into()))
}
