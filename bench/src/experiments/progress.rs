//! How far an experiment is: a bar at a terminal, else a line for each run.

use std::{
    io::IsTerminal as _,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};
use podferry_report::results::{Measurement, Outcome};

use super::{measure, scenario};
use crate::moves::whole;

/// What a person sees while it goes on.
#[derive(Debug)]
pub(super) struct Progress {
    bar: Option<ProgressBar>,
    began: Instant,
    all_s: f64,
    done_s: f64,
    all: usize,
    done: usize,
}

impl Progress {
    /// Of so many runs, which are likely to take so long.
    pub(super) fn new(runs: usize, estimate: Duration) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| ProgressBar::new(runs as u64));
        if let Some(bar) = &bar {
            let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {elapsed} {msg}");
            // Without the template the bar looks otherwise, and is one all the same.
            if let Ok(style) = style {
                bar.set_style(style);
            }
        }
        Self { bar, began: Instant::now(), all_s: estimate.as_secs_f64(), done_s: 0.0, all: runs, done: 0 }
    }

    /// A run is over that was likely to take `estimate_s`.
    pub(super) fn done(&mut self, measurement: &Measurement, estimate_s: f64) {
        self.done += 1;
        self.done_s += estimate_s;
        let line = line(measurement);
        let left = left_minutes(self.began.elapsed(), self.done_s, self.all_s);
        match &self.bar {
            Some(bar) => {
                bar.println(&line);
                bar.inc(1);
                bar.set_message(format!("about {left:.0} min left"));
            }
            None => println!("{:>4}/{} {line}; about {left:.0} min left", self.done, self.all),
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// By how much longer what is done took than it was likely to.
fn left_minutes(elapsed: Duration, done_s: f64, all_s: f64) -> f64 {
    let ratio = if done_s > 0.0 { elapsed.as_secs_f64() / done_s } else { 1.0 };
    (all_s - done_s).max(0.0) * ratio / 60.0
}

fn line(measurement: &Measurement) -> String {
    let name = scenario::name(&measurement.scenario);
    let what = match &measurement.outcome {
        Outcome::Moved => moved(measurement),
        Outcome::Refused(reason) => format!("refused: {reason}"),
        Outcome::Failed(reason) => format!("did not arrive: {reason}"),
    };
    match measure::failure(measurement) {
        Some(_) => format!("{name}: FAILED: {what}"),
        None => format!("{name}: {what}"),
    }
}

fn moved(measurement: &Measurement) -> String {
    let ms = |value: Option<f64>| value.map_or_else(|| "unknown".to_owned(), |value| format!("{value:.0} ms"));
    let gaps = measurement.clients.iter().flat_map(|clients| clients.gaps_ms.iter().copied());
    let wire = measurement.wire_bytes.map_or(0.0, |bytes| whole(bytes) / f64::from(1 << 20));
    let text = format!(
        "down {}, gap {}, in all {}, {wire:.1} MiB",
        ms(measurement.downtime_ms),
        ms(gaps.reduce(f64::max)),
        ms(measurement.total_ms)
    );
    let faults = measurement
        .clients
        .as_ref()
        .map_or([0; 3], |clients| [clients.lost_items, clients.failed_requests, clients.connection_resets]);
    match faults {
        [0, 0, 0] => text,
        [lost, failed, resets] => format!("{text}, {lost} items lost, {failed} requests failed, {resets} resets"),
    }
}

#[cfg(test)]
mod tests {
    use podferry_report::results::Strategy;

    use super::{super::measure::tests::measured, *};
    use crate::experiments::measure::Moved;

    #[test]
    fn a_line_says_what_became_of_a_run() {
        let moved = line(&measured(Strategy::Live, Ok(Moved::default())));
        assert!(
            moved.starts_with("redis live 16 MiB") && moved.contains("down 105 ms, gap 120 ms, in all 600 ms"),
            "{moved}"
        );
        let failed = line(&measured(Strategy::Live, Err(Outcome::Failed("no CRIU".to_owned()))));
        assert!(failed.ends_with("FAILED: did not arrive: no CRIU"), "{failed}");
    }

    #[test]
    fn what_is_left_follows_from_what_was_done() {
        assert!((left_minutes(Duration::from_secs(120), 60.0, 120.0) - 2.0).abs() < 0.01);
        assert!((left_minutes(Duration::ZERO, 0.0, 120.0) - 2.0).abs() < 0.01);
    }
}
