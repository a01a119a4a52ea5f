//! What every part of the agent works with.

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;

use podferry_common::failure::{Failure, FailureCode, chain};
use podferry_common::identity::Identity;
use podferry_runtime::Runc;
use podferry_runtime::stdio::ContainerStdio;
use podferry_transfer::Shares;

use crate::config::Config;
use crate::metrics::Metrics;
use crate::pods::Visitors;
use crate::relay::Aways;
use crate::target::inbox::Admissions;

/// Shared by everything that runs in one agent.
#[derive(Clone)]
pub struct Context(Arc<Shared>);

/// What [`Context`] points at.
pub struct Shared {
    /// The configuration.
    pub config: Config,
    /// Who this agent is.
    pub identity: Identity,
    /// Which transfers are expected.
    pub admissions: Admissions,
    /// What Prometheus can read.
    pub metrics: Metrics,
    /// Kubernetes: pods' containers that wait for their restore.
    pub visitors: Visitors,
    /// Kubernetes: connections that have come to this node without their address.
    pub aways: Aways,
    /// What all that leaves this node shares, if it has a limit of its own.
    pub shares: Option<Shares>,
}

impl Context {
    /// Of a new agent.
    pub fn new(config: Config, identity: Identity) -> Self {
        let metrics = Metrics::default();
        let admissions = Admissions::new(metrics.clone());
        let visitors = Visitors::default();
        let shares = config.transfer.bandwidth_limit.map(|limit| Shares::new(limit.get()));
        let aways = Aways::default();
        Self(Arc::new(Shared { config, identity, admissions, metrics, visitors, aways, shares }))
    }

    /// runc with this root folder.
    pub fn runc(&self, root: &Path) -> Runc {
        let runc = Runc::new(&self.config.tools.runc, root);
        match self.config.tools.criu.parent() {
            Some(dir) => runc.with_programs(dir),
            None => runc,
        }
    }

    /// Standard descriptors for a container that this agent makes; its output is appended to its log. Blocks.
    ///
    /// # Errors
    /// When the log or its keeper cannot be had.
    pub fn container_stdio(&self, id: &str) -> Result<ContainerStdio, Failure> {
        let logs = &self.config.runtime.logs_dir;
        let what = "the container's output cannot be kept";
        std::fs::create_dir_all(logs).map_err(|error| self.failure(FailureCode::Internal, what, &error))?;
        podferry_runtime::stdio::spawn_keeper(&self.config.tools.stdio_keeper, &logs.join(format!("{id}.log")))
            .map_err(|error| self.failure(FailureCode::Internal, what, &error))
    }

    /// A failure on this node, with everything that caused it.
    pub fn failure(&self, code: FailureCode, what: &str, error: &(dyn std::error::Error + 'static)) -> Failure {
        let failure = out_of_room(error).unwrap_or_else(|| Failure::new(code, ""));
        Failure { message: format!("{what}: {}", chain(error)), ..failure }.on(self.config.node.as_str())
    }

    /// A failure on this node that has no other cause.
    pub fn refusal(&self, code: FailureCode, message: impl Into<String>) -> Failure {
        Failure::new(code, message).on(self.config.node.as_str())
    }
}

impl std::ops::Deref for Context {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.0
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Context").field("node", &self.config.node).finish_non_exhaustive()
    }
}

/// The failure that an error is when it comes from a full disk or tmpfs.
pub fn out_of_room(error: &(dyn std::error::Error + 'static)) -> Option<Failure> {
    let causes = std::iter::successors(Some(error), |error| error.source());
    let full = |error: &io::Error| matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
    causes.filter_map(|cause| cause.downcast_ref::<io::Error>()).any(full).then(|| {
        let failure = Failure::from_error(FailureCode::ResourceExhausted, error);
        failure.remedy("make room on the file system that is named, or choose another target")
    })
}

/// Runs what blocks on a thread where it may.
///
/// # Errors
/// When it fails, and when it panicked.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(Failure::new(FailureCode::Internal, format!("a task of the agent panicked: {error}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot write /x")]
    struct Write(#[source] io::Error);

    #[test]
    fn a_full_disk_is_seen_behind_what_it_caused() {
        let full = io::Error::other(Write(io::Error::from(io::ErrorKind::StorageFull)));
        let failure = out_of_room(&full).unwrap();
        assert_eq!(failure.code, FailureCode::ResourceExhausted);
        assert!(failure.message.starts_with("cannot write /x: ") && failure.remedy.is_some(), "{failure}");
        assert_eq!(out_of_room(&Write(io::Error::from(io::ErrorKind::PermissionDenied))), None);
    }
}
