//! Undoing and removing what a source part touched, when its worker cannot.

use std::time::{Duration, Instant};

use podferry_common::failure::{Failure, FailureCode, chain};
use podferry_network::LinkHandle;
use podferry_runtime::{Container, Freezer};

use crate::context::{Context, blocking};
use crate::journal::{PartDirs, PartRecord, Role};
use crate::target::bundle::Bundle;
use crate::throttle;
use crate::worker::messages::WorkerRecord;

/// How long a CRIU whose asker died gets to let its tasks go.
const CRIU_TIMEOUT: Duration = Duration::from_secs(30);
/// How long thawing gets.
const THAW_TIMEOUT: Duration = Duration::from_secs(5);

/// Waits until CRIU has let the tasks go, thaws their cgroup and joins their link.
///
/// # Errors
/// When CRIU does not end, or thawing or joining fails.
pub(crate) async fn free_container(
    context: &Context,
    container: Option<&Container>,
    worker: WorkerRecord,
    link: Option<LinkHandle>,
) -> Result<(), Failure> {
    let context = context.clone();
    let container = container.cloned();
    blocking(move || {
        if let Some(pid) = worker.criu_pid {
            wait_for_criu(&context, pid)?;
        }
        if let Some(container) = container.filter(Container::is_alive) {
            let thawed = Freezer::of(&container).and_then(|freezer| freezer.thaw(THAW_TIMEOUT));
            thawed.map_err(|error| failed(&context, "the container cannot be thawed", &error))?;
        }
        if let Some(link) = &link {
            // How it was cut died with the worker; cutting it again tells.
            match podferry_network::cut(link).and_then(|cut| podferry_network::uncut(&cut)) {
                // It went with its container or with a restart of the node.
                Ok(()) | Err(podferry_network::Error::NoInterface { .. }) => {}
                Err(error) => return Err(failed(&context, "the container's link cannot be joined again", &error)),
            }
        }
        Ok(())
    })
    .await
}

/// Gives a throttled container its own CPU limit back.
///
/// # Errors
/// When what the limit was cannot be read, or the cgroup does not take it.
pub(crate) async fn release_throttle(context: &Context, dirs: &PartDirs, record: &PartRecord) -> Result<(), Failure> {
    let (context, file) = (context.clone(), dirs.throttle_file());
    let lives = super::init_lives(record);
    blocking(move || {
        let released = throttle::release(&file, lives);
        released.map_err(|error| {
            let failure = failed(&context, "the container keeps less CPU time than its own limit", &error);
            failure.remedy(format!("see {}, which has that limit, and give it to the cgroup by hand", file.display()))
        })
    })
    .await
}

fn failed(context: &Context, what: &str, error: &(dyn std::error::Error + 'static)) -> Failure {
    context.failure(FailureCode::Internal, what, error).in_phase("rollback")
}

/// CRIU takes a lost asker for a no and resumes its tasks; nobody else may touch them before it has.
fn wait_for_criu(context: &Context, pid: u32) -> Result<(), Failure> {
    let begun = Instant::now();
    while is_criu(pid) {
        if begun.elapsed() > CRIU_TIMEOUT {
            let message = format!("CRIU (pid {pid}) still holds the tasks");
            return Err(context.refusal(FailureCode::DeadlineExceeded, message).in_phase("rollback"));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn is_criu(pid: u32) -> bool {
    let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    command.split(|byte| *byte == 0).any(|word| word == b"swrk")
}

/// Removes a container whose processes are dead: runc's state, the writable layer, what is in its volumes, the network namespace.
///
/// Only what is podferry's: a bundle that lies elsewhere, and its namespace, stay for whoever made them, as do volumes that did not move. What cannot be
/// removed is logged: the migration has succeeded all the same.
pub(crate) async fn remove_container(context: &Context, record: &PartRecord, container: Option<&Container>) {
    let Role::Source { root, bundle, link, netns, .. } = &record.role else { return };
    if context.config.kubernetes.is_some() {
        // All of it is the kubelet's, which sees that the container has ended, and that its pod is to be deleted.
        return;
    }
    let runc = context.runc(root);
    let id = record.workload.clone();
    let known = container.is_some();
    let ours = bundle.parent() == Some(context.config.runtime.bundles_dir.as_path());
    let (dir, volumes) = (bundle.clone(), record.volumes().to_vec());
    // What is there under its name now, alive, is another: the workload has come back.
    if runc.container(&id).is_ok_and(|now| now.is_alive()) {
        tracing::error!(id, "a released container is not removed: one of that name runs");
        return;
    }
    let removed = blocking(move || {
        if known && let Err(error) = runc.delete(&id, true) {
            tracing::error!(error = chain(&error), id, "the released container's state cannot be removed");
        }
        let bundle = Bundle::in_folder(dir);
        if ours && let Err(error) = bundle.dismantle() {
            tracing::error!(%error, bundle = %bundle.dir.display(), "the released writable layer cannot be removed");
        }
        for volume in &volumes {
            if let Err(error) = volume.clear() {
                tracing::error!(%error, dir = %volume.dir.display(), "what is in a released volume cannot be removed");
            }
        }
        Ok(())
    });
    if let Err(failure) = removed.await {
        tracing::error!(%failure, "the released container cannot be removed");
    }
    if let (true, Some(netns), Some(link)) = (ours, netns, link)
        && let Err(error) = podferry_network::destroy(netns, &link.host_interface).await
    {
        tracing::error!(error = chain(&error), netns = %netns.display(), "the released network namespace stays");
    }
}
