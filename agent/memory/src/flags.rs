//! Whether anybody changes flags of mappings that their lines in `/proc/PID/maps` do not show.
//!
//! Flags are in `/proc/PID/smaps` alone, for which the kernel counts all pages of the process, 16 ms for each GiB. Whoever has read them
//! and wants to use them later has to know that they are the same then. The calls that change them are few, and hardly any program
//! makes them; so they are counted meanwhile, of all processes of the machine:
//!
//! | call | changes | counted |
//! |---|---|---|
//! | madvise(2), `process_madvise(2)` | `dc` `wf` `dd` | `MADV_DONTFORK`, `DOFORK`, `DONTDUMP`, `DODUMP`, `WIPEONFORK`, `KEEPONFORK` |
//! | the same | `hg` `nh` `mg` `sr` `rr` | not: hints, which make a process faster or slower and change nothing that it could see |
//! | mmap(2), in place of a mapping of the same line | `gd` `dp` | `MAP_GROWSDOWN`, `MAP_DROPPABLE` of more than a page |
//! | the same | `nr` | not: `MAP_NORESERVE`, the kernel's accounting |
//! | the same, in place of one that has rare flags | all | not; a process that has any is [left alone](has_rare_flags) |
//! | mlock(2) and its like | `lo` | not: `VmLck` tells |
//!
//! What one processor does that comes to life meanwhile is not counted, nor is what a 32-bit process calls, which is left alone too.

use std::io;

use crate::sys::counter::Counter;

/// What is counted: trace points, and filters in the kernel's words. The numbers of madvise are those of `asm-generic/mman-common.h`.
const CALLS: [(&str, &str); 3] = [
    ("syscalls/sys_enter_madvise", ADVICE),
    ("syscalls/sys_enter_process_madvise", ADVICE),
    // `MAP_GROWSDOWN`, and `MAP_DROPPABLE` but for single pages, with which each CRIU tries the kernel out.
    ("syscalls/sys_enter_mmap", "flags & 0x100 || (flags & 0x8 && len != 4096)"),
];
const ADVICE: &str = "behavior == 10 || behavior == 11 || (behavior >= 16 && behavior <= 19)";

/// Flags that hardly any mapping has, but for the stack and the kernel's own.
const RARE: [&str; 6] = ["dc", "wf", "dd", "gd", "dp", "ss"];

/// Counts calls that change flags, from its beginning on.
#[derive(Debug)]
pub struct FlagWatch {
    counters: Vec<Counter>,
}

impl FlagWatch {
    /// Begins. It takes some milliseconds, and makes every call of every process a little slower until it is dropped.
    ///
    /// # Errors
    /// When the kernel cannot count (no `CONFIG_FTRACE_SYSCALLS`, no tracefs), or this process must not (`CAP_PERFMON`).
    pub fn start() -> io::Result<Self> {
        let processors = processors(&std::fs::read_to_string("/sys/devices/system/cpu/online")?)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the list of processors makes no sense"))?;
        let mut counters = Vec::new();
        for (event, filter) in CALLS {
            for processor in &processors {
                counters.push(Counter::start(event, filter, *processor)?);
            }
        }
        Ok(Self { counters })
    }

    /// Whether any such call was begun since.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn has_seen_any(&self) -> io::Result<bool> {
        self.counters.iter().try_fold(false, |seen, counter| Ok(seen || counter.count()? > 0))
    }
}

/// The numbers in a list like `0-3,8`.
fn processors(list: &str) -> Option<Vec<u32>> {
    let mut all = Vec::new();
    for range in list.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        all.extend(first..=last);
    }
    Some(all)
}

/// Whether a mapping of that name has flags, as its line in `smaps` tells them, that few have.
pub(crate) fn has_rare_flags(name: &str, flags: &str) -> bool {
    !name.starts_with('[') && flags.split_whitespace().any(|flag| RARE.contains(&flag))
}

#[cfg(test)]
mod tests {
    use memmap2::{Advice, MmapMut};

    use super::*;

    #[test]
    fn calls_that_change_flags_are_seen_and_others_are_not() {
        let memory = MmapMut::map_anon(1 << 20).unwrap();
        let seen_after = |advice| {
            // Others on this machine may do so, too, though hardly five times in a row.
            (0..5).all(|_| {
                let watch = FlagWatch::start().unwrap();
                memory.advise(advice).unwrap();
                watch.has_seen_any().unwrap()
            })
        };
        for advice in [Advice::DontFork, Advice::DoFork, Advice::DontDump, Advice::DoDump] {
            assert!(seen_after(advice), "{advice:?}");
        }
        assert!(!seen_after(Advice::WillNeed) && !seen_after(Advice::NoHugePage));
    }

    #[test]
    fn lists_of_processors_are_read() {
        assert_eq!(processors("0-3,8\n"), Some(vec![0, 1, 2, 3, 8]));
        assert_eq!(processors("0\n"), Some(vec![0]));
        assert_eq!((processors(""), processors("0-x")), (None, None));
    }

    #[test]
    fn the_stack_may_grow_and_nothing_else() {
        assert!(has_rare_flags("", " rd wr mr mw me dc ac sd"));
        assert!(has_rare_flags("/lib/x.so", " rd wr gd"));
        assert!(!has_rare_flags("[stack]", " rd wr mr mw me gd ac"));
        assert!(!has_rare_flags("[vvar]", " rd mr pf io de dd sd"));
        assert!(!has_rare_flags("[heap]", " rd wr mr mw me ac sd hg"));
    }
}
