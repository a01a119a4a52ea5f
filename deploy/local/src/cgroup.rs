//! The control groups of a node's containers, on cgroup v1, v2 and the hybrid of both.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use crate::error::{Error, FileContext, Result};

/// The mount points of all cgroup hierarchies of this machine, v1 and v2.
pub(crate) fn hierarchies() -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    // A file system mounted twice on one path is one hierarchy.
    let mut points: Vec<PathBuf> = table.lines().filter_map(cgroup_mount_point).collect();
    points.sort();
    points.dedup();
    points
}

/// `proc_pid_mountinfo(5)`: field 5 is the mount point, the type follows the lone hyphen.
fn cgroup_mount_point(line: &str) -> Option<PathBuf> {
    let (before, after) = line.split_once(" - ")?;
    let kind = after.split_whitespace().next()?;
    let point = before.split_whitespace().nth(4)?;
    matches!(kind, "cgroup" | "cgroup2").then(|| PathBuf::from(point))
}

/// Whether the machine has cgroup v2 only.
pub(crate) fn is_unified() -> bool {
    Path::new("/sys/fs/cgroup/cgroup.controllers").exists()
}

/// All groups below and with `name` in all hierarchies, the deepest first.
pub(crate) fn groups(name: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for hierarchy in hierarchies() {
        collect(&hierarchy.join(name), &mut found);
    }
    found
}

fn collect(group: &Path, found: &mut Vec<PathBuf>) {
    if !group.is_dir() {
        return;
    }
    let entries = fs::read_dir(group).into_iter().flatten().flatten();
    for entry in entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        collect(&entry.path(), found);
    }
    found.push(group.to_owned());
}

/// Thaws every group: a frozen task on v1 does not die of SIGKILL.
pub(crate) fn thaw(name: &str) {
    // The outermost first: a group below a frozen one stays frozen.
    for group in groups(name).iter().rev() {
        write_if_there(&group.join("freezer.state"), "THAWED");
        write_if_there(&group.join("cgroup.freeze"), "0");
    }
}

fn write_if_there(file: &Path, text: &str) {
    if file.exists() {
        // Whatever is still frozen shows up as a process that does not go away.
        let _ = fs::write(file, text);
    }
}

/// Removes the groups; their last processes may take a moment to be gone.
pub(crate) fn remove(name: &str, deadline: Duration) -> Result<()> {
    let end = Instant::now() + deadline;
    loop {
        let left: Vec<PathBuf> = groups(name).into_iter().filter(|group| fs::remove_dir(group).is_err()).collect();
        let Some(first) = left.iter().find(|group| group.exists()) else { return Ok(()) };
        if Instant::now() >= end {
            let processes = fs::read_to_string(first.join("cgroup.procs")).unwrap_or_default();
            let what = format!("cgroup {} with processes {processes:?}", first.display());
            return Err(Error::LeftBehind { what, seconds: deadline.as_secs() });
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// Makes sure that a name can be a single path component.
pub(crate) fn check_free(name: &str) -> Result<()> {
    match groups(name).first() {
        None => Ok(()),
        Some(group) => Err(std::io::Error::from(std::io::ErrorKind::AlreadyExists)).at("claim the cgroup", group),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_cgroup_lines_of_mountinfo() {
        let v1 = "37 31 0:34 / /sys/fs/cgroup/freezer rw,relatime - cgroup cgroup rw,freezer";
        let v2 = "41 31 0:38 / /sys/fs/cgroup/unified rw,nosuid shared:9 - cgroup2 cgroup2 rw";
        let other = "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755";
        assert_eq!(cgroup_mount_point(v1), Some(PathBuf::from("/sys/fs/cgroup/freezer")));
        assert_eq!(cgroup_mount_point(v2), Some(PathBuf::from("/sys/fs/cgroup/unified")));
        assert_eq!(cgroup_mount_point(other), None);
    }

    #[test]
    fn nested_groups_are_removed_deepest_first() {
        let name = format!("podferry-local-test-{}", std::process::id());
        for hierarchy in hierarchies() {
            fs::create_dir_all(hierarchy.join(&name).join("one/two")).unwrap();
        }
        assert!(check_free(&name).is_err());
        assert_eq!(groups(&name).len(), 3 * hierarchies().len());
        thaw(&name);
        remove(&name, Duration::from_secs(2)).unwrap();
        assert!(groups(&name).is_empty());
    }
}
