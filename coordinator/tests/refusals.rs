//! What the coordinator refuses, and how it says so.

mod world;

use podferry_common::identity::{LocalCa, Peer};
use podferry_common::tls;
use podferry_common::{Failure, FailureCode, MigrationId};
use podferry_proto::v1::coordinator_service_client::CoordinatorServiceClient;
use podferry_proto::v1::{self, ProtocolVersion};
use tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
use world::{Copy, Fault, World, migrate, outcome};

#[tokio::test]
async fn requests_that_cannot_be_served_say_why() {
    let mut world = World::new().await;
    let (_coordinator, mut client) = world.coordinator().await;
    let mut said = Vec::new();
    let mut refused = async |workload: &str, target: &str| {
        let failure = migrate(&mut client, workload, target).await.unwrap_err();
        said.push(format!("{} {failure}", failure.code));
    };
    refused("nothing", "b").await;
    refused("shop", "nowhere").await;
    refused("shop", "a").await;
    world.node("b", |node| {
        node.description.fit = false;
        node.description.complaints = vec!["no CRIU was found".to_owned()];
    });
    refused("shop", "b").await;
    world.node("b", |node| (node.description.fit, node.description.architecture) = (true, "aarch64".to_owned()));
    refused("shop", "b").await;
    world.node("b", |node| {
        node.description.architecture = "x86_64".to_owned();
        node.description.cpu_features = vec!["sse2".to_owned()];
    });
    refused("shop", "b").await;
    world.node("b", |node| {
        node.description.cpu_features = vec!["sse2".to_owned(), "avx2".to_owned()];
        node.description.images_free = 1 << 20;
    });
    refused("shop", "b").await;
    world.node("b", |node| {
        node.description.images_free = 4 << 30;
        node.description.version = Some(ProtocolVersion { current: 9, oldest: 8 });
    });
    refused("shop", "b").await;
    world.node("b", |node| node.description.version = Some(podferry_proto::Version::OURS.into()));
    world.node("a", |node| node.containers.remove("redis"));
    refused("redis", "c").await;
    insta::assert_snapshot!(said.join("\n"), @r#"
    NOT_FOUND there is no workload "nothing" in the inventory; what to do: name one of: redis, shop
    NOT_FOUND there is no node "nowhere" in the inventory; what to do: name one of: a, b, c
    INVALID_ARGUMENT node a cannot take the workload: the workload runs there already (on a, in preflight); what to do: name another node, or none
    FAILED_PRECONDITION node b cannot take the workload: it is not fit: no CRIU was found (on b, in preflight); what to do: run `podferry check` on the node
    FAILED_PRECONDITION node b cannot take the workload: its architecture is aarch64, not x86_64 (on b, in preflight); what to do: name a node of the same architecture
    FAILED_PRECONDITION node b cannot take the workload: its CPU lacks avx2 (on b, in preflight); what to do: name a node whose CPU has all features of the source's
    RESOURCE_EXHAUSTED node b cannot take the workload: 128 MiB are needed for images, 1 MiB are free (on b, in preflight); what to do: name a node with more free memory
    FAILED_PRECONDITION the agent of node b and this coordinator do not understand each other: no common protocol version: this side speaks 1 to 2, the other 8 to 9; update the older one (on b, in preflight); what to do: install the same version on both, or neighbouring ones
    NOT_FOUND workload redis: no node has a container "redis"; what to do: start it, or correct its container id in the inventory
    "#);
    world.stop_agent("c");
    let gone = migrate(&mut client, "shop", "c").await.unwrap_err();
    assert_eq!((gone.code, gone.node.as_deref()), (FailureCode::Unavailable, Some("c")), "{gone}");
    assert_eq!(world.calls(), Vec::<String>::new(), "nothing was touched");
    let recorded = client.list_migrations(v1::ListMigrationsRequest::default()).await.unwrap().into_inner();
    assert!(recorded.migrations.is_empty(), "nothing was recorded");
    assert_eq!(world.copy("a", "cart"), Some(Copy::Running));
}

#[tokio::test]
async fn a_node_takes_part_in_as_many_as_it_may() {
    let world = World::new().await;
    let config = std::fs::read_to_string(world.configuration()).unwrap();
    std::fs::write(world.configuration(), format!("migrations_per_node = 1\n{config}")).unwrap();
    let (_coordinator, mut client) = world.coordinator().await;
    world.fault("b", "Prepare", Fault::Hang, 1);
    let first = migrate(&mut client, "shop", "b").await.unwrap();
    world.called("b Prepare").await;
    let second = migrate(&mut client, "redis", "c").await.unwrap_err();
    assert_eq!((second.code, second.node.as_deref()), (FailureCode::ResourceExhausted, Some("a")), "{second}");
    world.heal("b", "Prepare");
    assert_eq!(outcome(&mut client, &first.id).await.phase(), v1::Phase::Succeeded);
    let third = migrate(&mut client, "redis", "c").await.unwrap();
    assert_eq!(outcome(&mut client, &third.id).await.phase(), v1::Phase::Succeeded);
}

#[tokio::test]
async fn each_caller_may_do_its_own() {
    let world = World::new().await;
    let (coordinator, mut client) = world.coordinator().await;
    let mut agent = world.client(&coordinator, &Peer::Agent("a".parse().unwrap())).await;
    let mut impostor = world.client(&coordinator, &Peer::Coordinator).await;
    let hello = v1::HelloRequest { version: Some(podferry_proto::Version::OURS.into()) };
    client.hello(hello).await.unwrap();
    agent.hello(hello).await.unwrap();
    let id = MigrationId::new().to_string();
    let question = || v1::GetDecisionRequest { migration_id: id.clone() };
    let unknown = agent.get_decision(question()).await.unwrap().into_inner();
    assert_eq!(unknown.decision(), v1::Decision::Undecided, "a record that was lost may have been a commit");
    let nonsense = v1::GetDecisionRequest { migration_id: "../x".to_owned() };
    assert_eq!(agent.get_decision(nonsense).await.unwrap_err().code(), Code::InvalidArgument);
    let denied = [
        client.get_decision(question()).await.unwrap_err(),
        agent.migrate(v1::MigrateRequest::default()).await.unwrap_err(),
        agent.list_nodes(v1::ListNodesRequest {}).await.unwrap_err(),
        agent.cancel_migration(v1::CancelMigrationRequest { id: id.clone() }).await.unwrap_err(),
        impostor.hello(hello).await.unwrap_err(),
        impostor.get_decision(question()).await.unwrap_err(),
    ];
    assert!(denied.iter().all(|status| status.code() == Code::PermissionDenied), "{denied:?}");

    let old = v1::HelloRequest { version: Some(ProtocolVersion { current: 9, oldest: 9 }) };
    let failure = Failure::from(client.hello(old).await.unwrap_err());
    assert_eq!(failure.code, FailureCode::FailedPrecondition);
    let missing = client.get_migration(v1::GetMigrationRequest { id }).await.unwrap_err();
    assert_eq!(missing.code(), Code::NotFound);
}

#[tokio::test]
async fn a_stranger_gets_no_answer() {
    let world = World::new().await;
    let (coordinator, _client) = world.coordinator().await;
    let folder = tempfile::tempdir().unwrap();
    let other = LocalCa::create(folder.path()).unwrap();
    let files = podferry_common::identity::IdentityFiles::in_folder(folder.path().join("me"));
    other.issue(&Peer::client("mallory").unwrap(), std::time::Duration::from_secs(3600), &files).unwrap();
    // The stranger trusts the coordinator; it is the coordinator that does not trust the stranger.
    let ca = world.identity(&Peer::client("tester").unwrap()).files().ca.clone();
    std::fs::copy(ca, &files.ca).unwrap();
    let mallory = podferry_common::identity::Identity::load(files).unwrap();
    let channel = tls::connect_lazy(&coordinator.address, &mallory, &Peer::Coordinator).unwrap();
    let mut client = CoordinatorServiceClient::new(channel);
    client.list_nodes(v1::ListNodesRequest {}).await.unwrap_err();
    let refused = |line: &String| line.contains("connection refused") && line.contains("handshake");
    coordinator.said(refused).await;
}

#[tokio::test]
async fn nodes_health_and_reflection() {
    let mut world = World::new().await;
    let (coordinator, mut client) = world.coordinator().await;
    world.stop_agent("c");
    let nodes = client.list_nodes(v1::ListNodesRequest {}).await.unwrap().into_inner().nodes;
    let seen: Vec<_> =
        nodes.iter().map(|node| (node.name.as_str(), node.reachable, node.workloads.join(" "))).collect();
    assert_eq!(seen, [("a", true, "redis shop".to_owned()), ("b", true, String::new()), ("c", false, String::new())]);
    assert!(nodes[2].complaints[0].contains("the agent of node c cannot be reached"), "{:?}", nodes[2].complaints);
    let identity = world.identity(&Peer::client("tester").unwrap());
    let channel = tls::connect(&coordinator.address, &identity, &Peer::Coordinator).await.unwrap();
    let mut health = HealthClient::new(channel.clone());
    let service = "podferry.v1.CoordinatorService".to_owned();
    let answer = health.check(tonic_health::pb::HealthCheckRequest { service }).await.unwrap().into_inner();
    assert_eq!(answer.status(), ServingStatus::Serving);
    let question = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut reflection = ServerReflectionClient::new(channel);
    let mut answers = reflection.server_reflection_info(futures::stream::iter([question])).await.unwrap().into_inner();
    let Some(MessageResponse::ListServicesResponse(list)) = answers.message().await.unwrap().unwrap().message_response
    else {
        panic!("reflection does not list the services")
    };
    assert!(list.service.iter().any(|service| service.name == "podferry.v1.CoordinatorService"), "{list:?}");
}

#[tokio::test]
async fn an_edited_inventory_counts_and_a_broken_one_does_not() {
    let world = World::new().await;
    let (coordinator, mut client) = world.coordinator().await;
    let path = world.folder.path().join("inventory.toml");
    let old = std::fs::read_to_string(&path).unwrap();
    world.node("a", |node| node.containers.insert("late".to_owned(), Copy::Running));
    assert_eq!(migrate(&mut client, "late", "b").await.unwrap_err().code, FailureCode::NotFound);
    std::fs::write(&path, format!("{old}\n[[workloads]]\nname = \"late\"\n")).unwrap();
    let accepted = migrate(&mut client, "late", "b").await.unwrap();
    assert_eq!(outcome(&mut client, &accepted.id).await.phase(), v1::Phase::Succeeded);
    std::fs::write(&path, "[[workloads]]\nname = \"LATE\"\n").unwrap();
    let back = migrate(&mut client, "late", "a").await.unwrap();
    assert_eq!(outcome(&mut client, &back.id).await.phase(), v1::Phase::Succeeded);
    let said = |line: &String| line.contains("the old one stays") && line.contains("inventory.toml:2:8");
    coordinator.said(said).await;
}
