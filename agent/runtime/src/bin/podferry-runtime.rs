//! The OCI runtime of the runtime class `podferry`: the node's runc, and for pods that come by a migration the restore of their
//! containers. See [`podferry_runtime::wrapper`].

use std::env;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

fn main() -> ExitCode {
    let words: Vec<OsString> = env::args_os().skip(1).collect();
    // The real path: the link that the runtime's configuration names points at the installed version.
    let program = env::current_exe().unwrap_or_else(|_| PathBuf::from("/opt/podferry/current/podferry-runtime"));
    podferry_runtime::wrapper::run(&program, &words)
}
