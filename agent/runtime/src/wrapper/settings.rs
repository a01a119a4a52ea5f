//! What the wrapper is told by whoever installed it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

/// `runtime.json`, beside the program itself.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// The node's own runc.
    pub runc: PathBuf,
    /// Where the agent listens.
    #[serde(default = "default_socket")]
    pub socket: PathBuf,
    /// Where the agent notes, by their uid, the pods that move away or have done so; on a disk.
    #[serde(default = "default_fence_dir")]
    pub fence_dir: PathBuf,
    /// For so many seconds the agent's word is waited for: less than the kubelet's `runtimeRequestTimeout`.
    #[serde(default = "default_wait_s")]
    pub wait_s: u64,
}

/// Why there are no settings.
#[derive(Debug, thiserror::Error)]
pub enum WrongSettings {
    /// The file cannot be read.
    #[error("cannot read {}: {source}; install podferry on this node again", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It is not what it should be.
    #[error("{} is wrong: {source}; install podferry on this node again", path.display())]
    Parse {
        /// Which.
        path: PathBuf,
        /// Where, and why.
        source: serde_json::Error,
    },
}

impl Settings {
    /// Reads those of a program in this folder.
    ///
    /// # Errors
    /// When the file is not there, or wrong.
    pub fn beside(folder: &Path) -> Result<Self, WrongSettings> {
        let path = folder.join("runtime.json");
        let text = fs::read(&path).map_err(|source| WrongSettings::Read { path: path.clone(), source })?;
        serde_json::from_slice(&text).map_err(|source| WrongSettings::Parse { path, source })
    }

    /// For how long the agent's word is waited for.
    pub fn wait(&self) -> Duration {
        Duration::from_secs(self.wait_s)
    }
}

fn default_socket() -> PathBuf {
    PathBuf::from("/run/podferry/runtime.sock")
}

fn default_fence_dir() -> PathBuf {
    PathBuf::from("/var/lib/podferry/fenced")
}

const fn default_wait_s() -> u64 {
    100
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runc_alone_has_to_be_said_and_what_is_not_known_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let write = |text: &str| fs::write(folder.path().join("runtime.json"), text).unwrap();
        let missing = Settings::beside(folder.path()).unwrap_err().to_string();
        assert!(missing.contains("runtime.json") && missing.contains("install podferry"), "{missing}");
        write(r#"{"runc": "/usr/bin/runc"}"#);
        let settings = Settings::beside(folder.path()).unwrap();
        assert_eq!((settings.runc.to_str(), settings.wait()), (Some("/usr/bin/runc"), Duration::from_secs(100)));
        for wrong in ["{}", r#"{"runc": "/r", "sockets": "/s"}"#, "x"] {
            write(wrong);
            assert!(matches!(Settings::beside(folder.path()), Err(WrongSettings::Parse { .. })), "{wrong}");
        }
    }
}
