//! Giving a container less CPU time while its memory is copied, and its own limit back, on every path.
//!
//! | The throttle is released by | when |
//! |---|---|
//! | the dump worker | all tasks are stopped: CRIU has its own code run in them now, which is not to be slowed down |
//! | the source's abort | pre-copy was given up or cancelled, or broke; the worker was killed; the migration is undone |
//! | the same in the next agent | the agent was killed: the [`ThrottleRecord`] in the part's folder tells it |
//!
//! The record is written before the limit is changed for the first time, and goes when the limit is as it was.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use podferry_common::failure::chain;
use podferry_runtime::{Container, CpuLimit, CpuQuota};
use serde::{Deserialize, Serialize};

use crate::worker::record;

/// The limit that a container had before it was throttled, and where to give it back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThrottleRecord {
    /// Whose limit.
    pub quota: CpuQuota,
    /// The container's own limit.
    pub own: CpuLimit,
}

/// Why a throttle is not released, or not set.
#[derive(Debug, thiserror::Error)]
pub enum ThrottleError {
    /// The limit that the container had cannot be noted, or what was noted cannot be read.
    #[error("cannot note or read which CPU limit the container had")]
    Record(#[source] io::Error),
    /// The cgroup does not take it.
    #[error("cannot change the container's CPU limit")]
    Cgroup(#[from] podferry_runtime::Error),
}

impl ThrottleRecord {
    /// What `file` notes; none when the container is not throttled.
    ///
    /// # Errors
    /// When it is there and cannot be read.
    pub fn load(file: &Path) -> Result<Option<Self>, ThrottleError> {
        record::load(file).map_err(|error| ThrottleError::Record(record::at(file, &error)))
    }

    /// Gives the container its own limit back. Idempotent.
    ///
    /// # Errors
    /// When the cgroup does not take it; to be called again.
    pub fn release(&self) -> Result<(), ThrottleError> {
        Ok(self.quota.restore(&self.own)?)
    }
}

/// Gives the container the limit back that `file` notes, if there is one, and removes the file. Idempotent. A container that is gone
/// has none: whatever has its cgroup's place is another.
///
/// # Errors
/// When the file cannot be read, or the cgroup does not take the limit; to be called again.
pub fn release(file: &Path, container_lives: bool) -> Result<(), ThrottleError> {
    let noted = if container_lives { ThrottleRecord::load(file)? } else { None };
    if let Some(noted) = noted {
        noted.release()?;
        tracing::info!(cgroup = %noted.quota.dir().display(), limit = ?noted.own, "the container has its own CPU limit again");
    }
    match std::fs::remove_file(file) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(ThrottleError::Record(record::at(file, &error))),
        _ => Ok(()),
    }
}

/// A container that may be throttled.
#[derive(Debug)]
pub(crate) struct Throttle {
    record: ThrottleRecord,
    file: PathBuf,
    /// The rate that it is held to; none before the first step.
    held: Option<u64>,
    looked: Instant,
    used: Duration,
}

impl Throttle {
    /// Of a container, which is not touched yet. `file` is where its own limit will be noted.
    pub(crate) fn of(container: &Container, file: PathBuf) -> Result<Self, podferry_runtime::Error> {
        let quota = CpuQuota::of(container)?;
        let (own, used) = (quota.limit()?, quota.used()?);
        Ok(Self { record: ThrottleRecord { quota, own }, file, held: None, looked: Instant::now(), used })
    }

    /// The least CPU time that can be set, in microseconds per second.
    pub(crate) fn least(&self) -> u64 {
        self.record.own.least_rate()
    }

    /// CPU time that the container had since this was asked last, in microseconds per second; 0 when that is not known.
    pub(crate) fn cpu_rate(&mut self) -> u64 {
        let used = match self.record.quota.used() {
            Ok(used) => used,
            Err(error) => {
                tracing::warn!(error = chain(&error), "the container's CPU time cannot be read");
                return 0;
            }
        };
        let (had, passed) = (used.saturating_sub(self.used), self.looked.elapsed());
        (self.used, self.looked) = (used, Instant::now());
        let rate = had.as_micros().saturating_mul(1_000_000) / passed.as_micros().max(1);
        u64::try_from(rate).unwrap_or(u64::MAX)
    }

    /// The CPU time that the container is held to, in microseconds per second; none before the first step.
    pub(crate) fn held(&self) -> Option<u64> {
        self.held
    }

    /// Waits until a throttled container has had its time of some periods since `begun`. It has all of a period's at once and then none
    /// for the rest, and pays for what it had too much, up to a tick of 4 ms, with the time of later ones: a round that saw less would
    /// tell anything.
    pub(crate) fn wait_for_some_periods(&self, begun: Instant) {
        const PERIODS: u32 = 5;
        if self.held.is_some() {
            let periods = Duration::from_micros(self.record.own.period_us) * PERIODS;
            std::thread::sleep(periods.saturating_sub(begun.elapsed()));
        }
    }

    /// Holds the container to so many microseconds of CPU time per second. Its own limit is noted first.
    pub(crate) fn hold(&mut self, rate: u64) -> Result<(), ThrottleError> {
        if self.held.is_none() {
            record::store(&self.file, &self.record).map_err(ThrottleError::Record)?;
        }
        let held = self.record.quota.throttle(&self.record.own, rate)?;
        tracing::info!(cgroup = %self.record.quota.dir().display(), rate = held, "the container is throttled");
        self.held = Some(held);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use podferry_runtime::CgroupPaths;

    use super::*;

    /// A folder that looks like a cgroup of version 2, and what is to be throttled in it.
    fn throttle(folder: &Path) -> Throttle {
        std::fs::write(folder.join("cpu.max"), "150000 100000").unwrap();
        std::fs::write(folder.join("cpu.stat"), "usage_usec 1000\n").unwrap();
        let quota = CpuQuota::at(&CgroupPaths::V2(folder.to_owned())).unwrap();
        let own = quota.limit().unwrap();
        let file = folder.join("throttle.json");
        let record = ThrottleRecord { quota, own };
        Throttle { record, file, held: None, looked: Instant::now(), used: Duration::from_millis(1) }
    }

    fn max(folder: &Path) -> String {
        std::fs::read_to_string(folder.join("cpu.max")).unwrap()
    }

    #[test]
    fn the_own_limit_is_noted_before_it_is_lowered_and_comes_back_from_the_note() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path();
        let mut throttle = throttle(folder);
        let file = throttle.file.clone();
        // As if the disk were full: nothing may be changed that nobody could undo.
        throttle.file = folder.join("missing/throttle.json");
        assert!(throttle.hold(800_000).is_err());
        assert_eq!((max(folder).as_str(), throttle.held()), ("150000 100000", None));

        throttle.file.clone_from(&file);
        for (rate, said) in [(800_000, "80000 100000"), (400_000, "40000 100000")] {
            throttle.hold(rate).unwrap();
            assert_eq!((max(folder).as_str(), throttle.held()), (said, Some(rate)));
        }
        // By whoever comes next, who knows the file alone, and as often as it likes.
        for _ in 0..2 {
            release(&file, true).unwrap();
            assert_eq!(max(folder), "150000 100000");
            assert!(!file.exists());
        }
    }

    #[test]
    fn the_cgroup_of_a_container_that_is_gone_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let mut throttle = throttle(dir.path());
        throttle.hold(500_000).unwrap();
        std::fs::write(dir.path().join("cpu.max"), "70000 100000").unwrap();
        release(&throttle.file, false).unwrap();
        assert_eq!(max(dir.path()), "70000 100000");
        assert!(!throttle.file.exists());
    }

    #[test]
    fn a_note_that_cannot_be_read_is_an_error_that_names_it_and_stays() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("throttle.json");
        std::fs::write(&file, "no").unwrap();
        let error = chain(&release(&file, true).unwrap_err());
        assert!(error.contains("throttle.json"), "{error}");
        assert!(file.exists());
    }

    #[test]
    fn the_time_is_counted_between_two_looks() {
        let dir = tempfile::tempdir().unwrap();
        let mut throttle = throttle(dir.path());
        throttle.looked = Instant::now().checked_sub(Duration::from_secs(2)).unwrap();
        std::fs::write(dir.path().join("cpu.stat"), "usage_usec 1001000\n").unwrap();
        let rate = throttle.cpu_rate();
        assert!((450_000..=500_000).contains(&rate), "{rate}");
        assert!(throttle.cpu_rate() == 0, "it had none since");
    }
}
