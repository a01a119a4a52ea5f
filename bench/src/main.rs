//! `podferry-bench`: workloads under load, the demo, and the measurements.

use std::{io::Read, net::SocketAddr, path::PathBuf, process::ExitCode, time::Duration};

use clap::{Args, Parser, Subcommand};
use podferry_bench::{
    chaos, demo, experiments,
    load::{self, Event, Kind, LoadOptions, LoadReport, Pace, Readiness, redis_data, sql},
    loads::{self, Load as HardLoad},
    local, moves, slowdown, soak,
    stage::{Interrupt, Strategy},
    stream, total,
};
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Workloads under load, the demo, and the measurements.
#[derive(Debug, Parser)]
#[command(name = "podferry-bench", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Move three workloads under load between two local nodes and back, and check that nothing of them is lost.
    Demo(Extent),
    /// Let everything fail in every phase of migrations of Redis under load, and check that nothing is lost and nothing doubled.
    Chaos(ChaosArguments),
    /// Measure warm migration of Redis at several sizes.
    Warm(Extent),
    /// Measure live migration of Redis at several sizes.
    Live(Extent),
    /// Measure post-copy migration of Redis at several sizes.
    Postcopy(Extent),
    /// Measure hybrid migration of Redis at several sizes.
    Hybrid(Extent),
    /// Measure live migration of Redis with writable layers of several sizes.
    Layers(Extent),
    /// Measure live migration of containers that are hard to move, and say which are refused and why.
    Loads(LoadsArguments),
    /// Measure how much slower Redis gets while its memory is copied.
    Slowdown(SlowdownArguments),
    /// Measure how long a live migration of idle memory takes in all, against the page stream alone with the same bytes.
    Total(Extent),
    /// Move a mixed set of workloads under load for long, and check that agents and coordinator do not grow.
    Soak {
        /// How many migrations there are.
        #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u32).range(30..))]
        migrations: u32,
    },
    /// Run a suite of experiments: what a migration of which workload by which strategy costs, over which link, beside other tools.
    Experiments(ExperimentsArguments),
    /// The receiving end of a copy by other tools, for the experiments' own use.
    #[command(hide = true)]
    PeerReceive {
        /// Where to listen.
        #[arg(long)]
        listen: SocketAddr,
        /// Where the folders are to come to.
        folders: Vec<PathBuf>,
    },
    /// Carry frames between two TAP devices, for the experiments' own use.
    #[command(hide = true)]
    LinkDelay {
        /// The devices.
        fabric: String,
        node: String,
        /// The address of the node that is not behind them.
        #[arg(long)]
        near: std::net::Ipv4Addr,
        /// How long a frame takes between the nodes, in µs.
        #[arg(long)]
        delay_us: u64,
    },
    /// The sending end.
    #[command(hide = true)]
    PeerSend {
        /// Where the other end listens.
        #[arg(long)]
        to: SocketAddr,
        /// What to send.
        folders: Vec<PathBuf>,
    },
    /// Measure the page stream between two network namespaces against raw TCP, and packing against none.
    Stream(stream::Arguments),
    /// A local cluster to play with, which goes on until it is taken down.
    #[command(subcommand)]
    Local(Local),
    /// Put a workload under load and check every answer; prints a line of JSON when all clients have had an answer, and
    /// one with the report at the end.
    Load(LoadArguments),
    /// Write a data set of a given size into Redis; prints its digest.
    RedisFill(FillArguments),
    /// Make the tables in `PostgreSQL` that its clients use.
    SqlFill(Target),
    /// Print the digest of what Redis holds.
    RedisDigest(Target),
}

#[derive(Debug, Args)]
struct Extent {
    /// Fewer moves, smaller sizes.
    #[arg(long, env = "QUICK", value_parser = clap::builder::FalseyValueParser::new(), action = clap::ArgAction::SetTrue)]
    quick: bool,
}

#[derive(Debug, Args)]
struct ExperimentsArguments {
    #[command(flatten)]
    extent: Extent,
    /// A suite's file; without it `bench/suites/standard.toml`, or `quick.toml` when it is to be quick.
    #[arg(long)]
    suite: Option<PathBuf>,
    /// The folder for results; what is there is not run again. Without it one below `.podferry/experiments`.
    #[arg(long)]
    results: Option<PathBuf>,
    /// Only show what would be run, and how long it is likely to take.
    #[arg(long)]
    plan: bool,
}

impl ExperimentsArguments {
    fn options(self) -> experiments::Options {
        let name = if self.extent.quick { "quick" } else { "standard" };
        experiments::Options {
            suite: self.suite.unwrap_or_else(|| experiments::suite_of(name)),
            results: self.results,
            plan_only: self.plan,
        }
    }
}

#[derive(Debug, Args)]
struct ChaosArguments {
    #[command(flatten)]
    extent: Extent,
    /// Only cases with this in their name, as in "live / fill" or "kill hook"; may be given several times.
    #[arg(long)]
    only: Vec<String>,
    /// Show the cases' names, and do nothing.
    #[arg(long)]
    list: bool,
    /// Says who comes back late after it was killed, and which way a link is cut.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// How often each case is played.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    repeat: u16,
    /// How many clusters there are at once: most of a case is waiting.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..))]
    jobs: u16,
}

#[derive(Debug, Args)]
struct LoadsArguments {
    #[command(flatten)]
    extent: Extent,
    /// Only the load with this name; may be given several times.
    #[arg(long)]
    only: Vec<String>,
}

#[derive(Debug, Args)]
struct SlowdownArguments {
    #[command(flatten)]
    extent: Extent,
    /// Connections of the clients.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..))]
    connections: u32,
    #[command(flatten)]
    depth: Depth,
}

#[derive(Debug, Args)]
struct Depth {
    /// Requests that a client with a pipeline has under way.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..))]
    depth: u16,
}

#[derive(Debug, Subcommand)]
enum Local {
    /// Bring it up, with the demo's workloads on the first node.
    Up,
    /// Take it down.
    Down,
    /// Show what runs where.
    Status,
    /// Run the command line on its client side.
    Podferry {
        /// What to give to `podferry`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
}

#[derive(Debug, Args)]
struct Target {
    /// Where the workload listens, as IP:PORT.
    #[arg(long)]
    target: SocketAddr,
}

#[derive(Debug, Args)]
struct LoadArguments {
    #[command(flatten)]
    target: Target,
    /// What the clients do.
    #[arg(long)]
    kind: Kind,
    /// How many clients there are, each with one connection.
    #[arg(long, default_value_t = 1)]
    clients: u32,
    #[command(flatten)]
    depth: Depth,
    /// How many ms a client waits between an answer and its next request; without it one is sent about every millisecond.
    #[arg(long)]
    think: Option<u64>,
    /// Report every answer with the time it took.
    #[arg(long)]
    samples: bool,
    /// End when standard input is closed.
    #[arg(long, conflicts_with = "seconds")]
    until_stdin_closes: bool,
    /// End after so many seconds.
    #[arg(long, required_unless_present = "until_stdin_closes")]
    seconds: Option<u64>,
}

#[derive(Debug, Args)]
struct FillArguments {
    #[command(flatten)]
    target: Target,
    /// Size of the data set in MiB.
    #[arg(long)]
    mib: u64,
}

type Outcome = Result<ExitCode, Box<dyn std::error::Error>>;

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli.command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("podferry-bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Outcome {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let outcome = runtime.block_on(async {
        match command {
            Command::Demo(extent) => staged(|interrupt| Ok(demo::run(extent.quick, interrupt)?.holds())),
            Command::Chaos(arguments) => run_chaos(arguments),
            Command::Warm(extent) => measure(Strategy::Warm, &extent),
            Command::Live(extent) => measure(Strategy::Live, &extent),
            Command::Postcopy(extent) => measure(Strategy::Postcopy, &extent),
            Command::Hybrid(extent) => measure(Strategy::Hybrid, &extent),
            Command::Layers(extent) => staged(|interrupt| Ok(moves::run_layers(extent.quick, interrupt)?.holds())),
            Command::Loads(LoadsArguments { extent, only }) => {
                let loads = HardLoad::named(&only)?;
                staged(|interrupt| Ok(loads::run(&loads, extent.quick, interrupt)?.holds()))
            }
            Command::Slowdown(SlowdownArguments { extent, connections, depth }) => {
                let options = slowdown::Options { quick: extent.quick, connections, depth: depth.depth };
                staged(|interrupt| Ok(slowdown::run(options, interrupt)?.passed))
            }
            Command::Total(extent) => staged(|interrupt| Ok(total::run(extent.quick, interrupt)?.passed)),
            Command::Soak { migrations } => staged(|interrupt| Ok(soak::run(migrations, interrupt)?.holds())),
            Command::Experiments(arguments) => {
                let options = arguments.options();
                staged(|interrupt| experiments::run(&options, interrupt))
            }
            Command::PeerReceive { listen, folders } => {
                experiments::peers::receive(listen, &folders)?;
                Ok(ExitCode::SUCCESS)
            }
            Command::LinkDelay { fabric, node, near, delay_us } => {
                experiments::delay::carry([&fabric, &node], near, Duration::from_micros(delay_us))?;
                Ok(ExitCode::SUCCESS)
            }
            Command::PeerSend { to, folders } => {
                experiments::peers::send(to, &folders)?;
                Ok(ExitCode::SUCCESS)
            }
            Command::Stream(arguments) => {
                Ok(if stream::run(arguments).await? { ExitCode::SUCCESS } else { ExitCode::FAILURE })
            }
            Command::Local(command) => run_local(command),
            Command::Load(arguments) => run_load(arguments).await,
            Command::RedisFill(arguments) => print(&redis_data::fill(arguments.target.target, arguments.mib).await?),
            Command::SqlFill(target) => print(&sql::fill(target.target).await?),
            Command::RedisDigest(target) => print(&redis_data::state(target.target).await?),
        }
    });
    // The thread that waits for standard input cannot be ended.
    runtime.shutdown_background();
    outcome
}

fn run_chaos(arguments: ChaosArguments) -> Outcome {
    let ChaosArguments { extent, only, list, seed, repeat, jobs } = arguments;
    let options = chaos::Options { quick: extent.quick, only, seed, repeat: repeat.into(), jobs: jobs.into() };
    if list {
        chaos::chosen(&options)?.iter().for_each(|case| println!("{case}"));
        return Ok(ExitCode::SUCCESS);
    }
    staged(|interrupt| Ok(chaos::run(&options, interrupt)?.holds()))
}

fn measure(strategy: Strategy, extent: &Extent) -> Outcome {
    staged(|interrupt| Ok(moves::run(strategy, extent.quick, interrupt)?.holds()))
}

/// Runs what needs a cluster. It is told when somebody wants it to end, and then takes the cluster down first.
fn staged(work: impl FnOnce(&Interrupt) -> podferry_bench::error::Result<bool>) -> Outcome {
    let interrupt = Interrupt::default();
    for kind in [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()] {
        let (mut signals, interrupt) = (signal(kind)?, interrupt.clone());
        tokio::spawn(async move {
            while signals.recv().await.is_some() {
                eprintln!("ending; what was brought up is taken down first");
                interrupt.set();
            }
        });
    }
    let holds = tokio::task::block_in_place(|| work(&interrupt))?;
    Ok(if holds { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn run_local(command: Local) -> Outcome {
    match command {
        Local::Up => local::up()?,
        Local::Down => local::down()?,
        Local::Status => print!("{}", local::status()?),
        Local::Podferry { arguments } => {
            let code = local::podferry(&arguments)?.code().and_then(|code| u8::try_from(code).ok());
            return Ok(code.map_or(ExitCode::FAILURE, ExitCode::from));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn print(value: &impl Serialize) -> Outcome {
    println!("{}", serde_json::to_string(value)?);
    Ok(ExitCode::SUCCESS)
}

async fn run_load(arguments: LoadArguments) -> Outcome {
    let stop = CancellationToken::new();
    stop_when(&arguments, &stop);
    let ready = Readiness::new(arguments.clients);
    let LoadArguments { target, kind, clients, depth, think, samples, .. } = arguments;
    let pace = think.map_or_else(Pace::default, |ms| Pace::Think(Duration::from_millis(ms)));
    let options = LoadOptions { target: target.target, kind, clients, depth: depth.depth.into(), pace, samples };
    let clients = load::run(options, stop, std::sync::Arc::clone(&ready));
    let tell = async {
        ready.all().await;
        print(&Event::Ready)
    };
    let (report, told): (LoadReport, Outcome) = tokio::join!(clients, tell);
    told?;
    let clean = report.is_clean();
    print(&Event::Report(report))?;
    Ok(if clean { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Arranges for `stop` to be cancelled. An interrupt from the keyboard does the same: the report is still printed.
fn stop_when(arguments: &LoadArguments, stop: &CancellationToken) {
    let interrupted = stop.clone();
    tokio::spawn(async move {
        if tokio::signal::ctrl_c().await.is_ok() {
            interrupted.cancel();
        }
    });
    let stop = stop.clone();
    if let Some(seconds) = arguments.seconds {
        tokio::spawn(async move {
            tokio::time::sleep(std::time::Duration::from_secs(seconds)).await;
            stop.cancel();
        });
        return;
    }
    std::thread::spawn(move || {
        // What comes does not matter, only that nothing comes any more; an error is an end, too.
        let mut input = std::io::stdin().lock();
        let mut buffer = [0; 64];
        while input.read(&mut buffer).is_ok_and(|read| read > 0) {}
        stop.cancel();
    });
}
