//! The agent's configuration file, `agent.toml`.

use std::fs;
use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::time::Duration;

use podferry_common::NodeName;
use podferry_common::identity::IdentityFiles;
use podferry_memory::tracker::Preference;
use serde::Deserialize;

/// Everything the agent is told. Paths are as its own mount namespace sees them.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// This node's name, as in its certificate.
    pub node: NodeName,
    /// Where it listens: the coordinator's calls and other agents' transfers come to one port.
    pub listen: SocketAddr,
    /// Where Prometheus may read figures over plain HTTP; nowhere unless this is set.
    #[serde(default)]
    pub metrics_listen: Option<SocketAddr>,
    /// Where it remembers its parts of migrations; on a disk.
    pub state_dir: PathBuf,
    /// Where images are kept while a container moves; a tmpfs is mounted there when there is none.
    pub images_dir: PathBuf,
    /// Where sockets are made; short, because a socket's path has 108 bytes at most.
    #[serde(default = "default_runtime_dir")]
    pub runtime_dir: PathBuf,
    /// host:port of the coordinator, which a part is asked about after a restart.
    pub coordinator: String,
    /// How writes to a workload's memory are followed in a live migration.
    #[serde(default)]
    pub tracker: Tracker,
    /// Whether the first round of a live migration gives way to a workload that waits for processors.
    #[serde(default = "yes")]
    pub give_way: bool,
    /// The certificate authority, the node's certificate and its key.
    pub identity: IdentityFiles,
    /// Programs.
    pub tools: Tools,
    /// Where containers are.
    pub runtime: Runtime,
    /// How containers are connected; nothing in Kubernetes.
    #[serde(default)]
    pub network: Network,
    /// Kubernetes: this node's containers are pods'.
    #[serde(default)]
    pub kubernetes: Option<Kubernetes>,
    /// Of containers that fetch memory after they were resumed.
    #[serde(default)]
    pub post_copy: PostCopy,
    /// Of what is sent to other nodes.
    #[serde(default)]
    pub transfer: Transfer,
}

/// Of what is sent to other nodes.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Transfer {
    /// The most bytes per second that all migrations from this node send together, in equal parts; one whose container stands still comes
    /// first. As many as the link takes, unless this is set.
    pub bandwidth_limit: Option<NonZeroU64>,
}

/// Of containers that fetch memory after they were resumed.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PostCopy {
    /// For so many seconds a source that does not answer is tried again. Then its pages are given up, and the container is ended.
    pub recover_within_s: u64,
}

impl Default for PostCopy {
    fn default() -> Self {
        Self { recover_within_s: 300 }
    }
}

impl PostCopy {
    /// For how long a source that does not answer is tried again.
    pub fn recover_within(&self) -> Duration {
        Duration::from_secs(self.recover_within_s)
    }
}

/// Where a container has its shared memory.
pub const SHARED_MEMORY: &str = "/dev/shm";

/// A node of Kubernetes: containers that arrive are created by its containerd, and their bundles and networks are its own.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Kubernetes {
    /// Where it listens for `podferry-runtime`, which says the same in its `runtime.json`.
    pub socket: PathBuf,
    /// Where the pods that move away are noted for `podferry-runtime`; on a disk.
    pub fence_dir: PathBuf,
    /// The kubelet's folder.
    pub kubelet_dir: PathBuf,
    /// A folder on the disk that has containers' writable layers.
    pub layers_dir: PathBuf,
    /// For so many seconds a pod's container is waited for on its target: its image may have to be pulled.
    pub arrive_within_s: u64,
    /// For so many seconds connections to a pod's old address live on at most, when it has moved; 0: they are closed when it moves.
    pub relay_s: u64,
}

impl Default for Kubernetes {
    fn default() -> Self {
        Self {
            socket: "/run/podferry/runtime.sock".into(),
            fence_dir: "/var/lib/podferry/fenced".into(),
            kubelet_dir: "/var/lib/kubelet".into(),
            layers_dir: "/var/lib/containerd".into(),
            arrive_within_s: 120,
            relay_s: 600,
        }
    }
}

impl Kubernetes {
    /// For how long a pod's container is waited for on its target.
    pub fn arrive_within(&self) -> Duration {
        Duration::from_secs(self.arrive_within_s)
    }

    /// For how long connections to a pod's old address live on at most.
    pub fn relay(&self) -> Duration {
        Duration::from_secs(self.relay_s)
    }

    /// Whether what is mounted there moves with its pod: an `emptyDir`, the shared memory of its sandbox, and what containerd makes of
    /// an image's own volumes (`VOLUME` of a Dockerfile). They are told by the ends of their paths, which are the
    /// same wherever kubelet and containerd keep them.
    pub fn moves(destination: &Path, dir: &Path) -> bool {
        const EMPTY_DIR: [&str; 5] = ["pods", "*", "volumes", "kubernetes.io~empty-dir", "*"];
        const OF_IMAGE: [&str; 5] = ["io.containerd.grpc.v1.cri", "containers", "*", "volumes", "*"];
        let parts: Vec<_> = dir.iter().rev().take(EMPTY_DIR.len()).collect();
        let is = |wanted: [&str; 5]| {
            parts.len() == wanted.len()
                && parts.iter().zip(wanted.iter().rev()).all(|(part, wanted)| *wanted == "*" || part == wanted)
        };
        destination == Path::new(SHARED_MEMORY) || is(EMPTY_DIR) || is(OF_IMAGE)
    }
}

/// How writes to memory are followed.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum Tracker {
    /// By a userfaultfd where kernel and process allow it, else by soft-dirty marks.
    #[default]
    Auto,
    /// By a userfaultfd only.
    Userfaultfd,
    /// By soft-dirty marks only.
    SoftDirty,
}

impl From<Tracker> for Preference {
    fn from(tracker: Tracker) -> Self {
        match tracker {
            Tracker::Auto => Self::Auto,
            Tracker::Userfaultfd => Self::Userfaultfd,
            Tracker::SoftDirty => Self::SoftDirty,
        }
    }
}

/// Programs that the agent runs.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tools {
    /// CRIU, 4.2.1 or newer.
    pub criu: PathBuf,
    /// runc, 1.3 or newer.
    pub runc: PathBuf,
    /// `podferry-hook`.
    pub hook: PathBuf,
    /// `podferry-stdio-keeper`.
    pub stdio_keeper: PathBuf,
    /// `podferry-dump-worker`.
    pub dump_worker: PathBuf,
    /// `libpodferry_criu_shim.so`, which is preloaded into CRIU.
    pub criu_shim: PathBuf,
    /// `podferry-pager`.
    pub pager: PathBuf,
    /// `podferry-tar`, which is `tar` for CRIU.
    pub tar: PathBuf,
}

/// Where containers are.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Runtime {
    /// runc's root folders; containers that arrive go to the first.
    pub roots: Vec<PathBuf>,
    /// Where the bundles of containers that may arrive are: `<bundles_dir>/<workload>/config.json`.
    #[serde(default = "default_bundles_dir")]
    pub bundles_dir: PathBuf,
    /// Where containers' output goes.
    #[serde(default = "default_logs_dir")]
    pub logs_dir: PathBuf,
    /// Folders whose directories move with the containers that have them mounted and can write to them.
    #[serde(default = "default_volume_dirs")]
    pub volume_dirs: Vec<PathBuf>,
}

/// How containers are connected.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Network {
    /// The bridge that arriving containers' links join.
    pub bridge: String,
}

/// What is wrong with a configuration file.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It cannot be read.
    #[error("cannot read the configuration {}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is not what it should be; the source points at the place.
    #[error("the configuration {} is wrong", path.display())]
    Parse {
        /// Which file.
        path: PathBuf,
        /// Where and why.
        source: Box<toml::de::Error>,
    },
    /// It names no bridge, and the node is none of Kubernetes.
    #[error(
        "the configuration {} names no bridge in network.bridge; on a node of Kubernetes write [kubernetes]", path.display()
    )]
    NoBridge {
        /// Which file.
        path: PathBuf,
    },
    /// It names no folder of runc's.
    #[error("the configuration {} names no root of runc's in runtime.roots", path.display())]
    NoRoot {
        /// Which file.
        path: PathBuf,
    },
}

impl Config {
    /// Reads the file.
    ///
    /// # Errors
    /// When it is not there, or has a key that is missing, unknown or of the wrong kind.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        let config: Self = toml::from_str(&text)
            .map_err(|source| ConfigError::Parse { path: path.to_owned(), source: Box::new(source) })?;
        if config.runtime.roots.is_empty() {
            return Err(ConfigError::NoRoot { path: path.to_owned() });
        }
        if config.network.bridge.is_empty() && config.kubernetes.is_none() {
            return Err(ConfigError::NoBridge { path: path.to_owned() });
        }
        Ok(config)
    }

    /// Where arriving containers' state goes.
    pub fn runc_root(&self) -> &Path {
        &self.runtime.roots[0]
    }

    /// A folder on the disk that has containers' writable layers.
    pub fn layers_dir(&self) -> &Path {
        self.kubernetes.as_ref().map_or(&self.runtime.bundles_dir, |kubernetes| &kubernetes.layers_dir)
    }

    /// Where the parts are remembered.
    pub fn parts_dir(&self) -> PathBuf {
        self.state_dir.join("parts")
    }
}

const fn yes() -> bool {
    true
}

fn default_bundles_dir() -> PathBuf {
    PathBuf::from("/var/lib/podferry/bundles")
}

fn default_logs_dir() -> PathBuf {
    PathBuf::from("/var/log/podferry")
}

fn default_volume_dirs() -> Vec<PathBuf> {
    vec![PathBuf::from("/var/lib/podferry/volumes")]
}

fn default_runtime_dir() -> PathBuf {
    PathBuf::from("/run/podferry")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_pods_folders_those_move_that_are_its_own() {
        let is = |dir: &str| Kubernetes::moves(Path::new("/there"), Path::new(dir));
        assert!(Kubernetes::moves(Path::new("/dev/shm"), Path::new("/run/containerd/sandboxes/s-1/shm")));
        assert!(is("/var/lib/kubelet/pods/u-1/volumes/kubernetes.io~empty-dir/cache"));
        assert!(
            is("/mnt/disk/kubelet/pods/u-1/volumes/kubernetes.io~empty-dir/cache"),
            "where the kubelet's folder is a link"
        );
        assert!(is("/var/lib/containerd/io.containerd.grpc.v1.cri/containers/c-1/volumes/v-1"));
        for other in [
            "/var/lib/kubelet/pods/u-1/volumes/kubernetes.io~empty-dir",
            "/var/lib/kubelet/pods/u-1/volumes/kubernetes.io~empty-dir/cache/below",
            "/var/lib/kubelet/pods/u-1/volumes/kubernetes.io~csi/pvc-1/mount",
            "/var/lib/kubelet/pods/u-1/volumes/kubernetes.io~configmap/settings",
            "/var/lib/containerd/io.containerd.grpc.v1.cri/sandboxes/s-1/volumes/v-1",
            "/",
            "/var/lib/podferry/volumes/a",
        ] {
            assert!(!is(other), "{other}");
        }
    }

    #[test]
    fn trackers_are_named_as_operators_write_them() {
        #[derive(Deserialize)]
        struct Named {
            #[serde(default)]
            tracker: Tracker,
        }
        let read = |text: &str| toml::from_str::<Named>(text).map(|named| Preference::from(named.tracker));
        assert_eq!(read("").unwrap(), Preference::Auto);
        assert_eq!(read("tracker = 'auto'").unwrap(), Preference::Auto);
        assert_eq!(read("tracker = 'userfaultfd'").unwrap(), Preference::Userfaultfd);
        assert_eq!(read("tracker = 'soft-dirty'").unwrap(), Preference::SoftDirty);
        assert!(read("tracker = 'softdirty'").unwrap_err().to_string().contains("soft-dirty"));
    }
}
