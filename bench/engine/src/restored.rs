//! `criu restore`.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::unistd::Pid;
use podferry_criu::CriuLog;

use crate::error::{Error, Result, file};
use crate::tools;

/// Restores from `FOLDER/images`; with `lazy`, CRIU asks at `FOLDER/restore/lazy-pages.socket` for the pages that the images
/// call so. Gives the number of the first process.
pub fn restore(folder: &Path, lazy: bool) -> Result<Pid> {
    let (work, number) = (folder.join("restore"), folder.join("restore/pid"));
    let mut command = Command::new(tools::criu()?);
    command.args(["restore", "--restore-detached", "--manage-cgroups=ignore", "-v1", "--log-file", "restore.log"]);
    command.arg("--pidfile").arg(&number).arg("--images-dir").arg(folder.join("images")).arg("--work-dir").arg(&work);
    if lazy {
        command.arg("--lazy-pages");
    }
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
    let status = status.map_err(file("start", Path::new("criu")))?;
    if !status.success() {
        return Err(Error::Restore(CriuLog::of_restore(&work).failure_or(&status.to_string())));
    }
    let text = fs::read_to_string(&number).map_err(file("read", &number))?;
    text.trim().parse().map(Pid::from_raw).map_err(|_| Error::Program { program: "criu", problem: "no pid".to_owned() })
}
