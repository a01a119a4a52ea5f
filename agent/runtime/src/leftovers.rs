//! What a killed `runc restore` leaves, and how to remove it without harming the container's files.
//!
//! The trap: runc binds the root filesystem to `ROOT/ID/criu-root` for CRIU. If runc is killed the mount stays, and a later
//! `runc delete` removes `ROOT/ID` recursively, through the mount: the root filesystem is emptied. So whatever is mounted
//! there is unmounted before anything is deleted, and a mount that stays stops the clean-up.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use oci_spec::runtime::Spec;
use procfs::process::Process;
use rustix::mount::{UnmountFlags, unmount};
use serde::{Deserialize, Serialize};

use crate::cgroup::CgroupPaths;
use crate::container::{Container, Init, check_id, collect_descendants};
use crate::error::Error;
use crate::freezer::Freezer;
use crate::process::read_if_there;
use crate::runc::{Runc, remove_file};

/// How long killed processes may take to be gone. One with gigabytes of memory takes about 0.1 s per GiB.
const REAP: Duration = Duration::from_secs(20);
/// Between two looks at them.
const POLL: Duration = Duration::from_millis(5);
/// What CRIU makes its temporary root directories from (`criu/mount.c`), with six letters or digits behind.
const CRIU_ROOTS: &str = "/tmp/.criu.mntns.";

/// A note beside runc's state that a restore is under way. It outlives the agent, so that the next one finds CRIU's log.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) work_path: PathBuf,
}

impl Record {
    /// A file, not a directory: runc takes every directory in its root for a container.
    fn path(runc: &Runc, id: &str) -> PathBuf {
        runc.root.join(format!(".{id}.podferry-restore.json"))
    }

    pub(crate) fn write(&self, runc: &Runc, id: &str) -> Result<(), Error> {
        let path = Self::path(runc, id);
        fs::create_dir_all(&runc.root).map_err(Error::io("make", &runc.root))?;
        let text = serde_json::to_vec(self).map_err(|source| Error::State { path: path.clone(), source })?;
        fs::write(&path, text).map_err(Error::io("write", path))
    }

    pub(crate) fn remove(runc: &Runc, id: &str) -> Result<(), Error> {
        remove_file(&Self::path(runc, id))
    }

    pub(crate) fn read(runc: &Runc, id: &str) -> Result<Option<Self>, Error> {
        let path = Self::path(runc, id);
        let Some(text) = read_if_there(&path)? else { return Ok(None) };
        serde_json::from_str(&text).map(Some).map_err(|source| Error::State { path, source })
    }
}

/// See [`Runc::cleanup_killed_restore`].
pub(crate) fn clean_up(runc: &Runc, id: &str, bundle: &Path) -> Result<(), Error> {
    let config_path = bundle.join("config.json");
    let config = Spec::load(&config_path).map_err(|source| Error::Spec { path: config_path, source })?;
    clean_up_all(runc, id, planned_cgroups(&config, id)?, || unmount_prepared(bundle, &config))
}

/// See [`Runc::cleanup_given_up_restore`].
pub(crate) fn clean_up_without_bundle(runc: &Runc, id: &str, cgroups_path: &Path) -> Result<(), Error> {
    clean_up_all(runc, id, CgroupPaths::of_spec(Some(cgroups_path), id)?, || Ok(()))
}

fn clean_up_all(
    runc: &Runc,
    id: &str,
    planned: CgroupPaths,
    unmount_more: impl FnOnce() -> Result<(), Error>,
) -> Result<(), Error> {
    check_id(id)?;
    let state_dir = runc.root.join(id);
    // runc writes its state only when the hook has been reached; before that the configuration tells the cgroup.
    let container = Container::read(&runc.root, id).ok();
    let cgroups = container.as_ref().map_or(planned, |container| container.cgroups.clone());
    kill_all(id, &cgroups, container.as_ref().and_then(|container| container.init))?;
    unmount_state(&state_dir)?;
    unmount_more()?;
    remove_criu_roots(runc, id)?;
    if container.is_some() {
        runc.delete(id, true)?;
    }
    remove_state(&state_dir)?;
    cgroups.remove()?;
    Record::remove(runc, id)
}

/// A process and all its descendants except itself, named so that none is taken for a later one.
pub(crate) fn family(pid: i32) -> Vec<Init> {
    let mut pids = BTreeSet::new();
    collect_descendants(pid, &mut pids);
    pids.remove(&pid);
    pids.into_iter().filter_map(Init::of_pid).collect()
}

/// Unmounts whatever is mounted in runc's directory of a container, which is `criu-root` with what was mounted in the
/// root filesystem.
pub(crate) fn unmount_state(state_dir: &Path) -> Result<(), Error> {
    let state_dir = match fs::canonicalize(state_dir) {
        Ok(dir) => dir,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io("resolve", state_dir)(error)),
    };
    let inside = |point: &Path| point.starts_with(&state_dir) && point != state_dir;
    unmount_all(inside)?;
    match mount_points()?.into_iter().find(|point| inside(point)) {
        Some(mount) => Err(Error::StillMounted { dir: state_dir, mount }),
        None => Ok(()),
    }
}

/// The cgroup that a container will have once it is made from a bundle. One that is the machine's own, or the agent's, is an error:
/// whoever asks may come to kill what is in it.
pub fn cgroups_of_bundle(bundle: &Path, id: &str) -> Result<CgroupPaths, Error> {
    let path = bundle.join("config.json");
    let config = Spec::load(&path).map_err(|source| Error::Spec { path, source })?;
    let cgroups = planned_cgroups(&config, id)?;
    refuse_shared(id, &cgroups)?;
    Ok(cgroups)
}

fn planned_cgroups(config: &Spec, id: &str) -> Result<CgroupPaths, Error> {
    let path = config.linux().as_ref().and_then(|linux| linux.cgroups_path().clone());
    CgroupPaths::of_spec(path.as_deref(), id)
}

/// Kills every process of the container's cgroup (CRIU and its hook are in there as well) and of its init's family.
fn kill_all(id: &str, cgroups: &CgroupPaths, init: Option<Init>) -> Result<(), Error> {
    refuse_shared(id, cgroups)?;
    let start = Instant::now();
    loop {
        let mut targets: BTreeSet<i32> = cgroups.processes()?;
        if let Some(init) = init.filter(|init| init.is_alive()) {
            targets.insert(init.pid);
            targets.extend(family(init.pid).into_iter().map(|process| process.pid));
        }
        let living: Vec<Init> =
            targets.into_iter().filter_map(Init::of_pid).filter(|process| process.is_alive()).collect();
        if living.is_empty() {
            return Ok(());
        }
        if start.elapsed() >= REAP {
            return Err(Error::Parked { id: id.to_owned(), pids: living.iter().map(|process| process.pid).collect() });
        }
        living.into_iter().for_each(Init::kill);
        // A frozen task does not die on cgroup v1.
        if let Err(error) = Freezer::at(cgroups.clone()).and_then(|freezer| freezer.thaw(Duration::from_secs(1))) {
            tracing::debug!(container = id, %error, "not thawed while killing");
        }
        sleep(POLL);
    }
}

/// A configuration with `cgroupsPath: /` would make the whole machine the container.
fn refuse_shared(id: &str, cgroups: &CgroupPaths) -> Result<(), Error> {
    let pids = cgroups.processes()?;
    let own = rustix::process::getpid().as_raw_nonzero().get();
    match [1, own].into_iter().find(|pid| pids.contains(pid)) {
        Some(pid) => Err(Error::SharedCgroup { id: id.to_owned(), pid }),
        None => Ok(()),
    }
}

/// runc binds the configured mounts into the root filesystem for a moment, to make their mount points. Killed just then, it
/// leaves them there, and whoever deletes the root filesystem deletes the volumes.
fn unmount_prepared(bundle: &Path, config: &Spec) -> Result<(), Error> {
    let Some(root) = config.root() else { return Ok(()) };
    let Ok(rootfs) = fs::canonicalize(bundle.join(root.path())) else { return Ok(()) };
    let binds: Vec<PathBuf> = config
        .mounts()
        .iter()
        .flatten()
        .filter(|mount| {
            let options = mount.options().iter().flatten();
            mount.typ().as_deref() == Some("bind")
                || options.into_iter().any(|option| option == "bind" || option == "rbind")
        })
        .map(|mount| rootfs.join(mount.destination().strip_prefix("/").unwrap_or(mount.destination())))
        .collect();
    unmount_all(|point| binds.iter().any(|bind| bind == point))
}

/// Unmounts all that `wanted` names, the last mounted first, without following links and without waiting for users.
fn unmount_all(wanted: impl Fn(&Path) -> bool) -> Result<(), Error> {
    for point in mount_points()?.into_iter().rev().filter(|point| wanted(point)) {
        match unmount(&point, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            // EINVAL: it went away with the mount above it.
            Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => {}
            Err(errno) => return Err(Error::io("unmount", point)(errno.into())),
        }
    }
    Ok(())
}

fn mount_points() -> Result<Vec<PathBuf>, Error> {
    let mounts = Process::myself().and_then(|process| process.mountinfo()).map_err(Error::proc(0, "mountinfo"))?;
    Ok(mounts.into_iter().map(|mount| mount.mount_point).collect())
}

/// Removes the temporary root directory that CRIU's log of this restore names. Others belong to other restores.
fn remove_criu_roots(runc: &Runc, id: &str) -> Result<(), Error> {
    let Some(record) = Record::read(runc, id)? else { return Ok(()) };
    let Some(log) = read_if_there(&record.work_path.join("restore.log"))? else { return Ok(()) };
    let Some(dir) = criu_roots_in(&log) else { return Ok(()) };
    unmount_all(|point| point.starts_with(&dir))?;
    match fs::remove_dir(&dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", dir)(error)),
        _ => Ok(()),
    }
}

/// CRIU logs `mnt: Will mount ID @ /tmp/.criu.mntns.XXXXXX/mnt-ID ...` for every mount. What follows the first path of a
/// line is the container's and not to be trusted.
fn criu_roots_in(log: &str) -> Option<PathBuf> {
    log.lines().filter(|line| line.contains("mnt: ")).find_map(|line| {
        let (_, rest) = line.split_once("Will mount ")?;
        let (_, path) = rest.split_once(" @ ")?;
        let suffix = path.strip_prefix(CRIU_ROOTS)?.get(..6)?;
        suffix.bytes().all(|byte| byte.is_ascii_alphanumeric()).then(|| PathBuf::from(format!("{CRIU_ROOTS}{suffix}")))
    })
}

/// Removes runc's directory of the container. It holds no mounts any more; links in it are not followed.
fn remove_state(state_dir: &Path) -> Result<(), Error> {
    unmount_state(state_dir)?;
    match fs::remove_dir_all(state_dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", state_dir)(error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_restores_own_directory_is_found_in_the_log() {
        let log = "(00.1) mnt: \t\tWill mount 54 @ /tmp/.criu.mntns.W8DhcO/mnt-54 /tmp/.criu.mntns.AAAAAA\n";
        assert_eq!(criu_roots_in(log), Some("/tmp/.criu.mntns.W8DhcO".into()));
        assert_eq!(criu_roots_in("(00.1) mnt: \t\tWill mount 54 @ /tmp/.criu.mntns.../../x\n"), None);
        assert_eq!(criu_roots_in("(00.1) Opening /tmp/.criu.mntns.W8DhcO\n"), None);
    }

    #[test]
    fn the_machines_own_cgroup_is_never_killed() {
        let roots = CgroupPaths::of_spec(Some(Path::new("/")), "x").unwrap();
        assert!(matches!(refuse_shared("x", &roots), Err(Error::SharedCgroup { .. })));
        let bundle = tempfile::tempdir().unwrap();
        let config = r#"{"ociVersion":"1.2.1","root":{"path":"rootfs"},"linux":{"cgroupsPath":"/"}}"#;
        fs::write(bundle.path().join("config.json"), config).unwrap();
        assert!(matches!(cgroups_of_bundle(bundle.path(), "x"), Err(Error::SharedCgroup { .. })));
    }
}
