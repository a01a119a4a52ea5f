//! The processes that a dump takes along.

use std::collections::BTreeSet;

use procfs::process::Process;

use crate::container::{Container, Init, collect_descendants};
use crate::error::Error;

/// A process of a container's tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Member {
    /// As this machine sees it.
    pub pid: i32,
    /// As the container sees it, and with it CRIU's images: in the innermost pid namespace.
    pub inner: i32,
    /// When it began, in clock ticks since boot: tells it from a later process of that pid.
    pub start_time: u64,
}

impl Member {
    /// Whether it has not ended. One that is dead and not reaped has no memory either.
    pub fn is_alive(&self) -> bool {
        Init { pid: self.pid, start_time: self.start_time }.is_alive()
    }

    /// Bytes of its memory that a migration would move; 0 when it has ended. What it shares with others counts for each of them.
    pub fn memory_to_move(&self) -> u64 {
        let Ok(status) = Process::new(self.pid).and_then(|process| process.status()) else { return 0 };
        let parts = [status.rssanon, status.vmswap, status.rssshmem];
        parts.into_iter().flatten().sum::<u64>() * 1024
    }

    fn of_pid(pid: i32) -> Option<Self> {
        let process = Process::new(pid).ok()?;
        let stat = process.stat().ok().filter(|stat| !matches!(stat.state, 'Z' | 'X'))?;
        let inner = process.status().ok()?.nspid?.last().copied()?;
        Some(Self { pid, inner, start_time: stat.starttime })
    }
}

impl Container {
    /// Its init and that one's descendants, as they are now: while they run there may be others a moment later. Without the dead,
    /// and without what `runc exec` started.
    pub fn tree(&self) -> Result<Vec<Member>, Error> {
        let init = self.init.filter(|init| init.is_alive()).ok_or_else(|| Error::NotRunning { id: self.id.clone() })?;
        let mut pids = BTreeSet::new();
        collect_descendants(init.pid, &mut pids);
        Ok(pids.into_iter().filter_map(Member::of_pid).collect())
    }
}
