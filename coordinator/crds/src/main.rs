//! `podferry-crds FOLDER`: writes the definitions of podferry's Kubernetes API as YAML, one file each.

use std::error::Error;
use std::path::PathBuf;

fn main() -> Result<(), Box<dyn Error>> {
    let folder = std::env::args_os().nth(1).map(PathBuf::from).ok_or("usage: podferry-crds FOLDER")?;
    std::fs::create_dir_all(&folder)?;
    for (name, definition) in podferry_crds::definitions() {
        std::fs::write(folder.join(name), serde_saphyr::to_string(&definition)?)?;
    }
    Ok(())
}
