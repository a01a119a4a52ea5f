//! Any tree comes out as it went in. Needs root, for owners and whiteouts.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::fs;
use std::os::unix::fs::{FileExt, chown, symlink};
use std::path::{Path, PathBuf};

use common::tree;
use podferry_filesystem::{Limits, Overlay, WritableLayer, pack, unpack};
use proptest::prelude::*;
use rustix::fs::{
    AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags, chmodat, lsetxattr, mknodat, utimensat,
};

#[derive(Clone, Debug)]
enum What {
    Directory,
    File { extents: Vec<(u32, Vec<u8>)>, length: u32 },
    Symlink(String),
    HardLink(prop::sample::Index),
    Fifo,
    Socket,
    Whiteout,
}

#[derive(Clone, Debug)]
struct Node {
    /// Which of the directories made so far it goes into.
    parent: prop::sample::Index,
    name: String,
    what: What,
    mode: u32,
    owner: (u32, u32),
    mtime: (i64, i64),
    xattr: Option<(String, Vec<u8>)>,
}

fn what() -> impl Strategy<Value = What> {
    let extent = (0_u32..4_000_000, prop::collection::vec(any::<u8>(), 1..9000));
    prop_oneof![
        3 => Just(What::Directory),
        4 => (prop::collection::vec(extent, 0..4), 0_u32..5_000_000).prop_map(|(extents, length)| What::File { extents, length }),
        1 => "[a-z./]{1,40}".prop_map(What::Symlink),
        2 => any::<prop::sample::Index>().prop_map(What::HardLink),
        1 => Just(What::Fifo),
        1 => Just(What::Socket),
        1 => Just(What::Whiteout),
    ]
}

fn node() -> impl Strategy<Value = Node> {
    let xattr = prop::option::of(("user\\.[a-z]{1,20}", prop::collection::vec(any::<u8>(), 0..300)));
    let owner = (0_u32..70_000, 0_u32..70_000);
    let mtime = (-1_000_000_000_i64..4_000_000_000, 0_i64..1_000_000_000);
    (any::<prop::sample::Index>(), "[ -.0-~é]{1,12}", what(), 0_u32..0o10000, owner, mtime, xattr).prop_map(
        |(parent, name, what, mode, owner, mtime, xattr)| Node { parent, name, what, mode, owner, mtime, xattr },
    )
}

/// Makes the tree, without the nodes whose name is taken or that have nothing to link to.
fn make(root: &Path, nodes: &[Node]) {
    let mut directories = vec![root.to_owned()];
    let mut leaves: Vec<PathBuf> = Vec::new();
    let mut made: Vec<(PathBuf, &Node)> = Vec::new();
    for node in nodes {
        let path = node.parent.get(&directories).join(&node.name);
        if node.name.trim_matches('.').is_empty() || path.symlink_metadata().is_ok() {
            continue;
        }
        let special = |kind| mknodat(CWD, &path, kind, Mode::empty(), 0).unwrap();
        match &node.what {
            What::Directory => {
                fs::create_dir(&path).unwrap();
                directories.push(path.clone());
            }
            What::File { extents, length } => {
                let file = fs::File::create(&path).unwrap();
                file.set_len(u64::from(*length)).unwrap();
                for (offset, bytes) in extents {
                    file.write_all_at(bytes, u64::from(*offset)).unwrap();
                }
            }
            What::Symlink(text) => symlink(text, &path).unwrap(),
            What::HardLink(_) if leaves.is_empty() => continue,
            What::HardLink(target) => fs::hard_link(target.get(&leaves), &path).unwrap(),
            What::Fifo => special(FileType::Fifo),
            What::Socket => special(FileType::Socket),
            What::Whiteout => special(FileType::CharacterDevice),
        }
        if !matches!(node.what, What::Directory | What::Whiteout) {
            leaves.push(path.clone());
        }
        made.push((path, node));
    }
    // Children first, as making them touches their directories.
    for (path, node) in made.iter().rev() {
        dress(path, node);
    }
}

fn dress(path: &Path, node: &Node) {
    std::os::unix::fs::lchown(path, Some(node.owner.0), Some(node.owner.1)).unwrap();
    let kind = path.symlink_metadata().unwrap().file_type();
    if !kind.is_symlink() {
        chmodat(CWD, path, Mode::from_raw_mode(node.mode), AtFlags::empty()).unwrap();
    }
    if let Some((name, value)) = node.xattr.as_ref().filter(|_| kind.is_file() || kind.is_dir()) {
        lsetxattr(path, name.as_str(), value, XattrFlags::empty()).unwrap();
    }
    let time = Timespec { tv_sec: node.mtime.0, tv_nsec: node.mtime.1 };
    let times = Timestamps { last_access: time, last_modification: time };
    utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn any_tree_comes_out_as_it_went_in(nodes in prop::collection::vec(node(), 0..40)) {
        let (source, target) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        make(source.path(), &nodes);
        chown(source.path(), Some(77), Some(78)).unwrap();
        let overlay = Overlay { lower: Vec::new(), upper: source.path().to_owned(), work: PathBuf::new() };
        let mut stream = Vec::new();
        let packed = pack(&WritableLayer::Overlay(overlay), &mut stream).unwrap();
        let unpacked = unpack(stream.as_slice(), target.path(), &Limits::default()).unwrap();
        prop_assert_eq!(packed.entries, unpacked.entries);
        prop_assert_eq!(tree(source.path()), tree(target.path()));

        // Cut off anywhere, it is an error and not a smaller tree.
        let cut = stream.len() * 2 / 3;
        let half = tempfile::tempdir().unwrap();
        prop_assert!(unpack(&stream[..cut], half.path(), &Limits::default()).is_err());
    }
}
