//! Which pages of a process were written since the last round.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;

use nix::unistd::Pid;
use thiserror::Error;

use crate::PAGE_SIZE;
use crate::inject::{self, InjectError, Injected};
use crate::maps::{self, Mapping};
use crate::moves::Moves;
use crate::range::{PageRange, PageRanges};
use crate::sys::pagemap::{self, Query, Region, category};
use crate::sys::userfaultfd::{self, feature};

/// Why a process's writes cannot be followed, or not any more.
#[derive(Debug, Error)]
pub enum TrackError {
    /// There is no userfaultfd of it.
    #[error(transparent)]
    Inject(#[from] InjectError),
    /// The kernel's userfaultfd cannot do what is needed.
    #[error(
        "process {process}: the kernel does not follow writes asynchronously: {source}; it needs Linux 6.7 or newer with \
         CONFIG_PTE_MARKER_UFFD_WP"
    )]
    NoAsynchronousProtection {
        /// The process.
        process: Pid,
        /// What the kernel said.
        source: io::Error,
    },
    /// Moves of its mappings cannot be read.
    #[error("process {process}: cannot read the moves of its mappings: {source}")]
    Moves {
        /// The process.
        process: Pid,
        /// What the system said.
        source: io::Error,
    },
    /// A file of `/proc` cannot be read.
    #[error("process {process}: cannot read {file}: {source}")]
    Proc {
        /// The process.
        process: Pid,
        /// Which file of its folder.
        file: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel refused to register memory.
    #[error("process {process}: cannot follow writes to {range}: {source}")]
    Register {
        /// The process.
        process: Pid,
        /// Which addresses.
        range: PageRange,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel refused to look for written pages.
    #[error("process {process}: cannot look for written pages in {range}: {source}; this needs Linux 6.7 or newer")]
    Scan {
        /// The process.
        process: Pid,
        /// Which addresses.
        range: PageRange,
        /// What the kernel said.
        source: io::Error,
    },
}

/// What a frozen process has in some ranges.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Frozen {
    /// All pages that hold something. Every other page of the ranges is zero.
    pub existing: PageRanges,
    /// Those that were written since the last round.
    pub written: PageRanges,
}

/// Follows a process's writes by write protection that the kernel lifts by itself (userfaultfd, `UFFD_FEATURE_WP_ASYNC`).
///
/// The first write to a page after a round costs the process about 1 µs; nothing else of it is slower. What is not
/// registered, such as a new mapping, counts as written. Dropping ends the following, at 20 to 35 ms for each GiB during
/// which the process cannot change its mappings: keep it until the migration is over.
#[derive(Debug)]
pub struct Tracker {
    process: Pid,
    /// Before the userfaultfd: its reader ends first.
    moves: Moves,
    userfaultfd: Arc<OwnedFd>,
    pagemap: File,
    regions: Vec<Region>,
    /// Mappings that the kernel does not register.
    refused: Vec<PageRange>,
    /// What is told again although the kernel has no mark of it.
    owed: PageRanges,
    /// Categories of pages that hold nothing.
    empty: u64,
}

/// Regions that are asked for at a time: 192 KiB.
const REGIONS: usize = 8192;
/// The lowest address that a mapping may have on all kernels (`vm.mmap_min_addr`).
const LOWEST: u64 = 64 * 1024;
/// The end of the addresses of a process with four page-table levels, less the guard page.
const HIGHEST: u64 = (1 << 47) - PAGE_SIZE;

impl Tracker {
    /// Begins to follow a process, one thread of which stands still for some 100 µs.
    pub fn attach(process: Pid) -> Result<Self, TrackError> {
        let Injected { userfaultfd, .. } = inject::userfaultfd(process)?;
        let features = feature::WP_ASYNC
            | feature::WP_UNPOPULATED
            | feature::WP_HUGETLBFS_SHMEM
            | feature::PAGEFAULT_FLAG_WP
            | feature::EVENT_REMAP;
        userfaultfd::handshake(userfaultfd.as_fd(), features)
            .map_err(|source| TrackError::NoAsynchronousProtection { process, source })?;
        let pagemap = File::open(format!("/proc/{process}/pagemap"));
        let pagemap = pagemap.map_err(|source| TrackError::Proc { process, file: "pagemap", source })?;
        let empty = empty_categories(&pagemap);
        let regions = vec![Region::default(); REGIONS];
        let userfaultfd = Arc::new(userfaultfd);
        let moves = Moves::of(Arc::clone(&userfaultfd)).map_err(|source| TrackError::Moves { process, source })?;
        Ok(Self { process, moves, userfaultfd, pagemap, regions, refused: Vec::new(), owed: PageRanges::new(), empty })
    }

    /// The process.
    pub fn process(&self) -> Pid {
        self.process
    }

    /// Begins a round: gives the pages that pre-copy moves and that were written since the last one, all existing ones the
    /// first time, and follows writes to them from now on.
    ///
    /// Read the pages after this call: a page that is written meanwhile is told again in the next round.
    pub fn round(&mut self) -> Result<PageRanges, TrackError> {
        let mappings = self.mappings()?;
        self.register(&mappings)?;
        // Read again: what was mapped meanwhile is told as written, whether it was registered or not.
        let moved = maps::pre_copied(&self.mappings()?);
        let mut written = PageRanges::new();
        let query = Query {
            with: category::WRITTEN,
            without: self.empty,
            any_of: category::PRESENT | category::SWAPPED,
            tell: category::PRESENT | category::SWAPPED,
            protect: true,
        };
        for range in &moved {
            self.scan_changing(range, query, &mut written)?;
        }
        // Taken after the scan: a move that it met half done is told by now, or will be next time.
        let owed = self.take_owed();
        // What is in a mapping that is too small now may be in a larger one next time.
        self.owed = owed.difference(&moved);
        for range in &owed.intersection(&moved) {
            let all = Query { with: 0, protect: false, ..query };
            self.scan(range, all, &mut |region| written.push(region.range()))
                .map_err(|source| self.scan_error(range, source))?;
        }
        Ok(written)
    }

    /// Tells these pages again, in the next round or in the last, if they are there then: they could not be read, because the
    /// process was changing its mappings.
    pub fn tell_again(&mut self, pages: &PageRanges) {
        for range in pages {
            self.owed.push(range);
        }
    }

    /// What has to be told whatever the kernel's marks say.
    fn take_owed(&mut self) -> PageRanges {
        let mut owed = std::mem::take(&mut self.owed);
        for range in &self.moves.take() {
            owed.push(range);
        }
        owed
    }

    /// What the frozen process has in these ranges, and what of it was written since the last round.
    ///
    /// The process must not run: all threads stopped, and no kernel work under way that writes to its memory. After this, only
    /// [`Self::round`] tells moves again that happened before.
    pub fn frozen(&mut self, ranges: &PageRanges) -> Result<Frozen, TrackError> {
        let query = Query {
            with: 0,
            without: self.empty,
            any_of: category::PRESENT | category::SWAPPED,
            tell: category::WRITTEN | category::PRESENT,
            protect: false,
        };
        let mut frozen = Frozen::default();
        for range in ranges {
            self.scan(range, query, &mut |region| {
                frozen.existing.push(region.range());
                if region.is(category::WRITTEN) {
                    frozen.written.push(region.range());
                }
            })
            .map_err(|source| self.scan_error(range, source))?;
        }
        let owed = self.take_owed();
        for range in &owed.intersection(&frozen.existing) {
            frozen.written.push(range);
        }
        // A freeze that is given up must not forget them.
        self.owed = owed;
        Ok(frozen)
    }

    fn mappings(&self) -> Result<Vec<Mapping>, TrackError> {
        let process = self.process;
        maps::read(process).map_err(|source| TrackError::Proc { process, file: "maps", source })
    }

    /// Registers everything that is not refused, in spans with their holes.
    ///
    /// A span covers whole mappings even when the process changes them meanwhile. A range that was read from `maps` a moment
    /// ago might be a part of a mapping by now; registering it would split the mapping, and the process's `mremap` of the
    /// whole would fail.
    fn register(&mut self, mappings: &[Mapping]) -> Result<(), TrackError> {
        let Err((range, source)) = self.register_spans(mappings) else { return Ok(()) };
        // Some mapping cannot be registered. Found out by registering each alone, it splits the spans from now on.
        for mapping in mappings.iter().filter(|mapping| !mapping.is_kernels()) {
            if userfaultfd::register_write_protection(self.userfaultfd.as_fd(), mapping.range).is_err() {
                self.refused.push(mapping.range);
            }
        }
        if self.refused.is_empty() {
            return Err(TrackError::Register { process: self.process, range, source });
        }
        let process = self.process;
        self.register_spans(mappings).map_err(|(range, source)| TrackError::Register { process, range, source })
    }

    fn register_spans(&self, mappings: &[Mapping]) -> Result<(), (PageRange, io::Error)> {
        let is_refused =
            |mapping: &&Mapping| self.refused.iter().any(|refused| refused.intersection(mapping.range).is_some());
        let gaps = mappings.iter().filter(|mapping| mapping.is_kernels() || is_refused(mapping));
        let mut start = LOWEST;
        for gap in gaps.map(|mapping| mapping.range).chain([PageRange::new(HIGHEST, HIGHEST)]) {
            let span = PageRange::new(start, gap.start.clamp(start, HIGHEST));
            let inhabited = mappings.iter().any(|mapping| mapping.range.intersection(span).is_some());
            if inhabited {
                let registered = userfaultfd::register_write_protection(self.userfaultfd.as_fd(), span);
                registered.map_err(|source| (span, source))?;
            }
            start = gap.end.clamp(start, HIGHEST);
        }
        Ok(())
    }

    /// Scans a range of a process that runs. What it unmapped meanwhile, or mapped anew without registration, is told whole.
    fn scan_changing(&mut self, range: PageRange, query: Query, into: &mut PageRanges) -> Result<(), TrackError> {
        let scanned = self.scan(range, query, &mut |region| into.push(region.range()));
        match scanned {
            Ok(()) => Ok(()),
            // Not registered: all that is there counts as written. Nothing of it is protected, so the next round tells it
            // again.
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                into.truncate(range.start);
                let all = Query { with: 0, protect: false, ..query };
                let scanned = self.scan(range, all, &mut |region| into.push(region.range()));
                scanned.map_err(|source| self.scan_error(range, source))
            }
            Err(source) => Err(self.scan_error(range, source)),
        }
    }

    fn scan_error(&self, range: PageRange, source: io::Error) -> TrackError {
        TrackError::Scan { process: self.process, range, source }
    }

    fn scan(&mut self, range: PageRange, query: Query, found: &mut dyn FnMut(&Region)) -> io::Result<()> {
        let mut start = range.start;
        while start < range.end {
            let rest = PageRange::new(start, range.end);
            let (count, end) = pagemap::scan(self.pagemap.as_fd(), rest, query, &mut self.regions)?;
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
}

/// Categories of pages that hold nothing: the shared page of zeros, and guard regions where the kernel knows them.
fn empty_categories(pagemap: &File) -> u64 {
    let all = category::PFNZERO | category::GUARD;
    let query = Query { with: 0, without: all, any_of: category::PRESENT, tell: category::PRESENT, protect: false };
    let nothing = PageRange::new(LOWEST, LOWEST + PAGE_SIZE);
    match pagemap::scan(pagemap.as_fd(), nothing, query, &mut [Region::default()]) {
        Ok(_) => all,
        Err(_) => category::PFNZERO,
    }
}
