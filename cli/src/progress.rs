//! Progress of one migration on standard error: a bar on a terminal, a line for each step elsewhere.

use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, HumanDuration, ProgressBar, ProgressStyle};
use podferry_proto::v1::{Migration, Phase, Round, Strategy, TransferProgress};

use crate::words;

/// Between two lines about the same phase.
const LINE_INTERVAL: Duration = Duration::from_secs(1);
/// Between two frames of the bar.
const FRAME: Duration = Duration::from_millis(100);

/// Shows how far a migration is.
pub(crate) enum Progress {
    /// A terminal: a bar that changes in place.
    Bar(ProgressBar),
    /// A file, a pipe, a CI log: lines.
    Lines(Lines),
}

impl Progress {
    /// The form that suits standard error.
    pub(crate) fn new() -> Self {
        if io::stderr().is_terminal() { Self::Bar(bar()) } else { Self::Lines(Lines::default()) }
    }

    /// The form that several at a time can have: bars in place would write over each other and over the results between them.
    pub(crate) fn beside_others() -> Self {
        Self::Lines(Lines::default())
    }

    /// Shows the migration's state.
    pub(crate) fn show(&mut self, migration: &Migration) {
        match self {
            Self::Bar(bar) => show_bar(bar, migration),
            Self::Lines(lines) => {
                for line in lines.lines(migration, Instant::now()) {
                    eprintln!("{line}");
                }
            }
        }
    }

    /// Takes the bar away: the result follows.
    pub(crate) fn end(&mut self) {
        if let Self::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.end();
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("█▉▊▋▌▍▎▏ ")
}

fn bar() -> ProgressBar {
    let bar = ProgressBar::new_spinner();
    bar.set_style(style(WITHOUT_BYTES));
    bar.enable_steady_tick(FRAME);
    bar
}

const WITHOUT_BYTES: &str = "{spinner} {prefix} {msg} {elapsed}";
const WITH_BYTES: &str = "{spinner} {prefix} {msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec}, {eta} left";

fn show_bar(bar: &ProgressBar, migration: &Migration) {
    bar.set_prefix(title(migration));
    bar.set_message(words::phase(migration));
    let Some(progress) = moving(migration) else {
        if let Some(last) = migration.rounds.last().filter(|_| migration.phase() == Phase::Precopy) {
            bar.set_style(style(WITHOUT_BYTES));
            bar.set_message(format!("{} {}", words::phase(migration), round(migration.rounds.len(), last)));
        }
        return;
    };
    if bar.length() != Some(progress.expected_bytes) {
        bar.set_style(style(WITH_BYTES));
        bar.set_length(progress.expected_bytes);
    }
    bar.set_position(progress.raw_bytes.min(progress.expected_bytes));
}

/// `redis n1 → n2`; the target may not have been chosen yet.
fn title(migration: &Migration) -> String {
    let target = if migration.target.is_empty() { "?" } else { &migration.target };
    format!("{} {} → {target}", migration.workload, migration.source)
}

/// The bytes moved, once it is known how many there are. With the second round of pre-copy that is over: what is written
/// meanwhile has to be sent again.
fn moving(migration: &Migration) -> Option<TransferProgress> {
    let again = pre_copies(migration) && !migration.rounds.is_empty();
    migration.progress.filter(|progress| progress.expected_bytes > 0 && !again)
}

fn pre_copies(migration: &Migration) -> bool {
    matches!(migration.strategy(), Strategy::Live | Strategy::Hybrid)
}

/// `round 3  12.00 MiB  dirty 3.1k pages/s  freeze would add 14 ms`.
fn round(number: usize, round: &Round) -> String {
    let (sent, dirty) = (HumanBytes(round.raw_bytes), rate(round.dirty_rate));
    let throttle =
        if round.cpu_limit > 0.0 { format!("  throttled to {:.2} CPUs", round.cpu_limit) } else { String::new() };
    format!("round {number}  {sent}  dirty {dirty} pages/s  freeze would add {:.0} ms{throttle}", round.predicted_ms)
}

fn rate(pages: f64) -> String {
    match pages {
        1e6.. => format!("{:.1}M", pages / 1e6),
        1e3.. => format!("{:.1}k", pages / 1e3),
        _ => format!("{pages:.0}"),
    }
}

/// Plain lines: one for each phase, one a second while bytes move, and one for each round of pre-copy.
#[derive(Default)]
pub(crate) struct Lines {
    phase: Option<i32>,
    /// When the first bytes were seen, and how many.
    first: Option<(Instant, u64)>,
    printed: Option<Instant>,
    bytes: u64,
    rounds: usize,
}

impl Lines {
    /// The lines to print now.
    fn lines(&mut self, migration: &Migration, now: Instant) -> Vec<String> {
        let mut lines: Vec<_> = self.line(migration, now).into_iter().collect();
        if pre_copies(migration) {
            lines.extend(self.new_rounds(migration));
        }
        lines
    }

    /// The rounds that have ended since the last look. The one of the freeze is told with the result.
    fn new_rounds(&mut self, migration: &Migration) -> Vec<String> {
        if migration.phase() != Phase::Precopy {
            return Vec::new();
        }
        let told = std::mem::replace(&mut self.rounds, migration.rounds.len());
        let new = migration.rounds.iter().enumerate().skip(told);
        new.map(|(at, one)| format!("{}: precopy {}", title(migration), round(at + 1, one))).collect()
    }

    /// The line to print now, if any.
    fn line(&mut self, migration: &Migration, now: Instant) -> Option<String> {
        let changed = self.phase != Some(migration.phase);
        let progress = moving(migration);
        let bytes = progress.map_or(0, |progress| progress.raw_bytes);
        let due = self.printed.is_none_or(|printed| now.duration_since(printed) >= LINE_INTERVAL);
        if !changed && (!due || progress.is_none() || bytes == self.bytes) {
            return None;
        }
        self.phase = Some(migration.phase);
        self.printed = Some(now);
        self.bytes = bytes;
        let head = format!("{}: {}", title(migration), words::phase(migration));
        let moved = progress.filter(|_| !words::has_ended(migration)).map(|progress| self.amount(progress, now));
        Some(moved.map_or_else(|| head.clone(), |moved| format!("{head} {moved}")))
    }

    /// `52.00 MiB of 256.00 MiB, 104.00 MiB/s, 2 seconds left`.
    fn amount(&mut self, progress: TransferProgress, now: Instant) -> String {
        let TransferProgress { raw_bytes, expected_bytes, .. } = progress;
        let (since, before) = *self.first.get_or_insert((now, raw_bytes));
        let amount = format!("{} of {}", HumanBytes(raw_bytes), HumanBytes(expected_bytes));
        let millis = u64::try_from(now.duration_since(since).as_millis()).unwrap_or(u64::MAX);
        let rate = raw_bytes.saturating_sub(before).saturating_mul(1000).checked_div(millis).unwrap_or(0);
        let left = expected_bytes.saturating_sub(raw_bytes).checked_div(rate);
        match left {
            Some(seconds) => {
                format!("{amount}, {}/s, {} left", HumanBytes(rate), HumanDuration(Duration::from_secs(seconds)))
            }
            None => amount,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(phase: Phase, raw: u64, expected: u64) -> Migration {
        Migration {
            workload: "redis".into(),
            source: "n1".into(),
            target: "n2".into(),
            phase: phase.into(),
            progress: Some(TransferProgress { raw_bytes: raw, wire_bytes: raw / 2, expected_bytes: expected }),
            ..Default::default()
        }
    }

    #[test]
    fn lines_come_with_phases_and_once_a_second() {
        const MIB: u64 = 1 << 20;
        let start = Instant::now();
        let after = |millis| start + Duration::from_millis(millis);
        let mut lines = Lines::default();
        assert_eq!(lines.line(&at(Phase::Preflight, 0, 0), start).unwrap(), "redis n1 → n2: preflight");
        assert_eq!(lines.line(&at(Phase::Preflight, 0, 0), after(2000)), None, "nothing new to say");
        let freeze = lines.line(&at(Phase::Freeze, 0, 256 * MIB), after(2000)).unwrap();
        assert_eq!(freeze, "redis n1 → n2: freeze 0 B of 256.00 MiB");
        assert_eq!(lines.line(&at(Phase::Freeze, 10 * MIB, 256 * MIB), after(2500)), None, "too early");
        let moving = lines.line(&at(Phase::Freeze, 64 * MIB, 256 * MIB), after(3000)).unwrap();
        assert_eq!(moving, "redis n1 → n2: freeze 64.00 MiB of 256.00 MiB, 64.00 MiB/s, 3 seconds left");
        let done = lines.line(&at(Phase::Succeeded, 256 * MIB, 256 * MIB), after(3100)).unwrap();
        assert_eq!(done, "redis n1 → n2: succeeded");
    }

    #[test]
    fn each_round_of_pre_copy_has_a_line() {
        const MIB: u64 = 1 << 20;
        let start = Instant::now();
        let rounds = [(256, 3_141.0, 140.0), (12, 850.0, 13.6)].map(|(mib, dirty_rate, predicted_ms)| Round {
            raw_bytes: mib * MIB,
            dirty_rate,
            predicted_ms,
            ..Round::default()
        });
        let copying = |done: usize, raw| Migration {
            strategy: Strategy::Live.into(),
            rounds: rounds[..done].to_vec(),
            ..at(Phase::Precopy, raw, 256 * MIB)
        };
        let mut lines = Lines::default();
        assert_eq!(lines.lines(&copying(0, 0), start), ["redis n1 → n2: precopy 0 B of 256.00 MiB"]);
        let later = start + Duration::from_secs(2);
        let said = lines.lines(&copying(2, 268 * MIB), later);
        let expected = [
            "redis n1 → n2: precopy round 1  256.00 MiB  dirty 3.1k pages/s  freeze would add 140 ms",
            "redis n1 → n2: precopy round 2  12.00 MiB  dirty 850 pages/s  freeze would add 14 ms",
        ];
        assert_eq!(said, expected);
        assert_eq!(lines.lines(&copying(2, 268 * MIB), later), [""; 0]);
        let freeze = Migration { phase: Phase::Freeze.into(), ..copying(2, 268 * MIB) };
        assert_eq!(lines.lines(&freeze, later), ["redis n1 → n2: freeze"]);
        assert_eq!((rate(2.5e6), rate(1000.0), rate(0.0)), ("2.5M".into(), "1.0k".into(), "0".into()));
    }
}
