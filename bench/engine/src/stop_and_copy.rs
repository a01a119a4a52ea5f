//! CRIU alone: dump to a folder in memory, restore from there.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use podferry_criu::CriuLog;

use crate::error::{Error, Result, file};
use crate::victim::Victim;
use crate::{restored, tools};

/// Migrates the process on this machine.
pub fn migrate(victim: &mut Victim) -> Result<()> {
    let folder = victim.next_folder()?;
    let mut command = Command::new(tools::criu()?);
    command.args([
        "dump",
        "--manage-cgroups=ignore",
        "--network-lock",
        "skip",
        "-v1",
        "--log-file",
        "dump.log",
        "--tree",
    ]);
    command.arg(victim.pid().to_string()).arg("--images-dir").arg(folder.join("images"));
    command.arg("--work-dir").arg(folder.join("work"));
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
    let status = status.map_err(file("start", Path::new("criu")))?;
    if !status.success() {
        let failure = CriuLog::of_dump(&folder.join("work")).failure_or(&status.to_string());
        return Err(Error::Program { program: "criu dump", problem: failure.to_string() });
    }
    let pid = restored::restore(&folder, victim.cgroup())?;
    victim.moved(pid)?;
    fs::remove_dir_all(&folder).map_err(file("remove", &folder))
}
