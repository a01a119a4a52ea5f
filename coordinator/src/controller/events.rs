//! What a person reads in `kubectl describe`.

use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Client, Resource};
use podferry_common::Failure;
use podferry_crds::{Migration, NodeEvacuation};

use crate::audit::What;
use crate::evacuation::{Evacuation, Outcome, Phase};
use crate::store::Record;

/// Who writes the events.
const CONTROLLER: &str = "podferry-coordinator";
/// Characters of a note: the API server takes 1 KiB, and none of them has more than four bytes.
const MAX_NOTE: usize = 250;

/// Writes events. One that cannot be written is logged: nothing depends on them.
pub(super) struct Events(Recorder);

impl Events {
    pub(super) fn new(client: Client, name: String) -> Self {
        let reporter = Reporter { controller: CONTROLLER.to_owned(), instance: Some(name) };
        Self(Recorder::new(client, reporter))
    }

    /// That a migration begins.
    pub(super) async fn accepted(&self, object: &Migration, record: &Record) {
        let note = format!(
            "{} is moved from {} to {} (migration {})",
            record.workload, record.source, record.target, record.id
        );
        self.publish(object, EventType::Normal, "Accepted", note).await;
    }

    /// That it never will, or not yet.
    pub(super) async fn refused(&self, object: &impl Resource<DynamicType = ()>, reason: &str, failure: &Failure) {
        self.publish(object, EventType::Warning, reason, failure.to_string()).await;
    }

    /// That a node is being emptied.
    pub(super) async fn evacuating(&self, object: &NodeEvacuation, evacuation: &Evacuation) {
        let (id, count) = (evacuation.id, evacuation.entries.len());
        let note = format!("{count} pods are moved away from {} (evacuation {id})", evacuation.node);
        self.publish(object, EventType::Normal, "Accepted", note).await;
    }

    /// How that has ended. Why some pods stay is in its status.
    pub(super) async fn evacuated(&self, object: &NodeEvacuation, evacuation: &Evacuation) {
        let (kind, reason) = match evacuation.phase {
            Phase::Ended(Outcome::Complete) => (EventType::Normal, "Complete"),
            Phase::Ended(Outcome::Cancelled) => (EventType::Normal, "Cancelled"),
            Phase::Ended(Outcome::Incomplete) => (EventType::Warning, "Incomplete"),
            Phase::Running | Phase::Cancelling { .. } => return,
        };
        let wire = evacuation.to_list_entry();
        let trouble = evacuation.trouble.as_ref().map(|failure| format!(": {failure}")).unwrap_or_default();
        let note = format!("{} moved, {} could not be moved{trouble}", wire.moved, wire.failed);
        self.publish(object, kind, reason, note).await;
    }

    /// What has become of it.
    pub(super) async fn became(&self, object: &Migration, what: What, record: &Record) {
        let (source, target) = (&record.source, &record.target);
        let why = record.state.failure().map(ToString::to_string).unwrap_or_default();
        let (kind, reason, note) = match what {
            What::Committed => (EventType::Normal, "Committed", format!("the copy on {target} is the right one now")),
            What::Succeeded => {
                let downtime = record.report.downtime_ms;
                (
                    EventType::Normal,
                    "Succeeded",
                    format!("the pod runs on {target}; it stood still for {downtime:.0} ms"),
                )
            }
            What::RollingBack => (EventType::Warning, "RollingBack", format!("everything is undone: {why}")),
            What::RolledBack => {
                (EventType::Warning, "RolledBack", format!("the pod runs on {source}, as before: {why}"))
            }
            What::Cancelled => (EventType::Normal, "Cancelled", format!("the pod runs on {source}, as before: {why}")),
            What::Failed => (EventType::Warning, "Lost", format!("the pod's memory is lost, it runs nowhere: {why}")),
            What::Accepted | What::Refused | What::TakenUp => return,
        };
        self.publish(object, kind, reason, note).await;
    }

    async fn publish<K: Resource<DynamicType = ()>>(&self, object: &K, type_: EventType, reason: &str, note: String) {
        let note = Some(note.chars().take(MAX_NOTE).collect());
        let event = Event { type_, reason: reason.to_owned(), note, action: "Migrate".to_owned(), secondary: None };
        if let Err(error) = self.0.publish(&event, &object.object_ref(&())).await {
            tracing::warn!(reason, %error, "an event is not written");
        }
    }
}
