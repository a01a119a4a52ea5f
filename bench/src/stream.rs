//! The page stream against raw TCP: how fast, and how much processor time a GiB takes at both ends together.
//!
//! Two network namespaces with a veth pair between them, a process in each. Every round measures raw TCP and the stream one
//! after the other, so that what else the machine does meets both.

mod link;
mod role;

use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use clap::Args;
use podferry_common::identity::{CaError, IdentityError, IdentityFiles, LocalCa, Peer};
use podferry_transfer::TransferError;
use serde::Serialize;
use tokio::io::{AsyncBufReadExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};

pub use role::Role;

use link::Link;
use role::{Contents, Measured, SOURCE, TARGET};

/// As in the agent. glibc's allocator gives big buffers back to the kernel at once, and a fresh one costs a page fault for
/// every 4 KiB: a third of all processor time of a transfer.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const MIB: u64 = 1 << 20;
/// What the project demands of the stream: at least this much of raw TCP,
const LEAST_OF_RAW: f64 = 0.29;
/// and at most so many processor seconds for a GiB.
const MOST_CPU: f64 = 1.1;
/// Packing must not make a transfer slower; this much is noise.
const LEAST_OF_PLAIN: f64 = 0.95;

/// What to measure.
#[derive(Debug, Args)]
pub struct Arguments {
    /// Fewer rounds and less data.
    #[arg(long, env = "QUICK", value_parser = clap::builder::FalseyValueParser::new(), action = clap::ArgAction::SetTrue)]
    quick: bool,
    /// How many rounds of raw TCP and the stream.
    #[arg(long)]
    rounds: Option<u32>,
    /// Leave packing out.
    #[arg(long)]
    no_compression: bool,
    /// What a process that this program starts does.
    #[command(subcommand)]
    role: Option<Role>,
}

/// Why a measurement did not come to be.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A program that makes the network failed.
    #[error("`{command}` failed: {reason}; it needs root, iproute2, and the kernel's veth and tbf")]
    Network {
        /// The command line.
        command: String,
        /// What it said.
        reason: String,
    },
    /// A system call failed.
    #[error("cannot {what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// One of the two processes failed; it says why above.
    #[error("the measured {what} ended early or did not end in time; it says why above")]
    Process {
        /// Which process.
        what: String,
    },
    /// What a process measured cannot be read.
    #[error("a result cannot be read or written: {0}")]
    Json(#[from] serde_json::Error),
    /// The authority of the measurement's certificates.
    #[error("the certificates for the measurement cannot be made: {}", podferry_common::chain(.0))]
    Ca(#[from] CaError),
    /// A certificate of the measurement.
    #[error("a certificate for the measurement cannot be read: {}", podferry_common::chain(.0))]
    Identity(#[from] IdentityError),
    /// The transfer itself.
    #[error("the measured transfer failed: {}", podferry_common::chain(.0))]
    Transfer(#[from] TransferError),
    /// The server of the measurement.
    #[error("the measured server failed: {}", podferry_common::chain(.0))]
    Server(#[from] tonic::transport::Error),
}

pub(crate) fn io_error(what: &'static str) -> impl Fn(io::Error) -> Error {
    move |source| Error::Io { what, source }
}

/// Middle, lowest and highest of some rounds.
#[derive(Debug, Clone, Copy, Serialize)]
struct Spread {
    median: f64,
    min: f64,
    max: f64,
}

impl Spread {
    fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let at = |index: usize| values.get(index).copied().unwrap_or(f64::NAN);
        let middle = values.len() / 2;
        let lower = if values.len().is_multiple_of(2) { middle.saturating_sub(1) } else { middle };
        Self { median: f64::midpoint(at(lower), at(middle)), min: at(0), max: at(values.len().saturating_sub(1)) }
    }
}

impl std::fmt::Display for Spread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.2} ({:.2}–{:.2})", self.median, self.min, self.max)
    }
}

/// The stream beside raw TCP.
#[derive(Debug, Serialize)]
struct AgainstRaw {
    rounds: usize,
    raw_gib_per_second: Spread,
    raw_cpu_seconds_per_gib: Spread,
    gib_per_second: Spread,
    cpu_seconds_per_gib: Spread,
    /// Of each round's two.
    of_raw: Spread,
}

/// Packing beside none, on one link with one kind of contents.
#[derive(Debug, Serialize)]
struct Packing {
    link: &'static str,
    contents: Contents,
    off_mib_per_second: Spread,
    auto_mib_per_second: Spread,
    /// Of each round's two.
    auto_of_off: Spread,
    ratio: f64,
}

#[derive(Debug, Serialize)]
struct Report {
    name: &'static str,
    passed: bool,
    stream: AgainstRaw,
    packing: Vec<Packing>,
}

/// One measurement of the two processes together.
#[derive(Debug, Clone, Copy)]
struct Run {
    gib_per_second: f64,
    cpu_seconds_per_gib: f64,
    ratio: f64,
}

struct Bench {
    link: Link,
    program: PathBuf,
    keys: tempfile::TempDir,
}

/// Measures and prints; says whether everything is as fast as demanded.
pub async fn run(arguments: Arguments) -> Result<bool, Error> {
    if let Some(role) = arguments.role {
        return role::play(role).await.map(|()| true);
    }
    let quick = arguments.quick;
    let bench = Bench::new().await?;
    let rounds = arguments.rounds.unwrap_or(if quick { 3 } else { 9 });
    let stream = bench.against_raw(rounds, if quick { 1024 } else { 4096 }).await?;
    let packing = if arguments.no_compression { Vec::new() } else { bench.packing(quick).await? };
    let fast = stream.of_raw.median >= LEAST_OF_RAW && stream.cpu_seconds_per_gib.median <= MOST_CPU;
    let passed = fast && packing.iter().all(|packing| packing.auto_of_off.median >= LEAST_OF_PLAIN);
    let report = Report { name: "stream", passed, stream, packing };
    print_table(&report);
    println!("{}", serde_json::to_string(&report)?);
    Ok(passed)
}

impl Bench {
    async fn new() -> Result<Self, Error> {
        let keys = tempfile::tempdir().map_err(io_error("make a folder"))?;
        let ca = LocalCa::create(&keys.path().join("ca"))?;
        for node in [SOURCE, TARGET] {
            let peer = Peer::Agent(node.parse().expect("a constant name"));
            ca.issue(&peer, Duration::from_secs(24 * 3600), &IdentityFiles::in_folder(keys.path().join(node)))?;
        }
        let program = std::env::current_exe().map_err(io_error("find this program"))?;
        Ok(Self { link: Link::new().await?, program, keys })
    }

    async fn against_raw(&self, rounds: u32, mib: u64) -> Result<AgainstRaw, Error> {
        let (mut raws, mut streams) = (Vec::new(), Vec::new());
        for round in 0..rounds {
            eprintln!("round {} of {rounds}: raw TCP and the stream, {mib} MiB each", round + 1);
            raws.push(self.measure("raw", Contents::Noise, "off", mib).await?);
            streams.push(self.measure("stream", Contents::Noise, "auto", mib).await?);
        }
        Ok(AgainstRaw {
            rounds: raws.len(),
            raw_gib_per_second: Spread::of(raws.iter().map(|run| run.gib_per_second)),
            raw_cpu_seconds_per_gib: Spread::of(raws.iter().map(|run| run.cpu_seconds_per_gib)),
            gib_per_second: Spread::of(streams.iter().map(|run| run.gib_per_second)),
            cpu_seconds_per_gib: Spread::of(streams.iter().map(|run| run.cpu_seconds_per_gib)),
            of_raw: Spread::of(raws.iter().zip(&streams).map(|(raw, run)| run.gib_per_second / raw.gib_per_second)),
        })
    }

    async fn packing(&self, quick: bool) -> Result<Vec<Packing>, Error> {
        let mut all = Vec::new();
        // Where the link sets the pace, runs hardly differ; where the processors do, they differ by a quarter.
        let links: [(&str, Option<&str>, u64, u32); 3] = [
            ("200 Mbit/s", Some("200mbit"), 96, 3),
            ("1 Gbit/s", Some("1gbit"), 512, 3),
            ("unlimited", None, 2048, 11),
        ];
        for (name, rate, mib, rounds) in links {
            self.link.limit(rate).await?;
            let (mib, rounds) = if quick { (mib / 2, 1) } else { (mib, rounds) };
            for contents in [Contents::Records, Contents::Noise] {
                all.push(self.packing_on(name, contents, mib, rounds).await?);
            }
        }
        Ok(all)
    }

    async fn packing_on(
        &self,
        link: &'static str,
        contents: Contents,
        mib: u64,
        rounds: u32,
    ) -> Result<Packing, Error> {
        let (mut offs, mut autos) = (Vec::new(), Vec::new());
        for round in 0..rounds {
            eprintln!("{link}, {contents:?}: without and with packing, {mib} MiB each");
            // The first of two finds the machine in another state than the second: each is first as often as the other.
            let order = if round % 2 == 0 { ["off", "auto"] } else { ["auto", "off"] };
            for packing in order {
                let runs = if packing == "off" { &mut offs } else { &mut autos };
                runs.push(self.measure("stream", contents, packing, mib).await?);
            }
        }
        let mib_per_second = |runs: &[Run]| Spread::of(runs.iter().map(|run| run.gib_per_second * 1024.0));
        Ok(Packing {
            link,
            contents,
            off_mib_per_second: mib_per_second(&offs),
            auto_mib_per_second: mib_per_second(&autos),
            auto_of_off: Spread::of(
                offs.iter().zip(&autos).map(|(off, auto)| auto.gib_per_second / off.gib_per_second),
            ),
            ratio: Spread::of(autos.iter().map(|run| run.ratio)).median,
        })
    }

    async fn measure(&self, how: &str, contents: Contents, packing: &str, mib: u64) -> Result<Run, Error> {
        let mut receiver = Process::start(
            self.command(self.link.target(), TARGET).args(["receive", how]).arg(self.link.address()),
            "receiver",
        )?;
        if receiver.line().await? != role::READY {
            return Err(Error::Process { what: "receiver".to_owned() });
        }
        let mib_text = mib.to_string();
        let contents = serde_json::to_string(&contents)?;
        let sender = Process::start(
            self.command(self.link.source(), SOURCE).args(["send", how]).arg(self.link.address()).args([
                packing,
                &mib_text,
                contents.trim_matches('"'),
            ]),
            "sender",
        )?;
        let sent = sender.result().await?;
        let received = receiver.result().await?;
        let bytes = as_f64(mib * MIB);
        let gib = bytes / as_f64(1024 * MIB);
        Ok(Run {
            gib_per_second: gib / sent.seconds,
            cpu_seconds_per_gib: (sent.cpu_seconds + received.cpu_seconds) / gib,
            ratio: bytes / as_f64(sent.wire_bytes.max(1)),
        })
    }

    fn command(&self, namespace: &str, node: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", namespace]).arg(&self.program).arg("stream");
        command.env(role::KEYS, key_folder(self.keys.path(), node));
        command
    }
}

fn key_folder(keys: &Path, node: &str) -> PathBuf {
    keys.join(node)
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

fn print_table(report: &Report) {
    let stream = &report.stream;
    println!("\n{} rounds, median (lowest–highest)\n", stream.rounds);
    println!("| | GiB/s | of raw TCP | CPU s/GiB, both ends |\n|---|---|---|---|");
    println!("| raw TCP, cubic | {} | 1 | {} |", stream.raw_gib_per_second, stream.raw_cpu_seconds_per_gib);
    println!("| the stream | {} | {} | {} |", stream.gib_per_second, stream.of_raw, stream.cpu_seconds_per_gib);
    if report.packing.is_empty() {
        return;
    }
    println!("\n| link | contents | MiB/s without packing | with | gain | ratio |\n|---|---|---|---|---|---|");
    for packing in &report.packing {
        let Packing { link, off_mib_per_second: off, auto_mib_per_second: auto, auto_of_off: gain, ratio, .. } =
            packing;
        println!("| {link} | {} | {off} | {auto} | {gain} | {ratio:.2} |", packing.contents);
    }
    println!();
}

#[expect(clippy::cast_precision_loss, reason = "byte counts for rates; 2^53 bytes are 8 PiB")]
fn as_f64(bytes: u64) -> f64 {
    bytes as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_few_is_theirs() {
        let shown = |values: &[f64]| Spread::of(values.iter().copied()).to_string();
        assert_eq!(shown(&[3.0, 1.0, 2.0]), "2.00 (1.00–3.00)");
        assert_eq!(shown(&[4.0, 1.0, 2.0, 3.0]), "2.50 (1.00–4.00)");
        assert_eq!(shown(&[1.0]), "1.00 (1.00–1.00)");
    }
}
