//! Migrations that are asked for by `Migration` objects, and evacuations by `NodeEvacuation` objects ([`evacuation`]).
//!
//! A watch, which is set up anew when it breaks, brings every object once and after each change. An object without a
//! record is a request: it becomes a migration of the coordinator's core, as one that is asked for over gRPC does, or it is
//! refused, or it waits. Then [`crate::store`] writes its status, and the controller does what the object asks for besides: a cancel, a
//! deletion, and to be deleted some time after its end.
//!
//! Who may make them is what Kubernetes says (RBAC); an object does not tell who has made it. For the access policy and the audit
//! log all of them are one client, [`CLIENT`].

mod evacuation;
mod events;
mod follow;
mod labels;
mod notices;
mod objects;
mod reconcile;

use std::collections::HashSet;
use std::fmt::Debug;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::StreamExt as _;
use kube::runtime::controller::{Action, Config as ControllerConfig, Controller as Watching};
use kube::runtime::reflector::Store as Seen;
use kube::runtime::watcher;
use kube::{Api, Client, Resource, ResourceExt as _};
use podferry_common::identity::Peer;
use podferry_common::{Failure, MigrationId};
use podferry_crds::{Migration, NodeEvacuation};
use serde::de::DeserializeOwned;
use thiserror::Error;
use tokio_util::sync::CancellationToken;

use crate::api::Current;
use crate::evacuation::{EvacuationId, Evacuator};
use crate::kubernetes::Notice;
use crate::pods::Watched;
use crate::runner::Runner;
use crate::store::{Evacuations, Objects, StoreError};
use events::Events;

/// The client that all objects together are, in the access policy and the audit log.
pub const CLIENT: &str = "kubernetes";

/// Objects that are looked at at the same time. Looking may wait for agents.
const AT_ONCE: u16 = 32;
/// When something that failed is tried again.
const AGAIN: Duration = Duration::from_secs(5);

/// What the controller works with.
pub struct Parts {
    /// The API server.
    pub client: Client,
    /// The records in it: of migrations,
    pub objects: Objects,
    /// and of evacuations.
    pub evacuations: Evacuations,
    /// The coordinator's core.
    pub current: Current,
    /// The evacuations as they go on.
    pub evacuator: Evacuator,
    /// The migrations as they go on.
    pub runner: Runner,
    /// What is seen of the cluster, and the taints upon which a node is evacuated; none when the inventory is a file.
    pub notices: Option<(Watched, Vec<Notice>)>,
    /// What this process is called in events.
    pub name: String,
    /// Ends it.
    pub stop: CancellationToken,
}

/// What all its tasks share.
struct Controller {
    client: Client,
    objects: Objects,
    evacuations: Evacuations,
    current: Current,
    evacuator: Evacuator,
    runner: Runner,
    events: Events,
    peer: Peer,
    /// The Migrations as the watch has brought them.
    seen: Seen<Migration>,
    /// The `NodeEvacuation` objects as their watch has.
    seen_evacuations: Seen<NodeEvacuation>,
    /// Evacuations whose end somebody waits for.
    awaited: Mutex<HashSet<EvacuationId>>,
    /// Migrations whose progress somebody shows.
    followed: Mutex<HashSet<MigrationId>>,
}

/// Why an object is looked at again later.
#[derive(Debug, Error)]
enum ControllerError {
    /// The API server did not do something.
    #[error("the API server does not {action}")]
    Api {
        /// What.
        action: &'static str,
        /// Why not.
        source: Box<kube::Error>,
    },
    /// A status was not written.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A cancel has not been done.
    #[error("it is not cancelled: {0}")]
    NotCancelled(Failure),
}

/// Does what objects ask for, until it is stopped.
pub async fn run(parts: Parts) {
    let Parts { client, objects, evacuations, current, evacuator, runner, notices, name, stop } = parts;
    let peer = match Peer::client(CLIENT) {
        Ok(peer) => peer,
        Err(error) => return tracing::error!(%error, "nothing is taken from an object"),
    };
    let migrations = watching::<Migration>(&client, &stop);
    let nodes = watching::<NodeEvacuation>(&client, &stop);
    let (events, seen) = (Events::new(client.clone(), name), migrations.store());
    let (followed, awaited, seen_by) = (Mutex::default(), Mutex::default(), current.clone());
    let controller = Arc::new(Controller {
        client: client.clone(),
        objects,
        evacuations,
        current,
        evacuator,
        runner,
        events,
        peer,
        seen,
        seen_evacuations: nodes.store(),
        awaited,
        followed,
    });
    let looks = migrations.run(
        |object, controller| async move { controller.reconcile(object).await },
        |object, error, _| look_again(&*object, error),
        Arc::clone(&controller),
    );
    let looks_at_nodes = nodes.run(
        |object, controller| async move { controller.reconcile_evacuation(object).await },
        |object, error, _| look_again(&*object, error),
        controller,
    );
    let of_cluster = async {
        if let Some((watched, wanted)) = notices {
            let answers = notices::answer(client.clone(), watched.clone(), wanted, stop.clone());
            tokio::join!(answers, labels::keep(client, watched, seen_by, stop));
        }
    };
    tokio::join!(looks.for_each(looked), looks_at_nodes.for_each(looked), of_cluster);
}

/// A watch of all objects of a kind.
fn watching<K>(client: &Client, stop: &CancellationToken) -> Watching<K>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
{
    Watching::new(Api::<K>::all(client.clone()), watcher::Config::default())
        .with_config(ControllerConfig::default().concurrency(AT_ONCE))
        .graceful_shutdown_on(stop.clone().cancelled_owned())
}

fn look_again<K: Resource<DynamicType = ()>>(object: &K, error: &ControllerError) -> Action {
    let (kind, error) = (K::kind(&()), podferry_common::chain(error));
    tracing::warn!(object = object.name_any(), %kind, error, "an object is looked at again later");
    Action::requeue(AGAIN)
}

async fn looked<T>(looked: Result<T, kube::runtime::controller::Error<ControllerError, watcher::Error>>) {
    if let Err(kube::runtime::controller::Error::QueueError(error)) = looked {
        tracing::warn!(%error, "a watch of objects is broken: it is set up anew");
    }
}
