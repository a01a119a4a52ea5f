//! `podferry-agent`: the agent of one node.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand, ValueEnum};
use podferry_agent::config::Config;
use podferry_agent::journal::{self, OperatorsWord};
use podferry_agent::server;
use podferry_common::{MigrationId, failure, telemetry};

/// Transfers are big buffers: see [`podferry_transfer::server`].
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Moves containers from and to this node.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The configuration file.
    #[arg(long, default_value = "/etc/podferry/agent.toml")]
    config: PathBuf,
    /// Without one: serves until it is told to stop.
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Decides a migration by hand for this node, when the coordinator's record is lost or its other node never comes back.
    /// A wrong word makes two running copies or none: see "recovering by hand" in docs/operations.md.
    Decide {
        /// The migration's id.
        migration: MigrationId,
        /// Which copy is the right one.
        word: Word,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum Word {
    /// The target's. On a source: destroys it. On a target: lets it run; the source must never run again.
    Commit,
    /// The source's. On a source: lets it run on. On a target: undoes everything.
    Abort,
}

#[tokio::main]
async fn main() -> ExitCode {
    telemetry::init();
    let arguments = Arguments::parse();
    match run(arguments).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = failure::chain(error.as_ref()), "the agent ends");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: Arguments) -> Result<(), Box<dyn std::error::Error>> {
    let config = Config::load(&arguments.config)?;
    let Some(Command::Decide { migration, word }) = arguments.command else {
        return server::serve(config).await;
    };
    let word = match word {
        Word::Commit => OperatorsWord::Commit,
        Word::Abort => OperatorsWord::Abort,
    };
    journal::decide(&config, migration, word)?;
    println!("noted; the agent follows within seconds, or when it is started");
    Ok(())
}
