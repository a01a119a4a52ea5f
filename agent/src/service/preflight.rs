//! Can this container be dumped here, could it be restored there? Looks, and touches nothing.

use std::path::{Path, PathBuf};

use oci_spec::runtime::Spec;
use podferry_common::failure::{Failure, FailureCode};
use podferry_common::room;
use podferry_criu::GHOST_LIMIT;
use podferry_filesystem::WritableLayer;
use podferry_network::{ContainerLink, Netns, Unmoved};
use podferry_proto::v1::{self, Finding, NetworkKind};
use podferry_runtime::{Container, DeletedFile, NamespaceKind, Severity, Status, stop_signal};

use super::{convert, describe, network, tracking, volumes};
use crate::application::{Application, WrongApplication};
use crate::context::{Context, blocking};
use crate::target::INTERFACE;
use crate::target::bundle::Bundle;

/// How a container comes to run on the other node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// Its processes are dumped and restored.
    Carried,
    /// It is stopped, and started anew on its files.
    StartedAnew,
    /// A new instance takes its place.
    Replaced,
}

impl Way {
    /// That of a strategy.
    pub(crate) fn of(strategy: v1::Strategy) -> Self {
        match strategy {
            v1::Strategy::Cold => Self::StartedAnew,
            v1::Strategy::Application => Self::Replaced,
            _ => Self::Carried,
        }
    }
}

/// What would come to this node.
#[derive(Clone, Debug)]
pub(crate) struct Wish {
    workload: String,
    memory_bytes: u64,
    /// What counts against its limit; 0 when that is not known.
    charged_bytes: u64,
    layer_bytes: u64,
    network: NetworkKind,
    link: Option<v1::Link>,
    volumes: Vec<v1::Volume>,
    pub(crate) way: Way,
    /// Kubernetes: the container's bundle, once it is there.
    pod: Option<PodBundle>,
}

/// Where a pod's container is to be.
#[derive(Clone, Debug)]
enum PodBundle {
    /// Its pod is still to be made.
    ToCome,
    /// Here.
    At(PathBuf),
}

impl From<v1::PreflightTargetRequest> for Wish {
    fn from(request: v1::PreflightTargetRequest) -> Self {
        Self {
            network: request.network(),
            way: Way::of(request.strategy()),
            pod: request.is_pod.then_some(PodBundle::ToCome),
            workload: request.workload,
            memory_bytes: request.memory_bytes,
            charged_bytes: request.charged_bytes,
            layer_bytes: request.layer_bytes,
            volumes: request.volumes,
            link: request.link,
        }
    }
}

impl Wish {
    /// What is being prepared; a pod's container has its bundle by then.
    pub(crate) fn of_prepare(request: v1::PrepareRequest, bundle: Option<PathBuf>) -> Self {
        Self {
            network: request.network(),
            pod: bundle.map(PodBundle::At),
            way: match (request.application, request.cold) {
                (true, _) => Way::Replaced,
                (false, true) => Way::StartedAnew,
                (false, false) => Way::Carried,
            },
            workload: request.workload,
            memory_bytes: request.memory_bytes,
            // Preflight has compared it.
            charged_bytes: 0,
            layer_bytes: request.layer_bytes,
            volumes: request.volumes,
            link: request.link,
        }
    }

    /// The bundle that it would come into; none while its pod is still to be made.
    fn bundle_dir(&self, context: &Context) -> Option<PathBuf> {
        match &self.pod {
            Some(PodBundle::ToCome) => None,
            Some(PodBundle::At(bundle)) => Some(bundle.clone()),
            None => Some(context.config.runtime.bundles_dir.join(&self.workload)),
        }
    }
}

/// A link together with where it is cut.
#[derive(Clone, Debug)]
pub(crate) struct FoundLink {
    /// The link.
    pub link: ContainerLink,
}

/// Finds a container.
///
/// # Errors
/// `NOT_FOUND` when no root has it.
pub(crate) async fn container(context: &Context, workload: &str) -> Result<Container, Failure> {
    let id = workload.to_owned();
    let context = context.clone();
    blocking(move || {
        podferry_runtime::find(&context.config.runtime.roots, &id).map_err(|error| {
            let what = format!("there is no container {id}");
            context.failure(FailureCode::NotFound, &what, &error).in_phase("preflight")
        })
    })
    .await
}

/// The link of a container whose network namespace is given by path.
///
/// # Errors
/// When it has none that can be cut.
pub(crate) async fn link_of(context: &Context, container: &Container) -> Result<Option<FoundLink>, Failure> {
    let of_pod = context.config.kubernetes.is_some();
    let path = container.namespace_paths.get(&NamespaceKind::Network).filter(|_| !of_pod);
    let Some(path) = path else { return Ok(None) };
    let failed = |error: podferry_network::Error| {
        let what = "the container's link cannot be read";
        context.failure(FailureCode::FailedPrecondition, what, &error).in_phase("preflight")
    };
    let netns = Netns::open(path).map_err(failed)?;
    let link = podferry_network::discover(&netns, INTERFACE).await.map_err(failed)?;
    if link.peer.is_none() {
        let message = format!("{INTERFACE} of {} has no end in this node's network namespace", container.id);
        let failure = context.refusal(FailureCode::FailedPrecondition, message).in_phase("preflight");
        return Err(failure.remedy("connect the container with a veth pair"));
    }
    Ok(Some(FoundLink { link }))
}

/// Can it be taken from here in that way?
///
/// # Errors
/// When it is not there or cannot be looked at. What speaks against it is not an error but a finding.
pub(crate) async fn source(
    context: &Context,
    workload: &str,
    way: Way,
) -> Result<v1::PreflightSourceResponse, Failure> {
    let container = container(context, workload).await?;
    if container.status != Status::Running {
        let (message, remedy) = not_running(&container.id, container.status, &container.root);
        let failure = context.refusal(FailureCode::FailedPrecondition, message).in_phase("preflight");
        return Err(failure.remedy(remedy));
    }
    let link = link_of(context, &container).await?;
    let looked = {
        let (context, container) = (context.clone(), container.clone());
        blocking(move || {
            let failed = |error: &(dyn std::error::Error + 'static)| {
                let what = "the container's processes cannot be looked at";
                context.failure(FailureCode::FailedPrecondition, what, error).in_phase("preflight")
            };
            let report = podferry_runtime::preflight(&container).map_err(|error| failed(&error))?;
            let layer = WritableLayer::of(&container.rootfs).map_err(|error| failed(&error))?;
            let volumes = match way {
                Way::Replaced => (Vec::new(), volumes::of_replaced(&context, &container)?),
                Way::Carried | Way::StartedAnew => volumes::at_source(&context, &container)?,
            };
            let relayed = if way == Way::Carried { crate::relay::relayed(&context, &container) } else { None };
            Ok((report, layer, volumes, relayed))
        })
        .await?
    };
    let (report, layer, (volumes, mut findings), relayed) = looked;
    if way == Way::Carried {
        findings.extend(report.findings.iter().map(finding_of));
        let images_free = podferry_filesystem::free_bytes(&context.config.images_dir).unwrap_or(0);
        findings.extend(deleted_findings(&report.facts.deleted_files, images_free));
    } else {
        findings.extend(terminal_finding(&container.config));
        findings.extend(stop_signal(&container.annotations).err().map(|error| {
            let remedy = "name another in config.json, or migrate without stopping it".to_owned();
            refusal("stop-signal", error.to_string(), remedy)
        }));
    }
    if way == Way::Replaced {
        findings.extend(replaced_findings(context, &container));
    }
    if link.is_some() {
        findings.extend(network::unmoved_findings(&unmoved(context, &container).await?));
    }
    // They come back as files, and for a moment both as such and as images.
    let deleted = report.facts.deleted_files.iter().filter(|_| way == Way::Carried);
    let deleted_bytes: u64 = deleted.map(|file| file.bytes).sum();
    if let (WritableLayer::Plain { rootfs }, false) = (&layer, way == Way::Replaced) {
        findings.extend(plain_root(&container, rootfs));
    }
    let layer_bytes = if way == Way::Replaced { 0 } else { layer.moved().map_or(0, content_bytes) };
    Ok(v1::PreflightSourceResponse {
        findings,
        memory_bytes: report.facts.memory_bytes.saturating_add(deleted_bytes),
        charged_bytes: container.charged_memory().unwrap_or(0),
        layer_bytes: layer_bytes.saturating_add(deleted_bytes),
        network: network_kind(context, &container).into(),
        link: link.map(|link| convert::link_message(&link.link)),
        tcp_connections: u32::try_from(report.facts.tcp_connections).unwrap_or(u32::MAX),
        processes: u32::try_from(report.facts.processes).unwrap_or(u32::MAX),
        volumes,
        relayed,
        tracking: None,
    })
}

/// Whose memory could be followed while the container runs.
///
/// # Errors
/// When it is not there, or has ended.
pub(crate) async fn tracking(context: &Context, workload: &str) -> Result<v1::Tracking, Failure> {
    let container = container(context, workload).await?;
    let context = context.clone();
    blocking(move || {
        let members = container.tree().map_err(|error| {
            let what = "the container's processes cannot be looked at";
            context.failure(FailureCode::FailedPrecondition, what, &error).in_phase("preflight")
        })?;
        Ok(tracking::look(&members, context.config.tracker.into()))
    })
    .await
}

/// What is wrong with a container that does not run, and what to do.
fn not_running(id: &str, status: Status, root: &Path) -> (String, String) {
    let word = format!("{status:?}").to_lowercase();
    let root = root.display();
    let remedy = match status {
        Status::Paused => {
            format!("runc --root {root} resume {id}, unless it is paused for a reason, and migrate it then")
        }
        Status::Created => format!("runc --root {root} start {id}, and migrate it when its program runs"),
        Status::Running | Status::Stopped => {
            "start it where it shall run: there is nothing to move in one that has ended".to_owned()
        }
    };
    (format!("{id} is {word}, not running"), remedy)
}

async fn unmoved(context: &Context, container: &Container) -> Result<Unmoved, Failure> {
    let Some(path) = container.namespace_paths.get(&NamespaceKind::Network) else { return Ok(Unmoved::default()) };
    let looked = async { podferry_network::unmoved(&Netns::open(path)?, INTERFACE).await };
    looked.await.map_err(|error: podferry_network::Error| {
        let what = "the container's network cannot be looked at";
        context.failure(FailureCode::FailedPrecondition, what, &error).in_phase("preflight")
    })
}

/// Deleted files are carried along among the images, and so have to find room there.
fn deleted_findings(files: &[DeletedFile], images_free: u64) -> Vec<Finding> {
    const REMEDY: &str =
        "let the program close the file or keep its name (for logs: reopen them after rotation), or restart it";
    let refused = |file: &DeletedFile, kind: &str, why: String| Finding {
        refuses: true,
        kind: kind.to_owned(),
        pid: file.pid.unsigned_abs(),
        fd: file.fd,
        message: format!("has {} open, {} bytes that are in no directory any more, {why}", file.name, file.bytes),
        remedy: REMEDY.to_owned(),
    };
    let limit = u64::from(GHOST_LIMIT);
    let too_large = files.iter().filter(|file| file.bytes > limit);
    let mut findings: Vec<Finding> = too_large
        .map(|file| refused(file, "deleted-file", format!("and CRIU carries at most {limit} bytes of one")))
        .collect();
    let all = files.iter().map(|file| file.bytes).sum();
    if let Some(largest) = files.iter().max_by_key(|file| file.bytes)
        && all > 0
        && images_free < room::to_store(all)
    {
        let why =
            format!("and all such files with {all} bytes do not fit into the {images_free} bytes free for images");
        findings.push(refused(largest, "out-of-image-memory", why));
    }
    findings
}

fn network_kind(context: &Context, container: &Container) -> NetworkKind {
    let by_path = container.namespace_paths.contains_key(&NamespaceKind::Network);
    if by_path && context.config.kubernetes.is_some() {
        NetworkKind::Pod
    } else if container.namespace_paths.contains_key(&NamespaceKind::Network) {
        NetworkKind::Path
    } else if container.namespaces.contains(&NamespaceKind::Network) {
        NetworkKind::Own
    } else {
        NetworkKind::Host
    }
}

fn finding_of(finding: &podferry_runtime::Finding) -> Finding {
    Finding {
        refuses: finding.severity == Severity::Blocking,
        kind: convert::kebab(&format!("{:?}", finding.kind)),
        pid: finding.pid.map(i32::unsigned_abs).unwrap_or_default(),
        fd: finding.fd.unwrap_or(-1),
        message: finding.message.clone(),
        remedy: finding.remedy.to_owned(),
    }
}

/// A root filesystem that is no overlay and can be written to holds changes that nobody can tell from the image.
fn plain_root(container: &Container, rootfs: &Path) -> Option<Finding> {
    let read_only = container.config.root().as_ref().and_then(oci_spec::runtime::Root::readonly).unwrap_or(false);
    (!read_only).then(|| Finding {
        refuses: true,
        kind: "plain-root".to_owned(),
        pid: 0,
        fd: -1,
        message: format!("{} is writable and no overlay: its changes cannot be told from its image", rootfs.display()),
        remedy: "give the container an overlay as root filesystem, or make it read-only".to_owned(),
    })
}

/// What speaks against restoring here.
///
/// # Errors
/// When this machine cannot be looked at.
pub(crate) async fn target(context: &Context, wish: &Wish) -> Result<Vec<Finding>, Failure> {
    let mut findings = Vec::new();
    match &wish.pod {
        None => findings.extend(own_bundle_findings(context, wish)),
        Some(PodBundle::At(bundle)) => findings.extend(config_findings(bundle, wish)),
        Some(PodBundle::ToCome) => {}
    }
    let taken = {
        let (roots, id) = (context.config.runtime.roots.clone(), wish.workload.clone());
        blocking(move || Ok(podferry_runtime::find(&roots, &id).is_ok())).await?
    };
    if taken && wish.pod.is_none() {
        let message = format!("a container {} is on this node already", wish.workload);
        findings.push(refusal("container-exists", message, format!("runc delete {}", wish.workload)));
    }
    if wish.network == NetworkKind::Path {
        findings.extend(network::bridge_finding(&context.config.network.bridge));
    }
    if let Some(bundle) = wish.bundle_dir(context) {
        let (context, wish) = (context.clone(), wish.clone());
        let look = move || volumes::at_target(&context, &bundle, &wish.volumes, wish.layer_bytes);
        findings.extend(blocking(look).await?);
    }
    let carried = wish.way == Way::Carried;
    let needed = if carried { room::to_restore(wish.memory_bytes) } else { room::to_store(wish.memory_bytes) };
    let facts = describe::host_facts(context).await?;
    if facts.memory_available < needed {
        let message = format!("{needed} bytes of memory are needed and {} are available", facts.memory_available);
        findings.push(refusal("out-of-memory", message, "free memory, or choose another target".to_owned()));
    }
    let places = [
        ("out-of-image-memory", context.config.images_dir.as_path(), wish.memory_bytes),
        ("out-of-disk", context.config.layers_dir(), wish.layer_bytes),
    ];
    // No images come then.
    for (kind, dir, bytes) in places.into_iter().skip(usize::from(!carried)) {
        let free = podferry_filesystem::free_bytes(dir).unwrap_or(0);
        let needed = room::to_store(bytes);
        if free < needed {
            let message = format!("{needed} bytes are needed in {} and {free} are free", dir.display());
            findings.push(refusal(kind, message, format!("give {} more room", dir.display())));
        }
    }
    Ok(findings)
}

/// What speaks against the bundle of podferry's own that is to be restored into.
fn own_bundle_findings(context: &Context, wish: &Wish) -> Vec<Finding> {
    let bundle = match Bundle::read(&context.config.runtime.bundles_dir, &wish.workload) {
        Ok(bundle) => bundle,
        Err(failure) => return vec![refusal("no-bundle", failure.message, failure.remedy.unwrap_or_default())],
    };
    let mut findings = bundle_findings(&bundle, wish);
    if wish.way == Way::Replaced {
        let wrong = application_here(context, &wish.workload).err();
        findings
            .extend(wrong.map(|failure| refusal("application", failure.message, failure.remedy.unwrap_or_default())));
    }
    findings.extend(config_findings(&bundle.dir, wish));
    findings
}

/// What speaks against its configuration. One that cannot be read is found elsewhere.
fn config_findings(bundle: &Path, wish: &Wish) -> Option<Finding> {
    let spec = Spec::load(bundle.join("config.json")).ok()?;
    match wish.way {
        Way::Carried => limit_finding(&spec, wish.charged_bytes),
        Way::StartedAnew | Way::Replaced => terminal_finding(&spec),
    }
}

/// What speaks against a new instance in the place of one that runs here.
fn replaced_findings(context: &Context, container: &Container) -> Vec<Finding> {
    let application = Application::of(&container.annotations);
    let mut findings: Vec<Finding> = application.err().map(|error| wrong_application(&error)).into_iter().collect();
    if network_kind(context, container) == NetworkKind::Host {
        findings.push(refusal(
            "host-network",
            "it is in the node's own network: no address moves to a new instance".to_owned(),
            "give it a network namespace by path in config.json, or use another strategy".to_owned(),
        ));
    }
    findings
}

fn wrong_application(error: &WrongApplication) -> Finding {
    let remedy = "see docs/operations.md, \"Application-level migrations\", for what config.json is to say".to_owned();
    refusal("application", error.to_string(), remedy)
}

/// What this node's own bundle says of how a new instance takes over.
///
/// # Errors
/// When it is not there, or does not say it.
pub(crate) fn application_here(context: &Context, workload: &str) -> Result<Application, Failure> {
    let config = context.config.runtime.bundles_dir.join(workload).join("config.json");
    let spec = Spec::load(&config).map_err(|error| {
        let what = format!("{} cannot be read", config.display());
        context.failure(FailureCode::FailedPrecondition, &what, &error).in_phase("preflight")
    })?;
    let annotations = spec.annotations().iter().flatten().map(|(key, value)| (key.clone(), value.clone())).collect();
    Application::of(&annotations).map_err(|error| {
        let finding = wrong_application(&error);
        let failure = context.refusal(FailureCode::FailedPrecondition, finding.message).in_phase("preflight");
        failure.remedy(finding.remedy)
    })
}

/// Nobody is there to take the terminal of a container that an agent starts.
fn terminal_finding(config: &Spec) -> Option<Finding> {
    let wanted = config.process().as_ref().and_then(oci_spec::runtime::Process::terminal).unwrap_or(false);
    wanted.then(|| {
        let message = "its standard streams are a terminal, which nobody takes when it is started anew".to_owned();
        refusal("terminal", message, "set process.terminal to false in config.json, and start it so".to_owned())
    })
}

/// A container that has more memory than it may have here is killed by the kernel, and where memory is laid in behind the commit
/// not before it: then no copy is left.
fn limit_finding(config: &Spec, charged_bytes: u64) -> Option<Finding> {
    let limit = config.linux().as_ref()?.resources().as_ref()?.memory().as_ref()?.limit()?;
    // Neither 0 nor -1 is a limit.
    let limit = u64::try_from(limit).ok().filter(|limit| *limit > 0)?;
    (limit < charged_bytes).then(|| {
        let message =
            format!("the target's config.json allows {limit} bytes of memory, and the container has {charged_bytes}");
        refusal("memory-limit", message, "raise linux.resources.memory.limit in config.json".to_owned())
    })
}

/// The same as an error, for a caller that goes on to change things.
///
/// # Errors
/// The first finding that refuses.
pub(crate) async fn refuse(context: &Context, wish: &Wish) -> Result<(), Failure> {
    let Some(finding) = target(context, wish).await?.into_iter().find(|finding| finding.refuses) else {
        return Ok(());
    };
    let failure = context.refusal(FailureCode::FailedPrecondition, finding.message).in_phase("prepare");
    Err(failure.remedy(finding.remedy))
}

fn bundle_findings(bundle: &Bundle, wish: &Wish) -> Vec<Finding> {
    let mut findings = Vec::new();
    // Whatever it is: it would be unmounted with what the migration mounts there.
    if podferry_filesystem::is_mounted(&bundle.rootfs()).unwrap_or(true) {
        let message = format!("{} is mounted: the bundle is in use", bundle.rootfs().display());
        findings.push(refusal("bundle-in-use", message, "end what uses it, and unmount it".to_owned()));
    }
    if wish.network != NetworkKind::Path {
        return findings;
    }
    match &bundle.netns {
        None => findings.push(refusal(
            "no-network-namespace",
            "the target's config.json names no network namespace, and the source's does".to_owned(),
            "give the network namespace a path in config.json".to_owned(),
        )),
        Some(netns) if Netns::open(netns).is_ok() => findings.push(refusal(
            "network-namespace-exists",
            format!("the network namespace {} is there already", netns.display()),
            format!("ip netns delete, or umount {}", netns.display()),
        )),
        Some(_) => {}
    }
    if wish.link.is_none() {
        findings.push(refusal("no-link", "the source did not say its link".to_owned(), "update its agent".to_owned()));
    }
    findings
}

pub(super) fn refusal(kind: &str, message: String, remedy: String) -> Finding {
    Finding { refuses: true, kind: kind.to_owned(), pid: 0, fd: -1, message, remedy }
}

/// Bytes of the regular files below a folder. What cannot be read counts nothing: the copy will say so.
pub(super) fn content_bytes(dir: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(dir) else { return 0 };
    let size = |entry: std::fs::DirEntry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => content_bytes(&entry.path()),
        Ok(metadata) if metadata.is_file() => metadata.len(),
        _ => 0,
    };
    entries.flatten().map(size).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_does_not_run_is_told_what_to_do() {
        for (status, words) in [
            (Status::Paused, "runc --root /run/runc resume redis"),
            (Status::Created, "runc --root /run/runc start redis"),
            (Status::Stopped, "ended"),
        ] {
            let (message, remedy) = not_running("redis", status, Path::new("/run/runc"));
            assert!(remedy.contains(words), "{remedy}");
            assert!(message.contains(&format!("{status:?}").to_lowercase()), "{message}");
        }
    }

    #[test]
    fn a_limit_below_the_memory_that_a_container_has_is_refused_with_both_figures() {
        let config = |limit: i64| -> Spec {
            serde_json::from_value(serde_json::json!({
                "ociVersion": "1.2.0",
                "linux": { "resources": { "memory": { "limit": limit } } },
            }))
            .unwrap()
        };
        let found = limit_finding(&config(4 << 20), 12 << 20).unwrap();
        assert!(found.refuses && found.message.contains("allows 4194304 bytes") && found.message.contains("12582912"));
        for none in [0, -1, 12 << 20] {
            assert_eq!(limit_finding(&config(none), 12 << 20), None, "{none}");
        }
        assert_eq!(limit_finding(&Spec::default(), u64::MAX), None, "by default there is none");
    }

    #[test]
    fn deleted_files_are_refused_only_when_they_cannot_be_carried() {
        let file = |fd, bytes| DeletedFile { pid: 7, fd, name: format!("/data/{fd} (deleted)"), bytes, id: (1, 2) };
        let some = [file(3, 8 << 20), file(4, 1 << 30)];
        assert_eq!(deleted_findings(&some, 2 << 30), []);
        assert_eq!(deleted_findings(&[], 0), []);
        assert_eq!(deleted_findings(&[file(3, 0)], 0), []);
        let full = &deleted_findings(&some, 1 << 30)[0];
        assert_eq!((full.refuses, full.pid, full.fd, full.kind.as_str()), (true, 7, 4, "out-of-image-memory"));
        let large = &deleted_findings(&[file(3, 8 << 20), file(5, 4 << 30)], 1 << 40)[0];
        assert_eq!((large.refuses, large.pid, large.fd, large.kind.as_str()), (true, 7, 5, "deleted-file"));
        assert!(large.message.contains(&(4_u64 << 30).to_string()), "{large:?}");
    }
}
