//! CRIU's `tar`: packs and unpacks a container's small tmpfs mounts in a fraction of the time that GNU tar takes.
//!
//! CRIU runs `tar --gzip` once for each tmpfs of a container, at the dump and at the restore, while the container stands
//! still. Most of them are nearly empty, and what costs time is to start tar and gzip. This program takes the two calls
//! that CRIU makes ([`arguments`]) when the tree or the archive is *simple*, and hands everything else, arguments
//! untouched, to the real tar ([`fallback`]). What it writes is an ordinary archive, which any tar unpacks, and it
//! unpacks what GNU tar wrote.
//!
//! Simple are directories, symlinks, devices, fifos, and regular files of one name and without holes, within the
//! [`limits`]. A socket is left out with a note, as GNU tar leaves it out.
//!
//! Unlike GNU tar's own format this one's keeps the nanoseconds of a modification time.

pub mod arguments;
pub mod create;
mod error;
pub mod extract;
pub mod fallback;
pub mod limits;

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::ExitCode;

use arguments::Call;
pub use error::{Error, Result};

/// What GNU tar exits with after an error.
const FAILED: u8 = 2;

/// Does what the command line asks, itself or by becoming the real tar. The first argument is the program's name.
pub fn run(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let name = arguments.next().unwrap_or_else(|| OsString::from("tar"));
    let arguments: Vec<OsString> = arguments.collect();
    let ready = match Call::of(&arguments) {
        Call::Create => create::pack(io::stdin().as_fd()).map(Ready::Packed),
        Call::Extract { directory } => plan(directory).map(Ready::Planned),
        Call::Other => return become_real_tar(&name, &arguments),
    };
    // Up to here nothing was written anywhere, so the real tar finds everything as this program found it.
    let outcome = match ready {
        Ok(Ready::Packed(archive)) => deliver(&archive),
        Ok(Ready::Planned(plan)) => plan.carry_out(),
        Err(why) => {
            say(&format_args!("left to the real tar: {}", with_causes(&why)));
            return become_real_tar(&name, &arguments);
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format_args!("{}", with_causes(&error)));
            ExitCode::from(FAILED)
        }
    }
}

enum Ready {
    Packed(create::Packed),
    Planned(extract::Plan),
}

fn plan(directory: &Path) -> Result<extract::Plan> {
    let compressed = extract::read(io::stdin().as_fd())?;
    extract::Plan::of(&compressed, directory)
}

fn deliver(archive: &create::Packed) -> Result<()> {
    for socket in &archive.sockets {
        say(&format_args!("{}: socket ignored", socket.display()));
    }
    // Not through Stdout, which looks for lines.
    let stdout = io::stdout().as_fd().try_clone_to_owned().map_err(Error::Output)?;
    File::from(stdout).write_all(&archive.bytes).map_err(Error::Output)
}

fn become_real_tar(name: &OsStr, arguments: &[OsString]) -> ExitCode {
    let error = fallback::exec(name, arguments);
    say(&format_args!("{}", with_causes(&error)));
    ExitCode::from(fallback::NOT_FOUND)
}

/// A message for CRIU's log. Nothing can be done about a log that cannot be written.
fn say(what: &std::fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr(), "podferry-tar: {what}");
}

fn with_causes(error: &Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
