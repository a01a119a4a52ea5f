//! Which faults there are, in which moments of which strategies, and how they may end.

use std::fmt;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use podferry_local::{
    Strategy,
    faults::{
        Moment, Victim,
        links::{Link, Way},
    },
};

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Killed. If somebody supervises it, it comes back at once, or when its deadlines are over.
    Kill {
        /// Who.
        victim: Victim,
        /// Whether it stays away past the deadline of the phase.
        late: bool,
    },
    /// Stopped past the deadline of the phase, and let go on.
    Stall(Victim),
    /// Cut past the deadline of the phase, and healed.
    Cut(Link, Way),
    /// The source's agent stays away for longer than a post-copy's target waits.
    Gone,
    /// What goes to the target goes at 1 Mbit/s, from the beginning.
    SlowLink,
    /// No room in the tmpfs of the target's images.
    FullImages,
    /// No room on the disk of the target's journal.
    FullState,
    /// No room on the disk of the target's writable layers.
    FullLayers,
    /// The container may have less memory on the target than it has.
    LittleMemory,
    /// CRIU on the source ends at once.
    BrokenDump,
    /// CRIU on the target ends at once.
    BrokenRestore,
    /// The kernel refuses CRIU on the source.
    RefusedDump,
    /// The kernel refuses CRIU on the target.
    RefusedRestore,
    /// An image is damaged on the target.
    BadImage,
    /// The certificate of one of them ends.
    Expired(Victim),
}

impl Fault {
    /// The column of the table that it is counted in.
    pub fn kind(self) -> Kind {
        match self {
            Self::Kill { .. } | Self::Gone => Kind::Killed,
            Self::Stall(_) => Kind::Stopped,
            Self::Cut(_, Way::Both) => Kind::Cut,
            Self::Cut(..) => Kind::OneWay,
            _ => Kind::Other,
        }
    }

    /// Whether it holds from before the migration, which is then not halted.
    pub fn is_from_the_beginning(self) -> bool {
        matches!(self, Self::SlowLink | Self::Expired(_) | Self::LittleMemory)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kill { victim, late: false } => write!(f, "kill {}", victim.words()),
            Self::Kill { victim, late: true } => write!(f, "kill {}, back late", victim.words()),
            Self::Stall(victim) => write!(f, "stop {}", victim.words()),
            Self::Cut(link, Way::Both) => write!(f, "cut {}", link.words()),
            Self::Cut(link, Way::There) => write!(f, "cut {} one way there", link.words()),
            Self::Cut(link, Way::Back) => write!(f, "cut {} one way back", link.words()),
            Self::Gone => write!(f, "source's agent gone for long"),
            Self::SlowLink => write!(f, "1 Mbit/s to the target"),
            Self::FullImages => write!(f, "no room for images"),
            Self::FullState => write!(f, "full disk of the journal"),
            Self::FullLayers => write!(f, "full disk of the layers"),
            Self::LittleMemory => write!(f, "memory limit too low"),
            Self::BrokenDump => write!(f, "CRIU of the dump ends at once"),
            Self::BrokenRestore => write!(f, "CRIU of the restore ends at once"),
            Self::RefusedDump => write!(f, "kernel refuses the dump"),
            Self::RefusedRestore => write!(f, "kernel refuses the restore"),
            Self::BadImage => write!(f, "damaged image"),
            Self::Expired(victim) => write!(f, "expired certificate of the {}", victim.words()),
        }
    }
}

/// The columns of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// kill -9.
    Killed,
    /// SIGSTOP.
    Stopped,
    /// A link, both ways.
    Cut,
    /// A link, one way.
    OneWay,
    /// Room, CRIU, slowness, certificates.
    Other,
}

impl Kind {
    /// All of them, with their titles.
    pub const ALL: [(Self, &'static str); 5] = [
        (Self::Killed, "killed"),
        (Self::Stopped, "stopped"),
        (Self::Cut, "cut"),
        (Self::OneWay, "cut one way"),
        (Self::Other, "other"),
    ];
}

/// One fault in one moment of one strategy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Case {
    /// How the workload is moved.
    pub strategy: Strategy,
    /// When it goes wrong.
    pub moment: Moment,
    /// What goes wrong.
    pub fault: Fault,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} / {} / {}", self.strategy, self.moment.words(self.strategy), self.fault)
    }
}

/// How a case may end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allowed {
    /// The phases at the end.
    pub phases: &'static [&'static str],
    /// Whether the workload may be lost if that is said.
    pub loss: bool,
}

impl Case {
    /// Behind the commit it is completed. Before it the workload is where it was when it failed, and where it should be when
    /// that was survived; what nobody can survive has to have failed.
    pub fn allowed(&self) -> Allowed {
        let (undone, done, either): (&[_], &[_], &[_]) = (&["failed"], &["succeeded"], &["succeeded", "failed"]);
        let phases = match self.fault {
            Fault::Gone | Fault::Kill { victim: Victim::BothPagers, .. } if self.moment.is_committed() => either,
            Fault::Kill { victim: Victim::FirstPager, .. } => done,
            _ if self.moment.is_committed() => done,
            Fault::Kill { victim: Victim::Coordinator, .. }
            | Fault::FullImages
            | Fault::FullState
            | Fault::FullLayers
            | Fault::LittleMemory
            | Fault::BrokenDump
            | Fault::BrokenRestore
            | Fault::RefusedDump
            | Fault::RefusedRestore
            | Fault::Expired(_) => undone,
            _ => either,
        };
        let costs_memory = matches!(self.fault, Fault::Gone | Fault::Kill { victim: Victim::BothPagers, .. });
        // What fetches memory needs room for it.
        let takes_room = self.fault == Fault::FullImages;
        let loss = self.strategy.may_lose() && (self.moment.is_committed() && costs_memory || takes_room);
        Allowed { phases, loss }
    }

    /// One of these has to be in the reason of a migration that failed; none: any words will do.
    pub fn reasons(&self) -> &'static [&'static str] {
        match self.fault {
            // Sometimes it is known beforehand how much fits.
            Fault::FullImages | Fault::FullState | Fault::FullLayers => &["o space left", "too large", "are free"],
            Fault::Kill { victim: Victim::Coordinator, .. } => &["coordinator"],
            Fault::LittleMemory => &["bytes of memory"],
            Fault::BrokenDump | Fault::RefusedDump | Fault::BrokenRestore | Fault::RefusedRestore => &["CRIU", "criu"],
            Fault::Cut(..) | Fault::Stall(_) => &["node-a", "node-b", "coordinator", "s passed", "deadline"],
            _ => &[],
        }
    }

    /// Whether a client has to come again: its sockets were not moved, or were in the hands of who was killed.
    pub fn may_break_connections(&self) -> bool {
        !self.strategy.keeps_connections() || matches!(self.fault, Fault::Kill { victim: Victim::CriuOfDump, .. })
    }
}

/// Who is killed and stopped.
const VICTIMS: [Victim; 6] = [
    Victim::SourceAgent,
    Victim::TargetAgent,
    Victim::Coordinator,
    Victim::DumpWorker,
    Victim::Hook,
    Victim::FirstPager,
];

/// All cases. The seed says who comes back late, and which way a link is cut.
pub fn all(seed: u64) -> Vec<Case> {
    Strategy::ALL.into_iter().flat_map(|strategy| of_strategy(strategy, seed)).collect()
}

fn of_strategy(strategy: Strategy, seed: u64) -> Vec<Case> {
    let mut cases = Vec::new();
    for moment in Moment::ALL.into_iter().filter(|moment| moment.is_in(strategy)) {
        let mut add = |fault| cases.push(Case { strategy, moment, fault });
        for victim in VICTIMS.into_iter().filter(|victim| victim.is_in(strategy, moment)) {
            let late =
                victim.is_supervised() && toss(seed, &(strategy.name(), moment as u8, victim as u8)).is_multiple_of(2);
            add(Fault::Kill { victim, late });
            add(Fault::Stall(victim));
        }
        for link in Link::ALL {
            add(Fault::Cut(link, Way::Both));
        }
        let way = toss(seed, &(strategy.name(), moment as u8));
        let link = Link::ALL[usize::try_from(way % 3).unwrap_or(0)];
        add(Fault::Cut(link, if (way / 3).is_multiple_of(2) { Way::There } else { Way::Back }));
        others(strategy, moment).into_iter().for_each(add);
    }
    cases
}

/// What goes wrong in one moment only.
fn others(strategy: Strategy, moment: Moment) -> Vec<Fault> {
    let cold = strategy == Strategy::Cold;
    match moment {
        Moment::Preflight => {
            let who = match strategy {
                Strategy::Cold => vec![Victim::SourceAgent],
                Strategy::Warm => vec![Victim::TargetAgent],
                Strategy::Live => vec![Victim::SourceAgent, Victim::TargetAgent, Victim::Coordinator],
                Strategy::Postcopy => vec![Victim::Coordinator],
                Strategy::Hybrid => vec![],
            };
            let mut faults: Vec<Fault> = who.into_iter().map(Fault::Expired).collect();
            faults.extend([Fault::SlowLink, Fault::FullState]);
            // What is started anew has no memory yet.
            faults.extend((!cold).then_some(Fault::LittleMemory));
            faults
        }
        Moment::Prepare if cold => vec![Fault::FullLayers],
        Moment::Prepare => {
            vec![Fault::FullImages, Fault::BrokenDump, Fault::BrokenRestore, Fault::RefusedDump, Fault::RefusedRestore]
        }
        Moment::Dump if !cold => vec![Fault::BadImage, Fault::Kill { victim: Victim::CriuOfDump, late: false }],
        Moment::Held if !cold => {
            [Victim::CriuOfRestore, Victim::RuncRestore].map(|victim| Fault::Kill { victim, late: false }).into()
        }
        Moment::Fill if strategy.may_lose() => {
            vec![Fault::Gone, Fault::Kill { victim: Victim::BothPagers, late: false }]
        }
        _ => vec![],
    }
}

/// A number that follows from the seed and what it is for, the same in every run.
fn toss(seed: u64, what: &impl std::hash::Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    (seed, what).hash(&mut hasher);
    hasher.finish()
}

/// Some of each kind and strategy, for a look of a few minutes.
pub fn few(cases: &[Case]) -> Vec<Case> {
    let wanted = |case: &&Case| {
        let late_or_not = |wanted: Victim| matches!(case.fault, Fault::Kill { victim, .. } if victim == wanted);
        match (case.strategy, case.moment) {
            (Strategy::Cold, Moment::Dump) => late_or_not(Victim::SourceAgent),
            (Strategy::Cold, Moment::Released) => late_or_not(Victim::TargetAgent),
            (Strategy::Warm, Moment::Prepare) => case.fault == Fault::FullImages,
            (Strategy::Warm, Moment::Held) => case.fault == Fault::Cut(Link::ToTarget, Way::Both),
            (Strategy::Warm, Moment::Sealed) => late_or_not(Victim::Coordinator),
            (Strategy::Live, Moment::PreCopy) => case.fault == Fault::Cut(Link::Agents, Way::Both),
            (Strategy::Live, Moment::Committed) => case.fault == Fault::Stall(Victim::DumpWorker),
            (Strategy::Live, Moment::Fill) => late_or_not(Victim::FirstPager),
            (Strategy::Live, Moment::Preflight) => case.fault == Fault::SlowLink,
            (Strategy::Postcopy, Moment::Committed) => case.fault == Fault::Stall(Victim::TargetAgent),
            (Strategy::Postcopy, Moment::Fill) => case.fault == Fault::Gone || late_or_not(Victim::SourceAgent),
            (Strategy::Hybrid, Moment::Filled) => case.fault == Fault::Cut(Link::ToSource, Way::Both),
            (Strategy::Hybrid, Moment::Dump) => case.fault == Fault::BadImage,
            _ => false,
        }
    };
    cases.iter().filter(wanted).copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_strategy_meets_every_fault_in_each_of_its_phases() {
        let cases = all(0);
        for strategy in Strategy::ALL {
            for moment in Moment::ALL.into_iter().filter(|moment| moment.is_in(strategy)) {
                let here = || cases.iter().filter(|case| case.strategy == strategy && case.moment == moment);
                for (kind, title) in &Kind::ALL[..4] {
                    assert!(here().any(|case| case.fault.kind() == *kind), "{strategy} {moment:?} {title}");
                }
                for link in Link::ALL {
                    assert!(here().any(|case| case.fault == Fault::Cut(link, Way::Both)));
                }
            }
        }
    }

    #[test]
    fn a_seed_gives_the_same_cases_and_another_gives_others() {
        assert_eq!(all(7), all(7));
        assert_ne!(all(7), all(8));
        let names: std::collections::BTreeSet<String> = all(7).iter().map(ToString::to_string).collect();
        assert_eq!(names.len(), all(7).len(), "each has a name of its own");
    }

    #[test]
    fn behind_the_commit_nothing_may_fail_but_a_post_copy_whose_memory_is_gone() {
        for case in all(3).iter().filter(|case| case.moment.is_committed()) {
            let allowed = case.allowed();
            let costly = matches!(case.fault, Fault::Gone | Fault::Kill { victim: Victim::BothPagers, .. });
            assert_eq!(allowed.loss, costly, "{case}");
            assert_eq!(allowed.phases == ["succeeded"], !costly, "{case}");
        }
        let before = all(3).into_iter().filter(|case| !case.moment.is_committed() && case.fault != Fault::FullImages);
        assert!(before.into_iter().all(|case| !case.allowed().loss));
    }

    #[test]
    fn a_few_are_of_each_strategy_and_kind() {
        let few = few(&all(0));
        assert!((10..20).contains(&few.len()), "{}", few.len());
        assert!(Strategy::ALL.into_iter().all(|strategy| few.iter().any(|case| case.strategy == strategy)));
        let kinds = [Kind::Killed, Kind::Stopped, Kind::Cut, Kind::Other];
        assert!(kinds.into_iter().all(|kind| few.iter().any(|case| case.fault.kind() == kind)));
    }
}
