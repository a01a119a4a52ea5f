//! Streams that no honest source writes.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;
use std::path::Path;

use podferry_filesystem::format::{Entry, Kind, MAGIC, MAGIC_WITH_SEEDS, SEEDS_MAGIC, Totals, Xattr};
use podferry_filesystem::{Error, Limits, Result, SeedStore, SeedsReceived, UnpackStats, unpack, unpack_with_seeds};
use proptest::prelude::*;
use prost::Message;

/// Writes frames without the checks of the real writer.
struct Forger {
    stream: Vec<u8>,
    totals: Totals,
}

impl Forger {
    fn new() -> Self {
        let this = Self { stream: MAGIC.to_vec(), totals: Totals::default() };
        this.entry(&entry(Kind::Directory, ""))
    }

    fn frame(mut self, kind: u8, payload: &[u8]) -> Self {
        self.stream.push(kind);
        self.stream.extend(u32::try_from(payload.len()).unwrap().to_le_bytes());
        self.stream.extend(payload);
        self
    }

    fn entry(mut self, entry: &Entry) -> Self {
        self.totals.entries += 1;
        self.frame(1, &entry.encode_to_vec())
    }

    fn file(self, path: &str, data: &[(u64, &[u8])], size: u64) -> Self {
        let mut this = self.entry(&entry(Kind::Regular, path));
        for (offset, bytes) in data {
            this.totals.data_bytes += bytes.len() as u64;
            this = this.frame(2, &[&offset.to_le_bytes(), *bytes].concat());
        }
        this.frame(3, &size.to_le_bytes())
    }

    fn end(self) -> Vec<u8> {
        let totals = self.totals.encode_to_vec();
        self.frame(4, &totals).stream
    }
}

fn entry(kind: Kind, path: &str) -> Entry {
    Entry { path: path.into(), kind: kind.into(), mode: 0o755, ..Entry::default() }
}

fn link(kind: Kind, path: &str, target: &str) -> Entry {
    Entry { target: target.into(), ..entry(kind, path) }
}

fn small() -> Limits {
    Limits {
        max_bytes: 1000,
        max_file_bytes: 10_000,
        max_entries: 5,
        max_path: 100,
        max_depth: 3,
        max_xattr_bytes: 200,
    }
}

fn receive(stream: &[u8]) -> Result<UnpackStats> {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("dest")).unwrap();
    fs::write(dir.path().join("secret"), "untouched").unwrap();
    let result = unpack(stream, &dir.path().join("dest"), &small());
    assert_eq!(fs::read_to_string(dir.path().join("secret")).unwrap(), "untouched");
    assert_eq!(dir.path().read_dir().unwrap().count(), 2, "something was made outside");
    result
}

#[track_caller]
fn refused(forger: Forger, why: &str) {
    let error = receive(&forger.end()).expect_err("it was taken");
    assert!(matches!(error, Error::Refused { .. }) && error.to_string().contains(why), "{error}");
}

#[test]
fn an_honest_stream_passes_the_same_limits() {
    let forger = Forger::new().entry(&entry(Kind::Directory, "d")).file("d/f", &[(5, b"abc")], 10);
    let stats = receive(&forger.end()).unwrap();
    assert_eq!(stats, UnpackStats { entries: 3, data_bytes: 3 });
}

#[test]
fn paths_do_not_escape() {
    let at = |path| Forger::new().entry(&entry(Kind::Fifo, path));
    refused(at("/etc"), "absolute");
    refused(at(".."), "no name");
    refused(at("../secret"), "out of order");
    refused(at("./a"), "out of order");
    refused(at("a/"), "no name");
    refused(at("a\0b"), "no name");
    refused(at(""), "no name");
    refused(at("nowhere/file"), "out of order");
}

#[test]
fn links_are_not_followed() {
    let through = Forger::new().entry(&link(Kind::Symlink, "l", "..")).entry(&entry(Kind::Fifo, "l/secret2"));
    refused(through, "out of order");
    let over = Forger::new().entry(&link(Kind::Symlink, "l", "../secret")).file("l", &[(0, b"x")], 1);
    refused(over, "twice");
    let as_directory = Forger::new().entry(&link(Kind::Symlink, "l", "..")).entry(&entry(Kind::Directory, "l"));
    refused(as_directory, "twice");
}

#[test]
fn hard_links_lead_to_what_was_sent() {
    let to = |target| Forger::new().entry(&link(Kind::Symlink, "l", "..")).entry(&link(Kind::HardLink, "h", target));
    refused(to("../secret"), "not sent before");
    refused(to("l/secret"), "not sent before");
    refused(to("/etc/passwd"), "not sent before");
    refused(to("h"), "not sent before");
    refused(to(".."), "no name");
    refused(to(""), "without a target");
    let directory = Forger::new().entry(&entry(Kind::Directory, "d")).entry(&link(Kind::HardLink, "h", "d"));
    refused(directory, "directory");
}

#[test]
fn attributes_and_numbers_are_checked() {
    let with = |change: fn(&mut Entry)| {
        let mut entry = entry(Kind::Fifo, "f");
        change(&mut entry);
        Forger::new().entry(&entry)
    };
    let xattr = |name: &[u8], value: &[u8]| vec![Xattr { name: name.to_vec(), value: value.to_vec() }];
    let named = |name: &[u8], value: &[u8]| {
        Forger::new().entry(&Entry { xattrs: xattr(name, value), ..entry(Kind::Directory, "d") })
    };
    refused(named(b"security.selinux", b"x"), "does not travel");
    refused(named(b"trusted.overlay.redirect", b"../../etc"), "does not travel");
    refused(named(b"trusted.overlay.metacopy", b""), "does not travel");
    refused(named(b"trusted.any", b""), "does not travel");
    refused(named(b"user.a\0b", b""), "does not travel");
    refused(with(|entry| entry.mode = 0o20_000), "a mode");
    refused(with(|entry| entry.mtime_nanoseconds = 1_000_000_000), "a time");
    refused(with(|entry| entry.uid = u32::MAX), "owner");
    refused(with(|entry| entry.kind = 99), "unknown kind");
}

#[test]
fn frames_in_the_wrong_order_are_refused() {
    refused(Forger::new().frame(2, &[0; 9]), "data without a file");
    refused(Forger::new().frame(3, &[0; 8]), "not begun");
    refused(Forger::new().frame(9, &[]), "unknown kind");
    refused(Forger::new().frame(1, &[0xff; 30]), "protobuf");
    refused(Forger::new().entry(&entry(Kind::Regular, "f")), "before this file");
    refused(Forger::new().entry(&entry(Kind::Regular, "f")).entry(&entry(Kind::Fifo, "g")), "before this file's end");
    refused(Forger::new().file("f", &[(5, b"x"), (2, b"y")], 10), "backwards");
    refused(Forger::new().file("f", &[(5, b"x")], 3), "shorter");
    let mut lying = Forger::new();
    lying.totals.entries = 7;
    refused(lying, "totals");
    let rootless = Forger { stream: MAGIC.to_vec(), totals: Totals::default() };
    refused(rootless, "no root");
    let other_root = Forger { stream: MAGIC.to_vec(), totals: Totals::default() }.entry(&entry(Kind::Fifo, ""));
    refused(other_root, "must be the root");
    assert!(matches!(receive(b"not a layer at all"), Err(Error::Refused { .. })));
}

#[test]
fn every_limit_is_kept() {
    let beyond = |forger: Forger, what: &str| {
        let error = receive(&forger.end()).expect_err("it was taken");
        assert!(matches!(&error, Error::Limit { what: said, .. } if *said == what), "{error}");
    };
    beyond(
        (0..6).fold(Forger::new(), |forger, number| forger.entry(&entry(Kind::Fifo, &number.to_string()))),
        "entries",
    );
    beyond(Forger::new().file("f", &[(0, &[1; 600]), (600, &[1; 600])], 1200), "bytes of content");
    beyond(Forger::new().file("f", &[], u64::MAX), "bytes in one file");
    beyond(Forger::new().file("f", &[(u64::MAX - 1, b"abc")], u64::MAX), "bytes in one file");
    beyond(Forger::new().entry(&entry(Kind::Fifo, &"x".repeat(101))), "bytes in a path");
    beyond(Forger::new().frame(1, &[0; 5000]), "bytes in one frame");
    beyond(Forger::new().frame(2, &vec![0; 300_000]), "bytes in one frame");
    let deep = ["a", "a/a", "a/a/a", "a/a/a/a"];
    beyond(
        deep.iter().fold(Forger::new(), |forger, path| forger.entry(&entry(Kind::Directory, path))),
        "nested directories",
    );
    let large = Xattr { name: b"user.x".to_vec(), value: vec![0; 300] };
    beyond(
        Forger::new().entry(&Entry { xattrs: vec![large], ..entry(Kind::Fifo, "f") }),
        "bytes of extended attributes",
    );
}

#[test]
fn only_an_empty_directory_takes_a_layer() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("here"), "already").unwrap();
    let result = unpack(Forger::new().end().as_slice(), dir.path(), &small());
    assert!(matches!(result, Err(Error::NotEmpty { .. })));
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(Path::new("/"), &link).unwrap();
    assert!(matches!(unpack(Forger::new().end().as_slice(), &link, &small()), Err(Error::Io { .. })));
}

/// Streams of seeds as `Forger` makes layers.
struct SeedForger(Forger);

impl SeedForger {
    fn new() -> Self {
        Self(Forger { stream: SEEDS_MAGIC.to_vec(), totals: Totals::default() })
    }

    fn seed(mut self, id: u64) -> Self {
        self.0.totals.entries += 1;
        self.frame(5, &[id])
    }

    fn data(mut self, offset: u64, bytes: &[u8]) -> Self {
        self.0.totals.data_bytes += bytes.len() as u64;
        Self(self.0.frame(2, &[&offset.to_le_bytes(), bytes].concat()))
    }

    fn hole(self, offset: u64, length: u64) -> Self {
        self.frame(6, &[offset, length])
    }

    fn size(self, size: u64) -> Self {
        self.frame(3, &[size])
    }

    fn dropped(self, id: u64) -> Self {
        self.frame(7, &[id])
    }

    /// A whole seed of `abc`.
    fn abc(self, id: u64) -> Self {
        self.seed(id).data(0, b"abc").size(3)
    }

    fn frame(self, kind: u8, numbers: &[u64]) -> Self {
        let payload: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        Self(self.0.frame(kind, &payload))
    }

    fn end(self) -> Vec<u8> {
        self.0.end()
    }
}

/// Where seeds and a layer come in.
struct Arriving {
    dir: tempfile::TempDir,
    /// None when a layer has taken it.
    store: Option<SeedStore>,
}

impl Arriving {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("dest")).unwrap();
        fs::write(dir.path().join("secret"), "untouched").unwrap();
        let store = SeedStore::create(&dir.path().join("seeds"), small()).unwrap();
        Self { dir, store: Some(store) }
    }

    fn take(&mut self, stream: &[u8]) -> Result<SeedsReceived> {
        let result = self.store.as_mut().unwrap().receive(stream, drop);
        self.assert_nothing_outside();
        result
    }

    fn unpack(&mut self, stream: &[u8]) -> Result<UnpackStats> {
        let result = unpack_with_seeds(stream, &self.dir.path().join("dest"), &small(), self.store.take());
        self.assert_nothing_outside();
        result
    }

    fn assert_nothing_outside(&self) {
        assert_eq!(fs::read_to_string(self.dir.path().join("secret")).unwrap(), "untouched");
        let seeds = self.dir.path().join("seeds");
        let others =
            self.dir.path().read_dir().unwrap().filter(|entry| entry.as_ref().unwrap().path() != seeds).count();
        assert_eq!(others, 2, "something was made outside");
    }
}

#[track_caller]
fn refused_seeds(forger: SeedForger, why: &str) {
    let mut arriving = Arriving::new();
    arriving.take(&SeedForger::new().abc(7).end()).unwrap();
    let error = arriving.take(&forger.end()).expect_err("it was taken");
    assert!(matches!(error, Error::Refused { .. }) && error.to_string().contains(why), "{error}");
}

#[test]
fn seeds_in_the_wrong_order_are_refused() {
    refused_seeds(SeedForger::new().data(0, b"x"), "data without a seed");
    refused_seeds(SeedForger::new().hole(0, 1), "a hole without a seed");
    refused_seeds(SeedForger::new().size(1), "not begun");
    refused_seeds(SeedForger::new().seed(0).size(0), "without a number");
    refused_seeds(SeedForger::new().seed(1).seed(2), "before the end of another");
    refused_seeds(SeedForger::new().seed(1), "in the middle of a seed");
    refused_seeds(SeedForger::new().seed(1).data(5, b"xy").data(6, b"z").size(9), "backwards");
    refused_seeds(SeedForger::new().seed(1).hole(5, 5).data(9, b"z").size(20), "backwards");
    refused_seeds(SeedForger::new().seed(1).data(5, b"xy").size(6), "shorter");
    refused_seeds(SeedForger::new().seed(1).data(5, b"").size(6), "empty");
    refused_seeds(SeedForger::new().seed(1).hole(5, 0).size(6), "empty");
    refused_seeds(SeedForger::new().dropped(1), "not here");
    refused_seeds(SeedForger::new().dropped(7).dropped(7), "not here");
    refused_seeds(SeedForger::new().seed(1).dropped(7), "in the middle of another");
    refused_seeds(SeedForger(SeedForger::new().0.frame(1, &[])), "unknown kind");
    let mut lying = SeedForger::new().abc(1);
    lying.0.totals.data_bytes = 2;
    refused_seeds(lying, "totals");
    let mut arriving = Arriving::new();
    assert!(matches!(arriving.take(&Forger::new().end()), Err(Error::Refused { .. })), "a layer is no stream of seeds");
    assert!(matches!(receive(&SeedForger::new().end()), Err(Error::Refused { .. })), "nor the other way");
    assert!(matches!(Arriving::new().take(&SEEDS_MAGIC), Err(Error::Stream(_))), "cut off");
}

#[test]
fn seeds_keep_to_the_limits_of_the_layer() {
    let beyond = |forger: SeedForger, what: &str| {
        let error = Arriving::new().take(&forger.end()).expect_err("it was taken");
        assert!(matches!(&error, Error::Limit { what: said, .. } if *said == what), "{error}");
    };
    beyond(SeedForger::new().seed(1).data(0, &[1; 600]).data(600, &[1; 600]).size(1200), "bytes of content");
    beyond(
        SeedForger::new().seed(1).data(0, &[1; 600]).size(600).seed(2).data(0, &[1; 600]).size(600),
        "bytes of content",
    );
    beyond(SeedForger::new().seed(1).data(9_999, b"xy").size(10_001), "bytes in one file");
    beyond(SeedForger::new().seed(1).data(u64::MAX, b"xy").size(1), "bytes in one file");
    beyond(SeedForger::new().seed(1).hole(u64::MAX, 2).size(1), "bytes in one file");
    beyond(SeedForger::new().seed(1).size(10_001), "bytes in one file");
    beyond((1..7).fold(SeedForger::new(), SeedForger::abc), "seeds");
    beyond(SeedForger::new().frame(5, &[1; 9]), "bytes in one frame");

    // What is dropped, or cut, makes room.
    let mut arriving = Arriving::new();
    for _ in 0..5 {
        arriving.take(&SeedForger::new().seed(1).data(0, &[1; 600]).size(600).dropped(1).end()).unwrap();
        arriving.take(&SeedForger::new().seed(2).data(0, &[1; 600]).size(600).seed(2).size(0).end()).unwrap();
    }
    // Both count together.
    arriving.take(&SeedForger::new().seed(2).data(0, &[1; 600]).size(600).end()).unwrap();
    let error = arriving.unpack(&Forger::new().file("f", &[(0, &[1; 600])], 600).end()).unwrap_err();
    assert!(matches!(error, Error::Limit { what: "bytes of content", .. }), "{error}");
}

#[test]
fn a_layer_takes_a_seed_once_and_as_it_is() {
    let with = |id, path| Entry { seed: id, ..entry(Kind::Regular, path) };
    let layer =
        || Forger { stream: MAGIC_WITH_SEEDS.to_vec(), totals: Totals::default() }.entry(&entry(Kind::Directory, ""));
    let end = |forger: Forger, size: u64| forger.frame(3, &size.to_le_bytes());
    let arriving = || {
        let mut arriving = Arriving::new();
        arriving.take(&SeedForger::new().abc(7).abc(8).end()).unwrap();
        arriving
    };
    let stats = arriving().unpack(&end(layer().entry(&with(7, "f")), 3).end()).unwrap();
    assert_eq!(stats, UnpackStats { entries: 2, data_bytes: 0 });

    let refused = |forger: Forger, why: &str| {
        let error = arriving().unpack(&forger.end()).expect_err("it was taken");
        assert!(matches!(error, Error::Refused { .. }) && error.to_string().contains(why), "{error}");
    };
    refused(end(layer().entry(&with(9, "f")), 3), "did not come");
    refused(end(end(layer().entry(&with(7, "f")), 3).entry(&with(7, "g")), 3), "another file already");
    refused(end(layer().entry(&with(7, "f")), 4), "not as large as its seed");
    refused(end(layer().entry(&with(7, "f")), 2), "not as large as its seed");
    refused(layer().entry(&with(7, "f")).frame(2, &[0; 9]), "data of a file whose content is a seed");
    refused(layer().entry(&Entry { seed: 7, ..entry(Kind::Fifo, "f") }), "no regular file");
    refused(end(layer().file("f", &[], 0).entry(&with(7, "f")), 3), "twice");
    refused(end(layer().entry(&link(Kind::Symlink, "l", "../secret")).entry(&with(7, "l")), 3), "twice");
    refused(end(layer().entry(&with(7, "../f")), 3), "out of order");
    assert!(
        matches!(receive(&end(layer().entry(&with(7, "f")), 3).end()), Err(Error::Refused { .. })),
        "without any seeds"
    );
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn a_damaged_stream_stays_inside(damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
        let forger = Forger::new().entry(&entry(Kind::Directory, "d")).file("d/f", &[(5, b"abc")], 10);
        let mut stream = forger.entry(&link(Kind::HardLink, "d/h", "d/f")).entry(&link(Kind::Symlink, "s", "d")).end();
        for (place, byte) in damage {
            let place = place.index(stream.len());
            stream[place] = byte;
        }
        // Either way; receive() itself checks that nothing happened outside.
        let _ = receive(&stream);
    }

    #[test]
    fn damaged_seeds_stay_inside(damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
        let forger = SeedForger::new().abc(1).seed(2).data(3, b"xyz").hole(7, 9).size(40).dropped(1);
        let mut stream = forger.end();
        for (place, byte) in damage {
            let place = place.index(stream.len());
            stream[place] = byte;
        }
        // Either way; take() itself checks that nothing happened outside.
        let mut arriving = Arriving::new();
        let _ = arriving.take(&stream);
        // The limit, and what the file system rounds each seed up to.
        prop_assert!(arriving.store.unwrap().bytes() <= 1000 + 3 * 4096);
    }
}
