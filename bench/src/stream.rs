//! The page stream against raw TCP: how fast, and how much processor time a GiB takes at both ends together.
//!
//! Two network namespaces with a veth pair between them, a process in each. Every round measures raw TCP and the stream one
//! after the other, so that what else the machine does meets both.

mod link;
mod pair;
mod role;

use std::io;

use clap::Args;
use podferry_common::identity::{CaError, IdentityError};
use podferry_transfer::TransferError;
use serde::Serialize;

use crate::spread::Spread;

pub use role::Role;
pub(crate) use {
    link::Ends,
    pair::{Pair, Run},
    role::{Contents, How, Pack},
};

use link::Link;

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

struct Bench {
    link: Link,
    pair: Pair,
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
        let link = Link::new().await?;
        Ok(Self { pair: Pair::new()?, link })
    }

    async fn against_raw(&self, rounds: u32, mib: u64) -> Result<AgainstRaw, Error> {
        let (mut raws, mut streams) = (Vec::new(), Vec::new());
        for round in 0..rounds {
            eprintln!("round {} of {rounds}: raw TCP and the stream, {mib} MiB each", round + 1);
            raws.push(self.measure(How::Raw, Contents::Noise, Pack::Off, mib).await?);
            streams.push(self.measure(How::Stream, Contents::Noise, Pack::Auto, mib).await?);
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
            let order = if round % 2 == 0 { [Pack::Off, Pack::Auto] } else { [Pack::Auto, Pack::Off] };
            for packing in order {
                let runs = if packing == Pack::Off { &mut offs } else { &mut autos };
                runs.push(self.measure(How::Stream, contents, packing, mib).await?);
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

    async fn measure(&self, how: How, contents: Contents, packing: Pack, mib: u64) -> Result<Run, Error> {
        self.pair.measure(self.link.ends(), how, contents, packing, mib).await
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
