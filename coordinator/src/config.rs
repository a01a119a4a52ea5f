//! `coordinator.toml`.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use podferry_common::identity::IdentityFiles;
use serde::Deserialize;
use thiserror::Error;

use crate::audit::Bounds;
use crate::kubernetes::KubernetesConfig;
use crate::runner::{Deadlines, Limits};

/// The audit log's name in the state folder.
const AUDIT_LOG: &str = "audit.log";
/// Migrations that one node may take part in at a time, unless the configuration says otherwise: they share its network
/// and its processors, and a frozen workload waits for both.
const MIGRATIONS_PER_NODE: usize = 2;

/// Bytes of one file of the audit log, unless the configuration says otherwise: some 200 000 lines.
const AUDIT_LOG_BYTES: u64 = 64 << 20;
/// The fewest of them: an hour's lines must not push each other out.
const LEAST_AUDIT_LOG_BYTES: u64 = 64 << 10;
/// Full files of the audit log that are kept, unless the configuration says otherwise.
const AUDIT_LOG_FILES: usize = 8;
/// The most of them: a turn renames each.
const MOST_AUDIT_LOG_FILES: usize = 1000;

/// The configuration. Relative paths are relative to the file's folder.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where the API listens for gRPC.
    pub listen: SocketAddr,
    /// Where it listens for REST; nowhere, unless this is given.
    pub rest_listen: Option<SocketAddr>,
    /// The folder that the record of all migrations lives in.
    pub state_dir: PathBuf,
    /// The inventory of nodes and workloads; none in Kubernetes, where those of the API server are meant.
    pub inventory: Option<PathBuf>,
    /// The cluster in which migrations are recorded and asked for, and whose pods are the workloads unless there is an inventory.
    pub kubernetes: Option<KubernetesConfig>,
    /// The policy that says which clients may do what; without one all clients may do everything.
    pub access: Option<PathBuf>,
    /// The audit log; `audit.log` in `state_dir` unless said otherwise.
    pub audit_log: Option<PathBuf>,
    /// Bytes of one file of the audit log.
    #[serde(default = "audit_log_bytes")]
    pub audit_log_bytes: u64,
    /// Full files of the audit log that are kept.
    #[serde(default = "audit_log_files")]
    pub audit_log_files: usize,
    /// The coordinator's certificate, its key, and the authority.
    pub identity: IdentityFiles,
    /// Where Prometheus may read figures over plain HTTP; nowhere unless this is set.
    pub metrics_listen: Option<SocketAddr>,
    /// Migrations that one node may take part in at a time.
    #[serde(default = "migrations_per_node")]
    pub migrations_per_node: usize,
    /// Migrations from one node to one other at a time; as many as for a node, unless said otherwise.
    pub migrations_per_link: Option<usize>,
    /// How long things may take.
    #[serde(default)]
    pub deadlines: Deadlines,
}

fn audit_log_bytes() -> u64 {
    AUDIT_LOG_BYTES
}

fn audit_log_files() -> usize {
    AUDIT_LOG_FILES
}

fn migrations_per_node() -> usize {
    MIGRATIONS_PER_NODE
}

/// Why a configuration cannot be used.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Its content is wrong; the source says line and column.
    #[error("the configuration {} is wrong", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// What is wrong and where.
        source: toml::de::Error,
    },
    /// Next to nothing of the audit log would be kept.
    #[error(
        "the configuration {} is wrong: audit_log_bytes must be at least {LEAST_AUDIT_LOG_BYTES}, and audit_log_files between 1 and \
         {MOST_AUDIT_LOG_FILES}",
        path.display()
    )]
    AuditBounds {
        /// The file.
        path: PathBuf,
    },
    /// There are no nodes and no workloads.
    #[error("the configuration {} is wrong: give it an inventory or, in Kubernetes, [kubernetes]", path.display())]
    Inventory {
        /// The file.
        path: PathBuf,
    },
    /// A node could take part in nothing.
    #[error("the configuration {} is wrong: migrations_per_node and migrations_per_link must be at least 1", path.display())]
    NoMigrations {
        /// The file.
        path: PathBuf,
    },
}

impl Config {
    /// Reads and checks a file.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let failed = |source| ConfigError::Read { path: path.to_owned(), source };
        let text = std::fs::read_to_string(path).map_err(failed)?;
        let mut config: Self =
            toml::from_str(&text).map_err(|source| ConfigError::Parse { path: path.to_owned(), source })?;
        if config.inventory.is_none() && config.kubernetes.is_none() {
            return Err(ConfigError::Inventory { path: path.to_owned() });
        }
        if config.migrations_per_node == 0 || config.migrations_per_link == Some(0) {
            return Err(ConfigError::NoMigrations { path: path.to_owned() });
        }
        if config.audit_log_bytes < LEAST_AUDIT_LOG_BYTES
            || !(1..=MOST_AUDIT_LOG_FILES).contains(&config.audit_log_files)
        {
            return Err(ConfigError::AuditBounds { path: path.to_owned() });
        }
        let folder = path.parent().unwrap_or(Path::new(""));
        let identity = &mut config.identity;
        let paths = [&mut config.state_dir, &mut identity.ca, &mut identity.certificate];
        let kubeconfig = config.kubernetes.as_mut().and_then(|kubernetes| kubernetes.kubeconfig.as_mut());
        let optional = config.access.as_mut().into_iter().chain(config.audit_log.as_mut());
        let optional = optional.chain(config.inventory.as_mut()).chain(kubeconfig);
        for relative in paths.into_iter().chain([&mut identity.key]).chain(optional) {
            *relative = folder.join(&*relative);
        }
        Ok(config)
    }

    /// How many migrations there may be at a time.
    pub fn limits(&self) -> Limits {
        let per_node = self.migrations_per_node;
        Limits { per_node, per_link: self.migrations_per_link.unwrap_or(per_node) }
    }

    /// Where the audit log is.
    pub fn audit_log_path(&self) -> PathBuf {
        self.audit_log.clone().unwrap_or_else(|| self.state_dir.join(AUDIT_LOG))
    }

    /// How much of it is kept.
    pub fn audit_bounds(&self) -> Bounds {
        Bounds { bytes: self.audit_log_bytes, files: self.audit_log_files }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use podferry_common::chain;

    use super::*;

    const GOOD: &str = r#"
listen = "127.0.0.1:7440"
state_dir = "state"
inventory = "/etc/podferry/inventory.toml"
access = "access.toml"

[identity]
ca = "tls/ca.pem"
certificate = "tls/cert.pem"
key = "tls/key.pem"

[deadlines]
freeze = 0.5
"#;

    fn load(text: &str) -> Result<Config, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("coordinator.toml");
        std::fs::write(&path, text).unwrap();
        let shorten = |error: ConfigError| chain(&error).replace(&format!("{}/", folder.path().display()), "");
        let mut config = Config::load(&path).map_err(shorten)?;
        config.state_dir = config.state_dir.strip_prefix(folder.path()).unwrap().to_owned();
        Ok(config)
    }

    #[test]
    fn paths_are_relative_to_the_file_and_deadlines_have_defaults() {
        let config = load(GOOD).unwrap();
        assert_eq!(config.state_dir, Path::new("state"));
        assert_eq!(config.inventory.as_deref(), Some(Path::new("/etc/podferry/inventory.toml")));
        assert_eq!(config.deadlines.freeze, Duration::from_millis(500));
        assert_eq!(config.deadlines.prepare, Deadlines::default().prepare);
        assert_eq!((config.migrations_per_node, config.rest_listen), (2, None));
        let with_rest = load(&format!("rest_listen = \"[::1]:7444\"\n{GOOD}")).unwrap();
        assert_eq!(with_rest.rest_listen, Some("[::1]:7444".parse().unwrap()));
        assert_eq!(config.audit_log_path(), Path::new("state/audit.log"));
        let elsewhere = load(&format!("audit_log = \"/var/log/podferry/audit.log\"\n{GOOD}")).unwrap();
        assert_eq!(elsewhere.audit_log_path(), Path::new("/var/log/podferry/audit.log"));
    }

    #[test]
    fn a_coordinator_of_kubernetes_needs_only_to_say_that_it_is_one() {
        assert_eq!(load(GOOD).unwrap().kubernetes, None);
        let both = load(&format!("{GOOD}\n[kubernetes]\n")).unwrap();
        assert!(
            both.inventory.is_some() && both.kubernetes.is_some(),
            "the inventory's containers, recorded in the cluster"
        );
        let alone = GOOD.replace("inventory = \"/etc/podferry/inventory.toml\"\n", "");
        assert!(load(&alone).unwrap_err().contains("an inventory or, in Kubernetes, [kubernetes]"));
        let kubernetes = load(&format!("{alone}\n[kubernetes]\n")).unwrap().kubernetes.unwrap();
        let KubernetesConfig { namespace, lease, kubeconfig, agent_port, evacuate_on, eviction } = kubernetes;
        assert_eq!((namespace.as_str(), lease.as_str(), kubeconfig), ("podferry", "podferry-coordinator", None));
        assert_eq!((agent_port, evacuate_on, eviction), (7443, Vec::new(), None));
        let with_evictions = load(&format!("{alone}\n[kubernetes.eviction]\n")).unwrap().kubernetes.unwrap();
        let eviction = with_evictions.eviction.unwrap();
        assert_eq!((eviction.listen.to_string().as_str(), eviction.patience_s), ("0.0.0.0:7446", 600));
        assert_eq!(eviction.webhook, "podferry-eviction");
        let notices = "[kubernetes]\nevacuate_on = [{ taint = \"spot\", deadline_s = 110 }]\n";
        let kubernetes = load(&format!("{alone}\n{notices}")).unwrap().kubernetes.unwrap();
        let spot = crate::kubernetes::Notice { taint: "spot".to_owned(), deadline_s: 110, accept_loss: false };
        assert_eq!(kubernetes.evacuate_on, [spot]);
    }

    #[test]
    fn errors_point_at_the_line() {
        let broken = [
            GOOD.replace("freeze = 0.5", "freeze = 0"),
            GOOD.replace("freeze = 0.5", "freze = 1"),
            GOOD.replace("listen = \"127.0.0.1:7440\"", "listen = \"7440\""),
            GOOD.replace("state_dir = \"state\"", ""),
            format!("migrations_per_node = 0\n{GOOD}"),
            format!("audit_log_bytes = 1000\n{GOOD}"),
            format!("audit_log_files = 0\n{GOOD}"),
        ];
        let said: Vec<_> = broken.iter().map(|text| load(text).unwrap_err()).collect();
        insta::assert_snapshot!(said.join("\n"), @r#"
        the configuration coordinator.toml is wrong: TOML parse error at line 13, column 10
           |
        13 | freeze = 0
           |          ^
        0 is no deadline: it is between 0.001 and 86400 seconds

        the configuration coordinator.toml is wrong: TOML parse error at line 13, column 1
           |
        13 | freze = 1
           | ^^^^^
        unknown field `freze`, expected one of `preflight`, `prepare`, `precopy`, `freeze`, `commit`, `release`, `resume`, `fill`, `abort`, `survey`

        the configuration coordinator.toml is wrong: TOML parse error at line 2, column 10
          |
        2 | listen = "7440"
          |          ^^^^^^
        invalid socket address syntax

        the configuration coordinator.toml is wrong: TOML parse error at line 1, column 1
          |
        1 | 
          | ^
        missing field `state_dir`

        the configuration coordinator.toml is wrong: migrations_per_node and migrations_per_link must be at least 1
        the configuration coordinator.toml is wrong: audit_log_bytes must be at least 65536, and audit_log_files between 1 and 1000
        the configuration coordinator.toml is wrong: audit_log_bytes must be at least 65536, and audit_log_files between 1 and 1000
        "#);
    }
}
