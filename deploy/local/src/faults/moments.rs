//! The moments of a migration in which something may fail, and who may.

use crate::strategy::Strategy;

/// A moment, in the order in which they come. Behind the commit a post-copy has another order than the rest: its source is destroyed last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Moment {
    /// Both agents are asked whether it can be done.
    Preflight,
    /// The target reserves.
    Prepare,
    /// Memory or files are being sent while the tasks run.
    PreCopy,
    /// CRIU has just stopped the tasks, or they have ended.
    Dump,
    /// Pages have arrived.
    Transfer,
    /// The target holds what it has restored, or created.
    Held,
    /// Both parts are sealed; the coordinator does not know it.
    Sealed,
    /// The commit is on disk, and nobody has been told: the source is not dead, or, in a post-copy, the target does not run.
    Committed,
    /// The source is dead; the target does not run yet.
    Released,
    /// The target runs, and pages of it are missing.
    Fill,
    /// Post-copy: the target has all of its memory; the source is not dead yet.
    Filled,
}

impl Moment {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::Preflight,
        Self::Prepare,
        Self::PreCopy,
        Self::Dump,
        Self::Transfer,
        Self::Held,
        Self::Sealed,
        Self::Committed,
        Self::Released,
        Self::Fill,
        Self::Filled,
    ];

    /// Whether a migration of this strategy has it.
    pub fn is_in(self, strategy: Strategy) -> bool {
        match self {
            Self::PreCopy => strategy.copies_beforehand(),
            Self::Transfer => strategy != Strategy::Cold,
            Self::Released => !strategy.may_lose(),
            Self::Fill => strategy.fills(),
            Self::Filled => strategy.may_lose(),
            _ => true,
        }
    }

    /// The phase that it lies in, and where in it, in words for a table.
    pub fn words(self, strategy: Strategy) -> &'static str {
        match self {
            Self::Preflight => "preflight",
            Self::Prepare => "prepare",
            Self::PreCopy => "precopy",
            Self::Dump => "freeze: stopped",
            Self::Transfer => "freeze: sending",
            Self::Held => "freeze: restored",
            Self::Sealed => "commit: sealed",
            Self::Committed if strategy.may_lose() => "resume",
            Self::Committed | Self::Filled => "release",
            Self::Released => "resume",
            Self::Fill => "fill",
        }
    }

    /// Whether the decision is on disk.
    pub fn is_committed(self) -> bool {
        self >= Self::Committed
    }

    /// Whether the link has to be slow, or the moment passes at once.
    pub fn needs_slow_link(self) -> bool {
        matches!(self, Self::PreCopy | Self::Dump | Self::Transfer)
    }
}

/// Who is killed or stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Victim {
    /// The agent of the source.
    SourceAgent,
    /// The agent of the target.
    TargetAgent,
    /// The coordinator.
    Coordinator,
    /// Who has CRIU dump, and answers it.
    DumpWorker,
    /// The CRIU that dumps.
    CriuOfDump,
    /// `runc restore`.
    RuncRestore,
    /// The CRIU that restores.
    CriuOfRestore,
    /// Who holds the restored processes before their first instruction.
    Hook,
    /// The pager that works.
    FirstPager,
    /// The pager that takes over from it.
    SecondPager,
    /// Both.
    BothPagers,
}

impl Victim {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::SourceAgent,
        Self::TargetAgent,
        Self::Coordinator,
        Self::DumpWorker,
        Self::CriuOfDump,
        Self::RuncRestore,
        Self::CriuOfRestore,
        Self::Hook,
        Self::FirstPager,
        Self::SecondPager,
        Self::BothPagers,
    ];

    /// Whether there is one in this moment.
    pub fn is_in(self, strategy: Strategy, moment: Moment) -> bool {
        use Moment::{Committed, Dump, Fill, Filled, Held, Released};
        let last_of_source = if strategy.may_lose() { Filled } else { Committed };
        let last_of_restore = if strategy.may_lose() { Committed } else { Released };
        moment.is_in(strategy)
            && match self {
                Self::SourceAgent | Self::TargetAgent | Self::Coordinator => true,
                Self::DumpWorker | Self::CriuOfDump => {
                    strategy != Strategy::Cold && (Dump..=last_of_source).contains(&moment)
                }
                Self::RuncRestore | Self::CriuOfRestore | Self::Hook => {
                    strategy != Strategy::Cold && (Held..=last_of_restore).contains(&moment)
                }
                Self::FirstPager | Self::SecondPager | Self::BothPagers => {
                    strategy.fills() && (Held..=Fill).contains(&moment)
                }
            }
    }

    /// In words for a table.
    pub fn words(self) -> &'static str {
        match self {
            Self::SourceAgent => "source's agent",
            Self::TargetAgent => "target's agent",
            Self::Coordinator => "coordinator",
            Self::DumpWorker => "dump worker",
            Self::CriuOfDump => "CRIU of the dump",
            Self::RuncRestore => "runc restore",
            Self::CriuOfRestore => "CRIU of the restore",
            Self::Hook => "hook",
            Self::FirstPager => "first pager",
            Self::SecondPager => "second pager",
            Self::BothPagers => "both pagers",
        }
    }

    /// Whether somebody supervises it, who starts it again when it has died.
    pub fn is_supervised(self) -> bool {
        matches!(self, Self::SourceAgent | Self::TargetAgent | Self::Coordinator)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moments(strategy: Strategy) -> Vec<Moment> {
        Moment::ALL.into_iter().filter(|moment| moment.is_in(strategy)).collect()
    }

    #[test]
    fn each_strategy_has_the_moments_of_its_phases_in_order() {
        use Moment::{Committed, Dump, Fill, Filled, Held, PreCopy, Preflight, Prepare, Released, Sealed, Transfer};
        assert_eq!(moments(Strategy::Cold), [Preflight, Prepare, PreCopy, Dump, Held, Sealed, Committed, Released]);
        assert_eq!(moments(Strategy::Warm), [Preflight, Prepare, Dump, Transfer, Held, Sealed, Committed, Released]);
        assert_eq!(
            moments(Strategy::Hybrid),
            [Preflight, Prepare, PreCopy, Dump, Transfer, Held, Sealed, Committed, Fill, Filled]
        );
        assert!(moments(Strategy::Live).contains(&Released) && !moments(Strategy::Live).contains(&Filled));
        let phases = |strategy| moments(strategy).into_iter().map(|moment| moment.words(strategy)).collect::<Vec<_>>();
        assert_eq!(phases(Strategy::Live)[7..], ["release", "resume", "fill"]);
        assert_eq!(phases(Strategy::Postcopy)[6..], ["resume", "fill", "release"]);
    }

    #[test]
    fn only_who_is_there_can_be_a_victim() {
        let there = |strategy, moment| {
            let there = Victim::ALL.into_iter().filter(|victim| victim.is_in(strategy, moment));
            there.filter(|victim| !victim.is_supervised()).collect::<Vec<_>>()
        };
        assert!(Moment::ALL.into_iter().all(|moment| there(Strategy::Cold, moment).is_empty()));
        assert!(there(Strategy::Live, Moment::PreCopy).is_empty());
        assert_eq!(there(Strategy::Warm, Moment::Dump), [Victim::DumpWorker, Victim::CriuOfDump]);
        assert!(there(Strategy::Postcopy, Moment::Filled).contains(&Victim::DumpWorker));
        assert!(!Victim::SourceAgent.is_in(Strategy::Warm, Moment::Fill), "warm has no fill");
    }
}
