//! Reading a results folder.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::results::{Environment, Measurement, Outcome};

/// Why no report can be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReportError {
    /// A file of the results cannot be read.
    #[error("cannot read {}: {source}; a results folder has environment.json, suite.toml and results.jsonl, and `podferry-bench experiments` makes one", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A line is not a measurement.
    #[error("line {line} of {} is no measurement: {source}; it may be of another version: make the report with the podferry that measured, or take the line out", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// `environment.json` is not an environment.
    #[error("{} does not say on what was measured: {source}; it may be of another version, or damaged", path.display())]
    Environment {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// There is not one measurement.
    #[error("{} has no measurement; run the experiment first", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// A file of the report cannot be written.
    #[error("cannot write {}: {source}; is there room, and may you write there?", path.display())]
    Write {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

/// A measurement, and where it stands.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Run {
    /// Its line in `results.jsonl`, from 1.
    pub(crate) line: usize,
    /// The measurement.
    pub(crate) of: Measurement,
}

impl Run {
    /// Whether it ended on the target.
    pub(crate) fn moved(&self) -> bool {
        self.of.outcome == Outcome::Moved
    }
}

/// What a results folder has.
#[derive(Debug)]
pub(crate) struct Results {
    /// On what it was measured.
    pub(crate) environment: Environment,
    /// The suite, as it was run.
    pub(crate) suite: String,
    /// In the order in which they were taken.
    pub(crate) runs: Vec<Run>,
    /// What was passed over.
    pub(crate) notes: Vec<String>,
}

impl Results {
    /// Reads a folder.
    pub(crate) fn read(folder: &Path) -> Result<Self, ReportError> {
        let environment_file = folder.join("environment.json");
        let environment = serde_json::from_slice(&bytes(&environment_file)?)
            .map_err(|source| ReportError::Environment { path: environment_file, source })?;
        let suite = String::from_utf8_lossy(&bytes(&folder.join("suite.toml"))?).into_owned();
        let path = folder.join("results.jsonl");
        let (runs, notes) = measurements(&path, &bytes(&path)?)?;
        if runs.is_empty() {
            return Err(ReportError::Empty { path });
        }
        Ok(Self { environment, suite, runs, notes })
    }
}

fn bytes(path: &Path) -> Result<Vec<u8>, ReportError> {
    fs::read(path).map_err(|source| ReportError::Read { path: path.to_owned(), source })
}

/// All whole lines; a last one without an end was being written when the run was broken off.
fn measurements(path: &Path, bytes: &[u8]) -> Result<(Vec<Run>, Vec<String>), ReportError> {
    let (mut runs, mut notes) = (Vec::new(), Vec::new());
    for (index, text) in bytes.split_inclusive(|byte| *byte == b'\n').enumerate() {
        let line = index + 1;
        match serde_json::from_slice(text) {
            Ok(of) => runs.push(Run { line, of }),
            Err(_) if text.trim_ascii().is_empty() => {}
            Err(_) if !text.ends_with(b"\n") => {
                notes
                    .push(format!("Line {line} is not whole: the experiment was broken off there. It is passed over."));
            }
            Err(source) => return Err(ReportError::Line { path: path.to_owned(), line, source }),
        }
    }
    Ok((runs, notes))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = r#"{"scenario":{"workload":"redis","strategy":"live","memory_mib":16,"clients":2},"repeat":0,"began_unix_ms":1.0,"outcome":"moved"}"#;

    fn read(text: &str) -> Result<(Vec<Run>, Vec<String>), ReportError> {
        measurements(Path::new("results.jsonl"), text.as_bytes())
    }

    #[test]
    fn runs_know_their_lines_and_empty_ones_count() {
        let (runs, notes) = read(&format!("{LINE}\n\n{LINE}\n")).unwrap();
        assert_eq!(runs.iter().map(|run| run.line).collect::<Vec<_>>(), [1, 3]);
        assert!(notes.is_empty());
    }

    #[test]
    fn a_last_line_that_is_not_whole_is_passed_over_with_a_note() {
        for cut in 1..LINE.len() {
            let (runs, notes) = read(&format!("{LINE}\n{}", &LINE[..cut])).unwrap();
            assert_eq!((runs.len(), notes.len()), (1, 1));
            assert!(notes[0].contains("Line 2"), "{notes:?}");
        }
    }

    #[test]
    fn a_line_that_cannot_be_read_is_named_with_its_file() {
        let error = read(&format!("{LINE}\n{{\"scenario\":1}}\n{LINE}\n")).unwrap_err().to_string();
        assert!(error.contains("line 2 of results.jsonl"), "{error}");
    }
}
