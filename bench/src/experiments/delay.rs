//! A link that is far: what the nodes' agents send each other arrives later.
//!
//! The kernel's own means (netem, or departure times with fq) are not in every kernel. So the far node gets another uplink, a pair of TAP devices with a
//! process between them, which keeps each frame between the two nodes' own addresses for half the round-trip time, and passes all others on at
//! once: containers and their clients are as near as ever. Frames of either kind keep their order.

use std::{
    io::{self, BufRead as _, BufReader, Write as _},
    net::Ipv4Addr,
    process::Stdio,
    sync::{
        Arc,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

use podferry_local::{FABRIC_BRIDGE, LocalCluster, NODE_BRIDGE, Node, Place, Running};
use tun_rs::{DeviceBuilder, Layer, SyncDevice};

use super::peers::{READY, this_program};
use crate::{
    error::{Error, Result},
    stage::NODES,
};

/// The two ends: a port of the fabric's bridge, and the far node's uplink.
pub(super) const FABRIC_END: &str = "far-fabric";
const NODE_END: &str = "far-node";
/// Frames that are under way at most, each way: more than a gigabit per second has in 100 ms.
const UNDER_WAY: usize = 16_384;
/// The largest frame: the link's MTU of 1500 and the Ethernet header, with room for a tag.
const FRAME_MAX: usize = 2048;
/// How long a frame waits in a device for being read, in frames.
const QUEUE: u32 = 5000;

/// Carries frames between two TAP devices of this network namespace, which it makes, until it is killed. `near` is the address of the node that is not
/// behind them.
pub fn carry(names: [&str; 2], near: Ipv4Addr, delay: Duration) -> io::Result<()> {
    let [fabric, node] = [tap(names[0])?, tap(names[1])?];
    println!("{READY}");
    io::stdout().flush()?;
    let there = one_way(&fabric, &node, delay, move |frame| sender(frame) == Some(near));
    let back = one_way(&node, &fabric, delay, move |frame| receiver(frame) == Some(near));
    for way in there.into_iter().chain(back) {
        way.join().map_err(|_| io::Error::other("a thread that carries frames has panicked"))??;
    }
    Ok(())
}

fn tap(name: &str) -> io::Result<Arc<SyncDevice>> {
    DeviceBuilder::new().name(name).layer(Layer::L2).build_sync().map(Arc::new)
}

type Way = thread::JoinHandle<io::Result<()>>;

/// What comes out of `from` goes into `to`: at once, or behind the delay.
fn one_way(
    from: &Arc<SyncDevice>,
    to: &Arc<SyncDevice>,
    delay: Duration,
    is_delayed: impl Fn(&[u8]) -> bool + Send + 'static,
) -> [Way; 2] {
    let (sender, frames) = sync_channel(UNDER_WAY);
    let (from, at_once, later) = (Arc::clone(from), Arc::clone(to), Arc::clone(to));
    [
        thread::spawn(move || read(&from, &at_once, &sender, delay, is_delayed)),
        thread::spawn(move || {
            write(&frames, &later);
            Ok(())
        }),
    ]
}

type Due = (Instant, Vec<u8>);

fn read(
    from: &SyncDevice,
    to: &SyncDevice,
    later: &SyncSender<Due>,
    delay: Duration,
    is_delayed: impl Fn(&[u8]) -> bool,
) -> io::Result<()> {
    let mut buffer = [0; FRAME_MAX];
    loop {
        let length = match from.recv(&mut buffer) {
            // It is not up yet.
            Err(error) if error.raw_os_error() == Some(nix::libc::EIO) => {
                thread::sleep(Duration::from_millis(1));
                continue;
            }
            received => received?,
        };
        let frame = &buffer[..length];
        if !is_delayed(frame) {
            pass(to, frame);
        } else if later.send((Instant::now() + delay, frame.to_vec())).is_err() {
            return Ok(());
        }
    }
}

fn write(frames: &Receiver<Due>, to: &SyncDevice) {
    for (due, frame) in frames {
        thread::sleep(due.saturating_duration_since(Instant::now()));
        pass(to, &frame);
    }
}

/// What a device does not take is lost, as on any link.
fn pass(to: &SyncDevice, frame: &[u8]) {
    let _ = to.send(frame);
}

/// Where the addresses are in an Ethernet frame with IPv4 in it (RFC 894, RFC 791).
const TYPE_AT: usize = 12;
const IPV4: [u8; 2] = [0x08, 0x00];
const SENDER_AT: usize = 26;
const RECEIVER_AT: usize = 30;

fn sender(frame: &[u8]) -> Option<Ipv4Addr> {
    address(frame, SENDER_AT)
}

fn receiver(frame: &[u8]) -> Option<Ipv4Addr> {
    address(frame, RECEIVER_AT)
}

fn address(frame: &[u8], at: usize) -> Option<Ipv4Addr> {
    let kind = frame.get(TYPE_AT..TYPE_AT + 2)?;
    let octets: [u8; 4] = frame.get(at..at + 4)?.try_into().ok()?;
    (kind == IPV4).then(|| octets.into())
}

/// The second node is far while this exists.
#[derive(Debug)]
pub(super) struct FarLink {
    fabric: Place,
    carrier: Running,
}

impl FarLink {
    /// Moves it so far away that a round trip takes `rtt`.
    pub(super) fn new(cluster: &LocalCluster, rtt: Duration) -> Result<Self> {
        let (near, far) = (cluster.node(NODES[0])?, cluster.node(NODES[1])?);
        let fabric = cluster.fabric().clone();
        let link = Self { carrier: carrier(&fabric, &near, rtt)?, fabric };
        let (netns, port) = (far.netns(), NODES[1]);
        link.fabric.shell(&format!(
            "ip link set {NODE_END} netns {netns} txqueuelen {QUEUE}
             ip link set {port} down
             ip link set {FABRIC_END} master {FABRIC_BRIDGE} txqueuelen {QUEUE} up"
        ))?;
        far.shell(&format!("ip link set {NODE_END} master {NODE_BRIDGE} up"))?;
        Ok(link)
    }
}

fn carrier(fabric: &Place, near: &Node, rtt: Duration) -> Result<Running> {
    let mut command = fabric.command(this_program());
    let micros = (rtt / 2).as_micros().to_string();
    command.args(["link-delay", FABRIC_END, NODE_END, "--near", &near.address().to_string(), "--delay-us", &micros]);
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut carrier = fabric.spawn_command(command)?;
    let mut line = String::new();
    if let Some(output) = carrier.child().stdout.take() {
        // Silence is an end without that line, too.
        let _ = BufReader::new(output).read_line(&mut line);
    }
    if line.trim() == READY { Ok(carrier) } else { Err(Error::Misplaced("the far link could not be made".to_owned())) }
}

impl Drop for FarLink {
    fn drop(&mut self) {
        self.carrier.signal(podferry_local::Signal::KILL);
        // Its devices go with it. What cannot be undone goes with the cluster.
        self.carrier.wait(Duration::from_secs(5));
        let _ = self.fabric.shell(&format!("ip link set {} up", NODES[1]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_found_in_ipv4_only() {
        let mut frame = vec![0; 60];
        frame[12..14].copy_from_slice(&IPV4);
        frame[26..30].copy_from_slice(&[10, 88, 0, 11]);
        frame[30..34].copy_from_slice(&[10, 88, 0, 12]);
        assert_eq!(sender(&frame), Some(Ipv4Addr::new(10, 88, 0, 11)));
        assert_eq!(receiver(&frame), Some(Ipv4Addr::new(10, 88, 0, 12)));
        frame[12] = 0x86;
        assert_eq!(sender(&frame), None);
        assert_eq!(receiver(&frame[..20]), None);
    }
}
