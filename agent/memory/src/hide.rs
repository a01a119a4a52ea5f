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

use crate::flags::has_rare_flags;
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
/// a process that the library is to leave to the kernel: one with locked memory, with rare flags ([`crate::flags`]), or of 32 bits.
///
/// To be called as late as can be before CRIU stops the process, and while a [`FlagWatch`](crate::flags::FlagWatch) counts. The library
/// compares the mappings with those of the stopped process and asks the kernel when they differ, but flags that change without their
/// mapping it cannot see: when the watch has seen any, the file has to go.
pub fn mappings(process: Pid) -> io::Result<String> {
    if maps::status_kib(process, "VmLck:")? > 0 {
        return Ok(String::new());
    }
    let smaps = fs::read(format!("/proc/{process}/smaps"))?;
    // A name that is no UTF-8 comes out different here and in the library's comparison: the kernel is asked.
    Ok(section(process, &String::from_utf8_lossy(&smaps)).unwrap_or_default())
}

fn section(process: Pid, smaps: &str) -> Option<String> {
    let mut text = format!("process {process}\n");
    let (mut name, mut end) = (String::new(), 0);
    for line in smaps.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            (!has_rare_flags(&name, flags)).then_some(())?;
        } else if let Some(mapping) = Mapping::parse(line) {
            // The last of 64 bits, which says nothing, is there for all.
            end = if mapping.is_kernels() { end } else { mapping.range.end };
            name = mapping.name;
        } else {
            continue;
        }
        text.push_str(line);
        text.push('\n');
    }
    (end > 1 << 32).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_described_by_two_lines_each() {
        let smaps = "7f0000000000-7f0000400000 rw-p 00000000 00:00 0 \nSize:               4096 kB\nLocked:   0 kB\n\
                     VmFlags: rd wr mr mw me ac sd \n\
                     7f0000400000-7f0000500000 rw-p 00000000 00:00 0          [heap]\nSize:               1024 kB\n\
                     VmFlags: rd wr mr mw me ac hg \n";
        let expected = "process 7\n7f0000000000-7f0000400000 rw-p 00000000 00:00 0 \nVmFlags: rd wr mr mw me ac sd \n\
                        7f0000400000-7f0000500000 rw-p 00000000 00:00 0          [heap]\nVmFlags: rd wr mr mw me ac hg \n";
        assert_eq!(section(Pid::from_raw(7), smaps).as_deref(), Some(expected));
    }

    #[test]
    fn processes_of_which_flags_are_rare_or_addresses_short_are_left_to_the_kernel() {
        let smaps = |range: &str, flags: &str| format!("{range} rw-p 00000000 00:00 0 \nVmFlags: {flags}\n");
        let section = |smaps: String| section(Pid::from_raw(7), &smaps);
        let (long, short) = ("7f0000000000-7f0000400000", "f7000000-f7400000");
        assert!(section(smaps(long, "rd wr")).is_some());
        assert_eq!(section(smaps(long, "rd wr") + &smaps("7f0000400000-7f0000500000", "rd wr wf")), None);
        assert_eq!(section(smaps(short, "rd wr")), None);
        let kernels = "7fff00000000-7fff00001000 r--p 00000000 00:00 0     [vvar]\nVmFlags: rd pf io dd\n";
        assert_eq!(section(smaps(short, "rd wr") + kernels), None);
    }
}
