//! Namespaces that are shared with the host, or nested, and processes outside of init's tree.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use crate::container::{Container, Init, NamespaceKind, collect_descendants};
use crate::error::Error;

use super::{Finding, FindingKind};

/// Kinds of which CRIU dumps only the one that init is in. Mount and network namespaces may be nested.
const NOT_NESTED: [NamespaceKind; 6] = [
    NamespaceKind::Pid,
    NamespaceKind::Ipc,
    NamespaceKind::Uts,
    NamespaceKind::User,
    NamespaceKind::Cgroup,
    NamespaceKind::Time,
];

pub(super) fn look(
    container: &Container,
    init: i32,
    pids: &[i32],
    tree: &BTreeSet<i32>,
    findings: &mut Vec<Finding>,
) -> Result<(), Error> {
    findings.extend(strangers(init, pids, tree).into_iter().map(outside));
    for &pid in tree {
        for kind in NOT_NESTED {
            match (link(init, kind)?, link(pid, kind)?) {
                (Some(of_init), Some(own)) if of_init != own => findings.push(nested(kind, pid)),
                _ => {}
            }
        }
    }
    look_for_shared(container, tree, findings);
    Ok(())
}

/// The processes of the cgroup that do not descend from the container's first. None that ended between the looks, or
/// whose parent ended and left it to another while the tree was walked, or that began since with a number that was free
/// again.
fn strangers(init: i32, pids: &[i32], tree: &BTreeSet<i32>) -> Vec<i32> {
    let mut strangers: Vec<i32> = pids.iter().copied().filter(|pid| !tree.contains(pid)).collect();
    strangers.retain(|&pid| Init::of_pid(pid).is_some_and(Init::is_alive));
    if strangers.is_empty() {
        return strangers;
    }
    let mut later = BTreeSet::new();
    collect_descendants(init, &mut later);
    strangers.retain(|pid| !later.contains(pid));
    strangers
}

/// Which namespace a process is in. None when it ended, is a zombie, or the kernel has no such kind.
fn link(pid: i32, kind: NamespaceKind) -> Result<Option<PathBuf>, Error> {
    let path = format!("/proc/{pid}/ns/{}", kind.proc_name());
    match fs::read_link(&path).map_err(Error::io("read the link", path)) {
        Ok(link) => Ok(Some(link)),
        Err(error) if error.says_ended(pid) => Ok(None),
        Err(error) => Err(error),
    }
}

fn outside(pid: i32) -> Finding {
    Finding::warning(
        FindingKind::OutsideTree,
        "was put into the container from outside (`runc exec`) and does not move along".to_owned(),
        "wait until it has ended, or end it",
    )
    .of_process(pid)
}

fn nested(kind: NamespaceKind, pid: i32) -> Finding {
    Finding::blocking(
        FindingKind::NestedNamespace,
        format!("is in a {} namespace of its own inside the container", kind.proc_name()),
        "turn off the sandbox that makes it; CRIU dumps nested mount and network namespaces only",
    )
    .of_process(pid)
}

fn look_for_shared(container: &Container, tree: &BTreeSet<i32>, findings: &mut Vec<Finding>) {
    let shared = |kind| !container.namespaces.contains(&kind);
    if shared(NamespaceKind::Mount) {
        findings.push(Finding::blocking(
            FindingKind::SharedNamespace,
            "the container has the host's mounts".to_owned(),
            "give it a mount namespace",
        ));
    }
    if shared(NamespaceKind::Pid) {
        findings.push(Finding::blocking(
            FindingKind::SharedNamespace,
            "the container shares the host's process ids, which may be taken on the target".to_owned(),
            "give it a pid namespace (in Kubernetes: hostPID: false)",
        ));
    } else if container.namespace_paths.contains_key(&NamespaceKind::Pid) {
        findings.push(Finding::warning(
            FindingKind::SharedNamespace,
            "the container shares process ids with others, which may be taken on the target".to_owned(),
            "give it a pid namespace of its own (in Kubernetes: shareProcessNamespace: false)",
        ));
    }
    if shared(NamespaceKind::Ipc) {
        let user = tree.iter().copied().find(|&pid| has_sysv_memory(pid));
        let message = "the container shares the host's System V IPC, which stays behind".to_owned();
        let remedy = "give it an ipc namespace (in Kubernetes: hostIPC: false)";
        findings.push(match user {
            Some(pid) => Finding::blocking(FindingKind::SharedNamespace, message, remedy).of_process(pid),
            None => Finding::warning(FindingKind::SharedNamespace, message, remedy),
        });
    }
}

fn has_sysv_memory(pid: i32) -> bool {
    fs::read(format!("/proc/{pid}/maps")).is_ok_and(|text| String::from_utf8_lossy(&text).contains(" /SYSV"))
}
