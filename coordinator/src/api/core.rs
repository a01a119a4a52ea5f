//! The questions and their answers, whatever they come in by.

mod auto;
mod connections;
mod evacuations;
mod traits;
mod wishes;

use std::collections::HashMap;
use std::sync::Arc;

use jiff::Timestamp;
use podferry_common::identity::Peer;
use podferry_common::{Failure, FailureCode, MigrationId, NodeName, WorkloadName, chain};
use podferry_proto::v1;
use tokio::sync::watch;

use crate::access::{Action, Gate, Verb};
use crate::cluster::{
    Agents, Inventory, Location, Node, NodeView, PodRef, Seen, Workload, locate, speaks, spoken, survey,
};
use crate::evacuation::Evacuator;
use crate::migration::{Decision, State};
use crate::placement::{Candidate, Choice, Demand, Facts, choose, inhabited, judge};
use crate::pods::target_name;
use crate::runner::{Deadlines, Runner, blocking};
use crate::store::{PodMove, Record, Report, Store, StoreError};
use crate::strategy::{Connections, Strategy, Wishes};
use wishes::{grace_period_s_of, wishes};

/// What a request does not say, but who asks knows.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Bounds<'a> {
    /// Where the workload has to be; none: wherever it is.
    pub(crate) source: Option<&'a NodeName>,
    /// Nodes whose preflight has refused it already.
    pub(crate) refused_by: &'a [NodeName],
    /// Kubernetes: the request is as the policies of its pod have it.
    pub(crate) by_policies: bool,
    /// The same is wished of other workloads, too.
    pub(crate) of_many: bool,
}

/// A workload that somebody wants to be moved, and what is seen of the nodes.
struct Journey<'n, 'v> {
    who: &'v Peer,
    workload: &'v Workload,
    location: &'v Location<'v>,
    views: &'v [NodeView],
    /// Where to; none when placement chooses.
    target: Option<&'n Node>,
    /// Nodes whose preflight has refused it already.
    refused_by: &'v [NodeName],
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
    evacuator: Evacuator,
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
        let evacuator = Evacuator::new(store.clone(), runner.clone());
        Self { inventory: Arc::new(inventory), agents, store, runner, deadlines, gate, evacuator }
    }

    /// All evacuations that go on.
    pub fn evacuator(&self) -> &Evacuator {
        &self.evacuator
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

    /// Whether a node of that name takes part.
    pub(super) fn has_node(&self, name: &str) -> bool {
        self.inventory.node(name).is_some()
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
        let begun = self.begin(MigrationId::new(), request, who, Bounds::default()).await;
        if let Err(failure) = &begun {
            self.tell_refused(request, who, failure).await;
        }
        begun
    }

    /// The same for somebody who asks again as long as that [may help](may_pass): only what is refused for good is news. The id has been
    /// chosen already.
    pub(crate) async fn migrate_again(
        &self,
        id: MigrationId,
        request: &v1::MigrateRequest,
        who: &Peer,
        bounds: Bounds<'_>,
    ) -> Result<Record, Failure> {
        let begun = self.begin(id, request, who, bounds).await;
        if let Err(failure) = &begun
            && !may_pass(failure)
        {
            self.tell_refused(request, who, failure).await;
        }
        begun
    }

    async fn tell_refused(&self, request: &v1::MigrateRequest, who: &Peer, failure: &Failure) {
        let (workload, target) = (&request.workload, &request.target);
        tracing::info!(peer = %who, workload, target, %failure, "migration refused");
        // The log has said it if that cannot be written, and nothing is changed.
        let _refused_anyway = self.gate.audit().refused(workload, target, who, failure).await;
    }

    async fn begin(
        &self,
        id: MigrationId,
        request: &v1::MigrateRequest,
        who: &Peer,
        bounds: Bounds<'_>,
    ) -> Result<Record, Failure> {
        let by_policies = match self.runner.pods().filter(|_| !bounds.by_policies) {
            Some(pods) => {
                // What makes no sense is nobody's default.
                wishes(request)?;
                Some(pods.as_policies_say(request, bounds.of_many).await?)
            }
            None => None,
        };
        let request = by_policies.as_ref().unwrap_or(request);
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
        if let Some(source) = bounds.source.filter(|source| **source != location.view.node.name) {
            let message = format!("workload {} is on node {}, not on {source}", workload.name, location.view.node.name);
            return Err(Failure::new(FailureCode::NotFound, message));
        }
        let mut auto = self.auto(request, workload).await?;
        let refused_by = bounds.refused_by;
        let journey = Journey { who, workload, location: &location, views: &views, target: wanted, refused_by };
        let (target, report) = self.placed(&journey, wishes, auto.as_mut()).await?;
        self.gate.narrow(who, &moving(workload, &location, target.name.as_str())).await?;
        self.check_pod(workload, wishes.strategy).await?;
        let record = Record {
            id,
            workload: workload.name.clone(),
            container: workload.container.clone(),
            pod: workload.pod.as_ref().map(|pod| moved(pod, id)),
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
            connections: Connections::of(request)?,
            requested_by: Some(who.clone()),
            created_at: Timestamp::now(),
            frozen_at: None,
            state: State::new(),
            report,
        };
        self.runner.start(record).await
    }

    /// Refuses a pod that cannot move.
    async fn check_pod(&self, workload: &Workload, strategy: Strategy) -> Result<(), Failure> {
        match (&workload.pod, self.runner.pods()) {
            (Some(pod), Some(pods)) => pods.check(&pod.namespace, &pod.name, strategy).await,
            _ => Ok(()),
        }
    }

    /// The migration that a workload is part of, and where the last one has put it.
    async fn recorded(&self, workload: &Workload) -> Result<(Option<MigrationId>, Option<NodeName>), Failure> {
        let (store, name) = (self.store.clone(), workload.name.clone());
        let known = blocking(move || Ok((store.busy_with(&name)?, store.place(&name)?))).await;
        known.map_err(|error: StoreError| internal(&error))
    }

    /// The wanted target if it will do, or the best one, with a report that says why not the others.
    async fn target<'n>(&'n self, journey: &Journey<'n, '_>, wishes: Wishes) -> Result<(&'n Node, Report), Failure> {
        let Journey { who, workload, location, views, target, .. } = *journey;
        let demand = demand(workload, location, wishes)?;
        let surroundings = self.surroundings(journey);
        let candidate = |view: &NodeView| {
            let facts = view.seen.as_ref().map(|seen| facts(seen, workload, wishes.strategy));
            surroundings.candidate(view, facts.map_err(ToString::to_string))
        };
        if let Some(wanted) = target {
            let view = views.iter().find(|view| view.node.name == wanted.name);
            let view = view.ok_or_else(|| not_asked(wanted))?;
            let all: Vec<_> = views.iter().map(candidate).collect();
            judge_wanted(&demand, view, &candidate(view), &inhabited(&all))?;
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
        // A rule about neighbours may be about any node.
        if let (Some(likely), Some(wanted), false) = (likely, wanted, self.inventory.keeps_apart()) {
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

/// Whether the same request may be accepted later, though nobody changes it.
pub(crate) fn may_pass(failure: &Failure) -> bool {
    matches!(failure.code, FailureCode::Unavailable | FailureCode::ResourceExhausted | FailureCode::AlreadyExists)
}

/// The pod of a workload, as its migration's record has it.
fn moved(pod: &PodRef, id: MigrationId) -> PodMove {
    PodMove {
        namespace: pod.namespace.clone(),
        name: pod.name.clone(),
        uid: pod.uid.clone(),
        container: pod.container.clone(),
        target_name: target_name(&pod.base, id),
        keeps_name: pod.keeps_name,
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

fn judge_wanted(
    demand: &Demand,
    view: &NodeView,
    candidate: &Candidate,
    inhabited: &[&Candidate],
) -> Result<(), Failure> {
    let Err(objection) = judge(demand, candidate, inhabited) else { return Ok(()) };
    match &view.seen {
        // The agent's own words say more than that it does not answer.
        Err(failure) if view.node.name != demand.source => Err(failure.clone()),
        _ => Err(objection.into_failure(&view.node.name)),
    }
}

fn not_asked(node: &Node) -> Failure {
    Failure::new(FailureCode::Internal, format!("the agent of node {} was not asked", node.name))
}

fn demand(workload: &Workload, location: &Location<'_>, wishes: Wishes) -> Result<Demand, Failure> {
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
        starts_anew: wishes.strategy.starts_anew(),
        traits: workload.traits.clone(),
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
