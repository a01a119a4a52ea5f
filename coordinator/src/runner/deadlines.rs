//! How long each phase, and each attempt of what is repeated, may take.

use std::time::Duration;

use serde::{Deserialize, Deserializer};

use crate::migration::{Call, Path, Phase, Side};

/// Deadlines; in the configuration in seconds, with fractions.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Deadlines {
    /// Both preflights together.
    #[serde(deserialize_with = "seconds")]
    pub preflight: Duration,
    /// The target's reservation.
    #[serde(deserialize_with = "seconds")]
    pub prepare: Duration,
    /// Copying memory while the workload runs.
    #[serde(deserialize_with = "seconds")]
    pub precopy: Duration,
    /// Dump, transfer and restore: the workload stands still.
    #[serde(deserialize_with = "seconds")]
    pub freeze: Duration,
    /// Sealing both parts.
    #[serde(deserialize_with = "seconds")]
    pub commit: Duration,
    /// One attempt to destroy the source.
    #[serde(deserialize_with = "seconds")]
    pub release: Duration,
    /// One attempt to let the target go.
    #[serde(deserialize_with = "seconds")]
    pub resume: Duration,
    /// One attempt to learn that the target has all of its memory.
    #[serde(deserialize_with = "seconds")]
    pub fill: Duration,
    /// One attempt to undo a part. After the target's, the source is thawed in any case.
    #[serde(deserialize_with = "seconds")]
    pub abort: Duration,
    /// An agent's answer to what is on its node.
    #[serde(deserialize_with = "seconds")]
    pub survey: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            preflight: Duration::from_secs(30),
            prepare: Duration::from_secs(30),
            precopy: Duration::from_secs(3600),
            freeze: Duration::from_secs(300),
            commit: Duration::from_secs(15),
            release: Duration::from_secs(30),
            resume: Duration::from_secs(60),
            fill: Duration::from_secs(60),
            abort: Duration::from_secs(15),
            survey: Duration::from_secs(5),
        }
    }
}

impl Deadlines {
    /// Those of a migration whose workload gets so long to end.
    #[must_use]
    pub fn with_grace(self, grace: Duration) -> Self {
        Self { freeze: self.freeze + grace, ..self }
    }

    /// Those of pods: a target pod has to come to its node, maybe with its image, and its kubelet waits for two minutes at most
    /// (`runtimeRequestTimeout`) until its container is restored.
    #[must_use]
    pub fn of_pods(self) -> Self {
        const COMES: Duration = Duration::from_secs(150);
        const WAITS: Duration = Duration::from_secs(75);
        Self { prepare: self.prepare.max(COMES), precopy: self.precopy.min(WAITS), ..self }
    }

    /// How long a phase may take as a whole; `None` for what is repeated until it is done.
    pub fn of_phase(&self, phase: Phase) -> Option<Duration> {
        match phase {
            Phase::Preflight => Some(self.preflight),
            Phase::Prepare => Some(self.prepare),
            Phase::PreCopy => Some(self.precopy),
            Phase::Freeze => Some(self.freeze),
            Phase::Commit => Some(self.commit),
            Phase::Release
            | Phase::Resume
            | Phase::Fill
            | Phase::RollingBack
            | Phase::Succeeded
            | Phase::Failed
            | Phase::Cancelled => None,
        }
    }

    /// How long one call may take on that path. Calls of phases with a deadline have a little more than that, so that it is the phase
    /// that ends, once, for all of its calls.
    pub fn of_call(&self, call: Call, path: Path) -> Duration {
        const SLACK: Duration = Duration::from_secs(5);
        match call {
            Call::PreflightSource | Call::PreflightTarget => self.preflight + SLACK,
            Call::Prepare => self.prepare + SLACK,
            // The stream stays open while the target holds.
            Call::Freeze => self.before_the_freeze(path) + self.freeze + self.commit + SLACK,
            Call::Restore => self.freeze + self.commit + SLACK,
            Call::Seal(_) => self.commit + SLACK,
            Call::Release => self.release,
            Call::Resume => self.resume,
            Call::Fill => self.fill,
            Call::Abort(Side::Source | Side::Target) => self.abort,
        }
    }

    /// After how long an unsealed part undoes itself, told to agents: never before the coordinator would have. For the
    /// source that time begins with the end of pre-copy.
    pub fn of_part(&self, call: Call, path: Path) -> Duration {
        let rest = self.freeze + self.commit;
        if call == Call::Prepare { self.prepare + self.before_the_freeze(path) + rest } else { rest }
    }

    fn before_the_freeze(&self, path: Path) -> Duration {
        if path.pre_copy { self.precopy } else { Duration::ZERO }
    }
}

fn seconds<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
    let seconds = f64::deserialize(from)?;
    let fits = (0.001..=86_400.0).contains(&seconds);
    if fits {
        return Ok(Duration::from_secs_f64(seconds));
    }
    Err(serde::de::Error::custom(format!("{seconds} is no deadline: it is between 0.001 and 86400 seconds")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_part_ends_before_the_coordinator_would_have() {
        let limits = Deadlines::default();
        let cold = Path { pre_copy: true, ..Path::default() };
        for path in [Path::default(), cold, Path { pre_copy: true, fill: true, post_copy: true }] {
            let copying = if path.pre_copy { limits.precopy } else { Duration::ZERO };
            let frozen = limits.freeze + limits.commit;
            assert_eq!(limits.of_part(Call::Freeze, path), frozen);
            assert_eq!(limits.of_part(Call::Restore, path), frozen);
            assert_eq!(limits.of_part(Call::Prepare, path), limits.prepare + copying + frozen);
            assert!(limits.of_call(Call::Freeze, path) > copying + frozen);
            assert!(limits.of_call(Call::Restore, path) > frozen);
        }
        let patient = limits.with_grace(Duration::from_secs(600));
        assert_eq!(patient.of_phase(Phase::Freeze), Some(Duration::from_secs(900)), "it may take that long to end");
        assert_eq!(patient.of_part(Call::Freeze, cold), limits.of_part(Call::Freeze, cold) + Duration::from_secs(600));
        assert_eq!(limits.of_phase(Phase::Fill), None, "what is committed has no deadline");
    }
}
