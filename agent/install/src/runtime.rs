//! The node's container runtime: which one it is, how its own runc handler is set up, and how ours is added.

mod containerd;
mod crio;
mod search;

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::host::Host;

pub(crate) use containerd::{find, is_bare};
pub(crate) use search::find_runtime;
pub(crate) use search::system_id;

/// The handler's name, as a `RuntimeClass` names it.
pub(crate) const HANDLER: &str = "podferry";
/// Which annotations of a pod come into its containers' `config.json`.
const ANNOTATIONS: &str = "podferry.dev/*";
/// The wrapper's place in the bundle.
pub(crate) const WRAPPER: &str = "bin/podferry-runtime";

/// A container runtime that Kubernetes uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Runtime {
    /// containerd as a service of its own.
    Containerd,
    /// CRI-O.
    Crio,
    /// The containerd in K3s.
    K3s,
    /// The containerd in RKE2.
    Rke2,
}

impl Runtime {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Containerd => "containerd",
            Self::Crio => "CRI-O",
            Self::K3s => "K3s",
            Self::Rke2 => "RKE2",
        }
    }

    /// The systemd units that may run it.
    pub fn units(self) -> &'static [&'static str] {
        match self {
            Self::Containerd => &["containerd"],
            Self::Crio => &["crio"],
            Self::K3s => &["k3s-agent", "k3s"],
            Self::Rke2 => &["rke2-agent", "rke2-server"],
        }
    }

    /// Where K3s and RKE2 have containerd's configuration.
    pub(crate) fn rancher_folder(self) -> Option<&'static Path> {
        match self {
            Self::K3s => Some(Path::new("/var/lib/rancher/k3s/agent/etc/containerd")),
            Self::Rke2 => Some(Path::new("/var/lib/rancher/rke2/agent/etc/containerd")),
            Self::Containerd | Self::Crio => None,
        }
    }

    /// Where containerd notes the containers that run.
    fn tasks(self) -> &'static str {
        match self {
            Self::K3s | Self::Rke2 => "/run/k3s/containerd/io.containerd.runtime.v2.task/k8s.io",
            Self::Containerd | Self::Crio => "/run/containerd/io.containerd.runtime.v2.task/k8s.io",
        }
    }

    /// Where it keeps containers' writable layers.
    pub(crate) fn layers(self) -> &'static str {
        match self {
            Self::Containerd => "/var/lib/containerd",
            Self::Crio => "/var/lib/containers",
            Self::K3s => "/var/lib/rancher/k3s/agent/containerd",
            Self::Rke2 => "/var/lib/rancher/rke2/agent/containerd",
        }
    }

    /// How many containers of the handler run on the node, pods' sandboxes among them.
    pub fn containers_of_handler(self, host: &Host, wrapper: &Path) -> Result<usize> {
        match self {
            Self::Crio => crio::containers_of_handler(host),
            _ => containerd::containers_of_handler(host, self.tasks(), wrapper),
        }
    }
}

/// What has to be written for the handler.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Edit {
    /// A file of our own.
    File {
        /// Where.
        path: PathBuf,
        /// All of it.
        content: String,
    },
    /// A block in a file of the node's.
    Block {
        /// Where.
        path: PathBuf,
        /// The block.
        body: String,
    },
}

impl Edit {
    /// The file that it is about.
    pub(crate) fn path(&self) -> &Path {
        match self {
            Self::File { path, .. } | Self::Block { path, .. } => path,
        }
    }
}

/// How the handler gets onto this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Plan {
    /// What to write.
    pub edit: Edit,
    /// The node's own runc.
    pub runc: PathBuf,
    /// runc's root folder for containers of Kubernetes.
    pub runc_root: PathBuf,
}

/// Works out how the handler gets onto the node.
///
/// `config` is containerd's configuration where it is not where it is looked for; `wrapper` is what the handler is to run.
pub(crate) fn plan(host: &Host, runtime: Runtime, config: Option<&Path>, wrapper: &Path) -> Result<Plan> {
    match runtime {
        Runtime::Crio => crio::plan(host, wrapper),
        _ => containerd::plan(host, runtime, config, wrapper),
    }
}

/// Where runc is looked for when no configuration says where.
const RUNC_FOLDERS: [&str; 11] = [
    "/var/lib/rancher/k3s/data/current/bin",
    "/var/lib/rancher/rke2/bin",
    "/home/kubernetes/bin",
    "/usr/libexec/crio",
    "/usr/local/sbin",
    "/usr/local/bin",
    "/usr/sbin",
    "/usr/bin",
    "/sbin",
    "/bin",
    "/opt/bin",
];

/// The program that a configuration calls `named`, or runc.
fn find_runc(host: &Host, named: Option<&str>) -> Result<PathBuf> {
    let named = named.filter(|named| !named.is_empty()).unwrap_or("runc");
    if named.starts_with('/') {
        let found = PathBuf::from(named);
        return if host.is_program(&found) { Ok(found) } else { Err(Error::NoRunc { looked_for: named.to_owned() }) };
    }
    let candidates = RUNC_FOLDERS.map(|folder| Path::new(folder).join(named));
    candidates
        .into_iter()
        .find(|candidate| host.is_program(candidate))
        .ok_or_else(|| Error::NoRunc { looked_for: format!("{named} in {}", RUNC_FOLDERS.join(", ")) })
}
