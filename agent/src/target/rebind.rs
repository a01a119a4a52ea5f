//! A kubelet that did not wait: it has given up the container that waits for its restore, and begun it anew.
//!
//! That may be its own restart, or its patience, which ends after two minutes: a source that cannot be reached is waited for
//! for longer, behind the commit. What came is whole then, in memory, in the writable layer of the container that was given up, and in its
//! volumes. The part is [bound](TargetPart::rebound) to the new container, and its files are moved to that before it is restored.
//!
//! A pod that keeps its name is bound in the same way, on purpose: what came is for a pod that stands in for it until the source's pod is gone
//! ([`PodArrival::stands_in`]). That is another pod, so its volumes are others, too, and some of them other file systems.
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
use podferry_filesystem::{Limits, WritableLayer};
use podferry_part::Standing;
use tokio::sync::MutexGuard;

use super::bundle::Bundle;
use super::{TargetPart, io_failed, pod};
use crate::context::{Context, blocking};
use crate::journal::{Left, PartRecord, PodArrival, Role};
use crate::pods::{Door, Fence, Visitor};
use crate::volumes::{Look, Volume};
use crate::worker::record::at;

/// How long the kubelet's next try is waited for: it comes ten seconds after the last one, later with each.
const NEXT_TRY: Duration = Duration::from_secs(20);
/// Bytes that are read or written at once of what is copied.
const COPY: usize = 1 << 20;

impl TargetPart {
    /// The part with the container that the kubelet has begun in place of this part's; none when it has begun none, or this one is
    /// not committed. This one refuses everything from then on. The one behind `door` is another pod's, for which this part's stands in.
    ///
    /// # Errors
    /// When the new container cannot take what came; to be called again.
    pub async fn rebound(&self, door: Option<&Door>) -> Result<Option<Self>, Failure> {
        let mut record = self.ledger.lock().await;
        if record.standing != Standing::Sealed {
            return Ok(None);
        }
        if self.replaced.load(Ordering::Relaxed) {
            return Err(self.has_another());
        }
        // Else it was bound already, and then no part could be made of it.
        if record.workload == self.workload && !self.bind(&mut record, door).await? {
            return Ok(None);
        }
        let part = Self::resumed(&self.context, record.clone())?;
        self.replaced.store(true, Ordering::Relaxed);
        Ok(Some(part))
    }

    /// Binds the part to the container that was begun in place of its own. Whether there is one.
    async fn bind(&self, record: &mut MutexGuard<'_, PartRecord>, door: Option<&Door>) -> Result<bool, Failure> {
        let Some(old) = record.pod().cloned() else { return Ok(false) };
        let door = match (old.stands_in, door) {
            (false, _) => pod::door(&old),
            (true, Some(door)) => door.clone(),
            (true, None) => return Ok(false),
        };
        if old.stands_in {
            self.close_for_good(&old).await?;
        }
        let visitor = self.context.visitors.wait(&door, self.migration, NEXT_TRY).await;
        let Some(visitor) = visitor.filter(|visitor| visitor.hello.id != self.workload) else { return Ok(false) };
        self.give_up_copy().await?;
        let (context, volumes, seen) = (self.context.clone(), record.volumes().to_vec(), visitor.clone());
        let away = self.away.clone().filter(|_| old.stands_in);
        let (arrival, volumes) = blocking(move || {
            let found = look(&context, &old, &volumes, &seen)?;
            if let Some(away) = away {
                pod::move_relay(&context, &away, &found.0.bundle);
            }
            Ok(found)
        })
        .await?;
        self.note(record, |record| bind(record, &visitor.hello.id, arrival, volumes))?;
        Ok(true)
    }

    /// A copy that is still held must never hear the word that is for the next one.
    async fn give_up_copy(&self) -> Result<(), Failure> {
        self.hook.abort().await;
        self.clean_restore(self.patience()).await
    }

    /// Ends what is held in a pod that stands in for another, and keeps the kubelet from beginning anything in it. What came for it stays
    /// in its volumes: the pod is deleted behind the migration. Its wrapper is sent away, or will be when it finds an agent that was
    /// restarted: the fence is there then.
    async fn close_for_good(&self, pod: &PodArrival) -> Result<(), Failure> {
        let fence = self.context.config.kubernetes.as_ref().and_then(|it| Fence::around(&it.fence_dir, &pod.uid));
        let context = self.context.clone();
        blocking(move || {
            let put_up = fence.as_ref().map_or(Ok(()), Fence::put_up);
            put_up.map_err(|error| io_failed(&context, &error))
        })
        .await?;
        self.give_up_copy().await?;
        let why = format!("pod {} stood in for another, which takes its place", pod.name);
        self.context.visitors.send_away(&pod::door(pod), self.migration, &why).await;
        Ok(())
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
                bring(&left).map_err(|error| io_failed(&context, &error))
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
    left.iter().try_for_each(can_be_brought).map_err(|error| io_failed(context, &error))?;
    // Nobody runs in it any more.
    podferry_filesystem::unmount(&old.bundle.join("rootfs")).map_err(|error| not_unmounted(context, &error))?;
    let arrival = pod::arrival(context, visitor, &bundle)?;
    // Where the pod is the same, CRIU may have named its host otherwise by now.
    let host_name = if arrival.uid == old.uid { old.host_name.clone() } else { arrival.host_name.clone() };
    Ok((PodArrival { host_name, left, ..arrival }, moved))
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

fn are_together(left: &Left) -> io::Result<bool> {
    let device = |dir: &Path| fs::metadata(dir).map(|metadata| metadata.dev()).map_err(|error| at(dir, &error));
    Ok(device(&left.from)? == device(&left.to)?)
}

/// # Errors
/// When one of the directories is gone, with what came, or there is no room for it where it belongs.
fn can_be_brought(left: &Left) -> io::Result<()> {
    if are_together(left)? {
        return Ok(());
    }
    let stat = rustix::fs::statvfs(&left.from)?;
    let (taken, free) = ((stat.f_blocks - stat.f_bfree) * stat.f_frsize, podferry_filesystem::free_bytes(&left.to));
    match free.map_err(io::Error::other)? {
        // The whole file system's: exact for a volume in memory, which is one.
        free if taken <= free => Ok(()),
        free => {
            let message = format!("{} has {free} bytes free for up to {taken}", left.to.display());
            Err(io::Error::new(io::ErrorKind::StorageFull, message))
        }
    }
}

/// Brings all that is in a directory to where it belongs: moves it, or copies it from one file system to the other. May be done again when it
/// was not noted.
fn bring(left: &Left) -> io::Result<()> {
    if are_together(left)? {
        return move_content(&left.from, &left.to);
    }
    podferry_filesystem::wipe(&left.to).map_err(io::Error::other)?;
    let (reader, writer) = io::pipe()?;
    let from = WritableLayer::Volume { dir: left.from.clone() };
    std::thread::scope(|scope| {
        let packing = scope.spawn(move || podferry_filesystem::pack(&from, io::BufWriter::with_capacity(COPY, writer)));
        let unpacked =
            podferry_filesystem::unpack(io::BufReader::with_capacity(COPY, reader), &left.to, &Limits::default());
        let packed = packing.join().map_err(|_| io::Error::other("the thread that reads a volume panicked"))?;
        match (packed, unpacked) {
            (Ok(_), Ok(_)) => Ok(()),
            (Ok(_), Err(error)) | (Err(error), Ok(_)) => Err(io::Error::other(error)),
            // Either may be what has broken the other.
            (Err(read), Err(written)) => Err(io::Error::other(format!("{written}; {read}"))),
        }
    })
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
        assert!(can_be_brought(&gone).unwrap_err().to_string().contains("gone"));
    }

    #[test]
    fn what_lies_on_another_file_system_is_copied_and_again_when_that_was_cut_off() {
        let (disk, memory) = (tempfile::tempdir().unwrap(), tempfile::tempdir_in("/dev/shm").unwrap());
        fs::create_dir(memory.path().join("dir")).unwrap();
        fs::write(memory.path().join("dir/file"), "came").unwrap();
        fs::set_permissions(memory.path(), fs::Permissions::from_mode(0o750)).unwrap();
        let left = Left { from: memory.path().to_owned(), to: disk.path().to_owned() };
        assert!(!are_together(&left).unwrap(), "/dev/shm is a file system of its own");
        can_be_brought(&left).unwrap();
        fs::write(disk.path().join("half"), "of a first try").unwrap();
        bring(&left).unwrap();
        assert_eq!(fs::read_to_string(disk.path().join("dir/file")).unwrap(), "came");
        assert!(!disk.path().join("half").exists() && memory.path().join("dir/file").exists());
        assert_eq!(fs::metadata(disk.path()).unwrap().mode() & 0o7777, 0o750);
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
