//! Becoming the real tar.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::process::Command;

use crate::error::Error;

/// What a shell exits with when there is no such command.
pub const NOT_FOUND: u8 = 127;

/// Where [`exec`] has got to on PATH, as `PROCESS:POSITION`.
///
/// This program is known by its inode, and a copy of it has another: two copies would run each other for ever. Each goes
/// on behind the place where the one before found it. The process stays the same over exec; a child of tar's that runs
/// tar again starts from the beginning.
pub const TRIED: &str = "PODFERRY_TAR_TRIED";

/// Where `execvp` looks when there is no PATH.
const DEFAULT_PATH: &str = "/bin:/usr/bin";

/// Replaces this process by the first `tar` on PATH that is not this program, with the same arguments, descriptors and
/// environment. It returns only when that fails.
pub fn exec(name: &OsStr, arguments: &[OsString]) -> Error {
    let path = env::var_os("PATH").unwrap_or_else(|| DEFAULT_PATH.into());
    let this = fs::metadata("/proc/self/exe").ok().map(|this| identity(&this));
    let process = std::process::id();
    let mut last: Option<io::Error> = None;
    for (position, folder) in env::split_paths(&path).enumerate().skip(next_position(process)) {
        // An empty part of PATH is the working directory.
        let candidate = if folder.as_os_str().is_empty() { "./tar".into() } else { folder.join("tar") };
        let Ok(found) = fs::metadata(&candidate) else { continue };
        if !found.is_file() || found.mode() & 0o111 == 0 || Some(identity(&found)) == this {
            continue;
        }
        let tried = format!("{process}:{position}");
        last = Some(Command::new(candidate).arg0(name).args(arguments).env(TRIED, tried).exec());
    }
    Error::NoRealTar(last)
}

fn identity(file: &Metadata) -> (u64, u64) {
    (file.dev(), file.ino())
}

fn next_position(process: u32) -> usize {
    let tried = env::var(TRIED).unwrap_or_default();
    match tried.split_once(':') {
        Some((of, position)) if of == process.to_string() => {
            position.parse::<usize>().map_or(0, |position| position + 1)
        }
        _ => 0,
    }
}
