//! What a process has mapped: rings, contexts and devices show here even after their descriptors were closed.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use crate::error::Error;

use super::{Finding, FindingKind};

/// Below `/dev`, but ordinary memory or files.
const MEMORY: [&str; 4] = ["/dev/zero", "/dev/shm/", "/dev/hugepages/", "/dev/mqueue/"];

pub(super) fn look(pid: i32, findings: &mut Vec<Finding>) -> Result<(), Error> {
    let path = PathBuf::from(format!("/proc/{pid}/maps"));
    let text = fs::read(&path).map_err(Error::io("read", &path))?;
    let text = String::from_utf8_lossy(&text);
    let names: BTreeSet<&str> = text.lines().filter_map(name).collect();
    findings.extend(names.into_iter().filter_map(judge).map(|finding| finding.of_process(pid)));
    Ok(())
}

/// The sixth field of a line of `maps`, which may contain blanks.
fn name(line: &str) -> Option<&str> {
    let mut rest = line;
    for _ in 0..5 {
        rest = rest.split_once(' ')?.1.trim_start();
    }
    (!rest.is_empty()).then_some(rest)
}

fn judge(name: &str) -> Option<Finding> {
    if name.starts_with("/[aio]") {
        return Some(Finding::blocking(
            FindingKind::AsyncIo,
            "has a context of asynchronous I/O (io_setup); operations under way would be lost".to_owned(),
            "turn asynchronous I/O off in the program (for databases usually an option)",
        ));
    }
    if name == "anon_inode:[io_uring]" {
        return Some(io_uring());
    }
    let is_device = name.starts_with("/dev/") && !MEMORY.iter().any(|memory| name.starts_with(memory));
    is_device.then(|| {
        Finding::blocking(
            FindingKind::Device,
            format!("has the device {name} mapped"),
            "run it without the device; the state of hardware does not move",
        )
    })
}

/// An `io_uring` instance, by descriptor or mapping.
pub(super) fn io_uring() -> Finding {
    Finding::blocking(
        FindingKind::IoUring,
        "has an io_uring instance, which CRIU cannot dump".to_owned(),
        "turn io_uring off in the program, or forbid it by seccomp or the sysctl kernel.io_uring_disabled",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_blanks_are_whole() {
        let line = "7f00-7f01 rw-s 00000000 00:0e 1037        anon_inode:[io_uring]";
        assert_eq!(name(line), Some("anon_inode:[io_uring]"));
        assert_eq!(name("7f00-7f01 rw-p 00000000 00:00 0"), None);
        assert_eq!(name("7f00-7f01 rw-s 00000000 00:10 9   /[aio] (deleted)"), Some("/[aio] (deleted)"));
    }

    #[test]
    fn only_what_cannot_move_is_found() {
        assert_eq!(judge("/[aio] (deleted)").unwrap().kind, FindingKind::AsyncIo);
        assert_eq!(judge("/dev/nvidia0").unwrap().kind, FindingKind::Device);
        for harmless in ["/dev/zero (deleted)", "/dev/shm/pg.1", "[heap]", "/lib/libc.so.6", "/memfd:x (deleted)"] {
            assert_eq!(judge(harmless), None, "{harmless}");
        }
    }
}
