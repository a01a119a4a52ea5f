//! What a cluster's folder remembers of it, so that somebody else can use it or clear it away.

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::{Error, FileContext, Result};
use crate::network;
use crate::process::ProcessId;

/// The name of the state file in a cluster's folder.
pub(crate) const FILE_NAME: &str = "cluster.json";

/// One node, as planned and as it came to be.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct NodeState {
    pub(crate) name: String,
    pub(crate) address: Ipv4Addr,
    /// The launcher and init itself, in this order, once they run.
    pub(crate) processes: Vec<ProcessId>,
}

/// Written before anything is made: whatever is named here belongs to the cluster and is removed with it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct State {
    pub(crate) suffix: String,
    pub(crate) binaries: PathBuf,
    pub(crate) tools: PathBuf,
    pub(crate) start_agents: bool,
    /// How long each certificate is valid. Clusters of an older version, which have to go down too, do not say.
    #[serde(default = "crate::certificates::lifetime")]
    pub(crate) certificate_lifetime: Duration,
    /// Writable layers and bundles live on a tmpfs of the node, because the folder's file system takes no overlays.
    pub(crate) bundles_on_tmpfs: bool,
    pub(crate) nodes: Vec<NodeState>,
}

impl State {
    pub(crate) fn load(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(FILE_NAME);
        let text = match fs::read_to_string(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            other => other.at("read", &path)?,
        };
        serde_json::from_str(&text)
            .map(Some)
            .map_err(|error| Error::Document { what: path.display().to_string(), reason: error.to_string() })
    }

    /// Writes the first state; fails when there is one, whoever was quicker.
    pub(crate) fn claim(&self, folder: &Path) -> Result<()> {
        let path = folder.join(FILE_NAME);
        let new = self.write_new(folder)?;
        let linked = fs::hard_link(&new, &path);
        fs::remove_file(&new).at("remove", &new)?;
        match linked {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                Err(Error::AlreadyUp { folder: folder.to_owned() })
            }
            other => other.at("create", &path),
        }
    }

    /// Forgets the cluster.
    pub(crate) fn remove(folder: &Path) -> Result<()> {
        let path = folder.join(FILE_NAME);
        fs::remove_file(&path).at("remove", &path)
    }

    /// Replaced as a whole: a reader, or one who comes after a kill, finds the old text or the new one.
    pub(crate) fn save(&self, folder: &Path) -> Result<()> {
        let path = folder.join(FILE_NAME);
        let new = self.write_new(folder)?;
        fs::rename(&new, &path).at("replace", &path)
    }

    fn write_new(&self, folder: &Path) -> Result<PathBuf> {
        let new = folder.join(format!("{FILE_NAME}.{}", std::process::id()));
        let text = serde_json::to_string_pretty(self)
            .map_err(|error| Error::Document { what: new.display().to_string(), reason: error.to_string() })?;
        fs::write(&new, text).at("write", &new)?;
        Ok(new)
    }

    pub(crate) fn netns(&self, what: &str) -> String {
        format!("pf-{}-{what}", self.suffix)
    }

    pub(crate) fn fabric(&self) -> String {
        self.netns("fabric")
    }

    /// All namespaces of the cluster, the fabric last: the others' links are ports of its bridge.
    pub(crate) fn all_netns(&self) -> Vec<String> {
        let nodes = self.nodes.iter().map(|node| self.netns(&node.name));
        nodes.chain(["coordinator", "client", "fabric"].map(|what| self.netns(what))).collect()
    }

    pub(crate) fn netns_files(&self) -> Vec<PathBuf> {
        self.all_netns().iter().map(|name| network::netns_file(name)).collect()
    }

    /// The cgroup that a node's containers are in, without a leading slash, the same in every hierarchy.
    pub(crate) fn cgroup(&self, node: &str) -> String {
        format!("podferry-local-{}-{node}", self.suffix)
    }
}

/// Where things lie in a cluster's folder.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    pub(crate) folder: PathBuf,
}

impl Layout {
    pub(crate) fn logs(&self) -> PathBuf {
        self.folder.join("logs")
    }

    pub(crate) fn nodes(&self) -> PathBuf {
        self.folder.join("nodes")
    }

    pub(crate) fn node(&self, name: &str) -> PathBuf {
        self.nodes().join(name)
    }

    pub(crate) fn coordinator(&self) -> PathBuf {
        self.folder.join("coordinator")
    }

    pub(crate) fn coordinator_identity(&self) -> PathBuf {
        self.coordinator().join("identity")
    }

    pub(crate) fn identity(&self) -> PathBuf {
        self.folder.join("identity")
    }

    pub(crate) fn client_identity(&self) -> PathBuf {
        self.identity().join("client")
    }

    pub(crate) fn authority(&self) -> PathBuf {
        self.identity().join("authority")
    }
}
