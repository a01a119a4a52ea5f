//! `PAGEMAP_SCAN` of `/proc/PID/pagemap` (Linux 6.7; `Documentation/admin-guide/mm/pagemap.rst`).

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use crate::range::PageRange;

/// Categories of pages (`include/uapi/linux/fs.h`).
pub(crate) mod category {
    /// In a mapping whose writes a userfaultfd follows asynchronously, whether there is a page or not.
    pub(crate) const FOLLOWED: u64 = 1 << 0;
    /// Written since it was last write-protected, or never write-protected.
    pub(crate) const WRITTEN: u64 = 1 << 1;
    /// In memory.
    pub(crate) const PRESENT: u64 = 1 << 3;
    /// In swap.
    pub(crate) const SWAPPED: u64 = 1 << 4;
    /// The shared page of zeros, which appears where memory is read that was never written.
    pub(crate) const PFNZERO: u64 = 1 << 5;
    /// Written since the soft-dirty marks were cleared, or of a mapping that is newer than that. Never set by a kernel without
    /// `CONFIG_MEM_SOFT_DIRTY`; refused by the first kernels with `PAGEMAP_SCAN`.
    pub(crate) const SOFT_DIRTY: u64 = 1 << 7;
    /// A guard region of `MADV_GUARD_INSTALL` (Linux 6.15). Older kernels refuse the bit.
    pub(crate) const GUARD: u64 = 1 << 8;
}

const WP_MATCHING: u64 = 1 << 0;
const CHECK_WPASYNC: u64 = 1 << 1;

/// `struct page_region`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

impl Region {
    pub(crate) fn range(&self) -> PageRange {
        PageRange::new(self.start, self.end)
    }

    pub(crate) fn is(&self, category: u64) -> bool {
        self.categories & category != 0
    }
}

/// `struct pm_scan_arg`.
#[repr(C)]
struct Arguments {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

nix::ioctl_readwrite!(pagemap_scan, b'f', 16, Arguments);

/// What to look for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Query {
    /// Categories that a page must have,
    pub(crate) with: u64,
    /// those it must not have,
    pub(crate) without: u64,
    /// and those of which it must have one.
    pub(crate) any_of: u64,
    /// Categories that are told of each region.
    pub(crate) tell: u64,
    /// Write-protect what is found, in the same step.
    pub(crate) protect: bool,
}

/// Looks at a range until `regions` is full. Gives how many regions were found and the address up to which it looked.
pub(crate) fn scan(
    pagemap: BorrowedFd<'_>,
    range: PageRange,
    query: Query,
    regions: &mut [Region],
) -> io::Result<(usize, u64)> {
    let arguments = Arguments {
        size: size_of::<Arguments>() as u64,
        flags: if query.protect { WP_MATCHING | CHECK_WPASYNC } else { 0 },
        start: range.start,
        end: range.end,
        walk_end: 0,
        vec: 0,
        vec_len: 0,
        max_pages: 0,
        category_inverted: query.without,
        category_mask: query.with | query.without,
        category_anyof_mask: query.any_of,
        return_mask: query.tell,
    };
    call(pagemap, arguments, regions)
}

/// Whether anything in a range has this category. Looks no further than to the first such place.
pub(crate) fn any(pagemap: BorrowedFd<'_>, range: PageRange, category: u64) -> io::Result<bool> {
    let arguments = Arguments {
        size: size_of::<Arguments>() as u64,
        flags: 0,
        start: range.start,
        end: range.end,
        walk_end: 0,
        vec: 0,
        vec_len: 0,
        max_pages: 1,
        category_inverted: 0,
        category_mask: category,
        category_anyof_mask: 0,
        return_mask: category,
    };
    let (found, _) = call(pagemap, arguments, &mut [Region::default()])?;
    Ok(found > 0)
}

fn call(pagemap: BorrowedFd<'_>, mut arguments: Arguments, regions: &mut [Region]) -> io::Result<(usize, u64)> {
    (arguments.vec, arguments.vec_len) = (regions.as_mut_ptr() as u64, regions.len() as u64);
    // SAFETY: the arguments live for the call and have the layout of `struct pm_scan_arg`; `vec` points to `vec_len`
    // elements of `struct page_region`'s layout that nobody else uses meanwhile, valid whatever the kernel writes there.
    let found = unsafe { pagemap_scan(pagemap.as_raw_fd(), &raw mut arguments) }?;
    Ok((usize::try_from(found).unwrap_or(0).min(regions.len()), arguments.walk_end))
}
