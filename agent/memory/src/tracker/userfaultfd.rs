//! Following writes by asynchronous write protection.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;

use nix::unistd::Pid;

use super::pagemap::{self, HIGHEST, LOWEST, Pagemap};
use super::{Choice, Frozen, TrackError, WriteTracker, refuse_hazards};
use crate::PAGE_SIZE;
use crate::inject::{self, Injected};
use crate::maps::{self, Mapping};
use crate::moves::Moves;
use crate::range::{PageRange, PageRanges};
use crate::sys::pagemap::{Query, category};
use crate::sys::userfaultfd::{self, feature};

/// The tracker's name.
pub(super) const NAME: &str = "userfaultfd";

/// Follows a process's writes by write protection that the kernel lifts by itself (userfaultfd, `UFFD_FEATURE_WP_ASYNC`).
///
/// The first write to a page after a round costs the process about 1 µs; nothing else of it is slower. What is not
/// registered, such as a new mapping, counts as written. Dropping ends the following, at 20 to 35 ms for each GiB during
/// which the process cannot change its mappings: keep it until the migration is over.
///
/// A userfaultfd belongs to the memory that the process had when it was made. After execve(2) the process has other memory, of which
/// nothing is registered; the old one is gone, or lives on in a process that shared it. So the pages are looked for in a
/// `pagemap` that is opened anew each time, where what is not registered counts as written, and a round in which nothing at all is
/// registered there ends with [`TrackError::Replaced`].
#[derive(Debug)]
pub struct UserfaultfdTracker {
    process: Pid,
    choice: Choice,
    /// Before the userfaultfd: its reader ends first.
    moves: Moves,
    userfaultfd: Arc<OwnedFd>,
    pagemap: Pagemap,
    /// Mappings that the kernel does not register.
    refused: Vec<PageRange>,
    /// What is told again although the kernel has no mark of it.
    owed: PageRanges,
    /// Categories of pages that hold nothing.
    empty: u64,
}

/// What is asked of the kernel.
const FEATURES: u64 = feature::WP_ASYNC
    | feature::WP_UNPOPULATED
    | feature::WP_HUGETLBFS_SHMEM
    | feature::PAGEFAULT_FLAG_WP
    | feature::EVENT_REMAP;

/// The last page a mapping could have. Between it and the stack the kernel leaves room.
const UNUSED: PageRange = PageRange::new(HIGHEST - PAGE_SIZE, HIGHEST);

impl UserfaultfdTracker {
    /// Whether this kernel can do it at all: tried out on this process, of which nothing is followed.
    ///
    /// # Errors
    /// What the kernel says: `EINVAL` before Linux 6.7 or without `CONFIG_PTE_MARKER_UFFD_WP`.
    pub fn try_kernel() -> io::Result<()> {
        userfaultfd::handshake(userfaultfd::own()?.as_fd(), FEATURES)
    }

    /// Begins to follow a process, one thread of which stands still for some 100 µs.
    pub fn attach(process: Pid) -> Result<Self, TrackError> {
        let Injected { userfaultfd, .. } = inject::userfaultfd(process)?;
        userfaultfd::handshake(userfaultfd.as_fd(), FEATURES)
            .map_err(|source| TrackError::NoAsynchronousProtection { process, source })?;
        let pagemap = Pagemap::of(process).map_err(TrackError::of_file(process, "pagemap"))?;
        let empty = pagemap.empty_categories();
        let userfaultfd = Arc::new(userfaultfd);
        let moves = Moves::of(Arc::clone(&userfaultfd)).map_err(|source| TrackError::Moves { process, source })?;
        let reason = "the kernel marks written pages by itself, without the process standing still".to_owned();
        let choice = Choice { tracker: NAME, reason };
        let (refused, owed) = (Vec::new(), PageRanges::new());
        let mut tracker = Self { process, choice, moves, userfaultfd, pagemap, refused, owed, empty };
        // Now, so that whoever cannot be followed is known before anything of it is copied.
        let mappings = tracker.mappings()?;
        tracker.register(&mappings)?;
        tracker.confirm()?;
        Ok(tracker)
    }

    /// What has to be told whatever the kernel's marks say.
    fn take_owed(&mut self) -> PageRanges {
        let mut owed = std::mem::take(&mut self.owed);
        for range in &self.moves.take() {
            owed.push(range);
        }
        owed
    }

    fn mappings(&self) -> Result<Vec<Mapping>, TrackError> {
        let process = self.process;
        let mappings = maps::read(process).map_err(TrackError::of_file(process, "maps"))?;
        if mappings.is_empty() { Err(TrackError::Ended { process }) } else { Ok(mappings) }
    }

    /// Opens `pagemap` anew, and makes sure that the memory it shows is the one that is followed.
    fn confirm(&mut self) -> Result<(), TrackError> {
        let process = self.process;
        self.pagemap.reopen().map_err(TrackError::of_file(process, "pagemap"))?;
        if !userfaultfd::has_memory(self.userfaultfd.as_fd(), UNUSED) {
            return Err(self.is_replaced());
        }
        // The memory may be in use still, though by another process. Something of this one's is registered always: its stack, at
        // least. Nobody else may register it as long as this userfaultfd is open.
        let is_followed = self.pagemap.is_followed();
        let everything = PageRange::new(LOWEST, HIGHEST);
        if is_followed.map_err(|source| self.scan_error(everything, source))? {
            Ok(())
        } else {
            Err(self.is_replaced())
        }
    }

    /// The error for memory that is not the process's: it ended, or has other memory now.
    fn is_replaced(&self) -> TrackError {
        self.mappings().err().unwrap_or(TrackError::Replaced { process: self.process })
    }

    /// Registers everything that is not refused, in spans with their holes.
    ///
    /// A span covers whole mappings even when the process changes them meanwhile. A range that was read from `maps` a moment
    /// ago might be a part of a mapping by now; registering it would split the mapping, and the process's `mremap` of the
    /// whole would fail.
    fn register(&mut self, mappings: &[Mapping]) -> Result<(), TrackError> {
        let Err((range, source)) = self.register_spans(mappings) else { return Ok(()) };
        if !userfaultfd::has_memory(self.userfaultfd.as_fd(), UNUSED) {
            return Err(self.is_replaced());
        }
        // Some mapping cannot be registered. Found out by registering each alone, it splits the spans from now on.
        self.refused = self.registered_alone(mappings)?;
        let failed = |(range, source)| TrackError::Register { process: self.process, range, source };
        if self.refused.is_empty() {
            return Err(failed((range, source)));
        }
        self.register_spans(mappings).map_err(failed)
    }

    /// Registers each mapping alone, and gives those that cannot be.
    ///
    /// One that belongs to another userfaultfd is an error: its marks are that one's, and to renew them here would take from
    /// the other what it has not told yet.
    fn registered_alone(&self, mappings: &[Mapping]) -> Result<Vec<PageRange>, TrackError> {
        let mut refused = Vec::new();
        for range in mappings.iter().filter(|mapping| !mapping.is_kernels()).map(|mapping| mapping.range) {
            match userfaultfd::register_write_protection(self.userfaultfd.as_fd(), range) {
                Ok(()) => {}
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                    return Err(TrackError::Shared { process: self.process });
                }
                Err(_) => refused.push(range),
            }
        }
        Ok(refused)
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
        let scanned = self.pagemap.scan(range, query, &mut |region| into.push(region.range()));
        match scanned {
            Ok(()) => Ok(()),
            // Not registered: all that is there counts as written. Nothing of it is protected, so the next round tells it
            // again.
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                into.truncate(range.start);
                let all = Query { with: 0, protect: false, ..query };
                let scanned = self.pagemap.scan(range, all, &mut |region| into.push(region.range()));
                scanned.map_err(|source| self.scan_error(range, source))
            }
            Err(source) => Err(self.scan_error(range, source)),
        }
    }

    fn scan_error(&self, range: PageRange, source: io::Error) -> TrackError {
        // The memory that was looked at is gone: newer kernels say so, in the midst of a scan too.
        if source.raw_os_error() == Some(libc::ESRCH) {
            return self.is_replaced();
        }
        TrackError::Scan { process: self.process, range, source }
    }
}

impl WriteTracker for UserfaultfdTracker {
    fn process(&self) -> Pid {
        self.process
    }

    fn choice(&self) -> &Choice {
        &self.choice
    }

    fn round(&mut self) -> Result<PageRanges, TrackError> {
        refuse_hazards(self.process)?;
        // Before anything is registered: where the old memory lives on in another process, it must not be registered by the
        // mappings of this one.
        self.confirm()?;
        let mappings = self.mappings()?;
        self.register(&mappings)?;
        // Read again: what was mapped meanwhile is told as written, whether it was registered or not.
        let moved =
            maps::followable(self.process).map_err(TrackError::of_file(self.process, "maps, status or smaps"))?;
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
            let scanned = self.pagemap.scan(range, all, &mut |region| written.push(region.range()));
            scanned.map_err(|source| self.scan_error(range, source))?;
        }
        self.confirm()?;
        refuse_hazards(self.process)?;
        Ok(written)
    }
    fn tell_again(&mut self, pages: &PageRanges) {
        for range in pages {
            self.owed.push(range);
        }
    }

    fn frozen(&mut self, ranges: &PageRanges) -> Result<Frozen, TrackError> {
        let query = Query {
            with: 0,
            without: self.empty,
            any_of: category::PRESENT | category::SWAPPED,
            tell: category::WRITTEN | category::PRESENT,
            protect: false,
        };
        let regions = pagemap::scan_together(self.process, ranges, query, pagemap::SHARE);
        let regions = regions.map_err(|(range, source)| self.scan_error(range, source))?;
        let mut frozen = Frozen::default();
        for region in &regions {
            frozen.existing.push(region.range());
            if region.is(category::WRITTEN) {
                frozen.written.push(region.range());
            }
        }
        let owed = self.take_owed();
        for range in &owed.intersection(&frozen.existing) {
            frozen.written.push(range);
        }
        // A freeze that is given up must not forget them.
        self.owed = owed;
        Ok(frozen)
    }
}
