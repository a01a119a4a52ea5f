//! `criu restore`.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::unistd::Pid;
use podferry_criu::CriuLog;

use crate::error::{Error, Result, file};
use crate::tools;

/// Restores from `FOLDER/images`; with `lazy`, CRIU asks at `FOLDER/restore/lazy-pages.socket` for the pages that the images
/// call so. The processes come into a cgroup, if one is given. Gives the number of the first process.
pub fn restore(folder: &Path, lazy: bool, cgroup: Option<&Path>) -> Result<Pid> {
    let (work, number) = (folder.join("restore"), folder.join("restore/pid"));
    let mut command = within(cgroup, &tools::criu()?);
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

/// A program that runs in a cgroup.
fn within(cgroup: Option<&Path>, program: &Path) -> Command {
    let Some(cgroup) = cgroup else { return Command::new(program) };
    let mut command = Command::new("sh");
    command.args(["-c", "echo $$ >\"$1/cgroup.procs\" && shift && exec \"$@\"", "sh"]).arg(cgroup).arg(program);
    command
}
