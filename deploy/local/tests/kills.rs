//! Whatever is killed in whatever phase of a migration: one copy runs, its clients notice nothing, nothing is left.

#![allow(clippy::unwrap_used, reason = "a helper that fails has to fail its test")]

mod faults;

use std::fs;
use std::thread;
use std::time::Duration;

use faults::sampler::Sampler;
use faults::stage::{Begun, LogTail, NAME, NODES, PROGRAM, Stage, Stopped, agent, standing};
use faults::{options, processes, redis, serial, wait_every, wait_for};
use podferry_local::{LocalCluster, ProcessId, Signal};

/// What Redis holds, in MiB: on the slow link a transfer of seconds.
const MEMORY: usize = 6;
/// How often a phase is aimed at that has passed before it could be stopped.
const AIMS: usize = 4;

/// The moment of a kill.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Moment {
    /// Both agents are asked whether it can be done.
    Preflight,
    /// The target reserves.
    Prepare,
    /// CRIU has just stopped the tasks.
    Dump,
    /// Pages have arrived.
    Transfer,
    /// The target holds the restored container.
    Held,
    /// Both parts are sealed; the coordinator does not know it.
    Sealed,
    /// The commit is on disk; the source is not dead yet.
    Committed,
    /// The source is dead; the target does not run yet.
    Released,
}

/// Who is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    SourceAgent,
    TargetAgent,
    Coordinator,
    DumpWorker,
    CriuOfDump,
    RuncRestore,
    CriuOfRestore,
}

/// A migration that stands still in a moment.
struct Halted {
    _begun: Begun,
    id: String,
    stopped: Stopped,
    slow: bool,
}

fn coordinator(stage: &Stage) -> ProcessId {
    stage.cluster.coordinator().process().unwrap()
}

/// Migrates until the moment, and halts there.
fn halt_at(stage: &mut Stage, moment: Moment) -> Halted {
    for _ in 0..AIMS {
        let begun = stage.begin();
        match aim(stage, begun, moment) {
            Ok(halted) => return halted,
            Err(id) => {
                eprintln!("{moment:?} had passed; aiming again");
                let (phase, reason) = stage.ended(&id);
                assert_eq!(phase, "succeeded", "{reason}");
            }
        }
    }
    panic!("{moment:?} always passes before it can be stopped");
}

/// The id of a migration that was too quick is the error.
fn aim(stage: &mut Stage, begun: Begun, moment: Moment) -> Result<Halted, String> {
    use Moment::{Committed, Dump, Held, Preflight, Prepare, Released, Sealed, Transfer};
    let slow = matches!(moment, Dump | Transfer);
    if slow {
        stage.slow_down(&stage.target());
    }
    let id = begun.id();
    let stopped = Stopped::default();
    let next = match moment {
        Preflight => {
            stopped.stop(coordinator(stage));
            "phase=prepare"
        }
        Prepare => {
            begun.wait_phase("prepare");
            stopped.stop(coordinator(stage));
            "phase=freeze"
        }
        Dump | Transfer => {
            wait_every(Duration::from_micros(200), "the tasks to be stopped", || stage.is_stopped().then_some(()));
            if moment == Transfer {
                await_pages(stage, &id);
            }
            "phase=commit"
        }
        Held | Sealed | Committed | Released => {
            wait_every(Duration::from_micros(200), "the tasks to be stopped", || stage.is_stopped().then_some(()));
            stopped.stop(coordinator(stage));
            "phase=commit"
        }
    };
    if begun.log.find(next).is_some() {
        return Err(id);
    }
    if moment >= Held {
        wait_for("the hook to hold", || processes::hook(&stage.target()));
        // The agent has to hear of it, too.
        thread::sleep(Duration::from_millis(50));
    }
    if moment >= Sealed {
        seal(stage, &begun, &stopped, &id);
    }
    if moment >= Committed {
        stopped.stop(processes::dump_worker(&stage.source()).unwrap());
        stopped.go_on(coordinator(stage));
        begun.wait_phase("release");
        thread::sleep(Duration::from_millis(50));
    }
    if moment == Released {
        stopped.stop(agent(&stage.target()));
        stopped.go_on(processes::dump_worker(&stage.source()).unwrap());
        begun.wait_phase("resume");
        thread::sleep(Duration::from_millis(50));
    }
    Ok(Halted { _begun: begun, id, stopped, slow })
}

fn await_pages(stage: &Stage, id: &str) {
    let folder = stage.target().on_machine(&stage.target().images().join(id).join("images"));
    wait_for("pages at the target", || {
        let bytes: u64 =
            fs::read_dir(&folder).ok()?.flatten().filter_map(|file| Some(file.metadata().ok()?.len())).sum();
        (bytes > 200 << 10).then_some(())
    });
}

/// Lets the coordinator seal both parts, and stops it before it hears of the second.
fn seal(stage: &Stage, begun: &Begun, stopped: &Stopped, id: &str) {
    let worker = processes::dump_worker(&stage.source()).unwrap();
    stopped.stop(worker);
    stopped.go_on(coordinator(stage));
    begun.wait_phase("commit");
    let is_sealed = |standing: Option<String>| (standing.as_deref() == Some("sealed")).then_some(());
    wait_for("the target to be sealed", || is_sealed(standing(&stage.target(), id)));
    thread::sleep(Duration::from_millis(50));
    stopped.stop(coordinator(stage));
    stopped.go_on(worker);
    wait_for("the source to be sealed", || is_sealed(standing(&stage.source(), id)));
}

/// Kills the victim; daemons are started again at once, as whoever supervises them does.
fn kill(stage: &Stage, victim: Victim) {
    let (source, target) = (stage.source(), stage.target());
    let processes = match victim {
        Victim::SourceAgent => return source.kill_agent(Signal::KILL).unwrap(),
        Victim::TargetAgent => return target.kill_agent(Signal::KILL).unwrap(),
        Victim::Coordinator => return stage.cluster.coordinator().kill(Signal::KILL).unwrap(),
        Victim::DumpWorker => processes::dump_worker(&source),
        Victim::CriuOfDump => processes::criu_of_dump(&source),
        Victim::RuncRestore => processes::runc_restore(&target),
        Victim::CriuOfRestore => processes::criu_of_restore(&target),
    };
    let process = processes.unwrap_or_else(|| panic!("there is no {victim:?}"));
    assert!(process.signal(Signal::KILL));
    assert!(process.wait_gone(Duration::from_secs(10)), "{victim:?} does not die");
}

fn start_again(stage: &Stage, victim: Victim) {
    match victim {
        Victim::SourceAgent => Stage::restart_agent(&stage.source()),
        Victim::TargetAgent => Stage::restart_agent(&stage.target()),
        Victim::Coordinator => stage.restart_coordinator(),
        _ => {}
    }
}

/// How it may end. Before the parts are sealed it is undone, after the commit it is completed. An agent that nobody has
/// asked for anything yet may be killed without harm; and a commit may reach those who outlive a sealed part's keeper.
fn allowed(moment: Moment, victim: Victim) -> &'static [&'static str] {
    match (moment, victim) {
        (Moment::Committed | Moment::Released, _) => &["succeeded"],
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
    // The directions of tc are by node, and the workload may move.
    let slowed = stage.target();
    kill(stage, victim);
    halted.stopped.all_go_on();
    start_again(stage, victim);
    if halted.slow {
        stage.speed_up(&slowed);
    }
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
    stage.counting.as_ref().unwrap().assert_alive(&format!("after the migration that followed {what}"));
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

#[test]
fn the_criu_that_dumps_may_be_killed() {
    cases(Victim::CriuOfDump, &ALL[2..7]);
}

/// While there is one: from the restore until the target runs.
#[test]
fn runc_restore_may_be_killed() {
    cases(Victim::RuncRestore, &ALL[4..]);
}

#[test]
fn the_criu_that_restores_may_be_killed() {
    cases(Victim::CriuOfRestore, &ALL[4..]);
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
        asked.wait(&format!("decision asked for peer=agent {} migration={}", NODES[0], halted.id));
        asked.wait(&format!("decision asked for peer=agent {} migration={}", NODES[1], halted.id));
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
        stage.counting.as_ref().unwrap().assert_alive("after the migration that followed");
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
