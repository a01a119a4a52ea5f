//! Volumes in a preflight: what the source has, and whether the target can take it.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use oci_spec::runtime::Spec;
use podferry_common::failure::{Failure, FailureCode};
use podferry_common::room;
use podferry_proto::v1::{self, Finding};
use podferry_runtime::{BindMount, Container, Storage};

use super::preflight::{content_bytes, refusal};
use crate::config::SHARED_MEMORY;
use crate::context::Context;
use crate::volumes::{self, Look, MOST, Volume};

/// The most of them that are looked at, also of those that stay.
const MOST_KNOWN: usize = 2 * MOST;

fn look(context: &Context, spec: &Spec, bundle: &Path) -> Result<Look, Failure> {
    Look::at(&context.config, spec, bundle).map_err(|error| {
        let what = "what is mounted in the container cannot be looked at";
        context.failure(FailureCode::FailedPrecondition, what, &error).in_phase("preflight")
    })
}

/// The volumes that a coordinator names, of a container that runs here.
///
/// # Errors
/// When one of them does not move.
pub(super) fn of_source(
    context: &Context,
    container: &Container,
    named: &[v1::Volume],
) -> Result<Vec<Volume>, Failure> {
    let chosen = look(context, &container.config, &container.bundle)?.chosen(named);
    chosen.map_err(|failure| failure.on(context.config.node.as_str()).in_phase("freeze"))
}

/// The volumes that a coordinator names, of a container that comes here.
///
/// # Errors
/// When one of them does not move, or there is no bundle.
pub(super) fn of_target(context: &Context, bundle: &Path, named: &[v1::Volume]) -> Result<Vec<Volume>, Failure> {
    if named.is_empty() {
        return Ok(Vec::new());
    }
    let chosen = look(context, &spec_of(context, bundle)?, bundle)?.chosen(named);
    chosen.map_err(|failure| failure.on(context.config.node.as_str()).in_phase("prepare"))
}

fn spec_of(context: &Context, bundle: &Path) -> Result<Spec, Failure> {
    Spec::load(bundle.join("config.json")).map_err(|error| {
        let what = format!("{}/config.json cannot be read", bundle.display());
        context.failure(FailureCode::FailedPrecondition, &what, &error).in_phase("preflight")
    })
}

/// What a running container has, for the target to know, and what speaks against moving it. Blocks.
///
/// # Errors
/// When it cannot be looked at.
pub(super) fn at_source(context: &Context, container: &Container) -> Result<(Vec<v1::Volume>, Vec<Finding>), Failure> {
    let look = look(context, &container.config, &container.bundle)?;
    let mut findings: Vec<Finding> = look.staying.iter().map(|mount| stays(context, mount)).collect();
    findings.extend(overlap(&look));
    if look.moving.len() > MOST || look.shared.len() > MOST {
        let message = format!("it has more than {MOST} volumes that move, or are shared");
        findings.push(refusal("too-many-volumes", message, "give it fewer mounts".to_owned()));
    }
    let own: Vec<i32> = container.init.iter().map(|init| init.pid).collect();
    for volume in &look.moving {
        findings.extend(used(context, volume, &own)?);
    }
    let moving = look.moving.iter().map(|volume| v1::Volume {
        destination: volume.destination.display().to_string(),
        bytes: content_bytes(&volume.dir),
        ..v1::Volume::default()
    });
    let shared = look.shared.iter().map(|(mount, storage)| v1::Volume {
        destination: mount.destination.display().to_string(),
        bytes: 0,
        shared_filesystem: storage.filesystem.clone(),
        shared_place: storage.place.clone(),
    });
    Ok((moving.chain(shared).take(MOST_KNOWN).collect(), findings))
}

/// What a new instance would find of the volumes of one that runs here. None of them moves. Blocks.
///
/// # Errors
/// When it cannot be looked at.
pub(super) fn of_replaced(context: &Context, container: &Container) -> Result<Vec<Finding>, Failure> {
    let look = look(context, &container.config, &container.bundle)?;
    let shared = look.shared.iter().map(|(mount, storage)| {
        refusal(
            "volume-shared",
            format!(
                "{} is on {} ({}), which both instances would write to at once",
                mount.destination.display(),
                storage.filesystem,
                storage.place
            ),
            "mount it read-only, or use another strategy".to_owned(),
        )
    });
    let left = look.moving.iter().map(|volume| {
        warning(
            "volume-stays",
            format!(
                "what is in {} ({} here) stays: the new instance begins with what the target has there",
                volume.destination.display(),
                volume.dir.display()
            ),
            "remove it here when it is not needed any more".to_owned(),
        )
    });
    let staying = look.staying.iter().map(|mount| stays(context, mount));
    Ok(shared.chain(left).chain(staying).collect())
}

/// What speaks against having these volumes here, where the layer takes `layer_bytes` on the disk of the bundles. Blocks.
///
/// # Errors
/// When this node's folders cannot be looked at.
pub(super) fn at_target(
    context: &Context,
    bundle: &Path,
    named: &[v1::Volume],
    layer_bytes: u64,
) -> Result<Vec<Finding>, Failure> {
    // Said already when there is none.
    let Ok(spec) = spec_of(context, bundle) else { return Ok(Vec::new()) };
    let look = look(context, &spec, bundle)?;
    if named.len() > MOST_KNOWN {
        let message = format!("{} volumes are named", named.len());
        return Ok(vec![refusal("too-many-volumes", message, "give it fewer mounts".to_owned())]);
    }
    let mut findings: Vec<Finding> = overlap(&look).into_iter().collect();
    let mut needed = BTreeMap::from([(device(context.config.layers_dir()), layer_bytes)]);
    for volume in named {
        if !volume.shared_filesystem.is_empty() {
            findings.extend(shared_here(&look, volume));
            continue;
        }
        let here = look.moving.iter().find(|known| known.destination == Path::new(&volume.destination));
        let Some(here) = here else {
            findings.push(missing(context, &look, volume));
            continue;
        };
        // A pod's are made for it, with what the image has there.
        if context.config.kubernetes.is_none() {
            findings.extend(occupied(here));
        }
        findings.extend(used(context, here, &[])?);
        let all = needed.entry(device(&here.dir)).or_default();
        *all = all.saturating_add(volume.bytes);
        findings.extend(too_small(here, *all));
    }
    let unknown = look.moving.iter().filter(|here| !named.iter().any(|volume| is_at(&here.destination, volume)));
    findings.extend(unknown.map(|volume| {
        warning(
            "volume-stays",
            format!("{} does not come with it: it finds there what this node has", volume.destination.display()),
            "compare the two config.json, and `runtime.volume_dirs` of the two agent.toml".to_owned(),
        )
    }));
    Ok(findings)
}

fn is_at(destination: &Path, volume: &v1::Volume) -> bool {
    destination == Path::new(&volume.destination)
}

fn device(path: &Path) -> u64 {
    // What cannot be looked at is on none, and preparing says why.
    std::fs::metadata(volumes::existing(path)).map_or(0, |metadata| metadata.dev())
}

fn overlap(look: &Look) -> Option<Finding> {
    let (one, other) = look.overlap()?;
    let named = |volume: &Volume| format!("{} ({})", volume.destination.display(), volume.dir.display());
    let message = format!("{} and {} are one directory, or one lies in the other", named(one), named(other));
    Some(refusal("volumes-overlap", message, "give each mount a directory of its own".to_owned()))
}

/// Another container sees it.
fn used(context: &Context, volume: &Volume, own: &[i32]) -> Result<Option<Finding>, Failure> {
    // A pod's shared memory is its sandbox's, too, which keeps nothing there.
    let of_sandbox = context.config.kubernetes.is_some() && volume.destination == Path::new(SHARED_MEMORY);
    if of_sandbox || !volume.dir.exists() {
        return Ok(None);
    }
    let user = Storage::of(&volume.dir).and_then(|storage| storage.other_user(&volume.dir, own));
    let user = user.map_err(|error| {
        let what = format!("who uses {} cannot be told", volume.dir.display());
        context.failure(FailureCode::FailedPrecondition, &what, &error).in_phase("preflight")
    })?;
    Ok(user.map(|pid| Finding {
        pid: pid.unsigned_abs(),
        ..refusal(
            "volume-in-use",
            format!("has {} mounted, too, which would move away from it", volume.dir.display()),
            "stop the other container, or put what both use on storage that both nodes see".to_owned(),
        )
    }))
}

fn stays(context: &Context, mount: &BindMount) -> Finding {
    if context.config.kubernetes.is_some() {
        // Nobody has said that another node has the same there.
        return refusal(
            "volume-stays",
            format!("{} ({} here) is no volume that moves", mount.destination.display(), mount.source.display()),
            "see which volumes move in docs/kubernetes.md, or mount it read-only".to_owned(),
        );
    }
    warning(
        "volume-stays",
        format!(
            "{} ({} here) is not moved: it lies below none of runtime.volume_dirs ({})",
            mount.destination.display(),
            mount.source.display(),
            folders(context, ", ")
        ),
        "see that both nodes have the same there, or put it below such a folder".to_owned(),
    )
}

fn missing(context: &Context, look: &Look, volume: &v1::Volume) -> Finding {
    let at = |mount: &&BindMount| is_at(&mount.destination, volume);
    let (message, remedy) = if let Some(mount) = look.staying.iter().find(at) {
        (
            format!(
                "{} is {} here, which is below none of runtime.volume_dirs",
                volume.destination,
                mount.source.display()
            ),
            format!("give it a directory below {}, which the migration fills", folders(context, " or ")),
        )
    } else if let Some((_, storage)) = look.shared.iter().find(|(mount, _)| is_at(&mount.destination, volume)) {
        (
            format!("{} is on {} here, and on the source's own disk there", volume.destination, storage.filesystem),
            "let both nodes have it on shared storage, or both on a disk of their own".to_owned(),
        )
    } else if look.own.iter().any(|mount| is_at(&mount.destination, volume)) {
        (
            format!("{} is a file here, or can only be read", volume.destination),
            "let config.json mount a directory there that can be written to".to_owned(),
        )
    } else {
        (
            format!("config.json mounts nothing at {}, where the source has a volume", volume.destination),
            format!("let it mount a directory below {} there, which the migration fills", folders(context, " or ")),
        )
    };
    refusal("no-volume", message, remedy)
}

/// What is to be on shared storage is on the same here, as far as its name tells.
fn shared_here(look: &Look, volume: &v1::Volume) -> Option<Finding> {
    let here = look.shared.iter().find(|(mount, _)| is_at(&mount.destination, volume));
    let there = format!("{} ({})", volume.shared_filesystem, volume.shared_place);
    let Some((_, storage)) = here else {
        let message = format!("{} is on {there} on the source, and on no shared storage here", volume.destination);
        let remedy = "mount the same share on this node, and let config.json bind it".to_owned();
        return Some(refusal("volume-not-shared", message, remedy));
    };
    if storage.filesystem == volume.shared_filesystem && storage.place == volume.shared_place {
        return None;
    }
    let message = format!(
        "{} is on {there} on the source, and on {} ({}) here",
        volume.destination, storage.filesystem, storage.place
    );
    Some(warning("volume-elsewhere", message, "see whether these are the same".to_owned()))
}

fn occupied(volume: &Volume) -> Option<Finding> {
    let dir = volume.dir.display();
    match volumes::is_empty(&volume.dir) {
        Ok(true) => None,
        Ok(false) => Some(refusal(
            "volume-not-empty",
            format!("{dir}, where {} shall come, has something in it", volume.destination.display()),
            "look what it is; empty the folder when nobody needs it".to_owned(),
        )),
        Err(error) => Some(refusal("volume-not-empty", format!("{dir} cannot be read: {error}"), String::new())),
    }
}

fn too_small(volume: &Volume, bytes: u64) -> Option<Finding> {
    let there = volumes::existing(&volume.dir);
    let free = podferry_filesystem::free_bytes(there).unwrap_or(0);
    // What a container has of its own shared memory is the other's size, to the byte.
    let needed = if volume.destination == Path::new(SHARED_MEMORY) { bytes } else { room::to_store(bytes) };
    (free < needed).then(|| {
        let message = format!("{needed} bytes are needed on the disk of {} and {free} are free", volume.dir.display());
        refusal("out-of-disk", message, format!("give {} more room", there.display()))
    })
}

fn folders(context: &Context, between: &str) -> String {
    let folders: Vec<_> = context.config.runtime.volume_dirs.iter().map(|dir| dir.display().to_string()).collect();
    folders.join(between)
}

fn warning(kind: &str, message: String, remedy: String) -> Finding {
    Finding { refuses: false, ..refusal(kind, message, remedy) }
}
