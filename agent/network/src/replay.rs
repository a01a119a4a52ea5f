//! Handing captured packets to a container.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, LinkAddr, MsgFlags, SockFlag, SockType, sendto, socket};

use crate::announce::{ETHERTYPE_IPV6, ethernet, link_address};
use crate::error::{Error, Result};
use crate::link::MacAddress;
use crate::netlink::open_for;
use crate::segment::segments;

const ETHERTYPE_IPV4: u16 = 0x0800;

/// Hands packets to one container, through its host interface: what is sent out of that comes into the container.
///
/// A [cut](crate::cut()) link drops these packets like all others, so they are delivered after
/// [`uncut`](crate::uncut) or [`attach`](crate::attach()) only; opening can be done before.
#[derive(Debug)]
pub struct Replayer {
    interface: String,
    socket: OwnedFd,
    link: LinkAddr,
    host_mac: MacAddress,
    container_mac: MacAddress,
    mtu: usize,
}

impl Replayer {
    /// Prepares to deliver to the container behind a host interface of the calling thread's namespace. The MTU is that of the
    /// container's interface.
    pub fn open(host_interface: &str, container_mac: MacAddress, mtu: u32) -> Result<Self> {
        let failed = |source: io::Error| Error::Replay { interface: host_interface.into(), source };
        let link = open_for(host_interface)?.link(host_interface)?;
        let no_ethernet = Error::WrongKind { interface: host_interface.into(), what: "no Ethernet interface" };
        let host_mac = link.mac().ok_or(no_ethernet)?;
        // Protocol 0: this socket sends, and receives nothing.
        let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)
            .map_err(|errno| failed(errno.into()))?;
        Ok(Self {
            interface: host_interface.into(),
            socket,
            link: link_address(host_interface).map_err(failed)?,
            host_mac,
            container_mac,
            mtu: usize::try_from(mtu).unwrap_or(usize::MAX),
        })
    }

    /// Delivers a captured packet, as so many [segments](crate::segments) as it takes. What cannot be carried is left out:
    /// its sender repeats it, or can do without it.
    pub fn deliver(&self, packet: &[u8]) -> Result<()> {
        let is_v6 = packet.first().is_some_and(|first| first >> 4 == 6);
        let header = ethernet(self.container_mac.0, self.host_mac, if is_v6 { ETHERTYPE_IPV6 } else { ETHERTYPE_IPV4 });
        for segment in segments(packet, self.mtu) {
            self.send(&[&header[..], &segment].concat())
                .map_err(|errno| Error::Replay { interface: self.interface.clone(), source: errno.into() })?;
        }
        Ok(())
    }

    fn send(&self, frame: &[u8]) -> nix::Result<()> {
        loop {
            match sendto(self.socket.as_raw_fd(), frame, &self.link, MsgFlags::empty()) {
                Err(Errno::EINTR) => {}
                sent => return sent.map(drop),
            }
        }
    }
}
