//! Volumes move with their container, or the migration is refused; never is anything lost that was in a folder.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

mod support;
#[path = "../../../agent/filesystem/tests/common/mod.rs"]
mod tree;

use std::fs::{self, File};
use std::net::SocketAddr;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use podferry_local::{BindMount, FIRST_CONTAINER_ADDRESS, Node, Workload};
use rustix::fs::{CWD, FileType, Mode, XattrFlags, mknodat, setxattr};
use serde_json::Value;
use support::{Line, NODES, Stage, eventually, image, redis, redis_address};
use tree::tree;

/// The workload.
const NAME: &str = "files";
/// Its volume.
const VOLUME: &str = "/volume";
const LIVE: &[&str] = &["--strategy", "live", "--downtime-budget", "1000"];
const HYBRID: &[&str] = &["--strategy", "hybrid", "--accept-loss", "--downtime-budget", "1000"];
const WARM: &[&str] = &["--strategy", "warm"];
/// So slow that some MiB of files take seconds.
const SLOW: &[&str] = &["--strategy", "live", "--bandwidth-limit", "8M", "--no-compression"];
const MIB: u64 = 1 << 20;
/// `setfacl -m u:7:rw`, as the kernel keeps it: version, then tag, permissions and id of each entry (`linux/posix_acl_xattr.h`).
const ACL: [u8; 44] = [
    2, 0, 0, 0, 1, 0, 6, 0, 255, 255, 255, 255, 2, 0, 6, 0, 7, 0, 0, 0, 4, 0, 4, 0, 255, 255, 255, 255, 16, 0, 6, 0,
    255, 255, 255, 255, 32, 0, 0, 0, 255, 255, 255, 255,
];

fn volume(node: &Node) -> PathBuf {
    node.volume(NAME, Path::new(VOLUME))
}

fn workload(stage: &Stage, mib: u64) -> Workload {
    let mib = mib.to_string();
    let arguments = ["/bin/podferry-file-load", "--mib", &mib, "--files", "8", "--folder", VOLUME];
    let rootfs = image(stage.folder.path(), NAME, "podferry-file-load", &[]);
    Workload { volumes: vec![VOLUME.into()], ..Workload::new(NAME, rootfs, arguments, FIRST_CONTAINER_ADDRESS) }
}

fn start(stage: &Stage, mib: u64) -> Line {
    stage.start(&workload(stage, mib));
    let mut line = stage.connect(SocketAddr::new(FIRST_CONTAINER_ADDRESS.into(), 7000));
    assert_eq!(line.ask("check"), "ok");
    line
}

/// A tree that nobody writes to, with all that a file can be and have.
fn make_still(folder: &Path) {
    fs::create_dir_all(folder.join("deep/er")).unwrap();
    fs::write(folder.join("plain"), "x").unwrap();
    fs::hard_link(folder.join("plain"), folder.join("deep/again")).unwrap();
    std::os::unix::fs::symlink("../plain", folder.join("deep/link")).unwrap();
    File::create(folder.join("sparse")).unwrap().write_all_at(b"end", 10 * MIB).unwrap();
    std::os::unix::fs::chown(folder.join("deep"), Some(7), Some(8)).unwrap();
    setxattr(folder.join("plain"), "user.note", b"\0\xff", XattrFlags::CREATE).unwrap();
    setxattr(folder.join("sparse"), "system.posix_acl_access", &ACL, XattrFlags::CREATE).unwrap();
    mknodat(CWD, folder.join("deep/er/pipe"), FileType::Fifo, Mode::from_raw_mode(0o640), 0).unwrap();
    fs::set_permissions(folder.join("deep/er"), std::os::unix::fs::PermissionsExt::from_mode(0o1751)).unwrap();
}

fn is_empty(folder: &Path) -> bool {
    fs::read_dir(folder).map_or(true, |mut entries| entries.next().is_none())
}

fn assert_emptied(node: &Node) {
    eventually(Duration::from_secs(30), || {
        if is_empty(&volume(node)) { Ok(()) } else { Err(format!("{} has something of the volume", node.name())) }
    });
}

/// The record of a migration once it has ended.
fn ended(stage: &Stage, id: &str) -> Value {
    eventually(Duration::from_secs(120), || {
        let output = stage.cluster.podferry(["describe", id, "--output", "json"]).unwrap();
        let record: Value = serde_json::from_str(output.stdout.trim()).map_err(|error| error.to_string())?;
        let phase = record["phase"].as_str().unwrap_or_default();
        let done = matches!(phase, "succeeded" | "failed" | "cancelled");
        if done { Ok(record) } else { Err(format!("it does not end: {record:#}")) }
    })
}

/// Begins one that takes seconds, and gives its id when something of the volume has come.
fn begin_slowly(stage: &Stage) -> String {
    let words = [&["migrate", NAME, "--to", NODES[1], "--output", "json"], SLOW].concat();
    let output = stage.cluster.podferry(words).unwrap();
    let record: Value = serde_json::from_str(output.stdout.trim()).unwrap_or_else(|_| panic!("{}", output.stderr));
    let folder = volume(&stage.node(NODES[1]));
    eventually(Duration::from_secs(30), || {
        let there = !is_empty(&folder);
        if there { Ok(()) } else { Err("nothing comes into the volume".to_owned()) }
    });
    record["id"].as_str().unwrap().to_owned()
}

#[test]
fn what_is_in_a_volume_moves_with_the_container_and_is_not_left_behind() {
    let stage = Stage::up(&[NAME]);
    let folder = volume(&stage.node(NODES[0])).join("still");
    make_still(&folder);
    let still = tree(&folder);
    let mut line = start(&stage, 64);
    for (hop, strategy) in [LIVE, WARM, HYBRID, LIVE].into_iter().enumerate() {
        let (from, to) = (stage.node(NODES[hop % 2]), stage.node(NODES[(hop + 1) % 2]));
        let record = stage.migrate_with(NAME, to.name(), strategy);
        assert_eq!(line.ask("check"), "ok", "after hop {hop}: {record:#}");
        assert!(tree(&volume(&to).join("still")) == still, "what nobody writes to differs after hop {hop}");
        assert_emptied(&from);
        if strategy == LIVE {
            let rounds = record["rounds"].as_array().unwrap();
            let bytes: Vec<u64> = rounds.iter().map(|round| round["raw_bytes"].as_u64().unwrap()).collect();
            println!("hop {hop}: {} ms down, rounds {bytes:?}", record["downtime_ms"]);
            assert!(bytes[0] > 64 * MIB && *bytes.last().unwrap() < 32 * MIB, "the freeze had it: {record:#}");
        }
    }
    let mappings =
        fs::read_to_string(format!("/proc/{}/maps", stage.node(NODES[0]).container_process(NAME).unwrap().pid));
    assert!(mappings.unwrap().contains("/volume/mapped"), "it writes to the volume still");
}

#[test]
fn a_database_that_is_stopped_and_started_anew_finds_its_files_in_its_volume() {
    let stage = Stage::up(&["redis"]);
    let mut workload = redis("redis", FIRST_CONTAINER_ADDRESS);
    workload.args.extend(["--appendonly", "yes"].map(str::to_owned));
    workload.volumes = vec!["/data".into()];
    stage.start(&workload);
    assert_eq!(stage.connect(redis_address()).ask("SET kept 42"), "+OK");
    for target in [NODES[1], NODES[0]] {
        stage.migrate_with("redis", target, &["--strategy", "cold"]);
        assert_eq!(stage.connect(redis_address()).ask_bulk("GET kept"), "42");
        assert!(!is_empty(&stage.node(target).volume("redis", Path::new("/data")).join("appendonlydir")));
    }
    let left = stage.node(NODES[1]).volume("redis", Path::new("/data"));
    eventually(Duration::from_secs(30), || if is_empty(&left) { Ok(()) } else { Err("it stays".to_owned()) });
}

#[test]
fn a_migration_that_is_undone_leaves_nothing_in_the_targets_volume_and_all_in_the_sources() {
    let stage = Stage::up(&[NAME]);
    let mut line = start(&stage, 64);
    let node = stage.node(NODES[1]);
    let id = begin_slowly(&stage);
    stage.cluster.podferry(["cancel", &id]).unwrap();
    assert_eq!(ended(&stage, &id)["phase"], "cancelled");
    assert_emptied(&node);
    let id = begin_slowly(&stage);
    node.kill_agent(podferry_local::Signal::KILL).unwrap();
    assert!(!is_empty(&volume(&node)), "it was killed in the middle");
    node.start_agent().unwrap();
    node.wait_ready().unwrap();
    assert_eq!(ended(&stage, &id)["phase"], "failed");
    assert_emptied(&node);
    let id = begin_slowly(&stage);
    let source = stage.node(NODES[0]);
    source.kill_agent(podferry_local::Signal::KILL).unwrap();
    source.start_agent().unwrap();
    source.wait_ready().unwrap();
    assert_eq!(ended(&stage, &id)["phase"], "failed");
    assert_emptied(&node);
    assert_eq!((stage.places(NAME), line.ask("check").as_str()), (vec![NODES[0]], "ok"));
    stage.migrate_with(NAME, NODES[1], LIVE);
    assert_eq!(line.ask("check"), "ok");
}

/// Each is refused before anything is touched, and what is in the folders stays.
#[test]
fn a_volume_that_cannot_move_or_has_no_place_is_refused() {
    let stage = Stage::up(&[NAME, "other"]);
    let mut line = start(&stage, 1);
    let [first, second] = NODES.map(|name| stage.node(name));
    let mut refused = |stage: &Stage, words: &[&str]| {
        let record = stage.try_migrate_with(NAME, NODES[1], LIVE).unwrap_or_else(|words| panic!("{words}"));
        let reason = record["reason"].as_str().unwrap();
        assert_eq!(record["phase"], "failed", "{record:#}");
        for word in words {
            assert!(reason.contains(word), "{word:?} is missing in {reason}");
        }
        assert_eq!((record["downtime_ms"].as_f64(), line.ask("check").as_str()), (Some(0.0), "ok"));
    };
    // Somebody's data is where it would go.
    let foreign = volume(&second).join("foreign");
    fs::create_dir_all(volume(&second)).unwrap();
    fs::write(&foreign, "precious").unwrap();
    refused(&stage, &["volume-not-empty", VOLUME, "has something in it", NODES[1]]);
    assert_eq!(fs::read_to_string(&foreign).unwrap(), "precious");
    fs::remove_file(&foreign).unwrap();
    // Another container uses it.
    let shares = BindMount { source: volume(&first), destination: "/theirs".into(), read_only: true };
    let rootfs = stage.folder.path().join("image/rootfs");
    let other =
        Workload::new("other", rootfs, ["/bin/podferry-file-load", "--mib", "1"], "10.88.0.101".parse().unwrap());
    stage.cluster.start_workload(NODES[0], &Workload { mounts: vec![shares], ..other }).unwrap();
    refused(&stage, &["volume-in-use", "too", NODES[0]]);
    first.remove_workload("other").unwrap();
    // The target's configuration has none there, or not one that may be filled.
    second.remove_workload(NAME).unwrap();
    let without = Workload { volumes: Vec::new(), ..workload(&stage, 1) };
    stage.cluster.prepare_workload(NODES[1], &without).unwrap();
    refused(&stage, &["no-volume", "mounts nothing at /volume", NODES[1]]);
    second.remove_workload(NAME).unwrap();
    let elsewhere = stage.folder.path().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    let mounts = vec![BindMount { source: elsewhere.clone(), destination: VOLUME.into(), read_only: false }];
    stage.cluster.prepare_workload(NODES[1], &Workload { mounts, ..without.clone() }).unwrap();
    refused(&stage, &["no-volume", "volume_dirs", &elsewhere.display().to_string()]);
    second.remove_workload(NAME).unwrap();
    stage.cluster.prepare_workload(NODES[1], &workload(&stage, 1)).unwrap();
    let record = stage.migrate_with(NAME, NODES[1], LIVE);
    assert_eq!(line.ask("check"), "ok", "{record:#}");
}

/// A folder of the host that both nodes have is left alone, as ever, and the migration says so.
#[test]
fn a_mount_that_does_not_move_is_named() {
    let stage = Stage::up(&["redis"]);
    let folder = stage.folder.path().join("host");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("file"), "stays").unwrap();
    let mounts = vec![BindMount { source: folder.clone(), destination: "/host".into(), read_only: false }];
    stage.start(&Workload { mounts, ..redis("redis", FIRST_CONTAINER_ADDRESS) });
    stage.connect(redis_address());
    let record = stage.migrate("redis", NODES[1]);
    let notes = record["notes"].to_string();
    assert!(notes.contains("/host") && notes.contains("is not moved"), "{notes}");
    assert_eq!(fs::read_to_string(folder.join("file")).unwrap(), "stays");
}
