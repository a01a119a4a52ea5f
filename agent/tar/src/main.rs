//! `tar` for CRIU: see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    podferry_tar::run(std::env::args_os())
}
