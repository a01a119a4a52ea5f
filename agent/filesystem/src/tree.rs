//! Directories without surprises: opening below a root, extended attributes, deleting, space.

use std::ffi::{CString, OsStr};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{self, AtFlags, FileType, Mode, OFlags, RawDir, ResolveFlags};
use rustix::io::Errno;

use crate::error::{Error, Result, failed};
use crate::format::MAX_DEPTH;
use crate::mountinfo;

/// Opens a directory itself: no symbolic link in its last component.
pub(crate) fn open_root(dir: &Path) -> Result<OwnedFd> {
    fs::open(dir, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
        .map_err(failed("open the directory", dir))
}

/// Opens what is below a directory and on its mount, following no link.
pub(crate) fn open_beneath(dir: impl AsFd, path: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let resolve =
        ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    loop {
        // The kernel answers EAGAIN when a rename elsewhere might have let the lookup escape.
        match fs::openat2(dir.as_fd(), path, flags | OFlags::CLOEXEC, Mode::empty(), resolve) {
            Err(Errno::AGAIN | Errno::INTR) => {}
            result => return result,
        }
    }
}

/// The names in a directory, sorted, so that the same tree always makes the same stream.
pub(crate) fn names(dir: impl AsFd) -> rustix::io::Result<Vec<CString>> {
    let mut buffer = vec![MaybeUninit::uninit(); 32 * 1024];
    let mut entries = RawDir::new(dir, &mut buffer);
    let mut names = Vec::new();
    while let Some(entry) = entries.next() {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            names.push(entry.file_name().to_owned());
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// Visits every regular file below a directory, on its file system and no deeper than `MAX_DEPTH`, while others may change the
/// tree: what vanishes or cannot be opened is left out. Only `visit` can fail.
pub(crate) fn each_file(
    root: OwnedFd,
    mut visit: impl FnMut(BorrowedFd<'_>, &OsStr, &fs::Stat) -> Result<()>,
) -> Result<()> {
    let open = |dir: OwnedFd| Some((names(&dir).ok()?.into_iter(), dir));
    let mut levels: Vec<_> = open(root).into_iter().collect();
    while let Some((names, dir)) = levels.last_mut() {
        let Some(name) = names.next() else {
            levels.pop();
            continue;
        };
        let name = OsStr::from_bytes(name.to_bytes());
        let Ok(stat) = fs::statat(&*dir, name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => visit(dir.as_fd(), name, &stat)?,
            FileType::Directory if levels.len() <= MAX_DEPTH => {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY;
                let below = levels.last().and_then(|(_, dir)| open_beneath(dir, Path::new(name), flags).ok());
                levels.extend(below.and_then(open));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Opens a regular file for reading: no link, and nothing that would have to be waited for, if it has taken the file's place.
pub(crate) fn open_file(dir: impl AsFd, name: &OsStr) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    fs::openat(dir, name, flags, Mode::empty())
}

/// A path that names an entry of an open directory for the calls that take no descriptor (`lgetxattr`, `lsetxattr`).
pub(crate) fn by_descriptor(dir: BorrowedFd<'_>, name: &OsStr) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd())).join(name)
}

/// Writes all of the bytes.
pub(crate) fn write_at(file: impl AsFd, bytes: &[u8], offset: u64) -> rustix::io::Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        done += rustix::io::pwrite(&file, &bytes[done..], offset + done as u64)?;
    }
    Ok(())
}

/// Bytes that an unprivileged writer could still put on the file system of this directory.
pub fn free_bytes(dir: &Path) -> Result<u64> {
    let stat = fs::statvfs(dir).map_err(failed("measure the space of", dir))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Up to so many files and directories are written to the disk one by one. The whole file system, which may have much else
/// to write, takes longer than these.
const SYNCED_ALONE: usize = 64;

/// Writes all that is in a directory to its disk, so that a layer outlives a crash of the node. What appears or goes
/// meanwhile may be missed.
pub fn sync(dir: &Path) -> Result<()> {
    let mut entries = vec![dir.to_owned()];
    if !collect_few(dir, &mut entries) {
        return fs::syncfs(open_root(dir)?).map_err(failed("sync", dir));
    }
    if entries.len() == 1 {
        return Ok(());
    }
    for path in &entries {
        // Sockets, fifos and links have no content, and opening them may wait for ever: their directory holds all of them.
        let kind = std::fs::symlink_metadata(path).map(|now| now.file_type());
        if kind.is_ok_and(|kind| kind.is_file() || kind.is_dir()) {
            let file = fs::open(path, OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty());
            match file.and_then(fs::fsync) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(error) => return Err(failed("sync", path)(error)),
            }
        }
    }
    Ok(())
}

/// Adds everything below a directory. False when that is more than [`SYNCED_ALONE`], or cannot be read.
fn collect_few(dir: &Path, entries: &mut Vec<PathBuf>) -> bool {
    let Ok(here) = std::fs::read_dir(dir) else { return false };
    for entry in here {
        let Ok(entry) = entry else { return false };
        entries.push(entry.path());
        let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if entries.len() > SYNCED_ALONE || (is_dir && !collect_few(&entry.path(), entries)) {
            return false;
        }
    }
    true
}

/// Deletes all that is in a directory, and keeps the directory. Symbolic links are deleted, not followed. When anything
/// is mounted below, nothing is deleted: it would empty what is mounted there (a container's own root, for example).
pub fn wipe(dir: &Path) -> Result<()> {
    let real = dir.canonicalize().map_err(|source| Error::Io { doing: "find", path: dir.to_owned(), source })?;
    if let Some(path) = mountinfo::mount_below(&real)? {
        return Err(Error::Mounted { path });
    }
    let root = open_root(&real)?;
    // What lies deeper than descriptors reach is moved up, and wiped in the next round.
    while wipe_below(&root, &real)? {}
    Ok(())
}

/// Levels of directories that a wipe keeps open.
const WIPE_DEPTH: usize = 128;

struct Level {
    dir: OwnedFd,
    path: PathBuf,
    names: std::vec::IntoIter<CString>,
}

impl Level {
    fn of(dir: OwnedFd, path: PathBuf) -> Result<Self> {
        let names = names(&dir).map_err(failed("list", &path))?.into_iter();
        Ok(Self { dir, path, names })
    }
}

/// One round; true when something too deep was moved up into the root.
fn wipe_below(root: &OwnedFd, path: &Path) -> Result<bool> {
    let mut moved = 0;
    let start = open_beneath(root, Path::new(""), OFlags::RDONLY | OFlags::DIRECTORY).map_err(failed("open", path))?;
    let mut levels = vec![Level::of(start, path.to_owned())?];
    while let Some(level) = levels.last_mut() {
        let Some(name) = level.names.next() else {
            close_level(&mut levels)?;
            continue;
        };
        let below = level.path.join(OsStr::from_bytes(name.to_bytes()));
        match fs::unlinkat(&level.dir, &name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => continue,
            Err(Errno::ISDIR) => {}
            Err(errno) => return Err(failed("delete", &below)(errno)),
        }
        if levels.len() >= WIPE_DEPTH {
            move_up(&levels, &name, root, &mut moved)?;
            continue;
        }
        let parent = levels.last().map_or(root, |level| &level.dir);
        let dir =
            open_beneath(parent, Path::new(OsStr::from_bytes(name.to_bytes())), OFlags::RDONLY | OFlags::DIRECTORY)
                .map_err(|errno| match errno {
                    Errno::XDEV => Error::Mounted { path: below.clone() },
                    errno => failed("open the directory", &below)(errno),
                })?;
        levels.push(Level::of(dir, below)?);
    }
    Ok(moved > 0)
}

/// Leaves the deepest directory, which is empty now, and deletes it unless it is the root.
fn close_level(levels: &mut Vec<Level>) -> Result<()> {
    let Some(done) = levels.pop() else { return Ok(()) };
    let (Some(parent), Some(name)) = (levels.last(), done.path.file_name()) else { return Ok(()) };
    match fs::unlinkat(&parent.dir, name, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(failed("delete the directory", &done.path)(errno)),
    }
}

fn move_up(levels: &[Level], name: &CString, root: &OwnedFd, moved: &mut u64) -> Result<()> {
    let Some(level) = levels.last() else { return Ok(()) };
    loop {
        let parked = format!(".podferry-wipe-{}-{moved}", std::process::id());
        *moved += 1;
        match fs::renameat_with(&level.dir, name, root, &parked, fs::RenameFlags::NOREPLACE) {
            Ok(()) => return Ok(()),
            Err(Errno::EXIST) => {}
            Err(errno) => return Err(failed("move up", &level.path)(errno)),
        }
    }
}

/// Whether a file is a whiteout: a character device with the number 0:0.
pub(crate) fn is_whiteout(stat: &fs::Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == 0
}
