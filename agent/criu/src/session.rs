use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};

use command_fds::{CommandFdExt as _, FdMapping};
use protobuf::{EnumOrUnknown, Message as _, MessageField};
use rust_criu::rust_criu_protobuf::rpc;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};

use crate::{CriuError, CriuLog};

/// Where `criu swrk` finds its socket. Descriptors that the caller passes on must be numbered above it.
const RPC_FD: i32 = 3;
/// The longest answer of CRIU that is read, in bytes. Its messages are below 1 KiB.
const LONGEST_ANSWER: usize = 64 * 1024;

/// What CRIU tells of its progress, and waits for an answer to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notification {
    /// CRIU's word for the moment: `pre-dump`, `network-lock`, `post-dump`, `network-unlock`, …
    pub name: String,
    /// The init of the tree, where CRIU gives it.
    pub pid: Option<i32>,
}

/// The answer to a [`Notification`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Go on.
    Proceed,
    /// Fail: CRIU undoes what it did and resumes the tasks.
    GiveUp,
}

/// One `criu swrk` and the conversation with it.
///
/// The conversation is our own and not rust-criu's, whose message types it uses: that one hangs up on a CRIU after a
/// refused notification and kills one that reports a failure, while a CRIU that holds tasks has to be heard out.
#[derive(Debug)]
pub struct Session {
    child: Child,
    socket: OwnedFd,
}

impl Session {
    /// Starts CRIU. `inherit` are further descriptors that it gets, numbered 4 and above.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn start(criu: &Path, inherit: Vec<FdMapping>) -> Result<Self, CriuError> {
        Self::start_with(criu, inherit, [])
    }

    /// As [`Session::start`], with further variables in CRIU's environment.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn start_with(
        criu: &Path,
        mut inherit: Vec<FdMapping>,
        environment: impl IntoIterator<Item = (OsString, OsString)>,
    ) -> Result<Self, CriuError> {
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .map_err(|error| start_error(criu, error.into()))?;
        inherit.push(FdMapping { parent_fd: theirs, child_fd: RPC_FD });
        let mut command = Command::new(criu);
        command.envs(environment);
        command.arg("swrk").arg(RPC_FD.to_string()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command
            .fd_mappings(inherit)
            .map_err(|_| start_error(criu, io::Error::other("two descriptors for one number")))?;
        let child = command.spawn().map_err(|source| start_error(criu, source))?;
        Ok(Self { child, socket: ours })
    }

    /// The process id of CRIU.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Dumps, asking `on_notify` at each of CRIU's notifications. Returns when CRIU has ended.
    ///
    /// After `Ok` the tasks are dead. After [`CriuError::GivenUp`] and [`CriuError::Dump`] they run on.
    ///
    /// # Errors
    /// [`CriuError::Gone`] when CRIU was killed: then the tasks may run on or not, and the caller has to look.
    pub fn dump(
        mut self,
        options: rpc::Criu_opts,
        log: &CriuLog,
        mut on_notify: impl FnMut(&Notification) -> Verdict,
    ) -> Result<(), CriuError> {
        let mut request = rpc::Criu_req::new();
        request.set_type(rpc::Criu_req_type::DUMP);
        request.opts = MessageField::some(options);
        self.say(&request)?;

        let mut given_up = false;
        loop {
            let answer = self.hear()?;
            if answer.type_() != rpc::Criu_req_type::NOTIFY {
                return self.finish(&answer, log, given_up);
            }
            let verdict = on_notify(&Notification {
                name: answer.notify.script().to_owned(),
                pid: answer.notify.has_pid().then(|| answer.notify.pid()),
            });
            given_up |= verdict == Verdict::GiveUp;
            self.say(&notify_answer(verdict))?;
        }
    }

    fn finish(mut self, answer: &rpc::Criu_resp, log: &CriuLog, given_up: bool) -> Result<(), CriuError> {
        let _ended = self.child.wait();
        // `cr_errmsg` alone says nothing: a harmless complaint comes with success.
        if answer.success() {
            return Ok(());
        }
        if given_up {
            return Err(CriuError::GivenUp);
        }
        Err(CriuError::Dump { failure: log.failure_or(answer.cr_errmsg()), errno: answer.cr_errno() })
    }

    fn say(&mut self, request: &rpc::Criu_req) -> Result<(), CriuError> {
        let bytes = request.write_to_bytes()?;
        match send(self.socket.as_fd(), &bytes, SendFlags::NOSIGNAL) {
            Ok(_) => Ok(()),
            Err(rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET) => Err(self.gone()),
            Err(error) => Err(CriuError::Conversation { doing: "sending", source: error.into() }),
        }
    }

    fn hear(&mut self) -> Result<rpc::Criu_resp, CriuError> {
        let mut buffer = vec![0; LONGEST_ANSWER];
        loop {
            match recv(self.socket.as_fd(), &mut *buffer, RecvFlags::empty()) {
                Ok((0, _)) | Err(rustix::io::Errno::CONNRESET) => return Err(self.gone()),
                Ok((length, _)) => return Ok(rpc::Criu_resp::parse_from_bytes(&buffer[..length.min(LONGEST_ANSWER)])?),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(CriuError::Conversation { doing: "receiving", source: error.into() }),
            }
        }
    }

    fn gone(&mut self) -> CriuError {
        let status = self.child.wait().map_or_else(|error| error.to_string(), describe);
        CriuError::Gone { status }
    }
}

fn start_error(criu: &Path, source: io::Error) -> CriuError {
    CriuError::Start { path: criu.to_owned(), source }
}

fn notify_answer(verdict: Verdict) -> rpc::Criu_req {
    let mut answer = rpc::Criu_req::new();
    answer.type_ = Some(EnumOrUnknown::new(rpc::Criu_req_type::NOTIFY));
    answer.set_notify_success(verdict == Verdict::Proceed);
    answer
}

fn describe(status: ExitStatus) -> String {
    match status.signal() {
        Some(signal) => format!("killed by signal {signal}"),
        None => format!("exit code {}", status.code().unwrap_or_default()),
    }
}
