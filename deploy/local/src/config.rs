//! The configuration files of agents and the coordinator, as they read them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use podferry_common::identity::IdentityFiles;
use serde::{Deserialize, Serialize};

use crate::cluster::{COORDINATOR_PORT, REST_PORT};
use crate::container::RUNC_ROOT;
use crate::error::{Error, FileContext, Result};
use crate::network::{COORDINATOR_ADDRESS, NODE_BRIDGE};
use crate::node::{AGENT_PORT, Node};
use crate::state::{NodeState, State};

/// `agent.toml`.
#[derive(Debug, Serialize)]
pub(crate) struct AgentConfig {
    pub(crate) node: String,
    pub(crate) listen: String,
    pub(crate) coordinator: String,
    pub(crate) state_dir: PathBuf,
    pub(crate) images_dir: PathBuf,
    pub(crate) identity: IdentityFiles,
    pub(crate) tools: AgentTools,
    pub(crate) runtime: AgentRuntime,
    pub(crate) network: AgentNetwork,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) post_copy: Option<AgentPostCopy>,
}

/// The programs an agent starts.
#[derive(Debug, Serialize)]
pub(crate) struct AgentTools {
    pub(crate) criu: PathBuf,
    pub(crate) runc: PathBuf,
    pub(crate) hook: PathBuf,
    pub(crate) stdio_keeper: PathBuf,
    pub(crate) dump_worker: PathBuf,
    pub(crate) criu_shim: PathBuf,
    pub(crate) pager: PathBuf,
    pub(crate) tar: PathBuf,
}

/// Where an agent finds containers and puts those that arrive.
#[derive(Debug, Serialize)]
pub(crate) struct AgentRuntime {
    pub(crate) roots: Vec<PathBuf>,
    pub(crate) bundles_dir: PathBuf,
    pub(crate) logs_dir: PathBuf,
    pub(crate) volume_dirs: Vec<PathBuf>,
}

/// Where an agent attaches a container's link.
#[derive(Debug, Serialize)]
pub(crate) struct AgentNetwork {
    pub(crate) bridge: String,
}

/// How long an agent tries to get memory that a container of its still needs.
#[derive(Debug, Serialize)]
pub(crate) struct AgentPostCopy {
    pub(crate) recover_within_s: u64,
}

/// `coordinator.toml`.
#[derive(Debug, Serialize)]
pub(crate) struct CoordinatorConfig {
    pub(crate) listen: String,
    pub(crate) rest_listen: String,
    pub(crate) state_dir: PathBuf,
    pub(crate) inventory: PathBuf,
    pub(crate) identity: IdentityFiles,
    pub(crate) deadlines: BTreeMap<String, u64>,
}

/// The coordinator's inventory of a machine without Kubernetes.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Inventory {
    #[serde(default)]
    pub(crate) nodes: Vec<InventoryNode>,
    #[serde(default)]
    pub(crate) workloads: Vec<InventoryWorkload>,
}

/// One node of the inventory.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct InventoryNode {
    pub(crate) name: String,
    pub(crate) address: String,
}

/// One workload of the inventory; its container's id is its name, and where it is, the agents say.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct InventoryWorkload {
    pub(crate) name: String,
}

/// Writes a document as TOML.
pub(crate) fn write(path: &Path, document: &impl Serialize) -> Result<()> {
    let text = toml::to_string_pretty(document)
        .map_err(|error| Error::Document { what: path.display().to_string(), reason: error.to_string() })?;
    // Renamed into place: who reads it meanwhile finds the old text or the new one.
    let new = path.with_extension("toml.new");
    fs::write(&new, text).at("write", &new)?;
    fs::rename(&new, path).at("replace", path)
}

/// Adds a workload to the inventory, if it is not there yet.
pub(crate) fn register(path: &Path, workload: &str) -> Result<()> {
    let text = fs::read_to_string(path).at("read", path)?;
    let mut inventory: Inventory = toml::from_str(&text)
        .map_err(|error| Error::Document { what: path.display().to_string(), reason: error.to_string() })?;
    if inventory.workloads.iter().any(|known| known.name == workload) {
        return Ok(());
    }
    inventory.workloads.push(InventoryWorkload { name: workload.to_owned() });
    write(path, &inventory)
}

/// The configuration of a node's agent.
pub(crate) fn agent(node: &Node, state: &State, recover_within_s: Option<u64>) -> AgentConfig {
    let program = |name: &str| state.binaries.join(name);
    AgentConfig {
        node: node.name().to_owned(),
        listen: format!("{}:{AGENT_PORT}", node.address()),
        coordinator: coordinator_address(),
        state_dir: node.agent_state(),
        images_dir: node.images(),
        identity: IdentityFiles::in_folder(node.identity()),
        tools: AgentTools {
            criu: state.tools.join("criu"),
            runc: state.tools.join("runc"),
            hook: program("podferry-hook"),
            stdio_keeper: program("podferry-stdio-keeper"),
            dump_worker: program("podferry-dump-worker"),
            criu_shim: program("libpodferry_criu_shim.so"),
            pager: program("podferry-pager"),
            tar: program("podferry-tar"),
        },
        runtime: AgentRuntime {
            roots: vec![PathBuf::from(RUNC_ROOT)],
            bundles_dir: node.bundles(),
            logs_dir: node.container_logs(),
            volume_dirs: vec![node.volumes()],
        },
        network: AgentNetwork { bridge: NODE_BRIDGE.to_owned() },
        post_copy: recover_within_s.map(|recover_within_s| AgentPostCopy { recover_within_s }),
    }
}

/// The configuration of the coordinator, whose files lie in `folder`.
pub(crate) fn coordinator(
    folder: &Path,
    identity: IdentityFiles,
    deadlines: BTreeMap<String, u64>,
) -> CoordinatorConfig {
    CoordinatorConfig {
        listen: coordinator_address(),
        rest_listen: format!("{COORDINATOR_ADDRESS}:{REST_PORT}"),
        state_dir: folder.join("state"),
        inventory: folder.join("inventory.toml"),
        identity,
        deadlines,
    }
}

/// The nodes, as the coordinator reaches their agents, and the names of workloads.
pub(crate) fn inventory(state: &State, workloads: &[String]) -> Inventory {
    let entry =
        |node: &NodeState| InventoryNode { name: node.name.clone(), address: format!("{}:{AGENT_PORT}", node.address) };
    Inventory {
        nodes: state.nodes.iter().map(entry).collect(),
        workloads: workloads.iter().map(|name| InventoryWorkload { name: name.clone() }).collect(),
    }
}

fn coordinator_address() -> String {
    format!("{COORDINATOR_ADDRESS}:{COORDINATOR_PORT}")
}
