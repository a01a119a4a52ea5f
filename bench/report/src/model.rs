//! How the downtime of warm grows with memory: what `auto` reckons with.

use serde::Serialize;

use crate::{
    groups::{Cell, Metric, Sweep, mib},
    names,
    read::Run,
    results::Strategy,
    stats::median,
};

/// A straight line through the downtimes of a sweep along memory.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Growth {
    /// Whose.
    pub(crate) strategy: Strategy,
    /// What is the same everywhere.
    pub(crate) situation: String,
    /// Runs that it was drawn through.
    pub(crate) n: usize,
    /// Downtime without memory, in ms.
    pub(crate) fixed_ms: f64,
    /// Downtime for each MiB, in ms.
    pub(crate) ms_per_mib: f64,
    /// The same the other way round, in MiB/s; absent when the downtime does not grow.
    pub(crate) mib_per_s: Option<f64>,
    /// Its lines.
    #[serde(skip)]
    pub(crate) lines: Vec<usize>,
}

impl Growth {
    /// Of a strategy along memory; none when it moved with one size only.
    pub(crate) fn of(sweep: &Sweep<'_, '_>, strategy: Strategy) -> Option<Self> {
        let cells = sweep.places.iter().filter_map(|(_, place)| place.cell(strategy));
        let runs: Vec<_> = cells.flat_map(Cell::moved).collect();
        let held = |run: &Run| run.of.resident_bytes.map_or_else(|| mib(run.of.scenario.memory_mib << 20), mib);
        let points: Vec<(f64, f64)> =
            runs.iter().filter_map(|run| Some((held(run), Metric::Downtime.of(&run.of)?))).collect();
        let (fixed_ms, ms_per_mib) = theil_sen(&points)?;
        let mib_per_s = (ms_per_mib > 0.0).then(|| 1000.0 / ms_per_mib);
        let situation = names::situation(sweep.scenario(), &[sweep.axis.part()]);
        let lines = runs.iter().map(|run| run.line).collect();
        Some(Self { strategy, situation, n: points.len(), fixed_ms, ms_per_mib, mib_per_s, lines })
    }
}

/// Where a line begins and how it rises: the median of the slopes between all pairs (Theil and Sen), and the median of what is left. A run
/// that took far too long does not bend it.
fn theil_sen(points: &[(f64, f64)]) -> Option<(f64, f64)> {
    let later = |index: usize| points[index + 1..].iter();
    let pairs = points.iter().enumerate().flat_map(|(index, one)| later(index).map(move |other| (one, other)));
    // Sizes that differ by less than a MiB are the same size.
    let slopes = pairs
        .filter(|(one, other)| (one.0 - other.0).abs() >= 1.0)
        .map(|(one, other)| (other.1 - one.1) / (other.0 - one.0));
    let slope = median(slopes.collect())?;
    let begin = median(points.iter().map(|(x, y)| y - slope * x).collect())?;
    Some((begin, slope))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn one_size_has_no_growth() {
        assert_eq!(theil_sen(&[(64.0, 100.0), (64.2, 120.0)]), None);
        assert_eq!(theil_sen(&[]), None);
    }

    #[test]
    fn a_run_that_took_far_too_long_does_not_bend_the_line() {
        let mut points: Vec<(f64, f64)> =
            (1..=6).map(|size| f64::from(size) * 100.0).map(|x| (x, 180.0 + 4.0 * x)).collect();
        points[3].1 = 90_000.0;
        let (begin, slope) = theil_sen(&points).unwrap();
        assert!((slope - 4.0).abs() < 1e-9 && (begin - 180.0).abs() < 1e-6, "{begin} {slope}");
    }

    proptest! {
        #[test]
        fn points_on_a_line_give_that_line(begin in 0.0..1e4_f64, slope in 0.01..100.0_f64, sizes in prop::collection::vec(1_u32..5000, 2..20)) {
            prop_assume!(sizes.iter().any(|size| *size != sizes[0]));
            let points: Vec<(f64, f64)> = sizes.iter().map(|size| f64::from(*size)).map(|x| (x, begin + slope * x)).collect();
            let (found_begin, found_slope) = theil_sen(&points).unwrap();
            prop_assert!((found_slope - slope).abs() < 1e-6 * slope.max(1.0));
            prop_assert!((found_begin - begin).abs() < 1e-3);
        }
    }
}
