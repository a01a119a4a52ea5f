//! `podferry-report FOLDER`: makes the report of a results folder.

use std::{path::PathBuf, process::ExitCode};

use clap::Parser;

/// Make the report of an experiment: report.html, results.csv and summary.json, in the folder with its results.
#[derive(Debug, Parser)]
#[command(name = "podferry-report", version)]
struct Cli {
    /// The folder with results.jsonl, environment.json and suite.toml.
    folder: PathBuf,
}

fn main() -> ExitCode {
    match podferry_report::report(&Cli::parse().folder) {
        Ok(path) => {
            println!("{}", path.display());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("podferry-report: {error}");
            ExitCode::FAILURE
        }
    }
}
