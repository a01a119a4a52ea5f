//! Directories of a node that move with a container: its volumes.
//!
//! A bind mount that the container can write to moves when its directory lies below one of the folders that the node's configuration
//! gives to podferry for that (`runtime.volume_dirs`), or is an `emptyDir` of the container's own pod. No other does: who mounts a folder
//! of the host into a container has not said that it is the container's alone. What lies on storage that both nodes see stays where it is.
//!
//! A volume moves as the writable layer does, with its large files in the rounds before the freeze. Where it goes says the target's own
//! `config.json`, at the same place in the container. The folder there is podferry's from Prepare on. Outside Kubernetes it has to be
//! empty then; a pod's was made for the pod that comes, and is cleared. It is emptied when the migration is undone. The source's is
//! emptied when the migration has succeeded; a pod's goes with the pod.

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::Spec;
use podferry_common::failure::{Failure, FailureCode};
use podferry_filesystem::WritableLayer;
use podferry_proto::v1;
use podferry_runtime::{BindMount, Container, Storage, bind_mounts};
use serde::{Deserialize, Serialize};

use crate::config::{Config, Kubernetes};

/// The most volumes of a container that move.
pub const MOST: usize = 64;
/// The name of the writable layer in the transfer.
pub const LAYER: &str = "upper";
/// Where what comes of a volume's files before the freeze is kept: in the volume, which may be a file system of its own.
const SEEDS: &str = ".podferry-seeds";

/// A directory that moves with a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// Where it is mounted in the container; the same on both nodes.
    pub destination: PathBuf,
    /// Where it is on this node.
    pub dir: PathBuf,
    /// A migration has made the directory.
    #[serde(default)]
    pub made: bool,
}

impl Volume {
    /// Where its seeds are kept.
    pub fn seeds(&self) -> PathBuf {
        self.dir.join(SEEDS)
    }

    /// Whether a migration may have it: to be asked before it is noted, for what is noted is emptied.
    ///
    /// # Errors
    /// When it has something in it, or cannot be read.
    pub fn check_empty(&self) -> io::Result<()> {
        if is_empty(&self.dir)? {
            return Ok(());
        }
        Err(io::Error::other(format!("{} is not empty any more: somebody else writes there", self.dir.display())))
    }

    /// Makes the directory, if it is not there; to be noted before. Idempotent.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn make_room(&self) -> io::Result<()> {
        fs::create_dir_all(&self.dir)
    }

    /// Whether one of them lies in the other, or they are the same.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.dir.starts_with(&other.dir) || other.dir.starts_with(&self.dir)
    }

    /// Removes all that is in it, and the directory when a migration has made it. Idempotent.
    ///
    /// # Errors
    /// When something cannot be deleted, or is mounted there.
    pub fn clear(&self) -> io::Result<()> {
        if !self.dir.is_dir() {
            return Ok(());
        }
        podferry_filesystem::wipe(&self.dir).map_err(io::Error::other)?;
        if self.made { fs::remove_dir(&self.dir) } else { Ok(()) }
    }
}

/// Whether nothing is in a directory; so it is when it is not there.
///
/// # Errors
/// When it cannot be read.
pub fn is_empty(dir: &Path) -> io::Result<bool> {
    match fs::read_dir(dir) {
        Ok(mut entries) => Ok(entries.next().is_none()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
        Err(error) => Err(error),
    }
}

/// What becomes of a container's bind mounts.
#[derive(Clone, Debug, Default)]
pub struct Look {
    /// Those that move.
    pub moving: Vec<Volume>,
    /// Those that both nodes see.
    pub shared: Vec<(BindMount, Storage)>,
    /// Directories that could be written to, and stay: they are not podferry's to move.
    pub staying: Vec<BindMount>,
    /// The others: files, and what can only be read.
    pub own: Vec<BindMount>,
}

impl Look {
    /// Looks at those of a bundle's configuration.
    ///
    /// # Errors
    /// When the storage of one cannot be told.
    pub fn at(config: &Config, spec: &Spec, bundle: &Path) -> Result<Self, podferry_runtime::Error> {
        let folders: Vec<PathBuf> = config.runtime.volume_dirs.iter().filter_map(|dir| resolve(dir)).collect();
        let mut look = Self::default();
        let moves = |destination: &Path, dir: &Path| match &config.kubernetes {
            Some(_) => Kubernetes::moves(destination, dir),
            None => folders.iter().any(|folder| dir.starts_with(folder) && dir != *folder),
        };
        for mount in bind_mounts(spec, bundle) {
            look.add(mount, moves)?;
        }
        Ok(look)
    }

    fn add(&mut self, mount: BindMount, moves: impl Fn(&Path, &Path) -> bool) -> Result<(), podferry_runtime::Error> {
        let dir = resolve(&mount.source).filter(|dir| dir.is_dir() || !dir.exists());
        let Some(dir) = dir.filter(|_| !mount.read_only) else {
            self.own.push(mount);
            return Ok(());
        };
        let storage = Storage::of(existing(&dir))?;
        if storage.is_shared() {
            self.shared.push((mount, storage));
        } else if moves(&mount.destination, &dir) {
            let made = !dir.exists();
            self.moving.push(Volume { destination: mount.destination, dir, made });
        } else {
            self.staying.push(mount);
        }
        Ok(())
    }

    /// Two of them that lie in each other: all of one would move with the other.
    pub fn overlap(&self) -> Option<(&Volume, &Volume)> {
        let mut rest = self.moving.as_slice();
        while let Some((one, others)) = rest.split_first() {
            if let Some(other) = others.iter().find(|other| one.overlaps(other)) {
                return Some((one, other));
            }
            rest = others;
        }
        None
    }

    /// The volumes that a coordinator names, in its order.
    ///
    /// # Errors
    /// When one is none, or does not move here.
    pub fn chosen(self, named: &[v1::Volume]) -> Result<Vec<Volume>, Failure> {
        if named.len() > MOST {
            let message = format!("{} volumes are named, and at most {MOST} move", named.len());
            return Err(Failure::new(FailureCode::InvalidArgument, message));
        }
        let mut moving = self.moving;
        let mut choose = |volume: &v1::Volume| {
            let index = moving.iter().position(|known| known.destination == Path::new(&volume.destination));
            index.map(|index| moving.swap_remove(index)).ok_or_else(|| {
                let message = format!("{:?} is no volume that moves, or is named twice", volume.destination);
                Failure::new(FailureCode::FailedPrecondition, message)
            })
        };
        named.iter().map(&mut choose).collect()
    }
}

/// A path without links, as far as it exists; none when it cannot be told, or has `..` in what does not exist.
fn resolve(path: &Path) -> Option<PathBuf> {
    let there = existing(path);
    let rest = path.strip_prefix(there).ok()?;
    let plain = rest.components().all(|component| matches!(component, Component::Normal(_)));
    let real = fs::canonicalize(there).ok().filter(|_| plain)?;
    // Joined with nothing a path gets a slash at its end.
    Some(if rest.as_os_str().is_empty() { real } else { real.join(rest) })
}

/// The deepest folder of a path that exists.
pub fn existing(path: &Path) -> &Path {
    path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"))
}

/// What of a container's files moves: its writable layer and its volumes, by their names in the transfer.
#[derive(Clone, Debug, Default)]
pub struct MovedFiles(Vec<(String, WritableLayer)>);

impl MovedFiles {
    /// Those of a running or stopped container whose root is mounted.
    ///
    /// # Errors
    /// When its root is not found.
    pub fn of(container: &Container, volumes: &[Volume]) -> Result<Self, podferry_filesystem::Error> {
        let layer = WritableLayer::of(&container.rootfs)?;
        let layer = layer.moved().is_ok().then(|| (LAYER.to_owned(), layer));
        let volumes = volumes.iter().enumerate();
        let volumes = volumes.map(|(index, volume)| (name(index), WritableLayer::Volume { dir: volume.dir.clone() }));
        Ok(Self(layer.into_iter().chain(volumes).collect()))
    }

    /// Each with its name.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &WritableLayer)> {
        self.0.iter().map(|(name, layer)| (name.as_str(), layer))
    }
}

/// The name of a volume in the transfer: both nodes have them in the same order.
pub fn name(index: usize) -> String {
    format!("volume-{index}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume(destination: &str, dir: &str) -> Volume {
        Volume { destination: destination.into(), dir: dir.into(), made: false }
    }

    #[test]
    fn paths_are_followed_as_far_as_they_exist_and_not_upwards_beyond() {
        let folder = tempfile::tempdir().unwrap();
        let real = fs::canonicalize(folder.path()).unwrap();
        fs::create_dir(real.join("there")).unwrap();
        std::os::unix::fs::symlink("there", real.join("link")).unwrap();
        assert_eq!(resolve(&real.join("link/new/er")), Some(real.join("there/new/er")));
        assert_eq!(resolve(&real.join("there")), Some(real.join("there")));
        assert_eq!(resolve(&real.join("link/../there")), Some(real.join("there")));
        assert_eq!(resolve(&real.join("new/../../../etc")), None);
    }

    #[test]
    fn volumes_in_each_other_are_found() {
        let look = |volumes: &[(&str, &str)]| Look {
            moving: volumes.iter().map(|(destination, dir)| volume(destination, dir)).collect(),
            ..Look::default()
        };
        assert_eq!(look(&[("/a", "/v/a"), ("/b", "/v/ab"), ("/c", "/v/c")]).overlap(), None);
        for pair in
            [[("/a", "/v/a"), ("/b", "/v/a/b")], [("/a", "/v/a/b"), ("/b", "/v/a")], [("/a", "/v/a"), ("/b", "/v/a")]]
        {
            assert!(look(&pair).overlap().is_some(), "{pair:?}");
        }
    }

    #[test]
    fn only_volumes_that_move_here_are_chosen_and_each_once() {
        let look = || Look { moving: vec![volume("/a", "/v/a"), volume("/b", "/v/b")], ..Look::default() };
        let named = |names: &[&str]| -> Vec<v1::Volume> {
            names.iter().map(|name| v1::Volume { destination: (*name).to_owned(), ..v1::Volume::default() }).collect()
        };
        assert_eq!(look().chosen(&named(&["/b", "/a"])).unwrap(), [volume("/b", "/v/b"), volume("/a", "/v/a")]);
        assert_eq!(look().chosen(&[]).unwrap(), []);
        for wrong in [&["/c"][..], &["/a", "/a"], &["/v/a"], &["/"; MOST + 1]] {
            assert!(look().chosen(&named(wrong)).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn what_was_made_goes_and_what_was_there_is_emptied() {
        let folder = tempfile::tempdir().unwrap();
        for made in [false, true] {
            let dir = folder.path().join(made.to_string());
            let volume = Volume { destination: "/a".into(), dir: dir.clone(), made };
            volume.check_empty().unwrap();
            volume.make_room().unwrap();
            fs::create_dir(volume.seeds()).unwrap();
            fs::write(dir.join("file"), "x").unwrap();
            assert!(volume.check_empty().is_err(), "it is not empty");
            volume.clear().unwrap();
            volume.clear().unwrap();
            assert_eq!(dir.exists(), !made);
            assert!(is_empty(&dir).unwrap());
        }
    }
}
