//! The mappings of a process, and which of them can be followed while it runs.

use std::fs;
use std::io;

use nix::unistd::Pid;

use crate::PAGE_SIZE;
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

    /// Whether the kernel put it there: vdso, vvar, vsyscall.
    pub fn is_kernels(&self) -> bool {
        self.name.starts_with("[v")
    }

    fn parse(line: &str) -> Option<Self> {
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

/// The ranges that pre-copy moves.
pub fn pre_copied(mappings: &[Mapping]) -> PageRanges {
    mappings.iter().filter(|mapping| mapping.is_pre_copied()).map(|mapping| mapping.range).collect()
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
}
