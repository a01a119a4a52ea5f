//! containerd, also the one in K3s and RKE2.
//!
//! A drop-in of our own is taken where it is safe: for configurations of version 3 whose `imports` read the drop-in's folder.
//! containerd 1.7 puts the CRI plugin's section of a later file in place of the whole section of an earlier one, so that a drop-in with
//! one handler would make it forget all others, the sandbox image, and the registries
//! (`mergeConfig` in `services/server/config/config.go`; containerd 2 merges them). A configuration of version 2 may be read by either, so it gets a
//! block at the end of the file whose section counts. So does one of version 3 that imports nothing.

use std::path::{Path, PathBuf};

use toml::{Table, Value};

use crate::block;
use crate::error::{Error, Result};
use crate::host::Host;
use crate::runtime::crio::nested;
use crate::runtime::{ANNOTATIONS, Edit, HANDLER, Plan, Runtime, find_runc};

const MAIN: &str = "/etc/containerd/config.toml";
const DROP_IN: &str = "podferry.toml";
const CRI_V2: &str = "io.containerd.grpc.v1.cri";
const CRI_V3: &str = "io.containerd.cri.v1.runtime";
const RUNC_TYPE: &str = "io.containerd.runc.v2";
/// The shim's default, whatever containerd's own folders are.
const RUNC_ROOT: &str = "/run/containerd/runc/k8s.io";
const BASE_TEMPLATE: &str = "{{ template \"base\" . }}\n";

pub(super) fn plan(host: &Host, runtime: Runtime, config: Option<&Path>, wrapper: &Path) -> Result<Plan> {
    let main = match (config, runtime.rancher_folder()) {
        (Some(config), _) => config.to_owned(),
        (None, Some(folder)) => folder.join("config.toml"),
        (None, None) => PathBuf::from(MAIN),
    };
    let config = Config::load(host, main)?;
    let own = config.own_handler()?;
    let runc = find_runc(host, own.binary(wrapper).as_deref())?;
    let runc_root = own.option("Root").map_or_else(|| RUNC_ROOT.into(), |root| Path::new(root).join("k8s.io"));
    let body = config.handler(own.table, wrapper);
    let edit = match runtime.rancher_folder() {
        Some(folder) => config.rancher_edit(host, folder, body)?,
        None => config.edit(host, body)?,
    };
    Ok(Plan { edit, runc, runc_root })
}

/// One file, as containerd reads it.
struct File {
    path: PathBuf,
    table: Table,
}

/// containerd's configuration: the main file, and what it imports behind it.
struct Config {
    main: PathBuf,
    exists: bool,
    version: i64,
    files: Vec<File>,
    imports: Vec<String>,
}

impl Config {
    fn load(host: &Host, main: PathBuf) -> Result<Self> {
        let Some(text) = host.text(&main)? else { return Self::default_of(host, main) };
        // Our own block is not the node's configuration.
        let table = parse(&main, &block::remove(&text))?;
        let version = table.get("version").and_then(Value::as_integer).unwrap_or(1);
        if version < 2 {
            return Err(Error::OldConfig { path: main, found: version });
        }
        let imports: Vec<String> = strings(table.get("imports"));
        let mut files = vec![File { path: main.clone(), table }];
        for path in imports.iter().map(|import| resolve(&main, import)) {
            for path in matches(host, &path)?.into_iter().filter(|path| !is_ours(path)) {
                let text = host.text(&path)?.unwrap_or_default();
                files.push(File { table: parse(&path, &block::remove(&text))?, path });
            }
        }
        let config = Self { main, exists: true, version, files, imports };
        config.check()?;
        Ok(config)
    }

    /// containerd runs without a file, too. Of what version one has to be, its own version says.
    fn default_of(host: &Host, main: PathBuf) -> Result<Self> {
        let said = host.run(&["containerd", "--version"])?;
        let version = said.split_whitespace().find_map(|word| {
            let (major, rest) = word.trim_start_matches('v').split_once('.')?;
            rest.contains('.').then(|| major.parse::<i64>().ok()).flatten()
        });
        let version = if version.unwrap_or(1) >= 2 { 3 } else { 2 };
        Ok(Self { main, exists: false, version, files: Vec::new(), imports: Vec::new() })
    }

    fn check(&self) -> Result<()> {
        for file in &self.files {
            let disabled = strings(file.table.get("disabled_plugins"));
            if disabled.iter().any(|plugin| plugin == "cri" || plugin == CRI_V2 || plugin == CRI_V3) {
                return Err(Error::CriDisabled { path: file.path.clone() });
            }
            if find(&file.table, &self.keys(&["runtimes", HANDLER])).is_some() {
                return Err(Error::ForeignHandler { path: file.path.clone() });
            }
        }
        Ok(())
    }

    fn plugin(&self) -> &'static str {
        if self.version >= 3 { CRI_V3 } else { CRI_V2 }
    }

    fn keys<'a>(&self, below: &[&'a str]) -> Vec<&'a str> {
        ["plugins", self.plugin(), "containerd"].into_iter().chain(below.iter().copied()).collect()
    }

    /// The file whose CRI section counts, for a containerd that does not merge them.
    fn counting(&self) -> Option<&File> {
        let has_cri = |file: &&File| find(&file.table, &["plugins", self.plugin()]).is_some();
        self.files.iter().rev().find(has_cri).or(self.files.first())
    }

    fn get(&self, below: &[&str]) -> Option<&Value> {
        let keys = self.keys(below);
        if self.version >= 3 {
            return self.files.iter().rev().find_map(|file| find(&file.table, &keys));
        }
        self.counting().and_then(|file| find(&file.table, &keys))
    }

    /// The node's handler that runs runc: the default, if it does, else the one called `runc`.
    fn own_handler(&self) -> Result<Own> {
        let default = self.get(&["default_runtime_name"]).and_then(Value::as_str).unwrap_or("runc");
        let Some(runtimes) = self.get(&["runtimes"]).and_then(Value::as_table).filter(|found| !found.is_empty()) else {
            return Ok(Own { table: Table::new() });
        };
        let named = |name: &str| self.get(&["runtimes", name]).and_then(Value::as_table);
        let runs_runc =
            |table: &&Table| table.get("runtime_type").and_then(Value::as_str).unwrap_or(RUNC_TYPE) == RUNC_TYPE;
        if let Some(table) = [default, "runc"].into_iter().filter_map(named).find(runs_runc) {
            return Ok(Own { table: table.clone() });
        }
        // containerd has one called runc by itself.
        if named("runc").is_none() {
            return Ok(Own { table: Table::new() });
        }
        Err(Error::NotRunc { found: runtimes.keys().cloned().collect::<Vec<_>>().join(", ") })
    }

    /// Our handler: the node's own with another program.
    fn handler(&self, mut own: Table, wrapper: &Path) -> String {
        own.insert("runtime_type".to_owned(), Value::String(RUNC_TYPE.to_owned()));
        for key in ["pod_annotations", "container_annotations"] {
            let mut passed = strings(own.get(key));
            if !passed.iter().any(|found| found == ANNOTATIONS) {
                passed.push(ANNOTATIONS.to_owned());
            }
            own.insert(key.to_owned(), Value::Array(passed.into_iter().map(Value::String).collect()));
        }
        let options = own.entry("options").or_insert_with(|| Value::Table(Table::new()));
        if let Value::Table(options) = options {
            options.insert("BinaryName".to_owned(), Value::String(wrapper.display().to_string()));
        }
        nested(&self.keys(&["runtimes", HANDLER]), own)
    }

    fn edit(&self, host: &Host, body: String) -> Result<Edit> {
        if !self.exists {
            // As a block: the next time the file is there, and what is in it is not to be taken for the node's own.
            let content = block::insert(&format!("version = {}\n", self.version), &body);
            return Ok(Edit::File { path: self.main.clone(), content });
        }
        if self.version >= 3
            && let Some(path) = self.drop_in()
        {
            return Ok(drop_in(path, &body));
        }
        let path = self.counting().map_or_else(|| self.main.clone(), |file| file.path.clone());
        extended(host, path, body)
    }

    /// K3s and RKE2 write the main file anew at each start, from a template.
    fn rancher_edit(&self, host: &Host, folder: &Path, body: String) -> Result<Edit> {
        if self.version >= 3
            && let Some(path) = self.drop_in()
        {
            return Ok(drop_in(path, &body));
        }
        let template = folder.join(if self.version >= 3 { "config-v3.toml.tmpl" } else { "config.toml.tmpl" });
        match host.text(&template)? {
            Some(text) if text != BASE_TEMPLATE && !is_made_by_us(&text) => Ok(Edit::Block { path: template, body }),
            _ => {
                let content = format!("{BASE_TEMPLATE}{}", block::insert("", &body));
                Ok(Edit::File { path: template, content })
            }
        }
    }

    /// Where a drop-in would be read: the first of the imported folders.
    fn drop_in(&self) -> Option<PathBuf> {
        let folders = self.imports.iter().filter_map(|import| import.strip_suffix("/*.toml"));
        folders.map(|folder| resolve(&self.main, folder).join(DROP_IN)).next()
    }
}

/// The node's own handler.
struct Own {
    table: Table,
}

impl Own {
    fn option(&self, name: &str) -> Option<&str> {
        let found = self.table.get("options").and_then(|options| options.get(name)).and_then(Value::as_str);
        found.filter(|value| !value.is_empty())
    }

    /// Its program, if it is not our wrapper itself.
    fn binary(&self, wrapper: &Path) -> Option<String> {
        self.option("BinaryName").filter(|name| Path::new(name) != wrapper).map(str::to_owned)
    }
}

fn drop_in(path: PathBuf, body: &str) -> Edit {
    let content =
        format!("# Written by podferry-install, removed by `podferry-install uninstall`.\nversion = 3\n\n{body}");
    Edit::File { path, content }
}

/// A block at the end of a file; it has to be TOML afterwards, which it is not when the tables above ours are inline ones.
fn extended(host: &Host, path: PathBuf, body: String) -> Result<Edit> {
    let text = host.text(&path)?.unwrap_or_default();
    match block::insert(&text, &body).parse::<Table>() {
        Ok(_) => Ok(Edit::Block { path, body }),
        Err(error) => Err(Error::CannotExtend { path, reason: error.to_string() }),
    }
}

fn is_made_by_us(template: &str) -> bool {
    block::is_in(template) && block::remove(template) == BASE_TEMPLATE
}

/// Whether it is what stands before our block in a file that was made for it, and nothing else.
pub(crate) fn is_bare(text: &str) -> bool {
    [BASE_TEMPLATE, "version = 2\n", "version = 3\n"].contains(&text)
}

fn is_ours(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name == DROP_IN)
}

/// Paths are relative to the main file's folder.
fn resolve(main: &Path, import: &str) -> PathBuf {
    main.parent().unwrap_or(Path::new("/")).join(import)
}

/// The files that an import names: its last part may have `*`.
fn matches(host: &Host, import: &Path) -> Result<Vec<PathBuf>> {
    let (Some(folder), Some(pattern)) = (import.parent(), import.file_name().and_then(|name| name.to_str())) else {
        return Ok(Vec::new());
    };
    let Some((before, after)) = pattern.split_once('*') else {
        return Ok(if host.has(import) { vec![import.to_owned()] } else { Vec::new() });
    };
    let fits = |name: &String| name.len() >= pattern.len() - 1 && name.starts_with(before) && name.ends_with(after);
    Ok(host.names(folder)?.into_iter().filter(fits).map(|name| folder.join(name)).collect())
}

fn strings(value: Option<&Value>) -> Vec<String> {
    let list = value.and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    list.iter().filter_map(Value::as_str).map(str::to_owned).collect()
}

pub(super) fn parse(path: &Path, text: &str) -> Result<Table> {
    text.parse().map_err(|source| Error::Toml { path: path.to_owned(), source: Box::new(source) })
}

/// What is below these keys.
pub(crate) fn find<'a>(table: &'a Table, keys: &[&str]) -> Option<&'a Value> {
    let (first, rest) = keys.split_first()?;
    rest.iter().try_fold(table.get(*first)?, |value, key| value.get(*key))
}

/// containerd notes each container's options beside it.
pub(super) fn containers_of_handler(host: &Host, tasks: &str, wrapper: &Path) -> Result<usize> {
    let wrapper = wrapper.to_string_lossy();
    let mut count = 0;
    for id in host.names(tasks)? {
        let folder = Path::new(tasks).join(id);
        let mut noted = String::new();
        for file in ["options.json", "runtime"] {
            noted += &host.text(folder.join(file))?.unwrap_or_default();
        }
        count += usize::from(noted.contains(wrapper.as_ref()));
    }
    Ok(count)
}
