//! Becoming the agent: from a pod's container into the node's namespaces, and out of the pod's cgroups.

use std::convert::Infallible;
use std::fs::{self, File};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{self, Command};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::agent_config;
use crate::bundle::CURRENT;
use crate::error::{Error, Result};

/// For so long an agent may end by itself.
const PATIENCE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(50);
/// The cgroup of the agent, and of all that it starts.
pub(crate) const CGROUP: &str = "podferry";

/// Replaces this process by the node's agent, as a process of the node.
///
/// Dump workers, pagers and stdio keepers must outlive the agent's container, and whatever is in the container's cgroup is killed with
/// it. So the agent runs in a cgroup of the node's. Its container ends with it all the same, since it stays the container's first process.
pub fn become_agent(folder: &Path) -> Result<Infallible> {
    let entered = |what: &str, source: io::Error| Error::Enter { action: format!("enter the node's {what}"), source };
    let open = |name: &str| File::open(Path::new("/proc/1/ns").join(name)).map_err(|source| entered(name, source));
    // Opened before the first is entered, which has another /proc.
    let namespaces = [
        ("cgroup", LinkNameSpaceType::ControlGroup),
        ("uts", LinkNameSpaceType::HostNameAndNISDomainName),
        ("ipc", LinkNameSpaceType::InterProcessCommunication),
        ("net", LinkNameSpaceType::Network),
        ("mnt", LinkNameSpaceType::Mount),
    ];
    let opened = namespaces.map(|(name, kind)| open(name).map(|file| (name, kind, file)));
    for namespace in opened {
        let (name, kind, file) = namespace?;
        move_into_link_name_space(std::os::fd::AsFd::as_fd(&file), Some(kind))
            .map_err(|error| entered(name, error.into()))?;
    }
    leave_cgroups().map_err(|source| Error::Enter { action: "leave the pod's cgroups".to_owned(), source })?;
    end_others(folder).map_err(|source| Error::Enter { action: "end the agent before".to_owned(), source })?;
    let agent = folder.join(CURRENT).join("bin/podferry-agent");
    let error = Command::new(&agent).arg("--config").arg(agent_config::PATH).current_dir("/").exec();
    Err(Error::File { action: "run", path: agent, source: error })
}

/// Ends agents that outlived their containers: containerd may take a container for dead whose process it cannot see in the pod's cgroup,
/// and such an agent still has the port.
fn end_others(folder: &Path) -> io::Result<()> {
    for signal in [Signal::TERM, Signal::KILL] {
        let end = Instant::now() + PATIENCE;
        for agent in agents(folder)? {
            // It may have ended by itself.
            let _ = kill_process(agent, signal);
        }
        while !agents(folder)?.is_empty() && Instant::now() < end {
            thread::sleep(PAUSE);
        }
    }
    Ok(())
}

/// All processes that run a program `podferry-agent` of this installation, also one that has been replaced.
fn agents(folder: &Path) -> io::Result<Vec<Pid>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw) else {
            continue;
        };
        let Ok(program) = fs::read_link(entry.path().join("exe")) else { continue };
        let program = program.to_string_lossy();
        let program = Path::new(program.trim_end_matches(" (deleted)"));
        if program.starts_with(folder) && program.file_name().is_some_and(|name| name == "podferry-agent") {
            found.push(pid);
        }
    }
    Ok(found)
}

/// Moves this process to a cgroup of its own at the node's root, in all hierarchies that are mounted there.
fn leave_cgroups() -> io::Result<()> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    for Mount { kind, options, path } in mounts.lines().filter_map(cgroup_mount) {
        let folder = Path::new(path).join(CGROUP);
        match fs::create_dir(&folder) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        if kind == "cgroup" && options.split(',').any(|option| option == "cpuset") {
            inherit_cpuset(Path::new(path), &folder)?;
        }
        fs::write(folder.join("cgroup.procs"), process::id().to_string())?;
    }
    Ok(())
}

/// A mounted hierarchy of cgroups.
pub(crate) struct Mount<'a> {
    kind: &'a str,
    options: &'a str,
    /// Where it is.
    pub(crate) path: &'a str,
}

/// The hierarchy that a line of a process's `mounts` is about.
pub(crate) fn cgroup_mount(line: &str) -> Option<Mount<'_>> {
    let mut words = line.split(' ').skip(1);
    let (path, kind, options) = (words.next()?, words.next()?, words.next()?);
    matches!(kind, "cgroup" | "cgroup2").then_some(Mount { kind, options, path })
}

/// With version 1 a new cgroup has no processors and no memory nodes.
fn inherit_cpuset(from: &Path, to: &Path) -> io::Result<()> {
    for name in ["cpuset.cpus", "cpuset.mems"] {
        let value = fs::read(from.join(name))?;
        fs::write(to.join(name), value)?;
    }
    Ok(())
}
