use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::path::PathBuf;

use protobuf::{EnumOrUnknown, MessageField};
use rust_criu::rust_criu_protobuf::rpc;
use serde::{Deserialize, Serialize};

/// The most that an open file without a name (CRIU's *ghost file*) may take on its filesystem to be carried along, in bytes:
/// the most that CRIU's RPC can say. CRIU's own limit is 1 MiB, at which databases with temporary files fail in the freeze.
/// What fits into the images' folder is for the caller to look at.
pub const GHOST_LIMIT: u32 = u32::MAX;

/// What CRIU does about the cgroups of what it dumps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CgroupsMode {
    /// Nothing: whoever restores puts the tasks where they belong. Cheapest.
    Ignore,
    /// Note membership and properties; on restore only cgroups that are not there yet get the properties.
    Soft,
}

impl From<CgroupsMode> for rpc::Criu_cg_mode {
    fn from(mode: CgroupsMode) -> Self {
        match mode {
            CgroupsMode::Ignore => Self::IGNORE,
            CgroupsMode::Soft => Self::SOFT,
        }
    }
}

/// What to dump and how. Paths are as the caller's mount namespace sees them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DumpRequest {
    /// The init of the tree, in the caller's pid namespace.
    pub pid: i32,
    /// Where the images go; should be in memory.
    pub images_dir: PathBuf,
    /// Where the log (`dump.log`) goes.
    pub work_dir: PathBuf,
    /// The container's root filesystem.
    pub root: PathBuf,
    /// Mounts that whoever restores makes itself: key (the mount point) and value (the name for it).
    pub external_mounts: Vec<(String, String)>,
    /// Other things that whoever restores brings, in CRIU's `--external` notation.
    pub externals: Vec<String>,
    /// Dump established TCP connections; otherwise they are closed.
    pub tcp_established: bool,
    /// Leave out connections that no process has taken yet, instead of refusing to dump: who opened them is told by a reset.
    #[serde(default)]
    pub skip_in_flight: bool,
    /// The freezer cgroup of the tasks, when there is one: without it CRIU stops them one by one.
    pub freeze_cgroup: Option<PathBuf>,
    /// What to do about cgroups.
    pub cgroups: CgroupsMode,
    /// Seconds that CRIU may take to freeze all tasks.
    pub freeze_timeout_s: u32,
}

impl DumpRequest {
    /// The request in CRIU's words.
    ///
    /// The folders' descriptors must stay open in this process while CRIU works: CRIU looks them up in the `/proc` of
    /// whoever talks to it. `page_socket` is a descriptor number inside CRIU, which it must have inherited.
    pub fn options(&self, images: BorrowedFd<'_>, work: BorrowedFd<'_>, page_socket: RawFd) -> rpc::Criu_opts {
        let mut options = rpc::Criu_opts::new();
        options.set_pid(self.pid);
        options.set_images_dir_fd(images.as_raw_fd());
        options.set_work_dir_fd(work.as_raw_fd());
        options.set_log_file(crate::log::DUMP_LOG.to_owned());
        options.set_log_level(LOG_LEVEL);
        options.set_root(self.root.to_string_lossy().into_owned());
        options.set_notify_scripts(true);
        options.set_file_locks(true);
        options.set_link_remap(true);
        options.set_ghost_limit(GHOST_LIMIT);
        options.set_orphan_pts_master(true);
        // An address in use elsewhere is no concern of the dump; the caller cuts the link itself, which costs a tenth
        // of a millisecond where nftables costs fifteen and leaves rules behind.
        options.network_lock = Some(EnumOrUnknown::new(rpc::Criu_network_lock_method::SKIP));
        options.set_tcp_established(self.tcp_established);
        options.set_tcp_close(!self.tcp_established);
        options.set_tcp_skip_in_flight(self.skip_in_flight);
        options.set_manage_cgroups(true);
        options.manage_cgroups_mode = Some(EnumOrUnknown::new(self.cgroups.into()));
        options.set_timeout(self.freeze_timeout_s);
        options.external.clone_from(&self.externals);
        options.ext_mnt = self.external_mounts.iter().map(external_mount).collect();
        if let Some(cgroup) = &self.freeze_cgroup {
            options.set_freeze_cgroup(cgroup.to_string_lossy().into_owned());
        }
        let mut pages = rpc::Criu_page_server_info::new();
        pages.set_fd(page_socket);
        options.ps = MessageField::some(pages);
        options
    }
}

/// Debug: the line that says why something failed is often one of these.
const LOG_LEVEL: i32 = 4;

fn external_mount((key, value): &(String, String)) -> rpc::Ext_mount_map {
    let mut mount = rpc::Ext_mount_map::new();
    mount.set_key(key.clone());
    mount.set_val(value.clone());
    mount
}
