//! Taking podferry off a node, also while pods of its handler run.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use crate::agent_config;
use crate::bundle;
use crate::error::{Error, Result};
use crate::host::Host;
use crate::install::{Options, refuse_while_busy};
use crate::journal::{Change, Journal, remove_folder, remove_tree};
use crate::restart::Restart;
use crate::runtime::{self, Runtime};

const PAUSE: Duration = Duration::from_secs(1);

/// Takes everything off the node. `false` if there was nothing.
///
/// Containers of the handler that still run need its program to be stopped, so for them it becomes a link to runc until they are gone;
/// `wait` is how long that is waited for.
pub fn uninstall(host: &Host, options: &Options, wait: Duration) -> Result<bool> {
    let folder = options.folder(host)?;
    let Some(mut journal) = Journal::load(host, &folder)? else {
        Journal::remove_begun(host, &folder)?;
        return Ok(false);
    };
    journal.remove_unfinished(host)?;
    let runtime = runtime::find_runtime(host, options.runtime)?;
    refuse_while_busy(host, options.force)?;
    options.restart.check(host, runtime)?;
    journal.leaving = true;
    journal.save(host, &folder)?;

    let wrapper = Options::wrapper(&folder);
    if let Err(error) = wait_for_containers(host, runtime, &wrapper, wait) {
        if let Some(runc) = &journal.runc {
            bundle::leave_only_runc(host, &folder, runc)?;
        }
        journal.undo(host, &folder, |change| is_programs(change, &folder))?;
        return Err(error);
    }
    take_handler_out(host, &folder, &mut journal, &options.restart, runtime)?;
    journal.undo(host, &folder, |change| !matches!(change, Change::Folder { .. }))?;
    remove_own_folders(host, &folder)?;
    let above: Vec<PathBuf> = journal.changes.iter().rev().filter_map(folder_of).collect();
    Journal::remove(host, &folder)?;
    above.iter().try_for_each(|path| remove_folder(&host.path(path)))?;
    Ok(true)
}

fn folder_of(change: &Change) -> Option<PathBuf> {
    if let Change::Folder { path } = change { Some(path.clone()) } else { None }
}

fn is_programs(change: &Change, folder: &Path) -> bool {
    matches!(change, Change::Tree { path } if path.starts_with(folder))
}

fn wait_for_containers(host: &Host, runtime: Runtime, wrapper: &Path, wait: Duration) -> Result<()> {
    let end = Instant::now() + wait;
    loop {
        let count = runtime.containers_of_handler(host, wrapper)?;
        if count == 0 {
            return Ok(());
        }
        if Instant::now() >= end {
            return Err(Error::StillRunning { count });
        }
        thread::sleep(PAUSE);
    }
}

/// The handler's own files lie outside of our folder and of `/etc/podferry`.
fn take_handler_out(
    host: &Host,
    folder: &Path,
    journal: &mut Journal,
    restart: &Restart,
    runtime: Runtime,
) -> Result<()> {
    let is_handler = |change: &Change| match change {
        Change::Block { .. } => true,
        Change::File { path } => !path.starts_with(folder) && !path.starts_with("/etc/podferry"),
        _ => false,
    };
    if journal.changes.iter().any(is_handler) {
        journal.restart_needed = true;
        journal.save(host, folder)?;
    }
    journal.undo(host, folder, is_handler)?;
    if journal.restart_needed {
        restart.run(host, runtime)?;
        journal.restart_needed = false;
        journal.save(host, folder)?;
    }
    Ok(())
}

/// What agent and installer have made below folders that are podferry's alone.
fn remove_own_folders(host: &Host, folder: &Path) -> Result<()> {
    if host.is_mounted(agent_config::IMAGES)? {
        host.run(&["umount", agent_config::IMAGES])?;
    }
    for own in [agent_config::IMAGES, agent_config::SOCKETS, agent_config::STATE, agent_config::IDENTITY] {
        remove_tree(&host.path(own))?;
    }
    remove_cgroups(host)?;
    remove_tree(&host.path(folder.join(bundle::LEFTOVER)))
}

/// Those that the agent ran in. One with processes is left: they are of an agent that has not ended yet, and the next boot has none of it.
fn remove_cgroups(host: &Host) -> Result<()> {
    let mounts = host.text("/proc/1/mounts")?.unwrap_or_default();
    for mount in mounts.lines().filter_map(crate::enter::cgroup_mount) {
        let _ = std::fs::remove_dir(host.path(Path::new(mount.path).join(crate::enter::CGROUP)));
    }
    Ok(())
}
