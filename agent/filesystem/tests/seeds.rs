//! A layer whose large files were sent before it comes out as it was in the end, whatever was written meanwhile. Needs root.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::tree;
use podferry_filesystem::{
    Error, Host, Limits, Overlay, Pass, SeedStore, Seeder, SeedsSent, WritableLayer, pack_with_seeds, unpack_with_seeds,
};
use proptest::prelude::*;
use rustix::fs::{FallocateFlags, SeekFrom, Timespec, Timestamps, XattrFlags, fallocate, futimens, lsetxattr, seek};

const KIB: u64 = 1024;

/// What the seeder is told of this machine.
struct Told {
    cancelled: bool,
    no_writer: bool,
}

impl Host for Told {
    fn is_cancelled(&self) -> bool {
        self.cancelled
    }

    fn has_no_writer(&self, _: BorrowedFd<'_>) -> bool {
        self.no_writer
    }
}

const COMPARES: Told = Told { cancelled: false, no_writer: false };
/// The truth in tests that close every file.
const NO_WRITER: Told = Told { cancelled: false, no_writer: true };

/// Both sides of a move.
struct Move {
    folder: tempfile::TempDir,
    layer: WritableLayer,
    seeder: Seeder,
    /// Where the store is.
    seeds: PathBuf,
    store: Option<SeedStore>,
}

impl Move {
    fn new() -> Self {
        Self::with_seeds_in("seeds")
    }

    /// The store is in this place of the folder with both sides.
    fn with_seeds_in(place: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        for name in ["source", "target"] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        let upper = folder.path().join("source");
        let layer = WritableLayer::Overlay(Overlay { lower: Vec::new(), upper, work: PathBuf::new() });
        let seeds = folder.path().join(place);
        let store = SeedStore::create(&seeds, Limits::default()).unwrap();
        Self { folder, layer, seeder: Seeder::default(), seeds, store: Some(store) }
    }

    fn source(&self, name: &str) -> PathBuf {
        self.folder.path().join("source").join(name)
    }

    fn target(&self, name: &str) -> PathBuf {
        self.folder.path().join("target").join(name)
    }

    fn pass(&mut self, pass: Pass, host: &dyn Host) -> SeedsSent {
        let mut stream = Vec::new();
        let sent = self.seeder.pass(&self.layer, pass, host, &mut stream).unwrap();
        if !stream.is_empty() {
            let received = self.store.as_mut().unwrap().receive(stream.as_slice(), drop).unwrap();
            assert_eq!((received.seeds, received.data_bytes), (sent.seeds, sent.data_bytes));
        }
        sent
    }

    /// Packs and unpacks what is there, and gives how many bytes of it came as seeds.
    fn end(&mut self) -> u64 {
        let mut stream = Vec::new();
        let packed = pack_with_seeds(&self.layer, &self.seeder, &mut stream).unwrap();
        unpack_with_seeds(stream.as_slice(), &self.target(""), &Limits::default(), self.store.take()).unwrap();
        assert!(!self.seeds.exists());
        packed.seeded_bytes
    }

    #[track_caller]
    fn assert_equal(&self) {
        assert!(tree(&self.source("")) == tree(&self.target("")), "source and target differ");
    }
}

fn write(path: &Path, offset: u64, bytes: &[u8]) {
    let file = OpenOptions::new().write(true).create(true).truncate(false).open(path).unwrap();
    file.write_all_at(bytes, offset).unwrap();
}

fn noise(length: usize, seed: u8) -> Vec<u8> {
    let mut state = u64::from(seed) + 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    (0..length).map(|_| next()).collect()
}

/// Where a file has data.
fn extents(path: &Path) -> Vec<(u64, u64)> {
    let file = File::open(path).unwrap();
    let mut found = Vec::new();
    let mut position = 0;
    while let Ok(start) = seek(&file, SeekFrom::Data(position)) {
        position = seek(&file, SeekFrom::Hole(start)).unwrap();
        found.push((start, position));
    }
    found
}

#[test]
fn only_what_changed_is_sent_again() {
    let mut this = Move::new();
    write(&this.source("large"), 0, &noise(640 << 10, 1));
    write(&this.source("small"), 0, &noise(60 << 10, 2));
    assert_eq!(this.pass(Pass::Running, &COMPARES).data_bytes, 640 * KIB, "without the small one");
    let same = this.pass(Pass::Running, &COMPARES);
    assert_eq!((same.seeds, same.data_bytes, same.read_bytes), (0, 0, 640 * KIB), "it is read, and nothing is sent");
    write(&this.source("large"), 200 * KIB, b"one block");
    let again = this.pass(Pass::Running, &COMPARES);
    assert_eq!((again.seeds, again.data_bytes, again.read_bytes), (1, 64 * KIB, 640 * KIB));
    OpenOptions::new().append(true).open(this.source("large")).unwrap().write_all(b"a log's next line").unwrap();
    let last = this.pass(Pass::Frozen, &COMPARES);
    assert_eq!((last.seeds, last.data_bytes), (1, 17));
    assert_eq!(this.end(), 640 * KIB + 17);
    this.assert_equal();
}

/// The folder of a volume may be a mount of its own, beside which there is no room on its file system.
#[test]
fn a_volume_keeps_its_seeds_in_itself_and_is_in_the_end_as_it_was_at_the_source() {
    let mut this = Move::with_seeds_in("target/.seeds");
    this.layer = WritableLayer::Volume { dir: this.source("") };
    write(&this.source("large"), 0, &noise(640 << 10, 1));
    write(&this.source("gone"), 0, &noise(100 << 10, 3));
    fs::hard_link(this.source("large"), this.source("again")).unwrap();
    this.pass(Pass::Running, &COMPARES);
    assert!(this.seeds.join("1").exists());
    fs::remove_file(this.source("gone")).unwrap();
    write(&this.source("small"), 0, &noise(100, 2));
    this.pass(Pass::Frozen, &COMPARES);
    let old = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
    File::open(this.source("")).unwrap().set_modified(old).unwrap();
    assert_eq!(this.end(), 640 * KIB);
    this.assert_equal();
    assert_eq!(fs::metadata(this.target("")).unwrap().modified().unwrap(), old);
}

#[test]
fn whatever_else_is_in_a_volume_is_left_alone() {
    let mut this = Move::with_seeds_in("target/.seeds");
    this.layer = WritableLayer::Volume { dir: this.source("") };
    write(&this.target("foreign"), 0, b"data");
    let mut stream = Vec::new();
    pack_with_seeds(&this.layer, &this.seeder, &mut stream).unwrap();
    let refused = unpack_with_seeds(stream.as_slice(), &this.target(""), &Limits::default(), this.store.take());
    assert!(matches!(refused, Err(Error::NotEmpty { .. })), "{refused:?}");
    assert_eq!(fs::read(this.target("foreign")).unwrap(), b"data");
}

#[test]
fn metadata_of_a_seeded_file_are_those_of_the_end() {
    let mut this = Move::new();
    write(&this.source("file"), 0, &noise(100 << 10, 1));
    this.pass(Pass::Running, &COMPARES);
    fs::rename(this.source("file"), this.source("renamed")).unwrap();
    fs::hard_link(this.source("renamed"), this.source("second name")).unwrap();
    let file = File::open(this.source("renamed")).unwrap();
    std::os::unix::fs::chown(this.source("renamed"), Some(77), Some(78)).unwrap();
    file.set_permissions(fs::Permissions::from_mode(0o4711)).unwrap();
    lsetxattr(this.source("renamed"), "user.comment", b"\0\xff", XattrFlags::empty()).unwrap();
    let then = Timespec { tv_sec: 1_000_000_000, tv_nsec: 123_456_789 };
    futimens(&file, &Timestamps { last_access: then, last_modification: then }).unwrap();
    assert_eq!(this.pass(Pass::Frozen, &COMPARES).data_bytes, 0, "its content has not changed");
    assert_eq!(this.end(), 100 * KIB);
    this.assert_equal();
}

#[test]
fn holes_stay_holes_and_new_ones_are_made() {
    let mut this = Move::new();
    let path = this.source("sparse");
    let file = File::create(&path).unwrap();
    file.set_len(8 << 20).unwrap();
    for block in [0, 16, 17, 18, 40, 100] {
        file.write_all_at(&noise(64 << 10, 3), block * 64 * KIB).unwrap();
    }
    assert_eq!(this.pass(Pass::Running, &COMPARES).data_bytes, 6 * 64 * KIB);
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    // Two whole blocks, a part of one, and all that is left of the end.
    fallocate(&file, punch, 16 * 64 * KIB, 2 * 64 * KIB).unwrap();
    fallocate(&file, punch, 40 * 64 * KIB + 8 * KIB, 16 * KIB).unwrap();
    file.set_len(50 * 64 * KIB).unwrap();
    file.set_len(9 << 20).unwrap();
    let last = this.pass(Pass::Frozen, &COMPARES);
    assert_eq!(last.data_bytes, 48 * KIB, "the block of which a part is a hole now");
    this.end();
    this.assert_equal();
    assert_eq!(extents(&this.target("sparse")), extents(&path));
}

#[test]
fn what_goes_or_shrinks_is_dropped_and_takes_no_room_any_more() {
    let mut this = Move::new();
    for name in ["gone", "shrunk", "replaced", "stays"] {
        write(&this.source(name), 0, &noise(128 << 10, 1));
    }
    this.pass(Pass::Running, &COMPARES);
    assert_eq!(this.store.as_ref().unwrap().bytes(), 4 * 128 * KIB);
    fs::remove_file(this.source("gone")).unwrap();
    File::options().write(true).open(this.source("shrunk")).unwrap().set_len(100).unwrap();
    fs::remove_file(this.source("replaced")).unwrap();
    fs::create_dir(this.source("replaced")).unwrap();
    assert_eq!(this.pass(Pass::Running, &COMPARES).data_bytes, 0);
    assert_eq!(this.store.as_ref().unwrap().bytes(), 128 * KIB);
    assert_eq!(this.folder.path().join("seeds").read_dir().unwrap().count(), 1);
    this.pass(Pass::Frozen, &COMPARES);
    assert_eq!(this.end(), 128 * KIB);
    this.assert_equal();
}

#[test]
fn without_a_pass_in_the_freeze_or_after_a_change_behind_it_content_is_sent_as_ever() {
    for changes in [false, true] {
        let mut this = Move::new();
        write(&this.source("file"), 0, &noise(100 << 10, 1));
        this.pass(if changes { Pass::Frozen } else { Pass::Running }, &COMPARES);
        if changes {
            // The kernel's clock goes in steps of 10 ms at most.
            std::thread::sleep(Duration::from_millis(30));
            write(&this.source("file"), 5, b"late");
        }
        assert_eq!(this.end(), 0);
        this.assert_equal();
    }
}

/// Whether this file system sets times when a mapping is written to: only then may anything be at rest.
fn notes_mapped_writes(path: &Path) -> bool {
    [0xef53, 0x5846_5342, 0x9123_683e].contains(&rustix::fs::statfs(path).unwrap().f_type)
}

#[test]
fn a_file_at_rest_is_not_read_in_the_freeze_and_one_that_was_touched_is() {
    let mut this = Move::new();
    let path = this.source("file");
    write(&path, 0, &noise(100 << 10, 1));
    let mut expected = 100 * KIB;
    this.pass(Pass::Running, &NO_WRITER);
    let soon = this.pass(Pass::Frozen, &NO_WRITER);
    assert_eq!(
        (soon.read_bytes, soon.restless_bytes),
        (expected, 128 * KIB),
        "it was written a moment before it was read"
    );
    std::thread::sleep(Duration::from_millis(1100));
    assert_eq!(this.pass(Pass::Running, &COMPARES).read_bytes, expected, "somebody may write to it");
    assert_eq!(this.pass(Pass::Frozen, &COMPARES).read_bytes, expected);
    assert_eq!(this.pass(Pass::Running, &NO_WRITER).read_bytes, expected, "once more, to know it at rest");
    if notes_mapped_writes(&path) {
        expected = 0;
    }
    assert_eq!(this.pass(Pass::Running, &NO_WRITER).read_bytes, expected);
    assert_eq!(this.pass(Pass::Frozen, &NO_WRITER).read_bytes, expected);
    // A write that hides itself: the same size, and the time of before.
    let before = path.metadata().unwrap();
    write(&path, 70_000, b"hidden");
    let then = Timespec { tv_sec: before.mtime(), tv_nsec: before.mtime_nsec() };
    let file = File::options().write(true).open(&path).unwrap();
    futimens(file.as_fd(), &Timestamps { last_access: then, last_modification: then }).unwrap();
    drop(file);
    let last = this.pass(Pass::Frozen, &NO_WRITER);
    assert_eq!((last.read_bytes, last.data_bytes), (100 * KIB, 36 * KIB));
    this.end();
    this.assert_equal();
}

#[test]
fn a_pass_ends_when_it_is_cancelled() {
    let mut this = Move::new();
    write(&this.source("file"), 0, &noise(100 << 10, 1));
    let cancelled = Told { cancelled: true, no_writer: false };
    let error = this.seeder.pass(&this.layer, Pass::Running, &cancelled, Vec::new()).unwrap_err();
    assert!(matches!(error, Error::Stream(_)), "{error}");
}

/// One thing that a container does to one of its files.
#[derive(Clone, Debug)]
enum Deed {
    Write { file: prop::sample::Index, offset: u32, length: u16, seed: u8 },
    Cut { file: prop::sample::Index, length: u32 },
    Punch { file: prop::sample::Index, offset: u32, length: u32 },
    Move { file: prop::sample::Index, to: u8 },
    Link { file: prop::sample::Index, to: u8 },
    Remove { file: prop::sample::Index },
    Make { name: u8, length: u32, seed: u8 },
    Pass { at_rest: bool },
}

fn deed() -> impl Strategy<Value = Deed> {
    let file = any::<prop::sample::Index>;
    prop_oneof![
        6 => (file(), 0_u32..600_000, any::<u16>(), any::<u8>())
            .prop_map(|(file, offset, length, seed)| Deed::Write { file, offset, length, seed }),
        2 => (file(), 0_u32..600_000).prop_map(|(file, length)| Deed::Cut { file, length }),
        2 => (file(), 0_u32..600_000, 1_u32..200_000)
            .prop_map(|(file, offset, length)| Deed::Punch { file, offset, length }),
        1 => (file(), any::<u8>()).prop_map(|(file, to)| Deed::Move { file, to }),
        1 => (file(), any::<u8>()).prop_map(|(file, to)| Deed::Link { file, to }),
        1 => file().prop_map(|file| Deed::Remove { file }),
        4 => (any::<u8>(), 0_u32..400_000, any::<u8>()).prop_map(|(name, length, seed)| Deed::Make { name, length, seed }),
        4 => any::<bool>().prop_map(|at_rest| Deed::Pass { at_rest }),
    ]
}

fn place(this: &Move, name: u8) -> PathBuf {
    this.source(["", "d/", "d/e/"][usize::from(name % 3)]).join((name % 16).to_string())
}

fn files(this: &Move) -> Vec<PathBuf> {
    let names = (0..48).map(|name| place(this, name));
    let mut found: Vec<PathBuf> = names.filter(|path| path.is_file()).collect();
    found.sort();
    found.dedup();
    found
}

fn act(this: &mut Move, deed: &Deed) {
    let files = files(this);
    let of = |file: &prop::sample::Index| (!files.is_empty()).then(|| file.get(&files).clone());
    match deed {
        Deed::Write { file, offset, length, seed } => {
            if let Some(path) = of(file) {
                write(&path, u64::from(*offset), &noise(usize::from(*length), *seed));
            }
        }
        Deed::Cut { file, length } => {
            if let Some(path) = of(file) {
                File::options().write(true).open(path).unwrap().set_len(u64::from(*length)).unwrap();
            }
        }
        Deed::Punch { file, offset, length } => {
            if let Some(path) = of(file) {
                let file = File::options().write(true).open(path).unwrap();
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                fallocate(&file, flags, u64::from(*offset), u64::from(*length)).unwrap();
            }
        }
        Deed::Move { file, to } => drop(of(file).map(|path| fs::rename(path, place(this, *to)))),
        Deed::Link { file, to } => drop(of(file).map(|path| fs::hard_link(path, place(this, *to)))),
        Deed::Remove { file } => drop(of(file).map(fs::remove_file)),
        Deed::Make { name, length, seed } => fs::write(place(this, *name), noise(*length as usize, *seed)).unwrap(),
        Deed::Pass { at_rest } => {
            this.pass(Pass::Running, if *at_rest { &NO_WRITER } else { &COMPARES });
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn whatever_is_written_between_the_passes_the_layer_is_what_it_was_in_the_end(
        deeds in prop::collection::vec(deed(), 1..40),
        at_rest in any::<bool>(),
    ) {
        let mut this = Move::new();
        fs::create_dir_all(this.source("d/e")).unwrap();
        for deed in &deeds {
            act(&mut this, deed);
        }
        this.pass(Pass::Frozen, if at_rest { &NO_WRITER } else { &COMPARES });
        this.end();
        prop_assert!(tree(&this.source("")) == tree(&this.target("")));
        for path in files(&this) {
            let relative = path.strip_prefix(this.source("")).unwrap();
            prop_assert_eq!(extents(&path), extents(&this.target(relative.to_str().unwrap())));
        }
    }
}
