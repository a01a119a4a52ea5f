use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::CriuError;

/// The oldest CRIU that podferry works with: older ones cannot read the vDSO of new kernels or dump their sockets.
pub const OLDEST_CRIU: CriuVersion = CriuVersion { major: 4, minor: 2, patch: 1 };

/// What is asked for by [`Criu::features`], from the table in CRIU's `cr-check.c`: tracking memory (`mem_dirty_track`,
/// `pagemap_scan`, `uffd…`), telling reused process ids apart (`pidfd_store`), locking the network, and kernel objects that
/// only newer kernels let be dumped.
const FEATURES: [&str; 14] = [
    "external_net_ns",
    "get_rseq_conf",
    "has_ipt_legacy",
    "mem_dirty_track",
    "network_lock_nftables",
    "overlayfs_maps",
    "pagemap_scan",
    "pagemap_scan_guard_pages",
    "pidfd_store",
    "seccomp_filters",
    "tcp_half_closed",
    "timens",
    "uffd",
    "uffd-noncoop",
];

/// A version of CRIU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct CriuVersion {
    /// 4 in 4.2.1.
    pub major: u32,
    /// 2 in 4.2.1.
    pub minor: u32,
    /// 1 in 4.2.1; 0 when it is not said.
    pub patch: u32,
}

impl fmt::Display for CriuVersion {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// What a CRIU on this kernel can do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CriuCapabilities {
    /// Which CRIU it is.
    pub version: CriuVersion,
    /// Why it cannot be used here; empty when it can.
    pub complaints: Vec<String>,
}

/// A CRIU on this machine.
#[derive(Clone, Debug)]
pub struct Criu {
    path: PathBuf,
}

impl Criu {
    /// The one at `path`.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Asks its version and lets it check the kernel.
    ///
    /// # Errors
    /// When it cannot be started or does not say its version. A kernel that lacks something is no error but a complaint.
    pub fn probe(&self) -> Result<CriuCapabilities, CriuError> {
        let said = self.run(&["--version"])?;
        let text = String::from_utf8_lossy(&said.stdout).into_owned();
        let version =
            parse_version(&text).ok_or_else(|| CriuError::Probe { path: self.path.clone(), said: text.clone() })?;
        let mut complaints = Vec::new();
        if version < OLDEST_CRIU {
            complaints.push(format!("CRIU {version} is too old: {OLDEST_CRIU} or newer is needed"));
        }
        let check = self.run(&["check"])?;
        if !check.status.success() {
            complaints.extend(errors_of(&check));
        }
        Ok(CriuCapabilities { version, complaints })
    }

    /// Which of the features that a migration can make use of this CRIU has on this kernel, by CRIU's names (`criu check
    /// --feature`), in alphabetical order. Takes some 40 ms for each.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn features(&self) -> Result<Vec<&'static str>, CriuError> {
        let mut found = Vec::new();
        for feature in FEATURES {
            if self.run(&["check", "--feature", feature])?.status.success() {
                found.push(feature);
            }
        }
        Ok(found)
    }

    fn run(&self, arguments: &[&str]) -> Result<Output, CriuError> {
        let ran = Command::new(&self.path).args(arguments).stdin(Stdio::null()).output();
        ran.map_err(|source| CriuError::Start { path: self.path.clone(), source })
    }
}

fn parse_version(text: &str) -> Option<CriuVersion> {
    let version = text.lines().find_map(|line| line.strip_prefix("Version:"))?.trim();
    let mut numbers = version.split(['.', '-']).map(|part| part.parse().ok());
    let major = numbers.next()??;
    let minor = numbers.next().flatten().unwrap_or(0);
    let patch = numbers.next().flatten().unwrap_or(0);
    Some(CriuVersion { major, minor, patch })
}

fn errors_of(check: &Output) -> Vec<String> {
    let text = [String::from_utf8_lossy(&check.stdout), String::from_utf8_lossy(&check.stderr)].join("\n");
    let lines: Vec<String> =
        text.lines().filter(|line| line.contains("Error")).map(|line| format!("criu check: {}", line.trim())).collect();
    if lines.is_empty() { vec![format!("criu check failed: {}", text.trim())] } else { lines }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_and_compared() {
        assert_eq!(parse_version("Version: 4.2.1\nGitID: v4"), Some(OLDEST_CRIU));
        assert!(parse_version("Version: 4.2").unwrap() < OLDEST_CRIU);
        assert!(parse_version("Version: 4.10").unwrap() > OLDEST_CRIU);
        assert_eq!(parse_version("criu"), None);
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let error = Criu::at("/no/such/criu").probe().unwrap_err();
        assert!(error.to_string().contains("/no/such/criu"), "{error}");
    }
}
