//! Which coordinator leads: the one that holds the lease.
//!
//! A lease is taken, and kept, by writes that name the resourceVersion that they were made from. Clocks are not compared: a
//! lease counts as given up when it has not changed for its whole duration by the clock of the one that wants it. Its holder stops
//! by itself when it could not write it for less than that.
//!
//! The lease keeps two coordinators from working at the same time. That two cannot *decide* at the same time does not depend on it:
//! each write of a record is taken only from the one that has written it last ([`crate::store`]).

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client, Error};
use podferry_common::MigrationId;
use thiserror::Error as ThisError;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::KubernetesConfig;

/// What the name of a process begins with that runs in a pod; then come the pod, `/`, and an id.
const POD: &str = "pod:";

/// What this process is called, as no other one ever is. `pod` is the one that it runs in, if it runs in one: by that, who is started again in it
/// knows that the one before is dead.
pub(super) fn process_name(pod: Option<&str>) -> String {
    let id = MigrationId::new();
    match pod {
        Some(pod) => format!("{POD}{pod}/{id}"),
        None => format!("{}/{id}", rustix::system::uname().nodename().to_string_lossy()),
    }
}

/// How long a lease counts that is not renewed.
const DURATION: Duration = Duration::from_secs(15);
/// How long a leader tries to renew it before it stops.
const RENEWAL: Duration = Duration::from_secs(10);
/// The pause between two looks or renewals.
const PAUSE: Duration = Duration::from_secs(2);
/// How long one request may take.
const ATTEMPT: Duration = Duration::from_secs(4);

/// Why a coordinator does not lead.
#[derive(Debug, ThisError)]
pub enum LeaderError {
    /// The lease could not be renewed in time.
    #[error("the lease {lease} could not be renewed for {} s: another coordinator may lead by now; this one stops", RENEWAL.as_secs())]
    Lapsed {
        /// Namespace and name.
        lease: String,
        /// Why not.
        source: Box<Error>,
    },
    /// Somebody else has it.
    #[error("the lease {lease} is held by {holder} now; this coordinator stops")]
    Taken {
        /// Namespace and name.
        lease: String,
        /// Who.
        holder: String,
    },
    /// The API server will not let it be taken.
    #[error(
        "the lease {lease} cannot be taken; is this service account allowed to get, create and update leases there?"
    )]
    Forbidden {
        /// Namespace and name.
        lease: String,
        /// What it says.
        source: Box<Error>,
    },
}

/// A lease that this process holds.
pub struct Leader {
    api: Api<Lease>,
    title: String,
    holder: String,
    lease: Lease,
    /// When the last write of it was begun that went through.
    renewed: Instant,
}

/// A lease as it was seen last, and since when it has been so.
struct Seen {
    version: Option<String>,
    since: Instant,
}

impl Leader {
    /// Waits until this process holds the lease. `holder` is what it is called, as no other one ever is.
    ///
    /// # Errors
    /// When the API server says that it never will.
    pub async fn wait(client: Client, config: &KubernetesConfig, holder: &str) -> Result<Self, LeaderError> {
        let api: Api<Lease> = Api::namespaced(client, &config.namespace);
        let title = format!("{}/{}", config.namespace, config.lease);
        let mut seen = None;
        let mut waits = false;
        let mut forbidden_since: Option<Instant> = None;
        loop {
            let renewed = Instant::now();
            match within(attempt(&api, &config.lease, holder, &mut seen)).await {
                Ok(Some(lease)) => {
                    tracing::info!(lease = title, holder, "this coordinator leads");
                    return Ok(Self { api, title, holder: holder.to_owned(), lease, renewed });
                }
                Ok(None) => {
                    forbidden_since = None;
                    if !std::mem::replace(&mut waits, true) {
                        tracing::info!(lease = title, holder, "another coordinator leads: waiting");
                    }
                }
                // An API server that has just been started forbids everything until it has read who may do what.
                Err(Error::Api(status)) if status.code == 403 => {
                    if forbidden_since.get_or_insert_with(Instant::now).elapsed() >= DURATION {
                        return Err(LeaderError::Forbidden { lease: title, source: Box::new(Error::Api(status)) });
                    }
                }
                Err(error) => tracing::warn!(lease = title, %error, "the lease cannot be looked at: trying again"),
            }
            sleep(PAUSE).await;
        }
    }

    /// Keeps the lease until `stop` is cancelled. When that fails, `stop` is cancelled and the error says why.
    ///
    /// # Errors
    /// When it is lost.
    pub async fn keep(mut self, stop: CancellationToken) -> Result<Self, LeaderError> {
        loop {
            tokio::select! {
                () = stop.cancelled() => return Ok(self),
                () = sleep(PAUSE) => {}
            }
            let started = Instant::now();
            let error = match within(self.renew()).await {
                Ok(None) => {
                    self.renewed = started;
                    continue;
                }
                Ok(Some(holder)) => {
                    stop.cancel();
                    return Err(LeaderError::Taken { lease: self.title, holder });
                }
                Err(error) => error,
            };
            tracing::warn!(lease = self.title, %error, "the lease is not renewed yet");
            if self.renewed.elapsed() + PAUSE >= RENEWAL {
                stop.cancel();
                return Err(LeaderError::Lapsed { lease: self.title, source: Box::new(error) });
            }
        }
    }

    /// Gives the lease up, so that nobody waits for it to lapse. For when nothing is written any more.
    pub async fn resign(mut self) {
        self.lease.spec.get_or_insert_default().holder_identity = Some(String::new());
        let name = self.lease.metadata.name.clone().unwrap_or_default();
        if let Err(error) = within(self.api.replace(&name, &PostParams::default(), &self.lease)).await {
            tracing::info!(lease = self.title, %error, "the lease is not given up: it lapses");
        }
    }

    /// Renews it; or says who has it.
    async fn renew(&mut self) -> Result<Option<String>, Error> {
        let name = self.lease.metadata.name.clone().unwrap_or_default();
        let mut wanted = self.lease.clone();
        wanted.spec.get_or_insert_default().renew_time = Some(now());
        match self.api.replace(&name, &PostParams::default(), &wanted).await {
            Ok(lease) => self.lease = lease,
            Err(Error::Api(status)) if status.code == 409 => {
                // Our own renewal may have gone through without its answer; or somebody else has it.
                let found = self.api.get(&name).await?;
                if holder_of(&found) != self.holder {
                    return Ok(Some(holder_of(&found).to_owned()));
                }
                self.lease = found;
            }
            Err(error) => return Err(error),
        }
        Ok(None)
    }
}

/// Looks at the lease, and takes it if nobody holds it.
async fn attempt(api: &Api<Lease>, name: &str, holder: &str, seen: &mut Option<Seen>) -> Result<Option<Lease>, Error> {
    let Some(found) = api.get_opt(name).await? else {
        let metadata = ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() };
        let lease = Lease { metadata, spec: Some(taken(None, holder)) };
        return taken_unless_overtaken(api.create(&PostParams::default(), &lease).await);
    };
    let since = match seen {
        Some(seen) if seen.version == found.metadata.resource_version => seen.since,
        _ => Instant::now(),
    };
    *seen = Some(Seen { version: found.metadata.resource_version.clone(), since });
    if !is_free(holder_of(&found), holder) && since.elapsed() < DURATION {
        return Ok(None);
    }
    let spec = Some(taken(found.spec.as_ref(), holder));
    let lease = Lease { metadata: found.metadata, spec };
    taken_unless_overtaken(api.replace(name, &PostParams::default(), &lease).await)
}

/// Whether a lease of `current` may be taken by `new` at once: nobody holds it, or one that is dead for sure. A process of the same pod is:
/// a pod's container is started again when it has ended.
fn is_free(current: &str, new: &str) -> bool {
    let pod =
        |holder: &str| holder.strip_prefix(POD).and_then(|rest| rest.split_once('/')).map(|(pod, _)| pod.to_owned());
    current.is_empty() || current == new || pod(current).is_some_and(|current| pod(new) == Some(current))
}

fn taken_unless_overtaken(answer: Result<Lease, Error>) -> Result<Option<Lease>, Error> {
    match answer {
        Ok(lease) => Ok(Some(lease)),
        Err(Error::Api(status)) if status.code == 409 => Ok(None),
        Err(error) => Err(error),
    }
}

fn taken(before: Option<&LeaseSpec>, holder: &str) -> LeaseSpec {
    let transitions = before.and_then(|spec| spec.lease_transitions).map_or(0, |count| count.saturating_add(1));
    LeaseSpec {
        acquire_time: Some(now()),
        renew_time: Some(now()),
        holder_identity: Some(holder.to_owned()),
        lease_duration_seconds: i32::try_from(DURATION.as_secs()).ok(),
        lease_transitions: Some(transitions),
        ..LeaseSpec::default()
    }
}

fn holder_of(lease: &Lease) -> &str {
    lease.spec.as_ref().and_then(|spec| spec.holder_identity.as_deref()).unwrap_or_default()
}

fn now() -> MicroTime {
    let at = Timestamp::now();
    MicroTime(k8s_openapi::jiff::Timestamp::from_microsecond(at.as_microsecond()).unwrap_or_default())
}

async fn within<T>(attempt: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    let late = || Error::Service(format!("no answer within {} s", ATTEMPT.as_secs()).into());
    timeout(ATTEMPT, attempt).await.unwrap_or_else(|_| Err(late()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_takes_a_lease_is_its_holder_and_the_change_is_counted() {
        let first = taken(None, "one");
        let second = taken(Some(&first), "other");
        assert_eq!((first.lease_transitions, second.lease_transitions), (Some(0), Some(1)));
        let lease = Lease { spec: Some(second), ..Lease::default() };
        assert_eq!((holder_of(&lease), holder_of(&Lease::default())), ("other", ""));
    }

    #[test]
    fn only_who_is_dead_for_sure_is_not_waited_for() {
        let [first, again] = [process_name(Some("one")), process_name(Some("one"))];
        assert!(first != again && is_free(&first, &again) && is_free("", &first));
        assert!(!is_free(&first, &process_name(Some("other"))) && !is_free(&first, &process_name(None)));
        assert!(!is_free(&process_name(None), &process_name(None)), "two of one machine may both live");
    }

    #[test]
    fn a_leader_stops_well_before_its_lease_counts_as_given_up() {
        assert!(RENEWAL + ATTEMPT < DURATION);
    }
}
