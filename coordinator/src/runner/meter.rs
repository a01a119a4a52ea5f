//! What a migration cost, by the coordinator's monotonic clock.

use std::time::Duration;

use jiff::Timestamp;
use podferry_proto::v1;
use tokio::time::Instant;

use crate::migration::Phase;
use crate::store::{Record, Round, told};
use crate::strategy::{Strategy, budget_ms};

/// Times one migration.
pub(super) struct Meter {
    started: Instant,
    phase: Phase,
    phase_since: Instant,
    frozen: Option<Instant>,
}

impl Meter {
    /// Begins, or after a restart goes on by the wall clock of the record.
    pub(super) fn new(record: &Record) -> Self {
        let now = Instant::now();
        let past = |at: Timestamp| {
            let elapsed = Duration::try_from(Timestamp::now().duration_since(at)).unwrap_or_default();
            now.checked_sub(elapsed).unwrap_or(now)
        };
        Self {
            started: past(record.created_at),
            phase: record.state.phase(),
            phase_since: now,
            frozen: record.frozen_at.map(past),
        }
    }

    /// The source's processes stand still, as was told at `at`. One that is stopped serves nobody from its signal on.
    pub(super) fn frozen(&mut self, record: &mut Record, at: Instant, frozen: v1::Frozen) {
        let freeze_ms = told(frozen.freeze_ms);
        let stopping = if record.strategy == Strategy::Cold { freeze_ms } else { 0.0 };
        let stopping = Duration::try_from_secs_f64(stopping / 1e3).unwrap_or_default();
        let at = at.checked_sub(stopping).unwrap_or(at);
        self.frozen.get_or_insert(at);
        let ago = jiff::SignedDuration::try_from(at.elapsed()).unwrap_or_default();
        record.frozen_at.get_or_insert(Timestamp::now() - ago);
        record.report.timings.freeze = freeze_ms;
        if frozen.killed {
            let grace = record.grace_period_s;
            record.report.note(format!("the workload did not end within {grace} s of its stop signal, and was killed"));
        }
    }

    /// The source has sent everything.
    pub(super) fn transferred(record: &mut Record, sent: &v1::Transferred) {
        let report = &mut record.report;
        report.timings.dump = told(sent.dump_ms);
        report.timings.transfer = told(sent.transfer_ms);
        report.wire_bytes = sent.wire_bytes;
        report.progress.raw_bytes = sent.raw_bytes;
        report.progress.wire_bytes = sent.wire_bytes;
        match sent.last_round {
            Some(last) => report.rounds.push(last.into()),
            None if report.rounds.is_empty() => report.rounds.push(Round {
                pages: sent.pages,
                raw_bytes: sent.raw_bytes,
                wire_bytes: sent.wire_bytes,
                duration_ms: report.timings.dump + report.timings.transfer,
                ..Round::default()
            }),
            None => {}
        }
        if let Some(verified) = sent.verified {
            let (bytes, verify_ms) = (verified.bytes, told(verified.verify_ms));
            report.note(format!(
                "verified: {bytes} bytes of memory are on the target as they are on the source; comparing them took {verify_ms:.1} ms \
                 of the downtime"
            ));
        }
    }

    /// A round of pre-copy has ended.
    pub(super) fn round(record: &mut Record, round: v1::Round) {
        let report = &mut record.report;
        report.rounds.push(round.into());
        let sum = |bytes: fn(&Round) -> u64| report.rounds.iter().map(bytes).fold(0, u64::saturating_add);
        let (raw_bytes, wire_bytes) = (sum(|round| round.raw_bytes), sum(|round| round.wire_bytes));
        report.progress.raw_bytes = report.progress.raw_bytes.max(raw_bytes);
        report.progress.wire_bytes = report.progress.wire_bytes.max(wire_bytes);
        report.wire_bytes = report.wire_bytes.max(wire_bytes);
    }

    /// The target has all of its memory.
    pub(super) fn filled(record: &mut Record, filled: v1::FillResponse) {
        let v1::FillResponse { pages, faults, fill_ms } = filled;
        record.report.timings.fill = told(fill_ms);
        if pages > 0 {
            record.report.note(format!(
                "{pages} pages were laid in behind the running container, which had to wait for one {faults} times"
            ));
        }
    }

    /// The target runs since `at`.
    pub(super) fn resumed(&self, record: &mut Record, at: Instant) {
        let Some(frozen) = self.frozen else { return };
        let downtime = milliseconds(at.saturating_duration_since(frozen));
        record.report.downtime_ms = downtime;
        let budget = budget_ms(record.downtime_budget_ms);
        if record.strategy.copies_memory_beforehand() && downtime > budget {
            record.report.note(format!(
                "the downtime was {downtime:.0} ms, {budget:.0} ms were aimed at: of a freeze only the memory that was left is predicted, with \
                 an allowance for all else, and all else took longer"
            ));
        }
    }

    /// Books the time since the last call to the phase that it was spent in. Returns whether the phase has changed.
    pub(super) fn book(&mut self, record: &mut Record, at: Instant) -> bool {
        let now = record.state.phase();
        if now == self.phase {
            return false;
        }
        let spent = milliseconds(at.saturating_duration_since(self.phase_since));
        let timings = &mut record.report.timings;
        match self.phase {
            Phase::Preflight => timings.preflight = spent,
            Phase::Prepare => timings.prepare = spent,
            Phase::PreCopy => timings.precopy = spent,
            Phase::Commit | Phase::Release => timings.commit += spent,
            Phase::Resume => timings.resume = spent,
            // The freeze is told apart by the agents, and the fill is timed by the target; the rest is no phase of a finished
            // migration.
            Phase::Freeze | Phase::Fill | Phase::RollingBack | Phase::Succeeded | Phase::Failed | Phase::Cancelled => {}
        }
        (self.phase, self.phase_since) = (now, at);
        if record.state.is_settled() {
            record.report.total_ms = milliseconds(at.saturating_duration_since(self.started));
        }
        true
    }
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::record;

    #[test]
    fn what_is_stopped_is_down_from_its_signal_on() {
        for (strategy, downtime_ms) in [(Strategy::Cold, 2500.0), (Strategy::Warm, 500.0)] {
            let mut record = Record { strategy, grace_period_s: 2, ..record("redis", "a", "b") };
            let mut meter = Meter::new(&record);
            let told = Instant::now() + Duration::from_secs(5);
            meter.frozen(&mut record, told, v1::Frozen { freeze_ms: 2000.0, killed: true });
            meter.resumed(&mut record, told + Duration::from_millis(500));
            assert!((record.report.downtime_ms - downtime_ms).abs() < 1e-6, "{strategy}: {:?}", record.report);
            assert_eq!(record.report.notes, ["the workload did not end within 2 s of its stop signal, and was killed"]);
        }
    }

    #[test]
    fn who_stood_still_for_longer_than_was_aimed_at_is_told() {
        for (strategy, budget, downtime, told) in [
            (Strategy::Live, 0.0, 99, false),
            (Strategy::Live, 0.0, 250, true),
            (Strategy::Live, 300.0, 250, false),
            (Strategy::Hybrid, 200.0, 250, true),
            (Strategy::Warm, 0.0, 250, false),
            (Strategy::Postcopy, 0.0, 250, false),
            (Strategy::Cold, 0.0, 250, false),
        ] {
            let mut record = Record { strategy, downtime_budget_ms: budget, ..record("redis", "a", "b") };
            let mut meter = Meter::new(&record);
            let frozen = Instant::now();
            meter.frozen(&mut record, frozen, v1::Frozen { freeze_ms: 0.0, killed: false });
            meter.resumed(&mut record, frozen + Duration::from_millis(downtime));
            let notes = format!("{:?}", record.report.notes);
            assert_eq!(notes.contains("250 ms"), told, "{strategy} {budget} {downtime}: {notes}");
        }
    }
}
