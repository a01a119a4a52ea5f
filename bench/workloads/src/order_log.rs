//! The append-only file of orders, one line each:
//!
//! ```text
//! SEQUENCE CHECKSUM ORDER-AS-JSON
//! ```
//!
//! `SEQUENCE` counts from 1 without a gap. `CHECKSUM` is XXH3 (64 bits, hexadecimal) of sequence and JSON, seeded with
//! the checksum of the line before (0 for the first), so that a line that was lost, doubled, changed or moved breaks
//! the chain from there on. A line is on disk (`fdatasync`) before its order is confirmed to anyone.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::shop::Items;

/// What a customer ordered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    /// The cart it came from.
    pub cart: String,
    /// The cart's operation that made it an order.
    pub cart_sequence: u64,
    /// What was in the cart.
    pub items: Items,
}

/// An order as it is in the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoggedOrder {
    /// Position in the log, from 1.
    pub sequence: u64,
    /// Checksum of this line and, through its seed, of all before it.
    pub checksum: u64,
    /// The order itself.
    pub order: Order,
}

/// Why the log cannot be used.
#[derive(Debug, Error)]
pub enum LogError {
    /// The file could not be opened, read or written.
    #[error("order log {}: cannot {what}: {source}; check that the folder exists and has space", path.display())]
    Io {
        /// The log file.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The content is not what was written.
    #[error("order log {}: line {line}: {problem}; the log was changed from outside or is incomplete", path.display())]
    Corrupt {
        /// The log file.
        path: PathBuf,
        /// Line number, from 1.
        line: usize,
        /// What is wrong with it.
        problem: Problem,
    },
    /// An order could not be written as JSON.
    #[error("order cannot be written as JSON: {0}")]
    Encode(#[from] serde_json::Error),
}

/// What is wrong with a line.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Problem {
    /// It does not have the three fields.
    #[error("not of the form SEQUENCE CHECKSUM ORDER")]
    Malformed,
    /// A line before it is missing, or it is there twice.
    #[error("sequence {found} where {expected} was due")]
    Sequence {
        /// The number that was due.
        expected: u64,
        /// The number that is there.
        found: u64,
    },
    /// The content does not match its checksum.
    #[error("checksum {found:016x} where {expected:016x} was due")]
    Checksum {
        /// The checksum that follows from the content.
        expected: u64,
        /// The checksum that is there.
        found: u64,
    },
}

/// The open log, ready for the next order.
#[derive(Debug)]
pub struct OrderLog {
    path: PathBuf,
    file: File,
    last_sequence: u64,
    last_checksum: u64,
}

impl OrderLog {
    /// Opens the log, or makes it, and goes on after its last order.
    ///
    /// A last line without its newline was never confirmed to anyone (the process ended while writing): it is cut off.
    pub fn open(path: &Path) -> Result<(Self, Vec<LoggedOrder>), LogError> {
        let fail = |what| move |source| LogError::Io { path: path.to_owned(), what, source };
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .read(true)
            .open(path)
            .map_err(fail("open it for appending"))?;
        let text = std::fs::read_to_string(path).map_err(fail("read it"))?;
        let whole = text.rfind('\n').map_or(0, |newline| newline + 1);
        if whole < text.len() {
            tracing::warn!(bytes = text.len() - whole, "cutting off an order that was never confirmed");
            file.set_len(whole as u64).map_err(fail("cut off its last line"))?;
        }
        let orders = parse(&text[..whole]).map_err(|(line, problem)| LogError::Corrupt {
            path: path.to_owned(),
            line,
            problem,
        })?;
        let (last_sequence, last_checksum) = orders.last().map_or((0, 0), |last| (last.sequence, last.checksum));
        Ok((Self { path: path.to_owned(), file, last_sequence, last_checksum }, orders))
    }

    /// Writes an order and returns once it is on disk.
    pub fn append(&mut self, order: Order) -> Result<LoggedOrder, LogError> {
        let json = serde_json::to_string(&order)?;
        let sequence = self.last_sequence + 1;
        let checksum = line_checksum(sequence, &json, self.last_checksum);
        let before = self.file.metadata().map_err(|source| self.error("measure it", source))?.len();
        let line = format!("{sequence} {checksum:016x} {json}\n");
        if let Err(source) = self.file.write_all(line.as_bytes()).and_then(|()| self.file.sync_data()) {
            // Otherwise half a line would stand before the next order's.
            self.file.set_len(before).map_err(|source| self.error("take back a failed write", source))?;
            return Err(self.error("append to it", source));
        }
        self.last_sequence = sequence;
        self.last_checksum = checksum;
        Ok(LoggedOrder { sequence, checksum, order })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn error(&self, what: &'static str, source: io::Error) -> LogError {
        LogError::Io { path: self.path.clone(), what, source }
    }
}

/// Reads a log from the file, trusting nothing that is in memory.
pub fn read(path: &Path) -> Result<Vec<LoggedOrder>, LogError> {
    let text = std::fs::read_to_string(path).map_err(|source| LogError::Io {
        path: path.to_owned(),
        what: "read it",
        source,
    })?;
    parse(&text).map_err(|(line, problem)| LogError::Corrupt { path: path.to_owned(), line, problem })
}

/// Reads and checks every line; on failure, the number of the first bad line (from 1) and what is wrong with it.
pub fn parse(text: &str) -> Result<Vec<LoggedOrder>, (usize, Problem)> {
    let mut orders: Vec<LoggedOrder> = Vec::new();
    for (index, line) in text.split_inclusive('\n').enumerate() {
        let (sequence, checksum) = orders.last().map_or((0, 0), |last| (last.sequence, last.checksum));
        orders.push(parse_line(line, sequence + 1, checksum).map_err(|problem| (index + 1, problem))?);
    }
    Ok(orders)
}

fn parse_line(line: &str, expected: u64, previous_checksum: u64) -> Result<LoggedOrder, Problem> {
    let line = line.strip_suffix('\n').ok_or(Problem::Malformed)?;
    let mut fields = line.splitn(3, ' ');
    let mut field = || fields.next().ok_or(Problem::Malformed);
    let sequence: u64 = field()?.parse().map_err(|_| Problem::Malformed)?;
    let found = u64::from_str_radix(field()?, 16).map_err(|_| Problem::Malformed)?;
    let json = field()?;
    if sequence != expected {
        return Err(Problem::Sequence { expected, found: sequence });
    }
    let checksum = line_checksum(sequence, json, previous_checksum);
    if checksum != found {
        return Err(Problem::Checksum { expected: checksum, found });
    }
    let order = serde_json::from_str(json).map_err(|_| Problem::Malformed)?;
    Ok(LoggedOrder { sequence, checksum, order })
}

fn line_checksum(sequence: u64, json: &str, previous: u64) -> u64 {
    xxh3_64_with_seed(format!("{sequence} {json}").as_bytes(), previous)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn order(number: u64) -> Order {
        Order { cart: format!("cart-{number}"), cart_sequence: number, items: [(1, 2), (7, 1)].into() }
    }

    fn written(orders: u64) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("orders.log");
        let (mut log, _) = OrderLog::open(&path).unwrap();
        for number in 1..=orders {
            assert_eq!(log.append(order(number)).unwrap().sequence, number);
        }
        (folder, path)
    }

    #[test]
    fn what_was_appended_is_read_back_and_gone_on_with() {
        let (_folder, path) = written(3);
        let (mut log, orders) = OrderLog::open(&path).unwrap();
        assert_eq!(
            orders.iter().map(|logged| logged.order.clone()).collect::<Vec<_>>(),
            [order(1), order(2), order(3)]
        );
        log.append(order(4)).unwrap();
        assert_eq!(read(&path).unwrap().len(), 4);
    }

    #[test]
    fn a_torn_last_line_is_cut_off_at_opening() {
        let (_folder, path) = written(2);
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, [&whole[..], b"3 0011"].concat()).unwrap();
        assert!(matches!(read(&path), Err(LogError::Corrupt { line: 3, problem: Problem::Malformed, .. })));
        let (mut log, orders) = OrderLog::open(&path).unwrap();
        assert_eq!(orders.len(), 2);
        log.append(order(3)).unwrap();
        assert_eq!(read(&path).unwrap().len(), 3);
    }

    #[test]
    fn a_missing_line_a_doubled_line_and_swapped_lines_are_found() {
        let (_folder, path) = written(3);
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<&str> = text.split_inclusive('\n').collect();
        let sequence = |expected, found| Problem::Sequence { expected, found };
        assert_eq!(parse(&[lines[0], lines[2]].concat()), Err((2, sequence(2, 3))));
        assert_eq!(parse(&[lines[0], lines[0]].concat()), Err((2, sequence(2, 1))));
        assert_eq!(parse(&[lines[1], lines[0]].concat()), Err((1, sequence(1, 2))));
    }

    proptest! {
        #[test]
        fn no_changed_byte_goes_unnoticed(at in 0..300_usize, bit in 0..8_u32) {
            let (_folder, path) = written(4);
            let mut bytes = std::fs::read(&path).unwrap();
            let original = parse(std::str::from_utf8(&bytes).unwrap()).unwrap();
            let at = at % bytes.len();
            bytes[at] ^= 1 << bit;
            // Hexadecimal in capitals is the same number: the only change that may pass is one that changes nothing.
            let parsed = std::str::from_utf8(&bytes).ok().and_then(|text| parse(text).ok());
            prop_assert!(parsed.is_none_or(|parsed| parsed == original));
        }
    }
}
