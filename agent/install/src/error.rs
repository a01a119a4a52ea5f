//! What can go wrong on a node, and what to do about it.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

/// Why a node cannot be installed, uninstalled or checked.
#[derive(Debug, Error)]
pub enum Error {
    /// A file or folder cannot be read, written, linked or removed.
    #[error("cannot {action} {}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// Where.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A configuration is no TOML.
    #[error("{} is no TOML: put it right, containerd or CRI-O would not take it either", path.display())]
    Toml {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        source: Box<toml::de::Error>,
    },
    /// The installer's own record cannot be read.
    #[error("{} is not what podferry-install wrote: restore it, or undo by hand what it lists", path.display())]
    Journal {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// The operating system lets nobody change what has to be changed.
    #[error("nodes with {system} are not supported: {reason}")]
    UnsupportedSystem {
        /// Its name.
        system: String,
        /// Why not.
        reason: &'static str,
    },
    /// No container runtime was found.
    #[error(
        "no container runtime was found below {}: there is none of {looked_for}. Name it with --runtime, and its \
         configuration with --containerd-config",
        root.display()
    )]
    NoRuntime {
        /// The node's root.
        root: PathBuf,
        /// What was looked for.
        looked_for: &'static str,
    },
    /// Several run, and only the kubelet knows which is its own.
    #[error("{found} are both here: name the one that the kubelet uses with --runtime")]
    SeveralRuntimes {
        /// Which ones.
        found: String,
    },
    /// containerd's configuration is older than its CRI plugin's names.
    #[error(
        "{} has version {found} of containerd's configuration, at least 2 is needed: write it anew with `containerd config migrate`",
        path.display()
    )]
    OldConfig {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: i64,
    },
    /// containerd has no CRI here.
    #[error("{} disables containerd's CRI plugin: this is not the runtime that the kubelet uses; name that with --runtime", path.display())]
    CriDisabled {
        /// The file.
        path: PathBuf,
    },
    /// Somebody else has a handler of our name.
    #[error("{} has a handler `podferry` that podferry-install did not write: remove it first", path.display())]
    ForeignHandler {
        /// The file.
        path: PathBuf,
    },
    /// Somebody else's file is where ours has to be.
    #[error("{} is there, and podferry-install did not write it: move it away", path.display())]
    ForeignFile {
        /// The file.
        path: PathBuf,
    },
    /// Somebody else's installation has the folder that ours has to have.
    #[error(
        "{} is there, and podferry-install did not make it: another installation of podferry has its journal or certificates there, and \
         uninstalling this one would remove them. Stop and remove that one first; if it is gone already, move the folder away",
        path.display()
    )]
    ForeignFolder {
        /// The folder.
        path: PathBuf,
    },
    /// The operator's settings have one that is the installer's.
    #[error(
        "the settings to be laid over agent.toml (--config or PODFERRY_AGENT_CONFIG; the chart's value agent.config) have {keys}: \
         podferry-install decides that itself, for podferry-runtime and uninstalling look there. Take it out"
    )]
    Decided {
        /// Which ones.
        keys: String,
    },
    /// The node's handlers are not runc's.
    #[error(
        "no handler of this node runs containers by runc ({found}): podferry moves containers of runc only; configure a handler that does"
    )]
    NotRunc {
        /// What they run.
        found: String,
    },
    /// runc itself is missing.
    #[error(
        "runc was not found: looked for {looked_for}. Install it, or name it as BinaryName of the node's runc handler"
    )]
    NoRunc {
        /// Which files were looked for.
        looked_for: String,
    },
    /// The block cannot be added to this file.
    #[error("{} cannot be extended by a handler: {reason}", path.display())]
    CannotExtend {
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// The bundle is not whole.
    #[error("the bundle {} lacks {missing}: it is not podferry's, or damaged", path.display())]
    Bundle {
        /// The folder.
        path: PathBuf,
        /// What is missing.
        missing: String,
    },
    /// A command on the node failed.
    #[error("`{command}` failed on the node: {said}")]
    Command {
        /// The command line.
        command: String,
        /// What it said.
        said: String,
    },
    /// Restarting would end all containers.
    #[error(
        "{unit} has KillMode={mode}: restarting it would end every container of the node. Set KillMode=process, or restart it \
         yourself on the drained node and run this again with --restart never"
    )]
    UnsafeRestart {
        /// The unit.
        unit: String,
        /// Its setting.
        mode: String,
    },
    /// Nobody knows how to restart the runtime.
    #[error(
        "{runtime} has to be restarted to know a new handler, and no systemd of this node runs it: give a command that restarts it \
         with --restart-command"
    )]
    NoRestart {
        /// The runtime.
        runtime: &'static str,
    },
    /// A migration is under way.
    #[error("{count} parts of migrations are under way on this node, or pods that have moved away are still here ({}): wait for their end, \
         or insist with --force", path.display())]
    Busy {
        /// How many.
        count: usize,
        /// Where they are noted.
        path: PathBuf,
    },
    /// Pods of the handler still run.
    #[error(
        "{count} containers of the handler `podferry` still run on this node. They go on, by runc; the rest of podferry is removed. \
         Uninstall again when they are gone"
    )]
    StillRunning {
        /// How many.
        count: usize,
    },
    /// Namespaces or cgroups of the node cannot be entered.
    #[error("cannot {action}: the agent needs a privileged pod with hostPID")]
    Enter {
        /// What was tried.
        action: String,
        /// Why not.
        source: io::Error,
    },
}

/// The result of everything here.
pub type Result<T> = std::result::Result<T, Error>;

/// Names the file of a failed operation.
pub(crate) trait At<T> {
    /// Says what was tried at which path.
    fn at(self, action: &'static str, path: impl Into<PathBuf>) -> Result<T>;
}

impl<T, E: Into<io::Error>> At<T> for std::result::Result<T, E> {
    fn at(self, action: &'static str, path: impl Into<PathBuf>) -> Result<T> {
        self.map_err(|source| Error::File { action, path: path.into(), source: source.into() })
    }
}
