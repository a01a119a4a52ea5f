//! Kills in migrations that copy memory beside CRIU, and how they may end.

use std::time::Instant;

use super::moments::{MEMORY, Moment, Victim, halt_at, kill, start_again};
use super::serial;
use super::stage::{Stage, Strategy};

/// How it ends. Before the parts are sealed it is undone, after the commit it is completed. Two pagers are there so that one
/// may die.
fn allowed(moment: Moment, victim: Victim) -> &'static [&'static str] {
    match (moment, victim) {
        (_, Victim::FirstPager | Victim::SecondPager)
        | (Moment::Committed | Moment::Released | Moment::Fill, _)
        | (Moment::Sealed, Victim::BothPagers) => &["succeeded"],
        (Moment::Sealed, Victim::Coordinator) => &["failed"],
        // runc outlives its CRIU for a while. A restore that is found dead after the commit is done again.
        (Moment::Sealed, _) | (Moment::Held, Victim::CriuOfRestore) => &["succeeded", "failed"],
        _ => &["failed"],
    }
}

/// Kills a victim in a moment; everything has to be sound afterwards, and the workload has to move again.
pub fn case(stage: &mut Stage, moment: Moment, victim: Victim) {
    let what = format!("{victim:?} killed at {moment:?}");
    let begun = Instant::now();
    let halted = halt_at(stage, moment);
    kill(stage, victim);
    if moment == Moment::Fill {
        // Whoever is started finds pages that are still missing.
        start_again(stage, victim);
        halted.stopped.all_go_on();
    } else {
        halted.stopped.all_go_on();
        start_again(stage, victim);
    }
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
    eprintln!("--- {what}: {:.1} s", begun.elapsed().as_secs_f64());
}

/// One after the other, on one stage.
pub fn run(strategy: Strategy, cases: &[(Victim, &[Moment])]) {
    let _one_at_a_time = serial();
    let mut stage = Stage::up_with(MEMORY, strategy);
    for (victim, moments) in cases {
        for moment in *moments {
            case(&mut stage, *moment, *victim);
        }
    }
    stage.assert_sound("in the end");
    assert!(stage.sampler.looks() > 50, "the sampler has hardly looked");
}
