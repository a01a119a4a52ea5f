//! `/proc/PID/pagemap`, looked at range by range.

use std::fs::File;
use std::io;
use std::num::NonZero;
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::thread;

use nix::unistd::Pid;

use crate::PAGE_SIZE;
use crate::range::{PageRange, PageRanges};
use crate::sys::pagemap::{self, Query, Region, category};

/// The lowest address that a mapping may have on all kernels (`vm.mmap_min_addr`).
pub(super) const LOWEST: u64 = 64 * 1024;
/// The end of the addresses of a process with four page-table levels, less the guard page.
pub(super) const HIGHEST: u64 = (1 << 47) - PAGE_SIZE;

/// Regions that are asked for at a time: 192 KiB.
const REGIONS: usize = 8192;
/// Entries that are read at a time: 512 KiB, of 256 MiB of addresses.
const ENTRIES: u64 = 64 * 1024;

/// What a thread looks at, at least, where several share a scan: 7 ms. CRIU's dump, which runs beside, takes longer.
pub(super) const SHARE: u64 = 1 << 30;
/// Shares end where page tables do, so that no two threads want the same.
const TABLE: u64 = 2 << 20;
/// More threads than this are not needed: they look at 8 GiB in 7 ms.
const MOST_THREADS: usize = 8;

/// The pages of a process.
#[derive(Debug)]
pub(super) struct Pagemap {
    process: Pid,
    file: File,
    regions: Vec<Region>,
}

impl Pagemap {
    pub(super) fn of(process: Pid) -> io::Result<Self> {
        Ok(Self { process, file: open(process)?, regions: vec![Region::default(); REGIONS] })
    }

    /// Opens it anew. An open one stays with the memory that the process had then; after execve(2) that is not the process's any more,
    /// and has no pages.
    pub(super) fn reopen(&mut self) -> io::Result<()> {
        self.file = open(self.process)?;
        Ok(())
    }

    /// Whether writes to any of this memory are followed by a userfaultfd.
    pub(super) fn is_followed(&self) -> io::Result<bool> {
        pagemap::any(self.file.as_fd(), PageRange::new(LOWEST, HIGHEST), category::FOLLOWED)
    }

    /// Whether the kernel can look for pages by this category.
    pub(super) fn knows(&self, category: u64) -> bool {
        pagemap::any(self.file.as_fd(), PageRange::new(LOWEST, LOWEST + PAGE_SIZE), category).is_ok()
    }

    /// Categories of pages that hold nothing: the shared page of zeros, and guard regions where the kernel knows them.
    pub(super) fn empty_categories(&self) -> u64 {
        let guard = if self.knows(category::GUARD) { category::GUARD } else { 0 };
        category::PFNZERO | guard
    }

    pub(super) fn scan(&mut self, range: PageRange, query: Query, found: &mut dyn FnMut(&Region)) -> io::Result<()> {
        let mut start = range.start;
        while start < range.end {
            let rest = PageRange::new(start, range.end);
            let (count, end) = pagemap::scan(self.file.as_fd(), rest, query, &mut self.regions)?;
            self.regions[..count].iter().for_each(&mut *found);
            // With room left in the list, all was looked at. The kernel's word for how far it got is then that of the last time
            // its own list of 512 regions was full, not the end (`do_pagemap_scan` sets `walk_end` only if it is 0). Looking at
            // the rest again would cost nothing but time, if its regions were not taken for a repetition: what was written
            // between the two looks is told only in the second.
            if count < self.regions.len() {
                return Ok(());
            }
            if end <= start {
                return Err(io::Error::other(format!("the scan does not get beyond {start:#x}")));
            }
            start = end;
        }
        Ok(())
    }

    /// Reads the entry of each page, for kernels without `PAGEMAP_SCAN`. Gives runs of pages that hold something, ascending, and
    /// whether they may have been written: they have the soft-dirty mark, or are no page of this mapping's alone.
    pub(super) fn read(&self, range: PageRange, found: &mut dyn FnMut(PageRange, bool)) -> io::Result<()> {
        let mut bytes = vec![0_u8; 8 * usize::try_from(ENTRIES).unwrap_or(0)];
        let mut start = range.start;
        while start < range.end {
            let end = range.end.min(start + ENTRIES * PAGE_SIZE);
            let length = usize::try_from(8 * PageRange::new(start, end).pages()).unwrap_or(0);
            self.file.read_exact_at(&mut bytes[..length], start / PAGE_SIZE * 8)?;
            let entries = bytes[..length].chunks_exact(8).map(|entry| entry.try_into().map_or(0, u64::from_ne_bytes));
            for (run, dirty) in runs(start, entries) {
                found(run, dirty);
            }
            start = end;
        }
        Ok(())
    }
}

fn open(process: Pid) -> io::Result<File> {
    File::open(format!("/proc/{process}/pagemap"))
}

/// Looks at ranges of a process with as many threads as there are processors, each with at least so many bytes. Gives what was
/// found, ascending.
///
/// For a process that stands still: one that changes its mappings may come between two threads.
pub(super) fn scan_together(
    process: Pid,
    ranges: &PageRanges,
    query: Query,
    least: u64,
) -> Result<Vec<Region>, (PageRange, io::Error)> {
    let threads = thread::available_parallelism().map_or(1, NonZero::get).min(MOST_THREADS);
    let shares = shares(ranges, threads, least);
    if let [share] = shares.as_slice() {
        return scan_share(process, share, query);
    }
    let found: Vec<_> = thread::scope(|scope| {
        let scans: Vec<_> = shares.iter().map(|share| scope.spawn(|| scan_share(process, share, query))).collect();
        scans.into_iter().map(|scan| scan.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    });
    Ok(found.into_iter().collect::<Result<Vec<_>, _>>()?.concat())
}

fn scan_share(process: Pid, ranges: &[PageRange], query: Query) -> Result<Vec<Region>, (PageRange, io::Error)> {
    let Some(first) = ranges.first() else { return Ok(Vec::new()) };
    let mut pagemap = Pagemap::of(process).map_err(|source| (*first, source))?;
    let mut found = Vec::new();
    for range in ranges {
        pagemap.scan(*range, query, &mut |region| found.push(*region)).map_err(|source| (*range, source))?;
    }
    Ok(found)
}

/// Cuts ranges into shares of about the same size, ascending, for so many threads; not into smaller ones than it is worth.
fn shares(ranges: &PageRanges, threads: usize, least: u64) -> Vec<Vec<PageRange>> {
    let all: u64 = ranges.iter().map(PageRange::length).sum();
    let share = all.div_ceil(u64::try_from(threads).unwrap_or(1)).max(least);
    let mut shares = vec![Vec::new()];
    let mut room = share;
    for mut range in ranges {
        while range.length() > room {
            let cut = (range.start + room).next_multiple_of(TABLE).min(range.end);
            if cut > range.start {
                shares.last_mut().into_iter().for_each(|share| share.push(PageRange::new(range.start, cut)));
                range = PageRange::new(cut, range.end);
            }
            shares.push(Vec::new());
            room = share;
        }
        room -= range.length();
        if !range.is_empty() {
            shares.last_mut().into_iter().for_each(|share| share.push(range));
        }
    }
    shares
}

/// Bits of an entry (`Documentation/admin-guide/mm/pagemap.rst`).
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const GUARD: u64 = 1 << 58;
/// Mapped once and nowhere else (Linux 4.2). The shared page of zeros never has this bit, nor the soft-dirty mark: it may have come to
/// where something else was before. So may not a page that is shared with a child since fork(2), but the two look alike.
const EXCLUSIVE: u64 = 1 << 56;
/// Written since the marks were cleared, or of a mapping that is newer than that (`VM_SOFTDIRTY`).
pub(super) const SOFT_DIRTY: u64 = 1 << 55;

/// Runs of pages that hold something and are alike.
fn runs(start: u64, entries: impl Iterator<Item = u64>) -> Vec<(PageRange, bool)> {
    let mut runs: Vec<(PageRange, bool)> = Vec::new();
    let addresses = (start..).step_by(usize::try_from(PAGE_SIZE).unwrap_or(usize::MAX));
    for (address, entry) in addresses.zip(entries) {
        if entry & (PRESENT | SWAPPED) == 0 || entry & GUARD != 0 {
            continue;
        }
        let dirty = entry & SOFT_DIRTY != 0 || entry & (PRESENT | EXCLUSIVE) == PRESENT;
        match runs.last_mut() {
            Some((run, same)) if *same == dirty && run.end == address => run.end += PAGE_SIZE,
            _ => runs.push((PageRange::new(address, address + PAGE_SIZE), dirty)),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_of_pages_that_are_alike() {
        let entries = [
            0,
            PRESENT | EXCLUSIVE,
            PRESENT | EXCLUSIVE | 0x1234,
            PRESENT | EXCLUSIVE | SOFT_DIRTY,
            SOFT_DIRTY,
            SWAPPED | SOFT_DIRTY,
            SWAPPED | GUARD,
            PRESENT | SOFT_DIRTY,
            // The page of zeros, or one of a parent and its child.
            PRESENT,
            SWAPPED,
        ];
        let page =
            |first: u64, behind: u64| PageRange::new(0x1_0000 + first * PAGE_SIZE, 0x1_0000 + behind * PAGE_SIZE);
        let expected =
            [(page(1, 3), false), (page(3, 4), true), (page(5, 6), true), (page(7, 9), true), (page(9, 10), false)];
        assert_eq!(runs(0x1_0000, entries.into_iter()), expected);
    }

    const LEAST: u64 = 4 << 20;

    #[test]
    fn shares_are_all_there_is_once_and_in_order() {
        let ranges: PageRanges =
            [(0x1000, 0x3000), (0x10_0000, 0x10_0000 + 5 * LEAST), (0x10_0000_0000, 0x10_0000_0000 + LEAST)]
                .into_iter()
                .map(|(start, end)| PageRange::new(start, end))
                .collect();
        for threads in [1, 2, 3, 8, 100] {
            let shares = shares(&ranges, threads, LEAST);
            assert!(shares.len() <= threads && (threads < 2 || shares.len() > 1), "{threads}: {shares:?}");
            assert!(shares.concat().windows(2).all(|two| two[0].end <= two[1].start), "{shares:?}");
            assert_eq!(shares.concat().into_iter().collect::<PageRanges>(), ranges);
        }
        assert_eq!(shares(&PageRanges::new(), 4, LEAST), [vec![]]);
    }

    #[test]
    fn many_threads_find_what_one_does() {
        let memory = vec![1_u8; 3 * usize::try_from(LEAST).unwrap()];
        let start = (memory.as_ptr() as u64).next_multiple_of(PAGE_SIZE);
        let range = PageRange::new(start, start + 3 * LEAST - PAGE_SIZE);
        let any_of = category::PRESENT | category::SWAPPED;
        let query = Query { with: 0, without: 0, any_of, tell: any_of, protect: false };
        let found = scan_together(Pid::this(), &[range].into_iter().collect(), query, LEAST).unwrap();
        assert_eq!(found.iter().map(Region::range).collect::<PageRanges>().as_slice(), [range]);
        assert!(scan_together(Pid::this(), &PageRanges::new(), query, LEAST).unwrap().is_empty());
    }

    #[test]
    fn reading_entries_finds_what_a_scan_finds() {
        let memory = vec![1_u8; 3 << 20];
        let start = (memory.as_ptr() as u64).next_multiple_of(PAGE_SIZE);
        let range = PageRange::new(start, start + (2 << 20));
        let mut pagemap = Pagemap::of(Pid::this()).unwrap();
        let mut read = crate::range::PageRanges::new();
        pagemap.read(range, &mut |run, _| read.push(run)).unwrap();
        let any_of = category::PRESENT | category::SWAPPED;
        let query = Query { with: 0, without: 0, any_of, tell: any_of, protect: false };
        let mut scanned = crate::range::PageRanges::new();
        pagemap.scan(range, query, &mut |region| scanned.push(region.range())).unwrap();
        assert_eq!(read.as_slice(), [range]);
        assert_eq!(read, scanned);
        assert!(!pagemap.is_followed().unwrap());
    }
}
