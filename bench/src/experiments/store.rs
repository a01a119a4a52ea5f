//! The folder with results: what is there is not run again.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
};

use podferry_report::results::{Environment, Measurement};

use super::{scenario, suite::Suite};

/// Why results cannot be kept.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// A file operation failed.
    #[error("cannot {action} {}: {source}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A line is none of ours.
    #[error("line {line} of {} is no measurement: {source}; take that line out, or name another folder with --results", path.display())]
    Line {
        /// Which file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// The folder has something else.
    #[error("{} has results of another suite; name another folder with --results, or remove this one", folder.display())]
    OtherSuite {
        /// The folder.
        folder: PathBuf,
    },
    /// A value cannot be written.
    #[error("cannot write a result as JSON: {0}")]
    Json(#[from] serde_json::Error),
}

type Result<T> = std::result::Result<T, StoreError>;

fn fail(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> StoreError {
    let path = path.to_owned();
    move |source| StoreError::File { action, path, source }
}

/// Results that are on the disk, and grow.
#[derive(Debug)]
pub(super) struct Store {
    folder: PathBuf,
    file: File,
    measurements: Vec<Measurement>,
}

impl Store {
    /// What a folder has, without changing anything.
    pub(super) fn look(folder: &Path) -> Result<Vec<Measurement>> {
        let path = folder.join("results.jsonl");
        match fs::read(&path) {
            Ok(bytes) => read(&path, &String::from_utf8_lossy(whole_lines(&bytes))),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(fail("read", &path)(error)),
        }
    }

    /// Opens a folder for this suite, made when missing. A last line that was not written to its end is cut off: its run is run again.
    pub(super) fn open(folder: &Path, suite: &Suite) -> Result<Self> {
        fs::create_dir_all(folder).map_err(fail("create", folder))?;
        let suite_file = folder.join("suite.toml");
        match fs::read_to_string(&suite_file) {
            Ok(text) if text != suite.text => return Err(StoreError::OtherSuite { folder: folder.to_owned() }),
            Ok(_) => {}
            Err(_) => fs::write(&suite_file, &suite.text).map_err(fail("write", &suite_file))?,
        }
        let measurements = Self::look(folder)?;
        let path = folder.join("results.jsonl");
        let file = File::options().create(true).append(true).open(&path).map_err(fail("open", &path))?;
        let bytes = fs::read(&path).map_err(fail("read", &path))?;
        file.set_len(whole_lines(&bytes).len() as u64).map_err(fail("shorten", &path))?;
        Ok(Self { folder: folder.to_owned(), file, measurements })
    }

    /// All that there is.
    pub(super) fn measurements(&self) -> &[Measurement] {
        &self.measurements
    }

    /// Writes one more down, at once.
    pub(super) fn add(&mut self, measurement: Measurement) -> Result<()> {
        let line = serde_json::to_string(&measurement)? + "\n";
        let path = self.folder.join("results.jsonl");
        self.file.write_all(line.as_bytes()).map_err(fail("write", &path))?;
        self.measurements.push(measurement);
        Ok(())
    }

    /// Writes down on what is measured. One that is there stays: what is added to the results later is measured on the same.
    pub(super) fn describe(&self, environment: &Environment) -> Result<()> {
        let path = self.folder.join("environment.json");
        if path.exists() {
            return Ok(());
        }
        fs::write(&path, serde_json::to_string_pretty(environment)? + "\n").map_err(fail("write", &path))
    }
}

/// What tells a run from all others.
pub(super) fn key(measurement: &Measurement) -> (String, u32) {
    (scenario::name(&measurement.scenario), measurement.repeat)
}

/// Keys of all these.
pub(super) fn keys(measurements: &[Measurement]) -> BTreeSet<(String, u32)> {
    measurements.iter().map(key).collect()
}

/// Up to the last end of a line.
fn whole_lines(bytes: &[u8]) -> &[u8] {
    let end = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1);
    &bytes[..end]
}

fn read(path: &Path, text: &str) -> Result<Vec<Measurement>> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let parse = |(index, line): (usize, &str)| {
        serde_json::from_str(line).map_err(|source| StoreError::Line { path: path.to_owned(), line: index + 1, source })
    };
    lines.map(parse).collect()
}

#[cfg(test)]
mod tests {
    use podferry_report::results::Strategy;

    use super::{super::measure::tests::measured, *};
    use crate::experiments::measure::Moved;

    fn suite(text: &str) -> Suite {
        let sweep = "[[sweep]]\nquestion = \"q\"\nworkload = [\"redis\"]\nstrategy = [\"live\"]\nmemory_mib = [16]\n";
        Suite::parse("test", &format!("{text}{sweep}")).unwrap()
    }

    #[test]
    fn what_was_written_is_there_when_it_is_opened_again() {
        let folder = tempfile::tempdir().unwrap();
        let mut store = Store::open(folder.path(), &suite("")).unwrap();
        let one = measured(Strategy::Live, Ok(Moved::default()));
        store.add(one.clone()).unwrap();
        let again = Store::open(folder.path(), &suite("")).unwrap();
        assert_eq!(again.measurements(), [one]);
        assert_eq!(keys(again.measurements()).len(), 1);
    }

    #[test]
    fn a_line_that_was_broken_off_is_cut_off_and_a_wrong_one_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let mut store = Store::open(folder.path(), &suite("")).unwrap();
        store.add(measured(Strategy::Live, Ok(Moved::default()))).unwrap();
        let path = folder.path().join("results.jsonl");
        let whole = fs::read_to_string(&path).unwrap();
        fs::write(&path, format!("{whole}{{\"scenario\":{{\"wor")).unwrap();
        let mut again = Store::open(folder.path(), &suite("")).unwrap();
        assert_eq!(again.measurements().len(), 1);
        again.add(measured(Strategy::Warm, Ok(Moved::default()))).unwrap();
        assert_eq!(Store::look(folder.path()).unwrap().len(), 2);
        fs::write(&path, format!("{whole}{{}}\n")).unwrap();
        assert!(Store::look(folder.path()).unwrap_err().to_string().contains("line 2"));
    }

    #[test]
    fn results_of_another_suite_are_not_mixed_in() {
        let folder = tempfile::tempdir().unwrap();
        drop(Store::open(folder.path(), &suite("")).unwrap());
        assert!(matches!(Store::open(folder.path(), &suite("# other\n")), Err(StoreError::OtherSuite { .. })));
    }
}
