//! The target's side of seeds: files in a folder of their own, until a layer says which file each of them is.
//!
//! They come from a peer that may be hostile. Their names are numbers, in a directory that this process made, so a stream cannot name
//! anything else; what they take on the disk is asked of the file system, so that holes and what is written again count as what they
//! are.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{self, AtFlags, FallocateFlags, Mode, OFlags, RenameFlags};

use crate::error::{Error, Result, beyond, failed, refused};
use crate::format::{DATA, DROP, END, FILE_END, FrameReader, HOLE, SEED, SEEDS_MAGIC, Totals, split_u64};
use crate::tree::{open_root, write_at};
use crate::unpack::{Limits, decode};

/// The longest payload of a frame without data.
const LONGEST_FRAME: usize = 64;

/// What a stream held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SeedsReceived {
    /// Seeds that came or were changed.
    pub seeds: u64,
    /// Bytes of content.
    pub data_bytes: u64,
}

/// A folder of seeds. Dropping it leaves the folder as it is.
#[derive(Debug)]
pub struct SeedStore {
    dir: OwnedFd,
    path: PathBuf,
    limits: Limits,
    seeds: HashMap<u64, Kept>,
    /// What all seeds hold, in bytes.
    bytes: u64,
}

/// What is known of a seed.
#[derive(Clone, Copy, Debug, Default)]
struct Kept {
    size: u64,
    /// Bytes that it takes, holes not counted.
    bytes: u64,
}

impl SeedStore {
    /// Makes the folder, which must not exist, for this user alone. It has to be on the file system that the layer will be on, and may
    /// lie in the layer's own directory.
    pub fn create(path: &Path, limits: Limits) -> Result<Self> {
        fs::mkdir(path, Mode::RWXU).map_err(failed("create the folder", path))?;
        Ok(Self { dir: open_root(path)?, path: path.to_owned(), limits, seeds: HashMap::new(), bytes: 0 })
    }

    /// Keeps what a stream of seeds brings. Each seed is given to `complete` when a change of it is, open, to be brought to the disk.
    ///
    /// The stream is read up to its end frame and not a byte further. After an error the store is of no use any more.
    pub fn receive(&mut self, reader: impl Read, complete: impl FnMut(OwnedFd)) -> Result<SeedsReceived> {
        let frames = FrameReader::start(reader, LONGEST_FRAME, &[SEEDS_MAGIC])?;
        Receiving { store: self, complete, open: None, received: SeedsReceived::default() }.run(frames)
    }

    /// Bytes that all seeds hold.
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The name of the folder, when it lies in this directory.
    pub(crate) fn name_in(&self, dir: &Path) -> Option<&OsStr> {
        self.path.file_name().filter(|_| self.path.parent() == Some(dir))
    }

    /// Deletes the folder, with the seeds that no layer has taken.
    pub(crate) fn remove(self) -> Result<()> {
        for id in self.seeds.keys() {
            let name = name(*id);
            fs::unlinkat(&self.dir, &name, AtFlags::empty()).map_err(failed("delete", &self.path.join(&name)))?;
        }
        fs::rmdir(&self.path).map_err(failed("delete the folder", &self.path))
    }

    /// Gives a seed away, open, to become a file; none when there is none of that number.
    pub(crate) fn take(&mut self, id: u64) -> Result<Option<Taken<'_>>> {
        let Some(Kept { size, .. }) = self.seeds.remove(&id) else { return Ok(None) };
        let file = self.open(id, OFlags::empty())?;
        Ok(Some(Taken { file, size, dir: self.dir.as_fd(), name: name(id) }))
    }

    fn open(&self, id: u64, more: OFlags) -> Result<OwnedFd> {
        let name = name(id);
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC | more;
        fs::openat(&self.dir, &name, flags, Mode::RUSR | Mode::WUSR).map_err(failed("open", &self.path.join(&name)))
    }

    /// Asks the file system what a seed takes by now.
    fn recount(&mut self, id: u64, file: &OwnedFd) -> Result<()> {
        let stat = fs::fstat(file).map_err(failed("read the metadata of", &self.path.join(name(id))))?;
        let number = |value| u64::try_from(value).unwrap_or(0);
        // Some file systems set more aside for a file that grows, for a while.
        let now = Kept { size: number(stat.st_size), bytes: (number(stat.st_blocks) * 512).min(number(stat.st_size)) };
        let before = self.seeds.insert(id, now).unwrap_or_default();
        self.bytes = self.bytes - before.bytes + now.bytes;
        Ok(())
    }
}

/// A seed that becomes a file.
pub(crate) struct Taken<'a> {
    /// Open for writing.
    pub(crate) file: OwnedFd,
    pub(crate) size: u64,
    dir: BorrowedFd<'a>,
    name: String,
}

impl Taken<'_> {
    /// Puts it under its name, which must be free.
    pub(crate) fn rename(&self, dir: &OwnedFd, to: &OsStr) -> rustix::io::Result<()> {
        fs::renameat_with(self.dir, &self.name, dir, to, RenameFlags::NOREPLACE)
    }
}

fn name(id: u64) -> String {
    format!("{id:x}")
}

/// A seed that is being changed.
struct Changing {
    id: u64,
    file: OwnedFd,
    /// Up to where it was changed.
    position: u64,
    /// Up to where there is data of this change.
    end: u64,
}

struct Receiving<'a, F> {
    store: &'a mut SeedStore,
    complete: F,
    open: Option<Changing>,
    received: SeedsReceived,
}

impl<F: FnMut(OwnedFd)> Receiving<'_, F> {
    fn run<R: Read>(mut self, mut frames: FrameReader<R>) -> Result<SeedsReceived> {
        loop {
            match frames.next()? {
                (SEED, payload) => self.begin(split_u64(payload)?.0)?,
                (DATA, payload) => self.data(payload)?,
                (HOLE, payload) => self.hole(payload)?,
                (FILE_END, payload) => self.end_of_change(split_u64(payload)?.0)?,
                (DROP, payload) => self.drop_seed(split_u64(payload)?.0)?,
                (END, payload) => return self.end(decode(payload)?),
                _ => return Err(refused(b"", "a frame of unknown kind among seeds")),
            }
        }
    }

    fn begin(&mut self, id: u64) -> Result<()> {
        if self.open.is_some() || id == 0 {
            return Err(refused(b"", "a seed without a number, or before the end of another"));
        }
        let is_new = !self.store.seeds.contains_key(&id);
        if is_new && self.store.seeds.len() as u64 >= self.store.limits.max_entries {
            return Err(beyond(b"", "seeds", self.store.limits.max_entries));
        }
        let how = if is_new { OFlags::CREATE | OFlags::EXCL } else { OFlags::empty() };
        let file = self.store.open(id, how)?;
        self.store.recount(id, &file)?;
        self.received.seeds += 1;
        self.open = Some(Changing { id, file, position: 0, end: 0 });
        Ok(())
    }

    fn data(&mut self, payload: &[u8]) -> Result<()> {
        let (offset, bytes) = split_u64(payload)?;
        let (store, length) = (&mut *self.store, bytes.len() as u64);
        let Some(open) = &mut self.open else { return Err(refused(b"", "data without a seed")) };
        if bytes.is_empty() {
            return Err(refused(b"", "data of a seed that is empty"));
        }
        advance(open, offset, length, store.limits.max_file_bytes)?;
        open.end = open.position;
        // What it replaces is only known afterwards.
        if store.bytes.saturating_add(length) > store.limits.max_bytes {
            return Err(beyond(b"", "bytes of content", store.limits.max_bytes));
        }
        self.received.data_bytes += length;
        write_at(&open.file, bytes, offset).map_err(failed("write", &store.path.join(name(open.id))))?;
        store.recount(open.id, &open.file)
    }

    fn hole(&mut self, payload: &[u8]) -> Result<()> {
        let (offset, rest) = split_u64(payload)?;
        let (length, _) = split_u64(rest)?;
        let store = &mut *self.store;
        let Some(open) = &mut self.open else { return Err(refused(b"", "a hole without a seed")) };
        if length == 0 {
            return Err(refused(b"", "a hole of a seed that is empty"));
        }
        advance(open, offset, length, i64::MAX.unsigned_abs())?;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let path = || store.path.join(name(open.id));
        fs::fallocate(&open.file, flags, offset, length).map_err(|errno| failed("make a hole in", &path())(errno))?;
        store.recount(open.id, &open.file)
    }

    fn end_of_change(&mut self, size: u64) -> Result<()> {
        let Some(open) = self.open.take() else { return Err(refused(b"", "the end of a seed that was not begun")) };
        if size < open.end {
            return Err(refused(b"", "a seed is shorter than its data"));
        }
        if size > self.store.limits.max_file_bytes {
            return Err(beyond(b"", "bytes in one file", self.store.limits.max_file_bytes));
        }
        let path = self.store.path.join(name(open.id));
        fs::ftruncate(&open.file, size).map_err(failed("set the size of", &path))?;
        self.store.recount(open.id, &open.file)?;
        (self.complete)(open.file);
        Ok(())
    }

    fn drop_seed(&mut self, id: u64) -> Result<()> {
        if self.open.take_if(|open| open.id == id).is_none() && self.open.is_some() {
            return Err(refused(b"", "a seed is dropped in the middle of another"));
        }
        let Some(kept) = self.store.seeds.remove(&id) else {
            return Err(refused(b"", "a seed is dropped that is not here"));
        };
        self.store.bytes -= kept.bytes;
        let name = name(id);
        fs::unlinkat(&self.store.dir, &name, AtFlags::empty()).map_err(failed("delete", &self.store.path.join(&name)))
    }

    fn end(self, totals: Totals) -> Result<SeedsReceived> {
        if self.open.is_some() {
            return Err(refused(b"", "the stream ends in the middle of a seed"));
        }
        if (totals.entries, totals.data_bytes) != (self.received.seeds, self.received.data_bytes) {
            return Err(refused(b"", "the totals of seeds are not what came: something is missing or too much"));
        }
        Ok(self.received)
    }
}

/// Goes on behind a stretch that must not lie before what was changed already.
fn advance(open: &mut Changing, offset: u64, length: u64, most: u64) -> Result<()> {
    if offset < open.position {
        return Err(refused(b"", "a change of a seed that goes backwards"));
    }
    open.position = offset.saturating_add(length);
    if open.position > most {
        return Err(Error::Limit { path: name(open.id), what: "bytes in one file", limit: most });
    }
    Ok(())
}
