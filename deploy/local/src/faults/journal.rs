//! What agents have written down of their parts of migrations.

use std::fs;

use serde_json::Value;

use crate::node::Node;

fn document(node: &Node, migration: &str, name: &str) -> Option<Value> {
    let path = node.agent_state().join("parts").join(migration).join(name);
    serde_json::from_str(&fs::read_to_string(path).ok()?).ok()
}

/// How far a node's part of a migration is, by the agent's own record.
pub fn standing(node: &Node, migration: &str) -> Option<String> {
    document(node, migration, "part.json")?["standing"].as_str().map(str::to_owned)
}

/// How far the pager of a node's part is, by its own record; empty without one.
pub fn pager_state(node: &Node, migration: &str) -> String {
    let status = document(node, migration, "pager.json").unwrap_or_default();
    status["state"]["state"].as_str().unwrap_or_default().to_owned()
}

/// The migrations whose part on a node has not ended. Those that have stay in the journal for a day.
pub fn open_parts(node: &Node) -> Vec<String> {
    let entries = fs::read_dir(node.agent_state().join("parts")).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    names.filter(|name| standing(node, name).is_some_and(|standing| !is_last(&standing))).collect()
}

fn is_last(standing: &str) -> bool {
    ["released", "resumed", "aborted"].contains(&standing)
}
