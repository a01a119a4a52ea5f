//! Streams that no honest source writes.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;
use std::path::Path;

use podferry_filesystem::format::{Entry, Kind, MAGIC, Totals, Xattr};
use podferry_filesystem::{Error, Limits, Result, UnpackStats, unpack};
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
}
