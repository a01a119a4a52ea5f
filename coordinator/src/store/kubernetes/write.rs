//! Writes that the API server takes only if nobody else has written meanwhile.
//!
//! Every write of a status names the resourceVersion that it was made from, and its writer. A write that is refused as out of date, or
//! of which no answer came, is followed by a look: the object says who has written its status last. If that is this very write, it
//! went through. If it is the write before, only the rest of the object has changed (somebody set `cancel`, or a label), or the write was
//! lost: it is made again. If it is another one of this process, the object was seen before that. If it is anybody else's, another
//! coordinator leads. What an attempt that was given up may still do later is harmless: its resourceVersion is out of date by then.

use std::fmt::Debug;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use kube::api::{DeleteParams, PostParams, Preconditions};
use kube::{Api, Client, Error, Resource, ResourceExt as _};
use podferry_crds::{
    EVACUATION_ID_ANNOTATION, ID_ANNOTATION, Migration, MigrationStatus, NodeEvacuation, NodeEvacuationStatus, Writer,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::{Instant, sleep, timeout};

use crate::store::StoreError;

/// How long one attempt may take.
const ATTEMPT: Duration = Duration::from_secs(5);
/// How long it is tried. A leader that cannot write its lease for longer has none.
const PATIENCE: Duration = Duration::from_secs(15);
/// The pause between attempts.
const PAUSE: Duration = Duration::from_millis(200);

/// A kind whose status holds a record.
pub(super) trait Kept: Resource<DynamicType = ()> + Clone + Debug + Serialize + DeserializeOwned {
    /// The annotation of one that the coordinator has made itself.
    const ID: &'static str;
    /// Its status.
    type Status;

    /// The objects of this kind: those of a namespace, if it has such.
    fn api(client: Client, namespace: &str) -> Api<Self>;
    /// Who has written its status last.
    fn written_by(&self) -> Option<&Writer>;
    /// It with another status.
    #[must_use]
    fn with(&self, status: Self::Status, writer: Writer) -> Self;
}

impl Kept for Migration {
    const ID: &'static str = ID_ANNOTATION;
    type Status = MigrationStatus;

    fn api(client: Client, namespace: &str) -> Api<Self> {
        Api::namespaced(client, namespace)
    }

    fn written_by(&self) -> Option<&Writer> {
        self.status.as_ref()?.written_by.as_ref()
    }

    fn with(&self, status: MigrationStatus, writer: Writer) -> Self {
        let status = MigrationStatus { written_by: Some(writer), ..status };
        Self { metadata: self.metadata.clone(), spec: self.spec.clone(), status: Some(status) }
    }
}

impl Kept for NodeEvacuation {
    const ID: &'static str = EVACUATION_ID_ANNOTATION;
    type Status = NodeEvacuationStatus;

    fn api(client: Client, _: &str) -> Api<Self> {
        Api::all(client)
    }

    fn written_by(&self) -> Option<&Writer> {
        self.status.as_ref()?.written_by.as_ref()
    }

    fn with(&self, status: NodeEvacuationStatus, writer: Writer) -> Self {
        let status = NodeEvacuationStatus { written_by: Some(writer), ..status };
        Self { metadata: self.metadata.clone(), spec: self.spec.clone(), status: Some(status) }
    }
}

/// Why something was not written.
pub(super) enum Unwritten {
    /// The API server says that it will never take it.
    Refused(Box<Error>),
    /// The object is gone.
    Gone,
    /// This process has written it since it was seen.
    Stale,
    /// Whether it was written is not known, or another coordinator leads.
    Store(StoreError),
}

impl Unwritten {
    /// For those who cannot go on without.
    pub(super) fn fatal(self, action: &'static str, object: &impl Kept) -> StoreError {
        match self {
            Self::Store(error) => error,
            Self::Refused(source) => StoreError::Api { action, source },
            Self::Gone => StoreError::Deposed { object: title(object), by: "whoever has deleted it".to_owned() },
            Self::Stale => StoreError::Stale { object: title(object) },
        }
    }
}

/// Who writes, and where.
pub(super) struct Pen {
    pub(super) client: Client,
    /// This process, as no other one is called.
    pub(super) writer: String,
    /// How many writes it has begun: no two are taken for the same.
    pub(super) begun: AtomicI64,
}

/// When to give up.
struct Patience {
    until: Instant,
    action: &'static str,
}

impl Patience {
    fn new(action: &'static str) -> Self {
        Self { until: Instant::now() + PATIENCE, action }
    }

    /// Waits for another attempt, if there is time for one.
    async fn after(&self, error: Error) -> Result<(), Unwritten> {
        if Instant::now() >= self.until && is_forbidden(&error) {
            return Err(Unwritten::Refused(Box::new(error)));
        }
        if Instant::now() >= self.until {
            return Err(Unwritten::Store(StoreError::Api { action: self.action, source: Box::new(error) }));
        }
        tracing::warn!(action = self.action, %error, "the API server has not done it: trying again");
        sleep(PAUSE).await;
        Ok(())
    }
}

impl Pen {
    pub(super) fn new(client: Client, writer: &str) -> Self {
        Self { client, writer: writer.to_owned(), begun: AtomicI64::new(0) }
    }

    pub(super) fn api<K: Kept>(&self, namespace: &str) -> Api<K> {
        K::api(self.client.clone(), namespace)
    }

    /// Writes the status of an object that was last seen like this; then it is as it was written.
    pub(super) async fn write<K: Kept>(&self, object: &mut K, status: K::Status) -> Result<(), Unwritten> {
        let patience = Patience::new("write a record");
        let before = object.written_by().cloned();
        let sequence = self.begun.fetch_add(1, Ordering::Relaxed) + 1;
        let writer = Writer { coordinator: self.writer.clone(), sequence };
        let mut wanted = object.with(status, writer.clone());
        // They only make the message larger.
        wanted.meta_mut().managed_fields = None;
        let (api, name) = (self.api::<K>(&namespace(object)), object.name_any());
        let mut overtaken = false;
        loop {
            let error = match within(api.replace_status(&name, &PostParams::default(), &wanted)).await {
                Ok(written) => {
                    *object = written;
                    return Ok(());
                }
                Err(error) if is_for_good(&error) => return Err(Unwritten::Refused(Box::new(error))),
                Err(error) => error,
            };
            // Who was overtaken by a change of the rest of the object need not wait, once.
            if !is_conflict(&error) || std::mem::replace(&mut overtaken, true) {
                patience.after(error).await?;
            }
            let found = self.look(&api, &name, object, &patience).await?;
            let by = found.written_by().cloned();
            if by.as_ref() == Some(&writer) {
                *object = found;
                return Ok(());
            }
            if by != before {
                return Err(self.written_by_another(object, by));
            }
            wanted.meta_mut().resource_version = found.resource_version();
        }
    }

    fn written_by_another(&self, object: &impl Kept, by: Option<Writer>) -> Unwritten {
        let by = by.map_or_else(|| "nobody known".to_owned(), |writer| writer.coordinator);
        if by == self.writer {
            return Unwritten::Stale;
        }
        Unwritten::Store(StoreError::Deposed { object: title(object), by })
    }

    async fn look<K: Kept>(&self, api: &Api<K>, name: &str, object: &K, patience: &Patience) -> Result<K, Unwritten> {
        loop {
            match within(api.get_opt(name)).await {
                Ok(Some(found)) if found.uid() == object.uid() => return Ok(found),
                Ok(_) => return Err(Unwritten::Gone),
                Err(error) if is_for_good(&error) => return Err(Unwritten::Refused(Box::new(error))),
                Err(error) => patience.after(error).await?,
            }
        }
    }

    /// Writes the status that an object is to have. Where somebody has torn it away the record must not be lost with it: another one is made.
    pub(super) async fn write_surely<K: Kept>(
        &self,
        object: &mut K,
        status: impl Fn(&K) -> Result<K::Status, StoreError>,
        another: impl FnOnce() -> K,
    ) -> Result<(), Unwritten> {
        let wanted = status(object).map_err(Unwritten::Store)?;
        match self.write(object, wanted).await {
            Err(Unwritten::Gone) => {}
            written => return written,
        }
        tracing::error!(object = title(object), "the object was deleted: making another");
        *object = self.make(&another()).await?;
        let wanted = status(object).map_err(Unwritten::Store)?;
        self.write(object, wanted).await
    }

    /// Deletes an object that is not needed any more. Whether it is gone, or another has its name.
    pub(super) async fn delete<K: Kept>(&self, namespace: &str, name: &str, uid: String) -> bool {
        let preconditions = Some(Preconditions { uid: Some(uid), resource_version: None });
        let parameters = DeleteParams { preconditions, ..DeleteParams::default() };
        match self.api::<K>(namespace).delete(name, &parameters).await {
            Ok(_) => true,
            Err(Error::Api(status)) if [404, 409].contains(&status.code) => true,
            Err(error) => {
                tracing::warn!(kind = %K::kind(&()), name, %error, "an old object is not deleted yet");
                false
            }
        }
    }

    /// Makes an object of what was not asked for by one.
    pub(super) async fn make<K: Kept>(&self, object: &K) -> Result<K, Unwritten> {
        let patience = Patience::new("make an object");
        let (api, name) = (self.api::<K>(&namespace(object)), object.name_any());
        loop {
            let error = match within(api.create(&PostParams::default(), object)).await {
                Ok(made) => return Ok(made),
                Err(Error::Api(status)) if status.is_already_exists() => {
                    return self.made_before(&api, &name, object, *status).await;
                }
                Err(error) if is_for_good(&error) => return Err(Unwritten::Refused(Box::new(error))),
                Err(error) => error,
            };
            patience.after(error).await?;
        }
    }

    /// An attempt that was given up may have made it after all.
    async fn made_before<K: Kept>(
        &self,
        api: &Api<K>,
        name: &str,
        object: &K,
        status: kube::core::Status,
    ) -> Result<K, Unwritten> {
        let id = |object: &K| object.annotations().get(K::ID).cloned();
        match within(api.get_opt(name)).await {
            Ok(Some(found)) if id(&found) == id(object) => match found.written_by().cloned() {
                Some(by) if by.coordinator != self.writer => Err(self.written_by_another(object, Some(by))),
                _ => Ok(found),
            },
            _ => Err(Unwritten::Refused(Box::new(Error::Api(Box::new(status))))),
        }
    }
}

/// Kind, namespace and name of an object, for a person.
pub(super) fn title<K: Kept>(object: &K) -> String {
    let namespace = object.namespace().map(|namespace| format!("{namespace}/")).unwrap_or_default();
    format!("{} {namespace}{}", K::kind(&()), object.name_any())
}

pub(super) fn namespace(object: &impl Kept) -> String {
    object.namespace().unwrap_or_default()
}

async fn within<T>(attempt: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    let late = || Error::Service(format!("no answer within {} s", ATTEMPT.as_secs()).into());
    timeout(ATTEMPT, attempt).await.unwrap_or_else(|_| Err(late()))
}

fn is_conflict(error: &Error) -> bool {
    matches!(error, Error::Api(status) if status.code == 409)
}

/// An API server that has just been started forbids everything until it has read who may do what.
fn is_forbidden(error: &Error) -> bool {
    matches!(error, Error::Api(status) if [401, 403].contains(&status.code))
}

/// Whether the same request would be refused again, whatever happens meanwhile. What is out of date, or gone, is looked at first; what is
/// forbidden is tried again.
fn is_for_good(error: &Error) -> bool {
    let Error::Api(status) = error else { return false };
    let causes = status.details.iter().flat_map(|details| &details.causes);
    let ends = causes.into_iter().any(|cause| cause.reason == "NamespaceTerminating");
    ends || ((400..500).contains(&status.code) && ![401, 403, 404, 408, 409, 429].contains(&status.code))
}

#[cfg(test)]
mod tests {
    use kube::core::Status;

    use super::*;

    #[test]
    fn only_what_would_be_refused_again_is_given_up_at_once() {
        let answer = |code| Error::Api(Box::new(Status { code, ..Status::failure("no", "No") }));
        assert!([400, 413, 422].into_iter().all(|code| is_for_good(&answer(code))));
        assert!(![403, 404, 409, 429, 500, 503, 504].into_iter().any(|code| is_for_good(&answer(code))));
        assert!(is_conflict(&answer(409)) && !is_conflict(&answer(404)));
    }
}
