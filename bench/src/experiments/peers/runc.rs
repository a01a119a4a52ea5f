//! `runc checkpoint`, a copy, `runc restore`: what whoever has runc and no podferry does, with connections kept.
//!
//! Images go through memory on both nodes. The network namespace, the root filesystem and the address on the target are made before the freeze,
//! and the container has the same link address there, so that nobody has to ask for it anew: the peer is given every advantage that a careful
//! administrator could.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use nix::sys::{
    resource::{UsageWho, getrusage},
    time::TimeValLike as _,
};
use podferry_local::{GATEWAY, Node, RUNC_ROOT, Running};
use podferry_report::results::Phase;

use super::{super::measure::Moved, copy::READY};
use crate::{
    error::{Error, Result},
    load::milliseconds,
};

/// Where the receiver of the copy listens.
const PORT: u16 = 7100;
/// How long each step may take.
const DEADLINE: Duration = Duration::from_secs(180);
/// The folder of the images, below the node's tmpfs for images.
const IMAGES: &str = "peer";

/// Moves a container from one node to the other.
pub(super) fn move_it(source: &Node, target: &Node, name: &str) -> Result<Moved> {
    let peer = Peer { source, target, name, began: Instant::now() };
    peer.make_way()?;
    let receiver = peer.receiver()?;
    let prepared = peer.began.elapsed();
    let mut started_cpu_s = [0.0, 0.0];
    let before = children_cpu_s();
    let dump = peer.timed("dump", |peer| peer.checkpoint())?;
    let mut sent = 0.0;
    let copy = peer.timed("copy", |peer| {
        peer.send()?;
        sent = children_cpu_s();
        peer.received(receiver)
    })?;
    started_cpu_s[0] = sent - before;
    let raw_bytes = size_of(&target.on_machine(&target.images().join(IMAGES)))?;
    let restore = peer.timed("restore", |peer| peer.restore())?;
    started_cpu_s[1] = children_cpu_s() - sent;
    let own_downtime_ms = restore.start_ms + restore.duration_ms - dump.start_ms;
    peer.clean_up()?;
    let prepare = Phase { name: "prepare".to_owned(), start_ms: 0.0, duration_ms: milliseconds(prepared) };
    Ok(Moved {
        phases: vec![prepare, dump, copy, restore],
        raw_bytes: Some(raw_bytes),
        own_downtime_ms: Some(own_downtime_ms),
        started_cpu_s,
        ..Moved::default()
    })
}

struct Peer<'a> {
    source: &'a Node,
    target: &'a Node,
    name: &'a str,
    began: Instant,
}

impl Peer<'_> {
    fn timed(&self, name: &str, step: impl FnOnce(&Self) -> Result<()>) -> Result<Phase> {
        let start_ms = milliseconds(self.began.elapsed());
        step(self)?;
        let duration_ms = milliseconds(self.began.elapsed()) - start_ms;
        Ok(Phase { name: name.to_owned(), start_ms, duration_ms })
    }

    fn images(node: &Node) -> PathBuf {
        node.images().join(IMAGES)
    }

    fn upper(&self, node: &Node) -> PathBuf {
        node.bundle(self.name).join("upper")
    }

    /// Folders, and on the target the network namespace with the container's own addresses, on no bridge yet.
    fn make_way(&self) -> Result<()> {
        for node in [self.source, self.target] {
            node.check(["mkdir", "-p", &path(&Self::images(node))])?;
        }
        let name = self.name;
        let words = self.source.shell(&format!(
            "ip -n {name} -o -4 address show dev eth0 | awk '{{print $4}}'; ip netns exec {name} cat /sys/class/net/eth0/address"
        ))?;
        let mut words = words.split_whitespace();
        let (Some(address), Some(link_address)) = (words.next(), words.next()) else {
            return Err(Error::Misplaced(format!("{name} has no address on {}", self.source.name())));
        };
        self.target.shell(&format!(
            "ip netns add {name}
             ip link add {LINK} type veth peer name eth0 netns {name}
             ip -n {name} link set eth0 address {link_address}
             ip -n {name} link set lo up
             ip -n {name} address add {address} dev eth0
             ip -n {name} link set eth0 up
             ip -n {name} route add default via {GATEWAY}"
        ))?;
        Ok(())
    }

    fn receiver(&self) -> Result<Running> {
        let mut command = self.target.command(this_program());
        command.args(["peer-receive", "--listen", &self.address().to_string()]);
        command.arg(Self::images(self.target)).arg(self.upper(self.target));
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut running = self.target.spawn_command(command)?;
        let mut line = String::new();
        if let Some(output) = running.child().stdout.take() {
            // Silence is an end without that line, too.
            let _ = BufReader::new(output).read_line(&mut line);
        }
        if line.trim() == READY { Ok(running) } else { Err(Error::Misplaced(format!("the receiver said {line:?}"))) }
    }

    fn address(&self) -> SocketAddr {
        SocketAddr::from((self.target.address(), PORT))
    }

    fn checkpoint(&self) -> Result<()> {
        let images = path(&Self::images(self.source));
        let words = ["checkpoint", "--image-path", &images, "--work-path", "/tmp", "--tcp-established", self.name];
        self.source.runc(&words)?.success()?;
        // From here on nobody answers on the source: not even its kernel, with a reset.
        self.source.check(["ip", "-n", self.name, "link", "set", "eth0", "down"])?;
        Ok(())
    }

    fn send(&self) -> Result<()> {
        let mut command = self.source.command(this_program());
        command.args(["peer-send", "--to", &self.address().to_string()]);
        command.arg(Self::images(self.source)).arg(self.upper(self.source));
        podferry_local::command::run_within(&mut command, DEADLINE)?.success().map_err(Error::from).map(drop)
    }

    fn received(&self, mut receiver: Running) -> Result<()> {
        match receiver.wait(DEADLINE) {
            Some(status) if status.success() => Ok(()),
            status => Err(Error::Misplaced(format!("the receiver of the copy ended with {status:?}"))),
        }
    }

    fn restore(&self) -> Result<()> {
        let name = self.name;
        self.target.mount_rootfs(&self.target.bundle(name))?;
        self.target.shell(&format!(
            "ip link set {LINK} master {} up
             ip netns exec {name} bash -c 'echo > /dev/udp/{GATEWAY}/9'",
            podferry_local::NODE_BRIDGE
        ))?;
        let (images, bundle) = (path(&Self::images(self.target)), path(&self.target.bundle(name)));
        let mut command = self.target.command("runc");
        command.args(["--root", RUNC_ROOT, "restore", "--detach", "--tcp-established", "--work-path", "/tmp"]);
        command.args(["--image-path", &images, "--bundle", &bundle, name]);
        // What it restores keeps these: pipes would never end.
        let log_path = self.target.container_logs().join(format!("{name}-restore.log"));
        let log = fs::File::create(&log_path);
        let log = log.map_err(|source| Error::File { action: "create", path: log_path.clone(), source })?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let mut running = self.target.spawn_command(command)?;
        match running.wait(DEADLINE) {
            Some(status) if status.success() => Ok(()),
            status => {
                let said = fs::read_to_string(&log_path).unwrap_or_default();
                Err(Error::Misplaced(format!("`runc restore` ended with {status:?}: {}", said.trim())))
            }
        }
    }

    fn clean_up(&self) -> Result<()> {
        for node in [self.source, self.target] {
            node.check(["rm", "-rf", &path(&Self::images(node))])?;
        }
        Ok(())
    }
}

/// The host's end of the container's link on the target.
const LINK: &str = "v-peer";

fn path(path: &Path) -> String {
    path.display().to_string()
}

fn this_program() -> PathBuf {
    podferry_local::default_binaries().join("podferry-bench")
}

/// CPU time of all programs that this process has started and waited for, and of those that they have waited for.
fn children_cpu_s() -> f64 {
    getrusage(UsageWho::RUSAGE_CHILDREN).map_or(0.0, |usage| {
        [usage.user_time(), usage.system_time()].iter().map(|time| time.num_microseconds()).sum::<i64>() as f64 / 1e6
    })
}

/// Bytes of all files in a folder.
fn size_of(folder: &Path) -> Result<u64> {
    let fail = |source| Error::File { action: "list", path: folder.to_owned(), source };
    let mut bytes = 0;
    for entry in fs::read_dir(folder).map_err(fail)? {
        let metadata = entry.and_then(|entry| entry.metadata()).map_err(fail)?;
        bytes += metadata.len();
    }
    Ok(bytes)
}
