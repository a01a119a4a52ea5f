//! `podferry-pager JOB [second]`: lays memory in behind restored processes; the agent starts it. See `podferry_agent::pager`.

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;

use podferry_agent::pager::run;
use podferry_common::{failure, telemetry};

fn main() -> ExitCode {
    telemetry::init();
    match work() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = failure::chain(error.as_ref()), "the pager has no part in the restore");
            ExitCode::FAILURE
        }
    }
}

fn work() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (job, role) = match arguments.as_slice() {
        [job] => (job, run::Role::First),
        [job, second] if second == run::SECOND => (job, run::Role::Second),
        _ => return Err("usage: podferry-pager JOB [second]".into()),
    };
    run::run(&PathBuf::from(job), role)
}
