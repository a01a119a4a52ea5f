//! Counters of the kernel's trace points (`perf_event_open(2)`).

use std::ffi::CString;
use std::fs;
use std::io::{self, Read as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

/// `PERF_TYPE_TRACEPOINT`.
const TRACEPOINT: u32 = 2;
/// `attr.disabled`: it counts when it is told to.
const DISABLED: u64 = 1;
/// `PERF_FLAG_FD_CLOEXEC`.
const CLOEXEC: libc::c_ulong = 1 << 3;
/// `_IO('$', 0)` and `_IOW('$', 6, char *)`.
const ENABLE: libc::c_ulong = 0x2400;
const SET_FILTER: libc::c_ulong = 0x4008_2406;
/// Where the kernel's trace points are described.
const FOLDERS: [&str; 2] = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];

/// The first 64 bytes of `struct perf_event_attr` (`PERF_ATTR_SIZE_VER0`), which every kernel takes.
#[repr(C)]
#[derive(Default)]
struct Attributes {
    kind: u32,
    size: u32,
    config: u64,
    sample_period: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    wakeup_events: u32,
    breakpoint_type: u32,
    config1: u64,
}

const _: () = assert!(size_of::<Attributes>() == 64);

/// Counts how often one trace point is passed on one processor, by whomever.
#[derive(Debug)]
pub(crate) struct Counter(fs::File);

impl Counter {
    /// Counts from now on what passes the filter, in the kernel's words for it (`Documentation/trace/events.rst`).
    ///
    /// # Errors
    /// When the kernel has no such trace point, or does not let this process count.
    pub(crate) fn start(event: &str, filter: &str, processor: u32) -> io::Result<Self> {
        let attributes = Attributes {
            kind: TRACEPOINT,
            size: 64,
            config: number_of(event)?,
            flags: DISABLED,
            ..Attributes::default()
        };
        let processor = libc::c_int::try_from(processor).map_err(io::Error::other)?;
        // SAFETY: the attributes live until the call returns and are as long as they say; all processes, one processor, no group.
        let fd = unsafe { libc::syscall(libc::SYS_perf_event_open, &raw const attributes, -1, processor, -1, CLOEXEC) };
        let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0).ok_or_else(io::Error::last_os_error)?;
        // SAFETY: a new descriptor that nobody else has.
        let counter = Self(unsafe { OwnedFd::from_raw_fd(fd) }.into());
        let filter = CString::new(filter)?;
        counter.tell(SET_FILTER, filter.as_ptr())?;
        counter.tell(ENABLE, std::ptr::null())?;
        Ok(counter)
    }

    fn tell(&self, request: libc::c_ulong, text: *const libc::c_char) -> io::Result<()> {
        // SAFETY: one of the two requests above: the first takes a string that ends with a zero and lives until the call returns,
        // the second takes nothing.
        let told = unsafe { libc::ioctl(self.0.as_raw_fd(), request, text) };
        if told == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// How often it was.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub(crate) fn count(&self) -> io::Result<u64> {
        let mut count = [0; 8];
        (&self.0).read_exact(&mut count)?;
        Ok(u64::from_ne_bytes(count))
    }
}

fn number_of(event: &str) -> io::Result<u64> {
    let found = FOLDERS.iter().find_map(|folder| fs::read_to_string(format!("{folder}/events/{event}/id")).ok());
    let text =
        found.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("there is no trace point {event}")))?;
    text.trim().parse().map_err(io::Error::other)
}
