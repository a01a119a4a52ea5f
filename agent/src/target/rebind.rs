//! A kubelet that did not wait: it has given up the container that waits for its restore, and begun it anew.
//!
//! That may be its own restart, or its patience, which ends after two minutes: a source that cannot be reached is waited for
//! for longer, behind the commit. What came is whole then, in memory, in the writable layer of the container that was given up, and in its
//! volumes. Its files are moved to the new one, and the part goes on with that.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use oci_spec::runtime::Spec;
use podferry_common::failure::{Failure, FailureCode};
use podferry_part::Standing;

use super::bundle::Bundle;
use super::{TargetPart, io_failed, pod};
use crate::context::{Context, blocking};
use crate::journal::{PartRecord, PodArrival, Role};
use crate::pods::Visitor;
use crate::volumes::{Look, Volume};
use crate::worker::record::at;

/// How long the kubelet's next try is waited for: it comes ten seconds after the last one, later with each.
const NEXT_TRY: Duration = Duration::from_secs(20);

impl TargetPart {
    /// The part with the container that the kubelet has begun in place of this part's; none when it has begun none, or this one is
    /// not committed.
    ///
    /// # Errors
    /// When what came cannot be moved to it; to be called again.
    pub async fn rebound(&self) -> Result<Option<Self>, Failure> {
        let Some(old) = self.pod.clone() else { return Ok(None) };
        let mut record = self.ledger.lock().await;
        if record.standing != Standing::Sealed {
            return Ok(None);
        }
        let visitor = self.context.visitors.wait(&pod::door(&old), self.migration, NEXT_TRY).await;
        let Some(visitor) = visitor.filter(|visitor| visitor.is_there() && visitor.hello.id != self.workload) else {
            return Ok(None);
        };
        self.clean_restore(self.patience()).await?;
        let volumes = record.volumes().to_vec();
        let (context, seen) = (self.context.clone(), std::sync::Arc::clone(&visitor));
        let (arrival, volumes) = blocking(move || move_files(&context, &old, &volumes, &seen)).await?;
        self.note(&mut record, |record| bind(record, &visitor.hello.id, arrival, volumes))?;
        let record = record.clone();
        Self::resumed(&self.context, record).map(Some)
    }
}

fn bind(record: &mut PartRecord, id: &str, arrival: PodArrival, moved: Vec<Volume>) {
    id.clone_into(&mut record.workload);
    if let Role::Target { pod, volumes, .. } = &mut record.role {
        *pod = Some(arrival);
        *volumes = moved;
    }
    // Nothing of the new one has been told to run.
    record.going = false;
}

/// Moves layer and volumes from the container that was given up to the new one; blocks. Looks at everything first: what cannot be moved
/// as a whole is not moved in parts. What a former try has moved to the same container stays.
fn move_files(
    context: &Context,
    old: &PodArrival,
    volumes: &[Volume],
    visitor: &Visitor,
) -> Result<(PodArrival, Vec<Volume>), Failure> {
    let failed = |what: &str, error: &(dyn std::error::Error + 'static)| {
        context.failure(FailureCode::Internal, what, error).in_phase("resume")
    };
    let bundle = Bundle::of_pod(visitor.hello.bundle.clone())
        .map_err(|failure| failure.on(context.config.node.as_str()).in_phase("resume"))?;
    let spec = Spec::load(bundle.dir.join("config.json"))
        .map_err(|error| failed("the new container's config.json cannot be read", &error))?;
    let look = Look::at(&context.config, &spec, &bundle.dir)
        .map_err(|error| failed("the new container's volumes cannot be looked at", &error))?;
    let counterpart = |volume: &Volume| {
        let found = look.moving.iter().find(|new| new.destination == volume.destination).cloned();
        found.ok_or_else(|| {
            let message =
                format!("the container that was begun anew has no volume at {}", volume.destination.display());
            context.refusal(FailureCode::FailedPrecondition, message).in_phase("resume")
        })
    };
    let moved: Vec<Volume> = volumes.iter().map(counterpart).collect::<Result<_, _>>()?;
    let pairs = volumes.iter().zip(&moved).map(|(from, to)| (from.dir.clone(), to.dir.clone()));
    let pairs = pairs.filter(|(from, to)| from != to).chain([(old.upper.clone(), bundle.upper())]);
    let pairs: Vec<(PathBuf, PathBuf)> = pairs.collect();
    pairs.iter().try_for_each(|(from, _)| there(from)).map_err(|error| io_failed(context, &error))?;
    let what = "the root filesystem of a container that was begun anew cannot be unmounted";
    for rootfs in [old.bundle.join("rootfs"), bundle.rootfs()] {
        podferry_filesystem::unmount(&rootfs).map_err(|error| failed(what, &error))?;
    }
    pairs.iter().try_for_each(|(from, to)| move_content(from, to)).map_err(|error| io_failed(context, &error))?;
    Ok((pod::arrival(visitor, &bundle), moved))
}

/// # Errors
/// When the directory is gone, with what came.
fn there(dir: &Path) -> io::Result<()> {
    fs::metadata(dir).map(drop).map_err(|error| at(dir, &error))
}

/// Moves all that is in a directory, and what the directory itself is like, to one on the same file system. What is there by the same name goes.
fn move_content(from: &Path, to: &Path) -> io::Result<()> {
    let entries = fs::read_dir(from).map_err(|error| at(from, &error))?;
    for entry in entries {
        let entry = entry?;
        let target = to.join(entry.file_name());
        remove(&target)?;
        fs::rename(entry.path(), &target).map_err(|error| at(&entry.path(), &error))?;
    }
    let like = fs::metadata(from)?;
    fs::set_permissions(to, like.permissions())?;
    std::os::unix::fs::chown(to, Some(like.uid()), Some(like.gid()))
}

fn remove(path: &PathBuf) -> io::Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at(path, &error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn what_came_is_moved_whole_and_a_second_try_finds_the_rest() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        for dir in [&from, &to] {
            fs::create_dir(dir).unwrap();
        }
        fs::create_dir(from.join("dir")).unwrap();
        fs::write(from.join("dir/file"), "came").unwrap();
        std::os::unix::fs::symlink("nowhere", from.join("link")).unwrap();
        fs::set_permissions(&from, fs::Permissions::from_mode(0o750)).unwrap();
        // What the image has there.
        fs::create_dir(to.join("dir")).unwrap();
        fs::write(to.join("dir/of-the-image"), "").unwrap();
        move_content(&from, &to).unwrap();
        assert_eq!(fs::read_to_string(to.join("dir/file")).unwrap(), "came");
        assert!(!to.join("dir/of-the-image").exists() && to.join("link").is_symlink());
        assert_eq!(fs::metadata(&to).unwrap().mode() & 0o7777, 0o750);
        fs::write(from.join("late"), "").unwrap();
        move_content(&from, &to).unwrap();
        assert!(to.join("late").exists() && to.join("dir/file").exists());
        assert!(move_content(&folder.path().join("gone"), &to).unwrap_err().to_string().contains("gone"));
    }
}
