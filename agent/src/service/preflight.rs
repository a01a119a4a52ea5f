//! Can this container be dumped here, could it be restored there? Looks, and touches nothing.

use std::path::Path;

use podferry_common::failure::{Failure, FailureCode};
use podferry_common::room;
use podferry_filesystem::WritableLayer;
use podferry_network::{ContainerLink, LinkHandle, Netns};
use podferry_proto::v1::{self, Finding, NetworkKind};
use podferry_runtime::{Container, NamespaceKind, Severity, Status};

use super::{convert, describe};
use crate::context::{Context, blocking};
use crate::target::INTERFACE;
use crate::target::bundle::Bundle;

/// What would come to this node.
#[derive(Clone, Debug)]
pub(crate) struct Wish {
    workload: String,
    memory_bytes: u64,
    layer_bytes: u64,
    network: NetworkKind,
    link: Option<v1::Link>,
}

impl From<v1::PreflightTargetRequest> for Wish {
    fn from(request: v1::PreflightTargetRequest) -> Self {
        Self {
            network: request.network(),
            workload: request.workload,
            memory_bytes: request.memory_bytes,
            layer_bytes: request.layer_bytes,
            link: request.link,
        }
    }
}

impl From<v1::PrepareRequest> for Wish {
    fn from(request: v1::PrepareRequest) -> Self {
        Self {
            network: request.network(),
            workload: request.workload,
            memory_bytes: request.memory_bytes,
            layer_bytes: request.layer_bytes,
            link: request.link,
        }
    }
}

/// A link together with where it is cut.
#[derive(Clone, Debug)]
pub(crate) struct FoundLink {
    /// The link.
    pub link: ContainerLink,
}

impl FoundLink {
    /// Where to cut it.
    pub(crate) fn handle(&self) -> Option<LinkHandle> {
        self.link.peer.as_ref().map(LinkHandle::new)
    }
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
    let Some(path) = container.namespace_paths.get(&NamespaceKind::Network) else { return Ok(None) };
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

/// Can it be dumped?
///
/// # Errors
/// When it is not there or cannot be looked at. What speaks against a dump is not an error but a finding.
pub(crate) async fn source(context: &Context, workload: &str) -> Result<v1::PreflightSourceResponse, Failure> {
    let container = container(context, workload).await?;
    if container.status != Status::Running {
        let message = format!("{workload} is {:?}, not running", container.status).to_lowercase();
        return Err(context.refusal(FailureCode::FailedPrecondition, message).in_phase("preflight"));
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
            Ok((report, layer))
        })
        .await?
    };
    let (report, layer) = looked;
    let mut findings: Vec<Finding> = report.findings.iter().map(finding_of).collect();
    let layer_bytes = match &layer {
        WritableLayer::Overlay(overlay) => content_bytes(&overlay.upper),
        WritableLayer::Plain { rootfs } => {
            findings.extend(plain_root(&container, rootfs));
            0
        }
    };
    Ok(v1::PreflightSourceResponse {
        findings,
        memory_bytes: report.facts.memory_bytes,
        layer_bytes,
        network: network_kind(&container).into(),
        link: link.map(|link| convert::link_message(&link.link)),
        tcp_connections: u32::try_from(report.facts.tcp_connections).unwrap_or(u32::MAX),
        processes: u32::try_from(report.facts.processes).unwrap_or(u32::MAX),
    })
}

fn network_kind(container: &Container) -> NetworkKind {
    if container.namespace_paths.contains_key(&NamespaceKind::Network) {
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
    match Bundle::read(&context.config.runtime.bundles_dir, &wish.workload) {
        Ok(bundle) => findings.extend(bundle_findings(&bundle, wish)),
        Err(failure) => findings.push(refusal("no-bundle", failure.message, failure.remedy.unwrap_or_default())),
    }
    let taken = {
        let (roots, id) = (context.config.runtime.roots.clone(), wish.workload.clone());
        blocking(move || Ok(podferry_runtime::find(&roots, &id).is_ok())).await?
    };
    if taken {
        let message = format!("a container {} is on this node already", wish.workload);
        findings.push(refusal("container-exists", message, format!("runc delete {}", wish.workload)));
    }
    let needed = room::to_restore(wish.memory_bytes);
    let facts = describe::host_facts(context).await?;
    if facts.memory_available < needed {
        let message = format!("{needed} bytes of memory are needed and {} are available", facts.memory_available);
        findings.push(refusal("out-of-memory", message, "free memory, or choose another target".to_owned()));
    }
    let places = [
        ("out-of-image-memory", &context.config.images_dir, wish.memory_bytes),
        ("out-of-disk", &context.config.runtime.bundles_dir, wish.layer_bytes),
    ];
    for (kind, dir, bytes) in places {
        let free = podferry_filesystem::free_bytes(dir).unwrap_or(0);
        let needed = room::to_store(bytes);
        if free < needed {
            let message = format!("{needed} bytes are needed in {} and {free} are free", dir.display());
            findings.push(refusal(kind, message, format!("give {} more room", dir.display())));
        }
    }
    Ok(findings)
}

/// The same as an error, for a caller that goes on to change things.
///
/// # Errors
/// The first finding.
pub(crate) async fn refuse(context: &Context, wish: &Wish) -> Result<(), Failure> {
    let Some(finding) = target(context, wish).await?.into_iter().next() else { return Ok(()) };
    let failure = context.refusal(FailureCode::FailedPrecondition, finding.message).in_phase("prepare");
    Err(failure.remedy(finding.remedy))
}

fn bundle_findings(bundle: &Bundle, wish: &Wish) -> Vec<Finding> {
    let mut findings = Vec::new();
    if bundle.is_mounted() {
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

fn refusal(kind: &str, message: String, remedy: String) -> Finding {
    Finding { refuses: true, kind: kind.to_owned(), pid: 0, fd: -1, message, remedy }
}

/// Bytes of the regular files below a folder. What cannot be read counts nothing: the copy will say so.
fn content_bytes(dir: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(dir) else { return 0 };
    let size = |entry: std::fs::DirEntry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => content_bytes(&entry.path()),
        Ok(metadata) if metadata.is_file() => metadata.len(),
        _ => 0,
    };
    entries.flatten().map(size).sum()
}
