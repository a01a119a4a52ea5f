//! What containers have written to their files moves while they run, and nothing of it is lost.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

mod support;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use podferry_local::{FIRST_CONTAINER_ADDRESS, Node, Workload};
use serde_json::Value;
use support::{Line, NODES, Stage, eventually, image};

/// The workload.
const NAME: &str = "files";
/// As `--strategy live`; a budget that two shared cores keep.
const LIVE: &[&str] = &["--strategy", "live", "--downtime-budget", "1000"];
const HYBRID: &[&str] = &["--strategy", "hybrid", "--accept-loss", "--downtime-budget", "1000"];
const WARM: &[&str] = &["--strategy", "warm"];
const MIB: u64 = 1 << 20;
/// So slow that some MiB of files take seconds.
const SLOW: &[&str] = &["--strategy", "live", "--bandwidth-limit", "8M", "--no-compression"];

/// Runs the program with so many MiB of files that are written once.
fn start(stage: &Stage, mib: u64) -> Line {
    let mib = mib.to_string();
    let arguments = ["/bin/podferry-file-load", "--mib", &mib, "--files", "8"];
    stage.start(&Workload::new(
        NAME,
        image(stage.folder.path(), NAME, "podferry-file-load", &[]),
        arguments,
        FIRST_CONTAINER_ADDRESS,
    ));
    let mut line = stage.connect(SocketAddr::new(FIRST_CONTAINER_ADDRESS.into(), 7000));
    assert_eq!(line.ask("check"), "ok");
    line
}

/// All files are what they have to be, now and when all of them have been written to again.
fn assert_right(line: &mut Line, when: &str) {
    assert_eq!(line.ask("check"), "ok", "{when}");
    let turns = |line: &mut Line| line.ask("turns").parse::<u64>().unwrap();
    let before = turns(line);
    eventually(Duration::from_secs(60), || {
        if turns(line) > before + 100 { Ok(()) } else { Err(format!("nothing is written {when}")) }
    });
    assert_eq!(line.ask("check"), "ok", "{when}, later");
}

fn round_bytes(record: &Value) -> Vec<u64> {
    let rounds = record["rounds"].as_array().unwrap();
    rounds.iter().map(|round| round["raw_bytes"].as_u64().unwrap()).collect()
}

fn seeds(node: &Node) -> PathBuf {
    node.on_machine(&node.bundle(NAME).join("seeds"))
}

fn upper_is_empty(node: &Node) -> bool {
    let upper = node.on_machine(&node.bundle(NAME).join("upper"));
    upper.read_dir().map_or(true, |mut entries| entries.next().is_none())
}

/// Nothing of the layer, or of what came before it, is on the node.
fn assert_has_nothing(node: &Node) {
    eventually(Duration::from_secs(30), || {
        let clean = !seeds(node).exists() && upper_is_empty(node);
        if clean { Ok(()) } else { Err(format!("{} has something of the layer", node.name())) }
    });
}

/// Begins a slow migration, and waits until files come in; gives its id.
fn begin_slowly(stage: &Stage) -> String {
    let words = [&["migrate", NAME, "--to", NODES[1], "--output", "json"], SLOW].concat();
    let output = stage.cluster.podferry(words).unwrap();
    let record: Value = serde_json::from_str(output.stdout.trim()).unwrap_or_else(|_| panic!("{}", output.stderr));
    let folder = seeds(&stage.node(NODES[1]));
    eventually(Duration::from_secs(30), || {
        let some = folder.read_dir().map_err(|error| format!("{}: {error}", folder.display()))?.next();
        some.map(drop).ok_or_else(|| "no file comes in".to_owned())
    });
    record["id"].as_str().unwrap().to_owned()
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

/// Of 128 MiB the freeze has what was written in the last round; and every byte of what was written, in place, by mappings that stay and
/// that are gone, with holes and new names, is there after each hop.
#[test]
fn large_layers_move_before_the_freeze_and_every_file_is_what_was_written_to_it() {
    let stage = Stage::up(&[NAME]);
    let mut line = start(&stage, 128);
    // Old enough to be at rest.
    thread::sleep(Duration::from_millis(1500));
    for (hop, strategy) in [LIVE, LIVE, HYBRID, LIVE, WARM, LIVE].into_iter().enumerate() {
        let (from, to) = (stage.node(NODES[hop % 2]), stage.node(NODES[(hop + 1) % 2]));
        let record = stage.migrate_with(NAME, to.name(), strategy);
        assert_right(&mut line, &format!("after hop {hop}"));
        if strategy != WARM {
            let rounds = round_bytes(&record);
            let last = *rounds.last().unwrap();
            println!("hop {hop}: {} ms down, rounds {rounds:?}", record["downtime_ms"]);
            assert!(rounds.len() >= 2 && rounds[0] > 128 * MIB, "{record:#}");
            assert!(last < 32 * MIB, "the freeze had much of the layer: {record:#}");
        }
        assert!(!seeds(&to).exists(), "hop {hop}");
        assert_has_nothing(&from);
    }
}

#[test]
fn a_migration_that_is_cancelled_while_files_are_sent_leaves_nothing_of_them() {
    let stage = Stage::up(&[NAME]);
    let mut line = start(&stage, 64);
    // What a first migration makes once and for all is no leftover.
    stage.migrate_with(NAME, NODES[1], LIVE);
    stage.migrate_with(NAME, NODES[0], LIVE);
    let before = stage.settled_census();
    let id = begin_slowly(&stage);
    stage.cluster.podferry(["cancel", &id]).unwrap();
    assert_eq!(ended(&stage, &id)["phase"], "cancelled");
    assert_has_nothing(&stage.node(NODES[1]));
    assert_eq!(stage.places(NAME), [NODES[0]]);
    assert_right(&mut line, "after it was cancelled");
    stage.assert_census(&before, |_| false);
    stage.migrate_with(NAME, NODES[1], LIVE);
    assert_right(&mut line, "after the migration that works");
}

#[test]
fn an_agent_that_is_killed_while_files_come_in_removes_them_when_it_is_back() {
    let stage = Stage::up(&[NAME]);
    let mut line = start(&stage, 64);
    let node = stage.node(NODES[1]);
    let id = begin_slowly(&stage);
    node.kill_agent(podferry_local::Signal::KILL).unwrap();
    assert!(seeds(&node).exists(), "it was killed in the middle");
    node.start_agent().unwrap();
    node.wait_ready().unwrap();
    assert_eq!(ended(&stage, &id)["phase"], "failed");
    assert_has_nothing(&node);
    assert_right(&mut line, "after the agent was killed");
    stage.migrate_with(NAME, NODES[1], LIVE);
    assert_right(&mut line, "after the migration that works");
}

/// In pre-copy, so that the container never stands still for it.
#[test]
fn a_target_whose_disk_fills_up_while_files_come_in_is_undone_and_named() {
    let stage = Stage::up(&[NAME]);
    let mut line = start(&stage, 64);
    let node = stage.node(NODES[1]);
    let bundles = node.bundles().display().to_string();
    node.remove_workload(NAME).unwrap();
    node.shell(&format!("mount -t tmpfs -o size=512m tmpfs {bundles}")).unwrap();
    let workload =
        Workload::new(NAME, stage.folder.path().join("image/rootfs"), ["/bin/true"], FIRST_CONTAINER_ADDRESS);
    stage.cluster.prepare_workload(node.name(), &workload).unwrap();
    let id = begin_slowly(&stage);
    let used = node.shell(&format!("df --output=used -BM {bundles} | tail -1 | tr -dc 0-9")).unwrap();
    let room = used.trim().parse::<u64>().unwrap() + 12;
    node.shell(&format!("mount -o remount,size={room}m {bundles}")).unwrap();
    let record = ended(&stage, &id);
    assert_eq!(record["phase"], "failed");
    let reason = record["reason"].as_str().unwrap();
    for word in [NODES[1], "no space left for", "seeds", "make room"] {
        assert!(reason.contains(word), "{word:?} is missing in {reason}");
    }
    assert_eq!(record["downtime_ms"].as_f64(), Some(0.0), "{record:#}");
    assert_has_nothing(&node);
    assert_right(&mut line, "after a target that was full");
    node.remove_workload(NAME).unwrap();
    node.shell(&format!("umount {bundles}")).unwrap();
}
