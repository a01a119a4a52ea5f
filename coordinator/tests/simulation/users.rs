//! Users: which migrations they ask for, and where placement sends them.

use std::collections::BTreeSet;

use podferry_common::{MigrationId, NodeName};
use podferry_coordinator::migration::State;
use podferry_coordinator::placement::{self, Candidate, Demand, Facts, NodeTraits, WorkloadTraits};
use podferry_coordinator::store::{Record, Report};
use podferry_coordinator::strategy::{Connections, Strategy};

use crate::coordinator::Driver;
use crate::network::Place;
use crate::world::{Event, HOME, MOST, MS, Move, NODES, SECOND, Time, World};

impl World {
    /// A user asks for a migration of the workload, as soon as the coordinator would record one: `store::database::conflict`.
    pub(crate) fn wish(&mut self) {
        let number = self.moves.len();
        if self.wishes == 0 || number == MOST {
            return;
        }
        if !self.coordinator.up || self.coordinator.drivers.iter().flatten().any(Driver::is_open) {
            self.schedule(5 * SECOND, Event::Wish);
            return;
        }
        let last = (0..number).rev().find_map(|earlier| self.coordinator.newest(earlier));
        let lost =
            last.as_ref().is_some_and(|record| matches!(record.state, State::Lost { .. } | State::Losing { .. }));
        let place = last.map_or(HOME, |record| node_of(record.place().as_str()));
        self.wishes -= 1;
        // What runs nowhere cannot be moved.
        if lost {
            self.wishes = 0;
            return;
        }
        let strategies = [Strategy::Cold, Strategy::Warm, Strategy::Live, Strategy::Postcopy, Strategy::Hybrid];
        let strategy = strategies[self.rng.usize(..strategies.len())];
        let Some(target) = self.target(strategy, place) else {
            self.schedule(5 * SECOND, Event::Wish);
            return;
        };
        let grace = if strategy == Strategy::Cold { self.rng.u64(..=10) * SECOND } else { 0 };
        self.moves.push(Move { strategy, path: strategy.path(), source: place, target, grace });
        self.say(|| format!("a user asks for {number}: {strategy:?} from {place} to {target}"));
        let driver = Driver::new(record(strategy, place, target, grace));
        self.coordinator.drivers[number] = Some(driver);
        if self.rng.u32(..100) < 15 {
            let after = self.rng.u64(MS..40 * SECOND);
            self.schedule(after, Event::Cancel(number));
        }
        // `Runner::begin`: the record is on disk before anything else; its driver then begins with `Started`.
        self.write(number, true, Vec::new(), true, false);
        self.schedule(SECOND, Event::Wish);
    }

    /// The target that a user names, or that placement finds.
    fn target(&mut self, strategy: Strategy, source: usize) -> Option<usize> {
        if self.rng.bool() {
            let others = [1, 2];
            return Some((source + others[self.rng.usize(..2)]) % NODES);
        }
        let facts = |node: usize| {
            let answers = self.nodes[node].up && !self.network.is_cut(Place::Coordinator, Place::Node(node));
            let has_container = self.nodes[node].container.is_some();
            let facts = Facts { fit: true, knows: true, version: 2, has_container, ..Facts::default() };
            answers.then_some(facts).ok_or_else(String::new)
        };
        let candidate = |node: usize| Candidate {
            name: name(node),
            facts: facts(node).map(|facts| Facts { memory_available: 1 << 40, images_free: 1 << 40, ..facts }),
            migrations: 0,
            migration_limit: 2,
            link_migrations: 0,
            link_limit: 2,
            evacuated_by: None,
            has_refused: false,
            traits: NodeTraits::default(),
            neighbours: Vec::new(),
        };
        let candidates: Vec<_> = (0..NODES).map(candidate).collect();
        let demand = Demand {
            source: name(source),
            architecture: String::new(),
            cpu_features: BTreeSet::new(),
            memory_bytes: 1 << 20,
            version: 2,
            starts_anew: strategy == Strategy::Cold,
            traits: WorkloadTraits::default(),
        };
        let choice = placement::choose(&demand, &candidates).ok()?;
        let target = node_of(choice.target.as_str());
        if target == source || self.nodes[target].container.is_some() {
            self.fail(format!("placement has chosen node {target}, which the workload is on"));
        }
        Some(target)
    }
}

fn name(node: usize) -> NodeName {
    ["a", "b", "c"][node].parse().expect("a name")
}

fn node_of(name: &str) -> usize {
    ["a", "b", "c"].iter().position(|other| *other == name).expect("a node of this world")
}

fn record(strategy: Strategy, source: usize, target: usize, grace: Time) -> Record {
    Record {
        id: MigrationId::new(),
        workload: "cart".parse().expect("a name"),
        container: "cart".to_owned(),
        pod: None,
        strategy,
        auto: None,
        strategy_reason: String::new(),
        source: name(source),
        source_address: String::new(),
        target: name(target),
        target_address: String::new(),
        compress: true,
        downtime_budget_ms: 0.0,
        bandwidth_limit: 0,
        verify: false,
        throttle: false,
        grace_period_s: u32::try_from(grace / SECOND).unwrap_or_default(),
        connections: Connections::default(),
        requested_by: None,
        created_at: jiff::Timestamp::UNIX_EPOCH,
        frozen_at: None,
        state: State::new(),
        report: Report::default(),
    }
}
