//! Open descriptors: kernel objects, devices, files from outside.

use std::fs::{self, Metadata};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{major, minor};

use crate::error::Error;

use super::mounts::Known;
use super::{DeletedFile, Finding, FindingKind, mappings, timers, watches};

/// A descriptor that is a socket.
#[derive(Debug, Clone, Copy)]
pub(super) struct Socket {
    pub(super) pid: i32,
    pub(super) fd: i32,
    pub(super) inode: u64,
}

/// What is collected of all processes before it is judged.
#[derive(Debug, Default)]
pub(super) struct Open {
    /// Their sockets.
    pub(super) sockets: Vec<Socket>,
    /// Files without a name, each once.
    pub(super) deleted_files: Vec<DeletedFile>,
}

/// `st_blocks` counts in this unit, whatever the filesystem's own is (stat(3type)).
const BLOCK: u64 = 512;

/// Objects behind `anon_inode:` that CRIU dumps (`criu/files.c`).
const KNOWN_OBJECTS: [&str; 8] =
    ["[eventfd]", "[eventpoll]", "inotify", "[fanotify]", "[signalfd]", "[timerfd]", "[pidfd]", "bpf-map"];

/// Looks at every descriptor of a process, and collects its sockets and deleted files.
pub(super) fn look(pid: i32, mounts: &Known, findings: &mut Vec<Finding>, open: &mut Open) -> Result<(), Error> {
    let dir = PathBuf::from(format!("/proc/{pid}/fd"));
    for entry in fs::read_dir(&dir).map_err(Error::io("list", &dir))?.flatten() {
        let Some(fd) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        match look_at_one(pid, fd, &entry.path(), mounts, open) {
            Ok(finding) => findings.extend(finding.map(|finding| finding.of_descriptor(pid, fd))),
            // Closed meanwhile, maybe with its process's end.
            Err(error) if error.says_ended(pid) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn look_at_one(pid: i32, fd: i32, path: &Path, mounts: &Known, open: &mut Open) -> Result<Option<Finding>, Error> {
    let link = fs::read_link(path).map_err(Error::io("read the link", path))?;
    let link = link.to_string_lossy();
    if let Some(object) = link.strip_prefix("anon_inode:") {
        return look_at_object(pid, fd, object, mounts);
    }
    if let Some(inode) = link.strip_prefix("socket:[").and_then(|rest| rest.strip_suffix(']')) {
        open.sockets.extend(inode.parse().map(|inode| Socket { pid, fd, inode }));
        return Ok(None);
    }
    // Pipes, namespaces, pidfds and memory files have no place in the tree of mounts.
    if !link.starts_with('/') || link.starts_with("/memfd:") {
        return Ok(None);
    }
    let metadata = fs::metadata(path).map_err(Error::io("look at", path))?;
    let from_outside = !mounts.contains(pid, mount_of(pid, fd)?)?;
    if !from_outside {
        open.note_if_deleted(pid, fd, &link, &metadata);
    }
    Ok(judge_file(fd, &link, &metadata, from_outside))
}

impl Open {
    fn note_if_deleted(&mut self, pid: i32, fd: i32, link: &str, metadata: &Metadata) {
        let id = (metadata.dev(), metadata.ino());
        let known = self.deleted_files.iter().any(|file| file.id == id);
        if !known && metadata.is_file() && metadata.nlink() == 0 {
            let bytes = metadata.blocks().saturating_mul(BLOCK);
            self.deleted_files.push(DeletedFile { pid, fd, name: link.to_owned(), bytes, id });
        }
    }
}

/// What the kernel tells of a descriptor (`proc_pid_fdinfo(5)`).
fn fdinfo(pid: i32, fd: i32) -> Result<String, Error> {
    let path = PathBuf::from(format!("/proc/{pid}/fdinfo/{fd}"));
    fs::read_to_string(&path).map_err(Error::io("read", &path))
}

fn look_at_object(pid: i32, fd: i32, object: &str, mounts: &Known) -> Result<Option<Finding>, Error> {
    match object {
        "[timerfd]" => Ok(timers::judge(&fdinfo(pid, fd)?)),
        "inotify" | "[fanotify]" => Ok(watches::judge(&fdinfo(pid, fd)?, mounts)),
        _ => Ok(judge_object(object)),
    }
}

/// The id of the mount through which a file was opened.
fn mount_of(pid: i32, fd: i32) -> Result<i32, Error> {
    let text = fdinfo(pid, fd)?;
    let id = text.lines().find_map(|line| line.strip_prefix("mnt_id:")).and_then(|id| id.trim().parse().ok());
    Ok(id.unwrap_or(-1))
}

fn judge_object(object: &str) -> Option<Finding> {
    if object == "[io_uring]" {
        return Some(mappings::io_uring());
    }
    (!KNOWN_OBJECTS.contains(&object)).then(|| {
        Finding::blocking(
            FindingKind::KernelObject,
            format!("has a kernel object that CRIU cannot dump: {object}"),
            "turn off the profiling, tracing or sandboxing that makes it",
        )
    })
}

fn judge_file(fd: i32, link: &str, metadata: &Metadata, from_outside: bool) -> Option<Finding> {
    let kind = metadata.file_type();
    let device = (major(metadata.rdev()), minor(metadata.rdev()));
    if kind.is_block_device() || (kind.is_char_device() && !is_known_device(device)) {
        return Some(Finding::blocking(
            FindingKind::Device,
            format!("has the device {link} ({}:{}) open", device.0, device.1),
            "run it without the device; the state of hardware does not move",
        ));
    }
    if from_outside && kind.is_char_device() && is_terminal(device) {
        return Some(Finding::blocking(
            FindingKind::ExternalTerminal,
            format!("has the host's terminal {link} open"),
            "start the container detached, with pipes as stdio",
        ));
    }
    if from_outside && fd <= 2 {
        return Some(Finding::blocking(
            FindingKind::HostStdio,
            format!("container stdio must not be a host file, and this is {link}"),
            "start the container with a pipe as stdio (podferry-stdio-keeper writes it to a file) or /dev/null",
        ));
    }
    if from_outside {
        return Some(Finding::blocking(
            FindingKind::HostFile,
            format!("has {link} open, which is outside of the container's mounts"),
            "do not pass the descriptor into the container; mount the file instead",
        ));
    }
    None
}

/// Terminals: `/dev/tty`, `/dev/ptmx` and the Unix98 pseudo terminals.
fn is_terminal((major, _): (u32, u32)) -> bool {
    matches!(major, 4 | 5 | 136..=143)
}

/// Memory devices (`/dev/null` and its like), terminals, and `/dev/net/tun`.
fn is_known_device(device: (u32, u32)) -> bool {
    device.0 == 1 || is_terminal(device) || device == (10, 200)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_kernel_objects_are_named() {
        assert_eq!(judge_object("[io_uring]").unwrap().kind, FindingKind::IoUring);
        let finding = judge_object("[perf_event]").unwrap();
        assert_eq!(finding.kind, FindingKind::KernelObject);
        assert!(finding.message.contains("perf_event"));
        assert_eq!(judge_object("[eventpoll]"), None);
        assert_eq!(judge_object("inotify"), None);
    }

    #[test]
    fn devices_and_outside_files_are_told_apart() {
        let kvm_like = fs::metadata("/dev/null").unwrap();
        assert_eq!(judge_file(0, "/dev/null", &kvm_like, false), None);
        let file = fs::metadata("/proc/self/exe").unwrap();
        assert_eq!(judge_file(1, "/var/log/x", &file, true).unwrap().kind, FindingKind::HostStdio);
        assert_eq!(judge_file(7, "/var/log/x", &file, true).unwrap().kind, FindingKind::HostFile);
        assert_eq!(judge_file(7, "/bin/x", &file, false), None);
        assert!(!is_known_device((10, 232)), "/dev/kvm");
        assert!(is_terminal((136, 3)));
    }
}
