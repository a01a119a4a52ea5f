//! Median, quartiles and what is not chance about them.

use fastrand::Rng;
use serde::Serialize;

/// How many samples the bootstrap draws.
const DRAWS: usize = 2000;
/// The same numbers give the same report.
const SEED: u64 = 0x706f_6466;
/// From so many values on, drawing from them says something; below it, the smallest and the largest are given.
pub(crate) const LEAST_FOR_INTERVAL: usize = 5;

/// What the bounds of a [`Spread`] are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Bounds {
    /// The 95 % confidence interval of the median, from a percentile bootstrap.
    Confidence95,
    /// The smallest and the largest: too few values for an interval.
    Range,
}

/// Where values lie.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Spread {
    /// How many values.
    pub(crate) n: usize,
    /// Half lie below.
    pub(crate) median: f64,
    /// A quarter lies below.
    pub(crate) q1: f64,
    /// Three quarters lie below.
    pub(crate) q3: f64,
    /// The smallest.
    pub(crate) min: f64,
    /// The largest.
    pub(crate) max: f64,
    /// Lower bound of the median.
    pub(crate) low: f64,
    /// Upper bound of the median.
    pub(crate) high: f64,
    /// What `low` and `high` are.
    pub(crate) bounds: Bounds,
}

impl Spread {
    /// Of these values; none when there are none.
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut sorted: Vec<f64> = values.into_iter().filter(|value| value.is_finite()).collect();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let enough = sorted.len() >= LEAST_FOR_INTERVAL;
        let (low, high) = if enough { bootstrap(&sorted) } else { (min, max) };
        Some(Self {
            n: sorted.len(),
            median: quantile(&sorted, 0.5),
            q1: quantile(&sorted, 0.25),
            q3: quantile(&sorted, 0.75),
            min,
            max,
            low,
            high,
            bounds: if enough { Bounds::Confidence95 } else { Bounds::Range },
        })
    }

    /// Whether the bounds of the two have something in common.
    pub(crate) fn overlaps(&self, other: &Self) -> bool {
        self.low <= other.high && other.low <= self.high
    }
}

/// The one in the middle; none when there are none.
pub(crate) fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    (!values.is_empty()).then(|| quantile(&values, 0.5))
}

/// The quantile `share` of sorted values, between two of them in proportion (type 7 of Hyndman and Fan, as R and `NumPy` do it).
fn quantile(sorted: &[f64], share: f64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "nobody has 2^52 runs")]
    let place = (sorted.len() - 1) as f64 * share;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an index of the slice")]
    let below = place.floor() as usize;
    let above = (below + 1).min(sorted.len() - 1);
    sorted[below] + (sorted[above] - sorted[below]) * place.fract()
}

/// 2.5 % and 97.5 % of the medians of samples that are drawn from the values, each as large as they are.
fn bootstrap(sorted: &[f64]) -> (f64, f64) {
    let mut random = Rng::with_seed(SEED);
    let mut sample = vec![0.0; sorted.len()];
    let mut medians: Vec<f64> = (0..DRAWS)
        .map(|_| {
            sample.fill_with(|| sorted[random.usize(..sorted.len())]);
            sample.sort_by(f64::total_cmp);
            quantile(&sample, 0.5)
        })
        .collect();
    medians.sort_by(f64::total_cmp);
    (quantile(&medians, 0.025), quantile(&medians, 0.975))
}

#[cfg(test)]
#[expect(clippy::float_cmp, reason = "sums of halves are exact")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn nothing_has_no_spread() {
        assert_eq!(Spread::of([]), None);
        assert_eq!(Spread::of([f64::NAN]), None);
    }

    #[test]
    fn quartiles_are_those_of_r() {
        // quantile(c(1, 2, 3, 4), c(.25, .5, .75)): 1.75 2.50 3.25
        let spread = Spread::of([4.0, 1.0, 3.0, 2.0]).unwrap();
        assert_eq!([spread.q1, spread.median, spread.q3], [1.75, 2.5, 3.25]);
        assert_eq!((spread.low, spread.high, spread.bounds), (1.0, 4.0, Bounds::Range));
    }

    #[test]
    fn the_interval_of_the_median_of_1_to_101_is_near_that_of_order_statistics() {
        // Of 101 values the 41st and the 61st bound the median with 95 % (binomial).
        let spread = Spread::of((1..=101).map(f64::from)).unwrap();
        assert_eq!(spread.bounds, Bounds::Confidence95);
        assert!((spread.low - 41.0).abs() <= 2.0 && (spread.high - 61.0).abs() <= 2.0, "{spread:?}");
    }

    #[test]
    fn the_same_values_have_the_same_interval() {
        let values = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6];
        assert_eq!(Spread::of(values), Spread::of(values.into_iter().rev()));
    }

    proptest! {
        #[test]
        fn bounds_enclose_the_median_and_lie_within_the_values(values in prop::collection::vec(0.0..1e9, 1..60)) {
            let spread = Spread::of(values.iter().copied()).unwrap();
            prop_assert_eq!(spread.n, values.len());
            let steps = [spread.min, spread.q1, spread.median, spread.q3, spread.max];
            prop_assert!(steps.is_sorted(), "{:?}", spread);
            prop_assert!([spread.min, spread.low, spread.median, spread.high, spread.max].is_sorted(), "{:?}", spread);
        }

        #[test]
        fn scaling_the_values_scales_the_spread(values in prop::collection::vec(1.0..1e6, 1..30)) {
            let once = Spread::of(values.iter().copied()).unwrap();
            let twice = Spread::of(values.iter().map(|value| value * 2.0)).unwrap();
            prop_assert_eq!([once.median * 2.0, once.low * 2.0, once.high * 2.0], [twice.median, twice.low, twice.high]);
        }
    }
}
