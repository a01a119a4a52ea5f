//! Making a tree from a stream that a hostile peer may have written.
//!
//! What keeps it inside its directory: each entry is made by its last component in the open directory of its parent,
//! which this process made itself and found by no link; nothing that exists is ever opened, replaced or followed. Hard
//! links find their target with `openat2(RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS)`.
//!
//! The tree holds set-user-id files of the container's: the directory above it must be closed to other users.

use std::ffi::OsStr;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use prost::Message;
use rustix::fs::{self, AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

use crate::attributes::{Fate, fate};
use crate::error::{Error, Result, beyond, failed, refused};
use crate::format::{
    DATA, END, ENTRY, Entry, FILE_END, FrameReader, Kind, MAGIC, MAGIC_WITH_SEEDS, MAX_DEPTH, MAX_PATH, MAX_XATTRS,
    Totals, split_u64,
};
use crate::seed_store::SeedStore;
use crate::tree::{by_descriptor, names, open_beneath, open_root, write_at};

/// The longest name of one component (`NAME_MAX`).
const NAME_MAX: usize = 255;
/// What an entry's fixed fields and their tags take, generously.
const FIXED_FIELDS: usize = 1024;

/// What a receiver takes at most. What is beyond is refused before memory or space is taken for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of file content altogether; [`free_bytes`](crate::free_bytes) is a good choice.
    pub max_bytes: u64,
    /// The size of one file, holes included, in bytes.
    pub max_file_bytes: u64,
    /// Entries altogether.
    pub max_entries: u64,
    /// The length of a path or of a link's text, in bytes.
    pub max_path: usize,
    /// Nested directories; each one costs a file descriptor.
    pub max_depth: usize,
    /// Names and values of one entry's extended attributes, in bytes.
    pub max_xattr_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_bytes: 256 << 30,
            max_file_bytes: 16 << 40,
            max_entries: 10_000_000,
            max_path: MAX_PATH,
            max_depth: MAX_DEPTH,
            max_xattr_bytes: MAX_XATTRS,
        }
    }
}

/// What a stream held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UnpackStats {
    /// Entries of all kinds, the root directory included.
    pub entries: u64,
    /// Bytes of file content written.
    pub data_bytes: u64,
}

/// Makes the tree that a stream describes in an empty directory, which takes the metadata of the stream's root.
///
/// On an error the directory holds a part of the tree; [`wipe`](crate::wipe) clears it. The stream is read up to its end
/// frame and not a byte further.
pub fn unpack(reader: impl Read, dest: &Path, limits: &Limits) -> Result<UnpackStats> {
    unpack_with_seeds(reader, dest, limits, None)
}

/// As [`unpack`], of a layer whose files may refer to seeds that came before. The bytes of all seeds count as content; the store goes in
/// the end, with those that no entry refers to. Its folder is all that may be in the directory.
pub fn unpack_with_seeds(
    reader: impl Read,
    dest: &Path,
    limits: &Limits,
    seeds: Option<SeedStore>,
) -> Result<UnpackStats> {
    let root = open_root(dest)?;
    let own = seeds.as_ref().and_then(|seeds| seeds.name_in(dest));
    let in_it = names(&root).map_err(failed("list", dest))?;
    if in_it.iter().any(|name| Some(OsStr::from_bytes(name.to_bytes())) != own) {
        return Err(Error::NotEmpty { dir: dest.to_owned() });
    }
    let longest = limits.max_xattr_bytes + 2 * limits.max_path + FIXED_FIELDS;
    let frames = FrameReader::start(reader, longest, &[MAGIC, MAGIC_WITH_SEEDS])?;
    let seeded_bytes = seeds.as_ref().map_or(0, SeedStore::bytes);
    let stats = UnpackStats::default();
    Unpacker { root, dest, limits, levels: Vec::new(), file: None, stats, seeds, seeded_bytes }.run(frames)
}

/// A directory whose content is being received; it gets its metadata when that is complete, because writing into it
/// would change its time, and its default ACL would change what is made in it.
struct Level {
    dir: OwnedFd,
    entry: Entry,
}

/// A regular file whose data is being received.
struct Open {
    file: OwnedFd,
    entry: Entry,
    position: u64,
    /// How large it is, when its content is a seed.
    seeded: Option<u64>,
}

struct Unpacker<'a> {
    root: OwnedFd,
    dest: &'a Path,
    limits: &'a Limits,
    levels: Vec<Level>,
    file: Option<Open>,
    stats: UnpackStats,
    seeds: Option<SeedStore>,
    /// What all seeds hold.
    seeded_bytes: u64,
}

impl Unpacker<'_> {
    fn run<R: Read>(mut self, mut frames: FrameReader<R>) -> Result<UnpackStats> {
        loop {
            match frames.next()? {
                (ENTRY, payload) => self.entry(decode(payload)?)?,
                (DATA, payload) => self.data(payload)?,
                (FILE_END, payload) => self.file_end(payload)?,
                (END, payload) => return self.end(decode(payload)?),
                _ => return Err(refused(b"", "a frame of unknown kind")),
            }
        }
    }

    fn entry(&mut self, entry: Entry) -> Result<()> {
        if let Some(open) = &self.file {
            return Err(refused(&open.entry.path, "the next entry comes before this file's end"));
        }
        check(&entry, self.limits)?;
        self.stats.entries += 1;
        if self.stats.entries > self.limits.max_entries {
            return Err(beyond(&entry.path, "entries", self.limits.max_entries));
        }
        if self.stats.entries == 1 {
            return self.enter_root(entry);
        }
        let (parent, name) = split(&entry.path)?;
        let name = OsStr::from_bytes(name).to_owned();
        self.leave_until(parent)?;
        self.create(entry, &name)
    }

    fn enter_root(&mut self, entry: Entry) -> Result<()> {
        if !entry.path.is_empty() || entry.kind() != Kind::Directory {
            return Err(refused(&entry.path, "the first entry must be the root directory"));
        }
        let dir = self.root.try_clone().map_err(Error::Stream)?;
        self.levels.push(Level { dir, entry });
        Ok(())
    }

    /// Ends directories until the given one is the current one.
    fn leave_until(&mut self, parent: &[u8]) -> Result<()> {
        while let Some(level) = self.levels.pop() {
            if level.entry.path == parent {
                self.levels.push(level);
                return Ok(());
            }
            self.leave(&level)?;
        }
        Err(refused(parent, "an entry comes out of order: its directory is not the one being received"))
    }

    fn create(&mut self, entry: Entry, name: &OsStr) -> Result<()> {
        let path = self.shown(&entry);
        let Some(level) = self.levels.last() else { return Err(refused(&entry.path, "an entry without a directory")) };
        let made = |result: rustix::io::Result<()>| match result {
            Err(Errno::EXIST) => Err(refused(&entry.path, "the same name comes twice")),
            result => result.map_err(failed("create", &path)),
        };
        let node = |kind| fs::mknodat(&level.dir, name, kind, Mode::empty(), 0);
        match entry.kind() {
            Kind::Directory => {
                made(fs::mkdirat(&level.dir, name, Mode::RWXU))?;
                return self.enter(entry, name);
            }
            Kind::Regular if entry.seed != 0 => {
                let unknown = || refused(&entry.path, "a seed that did not come, or is another file already");
                let seed = self
                    .seeds
                    .as_mut()
                    .map(|seeds| seeds.take(entry.seed))
                    .transpose()?
                    .flatten()
                    .ok_or_else(unknown)?;
                made(seed.rename(&level.dir, name))?;
                self.file = Some(Open { file: seed.file, entry, position: 0, seeded: Some(seed.size) });
                return Ok(());
            }
            Kind::Regular => {
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let opened = fs::openat(&level.dir, name, flags, Mode::RUSR | Mode::WUSR);
                let file = match opened {
                    Ok(file) => file,
                    Err(errno) => return made(Err(errno)),
                };
                self.file = Some(Open { file, entry, position: 0, seeded: None });
                return Ok(());
            }
            Kind::HardLink => return made(self.link(level, &entry, name)?),
            Kind::Symlink => made(fs::symlinkat(OsStr::from_bytes(&entry.target), &level.dir, name))?,
            Kind::Fifo => made(node(FileType::Fifo))?,
            Kind::Socket => made(node(FileType::Socket))?,
            Kind::Whiteout => made(node(FileType::CharacterDevice))?,
            Kind::Unspecified => return Err(refused(&entry.path, "an entry of unknown kind")),
        }
        let by_name = by_descriptor(level.dir.as_fd(), name);
        self.node_metadata(&level.dir, name, &by_name, &entry)
    }

    fn enter(&mut self, entry: Entry, name: &OsStr) -> Result<()> {
        if self.levels.len() > self.limits.max_depth {
            return Err(beyond(&entry.path, "nested directories", self.limits.max_depth as u64));
        }
        let path = self.shown(&entry);
        let parent = self.levels.last().map_or(&self.root, |level| &level.dir);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let dir = open_beneath(parent, Path::new(name), flags).map_err(failed("open", &path))?;
        self.levels.push(Level { dir, entry });
        Ok(())
    }

    /// The outer result is about the target, the inner one about the new name.
    fn link(&self, level: &Level, entry: &Entry, name: &OsStr) -> Result<rustix::io::Result<()>> {
        let (parent, target) = split(&entry.target)?;
        let target = OsStr::from_bytes(target);
        let unknown = |_| refused(&entry.path, "a hard link to what was not sent before");
        let parent = Path::new(OsStr::from_bytes(parent));
        let dir = open_beneath(&self.root, parent, OFlags::PATH | OFlags::DIRECTORY).map_err(unknown)?;
        let stat = fs::statat(&dir, target, AtFlags::SYMLINK_NOFOLLOW).map_err(unknown)?;
        if matches!(FileType::from_raw_mode(stat.st_mode), FileType::Directory | FileType::CharacterDevice) {
            return Err(refused(&entry.path, "a hard link to a directory or whiteout"));
        }
        Ok(fs::linkat(dir, target, &level.dir, name, AtFlags::empty()))
    }

    fn data(&mut self, payload: &[u8]) -> Result<()> {
        let (offset, bytes) = split_u64(payload)?;
        let Some(open) = &mut self.file else { return Err(refused(b"", "data without a file")) };
        if offset < open.position || bytes.is_empty() {
            return Err(refused(&open.entry.path, "data that is empty or goes backwards"));
        }
        if open.seeded.is_some() {
            return Err(refused(&open.entry.path, "data of a file whose content is a seed"));
        }
        let end = offset.saturating_add(bytes.len() as u64);
        if end > self.limits.max_file_bytes {
            return Err(beyond(&open.entry.path, "bytes in one file", self.limits.max_file_bytes));
        }
        self.stats.data_bytes += bytes.len() as u64;
        if self.stats.data_bytes.saturating_add(self.seeded_bytes) > self.limits.max_bytes {
            return Err(beyond(&open.entry.path, "bytes of content", self.limits.max_bytes));
        }
        open.position = end;
        let shown = || self.dest.join(OsStr::from_bytes(&open.entry.path));
        write_at(&open.file, bytes, offset).map_err(|errno| failed("write", &shown())(errno))
    }

    fn file_end(&mut self, payload: &[u8]) -> Result<()> {
        let (size, _) = split_u64(payload)?;
        let Some(open) = self.file.take() else { return Err(refused(b"", "the end of a file that was not begun")) };
        if size < open.position {
            return Err(refused(&open.entry.path, "a file is shorter than its data"));
        }
        if size > self.limits.max_file_bytes {
            return Err(beyond(&open.entry.path, "bytes in one file", self.limits.max_file_bytes));
        }
        if open.seeded.is_some_and(|seeded| seeded != size) {
            return Err(refused(&open.entry.path, "a file is not as large as its seed"));
        }
        let path = self.shown(&open.entry);
        fs::ftruncate(&open.file, size).map_err(failed("set the size of", &path))?;
        self.open_metadata(&open.file, &open.entry)
    }

    fn end(mut self, totals: Totals) -> Result<UnpackStats> {
        if let Some(open) = &self.file {
            return Err(refused(&open.entry.path, "the stream ends before this file"));
        }
        if self.levels.is_empty() {
            return Err(refused(b"", "the stream has no root directory"));
        }
        while self.levels.len() > 1 {
            self.levels.pop().map_or(Ok(()), |level| self.leave(&level))?;
        }
        // It may lie in the root, whose time that changes.
        self.seeds.take().map_or(Ok(()), SeedStore::remove)?;
        self.levels.pop().map_or(Ok(()), |level| self.leave(&level))?;
        if (totals.entries, totals.data_bytes) != (self.stats.entries, self.stats.data_bytes) {
            return Err(refused(b"", "its totals are not what came: something is missing or too much"));
        }
        Ok(self.stats)
    }

    fn leave(&self, level: &Level) -> Result<()> {
        self.open_metadata(&level.dir, &level.entry)
    }

    /// For what is open. Owner first, it clears set-user-id bits and capabilities; times last, all else changes them.
    fn open_metadata(&self, file: &OwnedFd, entry: &Entry) -> Result<()> {
        let path = self.shown(entry);
        let apply = || {
            fs::fchown(file, Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid)))?;
            fs::fchmod(file, Mode::from_raw_mode(entry.mode))?;
            for xattr in &entry.xattrs {
                fs::fsetxattr(file, xattr.name.as_slice(), &xattr.value, XattrFlags::CREATE)?;
            }
            fs::futimens(file, &times(entry))
        };
        apply().map_err(failed("set the metadata of", &path))
    }

    /// For what is only a name: links, fifos, sockets, whiteouts.
    fn node_metadata(&self, dir: &OwnedFd, name: &OsStr, by_name: &Path, entry: &Entry) -> Result<()> {
        let path = self.shown(entry);
        let apply = || {
            let nofollow = AtFlags::SYMLINK_NOFOLLOW;
            fs::chownat(dir, name, Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid)), nofollow)?;
            if entry.kind() != Kind::Symlink {
                fs::chmodat(dir, name, Mode::from_raw_mode(entry.mode), AtFlags::empty())?;
            }
            for xattr in &entry.xattrs {
                fs::lsetxattr(by_name, xattr.name.as_slice(), &xattr.value, XattrFlags::CREATE)?;
            }
            fs::utimensat(dir, name, &times(entry), nofollow)
        };
        apply().map_err(failed("set the metadata of", &path))
    }

    fn shown(&self, entry: &Entry) -> PathBuf {
        self.dest.join(OsStr::from_bytes(&entry.path))
    }
}

pub(crate) fn decode<M: Message + Default>(payload: &[u8]) -> Result<M> {
    M::decode(payload).map_err(|_| refused(b"", "a frame that is no protobuf message of its kind"))
}

/// A path's directory and last component.
fn split(path: &[u8]) -> Result<(&[u8], &[u8])> {
    let (parent, name) = match path.iter().rposition(|byte| *byte == b'/') {
        // A leading slash leaves an empty parent like that of a name in the root: told apart here.
        Some(0) => return Err(refused(path, "an absolute path")),
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (&path[..0], path),
    };
    if matches!(name, b"" | b"." | b"..") || name.contains(&0) {
        return Err(refused(path, "a component that is no name"));
    }
    if name.len() > NAME_MAX {
        return Err(beyond(path, "bytes in a name", NAME_MAX as u64));
    }
    Ok((parent, name))
}

/// What can be said of an entry by itself.
fn check(entry: &Entry, limits: &Limits) -> Result<()> {
    let refuse = |why| Err(refused(&entry.path, why));
    if entry.path.len() > limits.max_path || entry.target.len() > limits.max_path {
        return Err(beyond(&entry.path, "bytes in a path", limits.max_path as u64));
    }
    let wants_target = matches!(entry.kind(), Kind::Symlink | Kind::HardLink);
    if entry.seed != 0 && entry.kind() != Kind::Regular {
        return refuse("a seed of what is no regular file");
    }
    if wants_target == entry.target.is_empty() || entry.target.contains(&0) {
        return refuse("a link without a target, or a target without a link");
    }
    if entry.mode > 0o7777 || entry.mtime_nanoseconds >= 1_000_000_000 {
        return refuse("a mode or a time that no file has");
    }
    // To chown(2) the last number means to leave the owner, who would be root.
    if entry.uid == u32::MAX || entry.gid == u32::MAX {
        return refuse("an owner that no file has");
    }
    let bytes: usize = entry.xattrs.iter().map(|xattr| xattr.name.len() + xattr.value.len()).sum();
    if bytes > limits.max_xattr_bytes {
        return Err(beyond(&entry.path, "bytes of extended attributes", limits.max_xattr_bytes as u64));
    }
    if matches!(entry.kind(), Kind::HardLink | Kind::Whiteout) && !entry.xattrs.is_empty() {
        return refuse("extended attributes where none belong");
    }
    if entry.xattrs.iter().any(|xattr| fate(&xattr.name, &xattr.value) != Fate::Keep) {
        return refuse("an extended attribute that does not travel");
    }
    Ok(())
}

fn times(entry: &Entry) -> Timestamps {
    let mtime = Timespec { tv_sec: entry.mtime_seconds, tv_nsec: i64::from(entry.mtime_nanoseconds) };
    Timestamps { last_access: mtime, last_modification: mtime }
}
