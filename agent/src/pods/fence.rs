//! Keeps the kubelet from starting what moves away, on a disk: it starts pods again after a reboot, too.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use podferry_runtime::Container;
use podferry_runtime::wrapper::{KEEP, PodContainer};
use serde::{Deserialize, Serialize};

/// The fence around one pod. [`podferry_runtime::wrapper`] starts nothing behind it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fence(PathBuf);

impl Fence {
    /// That of a container's pod; none when it is no pod's.
    pub fn of(dir: &Path, container: &Container) -> Option<Self> {
        let pod = PodContainer::of(&container.annotations)?;
        // It is a file's name here, and comes from the API server.
        let plain = !pod.uid.is_empty() && pod.uid.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        plain.then(|| Self(dir.join(pod.uid)))
    }

    /// Removes those of pods that are not on this node any more, which the kubelet's folder of theirs tells.
    ///
    /// # Errors
    /// When one stays.
    pub fn prune(dir: &Path, kubelet_dir: &Path) -> io::Result<()> {
        let entries = match fs::read_dir(dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            if !kubelet_dir.join("pods").join(entry.file_name()).exists() {
                Self(entry.path()).take_away()?;
            }
        }
        Ok(())
    }

    /// Puts it up. Idempotent. It is on the disk then, and so is there after a power failure.
    ///
    /// # Errors
    /// When that cannot be written down.
    pub fn put_up(&self) -> io::Result<()> {
        let Some(dir) = self.0.parent() else { return Ok(()) };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        fs::File::create(&self.0)?.sync_all()?;
        fs::File::open(dir)?.sync_all()
    }

    /// Keeps the container from being killed, too: it stands still, so that its probes fail, and its memory is needed. Its
    /// processes end with a power failure anyhow, so this need not be on the disk.
    ///
    /// # Errors
    /// When that cannot be written down.
    pub fn keep(&self) -> io::Result<()> {
        fs::write(&self.0, KEEP)
    }

    /// Lets it be killed again, and no more than that.
    ///
    /// # Errors
    /// When that cannot be written down.
    pub fn let_die(&self) -> io::Result<()> {
        fs::write(&self.0, "")
    }

    /// Takes it away. Idempotent.
    ///
    /// # Errors
    /// When it stays.
    pub fn take_away(&self) -> io::Result<()> {
        match fs::remove_file(&self.0) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fences_stand_as_long_as_their_pods_are_there() {
        let folder = tempfile::tempdir().unwrap();
        let (fences, kubelet) = (folder.path().join("fenced"), folder.path().join("kubelet"));
        Fence::prune(&fences, &kubelet).unwrap();
        for uid in ["there", "gone"] {
            Fence(fences.join(uid)).put_up().unwrap();
            Fence(fences.join(uid)).put_up().unwrap();
        }
        fs::create_dir_all(kubelet.join("pods/there")).unwrap();
        Fence::prune(&fences, &kubelet).unwrap();
        assert!(fences.join("there").exists() && !fences.join("gone").exists());
        Fence(fences.join("there")).keep().unwrap();
        assert_eq!(fs::read_to_string(fences.join("there")).unwrap(), KEEP);
        Fence(fences.join("there")).let_die().unwrap();
        assert_eq!(fs::read_to_string(fences.join("there")).unwrap(), "");
        Fence(fences.join("there")).take_away().unwrap();
        Fence(fences.join("there")).take_away().unwrap();
        assert!(!fences.join("there").exists());
    }
}
