//! The programs: one folder for each bundle, which nobody changes once it is there, and `current`, which leads to one of them.

use std::fs;
use std::io::Read;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use serde::Serialize;
use xxhash_rust::xxh3::Xxh3;

use crate::agent_config;
use crate::error::{At, Error, Result};
use crate::host::{Host, sync_folder, write_whole};
use crate::journal::{remove_file, remove_tree};
use crate::runtime::WRAPPER;

/// The link to the bundle that is in use.
pub(crate) const CURRENT: &str = "current";
/// What uninstalling leaves for containers that still run.
pub(crate) const LEFTOVER: &str = "leftover";
/// What a bundle must have; CRIU's start script is written on the node.
const NEEDED: [&str; 10] = [
    "VERSION",
    "bin/podferry-agent",
    "bin/podferry-dump-worker",
    "bin/podferry-hook",
    "bin/podferry-pager",
    "bin/podferry-stdio-keeper",
    "bin/podferry-tar",
    "bin/libpodferry_criu_shim.so",
    "tools/libexec/criu",
    "tools/libexec/busybox",
];

/// What the wrapper reads beside itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct WrapperConfig {
    /// The node's own runc.
    pub runc: PathBuf,
    /// The agent's socket.
    pub socket: PathBuf,
    /// Where a file for each container says that it must not run here.
    pub fence_dir: PathBuf,
    /// For so many seconds a `create` waits for the agent; the kubelet's own limit is 120.
    pub wait_s: u32,
}

impl WrapperConfig {
    /// The usual paths, with this runc.
    pub fn with_runc(runc: PathBuf) -> Self {
        Self { runc, socket: agent_config::SOCKET.into(), fence_dir: agent_config::FENCES.into(), wait_s: 100 }
    }
}

/// A bundle as the image has it.
#[derive(Debug, Clone)]
pub struct Bundle {
    source: PathBuf,
    name: String,
}

impl Bundle {
    /// Looks at the bundle in this folder (which is not the node's).
    pub fn open(source: &Path) -> Result<Self> {
        let missing: Vec<_> =
            NEEDED.iter().chain([&WRAPPER]).filter(|needed| !source.join(needed).is_file()).copied().collect();
        if !missing.is_empty() {
            return Err(Error::Bundle { path: source.to_owned(), missing: missing.join(", ") });
        }
        let version = source.join("VERSION");
        let version = fs::read_to_string(&version).at("read", version)?;
        let name = format!("{}-{:08x}", version.trim(), digest(source)? >> 32);
        Ok(Self { source: source.to_owned(), name })
    }

    /// The name of its folder: the version, and what distinguishes builds of it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Copies it to the node, where it is to be seen whole or not at all.
    pub fn lay(&self, host: &Host, folder: &Path, wrapper: &WrapperConfig) -> Result<()> {
        let target = host.path(folder).join(&self.name);
        if !target.is_dir() {
            let new = host.path(folder).join(format!(".{}.new", self.name));
            remove_tree(&new)?;
            copy_tree(&self.source, &new)?;
            write_criu_script(&new, &folder.join(&self.name))?;
            write_wrapper_config(&new, wrapper)?;
            rustix::fs::sync();
            fs::rename(&new, &target).at("rename", &new)?;
            return sync_folder(&target);
        }
        write_wrapper_config(&target, wrapper)
    }

    /// Makes `current` lead to it, in one step.
    pub fn switch(&self, host: &Host, folder: &Path) -> Result<()> {
        switch(host, folder, &self.name)
    }
}

/// Makes `current` lead to that folder, in one step.
pub(crate) fn switch(host: &Host, folder: &Path, name: &str) -> Result<()> {
    let link = host.path(folder).join(CURRENT);
    if fs::read_link(&link).is_ok_and(|now| now == Path::new(name)) {
        return Ok(());
    }
    let new = host.path(folder).join(".current.new");
    remove_file(&new)?;
    symlink(name, &new).at("link", &new)?;
    fs::rename(&new, &link).at("rename", &new)?;
    sync_folder(&link)
}

/// Where `current` leads.
pub(crate) fn current(host: &Host, folder: &Path) -> Option<String> {
    let link = fs::read_link(host.path(folder).join(CURRENT)).ok()?;
    Some(link.to_string_lossy().into_owned())
}

/// Puts a link to runc where the handler looks for its program, in place of all bundles.
pub(crate) fn leave_only_runc(host: &Host, folder: &Path, runc: &Path) -> Result<()> {
    let leftover = host.path(folder).join(LEFTOVER);
    let link = leftover.join(WRAPPER);
    let bin = link.parent().unwrap_or(&leftover);
    fs::create_dir_all(bin).at("make", bin)?;
    remove_file(&link)?;
    symlink(runc, &link).at("link", &link)?;
    switch(host, folder, LEFTOVER)
}

fn write_wrapper_config(bundle: &Path, wrapper: &WrapperConfig) -> Result<()> {
    let path = bundle.join(WRAPPER).with_file_name("runtime.json");
    let text = serde_json::to_vec_pretty(wrapper).map_err(std::io::Error::other).at("write", &path)?;
    if fs::read(&path).is_ok_and(|now| now == text) {
        return Ok(());
    }
    write_whole(&path, &text, 0o644)
}

/// CRIU runs with the bundle's own libraries and their loader. The script needs nothing of the node's, not even a shell.
fn write_criu_script(bundle: &Path, place: &Path) -> Result<()> {
    let libraries = bundle.join("tools/lib/criu");
    let loader = fs::read_dir(&libraries)
        .at("list", &libraries)?
        .filter_map(std::result::Result::ok)
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .find(|name| name.starts_with("ld-linux"))
        .ok_or_else(|| Error::Bundle { path: bundle.to_owned(), missing: "the loader in tools/lib/criu".to_owned() })?;
    let tools = place.join("tools");
    let tools = tools.display();
    let script = format!(
        "#!{tools}/libexec/busybox sh\n# Written by podferry-install: CRIU with its own libraries and loader.\n\
         exec {tools}/lib/criu/{loader} --inhibit-cache --library-path {tools}/lib/criu --argv0 criu {tools}/libexec/criu \"$@\"\n"
    );
    let path = bundle.join("tools/bin/criu");
    let folder = path.parent().unwrap_or(bundle);
    fs::create_dir_all(folder).at("make", folder)?;
    write_whole(&path, script.as_bytes(), 0o755)
}

fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).at("make", to)?;
    fs::set_permissions(to, fs::Permissions::from_mode(0o755)).at("open", to)?;
    for (path, name) in sorted(from)? {
        let target = to.join(name);
        if path.is_dir() {
            copy_tree(&path, &target)?;
        } else {
            fs::copy(&path, &target).at("copy", &path)?;
        }
    }
    Ok(())
}

/// Of all names, modes and contents.
fn digest(folder: &Path) -> Result<u64> {
    let mut hash = Xxh3::new();
    add_to_digest(&mut hash, folder)?;
    Ok(hash.digest())
}

fn add_to_digest(hash: &mut Xxh3, folder: &Path) -> Result<()> {
    for (path, name) in sorted(folder)? {
        hash.update(name.as_bytes());
        if path.is_dir() {
            add_to_digest(hash, &path)?;
            continue;
        }
        let mut file = fs::File::open(&path).at("read", &path)?;
        let mut buffer = vec![0; 1 << 16];
        loop {
            match file.read(&mut buffer).at("read", &path)? {
                0 => break,
                read => hash.update(&buffer[..read]),
            }
        }
    }
    Ok(())
}

fn sorted(folder: &Path) -> Result<Vec<(PathBuf, String)>> {
    let mut found = fs::read_dir(folder)
        .and_then(Iterator::collect::<std::io::Result<Vec<_>>>)
        .at("list", folder)?
        .into_iter()
        .map(|entry| (entry.path(), entry.file_name().to_string_lossy().into_owned()))
        .collect::<Vec<_>>();
    found.sort();
    Ok(found)
}
