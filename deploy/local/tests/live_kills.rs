//! Whatever is killed in whatever phase of a live migration: one copy runs, its clients notice nothing, nothing is left.

#![allow(clippy::unwrap_used, reason = "a helper that fails has to fail its test")]

mod faults;

use std::time::{Duration, Instant};

use faults::cases::{self, case};
use faults::moments::{MEMORY, Moment, Victim, halt_at, kill};
use faults::stage::{NAME, NODES, PROGRAM, Stage, Strategy};
use faults::{processes, sampler, serial, wait_for};

fn cases(cases: &[(Victim, &[Moment])]) {
    cases::run(Strategy::Live, cases);
}

const ALL: [Moment; 7] =
    [Moment::PreCopy, Moment::Dump, Moment::Held, Moment::Sealed, Moment::Committed, Moment::Released, Moment::Fill];

#[test]
fn the_sources_agent_may_be_killed_in_a_live_migration() {
    cases(&[(Victim::SourceAgent, &ALL)]);
}

#[test]
fn the_targets_agent_may_be_killed_in_a_live_migration() {
    cases(&[(Victim::TargetAgent, &ALL)]);
}

#[test]
fn the_coordinator_may_be_killed_in_a_live_migration() {
    cases(&[(Victim::Coordinator, &ALL)]);
}

/// While there are any; what warm migrations show as well is left to those.
#[test]
fn whoever_dumps_and_restores_may_be_killed_in_a_live_migration() {
    use Moment::{Committed, Dump, Held, Released, Sealed, Transfer};
    cases(&[
        (Victim::DumpWorker, &[Dump, Held, Committed]),
        (Victim::CriuOfDump, &[Transfer, Sealed]),
        (Victim::RuncRestore, &[Held, Released]),
        (Victim::CriuOfRestore, &[Sealed, Released]),
    ]);
}

#[test]
fn each_of_the_pagers_may_be_killed() {
    use Moment::{Fill, Held};
    cases(&[(Victim::FirstPager, &[Held, Fill]), (Victim::SecondPager, &[Held, Fill])]);
}

/// Before the container runs they cost a restore. Behind that its memory is gone: it is ended, and that is said.
#[test]
fn both_pagers_may_be_killed_and_nobody_reads_zeros() {
    let _one_at_a_time = serial();
    let mut stage = Stage::up_with(MEMORY, Strategy::Live);
    for moment in [Moment::Held, Moment::Sealed, Moment::Released] {
        case(&mut stage, moment, Victim::BothPagers);
    }
    let halted = halt_at(&mut stage, Moment::Fill);
    let target = stage.target();
    kill(&stage, Victim::BothPagers);
    halted.stopped.all_go_on();
    let (phase, reason) = stage.ended(&halted.id);
    assert!(phase == "failed" && reason.contains("memory"), "{phase}: {reason}\n{}", stage.logs());
    eprintln!("{reason}");
    for name in NODES {
        let node = stage.cluster.node(name).unwrap();
        assert_eq!(sampler::running(&node, NAME, PROGRAM), Vec::<u32>::new(), "on {name}");
        assert_eq!(processes::of_container(&node, NAME), Vec::<u32>::new(), "on {name}");
    }
    assert_eq!(stage.sampler.doubles(), Vec::<String>::new());
    let images = target.on_machine(&target.images());
    wait_for("its memory to be removed", || std::fs::read_dir(&images).unwrap().next().is_none().then_some(()));
    assert_eq!(processes::pagers(&target), (None, None));
}

#[test]
fn a_cancel_in_pre_copy_costs_the_workload_nothing() {
    let _one_at_a_time = serial();
    let mut stage = Stage::up_with(MEMORY, Strategy::Live);
    let halted = halt_at(&mut stage, Moment::PreCopy);
    let begun = Instant::now();
    let output = stage.podferry(&["cancel", &halted.id]);
    assert!(output.status.success(), "{}{}", output.stdout, output.stderr);
    let (phase, reason) = stage.ended(&halted.id);
    assert_eq!(phase, "cancelled", "{reason}\n{}", stage.logs());
    assert!(begun.elapsed() < Duration::from_secs(3), "it took {:?}", begun.elapsed());
    // At once, while the link is still slow: what was on its way is not waited for.
    stage.assert_alive("right after the cancel");
    drop(halted.slow);
    stage.assert_sound("after the cancel");
    stage.migrate();
    stage.assert_alive("after the migration that followed the cancel");
}
