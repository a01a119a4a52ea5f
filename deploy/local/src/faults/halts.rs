//! Processes that stand still for a while, and logs in which something is waited for.

use std::cell::RefCell;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use rustix::process::Signal;

use super::{processes, wait_every, wait_for};
use crate::error::{Error, Result};
use crate::process::ProcessId;

/// Processes that were stopped by a signal; they go on when this is dropped.
#[derive(Debug, Default)]
pub struct Stopped(RefCell<Vec<Halt>>);

#[derive(Debug)]
struct Halt {
    process: ProcessId,
    /// `nsenter`, which would stop itself with the child that it waits for, and let it go on when it goes on itself, at a time when
    /// the child may have been stopped once more. Stopped before its child, it does not see any of this.
    parent: Option<ProcessId>,
}

impl Halt {
    fn end(&self) {
        self.process.signal(Signal::CONT);
        if let Some(parent) = self.parent {
            parent.signal(Signal::CONT);
        }
    }
}

impl Stopped {
    /// Stops a process, and waits until it stands still.
    pub fn stop(&self, process: ProcessId) -> Result<()> {
        let parent = processes::nsenter_of(process.pid);
        if let Some(parent) = parent {
            stop_one(parent)?;
        }
        self.0.borrow_mut().push(Halt { process, parent });
        stop_one(process)
    }

    /// Lets one go on.
    pub fn go_on(&self, process: ProcessId) {
        self.0.borrow_mut().retain(|halt| {
            let other = halt.process != process;
            if !other {
                halt.end();
            }
            other
        });
    }

    /// Lets all go on but these.
    pub fn all_go_on_but(&self, kept: &[ProcessId]) {
        self.0.borrow_mut().retain(|halt| {
            let kept = kept.contains(&halt.process);
            if !kept {
                halt.end();
            }
            kept
        });
    }

    /// Lets all go on.
    pub fn all_go_on(&self) {
        self.0.borrow_mut().drain(..).for_each(|halt| halt.end());
    }
}

fn stop_one(process: ProcessId) -> Result<()> {
    if !process.signal(Signal::STOP) {
        return Err(Error::NotRunning { what: format!("process {}", process.pid) });
    }
    let what = format!("process {} to stop", process.pid);
    wait_for(&what, || matches!(processes::state(process.pid), Some('T' | 't') | None).then_some(()))
}

impl Drop for Stopped {
    fn drop(&mut self) {
        self.all_go_on();
    }
}

/// What is written into a log from now on.
#[derive(Debug)]
pub struct LogTail {
    path: PathBuf,
    begin: usize,
}

impl LogTail {
    /// Of this file, which need not be there yet.
    pub fn of(path: PathBuf) -> Self {
        let length = fs::metadata(&path).map(|log| log.len()).unwrap_or_default();
        Self { path, begin: usize::try_from(length).unwrap_or(usize::MAX) }
    }

    /// The first line that has this in it.
    pub fn find(&self, what: &str) -> Option<String> {
        let text = fs::read_to_string(&self.path).unwrap_or_default();
        let new = text.get(self.begin..)?;
        // The last line may not be whole yet.
        let whole = &new[..=new.rfind('\n')?];
        whole.lines().find(|line| format!("{line} ").contains(what)).map(str::to_owned)
    }

    /// Waits for such a line.
    pub fn wait(&self, what: &str) -> Result<String> {
        wait_every(Duration::from_micros(500), &format!("{what:?} in {}", self.path.display()), || self.find(what))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::process::Command;

    use super::*;

    #[test]
    fn who_was_stopped_goes_on_when_it_is_let_or_forgotten() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let process = ProcessId::of(child.id()).unwrap();
        let goes = || wait_for("it to go on", || (processes::state(process.pid) == Some('S')).then_some(()));
        goes().unwrap();
        let stopped = Stopped::default();
        stopped.stop(process).unwrap();
        assert_eq!(processes::state(process.pid), Some('T'));
        stopped.go_on(process);
        goes().unwrap();
        stopped.stop(process).unwrap();
        drop(stopped);
        goes().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(Stopped::default().stop(process).is_err(), "it is gone");
    }

    #[test]
    fn only_whole_new_lines_are_found() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        fs::write(&path, "phase=freeze of long ago\n").unwrap();
        let tail = LogTail::of(path.clone());
        let mut log = fs::File::options().append(true).open(&path).unwrap();
        assert_eq!(tail.find("phase=freeze "), None);
        write!(log, "now phase=freeze").unwrap();
        assert_eq!(tail.find("phase=freeze "), None);
        writeln!(log).unwrap();
        assert_eq!(tail.find("phase=freeze ").as_deref(), Some("now phase=freeze"));
    }
}
