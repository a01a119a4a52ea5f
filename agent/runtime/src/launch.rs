//! Who starts `runc restore`.
//!
//! A container is the child of whoever has to learn of its end. On a node of podferry's own that is nobody, and this process starts runc.
//! In Kubernetes it is containerd's shim: there the process that the shim has started in runc's place starts it
//! ([`crate::wrapper`]).

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus};

/// A program to be started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Invocation {
    /// Which.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// Its whole environment.
    pub env: Vec<(OsString, OsString)>,
}

impl Invocation {
    /// What a command with a cleared environment would start.
    pub(crate) fn of(command: &Command) -> Self {
        let env = command.get_envs().filter_map(|(name, value)| Some((name.to_owned(), value?.to_owned())));
        Self {
            program: command.get_program().into(),
            args: command.get_args().map(ToOwned::to_owned).collect(),
            env: env.collect(),
        }
    }
}

/// Starts a program where this process cannot, with standard descriptors of its own.
pub trait Launcher: fmt::Debug + Send + Sync {
    /// Starts it; blocks until it has been.
    ///
    /// # Errors
    /// When it cannot be started.
    fn launch(&self, invocation: Invocation) -> io::Result<Box<dyn Launched>>;
}

/// A program that was started.
pub trait Launched: fmt::Debug + Send {
    /// Its process id, as this process sees it.
    fn pid(&self) -> u32;

    /// How it ended; none while it has not.
    ///
    /// # Errors
    /// When that cannot be known any more.
    fn try_wait(&mut self) -> io::Result<Option<ExitStatus>>;
}

impl Launched for Child {
    fn pid(&self) -> u32 {
        self.id()
    }

    fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        Self::try_wait(self)
    }
}
