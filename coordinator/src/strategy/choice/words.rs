//! A choice in words.

use std::collections::BTreeMap;

use podferry_proto::v1::Tracking;

use super::super::past::Outlook;
use super::{CHOICES, Figures, Goals, Obstacle, Sizes, Strategy};

/// A choice and what it was made by.
pub(super) struct Told<'a> {
    pub(super) strategy: Strategy,
    /// None when the workload cannot be dumped.
    pub(super) figures: Option<Figures>,
    pub(super) tracking: Option<&'a Tracking>,
    pub(super) goals: &'a Goals,
    pub(super) obstacles: &'a BTreeMap<Strategy, Obstacle>,
}

impl Told<'_> {
    /// What was chosen and why; then why not the others.
    pub(super) fn reason(&self) -> String {
        let why = match (self.strategy, self.figures) {
            (Strategy::Cold, _) | (_, None) => {
                "nothing else can work, and a restart is allowed: memory is lost and connections are closed".to_owned()
            }
            (_, Some(figures)) => self.by_sizes(figures),
        };
        let not = self.others();
        let not = if not.is_empty() { not } else { format!(". Not {not}") };
        format!("{}: {why}{not}", self.strategy)
    }

    fn by_sizes(&self, figures: Figures) -> String {
        let all = size(figures.memory_bytes.saturating_add(figures.layer_bytes));
        let (warm, budget) = (time(figures.warm_ms), time(self.goals.budget_ms));
        match figures.sizes {
            Sizes::Worth if self.strategy.copies_memory_beforehand() => {
                let copied = size(figures.followed_bytes.saturating_add(figures.layer_bytes));
                format!(
                    "{copied} of {all} can be copied while it runs{}; without that it would stand still for about {warm}, with {budget} \
                     aimed at{}",
                    self.followed_by(),
                    self.past(figures)
                )
            }
            Sizes::Little => format!(
                "{all} are so little that copying beforehand gains nothing: it stands still for about {warm} either way"
            ),
            Sizes::NotFollowed if self.strategy == Strategy::Postcopy => format!(
                "{}; warm would stand still for about {warm}, with {budget} aimed at, and a loss is accepted",
                self.left(figures)
            ),
            Sizes::NotFollowed => format!("{}; it stands still for about {warm}", self.left(figures)),
            Sizes::Worth => format!("{all} move in about {warm}, and what would be shorter cannot work"),
        }
    }

    fn followed_by(&self) -> String {
        match self.tracking {
            Some(tracking) if tracking.tracker.is_empty() => String::new(),
            Some(tracking) if tracking.left_bytes > 0 => {
                format!(" (writes are followed by {}; {})", tracking.tracker, tracking.reasons.join("; "))
            }
            Some(tracking) => format!(" (writes are followed by {})", tracking.tracker),
            None => " (the source's agent does not say whose writes it can follow: what it cannot moves in the freeze)"
                .into(),
        }
    }

    fn left(&self, figures: Figures) -> String {
        let left = size(figures.memory_bytes.saturating_sub(figures.followed_bytes));
        let why = match self.tracking {
            Some(tracking) => tracking.reasons.join("; "),
            None => "the source's kernel does not tell which pages were written".to_owned(),
        };
        format!("writes to {left} of its memory cannot be followed ({why})")
    }

    /// What the last migration says of this one's rounds.
    fn past(&self, figures: Figures) -> String {
        let goals = self.goals;
        let left = goals.auto.past.map(|past| time(past.left_ms_at(goals.bandwidth_limit))).unwrap_or_default();
        let said = match figures.outlook {
            Outlook::Converges => format!(": the last migration had {left} left at the end of its rounds"),
            Outlook::DoesNotConverge => {
                format!(", which may not be reached: the last migration had {left} left at the end of its rounds")
            }
            Outlook::Unknown => String::new(),
        };
        let instead = match self.strategy {
            Strategy::Hybrid => "; what is not below it then is fetched after the resume, since a loss is accepted",
            _ => "",
        };
        format!("{said}{instead}")
    }

    /// Those that were not chosen, by what speaks against them.
    fn others(&self) -> String {
        let why = |strategy: Strategy| match self.obstacles.get(&strategy) {
            Some(obstacle) => Some(obstacle.why.clone()),
            None => self.lesser(strategy).map(str::to_owned),
        };
        let others = CHOICES.into_iter().filter(|other| *other != self.strategy);
        grouped(others.filter_map(|other| Some((other, why(other)?))))
    }

    /// Why something that could work is not as good; none where that has been said.
    fn lesser(&self, other: Strategy) -> Option<&'static str> {
        let beforehand = self.strategy.copies_memory_beforehand();
        match other {
            Strategy::Cold => Some("is for when nothing else can work"),
            Strategy::Hybrid if self.strategy == Strategy::Live => {
                Some("is not needed: the rounds are expected to get there")
            }
            Strategy::Postcopy if beforehand => Some("would risk all memory, not only what is left"),
            Strategy::Postcopy | Strategy::Hybrid if self.strategy == Strategy::Warm => {
                Some("would risk the workload for no gain")
            }
            Strategy::Live if self.strategy == Strategy::Hybrid => {
                Some("would give up where the rounds do not get there")
            }
            _ => None,
        }
    }
}

/// All of them, for somebody to whom none could be given.
pub(super) fn all(obstacles: &BTreeMap<Strategy, Obstacle>) -> String {
    grouped(CHOICES.into_iter().filter_map(|strategy| Some((strategy, obstacles.get(&strategy)?.why.clone()))))
}

/// Strategies with the same reason stand together.
fn grouped(reasons: impl Iterator<Item = (Strategy, String)>) -> String {
    let mut groups: Vec<(Vec<&str>, String)> = Vec::new();
    for (strategy, why) in reasons {
        match groups.iter_mut().find(|(_, known)| *known == why) {
            Some((names, _)) => names.push(strategy.as_str()),
            None => groups.push((vec![strategy.as_str()], why)),
        }
    }
    let told: Vec<_> = groups.into_iter().map(|(names, why)| format!("{}: {why}", names.join(", "))).collect();
    told.join("; ")
}

#[expect(clippy::cast_precision_loss, reason = "for people")]
fn size(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

fn time(milliseconds: f64) -> String {
    if milliseconds < 1000.0 { format!("{milliseconds:.0} ms") } else { format!("{:.1} s", milliseconds / 1e3) }
}
