//! A sender and a receiver, each a process in a network namespace.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use clap::ValueEnum;
use podferry_common::identity::{IdentityFiles, LocalCa, Peer};
use tokio::io::{AsyncBufReadExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};

use super::link::Ends;
use super::role::{self, Contents, How, Measured, Pack, SOURCE, TARGET};
use super::{Error, MIB, as_f64, io_error};

/// One measurement of the two processes together.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Run {
    pub(crate) gib_per_second: f64,
    pub(crate) cpu_seconds_per_gib: f64,
    pub(super) ratio: f64,
}

impl Run {
    /// Of so many GiB in so many seconds, for so many of processor time.
    pub(crate) fn of(gib: f64, seconds: f64, cpu_seconds: f64) -> Self {
        Self { gib_per_second: gib / seconds, cpu_seconds_per_gib: cpu_seconds / gib, ratio: 1.0 }
    }
}

/// What the two processes are started with.
pub(crate) struct Pair {
    program: PathBuf,
    keys: tempfile::TempDir,
}

impl Pair {
    /// Makes certificates for both.
    pub(crate) fn new() -> Result<Self, Error> {
        let keys = tempfile::tempdir().map_err(io_error("make a folder"))?;
        let ca = LocalCa::create(&keys.path().join("ca"))?;
        for node in [SOURCE, TARGET] {
            let peer = Peer::Agent(node.parse().expect("a constant name"));
            ca.issue(&peer, Duration::from_secs(24 * 3600), &IdentityFiles::in_folder(keys.path().join(node)))?;
        }
        let program = std::env::current_exe().map_err(io_error("find this program"))?;
        Ok(Self { program, keys })
    }

    /// Sends so much from one end to the other.
    pub(crate) async fn measure(
        &self,
        ends: &Ends,
        how: How,
        contents: Contents,
        packing: Pack,
        mib: u64,
    ) -> Result<Run, Error> {
        let mut receive = self.command(&ends.target, TARGET);
        receive.args(["receive", &word(&how), &ends.address]);
        let mut receiver = Process::start(&mut receive, "receiver")?;
        if receiver.line().await? != role::READY {
            return Err(Error::Process { what: "receiver".to_owned() });
        }
        let mut send = self.command(&ends.source, SOURCE);
        send.args(["send", &word(&how), &ends.address, &word(&packing), &mib.to_string(), &word(&contents)]);
        let sent = Process::start(&mut send, "sender")?.result().await?;
        let received = receiver.result().await?;
        let bytes = as_f64(mib * MIB);
        let gib = bytes / as_f64(1024 * MIB);
        let run = Run::of(gib, sent.seconds, sent.cpu_seconds + received.cpu_seconds);
        Ok(Run { ratio: bytes / as_f64(sent.wire_bytes.max(1)), ..run })
    }

    fn command(&self, namespace: &str, node: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", namespace]).arg(&self.program).arg("stream");
        command.env(role::KEYS, self.keys.path().join(node));
        command
    }
}

/// As it stands on the command line.
fn word(value: &impl ValueEnum) -> String {
    value.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

/// One of the two processes; killed when it is not waited for.
struct Process {
    what: &'static str,
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

/// Longer than the slowest measurement.
const PATIENCE: Duration = Duration::from_secs(120);

impl Process {
    fn start(command: &mut Command, what: &'static str) -> Result<Self, Error> {
        let spawned = command.stdin(Stdio::null()).stdout(Stdio::piped()).kill_on_drop(true).spawn();
        let mut child = spawned.map_err(io_error("start a process to be measured"))?;
        let stdout = child.stdout.take().expect("piped above");
        Ok(Self { what, child, lines: BufReader::new(stdout).lines() })
    }

    async fn line(&mut self) -> Result<String, Error> {
        let early = || Error::Process { what: self.what.to_owned() };
        let line = tokio::time::timeout(PATIENCE, self.lines.next_line()).await.map_err(|_| early())?;
        line.map_err(io_error("read from a measured process"))?.ok_or_else(early)
    }

    async fn result(mut self) -> Result<Measured, Error> {
        let measured = serde_json::from_str(&self.line().await?)?;
        let status = tokio::time::timeout(PATIENCE, self.child.wait()).await;
        match status {
            Ok(Ok(status)) if status.success() => Ok(measured),
            _ => Err(Error::Process { what: self.what.to_owned() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_those_of_the_command_line() {
        assert_eq!(
            (word(&How::Stream), word(&Pack::Auto), word(&Contents::Noise)),
            ("stream".into(), "auto".into(), "noise".into())
        );
    }
}
