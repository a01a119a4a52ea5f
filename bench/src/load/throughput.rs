//! How many answers came when.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::milliseconds;
use crate::{migration::Span, moves::whole};

/// How finely time is cut. Slices begin at multiples of this since 1970, so those of all clients are the same.
pub const SLICE: Duration = Duration::from_millis(50);

/// Answers in slices of time that follow each other.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Throughput {
    /// The number of the first slice, counted from 1970.
    first: u64,
    /// Answers in each.
    slices: Vec<u64>,
}

impl Throughput {
    /// So many answers came at this time since 1970, which is not before any that was noted earlier.
    pub fn note(&mut self, unix: Duration, answers: u64) {
        let slice = u64::try_from(unix.as_millis() / SLICE.as_millis()).unwrap_or(u64::MAX);
        if self.slices.is_empty() {
            self.first = slice;
        }
        let index = usize::try_from(slice.saturating_sub(self.first)).unwrap_or(usize::MAX);
        if index >= self.slices.len() {
            self.slices.resize(index + 1, 0);
        }
        self.slices[index] += answers;
    }

    /// All answers.
    pub fn answers(&self) -> u64 {
        self.slices.iter().sum()
    }

    /// Answers in a second, by the slices that lie wholly within this time. `None` without such slices, and unless answers were noted
    /// before and after: at its ends a client did not count for all of a slice.
    pub fn rate_within(&self, span: Span) -> Option<f64> {
        let length = milliseconds(SLICE);
        let (begin, end) = (number(span.start / length, f64::ceil)?, number(span.end / length, f64::floor)?);
        let index = |slice: u64| usize::try_from(slice.checked_sub(self.first)?).ok();
        let (begin, end) = (index(begin)?, index(end)?);
        if begin == 0 || begin >= end || end >= self.slices.len() {
            return None;
        }
        let answers: u64 = self.slices[begin..end].iter().sum();
        Some(whole(answers) / (whole((end - begin) as u64) * SLICE.as_secs_f64()))
    }
}

fn number(value: f64, round: fn(f64) -> f64) -> Option<u64> {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "not negative, and far below 2^53")]
    (value >= 0.0).then(|| round(value) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noted(answers: &[(u64, u64)]) -> Throughput {
        let mut throughput = Throughput::default();
        for &(ms, answers) in answers {
            throughput.note(Duration::from_millis(ms), answers);
        }
        throughput
    }

    fn rate(throughput: &Throughput, start: f64, end: f64) -> Option<f64> {
        throughput.rate_within(Span { start, end })
    }

    #[test]
    fn answers_are_counted_in_slices_and_silence_is_slices_without_any() {
        let throughput = noted(&[(1010, 1), (1049, 2), (1050, 4), (1210, 8)]);
        assert_eq!(throughput, Throughput { first: 20, slices: vec![3, 4, 0, 0, 8] });
        assert_eq!(throughput.answers(), 15);
    }

    #[test]
    fn the_rate_is_that_of_whole_slices() {
        let throughput = noted(&[(1010, 1), (1060, 10), (1110, 20), (1160, 40), (1210, 80)]);
        assert_eq!(rate(&throughput, 1050.0, 1150.0), Some(300.0));
        assert_eq!(rate(&throughput, 1020.0, 1199.0), Some(300.0), "what is cut at either end does not count");
        assert!((rate(&throughput, 1050.0, 1200.0).unwrap() - 70.0 / 0.15).abs() < 1e-9);
    }

    #[test]
    fn where_the_client_did_not_count_all_the_while_there_is_no_rate() {
        let throughput = noted(&[(1010, 1), (1060, 10), (1110, 20), (1160, 40)]);
        assert_eq!(rate(&throughput, 1000.0, 1150.0), None, "from before its first answer");
        assert_eq!(rate(&throughput, 1050.0, 1200.0), None, "until its last");
        assert_eq!(rate(&throughput, 1060.0, 1090.0), None, "shorter than a slice");
        assert_eq!(rate(&throughput, 900.0, 950.0), None);
        assert_eq!(rate(&Throughput::default(), 1050.0, 1150.0), None);
    }
}
