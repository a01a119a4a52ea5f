//! Which evictions are answered by a migration, which are let through, and why. Pure.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Pod;
use podferry_common::Failure;

use crate::pods::{check_movable, comes_by, is_of_class, phase};
use crate::strategy::Strategy;

/// What is known when somebody wants to evict a pod.
pub(super) struct Known<'k> {
    /// The pod; none when there is none of that name.
    pub(super) pod: Option<&'k Pod>,
    /// The uid that the evictor wants it to have.
    pub(super) wanted_uid: Option<&'k str>,
    /// Nothing is to come of it.
    pub(super) dry_run: bool,
    /// Its node takes part.
    pub(super) node_takes_part: bool,
    /// The migration of the pod that is under way, whoever has asked for it.
    pub(super) under_way: Option<Attempt>,
    /// What has come of an eviction of this very pod before.
    pub(super) before: Option<Attempt>,
    /// How its policies want it to be moved; or why they do not.
    pub(super) strategy: Result<Strategy, Failure>,
    /// How long an eviction may be put off.
    pub(super) patience: SignedDuration,
    /// Now.
    pub(super) now: Timestamp,
}

/// A migration of the pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Attempt {
    /// What a person finds it by.
    pub(super) title: String,
    /// When it was asked for.
    pub(super) begun_at: Timestamp,
    /// Why it has come to nothing; none while it may still come to something.
    pub(super) failed: Option<String>,
}

/// What becomes of an eviction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The pod is evicted, as if podferry were not there.
    Allow(Why),
    /// A migration of the pod is under way: try again.
    Wait(Attempt),
    /// A migration of the pod begins: try again.
    Begin,
}

/// Why an eviction is let through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Why {
    /// There is no such pod: the API server says so itself.
    Gone,
    /// It is none of podferry's.
    NotOurs,
    /// It ends, or has ended.
    Ending,
    /// It does not run yet, so there is nothing to move.
    NotRunning,
    /// Its node does not take part.
    Node,
    /// A policy does not allow that it is moved, or the policies make no sense.
    Policy(String),
    /// It cannot move.
    CannotMove(String),
    /// It was tried a short while ago.
    HasFailed {
        /// By which migration.
        migration: String,
        /// What came of it.
        reason: String,
    },
    /// It was put off for as long as it may be.
    OutOfPatience {
        /// By which migration.
        migration: String,
        /// For how many seconds at most.
        patience_s: i64,
    },
    /// Nothing is to come of it.
    DryRun,
    /// It is not known what to do.
    Unknown(String),
}

/// What becomes of an eviction.
pub(super) fn decide(known: &Known<'_>) -> Verdict {
    match judge(known) {
        Verdict::Wait(_) | Verdict::Begin if known.dry_run => Verdict::Allow(Why::DryRun),
        verdict => verdict,
    }
}

fn judge(known: &Known<'_>) -> Verdict {
    let Some(pod) = known.pod else { return Verdict::Allow(Why::Gone) };
    if let Some(why) = is_nobodys_loss(pod, known.wanted_uid) {
        return Verdict::Allow(why);
    }
    if let Some(attempt) = current(known, pod) {
        return put_off(known, attempt);
    }
    if let Some(Attempt { title, failed: Some(reason), .. }) = &known.before {
        return Verdict::Allow(Why::HasFailed { migration: title.clone(), reason: reason.clone() });
    }
    match obstacle(known, pod) {
        Some(why) => Verdict::Allow(why),
        None => Verdict::Begin,
    }
}

/// Why nothing is lost by the eviction that podferry could save.
fn is_nobodys_loss(pod: &Pod, wanted_uid: Option<&str>) -> Option<Why> {
    let another = wanted_uid.is_some_and(|wanted| pod.metadata.uid.as_deref() != Some(wanted));
    if another {
        return Some(Why::Gone);
    }
    if !is_of_class(pod) {
        return Some(Why::NotOurs);
    }
    let ending = pod.metadata.deletion_timestamp.is_some() || matches!(phase(pod), "Succeeded" | "Failed");
    ending.then_some(Why::Ending)
}

/// The migration that the pod is in. The one that an eviction has asked for may wait while another one is under way; then it was put off since that one.
fn current(known: &Known<'_>, pod: &Pod) -> Option<Attempt> {
    let ours = known.before.as_ref().filter(|before| before.failed.is_none());
    let all = ours.into_iter().chain(&known.under_way).cloned().chain(arrival(pod));
    all.min_by_key(|attempt| attempt.begun_at)
}

/// The migration by which a pod has come that has not taken its predecessor's place yet.
fn arrival(pod: &Pod) -> Option<Attempt> {
    let made_at = pod.metadata.creation_timestamp.as_ref()?;
    let begun_at = Timestamp::from_second(made_at.0.as_second()).ok()?;
    Some(Attempt { title: format!("migration {}", comes_by(pod)?), begun_at, failed: None })
}

fn put_off(known: &Known<'_>, attempt: Attempt) -> Verdict {
    if known.now.duration_since(attempt.begun_at) < known.patience {
        return Verdict::Wait(attempt);
    }
    let patience_s = known.patience.as_secs();
    Verdict::Allow(Why::OutOfPatience { migration: attempt.title, patience_s })
}

/// What keeps a migration from being begun.
fn obstacle(known: &Known<'_>, pod: &Pod) -> Option<Why> {
    if phase(pod) != "Running" {
        return Some(Why::NotRunning);
    }
    if !known.node_takes_part {
        return Some(Why::Node);
    }
    match &known.strategy {
        Err(failure) => Some(Why::Policy(failure.to_string())),
        Ok(strategy) => check_movable(pod, *strategy).err().map(|failure| Why::CannotMove(failure.to_string())),
    }
}

impl Why {
    /// What is counted.
    pub(super) fn word(&self) -> &'static str {
        match self {
            Self::Gone => "gone",
            Self::NotOurs => "not_ours",
            Self::Ending => "ending",
            Self::NotRunning => "not_running",
            Self::Node => "node",
            Self::Policy(_) => "policy",
            Self::CannotMove(_) => "cannot_move",
            Self::HasFailed { .. } => "has_failed",
            Self::OutOfPatience { .. } => "out_of_patience",
            Self::DryRun => "dry_run",
            Self::Unknown(_) => "unknown",
        }
    }

    /// What an evictor is told; nothing where nobody expects a migration.
    pub(super) fn warning(&self) -> Option<String> {
        let said = match self {
            Self::Gone | Self::NotOurs | Self::Ending => return None,
            Self::NotRunning => "it does not run yet, so there is nothing to move".to_owned(),
            Self::Node => "its node does not take part: it has no label podferry.dev/enabled=true".to_owned(),
            Self::Policy(why) | Self::CannotMove(why) | Self::Unknown(why) => why.clone(),
            Self::HasFailed { migration, reason } => format!("{migration} was tried already: {reason}"),
            Self::OutOfPatience { migration, patience_s } => {
                format!("{migration} has not moved it in {patience_s} s, and it is put off no longer")
            }
            Self::DryRun => return Some("podferry would move this pod instead of letting it be evicted".to_owned()),
        };
        Some(format!("podferry does not move this pod, and it is evicted: {said}"))
    }
}

#[cfg(test)]
mod tests;
