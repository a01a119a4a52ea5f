//! What placement is told of nodes besides their agents' words: limits, evacuations, labels, and who is there.

use std::collections::HashMap;

use podferry_common::{NodeName, WorkloadName};

use super::{Core, Journey};
use crate::cluster::{Inventory, NodeView, Workload};
use crate::evacuation::Cordons;
use crate::placement::{Candidate, Facts, Neighbour};
use crate::runner::Limits;

/// What surrounds a workload that is to be moved.
pub(super) struct Surroundings<'a> {
    load: HashMap<NodeName, usize>,
    link_load: HashMap<NodeName, usize>,
    limits: Limits,
    cordons: &'a Cordons,
    neighbours: HashMap<NodeName, Vec<Neighbour>>,
    refused_by: &'a [NodeName],
}

impl Core {
    /// What surrounds the workload of that journey.
    pub(super) fn surroundings<'a>(&'a self, journey: &Journey<'_, 'a>) -> Surroundings<'a> {
        let Journey { workload, views, location, refused_by, .. } = *journey;
        let source = &location.view.node.name;
        let runner = &self.runner;
        // Without rules about neighbours nobody asks for them.
        let neighbours = if self.inventory.keeps_apart() {
            neighbours(&self.inventory, workload, views, &runner.moving())
        } else {
            HashMap::new()
        };
        Surroundings {
            load: runner.load(),
            link_load: runner.link_load(source),
            limits: runner.limits(),
            cordons: self.evacuator.cordons(),
            neighbours,
            refused_by,
        }
    }
}

impl Surroundings<'_> {
    /// A node, as placement judges it.
    pub(super) fn candidate(&self, view: &NodeView, facts: Result<Facts, String>) -> Candidate {
        let name = &view.node.name;
        let count = |load: &HashMap<NodeName, usize>| load.get(name).copied().unwrap_or_default();
        Candidate {
            name: name.clone(),
            facts,
            migrations: count(&self.load),
            migration_limit: self.limits.per_node,
            link_migrations: count(&self.link_load),
            link_limit: self.limits.per_link,
            evacuated_by: self.cordons.of(name).map(|id| id.to_string()),
            has_refused: self.refused_by.contains(name),
            traits: view.node.traits.clone(),
            neighbours: self.neighbours.get(name).cloned().unwrap_or_default(),
        }
    }
}

/// The other workloads of each node, with those that are on their way to it.
fn neighbours(
    inventory: &Inventory,
    workload: &Workload,
    views: &[NodeView],
    moving: &[(NodeName, NodeName, WorkloadName)],
) -> HashMap<NodeName, Vec<Neighbour>> {
    let mut all: HashMap<NodeName, Vec<Neighbour>> = HashMap::new();
    for other in inventory.workloads().filter(|other| other.name != workload.name) {
        let here = |view: &&NodeView| {
            let containers = view.seen.as_ref().map(|seen| seen.containers.as_slice()).unwrap_or_default();
            let arrives = moving.iter().any(|(_, target, name)| *target == view.node.name && *name == other.name);
            arrives || containers.iter().any(|one| one.id == other.container && one.status != "stopped")
        };
        for view in views.iter().filter(here) {
            let (labels, anti_affinity) = (other.traits.labels.clone(), other.traits.anti_affinity.clone());
            let neighbour = Neighbour { name: other.name.to_string(), labels, anti_affinity };
            all.entry(view.node.name.clone()).or_default().push(neighbour);
        }
    }
    all
}
