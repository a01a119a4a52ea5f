//! How workloads are moved, as the command line is told.

use std::fmt;

/// A strategy, with what else is said for it here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Strategy {
    /// Stop, copy, start.
    Cold,
    /// Freeze, transfer, resume.
    Warm,
    /// Copy memory while the workload runs, then freeze.
    Live,
    /// Freeze, resume, fetch the memory behind the running workload.
    Postcopy,
    /// Live, and fetch what does not converge.
    Hybrid,
}

impl Strategy {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Cold, Self::Warm, Self::Live, Self::Postcopy, Self::Hybrid];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cold => "cold",
            Self::Warm => "warm",
            Self::Live => "live",
            Self::Postcopy => "postcopy",
            Self::Hybrid => "hybrid",
        }
    }

    /// For the command line; with a budget that two shared cores keep.
    pub fn words(self) -> &'static [&'static str] {
        match self {
            Self::Cold => &["--strategy", "cold"],
            Self::Warm => &["--strategy", "warm"],
            Self::Live => &["--strategy", "live", "--downtime-budget", "1000"],
            Self::Postcopy => &["--strategy", "postcopy", "--accept-loss"],
            Self::Hybrid => &["--strategy", "hybrid", "--downtime-budget", "1000", "--accept-loss"],
        }
    }

    /// Whether something is copied while the workload still runs on the source.
    pub fn copies_beforehand(self) -> bool {
        matches!(self, Self::Cold | Self::Live | Self::Hybrid)
    }

    /// Whether the workload runs on the target before all of its memory is there.
    pub fn fills(self) -> bool {
        matches!(self, Self::Live | Self::Postcopy | Self::Hybrid)
    }

    /// Whether the source keeps memory that the target needs, so that it is released last, and either node's end is the workload's.
    pub fn may_lose(self) -> bool {
        matches!(self, Self::Postcopy | Self::Hybrid)
    }

    /// Whether connections live on.
    pub fn keeps_connections(self) -> bool {
        self != Self::Cold
    }
}

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
