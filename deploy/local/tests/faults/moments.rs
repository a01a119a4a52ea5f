//! Halting in a moment of a migration, and killing there, as tests do: what cannot be done fails them.

use podferry_local::faults::links::Slow;
pub use podferry_local::faults::{Moment, Stopped, Victim};

use super::stage::Stage;

/// What Redis holds, in MiB: on the slow link a transfer of seconds.
pub const MEMORY: usize = 6;
/// How often a phase is aimed at that has passed before it could be stopped.
const AIMS: usize = 4;

/// A migration that stands still in a moment.
pub struct Halted {
    _begun: podferry_local::faults::Begun,
    pub id: String,
    pub stopped: Stopped,
    /// The link, if it was slowed down for this.
    pub slow: Option<Slow>,
}

/// Migrates until the moment, and halts there.
pub fn halt_at(stage: &mut Stage, moment: Moment) -> Halted {
    for _ in 0..AIMS {
        let slow = moment.needs_slow_link().then(|| stage.scene().slow_down().unwrap());
        match stage.scene().halt_at(moment).unwrap_or_else(|error| panic!("{error}\n{}", stage.logs())) {
            Ok(halted) => return Halted { _begun: halted.begun, id: halted.id, stopped: halted.stopped, slow },
            Err(id) => {
                eprintln!("{moment:?} had passed; aiming again");
                let (phase, reason) = stage.ended(&id);
                assert_eq!(phase, "succeeded", "{reason}");
            }
        }
    }
    panic!("{moment:?} always passes before it can be stopped");
}

/// Kills the victim.
pub fn kill(stage: &Stage, victim: Victim) {
    stage.scene().kill(victim).unwrap();
}

/// Starts it again, as whoever supervises daemons does.
pub fn start_again(stage: &Stage, victim: Victim) {
    stage.scene().start_again(victim).unwrap();
}
