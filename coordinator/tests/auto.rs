//! Migrations whose strategy the coordinator chooses in preflight, through the real coordinator.
#![expect(clippy::unwrap_used, reason = "a panic is the report")]

mod world;

use podferry_common::{Failure, FailureCode};
use podferry_proto::v1::{self, Decision, Phase, Strategy};
use world::{Client, Copy, Fault, World, outcome, request, watch};

fn auto() -> v1::MigrateRequest {
    let (workload, target) = ("shop".to_owned(), "b".to_owned());
    v1::MigrateRequest { workload, target, strategy: Strategy::Auto.into(), ..Default::default() }
}

fn back(request: v1::MigrateRequest) -> v1::MigrateRequest {
    v1::MigrateRequest { target: "a".to_owned(), ..request }
}

async fn moved(client: &mut Client, wanted: v1::MigrateRequest) -> v1::Migration {
    let accepted = request(client, wanted).await.unwrap();
    let end = outcome(client, &accepted.id).await;
    assert_eq!((end.phase(), end.decision()), (Phase::Succeeded, Decision::Commit), "{end:?}");
    end
}

fn knows(world: &World, words: &[&str]) {
    for node in ["a", "b", "c"] {
        world.node(node, |node| node.description.features = words.iter().map(ToString::to_string).collect());
    }
}

fn follows(world: &World, followed_mib: u64, left_mib: u64) {
    let reasons = vec!["process 7 uses io_uring".to_owned()];
    let (followed_bytes, left_bytes) = (followed_mib << 20, left_mib << 20);
    let tracking = v1::Tracking { followed_bytes, left_bytes, tracker: "userfaultfd".to_owned(), reasons };
    world.shared.lock().tracking = Some(tracking);
}

fn unfit(world: &World, node: &str) {
    world.node(node, |node| {
        (node.description.fit, node.description.complaints) = (false, vec!["no CRIU was found".to_owned()]);
    });
}

fn finding(refuses: bool, kind: &str) -> v1::Finding {
    let (kind, message, remedy) = (kind.to_owned(), "it lacks uffd".to_owned(), "choose another target".to_owned());
    v1::Finding { refuses, kind, message, remedy, fd: -1, ..Default::default() }
}

fn assert_untouched(world: &World) {
    let copies = (world.copy("a", "cart"), world.copy("b", "cart"));
    assert_eq!(copies, (Some(Copy::Running), None), "{:?}", world.calls());
}

#[tokio::test]
async fn what_preflight_sees_decides_and_agents_are_told_only_what_was_chosen() {
    let world = World::new().await;
    let (_coordinator, mut client) = world.coordinator().await;
    follows(&world, 64, 0);
    let accepted = request(&mut client, auto()).await.unwrap();
    assert_eq!((accepted.strategy(), accepted.strategy_reason.as_str()), (Strategy::Unspecified, ""));
    let seen = watch(&mut client, &accepted.id).await;
    let chosen = |migration: &&v1::Migration| migration.phase() != Phase::Preflight;
    assert!(seen.iter().filter(chosen).all(|migration| migration.strategy() == Strategy::Live), "{seen:?}");
    let live = seen.last().unwrap();
    assert_eq!((live.phase(), live.rounds.len()), (Phase::Succeeded, 3), "{live:?}");
    assert!(world.shared.lock().freezes[0].pre_copy.is_some());
    assert_eq!(world.shared.lock().asked, [("a".to_owned(), Strategy::Warm), ("b".to_owned(), Strategy::Live)]);

    follows(&world, 0, 64);
    let warm = moved(&mut client, back(auto())).await;
    assert_eq!((warm.strategy(), warm.rounds.len()), (Strategy::Warm, 1));
    assert_eq!(world.shared.lock().freezes[1].pre_copy, None);
    assert_eq!(world.shared.lock().asked[3], ("a".to_owned(), Strategy::Warm));
    insta::assert_snapshot!(format!("{}\n{}", live.strategy_reason, warm.strategy_reason), @r#"
    live: 64.0 MiB of 64.0 MiB can be copied while it runs (writes are followed by userfaultfd); without that it would stand still for about 430 ms, with 100 ms aimed at. Not hybrid, postcopy: the agent of node a does not know post-copy; cold: the agent of node a does not know cold migrations, or its node lacks what they need
    warm: writes to 64.0 MiB of its memory cannot be followed (process 7 uses io_uring); it stands still for about 430 ms. Not hybrid, postcopy: the agent of node b does not know post-copy; cold: the agent of node b does not know cold migrations, or its node lacks what they need
    "#);

    // A list has the beginning of it, and what was asked for by name needs no reason.
    let listed = client.list_migrations(v1::ListMigrationsRequest::default()).await.unwrap().into_inner().migrations;
    assert!(listed.iter().all(|one| one.strategy_reason.len() <= 160 && !one.strategy_reason.is_empty()), "{listed:?}");
    let asked = v1::MigrateRequest { strategy: Strategy::Warm.into(), ..auto() };
    assert_eq!(moved(&mut client, asked).await.strategy_reason, "");
}

#[tokio::test]
async fn what_the_target_refuses_is_not_chosen() {
    let world = World::new().await;
    let (_coordinator, mut client) = world.coordinator().await;
    world.fault("b", "PreflightTarget", Fault::Find(finding(true, "lazy-pages")), 1);
    let end = moved(&mut client, auto()).await;
    assert_eq!(end.strategy(), Strategy::Warm);
    assert!(end.strategy_reason.contains("live: the workload cannot be restored on this node: lazy-pages"), "{end:?}");

    world.fault("a", "PreflightTarget", Fault::Find(finding(true, "no-bundle")), 2);
    let accepted = request(&mut client, back(auto())).await.unwrap();
    let end = outcome(&mut client, &accepted.id).await;
    assert_eq!((end.phase(), end.strategy(), end.strategy_reason.as_str()), (Phase::Failed, Strategy::Unspecified, ""));
    insta::assert_snapshot!(end.reason, @r#"no strategy can move the workload: live, warm: the workload cannot be restored on this node: no-bundle: it lacks uffd; hybrid, postcopy: the agent of node b does not know post-copy; cold: the agent of node b does not know cold migrations, or its node lacks what they need (on a, in preflight); what to do: choose another target"#);
    assert_eq!(world.copy("b", "cart"), Some(Copy::Running));
}

#[tokio::test]
async fn a_loss_is_risked_only_by_those_who_accept_it() {
    let world = World::new().await;
    knows(&world, &["agent:post_copy", "agent:cold"]);
    let (_coordinator, mut client) = world.coordinator().await;
    follows(&world, 64, 0);
    let live = moved(&mut client, v1::MigrateRequest { downtime_budget_ms: 2.0, ..auto() }).await;
    assert_eq!(live.strategy(), Strategy::Live);
    // Its rounds ended at 4.5 ms, which is more than was aimed at.
    let accepting = v1::MigrateRequest { accept_loss: true, downtime_budget_ms: 2.0, ..auto() };
    let hybrid = moved(&mut client, back(accepting.clone())).await;
    assert_eq!(hybrid.strategy(), Strategy::Hybrid);
    let calls = world.calls();
    let place = |call: &str| calls.iter().rposition(|other| other == call).unwrap();
    assert!(place("a Resume") < place("a Fill") && place("a Fill") < place("b Release"), "{calls:?}");
    assert!(world.shared.lock().freezes[1].post_copy);
    let hopeful = moved(&mut client, v1::MigrateRequest { downtime_budget_ms: 50.0, ..accepting.clone() }).await;
    assert_eq!(hopeful.strategy(), Strategy::Live, "{}", hopeful.strategy_reason);
    follows(&world, 0, 64);
    let fetched = moved(&mut client, back(accepting)).await;
    assert_eq!((fetched.strategy(), fetched.rounds.len()), (Strategy::Postcopy, 1), "{}", fetched.strategy_reason);
}

#[tokio::test]
async fn a_restart_is_for_those_who_allow_it_and_for_when_nothing_else_can() {
    let world = World::new().await;
    knows(&world, &["agent:cold"]);
    let (_coordinator, mut client) = world.coordinator().await;
    let restartable = v1::MigrateRequest { allow_restart: true, grace_period_s: Some(7), ..auto() };
    let live = moved(&mut client, restartable.clone()).await;
    assert_eq!((live.strategy(), world.shared.lock().freezes[0].stop), (Strategy::Live, None));
    assert_eq!(world.shared.lock().freezes[0].deadline_ms, 5000, "nobody is waited for who does not end");

    unfit(&world, "a");
    let refused = request(&mut client, back(auto())).await.unwrap_err();
    assert!(refused.message.contains("no CRIU was found"), "{refused}");
    let cold = moved(&mut client, back(restartable.clone())).await;
    assert_eq!((cold.strategy(), cold.keeps_connections), (Strategy::Cold, false));
    assert!(cold.notes.iter().any(|note| note.starts_with("3 established TCP connections are closed")), "{cold:?}");
    assert_eq!(world.shared.lock().freezes[1].stop, Some(v1::Stop { grace_period_ms: 7000 }));
    insta::assert_snapshot!(cold.strategy_reason, @r#"cold: nothing else can work, and a restart is allowed: memory is lost and connections are closed. Not live, hybrid, postcopy, warm: node a cannot take the workload: it is not fit: no CRIU was found"#);
    world.node("a", |node| node.description.fit = true);

    world.node("b", |node| node.description.cpu_features = vec!["sse2".to_owned()]);
    let cold = moved(&mut client, restartable.clone()).await;
    assert!(cold.strategy() == Strategy::Cold && cold.strategy_reason.contains("its CPU lacks avx2"), "{cold:?}");
    world.node("b", |node| node.description.cpu_features.push("avx2".to_owned()));

    world.fault("b", "PreflightSource", Fault::Find(finding(true, "io-uring")), 1);
    let accepted = request(&mut client, back(auto())).await.unwrap();
    let end = outcome(&mut client, &accepted.id).await;
    assert!(end.reason.contains("io-uring") && end.reason.contains("--allow-restart"), "{}", end.reason);
    world.fault("b", "PreflightSource", Fault::Find(finding(true, "io-uring")), 1);
    let cold = moved(&mut client, back(restartable)).await;
    assert!(cold.strategy() == Strategy::Cold && cold.strategy_reason.contains("io-uring"), "{cold:?}");

    let named = v1::MigrateRequest { allow_restart: true, strategy: Strategy::Live.into(), ..auto() };
    let stopped = v1::MigrateRequest { grace_period_s: Some(7), ..auto() };
    let refused = [request(&mut client, named).await, request(&mut client, stopped).await].map(Result::unwrap_err);
    insta::assert_snapshot!(refused.map(|failure| format!("{} {failure}", failure.code)).join("\n"), @r#"
    INVALID_ARGUMENT the strategy live does not restart the workload, whatever is allowed (in preflight); what to do: use auto, or cold, or do not allow a restart
    INVALID_ARGUMENT no workload is stopped unless that is allowed (in preflight); what to do: give no grace period, or --allow-restart
    "#);
}

#[tokio::test]
async fn a_choice_is_on_disk_before_anything_is_prepared_and_outlives_the_coordinator() {
    let world = World::new().await;
    let (coordinator, mut client) = world.coordinator().await;
    world.fault("b", "Prepare", Fault::Hang, 1);
    let chosen = request(&mut client, auto()).await.unwrap();
    world.called("b Prepare").await;
    coordinator.kill().await;
    let (coordinator, mut client) = world.coordinator().await;
    let end = outcome(&mut client, &chosen.id).await;
    assert_eq!(
        (end.phase(), end.strategy(), end.decision()),
        (Phase::Failed, Strategy::Live, Decision::Abort),
        "{end:?}"
    );
    assert!(end.strategy_reason.starts_with("live: ") && end.reason.contains("was restarted"), "{end:?}");
    world.heal("b", "Prepare");
    assert_untouched(&world);

    // What was committed goes on along the path of what was chosen: a live migration fills.
    world.fault("b", "Fill", Fault::Hang, 1);
    let chosen = request(&mut client, auto()).await.unwrap();
    world.called("b Fill").await;
    coordinator.kill().await;
    world.heal("b", "Fill");
    let (coordinator, mut client) = world.coordinator().await;
    let end = outcome(&mut client, &chosen.id).await;
    assert_eq!((end.phase(), end.strategy()), (Phase::Succeeded, Strategy::Live), "{end:?}");
    assert!(end.timings.unwrap().fill > 0.0 && end.strategy_reason.starts_with("live: "), "{end:?}");

    // A coordinator that dies before has chosen nothing, and touched nothing.
    world.fault("a", "PreflightTarget", Fault::Hang, 1);
    let unchosen = request(&mut client, back(auto())).await.unwrap();
    world.called("a PreflightTarget").await;
    coordinator.kill().await;
    world.heal("a", "PreflightTarget");
    let (_coordinator, mut client) = world.coordinator().await;
    let end = outcome(&mut client, &unchosen.id).await;
    assert_eq!((end.phase(), end.strategy()), (Phase::Failed, Strategy::Unspecified), "{end:?}");
    assert_eq!((world.copy("a", "cart"), world.copy("b", "cart")), (None, Some(Copy::Running)));
}

#[tokio::test]
async fn rounds_that_do_not_converge_end_before_the_freeze_and_name_the_options() {
    let world = World::new().await;
    let (_coordinator, mut client) = world.coordinator().await;
    let gives_up = Failure::new(FailureCode::FailedPrecondition, "after 3 rounds the processes still write 90.0 MiB/s");
    world.fault("a", "PreCopy", Fault::Fail(gives_up), 1);
    let wanted = v1::MigrateRequest { downtime_budget_ms: 40.0, ..auto() };
    let accepted = request(&mut client, wanted.clone()).await.unwrap();
    let end = outcome(&mut client, &accepted.id).await;
    assert_eq!((end.phase(), end.problem.as_ref().unwrap().phase.as_str()), (Phase::Failed, "precopy"), "{end:?}");
    let remedy = end.problem.unwrap().remedy;
    for option in ["--downtime-budget", "--throttle", "--strategy warm", "--accept-loss"] {
        assert!(remedy.contains(option), "{option} is missing in {remedy}");
    }
    assert_untouched(&world);
    // The next one knows of it, and a person is told.
    let again = moved(&mut client, wanted).await;
    assert!(again.strategy_reason.contains("may not be reached: the last migration had 90 ms left"), "{again:?}");
}

#[tokio::test]
async fn old_agents_move_warm() {
    let world = World::new().await;
    for node in ["a", "b", "c"] {
        world.node(node, |node| {
            node.description.version = Some(v1::ProtocolVersion { current: 1, oldest: 1 });
        });
    }
    let (_coordinator, mut client) = world.coordinator().await;
    let end = moved(&mut client, v1::MigrateRequest { accept_loss: true, ..auto() }).await;
    assert_eq!(end.strategy(), Strategy::Warm);
    assert!(end.strategy_reason.contains("the agent of node a speaks version 1 of the protocol, not 2"), "{end:?}");
}
