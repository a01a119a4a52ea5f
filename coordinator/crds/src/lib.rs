//! podferry's Kubernetes API, group `podferry.dev`, version `v1alpha1`.
//!
//! - [`Migration`]: one pod, moved once. What it asks for is what a `MigrateRequest` can say; its status has what
//!   `podferry describe --output json` shows, and the coordinator's own record.
//! - [`MigrationPolicy`]: what migrations of some pods ask for when they do not say it themselves, and what they may not.
//! - [`NodeEvacuation`]: everything movable off one node; its status has what became of each pod, and the coordinator's own record.
//!
//! The definitions in `deploy/crds` are written by `cargo run -p podferry-crds -- deploy/crds`; a test holds them to the code.

mod evacuation;
mod migration;
mod policy;
mod schema;
mod wishes;

pub use evacuation::{EvacuatedPod, MAX_CONCURRENT, NodeEvacuation, NodeEvacuationSpec, NodeEvacuationStatus, Order};
pub use migration::{
    HistoryEntry, Migration, MigrationSpec, MigrationStatus, Problem, Progress, Round, Timings, Writer,
};
pub use policy::{Limits, MigrationPolicy, MigrationPolicySpec};
pub use wishes::{Connections, Strategy, Wishes};

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt as _;

/// The API's group.
pub const GROUP: &str = "podferry.dev";

/// On a [`Migration`] that the coordinator made itself because somebody asked over gRPC, REST or the page: the migration's id. Such an
/// object is a record and no request.
pub const ID_ANNOTATION: &str = "podferry.dev/migration-id";

/// Keeps a deleted [`Migration`] until it is undone or has come to its end.
pub const FINALIZER: &str = "podferry.dev/migration";

/// On a [`Migration`] that an eviction has asked for: the uid of the pod that was to be evicted.
pub const EVICTED_LABEL: &str = "podferry.dev/evicted-pod";

/// On such a [`Migration`]: who wanted to evict it, as the API server knows them.
pub const EVICTED_BY_ANNOTATION: &str = "podferry.dev/evicted-by";

/// On a [`NodeEvacuation`] that the coordinator made itself: the evacuation's id. Such an object is a record and no request.
pub const EVACUATION_ID_ANNOTATION: &str = "podferry.dev/evacuation-id";

/// Keeps a deleted [`NodeEvacuation`] until it has ended.
pub const EVACUATION_FINALIZER: &str = "podferry.dev/evacuation";

/// All definitions, each with the name of its file.
pub fn definitions() -> Vec<(String, CustomResourceDefinition)> {
    let all = [Migration::crd(), MigrationPolicy::crd(), NodeEvacuation::crd()];
    let named = |crd: CustomResourceDefinition| (format!("{}_{}.yaml", crd.spec.group, crd.spec.names.plural), crd);
    all.into_iter().map(named).collect()
}
