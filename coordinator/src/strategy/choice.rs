//! The choice of a strategy when nobody asks for one. Pure: it judges what preflight saw.
//!
//! What can work is told apart from what is better. A strategy has an [`Obstacle`] when an agent, preflight or the caller rules it out; of
//! those without one the first in an order is taken that follows from sizes:
//!
//! * Memory that can be followed is worth copying beforehand when that spares the workload more than a tenth of the downtime that is aimed
//!   at: *live*, or *hybrid* where a loss is accepted and the last migration does not show that the rounds converge.
//! * So little memory that its transfer does not show: *warm*.
//! * Memory that cannot be followed: *warm*, or *postcopy* where a loss is accepted and warm would stand still for too long.
//! * *Cold* comes last in every order: it loses what the others carry.

#[cfg(test)]
mod tests;
mod words;

use std::collections::BTreeMap;

use podferry_common::{Failure, FailureCode};
use podferry_proto::{Version, v1};

use super::past::Outlook;
use super::{Auto, COLD_WORD, POST_COPY_WORD, Strategy, Wishes};
use crate::cluster::spoken;

/// An agent's word for that its kernel tells which pages were written.
const TRACKING_WORD: &str = "kernel:write_tracking";
/// What begins the words about a kernel: an agent that says none of them is too old to.
const KERNEL_WORDS: &str = "kernel:";
/// Bytes per second that dump, transfer and restore of a warm migration get through together (`docs/performance.md`).
const WARM_RATE: f64 = (256 << 20) as f64;
/// Milliseconds of a freeze without memory, as in `podferry_memory::convergence`.
const FIXED_MS: f64 = 180.0;
/// So little that a round of its own costs more than it saves, as in `podferry_memory::convergence`.
const FEW_BYTES: u64 = 4 << 20;
/// Copying beforehand pays when it spares more than this part of the downtime that is aimed at, and more than [`LEAST_GAIN_MS`].
const WORTH_OF_BUDGET: f64 = 0.1;
const LEAST_GAIN_MS: f64 = 5.0;

/// Those that can be chosen, in the order in which people are told of them.
const CHOICES: [Strategy; 5] = [Strategy::Live, Strategy::Hybrid, Strategy::Postcopy, Strategy::Warm, Strategy::Cold];

/// What the caller wants.
#[derive(Clone, Debug, PartialEq)]
pub struct Goals {
    /// What it allows, and what was known before preflight.
    pub auto: Auto,
    /// The downtime that is aimed at, in milliseconds; more than 0.
    pub budget_ms: f64,
    /// The most bytes per second on the link; 0 for as many as it takes.
    pub bandwidth_limit: u64,
    /// All memory that is copied beforehand is to be compared.
    pub verify: bool,
}

/// What one of the two agents says of its node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct End {
    /// The node.
    pub node: String,
    /// The newest version of the protocol that its agent speaks.
    pub version: u32,
    /// Why its CRIU cannot be used; none when it can.
    pub unfit: Option<String>,
    /// Its agent knows post-copy.
    pub post_copy: bool,
    /// Its agent knows cold migrations, and lacks nothing for them.
    pub cold: bool,
    /// Whether its kernel tells which pages were written; none when the agent does not say.
    pub tracks_writes: Option<bool>,
}

impl End {
    /// From an agent's own words.
    pub fn of(node: &str, says: &v1::DescribeResponse) -> Self {
        let has = |word: &str| says.features.iter().any(|feature| feature == word);
        let speaks_of_its_kernel = says.features.iter().any(|feature| feature.starts_with(KERNEL_WORDS));
        let complaints =
            || if says.complaints.is_empty() { "its agent says so".into() } else { says.complaints.join("; ") };
        Self {
            node: node.to_owned(),
            version: spoken(says),
            unfit: (!says.fit).then(complaints),
            post_copy: has(POST_COPY_WORD),
            cold: has(COLD_WORD),
            tracks_writes: speaks_of_its_kernel.then(|| has(TRACKING_WORD)),
        }
    }
}

/// Why a strategy cannot be taken.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Obstacle {
    /// What stands in the way.
    pub why: String,
    /// The node that it is about, if it is one's.
    pub node: Option<String>,
    /// What to do about it.
    pub remedy: Option<String>,
}

impl Obstacle {
    fn new(why: impl Into<String>) -> Self {
        Self { why: why.into(), node: None, remedy: None }
    }

    fn on(self, node: &str) -> Self {
        Self { node: Some(node.to_owned()), ..self }
    }

    fn remedy(self, remedy: &str) -> Self {
        Self { remedy: Some(remedy.to_owned()), ..self }
    }
}

impl From<Failure> for Obstacle {
    fn from(failure: Failure) -> Self {
        Self { why: failure.message, node: failure.node, remedy: failure.remedy }
    }
}

/// What preflight saw.
#[derive(Clone, Debug)]
pub struct View<'a> {
    /// The node the workload runs on.
    pub source: &'a End,
    /// The node it is to run on; none before it was asked.
    pub target: Option<&'a End>,
    /// What the source says of a workload that is dumped, or why it cannot be.
    pub carried: Result<&'a v1::PreflightSourceResponse, Obstacle>,
    /// What the source says of one that is stopped and started anew, or why it cannot be.
    pub restarted: Result<&'a v1::PreflightSourceResponse, Obstacle>,
    /// What the target has refused.
    pub refused: &'a BTreeMap<Strategy, Obstacle>,
}

/// What was chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The strategy.
    pub strategy: Strategy,
    /// Why, and why not the others, for a person.
    pub reason: String,
}

/// What the sizes say of copying memory while the workload runs.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Sizes {
    /// It is worth it.
    Worth,
    /// All there is moves in hardly any time.
    Little,
    /// Memory cannot be followed, and nothing else is worth it.
    NotFollowed,
}

/// The figures that a choice is made by.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Figures {
    memory_bytes: u64,
    layer_bytes: u64,
    /// Memory that can be followed; all, where nobody says it.
    followed_bytes: u64,
    /// How long the workload would stand still without copying beforehand.
    warm_ms: f64,
    sizes: Sizes,
    outlook: Outlook,
}

/// The best strategy of those that can work.
///
/// # Errors
/// When none can: a failure that says for each why.
pub fn choose(goals: &Goals, view: &View<'_>) -> Result<Choice, Failure> {
    let obstacles: BTreeMap<Strategy, Obstacle> =
        CHOICES.into_iter().filter_map(|strategy| Some((strategy, obstacle(strategy, goals, view)?))).collect();
    let figures = view.carried.as_ref().ok().map(|facts| Figures::of(facts, view.source, goals));
    let order = figures.map_or(CHOICES, |figures| order(figures, goals));
    let strategy = order.into_iter().find(|strategy| !obstacles.contains_key(strategy));
    let Some(strategy) = strategy else { return Err(nothing_works(&obstacles)) };
    let tracking = view.carried.as_ref().ok().and_then(|facts| facts.tracking.as_ref());
    let told = words::Told { strategy, figures, tracking, goals, obstacles: &obstacles };
    Ok(Choice { strategy, reason: told.reason() })
}

fn order(figures: Figures, goals: &Goals) -> [Strategy; 5] {
    use Strategy::{Cold, Hybrid, Live, Postcopy, Warm};
    match figures.sizes {
        Sizes::Worth if figures.outlook == Outlook::Converges => [Live, Hybrid, Warm, Postcopy, Cold],
        // Only where a loss is accepted: there is an obstacle otherwise.
        Sizes::Worth => [Hybrid, Live, Postcopy, Warm, Cold],
        Sizes::NotFollowed if figures.warm_ms > goals.budget_ms + FIXED_MS => [Postcopy, Hybrid, Warm, Live, Cold],
        Sizes::Little | Sizes::NotFollowed => [Warm, Live, Hybrid, Postcopy, Cold],
    }
}

impl Figures {
    fn of(facts: &v1::PreflightSourceResponse, source: &End, goals: &Goals) -> Self {
        // Volumes move as the layer does.
        let layer_bytes = facts.volumes.iter().fold(facts.layer_bytes, |all, volume| all.saturating_add(volume.bytes));
        let memory_bytes = facts.memory_bytes;
        let followed_bytes = match &facts.tracking {
            Some(tracking) => tracking.followed_bytes.min(memory_bytes),
            None if source.tracks_writes == Some(false) => 0,
            None => memory_bytes,
        };
        let gain = followed_bytes.saturating_add(layer_bytes);
        let sizes = if worth(gain, goals) {
            Sizes::Worth
        } else if worth(memory_bytes.saturating_add(layer_bytes), goals) {
            Sizes::NotFollowed
        } else {
            Sizes::Little
        };
        let past = goals.auto.past;
        Self {
            memory_bytes,
            layer_bytes,
            followed_bytes,
            warm_ms: FIXED_MS + transfer_ms(memory_bytes.saturating_add(layer_bytes), goals),
            sizes,
            outlook: past.map_or(Outlook::Unknown, |past| past.outlook(goals.budget_ms, goals.bandwidth_limit)),
        }
    }
}

/// What so much adds to a freeze, in milliseconds.
#[expect(clippy::cast_precision_loss, reason = "an estimate")]
fn transfer_ms(bytes: u64, goals: &Goals) -> f64 {
    let limit = if goals.bandwidth_limit > 0 { goals.bandwidth_limit as f64 } else { f64::INFINITY };
    bytes as f64 / WARM_RATE.min(limit) * 1e3
}

/// Whether the workload notices that so much does not move in the freeze.
fn worth(bytes: u64, goals: &Goals) -> bool {
    let spared = transfer_ms(bytes, goals);
    let few = bytes <= FEW_BYTES && spared <= goals.budget_ms;
    !few && spared > (goals.budget_ms * WORTH_OF_BUDGET).max(LEAST_GAIN_MS)
}

/// Why a strategy cannot be taken. What nobody can allow comes before what the caller could.
fn obstacle(strategy: Strategy, goals: &Goals, view: &View<'_>) -> Option<Obstacle> {
    let ends = || [Some(view.source), view.target].into_iter().flatten();
    let unable = ends().find_map(|end| inability(strategy, end));
    let forbidden = || forbidden(strategy, goals);
    let refused = || view.refused.get(&strategy).cloned();
    let old = || too_old(strategy, goals, view);
    if strategy == Strategy::Cold {
        // One that may not be restarted is not asked about.
        let told = || view.restarted.as_ref().err().cloned();
        return unable.or_else(old).or_else(forbidden).or_else(told).or_else(refused);
    }
    let placed = goals.auto.only_cold.as_ref().map(Obstacle::new);
    placed
        .or_else(|| ends().find_map(unfitness))
        .or(unable)
        .or_else(old)
        .or_else(|| view.carried.as_ref().err().cloned())
        .or_else(refused)
        .or_else(forbidden)
}

/// What the caller does not allow.
fn forbidden(strategy: Strategy, goals: &Goals) -> Option<Obstacle> {
    if strategy == Strategy::Cold && !goals.auto.allow_restart {
        let remedy = "allow a restart (--allow-restart), if the workload may lose its memory and its connections";
        return Some(Obstacle::new("needs --allow-restart, since memory and connections are lost").remedy(remedy));
    }
    if strategy.path().post_copy && !goals.auto.accept_loss {
        return Some(Obstacle::new("needs --accept-loss, since losing a node would lose the workload"));
    }
    let cannot_verify = goals.verify && strategy != Strategy::Live;
    cannot_verify.then(|| Obstacle::new("cannot verify").remedy("leave the verification away"))
}

fn unfitness(end: &End) -> Option<Obstacle> {
    let why = end.unfit.as_ref()?;
    let obstacle = Obstacle::new(format!("node {} is not fit for migrations: {why}", end.node)).on(&end.node);
    Some(obstacle.remedy("run `podferry check` on the node"))
}

/// What a node's agent does not know.
fn inability(strategy: Strategy, end: &End) -> Option<Obstacle> {
    let (knows, what) = match strategy {
        Strategy::Cold => (end.cold, "cold migrations, or its node lacks what they need"),
        Strategy::Postcopy | Strategy::Hybrid => (end.post_copy, "post-copy"),
        Strategy::Warm | Strategy::Live | Strategy::Application => return None,
    };
    (!knows).then(|| Obstacle::new(format!("the agent of node {} does not know {what}", end.node)).on(&end.node))
}

fn too_old(strategy: Strategy, goals: &Goals, view: &View<'_>) -> Option<Obstacle> {
    let wishes = Wishes { strategy, bandwidth_limit: goals.bandwidth_limit };
    let needs = [(Some(view.source), wishes.of_source()), (view.target, wishes.of_target())];
    needs.into_iter().find_map(|(end, needed)| {
        let end = end.filter(|end| end.version < needed)?;
        let why =
            format!("the agent of node {} speaks version {} of the protocol, not {needed}", end.node, end.version);
        let newest = Version::OURS.current;
        Some(
            Obstacle::new(why)
                .on(&end.node)
                .remedy(&format!("update the agent: this coordinator speaks version {newest}")),
        )
    })
}

fn nothing_works(obstacles: &BTreeMap<Strategy, Obstacle>) -> Failure {
    let mut remedies: Vec<&str> = Vec::new();
    // What keeps warm from it keeps all but cold; whoever asked for a flag is told of that last.
    for strategy in [Strategy::Warm, Strategy::Live, Strategy::Cold] {
        let remedy = obstacles.get(&strategy).and_then(|obstacle| obstacle.remedy.as_deref());
        remedies.extend(remedy.filter(|remedy| !remedies.contains(remedy)));
    }
    let message = format!("no strategy can move the workload: {}", words::all(obstacles));
    let failure = Failure::new(FailureCode::FailedPrecondition, message).in_phase("preflight");
    let failure = if remedies.is_empty() { failure } else { failure.remedy(remedies.join("; or ")) };
    match obstacles.get(&Strategy::Warm).and_then(|obstacle| obstacle.node.clone()) {
        Some(node) => failure.on(node),
        None => failure,
    }
}
