//! Spares `criu dump` and `criu restore` work that is done already, or that is for nothing.
//!
//! **Memory that has moved.** CRIU asks the kernel with the ioctl `PAGEMAP_SCAN` which pages of a mapping to dump. Preloaded into it
//! (`LD_PRELOAD`), this library stands in for the C library's `ioctl` and leaves out the ranges that a file names: their pages are neither looked at
//! nor written nor listed, as if they had never been touched. Everything else CRIU asks is passed on. Without the file, or with
//! one that cannot be read as a whole, nothing is hidden, and the dump is a whole one: whoever dumps looks at the images for
//! what was left out.
//!
//! The file has a line for each range: the process id that CRIU sees, the first address and the first one behind, these two in
//! hexadecimal. It is read when CRIU first asks for another process, so that it may be written after CRIU has started.
//!
//! **Shared memory that has moved.** Where a segment of shared memory has pages, CRIU asks with `lseek(SEEK_DATA)` of its file. Of
//! a segment that the same file names, by a line `shared` with device and inode in hexadecimal, it is told that it has none. On
//! restore what is kept of it is laid in: see [`shared`], for which this library stands in for `ftruncate` and `openat`.
//!
//! It also stands in for `openat`, to answer `/proc/PID/smaps`: see [`smaps`]; and for `sendmsg`, to answer the question for tracked
//! connections: see [`conntrack`]; and, on restore, for `system`: see [`scripts`].

mod conntrack;
mod mapping;
mod scripts;
mod shared;
mod smaps;

use std::collections::{HashMap, HashSet};
use std::sync::OnceLock;

/// The environment variable that names the file; `podferry_memory::hide` writes it.
const HIDE_VARIABLE: &str = "PODFERRY_CRIU_HIDE";

/// Addresses from the first to before the second.
type Range = (u64, u64);

/// What CRIU is not to see.
#[derive(Debug, Default, PartialEq, Eq)]
struct Hidden {
    /// The ranges of each process, ascending.
    ranges: HashMap<i32, Vec<Range>>,
    /// Segments of shared memory: device and inode.
    shared: HashSet<(u64, u64)>,
}

fn parse(text: &str) -> Option<Hidden> {
    let mut hidden = Hidden::default();
    for line in text.lines() {
        let mut words = line.split(' ');
        let whose = words.next()?;
        let mut number = || u64::from_str_radix(words.next()?, 16).ok();
        let two = (number()?, number()?);
        if whose == "shared" {
            hidden.shared.insert(two);
            continue;
        }
        (two.0 < two.1).then_some(())?;
        hidden.ranges.entry(whose.parse().ok()?).or_default().push(two);
    }
    for ranges in hidden.ranges.values_mut() {
        ranges.sort_unstable();
    }
    Some(hidden)
}

fn hidden() -> &'static Hidden {
    static HIDDEN: OnceLock<Hidden> = OnceLock::new();
    HIDDEN.get_or_init(|| {
        let text = std::env::var_os(HIDE_VARIABLE).and_then(|path| std::fs::read_to_string(path).ok());
        text.and_then(|text| parse(&text)).unwrap_or_default()
    })
}

/// What is left of a range without the hidden ones, ascending.
fn visible((start, end): Range, hidden: &[Range]) -> Vec<Range> {
    let mut left = Vec::new();
    let mut cursor = start;
    for (from, to) in hidden.iter().filter(|(from, to)| *to > start && *from < end) {
        if cursor < *from {
            left.push((cursor, *from));
        }
        cursor = cursor.max(*to);
    }
    if cursor < end {
        left.push((cursor, end));
    }
    left
}

/// The process whose `/proc/PID/pagemap` a descriptor is; `None` for CRIU's own, at which it tries the kernel out.
fn process_of(fd: libc::c_int) -> Option<i32> {
    let path = std::fs::read_link(format!("/proc/self/fd/{fd}")).ok()?;
    let folder = path.to_str()?.strip_suffix("/pagemap")?;
    let process = folder.rsplit('/').next()?.parse().ok();
    process.filter(|process| u32::try_from(*process) != Ok(std::process::id()))
}

/// `PAGE_IS_GUARD`.
const GUARD: u64 = 1 << 8;

/// Whether a scan looks for guard regions (`MADV_GUARD_INSTALL`), by its masks: what is inverted, what a page must have, of what it must
/// have one, and what is told. They hold no pages, so they are nothing that was moved: CRIU makes them again.
fn asks_for_guards(masks: &[u64; 4]) -> bool {
    let [inverted, with, ..] = masks;
    with & GUARD != 0 && inverted & GUARD == 0
}

#[expect(unsafe_code, reason = "functions of the C library, with their arguments' types, called by C")]
mod interposed {
    use std::ffi::CStr;
    use std::os::fd::IntoRawFd as _;

    use super::{Range, asks_for_guards, conntrack, hidden, process_of, scripts, shared, smaps, visible};

    /// `_IOWR('f', 16, struct pm_scan_arg)`.
    const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
    /// Bytes of `struct page_region`.
    const REGION: u64 = 24;

    /// `struct pm_scan_arg` (`include/uapi/linux/fs.h`).
    #[repr(C)]
    struct Scan {
        size: u64,
        flags: u64,
        start: u64,
        end: u64,
        walk_end: u64,
        vec: u64,
        vec_len: u64,
        max_pages: u64,
        masks: [u64; 4],
    }

    const _: () = assert!(size_of::<Scan>() == 0x60);

    fn real(fd: libc::c_int, request: libc::c_ulong, argument: *mut libc::c_void) -> libc::c_int {
        // SAFETY: what the caller wanted of ioctl(2), passed on unchanged; sets `errno` as it does.
        let result = unsafe { libc::syscall(libc::SYS_ioctl, fd, request, argument) };
        libc::c_int::try_from(result).unwrap_or(-1)
    }

    /// In place of the C library's `ioctl`. That one is variadic; on the architectures that podferry runs on, its only optional
    /// argument is passed like a third named one.
    ///
    /// # Safety
    /// As ioctl(2): `argument` must be what the request takes.
    #[unsafe(no_mangle)]
    unsafe extern "C" fn ioctl(fd: libc::c_int, request: libc::c_ulong, argument: *mut libc::c_void) -> libc::c_int {
        if request != PAGEMAP_SCAN {
            return real(fd, request, argument);
        }
        let Some(ranges) = process_of(fd).and_then(|pid| hidden().ranges.get(&pid)) else {
            return real(fd, request, argument);
        };
        // SAFETY: the caller passes a `struct pm_scan_arg` with this request, which it does not use meanwhile.
        let scan = unsafe { &mut *argument.cast::<Scan>() };
        if asks_for_guards(&scan.masks) {
            return real(fd, request, argument);
        }
        scan_around(fd, scan, ranges)
    }

    /// In place of the C library's `openat`. That one is variadic; its only optional argument is passed like a fourth named one, and
    /// the kernel does not look at it when there is none.
    ///
    /// # Safety
    /// As openat(2): `path` must be a string that ends with a zero.
    #[unsafe(no_mangle)]
    unsafe extern "C" fn openat(
        folder: libc::c_int,
        path: *const libc::c_char,
        flags: libc::c_int,
        mode: libc::mode_t,
    ) -> libc::c_int {
        // SAFETY: the caller passes a string that ends with a zero and does not change meanwhile; null is looked for before.
        let name = if path.is_null() { c"" } else { unsafe { CStr::from_ptr(path) } };
        if let Some(answer) = (name == c"smaps").then(|| smaps::answer(folder)).flatten() {
            return answer.into_raw_fd();
        }
        // SAFETY: what the caller wanted of openat(2), passed on unchanged; sets `errno` as it does.
        let result = unsafe { libc::syscall(libc::SYS_openat, folder, path, flags, mode) };
        let fd = libc::c_int::try_from(result).unwrap_or(-1);
        match shared::opens(name.to_bytes()) {
            Err(error) if fd >= 0 => fail_with(error.raw_os_error().unwrap_or(libc::EIO), Some(fd)),
            _ => fd,
        }
    }

    /// What a function of the C library gives that fails; closes what is not given away then.
    fn fail_with(error: libc::c_int, fd: Option<libc::c_int>) -> libc::c_int {
        // SAFETY: a descriptor that was opened just now, and that nobody else knows; a number of this thread's own.
        unsafe {
            fd.map(|fd| libc::close(fd));
            *libc::__errno_location() = error;
        }
        -1
    }

    /// In place of the C library's `lseek`, by the name that CRIU uses.
    ///
    /// # Safety
    /// None but those of lseek(2).
    #[unsafe(no_mangle)]
    unsafe extern "C" fn lseek64(fd: libc::c_int, offset: libc::off64_t, whence: libc::c_int) -> libc::off64_t {
        if whence == libc::SEEK_DATA
            && !hidden().shared.is_empty()
            && file_of(fd).is_some_and(|file| hidden().shared.contains(&file))
        {
            return fail_with(libc::ENXIO, None).into();
        }
        // SAFETY: what the caller wanted of lseek(2), passed on unchanged; sets `errno` as it does.
        unsafe { libc::syscall(libc::SYS_lseek, fd, offset, whence) }
    }

    /// Device and inode of a file.
    fn file_of(fd: libc::c_int) -> Option<(u64, u64)> {
        // SAFETY: all-zero is a valid `stat`, which the call fills in.
        unsafe {
            let mut found: libc::stat64 = std::mem::zeroed();
            (libc::fstat64(fd, &raw mut found) == 0).then_some((found.st_dev, found.st_ino))
        }
    }

    /// In place of the C library's `ftruncate`, by the name that CRIU uses.
    ///
    /// # Safety
    /// None but those of ftruncate(2).
    #[unsafe(no_mangle)]
    unsafe extern "C" fn ftruncate64(fd: libc::c_int, length: libc::off64_t) -> libc::c_int {
        shared::sized(fd);
        // SAFETY: what the caller wanted of ftruncate(2), passed on unchanged; sets `errno` as it does.
        let result = unsafe { libc::syscall(libc::SYS_ftruncate, fd, length) };
        libc::c_int::try_from(result).unwrap_or(-1)
    }

    /// In place of the C library's other name for `openat`, which CRIU uses.
    ///
    /// # Safety
    /// As [`openat`].
    #[unsafe(no_mangle)]
    unsafe extern "C" fn openat64(
        folder: libc::c_int,
        path: *const libc::c_char,
        flags: libc::c_int,
        mode: libc::mode_t,
    ) -> libc::c_int {
        // SAFETY: the same function with the same conditions.
        unsafe { openat(folder, path, flags, mode) }
    }

    /// In place of the C library's `sendmsg`.
    ///
    /// # Safety
    /// As sendmsg(2): `message` must be one, with readable parts.
    #[unsafe(no_mangle)]
    unsafe extern "C" fn sendmsg(fd: libc::c_int, message: *const libc::msghdr, flags: libc::c_int) -> libc::ssize_t {
        // SAFETY: the caller passes a message, which it does not change meanwhile.
        if let Some(question) = unsafe { single_part(message) }
            && conntrack::asks_for_all(&question)
            && is_to_netfilter(fd)
            && conntrack::none_is_tracked()
        {
            let mut nothing = conntrack::asking_for_nothing(question);
            let mut part = libc::iovec { iov_base: nothing.as_mut_ptr().cast(), iov_len: nothing.len() };
            // SAFETY: the caller's message, valid as before, and its one part of the same length.
            let mut changed = unsafe { *message };
            changed.msg_iov = &raw mut part;
            // SAFETY: the message and its part live until the call returns.
            return unsafe { real_sendmsg(fd, &raw const changed, flags) };
        }
        // SAFETY: what the caller wanted of sendmsg(2), passed on unchanged.
        unsafe { real_sendmsg(fd, message, flags) }
    }

    /// In place of the C library's `system`.
    ///
    /// # Safety
    /// As system(3): `command` must be null or a string that ends with a zero.
    #[unsafe(no_mangle)]
    unsafe extern "C" fn system(command: *const libc::c_char) -> libc::c_int {
        // SAFETY: not null, so it is a string that ends with a zero and does not change meanwhile.
        let replaced =
            (!command.is_null()).then(|| without_sigchld(|| scripts::run(unsafe { CStr::from_ptr(command) })));
        replaced.flatten().unwrap_or_else(|| real_system(command))
    }

    fn real_system(command: *const libc::c_char) -> libc::c_int {
        type System = unsafe extern "C" fn(*const libc::c_char) -> libc::c_int;
        // SAFETY: asks for the function that this one stands in for; a string that ends with a zero.
        let next = unsafe { libc::dlsym(libc::RTLD_NEXT, c"system".as_ptr()) };
        if next.is_null() {
            return -1;
        }
        // SAFETY: the C library's `system`, which has this type, and what its caller gave.
        unsafe { std::mem::transmute::<*mut libc::c_void, System>(next)(command) }
    }

    /// Does something while this thread is not told of children that end.
    fn without_sigchld<T>(work: impl FnOnce() -> T) -> T {
        // SAFETY: all-zero is a valid `sigset_t`; both sets live until the calls return.
        let before = unsafe {
            let (mut blocked, mut before): (libc::sigset_t, libc::sigset_t) = (std::mem::zeroed(), std::mem::zeroed());
            libc::sigemptyset(&raw mut blocked);
            libc::sigaddset(&raw mut blocked, libc::SIGCHLD);
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const blocked, &raw mut before);
            before
        };
        let done = work();
        // SAFETY: the mask that this thread had.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut()) };
        done
    }

    /// # Safety
    /// As sendmsg(2).
    unsafe fn real_sendmsg(fd: libc::c_int, message: *const libc::msghdr, flags: libc::c_int) -> libc::ssize_t {
        // SAFETY: the caller's; sets `errno` as sendmsg(2) does.
        let result = unsafe { libc::syscall(libc::SYS_sendmsg, fd, message, flags) };
        libc::ssize_t::try_from(result).unwrap_or(-1)
    }

    /// The contents of a message that has one part of the length of the question.
    ///
    /// # Safety
    /// `message` must be null or a message with readable parts.
    unsafe fn single_part(message: *const libc::msghdr) -> Option<[u8; conntrack::QUESTION]> {
        // SAFETY: null, or a message.
        let message = unsafe { message.as_ref() }?;
        if message.msg_iovlen != 1 {
            return None;
        }
        // SAFETY: it has one part.
        let part = unsafe { message.msg_iov.as_ref() }?;
        // SAFETY: a part that can be read, of that length.
        (part.iov_len == conntrack::QUESTION)
            .then(|| unsafe { part.iov_base.cast::<[u8; conntrack::QUESTION]>().read() })
    }

    fn is_to_netfilter(fd: libc::c_int) -> bool {
        let mut protocol: libc::c_int = 0;
        let mut length: libc::socklen_t = 4;
        // SAFETY: writes at most four bytes, which `protocol` has.
        let asked = unsafe {
            libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_PROTOCOL, (&raw mut protocol).cast(), &raw mut length)
        };
        asked == 0 && protocol == libc::NETLINK_NETFILTER
    }

    /// Asks as CRIU does; gives the first answer.
    #[cfg(test)]
    pub(super) fn ask_netfilter(question: &[u8; conntrack::QUESTION]) -> Vec<u8> {
        let mut answer = vec![0_u8; 16384];
        // SAFETY: a socket of our own; messages and their parts live until each call returns. All-zero is a valid `msghdr`.
        unsafe {
            let fd = libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::NETLINK_NETFILTER);
            assert!(fd >= 0);
            let mut part = libc::iovec { iov_base: question.as_ptr().cast_mut().cast(), iov_len: question.len() };
            let mut message: libc::msghdr = std::mem::zeroed();
            message.msg_iov = &raw mut part;
            message.msg_iovlen = 1;
            assert_eq!(sendmsg(fd, &raw const message, 0), 20);
            let received = libc::recv(fd, answer.as_mut_ptr().cast(), answer.len(), 0);
            libc::close(fd);
            answer.truncate(usize::try_from(received).expect("an answer"));
        }
        answer
    }

    /// A file in memory; `None` when there can be none.
    pub(super) fn memory_file() -> Option<std::fs::File> {
        // SAFETY: takes a string that ends with a zero, and gives a descriptor that nobody else has, or -1.
        unsafe {
            let fd = libc::memfd_create(c"smaps".as_ptr(), libc::MFD_CLOEXEC);
            (fd >= 0).then(|| std::os::fd::FromRawFd::from_raw_fd(fd))
        }
    }

    /// Scans the pieces between the hidden ranges one after the other, as if they were one.
    fn scan_around(fd: libc::c_int, scan: &mut Scan, hidden: &[Range]) -> libc::c_int {
        let (start, end, vec, vec_len) = (scan.start, scan.end, scan.vec, scan.vec_len);
        let mut found = 0;
        let mut walked = end;
        for (from, to) in visible((start, end), hidden) {
            let filled = u64::try_from(found).unwrap_or(0);
            (scan.start, scan.end) = (from, to);
            (scan.vec, scan.vec_len) = (vec + filled * REGION, vec_len - filled);
            let count = real(fd, PAGEMAP_SCAN, std::ptr::from_mut(scan).cast());
            if count < 0 {
                found = count;
                break;
            }
            found += count;
            if scan.walk_end < to || u64::try_from(found).unwrap_or(0) >= vec_len {
                walked = scan.walk_end;
                break;
            }
        }
        (scan.start, scan.end, scan.vec, scan.vec_len, scan.walk_end) = (start, end, vec, vec_len, walked);
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_described_is_understood() {
        let range = podferry_memory::range::PageRange::new;
        let ranges =
            [(7, range(0x2000, 0x3000)), (7, range(0x1000, 0x2000)), (9, range(0x7fff_0000_0000, 0x7fff_0000_1000))];
        let text = podferry_memory::hide::describe(ranges, [(1, 4711), (1, 12)]);
        assert_eq!(podferry_memory::hide::HIDE_VARIABLE, HIDE_VARIABLE);
        let hidden = parse(&text).unwrap();
        assert_eq!(hidden.ranges[&7], [(0x1000, 0x2000), (0x2000, 0x3000)]);
        assert_eq!(hidden.ranges[&9], [(0x7fff_0000_0000, 0x7fff_0000_1000)]);
        assert_eq!(hidden.shared, HashSet::from([(1, 12), (1, 4711)]));
        for bad in ["7 1000", "x 1000 2000", "7 2000 1000", "7 1000 2000\n\n", "shared 1", "shared x 1"] {
            assert_eq!(parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn guards_are_not_hidden_and_pages_that_are_none_are() {
        assert!(asks_for_guards(&[0, GUARD, 0, GUARD]));
        for masks in [[GUARD, GUARD, 0x18, 0x18], [0x24, 0x24, 0x18, 0x118], [0, 0, 0x18, 0x18]] {
            assert!(!asks_for_guards(&masks), "{masks:?}");
        }
    }

    #[test]
    fn only_what_is_named_is_hidden() {
        let hidden = [(10, 20), (30, 40)];
        for (range, expected) in [
            ((0, 5), vec![(0, 5)]),
            ((0, 50), vec![(0, 10), (20, 30), (40, 50)]),
            ((10, 40), vec![(20, 30)]),
            ((12, 18), vec![]),
            ((15, 35), vec![(20, 30)]),
            ((40, 50), vec![(40, 50)]),
        ] {
            assert_eq!(visible(range, &hidden), expected, "{range:?}");
        }
    }
}
