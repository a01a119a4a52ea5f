//! Packing a simple tree.

use std::ffi::{CString, OsStr};
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::write::GzEncoder;
use rustix::fs::{self, AtFlags, Dir, FileType, Mode, OFlags, Stat};
use tar::{EntryType, Header};

use crate::error::{Error, Result, failed, not_simple};
use crate::limits;

/// Bytes of a block, which all of a tar archive is made of.
const BLOCK: usize = 512;
/// Two empty blocks end an archive.
const END: usize = 2 * BLOCK;
/// The largest number that a header's time holds as octal digits. Others are written in more than one way.
const MAX_TIME: i64 = 0o777_7777_7777;
/// Bytes of the unit that `st_blocks` counts in.
const STAT_BLOCK: u64 = 512;

/// A whole archive.
#[derive(Debug)]
pub struct Packed {
    /// The archive, compressed.
    pub bytes: Vec<u8>,
    /// What was left out because no archive can hold it.
    pub sockets: Vec<PathBuf>,
}

/// Packs the directory that the descriptor names, and what is on the same file system below it.
///
/// A directory of another file system is kept without what is in it, as GNU tar's `--one-file-system` keeps it. An error
/// means that the tree is for the real tar: it is not simple, it changed while it was read, or it cannot be read.
///
/// That something changed is seen, as GNU tar sees it, by its size and its times, which move on with the kernel's clock
/// tick. CRIU's calls come while the container is frozen.
pub fn pack(directory: BorrowedFd<'_>) -> Result<Packed> {
    let top = Path::new(".");
    let root = open_directory(directory, OsStr::new("."), top)?;
    let mut packer = Packer { archive: Vec::new(), sockets: Vec::new(), device: 0, members: 0, content: 0 };
    packer.tree(root, top)?;
    packer.finish()
}

struct Packer {
    archive: Vec<u8>,
    sockets: Vec<PathBuf>,
    device: u64,
    members: usize,
    content: u64,
}

/// A directory whose names are being visited.
struct Level {
    directory: OwnedFd,
    /// From the root of the tree, which is `.`.
    path: PathBuf,
    before: Stat,
    names: std::vec::IntoIter<CString>,
}

impl Level {
    fn of(directory: OwnedFd, path: PathBuf) -> Result<Self> {
        let before = fs::fstat(&directory).map_err(failed("read the metadata of", &path))?;
        let mut names = Vec::new();
        for entry in Dir::read_from(&directory).map_err(failed("list", &path))? {
            let entry = entry.map_err(failed("list", &path))?;
            if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
                names.push(entry.file_name().to_owned());
            }
        }
        Ok(Self { directory, path, before, names: names.into_iter() })
    }

    /// Names that came or went meanwhile may be missing in the list, or in the archive.
    fn check_unchanged(&self) -> Result<()> {
        let now = fs::fstat(&self.directory).map_err(failed("read the metadata of", &self.path))?;
        if changed(&self.before, &now) {
            return Err(not_simple(&self.path, "changed while it was read"));
        }
        Ok(())
    }
}

impl Packer {
    fn tree(&mut self, root: OwnedFd, top: &Path) -> Result<()> {
        let top = Level::of(root, top.to_owned())?;
        self.device = top.before.st_dev;
        self.member(&top.path, EntryType::Directory, &top.before, b"", b"")?;
        let mut levels = vec![top];
        while let Some(level) = levels.last_mut() {
            let Some(name) = level.names.next() else {
                level.check_unchanged()?;
                levels.pop();
                continue;
            };
            let name = OsStr::from_bytes(name.to_bytes());
            let path = level.path.join(name);
            let below = self.visit(level.directory.as_fd(), name, &path)?;
            let Some(below) = below else { continue };
            if levels.len() >= limits::DEPTH {
                return Err(not_simple(&path, "is in too many directories"));
            }
            levels.push(Level::of(below, path)?);
        }
        Ok(())
    }

    /// Adds one name; a directory is returned, open, to go on in.
    fn visit(&mut self, parent: BorrowedFd<'_>, name: &OsStr, path: &Path) -> Result<Option<OwnedFd>> {
        let stat = fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW).map_err(failed("read the metadata of", path))?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        if kind == FileType::Directory {
            // A mount of another file system is not opened: it may be an automount, or a server that does not answer.
            if stat.st_dev != self.device {
                self.member(path, EntryType::Directory, &stat, b"", b"")?;
                return Ok(None);
            }
            let directory = open_directory(parent, name, path)?;
            let opened = fs::fstat(&directory).map_err(failed("read the metadata of", path))?;
            check_same(&stat, &opened, path)?;
            self.member(path, EntryType::Directory, &opened, b"", b"")?;
            return Ok(Some(directory));
        }
        if kind == FileType::Socket {
            self.sockets.push(path.to_owned());
            return Ok(None);
        }
        if stat.st_nlink > 1 {
            return Err(not_simple(path, "has other names (hard links)"));
        }
        match kind {
            FileType::RegularFile => {
                let content = self.content(parent, name, path, &stat)?;
                self.member(path, EntryType::Regular, &stat, b"", &content)?;
            }
            FileType::Symlink => {
                let target = fs::readlinkat(parent, name, Vec::new()).map_err(failed("read the link", path))?;
                self.member(path, EntryType::Symlink, &stat, target.as_bytes(), b"")?;
            }
            FileType::CharacterDevice => self.member(path, EntryType::Char, &stat, b"", b"")?,
            FileType::BlockDevice => self.member(path, EntryType::Block, &stat, b"", b"")?,
            FileType::Fifo => self.member(path, EntryType::Fifo, &stat, b"", b"")?,
            _ => return Err(not_simple(path, "is of a type that is unknown here")),
        }
        Ok(None)
    }

    /// Reads a whole file, which must stay what it is meanwhile.
    fn content(&mut self, parent: BorrowedFd<'_>, name: &OsStr, path: &Path, stat: &Stat) -> Result<Vec<u8>> {
        let size = u64::try_from(stat.st_size).unwrap_or(u64::MAX);
        self.content = self.content.saturating_add(size);
        if self.content > limits::CONTENT {
            return Err(not_simple(path, "is more content than is packed here"));
        }
        if u64::try_from(stat.st_blocks).unwrap_or(0) * STAT_BLOCK < size {
            return Err(not_simple(path, "has holes"));
        }
        // Without O_NONBLOCK a fifo that took the file's place would hold this up for ever.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = fs::openat(parent, name, flags, Mode::empty()).map_err(failed("open", path))?;
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        let mut content = vec![0; size];
        let mut filled = 0;
        while filled < size {
            match rustix::io::retry_on_intr(|| rustix::io::read(&file, &mut content[filled..])) {
                Ok(0) => break,
                Ok(read) => filled += read,
                Err(errno) => return Err(failed("read", path)(errno)),
            }
        }
        let now = fs::fstat(&file).map_err(failed("read the metadata of", path))?;
        check_same(stat, &now, path)?;
        if filled < size || changed(stat, &now) {
            return Err(not_simple(path, "changed while it was read"));
        }
        Ok(content)
    }

    fn member(&mut self, path: &Path, kind: EntryType, stat: &Stat, target: &[u8], content: &[u8]) -> Result<()> {
        self.members += 1;
        if self.members > limits::MEMBERS {
            return Err(not_simple(path, "is one file more than is packed here"));
        }
        let mut name = path.as_os_str().as_bytes().to_vec();
        if kind.is_dir() {
            name.push(b'/');
        }
        if name.len() > limits::PATH || target.len() > limits::PATH {
            return Err(not_simple(path, "has a very long name or target"));
        }
        let seconds = u64::try_from(stat.st_mtime).ok().filter(|_| stat.st_mtime <= MAX_TIME);
        let seconds = seconds.ok_or_else(|| not_simple(path, "has an uncommon modification time"))?;
        if stat.st_mtime_nsec != 0 {
            let time = format!("{seconds}.{:09}", stat.st_mtime_nsec);
            self.extension(EntryType::XHeader, &record("mtime", &time));
        }

        let mut header = Header::new_gnu();
        let old = header.as_old_mut();
        if target.len() > old.linkname.len() {
            self.extension(EntryType::GNULongLink, &[target, b"\0"].concat());
        }
        if name.len() > old.name.len() {
            self.extension(EntryType::GNULongName, &[&name, b"\0".as_slice()].concat());
        }
        copy(&mut old.name, &name);
        copy(&mut old.linkname, target);
        header.set_entry_type(kind);
        header.set_mode(stat.st_mode & 0o7777);
        header.set_uid(stat.st_uid.into());
        header.set_gid(stat.st_gid.into());
        header.set_mtime(seconds);
        header.set_size(content.len() as u64);
        if matches!(kind, EntryType::Char | EntryType::Block) {
            let gnu = header.as_gnu_mut().ok_or_else(|| not_simple(path, "has no place for its numbers"))?;
            gnu.set_device_major(fs::major(stat.st_rdev));
            gnu.set_device_minor(fs::minor(stat.st_rdev));
        }
        self.blocks(&mut header, content);
        Ok(())
    }

    /// Adds what the next member's header has no room for.
    fn extension(&mut self, kind: EntryType, content: &[u8]) {
        let mut header = if kind == EntryType::XHeader { Header::new_ustar() } else { Header::new_gnu() };
        // The names that GNU tar and Python's tarfile give them; nobody reads them.
        let name = if kind == EntryType::XHeader { b"././@PaxHeader".as_slice() } else { b"././@LongLink" };
        copy(&mut header.as_old_mut().name, name);
        header.set_entry_type(kind);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(content.len() as u64);
        self.blocks(&mut header, content);
    }

    fn blocks(&mut self, header: &mut Header, content: &[u8]) {
        header.set_cksum();
        self.archive.extend_from_slice(header.as_bytes());
        self.archive.extend_from_slice(content);
        self.archive.resize(self.archive.len().next_multiple_of(BLOCK), 0);
    }

    fn finish(mut self) -> Result<Packed> {
        self.archive.resize(self.archive.len() + END, 0);
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(&self.archive).map_err(Error::Compression)?;
        let bytes = encoder.finish().map_err(Error::Compression)?;
        Ok(Packed { bytes, sockets: self.sockets })
    }
}

fn open_directory(parent: BorrowedFd<'_>, name: &OsStr, path: &Path) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    fs::openat(parent, name, flags, Mode::empty()).map_err(failed("open", path))
}

fn check_same(seen: &Stat, opened: &Stat, path: &Path) -> Result<()> {
    if (seen.st_dev, seen.st_ino) != (opened.st_dev, opened.st_ino) {
        return Err(not_simple(path, "was replaced while it was read"));
    }
    Ok(())
}

fn changed(before: &Stat, now: &Stat) -> bool {
    let marks = |stat: &Stat| (stat.st_size, stat.st_mtime, stat.st_mtime_nsec, stat.st_ctime, stat.st_ctime_nsec);
    marks(before) != marks(now)
}

/// As much as fits: a longer one stands in an extension.
fn copy(field: &mut [u8], bytes: &[u8]) {
    let length = bytes.len().min(field.len());
    field[..length].copy_from_slice(&bytes[..length]);
}

/// A record of a pax header. Its length counts its own digits.
fn record(key: &str, value: &str) -> Vec<u8> {
    let rest = format!(" {key}={value}\n");
    let mut length = rest.len();
    while length.to_string().len() + rest.len() != length {
        length = length.to_string().len() + rest.len();
    }
    format!("{length}{rest}").into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::fs::{File, OpenOptions};

    /// On a tmpfs, where a file's blocks and a directory's size are known at once.
    fn folder() -> tempfile::TempDir {
        tempfile::Builder::new().prefix("podferry-tar-").tempdir_in("/dev/shm").unwrap()
    }

    #[test]
    fn a_file_that_changes_between_two_looks_is_not_packed() {
        type Change = fn(&Path);
        let changes: [(&str, Change); 4] = [
            ("grows", |file| OpenOptions::new().append(true).open(file).unwrap().write_all(b"more").unwrap()),
            ("shrinks", |file| File::options().write(true).open(file).unwrap().set_len(3).unwrap()),
            ("is replaced", |file| {
                std::fs::rename(file, file.with_extension("old")).unwrap();
                std::fs::write(file, b"content").unwrap();
            }),
            ("vanishes", |file| std::fs::remove_file(file).unwrap()),
        ];
        for (what, change) in changes {
            let folder = folder();
            let file = folder.path().join("file");
            std::fs::write(&file, b"content").unwrap();
            let parent = File::open(folder.path()).unwrap();
            let seen = fs::statat(&parent, "file", AtFlags::SYMLINK_NOFOLLOW).unwrap();
            let mut packer = Packer { archive: Vec::new(), sockets: Vec::new(), device: 0, members: 0, content: 0 };
            let mut read = || packer.content(parent.as_fd(), OsStr::new("file"), Path::new("./file"), &seen);
            assert_eq!(read().unwrap(), b"content");
            change(&file);
            let read = read();
            assert!(read.is_err(), "{what}: {read:?}");
        }
    }

    #[test]
    fn a_directory_that_changes_while_it_is_read_is_not_packed() {
        let folder = folder();
        let directory = OwnedFd::from(File::open(folder.path()).unwrap());
        let level = Level::of(directory, PathBuf::from(".")).unwrap();
        level.check_unchanged().unwrap();
        std::fs::write(folder.path().join("new"), b"").unwrap();
        assert!(level.check_unchanged().is_err());
    }

    #[test]
    fn a_record_counts_its_own_digits() {
        assert_eq!(record("mtime", "1.000000005"), b"21 mtime=1.000000005\n");
        // Two digits more or less, around ten and a hundred.
        for length in 0..200 {
            let record = record("k", &"v".repeat(length));
            let (digits, _) = record.split_at(record.iter().position(|byte| *byte == b' ').unwrap());
            assert_eq!(std::str::from_utf8(digits).unwrap().parse::<usize>().unwrap(), record.len());
        }
    }
}
