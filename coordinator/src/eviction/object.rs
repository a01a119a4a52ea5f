//! The `Migration` that an eviction asks for.
//!
//! It is called by the pod's uid, so however often, and with however many coordinators, a pod is evicted, there is one. It is what all of them
//! remember: when the first eviction was put off, and that it was tried. It goes some time after its end, and with it that memory.

use jiff::Timestamp;
use kube::ResourceExt as _;
use podferry_crds::{EVICTED_BY_ANNOTATION, EVICTED_LABEL, Migration, MigrationSpec};

use super::decide::Attempt;

/// Seconds that it stays when it has ended: for so long a pod whose migration came to nothing is evicted at once.
pub(super) const REMEMBERED_S: i32 = 3600;
/// Phases that come to nothing.
const FAILED: [&str; 3] = ["failed", "cancelled", "refused"];

/// What the `Migration` of an eviction of that pod is called.
pub(super) fn name(uid: &str) -> String {
    format!("evicted-{uid}")
}

/// The `Migration` of an eviction of that pod, by whom.
pub(super) fn object(pod: &str, uid: &str, evictor: &str) -> Migration {
    let spec = MigrationSpec {
        pod_name: pod.to_owned(),
        ttl_seconds_after_finished: Some(REMEMBERED_S),
        ..MigrationSpec::default()
    };
    let mut object = Migration::new(&name(uid), spec);
    object.labels_mut().insert(EVICTED_LABEL.to_owned(), uid.to_owned());
    object.annotations_mut().insert(EVICTED_BY_ANNOTATION.to_owned(), evictor.to_owned());
    object
}

/// What has come of it so far.
pub(super) fn attempt(object: &Migration, now: Timestamp) -> Attempt {
    let made_at = object.metadata.creation_timestamp.as_ref().map(|at| at.0.as_second());
    let status = object.status.as_ref();
    let failed = status.filter(|status| FAILED.contains(&status.phase.as_str()));
    Attempt {
        title: title(&object.name_any()),
        begun_at: made_at.and_then(|second| Timestamp::from_second(second).ok()).unwrap_or(now),
        failed: failed.map(|status| status.reason.clone()),
    }
}

/// How a `Migration` is spoken of.
pub(super) fn title(name: &str) -> String {
    format!("Migration {name}")
}

#[cfg(test)]
mod tests {
    use podferry_crds::{MigrationStatus, Wishes};

    use super::*;

    #[test]
    fn it_asks_for_nothing_but_the_pod_and_says_by_whom_it_comes() {
        let object = object("web-1", "u-1", "system:serviceaccount:kube-system:karpenter");
        assert_eq!((object.name_any().as_str(), object.spec.pod_name.as_str()), ("evicted-u-1", "web-1"));
        assert_eq!((&object.spec.target_node, &object.spec.wishes), (&None, &Wishes::default()));
        assert_eq!(object.spec.ttl_seconds_after_finished, Some(REMEMBERED_S));
        assert_eq!(object.labels()["podferry.dev/evicted-pod"], "u-1");
        assert_eq!(object.annotations()["podferry.dev/evicted-by"], "system:serviceaccount:kube-system:karpenter");
    }

    #[test]
    fn only_what_has_come_to_nothing_has_failed() {
        let now = Timestamp::from_second(1_000_000).unwrap();
        let of = |phase: &str| {
            let mut object = object("web-1", "u-1", "ada");
            let (phase, reason) = (phase.to_owned(), "no room".to_owned());
            object.status = Some(MigrationStatus { phase, reason, ..MigrationStatus::default() });
            attempt(&object, now).failed
        };
        for phase in ["failed", "cancelled", "refused"] {
            assert_eq!(of(phase).as_deref(), Some("no room"), "{phase}");
        }
        // The pod of one that has succeeded is about to be deleted.
        for phase in ["", "pending", "preflight", "precopy", "commit", "rolling_back", "succeeded"] {
            assert_eq!(of(phase), None, "{phase}");
        }
        assert_eq!(attempt(&object("web-1", "u-1", "ada"), now).begun_at, now);
    }
}
