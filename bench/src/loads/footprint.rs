//! What a container is made of, as the kernel says.

use std::{fs, path::Path};

use podferry_local::LocalCluster;
use serde::Serialize;

use crate::{error::Result, stage::NODES};

/// Memory, processes and threads of a container.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Footprint {
    /// Resident memory in MiB; what processes share is counted once (`Pss`).
    pub(crate) resident_mib: u64,
    /// Processes.
    pub(crate) processes: u64,
    /// Threads of all of them.
    pub(crate) threads: u64,
}

impl Footprint {
    /// That of a container, on whichever node it runs.
    pub(crate) fn of(cluster: &LocalCluster, name: &str) -> Result<Self> {
        let mut footprint = Self::default();
        let mut kib = 0;
        for node in NODES {
            let cgroup = cluster.node(node)?.cgroups_path(name);
            for folder in processes_in(&cgroup) {
                footprint.processes += 1;
                footprint.threads += fs::read_dir(folder.join("task")).map_or(0, |tasks| tasks.count() as u64);
                kib += shared_kib(&fs::read_to_string(folder.join("smaps_rollup")).unwrap_or_default());
            }
        }
        Ok(Self { resident_mib: kib / 1024, ..footprint })
    }
}

/// Folders in `/proc`. A process that ends meanwhile is passed over.
fn processes_in(cgroup: &Path) -> Vec<std::path::PathBuf> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten().map(|entry| entry.path());
    entries.filter(|folder| is_in(&fs::read_to_string(folder.join("cgroup")).unwrap_or_default(), cgroup)).collect()
}

fn is_in(table: &str, cgroup: &Path) -> bool {
    table.lines().filter_map(|line| line.splitn(3, ':').nth(2)).any(|path| Path::new(path) == cgroup)
}

fn shared_kib(rollup: &str) -> u64 {
    let value = rollup.lines().find_map(|line| line.strip_prefix("Pss:")?.split_whitespace().next()?.parse().ok());
    value.unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_in_the_cgroup_that_its_table_names() {
        let table = "5:memory:/podferry-local-1-node-a/jvm\n0::/\n";
        assert!(is_in(table, Path::new("/podferry-local-1-node-a/jvm")));
        assert!(!is_in(table, Path::new("/podferry-local-1-node-b/jvm")));
    }

    #[test]
    fn what_is_shared_is_counted_by_share() {
        assert_eq!(shared_kib("55-66 ---p 00 00:00 0 [rollup]\nRss:  900 kB\nPss:  512 kB\nPss_Anon: 1 kB\n"), 512);
        assert_eq!(shared_kib(""), 0);
    }
}
