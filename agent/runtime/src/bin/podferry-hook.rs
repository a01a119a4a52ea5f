//! CRIU's action script on the target: holds a restored container before its first instruction until the agent decides.
//!
//! CRIU runs it at every stage; only `post-restore` matters, where all processes exist, nothing runs yet, and failing
//! still undoes the restore. There it connects to the agent, `$PODFERRY_HOOK_SOCKET`, and speaks lines:
//!
//! | hook says | agent says | then |
//! |---|---|---|
//! | `post-restore PID MIGRATION` | | the container is held; `PID` is its init in the host's pid namespace |
//! | | `seal` | the hook answers `sealed`: from now on only a word of the agent ends the hold |
//! | | `go` | exit 0: the container runs |
//! | | `abort` | exit 1: CRIU kills what it restored |
//! | `post-restore-sealed PID MIGRATION` | | sent instead, after a sealed hook has lost its agent and found it again |
//!
//! Before `seal`, end of file or any error means abort: it fails closed. After it the coordinator may have committed the
//! migration to this copy, so the hook asks again every 100 ms, for ever: killing the copy is not its decision any more.
//! A hook whose CRIU died exits at once, since there is nobody left to hold the container for.

use std::env;
use std::io::{self, BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::parent_id;
use std::process::ExitCode;
use std::thread::sleep;
use std::time::Duration;

/// Between two attempts of a sealed hook to find its agent.
const RECONNECT: Duration = Duration::from_millis(100);
/// How often a waiting hook looks whether its CRIU still lives.
const PARENT_CHECK: Duration = Duration::from_millis(250);

/// What the agent decided.
enum Verdict {
    Go,
    Abort,
}

struct Hook {
    socket: String,
    init_pid: String,
    migration: String,
    criu: u32,
    sealed: bool,
}

fn main() -> ExitCode {
    if env::var_os("CRTOOLS_SCRIPT_ACTION").is_none_or(|action| action != "post-restore") {
        return ExitCode::SUCCESS;
    }
    match hold() {
        Ok(Verdict::Go) => ExitCode::SUCCESS,
        Ok(Verdict::Abort) => {
            eprintln!("podferry-hook: the agent aborts this restore");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("podferry-hook: restore is aborted: {error}");
            ExitCode::FAILURE
        }
    }
}

fn hold() -> io::Result<Verdict> {
    let mut hook = Hook {
        socket: variable("PODFERRY_HOOK_SOCKET")?,
        init_pid: variable("CRTOOLS_INIT_PID")?,
        migration: variable("PODFERRY_MIGRATION")?,
        criu: parent_id(),
        sealed: false,
    };
    loop {
        match hook.ask() {
            Ok(verdict) => return Ok(verdict),
            Err(error) if !hook.sealed || !hook.criu_lives() => return Err(error),
            Err(_) => sleep(RECONNECT),
        }
    }
}

fn variable(name: &str) -> io::Result<String> {
    env::var(name).map_err(|error| io::Error::new(ErrorKind::InvalidInput, format!("{name}: {error}")))
}

impl Hook {
    /// One connection to the agent, up to its verdict.
    fn ask(&mut self) -> io::Result<Verdict> {
        let mut stream = UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(PARENT_CHECK))?;
        let stage = if self.sealed { "post-restore-sealed" } else { "post-restore" };
        stream.write_all(format!("{stage} {} {}\n", self.init_pid, self.migration).as_bytes())?;
        let mut lines = BufReader::new(stream.try_clone()?);
        loop {
            match self.read_line(&mut lines)?.trim_end() {
                "seal" => {
                    // Sealed before the answer is out: an agent that reads `sealed` may rely on it.
                    self.sealed = true;
                    stream.write_all(b"sealed\n")?;
                }
                "go" => return Ok(Verdict::Go),
                "abort" => return Ok(Verdict::Abort),
                other => {
                    return Err(io::Error::new(ErrorKind::InvalidData, format!("the agent says {other:?}")));
                }
            }
        }
    }

    /// Waits for one whole line for as long as CRIU lives.
    fn read_line(&self, lines: &mut BufReader<UnixStream>) -> io::Result<String> {
        let mut line = String::new();
        loop {
            match lines.read_line(&mut line) {
                Ok(_) if line.ends_with('\n') => return Ok(line),
                Ok(_) => return Err(io::Error::new(ErrorKind::UnexpectedEof, "the agent hung up")),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    if !self.criu_lives() {
                        return Err(io::Error::new(ErrorKind::BrokenPipe, "CRIU is gone"));
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn criu_lives(&self) -> bool {
        parent_id() == self.criu
    }
}
