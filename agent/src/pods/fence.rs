//! Keeps the kubelet from starting what moves away, on a disk: it starts pods again after a reboot, too.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use podferry_runtime::Container;
use podferry_runtime::wrapper::PodContainer;

/// The fence around one pod. [`podferry_runtime::wrapper`] starts nothing behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fence(PathBuf);

impl Fence {
    /// That of a container's pod; none when it is no pod's.
    pub fn of(dir: &Path, container: &Container) -> Option<Self> {
        let pod = PodContainer::of(&container.annotations)?;
        // It is a file's name here, and comes from the API server.
        let plain = !pod.uid.is_empty() && pod.uid.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        plain.then(|| Self(dir.join(pod.uid)))
    }

    /// Puts it up. Idempotent.
    ///
    /// # Errors
    /// When that cannot be written down.
    pub fn put_up(&self) -> io::Result<()> {
        if let Some(dir) = self.0.parent() {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        }
        fs::File::create(&self.0)?.sync_all()
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
