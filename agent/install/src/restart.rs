//! Making the container runtime read its configuration, without ending the containers that it runs.

use crate::error::{Error, Result};
use crate::host::Host;
use crate::runtime::Runtime;

/// How the runtime is restarted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Restart {
    /// By systemd.
    Systemd,
    /// By a shell command on the node.
    Command(String),
    /// Not at all: somebody else does.
    Never,
}

impl Restart {
    /// Says, before anything is changed, why a restart would not do.
    pub(crate) fn check(&self, host: &Host, runtime: Runtime) -> Result<()> {
        match self {
            Self::Systemd => unit(host, runtime).and_then(|unit| refuse_to_kill(host, runtime, unit)),
            Self::Command(_) | Self::Never => Ok(()),
        }
    }

    /// Restarts it.
    pub(crate) fn run(&self, host: &Host, runtime: Runtime) -> Result<()> {
        match self {
            Self::Never => Ok(()),
            Self::Command(command) => host.run(&["sh", "-c", command]).map(drop),
            Self::Systemd => {
                let unit = unit(host, runtime)?;
                host.run(&["systemctl", "restart", unit])?;
                host.run(&["systemctl", "is-active", "--quiet", unit]).map(drop)
            }
        }
    }
}

/// The unit that runs the runtime on this node.
fn unit(host: &Host, runtime: Runtime) -> Result<&'static str> {
    if !host.has("/run/systemd/system") {
        return Err(Error::NoRestart { runtime: runtime.name() });
    }
    let is_active = |unit: &&&str| host.run(&["systemctl", "is-active", "--quiet", unit]).is_ok();
    runtime.units().iter().find(is_active).copied().ok_or(Error::NoRestart { runtime: runtime.name() })
}

/// containerd's shims are in its unit's cgroup, so systemd must be told to leave them alone. Where CRI-O's monitors are, it
/// puts them itself.
fn refuse_to_kill(host: &Host, runtime: Runtime, unit: &str) -> Result<()> {
    if runtime == Runtime::Crio {
        return Ok(());
    }
    let mode = host.run(&["systemctl", "show", "--property", "KillMode", "--value", unit])?;
    match mode.trim() {
        "process" | "none" => Ok(()),
        mode => Err(Error::UnsafeRestart { unit: unit.to_owned(), mode: mode.to_owned() }),
    }
}
