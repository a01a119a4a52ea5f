//! What there is: nodes and workloads from an inventory file, and what the agents say about them now.

mod inventory;

pub use inventory::{Inventory, InventoryError, Node, Problem, Workload};
