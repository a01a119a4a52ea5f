//! A place to pack and unpack in, and a tree as a value, to compare two of them.
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use podferry_tar::arguments::{CREATE, EXTRACT};
use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, chmodat, mknodat, utimensat};
use tempfile::TempDir;

/// Where the system's own programs are.
pub(crate) const SYSTEM: &str = "/usr/bin:/bin";

/// A folder on a tmpfs, where it is known which files have holes. All in it goes with it.
pub(crate) struct Place {
    folder: TempDir,
}

/// Which tar does it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum By {
    /// Ours, with no other on PATH: it cannot but do it itself.
    Ours,
    /// Ours, with the system's behind it on PATH, and between them one that notes that it was called.
    OursOrReal,
    /// The system's.
    Gnu,
}

impl Place {
    pub(crate) fn new() -> Self {
        let folder = tempfile::Builder::new().prefix("podferry-tar-").tempdir_in("/dev/shm").unwrap();
        let place = Self { folder };
        fs::create_dir(place.path("ours")).unwrap();
        symlink(env!("CARGO_BIN_EXE_podferry-tar"), place.path("ours/tar")).unwrap();
        fs::create_dir(place.path("spy")).unwrap();
        let script =
            format!("#!/bin/sh\necho \"$0\" \"$@\" >>'{}'\nexec /usr/bin/tar \"$@\"\n", place.path("calls").display());
        fs::write(place.path("spy/tar"), script).unwrap();
        fs::set_permissions(place.path("spy/tar"), PermissionsExt::from_mode(0o755)).unwrap();
        place
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A new empty directory.
    pub(crate) fn directory(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir(&path).unwrap();
        path
    }

    /// How many times the real tar was called by ours.
    pub(crate) fn calls(&self) -> usize {
        fs::read_to_string(self.path("calls")).map_or(0, |calls| calls.lines().count())
    }

    pub(crate) fn command(&self, by: By) -> Command {
        let (program, path) = match by {
            By::Ours => (self.path("ours/tar"), self.path("ours").into_os_string()),
            By::OursOrReal => {
                let mut path = self.path("ours").into_os_string();
                for more in [self.path("spy").as_os_str(), SYSTEM.as_ref()] {
                    path.push(":");
                    path.push(more);
                }
                (self.path("ours/tar"), path)
            }
            By::Gnu => (PathBuf::from("/usr/bin/tar"), SYSTEM.into()),
        };
        let mut command = Command::new(program);
        command.arg0("tar").env("PATH", path);
        command
    }

    /// Packs as CRIU does, and returns the image.
    pub(crate) fn pack(&self, by: By, tree: &Path) -> PathBuf {
        let image = self.path("image.tar.gz");
        done(&self.try_pack(by, tree, &image));
        image
    }

    pub(crate) fn try_pack(&self, by: By, tree: &Path, image: &Path) -> Output {
        let mut command = self.command(by);
        command.args(CREATE).stdin(File::open(tree).unwrap()).stdout(File::create(image).unwrap());
        command.stderr(std::process::Stdio::piped()).spawn().unwrap().wait_with_output().unwrap()
    }

    /// Unpacks as CRIU does.
    pub(crate) fn unpack(&self, by: By, image: &Path, directory: &Path) {
        done(&self.try_unpack(by, File::open(image).unwrap(), directory));
    }

    pub(crate) fn try_unpack(&self, by: By, image: File, directory: &Path) -> Output {
        self.command(by).args(EXTRACT).arg(directory).stdin(image).output().unwrap()
    }
}

pub(crate) fn done(output: &Output) {
    assert!(output.status.success(), "{}: {}", output.status, log(output));
}

pub(crate) fn log(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// All that a move has to keep of one name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) mode: u32,
    pub(crate) owner: (u32, u32),
    pub(crate) mtime: (i64, i64),
    pub(crate) device: u64,
    pub(crate) content: Vec<u8>,
    pub(crate) names: u64,
}

/// Every name below a directory, and the directory itself.
pub(crate) fn tree(root: &Path) -> BTreeMap<PathBuf, Seen> {
    let mut seen = BTreeMap::new();
    visit(root, Path::new("."), &mut seen);
    seen
}

/// The tree as GNU tar's own format keeps it.
pub(crate) fn in_whole_seconds(mut tree: BTreeMap<PathBuf, Seen>) -> BTreeMap<PathBuf, Seen> {
    for seen in tree.values_mut() {
        seen.mtime.1 = 0;
    }
    tree
}

fn visit(root: &Path, relative: &Path, seen: &mut BTreeMap<PathBuf, Seen>) {
    let path = root.join(relative);
    let metadata = path.symlink_metadata().unwrap();
    let kind = metadata.file_type();
    let content = if kind.is_symlink() {
        path.read_link().unwrap().into_os_string().into_encoded_bytes()
    } else if kind.is_file() {
        fs::read(&path).unwrap()
    } else {
        Vec::new()
    };
    let entry = Seen {
        mode: metadata.mode(),
        owner: (metadata.uid(), metadata.gid()),
        mtime: (metadata.mtime(), metadata.mtime_nsec()),
        device: metadata.rdev(),
        content,
        names: if kind.is_dir() { 1 } else { metadata.nlink() },
    };
    seen.insert(relative.to_owned(), entry);
    if kind.is_dir() {
        let names: Vec<OsString> = path.read_dir().unwrap().map(|entry| entry.unwrap().file_name()).collect();
        for name in names {
            visit(root, &relative.join(name), seen);
        }
    }
}

pub(crate) fn node(path: &Path, kind: FileType, device: u64) {
    mknodat(CWD, path, kind, Mode::empty(), device).unwrap();
}

/// Gives a file its owner, mode and time. A directory needs it behind what is made in it.
pub(crate) fn dress(path: &Path, owner: (u32, u32), mode: u32, mtime: (i64, i64)) {
    std::os::unix::fs::lchown(path, Some(owner.0), Some(owner.1)).unwrap();
    if !path.symlink_metadata().unwrap().file_type().is_symlink() {
        chmodat(CWD, path, Mode::from_raw_mode(mode), AtFlags::empty()).unwrap();
    }
    let time = Timespec { tv_sec: mtime.0, tv_nsec: mtime.1 };
    let times = Timestamps { last_access: time, last_modification: time };
    utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}
