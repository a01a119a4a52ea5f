//! What a coordinator does besides when it is one of a Kubernetes cluster, from the lease to its end.

use std::path::Path;

use kube::Client;
use thiserror::Error;
use tokio::signal::unix::Signal;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::leader::process_name;
use super::{ConnectError, KubernetesConfig, Leader, LeaderError, Notice, connect};
use crate::api::Current;
use crate::controller::{self, Parts};
use crate::evacuation::Evacuator;
use crate::pods::Watched;
use crate::runner::Runner;
use crate::store::{Evacuations, Objects, Store, StoreError};

/// The variable with the pod that the process runs in, by a name or uid that no other pod has.
pub const POD_VARIABLE: &str = "PODFERRY_POD";

/// A coordinator that may work: one that leads its cluster, or one of no cluster.
pub struct Leading(Option<Cluster>);

struct Cluster {
    client: Client,
    namespace: String,
    /// What this process is called, as no other one ever is.
    name: String,
    lease: JoinHandle<Result<Leader, LeaderError>>,
    evacuate_on: Vec<Notice>,
    records: Option<(Objects, Evacuations)>,
    controller: Option<JoinHandle<()>>,
}

/// Why a coordinator of a cluster cannot work.
#[derive(Debug, Error)]
pub enum LeadingError {
    /// The API server cannot be reached.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// It does not lead, or no more.
    #[error(transparent)]
    Leader(#[from] LeaderError),
}

impl Leading {
    /// Waits until this coordinator leads, if there is a cluster; none when a signal came before that. From then on `stop` is cancelled when it
    /// leads no more.
    ///
    /// # Errors
    /// When it never will.
    pub async fn begin(
        config: Option<&KubernetesConfig>,
        [terminate, interrupt]: &mut [Signal; 2],
        stop: &CancellationToken,
    ) -> Result<Option<Self>, LeadingError> {
        let Some(config) = config else { return Ok(Some(Self(None))) };
        let client = connect(config).await?;
        let pod = std::env::var(POD_VARIABLE).ok();
        let name = process_name(pod.as_deref());
        let leader = tokio::select! {
            leader = Leader::wait(client.clone(), config, &name) => leader?,
            _ = terminate.recv() => return Ok(None),
            _ = interrupt.recv() => return Ok(None),
        };
        let namespace = config.namespace.clone();
        let lease = tokio::spawn(leader.keep(stop.clone()));
        let (records, controller) = (None, None);
        let evacuate_on = config.evacuate_on.clone();
        Ok(Some(Self(Some(Cluster { client, namespace, name, lease, evacuate_on, records, controller }))))
    }

    /// The connection to its API server, if there is a cluster.
    pub fn client(&self) -> Option<Client> {
        self.0.as_ref().map(|cluster| cluster.client.clone())
    }

    /// The store: in the API server, or in that folder, which is made if missing.
    ///
    /// # Errors
    /// When it cannot be read, or the folder not be made.
    pub async fn store(&mut self, folder: &Path) -> Result<Store, StoreError> {
        let Some(cluster) = &mut self.0 else { return Store::open(folder) };
        // Other things are written there.
        let made = tokio::fs::create_dir_all(folder).await;
        made.map_err(|source| StoreError::Folder { path: folder.to_owned(), source })?;
        let objects = Objects::open(cluster.client.clone(), &cluster.namespace, &cluster.name).await?;
        let evacuations = Evacuations::open(cluster.client.clone(), &cluster.name).await?;
        cluster.records = Some((objects.clone(), evacuations.clone()));
        Ok(Store::in_kubernetes(objects, evacuations))
    }

    /// Begins to do what objects ask for, and what taints of nodes do, of what is `watched`.
    pub fn work(
        &mut self,
        current: &Current,
        evacuator: &Evacuator,
        runner: &Runner,
        watched: Option<Watched>,
        stop: &CancellationToken,
    ) {
        let Some(cluster) = &mut self.0 else { return };
        if let Some((objects, evacuations)) = cluster.records.clone() {
            cluster.controller = Some(tokio::spawn(controller::run(Parts {
                client: cluster.client.clone(),
                objects,
                evacuations,
                current: current.clone(),
                evacuator: evacuator.clone(),
                runner: runner.clone(),
                notices: watched.map(|watched| (watched, cluster.evacuate_on.clone())),
                name: cluster.name.clone(),
                stop: stop.clone(),
            })));
        }
    }

    /// Gives the lease up, when `stop` was cancelled and nothing is written any more.
    ///
    /// # Errors
    /// When it had been lost.
    pub async fn end(self) -> Result<(), LeaderError> {
        let Some(cluster) = self.0 else { return Ok(()) };
        if let Some(controller) = cluster.controller {
            // It waits for what is under way; a panic in it has been logged.
            let _ended = controller.await;
        }
        if let Some(leader) = cluster.lease.await.ok().transpose()? {
            leader.resign().await;
        }
        Ok(())
    }
}
