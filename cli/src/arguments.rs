//! The verbs and flags.

use std::env;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Command, CommandFactory, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use podferry_common::identity::Peer;
use podferry_proto::v1;

/// What `--help` says of exit codes; `docs/cli.md` has the same table.
const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  a migration failed and was rolled back, a drain left workloads behind, or a check found an unfit node
  2  the command line, the identity's files or the request make no sense
  3  refused: the state of workload, node or certificate does not allow it; nothing was touched
  4  no such workload, node or migration
  5  the coordinator cannot be reached, or does not answer
  6  the migration was cancelled
  7  something that ought not to happen, on this side or the coordinator's
  8  a migration failed behind its commit: memory was lost, and the workload runs nowhere
  130  interrupted; what was being watched goes on";

/// Moves running containers between nodes.
#[derive(Debug, Parser)]
#[command(name = "podferry", version, after_help = EXIT_CODES, max_term_width = 120)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

/// Flags that every verb takes.
#[derive(Debug, Args)]
#[command(next_help_heading = "Global options")]
pub(crate) struct Global {
    /// Address of the coordinator, host:port
    #[arg(long, global = true, env = "PODFERRY_COORDINATOR", value_name = "HOST:PORT")]
    pub(crate) coordinator: Option<String>,
    /// Folder with ca.pem, cert.pem and key.pem of a client certificate
    #[arg(long, global = true, env = "PODFERRY_IDENTITY", value_name = "DIR")]
    pub(crate) identity: Option<PathBuf>,
    /// How to print results; errors too are JSON with json, on standard error
    #[arg(long, short, global = true, value_enum, default_value_t = Output::Table)]
    pub(crate) output: Output,
}

/// How results are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For people
    Table,
    /// For scripts: one JSON value a line
    Json,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Move a workload to another node
    Migrate(Migrate),
    /// List the nodes
    Nodes,
    /// List the workloads
    Workloads {
        /// Only those on this node
        #[arg(long, default_value = "")]
        node: String,
    },
    /// List the connections that have outlived the move of their pod: they need the node that it came from
    Connections {
        /// Only this workload's
        #[arg(default_value = "")]
        workload: String,
        /// Only those that need this node
        #[arg(long, default_value = "")]
        node: String,
    },
    /// List the migrations, newest first
    Migrations {
        /// Only this workload's
        #[arg(long, default_value = "")]
        workload: String,
        /// Only those that have not ended
        #[arg(long)]
        active: bool,
    },
    /// Show a migration: phases, times, rounds, what went wrong; or an evacuation
    Describe {
        /// The migration's id, or the evacuation's
        id: String,
    },
    /// Follow a migration or an evacuation to its end; the exit code is its outcome
    Watch {
        /// The migration's id, or the evacuation's
        id: String,
    },
    /// Undo a migration that has not been committed, or stop an evacuation
    Cancel {
        /// The migration's id, or the evacuation's
        id: String,
    },
    /// Move all workloads of a node elsewhere: the coordinator evacuates it, also when nobody watches
    Drain(Drain),
    /// List the evacuations, newest first
    Evacuations {
        /// Only this node's
        #[arg(long, default_value = "")]
        node: String,
        /// Only those that have not ended
        #[arg(long)]
        active: bool,
    },
    /// Say what each node's CRIU and kernel can do; fails if a node is unfit
    Check,
    /// Make certificates, for clusters without an authority of their own
    #[command(subcommand)]
    Certificates(Certificates),
    /// Print the completions of a shell
    Completions {
        /// The shell
        #[arg(value_enum)]
        shell: Shell,
    },
}

/// What can be wished of a migration, of one or of each of many.
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of its own")]
#[derive(Debug, Args)]
pub(crate) struct Wishes {
    /// How to move it
    #[arg(long, value_enum, default_value_t = Strategy::Auto)]
    pub(crate) strategy: Strategy,
    /// With postcopy and hybrid, which need it, and auto: risk the workload until its last page is across
    #[arg(long)]
    pub(crate) accept_loss: bool,
    /// With auto: restart it when nothing else can move it; its memory is lost, its connections are closed
    #[arg(long)]
    pub(crate) allow_restart: bool,
    /// Never compress what is sent
    #[arg(long)]
    pub(crate) no_compression: bool,
    /// With auto, live and hybrid: the downtime to aim at, in milliseconds, at most 60000; the coordinator's default is 100
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u32).range(1..=60_000))]
    pub(crate) downtime_budget: Option<u32>,
    /// The most bytes per second that a migration sends, at least 64K; K, M and G are powers of 1024
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    pub(crate) bandwidth_limit: Option<u64>,
    /// With live, which auto chooses then: before the commit, compare all memory that was copied while it ran; costs downtime for each GiB
    #[arg(long)]
    pub(crate) verify: bool,
    /// With live, hybrid and auto: if it writes memory faster than it is sent, give it less CPU time, step by step, instead of giving up
    #[arg(long)]
    pub(crate) throttle: bool,
    /// Where the workload is stopped: how long it gets to end after its SIGTERM before it is killed, at most 3600; the coordinator's default is 30
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(0..=3600))]
    pub(crate) grace_period: Option<u32>,
    /// What becomes of its established connections: keep refuses what cannot keep them, auto closes them then
    #[arg(long, value_enum, default_value_t = Connections::Auto)]
    pub(crate) connections: Connections,
    /// With pods: how long connections to the old address live on, at most, as 90s, 30m or 12h; the nodes' default is ten minutes
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub(crate) connections_deadline: Option<Duration>,
}

/// What becomes of established connections.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Connections {
    /// They live on where they can
    Auto,
    /// The workload moves only if they live on
    Keep,
    /// They are closed
    Close,
}

impl From<Connections> for v1::Connections {
    fn from(connections: Connections) -> Self {
        match connections {
            Connections::Auto => Self::Unspecified,
            Connections::Keep => Self::Keep,
            Connections::Close => Self::Close,
        }
    }
}

impl Wishes {
    /// As a request says it; 0 for no wish.
    pub(crate) fn connections_deadline_s(&self) -> u32 {
        self.connections_deadline.map_or(0, |deadline| u32::try_from(deadline.as_secs()).unwrap_or(u32::MAX))
    }
}

/// Flags of `migrate`.
#[derive(Debug, Args)]
pub(crate) struct Migrate {
    /// The workload
    pub(crate) workload: String,
    /// The node to move it to; without it the coordinator chooses
    #[arg(long, value_name = "NODE")]
    pub(crate) to: Option<String>,
    /// Follow it to its end; the exit code is its outcome
    #[arg(long)]
    pub(crate) wait: bool,
    #[command(flatten)]
    pub(crate) wishes: Wishes,
}

/// Flags of `drain`.
#[derive(Debug, Args)]
pub(crate) struct Drain {
    /// The node
    pub(crate) node: String,
    /// How long there is, as after a notice that the node will be taken away: what copying beforehand would make too late moves warm (with
    /// --accept-loss post-copy), and nothing is begun after it; a number with s, m or h behind it
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub(crate) deadline: Option<Duration>,
    /// Move this workload before those with a lower number, instead of the inventory's; may be given again
    #[arg(long, value_name = "WORKLOAD=NUMBER", value_parser = priority, allow_hyphen_values = true)]
    pub(crate) priority: Vec<(String, i32)>,
    /// How many may move at a time; the coordinator's limits hold in any case
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) concurrency: Option<u32>,
    /// Kubernetes: mark the node unschedulable, too; it stays so
    #[arg(long)]
    pub(crate) cordon: bool,
    /// Move those of the lowest priority first, and not those of the highest
    #[arg(long)]
    pub(crate) lowest_first: bool,
    /// Only workloads with such labels: app=shop,tier in (front, back),!canary
    #[arg(long, short = 'l', value_name = "LABELS", default_value = "")]
    pub(crate) selector: String,
    /// Do not follow it: print the evacuation that has begun
    #[arg(long)]
    pub(crate) no_wait: bool,
    #[command(flatten)]
    pub(crate) wishes: Wishes,
}

/// A number of bytes, with a suffix or without.
fn bytes(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.char_indices().next_back() {
        Some((at, 'K' | 'k')) => (&text[..at], 10),
        Some((at, 'M' | 'm')) => (&text[..at], 20),
        Some((at, 'G' | 'g')) => (&text[..at], 30),
        _ => (text, 0),
    };
    let number = if digits.starts_with('+') { None } else { digits.parse::<u64>().ok() };
    let bytes = number.and_then(|number| number.checked_mul(1 << shift)).filter(|bytes| *bytes > 0);
    bytes.ok_or_else(|| "it is a whole number of bytes, with K, M, G or nothing behind it: 100M".to_owned())
}

/// A time of at least a second, in seconds or with a suffix.
fn duration(text: &str) -> Result<Duration, String> {
    let (digits, seconds) = match text.char_indices().next_back() {
        Some((at, 's')) => (&text[..at], 1),
        Some((at, 'm')) => (&text[..at], 60),
        Some((at, 'h')) => (&text[..at], 3600),
        _ => (text, 1),
    };
    let number = if digits.starts_with('+') { None } else { digits.parse::<u32>().ok() };
    let duration = number.filter(|number| *number > 0).map(|number| Duration::from_secs(u64::from(number) * seconds));
    duration.ok_or_else(|| "it is a whole number with s, m, h or nothing (seconds) behind it: 90s".to_owned())
}

/// A workload and its priority.
fn priority(text: &str) -> Result<(String, i32), String> {
    let parts = text.split_once('=').filter(|(name, _)| !name.is_empty());
    let parsed = parts.and_then(|(name, number)| Some((name.to_owned(), number.parse().ok()?)));
    parsed.ok_or_else(|| "it is a workload and a whole number: redis=10".to_owned())
}

/// What `certificates` does.
#[derive(Debug, Subcommand)]
pub(crate) enum Certificates {
    /// Make a certificate authority: ca.pem, and ca-key.pem, which never has to leave this machine
    Ca {
        /// The folder for it; made if missing
        folder: PathBuf,
    },
    /// Issue a certificate: ca.pem, cert.pem and key.pem; those that are there are replaced
    Issue {
        /// coordinator.podferry.internal, NODE.agent.podferry.internal or USER.client.podferry.internal
        name: Peer,
        /// The folder for it; made if missing
        folder: PathBuf,
        /// The authority's folder
        #[arg(long, value_name = "DIR")]
        ca: PathBuf,
        /// How long it is valid
        #[arg(long, default_value_t = 24, value_parser = clap::value_parser!(u32).range(1..))]
        hours: u32,
    },
}

/// How a workload is moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Strategy {
    /// What preflight finds best; the migration says why
    Auto,
    /// Stop it, start it anew on the target
    Cold,
    /// Freeze it, move its memory, let it go on
    Warm,
    /// Move its memory while it runs, freeze it for the rest only
    Live,
    /// Move it at once, its memory behind it: losing either node meanwhile loses the workload
    Postcopy,
    /// Memory first while it runs, then post-copy for the rest
    Hybrid,
    /// The application moves its own state
    Application,
}

impl From<Strategy> for v1::Strategy {
    fn from(strategy: Strategy) -> Self {
        match strategy {
            Strategy::Auto => Self::Auto,
            Strategy::Cold => Self::Cold,
            Strategy::Warm => Self::Warm,
            Strategy::Live => Self::Live,
            Strategy::Postcopy => Self::Postcopy,
            Strategy::Hybrid => Self::Hybrid,
            Strategy::Application => Self::Application,
        }
    }
}

/// The file name this program was called by.
pub(crate) fn program() -> String {
    let called = env::args_os().next().unwrap_or_default();
    Path::new(&called).file_name().map_or_else(|| "podferry".to_owned(), |name| name.to_string_lossy().into_owned())
}

/// The command line, with the name that the user typed: kubectl's plugins are files called `kubectl-NAME`.
pub(crate) fn command() -> Command {
    let command = Arguments::command();
    if program() == "kubectl-podferry" { command.bin_name("kubectl podferry") } else { command }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn bytes_have_suffixes() {
        for (text, number) in [("65536", 65_536), ("64K", 65_536), ("100M", 100 << 20), ("1g", 1 << 30)] {
            assert_eq!(bytes(text), Ok(number), "{text}");
        }
        for wrong in ["", "0", "M", "-1", "+1", "1.5G", "1GiB", "1 G", "17179869184G", "é"] {
            assert!(bytes(wrong).unwrap_err().contains("100M"), "{wrong}");
        }
    }

    #[test]
    fn deadlines_have_suffixes_and_priorities_have_names() {
        for (text, seconds) in [("90", 90), ("90s", 90), ("2m", 120), ("1h", 3600)] {
            assert_eq!(duration(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        for wrong in ["", "0", "s", "-1", "+1", "1.5m", "1d", "2 m", "é", "4294967296"] {
            assert!(duration(wrong).unwrap_err().contains("90s"), "{wrong}");
        }
        assert_eq!(priority("redis=-3"), Ok(("redis".to_owned(), -3)));
        for wrong in ["redis", "=3", "redis=", "redis=high", "redis=3000000000"] {
            assert!(priority(wrong).unwrap_err().contains("redis=10"), "{wrong}");
        }
    }

    #[test]
    fn every_strategy_has_the_protocols_name() {
        for strategy in Strategy::value_variants() {
            let word = strategy.to_possible_value().unwrap().get_name().to_uppercase();
            assert_eq!(v1::Strategy::from(*strategy).as_str_name(), format!("STRATEGY_{word}"));
        }
    }
}
