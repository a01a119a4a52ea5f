//! The source's side of seeds: what large files of a running container hold, sent before its layer is.
//!
//! Passes over the upper directory read what has changed and send it, [`Pass::Running`] while the container runs, then one
//! [`Pass::Frozen`] when it stands still. The seeder remembers a hash of each block that the target has, so that of a file that is read
//! again only the blocks go that differ. A file that cannot be read, or that vanishes, is given up as a seed and left to
//! [`pack`](crate::pack), which knows what to say of it.
//!
//! # When a file is not read again
//!
//! Nothing may be missed, and times alone say too little: `write(2)` sets them when it begins, which for a large one is seconds before
//! its last byte is in the file, and a page that is mapped and dirty already is written to without any time being set. So every pass
//! reads and compares all files but those that were *at rest* when they were read last, and have had the same size, times and
//! inode number ever since. At rest means, before the reading and in this order:
//!
//! 1. its change time lay [`MARGIN`] or more in the past. The kernel's time stamps are coarse (10 ms at 100 Hz), so that any later
//!    change leaves another one;
//! 2. its file system notes writes through mappings: the first write to a page of a mapping sets the times (`page_mkwrite`). ext4, XFS
//!    and Btrfs do; tmpfs does not;
//! 3. then nobody was able to write to it ([`Host::has_no_writer`]): no descriptor, no mapping, no call under way. What had been
//!    written by then is in what is read after that. Whoever writes later has to open the file later, or to cut it by its path, and
//!    either sets the change time later than that moment: by a call, when it begins, or with the first write to each page of a mapping.
//!    No page of a mapping that did not exist is writable already.
//!
//! A clock that is set back could let a change time come again, to the nanosecond; no other is believed.
//!
//! Blocks are told apart by XXH3-128, seeded with a secret of this seeder's own: whoever writes to the files cannot make two that are
//! taken for the same.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::hash::{BuildHasher as _, RandomState};
use std::io::{self, Write};
use std::ops::AddAssign;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prost::Message;
use rustix::fs::{self, Stat};

use crate::blocks::{BLOCK, Block, BlockBuffer, read_blocks};
use crate::error::{Error, Result};
use crate::format::{DATA, DROP, END, FILE_END, FrameWriter, HOLE, SEED, SEEDS_MAGIC, Totals};
use crate::layer::WritableLayer;
use crate::tree::{each_file, open_file, open_root};

/// Smaller files are left to the freeze: to name one costs nearly as much as to send it.
pub(crate) const SMALLEST: u64 = 64 * 1024;
/// How long the last change of a file at rest is past. More than the steps of the kernel's time stamps, and than a clock is
/// set back by whoever only corrects it.
pub(crate) const MARGIN: Duration = Duration::from_secs(1);
/// The most seeds, and blocks of all of them: 256 GiB, of which 96 MiB are remembered. What is beyond is left to the freeze.
const MOST_SEEDS: usize = 100_000;
const MOST_BLOCKS: usize = 4 << 20;
/// The file systems that set a file's times when a mapping is written to (linux/magic.h): ext4, XFS, Btrfs.
const NOTE_MAPPED_WRITES: [fs::FsWord; 3] = [0xef53, 0x5846_5342, 0x9123_683e];

/// What a seeder has to be told by whoever runs it.
pub trait Host {
    /// Whether the pass is to end, with an error.
    fn is_cancelled(&self) -> bool;

    /// Whether at this moment nobody at all can write to this file, which is open for reading. False when that is not known.
    fn has_no_writer(&self, file: BorrowedFd<'_>) -> bool;
}

/// Whether the container runs during a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// Anything may change meanwhile: a later pass makes up for it.
    Running,
    /// Nothing changes until the layer has been packed: what is known afterwards is the truth.
    Frozen,
}

/// What a pass sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SeedsSent {
    /// Seeds that were sent or changed.
    pub seeds: u64,
    /// Bytes of content that were sent.
    pub data_bytes: u64,
    /// Bytes that were read and compared for it,
    pub read_bytes: u64,
    /// and how long that took, without the sending.
    pub read_time: Duration,
    /// Bytes of files that are not at rest: the next pass reads them again.
    pub restless_bytes: u64,
}

impl AddAssign for SeedsSent {
    fn add_assign(&mut self, other: Self) {
        self.seeds += other.seeds;
        self.data_bytes += other.data_bytes;
        self.read_bytes += other.read_bytes;
        self.read_time += other.read_time;
        self.restless_bytes += other.restless_bytes;
    }
}

/// Remembers what a target has of a layer's large files.
#[derive(Debug)]
pub struct Seeder {
    /// The hashes' seed, which nobody else knows.
    secret: u64,
    buffer: BlockBuffer,
    seeds: HashMap<(u64, u64), Seed>,
    last_id: u64,
    /// Blocks of all seeds.
    blocks: usize,
    pass: u32,
    /// Whether the last pass was that of the freeze, and complete.
    settled: bool,
}

/// What the target has of one file.
#[derive(Debug)]
struct Seed {
    id: u64,
    size: u64,
    /// Those that are not wholly holes, ascending.
    blocks: Vec<Block>,
    /// What the file was like before it was read.
    print: Fingerprint,
    at_rest: bool,
    /// In which pass it was there last.
    pass: u32,
}

/// What is different when a file was written to; see the module's documentation for when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Fingerprint {
    size: i64,
    modified: (i64, u32),
    changed: (i64, u32),
}

impl Fingerprint {
    fn of(stat: &Stat) -> Self {
        let nanoseconds = |value| u32::try_from(value).unwrap_or(u32::MAX);
        Self {
            size: stat.st_size,
            modified: (stat.st_mtime, nanoseconds(stat.st_mtime_nsec)),
            changed: (stat.st_ctime, nanoseconds(stat.st_ctime_nsec)),
        }
    }

    /// Whether its last change lies the margin or more before this moment.
    fn is_old(&self, now: SystemTime) -> bool {
        let since = u64::try_from(self.changed.0).ok().map(|seconds| Duration::new(seconds, 0));
        let changed =
            since.and_then(|since| UNIX_EPOCH.checked_add(since + Duration::from_nanos(self.changed.1.into())));
        changed.is_some_and(|changed| now.duration_since(changed).is_ok_and(|age| age >= MARGIN))
    }
}

impl Default for Seeder {
    fn default() -> Self {
        // Its keys are the operating system's random numbers.
        let secret = RandomState::new().hash_one(());
        let (buffer, seeds) = (BlockBuffer::default(), HashMap::new());
        Self { secret, buffer, seeds, last_id: 0, blocks: 0, pass: 0, settled: false }
    }
}

impl Seeder {
    /// Whether there is no seed at all.
    pub fn is_empty(&self) -> bool {
        self.seeds.is_empty()
    }

    /// Goes over the layer once and sends what the target does not have of its large files. Nothing at all is written when it has
    /// everything.
    ///
    /// # Errors
    /// When the directory cannot be opened, `out` fails, or the host cancels. Files that cannot be read are no error.
    pub fn pass(&mut self, layer: &WritableLayer, pass: Pass, host: &dyn Host, out: impl Write) -> Result<SeedsSent> {
        let Ok(dir) = layer.moved() else { return Ok(SeedsSent::default()) };
        self.settled = false;
        self.pass += 1;
        let mut sending = Sending::new(out, host);
        let root = open_root(dir)?;
        each_file(root, |dir, name, stat| self.visit(&mut sending, dir, name, stat))?;
        self.drop_unseen(&mut sending)?;
        let sent = sending.end()?;
        self.settled = pass == Pass::Frozen;
        Ok(sent)
    }

    /// The seed that holds all of this file's content; none before the pass of the freeze, nor when it has changed since.
    pub(crate) fn settled(&self, stat: &Stat) -> Option<u64> {
        let seed = self.seeds.get(&inode(stat)).filter(|_| self.settled)?;
        (seed.print == Fingerprint::of(stat)).then_some(seed.id)
    }

    fn visit<W: Write>(
        &mut self,
        sending: &mut Sending<'_, W>,
        dir: BorrowedFd<'_>,
        name: &OsStr,
        stat: &Stat,
    ) -> Result<()> {
        if size_of(stat) < SMALLEST {
            return Ok(());
        }
        let pass = self.pass;
        if let Some(seed) = self.seeds.get_mut(&inode(stat))
            && (seed.pass == pass || seed.at_rest && seed.print == Fingerprint::of(stat))
        {
            seed.pass = pass;
            return Ok(());
        }
        // One that has gone is not seen, and dropped in the end.
        let Ok(file) = open_file(dir, name) else { return Ok(()) };
        let now = SystemTime::now();
        let Ok(before) = fs::fstat(&file) else { return Ok(()) };
        if inode(&before) != inode(stat) {
            return Ok(());
        }
        let at_rest = Fingerprint::of(&before).is_old(now)
            && notes_mapped_writes(&file)
            && sending.host.has_no_writer(file.as_fd());
        self.bring(sending, &file, &before, at_rest)
    }

    /// Sends of a file what the target has not.
    fn bring<W: Write>(
        &mut self,
        sending: &mut Sending<'_, W>,
        file: &OwnedFd,
        before: &Stat,
        at_rest: bool,
    ) -> Result<()> {
        let known = self.seeds.remove(&inode(before));
        let had = known.as_ref().map_or(0, |seed| seed.blocks.len());
        self.blocks -= had;
        if self.blocks + most_blocks(before) > MOST_BLOCKS || self.seeds.len() >= MOST_SEEDS {
            return known.map_or(Ok(()), |seed| sending.drop_seed(seed.id));
        }
        let (id, size, blocks) = match known {
            Some(seed) => (seed.id, Some(seed.size), seed.blocks),
            None => (self.last_id + 1, None, Vec::new()),
        };
        self.last_id = self.last_id.max(id);
        let mut change = Change { id, begun: false, old: blocks.into_iter().peekable(), new: Vec::new(), hole: None };
        let reading = Reading { file, size: size_of(before), buffer: &mut self.buffer, secret: self.secret };
        match change.run(sending, reading, size) {
            Ok(()) => {}
            Err(error @ Error::Stream(_)) => return Err(error),
            // It cannot be read: nobody knows what the target has of it now.
            Err(_) if change.begun || size.is_some() => return sending.drop_seed(id),
            Err(_) => return Ok(()),
        }
        let (blocks, print) = (change.new, Fingerprint::of(before));
        self.blocks += blocks.len();
        sending.sent.read_time += self.buffer.take_spent();
        sending.sent.restless_bytes += if at_rest { 0 } else { (blocks.len() * BLOCK) as u64 };
        self.seeds.insert(inode(before), Seed { id, size: size_of(before), blocks, print, at_rest, pass: self.pass });
        Ok(())
    }

    /// Tells of seeds whose file has gone, or is small now.
    fn drop_unseen<W: Write>(&mut self, sending: &mut Sending<'_, W>) -> Result<()> {
        let pass = self.pass;
        for (_, seed) in self.seeds.extract_if(|_, seed| seed.pass != pass) {
            self.blocks -= seed.blocks.len();
            sending.drop_seed(seed.id)?;
        }
        Ok(())
    }
}

/// One pass on its way.
struct Sending<'a, W> {
    frames: FrameWriter<W>,
    host: &'a dyn Host,
    sent: SeedsSent,
}

impl<'a, W: Write> Sending<'a, W> {
    fn new(out: W, host: &'a dyn Host) -> Self {
        Self { frames: FrameWriter::new(out, SEEDS_MAGIC), host, sent: SeedsSent::default() }
    }

    fn drop_seed(&mut self, id: u64) -> Result<()> {
        self.frames.frame(DROP, &[&id.to_le_bytes()])
    }

    fn end(mut self) -> Result<SeedsSent> {
        if self.frames.written > 0 {
            let totals = Totals { entries: self.sent.seeds, data_bytes: self.sent.data_bytes };
            self.frames.frame(END, &[&totals.encode_to_vec()])?;
            self.frames.flush()?;
        }
        Ok(self.sent)
    }
}

/// A file that is read, up to so many bytes.
struct Reading<'a> {
    file: &'a OwnedFd,
    size: u64,
    buffer: &'a mut BlockBuffer,
    secret: u64,
}

/// What is different in one file.
struct Change {
    id: u64,
    /// Whether anything was said of it.
    begun: bool,
    /// What the target has, from where the reading is on.
    old: std::iter::Peekable<std::vec::IntoIter<Block>>,
    /// What it has up to there.
    new: Vec<Block>,
    /// Where a hole begins and ends that has not been told yet.
    hole: Option<(u64, u64)>,
}

impl Change {
    /// Reads a file, and sends what is different. `known` is the size that the target knows.
    fn run<W: Write>(&mut self, sending: &mut Sending<'_, W>, reading: Reading<'_>, known: Option<u64>) -> Result<()> {
        let Reading { file, size, buffer, secret } = reading;
        read_blocks(file, size, buffer, |block| {
            if sending.host.is_cancelled() {
                return Err(Error::Stream(io::Error::other("the migration was aborted")));
            }
            self.block(sending, block, secret)
        })?;
        while let Some(gone) = self.old.next() {
            // What lies behind the end is cut off.
            if gone.start() < size {
                self.add_hole(sending, gone.start(), gone.end())?;
            }
        }
        self.tell_hole(sending)?;
        if known != Some(size) {
            self.begin(sending)?;
        }
        if self.begun { sending.frames.frame(FILE_END, &[&size.to_le_bytes()]) } else { Ok(()) }
    }

    /// The next block that is not wholly a hole.
    fn block<W: Write>(&mut self, sending: &mut Sending<'_, W>, found: &mut BlockBuffer, secret: u64) -> Result<()> {
        sending.sent.read_bytes += found.bytes().len() as u64;
        let now = found.hashed(secret);
        while let Some(gone) = self.old.next_if(|old| old.index < now.index) {
            self.add_hole(sending, gone.start(), gone.end())?;
        }
        let before = self.old.next_if(|old| old.index == now.index);
        self.new.push(now);
        if before == Some(now) {
            return Ok(());
        }
        let mut told = now.start();
        for (offset, bytes) in found.pieces() {
            if before.is_some() && told < offset {
                self.add_hole(sending, told, offset)?;
            }
            self.tell_hole(sending)?;
            self.begin(sending)?;
            sending.frames.frame(DATA, &[&offset.to_le_bytes(), bytes])?;
            sending.sent.data_bytes += bytes.len() as u64;
            told = offset + bytes.len() as u64;
        }
        if before.is_some() && told < now.end() {
            self.add_hole(sending, told, now.end())?;
        }
        Ok(())
    }

    /// Notes a hole where the target has something. Holes that touch are told as one.
    fn add_hole<W: Write>(&mut self, sending: &mut Sending<'_, W>, start: u64, end: u64) -> Result<()> {
        match &mut self.hole {
            Some((_, last)) if *last == start => {
                *last = end;
                return Ok(());
            }
            _ => self.tell_hole(sending)?,
        }
        self.hole = Some((start, end));
        Ok(())
    }

    fn tell_hole<W: Write>(&mut self, sending: &mut Sending<'_, W>) -> Result<()> {
        let Some((start, end)) = self.hole.take() else { return Ok(()) };
        self.begin(sending)?;
        sending.frames.frame(HOLE, &[&start.to_le_bytes(), &(end - start).to_le_bytes()])
    }

    fn begin<W: Write>(&mut self, sending: &mut Sending<'_, W>) -> Result<()> {
        if std::mem::replace(&mut self.begun, true) {
            return Ok(());
        }
        sending.sent.seeds += 1;
        sending.frames.frame(SEED, &[&self.id.to_le_bytes()])
    }
}

fn inode(stat: &Stat) -> (u64, u64) {
    (stat.st_dev, stat.st_ino)
}

fn size_of(stat: &Stat) -> u64 {
    u64::try_from(stat.st_size).unwrap_or(0)
}

/// How many blocks a file can have that are not wholly holes: each has a page at least.
fn most_blocks(stat: &Stat) -> usize {
    let pages = u64::try_from(stat.st_blocks).unwrap_or(0) / 8 + 1;
    usize::try_from(pages.min(size_of(stat) / BLOCK as u64 + 1)).unwrap_or(usize::MAX)
}

fn notes_mapped_writes(file: &OwnedFd) -> bool {
    fs::fstatfs(file).is_ok_and(|system| NOTE_MAPPED_WRITES.contains(&system.f_type))
}
