//! A simple tree comes out as it went in, whoever packs and whoever unpacks. Needs root, for owners and devices.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{By, Place, done, dress, in_whole_seconds, log, node, tree};
use podferry_tar::arguments::CREATE;
use proptest::prelude::*;
use rustix::fs::{FileType, makedev};

const PAIRS: [(By, By); 3] = [(By::Ours, By::Ours), (By::Ours, By::Gnu), (By::Gnu, By::Ours)];

/// One of every kind, and every oddity that is still simple.
fn make(root: &Path) {
    let file = |name: &str, content: &[u8], owner, mode, mtime| {
        fs::write(root.join(name), content).unwrap();
        dress(&root.join(name), owner, mode, mtime);
    };
    file("file", b"content", (0, 0), 0o644, (1_700_000_000, 123_456_789));
    file("empty", b"", (1, 2), 0, (0, 0));
    file("setuid", &[7; 512], (1000, 1000), 0o6755, (1, 1));
    file("block and a bit", &[8; 513], (3_000_000_000, 2_097_152), 0o600, (4_000_000_000, 999_999_999));
    file("new\nline\\n", b"\0\xff", (65534, 65534), 0o640, (1_700_000_000, 0));
    file(" -*?[", b"-", (0, 0), 0o777, (1_700_000_000, 5));
    fs::write(root.join(OsStr::from_bytes(b"\xff\xfe\x80")), b"no text").unwrap();
    for length in [96, 97, 98, 99, 100, 101, 255] {
        file(&"n".repeat(length), b"long name", (0, 0), 0o644, (1_600_000_000, 100));
        symlink("t".repeat(length), root.join(format!("link{length}"))).unwrap();
    }
    symlink("t".repeat(3000), root.join("far")).unwrap();
    for (name, target) in
        [("link", "file"), ("dangling", "../no/where"), ("core", "/proc/kcore"), ("to\nline", "a\nb ")]
    {
        symlink(target, root.join(name)).unwrap();
        dress(&root.join(name), (5, 6), 0, (1_500_000_000, 42));
    }
    for (name, kind, device) in [
        ("null", FileType::CharacterDevice, makedev(1, 3)),
        ("whiteout", FileType::CharacterDevice, 0),
        ("disk", FileType::BlockDevice, makedev(259, 1_048_575)),
        ("fifo", FileType::Fifo, 0),
    ] {
        node(&root.join(name), kind, device);
        dress(&root.join(name), (0, 5), 0o666, (1_400_000_000, 77));
    }
    let deep = root.join("deep").join("d".repeat(120)).join("inner");
    fs::create_dir_all(&deep).unwrap();
    fs::write(deep.join("leaf"), b"leaf").unwrap();
    symlink("../..", deep.join("up")).unwrap();
    dress(&deep, (9, 9), 0o2750, (1_300_000_000, 1));
    fs::create_dir(root.join("locked")).unwrap();
    dress(&root.join("locked"), (0, 0), 0, (1_300_000_000, 2));
    fs::create_dir(root.join("sticky")).unwrap();
    fs::write(root.join("sticky/child"), b"").unwrap();
    dress(&root.join("sticky"), (0, 0), 0o1777, (1_300_000_000, 3));
    dress(root, (12, 34), 0o1711, (1_200_000_000, 4));
}

#[test]
fn every_simple_kind_comes_out_as_it_went_in() {
    for (packer, unpacker) in PAIRS {
        let place = Place::new();
        let (from, to) = (place.directory("from"), place.directory("to"));
        make(&from);
        let mut before = tree(&from);
        if packer == By::Gnu {
            before = in_whole_seconds(before);
        }
        place.unpack(unpacker, &place.pack(packer, &from), &to);
        assert_eq!(tree(&to), before, "{packer:?} to {unpacker:?}");
    }
}

#[test]
fn an_empty_tree_keeps_its_own_metadata() {
    for (packer, unpacker) in PAIRS {
        let place = Place::new();
        let (from, to) = (place.directory("from"), place.directory("to"));
        dress(&from, (1, 2), 0o1777, (1_700_000_000, 0));
        place.unpack(unpacker, &place.pack(packer, &from), &to);
        assert_eq!(tree(&to), tree(&from), "{packer:?} to {unpacker:?}");
    }
}

#[test]
fn nanoseconds_that_gnu_tar_wrote_are_kept() {
    let place = Place::new();
    let (from, to) = (place.directory("from"), place.directory("to"));
    fs::write(from.join("file"), b"content").unwrap();
    dress(&from, (0, 0), 0o700, (1_700_000_000, 120_000_000));
    let image = place.path("image.tar.gz");
    let mut gnu = place.command(By::Gnu);
    gnu.args(["--create", "--gzip", "--format=pax", "--numeric-owner", "--directory"]).arg(&from).arg(".");
    done(&gnu.stdout(File::create(&image).unwrap()).spawn().unwrap().wait_with_output().unwrap());
    place.unpack(By::Ours, &image, &to);
    assert_eq!(tree(&to), tree(&from));
}

#[test]
fn what_is_there_already_is_kept_or_replaced_as_gnu_tar_does_it() {
    let after = |by| {
        let place = Place::new();
        let (from, to) = (place.directory("from"), place.directory("to"));
        make(&from);
        // A fifo would hold up a writer that did not replace it; a link would lead it astray.
        fs::write(place.path("outside"), b"outside").unwrap();
        dress(&place.path("outside"), (0, 0), 0o600, (1_100_000_000, 0));
        symlink(place.path("outside"), to.join("file")).unwrap();
        node(&to.join("empty"), FileType::Fifo, 0);
        fs::write(to.join("fifo"), b"a file").unwrap();
        fs::write(to.join("link"), b"a file").unwrap();
        node(&to.join("null"), FileType::CharacterDevice, makedev(1, 5));
        fs::create_dir_all(to.join("deep/other")).unwrap();
        dress(&to.join("deep/other"), (3, 3), 0o711, (1_000_000_000, 0));
        fs::write(to.join("mine"), b"stays").unwrap();
        dress(&to.join("mine"), (3, 3), 0o711, (1_000_000_000, 0));
        dress(&to, (3, 3), 0o711, (1_000_000_000, 0));
        place.unpack(by, &place.pack(By::Ours, &from), &to);
        assert_eq!(fs::read(place.path("outside")).unwrap(), b"outside");
        // What make() leaves with the time of its making.
        let mut seen = tree(&to);
        seen.retain(|path, _| path.components().count() < 3);
        for seen in seen.values_mut().filter(|seen| (1_750_000_000..3_900_000_000).contains(&seen.mtime.0)) {
            seen.mtime = (0, 0);
        }
        (seen, fs::read(to.join("mine")).unwrap(), to.join("deep/other").is_dir())
    };
    let ours = after(By::Ours);
    assert_eq!(ours, after(By::Gnu));
    assert_eq!((ours.1.as_slice(), ours.2), (b"stays".as_slice(), true));
}

#[test]
fn a_socket_is_left_out_with_a_note() {
    let place = Place::new();
    let (from, to) = (place.directory("from"), place.directory("to"));
    fs::create_dir(from.join("run")).unwrap();
    let _socket = UnixListener::bind(from.join("run/log")).unwrap();
    let image = place.path("image.tar.gz");
    let output = place.try_pack(By::Ours, &from, &image);
    done(&output);
    assert_eq!(log(&output), "podferry-tar: ./run/log: socket ignored\n");
    place.unpack(By::Ours, &image, &to);
    assert!(to.join("run").is_dir());
    assert!(!to.join("run/log").exists());
}

#[test]
fn a_mount_point_is_kept_without_what_is_mounted_there() {
    let packed = |by| {
        let place = Place::new();
        let (from, to) = (place.directory("from"), place.directory("to"));
        fs::create_dir(from.join("mnt")).unwrap();
        fs::write(from.join("file"), b"file").unwrap();
        for name in ["mnt", "file", "."] {
            dress(&from.join(name), (0, 0), 0o700, (1_000_000_000, 0));
        }
        // The mount is only in a namespace that ends with the script.
        let script = "mount -t tmpfs -o mode=1711,uid=7,gid=8 none \"$FROM/mnt\" && touch \"$FROM/mnt/inside\" && \
            touch -d @1234567890 \"$FROM/mnt\" && PATH=$THEN exec \"$0\" \"$@\" <\"$FROM\" >\"$IMAGE\"";
        let image = place.path("image.tar.gz");
        let tar = place.command(by);
        let path = tar.get_envs().find(|(name, _)| *name == "PATH").unwrap().1.unwrap();
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", script]).arg(tar.get_program()).args(CREATE).arg0("unshare");
        command.env("FROM", &from).env("IMAGE", &image).env("THEN", path);
        done(&command.output().unwrap());
        place.unpack(By::Gnu, &image, &to);
        tree(&to)
    };
    let ours = packed(By::Ours);
    assert_eq!(ours, packed(By::Gnu));
    assert_eq!(ours.len(), 3);
    assert_eq!(ours[Path::new("./mnt")].owner, (7, 8));
}

#[derive(Clone, Debug)]
enum What {
    Directory,
    File(Vec<u8>),
    Symlink(Vec<u8>),
    Node(FileType, u64),
}

#[derive(Clone, Debug)]
struct Node {
    /// Which of the directories made so far it goes into.
    parent: prop::sample::Index,
    name: Vec<u8>,
    what: What,
    owner: (u32, u32),
    mode: u32,
    mtime: (i64, i64),
}

/// Any bytes that may stand in a path.
fn bytes(longest: usize, slash: bool) -> impl Strategy<Value = Vec<u8>> {
    let usable = move |byte: &u8| *byte != 0 && (slash || *byte != b'/');
    prop::collection::vec(any::<u8>().prop_filter("not in a path", usable), 1..longest)
}

fn any_node() -> impl Strategy<Value = Node> {
    let device = (0_u32..4096, 0_u32..1 << 20).prop_map(|(major, minor)| makedev(major, minor));
    let what = prop_oneof![
        3 => Just(What::Directory),
        3 => prop::collection::vec(any::<u8>(), 0..2000).prop_map(What::File),
        2 => bytes(300, true).prop_map(What::Symlink),
        1 => device.clone().prop_map(|device| What::Node(FileType::CharacterDevice, device)),
        1 => device.prop_map(|device| What::Node(FileType::BlockDevice, device)),
        1 => Just(What::Node(FileType::Fifo, 0)),
    ];
    let nanoseconds = prop_oneof![Just(0_i64), 0_i64..1_000_000_000];
    let owner = (0..u32::MAX, 0..u32::MAX);
    let mtime = (0_i64..5_000_000_000, nanoseconds);
    (any::<prop::sample::Index>(), bytes(140, false), what, owner, 0_u32..0o10000, mtime)
        .prop_map(|(parent, name, what, owner, mode, mtime)| Node { parent, name, what, owner, mode, mtime })
}

fn make_nodes(root: &Path, nodes: &[Node]) {
    let mut directories = vec![root.to_owned()];
    let mut made: Vec<(PathBuf, &Node)> = Vec::new();
    for node in nodes {
        let path = node.parent.get(&directories).join(OsString::from_vec(node.name.clone()));
        if matches!(node.name.as_slice(), b"." | b"..") || path.symlink_metadata().is_ok() {
            continue;
        }
        match &node.what {
            What::Directory => {
                fs::create_dir(&path).unwrap();
                directories.push(path.clone());
            }
            What::File(content) => fs::write(&path, content).unwrap(),
            What::Symlink(target) => symlink(OsStr::from_bytes(target), &path).unwrap(),
            What::Node(kind, device) => common::node(&path, *kind, *device),
        }
        made.push((path, node));
    }
    // Children first, as making them touches their directories.
    for (path, node) in made.iter().rev() {
        dress(path, node.owner, node.mode, node.mtime);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn any_simple_tree_comes_out_as_it_went_in(nodes in prop::collection::vec(any_node(), 0..30)) {
        let place = Place::new();
        let from = place.directory("from");
        make_nodes(&from, &nodes);
        let before = tree(&from);
        let image = place.pack(By::Ours, &from);
        for by in [By::Ours, By::Gnu] {
            let to = place.directory(&format!("{by:?}"));
            place.unpack(by, &image, &to);
            prop_assert_eq!(&tree(&to), &before, "unpacked by {:?}", by);
        }
        let again = place.directory("again");
        place.unpack(By::Ours, &place.pack(By::Gnu, &from), &again);
        prop_assert_eq!(tree(&again), in_whole_seconds(before));
    }
}
