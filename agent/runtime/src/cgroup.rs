//! Where a container's cgroup is, in either version of the hierarchy, and who is in it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::error::Error;

/// The directories of one container's cgroup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CgroupPaths {
    /// cgroup v1: a directory in the hierarchy of each controller, by controller (`freezer`, `name=systemd`). Where a v2
    /// hierarchy without controllers is mounted beside them, its directory has the empty name.
    V1(BTreeMap<String, PathBuf>),
    /// cgroup v2: the one directory in the unified hierarchy.
    V2(PathBuf),
}

impl CgroupPaths {
    /// Understands the map `cgroup_paths` of runc's state, in which the unified hierarchy has the empty name.
    pub(crate) fn from_state(mut paths: BTreeMap<String, PathBuf>) -> Self {
        match paths.remove("") {
            Some(unified) if paths.is_empty() => Self::V2(unified),
            Some(unified) => {
                paths.insert(String::new(), unified);
                Self::V1(paths)
            }
            None => Self::V1(paths),
        }
    }

    /// Where the cgroup of a container that is yet to come will be, following runc's rules for `linux.cgroupsPath`
    /// (libcontainer's cgroupfs and systemd managers).
    ///
    /// `path` is the OCI field: absolute below each hierarchy, relative to this process's own cgroup, or systemd's
    /// `SLICE:PREFIX:NAME`. Without it runc uses the container's name.
    pub fn of_spec(path: Option<&Path>, id: &str) -> Result<Self, Error> {
        let own = own_cgroups()?;
        let place = |controllers: &str, mount: &Path| -> PathBuf {
            let relative = match path {
                Some(path) if path.is_absolute() => path.to_owned(),
                Some(path) => {
                    systemd_scope(&path.to_string_lossy()).unwrap_or_else(|| own_path(&own, controllers).join(path))
                }
                None => own_path(&own, controllers).join(id),
            };
            mount.join(relative.strip_prefix("/").unwrap_or(&relative))
        };
        let mut v1 = BTreeMap::new();
        let mut v2 = None;
        for mount in hierarchies()? {
            match mount.controllers {
                Some(controllers) => {
                    let dir = place(&controllers, &mount.point);
                    v1.extend(controllers.split(',').map(|name| (name.to_owned(), dir.clone())));
                }
                None => v2 = Some(place("", &mount.point)),
            }
        }
        v1.extend(v2.map(|dir| (String::new(), dir)));
        Ok(Self::from_state(v1))
    }

    /// Every directory, each once.
    pub fn dirs(&self) -> BTreeSet<&Path> {
        match self {
            Self::V1(paths) => paths.values().map(PathBuf::as_path).collect(),
            Self::V2(path) => BTreeSet::from([path.as_path()]),
        }
    }

    /// The directory in one controller's hierarchy; for cgroup v2 always the unified one.
    pub fn controller(&self, name: &str) -> Option<&Path> {
        match self {
            Self::V1(paths) => paths.get(name).map(PathBuf::as_path),
            Self::V2(path) => Some(path),
        }
    }

    /// The processes in the cgroup and in those below it, in the host's pid namespace. A directory that is gone holds none.
    pub fn processes(&self) -> Result<BTreeSet<i32>, Error> {
        let mut pids = BTreeSet::new();
        for dir in self.dirs() {
            collect_processes(dir, &mut pids)?;
        }
        Ok(pids)
    }

    /// Removes the cgroup and those below it. They must hold no process any more.
    pub fn remove(&self) -> Result<(), Error> {
        self.dirs().into_iter().try_for_each(remove_tree)
    }
}

fn collect_processes(dir: &Path, pids: &mut BTreeSet<i32>) -> Result<(), Error> {
    let file = dir.join("cgroup.procs");
    match fs::read_to_string(&file) {
        Ok(text) => pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok())),
        // A threaded cgroup of version 2 refuses with EOPNOTSUPP: its processes are listed above it.
        Err(error) if is_gone(&error) || error.kind() == io::ErrorKind::Unsupported => {}
        Err(error) => return Err(Error::io("read", file)(error)),
    }
    for child in children(dir)? {
        collect_processes(&child, pids)?;
    }
    Ok(())
}

fn remove_tree(dir: &Path) -> Result<(), Error> {
    for child in children(dir)? {
        remove_tree(&child)?;
    }
    match fs::remove_dir(dir) {
        Err(error) if !is_gone(&error) => Err(Error::io("remove the cgroup", dir)(error)),
        _ => Ok(()),
    }
}

fn children(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if is_gone(&error) => return Ok(Vec::new()),
        Err(error) => return Err(Error::io("list", dir)(error)),
    };
    Ok(entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|e| e.path()).collect())
}

/// The cgroup went away: ENOENT, or ENODEV from a file that was open at that moment.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(rustix::io::Errno::NODEV.raw_os_error())
}

/// One mounted cgroup hierarchy.
pub(crate) struct Hierarchy {
    /// The v1 controllers as in `/proc/self/cgroup` (`cpu,cpuacct`, `name=systemd`); `None` for cgroup v2.
    pub(crate) controllers: Option<String>,
    /// Where it is mounted.
    pub(crate) point: PathBuf,
}

/// The cgroup hierarchies that are mounted here, each once, in mount order.
pub(crate) fn hierarchies() -> Result<Vec<Hierarchy>, Error> {
    let mounts = procfs::process::Process::myself()
        .and_then(|process| process.mountinfo())
        .map_err(Error::proc(0, "mountinfo"))?;
    let own = own_cgroups()?;
    let mut found: Vec<Hierarchy> = Vec::new();
    for mount in mounts {
        let controllers = match mount.fs_type.as_str() {
            "cgroup2" => None,
            "cgroup" => own
                .keys()
                .find(|names| !names.is_empty() && names.split(',').all(|name| has_option(&mount.super_options, name)))
                .cloned(),
            _ => continue,
        };
        let known = found.iter().any(|hierarchy| hierarchy.controllers == controllers);
        if !known && (mount.fs_type == "cgroup2" || controllers.is_some()) {
            found.push(Hierarchy { controllers, point: mount.mount_point });
        }
    }
    Ok(found)
}

/// Named hierarchies show as `name=systemd`, which procfs splits at the equals sign.
fn has_option(options: &std::collections::HashMap<String, Option<String>>, name: &str) -> bool {
    match name.split_once('=') {
        Some((key, value)) => options.get(key).is_some_and(|found| found.as_deref() == Some(value)),
        None => options.contains_key(name),
    }
}

/// This process's cgroup in each hierarchy, by its comma-separated controllers; the empty name is cgroup v2.
fn own_cgroups() -> Result<BTreeMap<String, PathBuf>, Error> {
    let file = Path::new("/proc/self/cgroup");
    let text = fs::read_to_string(file).map_err(Error::io("read", file))?;
    Ok(text
        .lines()
        .filter_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            Some((fields.next()?.to_owned(), PathBuf::from(fields.next()?)))
        })
        .collect())
}

fn own_path<'a>(own: &'a BTreeMap<String, PathBuf>, controllers: &str) -> &'a Path {
    own.get(controllers).map_or(Path::new("/"), PathBuf::as_path)
}

/// `SLICE:PREFIX:NAME` as the systemd driver places it: `a-b.slice` lies in `a.slice`.
fn systemd_scope(path: &str) -> Option<PathBuf> {
    let mut fields = path.splitn(3, ':');
    let (slice, prefix, name) = (fields.next()?, fields.next()?, fields.next()?);
    let slice = if slice.is_empty() { "system.slice" } else { slice };
    let stem = slice.strip_suffix(".slice").unwrap_or(slice);
    let mut place = PathBuf::from("/");
    let mut grown = String::new();
    for part in stem.split('-').filter(|part| !part.is_empty()) {
        if !grown.is_empty() {
            grown.push('-');
        }
        grown.push_str(part);
        place.push(format!("{grown}.slice"));
    }
    let unit = if prefix.is_empty() { name.to_owned() } else { format!("{prefix}-{name}") };
    place.push(if unit.strip_suffix(".slice").is_some() { unit } else { format!("{unit}.scope") });
    Some(place)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_paths_tell_the_versions_apart() {
        let v2 = BTreeMap::from([(String::new(), PathBuf::from("/sys/fs/cgroup/x"))]);
        assert_eq!(CgroupPaths::from_state(v2), CgroupPaths::V2("/sys/fs/cgroup/x".into()));
        let hybrid = BTreeMap::from([
            (String::new(), PathBuf::from("/sys/fs/cgroup/unified/x")),
            ("freezer".to_owned(), PathBuf::from("/sys/fs/cgroup/freezer/x")),
        ]);
        let paths = CgroupPaths::from_state(hybrid);
        assert_eq!(paths.controller("freezer"), Some(Path::new("/sys/fs/cgroup/freezer/x")));
        assert_eq!(paths.controller("memory"), None);
        assert_eq!(paths.dirs().len(), 2, "the unified directory has to be removed as well");
    }

    #[test]
    fn systemd_paths_expand_like_systemd_does() {
        assert_eq!(systemd_scope("system.slice:runc:a1"), Some("/system.slice/runc-a1.scope".into()));
        assert_eq!(
            systemd_scope("kubepods-burstable-pod1.slice:cri-containerd:c0ffee"),
            Some(
                "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-c0ffee.scope"
                    .into()
            )
        );
        assert_eq!(systemd_scope("kubepods/pod1"), None);
    }

    #[test]
    fn absolute_paths_lie_below_every_hierarchy() {
        let paths = CgroupPaths::of_spec(Some(Path::new("/podferry-test/none")), "none").unwrap();
        assert!(!paths.dirs().is_empty());
        assert!(
            paths.dirs().iter().all(|dir| dir.ends_with("podferry-test/none") && dir.starts_with("/sys/fs/cgroup"))
        );
        assert_eq!(paths.processes().unwrap(), BTreeSet::new());
    }
}
