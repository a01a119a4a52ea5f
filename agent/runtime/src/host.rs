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

/// Flags in `/proc/cpuinfo` that no program can come to depend on: virtualisation, mitigations, power and timer
/// bookkeeping of the kernel, and names that the kernel makes up. A difference in them is no reason to refuse.
const INVISIBLE: [&str; 66] = [
    "acpi",
    "aperfmperf",
    "apic",
    "arat",
    "arch_capabilities",
    "arch_perfmon",
    "art",
    "bts",
    "cat_l2",
    "cat_l3",
    "cdp_l3",
    "constant_tsc",
    "cpuid",
    "cpuid_fault",
    "cqm",
    "dtes64",
    "dtherm",
    "dts",
    "ds_cpl",
    "ept",
    "ept_ad",
    "est",
    "flexpriority",
    "flush_l1d",
    "hypervisor",
    "ibpb",
    "ibrs",
    "ibrs_enhanced",
    "ida",
    "invpcid_single",
    "lbrv",
    "mba",
    "mca",
    "mce",
    "md_clear",
    "monitor",
    "mtrr",
    "nonstop_tsc",
    "nopl",
    "npt",
    "pat",
    "pbe",
    "pdcm",
    "pebs",
    "pge",
    "pln",
    "pti",
    "pts",
    "rep_good",
    "smep",
    "smap",
    "ss",
    "ssbd",
    "stibp",
    "svm",
    "tm",
    "tm2",
    "tpr_shadow",
    "tsc_adjust",
    "tsc_deadline_timer",
    "tsc_known_freq",
    "umip",
    "vmx",
    "vnmi",
    "vpid",
    "x2apic",
];

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

    /// The features that a program may have found here and would miss on `other`.
    pub fn missing_on(&self, other: &Self) -> Vec<String> {
        self.flags.difference(&other.flags).filter(|flag| !INVISIBLE.contains(&flag.as_str())).cloned().collect()
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
        assert_eq!(facts.cpu.missing_on(&facts.cpu), Vec::<String>::new());
    }

    #[test]
    fn only_what_programs_see_and_all_processors_have_is_missed() {
        let source =
            CpuFeatures::parse("flags\t\t: fpu avx2 avx512f vmx\nbugs : x\nflags\t: fpu avx2 avx512f vmx amx_tile\n");
        let target = CpuFeatures::parse("processor : 0\nflags : fpu avx2 svm\n");
        assert_eq!(source.missing_on(&target), ["avx512f"]);
        assert_eq!(target.missing_on(&source), Vec::<String>::new());
    }
}
