//! A file's content in blocks: what is read, hashed and compared at a time.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{self, SeekFrom};
use rustix::io::Errno;
use twox_hash::XxHash3_128;

use crate::error::{Result, failed};

/// Bytes of a block. Of one that has changed all is sent: larger ones send more, smaller ones take more memory.
pub(crate) const BLOCK: usize = 64 * 1024;

/// A block by its content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Block {
    /// Which one of its file.
    pub(crate) index: u64,
    /// Of its data, and of where in it they lie.
    hash: [u64; 2],
}

impl Block {
    /// Its first byte in the file.
    pub(crate) const fn start(&self) -> u64 {
        self.index * BLOCK as u64
    }

    /// The byte behind its last one.
    pub(crate) const fn end(&self) -> u64 {
        self.start() + BLOCK as u64
    }
}

/// One block as it was read: its bytes that are in no hole.
#[derive(Debug)]
pub(crate) struct BlockBuffer {
    index: u64,
    /// Offsets in the file, and lengths; ascending.
    pieces: Vec<(u64, usize)>,
    /// As many as a block has, of which so many were read: nothing is cleared that is read over.
    room: Box<[u8]>,
    length: usize,
    /// What is hashed besides.
    layout: Vec<u8>,
    /// How long reading and hashing took.
    spent: Duration,
}

impl Default for BlockBuffer {
    fn default() -> Self {
        let room = vec![0; BLOCK].into_boxed_slice();
        Self { index: 0, pieces: Vec::new(), room, length: 0, layout: Vec::new(), spent: Duration::ZERO }
    }
}

impl BlockBuffer {
    fn begin(&mut self, index: u64) {
        self.index = index;
        self.pieces.clear();
        self.length = 0;
    }

    /// All bytes, one piece after the other.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.room[..self.length]
    }

    /// Its runs of bytes, with their offsets in the file.
    pub(crate) fn pieces(&self) -> impl Iterator<Item = (u64, &[u8])> {
        let mut rest = self.bytes();
        self.pieces.iter().map(move |(offset, length)| {
            let (piece, behind) = rest.split_at(*length);
            rest = behind;
            (*offset, piece)
        })
    }

    /// How long reading and hashing took since this was asked last.
    pub(crate) fn take_spent(&mut self) -> Duration {
        std::mem::take(&mut self.spent)
    }

    /// What it is remembered by.
    pub(crate) fn hashed(&mut self, secret: u64) -> Block {
        let begun = Instant::now();
        let content = XxHash3_128::oneshot_with_seed(secret, self.bytes());
        self.layout.clear();
        self.layout.extend(content.to_le_bytes());
        for (offset, length) in &self.pieces {
            self.layout.extend(offset.to_le_bytes());
            self.layout.extend(length.to_le_bytes());
        }
        let bytes = XxHash3_128::oneshot_with_seed(secret, &self.layout).to_le_bytes();
        self.spent += begun.elapsed();
        let half = |at: usize| u64::from_le_bytes(std::array::from_fn(|index| bytes[at + index]));
        Block { index: self.index, hash: [half(0), half(8)] }
    }

    /// Reads the file from `position` up to `end`, which lie in this block. False when it ends before.
    fn read(&mut self, file: &OwnedFd, position: u64, end: u64) -> rustix::io::Result<bool> {
        let begun = Instant::now();
        // Both lie in one block.
        let wanted = usize::try_from(end - position).unwrap_or(BLOCK);
        let room = &mut self.room[self.length..self.length + wanted];
        let mut done = 0;
        while done < wanted {
            match rustix::io::pread(file, &mut room[done..], position + done as u64)? {
                0 => break,
                read => done += read,
            }
        }
        self.spent += begun.elapsed();
        self.length += done;
        if done > 0 {
            self.pieces.push((position, done));
        }
        Ok(done == wanted)
    }
}

/// Reads the first `size` bytes of a file but for its holes, and gives block by block, ascending, what is in them. A file that is cut
/// meanwhile ends earlier.
pub(crate) fn read_blocks(
    file: &OwnedFd,
    size: u64,
    buffer: &mut BlockBuffer,
    mut each: impl FnMut(&mut BlockBuffer) -> Result<()>,
) -> Result<()> {
    buffer.begin(0);
    let mut position = 0;
    while let Some((start, end)) = next_data(file, position, size).map_err(failed("read", Path::new("a file")))? {
        position = start;
        while position < end {
            let index = position / BLOCK as u64;
            if index != buffer.index {
                give(buffer, &mut each)?;
                buffer.begin(index);
            }
            let until = end.min((index + 1) * BLOCK as u64);
            if !buffer.read(file, position, until).map_err(failed("read", Path::new("a file")))? {
                return give(buffer, &mut each);
            }
            position = until;
        }
    }
    give(buffer, &mut each)
}

fn give(buffer: &mut BlockBuffer, each: &mut impl FnMut(&mut BlockBuffer) -> Result<()>) -> Result<()> {
    if buffer.pieces.is_empty() { Ok(()) } else { each(buffer) }
}

/// The next run of data at or behind a position and before `size`.
fn next_data(file: impl AsFd, position: u64, size: u64) -> rustix::io::Result<Option<(u64, u64)>> {
    let seek = |from| match fs::seek(&file, from) {
        Ok(found) => Ok(Some(found)),
        Err(Errno::NXIO) => Ok(None),
        Err(errno) => Err(errno),
    };
    if position >= size {
        return Ok(None);
    }
    let Some(start) = seek(SeekFrom::Data(position))?.filter(|start| *start < size) else { return Ok(None) };
    let Some(end) = seek(SeekFrom::Hole(start))? else { return Ok(None) };
    // Cut and written anew between the two calls.
    Ok((end > start).then_some((start, end.min(size))))
}
