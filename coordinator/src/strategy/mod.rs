//! How a workload is moved: which phases, in which order.
//!
//! Every strategy is a path through the same phases, and all paths share the machine of [`crate::migration`] from the
//! freeze on.

mod choice;
mod connections;
mod past;

use std::fmt;

use podferry_common::{Failure, FailureCode};
use podferry_proto::{Version, v1};
use serde::{Deserialize, Serialize};

use crate::migration::{Path, Phase};

pub use choice::{Choice, End, Goals, Obstacle, View, choose};
pub use connections::{Connections, Fate, why_closed};
pub use past::Past;

/// The downtime that is aimed at, in milliseconds, when nobody says one.
const DOWNTIME_BUDGET_MS: f64 = 100.0;

/// The downtime that is aimed at, in milliseconds, where so much was asked for; 0 is nothing asked for.
pub fn budget_ms(asked: f64) -> f64 {
    if asked > 0.0 { asked } else { DOWNTIME_BUDGET_MS }
}

/// What a request says of how a workload is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// So and not otherwise.
    This(Strategy),
    /// As preflight finds best.
    Auto,
}

/// What a request that leaves the choice to the coordinator allows, and what was known before preflight. Kept with the migration.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Auto {
    /// Post-copy and hybrid may be taken, with their risk.
    pub accept_loss: bool,
    /// Cold may be taken when nothing else can work.
    pub allow_restart: bool,
    /// Why placement found a target for cold alone; none when it found one for the others.
    pub only_cold: Option<String>,
    /// How the last migration of this workload went that copied memory beforehand.
    pub past: Option<Past>,
}

/// The ways to move a workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
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

/// The phases of a live migration.
const LIVE: &[Phase] = &[
    Phase::Preflight,
    Phase::Prepare,
    Phase::PreCopy,
    Phase::Freeze,
    Phase::Commit,
    Phase::Release,
    Phase::Resume,
    Phase::Fill,
    Phase::Succeeded,
];

/// The phases of a post-copy migration: the source is destroyed when the target has fetched all memory.
const POSTCOPY: &[Phase] = &[
    Phase::Preflight,
    Phase::Prepare,
    Phase::Freeze,
    Phase::Commit,
    Phase::Resume,
    Phase::Fill,
    Phase::Release,
    Phase::Succeeded,
];

/// The phases of a hybrid migration: pre-copy, then post-copy of what is left.
const HYBRID: &[Phase] = &[
    Phase::Preflight,
    Phase::Prepare,
    Phase::PreCopy,
    Phase::Freeze,
    Phase::Commit,
    Phase::Resume,
    Phase::Fill,
    Phase::Release,
    Phase::Succeeded,
];

/// The phases of a cold migration: the writable layer is copied before the freeze, which is a stop.
const COLD: &[Phase] = &[
    Phase::Preflight,
    Phase::Prepare,
    Phase::PreCopy,
    Phase::Freeze,
    Phase::Commit,
    Phase::Release,
    Phase::Resume,
    Phase::Succeeded,
];

/// The phases of an application-level migration: the new instance is brought up and catches up before the old one is cut off.
const APPLICATION: &[Phase] = COLD;

/// An agent's word for that it knows post-copy.
const POST_COPY_WORD: &str = "agent:post_copy";
/// An agent's word for that it knows cold migrations, and that its node lacks nothing for them.
const COLD_WORD: &str = "agent:cold";
/// And one for that it knows application-level migrations, for which it needs what cold ones do.
const APPLICATION_WORD: &str = "agent:application";

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

    /// The phases it goes through when nothing fails.
    pub fn phases(self) -> &'static [Phase] {
        match self {
            Self::Cold => COLD,
            Self::Warm => WARM,
            Self::Live => LIVE,
            Self::Postcopy => POSTCOPY,
            Self::Hybrid => HYBRID,
            Self::Application => APPLICATION,
        }
    }

    /// Its way through the machine.
    pub fn path(self) -> Path {
        let place = |phase| self.phases().iter().position(|other| *other == phase);
        let (fill, release) = (place(Phase::Fill), place(Phase::Release));
        Path {
            pre_copy: place(Phase::PreCopy).is_some(),
            fill: fill.is_some(),
            post_copy: fill.is_some() && fill < release,
        }
    }

    /// Whether memory is copied before the freeze; cold copies the writable layer alone.
    pub fn copies_memory_beforehand(self) -> bool {
        let path = self.path();
        path.pre_copy && path.fill
    }

    /// Whether the container that runs afterwards is another one than before: nothing of what only CRIU does is needed then, and
    /// connections end.
    pub fn starts_anew(self) -> bool {
        matches!(self, Self::Cold | Self::Application)
    }

    /// Whether a node may take part in it.
    pub fn finds_fit(self, node: &v1::DescribeResponse) -> bool {
        node.fit || (self.starts_anew() && self.is_known_to(node))
    }

    /// Whether a node's agent knows it, as far as agents of the same version differ in that.
    pub fn is_known_to(self, node: &v1::DescribeResponse) -> bool {
        let word = match self {
            Self::Cold => COLD_WORD,
            Self::Application => APPLICATION_WORD,
            Self::Postcopy | Self::Hybrid => POST_COPY_WORD,
            Self::Warm | Self::Live => return true,
        };
        node.features.iter().any(|feature| feature == word)
    }
}

impl Asked {
    /// What a request asks for. Unspecified means warm.
    pub fn of(wire: i32) -> Result<Self, Failure> {
        let unknown = || {
            Failure::new(FailureCode::InvalidArgument, format!("there is no strategy number {wire}"))
                .remedy("use a client of the coordinator's version")
        };
        let strategy = match v1::Strategy::try_from(wire).map_err(|_| unknown())? {
            v1::Strategy::Auto => return Ok(Self::Auto),
            v1::Strategy::Unspecified | v1::Strategy::Warm => Strategy::Warm,
            v1::Strategy::Cold => Strategy::Cold,
            v1::Strategy::Live => Strategy::Live,
            v1::Strategy::Postcopy => Strategy::Postcopy,
            v1::Strategy::Hybrid => Strategy::Hybrid,
            v1::Strategy::Application => Strategy::Application,
        };
        Ok(Self::This(strategy))
    }

    /// What has to be possible at least for a migration to be recorded. Every strategy but cold needs all that warm needs.
    pub fn at_least(self) -> Strategy {
        match self {
            Self::This(strategy) => strategy,
            Self::Auto => Strategy::Warm,
        }
    }
}

/// What a migration asks of the agents' protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wishes {
    /// How the workload is moved.
    pub strategy: Strategy,
    /// The most bytes per second on the link; 0 for as many as it takes.
    pub bandwidth_limit: u64,
}

impl Wishes {
    /// The oldest version that the source's agent may speak. One that is older would send all that the link takes.
    pub fn of_source(self) -> u32 {
        if self.bandwidth_limit > 0 { Version::PRE_COPY } else { self.of_target() }
    }

    /// The oldest version that the target's agent may speak.
    pub fn of_target(self) -> u32 {
        let path = self.strategy.path();
        // Either brings what came before the freeze.
        if path.fill || path.pre_copy { Version::PRE_COPY } else { Version::OURS.oldest }
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
    fn clients_that_know_no_auto_get_warm_and_every_strategy_is_offered() {
        assert_eq!(Asked::of(v1::Strategy::Unspecified.into()), Ok(Asked::This(Strategy::Warm)));
        assert_eq!(Asked::of(v1::Strategy::Auto.into()), Ok(Asked::Auto));
        for strategy in Strategy::ALL {
            assert_eq!(Asked::of(v1::Strategy::from(strategy).into()), Ok(Asked::This(strategy)));
        }
        assert_eq!(Asked::of(99).unwrap_err().code, FailureCode::InvalidArgument);
    }

    #[test]
    fn the_commit_comes_after_the_freeze_and_before_the_release() {
        for strategy in Strategy::ALL {
            let phases = strategy.phases();
            let place = |phase| phases.iter().position(|p| *p == phase).unwrap();
            assert!(place(Phase::Freeze) < place(Phase::Commit));
            assert!(place(Phase::Commit) < place(Phase::Release) && place(Phase::Commit) < place(Phase::Resume));
            assert_eq!(place(Phase::Resume) < place(Phase::Release), strategy.path().post_copy, "{strategy}");
        }
    }

    #[test]
    fn memory_is_copied_before_the_freeze_and_filled_in_after_the_resume() {
        let phases = Strategy::Live.phases();
        let place = |phase| phases.iter().position(|p| *p == phase).unwrap();
        assert!(place(Phase::Prepare) < place(Phase::PreCopy) && place(Phase::PreCopy) < place(Phase::Freeze));
        assert!(place(Phase::Resume) < place(Phase::Fill) && place(Phase::Fill) < place(Phase::Succeeded));
        assert_eq!(Strategy::Live.path(), Path { pre_copy: true, fill: true, post_copy: false });
        assert_eq!(Strategy::Postcopy.path(), Path { pre_copy: false, fill: true, post_copy: true });
        assert_eq!(Strategy::Hybrid.path(), Path { pre_copy: true, fill: true, post_copy: true });
        assert_eq!(Strategy::Warm.path(), Path::default());
        for anew in [Strategy::Cold, Strategy::Application] {
            assert_eq!(anew.path(), Path { pre_copy: true, fill: false, post_copy: false });
        }
        let copies = Strategy::ALL.into_iter().filter(|strategy| strategy.copies_memory_beforehand());
        assert_eq!(copies.collect::<Vec<_>>(), [Strategy::Live, Strategy::Hybrid]);
    }

    #[test]
    fn a_node_without_criu_is_fit_for_what_starts_anew_and_an_older_agent_is_told_apart() {
        let node = |fit, features: &[&str]| v1::DescribeResponse {
            fit,
            features: features.iter().map(ToString::to_string).collect(),
            ..v1::DescribeResponse::default()
        };
        let without_criu = node(false, &["agent:application", "agent:cold", "agent:post_copy"]);
        let older = node(true, &["agent:post_copy"]);
        for strategy in Strategy::ALL {
            assert_eq!(strategy.finds_fit(&without_criu), strategy.starts_anew(), "{strategy}");
            assert!(strategy.finds_fit(&older), "{strategy}");
            assert_eq!(strategy.is_known_to(&older), !strategy.starts_anew(), "{strategy}");
        }
        assert!(!Strategy::Cold.finds_fit(&node(false, &[])));
        assert!(!Strategy::Hybrid.is_known_to(&node(true, &["agent:cold"])));
    }
}
