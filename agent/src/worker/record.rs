//! Files that are there whole or not at all, whenever their writer is killed.
//!
//! Not synced: after a power failure nothing is left of the processes that the records speak of.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Writes `value` as JSON to `path`, so that a reader sees the old content or the new.
///
/// # Errors
/// When the folder or the disk does not take it.
pub fn store<T: Serialize>(path: &Path, value: &T) -> io::Result<()> {
    let new = path.with_extension("new");
    let text = serde_json::to_vec_pretty(value)?;
    let opened = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new);
    let written = opened.and_then(|mut file| file.write_all(&text)).and_then(|()| fs::rename(&new, path));
    written.map_err(|error| at(path, &error))
}

/// The error with the path it is about.
pub(crate) fn at(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// Reads what [`store`] wrote; none when there is no such file.
///
/// # Errors
/// When it cannot be read or is not what it should be.
pub fn load<T: DeserializeOwned>(path: &Path) -> io::Result<Option<T>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_replaced_whole_and_a_missing_one_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("record.json");
        assert_eq!(load::<Vec<u8>>(&path).unwrap(), None);
        store(&path, &vec![1, 2, 3]).unwrap();
        store(&path, &vec![4]).unwrap();
        assert_eq!(load::<Vec<u8>>(&path).unwrap(), Some(vec![4]));
        fs::write(&path, "no").unwrap();
        assert!(load::<Vec<u8>>(&path).is_err());
    }
}
