//! Whatever is killed or cut off while a container runs that still fetches memory: nothing of it is lost that is not said.

#![allow(clippy::unwrap_used, reason = "a helper that fails has to fail its test")]

mod faults;

use std::fs::OpenOptions;
use std::io::Write as _;
use std::thread;
use std::time::Duration;

use faults::cases;
use faults::moments::{MEMORY, Moment, Victim, halt_at};
use faults::stage::{NAME, NODES, PROGRAM, Stage, Strategy};
use faults::{processes, sampler, serial, wait_for};
use podferry_common::identity::Peer;
use podferry_common::{MigrationId, tls};
use podferry_local::Signal;
use podferry_proto::v1::fetch_request::Kind;
use podferry_proto::v1::fetch_service_client::FetchServiceClient;
use podferry_proto::v1::{FetchBegin, FetchPages, FetchRequest};
use tonic::Code;

#[test]
fn whoever_has_a_part_in_it_may_be_killed_in_a_post_copy() {
    use Moment::{Fill, Sealed};
    cases::run(
        Strategy::Postcopy,
        &[
            (Victim::SourceAgent, &[Sealed, Fill]),
            (Victim::TargetAgent, &[Sealed, Fill]),
            (Victim::Coordinator, &[Fill]),
            (Victim::DumpWorker, &[Fill]),
            (Victim::FirstPager, &[Fill]),
        ],
    );
}

/// Asks a node for pages that it keeps for another; gives how it refuses.
fn fetch(stage: &Stage, peer: &Peer, folder: &str, id: &str, pages: FetchPages) -> tonic::Status {
    let source = stage.source();
    let identity = stage.identity(peer, folder);
    let address = format!("{}:{}", source.address(), podferry_local::AGENT_PORT);
    let expected = Peer::Agent(source.name().parse().unwrap());
    let begin = FetchBegin { migration_id: id.to_owned(), awaited: true };
    let requests = [Kind::Begin(begin), Kind::Pages(pages)].map(|kind| FetchRequest { kind: Some(kind) });
    stage.run_inside(async {
        let channel = tls::connect(&address, &identity, &expected).await.unwrap();
        let mut client = FetchServiceClient::new(channel);
        match client.fetch(tokio_stream::iter(requests)).await {
            Ok(answers) => answers.into_inner().message().await.unwrap_err(),
            Err(refused) => refused,
        }
    })
}

#[test]
fn memory_that_waits_for_its_target_is_nobody_elses() {
    let _one_at_a_time = serial();
    let mut stage = Stage::up_with(MEMORY, Strategy::Postcopy);
    let halted = halt_at(&mut stage, Moment::Fill);
    let pages = |count| FetchPages { process: 1, address: 0x1000, count };
    let target = Peer::Agent(stage.target().name().parse().unwrap());
    let strangers = [Peer::Agent("node-c".parse().unwrap()), Peer::client("mallory").unwrap(), Peer::Coordinator];
    for (number, stranger) in strangers.iter().enumerate() {
        let refused = fetch(&stage, stranger, &format!("stranger-{number}"), &halted.id, pages(1));
        assert_eq!(refused.code(), Code::PermissionDenied, "{stranger:?}: {refused}");
    }
    let unknown = fetch(&stage, &target, "target", &MigrationId::new().to_string(), pages(1));
    assert_eq!(unknown.code(), Code::PermissionDenied, "{unknown}");
    for count in [0, 257] {
        let refused = fetch(&stage, &target, "target", &halted.id, pages(count));
        assert_eq!(refused.code(), Code::InvalidArgument, "{count}: {refused}");
    }
    halted.stopped.all_go_on();
    let (phase, reason) = stage.ended(&halted.id);
    assert_eq!(phase, "succeeded", "a stranger disturbed it: {reason}\n{}", stage.logs());
    stage.assert_sound("after strangers");
}

/// Longer than any of the waits of TCP until it tries again.
const CUT: Duration = Duration::from_secs(5);

#[test]
fn a_link_that_comes_back_in_time_costs_a_wait_and_nothing_else() {
    let _one_at_a_time = serial();
    let mut stage = Stage::up_with(MEMORY, Strategy::Postcopy);
    let halted = halt_at(&mut stage, Moment::Fill);
    let source = stage.source();
    stage.cut(&source, true);
    halted.stopped.all_go_on();
    thread::sleep(CUT);
    let now = stage.describe(&halted.id).unwrap();
    assert_eq!(now["phase"], "fill", "{now:#}");
    stage.cut(&source, false);
    let (phase, reason) = stage.ended(&halted.id);
    assert_eq!(phase, "succeeded", "{reason}\n{}", stage.logs());
    stage.assert_sound("after the link came back");
    stage.migrate();
    stage.assert_alive("after the migration that followed");
}

#[test]
fn a_source_that_stays_away_costs_the_workload_and_that_is_said() {
    let _one_at_a_time = serial();
    let mut stage = Stage::up_with(MEMORY, Strategy::Postcopy);
    let target = stage.target();
    let mut config = OpenOptions::new().append(true).open(target.agent_config()).unwrap();
    write!(config, "\n[post_copy]\nrecover_within_s = 1\n").unwrap();
    target.kill_agent(Signal::TERM).unwrap();
    Stage::restart_agent(&target);
    let halted = halt_at(&mut stage, Moment::Fill);
    let source = stage.source();
    stage.cut(&source, true);
    halted.stopped.all_go_on();
    wait_for("the loss to be said", || {
        let now = stage.describe(&halted.id)?;
        (now["phase"] == "failed").then_some(())
    });
    stage.cut(&source, false);
    let (phase, reason) = stage.ended(&halted.id);
    assert!(phase == "failed" && reason.contains("cannot be had"), "{phase}: {reason}\n{}", stage.logs());
    eprintln!("{reason}");
    for name in NODES {
        let node = stage.cluster.node(name).unwrap();
        wait_for("its processes to be gone", || processes::of_container(&node, NAME).is_empty().then_some(()));
        assert_eq!(sampler::running(&node, NAME, PROGRAM), Vec::<u32>::new(), "on {name}");
    }
    assert_eq!(stage.sampler.doubles(), Vec::<String>::new());
    for node in [source, target] {
        let images = node.on_machine(&node.images());
        wait_for("its memory to be removed", || std::fs::read_dir(&images).unwrap().next().is_none().then_some(()));
    }
}
