//! The shell of one evacuation: it looks at the node, asks for migrations, follows them, and writes.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use jiff::Timestamp;
use podferry_common::{Failure, FailureCode, MigrationId, WorkloadName, chain};
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinError, JoinSet};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::evacuator::{Evacuator, Wish, put_off};
use super::machine::{Ending, Event};
use super::plan::{Command, Room, is_done, next};
use super::record::{Evacuation, Phase, Standing};
use crate::api::Core;
use crate::runner::blocking;
use crate::store::StoreError;
use crate::strategy::Strategy;

/// How often the node is asked what is on it, when nothing says that this has changed.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);
/// For how long a node that does not answer is asked again: its agent may be being started anew.
const SIGHT_PATIENCE: Duration = Duration::from_secs(30);
/// The pause before a migration that was refused for now is asked for again, and before a silent node is.
const REST: Duration = Duration::from_secs(2);
/// How often a migration is asked for that is refused because an agent does not answer.
const MAX_UNANSWERED: u32 = 15;

/// An evacuation's task.
pub(super) struct Driver {
    evacuator: Evacuator,
    evacuation: Evacuation,
    wishes: mpsc::UnboundedReceiver<Wish>,
    view: watch::Sender<Evacuation>,
    /// Migrations whose outcome is waited for.
    followed: HashSet<MigrationId>,
    endings: JoinSet<(WorkloadName, MigrationId, Option<Ending>)>,
    /// Migrations that were asked to stop.
    stopped: HashSet<MigrationId>,
    /// Workloads that were refused for now: until when they are not asked for again, and how often that was for want of an answer.
    resting: HashMap<WorkloadName, (Instant, u32)>,
    /// When the node is to be looked at again.
    look_at: Instant,
    /// Whether something has happened since the last look.
    stale: bool,
    /// Since when the node has not answered.
    blind_since: Option<Instant>,
}

impl Driver {
    pub(super) fn new(
        evacuator: Evacuator,
        evacuation: Evacuation,
        wishes: mpsc::UnboundedReceiver<Wish>,
        view: watch::Sender<Evacuation>,
    ) -> Self {
        let (followed, endings, stopped, resting) = (HashSet::new(), JoinSet::new(), HashSet::new(), HashMap::new());
        let (look_at, stale, blind_since) = (Instant::now(), true, None);
        Self { evacuator, evacuation, wishes, view, followed, endings, stopped, resting, look_at, stale, blind_since }
    }

    /// Runs until the evacuation has ended or the coordinator stops.
    pub(super) async fn run(mut self) -> Result<(), StoreError> {
        let stop = self.evacuator.stopped().clone();
        loop {
            tokio::select! {
                biased;
                // What is undone because of the stop must not be taken for an outcome.
                () = stop.cancelled() => return Ok(()),
                worked = self.work() => if worked? { return Ok(()) },
            }
            let wake = self.wake();
            tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(()),
                Some(wish) = self.wishes.recv() => self.take_in(wish).await?,
                Some(ended) = self.endings.join_next() => self.ended(ended).await?,
                () = sleep_until(wake) => {}
            }
        }
    }

    /// Does what can be done now. Whether that was all there ever will be.
    async fn work(&mut self) -> Result<bool, StoreError> {
        self.cordon().await?;
        if self.looks_now() {
            self.look().await?;
        }
        let room = self.room();
        for command in next(&self.evacuation, &room) {
            self.execute(command).await?;
        }
        self.follow();
        let known = !self.stale || self.evacuation.trouble.is_some() || self.evacuation.phase != Phase::Running;
        if !known || !is_done(&self.evacuation, self.left()) {
            return Ok(false);
        }
        self.take(Event::Done(Timestamp::now()), false).await?;
        let (id, node, phase) = (self.evacuation.id, &self.evacuation.node, &self.evacuation.phase);
        tracing::info!(evacuation = %id, %node, ?phase, "evacuation ended");
        Ok(true)
    }

    fn looks_now(&self) -> bool {
        let wanted = self.evacuation.phase == Phase::Running && self.evacuation.trouble.is_none();
        wanted && self.look_at <= Instant::now()
    }

    /// When there is something to do, if nothing happens before.
    fn wake(&self) -> Instant {
        let now = Instant::now();
        // Those that have rested have been tried just now, or need not be.
        let rested = self.resting.values().map(|(until, _)| *until).filter(|until| *until > now).min();
        let deadline = self.left().map(|left| Instant::now() + left);
        let looks = self.evacuation.phase == Phase::Running && self.evacuation.trouble.is_none();
        let look = if looks { self.look_at } else { Instant::now() + LOOK_INTERVAL };
        let waits = self.evacuation.entries.iter().any(|entry| entry.standing == Standing::Waiting);
        [rested, deadline].into_iter().flatten().filter(|_| waits).fold(look, Instant::min)
    }

    /// How much time there is until the deadline; none without one.
    fn left(&self) -> Option<Duration> {
        let deadline = self.evacuation.terms.deadline_at?;
        Some(Duration::try_from(deadline.duration_since(Timestamp::now())).unwrap_or_default())
    }

    fn room(&self) -> Room {
        let now = Instant::now();
        let runner = self.evacuator.runner();
        let unsent = self.evacuation.entries.iter().filter_map(|entry| {
            let progress = runner.watch(entry.migration()?)?.borrow().report.progress;
            let known = progress.expected_bytes > 0;
            known.then(|| (entry.workload.clone(), progress.expected_bytes.saturating_sub(progress.raw_bytes)))
        });
        let resting = self.resting.iter().filter(|(_, (until, _))| *until > now).map(|(name, _)| name.clone());
        Room {
            on_node: runner.load().get(&self.evacuation.node).copied().unwrap_or_default(),
            per_node: runner.limits().per_node,
            left: self.left(),
            unsent: unsent.collect(),
            resting: resting.collect(),
        }
    }

    /// Asks the node what is on it.
    async fn look(&mut self) -> Result<(), StoreError> {
        let Some(core) = self.evacuator.core() else { return Ok(()) };
        match core.on_node(&self.evacuation.node, self.evacuation.terms.selector.as_ref()).await {
            Ok(found) => {
                (self.blind_since, self.stale) = (None, false);
                self.look_at = Instant::now() + LOOK_INTERVAL;
                let there = |workload: &WorkloadName| found.iter().any(|found| found.workload == *workload);
                let waiting = self.evacuation.entries.iter().filter(|entry| entry.standing == Standing::Waiting);
                let gone: Vec<_> = waiting.map(|entry| entry.workload.clone()).filter(|name| !there(name)).collect();
                for workload in gone {
                    self.explain(workload).await?;
                }
                self.take(Event::Seen(found), true).await?;
                self.look_for_homes(&core).await
            }
            Err(failure) => {
                put_off(self.evacuation.id, &failure);
                self.look_at = Instant::now() + REST;
                let since = *self.blind_since.get_or_insert_with(Instant::now);
                if since.elapsed() < SIGHT_PATIENCE {
                    Ok(())
                } else {
                    self.take(Event::LostSight(failure), false).await
                }
            }
        }
    }

    /// Asks it for what connections of those that have moved away need it. It need not answer that: nobody is kept for it.
    async fn look_for_homes(&mut self, core: &Core) -> Result<(), StoreError> {
        match core.homes_on(&self.evacuation.node).await {
            Ok(count) => self.take(Event::Homes(count), true).await,
            Err(failure) => {
                put_off(self.evacuation.id, &failure);
                Ok(())
            }
        }
    }

    /// A workload that waited is not there any more. Its migration may have begun and ended when nobody could write that down here.
    async fn explain(&mut self, workload: WorkloadName) -> Result<(), StoreError> {
        let (store, name) = (self.evacuator.store().clone(), workload.clone());
        let newest = blocking(move || {
            let all = store.list()?;
            Ok::<_, StoreError>(all.into_iter().find(|record| record.workload == name))
        });
        let newest = newest.await?;
        let since = self.evacuation.created_at;
        let took = newest.filter(|record| record.source == self.evacuation.node && record.created_at >= since);
        match took.filter(|record| record.state.is_settled()) {
            Some(record) => self.take(Event::Ended(workload, Ending::of(&record)), true).await,
            None => self.take(Event::Gone(workload), true).await,
        }
    }

    async fn execute(&mut self, command: Command) -> Result<(), StoreError> {
        match command {
            Command::Begin { workload, strategy, hurried } => {
                if let Some(hurried) = hurried {
                    let (id, strategy, why) = (self.evacuation.id, hurried.strategy, &hurried.why);
                    tracing::info!(evacuation = %id, %workload, %strategy, why, "moved in a faster way");
                    self.take(Event::Hurry(workload.clone(), hurried), true).await?;
                }
                self.begin(workload, strategy).await
            }
            Command::Cancel(migration) => {
                if self.stopped.insert(migration) {
                    let by = format!("the cancel of {}", self.evacuation.id);
                    // One that is committed, or has ended, goes its way.
                    let _goes_on = self.evacuator.runner().cancel(migration, &by).await;
                }
                Ok(())
            }
            Command::Late(workload, late) => {
                if let Some(why) = &late {
                    let id = self.evacuation.id;
                    tracing::warn!(evacuation = %id, %workload, why, "not expected to be away by the deadline");
                }
                self.take(Event::Late(workload, late), true).await
            }
            Command::DeadlinePassed => self.take(Event::DeadlinePassed, true).await,
        }
    }

    async fn begin(&mut self, workload: WorkloadName, strategy: Option<Strategy>) -> Result<(), StoreError> {
        let Some(core) = self.evacuator.core() else { return Ok(()) };
        let refusal = match core.migrate_for(&self.evacuation, &workload, strategy).await {
            Ok(record) => {
                self.resting.remove(&workload);
                return self.take(Event::Begun(workload, record.id), false).await;
            }
            Err(failure) => failure,
        };
        let tries = self.resting.get(&workload).map_or(0, |(_, tries)| *tries);
        let unanswered = refusal.code == FailureCode::Unavailable;
        self.resting.insert(workload.clone(), (Instant::now() + REST, tries + u32::from(unanswered)));
        match refusal.code {
            FailureCode::Unavailable if tries < MAX_UNANSWERED => {
                put_off(self.evacuation.id, &refusal);
                Ok(())
            }
            // It is not on the node any more.
            FailureCode::NotFound => self.explain(workload).await,
            // Somebody was faster: the next look says who.
            FailureCode::AlreadyExists if is_busy(&refusal) => {
                (self.look_at, self.stale) = (Instant::now(), true);
                Ok(())
            }
            _ => self.take(Event::Refused(workload, refusal), true).await,
        }
    }

    /// Waits for the outcome of every migration under way.
    fn follow(&mut self) {
        let moving =
            self.evacuation.entries.iter().filter_map(|entry| Some((entry.workload.clone(), entry.migration()?)));
        for (workload, id) in moving {
            if self.followed.insert(id) {
                let evacuator = self.evacuator.clone();
                self.endings.spawn(async move { (workload, id, outcome(&evacuator, id).await) });
            }
        }
    }

    async fn ended(
        &mut self,
        ended: Result<(WorkloadName, MigrationId, Option<Ending>), JoinError>,
    ) -> Result<(), StoreError> {
        // Nobody stops them; a panic has been logged, and the process ends by it.
        let Ok((workload, migration, ending)) = ended else { return Ok(()) };
        self.followed.remove(&migration);
        (self.look_at, self.stale) = (Instant::now(), true);
        // That may be what others wait for.
        self.resting.retain(|_, (_, unanswered)| *unanswered > 0);
        match ending {
            Some(ending) => self.take(Event::Ended(workload, ending), true).await,
            None => self.take(Event::Forgotten(workload, migration), true).await,
        }
    }

    async fn take_in(&mut self, wish: Wish) -> Result<(), StoreError> {
        let id = self.evacuation.id;
        match wish {
            Wish::Cancel(who) => {
                tracing::info!(evacuation = %id, who, "evacuation cancelled");
                self.take(Event::CancelRequested(who), false).await
            }
            Wish::Deadline(deadline) => {
                tracing::info!(evacuation = %id, ?deadline, "the deadline is moved");
                self.take(Event::DeadlineMoved(deadline), false).await
            }
        }
    }

    /// Marks the node unschedulable, where that is wished and has not been done. What is already there moves all the same if that fails: it is
    /// tried again.
    async fn cordon(&mut self) -> Result<(), StoreError> {
        let wanted = self.evacuation.terms.cordon && !self.evacuation.cordoned && !self.evacuation.has_ended();
        let Some(pods) = self.evacuator.runner().pods().filter(|_| wanted) else { return Ok(()) };
        // What is to move must not wait for an API server that does not answer.
        let cordoned = timeout(REST, pods.cordon(&self.evacuation.node)).await.unwrap_or_else(|_| {
            Err(Failure::new(FailureCode::DeadlineExceeded, "the API server does not mark the node unschedulable"))
        });
        match cordoned {
            Ok(()) => self.take(Event::Cordoned, true).await,
            Err(failure) => {
                put_off(self.evacuation.id, &failure);
                Ok(())
            }
        }
    }

    /// Takes an event in, writes what it changed, and shows it.
    async fn take(&mut self, event: Event, lazily: bool) -> Result<(), StoreError> {
        let before = self.evacuation.clone();
        self.evacuation.apply(event);
        if before == self.evacuation {
            return Ok(());
        }
        let (store, new) = (self.evacuator.store().clone(), self.evacuation.clone());
        blocking(move || store.update_evacuation(&new, lazily)).await?;
        self.view.send_replace(self.evacuation.clone());
        Ok(())
    }
}

/// Whether a workload is part of another migration; a container that is in the way on the target is another matter.
fn is_busy(refusal: &Failure) -> bool {
    refusal.node.is_none()
}

/// How a migration ends; none when it is not recorded any more.
async fn outcome(evacuator: &Evacuator, id: MigrationId) -> Option<Ending> {
    loop {
        if let Some(mut view) = evacuator.runner().watch(id)
            && let Ok(settled) = view.wait_for(|record| record.state.is_settled()).await
        {
            return Some(Ending::of(&settled));
        }
        let store = evacuator.store().clone();
        match blocking(move || store.get(id)).await {
            Ok(Some(record)) if record.state.is_settled() => return Some(Ending::of(&record)),
            Ok(None) => return None,
            // Its driver ends with the coordinator, and so does this one.
            Ok(Some(_)) => {}
            Err(error) => {
                let error = chain(&error);
                tracing::warn!(migration = %id, error, "a migration's outcome cannot be read: trying again");
            }
        }
        sleep(REST).await;
    }
}
