//! The calls themselves: one agent, one request, one answer.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use podferry_common::{Failure, FailureCode, MigrationId, NodeName};
use podferry_proto::v1::freeze_event::Event as FreezeEvent;
use podferry_proto::v1::{self, Finding};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout};
use tonic::Status;

use super::Deadlines;
use super::choosing::Survey;
use crate::cluster::{AgentClient, Agents, placed, speaks};
use crate::migration::{Call, Side};
use crate::pods::Pods;
use crate::store::{PodMove, Record};
use crate::strategy::{Auto, Choice, Connections, Fate, Strategy, Wishes, budget_ms};

/// What an agent says in its features that takes volumes.
const VOLUMES_WORD: &str = "agent:volumes";
/// What an agent says that moves pods.
const PODS_WORD: &str = "agent:pods";
/// And one that also moves those that keep their names.
const NAMES_WORD: &str = "agent:names";
/// Rounds of pre-copy at most: memory that has not become less by then does not.
const MAX_ROUNDS: u32 = 30;

/// What comes to a driver.
pub(super) enum Input {
    /// A call was answered, or failed, at that instant.
    Answered { call: Call, answer: Result<Answer, Failure>, at: Instant },
    /// A round of pre-copy has ended.
    Round(v1::Round),
    /// Pre-copy has ended.
    Converged { converged: v1::Converged, at: Instant },
    /// The source's processes stand still.
    Frozen { frozen: v1::Frozen, at: Instant },
    /// The transfer goes on.
    Progress(v1::Progress),
    /// Somebody asks to stop.
    Cancel { who: String, reply: oneshot::Sender<Result<Record, Failure>> },
}

/// What an agent says beyond yes.
#[derive(Clone, Debug)]
pub(super) enum Answer {
    /// Just yes.
    Done,
    /// The source can be dumped, and this is what it is.
    Source(Arc<v1::PreflightSourceResponse>),
    /// What the source says for the choice of a strategy.
    Surveyed(Arc<Survey>),
    /// The target can take it; what a person should know.
    Target(Vec<Finding>),
    /// The target can take it in this way, and this is what the source is then.
    Chosen { choice: Choice, facts: Arc<v1::PreflightSourceResponse>, findings: Vec<Finding> },
    /// The target is ready; whether connections to the pod's old address live on there.
    Prepared { relays: bool },
    /// Everything has been sent.
    Transferred(v1::Transferred),
    /// Held; milliseconds that the restore took.
    Restored(f64),
    /// All memory is in place.
    Filled(v1::FillResponse),
}

/// One call and all it needs.
#[expect(clippy::struct_excessive_bools, reason = "each is a wish of its own")]
pub(super) struct Job {
    pub(super) call: Call,
    pub(super) id: MigrationId,
    pub(super) container: String,
    pub(super) strategy: Strategy,
    /// By what the strategy is still to be chosen; none when it stands.
    pub(super) auto: Option<Auto>,
    pub(super) compress: bool,
    pub(super) downtime_budget_ms: f64,
    pub(super) bandwidth_limit: u64,
    pub(super) verify: bool,
    pub(super) throttle: bool,
    pub(super) grace_period_s: u32,
    pub(super) connections: Connections,
    pub(super) source: NodeName,
    pub(super) source_address: String,
    pub(super) target: NodeName,
    pub(super) target_address: String,
    /// The node to call and its agent's address.
    pub(super) node: NodeName,
    pub(super) address: String,
    pub(super) facts: Arc<v1::PreflightSourceResponse>,
    pub(super) survey: Arc<Survey>,
    /// The target takes connections to the pod's old address.
    pub(super) relays: bool,
    /// For an abort: why.
    pub(super) reason: String,
    pub(super) deadlines: Deadlines,
    pub(super) agents: Agents,
    /// The pod that moves, and what is done with it; none where there are no pods.
    pub(super) pod: Option<(Pods, PodMove)>,
    pub(super) inputs: mpsc::UnboundedSender<Input>,
}

impl Job {
    pub(super) fn new(call: Call, record: &Record, with: Surroundings) -> Self {
        let (node, address) = match call.side() {
            Side::Source => (&record.source, &record.source_address),
            Side::Target => (&record.target, &record.target_address),
        };
        Self {
            call,
            id: record.id,
            container: record.container.clone(),
            strategy: record.strategy,
            auto: record.auto.clone().filter(|_| record.chosen().is_none()),
            compress: record.compress,
            downtime_budget_ms: record.downtime_budget_ms,
            bandwidth_limit: record.bandwidth_limit,
            verify: record.verify,
            throttle: record.throttle,
            grace_period_s: record.grace_period_s,
            connections: record.connections,
            source: record.source.clone(),
            source_address: record.source_address.clone(),
            target: record.target.clone(),
            target_address: record.target_address.clone(),
            node: node.clone(),
            address: address.clone(),
            facts: with.facts,
            survey: with.survey,
            relays: with.relays,
            reason: record.state.failure().map(ToString::to_string).unwrap_or_default(),
            deadlines: with.deadlines,
            agents: with.agents,
            pod: with.pods.zip(record.pod.clone()),
            inputs: with.inputs,
        }
    }

    /// Waits `pause`, calls, and sends what comes of it to the driver.
    pub(super) async fn run(self, pause: Duration) {
        tokio::time::sleep(pause).await;
        let limit = self.deadlines.of_call(self.call, self.strategy.path());
        let answered = AssertUnwindSafe(timeout(limit, self.perform())).catch_unwind().await;
        let answer = match answered {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(self.late(limit)),
            Err(_) => Err(self.failure(FailureCode::Internal, "the coordinator's own code failed in this call")),
        };
        // Nobody waits for the end of a freeze that has told everything.
        if let Some(answer) = answer.transpose() {
            self.send(answer);
        }
    }

    fn send(&self, answer: Result<Answer, Failure>) {
        // A driver that is gone wants no answers.
        let _gone = self.inputs.send(Input::Answered { call: self.call, answer, at: Instant::now() });
    }

    fn late(&self, limit: Duration) -> Failure {
        let message = format!("the agent of node {} did not answer in {} s", self.node, limit.as_secs_f64());
        self.failure(FailureCode::DeadlineExceeded, message)
    }

    pub(super) fn failure(&self, code: FailureCode, message: impl Into<String>) -> Failure {
        Failure::new(code, message).on(self.node.as_str()).in_phase(phase_word(self.call))
    }

    /// `None`: there is nothing more to say than what has been sent already.
    async fn perform(&self) -> Result<Option<Answer>, Failure> {
        let client = self.agents.client(&self.node, &self.address)?;
        match self.call {
            Call::PreflightSource => match &self.auto {
                Some(auto) => self.survey_source(auto, client).await.map(Some),
                None => self.preflight_source(client).await.map(Some),
            },
            Call::PreflightTarget => match &self.auto {
                Some(auto) => self.choose(auto, client).await.map(Some),
                None => self.preflight_target(client).await.map(Some),
            },
            Call::Freeze => self.freeze(client).await.map(|()| None),
            Call::Prepare => self.prepare(client).await.map(Some),
            Call::Release => self.release(client).await.map(Some),
            Call::Resume => self.resume(client).await.map(Some),
            Call::Fill => self.fill(client).await.map(Some),
            _ => self.simple(client).await.map(Some).map_err(|status| self.placed(&status)),
        }
    }

    pub(super) fn placed(&self, status: &Status) -> Failure {
        placed(status, &self.node, &self.address, phase_word(self.call))
    }

    async fn preflight_source(&self, client: AgentClient) -> Result<Answer, Failure> {
        let node = self.agents.describe(&self.node, &self.address).await?;
        self.fit(&node)?;
        Ok(Answer::Source(self.ask_source(client, self.strategy).await??))
    }

    async fn preflight_target(&self, client: AgentClient) -> Result<Answer, Failure> {
        let node = self.agents.describe(&self.node, &self.address).await?;
        self.fit(&node)?;
        self.takes_volumes(&node, &self.facts)?;
        Ok(Answer::Target(self.ask_target(client, self.strategy, &self.facts).await??))
    }

    /// What the source says of a workload that moves in that way; the inner error is that it cannot be taken so.
    pub(super) async fn ask_source(
        &self,
        mut client: AgentClient,
        strategy: Strategy,
    ) -> Result<Result<Arc<v1::PreflightSourceResponse>, Failure>, Failure> {
        if self.pod.is_some() && strategy.starts_anew() {
            let failure = self.failure(FailureCode::FailedPrecondition, format!("{strategy} does not move pods yet"));
            return Ok(Err(failure.remedy("use live, warm, postcopy or hybrid")));
        }
        let request = v1::PreflightSourceRequest {
            migration_id: self.id.to_string(),
            workload: self.container.clone(),
            strategy: v1::Strategy::from(strategy).into(),
            look_at_tracking: self.auto.is_some(),
        };
        let answer = client.preflight_source(request).await.map_err(|status| self.placed(&status))?.into_inner();
        let refusal = self.refusal(&answer.findings, "the workload cannot be taken from this node");
        let refusal = refusal.or_else(|| self.losing_connections(strategy, &answer));
        Ok(refusal.map_or_else(|| Ok(Arc::new(answer)), Err))
    }

    /// Refuses a workload whose connections are to be kept and cannot be.
    fn losing_connections(&self, strategy: Strategy, facts: &v1::PreflightSourceResponse) -> Option<Failure> {
        let obstacle = self.connections.obstacle(strategy, facts)?;
        let failure = self.failure(FailureCode::FailedPrecondition, obstacle);
        Some(failure.remedy("let them be closed (--connections close), or kept where they can be (auto)"))
    }

    /// What the target says to such a workload in that way; the inner error is that it cannot take it so.
    pub(super) async fn ask_target(
        &self,
        mut client: AgentClient,
        strategy: Strategy,
        facts: &v1::PreflightSourceResponse,
    ) -> Result<Result<Vec<Finding>, Failure>, Failure> {
        let request = v1::PreflightTargetRequest {
            migration_id: self.id.to_string(),
            workload: self.container.clone(),
            memory_bytes: facts.memory_bytes,
            layer_bytes: facts.layer_bytes,
            network: facts.network,
            link: facts.link.clone(),
            strategy: v1::Strategy::from(strategy).into(),
            volumes: facts.volumes.clone(),
            charged_bytes: facts.charged_bytes,
            is_pod: self.pod.is_some(),
        };
        let answer = client.preflight_target(request).await.map_err(|status| self.placed(&status))?.into_inner();
        let refusal = self.refusal(&answer.findings, "the workload cannot be restored on this node");
        Ok(refusal.map_or(Ok(answer.findings), Err))
    }

    /// Whether that node can do its part. It may be another one than the one that was looked at before this migration was
    /// recorded: set up anew, or with an older agent.
    fn fit(&self, node: &v1::DescribeResponse) -> Result<(), Failure> {
        self.moves_pod(node)?;
        if self.strategy.finds_fit(node) {
            speaks(&self.node, node, self.needed_version())?;
            return self.knows(node);
        }
        let message = format!("node {} is not fit for migrations: {}", self.node, node.complaints.join("; "));
        Err(self.failure(FailureCode::FailedPrecondition, message).remedy("run `podferry check` on the node"))
    }

    fn moves_pod(&self, node: &v1::DescribeResponse) -> Result<(), Failure> {
        let Some((_, moved)) = &self.pod else { return Ok(()) };
        let says = |wanted: &str| node.features.iter().any(|word| word == wanted);
        let (what, remedy) = match (says(PODS_WORD), moved.keeps_name && !says(NAMES_WORD)) {
            (true, false) => return Ok(()),
            (true, true) => ("does not move pods that keep their names", "update it"),
            (false, _) => ("moves no pods", "write [kubernetes] into its agent.toml, or update it"),
        };
        let message = format!("the agent of node {} {what}", self.node);
        Err(self.failure(FailureCode::FailedPrecondition, message).remedy(remedy))
    }

    /// Agents of the same version may have learned it or not.
    fn knows(&self, node: &v1::DescribeResponse) -> Result<(), Failure> {
        if self.strategy.is_known_to(node) {
            return Ok(());
        }
        let (what, instead) = match self.strategy {
            Strategy::Cold => ("cold migrations", "warm"),
            Strategy::Application => ("application-level migrations", "live"),
            _ => ("post-copy", "live"),
        };
        let message = format!("the agent of node {} does not know {what}", self.node);
        Err(self.failure(FailureCode::Unimplemented, message).remedy(format!("update it, or use {instead}")))
    }

    /// One that does not know them would restore the container without.
    pub(super) fn takes_volumes(
        &self,
        node: &v1::DescribeResponse,
        facts: &v1::PreflightSourceResponse,
    ) -> Result<(), Failure> {
        let volumes = moving_volumes(facts);
        if volumes.is_empty() || node.features.iter().any(|word| word == VOLUMES_WORD) {
            return Ok(());
        }
        let names: Vec<_> = volumes.iter().map(|volume| volume.destination.as_str()).collect();
        let message = format!(
            "the workload has volumes ({}), and the agent of node {} does not know them",
            names.join(", "),
            self.node
        );
        Err(self.failure(FailureCode::Unimplemented, message).remedy("update it, or choose another target"))
    }

    fn needed_version(&self) -> u32 {
        let wishes = Wishes { strategy: self.strategy, bandwidth_limit: self.bandwidth_limit };
        match self.call.side() {
            Side::Source => wishes.of_source(),
            Side::Target => wishes.of_target(),
        }
    }

    /// All findings that refuse, as one failure.
    fn refusal(&self, findings: &[Finding], what: &str) -> Option<Failure> {
        let refusing: Vec<_> = findings.iter().filter(|finding| finding.refuses).collect();
        if refusing.is_empty() {
            return None;
        }
        let list: Vec<_> = refusing.iter().map(|finding| describe(finding)).collect();
        let mut remedies: Vec<_> = refusing.iter().map(|finding| finding.remedy.as_str()).collect();
        remedies.retain(|remedy| !remedy.is_empty());
        remedies.dedup();
        let failure = self.failure(FailureCode::FailedPrecondition, format!("{what}: {}", list.join("; ")));
        Some(if remedies.is_empty() { failure } else { failure.remedy(remedies.join("; ")) })
    }

    async fn freeze(&self, mut client: AgentClient) -> Result<(), Failure> {
        let request = v1::FreezeRequest {
            migration_id: self.id.to_string(),
            workload: self.container.clone(),
            target_node: self.target.to_string(),
            target_address: self.target_address.clone(),
            keep_connections: self.keeps_connections(),
            compress: self.compress,
            deadline_ms: self.part_deadline_ms(),
            pre_copy: self.pre_copy(),
            bandwidth_limit: self.bandwidth_limit,
            post_copy: self.strategy.path().post_copy,
            stop: self.stop(),
            take_over: self.take_over(),
            volumes: moving_volumes(&self.facts),
            relay: self.relays,
            relay_lifetime_s: self.connections.deadline_s,
        };
        let mut events = client.freeze(request).await.map_err(|status| self.placed(&status))?.into_inner();
        let (mut rounds, mut complete) = (0, false);
        while let Some(event) = events.message().await.map_err(|status| self.placed(&status))? {
            let at = Instant::now();
            let input = match event.event {
                Some(FreezeEvent::Frozen(frozen)) => Input::Frozen { frozen, at },
                Some(FreezeEvent::Progress(now)) => Input::Progress(now),
                Some(FreezeEvent::Transferred(sent)) => {
                    self.verified(&sent)?;
                    complete = true;
                    Input::Answered { call: self.call, answer: Ok(Answer::Transferred(sent)), at }
                }
                Some(FreezeEvent::Round(round)) => {
                    rounds += 1;
                    self.bounded(rounds)?;
                    Input::Round(round)
                }
                Some(FreezeEvent::Converged(converged)) => Input::Converged { converged, at },
                None => continue,
            };
            let _gone = self.inputs.send(input);
        }
        if complete {
            return Ok(());
        }
        Err(self.failure(FailureCode::Internal, "the source's agent ended the freeze without having sent everything"))
    }

    fn take_over(&self) -> Option<v1::TakeOver> {
        let grace_period_ms = u64::from(self.grace_period_s) * 1000;
        (self.strategy == Strategy::Application).then_some(v1::TakeOver { grace_period_ms })
    }

    fn stop(&self) -> Option<v1::Stop> {
        let grace_period_ms = u64::from(self.grace_period_s) * 1000;
        (self.strategy == Strategy::Cold).then_some(v1::Stop { grace_period_ms })
    }

    fn pre_copy(&self) -> Option<v1::PreCopy> {
        let downtime_budget_ms = budget_ms(self.downtime_budget_ms);
        let deadline_ms = whole_milliseconds(self.deadlines.precopy);
        let (max_rounds, verify, throttle) = (MAX_ROUNDS, self.verify, self.throttle);
        let asked = v1::PreCopy { downtime_budget_ms, max_rounds, deadline_ms, verify, throttle };
        self.strategy.path().pre_copy.then_some(asked)
    }

    /// Whoever asked for certainty is not to get a migration without it.
    fn verified(&self, sent: &v1::Transferred) -> Result<(), Failure> {
        if !self.verify || sent.verified.is_some() {
            return Ok(());
        }
        let message = "the source's agent did not compare the memory that was copied, although that was asked for";
        Err(self.failure(FailureCode::Unimplemented, message).remedy("update it, or migrate without verification"))
    }

    /// Rounds are kept with the migration: an agent that does not stop must not fill the store.
    fn bounded(&self, rounds: u32) -> Result<(), Failure> {
        if rounds <= MAX_ROUNDS {
            return Ok(());
        }
        let message = format!("the source's agent made more rounds of pre-copy than the {MAX_ROUNDS} that it may");
        Err(self.failure(FailureCode::Internal, message))
    }

    fn part_deadline_ms(&self) -> u64 {
        whole_milliseconds(self.deadlines.of_part(self.call, self.strategy.path()))
    }

    async fn simple(&self, mut client: AgentClient) -> Result<Answer, Status> {
        let migration_id = self.id.to_string();
        match self.call {
            Call::Restore => {
                let request = v1::RestoreRequest { migration_id, deadline_ms: self.part_deadline_ms() };
                let answer = client.restore(request).await?;
                return Ok(Answer::Restored(answer.into_inner().restore_ms));
            }
            Call::Seal(_) => {
                client.seal(v1::SealRequest { migration_id }).await?;
            }
            Call::Abort(_) => {
                client.abort(v1::AbortRequest { migration_id, reason: self.reason.clone() }).await?;
            }
            Call::PreflightSource
            | Call::PreflightTarget
            | Call::Prepare
            | Call::Freeze
            | Call::Release
            | Call::Resume
            | Call::Fill => {
                return Err(Status::internal("this call is not a simple one"));
            }
        }
        Ok(Answer::Done)
    }

    /// A pod's target is made first; the agent answers when its container waits for its restore.
    async fn prepare(&self, mut client: AgentClient) -> Result<Answer, Failure> {
        let Some((pods, moved)) = &self.pod else {
            let prepared = client.prepare(self.prepare_request(None)).await;
            return prepared.map_err(|status| self.placed(&status)).and_then(|answer| self.is_prepared(&answer));
        };
        let place = v1::PodPlace {
            namespace: moved.namespace.clone(),
            name: moved.target_name.clone(),
            uid: pods.make_target(self.id, &self.target, moved).await?,
            container: moved.container.clone(),
            stands_in: moved.keeps_name,
        };
        tokio::select! {
            prepared = client.prepare(self.prepare_request(Some(place))) => {
                prepared.map_err(|status| self.placed(&status)).and_then(|answer| self.is_prepared(&answer))
            }
            failure = pods.target_fails(moved) => Err(failure),
        }
    }

    /// The target may have nothing that carries connections.
    fn is_prepared(&self, answer: &tonic::Response<v1::PrepareResponse>) -> Result<Answer, Failure> {
        let relays = answer.get_ref().relays;
        if relays || self.keeps_connections() || self.connections.fate != Fate::Keep {
            return Ok(Answer::Prepared { relays });
        }
        let message = "its connections are to be kept, and the target has nothing that carries them";
        let failure = self.failure(FailureCode::FailedPrecondition, message.to_owned());
        Err(failure.remedy("see the log of the target's agent; or let them be closed (--connections close or auto)"))
    }

    fn prepare_request(&self, pod: Option<v1::PodPlace>) -> v1::PrepareRequest {
        let asks = self.strategy.path().post_copy || self.strategy == Strategy::Application;
        v1::PrepareRequest {
            source_address: if asks { self.source_address.clone() } else { String::new() },
            migration_id: self.id.to_string(),
            workload: self.container.clone(),
            source_node: self.source.to_string(),
            memory_bytes: self.facts.memory_bytes,
            layer_bytes: self.facts.layer_bytes,
            network: self.facts.network,
            link: self.facts.link.clone(),
            keep_connections: self.keeps_connections(),
            deadline_ms: self.part_deadline_ms(),
            cold: self.strategy.starts_anew(),
            application: self.strategy == Strategy::Application,
            pod,
            volumes: moving_volumes(&self.facts),
            relayed: self.connections.relayed(self.strategy, &self.facts),
        }
    }

    fn keeps_connections(&self) -> bool {
        self.connections.move_along(self.strategy, &self.facts)
    }
}

/// What a driver lends to its calls.
pub(super) struct Surroundings {
    pub(super) facts: Arc<v1::PreflightSourceResponse>,
    pub(super) survey: Arc<Survey>,
    pub(super) relays: bool,
    pub(super) deadlines: Deadlines,
    pub(super) agents: Agents,
    pub(super) pods: Option<Pods>,
    pub(super) inputs: mpsc::UnboundedSender<Input>,
}

/// Both sides are told the same, in the same order.
fn moving_volumes(facts: &v1::PreflightSourceResponse) -> Vec<v1::Volume> {
    facts.volumes.iter().filter(|volume| volume.shared_filesystem.is_empty()).cloned().collect()
}

/// A finding in one line.
pub(super) fn describe(finding: &Finding) -> String {
    let place = match (finding.pid, finding.fd) {
        (0, _) => String::new(),
        (pid, fd) if fd < 0 => format!(" (pid {pid})"),
        (pid, fd) => format!(" (pid {pid}, fd {fd})"),
    };
    format!("{}{place}: {}", finding.kind, finding.message)
}

fn whole_milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// The phase that a call belongs to, in the words of `timings`.
pub(super) fn phase_word(call: Call) -> &'static str {
    match call {
        Call::PreflightSource | Call::PreflightTarget => "preflight",
        Call::Prepare => "prepare",
        Call::Freeze => "freeze",
        Call::Restore => "restore",
        Call::Seal(_) => "commit",
        Call::Release => "release",
        Call::Resume => "resume",
        Call::Fill => "fill",
        Call::Abort(_) => "rolling_back",
    }
}
