//! What tests of whole clusters share.

#![allow(dead_code, unused_imports, reason = "each test binary uses its own part")]
#![allow(unreachable_pub, reason = "a module of several test binaries")]
#![allow(clippy::unwrap_used, reason = "a helper that fails has to fail its test")]

pub mod cases;
pub mod moments;
pub mod stage;

use std::fs::File;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Once;
use std::time::Duration;

use podferry_local::faults;
pub use podferry_local::faults::{PATIENCE, client, leftovers, processes, sampler};
use podferry_local::{FIRST_CONTAINER_ADDRESS, Options, Workload, workspace_root};

/// One test at a time, over all test binaries: two clusters under load on two cores would only wait for each other.
pub fn serial() -> File {
    let path = std::env::temp_dir().join("podferry-local-tests.lock");
    let lock = File::create(path).unwrap();
    lock.lock().unwrap();
    lock
}

/// Options for a whole cluster. `cargo test` builds this crate's own programs only, so the others are built here when
/// nobody has yet.
pub fn options(folder: impl Into<PathBuf>) -> Options {
    static BUILT: Once = Once::new();
    let options = Options::new(folder);
    BUILT.call_once(|| {
        let wanted = ["podferry", "podferry-agent", "podferry-coordinator", "podferry-dump-worker", "podferry-pager"];
        if wanted.iter().all(|name| options.binaries.join(name).exists()) {
            return;
        }
        let release = options.binaries.ends_with("release").then_some("--release");
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--quiet", "--bins", "-p", "podferry", "-p", "podferry-agent"]);
        build.args(["-p", "podferry-coordinator", "-p", "podferry-runtime"]).args(release);
        assert!(build.current_dir(workspace_root()).status().unwrap().success());
    });
    options
}

/// The image that `deploy/setup` makes.
pub fn redis_rootfs() -> PathBuf {
    let rootfs = workspace_root().join(".podferry/images/redis/rootfs");
    assert!(rootfs.join("usr/bin/redis-server").exists(), "{} is missing: run deploy/setup/setup.sh", rootfs.display());
    rootfs
}

/// A Redis at the first container address.
pub fn redis() -> Workload {
    let arguments = ["/bin/redis-server", "--protected-mode", "no", "--save", "", "--dir", "/data"];
    Workload::new("redis", redis_rootfs(), arguments, FIRST_CONTAINER_ADDRESS)
}

/// Waits for something that has to come within [`PATIENCE`], looking `every` so often.
pub fn wait_every<T>(every: Duration, what: &str, look: impl FnMut() -> Option<T>) -> T {
    faults::wait_every(every, what, look).unwrap()
}

/// Waits for something that has to come.
pub fn wait_for<T>(what: &str, look: impl FnMut() -> Option<T>) -> T {
    faults::wait_for(what, look).unwrap()
}
