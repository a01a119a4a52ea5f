//! Answers CRIU's reading of `/proc/PID/smaps` without the kernel's.
//!
//! For `smaps` the kernel counts the pages of all mappings, 16 ms for each GiB, and CRIU reads it while the process stands still.
//! Of all it says CRIU uses two lines for each mapping (`parse_smaps` in `criu/proc_parse.c`): the one that `maps` has too, and the
//! flags. So it gets these two: the first from `/proc/PID/maps` as it is now, the flags from a file that was written just before
//! (`podferry_memory::hide::mappings`).
//!
//! The kernel is asked after all when the process is not in the file, when one mapping is not exactly as it was, when it has locked
//! memory now, and when the file is not as it should be. Locked memory, because mlock(2) changes a flag that decides what becomes of
//! the pages, without changing the mapping's line.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{Seek as _, Write as _};
use std::os::fd::RawFd;
use std::sync::OnceLock;

/// The environment variable that names the file; `podferry_memory::hide` writes it.
const MAPPINGS_VARIABLE: &str = "PODFERRY_CRIU_MAPPINGS";

/// The lines of each process: the mapping's and that of its flags, by turns.
type Known = HashMap<i32, Vec<String>>;

fn parse(text: &str) -> Option<Known> {
    let mut known = Known::new();
    let mut lines: Option<&mut Vec<String>> = None;
    for line in text.lines() {
        if let Some(pid) = line.strip_prefix("process ") {
            lines = Some(known.entry(pid.parse().ok()?).or_default());
        } else {
            lines.as_mut()?.push(line.to_owned());
        }
    }
    let pairs = |lines: &Vec<String>| {
        lines.len().is_multiple_of(2) && lines.iter().skip(1).step_by(2).all(|flags| flags.starts_with("VmFlags: "))
    };
    known.values().all(pairs).then_some(known)
}

fn known() -> &'static Known {
    static KNOWN: OnceLock<Known> = OnceLock::new();
    KNOWN.get_or_init(|| {
        let text = std::env::var_os(MAPPINGS_VARIABLE).and_then(|path| fs::read_to_string(path).ok());
        text.and_then(|text| parse(&text)).unwrap_or_default()
    })
}

/// What CRIU is to read, when these are the mappings now; `None` when they are not those that are known.
fn compose(maps: &str, known: &[String]) -> Option<String> {
    let mut pairs = known.chunks_exact(2);
    let mut text = String::with_capacity(2 * maps.len() + 128);
    for line in maps.lines() {
        let [mapping, flags] = pairs.next()? else { return None };
        (line == mapping).then_some(())?;
        text.extend([mapping, "\n", flags, "\n"]);
    }
    pairs.next().is_none().then_some(text)
}

/// Whether this text of `/proc/PID/status` says that no memory is locked.
fn locks_nothing(status: &str) -> bool {
    let locked = status.lines().find_map(|line| line.strip_prefix("VmLck:"));
    locked.is_some_and(|locked| locked.split_whitespace().eq(["0", "kB"]))
}

/// The answer for the `smaps` in a folder, when it is a process's in `/proc` and all is as it was.
pub(crate) fn answer(folder: RawFd) -> Option<File> {
    let process = fs::read_link(format!("/proc/self/fd/{folder}")).ok()?;
    let process: i32 = process.to_str()?.strip_prefix("/proc/")?.parse().ok()?;
    let known = known().get(&process)?;
    // The status last: memory that is locked meanwhile is seen.
    let maps = fs::read_to_string(format!("/proc/{process}/maps")).ok()?;
    let text = compose(&maps, known)?;
    locks_nothing(&fs::read_to_string(format!("/proc/{process}/status")).ok()?).then_some(())?;
    let mut file = crate::interposed::memory_file()?;
    file.write_all(text.as_bytes()).ok()?;
    file.rewind().ok()?;
    Some(file)
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::os::fd::AsRawFd as _;

    use super::*;

    #[test]
    fn the_variable_is_that_of_whoever_writes_the_file() {
        assert_eq!(podferry_memory::hide::MAPPINGS_VARIABLE, MAPPINGS_VARIABLE);
    }

    const MAPS: &str = "1000-2000 rw-p 00000000 00:00 0 \n3000-4000 r--p 00000000 00:00 0          [heap]\n";
    const SMAPS: &str = "1000-2000 rw-p 00000000 00:00 0 \nVmFlags: rd wr dc \n\
                         3000-4000 r--p 00000000 00:00 0          [heap]\nVmFlags: rd \n";

    #[test]
    fn flags_that_are_known_are_told_with_the_mappings_as_they_are() {
        let known = parse(&format!("process 7\n{SMAPS}process 9\n")).unwrap();
        assert_eq!(compose(MAPS, &known[&7]).as_deref(), Some(SMAPS));
        assert_eq!(compose("", &known[&9]).as_deref(), Some(""));
    }

    #[test]
    fn a_mapping_that_differs_is_left_to_the_kernel() {
        let known = parse(&format!("process 7\n{SMAPS}")).unwrap();
        let (first, second) = MAPS.split_once('\n').unwrap();
        for maps in [
            MAPS.replace("rw-p", "r--p"),
            MAPS.replace("-4000", "-5000"),
            MAPS.replace("[heap]", "[anon:x]"),
            first.to_owned(),
            second.to_owned(),
            format!("{MAPS}5000-6000 rw-p 00000000 00:00 0 \n"),
        ] {
            assert_eq!(compose(&maps, &known[&7]), None, "{maps}");
        }
    }

    #[test]
    fn a_file_that_is_not_as_it_should_be_says_nothing() {
        for bad in ["x\n", "process x\n", "process 7\n1000-2000 rw-p 0 00:00 0\n", "process 7\n1000-2000 rw-p\nflags\n"]
        {
            assert_eq!(parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn locked_memory_is_left_to_the_kernel() {
        assert!(locks_nothing("Name:\tx\nVmLck:\t       0 kB\nVmPin:\t       8 kB\n"));
        assert!(!locks_nothing("VmLck:\t       4 kB\n"));
        assert!(!locks_nothing("Name:\tx\n"));
    }

    #[test]
    fn a_real_process_is_answered_as_long_as_it_is_as_it_was() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let folder = File::open(format!("/proc/{pid}")).unwrap();
        while fs::read_to_string(format!("/proc/{pid}/wchan")).unwrap().is_empty()
            || !fs::read_to_string(format!("/proc/{pid}/comm")).unwrap().starts_with("sleep")
            || !fs::read_to_string(format!("/proc/{pid}/stat")).unwrap().contains(") S ")
        {
            std::thread::yield_now();
        }
        let mappings = podferry_memory::hide::mappings(nix::unistd::Pid::from_raw(pid)).unwrap();
        let known = parse(&mappings).unwrap();
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
        let text = compose(&maps, &known[&pid]).unwrap();
        let two_lines = |smaps: String| -> Vec<String> {
            let wanted = |line: &&str| line.starts_with("VmFlags:") || !line.split(' ').next().unwrap().ends_with(':');
            smaps.lines().filter(wanted).map(str::to_owned).collect()
        };
        let kernels = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
        assert_eq!(text.lines().collect::<Vec<_>>(), two_lines(kernels));
        // Nothing names a file here, so nothing is known.
        assert!(answer(folder.as_raw_fd()).is_none());
        let mut file = crate::interposed::memory_file().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file.rewind().unwrap();
        let mut read = String::new();
        file.read_to_string(&mut read).unwrap();
        assert_eq!(read, text);
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
