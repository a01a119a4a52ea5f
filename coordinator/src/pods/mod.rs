//! Pods: what a migration does with the API server, beside what agents do with the container.
//!
//! A pod cannot move: its node is decided once. So another pod is made on the target, like it but under a name of its own
//! ([`plan`]), and takes its place step by step ([`Pods`]):
//!
//! | when | what | why then |
//! |---|---|---|
//! | before the target's `Prepare` | the target pod is created on its node, without labels and owner | its sandbox, volumes and image are there before anything is copied; no Service and no ReplicaSet knows it |
//! | behind the target's `Abort` | it is deleted | |
//! | at the commit | of a Job: it lets go of the source and gets the target, with labels, owner and finalizer | the source's container ends from here on, which the Job must not count; what becomes of the target it must |
//! | behind the target's `Resume` | it gets the labels that Services select by; the source counts as not ready | new connections go where the workload runs |
//! | behind the last of `Release` and `Resume` | it is adopted: all labels, the owner; then the source is deleted | see below |
//!
//! A ReplicaSet has as many pods as it should at every instant that it could act on: when it comes to know the target pod it has one
//! too many, and deletes one by its rules, among those that count the one that is not ready, or costs least
//! (`controller.kubernetes.io/pod-deletion-cost`). That is the source, which would be deleted just then anyhow. Were the source
//! deleted first, a third pod would be made; were the target adopted before it is ready, it would be the one that is deleted.
//!
//! A Job counts what ends. Its controller acts a second after the first of many changes to its pods, and the two by which the target takes the
//! source's place follow each other at once. Were the target counted first, the Job would have one too many and delete the younger. When the
//! coordinator is killed between the two, the Job makes a pod more, and deletes that when it sees the target.
//!
//! The pod of a StatefulSet has to have the name of the one before, which is free only when that is gone. So the target pod only stands in for
//! it: everything comes to that, and its container is restored and held. Behind the commit the source is deleted, without waiting for its node,
//! and the one of its name made on the target in the same moment, for its controller makes one as well; the agent restores once more, into that.
//! Then what stood in for it is deleted. It takes up what the pod requests beside it until then, so the node must have room for two
//! ([`room`]): a kubelet that refused the second would do so behind the commit.
//!
//! All steps can be repeated. Those behind the commit are, until they succeed; the pods' uids make sure that
//! no later pod of the same name is meant.

mod follow;
mod plan;
pub(crate) mod policy;
mod room;
mod steps;
mod traits;
mod watch;

use podferry_common::{Failure, FailureCode, chain};

pub use plan::target_name;
pub(crate) use plan::{check_movable, comes_by, is_of_class, phase};
pub use steps::Pods;
pub use watch::Watched;

/// The label by which a node takes part.
pub const ENABLED: &str = "podferry.dev/enabled";

/// What the API server refuses, or does not answer.
pub(crate) fn refused(what: &str, error: &kube::Error) -> Failure {
    let (code, remedy) = match error {
        kube::Error::Api(status) if status.code == 403 => {
            (FailureCode::PermissionDenied, "see the coordinator's ClusterRole")
        }
        kube::Error::Api(status) if status.code == 404 => (FailureCode::NotFound, "see `kubectl get pods`"),
        kube::Error::Api(status) if status.code == 409 => (FailureCode::Aborted, "try again"),
        kube::Error::Api(status) if status.code == 429 || status.code >= 500 => {
            (FailureCode::Unavailable, "try again; see the API server's log when it stays so")
        }
        kube::Error::Api(_) => (FailureCode::FailedPrecondition, "see what the API server says"),
        _ => (FailureCode::Unavailable, "see that the coordinator can reach the API server"),
    };
    Failure::new(code, format!("{what}: {}", chain(error))).remedy(remedy)
}
