//! The standard streams of a container: on a pipe or a terminal whose other end a keeper holds. CRIU cannot dump a
//! container whose standard output is a file of the machine.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use crate::{Outcome, exit_code};

/// Runs `runc create` with both output streams on one pipe, whose other end `podferry-stdio-keeper` holds.
pub(crate) fn create_on_pipe(keeper: &Path, log: &Path, command: &[OsString]) -> Outcome<ExitCode> {
    let (reader, writer) = io::pipe()?;
    let detached = Command::new(keeper).arg(log).stdin(reader).stdout(Stdio::null()).status()?;
    if !detached.success() {
        return Err(format!("{} cannot write {}", keeper.display(), log.display()).into());
    }
    let status = Command::new(&command[0])
        .args(&command[1..])
        // runc exchanges it for the container's own /dev/null.
        .stdin(Stdio::null())
        .stdout(writer.try_clone()?)
        .stderr(writer)
        .status()?;
    Ok(exit_code(status))
}

/// Runs `runc create` with a terminal, whose master side a keeper of our own holds.
pub(crate) fn create_on_terminal(socket: &Path, log: &Path, command: &[OsString]) -> Outcome<ExitCode> {
    let log = File::options().create(true).append(true).open(log)?;
    let listener = UnixListener::bind(socket)?;
    let mut keeper = Command::new(std::env::current_exe()?)
        .arg("keep")
        .stdin(OwnedFd::from(listener))
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()?;
    // The container's name is the last argument, options come before it.
    let (name, create) = command.split_last().ok_or("no command")?;
    let status = Command::new(&create[0])
        .args(&create[1..])
        .arg("--console-socket")
        .arg(socket)
        .arg(name)
        .stdin(Stdio::null())
        .status();
    fs::remove_file(socket)?;
    let status = status?;
    if !status.success() {
        // Nobody will hand it a terminal any more.
        let _ = keeper.kill();
    }
    Ok(exit_code(status))
}

/// The keeper of a terminal: what comes is written to standard error, which is the log.
pub(crate) fn keep() -> Outcome<ExitCode> {
    let listener = UnixListener::from(io::stdin().as_fd().try_clone_to_owned()?);
    let mut master = File::from(receive_terminal(&listener)?);
    let mut buffer = vec![0; 1 << 16];
    loop {
        match master.read(&mut buffer) {
            // A full disk must not stop the container, so writing may fail.
            Ok(length) if length > 0 => drop(io::stderr().write_all(&buffer[..length])),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // The end of a terminal is an error: its last user has closed it.
            Ok(_) | Err(_) => return Ok(ExitCode::SUCCESS),
        }
    }
}

/// runc connects once and sends the terminal's master side as `SCM_RIGHTS`, with its name as the data.
fn receive_terminal(listener: &UnixListener) -> Outcome<OwnedFd> {
    let (connection, _) = listener.accept()?;
    receive_descriptor(&connection)
}

fn receive_descriptor(connection: &UnixStream) -> Outcome<OwnedFd> {
    let mut name = [0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    recvmsg(connection, &mut [IoSliceMut::new(&mut name)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    let descriptor = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    Ok(descriptor.ok_or("runc sent no terminal")?)
}
