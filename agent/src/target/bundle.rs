//! The bundle that a container is restored into: the target's own, prepared by whoever runs this node.
//!
//! Mounts, devices, cgroup, labels and namespaces come from its `config.json` and from nothing that arrives.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use oci_spec::runtime::Spec;
use podferry_common::failure::{Failure, FailureCode};
use podferry_filesystem::Overlay;

/// `<bundles_dir>/<workload>/` with `config.json`, `lower` (the image), and room for `upper`, `work` and `rootfs`.
#[derive(Clone, Debug)]
pub struct Bundle {
    /// The folder.
    pub dir: PathBuf,
    /// The network namespace's path that `config.json` gives; none when the container gets one of its own or shares the
    /// host's.
    pub netns: Option<PathBuf>,
}

impl Bundle {
    /// Reads a workload's bundle.
    ///
    /// # Errors
    /// When it is not there or not whole: each says what is missing and how to prepare it.
    pub fn read(bundles_dir: &Path, workload: &str) -> Result<Self, Failure> {
        let dir = bundles_dir.join(workload);
        let config = dir.join("config.json");
        if !config.is_file() {
            return Err(refused(format!("there is no bundle for {workload}: {} is missing", config.display())));
        }
        if !dir.join("lower").is_dir() {
            return Err(refused(format!("the bundle of {workload} has no image: {}/lower is missing", dir.display())));
        }
        let spec = Spec::load(&config).map_err(|error| refused(format!("{} is wrong: {error}", config.display())))?;
        Ok(Self { netns: podferry_runtime::network_namespace(&spec), dir })
    }

    /// Where the root filesystem gets mounted.
    pub fn rootfs(&self) -> PathBuf {
        self.dir.join("rootfs")
    }

    /// Where the writable layer is.
    pub fn upper(&self) -> PathBuf {
        self.dir.join("upper")
    }

    /// Where what comes of the writable layer's files before the freeze is kept; there only meanwhile.
    pub fn seeds(&self) -> PathBuf {
        self.dir.join("seeds")
    }

    /// The root filesystem's layers.
    pub fn overlay(&self) -> Overlay {
        Overlay { lower: vec![self.dir.join("lower")], upper: self.upper(), work: self.dir.join("work") }
    }

    /// Makes the empty folders that a restore needs. What an earlier stay of the workload left in the writable layer is
    /// wiped: its truth is elsewhere now.
    ///
    /// # Errors
    /// When a folder cannot be made or wiped.
    pub fn make_room(&self) -> io::Result<()> {
        for dir in [self.upper(), self.dir.join("work"), self.rootfs()] {
            fs::create_dir_all(&dir)?;
        }
        self.wipe_layer()
    }

    /// Unmounts the root filesystem, when it is mounted, and wipes the writable layer. Idempotent.
    ///
    /// # Errors
    /// When it is busy.
    pub fn dismantle(&self) -> io::Result<()> {
        podferry_filesystem::unmount(&self.rootfs()).map_err(io::Error::other)?;
        self.wipe_layer()
    }

    /// Whether the root filesystem is mounted.
    pub fn is_mounted(&self) -> bool {
        let layer = podferry_filesystem::WritableLayer::of(&self.rootfs());
        matches!(layer, Ok(podferry_filesystem::WritableLayer::Overlay(_)))
    }

    fn wipe_layer(&self) -> io::Result<()> {
        for dir in [self.upper(), self.dir.join("work")] {
            if dir.is_dir() {
                podferry_filesystem::wipe(&dir).map_err(io::Error::other)?;
            }
        }
        if self.seeds().is_dir() {
            podferry_filesystem::wipe(&self.seeds()).map_err(io::Error::other)?;
            fs::remove_dir(self.seeds())?;
        }
        Ok(())
    }
}

fn refused(message: String) -> Failure {
    Failure::new(FailureCode::FailedPrecondition, message)
        .in_phase("preflight")
        .remedy("prepare the workload's bundle on this node: see docs/operations.md, \"Preparing a target\"")
}
