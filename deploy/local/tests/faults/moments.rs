//! The moments of a migration in which something may die, halting there, and who may be killed.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::thread;
use std::time::Duration;

use podferry_local::{ProcessId, Signal};

use super::stage::{Begun, Stage, Stopped, Strategy, agent, pager_state, standing};
use super::{processes, wait_every, wait_for};

/// What Redis holds, in MiB: on the slow link a transfer of seconds.
pub const MEMORY: usize = 6;
/// How often a phase is aimed at that has passed before it could be stopped.
const AIMS: usize = 4;

/// The moment of a kill.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Moment {
    /// Both agents are asked whether it can be done.
    Preflight,
    /// The target reserves.
    Prepare,
    /// Memory is being sent while the tasks run; live only.
    PreCopy,
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
    /// The target runs, and pages of it are missing; live only.
    Fill,
}

/// Who is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Victim {
    SourceAgent,
    TargetAgent,
    Coordinator,
    DumpWorker,
    CriuOfDump,
    RuncRestore,
    CriuOfRestore,
    FirstPager,
    SecondPager,
    BothPagers,
}

/// A migration that stands still in a moment.
pub struct Halted {
    _begun: Begun,
    pub id: String,
    pub stopped: Stopped,
    pub slow: bool,
}

fn coordinator(stage: &Stage) -> ProcessId {
    stage.cluster.coordinator().process().unwrap()
}

/// Migrates until the moment, and halts there.
pub fn halt_at(stage: &mut Stage, moment: Moment) -> Halted {
    let slow = matches!(moment, Moment::PreCopy | Moment::Dump | Moment::Transfer);
    for _ in 0..AIMS {
        // The directions of tc are by node, and the workload may move.
        let slowed = stage.target();
        if slow {
            stage.slow_down(&slowed);
        }
        let begun = stage.begin();
        match aim(stage, begun, moment) {
            Ok(halted) => return Halted { slow, ..halted },
            Err(id) => {
                eprintln!("{moment:?} had passed; aiming again");
                let (phase, reason) = stage.ended(&id);
                assert_eq!(phase, "succeeded", "{reason}");
                if slow {
                    stage.speed_up(&slowed);
                }
            }
        }
    }
    panic!("{moment:?} always passes before it can be stopped");
}

/// The id of a migration that was too quick is the error.
fn aim(stage: &mut Stage, begun: Begun, moment: Moment) -> Result<Halted, String> {
    use Moment::{Committed, Dump, Fill, Held, PreCopy, Preflight, Prepare, Released, Sealed, Transfer};
    let id = begun.id();
    let stopped = Stopped::default();
    if stage.strategy == Strategy::Live && (Dump..=Released).contains(&moment) {
        // In pre-copy whoever begins to follow a process stops it, too, for an instant.
        begun.wait_phase("freeze");
    }
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
        PreCopy => {
            begun.wait_phase("precopy");
            await_memory(stage, &id);
            "phase=freeze"
        }
        Fill => {
            stop_filling(stage, &stopped, &id);
            "phase=succeeded"
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
        stopped.all_go_on();
        return Err(id);
    }
    if moment == Fill {
        return Ok(Halted { _begun: begun, id, stopped, slow: false });
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
    Ok(Halted { _begun: begun, id, stopped, slow: false })
}

fn await_pages(stage: &Stage, id: &str) {
    let folder = stage.target().on_machine(&stage.target().images().join(id).join("images"));
    wait_for("pages at the target", || {
        let bytes: u64 =
            fs::read_dir(&folder).ok()?.flatten().filter_map(|file| Some(file.metadata().ok()?.len())).sum();
        (bytes > 200 << 10).then_some(())
    });
}

/// Waits until memory that is sent before the freeze has come to the target.
fn await_memory(stage: &Stage, id: &str) {
    let folder = stage.target().on_machine(&stage.target().images().join(id).join("images"));
    wait_for("memory at the target", || {
        let files = fs::read_dir(&folder).ok()?.flatten();
        let stores = files.filter(|file| file.file_name().to_string_lossy().ends_with(".store"));
        // They are as long as the address space, and hold little.
        let blocks: u64 = stores.filter_map(|file| Some(file.metadata().ok()?.blocks())).sum();
        (blocks * 512 > 1 << 20).then_some(())
    });
}

/// Stops the pager that works as soon as the restored processes run: what they lack then stays away.
fn stop_filling(stage: &Stage, stopped: &Stopped, id: &str) {
    let target = stage.target();
    let first = wait_every(Duration::from_millis(1), "a pager", || processes::pagers(&target).0);
    wait_every(Duration::from_micros(200), "the restored processes to run", || {
        let state = pager_state(&target, id);
        (state == "filling" || !first.is_alive()).then_some(())
    });
    if first.is_alive() {
        stopped.stop(first);
    }
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
pub fn kill(stage: &Stage, victim: Victim) {
    let (source, target) = (stage.source(), stage.target());
    let processes = match victim {
        Victim::SourceAgent => return source.kill_agent(Signal::KILL).unwrap(),
        Victim::TargetAgent => return target.kill_agent(Signal::KILL).unwrap(),
        Victim::Coordinator => return stage.cluster.coordinator().kill(Signal::KILL).unwrap(),
        Victim::DumpWorker => processes::dump_worker(&source),
        Victim::CriuOfDump => processes::criu_of_dump(&source),
        Victim::RuncRestore => processes::runc_restore(&target),
        Victim::CriuOfRestore => processes::criu_of_restore(&target),
        Victim::FirstPager => processes::pagers(&target).0,
        Victim::SecondPager => processes::pagers(&target).1,
        Victim::BothPagers => return kill_both_pagers(stage),
    };
    let process = processes.unwrap_or_else(|| panic!("there is no {victim:?}"));
    assert!(process.signal(Signal::KILL));
    assert!(process.wait_gone(Duration::from_secs(10)), "{victim:?} does not die");
}

/// One would put another in the other's place at once, so both are stopped first.
fn kill_both_pagers(stage: &Stage) {
    let (Some(first), Some(second)) = processes::pagers(&stage.target()) else { panic!("there are no two pagers") };
    for signal in [Signal::STOP, Signal::KILL] {
        assert!(first.signal(signal) && second.signal(signal));
    }
    for pager in [first, second] {
        assert!(pager.wait_gone(Duration::from_secs(10)), "a pager does not die");
    }
}

pub fn start_again(stage: &Stage, victim: Victim) {
    match victim {
        Victim::SourceAgent => Stage::restart_agent(&stage.source()),
        Victim::TargetAgent => Stage::restart_agent(&stage.target()),
        Victim::Coordinator => stage.restart_coordinator(),
        _ => {}
    }
}
