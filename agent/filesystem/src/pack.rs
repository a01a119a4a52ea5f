//! Reading an upper directory, or a volume, into a stream.

use std::collections::HashMap;
use std::ffi::{CString, OsStr};
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use prost::Message;
use rustix::fs::{self, AtFlags, FileType, OFlags, SeekFrom, Stat};
use rustix::io::Errno;

use crate::attributes::{Fate, fate};
use crate::error::{Error, Result, beyond, failed};
use crate::format::{
    CHUNK, DATA, END, ENTRY, Entry, FILE_END, FrameWriter, Kind, MAGIC, MAGIC_WITH_SEEDS, MAX_DEPTH, MAX_PATH,
    MAX_XATTRS, Totals, Xattr,
};
use crate::layer::WritableLayer;
use crate::seeder::Seeder;
use crate::tree::{by_descriptor, is_whiteout, names, open_beneath, open_file, open_root};

/// The longest value of an extended attribute, and the longest list of names (`XATTR_SIZE_MAX`, `XATTR_LIST_MAX`).
const XATTR_MAX: usize = 65536;

/// What a stream holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PackStats {
    /// Entries of all kinds, the root directory included.
    pub entries: u64,
    /// Whiteouts among them: names that the container deleted from its image.
    pub whiteouts: u64,
    /// Bytes of file content; holes and second names of hard links do not count.
    pub data_bytes: u64,
    /// Bytes of files whose content is a seed: it came before, and is not in the stream.
    pub seeded_bytes: u64,
    /// Bytes of the whole stream.
    pub stream_bytes: u64,
    /// Extended attributes that mean something on the source only, such as `SELinux` labels, and were left out.
    pub dropped_xattrs: u64,
}

/// Writes a container's upper directory, or a volume of it, into a stream.
///
/// The container should be frozen: a file that changes meanwhile is read once, from front to end, and one that vanishes
/// is left out. Content that the container wrote a moment ago is read from the page cache it wrote to; nothing needs to
/// be synced first.
pub fn pack(layer: &WritableLayer, out: impl Write) -> Result<PackStats> {
    Packer::new(out, MAGIC, &Seeder::default()).run(layer.moved()?)
}

/// As [`pack`], of a container that stands still since before the [last pass](crate::Pass::Frozen) of its seeds: the content of files
/// that have not changed since then is not sent again.
pub fn pack_with_seeds(layer: &WritableLayer, seeds: &Seeder, out: impl Write) -> Result<PackStats> {
    if seeds.is_empty() {
        return pack(layer, out);
    }
    Packer::new(out, MAGIC_WITH_SEEDS, seeds).run(layer.moved()?)
}

struct Level {
    dir: OwnedFd,
    /// Relative to the root.
    path: PathBuf,
    names: std::vec::IntoIter<CString>,
}

impl Level {
    fn of(dir: OwnedFd, path: PathBuf) -> Result<Self> {
        let names = names(&dir).map_err(failed("list", &path))?.into_iter();
        Ok(Self { dir, path, names })
    }
}

struct Packer<'a, W> {
    frames: FrameWriter<W>,
    seeds: &'a Seeder,
    stats: PackStats,
    /// The first path of each file that has more names.
    first_names: HashMap<(u64, u64), PathBuf>,
    chunk: Vec<u8>,
    xattr_list: Vec<u8>,
    xattr_value: Vec<u8>,
}

/// An entry while it is read: where it is, and what it is.
struct Found<'a> {
    dir: BorrowedFd<'a>,
    name: &'a OsStr,
    path: &'a Path,
    stat: Stat,
}

impl<'a, W: Write> Packer<'a, W> {
    fn new(out: W, magic: [u8; 8], seeds: &'a Seeder) -> Self {
        Self {
            frames: FrameWriter::new(out, magic),
            seeds,
            stats: PackStats::default(),
            first_names: HashMap::new(),
            chunk: vec![0; CHUNK],
            xattr_list: vec![0; XATTR_MAX],
            xattr_value: vec![0; XATTR_MAX],
        }
    }

    fn run(mut self, upper: &Path) -> Result<PackStats> {
        let root = open_root(upper)?;
        let stat = fs::fstat(&root).map_err(failed("read the metadata of", upper))?;
        let top = Found { dir: root.as_fd(), name: OsStr::new("."), path: Path::new(""), stat };
        self.entry(&top, Kind::Directory, Vec::new())?;
        let mut levels = vec![Level::of(root, PathBuf::new())?];
        while let Some(level) = levels.last_mut() {
            let Some(name) = level.names.next() else {
                levels.pop();
                continue;
            };
            let name = OsStr::from_bytes(name.to_bytes());
            let path = level.path.join(name);
            let below = self.visit(level.dir.as_fd(), name, &path)?;
            let Some(below) = below else { continue };
            if levels.len() > MAX_DEPTH {
                return Err(beyond(path.as_os_str().as_bytes(), "nested directories", MAX_DEPTH as u64));
            }
            levels.push(Level::of(below, path)?);
        }
        self.end()
    }

    /// Sends one entry; a directory is returned, open, to go on in.
    fn visit(&mut self, dir: BorrowedFd<'_>, name: &OsStr, path: &Path) -> Result<Option<OwnedFd>> {
        if path.as_os_str().len() >= MAX_PATH {
            return Err(beyond(path.as_os_str().as_bytes(), "bytes in a path", MAX_PATH as u64));
        }
        let stat = match fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => return Ok(None),
            Err(errno) => return Err(failed("read the metadata of", path)(errno)),
        };
        let found = Found { dir, name, path, stat };
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => self.directory(&found),
            _ if is_whiteout(&stat) => self.whiteout(&found).map(|()| None),
            FileType::CharacterDevice | FileType::BlockDevice => Err(Error::Unsupported {
                path: path.to_owned(),
                why: "it is a device node that the container made; a target takes none from another node: \
                      delete it, or give the device to the container by its specification",
            }),
            kind => self.leaf(&found, kind).map(|()| None),
        }
    }

    fn directory(&mut self, found: &Found<'_>) -> Result<Option<OwnedFd>> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let dir = open_beneath(found.dir, Path::new(found.name), flags).map_err(failed("open", found.path))?;
        self.entry(found, Kind::Directory, Vec::new())?;
        Ok(Some(dir))
    }

    /// overlayfs links all its whiteouts to one inode, so their link count says nothing.
    fn whiteout(&mut self, found: &Found<'_>) -> Result<()> {
        self.stats.whiteouts += 1;
        self.entry(found, Kind::Whiteout, Vec::new())
    }

    fn leaf(&mut self, found: &Found<'_>, kind: FileType) -> Result<()> {
        if found.stat.st_nlink > 1 {
            let inode = (found.stat.st_dev, found.stat.st_ino);
            if let Some(first) = self.first_names.get(&inode) {
                let target = first.as_os_str().as_bytes().to_vec();
                return self.entry(found, Kind::HardLink, target);
            }
            self.first_names.insert(inode, found.path.to_owned());
        }
        match kind {
            FileType::RegularFile => self.regular(found),
            FileType::Symlink => {
                let text =
                    fs::readlinkat(found.dir, found.name, Vec::new()).map_err(failed("read the link", found.path))?;
                self.entry(found, Kind::Symlink, text.into_bytes())
            }
            FileType::Fifo => self.entry(found, Kind::Fifo, Vec::new()),
            FileType::Socket => self.entry(found, Kind::Socket, Vec::new()),
            _ => Err(Error::Unsupported { path: found.path.to_owned(), why: "its type is unknown here" }),
        }
    }

    fn regular(&mut self, found: &Found<'_>) -> Result<()> {
        let file = open_file(found.dir, found.name).map_err(failed("open", found.path))?;
        let now = fs::fstat(&file).map_err(failed("read the metadata of", found.path))?;
        if (now.st_ino, now.st_dev) != (found.stat.st_ino, found.stat.st_dev) {
            return Err(Error::Unsupported {
                path: found.path.to_owned(),
                why: "it was replaced while it was read: freeze the container before its files are moved",
            });
        }
        let seed = self.seeds.settled(&now);
        self.entry_of(found, Entry { seed: seed.unwrap_or(0), ..plain_entry(found, Kind::Regular) })?;
        let size = match seed {
            Some(_) => u64::try_from(now.st_size).unwrap_or(0),
            None => self.content(&file, found.path)?,
        };
        self.stats.seeded_bytes += if seed.is_some() { size } else { 0 };
        self.frames.frame(FILE_END, &[&size.to_le_bytes()])
    }

    /// Sends what is no hole, and returns the file's size.
    fn content(&mut self, file: &OwnedFd, path: &Path) -> Result<u64> {
        let before = size_of(file, path)?;
        let mut position = 0;
        loop {
            let start = match fs::seek(file, SeekFrom::Data(position)) {
                Ok(start) => start,
                // No data behind this position: the rest, if any, is a hole.
                Err(Errno::NXIO) => break,
                Err(errno) => return Err(failed("find the data of", path)(errno)),
            };
            let end = match fs::seek(file, SeekFrom::Hole(start)) {
                Ok(end) => end,
                Err(Errno::NXIO) => break,
                Err(errno) => return Err(failed("find the holes of", path)(errno)),
            };
            position = self.extent(file, path, start, end)?;
            if position < end {
                // Cut short while it was read.
                break;
            }
        }
        // A hole at the end counts, unless it came or went meanwhile.
        Ok(position.max(before.min(size_of(file, path)?)))
    }

    /// Sends the bytes from start to end, or as many as there are, and returns where it stopped.
    fn extent(&mut self, file: &OwnedFd, path: &Path, start: u64, end: u64) -> Result<u64> {
        let mut position = start;
        while position < end {
            let wanted = usize::try_from(end - position).unwrap_or(CHUNK).min(CHUNK);
            let read = rustix::io::pread(file, &mut self.chunk[..wanted], position).map_err(failed("read", path))?;
            if read == 0 {
                break;
            }
            self.frames.frame(DATA, &[&position.to_le_bytes(), &self.chunk[..read]])?;
            position += read as u64;
            self.stats.data_bytes += read as u64;
        }
        Ok(position)
    }

    fn entry(&mut self, found: &Found<'_>, kind: Kind, target: Vec<u8>) -> Result<()> {
        self.entry_of(found, Entry { target, ..plain_entry(found, kind) })
    }

    /// Sends an entry that lacks its attributes only.
    fn entry_of(&mut self, found: &Found<'_>, mut entry: Entry) -> Result<()> {
        if !matches!(entry.kind(), Kind::HardLink | Kind::Whiteout) {
            entry.xattrs = self.xattrs(found)?;
        }
        self.stats.entries += 1;
        self.frames.frame(ENTRY, &[&entry.encode_to_vec()])
    }

    fn xattrs(&mut self, found: &Found<'_>) -> Result<Vec<Xattr>> {
        let file = by_descriptor(found.dir, found.name);
        let length = match fs::llistxattr(&file, self.xattr_list.as_mut_slice()) {
            Ok(length) => length,
            Err(Errno::OPNOTSUPP) => 0,
            Err(errno) => return Err(failed("list the extended attributes of", found.path)(errno)),
        };
        let mut kept: Vec<Xattr> = Vec::new();
        let mut bytes = 0;
        for name in self.xattr_list[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
            let length = match fs::lgetxattr(&file, name, self.xattr_value.as_mut_slice()) {
                Ok(length) => length,
                Err(Errno::NODATA) => continue,
                Err(errno) => return Err(failed("read an extended attribute of", found.path)(errno)),
            };
            let value = &self.xattr_value[..length];
            match fate(name, value) {
                Fate::Keep => kept.push(Xattr { name: name.to_vec(), value: value.to_vec() }),
                Fate::Drop => self.stats.dropped_xattrs += 1,
                Fate::Unmovable(why) => return Err(Error::Unsupported { path: found.path.to_owned(), why }),
            }
            bytes += name.len() + length;
        }
        if bytes > MAX_XATTRS {
            return Err(beyond(found.path.as_os_str().as_bytes(), "bytes of extended attributes", MAX_XATTRS as u64));
        }
        Ok(kept)
    }

    fn end(mut self) -> Result<PackStats> {
        let totals = Totals { entries: self.stats.entries, data_bytes: self.stats.data_bytes };
        self.frames.frame(END, &[&totals.encode_to_vec()])?;
        self.frames.flush()?;
        Ok(PackStats { stream_bytes: self.frames.written, ..self.stats })
    }
}

/// What the metadata says of an entry.
fn plain_entry(found: &Found<'_>, kind: Kind) -> Entry {
    let stat = &found.stat;
    Entry {
        path: found.path.as_os_str().as_bytes().to_vec(),
        kind: kind.into(),
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        mtime_seconds: stat.st_mtime,
        mtime_nanoseconds: u32::try_from(stat.st_mtime_nsec).unwrap_or(0),
        ..Entry::default()
    }
}

fn size_of(file: &OwnedFd, path: &Path) -> Result<u64> {
    let size = fs::fstat(file).map_err(failed("read the metadata of", path))?.st_size;
    Ok(u64::try_from(size).unwrap_or(0))
}
