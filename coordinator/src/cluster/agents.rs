//! Channels to the agents, each of which must prove to be the agent of its node.

use std::collections::HashMap;
use std::error::Error as _;
use std::sync::{Arc, Mutex, PoisonError};

use podferry_common::identity::{Identity, Peer};
use podferry_common::tls;
use podferry_common::{Failure, FailureCode, NodeName, chain};
use podferry_proto::v1::DescribeRequest;
use podferry_proto::v1::DescribeResponse;
use podferry_proto::v1::agent_service_client::AgentServiceClient;
use podferry_proto::{Version, VersionMismatch};
use tonic::Status;
use tonic::transport::Channel;

/// A client of one agent.
pub type AgentClient = AgentServiceClient<Channel>;

/// All agents. A channel dials when it is used, again when its connection broke, and always with the certificate that is
/// current then. Clones share the channels.
#[derive(Clone)]
pub struct Agents {
    identity: Identity,
    channels: Arc<Mutex<HashMap<(NodeName, String), Channel>>>,
}

impl Agents {
    /// No channels yet.
    pub fn new(identity: Identity) -> Self {
        Self { identity, channels: Arc::default() }
    }

    /// The agent of that node at that address. Must be called inside a tokio runtime.
    pub fn client(&self, node: &NodeName, address: &str) -> Result<AgentClient, Failure> {
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (node.clone(), address.to_owned());
        if let Some(channel) = channels.get(&key) {
            return Ok(AgentServiceClient::new(channel.clone()));
        }
        let channel = tls::connect_lazy(address, &self.identity, &Peer::Agent(node.clone())).map_err(|error| {
            let message = format!("the agent of node {node} cannot be reached: {}", chain(&error));
            Failure::new(FailureCode::Unavailable, message).on(node.as_str())
        })?;
        channels.insert(key, channel.clone());
        Ok(AgentServiceClient::new(channel))
    }

    /// The handshake: what the node is, if both sides speak a common version of the protocol.
    pub async fn describe(&self, node: &NodeName, address: &str) -> Result<DescribeResponse, Failure> {
        let mut client = self.client(node, address)?;
        let ours = Some(Version::OURS.into());
        let answer = client.describe(DescribeRequest { version: ours }).await;
        let description = answer.map_err(|status| placed(&status, node, address, "preflight"))?.into_inner();
        Version::OURS.agree(description.version.as_ref()).map_err(|mismatch| other_version(node, mismatch))?;
        Ok(description)
    }
}

fn other_version(node: &NodeName, mismatch: VersionMismatch) -> Failure {
    let message = format!("the agent of node {node} and this coordinator do not understand each other: {mismatch}");
    Failure::new(FailureCode::FailedPrecondition, message)
        .on(node.as_str())
        .in_phase("preflight")
        .remedy("install the same version on both, or neighbouring ones")
}

/// Whether the agent speaks that version of the protocol, or says a newer one.
pub fn speaks(node: &NodeName, description: &DescribeResponse, needed: u32) -> Result<(), Failure> {
    let current = spoken(description);
    if current >= needed {
        return Ok(());
    }
    let message = format!(
        "the agent of node {node} speaks version {current} of the protocol, and what this migration asks for needs version \
         {needed}"
    );
    Err(Failure::new(FailureCode::FailedPrecondition, message)
        .on(node.as_str())
        .in_phase("preflight")
        .remedy(OLD_AGENT))
}

/// What to do about an agent that is too old for a wish.
pub const OLD_AGENT: &str = "update the agent, or migrate warm and without a limit on the bandwidth";

/// The newest version that the agent says it speaks.
pub fn spoken(description: &DescribeResponse) -> u32 {
    description.version.map_or(0, |version| version.current)
}

/// A failed call as a failure that says where and when it failed and, for an agent that is not there, what to do.
pub fn placed(status: &Status, node: &NodeName, address: &str, phase: &str) -> Failure {
    let mut failure = Failure::from_status(status);
    // A status with a cause was made on this side: the connection broke, whatever code the library has for the way it did.
    if status.source().is_some() {
        failure.code = FailureCode::Unavailable;
    }
    // An agent signs its own failures: one that says that its peer is gone is there itself.
    let answered = status.source().is_none() && failure.node.is_some();
    failure.node.get_or_insert_with(|| node.to_string());
    failure.phase.get_or_insert_with(|| phase.to_owned());
    if failure.code == FailureCode::Unavailable && failure.remedy.is_none() && !answered {
        failure.message = format!("the agent of node {node} cannot be reached: {}", failure.message);
        failure.remedy = Some(format!("see that the agent of {node} runs and can be reached at {address}"));
    }
    failure
}
