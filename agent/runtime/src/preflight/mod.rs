//! Whether a container can be dumped, found out by looking, without touching it.
//!
//! CRIU refuses some things outright and fails on others half-way, with the container frozen. Each of these is looked for in
//! `/proc` beforehand, and reported with the process, the descriptor and what to do. What CRIU supports is taken from its
//! sources, version 4.2 (`criu/files.c`, `sockets.c`, `sk-inet.c`, `filesystems.c`, `namespaces.c`, `mount.c`).

mod descriptors;
mod mappings;
mod mounts;
mod namespaces;
mod sockets;
mod timers;
mod users;
mod watches;

use std::collections::BTreeSet;
use std::iter;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::Duration;

use procfs::process::{Process, Status};

use crate::container::{Container, NamespaceKind, collect_descendants};
use crate::error::Error;

/// How a container is connected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetworkKind {
    /// In a network namespace that somebody else made: its address can move along with it.
    Path(PathBuf),
    /// In a network namespace of its own, which the container's runtime makes empty.
    Own,
    /// In the host's.
    Host,
}

impl NetworkKind {
    /// How this container is connected.
    pub fn of(container: &Container) -> Self {
        match container.namespace_paths.get(&NamespaceKind::Network) {
            Some(path) => Self::Path(path.clone()),
            None if container.namespaces.contains(&NamespaceKind::Network) => Self::Own,
            None => Self::Host,
        }
    }
}

/// What was counted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// How the container is connected.
    pub network: NetworkKind,
    /// TCP connections of its processes, in whatever state between the first SYN and the last FIN.
    pub tcp_connections: usize,
    /// Its processes, those started by `runc exec` among them.
    pub processes: usize,
    /// The threads of those that a dump takes along.
    pub threads: usize,
    /// Bytes to move, see [`Container::memory_to_move`].
    pub memory_bytes: u64,
    /// Open files that are in no directory any more, each once.
    pub deleted_files: Vec<DeletedFile>,
}

/// A file that is open and in no directory any more. CRIU carries its content along among the images.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeletedFile {
    /// A process that has it open, in the host's pid namespace.
    pub pid: i32,
    /// The process's descriptor.
    pub fd: i32,
    /// The name that it had, in the kernel's words.
    pub name: String,
    /// Bytes that it takes on its filesystem.
    pub bytes: u64,
    /// Its device and inode, which tell it from others.
    pub id: (u64, u64),
}

/// What kind of thing stands in the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum FindingKind {
    /// An `io_uring` instance.
    IoUring,
    /// A context of asynchronous I/O (`io_setup`).
    AsyncIo,
    /// A descriptor of a kernel object that CRIU does not know: perf event, userfaultfd, BPF program, KVM.
    KernelObject,
    /// An MPTCP socket.
    Mptcp,
    /// A socket of another protocol that CRIU does not know.
    SocketProtocol,
    /// A unix socket whose other end is outside of the container.
    ExternalUnixSocket,
    /// Standard input, output or error is a file of the host.
    HostStdio,
    /// A file from outside of the container's mounts.
    HostFile,
    /// A terminal whose other end is outside of the container.
    ExternalTerminal,
    /// A device.
    Device,
    /// A watch (inotify, fanotify) on a file that CRIU cannot name.
    FileWatch,
    /// A periodic timer (timerfd) that CRIU may restore switched off.
    Timer,
    /// Under a debugger or tracer.
    Traced,
    /// Of another user than the agent, which lacks the capability to ask for its limits.
    OtherUser,
    /// Shares a namespace with the host.
    SharedNamespace,
    /// A namespace inside the container of a kind that CRIU cannot nest.
    NestedNamespace,
    /// A mount of a filesystem that CRIU does not know.
    Filesystem,
    /// A process that is no descendant of the container's init.
    OutsideTree,
    /// A dead process that nobody has reaped.
    Zombie,
}

/// Whether a finding forbids a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    /// The dump or the restore would fail, or lose something that the workload relies on.
    Blocking,
    /// The container can be moved, and something about it will be different.
    Warning,
}

/// One thing that stands in the way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What kind of thing.
    pub kind: FindingKind,
    /// Whether it forbids a migration.
    pub severity: Severity,
    /// The process, in the host's pid namespace; none when it is about the container as a whole.
    pub pid: Option<i32>,
    /// The process's descriptor, if it is about one.
    pub fd: Option<i32>,
    /// What was found.
    pub message: String,
    /// What to do about it.
    pub remedy: &'static str,
}

impl Finding {
    fn blocking(kind: FindingKind, message: String, remedy: &'static str) -> Self {
        Self { kind, severity: Severity::Blocking, pid: None, fd: None, message, remedy }
    }

    fn warning(kind: FindingKind, message: String, remedy: &'static str) -> Self {
        Self { severity: Severity::Warning, ..Self::blocking(kind, message, remedy) }
    }

    fn of_process(mut self, pid: i32) -> Self {
        self.pid = Some(pid);
        self
    }

    fn of_descriptor(mut self, pid: i32, fd: i32) -> Self {
        self.pid = Some(pid);
        self.fd = Some(fd);
        self
    }
}

impl std::fmt::Display for Finding {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.pid, self.fd) {
            (Some(pid), Some(fd)) => write!(formatter, "process {pid}, descriptor {fd}: ")?,
            (Some(pid), None) => write!(formatter, "process {pid}: ")?,
            _ => {}
        }
        write!(formatter, "{}; {}", self.message, self.remedy)
    }
}

/// What a look at a container gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// What was counted.
    pub facts: Facts,
    /// What stands in the way, by kind.
    pub findings: Vec<Finding>,
}

impl Report {
    /// The findings that forbid a migration.
    pub fn blocking(&self) -> impl Iterator<Item = &Finding> {
        self.findings.iter().filter(|finding| finding.severity == Severity::Blocking)
    }

    /// Whether nothing forbids it.
    pub fn can_be_dumped(&self) -> bool {
        self.blocking().next().is_none()
    }
}

/// Looks at a running container. What changes meanwhile may be missed: CRIU has the last word.
///
/// What would forbid a migration counts only when a second look finds such a thing too: a process that ends, or a connection that
/// is made, between the parts of one look can seem to be what it is not.
pub fn preflight(container: &Container) -> Result<Report, Error> {
    /// Longer than one look takes of a few processes, and nothing to somebody who waits for an answer.
    const PAUSE: Duration = Duration::from_millis(20);
    let first = look(container)?;
    if first.can_be_dumped() {
        return Ok(first);
    }
    sleep(PAUSE);
    Ok(confirmed(&first, look(container)?))
}

/// The second of two looks, without what only it found in the way.
fn confirmed(first: &Report, mut second: Report) -> Report {
    let kinds: BTreeSet<FindingKind> = first.blocking().map(|finding| finding.kind).collect();
    second.findings.retain(|finding| finding.severity == Severity::Warning || kinds.contains(&finding.kind));
    second
}

fn look(container: &Container) -> Result<Report, Error> {
    let init =
        container.init.filter(|init| init.is_alive()).ok_or_else(|| Error::NotRunning { id: container.id.clone() })?;
    let pids = container.processes()?;
    let mut findings = Vec::new();
    let mut threads = 0;
    let mut open = descriptors::Open::default();
    let mounts = mounts::Known::new(init.pid)?;
    let own = Process::myself().and_then(|process| process.status()).map_err(Error::proc(0, "status"))?;
    let mut tree = BTreeSet::new();
    collect_descendants(init.pid, &mut tree);
    // What `runc exec` started is not dumped: whatever it has does not matter.
    // The first process comes first: what several share is told of it.
    for pid in iter::once(init.pid).chain(tree.iter().copied().filter(|&pid| pid != init.pid)) {
        let looked = (|| {
            threads += look_at_process(pid, &own, &mut findings)?;
            mappings::look(pid, &mut findings)?;
            descriptors::look(pid, &mounts, &mut findings, &mut open)
        })();
        // It ended while it was looked at.
        if let Err(error) = looked
            && !error.says_ended(pid)
        {
            return Err(error);
        }
    }
    look_for_zombies(&tree, &mut findings);
    namespaces::look(container, init.pid, &pids, &tree, &mut findings)?;
    mounts::look(container, init.pid, &mut findings)?;
    let tcp_connections = sockets::look(&open.sockets, &mut findings)?;
    findings.sort_by_key(|finding| (finding.kind, finding.pid != Some(init.pid), finding.pid, finding.fd));
    let facts = Facts {
        network: NetworkKind::of(container),
        tcp_connections,
        processes: pids.len(),
        threads,
        memory_bytes: container.memory_to_move()?,
        deleted_files: open.deleted_files,
    };
    Ok(Report { facts, findings })
}

/// Whose it is, and who traces it; the number of its threads. `own` is of this process.
fn look_at_process(pid: i32, own: &Status, findings: &mut Vec<Finding>) -> Result<usize, Error> {
    let process = Process::new(pid).map_err(Error::proc(pid, "stat"))?;
    let status = process.status().map_err(Error::proc(pid, "status"))?;
    findings.extend(users::judge(&status, own).map(|finding| finding.of_process(pid)));
    let mut tracers = BTreeSet::new();
    let mut threads = 0;
    for task in process.tasks().map_err(Error::proc(pid, "task"))? {
        // A thread may end at any time.
        let Ok(status) = task.and_then(|task| task.status()) else { continue };
        threads += 1;
        tracers.insert(status.tracerpid);
    }
    tracers.remove(&0);
    findings.extend(tracers.into_iter().map(|tracer| {
        Finding::blocking(
            FindingKind::Traced,
            format!("process {tracer} traces it; CRIU has to trace it itself"),
            "detach the debugger, strace or profiler",
        )
        .of_process(pid)
    }));
    Ok(threads)
}

/// Processes that are dead, and stay so: for a moment every ended child is a zombie.
fn look_for_zombies(tree: &BTreeSet<i32>, findings: &mut Vec<Finding>) {
    /// Longer than a parent that reaps needs for it.
    const GRACE: Duration = Duration::from_millis(100);
    let dead = |pid: i32| {
        let stat = Process::new(pid).and_then(|process| process.stat()).ok()?;
        (stat.state == 'Z').then_some((pid, stat.starttime, stat.comm, stat.ppid))
    };
    let candidates: Vec<_> = tree.iter().filter_map(|&pid| dead(pid)).collect();
    if candidates.is_empty() {
        return;
    }
    sleep(GRACE);
    for (pid, _, name, parent) in candidates.into_iter().filter(|one| dead(one.0).as_ref() == Some(one)) {
        findings.push(
            Finding::warning(
                FindingKind::Zombie,
                format!("{name} is dead and was not reaped by its parent {parent}"),
                "if that is the container's first process, start the container with an init that reaps",
            )
            .of_process(pid),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_two_looks_found_is_in_the_way() {
        let facts = Facts {
            network: NetworkKind::Host,
            tcp_connections: 0,
            processes: 1,
            threads: 1,
            memory_bytes: 0,
            deleted_files: Vec::new(),
        };
        let found = |kind: FindingKind, pid| Finding::blocking(kind, String::new(), "").of_process(pid);
        let report = |findings: Vec<Finding>| Report { facts: facts.clone(), findings };
        let (ring, unix) = (FindingKind::IoUring, FindingKind::ExternalUnixSocket);
        let zombie = Finding::warning(FindingKind::Zombie, String::new(), "");
        let first = report(vec![found(ring, 1), found(FindingKind::Mptcp, 1)]);
        // Other processes of the same kind count: a program may start one after the other.
        let second = report(vec![found(ring, 2), found(unix, 1), zombie.clone()]);
        assert_eq!(confirmed(&first, second).findings, [found(ring, 2), zombie]);
    }
}
