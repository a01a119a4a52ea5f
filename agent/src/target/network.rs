//! The network of an arriving container, when it brings its own.

use std::path::Path;

use podferry_common::MigrationId;
use podferry_common::failure::{Failure, FailureCode, chain};
use podferry_network::Netns;

use crate::context::Context;
use crate::journal::{PartRecord, Role};

/// The interface of a container, as every runtime and CNI calls it.
pub const INTERFACE: &str = "eth0";

/// Makes the network namespace and link of an arriving container, when it brings its own.
pub(super) async fn make(context: &Context, record: &PartRecord) -> Result<(), Failure> {
    let Role::Target { netns: Some(netns), link: Some(link), plan: Some(container), .. } = &record.role else {
        return Ok(());
    };
    let plan = container.plan(&context.config.network.bridge, &link.host_interface);
    podferry_network::create(netns, &plan).await.map_err(|error| {
        let what = "the container's network namespace cannot be made";
        context.failure(FailureCode::FailedPrecondition, what, &error).in_phase("prepare")
    })?;
    set_mtu(netns, container.mtu_during_restore());
    Ok(())
}

/// Removes what was made of it. Idempotent.
pub(super) async fn remove(context: &Context, record: &PartRecord) -> Result<(), Failure> {
    let Role::Target { netns: Some(netns), link: Some(link), .. } = &record.role else { return Ok(()) };
    podferry_network::destroy(netns, &link.host_interface).await.map_err(|error| {
        let what = "the container's network namespace cannot be removed";
        context.failure(FailureCode::Internal, what, &error).in_phase("rollback")
    })
}

/// CRIU restores sockets with a maximum segment size of 524 bytes, and idle ones keep it until their route's MTU changes:
/// so it is another one during the restore and as it was from the resume on.
pub(super) fn restore_mtu(record: &PartRecord) {
    if let Role::Target { netns: Some(netns), plan: Some(plan), .. } = &record.role {
        set_mtu(netns, plan.mtu);
    }
}

/// A wrong MTU makes connections slow and breaks none, so it is no reason to fail.
fn set_mtu(netns: &Path, mtu: u32) {
    let set = Netns::open(netns).and_then(|netns| podferry_network::set_mtu(&netns, INTERFACE, mtu));
    if let Err(error) = set {
        tracing::warn!(error = chain(&error), netns = %netns.display(), mtu, "the container's MTU cannot be set");
    }
}

/// The host's end of an arriving container's link: at most 15 bytes, and the random end of the id makes it unique.
pub(super) fn host_interface(migration: MigrationId) -> String {
    let id = migration.to_string().replace('-', "");
    format!("pf{}", &id[id.len().saturating_sub(12)..])
}
