//! How a workload is moved: which phases, in which order.
//!
//! Every strategy is a path through the same phases, and all paths share the machine of [`crate::migration`] from the
//! freeze on. What is not offered yet is refused by name here, before anything is recorded.

use std::fmt;

use podferry_common::{Failure, FailureCode};
use podferry_proto::v1;
use serde::{Deserialize, Serialize};

use crate::migration::Phase;

/// The ways to move a workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Strategy {
    /// Stop, copy, start.
    Cold,
    /// Freeze, transfer from memory to memory, resume.
    Warm,
    /// Copy memory while the workload runs, freeze for the rest.
    Live,
    /// Resume first, fetch memory afterwards.
    Postcopy,
    /// Copy first, then resume, then fetch what was missing.
    Hybrid,
    /// The workload moves its own state when asked.
    Application,
}

/// The phases of a warm migration.
const WARM: &[Phase] =
    &[Phase::Preflight, Phase::Prepare, Phase::Freeze, Phase::Commit, Phase::Release, Phase::Resume, Phase::Succeeded];

impl Strategy {
    /// All strategies.
    pub const ALL: [Self; 6] = [Self::Cold, Self::Warm, Self::Live, Self::Postcopy, Self::Hybrid, Self::Application];

    /// Its name in JSON and on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cold => "cold",
            Self::Warm => "warm",
            Self::Live => "live",
            Self::Postcopy => "postcopy",
            Self::Hybrid => "hybrid",
            Self::Application => "application",
        }
    }

    /// The phases it goes through when nothing fails; `None` when it is not offered yet.
    pub fn phases(self) -> Option<&'static [Phase]> {
        (self == Self::Warm).then_some(WARM)
    }

    /// The strategy a request asks for, if this coordinator offers it. Unspecified means warm.
    pub fn requested(wire: i32) -> Result<Self, Failure> {
        let unknown = || {
            Failure::new(FailureCode::InvalidArgument, format!("there is no strategy number {wire}"))
                .remedy("use a client of the coordinator's version")
        };
        let strategy = match v1::Strategy::try_from(wire).map_err(|_| unknown())? {
            v1::Strategy::Unspecified | v1::Strategy::Warm => Self::Warm,
            v1::Strategy::Cold => Self::Cold,
            v1::Strategy::Live => Self::Live,
            v1::Strategy::Postcopy => Self::Postcopy,
            v1::Strategy::Hybrid => Self::Hybrid,
            v1::Strategy::Application => Self::Application,
        };
        if strategy.phases().is_some() {
            return Ok(strategy);
        }
        let message = format!("the strategy {strategy} is not available yet");
        Err(Failure::new(FailureCode::Unimplemented, message).remedy("use warm"))
    }
}

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl From<Strategy> for v1::Strategy {
    fn from(strategy: Strategy) -> Self {
        match strategy {
            Strategy::Cold => Self::Cold,
            Strategy::Warm => Self::Warm,
            Strategy::Live => Self::Live,
            Strategy::Postcopy => Self::Postcopy,
            Strategy::Hybrid => Self::Hybrid,
            Strategy::Application => Self::Application,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warm_is_the_default_and_the_only_one() {
        assert_eq!(Strategy::requested(v1::Strategy::Unspecified.into()), Ok(Strategy::Warm));
        for strategy in Strategy::ALL {
            let answer = Strategy::requested(v1::Strategy::from(strategy).into());
            if strategy == Strategy::Warm {
                assert_eq!(answer, Ok(strategy));
                continue;
            }
            let failure = answer.unwrap_err();
            assert_eq!(failure.code, FailureCode::Unimplemented);
            assert_eq!(failure.message, format!("the strategy {strategy} is not available yet"));
        }
        assert_eq!(Strategy::requested(99).unwrap_err().code, FailureCode::InvalidArgument);
    }

    #[test]
    fn the_commit_comes_after_the_freeze_and_before_the_release() {
        let phases = Strategy::Warm.phases().unwrap();
        let place = |phase| phases.iter().position(|p| *p == phase).unwrap();
        assert!(place(Phase::Freeze) < place(Phase::Commit) && place(Phase::Commit) < place(Phase::Release));
        assert!(place(Phase::Release) < place(Phase::Resume));
    }
}
