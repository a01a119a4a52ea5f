//! Processes by identity: a number alone may be somebody else's by the time it is used.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

use crate::error::{Error, FileContext, Result};

/// A process that stays the same one: its number and when it started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// The number in the pid namespace of the machine.
    pub pid: u32,
    /// Field 22 of `/proc/PID/stat`: clock ticks since boot, proc(5).
    pub start_time: u64,
}

impl ProcessId {
    /// The process that has this number now.
    pub fn of(pid: u32) -> Option<Self> {
        let (state, start_time) = stat(Path::new("/proc"), pid)?;
        // A zombie, or one that is being collected at this moment.
        let gone = matches!(state, 'Z' | 'X' | 'x');
        (!gone).then_some(Self { pid, start_time })
    }

    /// Whether it still runs. A zombie does not, nor does one that its parent collects just now.
    pub fn is_alive(&self) -> bool {
        Self::of(self.pid) == Some(*self)
    }

    /// Sends a signal, unless the process is gone. True when it was sent.
    pub fn signal(&self, signal: Signal) -> bool {
        let Some(pid) = Pid::from_raw(self.pid.cast_signed()) else { return false };
        let Ok(descriptor) = pidfd_open(pid, PidfdFlags::empty()) else { return false };
        // Checked after the descriptor is open: from here on it cannot become another process.
        self.is_alive() && pidfd_send_signal(&descriptor, signal).is_ok()
    }

    /// Waits until it has ended with all its threads, and so let go of its files and sockets: the first thread of a killed
    /// process is a zombie before the last has come back from the kernel. False when it has not by then.
    pub fn wait_gone(&self, deadline: Duration) -> bool {
        let end = Instant::now() + deadline;
        let Some(pid) = Pid::from_raw(self.pid.cast_signed()) else { return true };
        let Ok(descriptor) = pidfd_open(pid, PidfdFlags::empty()) else { return true };
        // Checked after the descriptor is open, as above.
        if stat(Path::new("/proc"), self.pid).is_none_or(|(_, start_time)| start_time != self.start_time) {
            return true;
        }
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let timeout = Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() };
            match poll(&mut [PollFd::new(&descriptor, PollFlags::IN)], Some(&timeout)) {
                Err(rustix::io::Errno::INTR) => {}
                Ok(0) => return false,
                _ => return true,
            }
        }
    }
}

/// State letter and start time out of `PROC/PID/stat`. The command in it may hold blanks and parentheses.
pub(crate) fn stat(proc: &Path, pid: u32) -> Option<(char, u64)> {
    let text = fs::read_to_string(proc.join(pid.to_string()).join("stat")).ok()?;
    let mut fields = text.rsplit_once(") ")?.1.split_whitespace();
    let state = fields.next()?.chars().next()?;
    // Field 3 was the state, so field 22 is the 19th after it.
    Some((state, fields.nth(18)?.parse().ok()?))
}

/// All process numbers in a proc filesystem.
pub(crate) fn pids(proc: &Path) -> Vec<u32> {
    let Ok(entries) = fs::read_dir(proc) else { return Vec::new() };
    entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// The children of a process; all tasks of it may have some.
pub(crate) fn children(pid: u32) -> Vec<u32> {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    tasks
        .flatten()
        .filter_map(|task| fs::read_to_string(task.path().join("children")).ok())
        .flat_map(|text| text.split_whitespace().filter_map(|word| word.parse().ok()).collect::<Vec<_>>())
        .collect()
}

/// Kills a process of ours and everything below it, children first, so that none is handed to another parent.
pub(crate) fn kill_tree(pid: u32) {
    for child in children(pid) {
        kill_tree(child);
    }
    if let Some(process) = ProcessId::of(pid) {
        process.signal(Signal::KILL);
    }
}

/// The process that `nsenter --pid` forked for us, once it has become the program that was asked for.
pub(crate) fn only_child(parent: u32, deadline: Duration) -> Option<ProcessId> {
    let end = Instant::now() + deadline;
    while Instant::now() < end {
        let child = children(parent).first().and_then(|pid| ProcessId::of(*pid));
        if let Some(child) = child.filter(|child| program(child.pid).is_some_and(|own| program(parent) != Some(own))) {
            return Some(child);
        }
        ProcessId::of(parent)?;
        thread::sleep(Duration::from_millis(1));
    }
    None
}

fn program(pid: u32) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{pid}/exe")).ok()
}

/// Every process of the machine whose network namespace is one of these `/run/netns` files. Ourselves never.
pub(crate) fn in_network_namespaces(files: &[PathBuf]) -> Vec<ProcessId> {
    let wanted: Vec<(u64, u64)> = files.iter().filter_map(|file| inode(file)).collect();
    if wanted.is_empty() {
        return Vec::new();
    }
    pids(Path::new("/proc"))
        .into_iter()
        .filter(|pid| *pid != std::process::id())
        .filter(|pid| {
            inode(Path::new(&format!("/proc/{pid}/ns/net"))).is_some_and(|namespace| wanted.contains(&namespace))
        })
        .filter_map(ProcessId::of)
        .collect()
}

fn inode(path: &Path) -> Option<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    let metadata = fs::metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino()))
}

/// Kills all of them and waits; what is still there after the deadline is an error.
pub(crate) fn kill_all(processes: &[ProcessId], deadline: Duration) -> Result<()> {
    for process in processes {
        process.signal(Signal::KILL);
    }
    let end = Instant::now() + deadline;
    for process in processes {
        let left = end.saturating_duration_since(Instant::now());
        if !process.wait_gone(left.max(Duration::from_millis(1))) {
            return Err(Error::LeftBehind { what: describe(*process), seconds: deadline.as_secs() });
        }
    }
    Ok(())
}

fn describe(process: ProcessId) -> String {
    let command = fs::read_to_string(format!("/proc/{}/comm", process.pid)).unwrap_or_default();
    format!("process {} ({})", process.pid, command.trim())
}

/// Writes the identity of a daemon to its pid file.
pub(crate) fn write_pid_file(path: &Path, process: ProcessId) -> Result<()> {
    let text = format!("{} {}\n", process.pid, process.start_time);
    fs::write(path, text).at("write", path)
}

/// The daemon that a pid file names, when it still runs.
pub(crate) fn read_pid_file(path: &Path) -> Option<ProcessId> {
    let text = fs::read_to_string(path).ok()?;
    let (pid, start_time) = text.trim().split_once(' ')?;
    let process = ProcessId { pid: pid.parse().ok()?, start_time: start_time.parse().ok()? };
    process.is_alive().then_some(process)
}

/// Whether a process listens on this TCP port, seen from inside its own network namespace (`proc_net_tcp`: 0A).
pub(crate) fn listens(pid: u32, port: u16) -> bool {
    let port = format!(":{port:04X}");
    ["tcp", "tcp6"].iter().any(|family| {
        let table = fs::read_to_string(format!("/proc/{pid}/net/{family}")).unwrap_or_default();
        table.lines().skip(1).any(|line| {
            let mut fields = line.split_whitespace().skip(1);
            fields.next().is_some_and(|local| local.ends_with(&port)) && fields.nth(1) == Some("0A")
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identity_is_bound_to_the_start_time() {
        let me = ProcessId::of(std::process::id()).unwrap();
        assert!(me.is_alive());
        assert!(!ProcessId { start_time: me.start_time + 1, ..me }.is_alive());
    }

    #[test]
    fn a_dead_process_is_gone_and_never_signalled() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let process = ProcessId::of(child.id()).unwrap();
        assert!(!process.wait_gone(Duration::from_millis(20)));
        assert!(process.signal(Signal::KILL));
        // A zombie counts as gone: nobody but its parent can do more about it.
        assert!(process.wait_gone(Duration::from_secs(5)));
        assert!(!process.signal(Signal::KILL));
        child.wait().unwrap();
    }

    /// Between a zombie and nothing the kernel shows the state X, while its parent collects it.
    #[test]
    fn a_process_that_is_being_collected_is_gone() {
        for _ in 0..500 {
            let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
            let process = ProcessId::of(child.id()).unwrap();
            let collector = thread::spawn(move || child.wait().unwrap());
            assert!(process.signal(Signal::KILL));
            assert!(process.wait_gone(Duration::from_secs(5)));
            for _ in 0..20 {
                assert!(!process.is_alive());
            }
            collector.join().unwrap();
        }
    }

    #[test]
    fn listening_is_seen_from_proc() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(listens(std::process::id(), port));
        drop(listener);
        // What another test forks has it too until it becomes another program.
        let end = Instant::now() + Duration::from_secs(5);
        while listens(std::process::id(), port) {
            assert!(Instant::now() < end, "it still listens");
            thread::sleep(Duration::from_millis(1));
        }
    }
}
