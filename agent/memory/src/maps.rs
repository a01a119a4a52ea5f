//! The mappings of a process, and which of them can be followed while it runs.

use std::fs;
use std::io;

use nix::unistd::Pid;
use thiserror::Error;

use crate::PAGE_SIZE;
use crate::hazard::{self, Hazard};
use crate::range::{PageRange, PageRanges};

/// One mapping: a line of `/proc/PID/maps`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Its addresses.
    pub range: PageRange,
    /// Whether it can be executed.
    pub executable: bool,
    /// Whether writes stay with the process (`MAP_PRIVATE`).
    pub private: bool,
    /// The inode of the mapped file; 0 for anonymous memory.
    pub inode: u64,
    /// What the kernel names it: a path, `[heap]`, `[stack]`, `[vdso]`, …
    pub name: String,
}

/// Mappings smaller than this are left to CRIU: that they need no round saves less than their entry costs.
const LEAST_LENGTH: u64 = 256 * 1024;

impl Mapping {
    /// Whether pre-copy moves it: private anonymous memory of some size.
    ///
    /// Shared memory cannot be followed soundly, since others write to it through their own mappings and through file
    /// descriptors. Stacks and executable memory are left to CRIU, whose parasite runs there.
    pub fn is_pre_copied(&self) -> bool {
        self.is_private_anonymous()
            && !self.executable
            && !self.name.starts_with("[stack")
            && self.range.length() >= LEAST_LENGTH
    }

    /// Whether nobody else writes to it, and nothing but what was written is in it.
    pub fn is_private_anonymous(&self) -> bool {
        self.private && self.inode == 0 && !self.is_kernels() && !self.name.starts_with('/')
    }

    /// Whether CRIU put it there, to work inside the frozen process: gone before that runs again. It may come to where the process
    /// unmapped something just before, also in a range that was kept from CRIU. A process's own of that name does no harm: what is in
    /// shared memory is not looked for in `pagemap`.
    pub(crate) fn is_crius(&self) -> bool {
        !self.private && self.name == "/memfd:CRIUMFD (deleted)"
    }

    /// Whether the kernel put it there: vdso, vvar, vsyscall.
    pub fn is_kernels(&self) -> bool {
        self.name.starts_with("[v")
    }

    pub(crate) fn parse(line: &str) -> Option<Self> {
        let (addresses, rest) = line.split_once(' ')?;
        let (start, end) = addresses.split_once('-')?;
        let address = |text| u64::from_str_radix(text, 16).ok().filter(|address| address.is_multiple_of(PAGE_SIZE));
        let (start, end) = (address(start)?, address(end)?);
        let mut fields = rest.splitn(4, ' ');
        let (permissions, _offset, _device) = (fields.next()?.as_bytes(), fields.next()?, fields.next()?);
        let tail = fields.next()?;
        let (inode, name) = tail.split_once(' ').unwrap_or((tail, ""));
        Some(Self {
            range: (start <= end).then(|| PageRange::new(start, end))?,
            executable: permissions.get(2) == Some(&b'x'),
            private: permissions.get(3)? == &b'p',
            inode: inode.parse().ok()?,
            name: name.trim_start().to_owned(),
        })
    }
}

/// The mappings of a process, by ascending address.
///
/// The process may change them at any time: what is read here is a hint, except while it is frozen.
pub fn read(process: Pid) -> io::Result<Vec<Mapping>> {
    let path = format!("/proc/{process}/maps");
    let text = fs::read(&path)?;
    let text = String::from_utf8_lossy(&text);
    let parse = |line: &str| {
        Mapping::parse(line).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("{path} has {line:?}")))
    };
    text.lines().map(parse).collect()
}

/// The ranges that pre-copy can move of a process that runs: what [`Mapping::is_pre_copied`] says, and is not locked.
///
/// CRIU does not restore locked memory lazily. What becomes locked after this call, [`moved`] finds.
pub fn followable(process: Pid) -> io::Result<PageRanges> {
    let mappings = read(process)?;
    let pre_copied = mappings.iter().filter(|mapping| mapping.is_pre_copied()).map(|mapping| mapping.range);
    let pre_copied: PageRanges = pre_copied.collect();
    Ok(pre_copied.difference(&locked(process)?))
}

/// Why hidden memory of a frozen process cannot be moved.
#[derive(Debug, Error)]
pub enum MovedError {
    /// Its mappings cannot be read.
    #[error("process {process}: cannot read its mappings in the freeze: {source}")]
    Read {
        /// The process.
        process: Pid,
        /// What the kernel said.
        source: io::Error,
    },
    /// Something came there that is not moved this way.
    #[error(
        "process {process}: {what} came to {range} after that range was kept from CRIU, so that nobody moves it; the process can \
         run on where it is, and the migration can be tried again"
    )]
    Replaced {
        /// The process.
        process: Pid,
        /// Where.
        range: PageRange,
        /// What is there.
        what: String,
    },
    /// Something came that may still be writing.
    #[error(
        "{0}, and it came after the last look: the process can run on where it is, and the migration can be tried again"
    )]
    Hazard(Hazard),
}

/// What a frozen process has mapped of ranges that CRIU was kept from. An error when something else than followable memory came
/// to them between the last round and the freeze.
///
/// Of what makes memory followable, what matters now is only that it is the process's own, and not locked: size and protection
/// may have changed.
pub fn moved(process: Pid, hidden: &PageRanges) -> Result<PageRanges, MovedError> {
    let failed = |source| MovedError::Read { process, source };
    let mappings = read(process).map_err(failed)?;
    if let Some(hazard) = hazard::mapped(process, &mappings) {
        return Err(MovedError::Hazard(hazard));
    }
    let (moved, strange) = split(&mappings, hidden);
    if let Some((range, what)) = strange {
        return Err(MovedError::Replaced { process, range, what });
    }
    match moved.intersection(&locked(process).map_err(failed)?).as_slice() {
        [] => Ok(moved),
        [range, ..] => Err(MovedError::Replaced { process, range: *range, what: "locked memory".to_owned() }),
    }
}

/// What is mapped of hidden ranges, and the first of it that is not private anonymous memory.
fn split(mappings: &[Mapping], hidden: &PageRanges) -> (PageRanges, Option<(PageRange, String)>) {
    let of = |mapping: &Mapping| [mapping.range].into_iter().collect::<PageRanges>().intersection(hidden);
    let what = |mapping: &Mapping| match (mapping.name.as_str(), mapping.private) {
        ("", true) => "a mapping".to_owned(),
        ("", false) => "shared memory".to_owned(),
        (name, _) => format!("the mapping {name}"),
    };
    let theirs = || mappings.iter().filter(|mapping| !mapping.is_crius());
    let mut strange = theirs().filter(|mapping| !mapping.is_private_anonymous());
    let strange = strange.find_map(|mapping| Some((*of(mapping).as_slice().first()?, what(mapping))));
    (theirs().flat_map(|mapping| of(mapping).as_slice().to_vec()).collect(), strange)
}

/// The locked mappings of a process (mlock(2), mlockall(2), `MAP_LOCKED`).
///
/// Reading their flags takes 16 ms for each GiB of the process, since the kernel counts all pages for `smaps` meanwhile. So it is
/// done only if the process has locked anything. Pages of `MCL_FUTURE` are counted with their mappings.
fn locked(process: Pid) -> io::Result<PageRanges> {
    if status_kib(process, "VmLck:")? == 0 {
        return Ok(PageRanges::new());
    }
    let path = format!("/proc/{process}/smaps");
    let text = fs::read(&path)?;
    let unclear = || io::Error::new(io::ErrorKind::InvalidData, format!("{path} has flags without a mapping"));
    locked_in(&String::from_utf8_lossy(&text)).ok_or_else(unclear)
}

/// The mappings of a text like `/proc/PID/smaps` that have the flag `lo`.
fn locked_in(smaps: &str) -> Option<PageRanges> {
    let mut locked = PageRanges::new();
    let mut mapping = None;
    for line in smaps.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            let range = mapping.take()?;
            if flags.split_whitespace().any(|flag| flag == "lo") {
                locked.push(range);
            }
        } else if let Some(next) = Mapping::parse(line) {
            mapping = Some(next.range);
        }
    }
    Some(locked)
}

/// A figure of `/proc/PID/status` in KiB; 0 where there is none, as of a process that has ended.
pub(crate) fn status_kib(process: Pid, name: &str) -> io::Result<u64> {
    let status = fs::read(format!("/proc/{process}/status"))?;
    let status = String::from_utf8_lossy(&status);
    let figure = status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    let Some(figure) = figure else { return Ok(0) };
    let number = figure.strip_suffix(" kB").and_then(|number| number.parse().ok());
    number
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("{name} of process {process} is {figure:?}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_every_kind_are_read() {
        let anonymous = Mapping::parse("7f9f584ba000-7f9f594c4000 rw-p 00000000 00:00 0 ").unwrap();
        assert_eq!(anonymous.range, PageRange::new(0x7f9f_584b_a000, 0x7f9f_594c_4000));
        assert!(anonymous.is_pre_copied());
        let file = Mapping::parse("00400000-00800000 r-xp 0002c000 fe:00 325835    /usr/bin/a b (deleted)").unwrap();
        assert_eq!((file.inode, file.name.as_str(), file.executable), (325_835, "/usr/bin/a b (deleted)", true));
        assert!(!file.is_pre_copied());
        let named = Mapping::parse("55d0a0000000-55d0b0000000 rw-p 00000000 00:00 0          [heap]").unwrap();
        assert!(named.is_pre_copied());
        let bare = Mapping::parse("7f9f584ba000-7f9f594c4000 rw-p 00000000 00:00 0").unwrap();
        assert_eq!((bare.inode, bare.name.as_str()), (0, ""));
        for line in [
            "7fff9c000000-7fff9ce4c000 rw-p 00000000 00:00 0      [stack]",
            "7f9f584ba000-7f9f594c4000 rw-s 00000000 00:01 42     /dev/zero (deleted)",
            "7f9f584ba000-7f9f584c4000 rw-p 00000000 00:00 0",
            "7f9f584ba000-7f9f594c4000 rwxp 00000000 00:00 0",
            "7f0000000000-7f0000400000 rw-p 00000000 fe:00 325835     /lib/x.so",
            "7f0000000000-7f0000400000 rw-p 00000000 00:0f 4711       /anon_hugepage (deleted)",
        ] {
            assert!(!Mapping::parse(line).unwrap().is_pre_copied(), "{line}");
        }
    }

    #[test]
    fn what_is_no_mapping_is_refused() {
        for line in ["", "x", "1000-2000", "1001-2000 rw-p 0 0:0 0", "2000-1000 rw-p 0 0:0 0", "1000-2000 rw 0 0:0 0"] {
            assert_eq!(Mapping::parse(line), None, "{line:?}");
        }
    }

    #[test]
    fn this_process_has_a_stack_and_a_vdso() {
        let mappings = read(Pid::this()).unwrap();
        assert!(mappings.windows(2).all(|two| two[0].range.end <= two[1].range.start));
        assert!(mappings.iter().any(|mapping| mapping.name == "[vdso]" && mapping.is_kernels()));
    }

    #[test]
    fn locked_mappings_are_those_with_the_flag() {
        let smaps = "7f0000000000-7f0000400000 rw-p 00000000 00:00 0 \nSize:               4096 kB\nLocked:   4096 kB\n\
                     VmFlags: rd wr mr mw me lo ac sd \n\
                     7f0000400000-7f0000500000 rw-p 00000000 00:00 0          [heap]\nSize:               1024 kB\n\
                     VmFlags: rd wr mr mw me ac sd \n\
                     7f0000600000-7f0000700000 rw-p 00000000 00:00 0 \nVmFlags: rd wr lo lf\n";
        let locked = locked_in(smaps).unwrap();
        let expected =
            [PageRange::new(0x7f00_0000_0000, 0x7f00_0040_0000), PageRange::new(0x7f00_0060_0000, 0x7f00_0070_0000)];
        assert_eq!(locked.as_slice(), expected);
        assert_eq!(locked_in("VmFlags: rd lo\n"), None);
    }

    #[test]
    fn what_came_to_a_hidden_range_is_named() {
        let mapping = |line: &str| Mapping::parse(line).unwrap();
        let own = mapping("7f0000000000-7f0000400000 rw-p 00000000 00:00 0 ");
        let file = mapping("7f0000400000-7f0000500000 r--p 00000000 fe:00 325835   /lib/x.so");
        let hidden = |end| [PageRange::new(0x7f00_0010_0000, end)].into_iter().collect::<PageRanges>();
        let (moved, strange) = split(&[own.clone(), file.clone()], &hidden(0x7f00_0040_0000));
        assert_eq!((moved.pages(), strange), (768, None));
        let crius = mapping("7f0000400000-7f0000405000 rwxs 00000000 00:01 4711   /memfd:CRIUMFD (deleted)");
        let (moved, strange) = split(&[own.clone(), crius], &hidden(0x7f00_0050_0000));
        assert_eq!((moved.pages(), strange), (768, None));
        let (_, strange) = split(&[own, file], &hidden(0x7f00_0050_0000));
        let range = PageRange::new(0x7f00_0040_0000, 0x7f00_0050_0000);
        assert_eq!(strange, Some((range, "the mapping /lib/x.so".to_owned())));
    }

    #[test]
    fn figures_of_the_status_are_read() {
        assert!(status_kib(Pid::this(), "VmRSS:").unwrap() > 0);
        assert_eq!(status_kib(Pid::this(), "VmNothing:").unwrap(), 0);
    }
}
