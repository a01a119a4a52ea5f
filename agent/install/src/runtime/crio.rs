//! CRI-O: drop-ins in `/etc/crio/crio.conf.d`, of which the last one counts, key by key.

use std::path::{Path, PathBuf};

use toml::{Table, Value};

use crate::error::{Error, Result};
use crate::host::Host;
use crate::runtime::containerd::{find, parse};
use crate::runtime::{Edit, HANDLER, Plan, find_runc};

const MAIN: &str = "/etc/crio/crio.conf";
const FOLDER: &str = "/etc/crio/crio.conf.d";
const OURS: &str = "99-podferry.conf";
const CONTAINERS: &str = "/run/containers/storage/overlay-containers";

pub(super) fn plan(host: &Host, wrapper: &Path) -> Result<Plan> {
    let files = load(host)?;
    let own = Own::find(&files)?;
    let runc = find_runc(host, own.path.as_deref())?;
    let root =
        own.table.get("runtime_root").and_then(Value::as_str).filter(|root| !root.is_empty()).unwrap_or("/run/runc");
    let runc_root = PathBuf::from(root);
    let mut handler = own.table;
    handler.insert("runtime_path".to_owned(), Value::String(wrapper.display().to_string()));
    handler.insert("runtime_type".to_owned(), Value::String("oci".to_owned()));
    handler.insert("runtime_root".to_owned(), Value::String(runc_root.display().to_string()));
    let content = nested(&["crio", "runtime", "runtimes", HANDLER], handler);
    let content = format!("# Written by podferry-install, removed by `podferry-install uninstall`.\n{content}");
    Ok(Plan { edit: Edit::File { path: Path::new(FOLDER).join(OURS), content }, runc, runc_root })
}

/// The node's own handler that runs runc.
struct Own {
    table: Table,
    path: Option<String>,
}

impl Own {
    /// The default handler, if it is runc's, else the one called `runc`, else CRI-O's own defaults with a runc that has to be
    /// found.
    fn find(files: &[Table]) -> Result<Self> {
        let lookup = |keys: &[&str]| files.iter().rev().find_map(|file| find(file, keys));
        let default = lookup(&["crio", "runtime", "default_runtime"]).and_then(Value::as_str).unwrap_or("runc");
        let named = |name: &str| lookup(&["crio", "runtime", "runtimes", name]).and_then(Value::as_table).cloned();
        for (name, table) in [default, "runc"].into_iter().filter_map(|name| named(name).map(|table| (name, table))) {
            let path = table.get("runtime_path").and_then(Value::as_str).unwrap_or(name);
            let is_vm = table.get("runtime_type").and_then(Value::as_str) == Some("vm");
            if is_runc(path) && !is_vm {
                let path = Some(path.to_owned());
                return Ok(Self { table, path });
            }
        }
        // A table for runc that runs something else was made on purpose.
        if let Some(table) = named("runc") {
            let found =
                table.get("runtime_path").map_or_else(|| "runc of another type".to_owned(), ToString::to_string);
            return Err(Error::NotRunc { found });
        }
        Ok(Self { table: Table::new(), path: None })
    }
}

fn is_runc(path: &str) -> bool {
    Path::new(path).file_name().is_some_and(|name| name == "runc")
}

/// All files but ours, also one of ours that is not written whole, in CRI-O's order.
fn load(host: &Host) -> Result<Vec<Table>> {
    let drop_ins =
        host.names(FOLDER)?.into_iter().filter(|name| !name.starts_with(OURS)).map(|name| Path::new(FOLDER).join(name));
    let paths = std::iter::once(PathBuf::from(MAIN)).chain(drop_ins);
    let mut files = Vec::new();
    for path in paths {
        let Some(text) = host.text(&path)? else { continue };
        let file = parse(&path, &text)?;
        if find(&file, &["crio", "runtime", "runtimes", HANDLER]).is_some() {
            return Err(Error::ForeignHandler { path });
        }
        files.push(file);
    }
    Ok(files)
}

/// A table below these keys, as TOML.
pub(super) fn nested(keys: &[&str], table: Table) -> String {
    let wrap = |inner: Table, key: &&str| Table::from_iter([((*key).to_owned(), Value::Table(inner))]);
    keys.iter().rev().fold(table, wrap).to_string()
}

/// CRI-O notes a container's handler in its `config.json`.
pub(super) fn containers_of_handler(host: &Host) -> Result<usize> {
    let mut count = 0;
    for id in host.names(CONTAINERS)? {
        let text = host.text(Path::new(CONTAINERS).join(id).join("userdata/config.json"))?.unwrap_or_default();
        let config: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
        count += usize::from(config["annotations"]["io.kubernetes.cri-o.RuntimeHandler"] == HANDLER);
    }
    Ok(count)
}
