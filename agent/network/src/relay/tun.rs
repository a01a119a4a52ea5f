//! The device by which packets leave a namespace to be relayed, and enter it.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::OnceCell;
use tun_rs::{DeviceBuilder, SyncDevice};

use super::{End, HEADER};
use crate::error::{Error, Result};
use crate::netlink::errno;
use crate::netns::Netns;

/// The largest IP packet, if it is no jumbogram, with the header that IPv6 does not count.
const PACKET_MAX: usize = (64 << 10) + 40;

/// How long another process may take to let go of the device.
const HANDING_OVER: Duration = Duration::from_millis(500);
const POLL: Duration = Duration::from_millis(5);
/// A device that is deleted is no more readable, and says so as an error.
const READABLE_OR_GONE: Interest = Interest::READABLE.add(Interest::ERROR);

/// The [device](End::device) of a namespace, opened. What is read and written are whole packets as the kernel holds them, each
/// with its `virtio_net_hdr` of 10 bytes in front: one may stand for many TCP segments, and its checksum may be left open. The
/// other end takes them as they are.
///
/// The device stays when this is dropped, and what is routed to it then is lost, without an answer to who sent it.
pub struct Tun {
    device: Arc<SyncDevice>,
    /// The same, once it is waited for: only then there surely is a runtime.
    waiting: OnceCell<AsyncFd<Arc<SyncDevice>>>,
    buffer: Mutex<Vec<u8>>,
    end: End,
}

impl Tun {
    /// Opens the device in a namespace: makes it, or attaches to the one that a former process left.
    pub fn open(netns: &Netns, end: End) -> Result<Self> {
        let device = netns.run(|| open(end))?.map_err(failed(end, "open"))?;
        Ok(Self {
            device: Arc::new(device),
            waiting: OnceCell::new(),
            buffer: Mutex::new(vec![0; HEADER + PACKET_MAX]),
            end,
        })
    }

    /// Waits for the next packet, or for the device to be deleted, which is an error. It can be called from any task of one
    /// runtime; a call that is given up takes no packet with it.
    pub async fn receive(&self) -> Result<Vec<u8>> {
        let waiting =
            self.waiting.get_or_try_init(|| async { self.registered() }).await.map_err(failed(self.end, "wait for"))?;
        loop {
            let mut ready = waiting.ready(READABLE_OR_GONE).await.map_err(failed(self.end, "wait for"))?;
            if let Ok(received) = ready.try_io(|device| self.read(device.get_ref()))
                && let Some(packet) = received.map_err(failed(self.end, "read"))?
            {
                return Ok(packet);
            }
        }
    }

    /// The next packet of those that are there already; none when all were given.
    pub fn try_receive(&self) -> Result<Option<Vec<u8>>> {
        loop {
            match self.read(&self.device) {
                Ok(None) => {}
                Ok(packet) => return Ok(packet),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(failed(self.end, "read")(error)),
            }
        }
    }

    /// Hands a packet to the namespace. [`Error::RelayedPacket`] is about this packet alone; what is malformed is not taken.
    pub fn send(&self, packet: &[u8]) -> Result<()> {
        self.device.send(packet).map(drop).map_err(|source| match errno(&source) {
            Errno::EINVAL | Errno::EMSGSIZE | Errno::EFAULT | Errno::ENOMEM | Errno::ENOBUFS | Errno::EAGAIN => {
                Error::RelayedPacket { source }
            }
            _ => failed(self.end, "write to")(source),
        })
    }

    #[expect(deprecated, reason = "its successor is unsafe; the descriptor of the device stays the same")]
    fn registered(&self) -> io::Result<AsyncFd<Arc<SyncDevice>>> {
        AsyncFd::with_interest(Arc::clone(&self.device), READABLE_OR_GONE)
    }

    /// Reads one packet; none when it is not to be given.
    fn read(&self, device: &SyncDevice) -> io::Result<Option<Vec<u8>>> {
        let mut buffer = self.buffer.lock().unwrap_or_else(PoisonError::into_inner);
        let length = device.recv(&mut buffer)?;
        let packet = &buffer[..length];
        Ok((!is_for_many(packet)).then(|| packet.to_vec()))
    }
}

impl fmt::Debug for Tun {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Tun").field("device", &self.end.device()).finish_non_exhaustive()
    }
}

/// Runs in the namespace. A process that is just ending, or a child that is just starting, may have the device a moment longer.
fn open(end: End) -> io::Result<SyncDevice> {
    let deadline = Instant::now() + HANDING_OVER;
    loop {
        match open_now(end) {
            Err(error) if errno(&error) == Errno::EBUSY && Instant::now() < deadline => thread::sleep(POLL),
            opened => return opened,
        }
    }
}

/// The device is not brought up here: what it is set to before matters.
fn open_now(end: End) -> io::Result<SyncDevice> {
    let device = DeviceBuilder::new().name(end.device()).offload(true).inherit_enable_state().build_sync()?;
    device.persist()?;
    device.set_nonblocking(true)?;
    Ok(device)
}

fn failed(end: End, doing: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Relay { doing, device: end.device(), source }
}

/// Whether a packet is for a group: the kernel tells every new link which groups it is in, and nobody at the other end asked.
fn is_for_many(packet: &[u8]) -> bool {
    let Some(ip) = packet.get(HEADER..) else { return true };
    match ip.first().map(|first| first >> 4) {
        Some(4) => ip.get(16).is_none_or(|first| first >> 4 == 0xe),
        Some(6) => ip.get(24).is_none_or(|first| *first == 0xff),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_packets_for_one_host_are_relayed() {
        let packet = |ip: &[u8], destination: usize, first: u8| {
            let mut packet = [&[0; HEADER], ip, &[0; 40]].concat();
            packet[HEADER + destination] = first;
            packet
        };
        assert!(!is_for_many(&packet(&[0x45], 16, 10)) && is_for_many(&packet(&[0x45], 16, 224)));
        assert!(!is_for_many(&packet(&[0x60], 24, 0xfd)) && is_for_many(&packet(&[0x60], 24, 0xff)));
        assert!(is_for_many(&packet(&[0x00], 0, 0)) && is_for_many(&[]) && is_for_many(&[0; HEADER]));
    }
}
