//! Ending the processes of a container whose memory is lost.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use podferry_common::failure::chain;
use podferry_runtime::CgroupPaths;
use rustix::process::{Pid, Signal, kill_process};

use super::messages::PagedContainer;
use crate::worker::run::kill_all;

/// How long killed tasks get to die before it is said that they do not.
const DEATH_WARNING: Duration = Duration::from_secs(5);

/// Kills all processes of a container and returns when none is left.
pub fn end_processes(container: &PagedContainer) {
    tracing::error!(container = container.id, "ending the container: it would read zeros for memory that it had");
    match podferry_runtime::find(std::slice::from_ref(&container.root), &container.id) {
        Ok(found) => kill_all(&found),
        // runc writes its state late in a restore.
        Err(error) => tracing::debug!(error = chain(&error), "runc does not know the container"),
    }
    end_in_cgroups(&container.cgroups);
}

fn end_in_cgroups(directories: &[impl AsRef<Path>]) {
    let begun = Instant::now();
    let mut warned = false;
    loop {
        let left: BTreeSet<i32> = directories.iter().flat_map(|directory| processes(directory.as_ref())).collect();
        if left.is_empty() {
            return;
        }
        for pid in left.into_iter().filter_map(Pid::from_raw) {
            let _gone_already = kill_process(pid, Signal::KILL);
        }
        for directory in directories {
            thaw(directory.as_ref());
        }
        if !warned && begun.elapsed() > DEATH_WARNING {
            warned = true;
            tracing::error!("killed tasks do not die (uninterruptible I/O?); still waiting");
        }
        thread::sleep(Duration::from_millis(1));
    }
}

fn processes(directory: &Path) -> BTreeSet<i32> {
    // Whatever the version: the one directory and those below it.
    let listed = CgroupPaths::V2(directory.to_owned()).processes();
    listed.unwrap_or_else(|error| {
        tracing::error!(error = chain(&error), "a cgroup's processes cannot be listed");
        BTreeSet::new()
    })
}

/// What is killed in a frozen cgroup of version 1 dies when that is thawed.
fn thaw(directory: &Path) {
    let state = directory.join("freezer.state");
    if state.exists()
        && let Err(error) = fs::write(&state, "THAWED")
    {
        tracing::debug!(%error, path = %state.display(), "thawing killed tasks");
    }
}
