//! The processes of a tree.

use std::fs;

use nix::unistd::Pid;

/// A process: its number out here and that inside its own pid namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// As this program sees it.
    pub host: Pid,
    /// As CRIU's images call it.
    pub inner: i32,
}

/// A process and all its descendants that are there now. While they run, there may be others a moment later.
pub fn members(root: Pid) -> Vec<Member> {
    let mut found = Vec::new();
    let mut waiting = vec![root];
    while let Some(host) = waiting.pop() {
        if let Some(inner) = inner_number(host) {
            found.push(Member { host, inner });
            waiting.extend(children(host));
        }
    }
    found
}

fn children(process: Pid) -> Vec<Pid> {
    let threads = fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    let lists = threads.filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok());
    lists
        .flat_map(|list| list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>())
        .map(Pid::from_raw)
        .collect()
}

/// The last number of `NSpid`; `None` for one that is gone.
fn inner_number(process: Pid) -> Option<i32> {
    let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("NSpid:"))?.split_whitespace().last()?.parse().ok()
}

/// Whether a process has ended and only waits to be reaped: it has no memory.
pub fn is_zombie(process: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    stat.rsplit(") ").next().is_none_or(|rest| rest.starts_with('Z') || rest.starts_with('X'))
}

/// Whether all threads of all processes are stopped by a tracer. Then none of them makes another.
pub fn stands_still(root: Pid) -> bool {
    let all = members(root);
    !all.is_empty() && all.iter().all(|member| threads_stand_still(member.host))
}

fn threads_stand_still(process: Pid) -> bool {
    let threads = fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    threads.filter_map(|thread| fs::read_to_string(thread.path().join("stat")).ok()).all(|stat| {
        let state = stat.rsplit(") ").next().unwrap_or("");
        state.starts_with('t') || state.starts_with('Z')
    })
}
