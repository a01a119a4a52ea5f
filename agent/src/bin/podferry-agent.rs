//! `podferry-agent`: the agent of one node.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use podferry_agent::config::Config;
use podferry_agent::server;
use podferry_common::{failure, telemetry};

/// Moves containers from and to this node.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The configuration file.
    #[arg(long, default_value = "/etc/podferry/agent.toml")]
    config: PathBuf,
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
    server::serve(Config::load(&arguments.config)?).await
}
