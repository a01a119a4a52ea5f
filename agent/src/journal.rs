//! What the agent remembers of its parts of migrations, so that it can take them up after it was killed.
//!
//! One folder per migration below `<state_dir>/parts`, with `part.json` in it. A record is written before what it allows
//! is done, and stays as a tombstone after the part ended: a repeated call gets the same answer then.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use podferry_common::MigrationId;
use podferry_network::LinkHandle;
use serde::{Deserialize, Serialize};

use crate::config::Config;
use crate::worker::record;

/// How long ended parts are remembered.
const TOMBSTONE_LIFETIME: Duration = Duration::from_secs(24 * 3600);

/// Where a part stands, as far as it has to survive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    /// It rolls back by itself.
    Open,
    /// It waits for the decision.
    Sealed,
    /// The source is being destroyed, or is: committed.
    Released,
    /// The target is being set free, or is: committed.
    Resumed,
    /// Undone.
    Aborted,
}

impl Standing {
    /// The part has come to its end.
    pub fn is_last(self) -> bool {
        matches!(self, Self::Released | Self::Resumed | Self::Aborted)
    }
}

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
    },
    /// The container comes to this node.
    Target {
        /// Who may send it.
        source_node: String,
        /// Whether its connections are kept.
        keep_connections: bool,
        /// The host's end of the link that was made for it.
        link: Option<LinkHandle>,
        /// The MTU of its interface, in bytes; until the container runs it is one lower.
        #[serde(default)]
        mtu: Option<u32>,
        /// The network namespace that was made for it.
        netns: Option<PathBuf>,
    },
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

    /// Makes them, for root alone.
    ///
    /// # Errors
    /// When one cannot be made.
    pub fn create(&self) -> io::Result<()> {
        use std::os::unix::fs::DirBuilderExt as _;
        for dir in [&self.state, &self.run, &self.images, &self.work] {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        }
        Ok(())
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

    /// The record of the part.
    pub fn part_file(&self) -> PathBuf {
        self.state.join("part.json")
    }

    /// The record of the dump worker.
    pub fn worker_record(&self) -> PathBuf {
        self.state.join("worker.json")
    }

    /// Where the dump worker listens.
    pub fn control_socket(&self) -> PathBuf {
        self.run.join("control")
    }

    /// Where the agent waits for CRIU's page stream.
    pub fn page_socket(&self) -> PathBuf {
        self.run.join("pages")
    }

    /// Where the agent waits for the restore's hook.
    pub fn hook_socket(&self) -> PathBuf {
        self.run.join("hook")
    }
}

impl PartRecord {
    /// Writes it down.
    ///
    /// # Errors
    /// When the disk does not take it.
    pub fn store(&mut self, dirs: &PartDirs) -> io::Result<()> {
        self.written = SystemTime::now();
        record::store(&dirs.part_file(), self)
    }
}

/// All parts that are remembered. What cannot be read is logged and left where it is.
///
/// # Errors
/// When the folder cannot be listed.
pub fn load_all(parts_dir: &Path) -> io::Result<Vec<PartRecord>> {
    let mut parts = Vec::new();
    for entry in fs::read_dir(parts_dir)? {
        let path = entry?.path().join("part.json");
        match record::load::<PartRecord>(&path) {
            Ok(Some(part)) => parts.push(part),
            Ok(None) => {}
            Err(error) => tracing::error!(%error, path = %path.display(), "a part's record cannot be read"),
        }
    }
    Ok(parts)
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
