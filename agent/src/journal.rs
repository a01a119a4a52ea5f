//! What the agent remembers of its parts of migrations, so that it can take them up after it was killed.
//!
//! One folder per migration below `<state_dir>/parts`, with `part.json` in it. A record is written before what it allows
//! is done, and stays as a tombstone after the part ended: a repeated call gets the same answer then.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use podferry_common::{MigrationId, NodeName};
use podferry_network::{ContainerLink, LinkHandle};
pub use podferry_part::Standing;
use serde::{Deserialize, Serialize};

use tokio::sync::{Mutex, MutexGuard, watch};

use crate::config::{Config, Tools};
use crate::pods::Fence;
use crate::volumes::Volume;
use crate::worker::messages::WorkerRecord;
use crate::worker::record;

/// How long ended parts are remembered.
const TOMBSTONE_LIFETIME: Duration = Duration::from_secs(24 * 3600);

/// What only one role has to know.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "role")]
pub enum Role {
    /// The container leaves this node.
    Source {
        /// runc's root folder.
        root: PathBuf,
        /// The container's init: process id.
        init_pid: i32,
        /// The container's init: start time in clock ticks since boot.
        init_start: u64,
        /// The container's bundle.
        bundle: PathBuf,
        /// The link to cut.
        link: Option<LinkHandle>,
        /// Where the container's network namespace is kept.
        netns: Option<PathBuf>,
        /// Post-copy: who fetches the memory that stays here.
        #[serde(default)]
        fetched_by: Option<FetchedBy>,
        /// Cold: how the container is stopped.
        #[serde(default)]
        stop: Option<StopNote>,
        /// Application-level: how it ends, and whether it was cut off.
        #[serde(default)]
        take_over: Option<TakeOverNote>,
        /// What moves with it, and is emptied when it has.
        #[serde(default)]
        volumes: Vec<Volume>,
        /// Kubernetes: what keeps the kubelet from starting it again here.
        #[serde(default)]
        fence: Option<Fence>,
    },
    /// The container comes to this node.
    Target {
        /// Who may send it.
        source_node: String,
        /// Whether its connections are kept.
        keep_connections: bool,
        /// The host's end of the link that was made for it.
        link: Option<LinkHandle>,
        /// What its interface is like; until the container runs its MTU is one lower.
        plan: Option<ContainerLink>,
        /// The network namespace that was made for it.
        netns: Option<PathBuf>,
        /// Post-copy: host:port of the source's agent, from which memory is fetched.
        #[serde(default)]
        fetch_from: Option<String>,
        /// The container is created from the bundle; nothing is restored.
        #[serde(default)]
        cold: bool,
        /// A new instance that takes the place of the source's.
        #[serde(default)]
        takes_over: bool,
        /// What comes with it, and is emptied when it is undone.
        #[serde(default)]
        volumes: Vec<Volume>,
        /// Kubernetes: the pod's container that it becomes.
        #[serde(default)]
        pod: Option<Box<PodArrival>>,
    },
}

/// A pod's container that is to be restored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodArrival {
    /// The pod's uid,
    pub uid: String,
    /// and its name.
    pub name: String,
    /// The host name that its containers share; none when they have the node's.
    #[serde(default)]
    pub host_name: Option<String>,
    /// It stands in for the pod that is to be, whose name is still taken: nothing runs in it.
    #[serde(default)]
    pub stands_in: bool,
    /// The container's name in the pod.
    pub container: String,
    /// Its bundle,
    pub bundle: PathBuf,
    /// the layers of its root filesystem, the topmost first,
    pub lower: Vec<PathBuf>,
    /// its writable one,
    pub upper: PathBuf,
    /// and overlayfs' work directory.
    pub work: PathBuf,
    /// Where runc writes the pid of its init.
    pub pid_file: PathBuf,
    /// Its cgroup, as its configuration names it (`linux.cgroupsPath`): the bundle may go before its processes.
    #[serde(default)]
    pub cgroup: Option<PathBuf>,
    /// What came is still there, in part: in containers that the kubelet had given up before it began this one.
    #[serde(default)]
    pub left: Vec<Left>,
}

/// Files of a container that was given up, which belong to the one that was begun in its place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Left {
    /// In this directory,
    pub from: PathBuf,
    /// and to be moved to that one.
    pub to: PathBuf,
}

/// How a container is stopped that is started anew elsewhere, and how far that is. It ran before: whoever undoes this starts it again
/// once `begun` is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StopNote {
    /// The number of the signal that asks it to end.
    #[serde(default = "sigterm")]
    pub signal: i32,
    /// From that to its SIGKILL.
    pub grace: Duration,
    /// Written before it is sent the signal.
    pub begun: Option<SystemTime>,
    /// Written behind that: it needs no other.
    pub told: bool,
}

/// How an instance ends whose place a new one takes, and whether it was cut off by then: who undoes this lets it take changes again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TakeOverNote {
    /// It keeps nothing: it serves until it is released, and ends what it is being asked.
    pub stateless: bool,
    /// Stateless: the number of the signal that asks it to end.
    pub signal: i32,
    /// Stateless: from that to its SIGKILL.
    pub grace: Duration,
    /// Written before it is cut off.
    pub quiesced: bool,
}

/// What agents sent that did not note it.
const fn sigterm() -> i32 {
    15
}

/// Who fetches memory that stays with a source, and how it is given.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FetchedBy {
    /// The target.
    pub node: NodeName,
    /// Whether pages may be compressed.
    pub compress: bool,
    /// The most bytes per second of what nobody waits for; none for as many as the link takes.
    pub bandwidth_limit: Option<u64>,
}

/// One part.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PartRecord {
    /// Of which migration.
    pub migration: MigrationId,
    /// runc's id of the container.
    pub workload: String,
    /// Where it stands.
    pub standing: Standing,
    /// A released source: what the container left has been removed too. Until then the workload cannot come back.
    #[serde(default)]
    pub tidied: bool,
    /// A sealed target: its container has been told to go, so it may have run.
    #[serde(default)]
    pub going: bool,
    /// When the record was written last.
    pub written: SystemTime,
    /// What only one role has to know.
    pub role: Role,
}

/// A part's folders.
#[derive(Clone, Debug)]
pub struct PartDirs {
    /// What has to survive; on a disk.
    pub state: PathBuf,
    /// Sockets.
    pub run: PathBuf,
    /// Images, in memory.
    pub images: PathBuf,
    /// CRIU's logs, in memory: they name files and addresses of the workload.
    pub work: PathBuf,
}

impl PartDirs {
    /// Those of a migration.
    pub fn of(config: &Config, migration: MigrationId) -> Self {
        let name = migration.to_string();
        let memory = config.images_dir.join(&name);
        Self {
            state: config.parts_dir().join(&name),
            run: config.runtime_dir.join(&name),
            images: memory.join("images"),
            work: memory.join("work"),
        }
    }

    /// Makes them, for root alone. A new part [begins](PartRecord::begin) with its record instead.
    ///
    /// # Errors
    /// When one cannot be made.
    pub fn create(&self) -> io::Result<()> {
        [&self.state, &self.run, &self.images, &self.work].into_iter().try_for_each(|dir| make(dir))
    }

    /// Removes images, logs and sockets. Idempotent.
    pub fn wipe_volatile(&self) {
        for dir in self.images.parent().into_iter().chain([self.run.as_path()]) {
            if let Err(error) = fs::remove_dir_all(dir)
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::error!(%error, dir = %dir.display(), "what a migration left cannot be removed");
            }
        }
    }

    /// Makes the folder that comes first where CRIU looks for programs, and gives it. Idempotent.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn programs(&self, tools: &Tools) -> io::Result<PathBuf> {
        let folder = self.run.join("bin");
        make(&folder)?;
        match std::os::unix::fs::symlink(&tools.tar, folder.join("tar")) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
            _ => Ok(folder),
        }
    }

    /// The writable layer of what is mounted in place of a root filesystem whose own is not here yet; in memory.
    pub fn placeholder(&self) -> PathBuf {
        self.work.with_file_name("placeholder")
    }

    /// The record of the part.
    pub fn part_file(&self) -> PathBuf {
        self.state.join("part.json")
    }

    /// The operator's word on a sealed part: see [`decide`].
    pub fn decision_file(&self) -> PathBuf {
        self.state.join("decision.json")
    }

    /// The record of the dump worker.
    pub fn worker_record(&self) -> PathBuf {
        self.state.join("worker.json")
    }

    /// What the dump worker was told; there is none before it is started.
    pub fn job_file(&self) -> PathBuf {
        self.state.join("job.json")
    }

    /// Which CPU limit a throttled container had; there is none while it has its own.
    pub fn throttle_file(&self) -> PathBuf {
        self.state.join("throttle.json")
    }

    /// How far the pager is; there is none without pages that come later.
    pub fn pager_status(&self) -> PathBuf {
        self.state.join("pager.json")
    }

    /// Where the dump worker listens.
    pub fn control_socket(&self) -> PathBuf {
        self.run.join("control")
    }

    /// Where the agent waits for CRIU's page stream.
    pub fn page_socket(&self) -> PathBuf {
        self.run.join("pages")
    }

    /// Where the agent waits for a pager that lacks pages.
    pub fn fetch_socket(&self) -> PathBuf {
        self.run.join("fetch")
    }

    /// Where the agent waits for the restore's hook.
    pub fn hook_socket(&self) -> PathBuf {
        self.run.join("hook")
    }
}

fn make(dir: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.map_err(|error| record::at(dir, &error))
}

impl PartRecord {
    /// Writes it down, and then makes the part's folders: should the agent be killed meanwhile, the next one knows what to
    /// remove.
    ///
    /// # Errors
    /// When the disk does not take it.
    pub fn begin(&mut self, dirs: &PartDirs) -> io::Result<()> {
        make(&dirs.state)?;
        self.store(dirs)?;
        dirs.create()
    }

    /// Cold: how the source's container is stopped.
    pub fn stop(&self) -> Option<StopNote> {
        match &self.role {
            Role::Source { stop, .. } => *stop,
            Role::Target { .. } => None,
        }
    }

    /// Application-level: how the source's instance is replaced.
    pub fn take_over(&self) -> Option<TakeOverNote> {
        match &self.role {
            Role::Source { take_over, .. } => *take_over,
            Role::Target { .. } => None,
        }
    }

    /// Changes how far that is.
    pub fn note_take_over(&mut self, change: impl FnOnce(&mut TakeOverNote)) {
        if let Role::Source { take_over: Some(take_over), .. } = &mut self.role {
            change(take_over);
        }
    }

    /// The volumes that move with the container.
    pub fn volumes(&self) -> &[Volume] {
        let (Role::Source { volumes, .. } | Role::Target { volumes, .. }) = &self.role;
        volumes
    }

    /// Kubernetes: the pod's container that a target's part restores.
    pub fn pod(&self) -> Option<&PodArrival> {
        match &self.role {
            Role::Target { pod, .. } => pod.as_deref(),
            Role::Source { .. } => None,
        }
    }

    /// What came and is not yet where the part's container has it.
    pub fn left(&self) -> &[Left] {
        self.pod().map_or(&[], |pod| &pod.left)
    }

    /// The first of that is moved.
    pub fn note_moved(&mut self) {
        if let Role::Target { pod: Some(pod), .. } = &mut self.role
            && !pod.left.is_empty()
        {
            pod.left.remove(0);
        }
    }

    /// Kubernetes: what keeps the kubelet from starting a source's container again.
    pub fn fence(&self) -> Option<&Fence> {
        match &self.role {
            Role::Source { fence, .. } => fence.as_ref(),
            Role::Target { .. } => None,
        }
    }

    /// Changes how far the source's container is stopped.
    pub fn note_stop(&mut self, change: impl FnOnce(&mut StopNote)) {
        if let Role::Source { stop: Some(stop), .. } = &mut self.role {
            change(stop);
        }
    }

    /// Writes it down.
    ///
    /// # Errors
    /// When the disk does not take it.
    pub fn store(&mut self, dirs: &PartDirs) -> io::Result<()> {
        self.written = SystemTime::now();
        record::store(&dirs.part_file(), self)
    }
}

/// How a sealed part ends, in the word of an operator who knows what no record says any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OperatorsWord {
    /// The target's copy is the right one. On a source: destroy it. On a target: the source never runs again, so let go.
    Commit,
    /// The source's copy is the right one. On a source: let it run on. On a target: undo everything.
    Abort,
}

/// Why an operator's word is not taken.
#[derive(Debug, thiserror::Error)]
pub enum DecideError {
    /// There is no such part.
    #[error("no part of migration {migration} is remembered in {}", parts_dir.display())]
    Unknown {
        /// Which migration.
        migration: MigrationId,
        /// Where parts are remembered.
        parts_dir: PathBuf,
    },
    /// Only a sealed part waits for a decision.
    #[error("this node's part of migration {migration} is {standing:?}, so it waits for no decision")]
    NotSealed {
        /// Which migration.
        migration: MigrationId,
        /// Where the part stands.
        standing: Standing,
    },
    /// The journal cannot be read or written.
    #[error("the journal of migration {migration} cannot be read or written")]
    Journal {
        /// Which migration.
        migration: MigrationId,
        /// Why.
        source: io::Error,
    },
}

/// Notes an operator's word. The agent follows it within seconds, or when it is started again.
///
/// # Errors
/// When no such part waits for a decision, or the disk does not take it.
pub fn decide(config: &Config, migration: MigrationId, word: OperatorsWord) -> Result<(), DecideError> {
    let dirs = PartDirs::of(config, migration);
    let failed = |source| DecideError::Journal { migration, source };
    let Some(part) = record::load::<PartRecord>(&dirs.part_file()).map_err(failed)? else {
        return Err(DecideError::Unknown { migration, parts_dir: config.parts_dir() });
    };
    // A worker seals before the agent notes it.
    let worker: Option<WorkerRecord> = record::load(&dirs.worker_record()).map_err(failed)?;
    let sealed = part.standing == Standing::Sealed || worker.is_some_and(|worker| worker.sealed);
    if !sealed || part.standing.is_last() {
        return Err(DecideError::NotSealed { migration, standing: part.standing });
    }
    record::store(&dirs.decision_file(), &word).map_err(failed)
}

/// A part's record in memory, never ahead of the disk.
#[derive(Debug)]
pub struct Ledger {
    migration: MigrationId,
    record: Mutex<PartRecord>,
    dirs: PartDirs,
    /// For those who must not wait for a step that is being taken.
    standing: watch::Sender<Standing>,
}

impl Ledger {
    /// Of a part whose record is on the disk as it is here.
    pub fn new(record: PartRecord, dirs: PartDirs) -> Self {
        let (standing, _) = watch::channel(record.standing);
        Self { migration: record.migration, record: Mutex::new(record), dirs, standing }
    }

    /// Of which migration it is.
    pub fn migration(&self) -> MigrationId {
        self.migration
    }

    /// Waits for the step that is being taken, and takes the next.
    pub async fn lock(&self) -> MutexGuard<'_, PartRecord> {
        self.record.lock().await
    }

    /// Where the part stands, by the last step that was taken.
    pub fn standing(&self) -> Standing {
        *self.standing.borrow()
    }

    /// Changes the record, first on the disk.
    ///
    /// # Errors
    /// When the disk does not take it; then nothing has changed.
    pub fn change(
        &self,
        record: &mut MutexGuard<'_, PartRecord>,
        change: impl FnOnce(&mut PartRecord),
    ) -> io::Result<()> {
        let mut next = PartRecord::clone(record);
        change(&mut next);
        next.store(&self.dirs)?;
        self.standing.send_replace(next.standing);
        **record = next;
        Ok(())
    }
}

/// What the journal remembers, oldest first, and the migrations whose record cannot be read: those are left where they are.
///
/// # Errors
/// When the folder cannot be listed.
pub fn load_all(parts_dir: &Path) -> io::Result<(Vec<PartRecord>, Vec<MigrationId>)> {
    let (mut parts, mut unreadable) = (Vec::new(), Vec::new());
    for entry in fs::read_dir(parts_dir)? {
        let entry = entry?;
        let path = entry.path().join("part.json");
        match record::load::<PartRecord>(&path) {
            Ok(Some(part)) => parts.push(part),
            Ok(None) => {}
            Err(error) => {
                tracing::error!(%error, path = %path.display(), "a part's record cannot be read");
                unreadable.extend(entry.file_name().to_str().and_then(|name| name.parse::<MigrationId>().ok()));
            }
        }
    }
    parts.sort_by_key(|part| part.written);
    Ok((parts, unreadable))
}

/// Forgets ended parts that nobody will ask about any more.
pub fn prune(config: &Config, parts: &[PartRecord]) {
    let old = |part: &&PartRecord| {
        part.standing.is_last() && part.written.elapsed().is_ok_and(|age| age > TOMBSTONE_LIFETIME)
    };
    for part in parts.iter().filter(old) {
        let dir = PartDirs::of(config, part.migration).state;
        if let Err(error) = fs::remove_dir_all(&dir) {
            tracing::warn!(%error, dir = %dir.display(), "an old part's record cannot be removed");
        }
    }
}

#[cfg(test)]
mod tests;
