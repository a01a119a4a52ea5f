//! Which memory CRIU is not to see, because it was moved already.
//!
//! `libpodferry_criu_shim.so`, preloaded into `criu dump`, reads a file that says so: a line for each range with the process id that
//! CRIU sees, and in hexadecimal the first address and the first one behind.

use std::fmt::Write as _;

use crate::range::PageRange;

/// The environment variable that names the file.
pub const HIDE_VARIABLE: &str = "PODFERRY_CRIU_HIDE";
/// The library's file name.
pub const LIBRARY: &str = "libpodferry_criu_shim.so";

/// The file's text.
pub fn describe(ranges: impl IntoIterator<Item = (i32, PageRange)>) -> String {
    ranges.into_iter().fold(String::new(), |mut text, (pid, range)| {
        let _ = writeln!(text, "{pid} {:x} {:x}", range.start, range.end);
        text
    })
}
