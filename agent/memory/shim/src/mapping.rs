//! Files that are mapped for as long as the process lives, and files of others that are written to.

#![expect(unsafe_code, reason = "mmap(2), and descriptors that C code owns")]

use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd as _, FromRawFd as _, RawFd};
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::AtomicU8;

/// So many first bytes of a file that does not shrink. Processes that are forked from this one have them too.
pub(crate) fn contents(file: &File, length: usize) -> io::Result<&'static [u8]> {
    if length == 0 {
        return Ok(&[]);
    }
    let start = map(file, length, libc::PROT_READ)?;
    // SAFETY: the mapping has this length, is never unmapped by this process while it runs code of this library, and nobody writes to
    // the file any more: it was handed over with the index that names it.
    Ok(unsafe { std::slice::from_raw_parts(start, length) })
}

/// The bytes of a file, which others may see and change.
pub(crate) fn flags(file: &File) -> io::Result<&'static [AtomicU8]> {
    let length = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
    if length == 0 {
        return Ok(&[]);
    }
    let start = map(file, length, libc::PROT_READ | libc::PROT_WRITE)?;
    // SAFETY: as in `contents`; bytes that others change meanwhile are atomic, which have the layout of bytes.
    Ok(unsafe { std::slice::from_raw_parts(start.cast::<AtomicU8>(), length) })
}

/// Maps the beginning of a file. Fails when the file is shorter.
fn map(file: &File, length: usize, protection: libc::c_int) -> io::Result<*const u8> {
    if file.metadata()?.len() < length as u64 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    // SAFETY: a new mapping, at an address that the kernel chooses.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), length, protection, libc::MAP_SHARED, file.as_raw_fd(), 0) };
    if start == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(start.cast::<u8>().cast_const()) }
}

/// A regular file of C code, which keeps it.
#[derive(Debug)]
pub(crate) struct Borrowed(ManuallyDrop<File>);

impl Borrowed {
    /// Fails when it is no regular file.
    pub(crate) fn of(fd: RawFd) -> io::Result<Self> {
        if fd < 0 {
            return Err(io::Error::from_raw_os_error(libc::EBADF));
        }
        // SAFETY: not -1; it is never closed here, and when it is not open, calls fail.
        let file = ManuallyDrop::new(unsafe { File::from_raw_fd(fd) });
        if file.metadata()?.is_file() { Ok(Self(file)) } else { Err(io::ErrorKind::InvalidInput.into()) }
    }

    pub(crate) fn length(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    pub(crate) fn write(&self, contents: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_all_at(contents, offset)
    }
}
