//! Which object is about which workload.

use podferry_common::{MigrationId, WorkloadName};

/// What stands between a pod's namespace and its name in the name of a workload.
const POD_SEPARATOR: char = '/';

/// Bytes of a pod's name that are taken into the name of its migration: with the rest that makes a name that is short enough.
const MAX_POD: usize = 200;
/// Digits of an id that tell migrations of one pod apart. The last ones: the first are the time.
const DIGITS: usize = 10;

/// The workload that a pod is.
pub fn workload_of(namespace: &str, pod: &str) -> String {
    format!("{namespace}{POD_SEPARATOR}{pod}")
}

/// Namespace and name of the pod that a workload is. One that is no pod counts as one of the coordinator's own namespace.
pub fn home_of<'a>(workload: &'a WorkloadName, own: &'a str) -> (&'a str, &'a str) {
    workload.as_str().split_once(POD_SEPARATOR).unwrap_or((own, workload.as_str()))
}

/// What the object of a migration is called that was not asked for by an object.
pub(super) fn object_name(pod: &str, id: MigrationId) -> String {
    let id = id.to_string();
    let pod = pod[..pod.len().min(MAX_POD)].trim_end_matches(['-', '.']);
    format!("{pod}-{}", &id[id.len() - DIGITS..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_is_found_again_by_its_workload() {
        let workload: WorkloadName = workload_of("shop", "cart-0.x").parse().unwrap();
        assert_eq!(home_of(&workload, "podferry"), ("shop", "cart-0.x"));
        assert_eq!(home_of(&"redis".parse().unwrap(), "podferry"), ("podferry", "redis"));
    }

    #[test]
    fn objects_of_one_pod_have_names_of_their_own() {
        let (one, other) = (MigrationId::new(), MigrationId::new());
        assert_ne!(object_name("cart-0", one), object_name("cart-0", other));
        let long = object_name(&format!("{}.b", "a".repeat(199)), one);
        assert!(long.len() < 253 && !long.contains(".-"), "{long}");
    }
}
