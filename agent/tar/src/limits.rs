//! Up to which size a tree is simple. Everything is held in memory, and beyond these sizes GNU tar's start no longer
//! matters.

/// Bytes of the content of all regular files.
pub const CONTENT: u64 = 1 << 20;
/// Files of all kinds.
pub const MEMBERS: usize = 8192;
/// Bytes of a path from the root of the tree, or of a symlink's target. The kernel takes 4095 (`PATH_MAX`).
pub const PATH: usize = 4000;
/// Directories in one another: each is held open while the tree is read.
pub const DEPTH: usize = 100;
/// Bytes of an archive as it is stored. Only its own output has to be below it; GNU tar's may be anything.
pub const COMPRESSED: u64 = 8 << 20;
/// Bytes of an archive when it is unpacked in memory.
pub const ARCHIVE: u64 = 32 << 20;
