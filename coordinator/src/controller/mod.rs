//! Migrations that are asked for by `Migration` objects.
//!
//! A watch, which is set up anew when it breaks, brings every object once and after each change. An object without a
//! record is a request: it becomes a migration of the coordinator's core, as one that is asked for over gRPC does, or it is
//! refused, or it waits. Then [`crate::store`] writes its status, and the controller does what the object asks for besides: a cancel, a
//! deletion, and to be deleted some time after its end.
//!
//! Who may make a Migration is what Kubernetes says (RBAC); an object does not tell who has made it. For the access policy and the audit
//! log all of them are one client, [`CLIENT`].

mod events;
mod follow;
mod policy;
mod reconcile;

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::StreamExt as _;
use kube::runtime::controller::{Action, Config as ControllerConfig, Controller as Watching};
use kube::runtime::reflector::Store as Seen;
use kube::runtime::watcher;
use kube::{Api, Client, ResourceExt as _};
use podferry_common::identity::Peer;
use podferry_common::{Failure, MigrationId};
use podferry_crds::Migration;
use thiserror::Error;
use tokio_util::sync::CancellationToken;

use crate::api::Current;
use crate::runner::Runner;
use crate::store::{Objects, StoreError};
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
    /// The records in it.
    pub objects: Objects,
    /// The coordinator's core.
    pub current: Current,
    /// The migrations as they go on.
    pub runner: Runner,
    /// What this process is called in events.
    pub name: String,
    /// Ends it.
    pub stop: CancellationToken,
}

/// What all its tasks share.
struct Controller {
    client: Client,
    objects: Objects,
    current: Current,
    runner: Runner,
    events: Events,
    peer: Peer,
    /// The objects as the watch has brought them.
    seen: Seen<Migration>,
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
    #[error("the migration is not cancelled: {0}")]
    NotCancelled(Failure),
}

/// Does what Migration objects ask for, until it is stopped.
pub async fn run(parts: Parts) {
    let Parts { client, objects, current, runner, name, stop } = parts;
    let peer = match Peer::client(CLIENT) {
        Ok(peer) => peer,
        Err(error) => return tracing::error!(%error, "no migration is taken from an object"),
    };
    let settings = ControllerConfig::default().concurrency(AT_ONCE);
    let watching = Watching::new(Api::<Migration>::all(client.clone()), watcher::Config::default())
        .with_config(settings)
        .graceful_shutdown_on(stop.cancelled_owned());
    let (events, seen) = (Events::new(client.clone(), name), watching.store());
    let followed = Mutex::default();
    let controller = Arc::new(Controller { client, objects, current, runner, events, peer, seen, followed });
    let looks = watching.run(
        |object, controller| async move { controller.reconcile(object).await },
        |object, error, _| {
            let chain = podferry_common::chain(error);
            tracing::warn!(object = object.name_any(), error = chain, "a Migration is looked at again later");
            Action::requeue(AGAIN)
        },
        controller,
    );
    looks
        .for_each(|looked| async move {
            if let Err(kube::runtime::controller::Error::QueueError(error)) = looked {
                tracing::warn!(%error, "the watch of Migrations is broken: it is set up anew");
            }
        })
        .await;
}
