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
    /// A core whose inventory was read from `path`.
    pub fn new(core: Core, path: PathBuf) -> Self {
        let version = version_of(&path);
        Self(Arc::new(Mutex::new(Followed { core, path, version })))
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
