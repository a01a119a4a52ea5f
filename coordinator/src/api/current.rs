//! The core with the inventory as it is now, for those who may ask it.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use podferry_common::identity::Peer;
use podferry_common::tls::PeerInfo;
use podferry_common::{Failure, FailureCode, chain};
use podferry_proto::v1;

use super::Core;
use crate::FileError;
use crate::access::Action;
use crate::cluster::Inventory;
use crate::follow::Follower;
use crate::metrics::Metrics;
use crate::pods::Watched;

/// How often agents are asked whether they answer.
const AGENTS_INTERVAL: Duration = Duration::from_secs(15);

/// The core, and the inventory that it follows: an edited file, or what has changed in the cluster, counts from the next request on.
#[derive(Clone)]
pub struct Current(Arc<Mutex<Followed>>);

struct Followed {
    core: Core,
    inventory: Source,
}

/// Where the inventory comes from.
enum Source {
    /// A file.
    File(Follower),
    /// The API server; which version of what is seen there the core has.
    Cluster(Watched, Option<u64>),
}

impl Current {
    /// A core whose inventory was read from `path`, some time ago: the first request reads it again.
    pub fn new(core: Core, path: PathBuf) -> Self {
        Self::following(core, Source::File(Follower::new(path)))
    }

    /// A core whose inventory is what is seen of a cluster of Kubernetes.
    pub fn watching(core: Core, cluster: Watched) -> Self {
        Self::following(core, Source::Cluster(cluster, None))
    }

    fn following(core: Core, inventory: Source) -> Self {
        let evacuator = core.evacuator().clone();
        let current = Self(Arc::new(Mutex::new(Followed { core, inventory })));
        // The evacuator is a part of the core: it must not keep it.
        let weak = Arc::downgrade(&current.0);
        evacuator.ask(move || weak.upgrade().map(|followed| Self(followed).now()));
        current
    }

    /// The core, for a caller who may do this, and who that is: there is no other way to it. A changed inventory that is wrong is logged once,
    /// and the last right one stays.
    ///
    /// # Errors
    /// `PERMISSION_DENIED`, with what is missing.
    pub async fn admit(&self, caller: Option<&PeerInfo>, action: &Action<'_>) -> Result<(Core, Peer), Failure> {
        let peer = caller.map(|caller| &caller.peer);
        let core = self.admit_peer(peer, action).await?;
        let nobody = || Failure::new(FailureCode::PermissionDenied, "the caller has shown no certificate");
        Ok((core, peer.cloned().ok_or_else(nobody)?))
    }

    /// The same for a peer that is known otherwise than by the certificate of a connection.
    pub(crate) async fn admit_peer(&self, peer: Option<&Peer>, action: &Action<'_>) -> Result<Core, Failure> {
        let core = self.now();
        core.gate().pass(peer, action).await?;
        Ok(core)
    }

    /// All nodes, and what their agents say now: for the coordinator itself, which needs nobody's leave.
    pub(crate) async fn nodes(&self) -> Vec<v1::Node> {
        self.now().nodes().await
    }

    /// Whether a node of that name takes part.
    pub(crate) fn has_node(&self, name: &str) -> bool {
        self.now().has_node(name)
    }

    /// Takes down again and again which agents answer, until it is dropped.
    pub async fn watch_agents(&self, metrics: &Metrics) {
        loop {
            let answers = self.now().answering().await;
            metrics.agents(&answers);
            tokio::time::sleep(AGENTS_INTERVAL).await;
        }
    }

    fn now(&self) -> Core {
        let mut followed = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(inventory) = followed.inventory.changed() {
            followed.core = followed.core.with_inventory(inventory);
        }
        followed.core.clone()
    }
}

impl Source {
    /// The inventory, when it is another than before.
    fn changed(&mut self) -> Option<Inventory> {
        match self {
            Self::File(file) => read_anew(file),
            Self::Cluster(cluster, known) => {
                let version = Some(cluster.version());
                (std::mem::replace(known, version) != version).then(|| cluster.inventory())
            }
        }
    }
}

/// A file that has changed.
fn read_anew(file: &mut Follower) -> Option<Inventory> {
    let read = file.has_changed().then(|| Inventory::load(file.path()))?;
    let wrong =
        |error: &FileError| tracing::error!(error = chain(error), "the changed inventory is wrong; the old one stays");
    read.inspect_err(wrong).ok()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::access::Gate;
    use crate::runner::Deadlines;
    use crate::store::Store;
    use crate::testing;

    async fn workloads(current: &Current) -> Vec<String> {
        let all = current.now().workloads("").await.unwrap();
        all.into_iter().map(|workload| workload.name).collect()
    }

    #[tokio::test]
    async fn a_change_while_the_coordinator_starts_counts() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("inventory.toml");
        fs::write(&path, "[[workloads]]\nname = \"early\"\n").unwrap();
        let inventory = Inventory::load(&path).unwrap();
        fs::write(&path, "[[workloads]]\nname = \"later\"\n").unwrap();
        let store = Store::open(&folder.path().join("state")).unwrap();
        let agents = testing::agents(folder.path());
        let audit = testing::audit(folder.path());
        let runner = testing::runner(&agents, &store, &audit);
        let gate = Gate::new(None, audit, Metrics::default()).unwrap();
        let core = Core::new(inventory, agents, store, runner, Deadlines::default(), gate);
        let current = Current::new(core, path.clone());
        assert_eq!(workloads(&current).await, ["later"]);
        fs::write(&path, "[[workloads]]\nname = \"LATEST\"\n").unwrap();
        assert_eq!(workloads(&current).await, ["later"], "a wrong one does not count");
        fs::write(&path, "[[workloads]]\nname = \"the-latest\"\n").unwrap();
        assert_eq!(workloads(&current).await, ["the-latest"]);
    }
}
