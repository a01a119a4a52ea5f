//! A tree as a value, to compare two of them.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// All that a move has to keep of one name.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) mode: u32,
    pub(crate) owner: (u32, u32),
    pub(crate) mtime: (i64, i64),
    pub(crate) device: u64,
    pub(crate) size: u64,
    pub(crate) content: Vec<u8>,
    pub(crate) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The first path with this inode.
    pub(crate) same_as: PathBuf,
}

/// Every name below a directory, and the directory itself.
pub(crate) fn tree(root: &Path) -> BTreeMap<PathBuf, Seen> {
    let mut seen = BTreeMap::new();
    let mut inodes = BTreeMap::new();
    visit(root, Path::new(""), &mut seen, &mut inodes);
    seen
}

fn visit(root: &Path, relative: &Path, seen: &mut BTreeMap<PathBuf, Seen>, inodes: &mut BTreeMap<u64, PathBuf>) {
    let path = if relative.as_os_str().is_empty() { root.to_owned() } else { root.join(relative) };
    let metadata = path.symlink_metadata().unwrap();
    let kind = metadata.file_type();
    let content = if kind.is_symlink() {
        path.read_link().unwrap().into_os_string().into_encoded_bytes()
    } else if kind.is_file() {
        std::fs::read(&path).unwrap()
    } else {
        Vec::new()
    };
    // overlayfs shares one inode between its whiteouts, which no one can see.
    let whiteout = metadata.rdev() == 0 && metadata.mode() & 0o170_000 == 0o020_000;
    let same_as = if whiteout {
        relative.to_owned()
    } else {
        inodes.entry(metadata.ino()).or_insert_with(|| relative.to_owned()).clone()
    };
    let entry = Seen {
        mode: metadata.mode(),
        owner: (metadata.uid(), metadata.gid()),
        mtime: (metadata.mtime(), metadata.mtime_nsec()),
        device: metadata.rdev(),
        size: if kind.is_dir() { 0 } else { metadata.size() },
        content,
        xattrs: xattrs(&path),
        same_as,
    };
    seen.insert(relative.to_owned(), entry);
    if kind.is_dir() {
        let mut names: Vec<OsString> = path.read_dir().unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        for name in names {
            visit(root, &relative.join(name), seen, inodes);
        }
    }
}

pub(crate) fn xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut list = vec![0; 65536];
    let length = rustix::fs::llistxattr(path, list.as_mut_slice()).unwrap();
    let names = list[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty());
    let private = |name: &[u8]| {
        name.starts_with(b"trusted.overlay.")
            && !matches!(name, b"trusted.overlay.opaque" | b"trusted.overlay.redirect")
    };
    names
        .filter(|name| !private(name))
        .map(|name: &[u8]| {
            let mut value = vec![0; 65536];
            let length = rustix::fs::lgetxattr(path, name, value.as_mut_slice()).unwrap();
            (name.to_vec(), value[..length].to_vec())
        })
        .collect()
}
