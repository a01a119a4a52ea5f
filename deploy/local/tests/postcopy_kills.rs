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
use podferry_local::Signal;

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
    stage.counting.as_ref().unwrap().assert_alive("after the migration that followed");
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
