//! The middle of some measurements, and how far they lie apart.

use serde::Serialize;

use crate::migration::median;

/// Middle, lowest and highest of some rounds; not a number without any.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    /// The middle one, or what is between the two in the middle.
    pub median: f64,
    /// The lowest.
    pub min: f64,
    /// The highest.
    pub max: f64,
}

impl Spread {
    /// Of these.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let values: Vec<f64> = values.into_iter().collect();
        let least = values.iter().copied().reduce(f64::min);
        let most = values.iter().copied().reduce(f64::max);
        let or_none = |value: Option<f64>| value.unwrap_or(f64::NAN);
        Self { median: or_none(median(values)), min: or_none(least), max: or_none(most) }
    }

    /// With so many digits behind the point.
    pub fn digits(self, digits: usize) -> String {
        format!("{:.digits$} ({:.digits$}–{:.digits$})", self.median, self.min, self.max)
    }
}

impl std::fmt::Display for Spread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.digits(2))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_few_is_theirs() {
        let shown = |values: &[f64]| Spread::of(values.iter().copied()).to_string();
        assert_eq!(shown(&[3.0, 1.0, 2.0]), "2.00 (1.00–3.00)");
        assert_eq!(shown(&[4.0, 1.0, 2.0, 3.0]), "2.50 (1.00–4.00)");
        assert_eq!(shown(&[1.0]), "1.00 (1.00–1.00)");
        assert_eq!(Spread::of([1234.5, 1000.4]).digits(0), "1117 (1000–1234)");
    }

    #[test]
    fn nothing_has_no_median() {
        assert!(Spread::of([]).median.is_nan());
    }
}
