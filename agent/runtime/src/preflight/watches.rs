//! Watches on files (inotify, fanotify) that CRIU cannot name.
//!
//! The kernel knows a watched file by its inode alone. CRIU opens it by its handle and asks for its name; where the
//! filesystem does not open files by handles, as overlays by default, it looks for the inode in some folders that daemons are
//! known to watch (`criu/irmap.c`), and fails the dump when it is not there.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{major, minor};

use super::mounts::Known;
use super::{Finding, FindingKind};

/// Where CRIU looks, with all that is below.
const SEARCHED: [&str; 8] = [
    "etc",
    "var/spool",
    "var/log",
    "usr/share/dbus-1/services",
    "usr/share/dbus-1/system-services",
    "var/lib/polkit-1/localauthority",
    "usr/share/polkit-1/actions",
    "lib/udev",
];
/// More files are not looked through: whether CRIU finds it is then left to CRIU.
const MOST_FILES: usize = 50_000;

/// A watched file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Watched {
    major: u32,
    minor: u32,
    inode: u64,
}

/// Judges an inotify or fanotify descriptor by its `fdinfo`.
pub(super) fn judge(fdinfo: &str, mounts: &Known) -> Option<Finding> {
    let lost = fdinfo.lines().filter_map(watched).find(|watched| {
        mounts.is_without_handles(watched.major, watched.minor) && !is_found(mounts.root(), *watched)
    })?;
    Some(Finding::blocking(
        FindingKind::FileWatch,
        format!(
            "watches inode {} of the container's overlay (inotify or fanotify), which CRIU cannot name",
            lost.inode
        ),
        "let the program watch a volume or a tmpfs, or look at the file from time to time instead (an option of many)",
    ))
}

/// The line of a watch on an inode: numbers are hexadecimal, and the device is the kernel's own (20 bits of minor number).
fn watched(line: &str) -> Option<Watched> {
    if !line.starts_with("inotify wd:") && !line.starts_with("fanotify ino:") {
        return None;
    }
    let field = |name: &str| {
        let value = line.split(' ').find_map(|word| word.strip_prefix(name))?;
        u64::from_str_radix(value, 16).ok()
    };
    let device = u32::try_from(field("sdev:")?).ok()?;
    Some(Watched { major: device >> 20, minor: device & 0xf_ffff, inode: field("ino:")? })
}

/// Whether CRIU finds a file's name by searching.
fn is_found(root: &Path, watched: Watched) -> bool {
    let is_it = |path: &Path| fs::symlink_metadata(path).is_ok_and(|metadata| watched.is(&metadata));
    let mut left = MOST_FILES;
    is_it(&root.join(".")) || SEARCHED.iter().any(|folder| search(&root.join(folder), watched, &mut left))
}

fn search(path: &Path, watched: Watched, left: &mut usize) -> bool {
    let Ok(metadata) = fs::symlink_metadata(path) else { return false };
    if watched.is(&metadata) || *left == 0 {
        return true;
    }
    *left -= 1;
    if !metadata.is_dir() {
        return false;
    }
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries.into_iter().any(|entry| search(&entry.path(), watched, left))
}

impl Watched {
    fn is(self, metadata: &fs::Metadata) -> bool {
        let device = metadata.dev();
        (major(device), minor(device), metadata.ino()) == (self.major, self.minor, self.inode)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_lines_are_understood() {
        let line = "inotify wd:1 ino:9e7e sdev:800013 mask:800afce ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:7e9e";
        assert_eq!(watched(line), Some(Watched { major: 8, minor: 19, inode: 0x9e7e }));
        let line =
            "fanotify ino:4f969 sdev:2e mflags:0 mask:3b ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:69";
        assert_eq!(watched(line), Some(Watched { major: 0, minor: 46, inode: 0x4f969 }));
        for other in ["fanotify flags:10 event-flags:0", "fanotify mnt_id:12 mflags:0 mask:3b", "pos:\t0", "ino:\t1057"]
        {
            assert_eq!(watched(other), None, "{other}");
        }
    }
}
