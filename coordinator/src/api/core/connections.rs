//! Connections that have outlived the move of their workload.

use jiff::Timestamp;
use podferry_common::{Failure, NodeName};
use podferry_proto::v1::{self, RelayEnd};

use super::{Core, blocking, internal};
use crate::cluster::relays;
use crate::store::Record;

/// The most connections that an answer names, of all workloads: with 128 bytes each they fit into a message.
const MOST_NAMED: usize = 16_384;

impl Core {
    /// What lives on of the connections that migrations took along, as the agents that answer see it; and the nodes whose agents do not.
    /// Those of one workload, and those that need one node, where they are named.
    pub async fn connections(&self, workload: &str, node: &str) -> Result<v1::ListConnectionsResponse, Failure> {
        if !workload.is_empty() {
            self.known_workload(workload)?;
        }
        if !node.is_empty() {
            self.known_node(node)?;
        }
        let (mut kept, mut silent_nodes) = (Vec::new(), Vec::new());
        for (name, said) in relays(&self.agents, self.inventory.nodes(), self.deadlines.survey).await {
            let Ok(ends) = said else {
                silent_nodes.push(name.to_string());
                continue;
            };
            for end in ends.into_iter().filter(|end| !end.is_home && !end.is_carried_on) {
                kept.push(self.kept(&name, end).await?);
            }
        }
        kept.retain(|one| workload.is_empty() || one.workload == workload);
        kept.retain(|one| node.is_empty() || one.node == node || one.home_node == node);
        kept.sort_by(|one, other| (&one.workload, &one.migration_id).cmp(&(&other.workload, &other.migration_id)));
        let mut room = MOST_NAMED;
        for one in &mut kept {
            one.some.truncate(room);
            room -= one.some.len();
        }
        Ok(v1::ListConnectionsResponse { kept, silent_nodes })
    }

    async fn kept(&self, node: &NodeName, end: RelayEnd) -> Result<v1::KeptConnections, Failure> {
        let record = match end.migration_id.parse() {
            Ok(id) => {
                let store = self.store.clone();
                blocking(move || store.get(id)).await.map_err(|error| internal(&error))?
            }
            Err(_no_id) => None,
        };
        Ok(v1::KeptConnections {
            workload: record.map(|record| name_now(&record)).unwrap_or_default(),
            migration_id: end.migration_id,
            home_node: end.peer_node,
            node: node.to_string(),
            addresses: end.addresses,
            since: time(end.since_unix_ms),
            until: time(end.until_unix_ms),
            connections: end.connections,
            some: end.some,
        })
    }

    /// How many pods that have moved away still have connections that need this node.
    ///
    /// # Errors
    /// When its agent does not answer.
    pub(crate) async fn homes_on(&self, name: &NodeName) -> Result<u32, Failure> {
        let node = self.known_node(name.as_str())?;
        let mut said = relays(&self.agents, [node], self.deadlines.survey).await;
        let ends = said.pop().map_or_else(|| Err(super::not_asked(node)), |(_, ends)| ends)?;
        Ok(u32::try_from(ends.iter().filter(|end| end.is_home).count()).unwrap_or(u32::MAX))
    }
}

/// The workload's name where it is now: pods change theirs when they move.
fn name_now(record: &Record) -> String {
    match &record.pod {
        Some(pod) if !pod.keeps_name => format!("{}/{}", pod.namespace, pod.target_name),
        _ => record.workload.to_string(),
    }
}

/// RFC 3339; empty for what is no time.
fn time(unix_ms: u64) -> String {
    let time = i64::try_from(unix_ms).ok().and_then(|ms| Timestamp::from_millisecond(ms).ok());
    time.filter(|_| unix_ms > 0).as_ref().map(ToString::to_string).unwrap_or_default()
}
