//! What this machine is: the facts by which a target is compared with a source.

use std::collections::BTreeSet;
use std::fmt;

use procfs::Current;

use crate::cgroup::hierarchies;
use crate::error::Error;

/// The version of the cgroup hierarchy that controls resources here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CgroupVersion {
    /// Only v1 hierarchies.
    V1,
    /// v1 controllers, and a v2 hierarchy without controllers beside them.
    Hybrid,
    /// Only the unified hierarchy.
    V2,
}

impl fmt::Display for CgroupVersion {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::V1 => "v1",
            Self::Hybrid => "hybrid",
            Self::V2 => "v2",
        })
    }
}

/// Facts about this machine that decide whether a container can run on.
#[derive(Debug, Clone)]
pub struct HostFacts {
    /// The machine's name for its architecture: `x86_64`, `aarch64`.
    pub architecture: String,
    /// The kernel's release: `6.18.44`.
    pub kernel_release: String,
    /// This node's name.
    pub hostname: String,
    /// What the processor offers to programs.
    pub cpu: CpuFeatures,
    /// Processors that are online.
    pub cpus: usize,
    /// Bytes of memory that can be had without swapping (`MemAvailable`).
    pub memory_available: u64,
    /// Bytes of memory in all.
    pub memory_total: u64,
    /// How cgroups are mounted.
    pub cgroup_version: CgroupVersion,
}

impl HostFacts {
    /// Looks at this machine.
    pub fn collect() -> Result<Self, Error> {
        let uname = rustix::system::uname();
        let memory = procfs::Meminfo::current().map_err(Error::proc(0, "meminfo"))?;
        let mounted = hierarchies()?;
        let has_v1 = mounted.iter().any(|hierarchy| hierarchy.controllers.is_some());
        let has_v2 = mounted.iter().any(|hierarchy| hierarchy.controllers.is_none());
        Ok(Self {
            architecture: uname.machine().to_string_lossy().into_owned(),
            kernel_release: uname.release().to_string_lossy().into_owned(),
            hostname: uname.nodename().to_string_lossy().into_owned(),
            cpu: CpuFeatures::collect()?,
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            memory_available: memory.mem_available.unwrap_or(memory.mem_free),
            memory_total: memory.mem_total,
            cgroup_version: match (has_v1, has_v2) {
                (true, true) => CgroupVersion::Hybrid,
                (true, false) => CgroupVersion::V1,
                (false, _) => CgroupVersion::V2,
            },
        })
    }
}

/// The instruction sets and features of a processor that programs see, by their names in `/proc/cpuinfo`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CpuFeatures {
    /// The flags.
    pub flags: BTreeSet<String>,
}

impl CpuFeatures {
    /// Reads this machine's. The flags are those that all processors have.
    pub fn collect() -> Result<Self, Error> {
        let text = std::fs::read_to_string("/proc/cpuinfo").map_err(Error::io("read", "/proc/cpuinfo"))?;
        Ok(Self::parse(&text))
    }

    /// Parses `/proc/cpuinfo`: the line `flags` of x86, `Features` of arm64.
    fn parse(text: &str) -> Self {
        let flags = text
            .lines()
            .filter_map(|line| line.split_once(':'))
            .filter(|(key, _)| matches!(key.trim(), "flags" | "Features"))
            .map(|(_, flags)| flags.split_whitespace().map(str::to_owned).collect::<BTreeSet<_>>())
            .reduce(|all, one| all.intersection(&one).cloned().collect())
            .unwrap_or_default();
        Self { flags }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_has_facts() {
        let facts = HostFacts::collect().unwrap();
        assert_eq!(facts.architecture, std::env::consts::ARCH);
        assert!(facts.memory_available > 0 && facts.memory_available <= facts.memory_total);
        assert!(facts.kernel_release.contains('.'));
        assert!(facts.cpu.flags.len() > 10);
    }

    #[test]
    fn only_what_all_processors_have_counts() {
        let two = CpuFeatures::parse("flags\t\t: fpu avx2 avx512f\nbugs : x\nflags\t: fpu avx2 amx_tile\n");
        assert_eq!(two.flags.iter().collect::<Vec<_>>(), ["avx2", "fpu"]);
        assert_eq!(CpuFeatures::parse("Features : fp asimd\n").flags.len(), 2);
    }
}
