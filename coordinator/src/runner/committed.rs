//! The two calls after the commit, which are repeated until they are confirmed; and what it means when an agent knows
//! nothing of its part any more: its journal was lost or cleared by hand, or the node was set up anew.

use podferry_common::{Failure, FailureCode};
use podferry_proto::v1::{self, Container};
use tonic::Status;

use super::calls::{Answer, Job};
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
        let request = v1::ResumeRequest { migration_id: self.id.to_string() };
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

    /// Whether the agent itself says that it has no such part. Its own failures name its node.
    fn is_forgotten(&self, status: &Status) -> bool {
        let failure = Failure::from_status(status);
        failure.code == FailureCode::NotFound && failure.node.as_deref() == Some(self.node.as_str())
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
