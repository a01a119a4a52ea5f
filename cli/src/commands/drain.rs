//! `drain` and `evacuations`: a node is emptied by the coordinator; the command line asks for that and watches.

use std::collections::{HashMap, HashSet};

use podferry_common::{Failure, FailureCode};
use podferry_proto::v1::{
    self, CancelEvacuationRequest, EvacuateRequest, EvacuatedState, EvacuatedWorkload, Evacuation, EvacuationPhase,
    GetEvacuationRequest, GetMigrationRequest, ListEvacuationsRequest, Migration,
};
use tokio::task::{JoinHandle, LocalSet};

use crate::arguments::{self, Global, Output};
use crate::coordinator::{Coordinator, answer, connect, present};
use crate::exit::Exit;
use crate::follow::{follow, follow_evacuation};
use crate::progress::Progress;
use crate::render::{self, DrainReport, Hurried, Late, LeftBehind};
use crate::words;

/// Has what runs on the node moved elsewhere. A workload that cannot be moved does not keep the others.
pub(super) async fn drain(global: &Global, flags: arguments::Drain) -> Result<Exit, Failure> {
    let mut coordinator = connect(global).await?;
    let deadline = flags.deadline.map_or(0, |deadline| deadline.as_secs());
    let wishes = flags.wishes;
    let request = EvacuateRequest {
        node: flags.node,
        strategy: v1::Strategy::from(wishes.strategy).into(),
        accept_loss: wishes.accept_loss,
        allow_restart: wishes.allow_restart,
        deadline_s: u32::try_from(deadline).unwrap_or(u32::MAX),
        priorities: flags.priority.into_iter().collect::<HashMap<_, _>>(),
        concurrency: flags.concurrency.unwrap_or_default(),
        bandwidth_limit: wishes.bandwidth_limit.unwrap_or_default(),
        cordon: flags.cordon,
        order: order(flags.lowest_first).into(),
        selector: flags.selector,
        downtime_budget_ms: wishes.downtime_budget.map_or(0.0, f64::from),
        verify: wishes.verify,
        throttle: wishes.throttle,
        grace_period_s: wishes.grace_period,
        connections: v1::Connections::from(wishes.connections).into(),
        connections_deadline_s: wishes.connections_deadline_s(),
        no_compression: wishes.no_compression,
    };
    let begun = answer(coordinator.evacuate(request)).await.map_err(told_apart)?.evacuation;
    let begun = begun.ok_or_else(nothing)?;
    if flags.no_wait {
        render::evacuation(global.output, &begun);
        return Ok(Exit::Done);
    }
    to_the_end(coordinator, global.output, &begun.id).await
}

fn order(lowest_first: bool) -> v1::EvacuationOrder {
    if lowest_first { v1::EvacuationOrder::LowestFirst } else { v1::EvacuationOrder::HighestFirst }
}

/// Follows an evacuation to its end.
pub(super) async fn watch(global: &Global, id: &str) -> Result<Exit, Failure> {
    to_the_end(connect(global).await?, global.output, id).await
}

/// Shows an evacuation.
pub(super) async fn describe(global: &Global, id: String) -> Result<Exit, Failure> {
    let mut coordinator = connect(global).await?;
    let found = answer(coordinator.get_evacuation(GetEvacuationRequest { id })).await.map_err(told_apart)?;
    render::evacuation(global.output, &found.evacuation.ok_or_else(nothing)?);
    Ok(Exit::Done)
}

/// Stops an evacuation.
pub(super) async fn cancel(global: &Global, id: String) -> Result<Exit, Failure> {
    let mut coordinator = connect(global).await?;
    let cancelled = answer(coordinator.cancel_evacuation(CancelEvacuationRequest { id })).await.map_err(told_apart)?;
    render::evacuation(global.output, &cancelled.evacuation.ok_or_else(nothing)?);
    Ok(Exit::Done)
}

/// Lists the evacuations.
pub(super) async fn list(global: &Global, node: String, active_only: bool) -> Result<Exit, Failure> {
    let mut coordinator = connect(global).await?;
    let request = ListEvacuationsRequest { node, active_only };
    let found = answer(coordinator.list_evacuations(request)).await.map_err(told_apart)?;
    render::evacuations(global.output, &found.evacuations);
    Ok(Exit::Done)
}

/// A coordinator from before evacuations does not know the method.
fn told_apart(failure: Failure) -> Failure {
    if failure.code != FailureCode::Unimplemented {
        return failure;
    }
    Failure::new(
        FailureCode::Unimplemented,
        "this coordinator is from before evacuations: it empties no nodes by itself",
    )
    .remedy("update the coordinator, or migrate each workload of the node (`podferry workloads --node NODE`)")
}

fn nothing() -> Failure {
    Failure::new(FailureCode::Internal, "the coordinator's answer has no evacuation")
}

async fn to_the_end(coordinator: Coordinator, output: Output, id: &str) -> Result<Exit, Failure> {
    let mut watcher = Watcher { coordinator, output, told: Told::default(), report: DrainReport::default() };
    // Migrations are watched beside each other, on this thread.
    let beside = LocalSet::new();
    let ended = tokio::select! {
        ended = beside.run_until(watcher.follow(id)) => ended,
        _ = tokio::signal::ctrl_c() => {
            eprintln!("the evacuation {id} goes on; follow it with: podferry watch {id}; stop it with: podferry cancel {id}");
            return Ok(Exit::Interrupted);
        }
    };
    let (ended, report) = (ended?, &mut watcher.report);
    report.finish(&ended);
    render::drain(output, report);
    Ok(match ended.phase() {
        _ if !report.lost.is_empty() => Exit::Lost,
        EvacuationPhase::Complete => Exit::Done,
        EvacuationPhase::Cancelled => Exit::Cancelled,
        _ => Exit::Failed,
    })
}

/// What was said of an evacuation already.
#[derive(Default)]
struct Told {
    hurried: HashSet<String>,
    late: HashSet<String>,
    left: HashSet<String>,
    migrations: HashSet<String>,
    in_sight: bool,
    /// Of how many workloads connections are waited for.
    homes: u32,
    /// Migrations under way, whose progress is shown.
    shown: HashMap<String, JoinHandle<()>>,
}

impl Drop for Told {
    fn drop(&mut self) {
        self.shown.values().for_each(JoinHandle::abort);
    }
}

struct Watcher {
    coordinator: Coordinator,
    output: Output,
    told: Told,
    report: DrainReport,
}

impl Watcher {
    async fn follow(&mut self, id: &str) -> Result<Evacuation, Failure> {
        let (states, mut seen) = tokio::sync::mpsc::unbounded_channel();
        let mut coordinator = self.coordinator.clone();
        let id = id.to_owned();
        let following = async move {
            // Whoever receives is here as long as this is.
            follow_evacuation(&mut coordinator, &id, |state| drop(states.send(state.clone()))).await
        };
        let telling = async {
            while let Some(state) = seen.recv().await {
                self.tell(&state).await?;
            }
            Ok::<_, Failure>(())
        };
        let (ended, told) = tokio::join!(following, telling);
        told.map_err(told_apart)?;
        ended.map_err(told_apart)
    }

    /// Says what is new.
    async fn tell(&mut self, state: &Evacuation) -> Result<(), Failure> {
        if !std::mem::replace(&mut self.told.in_sight, true) && !self.output.is_json() {
            eprintln!("{} is being emptied by {}", state.node, state.id);
        }
        for one in &state.workloads {
            self.tell_of(one).await?;
        }
        self.tell_homes(state);
        Ok(())
    }

    /// Says that what has moved has connections that still need the node, when nothing else is waited for.
    fn tell_homes(&mut self, state: &Evacuation) {
        let news = state.remaining == 0 && state.homes > 0 && self.told.homes != state.homes;
        if news && !self.output.is_json() {
            eprintln!(
                "{}: waiting for connections of {} that have left (podferry connections)",
                state.node, state.homes
            );
        }
        self.told.homes = state.homes;
    }

    async fn tell_of(&mut self, one: &EvacuatedWorkload) -> Result<(), Failure> {
        let name = &one.workload;
        if !one.hurried_why.is_empty() && self.told.hurried.insert(name.clone()) {
            render::hurried(self.output, &Hurried::of(one));
        }
        if !one.late.is_empty() && self.told.late.insert(name.clone()) {
            let late = Late { workload: name.clone(), why: one.late.clone() };
            render::late(self.output, &late);
            self.report.late.push(late);
        }
        let under_way = one.state() == EvacuatedState::Moving;
        for (at, id) in one.migration_ids.iter().enumerate() {
            let last = at + 1 == one.migration_ids.len();
            if under_way && last {
                self.show(id);
            } else if self.told.migrations.insert(id.clone()) {
                self.tell_end(id).await?;
            }
        }
        if one.state() == EvacuatedState::LeftBehind && self.told.left.insert(name.clone()) {
            render::failure(self.output, &LeftBehind::of(one).error);
        }
        Ok(())
    }

    /// Shows how far a migration is, unless scripts read.
    fn show(&mut self, id: &str) {
        if self.told.shown.contains_key(id) {
            return;
        }
        let (mut coordinator, of, mut progress) = (self.coordinator.clone(), id.to_owned(), Progress::beside_others());
        let showing = tokio::task::spawn_local(async move {
            // The evacuation says how it ended, whatever becomes of this watch.
            let _ended = follow(&mut coordinator, &of, |migration| progress.show(migration)).await;
            progress.end();
        });
        self.told.shown.insert(id.to_owned(), showing);
    }

    async fn tell_end(&mut self, id: &str) -> Result<(), Failure> {
        if let Some(showing) = self.told.shown.remove(id) {
            // It sees the end, too.
            let _shown = tokio::time::timeout(LAST_PROGRESS, showing).await;
        }
        let request = GetMigrationRequest { id: id.to_owned() };
        let ended: Migration = match answer(self.coordinator.get_migration(request)).await {
            Ok(found) => present(found.migration)?,
            // It is so old that it was forgotten.
            Err(failure) if failure.code == FailureCode::NotFound => return Ok(()),
            Err(failure) => return Err(failure),
        };
        self.report.migrations.push((&ended).into());
        if !self.output.is_json() {
            render::outcome(self.output, &ended);
        }
        if words::is_lost(&ended)
            && let Some(failure) = words::failure(&ended)
        {
            render::failure(self.output, &failure);
        }
        Ok(())
    }
}

/// How long the progress of a migration that has ended may take to say so.
const LAST_PROGRESS: std::time::Duration = std::time::Duration::from_millis(500);
