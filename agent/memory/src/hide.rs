//! Which memory CRIU is not to see, because it was moved already, and what it need not ask the kernel again.
//!
//! `libpodferry_criu_shim.so`, preloaded into `criu dump`, reads two files. One says what to hide: a line for each range with the
//! process id that CRIU sees, and in hexadecimal the first address and the first one behind; and for each segment of shared memory
//! one with `shared` and in hexadecimal device and inode. The other one has the flags of all mappings, from which the library answers
//! what CRIU would read from `/proc/PID/smaps`: there the kernel counts all pages meanwhile, 16 ms for each GiB.

use std::fmt::Write as _;
use std::fs;
use std::io;

use nix::unistd::Pid;

use crate::maps::{self, Mapping};
use crate::range::PageRange;

/// The environment variable that names the file of hidden ranges.
pub const HIDE_VARIABLE: &str = "PODFERRY_CRIU_HIDE";
/// The environment variable that names the file of mappings and their flags.
pub const MAPPINGS_VARIABLE: &str = "PODFERRY_CRIU_MAPPINGS";
/// The library's file name.
pub const LIBRARY: &str = "libpodferry_criu_shim.so";

/// The text of the file of hidden memory: ranges of processes, and whole segments of shared memory by device and inode.
pub fn describe(
    ranges: impl IntoIterator<Item = (i32, PageRange)>,
    shared: impl IntoIterator<Item = (u64, u64)>,
) -> String {
    let mut text = String::new();
    for (pid, range) in ranges {
        let _ = writeln!(text, "{pid} {:x} {:x}", range.start, range.end);
    }
    for (device, inode) in shared {
        let _ = writeln!(text, "shared {device:x} {inode:x}");
    }
    text
}

/// A process's part of the file of mappings: a line `process PID`, and for each mapping its lines of `maps` and of flags. Empty for
/// a process with locked memory, which the library leaves to the kernel.
///
/// To be called as late as can be before CRIU stops the process. The library compares the mappings with those of the stopped
/// process and asks the kernel when they differ, but flags that change without their mapping it cannot see; `docs/engine.md`
/// says which these are.
pub fn mappings(process: Pid) -> io::Result<String> {
    if maps::status_kib(process, "VmLck:")? > 0 {
        return Ok(String::new());
    }
    let smaps = fs::read(format!("/proc/{process}/smaps"))?;
    // A name that is no UTF-8 comes out different here and in the library's comparison: the kernel is asked.
    Ok(section(process, &String::from_utf8_lossy(&smaps)))
}

fn section(process: Pid, smaps: &str) -> String {
    let mut text = format!("process {process}\n");
    for line in smaps.lines() {
        if line.starts_with("VmFlags:") || Mapping::parse(line).is_some() {
            text.push_str(line);
            text.push('\n');
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_described_by_two_lines_each() {
        let smaps = "7f0000000000-7f0000400000 rw-p 00000000 00:00 0 \nSize:               4096 kB\nLocked:   0 kB\n\
                     VmFlags: rd wr mr mw me ac sd \n\
                     7f0000400000-7f0000500000 rw-p 00000000 00:00 0          [heap]\nSize:               1024 kB\n\
                     VmFlags: rd wr mr mw me ac dc \n";
        let expected = "process 7\n7f0000000000-7f0000400000 rw-p 00000000 00:00 0 \nVmFlags: rd wr mr mw me ac sd \n\
                        7f0000400000-7f0000500000 rw-p 00000000 00:00 0          [heap]\nVmFlags: rd wr mr mw me ac dc \n";
        assert_eq!(section(Pid::from_raw(7), smaps), expected);
    }
}
