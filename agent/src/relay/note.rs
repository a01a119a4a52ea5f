//! What is written down of relays.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use podferry_common::MigrationId;

/// Which end of a relay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    /// Where the address is.
    Home,
    /// Where the container is.
    Away,
}

impl Side {
    const fn word(self) -> &'static str {
        match self {
            Self::Home => "home",
            Self::Away => "away",
        }
    }
}

pub(super) fn path(dir: &Path, side: Side, migration: MigrationId) -> PathBuf {
    dir.join(format!("{migration}.{}", side.word()))
}

/// Those that there are.
///
/// # Errors
/// When the folder cannot be read.
pub(super) fn all(dir: &Path) -> io::Result<Vec<(MigrationId, Side)>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let file = entry?.path();
        let side =
            [Side::Home, Side::Away].into_iter().find(|side| file.extension().is_some_and(|end| end == side.word()));
        let migration = file.file_stem().and_then(|stem| stem.to_str()?.parse().ok());
        found.extend(migration.zip(side));
    }
    Ok(found)
}

/// Makes the folder for them, for root alone.
///
/// # Errors
/// When it cannot be made.
pub(super) fn make_room(dir: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_are_found_by_migration_and_side_and_what_else_is_there_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let (ids, notes) = ([MigrationId::new(), MigrationId::new()], dir.path().join("relays"));
        assert_eq!(all(&notes).unwrap(), []);
        make_room(&notes).unwrap();
        make_room(&notes).unwrap();
        for file in [
            path(&notes, Side::Home, ids[0]),
            path(&notes, Side::Away, ids[1]),
            notes.join("x.home"),
            notes.join("new"),
        ] {
            fs::write(file, "").unwrap();
        }
        let mut found = all(&notes).unwrap();
        found.sort_by_key(|(id, _)| *id);
        let mut expected = [(ids[0], Side::Home), (ids[1], Side::Away)];
        expected.sort_by_key(|(id, _)| *id);
        assert_eq!(found, expected);
    }
}
