//! What the agents say right now.

use std::time::Duration;

use futures::future::join_all;
use podferry_common::{Failure, FailureCode, NodeName};
use podferry_proto::v1::{Container, DescribeResponse, ListContainersRequest, ListRelaysRequest, RelayEnd};
use tokio::time::timeout;
use tonic::Code;

use super::{Agents, Node, Workload, placed};

/// What one agent says.
#[derive(Clone, Debug)]
pub struct Seen {
    /// The node.
    pub description: DescribeResponse,
    /// Its containers.
    pub containers: Vec<Container>,
}

/// A node and what its agent says, or why it says nothing.
#[derive(Clone, Debug)]
pub struct NodeView {
    /// The node of the inventory.
    pub node: Node,
    /// Its agent's words.
    pub seen: Result<Seen, Failure>,
}

/// Asks the agents of these nodes, all at once; none of them is waited for longer than `patience`.
pub async fn survey(agents: &Agents, nodes: impl IntoIterator<Item = &Node>, patience: Duration) -> Vec<NodeView> {
    let questions = nodes.into_iter().map(|node| async move {
        let seen = in_time(node, patience, look(agents, node)).await;
        NodeView { node: node.clone(), seen }
    });
    join_all(questions).await
}

/// Asks the agents of these nodes what they have of relays, in the same way. One that is from before relays has none.
pub async fn relays(
    agents: &Agents,
    nodes: impl IntoIterator<Item = &Node>,
    patience: Duration,
) -> Vec<(NodeName, Result<Vec<RelayEnd>, Failure>)> {
    let questions = nodes.into_iter().map(|node| async move {
        let ends = in_time(node, patience, ask_for_relays(agents, node)).await;
        (node.name.clone(), ends)
    });
    join_all(questions).await
}

async fn ask_for_relays(agents: &Agents, node: &Node) -> Result<Vec<RelayEnd>, Failure> {
    match agents.client(&node.name, &node.address)?.list_relays(ListRelaysRequest {}).await {
        Ok(answer) => Ok(answer.into_inner().ends),
        Err(status) if status.code() == Code::Unimplemented => Ok(Vec::new()),
        Err(status) => Err(placed(&status, &node.name, &node.address, "preflight")),
    }
}

async fn in_time<T>(
    node: &Node,
    patience: Duration,
    question: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    timeout(patience, question).await.unwrap_or_else(|_late| {
        let message = format!("the agent of node {} did not answer in {} s", node.name, patience.as_secs_f64());
        Err(Failure::new(FailureCode::Unavailable, message)
            .on(node.name.as_str())
            .remedy(format!("see that the agent of {} runs and can be reached at {}", node.name, node.address)))
    })
}

async fn look(agents: &Agents, node: &Node) -> Result<Seen, Failure> {
    let description = agents.describe(&node.name, &node.address).await?;
    let mut client = agents.client(&node.name, &node.address)?;
    let containers = client.list_containers(ListContainersRequest {}).await;
    let containers = containers.map_err(|status| placed(&status, &node.name, &node.address, "preflight"))?;
    Ok(Seen { description, containers: containers.into_inner().containers })
}

/// Where a workload is.
#[derive(Clone, Debug)]
pub struct Location<'a> {
    /// The node.
    pub view: &'a NodeView,
    /// What its agent says of the node.
    pub seen: &'a Seen,
    /// What its agent says of the container.
    pub container: &'a Container,
}

/// Finds the workload's container. A stopped one counts only to say so. `place` is where the last migration put it; it
/// decides when two nodes hold a container of that id, as during a migration.
pub fn locate<'a>(
    views: &'a [NodeView],
    workload: &Workload,
    place: Option<&NodeName>,
) -> Result<Location<'a>, Failure> {
    let mut alive = Vec::new();
    let mut stopped = Vec::new();
    for view in views {
        let Ok(seen) = &view.seen else { continue };
        let Some(container) = seen.containers.iter().find(|container| container.id == workload.container) else {
            continue;
        };
        let location = Location { view, seen, container };
        if container.status == "stopped" { stopped.push(location) } else { alive.push(location) }
    }
    if alive.len() > 1 {
        let placed = alive.iter().position(|location| Some(&location.view.node.name) == place);
        let nodes: Vec<_> = alive.iter().map(|location| location.view.node.name.to_string()).collect();
        return placed.map(|index| alive.swap_remove(index)).ok_or_else(|| ambiguous(workload, &nodes));
    }
    alive.pop().ok_or_else(|| nowhere(views, workload, &stopped))
}

fn ambiguous(workload: &Workload, nodes: &[String]) -> Failure {
    let (name, id) = (&workload.name, &workload.container);
    let message = format!("workload {name}: nodes {} each have a container {id:?}", nodes.join(" and "));
    Failure::new(FailureCode::FailedPrecondition, message)
        .remedy("delete the one that is not the workload, or give the inventory different container ids")
}

fn nowhere(views: &[NodeView], workload: &Workload, stopped: &[Location<'_>]) -> Failure {
    let (name, id) = (&workload.name, &workload.container);
    if let Some(location) = stopped.first() {
        let node = &location.view.node.name;
        let message = format!("workload {name}: its container {id:?} on node {node} is stopped");
        return Failure::new(FailureCode::FailedPrecondition, message).on(node.as_str()).remedy("start it");
    }
    let silent: Vec<_> = views.iter().filter_map(|view| view.seen.as_ref().err().map(ToString::to_string)).collect();
    if silent.is_empty() {
        let message = format!("workload {name}: no node has a container {id:?}");
        return Failure::new(FailureCode::NotFound, message)
            .remedy("start it, or correct its container id in the inventory");
    }
    let message = format!("workload {name}: no node that answers has a container {id:?} ({})", silent.join("; "));
    Failure::new(FailureCode::Unavailable, message).remedy("see that the agents of all nodes run")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::placement::{NodeTraits, WorkloadTraits};

    fn view(name: &str, status: Option<&str>) -> NodeView {
        let container = |status: &str| Container { id: "c1".into(), status: status.into(), ..Container::default() };
        NodeView {
            node: Node { name: name.parse().unwrap(), address: "127.0.0.1:1".into(), traits: NodeTraits::default() },
            seen: Ok(Seen {
                description: DescribeResponse::default(),
                containers: status.into_iter().map(container).collect(),
            }),
        }
    }

    fn silent(name: &str) -> NodeView {
        NodeView { seen: Err(Failure::new(FailureCode::Unavailable, "refused").on(name)), ..view(name, None) }
    }

    fn found(views: &[NodeView], place: Option<&str>) -> Result<String, Failure> {
        let workload = Workload {
            name: "cart".parse().unwrap(),
            container: "c1".into(),
            node: None,
            pod: None,
            traits: WorkloadTraits::default(),
        };
        let place = place.map(|place| place.parse().unwrap());
        locate(views, &workload, place.as_ref()).map(|location| location.view.node.name.to_string())
    }

    #[test]
    fn the_one_that_runs_is_found() {
        assert_eq!(found(&[view("a", None), view("b", Some("running")), silent("c")], Some("a")).unwrap(), "b");
        assert_eq!(found(&[view("a", Some("stopped")), view("b", Some("running"))], Some("a")).unwrap(), "b");
    }

    #[test]
    fn of_two_the_record_decides() {
        let both = [view("a", Some("running")), view("b", Some("running"))];
        assert_eq!(found(&both, Some("a")).unwrap(), "a");
        insta::assert_snapshot!(found(&both, None).unwrap_err(), @r#"
        workload cart: nodes a and b each have a container "c1"; what to do: delete the one that is not the workload, or give the inventory different container ids
        "#);
    }

    #[test]
    fn none_says_why() {
        insta::assert_snapshot!(found(&[view("a", Some("stopped")), view("b", None)], None).unwrap_err(), @r#"
        workload cart: its container "c1" on node a is stopped (on a); what to do: start it
        "#);
        insta::assert_snapshot!(found(&[view("a", None), silent("b")], None).unwrap_err(), @r#"
        workload cart: no node that answers has a container "c1" (refused (on b)); what to do: see that the agents of all nodes run
        "#);
        insta::assert_snapshot!(found(&[view("a", None)], None).unwrap_err(), @r#"
        workload cart: no node has a container "c1"; what to do: start it, or correct its container id in the inventory
        "#);
        assert_eq!(found(&[silent("b")], None).unwrap_err().code, FailureCode::Unavailable);
    }
}
