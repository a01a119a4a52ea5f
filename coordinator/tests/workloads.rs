//! What `ListWorkloads` says of nodes that are silent and of workloads that are on their way: a drain goes by it.

mod world;

use podferry_common::{Failure, FailureCode};
use podferry_proto::v1::{ListWorkloadsRequest, Phase, Workload};
use world::{Client, Copy, Fault, World, migrate, outcome};

async fn workloads(client: &mut Client, node: &str) -> Result<Vec<Workload>, Failure> {
    let answer = client.list_workloads(ListWorkloadsRequest { node: node.to_owned() }).await;
    Ok(answer.map_err(Failure::from)?.into_inner().workloads)
}

/// Name, node and migration of each.
fn places(workloads: &[Workload]) -> Vec<(&str, &str, &str)> {
    workloads.iter().map(|w| (w.name.as_str(), w.node.as_str(), w.migration_id.as_str())).collect()
}

#[tokio::test]
async fn a_silent_node_is_no_empty_one() {
    let mut world = World::new().await;
    let (_coordinator, mut client) = world.coordinator().await;
    world.stop_agent("a");
    let failure = workloads(&mut client, "a").await.unwrap_err();
    assert_eq!((failure.code, failure.node.as_deref()), (FailureCode::Unavailable, Some("a")), "{failure}");
    world.fault("b", "ListContainers", Fault::Hang, 1);
    let failure = workloads(&mut client, "b").await.unwrap_err();
    assert_eq!((failure.code, failure.node.as_deref()), (FailureCode::Unavailable, Some("b")), "{failure}");
    world.heal("b", "ListContainers");
    assert_eq!(workloads(&mut client, "b").await.unwrap(), [], "of others' silence it knows nothing");
    let all = workloads(&mut client, "").await.unwrap();
    assert_eq!(places(&all), [("redis", "", ""), ("shop", "", "")], "a list of all goes on without the silent");
}

#[tokio::test]
async fn what_is_on_its_way_is_on_both_nodes() {
    let world = World::new().await;
    let (_coordinator, mut client) = world.coordinator().await;
    for (node, method, copies, place) in [
        // First, as nothing has been committed yet that would say which of two copies counts.
        ("a", "Seal", (Some(Copy::Frozen), Some(Copy::Held)), "a"),
        ("a", "Transfer", (Some(Copy::Frozen), None), "a"),
        ("a", "Release", (Some(Copy::Frozen), Some(Copy::Held)), "b"),
        ("b", "Resume", (None, Some(Copy::Held)), "b"),
    ] {
        world.shared.lock().log.clear();
        world.fault(node, method, Fault::Hang, 1);
        let begun = migrate(&mut client, "shop", "b").await.unwrap();
        world.called(&format!("{node} {method}")).await;
        assert_eq!((world.copy("a", "cart"), world.copy("b", "cart")), copies, "{method}");
        let at_a = workloads(&mut client, "a").await.unwrap();
        assert_eq!(places(&at_a), [("redis", "a", ""), ("shop", place, begun.id.as_str())], "{method}");
        let at_b = workloads(&mut client, "b").await.unwrap();
        assert_eq!(places(&at_b), [("shop", place, begun.id.as_str())], "{method}");
        assert_eq!(workloads(&mut client, "c").await.unwrap(), [], "{method}");
        world.heal(node, method);
        if outcome(&mut client, &begun.id).await.phase() == Phase::Succeeded {
            let back = migrate(&mut client, "shop", "a").await.unwrap();
            assert_eq!(outcome(&mut client, &back.id).await.phase(), Phase::Succeeded);
        }
    }
    assert_eq!(places(&workloads(&mut client, "a").await.unwrap()), [("redis", "a", ""), ("shop", "a", "")]);
}
