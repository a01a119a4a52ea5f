//! Where the programs are.

use std::path::{Path, PathBuf};

use podferry_memory::hide::LIBRARY;

use crate::error::{Error, Result};

/// The CRIU that `deploy/setup/setup.sh` made, or that of `PODFERRY_TOOLS`.
pub fn criu() -> Result<PathBuf> {
    let given = std::env::var_os("PODFERRY_TOOLS").map(|tools| PathBuf::from(tools).join("bin/criu"));
    let made = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.podferry/tools/bin/criu");
    let found = given.into_iter().chain([made]).find(|path| path.exists());
    found.ok_or_else(|| Error::Program { program: "criu", problem: "run deploy/setup/setup.sh".to_owned() })
}

/// A program or library of this workspace, beside the one that runs.
pub fn built(name: &'static str) -> Result<PathBuf> {
    let here = std::env::current_exe().map_err(crate::error::file("find", Path::new("this program")))?;
    // Tests lie one folder deeper.
    let found = here.ancestors().skip(1).take(2).map(|folder| folder.join(name)).find(|path| path.exists());
    found.ok_or(Error::Program { program: name, problem: "not built: cargo build --workspace --lib --bins".to_owned() })
}

/// The library that is preloaded into `criu dump`.
pub fn shim() -> Result<PathBuf> {
    built(LIBRARY)
}
