//! Which object is about which workload.

use podferry_common::WorkloadName;

/// What stands between a pod's namespace and its name in the name of a workload.
const POD_SEPARATOR: char = '/';

/// Bytes of the name of a pod or node that are taken: with the rest that makes a name that is short enough.
const MAX_NAME: usize = 200;
/// Digits of an id that tell those of one pod or node apart. The last ones: the first are the time.
const DIGITS: usize = 10;

/// The workload that a pod is.
pub fn workload_of(namespace: &str, pod: &str) -> String {
    format!("{namespace}{POD_SEPARATOR}{pod}")
}

/// Namespace and name of the pod that a workload is. One that is no pod counts as one of the coordinator's own namespace.
pub fn home_of<'a>(workload: &'a WorkloadName, own: &'a str) -> (&'a str, &'a str) {
    pod_of(workload.as_str()).unwrap_or((own, workload.as_str()))
}

/// Namespace and name of the pod that a workload is; none when it is no pod.
pub(crate) fn pod_of(workload: &str) -> Option<(&str, &str)> {
    workload.split_once(POD_SEPARATOR)
}

/// What the object of a migration, or an evacuation, is called that was not asked for by an object. `of` is the pod or node.
pub(super) fn object_name(of: &str, id: &str) -> String {
    let of = of[..of.len().min(MAX_NAME)].trim_end_matches(['-', '.']);
    format!("{of}-{}", &id[id.len() - DIGITS..])
}

#[cfg(test)]
mod tests {
    use podferry_common::MigrationId;

    use super::*;

    #[test]
    fn a_pod_is_found_again_by_its_workload() {
        let workload: WorkloadName = workload_of("shop", "cart-0.x").parse().unwrap();
        assert_eq!(home_of(&workload, "podferry"), ("shop", "cart-0.x"));
        assert_eq!(home_of(&"redis".parse().unwrap(), "podferry"), ("podferry", "redis"));
    }

    #[test]
    fn objects_of_one_pod_have_names_of_their_own() {
        let (one, other) = (MigrationId::new().to_string(), MigrationId::new().to_string());
        assert_ne!(object_name("cart-0", &one), object_name("cart-0", &other));
        let long = object_name(&format!("{}.b", "a".repeat(199)), &one);
        assert!(long.len() < 253 && !long.contains(".-"), "{long}");
    }
}
