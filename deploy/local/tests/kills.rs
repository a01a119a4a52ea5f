//! Whatever is killed in whatever phase of a migration: one copy runs, its clients notice nothing, nothing is left.

#![allow(clippy::unwrap_used, reason = "a helper that fails has to fail its test")]

mod faults;

use std::fs;
use std::thread;
use std::time::Duration;

use faults::moments::{MEMORY, Moment, Victim, halt_at, kill, start_again};
use faults::sampler::Sampler;
use faults::stage::{LogTail, NAME, NODES, PROGRAM, Stage, standing};
use faults::{options, redis, serial, wait_for};
use podferry_local::LocalCluster;

/// How it may end. Before the parts are sealed it is undone, after the commit it is completed. An agent that nobody has
/// asked for anything yet may be killed without harm; and a commit may reach those who outlive a sealed part's keeper.
fn allowed(moment: Moment, victim: Victim) -> &'static [&'static str] {
    match (moment, victim) {
        (Moment::Committed | Moment::Released, _)
        // A restore that was started early is started anew.
        | (Moment::Transfer, Victim::RuncRestore | Victim::CriuOfRestore) => &["succeeded"],
        (Moment::Sealed, Victim::Coordinator) => &["failed"],
        // runc outlives its CRIU for a while. A restore that is found dead after the commit is done again.
        (Moment::Sealed, _)
        | (Moment::Preflight | Moment::Prepare, Victim::SourceAgent | Victim::TargetAgent)
        | (Moment::Held, Victim::CriuOfRestore) => &["succeeded", "failed"],
        _ => &["failed"],
    }
}

fn case(stage: &mut Stage, moment: Moment, victim: Victim) {
    let what = format!("{victim:?} killed at {moment:?}");
    eprintln!("--- {what}");
    let halted = halt_at(stage, moment);
    kill(stage, victim);
    halted.stopped.all_go_on();
    start_again(stage, victim);
    drop(halted.slow);
    let (phase, reason) = stage.ended(&halted.id);
    eprintln!("{what}: {phase} {reason}");
    assert!(allowed(moment, victim).contains(&phase.as_str()), "{what}: {phase}: {reason}\n{}", stage.logs());
    // A CRIU that is killed while it holds tasks leaves their sockets as they are just then.
    if victim == Victim::CriuOfDump && phase == "failed" {
        stage.assert_one_copy(&what);
        stage.reconnect();
    }
    stage.assert_sound(&what);
    stage.migrate();
    stage.assert_alive(&format!("after the migration that followed {what}"));
}

fn cases(victim: Victim, moments: &[Moment]) {
    let _one_at_a_time = serial();
    let mut stage = Stage::up(MEMORY);
    for moment in moments {
        case(&mut stage, *moment, victim);
    }
    stage.assert_sound("in the end");
    assert!(stage.sampler.looks() > 50, "the sampler has hardly looked");
}

const ALL: [Moment; 8] = [
    Moment::Preflight,
    Moment::Prepare,
    Moment::Dump,
    Moment::Transfer,
    Moment::Held,
    Moment::Sealed,
    Moment::Committed,
    Moment::Released,
];

#[test]
fn the_sources_agent_may_be_killed_at_any_moment() {
    cases(Victim::SourceAgent, &ALL);
}

#[test]
fn the_targets_agent_may_be_killed_at_any_moment() {
    cases(Victim::TargetAgent, &ALL);
}

#[test]
fn the_coordinator_may_be_killed_at_any_moment() {
    cases(Victim::Coordinator, &ALL);
}

/// While there is one: from the dump until the source is dead.
#[test]
fn the_dump_worker_may_be_killed() {
    cases(Victim::DumpWorker, &ALL[2..7]);
}

/// From when it reads pages: before that it puts its own code into the processes, and who kills it then may kill them. See
/// docs/reliability.md.
#[test]
fn the_criu_that_dumps_may_be_killed() {
    cases(Victim::CriuOfDump, &ALL[3..7]);
}

/// While there is one: from the transfer, during which it waits for its images, until the target runs.
#[test]
fn runc_restore_may_be_killed() {
    cases(Victim::RuncRestore, &ALL[3..]);
}

#[test]
fn the_criu_that_restores_may_be_killed() {
    cases(Victim::CriuOfRestore, &ALL[3..]);
}

/// A lost record may have been a commit: both copies stand still until an operator decides, and then one runs on.
#[test]
fn a_lost_record_leaves_the_decision_to_the_operator() {
    let _one_at_a_time = serial();
    let mut stage = Stage::up(MEMORY);
    for word in ["abort", "commit"] {
        let halted = halt_at(&mut stage, Moment::Sealed);
        kill(&stage, Victim::Coordinator);
        halted.stopped.all_go_on();
        fs::remove_file(stage.cluster.coordinator().folder().join("state/coordinator.redb")).unwrap();
        stage.restart_coordinator();
        let asked = LogTail::of(stage.cluster.coordinator().log().to_owned());
        let before = stage.counting.as_ref().unwrap().last();
        asked.wait(&format!("decision asked for peer=agent {} migration={}", NODES[0], halted.id)).unwrap();
        asked.wait(&format!("decision asked for peer=agent {} migration={}", NODES[1], halted.id)).unwrap();
        thread::sleep(Duration::from_millis(200));
        for node in [stage.source(), stage.target()] {
            assert_eq!(standing(&node, &halted.id).as_deref(), Some("sealed"));
        }
        assert_eq!(stage.counting.as_ref().unwrap().last(), before, "a copy ran before anybody decided");
        decide(&stage, &halted.id, word);
        if word == "commit" {
            stage.at = 1 - stage.at;
        }
        stage.assert_sound(&format!("after the operator's {word}"));
        stage.migrate();
        stage.assert_alive("after the migration that followed");
    }
}

/// Decides on both nodes, first where a copy has to go.
fn decide(stage: &Stage, id: &str, word: &str) {
    let nodes = match word {
        "commit" => [(stage.source(), "released"), (stage.target(), "resumed")],
        _ => [(stage.target(), "aborted"), (stage.source(), "aborted")],
    };
    for (node, end) in nodes {
        let agent = podferry_local::default_binaries().join("podferry-agent");
        let (agent, config) = (agent.display().to_string(), node.agent_config().display().to_string());
        node.check([agent.as_str(), "--config", &config, "decide", id, word]).unwrap();
        wait_for("the word to be followed", || (standing(&node, id)? == end).then_some(()));
        let again = node.exec([agent.as_str(), "--config", &config, "decide", id, word]).unwrap();
        assert!(!again.status.success() && again.stderr.contains("waits for no decision"), "{}", again.stderr);
    }
}

/// The other tests rely on it.
#[test]
fn the_sampler_sees_two_running_copies() {
    let _one_at_a_time = serial();
    let folder = tempfile::tempdir().unwrap();
    let mut options = options(folder.path());
    options.start_agents = false;
    let cluster = LocalCluster::up(&options).unwrap();
    let sampler = Sampler::start(cluster.nodes(), NAME, PROGRAM);
    cluster.node(NODES[0]).unwrap().start_workload(&redis()).unwrap();
    thread::sleep(Duration::from_millis(500));
    assert_eq!(sampler.doubles(), Vec::<String>::new());
    cluster.node(NODES[1]).unwrap().start_workload(&redis()).unwrap();
    wait_for("two running copies", || (!sampler.doubles().is_empty()).then_some(()));
    // One that stands still does not run.
    cluster.node(NODES[1]).unwrap().runc(&["pause", NAME]).unwrap().success().unwrap();
    thread::sleep(Duration::from_secs(1));
    let before = sampler.doubles().len();
    thread::sleep(Duration::from_millis(500));
    assert_eq!(sampler.doubles().len(), before);
}
