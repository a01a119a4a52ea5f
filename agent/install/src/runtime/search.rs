//! Finding out which runtime a node has, and which nodes are not for us.

use crate::error::{Error, Result};
use crate::host::Host;
use crate::runtime::Runtime;

const LOOKED_FOR: &str = "/run/k3s/containerd/containerd.sock, /run/containerd/containerd.sock, /run/crio/crio.sock, \
                          /etc/containerd/config.toml";

/// Which runtime the node has; the one that was `asked` for counts.
pub(crate) fn find_runtime(host: &Host, asked: Option<Runtime>) -> Result<Runtime> {
    refuse_closed_systems(host)?;
    if let Some(asked) = asked {
        return Ok(asked);
    }
    if host.has("/run/k3s/containerd/containerd.sock") {
        return Ok(if host.has("/var/lib/rancher/rke2/agent") { Runtime::Rke2 } else { Runtime::K3s });
    }
    match (host.has("/run/containerd/containerd.sock"), host.has("/run/crio/crio.sock")) {
        (true, true) => Err(Error::SeveralRuntimes { found: "containerd and CRI-O".to_owned() }),
        (true, false) => Ok(Runtime::Containerd),
        (false, true) => Ok(Runtime::Crio),
        (false, false) if host.has("/etc/containerd/config.toml") => Ok(Runtime::Containerd),
        (false, false) => Err(Error::NoRuntime { root: host.root().to_owned(), looked_for: LOOKED_FOR }),
    }
}

/// The `ID` of the node's operating system.
pub(crate) fn system_id(host: &Host) -> Result<String> {
    let text = match host.text("/etc/os-release")? {
        Some(text) => text,
        None => host.text("/usr/lib/os-release")?.unwrap_or_default(),
    };
    let id = text.lines().find_map(|line| line.strip_prefix("ID="));
    Ok(id.unwrap_or_default().trim_matches(['"', '\'']).to_owned())
}

fn refuse_closed_systems(host: &Host) -> Result<()> {
    let system = system_id(host)?;
    let reason = match system.as_str() {
        "bottlerocket" => {
            "its root is verified and read-only, and it writes containerd's configuration anew from its own settings, which have \
             no place for a handler. Use nodes with another system for pods that move"
        }
        "talos" => {
            "nothing can be installed at run time, and containerd's configuration comes from the machine configuration. Use nodes \
             with another system for pods that move"
        }
        _ => return Ok(()),
    };
    Err(Error::UnsupportedSystem { system, reason })
}
