//! Emptying a node: what is asked, and what an evacuation asks of the core.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::core::{Selector, SelectorExt as _};
use podferry_common::identity::Peer;
use podferry_common::{Failure, FailureCode, MigrationId, NodeName, WorkloadName};
use podferry_proto::v1;
use tokio::sync::watch;

use super::{Bounds, Core, internal, wishes};
use crate::access::{Action, Verb};
use crate::cluster::Seen;
use crate::evacuation::{self, Evacuation, EvacuationId, Event, Found, Manner, Order, Phase, Terms, Wish};
use crate::runner::blocking;
use crate::store::Record;
use crate::strategy::{Asked, Connections, Strategy};

impl Core {
    /// Accepts an evacuation that `who` asks for, or refuses it and records nothing.
    pub async fn evacuate(&self, request: &v1::EvacuateRequest, who: &Peer) -> Result<Evacuation, Failure> {
        let terms = self.terms(request)?;
        self.evacuate_on(EvacuationId::new(), &request.node, terms, who).await
    }

    /// Accepts the evacuation of that id and on those terms, or refuses it and records nothing.
    pub(crate) async fn evacuate_on(
        &self,
        id: EvacuationId,
        node: &str,
        terms: Terms,
        who: &Peer,
    ) -> Result<Evacuation, Failure> {
        let node = self.known_node(node)?.name.clone();
        // What makes no sense for any workload is refused at once.
        wishes(&of_one("any", &terms, terms.strategy))?;
        let found = self.on_node(&node, terms.selector.as_ref()).await?;
        let mut evacuation = Evacuation::with_id(id, node, terms, who.clone());
        evacuation.apply(Event::Seen(found));
        self.evacuator.start(evacuation).await
    }

    fn terms(&self, request: &v1::EvacuateRequest) -> Result<Terms, Failure> {
        let strategy = match request.strategy() {
            v1::Strategy::Unspecified => None,
            _ => match Asked::of(request.strategy)? {
                Asked::Auto => None,
                Asked::This(strategy) => Some(strategy),
            },
        };
        let mut priorities = BTreeMap::new();
        for (name, priority) in &request.priorities {
            priorities.insert(self.known_workload(name)?.name.clone(), *priority);
        }
        let deadline = Duration::from_secs(request.deadline_s.into());
        if request.cordon && self.runner.pods().is_none() {
            let message = "there is no Kubernetes here whose node could be marked unschedulable";
            let failure = Failure::new(FailureCode::FailedPrecondition, message);
            return Err(
                failure.remedy("ask without it: no migration goes to a node that is being emptied, in any case")
            );
        }
        let connections = Connections::of(&v1::MigrateRequest {
            strategy: request.strategy,
            allow_restart: request.allow_restart,
            connections: request.connections,
            connections_deadline_s: request.connections_deadline_s,
            ..v1::MigrateRequest::default()
        })?;
        let selector = evacuation::selector::parse(&request.selector);
        Ok(Terms {
            strategy,
            accept_loss: request.accept_loss,
            allow_restart: request.allow_restart,
            deadline_at: (!deadline.is_zero()).then(|| Timestamp::now() + deadline),
            priorities,
            concurrency: usize::try_from(request.concurrency).ok().filter(|count| *count > 0),
            bandwidth_limit: request.bandwidth_limit,
            manner: Manner {
                downtime_budget_ms: request.downtime_budget_ms,
                verify: request.verify,
                throttle: request.throttle,
                grace_period_s: request.grace_period_s,
                no_compression: request.no_compression,
                connections,
            },
            order: match request.order() {
                v1::EvacuationOrder::LowestFirst => Order::LowestFirst,
                v1::EvacuationOrder::HighestFirst | v1::EvacuationOrder::Unspecified => Order::HighestFirst,
            },
            selector: selector.map_err(|error| Failure::from_error(FailureCode::InvalidArgument, &error))?,
            cordon: request.cordon,
        })
    }

    /// The workloads that are on that node, or on their way from or to it, by its agent's word and the record: those with such labels.
    pub(crate) async fn on_node(&self, name: &NodeName, labels: Option<&LabelSelector>) -> Result<Vec<Found>, Failure> {
        let selector = selector(labels)?;
        let node = self.known_node(name.as_str())?;
        // Asked before and after the look: a workload whose migration begins or ends meanwhile is seen in any case.
        let before = self.under_way().await?;
        let mut views = self.survey([node]).await;
        let seen: Seen = views.pop().map_or_else(|| Err(super::not_asked(node)), |view| view.seen)?;
        let after = self.under_way().await?;
        let mut all = Vec::new();
        for workload in self.inventory.workloads().filter(|workload| selector.matches(&workload.traits.labels)) {
            let ends_here = |record: &&Record| record.source == *name || record.target == *name;
            let record = after.get(&workload.name).or(before.get(&workload.name)).filter(ends_here);
            let container = seen.containers.iter().find(|container| container.id == workload.container);
            if record.is_none() && container.is_none() {
                continue;
            }
            let (_, place) = self.recorded(workload).await?;
            all.push(Found {
                workload: workload.name.clone(),
                priority: workload.traits.priority,
                memory_bytes: container.map(|container| container.memory_bytes).unwrap_or_default(),
                runs: container.is_some_and(|container| container.status != "stopped"),
                placed_elsewhere: place.is_some_and(|place| place != *name),
                migration: record.map(|record| record.id),
            });
        }
        Ok(all)
    }

    /// Asks for a migration on behalf of whoever asked for the evacuation. That a limit is reached is no news.
    ///
    /// # Errors
    /// As for everybody; `NOT_FOUND` also when the workload is not on the node any more.
    pub(crate) async fn migrate_for(
        &self,
        evacuation: &Evacuation,
        workload: &WorkloadName,
        strategy: Option<Strategy>,
    ) -> Result<Record, Failure> {
        let request = of_one(workload.as_str(), &evacuation.terms, strategy);
        let who = &evacuation.requested_by;
        self.gate
            .narrow(who, &Action { source: Some(evacuation.node.as_str()), ..Action::migrate(workload.as_str(), "") })
            .await?;
        let refused_by = evacuation.entry(workload).map(|entry| entry.refused_by.as_slice()).unwrap_or_default();
        let bounds = Bounds { source: Some(&evacuation.node), refused_by, of_many: true, ..Bounds::default() };
        self.migrate_again(MigrationId::new(), &request, who, bounds).await
    }

    /// An evacuation as it is now.
    pub async fn evacuation(&self, id: &str) -> Result<Evacuation, Failure> {
        let id = parse_id(id)?;
        if let Some(view) = self.evacuator.watch(id) {
            return Ok(view.borrow().clone());
        }
        let store = self.store.clone();
        let found = blocking(move || store.evacuation(id)).await.map_err(|error| internal(&error))?;
        found.ok_or_else(|| {
            Failure::new(FailureCode::NotFound, format!("there is no evacuation {id}"))
                .remedy("see `podferry evacuations`")
        })
    }

    /// All evacuations, newest first.
    pub async fn evacuations(&self, node: &str, active_only: bool) -> Result<Vec<Evacuation>, Failure> {
        if !node.is_empty() {
            self.known_node(node)?;
        }
        let store = self.store.clone();
        let mut all = blocking(move || store.evacuations()).await.map_err(|error| internal(&error))?;
        all.retain(|one| (node.is_empty() || one.node.as_str() == node) && !(active_only && one.has_ended()));
        Ok(all)
    }

    /// An evacuation as it is now and, unless it has ended, its later states.
    pub async fn watch_evacuation(
        &self,
        id: &str,
    ) -> Result<(Evacuation, Option<watch::Receiver<Evacuation>>), Failure> {
        let parsed = parse_id(id)?;
        if let Some(mut view) = self.evacuator.watch(parsed) {
            let now = view.borrow_and_update().clone();
            let later = (!now.has_ended()).then_some(view);
            return Ok((now, later));
        }
        Ok((self.evacuation(id).await?, None))
    }

    /// Stops an evacuation, as `who` asks for.
    pub async fn cancel_evacuation(&self, id: &str, who: &Peer) -> Result<Evacuation, Failure> {
        let evacuation = self.evacuation(id).await?;
        let source = Some(evacuation.node.as_str());
        self.gate.narrow(who, &Action { source, ..Action::on_migration(Verb::CancelEvacuation, id) }).await?;
        let Some(mut view) = self.evacuator.watch(evacuation.id) else {
            return Err(Failure::new(FailureCode::FailedPrecondition, format!("evacuation {id} has ended already")));
        };
        self.evacuator.wish(evacuation.id, Wish::Cancel(who.to_string()));
        // The answer is that it is recorded. A driver that is gone has ended it, or could not write.
        let running = |evacuation: &Evacuation| evacuation.phase == Phase::Running;
        let answer = view.wait_for(|evacuation| !running(evacuation)).await.map(|evacuation| evacuation.clone());
        match answer {
            Ok(evacuation) => Ok(evacuation),
            Err(_gone) => self.evacuation(id).await,
        }
    }
}

/// The migration of one workload, as an evacuation asks for it.
fn of_one(workload: &str, terms: &Terms, strategy: Option<Strategy>) -> v1::MigrateRequest {
    // What takes the place of what was asked for restarts nobody.
    let as_asked = strategy == terms.strategy;
    // Nor is all of that for every strategy.
    let manner = if as_asked { terms.manner.clone() } else { Manner::default() };
    let connections = terms.manner.connections;
    v1::MigrateRequest {
        workload: workload.to_owned(),
        target: String::new(),
        strategy: strategy.map_or(v1::Strategy::Auto, v1::Strategy::from).into(),
        accept_loss: terms.accept_loss,
        allow_restart: terms.allow_restart && as_asked,
        bandwidth_limit: terms.bandwidth_limit,
        no_compression: terms.manner.no_compression,
        downtime_budget_ms: manner.downtime_budget_ms,
        verify: manner.verify,
        throttle: manner.throttle,
        grace_period_s: manner.grace_period_s,
        connections: v1::Connections::from(connections.fate).into(),
        connections_deadline_s: connections.deadline_s,
    }
}

/// What selects pods as a selector does.
fn selector(labels: Option<&LabelSelector>) -> Result<Selector, Failure> {
    let Some(labels) = labels else { return Ok(Selector::default()) };
    Selector::try_from(labels.clone()).map_err(|error| {
        let message = format!("the selector of pods is wrong: {error}");
        Failure::new(FailureCode::InvalidArgument, message).remedy("correct it: it is as in a Deployment")
    })
}

fn parse_id(id: &str) -> Result<EvacuationId, Failure> {
    id.parse().map_err(|error| Failure::from_error(FailureCode::InvalidArgument, &error))
}
