//! What a migration left behind: the census before and after, less what legitimately differs.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use super::journal;
use super::{wait_every, wait_for};
use crate::census::{Census, Counts};
use crate::cluster::LocalCluster;
use crate::container::RUNC_ROOT;
use crate::error::Result;

/// A census in lines, without what differs from migration to migration.
pub type Inventory = BTreeMap<String, u64>;

type Area = fn(&Census) -> &Counts;

/// Counts what the cluster holds now: everything but open files of agents, which depend on who was just called, and the
/// bytes of tmpfs, which include logs.
pub fn inventory(cluster: &LocalCluster) -> Result<Inventory> {
    // What goes away while it is counted makes the count fail.
    let census = wait_for("a census", || cluster.census().ok())?;
    let mut inventory = Inventory::new();
    let areas: [(&str, Area); 7] = [
        ("mounts", |census| &census.mounts),
        ("cgroups", |census| &census.cgroups),
        ("links", |census| &census.links),
        ("network namespaces", |census| &census.network_namespaces),
        ("netfilter rules", |census| &census.netfilter_rules),
        ("traffic control", |census| &census.traffic_control),
        ("processes", |census| &census.processes),
    ];
    for (area, counts) in areas {
        for (place, items) in counts(&census) {
            for (item, count) in items {
                *inventory.entry(format!("{area} of {place}: {}", normal(item))).or_default() += count;
            }
        }
    }
    for node in cluster.nodes() {
        for folder in [node.images(), "/run/podferry".into(), RUNC_ROOT.into()] {
            let entries = fs::read_dir(node.on_machine(&folder)).into_iter().flatten();
            inventory.insert(format!("files in {} of {}", folder.display(), node.name()), entries.count() as u64);
        }
        inventory.insert(format!("open parts of {}", node.name()), journal::open_parts(node).len() as u64);
    }
    Ok(inventory)
}

/// The same, once it does not change any more: the source is cleared away while the target runs already.
pub fn settled(cluster: &LocalCluster) -> Result<Inventory> {
    let mut before = inventory(cluster)?;
    wait_every(Duration::from_millis(300), "everything to settle", || {
        let now = inventory(cluster).ok()?;
        let same = now == before;
        before.clone_from(&now);
        same.then_some(now)
    })
}

/// A link is named by whoever made it: the cluster, or a migration by its id.
fn normal(item: &str) -> String {
    let of_migration =
        item.strip_prefix("pf").is_some_and(|id| id.len() == 12 && id.bytes().all(|byte| byte.is_ascii_hexdigit()));
    if of_migration || item.starts_with("v-") { "the container's link".to_owned() } else { item.to_owned() }
}

/// What is there more or less often than it should be.
pub fn difference(wanted: &Inventory, found: &Inventory) -> Vec<String> {
    let mut keys: Vec<&String> = wanted.keys().chain(found.keys()).collect();
    keys.sort();
    keys.dedup();
    let count = |inventory: &Inventory, key: &str| inventory.get(key).copied().unwrap_or(0);
    keys.into_iter()
        .filter(|key| count(wanted, key) != count(found, key))
        .map(|key| format!("{key}: {} -> {}", count(wanted, key), count(found, key)))
        .collect()
}
