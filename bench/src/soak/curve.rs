//! Whether a process grows: what it had in the last third of a run against what it had in the second.

use serde::Serialize;

/// How much of what there was in the second third may come on top in the last: what allocators keep goes up and down.
const TOLERANCE_PERCENT: u64 = 10;

/// What is sampled of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Quantity {
    /// Resident memory, in KiB.
    ResidentKib,
    /// Open files.
    Descriptors,
}

impl Quantity {
    /// What may come on top however little there was.
    fn slack(self) -> u64 {
        match self {
            Self::ResidentKib => 2 << 10,
            Self::Descriptors => 4,
        }
    }

    /// In words for a table.
    pub fn words(self) -> &'static str {
        match self {
            Self::ResidentKib => "KiB resident",
            Self::Descriptors => "open files",
        }
    }
}

/// A quantity of a process over the whole run: medians of its thirds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Curve {
    /// Whose.
    pub process: String,
    /// What.
    pub quantity: Quantity,
    /// The median of the first third, in which there is much that is made only once.
    pub first: u64,
    /// The median of the second third.
    pub second: u64,
    /// The median of the last third.
    pub last: u64,
    /// Whether it did not grow from the second to the last.
    pub flat: bool,
}

impl Curve {
    /// Of samples in the order in which they were taken.
    pub fn of(process: &str, quantity: Quantity, samples: &[u64]) -> Self {
        let third = samples.len() / 3;
        let (first, rest) = samples.split_at(third);
        let (second, last) = rest.split_at(third);
        let [first, second, last] = [first, second, last].map(median);
        let flat = third > 0 && last <= second + second * TOLERANCE_PERCENT / 100 + quantity.slack();
        Self { process: process.to_owned(), quantity, first, second, last, flat }
    }
}

fn median(samples: &[u64]) -> u64 {
    let mut sorted = samples.to_vec();
    sorted.sort_unstable();
    sorted.get(sorted.len() / 2).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flat(quantity: Quantity, samples: impl Iterator<Item = u64>) -> bool {
        Curve::of("x", quantity, &samples.collect::<Vec<_>>()).flat
    }

    #[test]
    fn what_grows_with_each_migration_is_not_flat() {
        assert!(!flat(Quantity::Descriptors, 10..100));
        assert!(!flat(Quantity::ResidentKib, (0..90).map(|turn| 20_000 + turn * 200)));
    }

    #[test]
    fn what_grows_in_the_beginning_or_goes_up_and_down_is_flat() {
        assert!(flat(Quantity::ResidentKib, (0..90).map(|turn| if turn < 20 { turn * 1000 } else { 20_000 })));
        assert!(flat(Quantity::Descriptors, (0..90).map(|turn| 20 + turn % 4)));
        assert!(!flat(Quantity::Descriptors, std::iter::empty()), "nothing was sampled");
    }

    #[test]
    fn a_curve_is_the_medians_of_its_thirds() {
        let curve = Curve::of("agent", Quantity::Descriptors, &[1, 9, 1, 4, 5, 6, 7, 7, 100]);
        assert_eq!((curve.first, curve.second, curve.last), (1, 5, 7));
    }
}
