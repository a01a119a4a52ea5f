//! The core with the inventory as it is now.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use podferry_common::chain;

use super::Core;
use crate::cluster::Inventory;

/// The core, and the inventory file that it follows: an edited file counts from the next request on.
#[derive(Clone)]
pub struct Current(Arc<Mutex<Followed>>);

struct Followed {
    core: Core,
    path: PathBuf,
    /// Of the file that was read last, or of an older one: looked at before the reading, so that a change in between is
    /// read once more instead of never. `None`: not known.
    version: Option<FileVersion>,
}

/// Tells one version of a file from the next.
#[derive(Clone, Copy, PartialEq, Eq)]
struct FileVersion {
    inode: u64,
    bytes: u64,
    seconds: i64,
    nanoseconds: i64,
}

impl Current {
    /// A core whose inventory was read from `path`, some time ago: the first request reads it again.
    pub fn new(core: Core, path: PathBuf) -> Self {
        Self(Arc::new(Mutex::new(Followed { core, path, version: None })))
    }

    /// The core. A changed inventory that is wrong is logged once, and the last right one stays.
    pub fn get(&self) -> Core {
        let mut followed = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let version = version_of(&followed.path);
        if version.is_some() && version != followed.version {
            followed.version = version;
            match Inventory::load(&followed.path) {
                Ok(inventory) => followed.core = followed.core.with_inventory(inventory),
                Err(error) => {
                    tracing::error!(error = chain(&error), "the changed inventory is wrong; the old one stays");
                }
            }
        }
        followed.core.clone()
    }
}

fn version_of(path: &std::path::Path) -> Option<FileVersion> {
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
    use crate::runner::Deadlines;
    use crate::store::Store;
    use crate::testing;

    async fn workloads(current: &Current) -> Vec<String> {
        let all = current.get().workloads("").await.unwrap();
        all.into_iter().map(|workload| workload.name).collect()
    }

    #[tokio::test]
    async fn a_change_while_the_coordinator_starts_counts() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("inventory.toml");
        fs::write(&path, "[[workloads]]\nname = \"early\"\n").unwrap();
        let inventory = Inventory::load(&path).unwrap();
        fs::write(&path, "[[workloads]]\nname = \"later\"\n").unwrap();
        let store = Store::open(&folder.path().join("state")).unwrap();
        let agents = testing::agents(folder.path());
        let runner = testing::runner(&agents, &store);
        let current = Current::new(Core::new(inventory, agents, store, runner, Deadlines::default()), path.clone());
        assert_eq!(workloads(&current).await, ["later"]);
        fs::write(&path, "[[workloads]]\nname = \"LATEST\"\n").unwrap();
        assert_eq!(workloads(&current).await, ["later"], "a wrong one does not count");
        fs::write(&path, "[[workloads]]\nname = \"the-latest\"\n").unwrap();
        assert_eq!(workloads(&current).await, ["the-latest"]);
    }
}
