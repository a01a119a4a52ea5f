//! Containers that are pods': their bundle is containerd's, and what runs their restore is the shim's child.

use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use oci_spec::runtime::{LinuxNamespaceType, Spec};
use podferry_common::MigrationId;
use podferry_common::failure::{Failure, FailureCode};
use podferry_common::identity::Peer;
use podferry_filesystem::Overlay;
use podferry_runtime::Launcher;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::Relayed;
use super::bundle::Bundle;
use crate::context::{Context, blocking};
use crate::journal::PodArrival;
use crate::pods::{Door, Visitor};
use crate::relay::Away;

/// How long a wrapper gets to find an agent that was restarted.
const RETURN_TIMEOUT: Duration = Duration::from_secs(5);

/// What to do about a kubelet that did not wait.
const ANEW: &str = "see \"A kubelet that did not wait\" in docs/kubernetes.md";

/// What is noted of a pod's container that comes; blocks.
///
/// # Errors
/// When its configuration cannot be read, or its host name.
pub(super) fn arrival(context: &Context, visitor: &Visitor, bundle: &Bundle) -> Result<PodArrival, Failure> {
    let spec = spec(context, &bundle.dir)?;
    let host_name = uts_namespace(&spec).map(|namespace| {
        let name = within(&namespace, || Ok(rustix::system::uname().nodename().to_string_lossy().into_owned()));
        name.map_err(|errno| host_name_failed(context, "read", errno))
    });
    let (hello, overlay) = (&visitor.hello, bundle.overlay());
    Ok(PodArrival {
        uid: hello.uid.clone(),
        name: hello.pod.clone(),
        stands_in: false,
        host_name: host_name.transpose()?,
        container: hello.container.clone(),
        bundle: bundle.dir.clone(),
        lower: overlay.lower.clone(),
        upper: overlay.upper.clone(),
        work: overlay.work.clone(),
        pid_file: hello.pid_file.clone(),
        cgroup: spec.linux().as_ref().and_then(|linux| linux.cgroups_path().clone()),
        left: Vec::new(),
    })
}

/// Gives the pod's namespace the addresses whose connections come with it. Where that cannot be they are closed, which is no reason
/// for it to stay.
pub(super) async fn expect_relay(
    context: &Context,
    migration: MigrationId,
    source: &Peer,
    pod: Option<&PodArrival>,
    relayed: Option<Relayed>,
) -> Option<Arc<Away>> {
    // What would end at once is not begun.
    context.config.kubernetes.as_ref().filter(|kubernetes| kubernetes.relay_s > 0)?;
    let (relayed, pod) = (relayed?, pod?);
    let (context, bundle, source) = (context.clone(), pod.bundle.clone(), source.clone());
    let prepared = tokio::task::spawn_blocking(move || {
        let spec = Spec::load(bundle.join("config.json"))?;
        let netns =
            namespace_of(&spec, LinuxNamespaceType::Network).ok_or("the pod has no network namespace of its own")?;
        Away::prepare(&context, migration, source, netns, relayed)
    });
    match prepared.await {
        Ok(Ok(away)) => Some(away),
        Ok(Err(error)) => {
            tracing::warn!(%error, %migration, "connections are closed: nothing can carry them");
            None
        }
        Err(error) => {
            tracing::error!(%error, %migration, "connections are closed: the task that prepares a relay ended");
            None
        }
    }
}

/// Connections that come with a pod's container come to another pod's, with that bundle. Where that cannot be they end; blocks.
pub(super) fn move_relay(context: &Context, away: &Away, bundle: &Path) {
    let moved = Spec::load(bundle.join("config.json")).map_err(Into::into).and_then(|spec| {
        let netns = namespace_of(&spec, LinuxNamespaceType::Network);
        away.move_to(netns.ok_or("the pod has no network namespace of its own")?)
    });
    if let Err(error) = moved {
        tracing::warn!(%error, node = %context.config.node, "connections end: nothing can carry them to the pod of their name");
    }
}

/// Its bundle.
pub(super) fn bundle(pod: &PodArrival) -> Bundle {
    let overlay = Overlay { lower: pod.lower.clone(), upper: pod.upper.clone(), work: pod.work.clone() };
    Bundle::with_layers(pod.bundle.clone(), overlay)
}

/// What starts runc for it; blocks.
pub(super) fn launcher(
    context: &Context,
    pod: &PodArrival,
    id: &str,
    migration: MigrationId,
) -> Result<Arc<dyn Launcher>, Failure> {
    let at = door(pod);
    let waiting = context.visitors.wait(&at, migration, RETURN_TIMEOUT);
    // On a thread where that may be done.
    let visitor = tokio::runtime::Handle::current().block_on(waiting);
    let visitor = visitor.filter(|visitor| visitor.is_there()).ok_or_else(|| {
        let message = format!(
            "nothing waits to become container {} of pod {}: the kubelet has given it up, or deleted the pod",
            pod.container, pod.name
        );
        let failure = context.refusal(FailureCode::Unavailable, message).in_phase("restore");
        failure.remedy("see `kubectl describe pod` for the target pod; the kubelet's runtimeRequestTimeout bounds how long it may wait")
    })?;
    if visitor.hello.id != id {
        // Its files have been laid into the bundle of the one before.
        let message = format!(
            "the kubelet has begun container {} of pod {} anew, as {}: what came is for {id}",
            pod.container, pod.name, visitor.hello.id
        );
        return Err(context.refusal(FailureCode::FailedPrecondition, message).in_phase("restore").remedy(ANEW));
    }
    Ok(visitor.launcher())
}

pub(super) fn door(pod: &PodArrival) -> Door {
    Door { uid: pod.uid.clone(), container: pod.container.clone() }
}

/// CRIU gives the namespace that the pod's containers share the host name of the pod that was: this gives it the pod's own again.
///
/// # Errors
/// When the namespace cannot be entered.
pub(super) async fn name_host(context: &Context, pod: &PodArrival) -> Result<(), Failure> {
    let Some(name) = pod.host_name.clone() else { return Ok(()) };
    let (context, bundle) = (context.clone(), pod.bundle.clone());
    let named = blocking(move || {
        let Some(namespace) = uts_namespace(&spec(&context, &bundle)?) else { return Ok(()) };
        let set = within(&namespace, move || rustix::system::sethostname(name.as_bytes()));
        set.map_err(|errno| host_name_failed(&context, "set", errno))
    });
    named.await
}

fn host_name_failed(context: &Context, action: &str, errno: Errno) -> Failure {
    let what = format!("the pod's host name cannot be {action}");
    context.failure(FailureCode::Internal, &what, &std::io::Error::from(errno)).in_phase("restore")
}

/// Does it in that namespace of host names; blocks.
fn within<T: Send + 'static>(
    namespace: &Path,
    work: impl FnOnce() -> rustix::io::Result<T> + Send + 'static,
) -> rustix::io::Result<T> {
    let file = rustix::fs::open(namespace, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    // The thread that does it is in that namespace for good.
    let done = std::thread::spawn(move || {
        move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::HostNameAndNISDomainName))?;
        work()
    });
    done.join().unwrap_or(Err(Errno::FAULT))
}

/// The configuration of a pod's container; blocks.
///
/// # Errors
/// When it cannot be read.
pub(super) fn spec(context: &Context, bundle: &Path) -> Result<Spec, Failure> {
    let what = "the configuration of a pod's container cannot be read";
    Spec::load(bundle.join("config.json"))
        .map_err(|error| context.failure(FailureCode::FailedPrecondition, what, &error).in_phase("restore"))
}

fn uts_namespace(spec: &Spec) -> Option<PathBuf> {
    namespace_of(spec, LinuxNamespaceType::Uts)
}

/// The namespace of that kind that the configuration gives by path.
fn namespace_of(spec: &Spec, kind: LinuxNamespaceType) -> Option<PathBuf> {
    let namespaces = spec.linux().as_ref()?.namespaces().as_ref()?;
    namespaces.iter().find(|namespace| namespace.typ() == kind)?.path().clone()
}
