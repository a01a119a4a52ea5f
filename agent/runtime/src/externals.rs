//! What of a container CRIU must not dump because the target's own container brings it: bind mounts, namespaces given by
//! path, and stdio. The keys are those that `runc restore` uses (libcontainer, `criu_linux.go`), so that CRIU finds on the
//! target what was left out on the source.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::{LinuxNamespaceType, Spec};
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};

use crate::cgroup::{CgroupPaths, hierarchies};
use crate::container::{Container, NamespaceKind};
use crate::error::Error;

/// File in the image directory that `runc restore` reads before it starts CRIU.
pub const DESCRIPTORS: &str = "descriptors.json";

/// The external resources of one container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Externals {
    /// Mounts, as CRIU's `ext_mnt` entries for a dump: the mount point in the container, and the key under which the
    /// restore names its replacement.
    pub mounts: Vec<(String, String)>,
    /// Namespaces, as CRIU's `external` strings: `net[4026532345]:extRootNetNS`.
    pub namespaces: Vec<String>,
    /// What stdin, stdout and stderr were at the start, in this order.
    pub descriptors: Vec<String>,
}

impl Externals {
    /// Those of a running container.
    pub fn of(container: &Container) -> Result<Self, Error> {
        let init = container.init.ok_or_else(|| Error::NotRunning { id: container.id.clone() })?;
        Ok(Self {
            mounts: mounts(container, init.pid)?,
            namespaces: namespaces(container)?,
            descriptors: container.external_descriptors.clone(),
        })
    }

    /// All as CRIU's `external` strings: `mnt[MOUNTPOINT]:KEY` and the namespaces.
    pub fn strings(&self) -> Vec<String> {
        let mounts = self.mounts.iter().map(|(point, key)| format!("mnt[{point}]:{key}"));
        mounts.chain(self.namespaces.iter().cloned()).collect()
    }

    /// Writes `descriptors.json` into an image directory.
    pub fn write_descriptors(&self, dir: &Path) -> Result<(), Error> {
        let path = dir.join(DESCRIPTORS);
        let text =
            serde_json::to_vec(&self.descriptors).map_err(|source| Error::State { path: path.clone(), source })?;
        fs::write(&path, text).map_err(Error::io("write", path))
    }
}

fn mounts(container: &Container, init: i32) -> Result<Vec<(String, String)>, Error> {
    let mut found = Vec::new();
    let mut add = |destination: &Path| -> Result<(), Error> {
        let point = resolve_in(&container.rootfs, destination)?;
        found.push((point.clone(), point));
        Ok(())
    };
    for mount in &container.mounts {
        match mount.device.as_str() {
            "bind" => add(&mount.destination)?,
            "cgroup" => cgroup_binds(container, &mount.destination)?.iter().try_for_each(|bind| add(bind))?,
            _ => {}
        }
    }
    for path in &container.masked_paths {
        if is_masked_file(init, path)? {
            found.push((path.display().to_string(), "/dev/null".to_owned()));
        }
    }
    for device in &container.devices {
        let point = resolve_in(&container.rootfs, device)?;
        found.push((point.clone(), point));
    }
    Ok(found)
}

/// A cgroup mount is a real one on cgroup v2 and in a cgroup namespace; otherwise runc binds each v1 hierarchy.
fn cgroup_binds(container: &Container, destination: &Path) -> Result<Vec<PathBuf>, Error> {
    if matches!(container.cgroups, CgroupPaths::V2(_)) || container.namespaces.contains(&NamespaceKind::Cgroup) {
        return Ok(Vec::new());
    }
    let mounted = hierarchies()?.into_iter().filter(|hierarchy| hierarchy.controllers.is_some());
    Ok(mounted.filter_map(|hierarchy| Some(destination.join(hierarchy.point.file_name()?))).collect())
}

/// runc masks a file by binding `/dev/null` over it, and a directory with an empty tmpfs, which is not external.
fn is_masked_file(init: i32, path: &Path) -> Result<bool, Error> {
    let seen = PathBuf::from(format!("/proc/{init}/root")).join(path.strip_prefix("/").unwrap_or(path));
    match fs::metadata(&seen) {
        Ok(metadata) => Ok(!metadata.is_dir()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Error::io("look at", seen)(error)),
    }
}

/// Network and pid namespaces given by path; the other kinds are joined by `runc restore` without a key.
fn namespaces(container: &Container) -> Result<Vec<String>, Error> {
    let mut found = Vec::new();
    for (kind, key) in [(NamespaceKind::Network, "extRootNetNS"), (NamespaceKind::Pid, "extRootPidNS")] {
        if let Some(path) = container.namespace_paths.get(&kind) {
            let inode = fs::metadata(path).map_err(Error::io("look at the namespace", path))?.ino();
            found.push(format!("{}[{inode}]:{key}", kind.proc_name()));
        }
    }
    Ok(found)
}

/// The network namespace that a bundle's configuration gives by path.
pub fn network_namespace(config: &Spec) -> Option<PathBuf> {
    let namespaces = config.linux().as_ref()?.namespaces().as_ref()?;
    namespaces.iter().find(|namespace| namespace.typ() == LinuxNamespaceType::Network)?.path().clone()
}

/// Where a path of the container really leads, following its symbolic links inside the root filesystem only, as the
/// container sees it: `/var/run/x` is `/run/x` where `/var/run` links there. Parts that do not exist are kept as they are.
fn resolve_in(rootfs: &Path, path: &Path) -> Result<String, Error> {
    let root = File::open(rootfs).map_err(Error::io("open", rootfs))?;
    let top = fs::canonicalize(rootfs).map_err(Error::io("resolve", rootfs))?;
    let names: Vec<&std::ffi::OsStr> = path
        .components()
        .filter_map(|component| match component {
            Component::Normal(name) => Some(name),
            _ => None,
        })
        .collect();
    for existing in (0..=names.len()).rev() {
        let prefix: PathBuf = if existing == 0 { ".".into() } else { names[..existing].iter().collect() };
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let Ok(opened) = openat2(&root, &prefix, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve) else {
            continue;
        };
        let link = format!("/proc/self/fd/{}", opened.as_raw_fd());
        let real = fs::read_link(&link).map_err(Error::io("read the link", link))?;
        let inside = real.strip_prefix(&top).unwrap_or(&prefix);
        let rest: PathBuf = names[existing..].iter().collect();
        return Ok(Path::new("/").join(inside).join(rest).display().to_string().trim_end_matches('/').to_owned());
    }
    Ok(path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_followed_inside_the_root_only() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("run/lock")).unwrap();
        fs::create_dir_all(dir.path().join("var")).unwrap();
        std::os::unix::fs::symlink("/run", dir.path().join("var/run")).unwrap();
        std::os::unix::fs::symlink("../../../../../../etc", dir.path().join("out")).unwrap();
        let resolve = |path: &str| resolve_in(dir.path(), Path::new(path)).unwrap();
        assert_eq!(resolve("/var/run/lock"), "/run/lock");
        assert_eq!(resolve("/var/run/new/socket"), "/run/new/socket");
        assert_eq!(resolve("/dev/shm"), "/dev/shm");
        assert_eq!(resolve("/out/passwd"), "/out/passwd", "must not reach the host's /etc");
    }

    #[test]
    fn strings_are_those_of_criu() {
        let externals = Externals {
            mounts: vec![("/data".into(), "/data".into()), ("/proc/keys".into(), "/dev/null".into())],
            namespaces: vec!["net[4026532000]:extRootNetNS".into()],
            descriptors: vec!["/dev/null".into(), "pipe:[7]".into(), "pipe:[7]".into()],
        };
        assert_eq!(
            externals.strings(),
            ["mnt[/data]:/data", "mnt[/proc/keys]:/dev/null", "net[4026532000]:extRootNetNS"]
        );
        let dir = tempfile::tempdir().unwrap();
        externals.write_descriptors(dir.path()).unwrap();
        let text = fs::read_to_string(dir.path().join("descriptors.json")).unwrap();
        assert_eq!(text, r#"["/dev/null","pipe:[7]","pipe:[7]"]"#);
    }
}
