//! What there is: nodes and workloads from an inventory file, and what the agents say about them now.

mod agents;
mod inventory;
mod survey;

pub use agents::{AgentClient, Agents, OLD_AGENT, placed, speaks, spoken};
pub use inventory::{Inventory, Node, PodRef, Workload};
pub use survey::{Location, NodeView, Seen, locate, relays, survey};
