//! Where every request passes.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use podferry_common::identity::Peer;
use podferry_common::{Failure, chain};

use super::{Action, Denial, Grounds, Policy, PolicyError, decide};
use crate::follow::Follower;

/// The policy as it is now. Clones share it.
#[derive(Clone)]
pub struct Gate(Arc<Mutex<State>>);

struct State {
    policy: Option<Arc<Policy>>,
    file: Option<Follower>,
}

impl Gate {
    /// Without a policy: all clients may do everything that clients can do.
    pub fn open() -> Self {
        Self(Arc::new(Mutex::new(State { policy: None, file: None })))
    }

    /// By the policy in that file, or [`Self::open`] without one. An edited file counts from the next request on; one that
    /// is wrong, or has gone, is logged once, and the last right one stays.
    pub fn following(path: Option<PathBuf>) -> Result<Self, PolicyError> {
        let Some(path) = path else { return Ok(Self::open()) };
        let mut file = Follower::new(path);
        let _first = file.has_changed();
        let policy = Some(Arc::new(Policy::load(file.path())?));
        Ok(Self(Arc::new(Mutex::new(State { policy, file: Some(file) }))))
    }

    fn policy(&self) -> Option<Arc<Policy>> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = &mut state.file
            && file.has_changed()
        {
            match Policy::load(file.path()) {
                Ok(policy) => {
                    tracing::info!(file = %file.path().display(), "the changed access policy counts from now on");
                    state.policy = Some(Arc::new(policy));
                }
                Err(error) => {
                    tracing::error!(error = chain(&error), "the changed access policy is wrong; the old one stays");
                }
            }
        }
        state.policy.clone()
    }

    /// The decision alone: for what somebody could ask for next.
    pub fn decide(&self, peer: Option<&Peer>, action: &Action<'_>) -> Result<Grounds, Denial> {
        decide(self.policy().as_deref(), peer, action)
    }

    /// Lets a request pass, or refuses it with `PERMISSION_DENIED`.
    #[expect(clippy::unused_async, reason = "a decision is to be written down before it counts")]
    pub async fn pass(&self, peer: Option<&Peer>, action: &Action<'_>) -> Result<(), Failure> {
        match self.decide(peer, action) {
            Ok(_) => Ok(()),
            Err(denial) => {
                tracing::warn!(what = denial.what, why = denial.why, "request denied");
                Err(denial.into())
            }
        }
    }

    /// As [`Self::pass`], for a request that has passed and of which more is known by now.
    pub async fn narrow(&self, peer: &Peer, action: &Action<'_>) -> Result<(), Failure> {
        self.pass(Some(peer), action).await
    }
}
