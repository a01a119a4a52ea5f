//! Writes to a process's memory that leave no mark.
//!
//! A read with `O_DIRECT` pins the pages it reads into, and the device writes to them later, past the page tables. Marks of
//! written pages are made when a page is pinned. If such a read is under way while pages are marked as not written, what arrives
//! afterwards is told by nobody (seen: 68 to 88 of 400 moves lost data). With AIO and `io_uring` a read may even be under way while
//! all threads do something else. So the memory of a process with one of these is not followed at all: CRIU moves it, while the
//! process stands still.
//!
//! A look comes before and after each step that makes marks ([`crate::tracker::WriteTracker::round`]). In the frozen state no marks are
//! made, and a thread that stands still has no direct read under way: there it is enough that [`crate::maps::moved`] finds no
//! AIO or `io_uring` that came after the last round.
//!
//! What a look does not find: a descriptor that is opened for direct I/O, read and closed between the two looks of one step,
//! or closed by one thread while another still reads through it; one of a thread with a descriptor table of its own
//! (`unshare(CLONE_FILES)`); and `process_vm_writev` or `ptrace` by other processes at just that moment.

use std::ffi::CStr;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;

use nix::unistd::Pid;
use rustix::fs::{Dir, Mode, OFlags};

use crate::maps::{self, Mapping};

/// A way in which a process's memory may be written without a mark.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hazard {
    /// The process.
    pub process: Pid,
    /// What it has.
    pub kind: HazardKind,
}

/// What a process has that may write to its memory without a mark.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HazardKind {
    /// A file or disk that is open for direct I/O.
    DirectIo {
        /// The number of the descriptor.
        fd: i32,
        /// What it is open to.
        path: String,
    },
    /// A ring of `io_uring`.
    IoUring {
        /// The number of the descriptor; `None` where only the ring's mapping is left.
        fd: Option<i32>,
    },
    /// A context of `io_setup(2)`.
    Aio,
    /// Memory that is pinned for devices: RDMA, registered buffers.
    Pinned {
        /// How much, in KiB.
        kib: u64,
    },
}

impl fmt::Display for Hazard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {} ", self.process)?;
        match &self.kind {
            HazardKind::DirectIo { fd, path } => {
                write!(f, "has {path} open for direct I/O (O_DIRECT) as descriptor {fd}")
            }
            HazardKind::IoUring { fd: Some(fd) } => write!(f, "uses io_uring through descriptor {fd}"),
            HazardKind::IoUring { fd: None } => write!(f, "uses io_uring"),
            HazardKind::Aio => write!(f, "has a context for asynchronous I/O (io_setup)"),
            HazardKind::Pinned { kib } => write!(f, "has {kib} KiB of memory pinned for devices"),
        }?;
        write!(f, ", which may write to its memory without the kernel telling of it")
    }
}

/// Looks for what may write to a process's memory without a mark. Gives the first it finds.
///
/// Takes about 15 µs for each open file, and 5 µs for each other descriptor, half of it in opening `fdinfo`. What is faster,
/// `pidfd_getfd(2)`, ends with a close(2), which some file systems answer by writing back or asking a server.
pub fn of(process: Pid) -> io::Result<Option<Hazard>> {
    if let Some(found) = mapped(process, &maps::read(process)?) {
        return Ok(Some(found));
    }
    let hazard = |kind| Hazard { process, kind };
    match maps::status_kib(process, "VmPin:")? {
        0 => Ok(opened(process)?.map(hazard)),
        kib => Ok(Some(hazard(HazardKind::Pinned { kib }))),
    }
}

/// The same, of what can be told from the mappings alone.
pub(crate) fn mapped(process: Pid, mappings: &[Mapping]) -> Option<Hazard> {
    let kind = mappings.iter().find_map(|mapping| match mapping.name.as_str() {
        name if name.starts_with("/[aio]") => Some(HazardKind::Aio),
        // A ring whose descriptor was registered and closed is still there.
        name if name.starts_with("anon_inode:[io_uring]") => Some(HazardKind::IoUring { fd: None }),
        _ => None,
    })?;
    Some(Hazard { process, kind })
}

fn opened(process: Pid) -> io::Result<Option<HazardKind>> {
    let folder = |name| {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::open(format!("/proc/{process}/{name}"), flags, Mode::empty())
    };
    let (links, infos): (OwnedFd, OwnedFd) = (folder("fd")?, folder("fdinfo")?);
    let mut target = [0_u8; 4096];
    for entry in Dir::read_from(&links)? {
        let entry = entry?;
        let name = entry.file_name();
        let Some(fd) = name.to_str().ok().and_then(|name| name.parse().ok()) else { continue };
        // One that was closed meanwhile was none in this look.
        let Ok(length) = rustix::fs::readlinkat_raw(&links, name, &mut target[..]) else { continue };
        let target = &target[..length];
        if target.starts_with(b"anon_inode:[io_uring]") {
            return Ok(Some(HazardKind::IoUring { fd: Some(fd) }));
        }
        // On pipes the same flag has another meaning, and nothing else has it.
        if target.starts_with(b"/") && is_direct(&infos, name)? {
            let path = String::from_utf8_lossy(target).into_owned();
            return Ok(Some(HazardKind::DirectIo { fd, path }));
        }
    }
    Ok(None)
}

fn is_direct(infos: &OwnedFd, name: &CStr) -> io::Result<bool> {
    let Ok(info) = rustix::fs::openat(infos, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()) else {
        return Ok(false);
    };
    let mut text = [0_u8; 128];
    let length = match rustix::io::read(&info, &mut text) {
        Ok(length) => length,
        Err(rustix::io::Errno::NOENT) => return Ok(false),
        Err(error) => return Err(error.into()),
    };
    let unclear = || io::Error::new(io::ErrorKind::InvalidData, "fdinfo without flags");
    let flags = flags(&text[..length]).ok_or_else(unclear)?;
    Ok(flags & libc::O_DIRECT.cast_unsigned() != 0)
}

/// The flags of open(2) that a file of `fdinfo` tells, in octal.
fn flags(text: &[u8]) -> Option<u32> {
    let line = std::str::from_utf8(text).ok()?.lines().find_map(|line| line.strip_prefix("flags:"))?;
    u32::from_str_radix(line.trim(), 8).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_octal() {
        assert_eq!(flags(b"pos:\t0\nflags:\t0140002\nmnt_id:\t29\n"), Some(0o140_002));
        assert_eq!(flags(b"pos:\t0\nflags:\t02004002\nmnt_id:\t29\n").map(|flags| flags & 0o40000), Some(0));
        assert_eq!(flags(b"pos:\t0\n"), None);
    }

    #[test]
    fn this_process_has_none() {
        assert_eq!(of(Pid::this()).unwrap(), None);
    }

    #[test]
    fn rings_without_a_descriptor_are_found_by_their_mappings() {
        let line = |line: &str| Mapping::parse(line).unwrap();
        let ring = line("7f9f584ba000-7f9f594c4000 rw-s 00000000 00:0f 1069    anon_inode:[io_uring]");
        let context = line("7f9f584ba000-7f9f594c4000 rw-s 00000000 00:10 1234   /[aio] (deleted)");
        let plain = line("7f9f584ba000-7f9f594c4000 rw-p 00000000 00:00 0 ");
        let kind = |mapping: Mapping| mapped(Pid::this(), &[plain.clone(), mapping]).map(|hazard| hazard.kind);
        assert_eq!(kind(ring), Some(HazardKind::IoUring { fd: None }));
        assert_eq!(kind(context), Some(HazardKind::Aio));
        assert_eq!(kind(plain.clone()), None);
    }

    #[test]
    fn what_is_said_names_process_and_descriptor() {
        let kind = HazardKind::DirectIo { fd: 7, path: "/data/x".to_owned() };
        let text = Hazard { process: Pid::from_raw(12), kind }.to_string();
        assert!(text.starts_with("process 12 has /data/x open for direct I/O (O_DIRECT) as descriptor 7"), "{text}");
    }
}
