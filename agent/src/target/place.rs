//! Where an arriving container's files go: what is made ready for them, and removed when it is undone.

use std::path::Path;

use podferry_common::failure::{Failure, FailureCode};

use super::bundle::Bundle;
use super::inbox::Inbox;
use super::seeds::ArrivingTree;
use super::{network, pod};
use crate::context::{Context, blocking};
use crate::journal::{PartDirs, PartRecord, PodArrival};
use crate::pods::Visitor;
use crate::volumes::{self, LAYER, Volume};

/// Where the container is going to be, whose volumes are ready to be filled then; blocks.
pub(super) fn place(
    context: &Context,
    visitor: Option<&Visitor>,
    workload: &str,
    volumes: &[Volume],
) -> Result<(Bundle, Option<PodArrival>), Failure> {
    let bundle = match visitor {
        Some(visitor) => Bundle::of_pod(visitor.hello.bundle.clone()),
        None => Bundle::read(&context.config.runtime.bundles_dir, workload),
    };
    let bundle = bundle.map_err(|failure| failure.on(context.config.node.as_str()))?;
    let pod = visitor.map(|visitor| pod::arrival(context, visitor, &bundle)).transpose()?;
    let ready = match visitor {
        // They were made for this pod, and what is there comes from the image.
        Some(_) => Volume::clear,
        None => Volume::check_empty,
    };
    volumes.iter().try_for_each(ready).map_err(|error| not_ready(context, &error))?;
    Ok((bundle, pod))
}

pub(super) fn not_ready(context: &Context, error: &std::io::Error) -> Failure {
    let what = format!("a volume cannot be made ready: {error}");
    context.refusal(FailureCode::FailedPrecondition, what).in_phase("prepare")
}

/// Where the container's files go, by their names in the transfer.
pub(super) fn trees(bundle: &Bundle, volumes: &[Volume]) -> Vec<(String, ArrivingTree)> {
    let layer = ArrivingTree::new(bundle.upper(), bundle.seeds());
    let volumes = volumes.iter().enumerate();
    let volumes =
        volumes.map(|(index, volume)| (volumes::name(index), ArrivingTree::new(volume.dir.clone(), volume.seeds())));
    std::iter::once((LAYER.to_owned(), layer)).chain(volumes).collect()
}

/// Why files are not on the disk.
#[derive(Debug, thiserror::Error)]
pub(super) enum SyncError {
    /// They cannot be synced.
    #[error(transparent)]
    Layer(#[from] podferry_filesystem::Error),
    /// What came before it could not be written.
    #[error("what came of them before the freeze could not be written")]
    Early(#[from] std::io::Error),
}

/// Waits until a container's files are on the disk.
pub(super) fn sync(layer: &Path, volumes: &[Volume], inbox: Option<&Inbox>) -> Result<(), SyncError> {
    podferry_filesystem::sync(layer)?;
    volumes.iter().try_for_each(|volume| podferry_filesystem::sync(&volume.dir))?;
    Ok(inbox.map_or(Ok(()), Inbox::written_back)?)
}

/// Removes what a target part made apart from the restore itself. Idempotent.
pub(super) async fn remove(
    context: &Context,
    record: &PartRecord,
    bundle: &Bundle,
    dirs: &PartDirs,
) -> Result<(), Failure> {
    let runc = context.runc(context.config.runc_root());
    if runc.container(&record.workload).is_ok_and(|container| container.is_alive()) {
        let message = format!("a container named {} runs, which this migration did not restore", record.workload);
        return Err(context.refusal(FailureCode::FailedPrecondition, message).in_phase("rollback"));
    }
    let (with, bundle, volumes) = (context.clone(), bundle.clone(), record.volumes().to_vec());
    blocking(move || remove_files(&with, &bundle, &volumes)).await?;
    network::remove(context, record).await?;
    dirs.wipe_volatile();
    Ok(())
}

fn remove_files(context: &Context, bundle: &Bundle, volumes: &[Volume]) -> Result<(), Failure> {
    let failed =
        |what: &str, error: &std::io::Error| context.failure(FailureCode::Internal, what, error).in_phase("rollback");
    bundle.dismantle().map_err(|error| failed("the writable layer cannot be removed", &error))?;
    let cleared = volumes.iter().try_for_each(Volume::clear);
    cleared.map_err(|error| failed("what came into a volume cannot be removed", &error))
}
