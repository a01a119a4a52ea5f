//! The node's `agent.toml`.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use toml::{Table, Value};

use crate::error::{Error, Result};
use crate::runtime::find;

/// Where it is on the node.
pub(crate) const PATH: &str = "/etc/podferry/agent.toml";
/// The folder of the node's certificate.
pub(crate) const IDENTITY: &str = "/etc/podferry/tls";
/// For the agent's journal.
pub(crate) const STATE: &str = "/var/lib/podferry";
/// For images under way; the agent mounts a tmpfs there.
pub(crate) const IMAGES: &str = "/run/podferry-images";
/// For sockets.
pub(crate) const SOCKETS: &str = "/run/podferry";

/// Where the agent listens for the OCI wrapper.
pub(crate) const SOCKET: &str = "/run/podferry/runtime.sock";
/// Where pods that move away are noted for the OCI wrapper, by their uid.
pub(crate) const FENCES: &str = "/var/lib/podferry/fenced";

/// What nobody else may set: the OCI wrapper is told the same paths, and uninstalling removes these folders and no others.
const DECIDED: [&str; 6] =
    ["state_dir", "images_dir", "runtime_dir", "runtime.logs_dir", "kubernetes.socket", "kubernetes.fence_dir"];

/// What differs between nodes.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// The node's name.
    pub node: String,
    /// Where the agent listens.
    pub listen: SocketAddr,
    /// Where Prometheus may read figures.
    pub metrics_listen: Option<SocketAddr>,
    /// host:port of the coordinator. The agent resolves names as the node does, which knows no Services: give an address.
    pub coordinator: String,
    /// Further settings, laid over these: a document as `agent.toml` has it.
    pub extra: Table,
}

/// Refuses further settings that are the installer's to decide.
pub(crate) fn refuse_decided(extra: &Table) -> Result<()> {
    let is_set = |key: &&str| find(extra, &key.split('.').collect::<Vec<_>>()).is_some();
    let keys: Vec<&str> = DECIDED.into_iter().filter(is_set).collect();
    if keys.is_empty() { Ok(()) } else { Err(Error::Decided { keys: keys.join(", ") }) }
}

/// The file's content. `bundle` is the bundle's folder on the node.
pub(crate) fn render(settings: &Settings, bundle: &Path, runc: &Path, runc_root: &Path, layers_dir: &str) -> String {
    let text = |value: &str| Value::String(value.to_owned());
    let path = |path: PathBuf| Value::String(path.display().to_string());
    let mut document = Table::new();
    document.insert("node".to_owned(), text(&settings.node));
    document.insert("listen".to_owned(), text(&settings.listen.to_string()));
    if let Some(metrics) = settings.metrics_listen {
        document.insert("metrics_listen".to_owned(), text(&metrics.to_string()));
    }
    document.insert("coordinator".to_owned(), text(&settings.coordinator));
    document.insert("state_dir".to_owned(), text(STATE));
    document.insert("images_dir".to_owned(), text(IMAGES));
    document.insert("runtime_dir".to_owned(), text(SOCKETS));
    let identity = [("ca", "ca.pem"), ("certificate", "cert.pem"), ("key", "key.pem")];
    let identity = identity.map(|(key, file)| (key.to_owned(), path(Path::new(IDENTITY).join(file))));
    document.insert("identity".to_owned(), Value::Table(Table::from_iter(identity)));
    let bin = |name: &str| path(bundle.join("bin").join(name));
    let tools = [
        ("criu", path(bundle.join("tools/bin/criu"))),
        ("runc", path(runc.to_owned())),
        ("hook", bin("podferry-hook")),
        ("stdio_keeper", bin("podferry-stdio-keeper")),
        ("dump_worker", bin("podferry-dump-worker")),
        ("pager", bin("podferry-pager")),
        ("tar", bin("podferry-tar")),
        ("criu_shim", bin("libpodferry_criu_shim.so")),
    ];
    let tools = tools.map(|(key, value)| (key.to_owned(), value));
    document.insert("tools".to_owned(), Value::Table(Table::from_iter(tools)));
    let mut runtime = Table::new();
    runtime.insert("roots".to_owned(), Value::Array(vec![path(runc_root.to_owned())]));
    runtime.insert("bundles_dir".to_owned(), path(Path::new(STATE).join("bundles")));
    runtime.insert("logs_dir".to_owned(), path(Path::new(STATE).join("logs")));
    runtime.insert("volume_dirs".to_owned(), Value::Array(Vec::new()));
    document.insert("runtime".to_owned(), Value::Table(runtime));
    let kubernetes = [("socket", SOCKET), ("fence_dir", FENCES), ("layers_dir", layers_dir)];
    let kubernetes = kubernetes.map(|(key, value)| (key.to_owned(), text(value)));
    document.insert("kubernetes".to_owned(), Value::Table(Table::from_iter(kubernetes)));
    lay_over(&mut document, settings.extra.clone());
    format!(
        "# Written by podferry-install; changes are lost. The chart's value agent.config is laid over it.\n{document}"
    )
}

/// Tables are merged, all else is replaced.
fn lay_over(document: &mut Table, extra: Table) {
    for (key, value) in extra {
        match (document.get_mut(&key), value) {
            (Some(Value::Table(below)), Value::Table(above)) => lay_over(below, above),
            (_, value) => {
                document.insert(key, value);
            }
        }
    }
}
