//! Network namespaces of the cluster and the wires between them.
//!
//! Nothing is ever made in the machine's own network namespace: a veth pair is born inside the fabric with its other
//! end already in the namespace it is meant for.

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statx};

use crate::command::ip;
use crate::error::{FileContext, Result};

/// Where iproute2 keeps named network namespaces.
pub(crate) const NETNS_FOLDER: &str = "/run/netns";
/// The bridge inside the fabric's namespace.
pub const FABRIC_BRIDGE: &str = "br0";
/// The bridge inside a node's namespace; the node's uplink and its containers' links are its ports.
pub const NODE_BRIDGE: &str = "pf0";
/// Prefix length of the one flat network.
pub const PREFIX_LENGTH: u8 = 24;
/// The fabric's own address, the default gateway of containers.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 1);
/// The coordinator's address.
pub const COORDINATOR_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 2);
/// The client side's address.
pub const CLIENT_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 3);
/// The first node's address; the next nodes count up from it.
pub const FIRST_NODE_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 11);
/// The first address for containers.
pub const FIRST_CONTAINER_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 88, 0, 100);

/// The address of the node with this index.
pub(crate) fn node_address(index: u8) -> Ipv4Addr {
    let [a, b, c, d] = FIRST_NODE_ADDRESS.octets();
    Ipv4Addr::new(a, b, c, d + index)
}

/// The file of a named network namespace.
pub(crate) fn netns_file(name: &str) -> PathBuf {
    Path::new(NETNS_FOLDER).join(name)
}

/// The machine's named network namespaces that start so.
pub(crate) fn named(prefix: &str) -> Vec<String> {
    let entries = fs::read_dir(NETNS_FOLDER).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.retain(|name| name.starts_with(prefix));
    names.sort();
    names
}

/// Makes a named namespace with its loopback up.
pub(crate) fn add_namespace(name: &str) -> Result<()> {
    ip(&format!("netns add {name}"))?;
    ip(&format!("-n {name} link set lo up")).map(drop)
}

/// Removes a named namespace; its links go with it once the last process has left. Absent ones are fine.
pub(crate) fn remove_namespace(name: &str) -> Result<()> {
    let file = netns_file(name);
    if !file.exists() {
        return Ok(());
    }
    // Killed between making the file and mounting the namespace on it, `ip netns del` would refuse.
    while umount2(&file, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW).is_ok() {}
    fs::remove_file(&file).at("remove the network namespace", &file)
}

/// The fabric: one bridge that every other namespace has a port of.
pub(crate) fn make_fabric(fabric: &str) -> Result<()> {
    {
        let _one_at_a_time = lock_run()?;
        note_folder()?;
        add_namespace(fabric)?;
    }
    // A fixed address: else the bridge takes over the lowest one of its ports and changes it as they come and go.
    ip(&format!("-n {fabric} link add {FABRIC_BRIDGE} address 02:88:00:00:00:01 type bridge forward_delay 0"))?;
    ip(&format!("-n {fabric} address add {GATEWAY}/{PREFIX_LENGTH} dev {FABRIC_BRIDGE}"))?;
    ip(&format!("-n {fabric} link set {FABRIC_BRIDGE} up")).map(drop)
}

/// A namespace with `eth0` on the fabric. `port` names the fabric's end.
pub(crate) fn attach(fabric: &str, name: &str, port: &str) -> Result<()> {
    add_namespace(name)?;
    ip(&format!("-n {fabric} link add {port} type veth peer name eth0 netns {name}"))?;
    ip(&format!("-n {fabric} link set {port} master {FABRIC_BRIDGE} up"))?;
    ip(&format!("-n {name} link set eth0 up")).map(drop)
}

/// Gives a plain namespace (coordinator, client) its address.
pub(crate) fn address_host(name: &str, address: Ipv4Addr) -> Result<()> {
    ip(&format!("-n {name} address add {address}/{PREFIX_LENGTH} dev eth0")).map(drop)
}

/// Gives a node its bridge, with the uplink as a port and the node's address on it.
pub(crate) fn address_node(name: &str, address: Ipv4Addr) -> Result<()> {
    let last = address.octets()[3];
    ip(&format!("-n {name} link add {NODE_BRIDGE} address 02:88:00:00:01:{last:02x} type bridge forward_delay 0"))?;
    ip(&format!("-n {name} link set eth0 master {NODE_BRIDGE}"))?;
    ip(&format!("-n {name} address add {address}/{PREFIX_LENGTH} dev {NODE_BRIDGE}"))?;
    ip(&format!("-n {name} link set {NODE_BRIDGE} up")).map(drop)
}

/// Notes that nothing was mounted on `/run/netns` before the first cluster came: `ip netns add` mounts the folder on
/// itself and never unmounts it. Holds whether the folder was there at all.
const NOTE: &str = "/run/podferry-local-netns";
const FOLDER_WAS_THERE: &str = "there";
const FOLDER_WAS_MADE: &str = "made";

/// Clusters that come and go at the same time must not take each other's traces for the machine's own.
fn lock_run() -> Result<File> {
    let run = Path::new("/run");
    let folder = File::open(run).at("open", run)?;
    folder.lock().at("lock", run)?;
    Ok(folder)
}

fn note_folder() -> Result<()> {
    if is_mounted() {
        return Ok(());
    }
    let was = if Path::new(NETNS_FOLDER).exists() { FOLDER_WAS_THERE } else { FOLDER_WAS_MADE };
    fs::write(NOTE, was).at("write", Path::new(NOTE))
}

/// Puts `/run/netns` back to how the first cluster found it, unless somebody uses it.
pub(crate) fn put_folder_back() -> Result<()> {
    let _one_at_a_time = lock_run()?;
    let empty = fs::read_dir(NETNS_FOLDER).is_ok_and(|mut entries| entries.next().is_none());
    let Ok(was) = fs::read_to_string(NOTE) else { return Ok(()) };
    if !empty {
        return Ok(());
    }
    if is_mounted() && !unmount_folder() {
        return Ok(());
    }
    if was == FOLDER_WAS_MADE {
        // Somebody may have begun to use it just now.
        let _ = fs::remove_dir(NETNS_FOLDER);
    }
    fs::remove_file(NOTE).at("remove", Path::new(NOTE))
}

/// Refused when something is mounted below it, which is what is wanted, but also while a process that looked into it
/// is just ending.
fn unmount_folder() -> bool {
    for _ in 0..50 {
        if umount2(NETNS_FOLDER, MntFlags::UMOUNT_NOFOLLOW) != Err(Errno::EBUSY) {
            break;
        }
        thread::sleep(Duration::from_millis(10));
    }
    !is_mounted()
}

/// Whether the folder is the root of a mount (statx(2), since Linux 5.8). The table of mounts also has hidden ones.
fn is_mounted() -> bool {
    statx(CWD, NETNS_FOLDER, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::empty())
        .is_ok_and(|status| status.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}
