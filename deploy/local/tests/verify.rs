//! The end check of live migrations: all that was copied beforehand is compared before the commit, and one byte that is not what it
//! was on the source ends the migration.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

mod support;

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use podferry_local::{FIRST_CONTAINER_ADDRESS, Node};
use rustix::fs::{SeekFrom, seek};
use support::counter::{Counter, digest};
use support::{NODES, Stage, churn, redis, verified};

/// As `--strategy live --verify`; a budget that two shared cores keep.
const VERIFIED: [&str; 5] = ["--strategy", "live", "--downtime-budget", "1000", "--verify"];
/// Bytes that 60 000 values of 1000 bytes take at least.
const POPULATED: u64 = 60_000_000;
const PAGE: usize = 4096;

#[test]
fn all_memory_of_a_busy_redis_is_compared_there_and_back() {
    let stage = Stage::up(&["redis"]);
    let counter = Counter::on_redis(&stage, 60000);
    let first_digest = counter.between(digest);
    for hop in 1..=4 {
        let before = counter.between(|_, counted| counted);
        let record = stage.migrate_with("redis", NODES[hop % 2], &VERIFIED);
        assert!(verified(&record) > POPULATED, "{record:#}");
        assert!(counter.between(|_, counted| counted) > before, "nothing was counted during hop {hop}");
        assert_eq!(counter.between(digest), first_digest, "after hop {hop}: {record:#}");
    }
    counter.stop();
}

/// A tree of processes, whose memory is written, mapped, unmapped and moved all the time.
#[test]
fn all_memory_of_processes_that_change_it_in_every_way_is_compared() {
    churn::hop(3, &["--strategy", "live", "--downtime-budget", "10000", "--verify"], |hop, record| {
        assert!(verified(record) > 4 << 20, "hop {hop}: {record:#}");
    });
}

#[test]
fn a_warm_migration_has_nothing_to_verify() {
    let stage = Stage::up(&["redis"]);
    stage.start(&redis("redis", FIRST_CONTAINER_ADDRESS));
    let refused = stage.try_migrate_with("redis", NODES[1], &["--strategy", "warm", "--verify"]).unwrap_err();
    assert!(refused.contains("INVALID_ARGUMENT") && refused.contains("nothing to verify"), "{refused}");
    assert_eq!(stage.places("redis"), [NODES[0]]);
}

/// What memory of processes is kept in on a node while it arrives.
fn stores(node: &Node) -> Vec<PathBuf> {
    let migrations = fs::read_dir(node.on_machine(&node.images())).into_iter().flatten().flatten();
    let files = migrations.flat_map(|migration| fs::read_dir(migration.path().join("images")).into_iter().flatten());
    let paths = files.flatten().map(|file| file.path());
    paths.filter(|path| path.extension().is_some_and(|extension| extension == "store")).collect()
}

/// Changes one byte of a value that Redis has been populated with, if one has arrived. They are not written any more on the source.
fn spoil(store: &File) -> bool {
    let mut page = [0; PAGE];
    let mut at = 0;
    while let Ok(found) = seek(store, SeekFrom::Data(at)) {
        at = found;
        store.read_exact_at(&mut page, at).unwrap();
        if let Some(place) = page.windows(6).position(|bytes| bytes == b"value:") {
            store.write_all_at(b"V", at + place as u64).unwrap();
            return true;
        }
        at += PAGE as u64;
    }
    false
}

#[test]
fn one_byte_that_differs_undoes_the_migration_and_is_named() {
    let stage = Stage::up(&["redis"]);
    let counter = Counter::on_redis(&stage, 60000);
    let first_digest = counter.between(digest);
    // Back and forth once, for all that is made once and for all, such as the coordinator's connections.
    stage.migrate_with("redis", NODES[1], &VERIFIED);
    stage.migrate_with("redis", NODES[0], &VERIFIED);
    let before = stage.settled_census();

    let (target, ended) = (stage.node(NODES[1]), Arc::new(AtomicBool::new(false)));
    let told = Arc::clone(&ended);
    let spoiling = thread::spawn(move || {
        while !told.load(Ordering::Relaxed) {
            let open = |path: PathBuf| File::options().read(true).write(true).open(path).ok();
            if stores(&target).into_iter().filter_map(open).any(|store| spoil(&store)) {
                return true;
            }
            thread::sleep(Duration::from_millis(20));
        }
        false
    });
    // Slow enough that something of it lies on the target for a while.
    let slow = [&VERIFIED[..], &["--bandwidth-limit", "24M", "--no-compression"]].concat();
    let record = stage.try_migrate_with("redis", NODES[1], &slow).unwrap();
    ended.store(true, Ordering::Relaxed);
    assert!(spoiling.join().unwrap(), "nothing was spoilt: {record:#}");

    assert_eq!(record["phase"], "failed", "{record:#}");
    let reason = record["reason"].as_str().unwrap();
    println!("{reason}");
    for words in
        ["memory of process 1 ", ": 1 of ", " pages differ, the first at 0x", "--strategy warm", "verify", NODES[1]]
    {
        assert!(reason.contains(words), "{words:?} is missing in {reason}");
    }
    assert_eq!(stage.places("redis"), [NODES[0]]);
    assert_eq!(counter.between(digest), first_digest);
    stage.assert_census(&before, |change| change.area == "tmpfs bytes" && change.after < change.before);
    // The same container moves, and is compared, when nobody changes anything.
    let record = stage.migrate_with("redis", NODES[1], &VERIFIED);
    assert!(verified(&record) > POPULATED, "{record:#}");
    assert_eq!(counter.between(digest), first_digest);
    counter.stop();
}
