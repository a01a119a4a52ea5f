//! What the installer has changed on the node, noted before each change so that all of it can be undone, whenever it is killed.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::block;
use crate::error::{At, Error, Result};
use crate::host::{Host, sync_folder, unfinished};
use crate::runtime::is_bare;

/// The journal's name in the installation's folder.
const NAME: &str = "install.json";

/// One change, with what undoes it. Paths are the node's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "change")]
pub(crate) enum Change {
    /// A folder that was not there; removed when it is empty.
    Folder {
        /// Where.
        path: PathBuf,
    },
    /// A file or link that was not there.
    File {
        /// Where.
        path: PathBuf,
    },
    /// A folder of podferry's own with all that is in it.
    Tree {
        /// Where.
        path: PathBuf,
    },
    /// A block in a file that is the node's own.
    Block {
        /// The file.
        path: PathBuf,
        /// Where it is kept as it was.
        original: PathBuf,
    },
    /// A file system that was mounted.
    Mount {
        /// Where.
        path: PathBuf,
    },
}

/// The record.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Journal {
    /// The bundle's folder that `current` leads to.
    pub bundle: Option<String>,
    /// The runtime's configuration differs from what the runtime has read.
    pub restart_needed: bool,
    /// It is being taken off, and waits for the last containers of the handler.
    pub leaving: bool,
    /// The node's own runc.
    pub runc: Option<PathBuf>,
    /// All changes, in their order.
    pub changes: Vec<Change>,
}

impl Journal {
    /// Reads it, if the node has one.
    pub(crate) fn load(host: &Host, folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(NAME);
        let Some(text) = host.text(&path)? else { return Ok(None) };
        serde_json::from_str(&text).map(Some).map_err(|source| Error::Journal { path: host.path(path), source })
    }

    /// Writes it to the disk.
    pub(crate) fn save(&self, host: &Host, folder: &Path) -> Result<()> {
        let path = folder.join(NAME);
        let text =
            serde_json::to_vec_pretty(self).map_err(|source| Error::Journal { path: host.path(&path), source })?;
        host.write(path, &text, 0o600)
    }

    /// Notes a change that is about to be made, unless it is noted.
    pub(crate) fn note(&mut self, host: &Host, folder: &Path, change: Change) -> Result<()> {
        if self.changes.contains(&change) {
            return Ok(());
        }
        self.changes.push(change);
        self.save(host, folder)
    }

    /// Forgets a change, which is not undone then.
    pub(crate) fn forget(&mut self, host: &Host, folder: &Path, change: &Change) -> Result<()> {
        self.changes.retain(|noted| noted != change);
        self.save(host, folder)
    }

    /// Undoes the changes that `which` picks, the last one first, and forgets them.
    pub(crate) fn undo(&mut self, host: &Host, folder: &Path, which: impl Fn(&Change) -> bool) -> Result<()> {
        for index in (0..self.changes.len()).rev() {
            if !which(&self.changes[index]) {
                continue;
            }
            self.changes[index].undo(host)?;
            self.changes.remove(index);
            self.save(host, folder)?;
        }
        Ok(())
    }

    /// Removes what a killed installer was writing. CRI-O would read it, as all that is in its folder.
    pub(crate) fn remove_unfinished(&self, host: &Host) -> Result<()> {
        let paths = self.changes.iter().flat_map(Change::written);
        paths.map(|path| unfinished(&host.path(path))).try_for_each(|path| remove_file(&path))
    }

    /// Removes what is left of an installer that was killed before it had noted anything.
    pub(crate) fn remove_begun(host: &Host, folder: &Path) -> Result<()> {
        if unfinished(&host.path(folder.join(NAME))).exists() { Self::remove(host, folder) } else { Ok(()) }
    }

    /// Removes the record itself, and the folder it is in.
    pub(crate) fn remove(host: &Host, folder: &Path) -> Result<()> {
        let path = host.path(folder.join(NAME));
        remove_file(&unfinished(&path))?;
        remove_file(&path)?;
        remove_folder(&host.path(folder))
    }
}

impl Change {
    /// The files that are written for it, one after the other.
    fn written(&self) -> Vec<&Path> {
        match self {
            Self::File { path } => vec![path],
            Self::Block { path, original } => vec![path, original],
            Self::Folder { .. } | Self::Tree { .. } | Self::Mount { .. } => Vec::new(),
        }
    }

    fn undo(&self, host: &Host) -> Result<()> {
        match self {
            Self::Folder { path } => remove_folder(&host.path(path)),
            Self::File { path } => remove_made(host, path),
            Self::Tree { path } => remove_tree(&host.path(path)),
            Self::Block { path, original } => take_block_out(host, path, original),
            Self::Mount { path } => unmount(host, path),
        }
    }
}

fn unmount(host: &Host, path: &Path) -> Result<()> {
    let path = path.to_string_lossy();
    if host.is_mounted(&path)? {
        host.run(&["umount", &path])?;
    }
    Ok(())
}

/// What was made is removed. What others have written beside a block of ours stays, without the block.
fn remove_made(host: &Host, path: &Path) -> Result<()> {
    let here = host.link_path(path);
    if fs::symlink_metadata(&here).is_ok_and(|found| found.is_file())
        && let Some(text) = host.text(path)?
        && block::is_in(&text)
        && !is_bare(&block::remove(&text))
    {
        return write_as_owned(&here, block::remove(&text).as_bytes(), mode_of(&here)?);
    }
    remove_file(&here)
}

/// The file is put back as it was. If somebody else has changed it meanwhile, only the block is taken out of it.
fn take_block_out(host: &Host, path: &Path, original: &Path) -> Result<()> {
    let (here, kept) = (host.path(path), host.path(original));
    if let Some(now) = host.text(path)? {
        let without = block::remove(&now);
        if without != now {
            write_as_owned(&here, without.as_bytes(), mode_of(&here)?)?;
        }
    }
    remove_file(&kept)
}

/// The file's permissions.
pub(crate) fn mode_of(path: &Path) -> Result<u32> {
    let found = fs::metadata(path).at("read", path)?;
    Ok(std::os::unix::fs::MetadataExt::mode(&found) & 0o7777)
}

/// Writes it, with the owner that it has.
pub(crate) fn write_as_owned(path: &Path, content: &[u8], mode: u32) -> Result<()> {
    use std::os::unix::fs::{MetadataExt, chown};
    let before = fs::metadata(path).at("read", path)?;
    crate::host::write_whole(path, content, mode)?;
    let after = fs::metadata(path).at("read", path)?;
    if (before.uid(), before.gid()) != (after.uid(), after.gid()) {
        chown(path, Some(before.uid()), Some(before.gid())).at("give back", path)?;
    }
    Ok(())
}

pub(crate) fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Ok(()) => sync_folder(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(Error::File { action: "remove", path: path.to_owned(), source }),
    }
}

/// Removes a folder, if it is empty: what others have put there stays.
pub(crate) fn remove_folder(path: &Path) -> Result<()> {
    match fs::remove_dir(path) {
        Ok(()) => sync_folder(path),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty) => Ok(()),
        Err(source) => Err(Error::File { action: "remove", path: path.to_owned(), source }),
    }
}

pub(crate) fn remove_tree(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Ok(()) => sync_folder(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(Error::File { action: "remove", path: path.to_owned(), source }),
    }
}
