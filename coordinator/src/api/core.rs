//! The questions and their answers, whatever they come in by.

mod auto;

use std::collections::HashMap;
use std::ops::RangeInclusive;
use std::sync::Arc;

use jiff::Timestamp;
use podferry_common::identity::Peer;
use podferry_common::{Failure, FailureCode, MigrationId, NodeName, WorkloadName, chain};
use podferry_proto::v1;
use tokio::sync::watch;

use crate::access::{Action, Gate, Verb};
use crate::cluster::{Agents, Inventory, Location, Node, NodeView, Seen, Workload, locate, speaks, spoken, survey};
use crate::migration::{Decision, State};
use crate::placement::{Candidate, Choice, Demand, Facts, choose, judge};
use crate::runner::{Deadlines, Runner, blocking};
use crate::store::{Record, Report, Store, StoreError};
use crate::strategy::{Asked, Strategy, Wishes};

/// Downtimes that can be aimed at, in milliseconds.
const DOWNTIME_BUDGETS: RangeInclusive<f64> = 1.0..=60_000.0;
/// The least bandwidth that a migration can be held to, in bytes per second.
const LEAST_BANDWIDTH: u64 = 64 << 10;
/// Seconds that a workload gets to end, when nobody says how many; as in Kubernetes.
const GRACE_PERIOD_S: u32 = 30;
/// The most of them.
const LONGEST_GRACE_PERIOD_S: u32 = 3600;

/// A workload that somebody wants to be moved, and what is seen of the nodes.
struct Journey<'n, 'v> {
    who: &'v Peer,
    workload: &'v Workload,
    location: &'v Location<'v>,
    views: &'v [NodeView],
    /// Where to; none when placement chooses.
    target: Option<&'n Node>,
}

/// Everything the coordinator can be asked. Clones share it.
#[derive(Clone)]
pub struct Core {
    inventory: Arc<Inventory>,
    agents: Agents,
    store: Store,
    runner: Runner,
    deadlines: Deadlines,
    gate: Gate,
}

impl Core {
    /// The core on these parts.
    pub fn new(
        inventory: Inventory,
        agents: Agents,
        store: Store,
        runner: Runner,
        deadlines: Deadlines,
        gate: Gate,
    ) -> Self {
        Self { inventory: Arc::new(inventory), agents, store, runner, deadlines, gate }
    }

    /// Who may ask for what.
    pub fn gate(&self) -> &Gate {
        &self.gate
    }

    /// The same with another inventory.
    #[must_use]
    pub fn with_inventory(&self, inventory: Inventory) -> Self {
        Self { inventory: Arc::new(inventory), ..self.clone() }
    }

    /// All nodes, and what their agents say now.
    pub async fn nodes(&self) -> Vec<v1::Node> {
        let views = self.survey(self.inventory.nodes()).await;
        views.iter().map(|view| self.node(view)).collect()
    }

    /// Which nodes' agents answer now.
    pub(super) async fn answering(&self) -> HashMap<NodeName, bool> {
        let views = self.survey(self.inventory.nodes()).await;
        views.into_iter().map(|view| (view.node.name, view.seen.is_ok())).collect()
    }

    fn node(&self, view: &NodeView) -> v1::Node {
        let (name, address) = (view.node.name.to_string(), view.node.address.clone());
        let seen = match &view.seen {
            Ok(seen) => seen,
            Err(failure) => {
                return v1::Node { name, address, complaints: vec![failure.to_string()], ..v1::Node::default() };
            }
        };
        let here =
            |workload: &&Workload| seen.containers.iter().any(|c| c.id == workload.container && c.status != "stopped");
        let workloads = self.inventory.workloads().filter(here).map(|workload| workload.name.to_string()).collect();
        let is = seen.description.clone();
        v1::Node {
            name,
            address,
            reachable: true,
            fit: is.fit,
            complaints: is.complaints,
            architecture: is.architecture,
            kernel: is.kernel,
            cpu_model: is.cpu_model,
            criu_version: is.criu_version,
            runc_version: is.runc_version,
            cgroup_version: is.cgroup_version,
            agent_version: is.agent_version,
            memory_total: is.memory_total,
            memory_available: is.memory_available,
            workloads,
            features: is.features,
        }
    }

    /// All workloads and where they are now; or those that are on one node, or are being migrated from or to it. A node
    /// whose agent does not say what is there is an error: whoever empties it would think that it is.
    pub async fn workloads(&self, node: &str) -> Result<Vec<v1::Workload>, Failure> {
        let wanted = if node.is_empty() { None } else { Some(self.known_node(node)?) };
        // Asked before and after the look: a workload whose migration begins or ends meanwhile is hidden from nobody.
        let before = self.under_way().await?;
        let views = self.survey(self.inventory.nodes()).await;
        let mut asked = views.iter().filter(|view| wanted.is_some_and(|wanted| wanted.name == view.node.name));
        if let Some(failure) = asked.find_map(|view| view.seen.as_ref().err()) {
            return Err(failure.clone());
        }
        let after = self.under_way().await?;
        let mut all = Vec::new();
        for workload in self.inventory.workloads() {
            let (earlier, now) = (before.get(&workload.name), after.get(&workload.name));
            let found = self.workload(&views, workload, earlier, now).await?;
            let ends = now.or(earlier).map(|record| [&record.source, &record.target]);
            let moves = ends.is_some_and(|ends| ends.iter().any(|end| end.as_str() == node));
            if node.is_empty() || found.node == node || moves {
                all.push(found);
            }
        }
        Ok(all)
    }

    /// The migrations whose outcome is open.
    async fn under_way(&self) -> Result<HashMap<WorkloadName, Record>, Failure> {
        let store = self.store.clone();
        let open = blocking(move || store.open_migrations()).await.map_err(|error| internal(&error))?;
        let unsettled = open.into_iter().filter(|record| !record.state.is_settled());
        Ok(unsettled.map(|record| (record.workload.clone(), record)).collect())
    }

    /// One workload; `earlier` and `now` are its migrations before and after the look at the nodes.
    async fn workload(
        &self,
        views: &[NodeView],
        workload: &Workload,
        earlier: Option<&Record>,
        now: Option<&Record>,
    ) -> Result<v1::Workload, Failure> {
        let (_, recorded) = self.recorded(workload).await?;
        let place = now.map(Record::place).or(recorded.as_ref()).or(earlier.map(|record| &record.source));
        let mut shown = v1::Workload {
            name: workload.name.to_string(),
            status: "unknown".to_owned(),
            migration_id: now.or(earlier).map(|record| record.id.to_string()).unwrap_or_default(),
            ..v1::Workload::default()
        };
        if let Ok(Location { view, container, .. }) = locate(views, workload, place) {
            shown.node = view.node.name.to_string();
            shown.status.clone_from(&container.status);
            shown.memory_bytes = container.memory_bytes;
            shown.processes = container.processes;
            shown.addresses.clone_from(&container.addresses);
        }
        Ok(shown)
    }

    /// Accepts a migration that `who` asks for, or refuses it and records nothing. The logs say which.
    pub async fn migrate(&self, request: &v1::MigrateRequest, who: &Peer) -> Result<Record, Failure> {
        let begun = self.begin(request, who).await;
        if let Err(failure) = &begun {
            let (workload, target) = (&request.workload, &request.target);
            tracing::info!(peer = %who, workload, target, %failure, "migration refused");
            // The log has said it if that cannot be written, and nothing is changed.
            let _refused_anyway = self.gate.audit().refused(workload, target, who, failure).await;
        }
        begun
    }

    async fn begin(&self, request: &v1::MigrateRequest, who: &Peer) -> Result<Record, Failure> {
        let wishes = wishes(request)?;
        let grace_period_s = grace_period_s_of(request, wishes.strategy)?;
        let workload = self.known_workload(&request.workload)?;
        let wanted = if request.target.is_empty() { None } else { Some(self.known_node(&request.target)?) };
        let (busy, place) = self.recorded(workload).await?;
        if let Some(id) = busy {
            let message = format!("workload {} is part of migration {id} already", workload.name);
            let remedy = format!("wait for {id} to end, or cancel it");
            return Err(Failure::new(FailureCode::AlreadyExists, message).remedy(remedy));
        }
        let views = self.look_for(workload, place.as_ref(), wanted).await;
        let location = locate(&views, workload, place.as_ref())?;
        let mut auto = self.auto(request, workload).await?;
        let journey = Journey { who, workload, location: &location, views: &views, target: wanted };
        let (target, report) = self.placed(&journey, wishes, auto.as_mut()).await?;
        self.gate.narrow(who, &moving(workload, &location, target.name.as_str())).await?;
        let record = Record {
            id: MigrationId::new(),
            workload: workload.name.clone(),
            container: workload.container.clone(),
            strategy: wishes.strategy,
            auto,
            strategy_reason: String::new(),
            source: location.view.node.name.clone(),
            source_address: location.view.node.address.clone(),
            target: target.name.clone(),
            target_address: target.address.clone(),
            compress: !request.no_compression,
            downtime_budget_ms: request.downtime_budget_ms,
            bandwidth_limit: request.bandwidth_limit,
            verify: request.verify,
            throttle: request.throttle,
            grace_period_s,
            requested_by: Some(who.clone()),
            created_at: Timestamp::now(),
            frozen_at: None,
            state: State::new(),
            report,
        };
        self.runner.start(record).await
    }

    /// The migration that a workload is part of, and where the last one has put it.
    async fn recorded(&self, workload: &Workload) -> Result<(Option<MigrationId>, Option<NodeName>), Failure> {
        let (store, name) = (self.store.clone(), workload.name.clone());
        let known = blocking(move || Ok((store.busy_with(&name)?, store.place(&name)?))).await;
        known.map_err(|error: StoreError| internal(&error))
    }

    /// The wanted target if it will do, or the best one, with a report that says why not the others.
    async fn target<'n>(&'n self, journey: &Journey<'n, '_>, wishes: Wishes) -> Result<(&'n Node, Report), Failure> {
        let Journey { who, workload, location, views, target } = *journey;
        let demand = demand(location, wishes)?;
        let load = self.runner.load();
        let candidate = |view: &NodeView| Candidate {
            name: view.node.name.clone(),
            facts: view.seen.as_ref().map(|seen| facts(seen, workload, wishes.strategy)).map_err(ToString::to_string),
            migrations: load.get(&view.node.name).copied().unwrap_or_default(),
            migration_limit: self.runner.limit(),
        };
        if let Some(wanted) = target {
            let view = views.iter().find(|view| view.node.name == wanted.name);
            let view = view.ok_or_else(|| not_asked(wanted))?;
            judge_wanted(&demand, view, &candidate(view))?;
            return Ok((wanted, Report::default()));
        }
        let mut report = Report::default();
        let (mut candidates, mut beyond) = (Vec::new(), None);
        for view in views {
            let action = moving(workload, location, view.node.name.as_str());
            match self.gate.decide(Some(who), &action) {
                Ok(_) => candidates.push(candidate(view)),
                Err(denial) => {
                    report.note(format!("not to {}: {}", view.node.name, denial.why));
                    beyond = Some(action);
                }
            }
        }
        // Placement would say that the workload runs there already, which is not why.
        if let Some(action) = beyond
            && candidates.iter().all(|candidate| candidate.name == demand.source)
        {
            self.gate.narrow(who, &action).await?;
        }
        let Choice { target, others } = choose(&demand, &candidates)?;
        for (name, why) in others {
            report.note(format!("not to {name}: {why}"));
        }
        Ok((self.known_node(target.as_str())?, report))
    }

    /// Asks the node where the workload ought to be and the wanted one; the others only when it is not there, or when
    /// one of them has to be chosen.
    async fn look_for(&self, workload: &Workload, place: Option<&NodeName>, wanted: Option<&Node>) -> Vec<NodeView> {
        let likely = place.or(workload.node.as_ref()).and_then(|name| self.inventory.node(name.as_str()));
        if let (Some(likely), Some(wanted)) = (likely, wanted) {
            let mut few = vec![likely];
            if wanted.name != likely.name {
                few.push(wanted);
            }
            let views = self.survey(few).await;
            if locate(&views, workload, place).is_ok_and(|location| location.view.node.name == likely.name) {
                return views;
            }
        }
        self.survey(self.inventory.nodes()).await
    }

    async fn survey(&self, nodes: impl IntoIterator<Item = &Node>) -> Vec<NodeView> {
        survey(&self.agents, nodes, self.deadlines.survey).await
    }

    fn known_node(&self, name: &str) -> Result<&Node, Failure> {
        self.inventory.node(name).ok_or_else(|| {
            let known: Vec<_> = self.inventory.nodes().map(|node| node.name.as_str()).collect();
            unknown("node", name, &known)
        })
    }

    fn known_workload(&self, name: &str) -> Result<&Workload, Failure> {
        self.inventory.workload(name).ok_or_else(|| {
            let known: Vec<_> = self.inventory.workloads().map(|workload| workload.name.as_str()).collect();
            unknown("workload", name, &known)
        })
    }

    /// A migration as it is now.
    pub async fn migration(&self, id: &str) -> Result<Record, Failure> {
        let id = parse_id(id)?;
        if let Some(view) = self.runner.watch(id) {
            return Ok(view.borrow().clone());
        }
        let store = self.store.clone();
        let record = blocking(move || store.get(id)).await.map_err(|error| internal(&error))?;
        record.ok_or_else(|| no_migration(id))
    }

    /// All migrations, newest first.
    pub async fn migrations(&self, workload: &str, active_only: bool) -> Result<Vec<Record>, Failure> {
        if !workload.is_empty() {
            self.known_workload(workload)?;
        }
        let store = self.store.clone();
        let mut all = blocking(move || store.list()).await.map_err(|error| internal(&error))?;
        for record in &mut all {
            if let Some(view) = self.runner.watch(record.id) {
                *record = view.borrow().clone();
            }
        }
        all.retain(|record| {
            (workload.is_empty() || record.workload.as_str() == workload) && !(active_only && record.state.is_settled())
        });
        Ok(all)
    }

    /// A migration as it is now and, unless its outcome is known, its later states.
    pub async fn watch(&self, id: &str) -> Result<(Record, Option<watch::Receiver<Record>>), Failure> {
        let parsed = parse_id(id)?;
        if let Some(mut view) = self.runner.watch(parsed) {
            let now = view.borrow_and_update().clone();
            let later = (!now.state.is_settled()).then_some(view);
            return Ok((now, later));
        }
        Ok((self.migration(id).await?, None))
    }

    /// Undoes a migration that is not committed, as `who` asks for.
    pub async fn cancel(&self, id: &str, who: &Peer) -> Result<Record, Failure> {
        let record = self.migration(id).await?;
        self.gate.narrow(who, &cancelling(id, &record)).await?;
        if let Some(answer) = self.runner.cancel(record.id, &who.to_string()).await {
            return answer;
        }
        let phase = self.migration(id).await?.state.phase();
        let message = format!("migration {id} has ended already: {phase}");
        Err(Failure::new(FailureCode::FailedPrecondition, message).in_phase(phase.as_str()))
    }

    /// How a migration was decided, by the durable record alone.
    pub async fn decision(&self, id: &str) -> Result<Decision, Failure> {
        let id = parse_id(id)?;
        let store = self.store.clone();
        blocking(move || store.decision(id)).await.map_err(|error| internal(&error))
    }
}

/// The migration that somebody asks for, now that it is known where the workload is.
fn moving<'a>(workload: &'a Workload, location: &'a Location<'_>, target: &'a str) -> Action<'a> {
    let source = Some(location.view.node.name.as_str());
    Action { source, ..Action::migrate(workload.name.as_str(), target) }
}

/// The cancel that somebody asks for, now that it is known of what.
fn cancelling<'a>(id: &'a str, record: &'a Record) -> Action<'a> {
    Action {
        workload: Some(record.workload.as_str()),
        source: Some(record.source.as_str()),
        target: Some(record.target.as_str()),
        ..Action::on_migration(Verb::CancelMigration, id)
    }
}

fn judge_wanted(demand: &Demand, view: &NodeView, candidate: &Candidate) -> Result<(), Failure> {
    let Err(objection) = judge(demand, candidate) else { return Ok(()) };
    match &view.seen {
        // The agent's own words say more than that it does not answer.
        Err(failure) if view.node.name != demand.source => Err(failure.clone()),
        _ => Err(objection.into_failure(&view.node.name)),
    }
}

fn not_asked(node: &Node) -> Failure {
    Failure::new(FailureCode::Internal, format!("the agent of node {} was not asked", node.name))
}

/// What a request asks of the way a workload is moved, if that makes sense.
fn wishes(request: &v1::MigrateRequest) -> Result<Wishes, Failure> {
    let asked = Asked::of(request.strategy)?;
    let strategy = asked.at_least();
    let refused = |message: String, remedy: &str| {
        Err(Failure::new(FailureCode::InvalidArgument, message).in_phase("preflight").remedy(remedy))
    };
    let (budget, limit) = (request.downtime_budget_ms, request.bandwidth_limit);
    // Zero is no wish. What is not a number is not in the range either.
    let no_budget = budget.abs() < f64::MIN_POSITIVE;
    if !no_budget && !DOWNTIME_BUDGETS.contains(&budget) {
        let (least, most) = (DOWNTIME_BUDGETS.start(), DOWNTIME_BUDGETS.end());
        let message = format!("{budget} ms is no downtime that can be aimed at: it is between {least} and {most} ms");
        return refused(message, "give another one, or none");
    }
    if limit > 0 && limit < LEAST_BANDWIDTH {
        let message = format!("{limit} bytes per second are too little: the least limit is {LEAST_BANDWIDTH}");
        return refused(message, "give a larger limit, or none");
    }
    if asked == Asked::Auto {
        return Ok(Wishes { strategy, bandwidth_limit: limit });
    }
    if request.allow_restart && strategy != Strategy::Cold {
        let message = format!("the strategy {strategy} does not restart the workload, whatever is allowed");
        return refused(message, "use auto, or cold, or do not allow a restart");
    }
    if !no_budget && !strategy.copies_memory_beforehand() {
        let message = format!("the strategy {strategy} cannot aim at a downtime: {}", without_rounds(strategy));
        return refused(message, "use live, or give no downtime");
    }
    if strategy.path().post_copy && !request.accept_loss {
        let message = format!(
            "the strategy {strategy} risks the workload: from its resume on the target until the last page is across, losing either \
             node, or the link between them for too long, loses it"
        );
        return refused(message, "accept that risk (--accept-loss), or use live");
    }
    if request.verify && strategy.path().post_copy {
        let message = format!(
            "the strategy {strategy} cannot verify: what is fetched after the resume is not there to be compared"
        );
        return refused(message, "leave the verification away, or use live");
    }
    if request.verify && strategy == Strategy::Cold {
        return refused(
            "the strategy cold has nothing to verify: it moves no memory".to_owned(),
            "leave the verification away, or use live",
        );
    }
    if request.verify && !strategy.copies_memory_beforehand() {
        let message = format!(
            "the strategy {strategy} has nothing to verify: all memory is read while the workload is frozen, and each piece of it \
             travels with a check sum"
        );
        return refused(message, "leave the verification away, or use live");
    }
    if request.throttle && !strategy.copies_memory_beforehand() {
        let message = format!("the strategy {strategy} cannot throttle a workload: {}", without_rounds(strategy));
        return refused(message, "use live, or do not throttle");
    }
    Ok(Wishes { strategy, bandwidth_limit: limit })
}

/// Why a strategy does nothing to memory while the workload runs.
fn without_rounds(strategy: Strategy) -> &'static str {
    if strategy == Strategy::Cold { "it moves no memory" } else { "it freezes the workload at once" }
}

/// How long a workload gets to end, in seconds, where it is stopped.
fn grace_period_s_of(request: &v1::MigrateRequest, strategy: Strategy) -> Result<u32, Failure> {
    let refused = |message: String, remedy: &str| {
        Err(Failure::new(FailureCode::InvalidArgument, message).in_phase("preflight").remedy(remedy))
    };
    let auto = Asked::of(request.strategy)? == Asked::Auto;
    let may_stop = strategy == Strategy::Cold || (auto && request.allow_restart);
    match request.grace_period_s {
        Some(_) if auto && !may_stop => refused(
            "no workload is stopped unless that is allowed".to_owned(),
            "give no grace period, or --allow-restart",
        ),
        Some(_) if !may_stop => {
            refused(format!("the strategy {strategy} stops no workload"), "give no grace period, or use cold")
        }
        Some(asked) if asked > LONGEST_GRACE_PERIOD_S => refused(
            format!("{asked} s are no grace period: it is at most {LONGEST_GRACE_PERIOD_S} s"),
            "give a shorter one, or none",
        ),
        None if may_stop => Ok(GRACE_PERIOD_S),
        asked => Ok(asked.unwrap_or_default()),
    }
}

fn demand(location: &Location<'_>, wishes: Wishes) -> Result<Demand, Failure> {
    let Location { view, seen, container } = location;
    let node = &view.node.name;
    if !wishes.strategy.finds_fit(&seen.description) {
        let complaints = seen.description.complaints.join("; ");
        let message = format!("node {node}, where the workload is, is not fit for migrations: {complaints}");
        return Err(Failure::new(FailureCode::FailedPrecondition, message)
            .on(node.as_str())
            .in_phase("preflight")
            .remedy("run `podferry check` on the node"));
    }
    speaks(node, &seen.description, wishes.of_source())?;
    Ok(Demand {
        source: node.clone(),
        architecture: seen.description.architecture.clone(),
        cpu_features: seen.description.cpu_features.iter().cloned().collect(),
        memory_bytes: container.memory_bytes,
        version: wishes.of_target(),
        starts_anew: wishes.strategy == Strategy::Cold,
    })
}

fn facts(seen: &Seen, workload: &Workload, strategy: Strategy) -> Facts {
    let is = &seen.description;
    Facts {
        fit: strategy.finds_fit(is),
        knows: strategy.is_known_to(is),
        complaints: is.complaints.clone(),
        version: spoken(is),
        architecture: is.architecture.clone(),
        cpu_features: is.cpu_features.iter().cloned().collect(),
        memory_available: is.memory_available,
        images_free: is.images_free,
        containers: seen.containers.iter().filter(|container| container.status != "stopped").count(),
        has_container: seen.containers.iter().any(|container| container.id == workload.container),
    }
}

fn unknown(kind: &str, name: &str, known: &[&str]) -> Failure {
    let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
    Failure::new(FailureCode::NotFound, format!("there is no {kind} {name:?} in the inventory"))
        .remedy(format!("name one of: {known}"))
}

fn parse_id(id: &str) -> Result<MigrationId, Failure> {
    id.parse().map_err(|error| Failure::from_error(FailureCode::InvalidArgument, &error))
}

fn no_migration(id: MigrationId) -> Failure {
    Failure::new(FailureCode::NotFound, format!("there is no migration {id}")).remedy("see `podferry migrations`")
}

fn internal(error: &StoreError) -> Failure {
    tracing::error!(error = %chain(error), "the store cannot be read");
    Failure::from_error(FailureCode::Internal, error).remedy("see the coordinator's disk and log")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(strategy: v1::Strategy, downtime_budget_ms: f64, bandwidth_limit: u64) -> Result<Wishes, String> {
        let strategy = strategy.into();
        let request =
            v1::MigrateRequest { strategy, downtime_budget_ms, bandwidth_limit, ..v1::MigrateRequest::default() };
        wishes(&request).map_err(|failure| format!("{} {failure}", failure.code))
    }

    fn throttled(strategy: v1::Strategy) -> Result<Wishes, String> {
        let request = v1::MigrateRequest { strategy: strategy.into(), throttle: true, ..v1::MigrateRequest::default() };
        wishes(&request).map_err(|failure| format!("{} {failure}", failure.code))
    }

    #[test]
    fn wishes_that_make_no_sense_are_refused() {
        let live = Wishes { strategy: Strategy::Live, bandwidth_limit: 0 };
        for budget in [0.0, 1.0, 0.5e3, 60_000.0] {
            assert_eq!(asked(v1::Strategy::Live, budget, 0), Ok(live));
        }
        let limited = Wishes { strategy: Strategy::Warm, bandwidth_limit: LEAST_BANDWIDTH };
        assert_eq!(asked(v1::Strategy::Unspecified, 0.0, LEAST_BANDWIDTH), Ok(limited));
        let refused = [
            asked(v1::Strategy::Live, 0.5, 0),
            asked(v1::Strategy::Live, -1.0, 0),
            asked(v1::Strategy::Live, 60_001.0, 0),
            asked(v1::Strategy::Live, f64::NAN, 0),
            asked(v1::Strategy::Warm, 100.0, 0),
            asked(v1::Strategy::Postcopy, 100.0, 0),
            asked(v1::Strategy::Live, 100.0, LEAST_BANDWIDTH - 1),
            asked(v1::Strategy::Postcopy, 0.0, 0),
            asked(v1::Strategy::Hybrid, 100.0, 0),
            throttled(v1::Strategy::Warm),
            throttled(v1::Strategy::Cold),
            asked(v1::Strategy::Cold, 100.0, 0),
        ];
        assert_eq!(throttled(v1::Strategy::Live), Ok(live));
        let said: Vec<_> = refused.into_iter().map(Result::unwrap_err).collect();
        insta::assert_snapshot!(said.join("\n"), @r#"
        INVALID_ARGUMENT 0.5 ms is no downtime that can be aimed at: it is between 1 and 60000 ms (in preflight); what to do: give another one, or none
        INVALID_ARGUMENT -1 ms is no downtime that can be aimed at: it is between 1 and 60000 ms (in preflight); what to do: give another one, or none
        INVALID_ARGUMENT 60001 ms is no downtime that can be aimed at: it is between 1 and 60000 ms (in preflight); what to do: give another one, or none
        INVALID_ARGUMENT NaN ms is no downtime that can be aimed at: it is between 1 and 60000 ms (in preflight); what to do: give another one, or none
        INVALID_ARGUMENT the strategy warm cannot aim at a downtime: it freezes the workload at once (in preflight); what to do: use live, or give no downtime
        INVALID_ARGUMENT the strategy postcopy cannot aim at a downtime: it freezes the workload at once (in preflight); what to do: use live, or give no downtime
        INVALID_ARGUMENT 65535 bytes per second are too little: the least limit is 65536 (in preflight); what to do: give a larger limit, or none
        INVALID_ARGUMENT the strategy postcopy risks the workload: from its resume on the target until the last page is across, losing either node, or the link between them for too long, loses it (in preflight); what to do: accept that risk (--accept-loss), or use live
        INVALID_ARGUMENT the strategy hybrid risks the workload: from its resume on the target until the last page is across, losing either node, or the link between them for too long, loses it (in preflight); what to do: accept that risk (--accept-loss), or use live
        INVALID_ARGUMENT the strategy warm cannot throttle a workload: it freezes the workload at once (in preflight); what to do: use live, or do not throttle
        INVALID_ARGUMENT the strategy cold cannot throttle a workload: it moves no memory (in preflight); what to do: use live, or do not throttle
        INVALID_ARGUMENT the strategy cold cannot aim at a downtime: it moves no memory (in preflight); what to do: use live, or give no downtime
        "#);
        let (strategy, accept_loss) = (v1::Strategy::Hybrid.into(), true);
        let accepted = v1::MigrateRequest { strategy, accept_loss, ..v1::MigrateRequest::default() };
        assert_eq!(wishes(&accepted).map(|wishes| wishes.strategy), Ok(Strategy::Hybrid));
    }

    #[test]
    fn only_memory_that_is_copied_beforehand_is_verified() {
        let asked = |strategy: v1::Strategy| {
            wishes(&v1::MigrateRequest { strategy: strategy.into(), verify: true, ..v1::MigrateRequest::default() })
        };
        assert!(asked(v1::Strategy::Live).is_ok());
        let nothing = asked(v1::Strategy::Cold).unwrap_err();
        assert_eq!(nothing.message, "the strategy cold has nothing to verify: it moves no memory");
        let refused = asked(v1::Strategy::Warm).unwrap_err();
        insta::assert_snapshot!(format!("{} {refused}", refused.code), @"INVALID_ARGUMENT the strategy warm has nothing to verify: all memory is read while the workload is frozen, and each piece of it travels with a check sum (in preflight); what to do: leave the verification away, or use live");
    }

    #[test]
    fn only_a_workload_that_is_stopped_gets_a_grace_period() {
        let asked = |strategy, grace_period_s| {
            let request = v1::MigrateRequest { grace_period_s, ..v1::MigrateRequest::default() };
            grace_period_s_of(&request, strategy)
        };
        assert_eq!(asked(Strategy::Cold, None), Ok(30));
        assert_eq!(asked(Strategy::Cold, Some(0)), Ok(0));
        assert_eq!(asked(Strategy::Cold, Some(3600)), Ok(3600));
        assert_eq!(asked(Strategy::Live, None), Ok(0));
        let refused = [asked(Strategy::Cold, Some(3601)), asked(Strategy::Warm, Some(30))].map(Result::unwrap_err);
        insta::assert_snapshot!(refused.map(|failure| format!("{} {failure}", failure.code)).join("\n"), @r"
        INVALID_ARGUMENT 3601 s are no grace period: it is at most 3600 s (in preflight); what to do: give a shorter one, or none
        INVALID_ARGUMENT the strategy warm stops no workload (in preflight); what to do: give no grace period, or use cold
        ");
    }

    #[test]
    fn only_what_is_asked_for_needs_a_newer_agent() {
        let versions = |strategy, bandwidth_limit| {
            let wishes = Wishes { strategy, bandwidth_limit };
            (wishes.of_source(), wishes.of_target())
        };
        assert_eq!(versions(Strategy::Warm, 0), (1, 1));
        assert_eq!(versions(Strategy::Warm, 1 << 20), (2, 1), "an older source would not keep to it");
        assert_eq!(versions(Strategy::Live, 0), (2, 2));
        assert_eq!(versions(Strategy::Cold, 0), (2, 2));
    }
}
