//! A file that lines are added to, and nothing else, with a bound on its size.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

/// Only its owner reads and writes it.
const MODE: u32 = 0o600;

/// How much of an audit log is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Bytes of one file, unless a single write is longer.
    pub bytes: u64,
    /// Full files that are kept besides the one that is written to.
    pub files: usize,
}

/// An open log. Lines are whole or followed by others: what a crash has cut off stands on a line of its own, and as the
/// beginning of a JSON object it is none.
pub(super) struct LogFile {
    path: PathBuf,
    bounds: Bounds,
    file: File,
    /// One that can be replaced by another.
    regular: bool,
    bytes: u64,
    /// The file may end in the middle of a line.
    torn: bool,
}

impl LogFile {
    /// Opens or makes it. Its mode is 0600 from then on.
    pub(super) fn open(path: &Path, bounds: Bounds) -> io::Result<Self> {
        let mut file = OpenOptions::new().read(true).append(true).create(true).mode(MODE).open(path)?;
        let metadata = file.metadata()?;
        // Somebody may have named a device or a pipe: others use it, too.
        let regular = metadata.is_file();
        if regular {
            file.set_permissions(Permissions::from_mode(MODE))?;
        }
        let bytes = metadata.len();
        let torn = bytes > 0 && last_byte(&mut file)? != b'\n';
        Ok(Self { path: path.to_owned(), bounds, file, regular, bytes, torn })
    }

    /// Adds whole lines. After an error some of them may be there, the last one in part.
    pub(super) fn append(&mut self, lines: &[u8]) -> io::Result<()> {
        if self.regular && self.bytes > 0 && self.bytes.saturating_add(lines.len() as u64) > self.bounds.bytes {
            self.turn_over()?;
        }
        if self.torn {
            self.write(b"\n")?;
        }
        // One call for all: there is no instant at which a line without its end is meant to be there.
        self.torn = true;
        self.write(lines)?;
        self.torn = false;
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let written = self.file.write_all(bytes);
        self.bytes = match written {
            Ok(()) => self.bytes.saturating_add(bytes.len() as u64),
            Err(_) => self.file.metadata().map_or(self.bytes, |metadata| metadata.len()),
        };
        written
    }

    /// Waits until all lines are on the disk.
    pub(super) fn sync(&mut self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Begins a new file. The oldest one goes when there are too many. Cut off in the middle, it leaves a gap in the numbers
    /// and loses nothing.
    fn turn_over(&mut self) -> io::Result<()> {
        self.file.sync_data()?;
        for number in (1..self.bounds.files).rev() {
            rename_if_there(&self.numbered(number), &self.numbered(number + 1))?;
        }
        rename_if_there(&self.path, &self.numbered(1))?;
        *self = Self::open(&self.path, self.bounds)?;
        let folder = self.path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(folder)?.sync_all()
    }

    fn numbered(&self, number: usize) -> PathBuf {
        let mut name = self.path.clone().into_os_string();
        name.push(format!(".{number}"));
        name.into()
    }
}

fn last_byte(file: &mut File) -> io::Result<u8> {
    let mut last = [0];
    file.seek(SeekFrom::End(-1))?;
    file.read_exact(&mut last)?;
    Ok(last[0])
}

fn rename_if_there(from: &Path, to: &Path) -> io::Result<()> {
    match fs::rename(from, to) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        renamed => renamed,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const WIDE: Bounds = Bounds { bytes: 1 << 20, files: 2 };

    fn line(number: usize) -> Vec<u8> {
        format!("{{\"number\":{number},\"text\":\"}}\\n{{\"}}\n").into_bytes()
    }

    /// The numbers of the lines that are JSON.
    fn numbers(path: &Path) -> Vec<usize> {
        let text = fs::read(path).unwrap();
        let lines = text.split(|&byte| byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok());
        lines.map(|line: serde_json::Value| usize::try_from(line["number"].as_u64().unwrap()).unwrap()).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

        /// A kill leaves a beginning of what was to be written.
        #[test]
        fn what_was_cut_off_is_misread_for_nothing(crashes in prop::collection::vec((1_usize..4, any::<prop::sample::Index>()), 1..6)) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("audit.log");
            let (mut number, mut whole) = (0, Vec::new());
            for (lines, cut) in crashes {
                let mut log = LogFile::open(&path, WIDE).unwrap();
                for _ in 0..lines {
                    log.append(&line(number)).unwrap();
                    whole.push(number);
                    number += 1;
                }
                drop(log);
                let last = line(number);
                let cut = cut.index(last.len() + 1);
                OpenOptions::new().append(true).open(&path).unwrap().write_all(&last[..cut]).unwrap();
                // Without its end alone it says all that it was to say.
                if cut + 1 >= last.len() {
                    whole.push(number);
                }
                number += 1;
            }
            LogFile::open(&path, WIDE).unwrap().append(&line(number)).unwrap();
            whole.push(number);
            prop_assert_eq!(numbers(&path), whole);
        }
    }

    #[test]
    fn old_files_are_numbered_and_the_oldest_go() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.log");
        let bounds = Bounds { bytes: 2 * line(10).len() as u64, files: 2 };
        let mut log = LogFile::open(&path, bounds).unwrap();
        (10..17).for_each(|number| log.append(&line(number)).unwrap());
        assert_eq!(numbers(&path), [16]);
        assert_eq!(numbers(&folder.path().join("audit.log.1")), [14, 15]);
        assert_eq!(numbers(&folder.path().join("audit.log.2")), [12, 13]);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 3);
        drop(log);
        LogFile::open(&path, bounds).unwrap().append(&line(17)).unwrap();
        assert_eq!(numbers(&path), [16, 17], "one that is opened again goes on");
        let long = line(1).repeat(100);
        LogFile::open(&path, bounds).unwrap().append(&long).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), long.len() as u64, "a long one has a file of its own");
    }

    #[test]
    fn nobody_else_reads_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.log");
        fs::write(&path, "").unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        drop(LogFile::open(&path, WIDE).unwrap());
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }
}
