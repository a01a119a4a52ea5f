//! What is installed is what the code says.

use std::fs;
use std::path::Path;

#[test]
fn the_definitions_in_deploy_are_those_of_the_code() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/crds");
    for (name, definition) in podferry_crds::definitions() {
        let committed = fs::read_to_string(folder.join(&name)).unwrap_or_default();
        let text = serde_saphyr::to_string(&definition).unwrap();
        assert!(committed == text, "{name} is old: run `cargo run -p podferry-crds -- deploy/crds`");
    }
}
