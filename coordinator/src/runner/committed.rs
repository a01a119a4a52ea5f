//! The calls after the commit, which are repeated until they are confirmed; and what it means when an agent knows
//! nothing of its part any more: its journal was lost or cleared by hand, or the node was set up anew.

use podferry_common::{Failure, FailureCode};
use podferry_proto::v1::{self, Container};
use tonic::Status;

use super::calls::{Answer, Job, phase_word};
use crate::cluster::AgentClient;

/// Where a person finds what to do.
const REMEDY: &str = "see \"An agent has lost its part\" in docs/operations.md";

impl Job {
    /// Destroys the source. It counts as destroyed, too, when its agent knows nothing of it and lists no live container of
    /// that id. Should there be one that the agent cannot see, it stands still: a sealed source runs on for an abort only,
    /// and this migration is committed.
    pub(super) async fn release(&self, mut client: AgentClient) -> Result<Answer, Failure> {
        let request = v1::ReleaseRequest { migration_id: self.id.to_string() };
        let Err(status) = client.release(request).await else { return Ok(Answer::Done) };
        if !self.is_forgotten(&status) {
            return Err(self.placed(&status));
        }
        let Some(copy) = self.live_copy(client).await? else {
            let (migration, node, container) = (self.id, &self.node, &self.container);
            tracing::warn!(%migration, %node, container, "the agent knows neither migration nor container: released");
            return Ok(Answer::Done);
        };
        let message = format!(
            "node {} knows nothing of this migration any more, and has a container {}, which may be the frozen source: \
             the target runs when it is gone",
            self.node,
            described(&copy)
        );
        Err(self.failure(FailureCode::FailedPrecondition, message).remedy(REMEDY))
    }

    /// Lets the target go. One whose agent knows nothing of it does not count as running, whatever it lists: runc calls a
    /// held container running too, and a workload that was held for ever would be lost when it is moved on.
    pub(super) async fn resume(&self, mut client: AgentClient) -> Result<Answer, Failure> {
        let request = v1::ResumeRequest { migration_id: self.id.to_string(), pod: self.named_pod().await? };
        let Err(status) = client.resume(request).await else { return Ok(Answer::Done) };
        if !self.is_forgotten(&status) {
            return Err(self.placed(&status));
        }
        let has = match self.live_copy(client).await? {
            Some(copy) => format!("has a container {}, which may still be held", described(&copy)),
            None => format!("has no container {:?}", self.container),
        };
        let message = format!("node {} knows nothing of this migration any more, and {has}", self.node);
        Err(self.failure(FailureCode::FailedPrecondition, message).remedy(REMEDY))
    }

    /// The pod in which the workload runs in the end, where that is another than the one that was prepared.
    async fn named_pod(&self) -> Result<Option<v1::PodPlace>, Failure> {
        let Some((pods, moved)) = self.pod.as_ref().filter(|(_, moved)| moved.keeps_name) else { return Ok(None) };
        let uid = pods.take_name(self.id, moved).await?;
        let (namespace, name, container) = (moved.namespace.clone(), moved.name.clone(), moved.container.clone());
        Ok(Some(v1::PodPlace { namespace, name, uid, container, stands_in: false }))
    }

    /// Waits until the target has all of its memory. A copy whose agent knows nothing of it may lack some, and the target's
    /// word that memory is lost ends the migration: neither is guessed, nor taken from anybody else.
    pub(super) async fn fill(&self, mut client: AgentClient) -> Result<Answer, Failure> {
        let request = v1::FillRequest { migration_id: self.id.to_string() };
        let status = match client.fill(request).await {
            Ok(filled) => return Ok(Answer::Filled(filled.into_inner())),
            Err(status) => status,
        };
        if self.is_forgotten(&status) {
            let message =
                format!("node {} knows nothing of this migration any more: its copy may lack memory", self.node);
            return Err(self.failure(FailureCode::FailedPrecondition, message).remedy(REMEDY));
        }
        let failure = self.placed(&status);
        Err(match failure.code {
            FailureCode::DataLoss if !self.is_its_own(&status) => Failure { code: FailureCode::Internal, ..failure },
            FailureCode::DataLoss => self.lost(failure),
            _ => failure,
        })
    }

    fn lost(&self, failure: Failure) -> Failure {
        let anew = format!("start the workload anew, on node {} or elsewhere: no copy of it runs", self.node);
        let remedy = failure.remedy.clone().unwrap_or(anew);
        failure.in_phase(phase_word(self.call)).remedy(remedy)
    }

    /// Whether the agent itself says that it has no such part. Its own failures name its node.
    fn is_forgotten(&self, status: &Status) -> bool {
        Failure::from_status(status).code == FailureCode::NotFound && self.is_its_own(status)
    }

    fn is_its_own(&self, status: &Status) -> bool {
        Failure::from_status(status).node.as_deref() == Some(self.node.as_str())
    }

    async fn live_copy(&self, mut client: AgentClient) -> Result<Option<Container>, Failure> {
        let listed = client.list_containers(v1::ListContainersRequest {}).await;
        let containers = listed.map_err(|status| self.placed(&status))?.into_inner().containers;
        let lives = |copy: &Container| copy.status != "stopped" || copy.processes > 0;
        Ok(containers.into_iter().find(|copy| copy.id == self.container && lives(copy)))
    }
}

fn described(copy: &Container) -> String {
    format!("{:?} ({}, {} processes)", copy.id, copy.status, copy.processes)
}
