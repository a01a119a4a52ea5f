//! CRIU's action script on the target: holds a restored container before its first instruction until the agent decides.
//!
//! CRIU runs it at every stage; only two matter. At `post-restore` all processes exist, nothing runs yet, and failing
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
//! At `pre-resume`, just before the processes run, it connects again and says `pre-resume MIGRATION`: from here on the sockets take
//! what comes. Whether that reaches anybody changes nothing.
//!
//! Before `seal`, end of file or any error means abort: it fails closed. After it the coordinator may have committed the
//! migration to this copy, so the hook asks again every 100 ms, for ever: killing the copy is not its decision any more.
//! A hook whose CRIU died exits at once, since there is nobody left to hold the container for.

use std::env;
use std::fs;
use std::io::{self, BufRead, BufReader, ErrorKind, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::parent_id;
use std::process::ExitCode;
use std::thread::sleep;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// Between two attempts of a sealed hook to find its agent.
const RECONNECT: Duration = Duration::from_millis(100);

/// What the agent decided.
enum Verdict {
    Go,
    Abort,
}

struct Hook {
    socket: String,
    init_pid: String,
    migration: String,
    /// Readable once CRIU is dead.
    criu: OwnedFd,
    sealed: bool,
}

fn main() -> ExitCode {
    let action = env::var_os("CRTOOLS_SCRIPT_ACTION").unwrap_or_default();
    if action == "pre-resume" {
        let _not_heard = tell_resume();
    }
    if action != "post-restore" {
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

fn tell_resume() -> io::Result<()> {
    let migration = variable("PODFERRY_MIGRATION")?;
    UnixStream::connect(variable("PODFERRY_HOOK_SOCKET")?)?.write_all(format!("pre-resume {migration}\n").as_bytes())
}

fn hold() -> io::Result<Verdict> {
    let mut hook = Hook {
        socket: variable("PODFERRY_HOOK_SOCKET")?,
        init_pid: variable("CRTOOLS_INIT_PID")?,
        migration: variable("PODFERRY_MIGRATION")?,
        criu: criu()?,
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

    /// Waits for one whole line for as long as CRIU lives. The agent has to hear of its death at once: it must not connect
    /// a copy that nobody completes.
    fn read_line(&self, lines: &mut BufReader<UnixStream>) -> io::Result<String> {
        let mut line = Vec::new();
        while line.last() != Some(&b'\n') {
            if lines.buffer().is_empty() {
                self.wait(lines.get_ref())?;
            }
            let available = lines.fill_buf()?;
            let end = available.iter().position(|byte| *byte == b'\n').map_or(available.len(), |at| at + 1);
            if end == 0 {
                return Err(io::Error::new(ErrorKind::UnexpectedEof, "the agent hung up"));
            }
            line.extend_from_slice(&available[..end]);
            lines.consume(end);
        }
        String::from_utf8(line).map_err(|error| io::Error::new(ErrorKind::InvalidData, error))
    }

    /// Waits until the agent has said something.
    fn wait(&self, stream: &UnixStream) -> io::Result<()> {
        let mut watched = [PollFd::new(stream, PollFlags::IN), PollFd::new(&self.criu, PollFlags::IN)];
        match poll(&mut watched, None) {
            Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
            Ok(_) if watched[1].revents().is_empty() => Ok(()),
            Ok(_) => Err(io::Error::new(ErrorKind::BrokenPipe, "CRIU is gone")),
        }
    }

    fn criu_lives(&self) -> bool {
        let mut watched = [PollFd::new(&self.criu, PollFlags::IN)];
        poll(&mut watched, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) == Ok(0)
    }
}

/// The CRIU that runs this. It runs its scripts by `sh -c`; most shells become the script, some wait for it.
fn criu() -> io::Result<OwnedFd> {
    let mut pid = parent_id();
    if fs::read_to_string(format!("/proc/{pid}/comm"))?.trim_end() == "sh" {
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let parent = status.lines().find_map(|line| line.strip_prefix("PPid:")?.trim().parse().ok());
        pid = parent.ok_or_else(|| io::Error::new(ErrorKind::InvalidData, "the shell has no parent"))?;
    }
    let criu = Pid::from_raw(pid.cast_signed()).ok_or_else(|| io::Error::from(ErrorKind::NotFound))?;
    Ok(pidfd_open(criu, PidfdFlags::empty())?)
}
