//! The standard streams of a container: on pipes or a terminal whose other ends a keeper holds.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use crate::{Outcome, exit_code};

/// Runs `runc create`; the keeper stays behind and ends when the last process of the container has.
pub(crate) fn create(log: &Path, console_socket: Option<&Path>, command: &[OsString]) -> Outcome<ExitCode> {
    let log = File::options().create(true).append(true).open(log)?;
    match console_socket {
        Some(socket) => create_on_terminal(log, socket, command),
        None => create_on_pipes(log, command),
    }
}

fn create_on_pipes(log: File, command: &[OsString]) -> Outcome<ExitCode> {
    let (out_reader, out_writer) = io::pipe()?;
    let (error_reader, error_writer) = io::pipe()?;
    start_keeper(&[], out_reader.into(), Some(error_reader.into()), log)?;
    let status = Command::new(&command[0])
        .args(&command[1..])
        // runc exchanges it for the container's own /dev/null.
        .stdin(Stdio::null())
        .stdout(out_writer)
        .stderr(error_writer)
        .status()?;
    Ok(exit_code(status))
}

fn create_on_terminal(log: File, socket: &Path, command: &[OsString]) -> Outcome<ExitCode> {
    let listener = UnixListener::bind(socket)?;
    let mut keeper = start_keeper(&["--terminal"], listener.into(), None, log)?;
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

/// The keeper has what to read from as its standard input and output, and the log as its standard error.
fn start_keeper(arguments: &[&str], first: OwnedFd, second: Option<OwnedFd>, log: File) -> Outcome<Child> {
    let keeper = Command::new(std::env::current_exe()?)
        .arg("keep")
        .args(arguments)
        .stdin(first)
        .stdout(second.map_or_else(Stdio::null, Stdio::from))
        .stderr(log)
        .spawn()?;
    Ok(keeper)
}

/// The keeper itself.
pub(crate) fn keep(terminal: bool) -> Outcome<ExitCode> {
    let first = io::stdin().as_fd().try_clone_to_owned()?;
    if terminal {
        copy(File::from(receive_terminal(&UnixListener::from(first))?));
        return Ok(ExitCode::SUCCESS);
    }
    let second = io::stdout().as_fd().try_clone_to_owned()?;
    let errors = thread::spawn(|| copy(File::from(second)));
    copy(File::from(first));
    let _ = errors.join();
    Ok(ExitCode::SUCCESS)
}

/// Until the end, which on a terminal is an error. A full disk must not stop the container, so writing may fail.
fn copy(mut from: File) {
    let mut buffer = vec![0; 1 << 16];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return,
            Ok(length) => drop(io::stderr().write_all(&buffer[..length])),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
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
