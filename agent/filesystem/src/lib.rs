//! A container's writable layer: what it is, and how it moves from one node to another.
//!
//! A container's root is an overlay mount: read-only layers from its image, and one *upper* directory that holds all the
//! container has written, created and deleted. Only the upper directory moves; the image's layers are already on the
//! target. [`WritableLayer::of`] finds it, [`pack`] turns it into a stream, [`unpack`] makes it again under an empty
//! directory, and [`Overlay::mount`] puts it over the target's own copy of the image.
//!
//! A large layer would keep its container frozen for as long as it takes to send. So what large files hold can be sent while the
//! container runs: a [`Seeder`] sends it as seeds, pass by pass, a [`SeedStore`] keeps them on the target, and the layer itself
//! ([`pack_with_seeds`], [`unpack_with_seeds`]) only says which file each of them is.
//!
//! The stream is read by the target from a peer that may be hostile ([`unpack`] says what it refuses), and it keeps what
//! a tar archive loses easily: whiteouts, opaque directories, extended attributes with binary values, holes,
//! nanoseconds. [The `format` module](mod@format) is its specification.
//!
//! Not carried: inode flags (`chattr`), `SELinux` labels (they come from the target's own specification), access and change
//! times, and overlayfs' private notes about the source's lower layers (`trusted.overlay.origin` and the like).

mod attributes;
mod blocks;
mod error;
pub mod format;
mod layer;
mod mountinfo;
mod pack;
mod seed_store;
mod seeder;
mod tree;
mod unpack;

pub use error::{Error, Result};
pub use layer::{Overlay, WritableLayer, is_mounted, unmount};
pub use pack::{PackStats, pack, pack_with_seeds};
pub use seed_store::{SeedStore, SeedsReceived};
pub use seeder::{Host, Pass, Seeder, SeedsSent};
pub use tree::{free_bytes, sync, wipe};
pub use unpack::{Limits, UnpackStats, unpack, unpack_with_seeds};
