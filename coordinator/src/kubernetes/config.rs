//! The section `[kubernetes]` of `coordinator.toml`.

use std::net::SocketAddr;
use std::path::PathBuf;

use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use serde::Deserialize;
use thiserror::Error;

/// Makes a coordinator one of a Kubernetes cluster: pods are its workloads, and migrations are recorded in the API server.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KubernetesConfig {
    /// The namespace that the coordinator runs in; its lease is there.
    #[serde(default = "namespace")]
    pub namespace: String,
    /// The name of the lease that says which coordinator leads.
    #[serde(default = "lease")]
    pub lease: String,
    /// How the API server is reached from outside of the cluster; from inside, the pod's own service account says it.
    pub kubeconfig: Option<PathBuf>,
    /// The port of the agents, at their nodes' own addresses.
    #[serde(default = "agent_port")]
    pub agent_port: u16,
    /// Taints that say that a node will be gone: it is evacuated then.
    #[serde(default)]
    pub evacuate_on: Vec<Notice>,
    /// Evictions become migrations; they do not unless this is given.
    pub eviction: Option<EvictionConfig>,
}

/// How evictions become migrations.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvictionConfig {
    /// Where the API server asks.
    #[serde(default = "eviction_listen")]
    pub listen: SocketAddr,
    /// The `ValidatingWebhookConfiguration` by which it asks. The coordinator writes into it whom to trust.
    #[serde(default = "eviction_webhook")]
    pub webhook: String,
    /// Seconds that evictions of a pod are put off, from the first one on. Then the pod is evicted.
    #[serde(default = "eviction_patience_s")]
    pub patience_s: u32,
}

fn eviction_listen() -> SocketAddr {
    SocketAddr::from(([0, 0, 0, 0], 7446))
}

fn eviction_webhook() -> String {
    "podferry-eviction".to_owned()
}

const fn eviction_patience_s() -> u32 {
    600
}

/// A taint that says that a node will be gone.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Notice {
    /// Its key.
    pub taint: String,
    /// How many seconds after it the node is gone; 0: nobody knows.
    #[serde(default)]
    pub deadline_s: u32,
    /// Whether pods may be moved by post-copy in a hurry, with its risk.
    #[serde(default)]
    pub accept_loss: bool,
}

fn namespace() -> String {
    "podferry".to_owned()
}

const fn agent_port() -> u16 {
    7443
}

fn lease() -> String {
    "podferry-coordinator".to_owned()
}

/// Why the API server cannot be reached.
#[derive(Debug, Error)]
pub enum ConnectError {
    /// The kubeconfig cannot be used.
    #[error("the kubeconfig {} cannot be used", path.display())]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: Box<kube::config::KubeconfigError>,
    },
    /// Nothing says where the API server is.
    #[error(
        "nothing says how the API server is reached: run in a pod with a service account, or set kubernetes.kubeconfig"
    )]
    Nowhere {
        /// Why not.
        source: Box<kube::config::InferConfigError>,
    },
    /// What is said of it makes no client.
    #[error("no connection to the API server can be set up")]
    Client {
        /// Why not.
        source: Box<kube::Error>,
    },
}

/// A client of the API server. It connects when it is used.
pub async fn connect(config: &KubernetesConfig) -> Result<Client, ConnectError> {
    let settings = match &config.kubeconfig {
        Some(path) => from_file(path.clone()).await?,
        None => Config::infer().await.map_err(|source| ConnectError::Nowhere { source: Box::new(source) })?,
    };
    Client::try_from(settings).map_err(|source| ConnectError::Client { source: Box::new(source) })
}

async fn from_file(path: PathBuf) -> Result<Config, ConnectError> {
    let failed = |source| ConnectError::Kubeconfig { path: path.clone(), source: Box::new(source) };
    let file = Kubeconfig::read_from(&path).map_err(failed)?;
    Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.map_err(failed)
}
