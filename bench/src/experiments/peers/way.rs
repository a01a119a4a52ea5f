//! The way from one node to the other that all peers take: what they find made, how images are copied, and when the link changes over.
//!
//! Images go through memory on both nodes. The network namespace and the address on the target are made before the freeze, and the container has
//! the same link address there, so that nobody has to ask for it anew: peers are given every advantage that a careful administrator could.

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
use podferry_local::{GATEWAY, NODE_BRIDGE, Node, Running};
use podferry_report::results::Phase;

use super::{super::measure::Moved, copy::READY};
use crate::{
    error::{Error, Result},
    load::milliseconds,
};

/// Where the receiver of the copy listens.
const PORT: u16 = 7100;
/// How long each step may take.
pub(super) const DEADLINE: Duration = Duration::from_secs(180);
/// The folder of the images, below the node's tmpfs for images.
const IMAGES: &str = "peer";
/// The host's end of the container's link on the target.
const LINK: &str = "v-peer";

/// What a peer does itself.
pub(super) trait Tool {
    /// Writes the container's images into [`Way::images`] of the source, and ends it there.
    fn checkpoint(&mut self, way: &Way) -> Result<()>;
    /// Brings it to life on the target from what was copied.
    fn restore(&mut self, way: &Way) -> Result<()>;
}

/// A container on its way.
#[derive(Debug)]
pub(super) struct Way<'a> {
    pub(super) source: &'a Node,
    pub(super) target: &'a Node,
    pub(super) name: &'a str,
    began: Instant,
}

impl<'a> Way<'a> {
    pub(super) fn new(source: &'a Node, target: &'a Node, name: &'a str) -> Self {
        Self { source, target, name, began: Instant::now() }
    }

    /// Goes all of it.
    pub(super) fn go(&self, tool: &mut impl Tool) -> Result<Moved> {
        self.make()?;
        let receiver = self.receiver()?;
        let prepared = self.began.elapsed();
        let at_first = children_cpu_s();
        let dump = self.timed("dump", || {
            tool.checkpoint(self)?;
            // From here on nobody answers on the source: not even its kernel, with a reset.
            self.source.check(["ip", "-n", self.name, "link", "set", "eth0", "down"]).map_err(Error::from).map(drop)
        })?;
        let mut sent = 0.0;
        let copy = self.timed("copy", || {
            self.send()?;
            sent = children_cpu_s();
            received(receiver)
        })?;
        let raw_bytes = size_of(&self.target.on_machine(&images(self.target)))?;
        let restore = self.timed("restore", || {
            self.target.mount_rootfs(&self.target.bundle(self.name))?;
            tool.restore(self)
        })?;
        let started_cpu_s = [sent - at_first, children_cpu_s() - sent];
        let own_downtime_ms = restore.start_ms + restore.duration_ms - dump.start_ms;
        let prepare = Phase { name: "prepare".to_owned(), start_ms: 0.0, duration_ms: milliseconds(prepared) };
        Ok(Moved {
            phases: vec![prepare, dump, copy, restore],
            raw_bytes: Some(raw_bytes),
            own_downtime_ms: Some(own_downtime_ms),
            started_cpu_s,
            ..Moved::default()
        })
    }

    fn timed(&self, name: &str, step: impl FnOnce() -> Result<()>) -> Result<Phase> {
        let start_ms = milliseconds(self.began.elapsed());
        step()?;
        let duration_ms = milliseconds(self.began.elapsed()) - start_ms;
        Ok(Phase { name: name.to_owned(), start_ms, duration_ms })
    }

    fn upper(&self, node: &Node) -> PathBuf {
        node.bundle(self.name).join("upper")
    }

    /// Folders, and on the target the network namespace with the container's own addresses, on no bridge yet. Its kernel is kept from answering
    /// with a reset what comes for connections that are not restored yet.
    fn make(&self) -> Result<()> {
        for node in [self.source, self.target] {
            node.check(["mkdir", "-p", &path(&images(node))])?;
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
             ip -n {name} route add default via {GATEWAY}
             ip netns exec {name} iptables -w -A OUTPUT -p tcp --tcp-flags RST RST -j DROP"
        ))?;
        Ok(())
    }

    fn receiver(&self) -> Result<Running> {
        let mut command = self.target.command(this_program());
        command.args(["peer-receive", "--listen", &self.address().to_string()]);
        command.arg(images(self.target)).arg(self.upper(self.target));
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

    fn send(&self) -> Result<()> {
        let mut command = self.source.command(this_program());
        command.args(["peer-send", "--to", &self.address().to_string()]);
        command.arg(images(self.source)).arg(self.upper(self.source));
        podferry_local::command::run_within(&mut command, DEADLINE)?.success().map_err(Error::from).map(drop)
    }

    /// Joins the container's link on the target, and runs what makes processes there that live on. `first` is a script that is run before, by the
    /// shell that becomes it. Its streams are no pipes: they would never end.
    pub(super) fn run_on_target(&self, first: &str, program: &str, words: &[String]) -> Result<()> {
        let name = self.name;
        // Something has to be sent, so that bridges learn where the container is.
        let script = format!(
            "{first}
             ip link set {LINK} master {NODE_BRIDGE} up
             ip netns exec {name} bash -c 'echo > /dev/udp/{GATEWAY}/9'
             exec \"$@\""
        );
        let log_path = self.target.container_logs().join(format!("{name}-restore.log"));
        let log = fs::File::create(&log_path);
        let log = log.map_err(|source| Error::File { action: "create", path: log_path.clone(), source })?;
        let mut command = self.target.command("bash");
        command.args(["-ec", &script, "restore", program]).args(words);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let mut running = self.target.spawn_command(command)?;
        match running.wait(DEADLINE) {
            Some(status) if status.success() => Ok(()),
            status => {
                let said = fs::read_to_string(&log_path).unwrap_or_default();
                Err(Error::Misplaced(format!("the restore ended with {status:?}: {}", said.trim())))
            }
        }
    }
}

fn received(mut receiver: Running) -> Result<()> {
    match receiver.wait(DEADLINE) {
        Some(status) if status.success() => Ok(()),
        status => Err(Error::Misplaced(format!("the receiver of the copy ended with {status:?}"))),
    }
}

/// Gives the memory of images back.
pub(super) fn remove_images(node: &Node) -> Result<()> {
    node.check(["rm", "-rf", &path(&images(node))])?;
    Ok(())
}

/// Where a peer's images are on a node.
pub(super) fn images(node: &Node) -> PathBuf {
    node.images().join(IMAGES)
}

pub(super) fn path(path: &Path) -> String {
    path.display().to_string()
}

/// In tests this process is not the program, which then lies beside it.
pub(in crate::experiments) fn this_program() -> PathBuf {
    podferry_local::default_binaries().join("podferry-bench")
}

/// CPU time of all programs that this process has started and waited for, and of those that they have waited for.
fn children_cpu_s() -> f64 {
    let seconds = |time: nix::sys::time::TimeVal| {
        Duration::from_micros(u64::try_from(time.num_microseconds()).unwrap_or(0)).as_secs_f64()
    };
    getrusage(UsageWho::RUSAGE_CHILDREN).map_or(0.0, |usage| seconds(usage.user_time()) + seconds(usage.system_time()))
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
