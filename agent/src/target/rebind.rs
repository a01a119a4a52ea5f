//! A kubelet that did not wait: it has given up the container that waits for its restore, and begun it anew.
//!
//! That may be its own restart, or its patience, which ends after two minutes: a source that cannot be reached is waited for
//! for longer, behind the commit. What came is whole then, in memory, in the writable layer of the container that was given up, and in its
//! volumes. The part is [bound](TargetPart::rebound) to the new container, and its files are moved to that before it is restored.
//!
//! Whoever does that may be killed anywhere in between, and the kubelet may give up the new one, too: where files are that have not been
//! moved yet stands in the record ([`PodArrival::left`]).

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Duration;

use podferry_common::failure::{Failure, FailureCode};
use podferry_part::Standing;
use tokio::sync::MutexGuard;

use super::bundle::Bundle;
use super::{TargetPart, io_failed, pod};
use crate::context::{Context, blocking};
use crate::journal::{Left, PartRecord, PodArrival, Role};
use crate::pods::Visitor;
use crate::volumes::{Look, Volume};
use crate::worker::record::at;

/// How long the kubelet's next try is waited for: it comes ten seconds after the last one, later with each.
const NEXT_TRY: Duration = Duration::from_secs(20);

impl TargetPart {
    /// The part with the container that the kubelet has begun in place of this part's; none when it has begun none, or this one is
    /// not committed. This one refuses everything from then on.
    ///
    /// # Errors
    /// When the new container cannot take what came; to be called again.
    pub async fn rebound(&self) -> Result<Option<Self>, Failure> {
        let mut record = self.ledger.lock().await;
        if record.standing != Standing::Sealed {
            return Ok(None);
        }
        if self.replaced.load(Ordering::Relaxed) {
            return Err(self.has_another());
        }
        // Else it was bound already, and then no part could be made of it.
        if record.workload == self.workload && !self.bind(&mut record).await? {
            return Ok(None);
        }
        let part = Self::resumed(&self.context, record.clone())?;
        self.replaced.store(true, Ordering::Relaxed);
        Ok(Some(part))
    }

    /// Binds the part to the container that was begun in place of its own. Whether there is one.
    async fn bind(&self, record: &mut MutexGuard<'_, PartRecord>) -> Result<bool, Failure> {
        let Some(old) = record.pod().cloned() else { return Ok(false) };
        let visitor = self.context.visitors.wait(&pod::door(&old), self.migration, NEXT_TRY).await;
        let Some(visitor) = visitor.filter(|visitor| visitor.hello.id != self.workload) else { return Ok(false) };
        // A copy that is still held must never hear the word that is for the next one.
        self.hook.abort().await;
        self.clean_restore(self.patience()).await?;
        let (context, volumes, seen) = (self.context.clone(), record.volumes().to_vec(), visitor.clone());
        let (arrival, volumes) = blocking(move || look(&context, &old, &volumes, &seen)).await?;
        self.note(record, |record| bind(record, &visitor.hello.id, arrival, volumes))?;
        Ok(true)
    }

    /// Fails when the part has been bound to another container, and another value of it goes on.
    ///
    /// # Errors
    /// `UNAVAILABLE`: whoever asks again finds that one.
    pub(super) fn check_bound(&self, record: &PartRecord) -> Result<(), Failure> {
        if record.workload == self.workload { Ok(()) } else { Err(self.has_another()) }
    }

    fn has_another(&self) -> Failure {
        let message = format!("container {} was given up, and what came belongs to another one", self.workload);
        self.refused(FailureCode::Unavailable, message, "resume").remedy("it is asked again by itself")
    }

    /// Moves what came for containers that were given up to where this one has it.
    ///
    /// # Errors
    /// When some of it cannot be moved; to be called again.
    pub(super) async fn collect(&self, record: &mut MutexGuard<'_, PartRecord>) -> Result<(), Failure> {
        while let Some(left) = record.left().first().cloned() {
            let (context, rootfs) = (self.context.clone(), self.bundle.rootfs());
            blocking(move || {
                // What is mounted must not be changed below.
                podferry_filesystem::unmount(&rootfs).map_err(|error| not_unmounted(&context, &error))?;
                move_content(&left.from, &left.to).map_err(|error| io_failed(&context, &error))
            })
            .await?;
            self.note(record, PartRecord::note_moved)?;
        }
        Ok(())
    }
}

fn bind(record: &mut PartRecord, id: &str, arrival: PodArrival, moved: Vec<Volume>) {
    id.clone_into(&mut record.workload);
    if let Role::Target { pod, volumes, .. } = &mut record.role {
        *pod = Some(Box::new(arrival));
        *volumes = moved;
    }
    // Nothing of the new one has been told to run.
    record.going = false;
}

/// What is to be noted of the new container, and its volumes; blocks. Looks at everything that has to be moved to it: what cannot be moved
/// as a whole is not moved in parts.
fn look(
    context: &Context,
    old: &PodArrival,
    volumes: &[Volume],
    visitor: &Visitor,
) -> Result<(PodArrival, Vec<Volume>), Failure> {
    let bundle = Bundle::of_pod(visitor.hello.bundle.clone())
        .map_err(|failure| failure.on(context.config.node.as_str()).in_phase("resume"))?;
    let spec = pod::spec(context, &bundle.dir)?;
    let look = Look::at(&context.config, &spec, &bundle.dir).map_err(|error| {
        let what = "the new container's volumes cannot be looked at";
        context.failure(FailureCode::Internal, what, &error).in_phase("resume")
    })?;
    let counterpart = |volume: &Volume| {
        let found = look.moving.iter().find(|new| new.destination == volume.destination).cloned();
        found.ok_or_else(|| {
            let message =
                format!("the container that was begun anew has no volume at {}", volume.destination.display());
            context.refusal(FailureCode::FailedPrecondition, message).in_phase("resume")
        })
    };
    let moved: Vec<Volume> = volumes.iter().map(counterpart).collect::<Result<_, _>>()?;
    let dirs = volumes.iter().zip(&moved).map(|(from, to)| (from.dir.clone(), to.dir.clone()));
    let dirs: Vec<_> = std::iter::once((old.upper.clone(), bundle.upper())).chain(dirs).collect();
    let left = left_for(&old.left, &dirs);
    left.iter().try_for_each(can_move).map_err(|error| io_failed(context, &error))?;
    // Nobody runs in it any more.
    podferry_filesystem::unmount(&old.bundle.join("rootfs")).map_err(|error| not_unmounted(context, &error))?;
    // The pod is the same. CRIU may have named its host otherwise by now.
    let host_name = old.host_name.clone();
    Ok((PodArrival { host_name, left, ..pod::arrival(context, visitor, &bundle)? }, moved))
}

/// What has to be moved to a container whose directories come in place of those of the one before, from where to where; `left` had not
/// come so far as that one. Last what came first: what its directories themselves are like stays.
fn left_for(left: &[Left], dirs: &[(PathBuf, PathBuf)]) -> Vec<Left> {
    let mut all: Vec<Left> = dirs
        .iter()
        .filter(|(from, to)| from != to)
        .map(|(from, to)| Left { from: from.clone(), to: to.clone() })
        .collect();
    let counterpart = |dir: &PathBuf| dirs.iter().find(|(from, _)| from == dir).map(|(_, to)| to.clone());
    all.extend(left.iter().filter_map(|left| Some(Left { from: left.from.clone(), to: counterpart(&left.to)? })));
    all
}

fn not_unmounted(context: &Context, error: &podferry_filesystem::Error) -> Failure {
    let what = "the root filesystem of a container that was begun anew cannot be unmounted";
    context.failure(FailureCode::Internal, what, error).in_phase("resume")
}

/// # Errors
/// When the directory is gone, with what came, or lies on another file system than where its content belongs.
fn can_move(left: &Left) -> io::Result<()> {
    let device = |dir: &Path| fs::metadata(dir).map(|metadata| metadata.dev()).map_err(|error| at(dir, &error));
    if device(&left.from)? == device(&left.to)? {
        return Ok(());
    }
    let message = format!("{} and {} are on different file systems", left.from.display(), left.to.display());
    Err(io::Error::new(io::ErrorKind::CrossesDevices, message))
}

/// Moves all that is in a directory, with the directory's own mode and owner, to one on the same file system. What is there by the same
/// name goes.
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
        let gone = Left { from: folder.path().join("gone"), to };
        assert!(can_move(&gone).unwrap_err().to_string().contains("gone"));
    }

    #[test]
    fn what_a_second_container_did_not_get_is_moved_to_the_third() {
        let left = |from: &str, to: &str| Left { from: from.into(), to: to.into() };
        let dirs = |from: &str, to: &str| (PathBuf::from(from), PathBuf::from(to));
        let first = left_for(&[], &[dirs("1/upper", "2/upper"), dirs("empty-dir", "empty-dir"), dirs("1/v", "2/v")]);
        assert_eq!(first, [left("1/upper", "2/upper"), left("1/v", "2/v")]);
        // The layer was moved, in part; then the kubelet gave the second one up, too.
        let second =
            left_for(&first[..1], &[dirs("2/upper", "3/upper"), dirs("empty-dir", "empty-dir"), dirs("2/v", "3/v")]);
        assert_eq!(second, [left("2/upper", "3/upper"), left("2/v", "3/v"), left("1/upper", "3/upper")]);
    }
}
