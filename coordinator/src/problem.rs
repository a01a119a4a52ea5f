//! What is wrong in a file that people write, and where.

use std::path::{Path, PathBuf};
use std::{fmt, fs, io};

use thiserror::Error;

/// One thing that is wrong, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Line, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
    /// What is wrong and what would be right.
    pub message: String,
}

impl Problem {
    /// A problem at a byte offset of `text`.
    pub(crate) fn at(text: &str, offset: usize, message: String) -> Self {
        let before = text.get(..offset).unwrap_or(text);
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        Self { line: before.matches('\n').count() + 1, column: before[line_start..].chars().count() + 1, message }
    }

    /// What the TOML parser has found in `text`.
    pub(crate) fn of_toml(text: &str, error: &toml::de::Error) -> Self {
        let message = error.message().trim_end().replace('\n', ", ");
        Self::at(text, error.span().map_or(0, |span| span.start), message)
    }

    /// All of them, one a line, each with its file.
    pub(crate) fn list(path: &Path, problems: &[Self]) -> String {
        let lines = problems.iter().map(|problem| format!("{}:{problem}", path.display()));
        lines.collect::<Vec<_>>().join("\n")
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.line, self.column, self.message)
    }
}

/// Why such a file cannot be used.
#[derive(Debug, Error)]
pub enum FileError {
    /// It cannot be read.
    #[error("cannot read {what} {}", path.display())]
    Read {
        /// What it is, such as "the inventory".
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It is larger than any of its kind.
    #[error("{what} {} has {bytes} bytes, more than {most}: is it the right file?", path.display())]
    TooLarge {
        /// What it is.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// The largest that is read.
        most: u64,
    },
    /// Its content is wrong.
    #[error("{}", Problem::list(path, problems))]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Everything that is wrong, in the order of the file.
        problems: Vec<Problem>,
    },
}

/// Reads a file of at most so many bytes and takes its text apart.
pub(crate) fn load<T>(
    what: &'static str,
    path: &Path,
    most: u64,
    parse: impl FnOnce(&str) -> Result<T, Vec<Problem>>,
) -> Result<T, FileError> {
    let failed = |source| FileError::Read { what, path: path.to_owned(), source };
    let bytes = fs::metadata(path).map_err(failed)?.len();
    if bytes > most {
        return Err(FileError::TooLarge { what, path: path.to_owned(), bytes, most });
    }
    let text = fs::read_to_string(path).map_err(failed)?;
    parse(&text).map_err(|problems| FileError::Invalid { path: path.to_owned(), problems })
}
