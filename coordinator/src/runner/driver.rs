//! One migration's task: takes what comes in, steps the machine, writes, and executes.

use std::collections::HashMap;
use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use podferry_common::{Failure, FailureCode};
use podferry_proto::v1::{self, PreflightSourceResponse};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use super::calls::{Answer, Input, Job, Surroundings, describe, phase_word};
use super::choosing::Survey;
use super::meter::Meter;
use super::{Deadlines, Shared, blocking};
use crate::audit::What;
use crate::migration::{Call, Command, Durability, Event, Phase, State};
use crate::store::{Record, StoreError, told};
use crate::strategy::{Choice, Fate, Strategy, why_closed};

/// The pause before the first repetition; doubled for each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// The longest pause between repetitions.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// What to do about rounds that do not converge, for somebody who left the choice to the coordinator.
const DOES_NOT_CONVERGE: &str = "migrate when it is less busy, or give a larger --downtime-budget; or let it be slowed down (--throttle), or \
                                 frozen for all of its memory (--strategy warm), or fetch what is left after the resume, which risks it \
                                 (--accept-loss)";

/// A migration's task.
pub(super) struct Driver {
    shared: Arc<Shared>,
    record: Record,
    facts: Arc<PreflightSourceResponse>,
    /// What the source said, while the strategy is still to be chosen.
    survey: Arc<Survey>,
    /// Whether the target takes connections to the pod's old address.
    relays: bool,
    meter: Meter,
    inputs: mpsc::UnboundedSender<Input>,
    queue: mpsc::UnboundedReceiver<Input>,
    view: watch::Sender<Record>,
    /// Calls under way. They are dropped with the driver, which is when nothing they could say matters any more.
    calls: JoinSet<()>,
    attempts: HashMap<Call, u32>,
    deadlines: Deadlines,
    deadline: Option<Instant>,
}

impl Driver {
    pub(super) fn new(
        shared: Arc<Shared>,
        record: Record,
        inputs: mpsc::UnboundedSender<Input>,
        queue: mpsc::UnboundedReceiver<Input>,
        view: watch::Sender<Record>,
    ) -> Self {
        let meter = Meter::new(&record);
        let deadlines = shared.deadlines.with_grace(Duration::from_secs(record.grace_period_s.into()));
        let deadline = deadlines.of_phase(record.state.phase()).map(|limit| Instant::now() + limit);
        let (facts, survey, calls, attempts) = (Arc::default(), Arc::default(), JoinSet::new(), HashMap::new());
        Self {
            shared,
            record,
            facts,
            survey,
            relays: false,
            meter,
            inputs,
            queue,
            view,
            calls,
            attempts,
            deadlines,
            deadline,
        }
    }

    /// Runs until the migration is final or the coordinator stops.
    pub(super) async fn run(mut self, first: Event) -> Result<(), StoreError> {
        let stop = self.shared.stop.clone();
        self.apply(first, Instant::now()).await?;
        while !self.record.state.is_final() {
            tokio::select! {
                () = stop.cancelled() => return Ok(()),
                Some(input) = self.queue.recv() => self.take(input).await?,
                () = until(self.deadline) => self.phase_is_late().await?,
                Some(_) = self.calls.join_next() => {}
            }
        }
        Ok(())
    }

    async fn take(&mut self, input: Input) -> Result<(), StoreError> {
        match input {
            Input::Answered { call, answer: Ok(answer), at } => {
                tracing::debug!(migration = %self.record.id, ?call, "answered");
                self.record.report.obstacle = None;
                self.note(call, answer, at);
                self.apply(Event::Succeeded(call), at).await
            }
            Input::Answered { call, answer: Err(failure), at } => {
                let failure = self.in_its_phase(call, failure);
                tracing::warn!(migration = %self.record.id, ?call, %failure, "call failed");
                self.note_obstacle(call, &failure);
                self.apply(Event::Failed(call, failure), at).await
            }
            Input::Round(round) => {
                self.take_round(round);
                Ok(())
            }
            Input::Converged { converged, at } => self.take_converged(&converged, at).await,
            Input::Frozen { frozen, at } => {
                self.meter.frozen(&mut self.record, at, frozen);
                self.apply(Event::Frozen, at).await
            }
            Input::Progress(progress) => {
                let report = &mut self.record.report;
                report.progress.raw_bytes = progress.raw_bytes;
                report.progress.wire_bytes = progress.wire_bytes;
                report.wire_bytes = progress.wire_bytes;
                self.view.send_replace(self.record.clone());
                Ok(())
            }
            Input::Cancel { who, reply } => self.cancel(&who, reply).await,
        }
    }

    /// A round is shown at once, and written with the next state: a restart undoes what it belongs to.
    fn take_round(&mut self, round: v1::Round) {
        // One that comes late belongs to nothing any more.
        if self.record.state == State::PreCopying {
            Meter::round(&mut self.record, round);
            self.view.send_replace(self.record.clone());
        }
    }

    async fn take_converged(&mut self, converged: &v1::Converged, at: Instant) -> Result<(), StoreError> {
        if self.record.state == State::PreCopying {
            converged.notes.iter().for_each(|note| self.record.report.note(note));
        }
        self.apply(Event::Converged, at).await
    }

    /// The stream of a freeze that breaks before the freeze has begun broke in pre-copy.
    fn in_its_phase(&self, call: Call, failure: Failure) -> Failure {
        if call != Call::Freeze || self.record.state != State::PreCopying {
            return failure;
        }
        let failure = failure.in_phase(Phase::PreCopy.as_str());
        let gave_up = failure.code == FailureCode::FailedPrecondition && failure.remedy.is_none();
        if gave_up && self.record.auto.is_some() { failure.remedy(DOES_NOT_CONVERGE) } else { failure }
    }

    /// Takes down what an answer says beyond yes.
    fn note(&mut self, call: Call, answer: Answer, at: Instant) {
        let report = &mut self.record.report;
        match answer {
            Answer::Source(facts) => self.note_source(facts),
            Answer::Surveyed(survey) => self.survey = survey,
            Answer::Target(findings) => findings.iter().for_each(|finding| report.note(describe(finding))),
            Answer::Chosen { choice, facts, findings } => {
                self.note_choice(choice);
                self.note_source(facts);
                for finding in &findings {
                    self.record.report.note(describe(finding));
                }
            }
            Answer::Prepared { relays } => self.note_prepared(relays),
            Answer::Transferred(sent) => Meter::transferred(&mut self.record, &sent),
            Answer::Restored(restore_ms) => report.timings.restore = told(restore_ms),
            Answer::Filled(filled) => Meter::filled(&mut self.record, filled),
            Answer::Done if call == Call::Resume => self.meter.resumed(&mut self.record, at),
            Answer::Done => {}
        }
    }

    /// Takes down how the workload is moved. It is written with the state that the target's answer leads to, before the first call of
    /// that: whoever goes on with this record goes on with this choice.
    fn note_choice(&mut self, choice: Choice) {
        // A choice that comes late must not change the path of what has been decided.
        if !matches!(self.record.state, State::Preflight { .. }) {
            return;
        }
        tracing::info!(migration = %self.record.id, strategy = %choice.strategy, reason = choice.reason, "strategy chosen");
        self.record.choose(choice.strategy, choice.reason);
        let grace = Duration::from_secs(self.record.grace_period_s.into());
        self.deadlines = self.shared.deadlines.with_grace(grace);
    }

    fn note_source(&mut self, facts: Arc<PreflightSourceResponse>) {
        let (strategy, connections) = (self.record.strategy, self.record.connections);
        let report = &mut self.record.report;
        report.keeps_connections = connections.move_along(strategy, &facts);
        let why = match strategy {
            Strategy::Application => Some("a new instance takes the workload's place"),
            Strategy::Cold => Some("the workload is stopped, and started anew"),
            _ if connections.fate == Fate::Close => Some("that was asked for"),
            _ if report.keeps_connections || facts.relayed.is_some() => None,
            _ => Some(why_closed(&facts)),
        };
        if let Some(why) = why.filter(|_| facts.tcp_connections > 0) {
            report.note(format!("{} established TCP connections are closed: {why}", facts.tcp_connections));
        }
        facts.findings.iter().for_each(|finding| report.note(describe(finding)));
        let anew = self.record.strategy.starts_anew();
        let files = facts.volumes.iter().fold(facts.layer_bytes, |all, volume| all.saturating_add(volume.bytes));
        report.progress.expected_bytes = if anew { files } else { facts.memory_bytes.saturating_add(files) };
        self.facts = facts;
    }

    /// Takes down whether connections live on though the pod gets another address.
    fn note_prepared(&mut self, relays: bool) {
        self.relays = relays;
        let Some(relayed) = self.record.connections.relayed(self.record.strategy, &self.facts) else { return };
        let report = &mut self.record.report;
        report.keeps_connections |= relays;
        if relays {
            let addresses = relayed.addresses.join(", ");
            report.note(format!("connections to {addresses} live on through a relay between the nodes"));
        } else if self.facts.tcp_connections > 0 {
            let count = self.facts.tcp_connections;
            report.note(format!(
                "{count} established TCP connections are closed: the target has nothing that carries them"
            ));
        }
    }

    /// Shows what keeps a committed migration from its end, without a write: the next attempt says it again.
    fn note_obstacle(&mut self, call: Call, failure: &Failure) {
        if !matches!(call, Call::Release | Call::Resume | Call::Fill) {
            return;
        }
        let obstacle = Some(format!("{} is repeated until it is confirmed: {failure}", phase_word(call)));
        if self.record.report.obstacle != obstacle {
            self.record.report.obstacle = obstacle;
            self.view.send_replace(self.record.clone());
        }
    }

    async fn phase_is_late(&mut self) -> Result<(), StoreError> {
        self.deadline = None;
        let phase = self.record.state.phase();
        let limit = self.deadlines.of_phase(phase).unwrap_or_default().as_secs_f64();
        let failure =
            Failure::new(FailureCode::DeadlineExceeded, format!("the phase {phase} took longer than {limit} s"))
                .in_phase(phase.as_str())
                .remedy("look at the agents' logs; a larger deadline can be set in the coordinator's configuration");
        self.apply(Event::DeadlinePassed(phase, failure), Instant::now()).await
    }

    async fn cancel(&mut self, who: &str, reply: oneshot::Sender<Result<Record, Failure>>) -> Result<(), StoreError> {
        let id = self.record.id;
        if !self.record.state.can_be_cancelled() {
            let phase = self.record.state.phase();
            let message = format!("migration {id} cannot be cancelled any more: it is in the phase {phase}");
            let failure = Failure::new(FailureCode::FailedPrecondition, message).in_phase(phase.as_str());
            // Who asked may have gone.
            let _gone = reply.send(Err(failure.remedy("wait for its end; migrate back if it succeeds")));
            return Ok(());
        }
        let failure = Failure::new(FailureCode::Aborted, format!("cancelled by {who}"))
            .in_phase(self.record.state.phase().as_str());
        self.apply(Event::CancelRequested(failure), Instant::now()).await?;
        let _gone = reply.send(Ok(self.record.clone()));
        Ok(())
    }

    /// Steps the machine, writes when it has to be written, and executes.
    async fn apply(&mut self, event: Event, at: Instant) -> Result<(), StoreError> {
        let before = self.record.state.clone();
        let step = before.clone().step(event, self.record.strategy.path());
        self.record.state = step.state;
        let changed = self.meter.book(&mut self.record, at);
        match step.durability {
            Durability::Before => {
                self.write(true).await?;
                self.execute(&step.commands);
            }
            Durability::Behind => {
                self.execute(&step.commands);
                self.write(false).await?;
            }
            Durability::Unchanged => self.execute(&step.commands),
        }
        if changed {
            self.enter_phase();
        }
        if let Some(what) = What::of(&before, &self.record.state) {
            self.shared.audit.migration(what, &self.record);
            self.shared.metrics.ended(what, &self.record);
        }
        if let Some(pods) = &self.shared.pods {
            pods.follow(&before, &self.record);
        }
        if step.durability != Durability::Unchanged {
            self.view.send_replace(self.record.clone());
        }
        Ok(())
    }

    fn enter_phase(&mut self) {
        let phase = self.record.state.phase();
        self.deadline = self.deadlines.of_phase(phase).map(|limit| Instant::now() + limit);
        let (id, workload, failure) = (self.record.id, &self.record.workload, self.record.state.failure());
        let why = failure.map(ToString::to_string);
        tracing::info!(migration = %id, %workload, %phase, why, "phase");
    }

    async fn write(&self, before: bool) -> Result<(), StoreError> {
        let (store, record) = (self.shared.store.clone(), self.record.clone());
        let what = match record.state.failure() {
            Some(failure) => format!("{}: {failure}", record.state.phase()),
            None => record.state.phase().to_string(),
        };
        blocking(move || if before { store.update(&record, &what) } else { store.update_lazily(&record, &what) }).await
    }

    fn execute(&mut self, commands: &[Command]) {
        for command in commands {
            let (call, pause) = match *command {
                Command::Call(call) => (call, Duration::ZERO),
                Command::Retry(call) => (call, self.pause(call)),
            };
            let with = Surroundings {
                facts: Arc::clone(&self.facts),
                survey: Arc::clone(&self.survey),
                relays: self.relays,
                deadlines: self.deadlines,
                agents: self.shared.agents.clone(),
                pods: self.shared.pods.clone(),
                inputs: self.inputs.clone(),
            };
            self.calls.spawn(Job::new(call, &self.record, with).run(pause));
        }
    }

    fn pause(&mut self, call: Call) -> Duration {
        let attempts = self.attempts.entry(call).or_default();
        let pause = FIRST_PAUSE.saturating_mul(1 << (*attempts).min(10)).min(LONGEST_PAUSE);
        *attempts += 1;
        pause
    }
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => pending().await,
    }
}
