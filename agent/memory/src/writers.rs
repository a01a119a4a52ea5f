//! Who can write to a file: through a descriptor, or through a mapping.
//!
//! The kernel counts them for each file (`i_writecount`): open descriptions for writing, which calls under way, asynchronous ones and
//! shared mappings keep open when their descriptor is closed. It grants a read lease (fcntl(2), `F_SETLEASE`) only when there is none, and
//! decides that in one step. So a lease that is granted says of one moment that nobody could write, however the file was
//! opened and by whom: nothing in `/proc` does.

use std::os::fd::BorrowedFd;

use crate::sys::lease;

/// Whether at this moment nobody at all can write to a file, which is open for reading here, and for nothing else. False also when that
/// cannot be known, because its file system has no leases.
///
/// Whoever opens it for writing in this moment waits for some microseconds, or is told `EWOULDBLOCK` if he does not want to wait.
///
/// ```
/// use std::os::fd::AsFd as _;
/// use podferry_memory::writers::has_none;
///
/// let file = tempfile::NamedTempFile::new()?;
/// let reader = std::fs::File::open(file.path())?;
/// assert!(!has_none(reader.as_fd()), "the temporary file is open for writing");
/// let path = file.into_temp_path();
/// assert!(has_none(reader.as_fd()));
/// # drop(path);
/// # Ok::<(), std::io::Error>(())
/// ```
pub fn has_none(file: BorrowedFd<'_>) -> bool {
    lease::try_read_lease(file).unwrap_or_else(|error| {
        tracing::debug!(%error, "who writes to a file cannot be known");
        false
    })
}

#[cfg(test)]
mod tests {
    use std::fs::{File, OpenOptions};
    use std::os::fd::AsFd as _;

    use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

    use super::*;

    #[test]
    fn a_file_has_a_writer_as_long_as_one_is_open_or_maps_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let writer = File::create(&path).unwrap();
        let reader = File::open(&path).unwrap();
        assert!(!has_none(reader.as_fd()));
        drop(writer);
        assert!(has_none(reader.as_fd()));
        let also_reads = File::open(&path).unwrap();
        assert!(has_none(reader.as_fd()), "who only reads is no writer");
        drop(also_reads);
        for _ in 0..100 {
            drop(OpenOptions::new().write(true).open(&path).unwrap());
            assert!(has_none(reader.as_fd()), "the lease is given back");
        }
    }

    #[test]
    #[allow(unsafe_code, reason = "only a mapping shows what a mapping does")]
    fn a_shared_mapping_is_a_writer_when_its_descriptor_is_closed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, [0; 4096]).unwrap();
        let reader = File::open(&path).unwrap();
        let writer = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let (protection, flags) = (ProtFlags::READ, MapFlags::SHARED);
        // SAFETY: the kernel chooses the address, and nobody uses the memory.
        let start = unsafe { mmap(std::ptr::null_mut(), 4096, protection, flags, &writer, 0) }.unwrap();
        drop(writer);
        assert!(!has_none(reader.as_fd()), "it may be made writable");
        // SAFETY: it was mapped above, and nobody uses it.
        unsafe { munmap(start, 4096) }.unwrap();
        assert!(has_none(reader.as_fd()));
    }
}
