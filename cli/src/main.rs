//! The podferry command line, also as `kubectl podferry` when it is found under the name `kubectl-podferry`.
//!
//! Results go to standard output, progress and errors to standard error. `docs/cli.md` describes verbs and exit codes.

mod arguments;
mod commands;
mod coordinator;
mod exit;
mod follow;
mod progress;
mod render;
mod words;

use std::process::ExitCode;

use clap::FromArgMatches;
use podferry_common::{Failure, FailureCode, telemetry};

use crate::arguments::{Arguments, Output};
use crate::exit::Exit;

fn main() -> ExitCode {
    // Log lines of the libraries below would stand between progress and results: only warnings, unless asked for.
    telemetry::init_with_default("warn");
    let matches = arguments::command().get_matches();
    let arguments = match Arguments::from_arg_matches(&matches) {
        Ok(arguments) => arguments,
        Err(error) => error.exit(),
    };
    let output = arguments.global.output;
    let exit = run(arguments).unwrap_or_else(|failure| {
        render::failure(output, &failure);
        Exit::of_refusal(&failure)
    });
    exit.into()
}

fn run(arguments: Arguments) -> Result<Exit, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::from_error(FailureCode::Internal, &error))?;
    runtime.block_on(commands::run(arguments))
}

impl Output {
    /// Whether results are JSON.
    fn is_json(self) -> bool {
        self == Self::Json
    }
}
