//! Memory without a place on a disk, of which only what was written exists.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::ptr::NonNull;

use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// A memory file that is mapped whole, for reading.
///
/// Several processes may have it, of which one at a time uses it (see `pager`).
#[derive(Debug)]
pub(crate) struct SparseMemory {
    file: File,
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: the mapping belongs to this value alone and stays where it is; it is only read through `&self`, and only written
// through `&mut self`.
unsafe impl Send for SparseMemory {}
// SAFETY: as above: `&self` gives nothing but shared slices.
unsafe impl Sync for SparseMemory {}

impl SparseMemory {
    /// Memory of this length that takes nothing yet. The name appears in `/proc/PID/maps`.
    pub(crate) fn new(name: &str, length: usize) -> io::Result<Self> {
        Self::of(File::from(memfd_create(name, MemfdFlags::CLOEXEC)?), length)
    }

    /// Memory of this length that is what lies in a file. The file should be in memory, and grows to this length.
    pub(crate) fn of(file: File, length: usize) -> io::Result<Self> {
        if file.metadata()?.len() < length as u64 {
            ftruncate(&file, length as u64)?;
        }
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: the kernel chooses an address that nothing else uses, and the file is at least as long as the mapping.
        let start = unsafe { mmap(std::ptr::null_mut(), length, ProtFlags::READ, flags, &file, 0) }?;
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { file, start, length })
    }

    /// What lies there; zeros where nothing was written.
    pub(crate) fn slice(&self, offset: usize, length: usize) -> &[u8] {
        assert!(offset.checked_add(length).is_some_and(|end| end <= self.length), "{offset}+{length} is outside");
        // SAFETY: the range is inside the mapping, which lives as long as `self` and is as long as the file, which never
        // shrinks. Nobody writes while the slice lives: in this process that takes `&mut self`, and another process uses
        // the file only after this one has handed it over or before it took it over.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().add(offset), length) }
    }

    /// Writes there. Fails with `ENOMEM` or `ENOSPC` when there is no memory left for it.
    pub(crate) fn write(&mut self, offset: usize, contents: &[u8]) -> io::Result<()> {
        assert!(offset.checked_add(contents.len()).is_some_and(|end| end <= self.length), "{offset} is outside");
        // By a call instead of the mapping: the lack of memory is an error then, not a SIGBUS.
        self.file.write_all_at(contents, offset as u64)
    }

    /// Gives the memory back. What lay there reads as zeros.
    pub(crate) fn release(&mut self, offset: usize, length: usize) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(fallocate(&self.file, flags, offset as u64, length as u64)?)
    }

    /// Bytes that exist.
    pub(crate) fn used(&self) -> io::Result<u64> {
        use std::os::unix::fs::MetadataExt as _;
        Ok(self.file.metadata()?.blocks() * 512)
    }
}

impl Drop for SparseMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping was made with this address and length, and no slice of it lives longer than `self`.
        let unmapped = unsafe { munmap(self.start.as_ptr().cast(), self.length) };
        debug_assert_eq!(unmapped, Ok(()));
    }
}
