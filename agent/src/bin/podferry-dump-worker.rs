//! `podferry-dump-worker JOB`: keeps one CRIU and its frozen tasks; the agent starts it. See `podferry_agent::worker`.

use std::error::Error;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;

use podferry_agent::worker::{messages::DumpJob, record, run};
use podferry_common::{failure, telemetry};

fn main() -> ExitCode {
    telemetry::init();
    match work() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = failure::chain(error.as_ref()), "the dump cannot begin");
            ExitCode::FAILURE
        }
    }
}

fn work() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, job, pages] = arguments.as_slice() else {
        return Err("usage: podferry-dump-worker JOB PAGE-SOCKET".into());
    };
    // Out of the agent's session: a signal to its group is none of ours.
    rustix::process::setsid()?;
    let job: DumpJob = record::load(&PathBuf::from(job))?.ok_or("there is no such job")?;
    run::run(job, page_socket(pages)?)
}

/// CRIU's end of the page stream waits at a socket: taking an inherited descriptor by its number would be unsafe.
fn page_socket(path: &str) -> Result<OwnedFd, Box<dyn Error>> {
    Ok(UnixStream::connect(path)?.into())
}
