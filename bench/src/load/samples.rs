//! Every answer of a client with the time it took, for percentiles and for what happened when.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use super::milliseconds;
use crate::{migration::Span, moves::whole};

/// How many answers a client notes at most: half an hour at one in a millisecond.
const MOST: usize = 1_800_000;

/// Answers in the order in which they came.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Samples {
    /// When the first came, in µs since 1970.
    first_us: u64,
    /// µs since the answer before, and µs that it took from the request on.
    answers: Vec<(u64, u64)>,
    /// When the last that is noted came, in µs since 1970.
    last_us: u64,
}

/// One answer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sample {
    /// When it came, in ms since 1970.
    pub unix_ms: f64,
    /// How long it took from the request on, in ms.
    pub took_ms: f64,
}

/// Percentiles of the time from a request to its answer, in ms; to three significant digits, which is what the histogram keeps. The slowest is exact.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Percentiles {
    /// How many answers.
    pub count: u64,
    /// Half were faster.
    pub p50_ms: f64,
    /// 90 of 100 were faster.
    pub p90_ms: f64,
    /// 99 of 100 were faster.
    pub p99_ms: f64,
    /// The slowest.
    pub max_ms: f64,
}

impl Samples {
    /// An answer came at this time since 1970, not before any that was noted earlier, and took so long.
    pub fn note(&mut self, unix: Duration, took: Duration) {
        let micros = |duration: Duration| u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        let now = micros(unix);
        if self.answers.is_empty() {
            self.first_us = now;
            self.last_us = now;
        }
        if self.answers.len() < MOST {
            self.answers.push((now.saturating_sub(self.last_us), micros(took)));
            self.last_us = now.max(self.last_us);
        }
    }

    /// All of them.
    pub fn all(&self) -> impl Iterator<Item = Sample> + '_ {
        let mut at = self.first_us;
        self.answers.iter().map(move |(since, took)| {
            at += since;
            let ms = |micros: u64| milliseconds(Duration::from_micros(micros));
            Sample { unix_ms: ms(at), took_ms: ms(*took) }
        })
    }

    /// Those that came within this time.
    pub fn within(&self, span: Span) -> impl Iterator<Item = Sample> + '_ {
        self.all().filter(move |sample| sample.unix_ms >= span.start && sample.unix_ms < span.end)
    }

    /// The longest time between two answers that overlaps with `span`, in ms; a silence from the last answer until `end` (ms since 1970)
    /// counts, too. `None` when no answer came before `span` ends.
    pub fn longest_gap(&self, span: Span, end: f64) -> Option<f64> {
        let mut last: Option<f64> = None;
        let mut longest: Option<f64> = None;
        for at in self.all().map(|sample| sample.unix_ms).chain([end]) {
            if let Some(before) = last.filter(|before| *before < span.end && at > span.start) {
                longest = Some(longest.unwrap_or(0.0).max(at - before));
            }
            last = Some(at.max(last.unwrap_or(at)));
        }
        longest
    }
}

/// Percentiles of what all these clients had within this time.
pub fn percentiles<'a>(clients: impl IntoIterator<Item = &'a Samples>, span: Span) -> Percentiles {
    // In µs; three digits. It grows as it must, so noting cannot fail.
    let Ok(mut histogram) = Histogram::<u64>::new(3) else { return Percentiles::default() };
    histogram.auto(true);
    let mut max_ms: f64 = 0.0;
    for sample in clients.into_iter().flat_map(|samples| samples.within(span)) {
        max_ms = max_ms.max(sample.took_ms);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "not negative, and far below 2^53")]
        let _ = histogram.record((sample.took_ms * 1e3).round() as u64);
    }
    if histogram.is_empty() {
        return Percentiles::default();
    }
    let at = |quantile: f64| (whole(histogram.value_at_quantile(quantile)) / 1e3).min(max_ms);
    Percentiles { count: histogram.len(), p50_ms: at(0.5), p90_ms: at(0.9), p99_ms: at(0.99), max_ms }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noted(answers: &[(u64, u64)]) -> Samples {
        let mut samples = Samples::default();
        for &(ms, took_us) in answers {
            samples.note(Duration::from_millis(ms), Duration::from_micros(took_us));
        }
        samples
    }

    const ALL: Span = Span { start: 0.0, end: 1e9 };

    #[test]
    fn answers_come_back_as_they_were_noted() {
        let samples = noted(&[(1000, 200), (1002, 300), (1500, 498_000)]);
        let back: Samples = serde_json::from_str(&serde_json::to_string(&samples).unwrap()).unwrap();
        let all: Vec<Sample> = back.all().collect();
        assert_eq!(all[0], Sample { unix_ms: 1000.0, took_ms: 0.2 });
        assert_eq!(all[2], Sample { unix_ms: 1500.0, took_ms: 498.0 });
        assert_eq!(back.within(Span { start: 1001.0, end: 1500.0 }).count(), 1);
    }

    #[test]
    fn the_longest_gap_is_the_one_that_overlaps_and_silence_until_the_end_is_one() {
        let samples = noted(&[(1000, 1), (1900, 1), (1901, 1), (2021, 1), (2022, 1)]);
        let gap = |start, end, until| samples.longest_gap(Span { start, end }, until);
        assert_eq!(gap(1950.0, 2010.0, 2023.0), Some(120.0));
        assert_eq!(gap(1500.0, 2010.0, 2023.0), Some(900.0), "one that began earlier overlaps, too");
        assert_eq!(gap(2021.5, 2021.8, 2023.0), Some(1.0));
        assert_eq!(gap(2021.5, 2400.0, 2500.0), Some(478.0), "no answer came any more");
        assert_eq!(gap(0.0, 999.0, 2500.0), None);
    }

    #[test]
    fn percentiles_are_those_of_all_clients_within_the_time() {
        let one = noted(&(0..99).map(|ms| (1000 + ms, 1000)).collect::<Vec<_>>());
        let two = noted(&[(1050, 80_000), (5000, 900_000)]);
        let found = percentiles([&one, &two], Span { start: 1000.0, end: 2000.0 });
        assert_eq!(found.count, 100);
        assert!((found.p50_ms - 1.0).abs() < 0.01 && (found.p99_ms - 1.0).abs() < 0.01, "{found:?}");
        assert!((found.max_ms - 80.0).abs() < 0.1, "{found:?}");
        assert_eq!(percentiles([&one], Span { start: 0.0, end: 1.0 }), Percentiles::default());
        assert_eq!(percentiles([&one, &two], ALL).count, 101);
    }
}
