//! Where every request passes.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use podferry_common::identity::Peer;
use podferry_common::{Failure, chain};

use super::{Action, Denial, Grounds, Policy, Verb, decide};
use crate::audit::{AuditError, AuditLog};
use crate::follow::Follower;
use crate::metrics::Metrics;
use crate::problem::FileError;

/// The policy as it is now, and the log of what was decided. Clones share both.
#[derive(Clone)]
pub struct Gate {
    state: Arc<Mutex<State>>,
    audit: AuditLog,
    metrics: Metrics,
}

struct State {
    policy: Option<Arc<Policy>>,
    file: Option<Follower>,
}

impl State {
    /// By the policy in that file; without one all clients may do everything that clients can do.
    fn following(path: Option<PathBuf>) -> Result<Self, FileError> {
        let Some(path) = path else { return Ok(Self { policy: None, file: None }) };
        let mut file = Follower::new(path);
        let _first = file.has_changed();
        let policy = Some(Arc::new(Policy::load(file.path())?));
        Ok(Self { policy, file: Some(file) })
    }

    fn policy(&mut self) -> Option<Arc<Policy>> {
        if let Some(file) = &mut self.file
            && file.has_changed()
        {
            match Policy::load(file.path()) {
                Ok(policy) => {
                    tracing::info!(file = %file.path().display(), "the changed access policy counts from now on");
                    self.policy = Some(Arc::new(policy));
                }
                Err(error) => {
                    tracing::error!(error = chain(&error), "the changed access policy is wrong; the old one stays");
                }
            }
        }
        self.policy.clone()
    }
}

impl Gate {
    /// By the policy in the file `policy`; without one all clients may do everything that clients can do. An edited file
    /// counts from the next request on; one that is wrong, or has gone, is logged once, and the last right one stays.
    ///
    /// # Errors
    /// When the file cannot be used now.
    pub fn new(policy: Option<PathBuf>, audit: AuditLog, metrics: Metrics) -> Result<Self, FileError> {
        Ok(Self { state: Arc::new(Mutex::new(State::following(policy)?)), audit, metrics })
    }

    /// Where decisions are written down.
    pub fn audit(&self) -> &AuditLog {
        &self.audit
    }

    /// The decision alone: for what somebody could ask for next.
    pub fn decide(&self, peer: Option<&Peer>, action: &Action<'_>) -> Result<Grounds, Denial> {
        let policy = self.state.lock().unwrap_or_else(PoisonError::into_inner).policy();
        decide(policy.as_deref(), peer, action)
    }

    /// Lets a request pass, or refuses it.
    ///
    /// # Errors
    /// `PERMISSION_DENIED`; and `UNAVAILABLE` when something would be changed and the decision cannot be written down.
    pub async fn pass(&self, peer: Option<&Peer>, action: &Action<'_>) -> Result<(), Failure> {
        let decided = self.decide(peer, action);
        self.metrics.asked(action.verb, decided.is_ok());
        // That somebody has said hello is no news, as long as that is all.
        if action.verb == Verb::Hello && decided.is_ok() {
            return Ok(());
        }
        let written = self.audit.request(peer, action, &decided).await;
        answer(action, decided, written)
    }

    /// As [`Self::pass`], for a request that has passed and of which more is known by now. That it may go on is no news.
    pub async fn narrow(&self, peer: &Peer, action: &Action<'_>) -> Result<(), Failure> {
        match self.decide(Some(peer), action) {
            Ok(_) => Ok(()),
            denied => {
                self.metrics.asked(action.verb, false);
                let written = self.audit.request(Some(peer), action, &denied).await;
                answer(action, denied, written)
            }
        }
    }
}

fn answer(
    action: &Action<'_>,
    decided: Result<Grounds, Denial>,
    written: Result<(), AuditError>,
) -> Result<(), Failure> {
    if let Err(denial) = decided {
        tracing::warn!(what = denial.what, why = denial.why, "request denied");
        return Err(denial.into());
    }
    // Who only looks is not kept from it, nor an agent whose workload waits for a decision.
    if action.verb.changes_something() { written.map_err(Failure::from) } else { Ok(()) }
}
