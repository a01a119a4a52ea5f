//! The node: its files below a root, and commands that run on it.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};
use std::process::{Command, Output};

use crate::error::{At, Error, Result};

/// As many symbolic links as the kernel follows.
const MOST_LINKS: usize = 40;

/// How commands are run on the node.
pub trait Commands {
    /// Runs one to its end.
    fn run(&self, command: &[&str]) -> io::Result<Output>;
}

/// Commands in the namespaces of the node's process 1. It needs a privileged pod with hostPID.
#[derive(Debug, Clone, Copy)]
pub struct Entered;

impl Commands for Entered {
    fn run(&self, command: &[&str]) -> io::Result<Output> {
        let namespaces = ["--target", "1", "--mount", "--uts", "--ipc", "--net", "--pid", "--"];
        Command::new("nsenter").args(namespaces).args(command).output()
    }
}

/// Commands right here, for a root of `/`.
#[derive(Debug, Clone, Copy)]
pub struct Direct;

impl Commands for Direct {
    fn run(&self, command: &[&str]) -> io::Result<Output> {
        let (program, arguments) = command.split_first().ok_or(io::ErrorKind::InvalidInput)?;
        Command::new(program).args(arguments).output()
    }
}

/// A node whose root is at some path.
pub struct Host {
    root: PathBuf,
    commands: Box<dyn Commands>,
}

impl Host {
    /// The node whose root is at `root`.
    pub fn new(root: impl Into<PathBuf>, commands: Box<dyn Commands>) -> Self {
        Self { root: root.into(), commands }
    }

    /// Where the node's root is.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where a path of the node's is to be found here. Links are followed as the node follows them: an absolute one begins at
    /// the node's root, and none leads out of it.
    pub fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        let mut left: VecDeque<OsString> = parts(path.as_ref());
        let mut resolved = PathBuf::new();
        let mut links = 0;
        while let Some(part) = left.pop_front() {
            if part == ".." {
                resolved.pop();
                continue;
            }
            let here = self.root.join(&resolved).join(&part);
            match fs::read_link(&here) {
                Ok(link) if links < MOST_LINKS => {
                    links += 1;
                    if link.is_absolute() {
                        resolved = PathBuf::new();
                    }
                    parts(&link).into_iter().rev().for_each(|part| left.push_front(part));
                }
                _ => resolved.push(part),
            }
        }
        self.root.join(resolved)
    }

    /// Where the path is itself, though it may be a link.
    pub fn link_path(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        match (path.parent(), path.file_name()) {
            (Some(parent), Some(name)) => self.path(parent).join(name),
            _ => self.path(path),
        }
    }

    /// Whether there is something at that path of the node's.
    pub fn has(&self, path: impl AsRef<Path>) -> bool {
        self.path(path).exists()
    }

    /// The text of a file of the node's, if there is one.
    pub fn text(&self, path: impl AsRef<Path>) -> Result<Option<String>> {
        let path = self.path(path);
        match fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(Error::File { action: "read", path, source }),
        }
    }

    /// The names in a folder of the node's, sorted; none if there is no such folder.
    pub fn names(&self, folder: impl AsRef<Path>) -> Result<Vec<String>> {
        let folder = self.path(folder);
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                return Ok(Vec::new());
            }
            Err(source) => return Err(Error::File { action: "list", path: folder, source }),
        };
        let mut names = entries
            .map(|entry| entry.map(|entry| entry.file_name().to_string_lossy().into_owned()))
            .collect::<io::Result<Vec<_>>>()
            .at("list", &folder)?;
        names.sort();
        Ok(names)
    }

    /// Whether it is a program that can be run.
    pub fn is_program(&self, path: impl AsRef<Path>) -> bool {
        let found = fs::metadata(self.path(path));
        found.is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
    }

    /// What the command said, if it succeeded.
    pub fn run(&self, command: &[&str]) -> Result<String> {
        let failed = |said: String| Error::Command { command: command.join(" "), said };
        let output = self.commands.run(command).map_err(|error| failed(error.to_string()))?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Err(failed(if said.is_empty() { output.status.to_string() } else { said }))
    }

    /// Writes a file whole or not at all, and makes sure that it is on the disk.
    pub fn write(&self, path: impl AsRef<Path>, content: &[u8], mode: u32) -> Result<()> {
        write_whole(&self.path(path), content, mode)
    }

    /// Whether something is mounted at that path of the node's.
    pub fn is_mounted(&self, path: &str) -> Result<bool> {
        let mounts = self.text("/proc/1/mounts")?.unwrap_or_default();
        Ok(mounts.lines().any(|line| line.split(' ').nth(1) == Some(path)))
    }
}

fn parts(path: &Path) -> VecDeque<OsString> {
    let part = |component| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        _ => None,
    };
    path.components().filter_map(part).collect()
}

/// What a file is called until it is written whole. A killed installer leaves it.
pub(crate) fn unfinished(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".podferry-new");
    path.with_file_name(name)
}

/// Replaces a file by rename, so that no reader sees half of it, also after a power cut.
pub(crate) fn write_whole(path: &Path, content: &[u8], mode: u32) -> Result<()> {
    let new = unfinished(path);
    let written = || -> io::Result<()> {
        match fs::remove_file(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&new)?;
        // The mode of a new file is less what the umask takes.
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&new, path)
    };
    written().at("write", path)?;
    sync_folder(path)
}

/// Makes what was done in the folder of this path last.
pub(crate) fn sync_folder(path: &Path) -> Result<()> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    fs::File::open(folder).and_then(|folder| folder.sync_all()).at("sync", folder)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn links_are_followed_as_the_node_follows_them() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("var/opt")).unwrap();
        symlink("/var/opt", root.path().join("opt")).unwrap();
        symlink("../../../../..", root.path().join("var/up")).unwrap();
        symlink("round", root.path().join("round")).unwrap();
        let host = Host::new(root.path(), Box::new(Direct));
        assert_eq!(host.path("/opt/podferry"), root.path().join("var/opt/podferry"));
        assert_eq!(host.path("/var/up/etc/x"), root.path().join("etc/x"), "no link leads out of the root");
        assert_eq!(host.path("/round"), root.path().join("round"), "a link to itself ends");
        assert_eq!(host.link_path("/opt"), root.path().join("opt"));
    }
}
