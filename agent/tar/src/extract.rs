//! Unpacking a simple archive.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Write};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use flate2::bufread::MultiGzDecoder;
use rustix::fs::{
    self, AtFlags, CWD, Dev, FileType, Gid, Mode, OFlags, SeekFrom, Timespec, Timestamps, UTIME_OMIT, Uid,
};
use rustix::io::Errno;
use tar::{EntryType, Header};

use crate::error::{Error, Result, failed, not_simple};
use crate::limits;

/// Bytes of a block, which all of a tar archive is made of.
const BLOCK: usize = 512;
/// What a numeric field starts with that is written in binary. For a time GNU tar does so only before 1970 and after 2242.
const BINARY: u8 = 0x80;

/// Reads all of a seekable file from where it stands, and leaves it standing there for the real tar.
pub fn read(file: BorrowedFd<'_>) -> Result<Vec<u8>> {
    let path = Path::new("standard input");
    let start = fs::seek(file, SeekFrom::Current(0)).map_err(failed("find the position in", path))?;
    let stat = fs::fstat(file).map_err(failed("read the metadata of", path))?;
    let size = u64::try_from(stat.st_size).unwrap_or(0).saturating_sub(start);
    if size > limits::COMPRESSED {
        return Err(Error::Archive { why: "is larger than is unpacked here" });
    }
    let mut bytes = vec![0; usize::try_from(size).unwrap_or(0)];
    let mut filled = 0;
    while filled < bytes.len() {
        let position = start + filled as u64;
        match rustix::io::retry_on_intr(|| rustix::io::pread(file, &mut bytes[filled..], position)) {
            Ok(0) => return Err(Error::Archive { why: "became shorter while it was read" }),
            Ok(read) => filled += read,
            Err(errno) => return Err(failed("read", path)(errno)),
        }
    }
    Ok(bytes)
}

/// An archive, understood to its end, and the directory that it can be unpacked into.
#[derive(Debug)]
pub struct Plan {
    archive: Vec<u8>,
    members: Vec<Member>,
    root: OwnedFd,
}

#[derive(Debug)]
struct Member {
    /// From the root of the tree, which is `.`.
    path: PathBuf,
    what: What,
    mode: Mode,
    owner: (Uid, Gid),
    mtime: Timespec,
}

#[derive(Debug)]
enum What {
    Directory,
    /// Where in the archive its content is.
    Regular(Range<usize>),
    Symlink(Vec<u8>),
    Node(FileType, Dev),
}

impl Plan {
    /// Reads a whole archive and looks at what is in the directory already, and changes nothing.
    ///
    /// An error means that this is for the real tar. So is every archive that names a file twice, or a file whose
    /// directory it has not named before: neither CRIU's calls nor this crate write such ones, and so nothing is ever
    /// unpacked through a symlink.
    pub fn of(compressed: &[u8], directory: &Path) -> Result<Self> {
        if !rustix::process::geteuid().is_root() {
            return Err(Error::Archive { why: "is to be unpacked by another user than root, who may not set owners" });
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = fs::openat(CWD, directory, flags, Mode::empty()).map_err(failed("open", directory))?;
        let archive = decompress(compressed)?;
        let members = Reader { archive: &archive, position: 0 }.members()?;
        check_order(&members)?;
        for member in &members {
            check_place(root.as_fd(), member)?;
        }
        Ok(Self { archive, members, root })
    }

    /// Unpacks. After an error a part is there.
    pub fn carry_out(&self) -> Result<()> {
        for member in &self.members {
            self.make(member)?;
        }
        // Last, and the innermost first: each file that is made gives its directory a new time.
        for member in self.members.iter().rev().filter(|member| matches!(member.what, What::Directory)) {
            self.dress(member)?;
        }
        Ok(())
    }

    fn make(&self, member: &Member) -> Result<()> {
        let path = member.path.as_path();
        if matches!(member.what, What::Directory) {
            return match fs::mkdirat(&self.root, path, Mode::RWXU) {
                Ok(()) | Err(Errno::EXIST) => Ok(()),
                Err(errno) => Err(failed("make the directory", path)(errno)),
            };
        }
        match fs::unlinkat(&self.root, path, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(errno) => return Err(failed("replace", path)(errno)),
        }
        match &member.what {
            What::Directory => {}
            What::Regular(content) => {
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let file =
                    fs::openat(&self.root, path, flags, Mode::RUSR | Mode::WUSR).map_err(failed("make", path))?;
                File::from(file).write_all(&self.archive[content.clone()]).map_err(|source| Error::Io {
                    doing: "write",
                    path: path.to_owned(),
                    source,
                })?;
            }
            What::Symlink(target) => {
                fs::symlinkat(OsStr::from_bytes(target), &self.root, path).map_err(failed("make the link", path))?;
            }
            What::Node(kind, device) => {
                let mode = Mode::RUSR | Mode::WUSR;
                fs::mknodat(&self.root, path, *kind, mode, *device).map_err(failed("make the node", path))?;
            }
        }
        self.dress(member)
    }

    /// Sets owner, mode and time, in this order: a new owner takes the setuid bit away, and both change no time.
    fn dress(&self, member: &Member) -> Result<()> {
        let path = member.path.as_path();
        let (user, group) = member.owner;
        fs::chownat(&self.root, path, Some(user), Some(group), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(failed("change the owner of", path))?;
        if !matches!(member.what, What::Symlink(_)) {
            fs::chmodat(&self.root, path, member.mode, AtFlags::empty()).map_err(failed("change the mode of", path))?;
        }
        let times =
            Timestamps { last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT }, last_modification: member.mtime };
        fs::utimensat(&self.root, path, &times, AtFlags::SYMLINK_NOFOLLOW).map_err(failed("change the time of", path))
    }
}

fn decompress(compressed: &[u8]) -> Result<Vec<u8>> {
    let mut archive = Vec::new();
    MultiGzDecoder::new(compressed).take(limits::ARCHIVE + 1).read_to_end(&mut archive).map_err(Error::Compression)?;
    if archive.len() as u64 > limits::ARCHIVE {
        return Err(Error::Archive { why: "holds more than is unpacked here" });
    }
    Ok(archive)
}

/// Each path once, and each behind its directory.
fn check_order(members: &[Member]) -> Result<()> {
    let mut seen: HashMap<&Path, bool> = HashMap::with_capacity(members.len());
    for member in members {
        let path = member.path.as_path();
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        if parent.is_some_and(|parent| seen.get(parent) != Some(&true)) {
            return Err(not_simple(path, "comes before its directory"));
        }
        if seen.insert(path, matches!(member.what, What::Directory)).is_some() {
            return Err(not_simple(path, "is in the archive more than once"));
        }
    }
    Ok(())
}

/// A directory may be there already, and anything else in another's place; what GNU tar does about a directory in a
/// file's place, or a file in a directory's, depends on what is in it and beside it.
fn check_place(root: BorrowedFd<'_>, member: &Member) -> Result<()> {
    let path = member.path.as_path();
    match fs::statat(root, path, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(there) => {
            let directory = FileType::from_raw_mode(there.st_mode) == FileType::Directory;
            if directory != matches!(member.what, What::Directory) {
                return Err(not_simple(path, "is there already, and of another kind"));
            }
            Ok(())
        }
        Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(failed("read the metadata of", path)(errno)),
    }
}

/// Goes through an archive's blocks.
///
/// `tar::Archive` is not used: it goes on over what it does not know, and here everything unknown has to be noticed.
struct Reader<'a> {
    archive: &'a [u8],
    position: usize,
}

/// What stands before a member's header because there was no room in it.
#[derive(Default)]
struct Extensions<'a> {
    name: Option<&'a [u8]>,
    target: Option<&'a [u8]>,
    records: Option<&'a [u8]>,
}

impl<'a> Reader<'a> {
    fn members(mut self) -> Result<Vec<Member>> {
        let mut members = Vec::new();
        let mut before = Extensions::default();
        let mut extended = false;
        while let Some(header) = self.header()? {
            let content = self.content(header)?;
            let bytes = &self.archive[content.clone()];
            let place = match header.entry_type() {
                EntryType::GNULongName => &mut before.name,
                EntryType::GNULongLink => &mut before.target,
                EntryType::XHeader => &mut before.records,
                _ => {
                    members.push(member(header, content, &before)?);
                    if members.len() > limits::MEMBERS {
                        return Err(Error::Archive { why: "has more members than are unpacked here" });
                    }
                    before = Extensions::default();
                    extended = false;
                    continue;
                }
            };
            if place.replace(bytes).is_some() {
                return Err(Error::Archive { why: "describes a member twice" });
            }
            extended = true;
        }
        if extended {
            return Err(Error::Archive { why: "ends where a member was to follow" });
        }
        Ok(members)
    }

    /// The next header, or none at the mark of the end.
    fn header(&mut self) -> Result<Option<&'a Header>> {
        let rest = &self.archive[self.position..];
        let block = rest.get(..BLOCK).ok_or(Error::Archive { why: "is cut off" })?;
        if block.iter().all(|byte| *byte == 0) {
            if rest.len() < 2 * BLOCK || rest.iter().any(|byte| *byte != 0) {
                return Err(Error::Archive { why: "goes on behind its end, or has only half of it" });
            }
            return Ok(None);
        }
        let header = Header::from_byte_slice(block);
        let sum =
            u32::from(b' ') * 8 + block[..148].iter().chain(&block[156..]).map(|byte| u32::from(*byte)).sum::<u32>();
        if header.cksum().ok() != Some(sum) {
            return Err(Error::Archive { why: "has a header with a wrong checksum" });
        }
        self.position += BLOCK;
        Ok(Some(header))
    }

    fn content(&mut self, header: &Header) -> Result<Range<usize>> {
        let cut = || Error::Archive { why: "is cut off in a member" };
        let size = header.entry_size().ok().and_then(|size| usize::try_from(size).ok()).ok_or_else(cut)?;
        let end = self.position.checked_add(size).ok_or_else(cut)?;
        let next = end.checked_next_multiple_of(BLOCK).filter(|next| *next <= self.archive.len()).ok_or_else(cut)?;
        let content = self.position..end;
        self.position = next;
        Ok(content)
    }
}

fn member(header: &Header, content: Range<usize>, before: &Extensions<'_>) -> Result<Member> {
    let name = match before.name {
        Some(name) => terminated(name)?,
        None => until_nul(&header.as_old().name),
    };
    let shown = Path::new(OsStr::from_bytes(name));
    let path = place(name, header.entry_type().is_dir()).ok_or_else(|| not_simple(shown, "has an uncommon name"))?;
    let odd = || not_simple(shown, "has a header that is not simple");

    // Names of owners would have to be looked up, and a prefix is part of the path.
    let owner_names = [header.username_bytes(), header.groupname_bytes()];
    let known = header.as_gnu().is_some() || header.as_ustar().is_some_and(|ustar| ustar.prefix[0] == 0);
    if !known || owner_names.iter().flatten().any(|name| !name.is_empty()) {
        return Err(odd());
    }

    let number = |value: std::io::Result<u64>| value.ok().and_then(|value| u32::try_from(value).ok());
    let owner = |value| number(value).filter(|id| *id != u32::MAX).ok_or_else(odd);
    let user = Uid::from_raw(owner(header.uid())?);
    let group = Gid::from_raw(owner(header.gid())?);
    let mode = Mode::from_raw_mode(header.mode().map_err(|_| odd())? & 0o7777);
    if header.as_old().mtime[0] & BINARY != 0 {
        return Err(odd());
    }
    let seconds = header.mtime().ok().and_then(|seconds| i64::try_from(seconds).ok()).ok_or_else(odd)?;
    let mut mtime = Timespec { tv_sec: seconds, tv_nsec: 0 };
    if let Some(records) = before.records {
        mtime =
            time_in(records, mtime).ok_or_else(|| not_simple(shown, "has extended attributes that are not simple"))?;
    }

    let kind = header.entry_type();
    if kind != EntryType::Regular && !content.is_empty() || kind != EntryType::Symlink && before.target.is_some() {
        return Err(odd());
    }
    let what = match kind {
        EntryType::Directory => What::Directory,
        EntryType::Regular => What::Regular(content),
        EntryType::Fifo => What::Node(FileType::Fifo, 0),
        EntryType::Char => What::Node(FileType::CharacterDevice, device(header).ok_or_else(odd)?),
        EntryType::Block => What::Node(FileType::BlockDevice, device(header).ok_or_else(odd)?),
        EntryType::Symlink => {
            let target = match before.target {
                Some(target) => terminated(target)?,
                None => until_nul(&header.as_old().linkname),
            };
            if target.is_empty() || target.len() > limits::PATH {
                return Err(odd());
            }
            What::Symlink(target.to_vec())
        }
        _ => return Err(not_simple(shown, "is a hard link, a sparse file, or of another kind that is not simple")),
    };
    Ok(Member { path, what, mode, owner: (user, group), mtime })
}

fn device(header: &Header) -> Option<Dev> {
    let major = header.device_major().ok()??;
    let minor = header.device_minor().ok()??;
    Some(fs::makedev(major, minor))
}

fn until_nul(field: &[u8]) -> &[u8] {
    field.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// GNU's long names end with a zero byte, and have no other.
fn terminated(bytes: &[u8]) -> Result<&[u8]> {
    match bytes.split_last() {
        Some((0, name)) if !name.contains(&0) => Ok(name),
        _ => Err(Error::Archive { why: "has a long name that does not end" }),
    }
}

/// The path that a name stands for: `./`, `./name` or `./name/name`, with a slash at the end for a directory and for
/// nothing else.
fn place(name: &[u8], directory: bool) -> Option<PathBuf> {
    let trimmed = name.strip_suffix(b"/").unwrap_or(name);
    if (trimmed.len() < name.len()) != directory || trimmed.len() > limits::PATH {
        return None;
    }
    let mut components = trimmed.split(|byte| *byte == b'/');
    if components.next() != Some(b".") || components.any(|name| matches!(name, b"" | b"." | b"..")) {
        return None;
    }
    Some(PathBuf::from(OsStr::from_bytes(trimmed)))
}

/// The modification time in a pax header, or else the given one; none when there is anything in it but times.
fn time_in(mut records: &[u8], otherwise: Timespec) -> Option<Timespec> {
    let mut found = otherwise;
    while !records.is_empty() {
        let space = records.iter().position(|byte| *byte == b' ')?;
        let length: usize = std::str::from_utf8(&records[..space]).ok()?.parse().ok()?;
        let record = records.get(space + 1..length)?.strip_suffix(b"\n")?;
        records = &records[length..];
        let (key, value) = std::str::from_utf8(record).ok()?.split_once('=')?;
        match key {
            "mtime" => found = time(value)?,
            // GNU tar sets none of these.
            "atime" | "ctime" => {}
            _ => return None,
        }
    }
    Some(found)
}

/// Seconds since 1970 with up to nine digits behind the point.
fn time(text: &str) -> Option<Timespec> {
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, "0"));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(seconds) || !digits(fraction) || fraction.len() > 9 {
        return None;
    }
    Some(Timespec { tv_sec: seconds.parse().ok()?, tv_nsec: format!("{fraction:0<9}").parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_has_its_fraction_in_nanoseconds() {
        let parts = |text| time(text).map(|time| (time.tv_sec, time.tv_nsec));
        assert_eq!(parts("12"), Some((12, 0)));
        assert_eq!(parts("12.5"), Some((12, 500_000_000)));
        assert_eq!(parts("12.000000007"), Some((12, 7)));
        for text in ["", "-1", "1.", ".5", "1.0000000001", "+1", "1.+5", "99999999999999999999"] {
            assert_eq!(parts(text), None, "{text:?}");
        }
    }

    #[test]
    fn records_other_than_times_are_not_simple() {
        let header = Timespec { tv_sec: 1, tv_nsec: 0 };
        let time = |records: &[u8]| time_in(records, header).map(|time| time.tv_sec);
        assert_eq!(time(b""), Some(1));
        assert_eq!(time(b"11 mtime=5\n"), Some(5));
        assert_eq!(time(b"11 atime=7\n11 mtime=5\n11 ctime=6\n"), Some(5));
        for records in [
            b"10 path=a\n".as_slice(),
            b"11 mtime=5\n10 path=a\n",
            b"11 mtime=5\n\n",
            b"12 mtime=5\n",
            b"10 mtime=5\n",
            b"2 mtime=5\n",
            b"0 mtime=5\n",
            b"mtime=5\n",
        ] {
            assert_eq!(time(records), None, "{}", String::from_utf8_lossy(records));
        }
    }

    #[test]
    fn a_name_leads_below_the_root_or_nowhere() {
        let path =
            |name: &[u8], directory| place(name, directory).map(|path| path.into_os_string().into_encoded_bytes());
        assert_eq!(path(b"./", true).as_deref(), Some(b".".as_slice()));
        assert_eq!(path(b"./a/b", false).as_deref(), Some(b"./a/b".as_slice()));
        assert_eq!(path(b"./a/", true).as_deref(), Some(b"./a".as_slice()));
        for name in [b"".as_slice(), b".", b"a", b"/a", b"./a/", b"./../a", b"./a//b", b"./a/./b", b"../a"] {
            assert_eq!(path(name, false).filter(|path| path != b"."), None, "{}", String::from_utf8_lossy(name));
        }
        for name in [b"./a".as_slice(), b"/", b"a/", b"./a//", b"./../", b".//"] {
            assert_eq!(path(name, true), None, "{}", String::from_utf8_lossy(name));
        }
    }
}
