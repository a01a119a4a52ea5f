//! Noticing that a file has changed.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// A file that is looked at again and again.
pub(crate) struct Follower {
    path: PathBuf,
    /// Of the file that was read last, or of an older one: looked at before the reading, so that a change in between is
    /// read once more instead of never. `None`: not looked at yet.
    seen: Option<Version>,
}

/// Tells one version of a file from the next; `None` for one that is not there.
type Version = Option<FileVersion>;

#[derive(Clone, Copy, PartialEq, Eq)]
struct FileVersion {
    inode: u64,
    bytes: u64,
    seconds: i64,
    nanoseconds: i64,
}

impl Follower {
    /// A file that counts as changed when it is looked at first.
    pub(crate) fn new(path: PathBuf) -> Self {
        Self { path, seen: None }
    }

    /// The file.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is another one than at the last look, or has gone since then.
    pub(crate) fn has_changed(&mut self) -> bool {
        let now = Some(version_of(&self.path));
        let changed = now != self.seen;
        self.seen = now;
        changed
    }
}

fn version_of(path: &Path) -> Version {
    let metadata = fs::metadata(path).ok()?;
    Some(FileVersion {
        inode: metadata.ino(),
        bytes: metadata.len(),
        seconds: metadata.mtime(),
        nanoseconds: metadata.mtime_nsec(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_version_is_noticed_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        fs::write(&path, "1").unwrap();
        let mut follower = Follower::new(path.clone());
        assert!(follower.has_changed() && !follower.has_changed());
        fs::write(&path, "22").unwrap();
        assert!(follower.has_changed() && !follower.has_changed());
        fs::remove_file(&path).unwrap();
        assert!(follower.has_changed() && !follower.has_changed(), "one that has gone");
    }
}
