//! Evictions that become migrations: a webhook on `pods/eviction` for `kubectl drain`, cluster-autoscaler, Karpenter and others that empty nodes.
//!
//! - `review`: the API server's question and its answer,
//! - `decide`: which evictions are put off, and why not the others,
//! - `object`: the `Migration` that an eviction asks for,
//! - `certificate`, `registration`: how the API server knows who answers,
//! - `server`: HTTPS.
//!
//! The first eviction of a pod that can move makes a `Migration` of it and is answered with 429, as are those after it: evictors try again. When the
//! pod has moved it is gone, which is what they wanted. **Everything else lets the eviction through**, with a warning that says why: a pod that cannot
//! move, a migration that came to nothing, one that takes too long, an API server or a coordinator that does not answer. No node stays because of
//! podferry; disruption budgets are the API server's, behind this.
//!
//! Who may evict a pod may end it, so nobody can do more by this than before. Nothing is kept here: what is known of a pod is in its `Migration`.

mod certificate;
mod decide;
mod object;
mod registration;
mod review;
mod server;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Pod;
use kube::api::PostParams;
use kube::{Api, Client};
use podferry_common::{Failure, chain};
use podferry_crds::{Migration, MigrationSpec};
use thiserror::Error;
use tokio_util::sync::CancellationToken;

use crate::api::Current;
use crate::kubernetes::EvictionConfig;
use crate::metrics::Metrics;
use crate::pods::is_of_class;
use crate::pods::policy::{PolicyError, policies_of, request_of};
use crate::runner::blocking;
use crate::store::{Record, Store, StoreError, workload_of};
use crate::strategy::{Asked, Strategy};
use certificate::{CertificateError, Shown};
use decide::{Attempt, Known, Verdict, Why, decide};
use registration::Registration;
use review::{Answer, Request};

/// How long an answer may take: the API server waits for five seconds.
const TIME: Duration = Duration::from_secs(4);

/// What evictions are answered with.
pub struct Parts {
    /// The API server.
    pub client: Client,
    /// The coordinator's core: which nodes take part.
    pub current: Current,
    /// Which migrations are under way.
    pub store: Store,
    /// Where evictions are counted.
    pub metrics: Metrics,
    /// The settings.
    pub settings: EvictionConfig,
}

/// Why evictions cannot be answered.
#[derive(Debug, Error)]
pub enum EvictionError {
    /// The port cannot be listened on.
    #[error(
        "cannot listen on {address} for evictions; is kubernetes.eviction.listen an address of this machine, and free?"
    )]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why not.
        source: io::Error,
    },
    /// There is no TLS.
    #[error(transparent)]
    Certificate(#[from] CertificateError),
}

/// Why it is not known what to do with a pod.
#[derive(Debug, Error)]
enum Unknown {
    /// The API server does not say it.
    #[error("the API server does not {action}")]
    Api {
        /// What.
        action: &'static str,
        /// Why not.
        source: kube::Error,
    },
    /// The records cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Begins to answer the API server, until `stop` is cancelled. For a coordinator that leads: no other one listens.
///
/// # Errors
/// When it cannot listen.
pub async fn begin(parts: Parts, stop: &CancellationToken) -> Result<(), EvictionError> {
    let address = parts.settings.listen;
    let listener = podferry_common::listen::listen(address).await;
    let listener = listener.map_err(|source| EvictionError::Listen { address, source })?;
    let path = format!("/evict/{}", certificate::secret()?);
    let shown = Arc::new(Shown::default());
    let tls = certificate::tls(Arc::clone(&shown))?;
    let registration = Registration::new(parts.client.clone(), &parts.settings.webhook, &path, shown);
    tokio::spawn(registration.keep(stop.clone()));
    let bound = listener.local_addr().unwrap_or(address);
    tracing::info!(address = %bound, webhook = parts.settings.webhook, "listening for evictions");
    tokio::spawn(server::serve(listener, tls, path, Arc::new(Evictions(parts)), stop.clone()));
    Ok(())
}

/// Answers questions about evictions.
struct Evictions(Parts);

/// What has become of an eviction.
enum Outcome {
    /// It goes on.
    Allowed(Why),
    /// It has to wait for this migration,
    Waits(String),
    /// which has just been asked for.
    Begun(String),
}

impl Evictions {
    async fn answer(&self, request: &Request) -> Answer {
        let unknown = |why| Outcome::Allowed(Why::Unknown(why));
        let outcome = match tokio::time::timeout(TIME, self.judge(request)).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(error)) => unknown(chain(&error)),
            Err(_) => unknown(format!("it was not known within {} s what to do with it", TIME.as_secs())),
        };
        self.tell(request, &outcome)
    }

    /// The answer, in the log and the figures too.
    fn tell(&self, request: &Request, outcome: &Outcome) -> Answer {
        let (pod, evictor) = (workload_of(&request.namespace, &request.name), &request.user_info.username);
        match outcome {
            Outcome::Allowed(why) => {
                self.0.metrics.evicted(true, why.word());
                let warning = why.warning();
                // Nothing has come of a dry run.
                if let Some(warning) = warning.as_ref().filter(|_| *why != Why::DryRun) {
                    tracing::warn!(pod, evictor, "{warning}");
                }
                Answer::allow(&request.uid, warning.as_deref())
            }
            Outcome::Waits(migration) => {
                self.0.metrics.evicted(false, "under_way");
                Answer::not_now(&request.uid, &not_now(&pod, migration))
            }
            Outcome::Begun(migration) => {
                self.0.metrics.evicted(false, "begun");
                tracing::info!(pod, evictor, migration, "a pod is moved instead of being evicted");
                Answer::not_now(&request.uid, &not_now(&pod, migration))
            }
        }
    }

    async fn judge(&self, request: &Request) -> Result<Outcome, Unknown> {
        let pods: Api<Pod> = Api::namespaced(self.0.client.clone(), &request.namespace);
        let pod = pods.get_opt(&request.name).await.map_err(api("show the pod"))?;
        let known = self.known(request, pod.as_ref()).await?;
        match decide(&known) {
            Verdict::Allow(why) => Ok(Outcome::Allowed(why)),
            Verdict::Wait(attempt) => Ok(Outcome::Waits(attempt.title)),
            Verdict::Begin => self.begin(request, &uid_of(pod.as_ref())).await,
        }
    }

    /// What there is to know. Of a pod that is none of ours nobody asks more.
    async fn known<'k>(&self, request: &'k Request, pod: Option<&'k Pod>) -> Result<Known<'k>, Unknown> {
        let mut known = Known {
            pod,
            wanted_uid: request.wanted_uid(),
            dry_run: request.is_dry_run(),
            node_takes_part: false,
            under_way: None,
            before: None,
            strategy: Ok(Strategy::Warm),
            patience: SignedDuration::from_secs(self.0.settings.patience_s.into()),
            now: Timestamp::now(),
        };
        let Some(ours) = pod.filter(|pod| is_of_class(pod)) else { return Ok(known) };
        let node = ours.spec.as_ref().and_then(|spec| spec.node_name.as_deref());
        known.node_takes_part = node.is_some_and(|node| self.0.current.has_node(node));
        known.under_way = self.under_way(request, uid_of(pod)).await?;
        known.before = self.before(request, &uid_of(pod), known.now).await?;
        known.strategy = self.strategy(request).await?;
        Ok(known)
    }

    /// The migration of the pod that is under way, or by which it has left and is about to be deleted, whoever has asked for it.
    async fn under_way(&self, request: &Request, uid: String) -> Result<Option<Attempt>, Unknown> {
        let Ok(workload) = workload_of(&request.namespace, &request.name).parse() else { return Ok(None) };
        let store = self.0.store.clone();
        let record = blocking(move || match store.busy_with(&workload)? {
            Some(id) => store.get(id),
            None => store.find(|record| has_left(record, &uid)),
        });
        let attempt = |record: Record| Attempt {
            title: format!("migration {}", record.id),
            begun_at: record.created_at,
            failed: None,
        };
        Ok(record.await?.map(attempt))
    }

    /// What has come of an eviction of this very pod before.
    async fn before(&self, request: &Request, uid: &str, now: Timestamp) -> Result<Option<Attempt>, Unknown> {
        let found = self.migrations(request).get_opt(&object::name(uid)).await;
        Ok(found.map_err(api("show the Migration of the pod"))?.map(|object| object::attempt(&object, now)))
    }

    /// How the pod's policies want it to be moved; or why they do not.
    async fn strategy(&self, request: &Request) -> Result<Result<Strategy, Failure>, Unknown> {
        let policies = match policies_of(&self.0.client, &request.namespace, &request.name).await {
            Ok(policies) => policies,
            Err(PolicyError::Api { action, source }) => return Err(Unknown::Api { action, source }),
            Err(error @ PolicyError::Selector { .. }) => return Ok(Err(error.failure())),
        };
        let spec = MigrationSpec { pod_name: request.name.clone(), ..MigrationSpec::default() };
        let asked = request_of(workload_of(&request.namespace, &request.name), &spec, &policies);
        Ok(asked.and_then(|asked| Asked::of(asked.strategy)).map(Asked::at_least))
    }

    /// Asks for a migration as anybody can.
    async fn begin(&self, request: &Request, uid: &str) -> Result<Outcome, Unknown> {
        let object = object::object(&request.name, uid, &request.user_info.username);
        let title = object::title(&object::name(uid));
        match self.migrations(request).create(&PostParams::default(), &object).await {
            Ok(_) => Ok(Outcome::Begun(title)),
            // Two have evicted it at the same time.
            Err(kube::Error::Api(status)) if status.is_already_exists() => Ok(Outcome::Waits(title)),
            Err(error) => Err(api("make a Migration of the pod")(error)),
        }
    }

    fn migrations(&self, request: &Request) -> Api<Migration> {
        Api::namespaced(self.0.client.clone(), &request.namespace)
    }
}

/// What an evictor is told who has to try again.
fn not_now(pod: &str, migration: &str) -> String {
    format!(
        "podferry moves the pod {pod} to another node instead ({migration}): try again until it is gone, and see `kubectl get migrations`"
    )
}

/// Whether that very pod has left its node by that migration: what runs is another one.
fn has_left(record: &Record, uid: &str) -> bool {
    record.pod.as_ref().is_some_and(|pod| pod.uid == uid) && record.place() == &record.target
}

fn uid_of(pod: Option<&Pod>) -> String {
    pod.and_then(|pod| pod.metadata.uid.clone()).unwrap_or_default()
}

fn api(action: &'static str) -> impl Fn(kube::Error) -> Unknown {
    move |source| Unknown::Api { action, source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration::State;
    use crate::store::PodMove;
    use crate::testing;

    #[test]
    fn a_pod_has_left_when_its_migration_is_committed_and_no_other_one_of_its_name_has() {
        let mut record = testing::record("shop/web-1", "a", "b");
        let moved = PodMove {
            namespace: "shop".to_owned(),
            name: "web-1".to_owned(),
            uid: "u-1".to_owned(),
            container: "web".to_owned(),
            target_name: "web-2".to_owned(),
            keeps_name: false,
        };
        record.pod = Some(moved);
        assert!(!has_left(&record, "u-1"), "it is still undecided");
        record.state = State::Completed;
        assert!(has_left(&record, "u-1") && !has_left(&record, "u-2"));
    }
}
