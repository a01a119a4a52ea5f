//! Mounts: which belong to the container, and which CRIU cannot make again.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use procfs::process::{MountInfo, Process};

use crate::container::Container;
use crate::error::Error;
use crate::externals::Externals;

use super::{Finding, FindingKind};

/// Filesystems that CRIU mounts anew on the target (`criu/filesystems.c`).
const SUPPORTED: [&str; 20] = [
    "proc",
    "sysfs",
    "devtmpfs",
    "binfmt_misc",
    "tmpfs",
    "devpts",
    "simfs",
    "btrfs",
    "pstore",
    "mqueue",
    "securityfs",
    "fusectl",
    "debugfs",
    "tracefs",
    "cgroup",
    "cgroup2",
    "aufs",
    "fuse",
    "overlay",
    "autofs",
];

/// The mounts that processes see: the container's, and those made inside it.
pub(super) struct Known {
    /// Ids by mount namespace.
    ids: RefCell<BTreeMap<PathBuf, BTreeSet<i32>>>,
    /// Devices of overlays whose files have no handles, by major and minor number.
    without_handles: RefCell<BTreeSet<String>>,
    init: PathBuf,
    /// The root that the container's init sees.
    root: PathBuf,
}

impl Known {
    /// Starts with those of the container's init.
    pub(super) fn new(init: i32) -> Result<Self, Error> {
        let (ids, without_handles) = (RefCell::default(), RefCell::default());
        let root = PathBuf::from(format!("/proc/{init}/root"));
        let known = Self { ids, without_handles, init: namespace(init)?, root };
        known.read(init)?;
        Ok(known)
    }

    /// Whether a mount is one of the process's or of the container's.
    pub(super) fn contains(&self, pid: i32, id: i32) -> Result<bool, Error> {
        let own = self.read(pid)?;
        let ids = self.ids.borrow();
        Ok([&own, &self.init].into_iter().filter_map(|namespace| ids.get(namespace)).any(|ids| ids.contains(&id)))
    }

    /// Whether a device is an overlay whose files cannot be opened by their handles.
    pub(super) fn is_without_handles(&self, major: u32, minor: u32) -> bool {
        self.without_handles.borrow().contains(&format!("{major}:{minor}"))
    }

    /// The root that the container's init sees.
    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    fn read(&self, pid: i32) -> Result<PathBuf, Error> {
        let namespace = namespace(pid)?;
        if !self.ids.borrow().contains_key(&namespace) {
            let mounts = mounts_of(pid)?;
            let overlays = mounts.iter().filter(|mount| mount.fs_type == "overlay" && !has_handles(mount));
            self.without_handles.borrow_mut().extend(overlays.map(|mount| mount.majmin.clone()));
            self.ids.borrow_mut().insert(namespace.clone(), mounts.iter().map(|mount| mount.mnt_id).collect());
        }
        Ok(namespace)
    }
}

/// An overlay's files can be opened by handles with the option `nfs_export`, which is shown where it differs from the
/// module's own setting.
fn has_handles(overlay: &MountInfo) -> bool {
    match overlay.super_options.get("nfs_export") {
        Some(value) => value.as_deref() != Some("off"),
        None => fs::read_to_string("/sys/module/overlay/parameters/nfs_export").is_ok_and(|set| set.starts_with('Y')),
    }
}

fn namespace(pid: i32) -> Result<PathBuf, Error> {
    let path = format!("/proc/{pid}/ns/mnt");
    fs::read_link(&path).map_err(Error::io("read the link", path))
}

fn mounts_of(pid: i32) -> Result<Vec<MountInfo>, Error> {
    let mounts = Process::new(pid).and_then(|process| process.mountinfo()).map_err(Error::proc(pid, "mountinfo"))?;
    Ok(mounts.into_iter().collect())
}

/// Looks for mounts that are neither the root filesystem, nor brought by the target's configuration, nor made by CRIU.
pub(super) fn look(container: &Container, init: i32, findings: &mut Vec<Finding>) -> Result<(), Error> {
    let external: BTreeSet<PathBuf> =
        Externals::of(container)?.mounts.into_iter().map(|(point, _)| PathBuf::from(point)).collect();
    let mounts = mounts_of(init)?;
    let Some(root) = mounts.iter().find(|mount| mount.mount_point == Path::new("/")) else { return Ok(()) };
    for mount in &mounts {
        // Another place of the same filesystem, for instance a read-only bind of `/proc/sys`.
        let made_with =
            mounts.iter().any(|other| other.root == "/" && other.majmin == mount.majmin && is_supported(other));
        let accounted = mount.mount_point == Path::new("/")
            || mount.majmin == root.majmin && Path::new(&mount.root).starts_with(&root.root)
            || external.contains(&mount.mount_point)
            || is_supported(mount) && mount.root == "/"
            || made_with;
        if !accounted {
            findings.push(Finding::blocking(
                FindingKind::Filesystem,
                format!(
                    "{} is a mount of {} ({}), which CRIU cannot make again",
                    mount.mount_point.display(),
                    mount.fs_type,
                    mount.root
                ),
                "mount it through the container's configuration rather than from inside the container",
            ));
        }
    }
    Ok(())
}

fn is_supported(mount: &MountInfo) -> bool {
    SUPPORTED.contains(&mount.fs_type.as_str())
}
