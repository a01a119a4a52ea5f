//! Reading pages of another process.

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::unix::fs::FileExt as _;

use nix::errno::Errno;
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;

use crate::PAGE_SIZE;
use crate::range::{PageRange, PageRanges};
use crate::store::Store;

/// The most ranges that are read with one call (`UIO_MAXIOV` is 1024; 512 is where it stops to pay).
const MAX_RANGES: usize = 512;

/// Pages that were read together: the ranges, and what they hold, one after the other.
#[derive(Debug)]
pub struct Batch<'a> {
    /// Where the pages are, ascending.
    pub ranges: &'a [PageRange],
    /// Their contents, in the same order.
    pub contents: &'a [u8],
}

/// What was read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Copied {
    /// Pages that were read.
    pub pages: u64,
    /// Pages that could not be read. When they are there again, [`WriteTracker::tell_again`] has to tell them.
    ///
    /// [`WriteTracker::tell_again`]: crate::tracker::WriteTracker::tell_again
    pub vanished: PageRanges,
}

/// Reads pages of one process, in batches of up to a fixed length.
#[derive(Debug)]
pub struct Copier {
    process: Pid,
    /// Opened at the first page that the fast way does not read.
    memory: Option<File>,
    /// Bytes of a batch.
    length: usize,
    /// Used by whoever does not bring buffers.
    buffer: Vec<u8>,
    ranges: Vec<PageRange>,
}

impl Copier {
    /// A reader whose batches have up to `length` bytes, a multiple of the page's.
    pub fn new(process: Pid, length: usize) -> Self {
        debug_assert!(length > 0 && (length as u64).is_multiple_of(PAGE_SIZE));
        Self { process, memory: None, length, buffer: Vec::new(), ranges: Vec::new() }
    }

    /// Reads all pages and hands them over batch by batch. Pages that vanish meanwhile are left out: the process unmapped
    /// them, and what is there then is written anew. Of one that ended, all are.
    pub fn read<E: From<io::Error>>(
        &mut self,
        ranges: &PageRanges,
        mut take: impl FnMut(Batch<'_>) -> Result<(), E>,
    ) -> Result<Copied, E> {
        let room = RefCell::new(std::mem::take(&mut self.buffer));
        let copied = self.read_into(
            ranges,
            || room.take(),
            |ranges, contents| {
                let taken = take(Batch { ranges, contents: &contents });
                room.replace(contents);
                taken
            },
        );
        self.buffer = room.into_inner();
        copied
    }

    /// As [`Self::read`], each batch into a buffer of the caller's, who gets it back with the pages in it: so they are not copied once
    /// more on their way.
    pub fn read_into<E: From<io::Error>>(
        &mut self,
        ranges: &PageRanges,
        mut room: impl FnMut() -> Vec<u8>,
        mut take: impl FnMut(&[PageRange], Vec<u8>) -> Result<(), E>,
    ) -> Result<Copied, E> {
        // Anew each time: an open one stays with the memory of the program that ran then (execve(2)).
        self.memory = None;
        let mut copied = Copied::default();
        let mut pieces = Pieces::new(ranges);
        loop {
            self.ranges.clear();
            pieces.fill(&mut self.ranges, self.length as u64);
            if self.ranges.is_empty() {
                return Ok(copied);
            }
            let mut contents = room();
            self.fill(&mut contents, &mut copied.vanished)?;
            copied.pages += contents.len() as u64 / PAGE_SIZE;
            if !contents.is_empty() {
                take(&self.ranges, contents)?;
            }
        }
    }

    /// Fills the buffer with the ranges' pages; takes those out of the ranges that are not there, and notes them.
    fn fill(&mut self, contents: &mut Vec<u8>, vanished: &mut PageRanges) -> io::Result<()> {
        let wanted: u64 = self.ranges.iter().map(|range| range.length()).sum();
        let wanted = usize::try_from(wanted).unwrap_or(usize::MAX);
        contents.resize(wanted, 0);
        if read_ranges(self.process, &self.ranges, contents)? != wanted {
            let length = self.fill_page_by_page(contents, vanished)?;
            contents.truncate(length);
        }
        Ok(())
    }

    /// As [`Self::fill`], in the way that also reads what the process itself may not (`PROT_NONE`).
    fn fill_page_by_page(&mut self, contents: &mut [u8], vanished: &mut PageRanges) -> io::Result<usize> {
        let memory = match &mut self.memory {
            Some(memory) => memory,
            none => match File::open(format!("/proc/{}/mem", self.process)) {
                Ok(memory) => none.insert(memory),
                Err(error) if is_gone(&error) => {
                    self.ranges.drain(..).for_each(|range| vanished.push(range));
                    return Ok(0);
                }
                Err(error) => return Err(error),
            },
        };
        let mut there = PageRanges::new();
        let mut length = 0;
        for page in self.ranges.iter().flat_map(|range| range.single_pages()) {
            match memory.read_exact_at(&mut contents[length..length + PAGE], page.start) {
                Ok(()) => {
                    there.push(page);
                    length += PAGE;
                }
                // An address without a mapping; the end of the file when the process has ended.
                Err(error) if is_gone(&error) => vanished.push(page),
                Err(error) => return Err(error),
            }
        }
        self.ranges.clear();
        self.ranges.extend(&there);
        Ok(length)
    }
}

#[expect(clippy::cast_possible_truncation, reason = "4096")]
const PAGE: usize = PAGE_SIZE as usize;

/// Whether an address is not mapped, or the process has ended, or is between two programs.
fn is_gone(error: &io::Error) -> bool {
    let gone = [libc::EIO, libc::ESRCH, libc::ENOENT];
    error.kind() == io::ErrorKind::UnexpectedEof || error.raw_os_error().is_some_and(|error| gone.contains(&error))
}

/// Reads as much as can be read without a gap.
fn read_ranges(process: Pid, ranges: &[PageRange], buffer: &mut [u8]) -> io::Result<usize> {
    let remote: Vec<RemoteIoVec> = ranges.iter().map(|range| remote(range.start, range.length())).collect();
    match process_vm_readv(process, &mut [IoSliceMut::new(buffer)], &remote) {
        Ok(length) => Ok(length),
        Err(Errno::EFAULT | Errno::ESRCH) => Ok(0),
        Err(error) => Err(error.into()),
    }
}

fn remote(address: u64, length: u64) -> RemoteIoVec {
    let native = |number| usize::try_from(number).unwrap_or(usize::MAX);
    RemoteIoVec { base: native(address), len: native(length) }
}

/// Reads memory of a process; fails when not all of it is there.
pub fn read_exact(process: Pid, address: u64, buffer: &mut [u8]) -> io::Result<()> {
    let length = buffer.len();
    let read = process_vm_readv(process, &mut [IoSliceMut::new(buffer)], &[remote(address, length as u64)])?;
    if read == length { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

/// Bytes of `struct rseq`, and what it is aligned to (rseq(2)).
const RSEQ: usize = 32;

/// Compares kept pages with those of a process that stands still; gives the first page that differs or is not kept.
///
/// A page may differ inside one area of a `struct rseq`: the kernel writes the number of the processor there whenever the thread
/// returns to user mode, also when that is CRIU's parasite, which runs in the frozen process; and will do so again.
pub fn first_difference(process: Pid, ranges: &PageRanges, store: &Store) -> io::Result<Option<PageRange>> {
    let mut different = None;
    let copied = Copier::new(process, 1 << 20).read::<io::Error>(ranges, |batch| {
        let mut rest = batch.contents;
        for page in batch.ranges.iter().flat_map(|range| range.single_pages()) {
            let (contents, later) = rest.split_at(PAGE);
            rest = later;
            if different.is_none() && !store.run(page).is_some_and(|kept| is_same(kept, contents)) {
                different = Some(page);
            }
        }
        Ok(())
    })?;
    if !copied.vanished.is_empty() {
        let pages = copied.vanished.pages();
        return Err(io::Error::other(format!("{pages} pages of a process that stands still are gone")));
    }
    Ok(different)
}

fn is_same(kept: &[u8], contents: &[u8]) -> bool {
    kept.len() == contents.len()
        && kept.chunks(RSEQ).zip(contents.chunks(RSEQ)).filter(|(kept, contents)| kept != contents).count() <= 1
}

/// Cuts ranges into pieces that fit a batch.
struct Pieces<'a> {
    rest: &'a [PageRange],
    /// Up to where the first of them was handed out.
    cursor: u64,
}

impl<'a> Pieces<'a> {
    fn new(ranges: &'a PageRanges) -> Self {
        Self { rest: ranges.as_slice(), cursor: 0 }
    }

    fn fill(&mut self, into: &mut Vec<PageRange>, mut room: u64) {
        while room > 0 && into.len() < MAX_RANGES {
            let Some((first, rest)) = self.rest.split_first() else { return };
            let start = first.start.max(self.cursor);
            let end = first.end.min(start + room);
            into.push(PageRange::new(start, end));
            room -= end - start;
            self.cursor = end;
            if end == first.end {
                self.rest = rest;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> PageRange {
        PageRange::new(start * PAGE_SIZE, end * PAGE_SIZE)
    }

    #[test]
    fn pieces_fit_and_lose_nothing() {
        let all: PageRanges = [range(1, 4), range(6, 7), range(10, 30)].into_iter().collect();
        let (mut pieces, mut seen) = (Pieces::new(&all), PageRanges::new());
        loop {
            let mut batch = Vec::new();
            pieces.fill(&mut batch, 5 * PAGE_SIZE);
            if batch.is_empty() {
                break;
            }
            assert!(batch.iter().map(|range| range.pages()).sum::<u64>() <= 5);
            for range in batch {
                seen.push(range);
            }
        }
        assert_eq!(seen, all);
    }

    #[test]
    fn what_is_mapped_is_read_and_what_is_not_is_left_out() {
        let page = PAGE;
        let memory: Vec<u8> = (0..8 * page).map(|index| u8::try_from(index / page).unwrap()).collect();
        let address = (memory.as_ptr() as u64).next_multiple_of(PAGE_SIZE);
        let own = PageRange::new(address, address + 6 * PAGE_SIZE);
        // The first page of an address space is never mapped.
        let all: PageRanges = [PageRange::new(0, PAGE_SIZE), own].into_iter().collect();
        let (mut contents, mut ranges) = (Vec::new(), PageRanges::new());
        let copied = Copier::new(Pid::this(), 4 * page)
            .read::<io::Error>(&all, |batch| {
                contents.extend_from_slice(batch.contents);
                batch.ranges.iter().for_each(|range| ranges.push(*range));
                Ok(())
            })
            .unwrap();
        assert_eq!((copied.pages, copied.vanished.as_slice()), (6, &all.as_slice()[..1]));
        assert_eq!(ranges.as_slice(), [own]);
        let offset = usize::try_from(address - memory.as_ptr() as u64).unwrap();
        assert_eq!(contents, memory[offset..offset + 6 * page]);
    }
}
