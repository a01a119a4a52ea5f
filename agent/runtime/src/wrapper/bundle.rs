//! What a bundle says of its pod, and the marks that the wrapper leaves.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;

/// The pod's annotation that names the migration by which it comes.
pub const MIGRATION: &str = "podferry.dev/migration";
/// What containerd and CRI-O (under its own prefix) write into every `config.json`.
const CRI: [&str; 2] = ["io.kubernetes.cri.", "io.kubernetes.cri-o."];
/// Beside the sandbox's bundle, with the container's name behind it: this container has come, and does not come again.
pub const ARRIVED_MARK: &str = "podferry-arrived-";
/// In runc's folder of a container: it was restored, and so runs.
const RESTORED_MARK: &str = "podferry-restored";

/// What of a `config.json` is read here; the rest is runc's.
#[derive(Deserialize)]
struct Config {
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

/// A pod's container, as its bundle's annotations have it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodContainer {
    /// The pod's namespace,
    pub namespace: String,
    /// name,
    pub pod: String,
    /// and uid.
    pub uid: String,
    /// The container's name in the pod.
    pub container: String,
    /// The id of the pod's sandbox.
    pub sandbox: String,
    /// The migration by which it comes, if it comes by one.
    pub migration: Option<String>,
}

impl PodContainer {
    /// That of a bundle; none when it is a sandbox's, or no pod's at all.
    ///
    /// # Errors
    /// When its configuration cannot be read.
    pub fn of_bundle(bundle: &Path) -> io::Result<Option<Self>> {
        let text = fs::read(bundle.join("config.json"))?;
        let config: Config = serde_json::from_slice(&text)?;
        Ok(Self::of(&config.annotations))
    }

    /// That of a `config.json` with these annotations.
    pub fn of(annotations: &BTreeMap<String, String>) -> Option<Self> {
        let migration = annotations.get(MIGRATION).filter(|id| !id.is_empty()).cloned();
        containerd(annotations).or_else(|| crio(annotations)).map(|found| Self { migration, ..found })
    }
}

/// The pod's uid when these annotations are its sandbox's.
pub(super) fn uid_of_sandbox(annotations: &BTreeMap<String, String>) -> Option<String> {
    let of = |name: &str| annotations.get(name).cloned();
    let is = |name: &str| of(name).is_some_and(|kind| kind == "sandbox");
    if is("io.kubernetes.cri.container-type") {
        return of("io.kubernetes.cri.sandbox-uid");
    }
    is("io.kubernetes.cri-o.ContainerType").then(|| of("io.kubernetes.cri-o.Labels")).flatten().and_then(|labels| {
        let labels: BTreeMap<String, String> = serde_json::from_str(&labels).ok()?;
        labels.get("io.kubernetes.pod.uid").cloned()
    })
}

fn containerd(annotations: &BTreeMap<String, String>) -> Option<PodContainer> {
    let of = |name: &str| annotations.get(&format!("{}{name}", CRI[0])).cloned();
    of("container-type").filter(|kind| kind == "container")?;
    Some(PodContainer {
        namespace: of("sandbox-namespace")?,
        pod: of("sandbox-name")?,
        uid: of("sandbox-uid")?,
        container: of("container-name")?,
        sandbox: of("sandbox-id")?,
        migration: None,
    })
}

/// CRI-O keeps the kubelet's own labels as JSON beside its words (`pkg/annotations`).
fn crio(annotations: &BTreeMap<String, String>) -> Option<PodContainer> {
    let of = |name: &str| annotations.get(&format!("{}{name}", CRI[1])).cloned();
    of("ContainerType").filter(|kind| kind == "container")?;
    let labels: BTreeMap<String, String> = serde_json::from_str(&of("Labels")?).ok()?;
    let label = |name: &str| labels.get(&format!("io.kubernetes.{name}")).cloned();
    Some(PodContainer {
        namespace: label("pod.namespace")?,
        pod: label("pod.name")?,
        uid: label("pod.uid")?,
        container: label("container.name")?,
        sandbox: of("SandboxID")?,
        migration: None,
    })
}

/// The folder of a pod's sandbox. containerd has its bundles side by side, CRI-O each as `ID/userdata`.
fn sandbox_of(bundle: &Path, sandbox: &str) -> PathBuf {
    match bundle.parent() {
        Some(folder) if bundle.ends_with("userdata") => folder.with_file_name(sandbox).join("userdata"),
        _ => bundle.with_file_name(sandbox),
    }
}

/// The wrapper's marks of one container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mark {
    arrived: PathBuf,
    restored: PathBuf,
}

impl Mark {
    /// Those of a container with this bundle, which runc keeps below `root`. Sandboxes' bundles are beside the containers': they
    /// live as long as the pod is on this node and up.
    pub fn of(bundle: &Path, root: &Path, id: &str, container: &PodContainer) -> Self {
        let sandbox = sandbox_of(bundle, &container.sandbox);
        Self {
            arrived: sandbox.join(format!("{ARRIVED_MARK}{}", container.container)),
            restored: root.join(id).join(RESTORED_MARK),
        }
    }

    /// Whether it has come already.
    pub fn has_arrived(&self) -> bool {
        self.arrived.exists()
    }

    /// It has come, and runs. Where that cannot be written down it has all the same: the agent knows it, too.
    pub fn set(&self) {
        for mark in [&self.restored, &self.arrived] {
            let _known_to_the_agent = fs::write(mark, "");
        }
    }

    /// Whether a container that runc keeps below `root` was restored.
    pub fn was_restored(root: &Path, id: &str) -> bool {
        !id.contains('/') && root.join(id).join(RESTORED_MARK).exists()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn annotations(kind: &str) -> BTreeMap<String, String> {
        let words = [
            ("container-type", kind),
            ("container-name", "redis"),
            ("sandbox-id", "5a4d"),
            ("sandbox-name", "redis-0"),
            ("sandbox-namespace", "shop"),
            ("sandbox-uid", "u-1"),
        ];
        words.map(|(name, value)| (format!("io.kubernetes.cri.{name}"), value.to_owned())).into()
    }

    #[test]
    fn a_container_of_a_pod_is_known_with_either_runtime_and_a_sandbox_is_none() {
        let mut words = annotations("container");
        let found = PodContainer::of(&words).unwrap();
        assert_eq!((found.namespace.as_str(), found.pod.as_str(), found.uid.as_str()), ("shop", "redis-0", "u-1"));
        assert_eq!((found.container.as_str(), found.migration), ("redis", None));
        words.insert(MIGRATION.to_owned(), "m".to_owned());
        assert_eq!(PodContainer::of(&words).unwrap().migration.as_deref(), Some("m"));
        assert_eq!(PodContainer::of(&annotations("sandbox")), None);
        assert_eq!(PodContainer::of(&BTreeMap::new()), None);
        let crio = [
            ("io.kubernetes.cri-o.ContainerType", "container"),
            ("io.kubernetes.cri-o.SandboxID", "5a4d"),
            (
                "io.kubernetes.cri-o.Labels",
                r#"{"io.kubernetes.pod.namespace":"shop","io.kubernetes.pod.name":"redis-0","io.kubernetes.pod.uid":"u-1","io.kubernetes.container.name":"redis"}"#,
            ),
        ];
        let crio = crio.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        assert_eq!(PodContainer::of(&crio), Some(found_without(&annotations("container"))));
        assert_eq!(uid_of_sandbox(&crio), None);
    }

    #[test]
    fn a_sandbox_says_whose_it_is_with_either_runtime_and_a_container_is_none() {
        assert_eq!(uid_of_sandbox(&annotations("sandbox")).as_deref(), Some("u-1"));
        assert_eq!(uid_of_sandbox(&annotations("container")), None);
        let crio = [
            ("io.kubernetes.cri-o.ContainerType", "sandbox"),
            ("io.kubernetes.cri-o.Labels", r#"{"io.kubernetes.pod.uid":"u-1","io.kubernetes.container.name":"POD"}"#),
        ];
        let crio = crio.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        assert_eq!(uid_of_sandbox(&crio).as_deref(), Some("u-1"));
    }

    fn found_without(words: &BTreeMap<String, String>) -> PodContainer {
        PodContainer::of(words).unwrap()
    }

    #[test]
    fn sandboxes_are_found_beside_their_containers() {
        let containerd = Path::new("/run/containerd/io.containerd.runtime.v2.task/k8s.io/c1");
        assert_eq!(sandbox_of(containerd, "s1"), containerd.with_file_name("s1"));
        let crio = Path::new("/run/containers/storage/overlay-containers/c1/userdata");
        assert_eq!(sandbox_of(crio, "s1"), Path::new("/run/containers/storage/overlay-containers/s1/userdata"));
    }

    #[test]
    fn what_has_come_is_marked_for_as_long_as_its_pod_is_here() {
        let folder = tempfile::tempdir().unwrap();
        let (bundle, root) = (folder.path().join("k8s.io/c1"), folder.path().join("runc"));
        for dir in [&bundle, &folder.path().join("k8s.io/5a4d"), &root.join("c1"), &root.join("c2")] {
            fs::create_dir_all(dir).unwrap();
        }
        let container = found_without(&annotations("container"));
        let mark = Mark::of(&bundle, &root, "c1", &container);
        assert!(!mark.has_arrived() && !Mark::was_restored(&root, "c1"));
        mark.set();
        assert!(mark.has_arrived() && Mark::was_restored(&root, "c1"));
        let again = Mark::of(&bundle.with_file_name("c2"), &root, "c2", &container);
        assert!(again.has_arrived(), "the same container of the same pod, started again");
        assert!(!Mark::was_restored(&root, "c2"));
    }
}
