//! Which strategy for which application: rules that are applied to the measurements, and nothing else.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::{
    groups::{Axis, Cell, Metric, Situation, Sweep},
    model::Growth,
    names,
    results::{Strategy, Workload},
    stats::Spread,
};

/// So many runs that moved make a strategy a candidate.
pub(crate) const LEAST_RUNS: usize = 3;
/// A kind of application has one strategy when it wins in this share of the situations that were decided.
const MAJORITY: f64 = 2.0 / 3.0;

/// The rules, as a reader is told them. What follows does just that.
pub(crate) const RULES: [&str; 6] = [
    "A candidate is a strategy of podferry's own with at least 3 runs in the situation, of which none failed, none was refused, and none lost \
     or doubled anything that had been confirmed to a client. Why another one is none is said.",
    "A candidate whose clients saw no failed request and no connection closed goes before one whose clients did.",
    "Among those the one with the smallest median of the longest service gap wins; of the downtime, where there were no clients.",
    "Those whose bounds overlap the winner's are as good. Of them all the one that costs the least CPU time on both nodes is recommended.",
    "Post-copy and hybrid lose the workload when a node or the link fails at the wrong moment. They are recommended beside the winner, with \
     --accept-loss, and only when their bounds lie below its bounds.",
    "With fewer than two candidates there is not enough data for a choice.",
];

/// What a strategy is worth in a situation.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Judged {
    /// Which one.
    pub(crate) strategy: Strategy,
    /// What is compared in the situation; one that lacks it is no candidate.
    pub(crate) gap_ms: Option<Spread>,
    /// CPU time on both nodes.
    pub(crate) cpu_s: Option<f64>,
    /// Its clients saw nothing but the gap.
    pub(crate) unseen: bool,
    /// Why it is no candidate.
    pub(crate) ruled_out: Option<String>,
}

/// What is recommended in a situation.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Advice {
    /// The kind of application.
    pub(crate) workload: Workload,
    /// The situation in words.
    pub(crate) situation: String,
    /// What was compared: the longest service gap, or the downtime where there are no clients.
    pub(crate) by: &'static str,
    /// What to take; none when there is not enough data.
    pub(crate) take: Option<Strategy>,
    /// Those that are as good.
    pub(crate) as_good: Vec<Strategy>,
    /// Those that are better, for who accepts a loss.
    pub(crate) with_loss: Vec<Strategy>,
    /// What `auto` chose, and how often.
    pub(crate) auto_chose: BTreeMap<String, usize>,
    /// All that were tried, peers not counted.
    pub(crate) judged: Vec<Judged>,
}

impl Advice {
    /// By the [`RULES`].
    pub(crate) fn of(situation: &Situation<'_>) -> Self {
        let own = situation.cells.iter().filter(|cell| is_own(cell.scenario.strategy));
        let has_gaps = situation.cells.iter().any(|cell| cell.spread(Metric::Gap).is_some());
        let metric = if has_gaps { Metric::Gap } else { Metric::Downtime };
        let judged: Vec<Judged> = own.map(|cell| judge(cell, metric)).collect();
        let choice = choose(&judged);
        let (take, as_good, with_loss) = choice.unwrap_or_default();
        Self {
            workload: situation.scenario.workload,
            situation: names::situation(&situation.scenario, &[]),
            by: metric.title(),
            take,
            as_good,
            with_loss,
            auto_chose: situation.cell(Strategy::Auto).map(auto_choices).unwrap_or_default(),
            judged,
        }
    }

    /// One strategy's judgement.
    pub(crate) fn judged(&self, strategy: Strategy) -> Option<&Judged> {
        self.judged.iter().find(|judged| judged.strategy == strategy)
    }

    /// Whether all that auto chose is recommended, as good, or better; none when it did not choose or nothing is recommended.
    pub(crate) fn auto_agrees(&self) -> Option<bool> {
        let good = self.take.iter().chain(&self.as_good).chain(&self.with_loss);
        let good: Vec<&str> = good.map(|strategy| word(*strategy)).collect();
        let judged = self.take.is_some() && !self.auto_chose.is_empty();
        judged.then(|| self.auto_chose.keys().all(|chosen| good.contains(&chosen.as_str())))
    }
}

fn is_own(strategy: Strategy) -> bool {
    !names::is_peer(strategy) && strategy != Strategy::Auto
}

/// A strategy's word on the command line.
fn word(strategy: Strategy) -> &'static str {
    if strategy == Strategy::PostCopy { "postcopy" } else { names::look(strategy).name }
}

fn judge(cell: &Cell<'_>, metric: Metric) -> Judged {
    let gap = cell.spread(metric);
    let seen = cell.sum(|clients| clients.failed_requests + clients.connection_resets);
    Judged {
        strategy: cell.scenario.strategy,
        gap_ms: gap,
        cpu_s: cell.spread(Metric::Cpu).map(|cpu| cpu.median),
        unseen: seen == 0,
        ruled_out: ruled_out(cell, gap.as_ref()),
    }
}

fn ruled_out(cell: &Cell<'_>, gap: Option<&Spread>) -> Option<String> {
    let (refused, failed) = cell.refused_and_failed();
    let (runs, lost) = (cell.runs.len(), cell.sum(|clients| clients.lost_items));
    if failed > 0 {
        return Some(format!("{failed} of {runs} failed"));
    }
    if refused > 0 {
        return Some(format!("{refused} of {runs} refused"));
    }
    if lost > 0 {
        return Some(format!("{lost} items lost or doubled"));
    }
    let measured = gap.map_or(0, |gap| gap.n);
    (measured < LEAST_RUNS).then(|| format!("{measured} measured, {LEAST_RUNS} needed"))
}

type Choice = (Option<Strategy>, Vec<Strategy>, Vec<Strategy>);

fn choose(judged: &[Judged]) -> Option<Choice> {
    let measured = |one: &Judged| Some((one.strategy, one.gap_ms?, one.cpu_s, one.unseen));
    let all: Vec<_> = judged.iter().filter(|one| one.ruled_out.is_none()).filter_map(measured).collect();
    if all.len() < 2 {
        return None;
    }
    let (risky, safe): (Vec<_>, Vec<_>) = all.into_iter().partition(|(strategy, ..)| names::risks_loss(*strategy));
    let any_unseen = safe.iter().any(|(.., unseen)| *unseen);
    let field: Vec<_> = safe.into_iter().filter(|(.., unseen)| *unseen || !any_unseen).collect();
    let winner = field.iter().min_by(|one, other| one.1.median.total_cmp(&other.1.median))?.1;
    let mut equals: Vec<_> = field.into_iter().filter(|(_, gap, ..)| gap.overlaps(&winner)).collect();
    // What has no cost goes behind what has one.
    let order = |(_, gap, cpu, _): &(_, Spread, Option<f64>, _)| (cpu.unwrap_or(f64::INFINITY), gap.median);
    equals.sort_by(|one, other| {
        let (one, other) = (order(one), order(other));
        one.0.total_cmp(&other.0).then(one.1.total_cmp(&other.1))
    });
    let mut equals = equals.into_iter().map(|(strategy, ..)| strategy);
    let take = equals.next()?;
    let bound = judged.iter().find(|one| one.strategy == take)?.gap_ms?.low.min(winner.low);
    let better = risky.into_iter().filter(|(_, gap, ..)| gap.high < bound).map(|(strategy, ..)| strategy);
    Some((Some(take), equals.collect(), better.collect()))
}

/// The runner notes `chose live: why`.
fn auto_choices(cell: &Cell<'_>) -> BTreeMap<String, usize> {
    let mut choices = BTreeMap::new();
    for note in cell.runs.iter().flat_map(|run| &run.of.notes) {
        if let Some((chosen, _)) = note.strip_prefix("chose ").and_then(|rest| rest.split_once(':')) {
            *choices.entry(chosen.to_owned()).or_default() += 1;
        }
    }
    choices
}

/// How often `auto` chose what the measurements recommend.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Auto {
    /// Situations in which it chose and something is recommended.
    pub(crate) judged: usize,
    /// Those in which all that it chose is recommended, as good, or better.
    pub(crate) agrees: usize,
    /// The others.
    pub(crate) differs: Vec<String>,
}

impl Auto {
    /// In all situations.
    pub(crate) fn of(advice: &[Advice]) -> Self {
        let mut auto = Self::default();
        for one in advice {
            match one.auto_agrees() {
                Some(true) => auto.agrees += 1,
                Some(false) => auto.differs.push(one.situation.clone()),
                None => continue,
            }
            auto.judged += 1;
        }
        auto
    }
}

/// What was made of the measurements.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Evaluation<'a> {
    /// What is recommended in each situation, in their order.
    pub(crate) advice: &'a [Advice],
    /// Where live begins to be better than warm.
    pub(crate) thresholds: &'a [Threshold],
    /// How the downtime of warm grows with memory.
    pub(crate) warm_growth: &'a [Growth],
}

/// What is recommended for a kind of application.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Kind {
    /// The workload that stands for it.
    pub(crate) workload: Workload,
    /// How many situations were measured, decided or not.
    pub(crate) situations: usize,
    /// How often each strategy is recommended.
    pub(crate) wins: BTreeMap<Strategy, usize>,
    /// The one that is recommended in two thirds of the decided situations or more.
    pub(crate) take: Option<Strategy>,
}

/// What is recommended for each kind.
pub(crate) fn kinds(advice: &[Advice]) -> Vec<Kind> {
    let mut kinds: BTreeMap<Workload, Kind> = BTreeMap::new();
    for one in advice {
        let workload = one.workload;
        let fresh = || Kind { workload, situations: 0, wins: BTreeMap::new(), take: None };
        let kind = kinds.entry(workload).or_insert_with(fresh);
        kind.situations += 1;
        if let Some(take) = one.take {
            *kind.wins.entry(take).or_default() += 1;
        }
    }
    kinds.into_values().map(|kind| Kind { take: majority(&kind.wins), ..kind }).collect()
}

#[expect(clippy::cast_precision_loss, reason = "counts of situations")]
fn majority(wins: &BTreeMap<Strategy, usize>) -> Option<Strategy> {
    let decided = wins.values().sum::<usize>() as f64;
    let (strategy, most) = wins.iter().max_by_key(|(_, count)| **count)?;
    (*most as f64 >= decided * MAJORITY).then_some(*strategy)
}

/// Where one strategy begins to be better than another.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Threshold {
    /// Along what.
    pub(crate) axis: Axis,
    /// What is the same everywhere.
    pub(crate) situation: String,
    /// The one that is looked at.
    pub(crate) strategy: Strategy,
    /// The one that it is compared with.
    pub(crate) against: Strategy,
    /// Each place where both were tried and `against` moved; that of a link that is not shaped is absent.
    pub(crate) places: Vec<(Option<f64>, Which)>,
    /// Its lines.
    #[serde(skip)]
    pub(crate) lines: Vec<usize>,
}

/// How a strategy compares with another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Which {
    /// Its median downtime is below that of the other.
    Better,
    /// It is not.
    NotBetter,
    /// None of its runs moved.
    DidNotMove,
}

impl Threshold {
    /// Of live against warm, which is what `auto` weighs; none where they were not tried side by side.
    pub(crate) fn live_against_warm(sweep: &Sweep<'_, '_>) -> Option<Self> {
        let (strategy, against) = (Strategy::Live, Strategy::Warm);
        let compare = |(place, of): &(f64, &Situation<'_>)| {
            let warm = of.cell(against)?.spread(Metric::Downtime)?;
            let which = match of.cell(strategy)?.spread(Metric::Downtime) {
                Some(live) if live.median < warm.median => Which::Better,
                Some(_) => Which::NotBetter,
                None => Which::DidNotMove,
            };
            Some((place.is_finite().then_some(*place), which))
        };
        let places: Vec<_> = sweep.places.iter().filter_map(compare).collect();
        let situation = names::situation(sweep.scenario(), &[sweep.axis.part()]);
        let found = Self { axis: sweep.axis, situation, strategy, against, places, lines: sweep.lines() };
        (found.places.len() > 1).then_some(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(strategy: Strategy, gaps: [f64; 3], cpu_s: f64) -> Judged {
        Judged { strategy, gap_ms: Spread::of(gaps), cpu_s: Some(cpu_s), unseen: true, ruled_out: None }
    }

    #[test]
    fn the_shortest_gap_wins() {
        let field =
            [judged(Strategy::Warm, [300.0, 310.0, 320.0], 1.0), judged(Strategy::Live, [100.0, 110.0, 120.0], 2.0)];
        assert_eq!(choose(&field), Some((Some(Strategy::Live), vec![], vec![])));
    }

    #[test]
    fn of_those_that_are_as_good_the_cheaper_one_is_taken() {
        let field =
            [judged(Strategy::Warm, [110.0, 120.0, 130.0], 1.0), judged(Strategy::Live, [100.0, 110.0, 120.0], 2.0)];
        assert_eq!(choose(&field), Some((Some(Strategy::Warm), vec![Strategy::Live], vec![])));
    }

    #[test]
    fn what_risks_a_loss_is_never_taken_but_named_where_it_is_better() {
        let field = [
            judged(Strategy::Warm, [300.0, 310.0, 320.0], 1.0),
            judged(Strategy::PostCopy, [100.0, 110.0, 120.0], 1.0),
            judged(Strategy::Hybrid, [290.0, 300.0, 310.0], 1.0),
        ];
        assert_eq!(choose(&field), Some((Some(Strategy::Warm), vec![], vec![Strategy::PostCopy])));
    }

    #[test]
    fn one_whose_clients_see_nothing_goes_before_a_faster_one_whose_clients_do() {
        let mut fast = judged(Strategy::Cold, [10.0, 10.0, 10.0], 1.0);
        fast.unseen = false;
        let field = [fast, judged(Strategy::Warm, [300.0, 310.0, 320.0], 1.0)];
        assert_eq!(choose(&field), Some((Some(Strategy::Warm), vec![], vec![])));
    }

    #[test]
    fn one_candidate_is_not_enough_data() {
        let mut failed = judged(Strategy::Live, [1.0, 1.0, 1.0], 1.0);
        failed.ruled_out = Some("1 of 3 failed".into());
        assert_eq!(choose(&[failed, judged(Strategy::Warm, [3.0, 3.0, 3.0], 1.0)]), None);
    }

    #[test]
    fn a_kind_needs_two_thirds_of_the_decided_situations() {
        assert_eq!(majority(&BTreeMap::from([(Strategy::Live, 2), (Strategy::Warm, 1)])), Some(Strategy::Live));
        assert_eq!(majority(&BTreeMap::from([(Strategy::Live, 3), (Strategy::Warm, 2)])), None);
        assert_eq!(majority(&BTreeMap::new()), None);
    }
}
