//! One hook: a command in the container, or a request to it.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use podferry_network::Netns;
use podferry_runtime::Container;
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::mpsc;

use super::HookName;
use super::http::{self, HttpHook};
use crate::context::Context;

/// The most of a hook's own words that is kept: the end of them says why it failed.
const WORDS: usize = 2 << 10;
/// Read from a hook at once.
const CHUNK: usize = 64 << 10;

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hook {
    /// Run in the container; well when it ends with 0.
    Command(Vec<String>),
    /// Asked of the container; well when it is answered with 2xx.
    Http(HttpHook),
}

impl Hook {
    /// Reads an annotation: a URL of the container's loopback, a JSON list of words (`["program", …]`), or a line for its shell.
    pub(super) fn parse(value: &str) -> Result<Self, String> {
        let value = value.trim();
        if value.starts_with("http://") || value.starts_with("https://") {
            return HttpHook::parse(value).map(Self::Http);
        }
        // A shell's own `[` is followed by a space.
        if !value.starts_with("[\"") {
            return Ok(Self::script(value));
        }
        let words: Vec<String> =
            serde_json::from_str(value).map_err(|error| format!("is no JSON list of words: {error}"))?;
        let fits = words.first().is_some_and(|program| !program.is_empty());
        fits.then_some(Self::Command(words)).ok_or_else(|| "names no program".to_owned())
    }

    /// For the container's shell.
    pub(super) fn script(script: impl Into<String>) -> Self {
        Self::Command(vec!["/bin/sh".to_owned(), "-c".to_owned(), script.into()])
    }
}

/// Where hooks are run, and what they are told.
#[derive(Clone, Debug)]
pub struct Instance {
    context: Context,
    root: PathBuf,
    id: String,
    netns: Netns,
    /// Environment variables.
    told: Vec<(&'static str, String)>,
}

/// A variable with the address of the old instance.
pub const SOURCE_HOST: &str = "PODFERRY_SOURCE_HOST";
/// And one with its port.
pub const SOURCE_PORT: &str = "PODFERRY_SOURCE_PORT";

/// What goes into a hook, and what comes out.
#[derive(Debug, Default)]
pub struct Flow {
    /// What it reads; nothing when it is not given.
    pub input: Option<mpsc::Receiver<Bytes>>,
    /// Who gets what it writes; nobody when it is not given.
    pub output: Option<mpsc::Sender<Bytes>>,
}

/// Why a hook did not do what it is for.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// It could not be started.
    #[error("the hook {name} cannot be started")]
    Start {
        /// Which.
        name: HookName,
        /// Why.
        source: io::Error,
    },
    /// What goes in or comes out broke.
    #[error("what the hook {name} reads or writes broke off")]
    Flow {
        /// Which.
        name: HookName,
        /// Why.
        source: io::Error,
    },
    /// It said no.
    #[error("the hook {name} failed: {status}{}{}", if said.is_empty() { "" } else { ": " }, said)]
    Failed {
        /// Which.
        name: HookName,
        /// An exit status, or an HTTP one.
        status: String,
        /// The end of what it said.
        said: String,
    },
    /// It could not be asked.
    #[error("the hook {name} cannot be asked")]
    Http {
        /// Which.
        name: HookName,
        /// Why.
        source: http::HttpError,
    },
    /// It took too long.
    #[error("the hook {name} did not end in {} s", limit.as_secs())]
    TooLate {
        /// Which.
        name: HookName,
        /// How long it had.
        limit: Duration,
    },
}

impl Instance {
    /// A container that runs; its hooks reach it by `port`.
    ///
    /// # Errors
    /// When its network namespace cannot be opened.
    pub fn of(context: &Context, container: &Container, port: Option<u16>) -> Result<Self, podferry_network::Error> {
        let by_path = container.namespace_paths.get(&podferry_runtime::NamespaceKind::Network);
        // Of one that has ended there is none.
        let netns = match by_path {
            Some(path) => Netns::open(path)?,
            None => Netns::of_process(container.init.map_or(0, |init| init.pid.unsigned_abs()))?,
        };
        let told = port.map(|port| ("PODFERRY_PORT", port.to_string())).into_iter().collect();
        let (root, id) = (container.root.clone(), container.id.clone());
        Ok(Self { context: context.clone(), root, id, netns, told })
    }

    /// Tells hooks by which port of their loopback the old instance is reached.
    #[must_use]
    pub fn with_source(mut self, port: u16) -> Self {
        self.told.extend([(SOURCE_HOST, "127.0.0.1".to_owned()), (SOURCE_PORT, port.to_string())]);
        self
    }

    /// Its network namespace.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    pub(super) fn told(&self) -> &[(&'static str, String)] {
        &self.told
    }

    /// Runs a hook to its end, within `limit`. One that is given up is told to end.
    ///
    /// # Errors
    /// When it does not end well.
    pub async fn run(&self, name: HookName, hook: &Hook, flow: Flow, limit: Duration) -> Result<(), HookError> {
        tracing::debug!(%name, id = self.id, "running a hook");
        let running = async {
            match hook {
                Hook::Command(words) => self.command(name, words, flow).await,
                Hook::Http(hook) => http::call(self, name, hook, flow).await,
            }
        };
        tokio::time::timeout(limit, running).await.unwrap_or(Err(HookError::TooLate { name, limit }))
    }

    async fn command(&self, name: HookName, words: &[String], flow: Flow) -> Result<(), HookError> {
        let started = |source| HookError::Start { name, source };
        let broke = |source| HookError::Flow { name, source };
        let variables = self.told.iter().map(|(name, value)| format!("{name}={value}"));
        let runc = self.context.runc(&self.root);
        let mut command = Command::from(runc.exec_command(&self.id, variables, words));
        command.stdin(if flow.input.is_some() { Stdio::piped() } else { Stdio::null() });
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut running = Running(command.spawn().map_err(started)?);
        let (input, output, errors) = (running.0.stdin.take(), running.0.stdout.take(), running.0.stderr.take());
        let (fed, heard, said, ended) =
            tokio::join!(feed(input, flow.input), hear(output, flow.output), hear(errors, None), running.0.wait(),);
        let status = ended.map_err(broke)?;
        if !status.success() {
            return Err(failed(name, status, &heard.unwrap_or_default(), &said.unwrap_or_default()));
        }
        // One that ended well without reading everything has not taken everything.
        fed.and(heard).map(drop).map_err(broke)
    }
}

fn failed(name: HookName, status: ExitStatus, heard: &Words, said: &Words) -> HookError {
    let said = if said.0.is_empty() { heard } else { said };
    HookError::Failed { name, status: status.to_string(), said: said.to_string() }
}

/// runc hands the signal on to what it runs in the container; killed, it would leave that behind.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let pid = self.0.id().and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw);
        if let Some(pid) = pid {
            let _gone_already = kill_process(pid, Signal::TERM);
        }
    }
}

async fn feed(input: Option<ChildStdin>, from: Option<mpsc::Receiver<Bytes>>) -> io::Result<()> {
    let (Some(mut input), Some(mut from)) = (input, from) else { return Ok(()) };
    while let Some(data) = from.recv().await {
        input.write_all(&data).await?;
    }
    input.shutdown().await
}

/// Hands on what comes, or keeps the end of it when nobody wants it.
async fn hear(from: Option<impl AsyncRead + Unpin>, to: Option<mpsc::Sender<Bytes>>) -> io::Result<Words> {
    let mut words = Words::default();
    let Some(mut from) = from else { return Ok(words) };
    let mut buffer = BytesMut::with_capacity(CHUNK);
    while from.read_buf(&mut buffer).await? > 0 {
        let data = buffer.split().freeze();
        match &to {
            Some(to) => to.send(data).await.map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?,
            None => words.add(&data),
        }
        buffer.reserve(CHUNK);
    }
    Ok(words)
}

/// The end of what was said.
#[derive(Debug, Default)]
pub(super) struct Words(VecDeque<u8>);

impl Words {
    pub(super) fn add(&mut self, data: &[u8]) {
        self.0.extend(data);
        let too_many = self.0.len().saturating_sub(WORDS);
        self.0.drain(..too_many);
    }
}

impl fmt::Display for Words {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes: Vec<u8> = self.0.iter().copied().collect();
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        out.write_str(&lines.join("; "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hook_is_a_url_a_list_of_words_or_a_line_for_the_shell() {
        let words = |words: &[&str]| Ok(Hook::Command(words.iter().map(ToString::to_string).collect()));
        assert_eq!(Hook::parse(r#" ["redis-cli", "PING"]"#), words(&["redis-cli", "PING"]));
        assert_eq!(Hook::parse("redis-cli PING"), words(&["/bin/sh", "-c", "redis-cli PING"]));
        assert!(matches!(Hook::parse("http://localhost:8080/state"), Ok(Hook::Http(_))));
        assert_eq!(Hook::parse("[ -e /x ]"), words(&["/bin/sh", "-c", "[ -e /x ]"]));
        for wrong in [r#"[""]"#, r#"["x", 1]"#, "http://example.org/", "https://localhost/", "http://localhost:0/x"] {
            assert!(Hook::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_end_of_what_was_said_is_kept() {
        let mut words = Words::default();
        words.add(&vec![b'x'; 10_000]);
        words.add(b"\nlast words\n\n");
        assert!(words.0.len() == WORDS && words.to_string().ends_with("x; last words"), "{words}");
    }
}
