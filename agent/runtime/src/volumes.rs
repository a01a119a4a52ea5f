//! Bind mounts of a container: what each shows it of its node, on which storage that lies, and who else uses it.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use oci_spec::runtime::Spec;
use procfs::process::{MountInfo, Process};
use rustix::fs::{AtFlags, CWD, StatxFlags, statx};

use crate::error::Error;

/// File systems that several nodes see at once, in the words of `/proc/PID/mountinfo`: networks', clusters', and those of a virtual
/// machine's host. What FUSE serves (`fuse.…`) is nearly always one of them, and taken for one.
const SHARED: [&str; 18] = [
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "ceph",
    "lustre",
    "gfs2",
    "ocfs2",
    "gpfs",
    "beegfs",
    "afs",
    "9p",
    "virtiofs",
    "pvfs2",
    "glusterfs",
    "orangefs",
    "coda",
    "vboxsf",
];

/// A bind mount that a container's configuration asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BindMount {
    /// Where, in the container: absolute, without a slash at its end.
    pub destination: PathBuf,
    /// What, on the node: absolute.
    pub source: PathBuf,
    /// Whether the container can only read it.
    pub read_only: bool,
}

/// The bind mounts of a bundle's configuration, in its order.
pub fn bind_mounts(config: &Spec, bundle: &Path) -> Vec<BindMount> {
    let mounts = config.mounts().as_deref().unwrap_or_default().iter();
    let bind = |mount: &oci_spec::runtime::Mount| {
        let options = mount.options().as_deref().unwrap_or_default();
        let is_bind = mount.typ().as_deref() == Some("bind") || has(options, "bind") || has(options, "rbind");
        let source = mount.source().as_ref().filter(|_| is_bind)?;
        // Its components alone: so two ways to write a path are one.
        let destination = Path::new("/").join(mount.destination()).components().collect();
        Some(BindMount { destination, source: bundle.join(source), read_only: has(options, "ro") })
    };
    mounts.filter_map(bind).collect()
}

fn has(options: &[String], wanted: &str) -> bool {
    options.iter().any(|option| option == wanted)
}

/// The storage that a directory lies on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Storage {
    /// The file system's type, as mountinfo says it.
    pub filesystem: String,
    /// What was mounted, and the way from there: `server:/export/a`. The same on every node that has mounted the same share in the
    /// same words.
    pub place: String,
    /// The device's numbers, `major:minor`.
    device: String,
    /// The way from the file system's root.
    path: PathBuf,
}

impl Storage {
    /// That of a directory, as this process sees it.
    ///
    /// # Errors
    /// When the directory is not there.
    pub fn of(dir: &Path) -> Result<Self, Error> {
        let real = fs::canonicalize(dir).map_err(Error::io("resolve", dir))?;
        // Which mount it is, the kernel knows by itself: a server that does not answer is not asked.
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::STATX_DONT_SYNC;
        let seen =
            statx(CWD, &real, flags, StatxFlags::MNT_ID).map_err(|errno| Error::io("look at", &real)(errno.into()))?;
        let mounts = mounts_of(std::process::id().cast_signed())?;
        let mount = mounts.into_iter().find(|mount| u64::try_from(mount.mnt_id) == Ok(seen.stx_mnt_id));
        let mount = mount.ok_or_else(|| Error::io("find the mount of", &real)(std::io::ErrorKind::NotFound.into()))?;
        let path = Path::new(&mount.root).join(real.strip_prefix(&mount.mount_point).unwrap_or(Path::new("")));
        let source = mount.mount_source.unwrap_or_default();
        let place = format!("{}{}", source.trim_end_matches('/'), path.display()).trim_end_matches('/').to_owned();
        Ok(Self { filesystem: mount.fs_type, place, device: mount.majmin, path })
    }

    /// Whether other nodes see the same.
    pub fn is_shared(&self) -> bool {
        SHARED.contains(&self.filesystem.as_str()) || self.filesystem.starts_with("fuse.")
    }

    /// A process that sees this storage, or a part of it, through a mount of its own: one of another container. `dir` is where this
    /// node has it, and `own` are processes whose mount namespaces do not count.
    ///
    /// # Errors
    /// When processes cannot be listed.
    pub fn other_user(&self, dir: &Path, own: &[i32]) -> Result<Option<i32>, Error> {
        let namespace = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
        let mut known: BTreeSet<PathBuf> = own.iter().filter_map(|pid| namespace(*pid)).collect();
        known.extend(namespace(std::process::id().cast_signed()));
        let processes = procfs::process::all_processes().map_err(Error::proc(1, "the list of processes"))?;
        for process in processes.flatten() {
            let Some(namespace) = namespace(process.pid) else { continue };
            if known.insert(namespace) && self.is_mounted_in(process.pid, dir) {
                return Ok(Some(process.pid));
            }
        }
        Ok(None)
    }

    /// Also a namespace that is a copy of the node's own has a volume mounted that is a file system of its own, at the same place.
    fn is_mounted_in(&self, pid: i32, dir: &Path) -> bool {
        // One that has just ended uses nothing.
        let mounts = mounts_of(pid).unwrap_or_default();
        mounts.iter().any(|mount| {
            mount.majmin == self.device && Path::new(&mount.root).starts_with(&self.path) && mount.mount_point != dir
        })
    }
}

fn mounts_of(pid: i32) -> Result<Vec<MountInfo>, Error> {
    let mounts = Process::new(pid).and_then(|process| process.mountinfo()).map_err(Error::proc(pid, "mountinfo"))?;
    Ok(mounts.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bind_mounts_are_told_by_type_or_option_and_their_paths_are_whole() {
        let config: Spec = serde_json::from_value(serde_json::json!({
            "ociVersion": "1.0.2",
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/data/", "type": "bind", "source": "/srv/data", "options": ["rbind", "rw"]},
                {"destination": "/etc//app", "source": "app", "options": ["bind", "ro"]},
                {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["ro"]},
            ],
        }))
        .unwrap();
        let mount = |destination: &str, source: &str, read_only| BindMount {
            destination: destination.into(),
            source: source.into(),
            read_only,
        };
        assert_eq!(
            bind_mounts(&config, Path::new("/bundles/app")),
            [mount("/data", "/srv/data", false), mount("/etc/app", "/bundles/app/app", true)]
        );
    }

    #[test]
    fn storage_is_where_the_kernel_says_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("inner");
        fs::create_dir(&inner).unwrap();
        let (outer, inner) = (Storage::of(dir.path()).unwrap(), Storage::of(&inner).unwrap());
        assert_eq!(inner.path, outer.path.join("inner"));
        assert_eq!((&inner.device, &inner.filesystem), (&outer.device, &outer.filesystem));
        assert!(inner.place.ends_with("/inner") && !inner.is_shared(), "{inner:?}");
        assert!(Storage::of(Path::new("/nowhere-at-all")).is_err());
        let of = |filesystem: &str| Storage { filesystem: filesystem.to_owned(), ..inner.clone() }.is_shared();
        assert!(of("nfs4") && of("fuse.sshfs") && !of("ext4") && !of("overlay"));
    }

    #[test]
    fn nobody_else_uses_a_directory_that_was_just_made() {
        let dir = tempfile::tempdir().unwrap();
        let storage = Storage::of(dir.path()).unwrap();
        assert_eq!(storage.other_user(dir.path(), &[]).unwrap(), None);
    }
}
