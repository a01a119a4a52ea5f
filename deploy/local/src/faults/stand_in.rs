//! Programs that do as the real ones do until a file says otherwise.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use crate::error::{FileContext, Result};

/// A folder of programs as `programs`, with a stand-in for one of them: a shell script that runs `before` first and then, unless
/// that has ended it, becomes the program.
pub fn folder_with(folder: &Path, programs: &Path, name: &str, before: &str) -> Result<PathBuf> {
    fs::create_dir(folder).at("create the folder", folder)?;
    for entry in fs::read_dir(programs).at("list", programs)?.flatten() {
        if entry.file_name() != name && entry.path().is_file() {
            let link = folder.join(entry.file_name());
            symlink(entry.path(), &link).at("link", &link)?;
        }
    }
    let path = folder.join(name);
    let script = format!("#!/bin/sh\n{before}\nexec {} \"$@\"\n", programs.join(name).display());
    fs::write(&path, script).at("write", &path)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).at("make executable", &path)?;
    Ok(folder.to_owned())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_stand_in_is_the_program_unless_it_has_ended_before() {
        let folder = tempfile::tempdir().unwrap();
        let mark = folder.path().join("mark");
        let before = format!("if test -e {}; then exit 7; fi", mark.display());
        let programs = folder_with(&folder.path().join("bin"), Path::new("/bin"), "echo", &before).unwrap();
        let echo = || Command::new(programs.join("echo")).arg("said").output().unwrap();
        assert_eq!(echo().stdout, b"said\n");
        fs::write(&mark, "").unwrap();
        assert_eq!(echo().status.code(), Some(7));
        assert!(programs.join("true").exists(), "the others are as they were");
    }
}
