//! Real overlay mounts, there and back. Needs root.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use common::tree;
use podferry_filesystem::{
    Error, Limits, Overlay, WritableLayer, free_bytes, is_mounted, pack, sync, unmount, unpack, wipe,
};
use rustix::fs::{CWD, FileType, Mode, XattrFlags, mknodat, setxattr};

/// An image, and one container's root over it, unmounted when the test ends.
struct Container {
    dir: tempfile::TempDir,
}

impl Container {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in ["image/etc", "image/var/cache/old", "base/bin", "upper", "work", "root"] {
            fs::create_dir_all(dir.path().join(name)).unwrap();
        }
        fs::write(dir.path().join("image/etc/passwd"), "root:x:0:0").unwrap();
        fs::write(dir.path().join("image/etc/motd"), "hello").unwrap();
        fs::write(dir.path().join("image/var/cache/old/entry"), "stale").unwrap();
        fs::write(dir.path().join("base/bin/sh"), "#!").unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The same image under another upper directory.
    fn overlay(&self, upper: &str, work: &str) -> Overlay {
        Overlay { lower: vec![self.path("image"), self.path("base")], upper: self.path(upper), work: self.path(work) }
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        for name in ["root", "other root", "wiped/here"] {
            let _ = unmount(&self.path(name));
        }
    }
}

fn write_as_a_container(root: &Path) {
    fs::remove_file(root.join("etc/motd")).unwrap();
    fs::remove_dir_all(root.join("var/cache")).unwrap();
    fs::create_dir(root.join("var/cache")).unwrap();
    fs::write(root.join("var/cache/new"), "fresh").unwrap();
    fs::write(root.join("etc/passwd"), "root:x:0:0\nuser:x:1:1").unwrap();
    fs::write(root.join("log"), "order 1\n").unwrap();
    fs::hard_link(root.join("log"), root.join("etc/log")).unwrap();
    fs::set_permissions(root.join("log"), fs::Permissions::from_mode(0o4751)).unwrap();
    std::os::unix::fs::chown(root.join("var/cache/new"), Some(1234), Some(4321)).unwrap();
    setxattr(root.join("log"), "user.binary", b"\0\xff\n=", XattrFlags::empty()).unwrap();
    symlink("../../../../etc/shadow", root.join("link")).unwrap();
    fs::hard_link(root.join("link"), root.join("link2")).unwrap();
    mknodat(CWD, root.join("pipe"), FileType::Fifo, Mode::from_raw_mode(0o620), 0).unwrap();
    drop(std::os::unix::net::UnixListener::bind(root.join("socket")).unwrap());
    let sparse = fs::File::create(root.join("sparse")).unwrap();
    sparse.write_all_at(b"begin", 0).unwrap();
    sparse.write_all_at(b"middle", 300 << 20).unwrap();
    sparse.set_len(1 << 30).unwrap();
    let capability = b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    setxattr(root.join("var/cache/new"), "security.capability", capability, XattrFlags::empty()).unwrap();
    let long_ago = SystemTime::UNIX_EPOCH + Duration::new(1_000_000_000, 123_456_789);
    fs::File::open(root.join("var/cache")).unwrap().set_modified(long_ago).unwrap();
    fs::set_permissions(root, fs::Permissions::from_mode(0o711)).unwrap();
}

#[test]
fn what_a_container_wrote_is_the_same_under_another_mount() {
    let container = Container::new();
    let root = container.path("root");
    container.overlay("upper", "work").mount(&root).unwrap();
    write_as_a_container(&root);

    let layer = WritableLayer::of(&root).unwrap();
    assert_eq!(layer, WritableLayer::Overlay(container.overlay("upper", "work")));
    let mut stream = Vec::new();
    let packed = pack(&layer, &mut stream).unwrap();
    assert_eq!(packed.stream_bytes, stream.len() as u64);
    assert_eq!(packed.whiteouts, 1, "etc/motd; var/cache is opaque instead");
    assert!(stream.len() < 64 * 1024, "holes are not sent, but {} bytes were", stream.len());

    for name in ["other upper", "other work", "other root"] {
        fs::create_dir(container.path(name)).unwrap();
    }
    let unpacked = unpack(stream.as_slice(), &container.path("other upper"), &Limits::default()).unwrap();
    assert_eq!((unpacked.entries, unpacked.data_bytes), (packed.entries, packed.data_bytes));
    sync(&container.path("other upper")).unwrap();

    assert_eq!(tree(&container.path("upper/etc")), tree(&container.path("other upper/etc")));
    let other = container.path("other root");
    container.overlay("other upper", "other work").mount(&other).unwrap();
    assert_eq!(
        WritableLayer::of(&other).unwrap(),
        WritableLayer::Overlay(container.overlay("other upper", "other work"))
    );
    // The sparse file by its blocks and edges; its gigabyte of zeros is not worth reading.
    let sparse = fs::File::open(other.join("sparse")).unwrap();
    let mut middle = [0; 6];
    sparse.read_exact_at(&mut middle, 300 << 20).unwrap();
    assert_eq!(&middle, b"middle");
    let metadata = sparse.metadata().unwrap();
    assert_eq!(metadata.len(), 1 << 30);
    assert!(metadata.blocks() * 512 < 1 << 20, "{} blocks", metadata.blocks());
    for root in [&root, &other] {
        fs::remove_file(root.join("sparse")).unwrap();
    }
    let (mut before, mut after) = (tree(&root), tree(&other));
    // Deleting the sparse files touched both roots.
    for tree in [&mut before, &mut after] {
        tree.get_mut(Path::new("")).unwrap().mtime = (0, 0);
    }
    assert_eq!(before, after);
    assert!(!other.join("etc/motd").exists() && !other.join("var/cache/old").exists());
    assert_eq!(before[Path::new("log")].mode & 0o7777, 0o4751);
    assert_eq!(before[Path::new("etc/log")].same_as, before[Path::new("log")].same_as);
}

#[test]
fn a_directory_that_is_no_overlay_is_said_to_be_none() {
    let dir = tempfile::tempdir().unwrap();
    let layer = WritableLayer::of(dir.path()).unwrap();
    assert_eq!(layer, WritableLayer::Plain { rootfs: dir.path().to_owned() });
    assert!(matches!(pack(&layer, Vec::new()), Err(Error::NotAnOverlay { .. })));
    assert!(free_bytes(dir.path()).unwrap() > 0);
    unmount(dir.path()).unwrap();
}

#[test]
fn a_device_node_is_refused_at_the_source() {
    let container = Container::new();
    mknodat(CWD, container.path("upper/null"), FileType::CharacterDevice, Mode::RUSR, rustix::fs::makedev(1, 3))
        .unwrap();
    let error = pack(&WritableLayer::Overlay(container.overlay("upper", "work")), Vec::new()).unwrap_err();
    assert!(matches!(&error, Error::Unsupported { path, .. } if path == Path::new("null")), "{error}");
}

#[test]
fn paths_with_the_options_own_separators_can_be_mounted_and_found() {
    let container = Container::new();
    for name in ["image,a:b c", "up,per", "wo\\rk"] {
        fs::create_dir(container.path(name)).unwrap();
    }
    let overlay = Overlay {
        lower: vec![container.path("image,a:b c")],
        upper: container.path("up,per"),
        work: container.path("wo\\rk"),
    };
    let root = container.path("root");
    overlay.mount(&root).unwrap();
    assert_eq!(WritableLayer::of(&root).unwrap(), WritableLayer::Overlay(overlay));
    unmount(&root).unwrap();
    assert!(matches!(WritableLayer::of(&root).unwrap(), WritableLayer::Plain { .. }));
}

#[test]
fn more_layers_than_a_page_of_options_holds_can_be_mounted() {
    let container = Container::new();
    let lower: Vec<PathBuf> =
        (0..120).map(|layer| container.path(&format!("layer-{layer}-{}", "x".repeat(60)))).collect();
    for (number, dir) in lower.iter().enumerate() {
        fs::create_dir(dir).unwrap();
        fs::write(dir.join(format!("file{number}")), "").unwrap();
    }
    let overlay = Overlay { lower, upper: container.path("upper"), work: container.path("work") };
    let root = container.path("root");
    overlay.mount(&root).unwrap();
    assert_eq!(root.read_dir().unwrap().count(), 120);
    assert_eq!(WritableLayer::of(&root).unwrap(), WritableLayer::Overlay(overlay));
}

#[test]
fn a_full_file_system_is_named() {
    let container = Container::new();
    fs::write(container.path("upper/big"), vec![7; 4 << 20]).unwrap();
    let mut stream = Vec::new();
    pack(&WritableLayer::Overlay(container.overlay("upper", "work")), &mut stream).unwrap();
    let small = container.path("root");
    rustix::mount::mount("tmpfs", &small, "tmpfs", rustix::mount::MountFlags::empty(), Some(c"size=1m")).unwrap();
    let error = unpack(stream.as_slice(), &small, &Limits::default()).unwrap_err();
    assert!(matches!(&error, Error::NoSpace { path, .. } if path.ends_with("big")), "{error}");
    wipe(&small).unwrap();
    assert_eq!(small.read_dir().unwrap().count(), 0);
}

#[test]
fn wiping_follows_no_link_and_crosses_no_mount() {
    let container = Container::new();
    let wiped = container.path("wiped");
    fs::create_dir_all(wiped.join("here")).unwrap();
    fs::write(wiped.join("file"), "x").unwrap();
    symlink(container.path("image"), wiped.join("link")).unwrap();
    // Deeper than a process may have descriptors open.
    let nest = "i=0; while [ $i -lt 700 ]; do mkdir d && cd d && touch f; i=$((i+1)); done";
    let nested = Command::new("sh").args(["-c", nest]).current_dir(&wiped).status().unwrap();
    assert!(nested.success());

    rustix::mount::mount_bind(container.path("image"), wiped.join("here")).unwrap();
    let error = wipe(&wiped).unwrap_err();
    assert!(matches!(&error, Error::Mounted { path } if path.ends_with("here")), "{error}");
    assert!(wiped.join("file").exists(), "nothing is deleted while something is mounted");

    unmount(&wiped.join("here")).unwrap();
    wipe(&wiped).unwrap();
    assert_eq!(wiped.read_dir().unwrap().count(), 0);
    assert_eq!(fs::read_to_string(container.path("image/etc/motd")).unwrap(), "hello");
    assert!(fs::metadata(&wiped).unwrap().is_dir());
    assert!(fs::metadata(container.path("image")).unwrap().uid() == 0);
}

#[test]
fn placeholders_are_like_the_image_and_all_that_is_mounted_is_unmounted() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    assert!(!is_mounted(&root).unwrap(), "it does not exist");
    let image = dir.path().join("image");
    fs::create_dir_all(image.join("run")).unwrap();
    std::os::unix::fs::symlink("run", image.join("var-run")).unwrap();
    fs::create_dir(&root).unwrap();
    fs::write(root.join("below"), "kept").unwrap();
    let overlay =
        Overlay { lower: vec![image.clone()], upper: dir.path().join("upper"), work: dir.path().join("work") };
    // A tmpfs as the agent has one.
    let scratch = dir.path().join("scratch");
    fs::create_dir(&scratch).unwrap();
    let flags =
        rustix::mount::MountFlags::NODEV | rustix::mount::MountFlags::NOEXEC | rustix::mount::MountFlags::NOSUID;
    rustix::mount::mount("test", &scratch, "tmpfs", flags, None::<&std::ffi::CStr>).unwrap();
    for number in 0..2 {
        overlay.mount_placeholder(&root, &scratch.join(number.to_string())).unwrap();
        assert!(is_mounted(&root).unwrap() && !root.join("below").exists());
        fs::create_dir(root.join("var-run/secrets")).unwrap();
        assert!(root.join("run/secrets").is_dir(), "links lead where they will");
        assert!(!overlay.upper.exists(), "its own layer is not touched");
    }
    unmount(&root).unwrap();
    unmount(&scratch).unwrap();
    assert!(!is_mounted(&root).unwrap() && image.join("run").read_dir().unwrap().next().is_none());
    assert_eq!(fs::read_to_string(root.join("below")).unwrap(), "kept");
}
