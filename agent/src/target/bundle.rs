//! The bundle that a container is restored into: the target's own, prepared by whoever runs this node, or by its containerd.
//!
//! Mounts, devices, cgroup, labels and namespaces come from its `config.json` and from nothing that arrives.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use oci_spec::runtime::Spec;
use podferry_common::failure::{Failure, FailureCode, chain};
use podferry_filesystem::{Overlay, WritableLayer};

/// A bundle, and where its root filesystem's layers are.
#[derive(Clone, Debug)]
pub struct Bundle {
    /// The folder.
    pub dir: PathBuf,
    /// The network namespace's path that `config.json` gives, when it is podferry's to make; none when the container gets one of its
    /// own or shares the host's, and in Kubernetes.
    pub netns: Option<PathBuf>,
    overlay: Overlay,
    /// It is containerd's: what is mounted there, and the layer's folder itself, are removed by that.
    of_pod: bool,
}

impl Bundle {
    /// Reads a workload's bundle: `<bundles_dir>/<workload>/` with `config.json`, `lower` (the image), and room for `upper`, `work` and
    /// `rootfs`.
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
        Ok(Self { netns: podferry_runtime::network_namespace(&spec), ..Self::in_folder(dir) })
    }

    /// One of podferry's own, whose configuration does not matter.
    pub fn in_folder(dir: PathBuf) -> Self {
        let overlay = Overlay { lower: vec![dir.join("lower")], upper: dir.join("upper"), work: dir.join("work") };
        Self { dir, netns: None, overlay, of_pod: false }
    }

    /// That of a pod's container, which its runtime has made and whose root filesystem it has mounted.
    ///
    /// # Errors
    /// When its root filesystem is no overlay.
    pub fn of_pod(dir: PathBuf) -> Result<Self, Failure> {
        let rootfs = dir.join("rootfs");
        let layer = WritableLayer::of(&rootfs).map_err(|error| no_overlay(&rootfs, &chain(&error)))?;
        match layer {
            WritableLayer::Overlay(overlay) => Ok(Self::with_layers(dir, overlay)),
            WritableLayer::Plain { .. } | WritableLayer::Volume { .. } => {
                Err(no_overlay(&rootfs, "it has another kind of file system"))
            }
        }
    }

    /// That of a pod's container whose layers an earlier agent has noted.
    pub fn with_layers(dir: PathBuf, overlay: Overlay) -> Self {
        Self { dir, netns: None, overlay, of_pod: true }
    }

    /// Where the root filesystem gets mounted.
    pub fn rootfs(&self) -> PathBuf {
        self.dir.join("rootfs")
    }

    /// Where the writable layer is.
    pub fn upper(&self) -> PathBuf {
        self.overlay.upper.clone()
    }

    /// Where what comes of the writable layer's files before the freeze is kept; there only meanwhile.
    pub fn seeds(&self) -> PathBuf {
        // Beside the layer, where renaming is moving.
        self.overlay.upper.with_file_name("seeds")
    }

    /// The root filesystem's layers.
    pub fn overlay(&self) -> &Overlay {
        &self.overlay
    }

    /// Makes the empty folders that a restore needs. What an earlier stay of the workload left in the writable layer is
    /// wiped: its truth is elsewhere now.
    ///
    /// # Errors
    /// When a folder cannot be made or wiped.
    pub fn make_room(&self) -> io::Result<()> {
        if self.of_pod {
            // What is mounted must not be changed below.
            podferry_filesystem::unmount(&self.rootfs()).map_err(io::Error::other)?;
        }
        for dir in [self.upper(), self.overlay.work.clone(), self.rootfs()] {
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

    /// Whether the root filesystem is mounted, and no placeholder of it.
    pub fn is_mounted(&self) -> bool {
        let layer = WritableLayer::of(&self.rootfs());
        matches!(layer, Ok(WritableLayer::Overlay(overlay)) if overlay.upper == self.overlay.upper)
    }

    fn wipe_layer(&self) -> io::Result<()> {
        for dir in [self.upper(), self.overlay.work.clone()] {
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

fn no_overlay(rootfs: &Path, why: &str) -> Failure {
    Failure::new(FailureCode::FailedPrecondition, format!("{} is not mounted as an overlay: {why}", rootfs.display()))
        .in_phase("prepare")
        .remedy("let containerd use the snapshotter overlayfs")
}

fn refused(message: String) -> Failure {
    Failure::new(FailureCode::FailedPrecondition, message)
        .in_phase("preflight")
        .remedy("prepare the workload's bundle on this node: see docs/operations.md, \"Preparing a target\"")
}
