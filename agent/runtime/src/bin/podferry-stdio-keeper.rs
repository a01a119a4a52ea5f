//! Appends what it reads on stdin to a log file, until the last writer is gone.
//!
//! A container's stdio must not be a file of the host, which CRIU can neither dump nor restore; a pipe it can. This
//! process holds the pipe's other end. It outlives the agent that started it, because a restart of the agent must not
//! close a container's stdout: started as `podferry-stdio-keeper LOG`, it opens the log, starts itself again in a new
//! session with the log as its stdout, and exits, so that init inherits the one that stays.

use std::env;
use std::fs::OpenOptions;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

/// The argument with which it starts itself.
const SERVE: &str = "--serve";

fn main() -> ExitCode {
    let arguments: Vec<_> = env::args_os().skip(1).collect();
    let done = match arguments.as_slice() {
        [argument] if argument == SERVE => keep(),
        [log] => detach(Path::new(log)),
        _ => Err(io::Error::new(ErrorKind::InvalidInput, "usage: podferry-stdio-keeper LOG < PIPE")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("podferry-stdio-keeper: {error}");
            ExitCode::FAILURE
        }
    }
}

fn detach(log: &Path) -> io::Result<()> {
    let file = OpenOptions::new().create(true).append(true).mode(0o640).open(log)?;
    Command::new(env::current_exe()?)
        .arg(SERVE)
        .current_dir("/")
        .stdin(Stdio::inherit())
        .stdout(file)
        .stderr(Stdio::null())
        .spawn()?;
    Ok(())
}

fn keep() -> io::Result<()> {
    // Out of the agent's session and process group: no signal to it or its terminal ends the log.
    rustix::process::setsid()?;
    let mut input = io::stdin().lock();
    let mut log = io::stdout().lock();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match input.read(&mut buffer) {
            Ok(0) => return Ok(()),
            // A full disk loses lines of the log; blocking the pipe would stop the container instead.
            Ok(count) => drop(log.write_all(&buffer[..count]).and_then(|()| log.flush())),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
