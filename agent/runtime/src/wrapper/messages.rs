//! What wrapper and agent say to each other on the agent's Unix socket: one JSON object in a line.
//!
//! | wrapper | agent |
//! |---|---|
//! | [`Hello`] | |
//! | | [`Order::Restore`] |
//! | [`Report::Started`], [`Report::Exited`] | another [`Order::Restore`], when that failed |
//! | | [`Order::Create`]: create it as any other |
//! | | [`Order::Fail`]: give the shim this error |
//!
//! The wrapper ends by itself, with success, once a restore has succeeded.

use std::ffi::OsString;
use std::io::{self, BufRead, Write};
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::ExitStatus;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::launch::Invocation;

/// The version of this conversation.
pub const VERSION: u32 = 1;
/// The longest line.
const MOST_BYTES: u64 = 1 << 20;

/// Who the wrapper is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`VERSION`].
    pub version: u32,
    /// The migration that the pod is annotated with.
    pub migration: String,
    /// The pod's namespace,
    pub namespace: String,
    /// name,
    pub pod: String,
    /// and uid.
    pub uid: String,
    /// The container's name in the pod,
    pub container: String,
    /// and its id, which is runc's.
    pub id: String,
    /// runc's root folder.
    pub root: PathBuf,
    /// The container's bundle, whose root filesystem is mounted.
    pub bundle: PathBuf,
    /// Where runc writes the pid of the init.
    pub pid_file: PathBuf,
    /// When it began, in milliseconds since 1970: of two that wait for the same, the younger one's container counts.
    pub began_ms: u64,
}

/// What the agent wants.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// Run this `runc restore`, with the wrapper's own standard descriptors, and what the shim gave to the create.
    Restore {
        /// runc.
        program: PathBuf,
        /// Its arguments, but for `--pid-file` and `--console-socket`.
        args: Vec<String>,
        /// Its whole environment.
        env: Vec<(String, String)>,
    },
    /// Create the container as any other.
    Create,
    /// It cannot be had.
    Fail {
        /// Why, and what to do.
        message: String,
    },
}

/// What became of an order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Report {
    /// runc runs.
    Started {
        /// Its pid, in the host's pid namespace.
        pid: u32,
    },
    /// It could not be started.
    NotStarted {
        /// Why.
        message: String,
    },
    /// runc has ended.
    Exited {
        /// The status, as `wait(2)` has it.
        status: i32,
    },
}

/// Why an order cannot be given.
#[derive(Debug, thiserror::Error)]
pub enum WrongMessage {
    /// It is no UTF-8.
    #[error("{text:?} cannot be said: it is no UTF-8")]
    NotText {
        /// What.
        text: OsString,
    },
}

impl Order {
    /// The order to run this.
    ///
    /// # Errors
    /// When a word of it is no UTF-8.
    pub fn restore(invocation: Invocation) -> Result<Self, WrongMessage> {
        let text = |word: OsString| word.into_string().map_err(|text| WrongMessage::NotText { text });
        let pair = |(name, value)| Ok((text(name)?, text(value)?));
        Ok(Self::Restore {
            program: invocation.program,
            args: invocation.args.into_iter().map(text).collect::<Result<_, _>>()?,
            env: invocation.env.into_iter().map(pair).collect::<Result<_, WrongMessage>>()?,
        })
    }
}

impl Report {
    /// runc has ended so.
    pub fn exited(status: ExitStatus) -> Self {
        Self::Exited { status: status.into_raw() }
    }
}

/// Writes a message as one line.
///
/// # Errors
/// When the other side is gone.
pub fn write(mut stream: impl Write, message: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    stream.write_all(&line)
}

/// Reads a message; none at the end.
///
/// # Errors
/// When the other side is gone, says what nobody understands, or too much.
pub fn read<T: DeserializeOwned>(stream: impl BufRead) -> io::Result<Option<T>> {
    let mut line = Vec::new();
    stream.take(MOST_BYTES).read_until(b'\n', &mut line)?;
    match line.last() {
        None => Ok(None),
        Some(b'\n') => Ok(Some(serde_json::from_slice(&line)?)),
        Some(_) => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "a message is cut off, or too long")),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt as _;

    use super::*;

    #[test]
    fn orders_and_reports_come_through_and_what_is_cut_off_does_not() {
        let invocation = Invocation {
            program: "/usr/bin/runc".into(),
            args: vec!["restore".into()],
            env: vec![("PATH".into(), "/bin".into())],
        };
        let order = Order::restore(invocation.clone()).unwrap();
        let mut wire = Vec::new();
        write(&mut wire, &order).unwrap();
        write(&mut wire, &Report::exited(ExitStatus::from_raw(256))).unwrap();
        let mut stream = wire.as_slice();
        assert_eq!(read(&mut stream).unwrap(), Some(order));
        assert_eq!(read(&mut stream).unwrap(), Some(Report::Exited { status: 256 }));
        assert_eq!(read::<Report>(&mut stream).unwrap(), None);
        wire.pop();
        let mut cut = wire.as_slice();
        read::<Order>(&mut cut).unwrap();
        assert!(read::<Report>(&mut cut).is_err());
        let no_text = Invocation { args: vec![OsString::from_vec(vec![0xff])], ..invocation };
        assert!(Order::restore(no_text).is_err());
    }

    #[test]
    fn a_line_without_an_end_takes_no_memory() {
        assert!(read::<Order>(io::BufReader::new(io::repeat(b'x'))).is_err());
    }
}
