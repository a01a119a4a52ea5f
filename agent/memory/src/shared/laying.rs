//! Kept pages of shared memory, left to the library that is preloaded into CRIU, which lays them in when it restores a segment.
//!
//! Everything lies in one folder, that of CRIU's images, on a tmpfs:
//!
//! | file | what |
//! |---|---|
//! | `shared-NUMBER.store` | the pages of a segment, sparse |
//! | `shared.index` | which of them belong where; there whole or not at all |
//! | `shared.laid` | a byte for each segment of the index, in its order: not 0 once it was laid in |
//!
//! The index is text: a line `laid PATH`, and for each segment `segment NUMBER BYTES PATH`, followed by a line for each run of pages:
//! its offset in the segment, its offset in the store and its length, in hexadecimal. Pages that are zero are in none: a file that
//! CRIU has just made is zero. Paths are absolute and last in their line.
//!
//! The library fails CRIU when it cannot do as the index says. That CRIU ran without the library, [`not_laid`] finds out, which has to
//! be asked before a restored container runs.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use crate::store::Store;

/// The environment variable that names the index.
pub const VARIABLE: &str = "PODFERRY_CRIU_SHARED";

const INDEX: &str = "shared.index";
const LAID: &str = "shared.laid";

/// Where the index is, or would be.
pub fn index(folder: &Path) -> PathBuf {
    folder.join(INDEX)
}

/// A store for the pages of a segment. One that is there is replaced.
///
/// # Errors
/// When it cannot be made.
pub fn store(folder: &Path, number: u32, bytes: u64) -> io::Result<Store> {
    let mut options = OpenOptions::new();
    let file =
        options.read(true).write(true).create(true).truncate(true).mode(0o600).open(store_path(folder, number))?;
    Store::in_file(file, bytes).map_err(io::Error::other)
}

fn store_path(folder: &Path, number: u32) -> PathBuf {
    folder.join(format!("shared-{number}.store"))
}

/// Writes the index: of each segment its number and its store, which was made by [`store`].
///
/// # Errors
/// When a file cannot be written, or the folder has a name that cannot be told in a line.
pub fn write<'a>(folder: &Path, segments: impl IntoIterator<Item = (u32, &'a Store)>) -> io::Result<()> {
    let mut count = 0;
    let mut text = format!("laid {}\n", line(&folder.join(LAID))?);
    for (number, store) in segments {
        let runs = store.placed();
        let bytes = runs.iter().map(|run| run.place + run.length).max().unwrap_or(0);
        let _ = writeln!(text, "segment {number} {bytes:x} {}", line(&store_path(folder, number))?);
        for run in runs {
            let _ = writeln!(text, "{:x} {:x} {:x}", run.address, run.place, run.length);
        }
        count += 1;
    }
    let new = folder.join("shared.index.new");
    create(&folder.join(LAID))?.set_len(count)?;
    io::Write::write_all(&mut create(&new)?, text.as_bytes())?;
    fs::rename(&new, index(folder))
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)
}

fn line(path: &Path) -> io::Result<&str> {
    let told = path.to_str().filter(|path| path.starts_with('/') && !path.contains('\n'));
    told.ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidInput, format!("{} cannot be told in a line", path.display()))
    })
}

/// Which segments of the index were not laid in, though CRIU is done with the memory of the container.
///
/// # Errors
/// When the files of an index that is there cannot be read.
pub fn not_laid(folder: &Path) -> io::Result<Vec<u32>> {
    let text = match fs::read_to_string(index(folder)) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let laid = fs::read(folder.join(LAID))?;
    let numbers = text.lines().filter_map(|line| line.strip_prefix("segment ")?.split(' ').next()?.parse().ok());
    Ok(numbers
        .enumerate()
        .filter(|(place, _)| laid.get(*place).is_none_or(|laid| *laid == 0))
        .map(|(_, number)| number)
        .collect())
}

/// Nothing was laid in yet: for a restore that is done again.
///
/// # Errors
/// When what an earlier one has noted cannot be removed.
pub fn begin_again(folder: &Path) -> io::Result<()> {
    match OpenOptions::new().write(true).open(folder.join(LAID)) {
        Ok(laid) => {
            let segments = laid.metadata()?.len();
            laid.set_len(0)?;
            laid.set_len(segments)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// Removes all of it, and with it the memory that it takes from the node.
///
/// # Errors
/// When a file cannot be removed.
pub fn remove(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)?.flatten() {
        if is_of_it(&entry.file_name()) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

fn is_of_it(name: &OsStr) -> bool {
    let name = name.to_string_lossy();
    name == INDEX || name == LAID || name.starts_with("shared-") && name.ends_with(".store")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PAGE_SIZE;
    use crate::range::PageRange;

    #[test]
    fn the_index_says_where_pages_are_and_leaves_out_zeros() {
        let folder = tempfile::tempdir().unwrap();
        let page = |number: u64, count: u64| PageRange::new(number * PAGE_SIZE, (number + count) * PAGE_SIZE);
        let mut store = store(folder.path(), 7, 8 << 20).unwrap();
        // The second 2 MiB first: they have the first place in the store.
        store.put(page(513, 2), &[1; 8192]).unwrap();
        store.put(page(3, 1), &[2; 4096]).unwrap();
        store.put_zero(page(4, 2)).unwrap();
        write(folder.path(), [(7, &store), (9, &Store::new(1).unwrap())]).unwrap();
        let text = fs::read_to_string(index(folder.path())).unwrap();
        let root = folder.path().display();
        let expected = format!(
            "laid {root}/shared.laid\nsegment 7 204000 {root}/shared-7.store\n3000 203000 1000\n201000 1000 2000\n\
             segment 9 0 {root}/shared-9.store\n"
        );
        assert_eq!(text, expected);
        assert_eq!(not_laid(folder.path()).unwrap(), [7, 9]);
    }

    #[test]
    fn what_was_laid_is_known_until_it_begins_again_or_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(not_laid(folder.path()).unwrap(), [] as [u32; 0], "nothing was to be");
        begin_again(folder.path()).unwrap();
        let stores = [7, 9].map(|number| (number, store(folder.path(), number, 1).unwrap()));
        write(folder.path(), stores.iter().map(|(number, store)| (*number, store))).unwrap();
        fs::write(folder.path().join(LAID), [0, 1]).unwrap();
        assert_eq!(not_laid(folder.path()).unwrap(), [7]);
        begin_again(folder.path()).unwrap();
        assert_eq!(not_laid(folder.path()).unwrap(), [7, 9]);
        fs::write(folder.path().join("pages-1.img"), "").unwrap();
        remove(folder.path()).unwrap();
        let left: Vec<_> = fs::read_dir(folder.path()).unwrap().flatten().map(|entry| entry.file_name()).collect();
        assert_eq!(left, ["pages-1.img"]);
    }

    #[test]
    fn a_folder_that_cannot_be_told_in_a_line_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let strange = folder.path().join("a\nb");
        fs::create_dir(&strange).unwrap();
        assert_eq!(write(&strange, []).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
