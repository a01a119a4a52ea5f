//! Runs that belong together, and what was measured of them.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::{
    names::{Part, STRATEGIES},
    read::Run,
    results::{Measurement, Outcome, Scenario, Strategy, Workload},
    stats::Spread,
};

/// A number that is taken of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Metric {
    /// Freeze to first instruction, in ms.
    Downtime,
    /// The longest service gap among the clients of the run, in ms.
    Gap,
    /// The whole migration, in ms.
    Total,
    /// Until fully operational on the target, in ms.
    Deployment,
    /// Before packing, in MiB.
    Raw,
    /// On the wire, in MiB.
    Wire,
    /// Of both nodes, in s.
    Cpu,
    /// The larger of the two nodes', in MiB.
    PeakMemory,
}

const MIB: f64 = (1 << 20) as f64;

/// Bytes in MiB.
#[expect(clippy::cast_precision_loss, reason = "shown with three digits")]
pub(crate) fn mib(bytes: u64) -> f64 {
    bytes as f64 / MIB
}

impl Metric {
    /// Of one run; none when it was not taken.
    pub(crate) fn of(self, run: &Measurement) -> Option<f64> {
        match self {
            Self::Downtime => run.downtime_ms,
            Self::Gap => run.clients.as_ref()?.gaps_ms.iter().copied().reduce(f64::max),
            Self::Total => run.total_ms,
            Self::Deployment => run.deployment_ms,
            Self::Raw => run.raw_bytes.map(mib),
            Self::Wire => run.wire_bytes.map(mib),
            Self::Cpu => run.cost.map(|[source, target]| source.cpu_s + target.cpu_s),
            Self::PeakMemory => {
                run.cost.map(|[source, target]| mib(source.peak_memory_bytes.max(target.peak_memory_bytes)))
            }
        }
    }

    /// What it is called, with its unit.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Downtime => "Downtime (ms)",
            Self::Gap => "Longest service gap (ms)",
            Self::Total => "Total time (ms)",
            Self::Deployment => "Deployment latency (ms)",
            Self::Raw => "Moved, before packing (MiB)",
            Self::Wire => "On the wire (MiB)",
            Self::Cpu => "CPU of both nodes (s)",
            Self::PeakMemory => "Peak memory of a node (MiB)",
        }
    }
}

/// What a parameter is swept over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Axis {
    /// Memory, in MiB.
    Memory,
    /// Bandwidth of the link, in Mbit/s; infinite where it is not shaped.
    Bandwidth,
    /// Round-trip time of the link, in ms.
    RoundTrip,
    /// Share of the memory that is written to each second, in percent.
    Dirty,
    /// Clients at once.
    Clients,
}

impl Axis {
    /// Where a scenario lies on it; none where it does not.
    pub(crate) fn of(self, scenario: &Scenario) -> Option<f64> {
        #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
        let float = |number: u64| number as f64;
        match self {
            Self::Memory => Some(float(scenario.memory_mib)),
            Self::Bandwidth => Some(scenario.link_mbit.map_or(f64::INFINITY, float)),
            Self::RoundTrip => Some(scenario.link_rtt_ms),
            Self::Dirty => scenario.dirty_percent,
            Self::Clients => Some(scenario.clients.into()),
        }
    }

    /// The part of a situation that varies along it.
    pub(crate) fn part(self) -> Part {
        match self {
            Self::Memory => Part::Memory,
            Self::Bandwidth => Part::Bandwidth,
            Self::RoundTrip => Part::RoundTrip,
            Self::Dirty => Part::Dirty,
            Self::Clients => Part::Clients,
        }
    }

    fn blank(self, scenario: &mut Scenario) {
        match self {
            Self::Memory => scenario.memory_mib = 0,
            Self::Bandwidth => scenario.link_mbit = None,
            Self::RoundTrip => scenario.link_rtt_ms = 0.0,
            Self::Dirty => scenario.dirty_percent = None,
            Self::Clients => scenario.clients = 0,
        }
    }
}

/// All of a scenario but the strategy, with an order.
type Key = (Workload, u64, Option<u64>, u32, u64, Option<u64>, Option<u64>, Option<u64>, u64);

fn key(of: &Scenario) -> Key {
    // The bits of floats that are not negative have the order of the floats.
    let (dirty, cpu) = (of.dirty_percent.map(f64::to_bits), of.cpu_limit.map(f64::to_bits));
    let rtt = of.link_rtt_ms.to_bits();
    (of.workload, of.memory_mib, dirty, of.clients, of.think_ms, cpu, of.memory_limit_mib, of.link_mbit, rtt)
}

/// The runs of one scenario.
#[derive(Debug, Clone)]
pub(crate) struct Cell<'a> {
    /// What was run.
    pub(crate) scenario: Scenario,
    /// Its repeats.
    pub(crate) runs: Vec<&'a Run>,
}

impl<'a> Cell<'a> {
    /// Those that ended on the target.
    pub(crate) fn moved(&self) -> impl Iterator<Item = &'a Run> + '_ {
        self.runs.iter().copied().filter(|run| run.moved())
    }

    /// Of the runs that ended on the target.
    pub(crate) fn spread(&self, metric: Metric) -> Option<Spread> {
        Spread::of(self.moved().filter_map(|run| metric.of(&run.of)))
    }

    /// How many were refused, and how many failed.
    pub(crate) fn refused_and_failed(&self) -> (usize, usize) {
        let count = |is: fn(&Outcome) -> bool| self.runs.iter().filter(|run| is(&run.of.outcome)).count();
        (
            count(|outcome| matches!(outcome, Outcome::Refused(_))),
            count(|outcome| matches!(outcome, Outcome::Failed(_))),
        )
    }

    /// A sum over what the clients of all runs saw.
    pub(crate) fn sum(&self, of: impl Fn(&crate::results::Clients) -> u64) -> u64 {
        self.runs.iter().filter_map(|run| run.of.clients.as_ref()).map(of).sum()
    }
}

/// The same situation, by each strategy that was tried in it.
#[derive(Debug, Clone)]
pub(crate) struct Situation<'a> {
    /// Its strategy is the first one's.
    pub(crate) scenario: Scenario,
    /// One for each strategy, in their order.
    pub(crate) cells: Vec<Cell<'a>>,
}

impl<'a> Situation<'a> {
    /// The runs of one strategy.
    pub(crate) fn cell(&self, strategy: Strategy) -> Option<&Cell<'a>> {
        self.cells.iter().find(|cell| cell.scenario.strategy == strategy)
    }

    /// Lines of all of them.
    pub(crate) fn lines(&self) -> Vec<usize> {
        self.cells.iter().flat_map(|cell| &cell.runs).map(|run| run.line).collect()
    }
}

/// All situations that runs are of.
pub(crate) fn situations(runs: &[Run]) -> Vec<Situation<'_>> {
    let mut cells: BTreeMap<(Key, Strategy), Vec<&Run>> = BTreeMap::new();
    for run in runs {
        let scenario = &run.of.scenario;
        cells.entry((key(scenario), scenario.strategy)).or_default().push(run);
    }
    let mut situations: BTreeMap<Key, Vec<Cell<'_>>> = BTreeMap::new();
    for ((key, _), runs) in cells {
        situations.entry(key).or_default().push(Cell { scenario: runs[0].of.scenario.clone(), runs });
    }
    situations.into_values().map(|cells| Situation { scenario: cells[0].scenario.clone(), cells }).collect()
}

/// Situations that differ along one axis only, in its order.
#[derive(Debug)]
pub(crate) struct Sweep<'a, 'b> {
    /// Along what they differ.
    pub(crate) axis: Axis,
    /// Two or more, one for each place on the axis.
    pub(crate) places: Vec<(f64, &'b Situation<'a>)>,
}

impl<'a> Sweep<'a, '_> {
    /// What is the same everywhere.
    pub(crate) fn scenario(&self) -> &Scenario {
        &self.places[0].1.scenario
    }

    /// The strategies that have been tried anywhere on it.
    pub(crate) fn strategies(&self) -> Vec<Strategy> {
        let tried = |strategy: &Strategy| self.places.iter().any(|(_, place)| place.cell(*strategy).is_some());
        STRATEGIES.into_iter().filter(tried).collect()
    }

    /// One strategy's numbers along the axis, where there are some.
    pub(crate) fn series(&self, strategy: Strategy, metric: Metric) -> Vec<(f64, Spread)> {
        let at = |(x, place): &(f64, &Situation<'a>)| Some((*x, place.cell(strategy)?.spread(metric)?));
        self.places.iter().filter_map(at).collect()
    }

    /// Lines of all of it.
    pub(crate) fn lines(&self) -> Vec<usize> {
        self.places.iter().flat_map(|(_, place)| place.lines()).collect()
    }
}

/// All sweeps along an axis in which some strategy was measured at two places or more; those with the most runs first.
pub(crate) fn sweeps<'a, 'b>(situations: &'b [Situation<'a>], axis: Axis) -> Vec<Sweep<'a, 'b>> {
    let mut groups: BTreeMap<Key, Vec<(f64, &Situation<'a>)>> = BTreeMap::new();
    for situation in situations {
        let Some(place) = axis.of(&situation.scenario) else { continue };
        let mut same = situation.scenario.clone();
        axis.blank(&mut same);
        groups.entry(key(&same)).or_default().push((place, situation));
    }
    let mut sweeps: Vec<_> = groups
        .into_values()
        .map(|mut places| {
            places.sort_by(|one, other| one.0.total_cmp(&other.0));
            Sweep { axis, places }
        })
        .filter(varies)
        .collect();
    sweeps.sort_by_key(|sweep| std::cmp::Reverse(sweep.lines().len()));
    sweeps
}

fn varies(sweep: &Sweep<'_, '_>) -> bool {
    let places = |strategy| sweep.places.iter().filter(|(_, place)| place.cell(strategy).is_some()).count();
    sweep.strategies().into_iter().any(|strategy| places(strategy) > 1)
}
