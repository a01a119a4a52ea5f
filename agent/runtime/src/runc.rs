//! Calling runc.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use oci_spec::runtime::State;

use crate::container::{Container, check_id};
use crate::error::Error;
use crate::leftovers;

/// Where programs are searched when nothing else is asked for. CRIU calls `tar`, `ip` and `iptables`.
const SYSTEM_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// One runc with one root directory.
#[derive(Debug, Clone)]
pub struct Runc {
    binary: PathBuf,
    pub(crate) root: PathBuf,
    /// Searched for programs before the system's.
    dirs: Vec<PathBuf>,
}

impl Runc {
    /// The program, and the directory where it keeps its containers' state (`runc --root`).
    pub fn new(binary: impl Into<PathBuf>, root: impl Into<PathBuf>) -> Self {
        Self { binary: binary.into(), root: root.into(), dirs: Vec::new() }
    }

    /// Makes runc, and the CRIU that it starts, take programs from this directory before those given earlier and the system's.
    #[must_use]
    pub fn with_programs(mut self, dir: impl Into<PathBuf>) -> Self {
        self.dirs.insert(0, dir.into());
        self
    }

    /// The directory where it keeps its containers' state.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The container `id` of this runc, from its files.
    pub fn container(&self, id: &str) -> Result<Container, Error> {
        crate::container::find(std::slice::from_ref(&self.root), id)
    }

    /// What runc itself says of a container.
    pub fn state(&self, id: &str) -> Result<State, Error> {
        let output = self.run(["state", id])?;
        serde_json::from_slice(&output.stdout).map_err(|source| Error::State { path: self.root.join(id), source })
    }

    /// Sends a signal (`TERM`, `KILL`, `9`) to a container's init process.
    pub fn kill(&self, id: &str, signal: &str) -> Result<(), Error> {
        self.run(["kill", id, signal]).map(drop)
    }

    /// Runs a command in a container and waits for it. How it ended and what it wrote is in the result.
    pub fn exec<S: AsRef<OsStr>>(&self, id: &str, args: impl IntoIterator<Item = S>) -> Result<Output, Error> {
        check_id(id)?;
        let mut command = self.command();
        command.arg("exec").arg(id).args(args).stdin(Stdio::null());
        command.output().map_err(Error::io("start", &self.binary))
    }

    /// The command that runs these words in a container, with these variables (`NAME=value`) beside those of its own.
    pub fn exec_command(
        &self,
        id: &str,
        variables: impl IntoIterator<Item = String>,
        words: impl IntoIterator<Item = impl AsRef<OsStr>>,
    ) -> Command {
        let mut command = self.command();
        command.arg("exec");
        command.args(variables.into_iter().flat_map(|variable| ["--env".to_owned(), variable]));
        command.arg(id).args(words);
        command
    }

    /// Deletes a container; `force` kills it first. That it does not exist is an error only without `force`.
    ///
    /// A `runc restore` that was killed leaves a bind mount of the container's root filesystem in runc's state directory,
    /// and runc deletes that directory recursively, which would empty the root filesystem. So it is unmounted first,
    /// always, and nothing is deleted if that fails.
    pub fn delete(&self, id: &str, force: bool) -> Result<(), Error> {
        check_id(id)?;
        leftovers::unmount_state(&self.root.join(id))?;
        let args: &[&str] = if force { &["delete", "--force", id] } else { &["delete", id] };
        self.run(args).map(drop)
    }

    /// Removes all that a killed `runc restore` has left: its processes, which are parked before their first
    /// instruction or held by the hook, mounts, CRIU's temporary directory, cgroup and state. The bundle's root filesystem
    /// stays as it is. Safe to repeat.
    pub fn cleanup_killed_restore(&self, id: &str, bundle: &Path) -> Result<(), Error> {
        leftovers::clean_up(self, id, bundle)
    }

    /// The same for a restore whose bundle is gone, because who had it made has given it up: `cgroups_path` is what its configuration
    /// said (`linux.cgroupsPath`). Safe to repeat.
    pub fn cleanup_given_up_restore(&self, id: &str, cgroups_path: &Path) -> Result<(), Error> {
        leftovers::clean_up_without_bundle(self, id, cgroups_path)
    }

    /// A command with runc's global options and a clean environment.
    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(&self.binary);
        command.env_clear().env("PATH", self.search_path()).arg("--root").arg(&self.root);
        command
    }

    pub(crate) fn binary(&self) -> &Path {
        &self.binary
    }

    fn search_path(&self) -> OsString {
        let mut path = OsString::new();
        for dir in &self.dirs {
            path.push(dir);
            path.push(":");
        }
        path.push(SYSTEM_PATH);
        path
    }

    fn run<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Result<Output, Error> {
        let mut command = self.command();
        let args: Vec<OsString> = args.into_iter().map(|arg| arg.as_ref().to_owned()).collect();
        let output = command.args(&args).stdin(Stdio::null()).output().map_err(Error::io("start", &self.binary))?;
        if output.status.success() {
            return Ok(output);
        }
        let words: Vec<_> = args.iter().map(|arg| arg.to_string_lossy()).collect();
        Err(Error::Runc {
            command: words.join(" "),
            status: output.status.to_string(),
            detail: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        })
    }
}

/// Removes a file; that it does not exist is no error.
pub(crate) fn remove_file(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", path)(error)),
        _ => Ok(()),
    }
}
