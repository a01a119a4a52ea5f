//! A target that has no room: it is refused with the figures where that can be known, and where it shows only on the way,
//! the migration is undone and says what is full. The source runs on with its connection, and the target has nothing of it.
#![allow(clippy::unwrap_used, reason = "a helper that fails has to fail its test")]

mod faults;

use std::fs;
use std::path::Path;
use std::time::Duration;

use faults::stage::{NAME, NODES, Stage};
use faults::{redis, serial, wait_every, wait_for};
use podferry_local::faults::room::{Mounted, full_state as full_state_of};
use podferry_local::{Node, Workload};
use serde_json::Value;

/// What Redis holds, in MiB: on the slow link a transfer of more than a second.
const MEMORY: usize = 2;
/// What its writable layer holds, and what is left for it on the full file system, in MiB. On the slow link more than two
/// seconds pass until that is full: the file system is made smaller meanwhile, and cannot be when it holds more.
const LAYER: usize = 8;
const ROOM: usize = 5;
const FAILED: i32 = 1;
const REFUSED: i32 = 3;

fn stage() -> Stage {
    let mut stage = Stage::up_unmoved(MEMORY);
    stage.take_stock();
    stage
}

/// Migrates, which has to end with this code; the words of the error.
fn fails(stage: &Stage, words: &[&str], code: i32) -> String {
    let output =
        stage.podferry(&[&["migrate", NAME, "--strategy", "warm", "--wait", "--output", "json"], words].concat());
    assert_eq!(output.status.code(), Some(code), "{}{}", output.stdout, output.stderr);
    let error = output.stderr.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()).next_back();
    error.unwrap_or_else(|| panic!("no error in JSON: {}", output.stderr))["error"].to_string()
}

fn assert_says(said: &str, words: &[&str]) {
    for word in words {
        assert!(said.contains(word), "{word:?} is missing in {said}");
    }
}

fn figure_before(said: &str, words: &str) -> usize {
    let before = said.split_once(words).unwrap_or_else(|| panic!("{said}")).0;
    before.rsplit(|letter: char| !letter.is_ascii_digit()).next().unwrap().parse().unwrap()
}

#[test]
fn a_target_without_memory_is_refused_with_the_figures_or_undone() {
    let _one_at_a_time = serial();
    let mut stage = stage();
    let node = stage.target();
    let available = pretend_memory(&node, 70 << 10);
    // Whether the node was named or not.
    for words in [&["--to", NODES[1]][..], &[]] {
        let said = fails(&stage, words, REFUSED);
        assert_says(&said, &[NODES[1], " MiB of memory are needed, 70 MiB are free"]);
        let needed = figure_before(&said, " MiB of memory are needed");
        // The images and the restored memory, and something to spare.
        assert!((64 + 2 * MEMORY..200).contains(&needed), "{said}");
    }
    available.end().unwrap();
    stage.assert_sound("after a target without memory");

    // The target's own limit is less than the container has: the kernel would kill it, in a live migration behind the commit.
    limit_memory(&stage, 4 << 20);
    let said = fails(&stage, &["--to", NODES[1]], REFUSED);
    assert_says(&said, &[NODES[1], "config.json allows 4194304 bytes of memory", "raise linux.resources.memory.limit"]);
    stage.assert_sound("after a limit that is too low");
    node.remove_workload(NAME).unwrap();
    stage.cluster.prepare_workload(node.name(), &redis()).unwrap();
    stage.migrate();
    stage.assert_alive("after the migration that works");
}

fn limit_memory(stage: &Stage, bytes: i64) {
    let node = stage.target();
    node.remove_workload(NAME).unwrap();
    let limited = Workload { memory_limit: Some(bytes), ..redis() };
    stage.cluster.prepare_workload(node.name(), &limited).unwrap();
}

/// Lets a node see so many KiB of available memory.
fn pretend_memory(node: &Node, kib: u64) -> Mounted {
    let real = fs::read_to_string("/proc/meminfo").unwrap();
    let others = real.lines().filter(|line| !line.starts_with("MemAvailable:"));
    let lines = others.chain([format!("MemAvailable: {kib} kB").as_str()]).collect::<Vec<_>>().join("\n");
    let file = node.folder().join("meminfo");
    fs::write(&file, lines + "\n").unwrap();
    Mounted::new(node, &format!("--bind {}", file.display()), Path::new("/proc/meminfo")).unwrap()
}

#[test]
fn a_target_whose_disk_fills_up_on_the_way_is_undone_and_named() {
    let _one_at_a_time = serial();
    let mut stage = stage();
    let blob = stage.source().bundle(NAME).join("rootfs/data/blob");
    fs::write(stage.source().on_machine(&blob), faults::client::noise(LAYER << 20)).unwrap();
    stage.take_stock();
    full_state(&mut stage);
    full_bundles(&mut stage);
    stage.migrate();
    stage.assert_alive("after the migration that works");
}

/// Where the agent keeps its state.
fn full_state(stage: &mut Stage) {
    let node = stage.target();
    let state = node.agent_state();
    let tiny = full_state_of(&node).unwrap();
    let said = fails(stage, &["--to", NODES[1]], FAILED);
    assert_says(&said, &["RESOURCE_EXHAUSTED", NODES[1], &state.display().to_string(), "No space left", "make room"]);
    tiny.end().unwrap();
    stage.assert_sound("after a target whose state is full");
}

/// Where it unpacks writable layers.
fn full_bundles(stage: &mut Stage) {
    let node = stage.target();
    let bundles = node.bundles();
    node.remove_workload(NAME).unwrap();
    let tmpfs = Mounted::new(&node, "-t tmpfs -o size=256m tmpfs", &bundles).unwrap();
    stage.cluster.prepare_workload(node.name(), &redis()).unwrap();
    let slow = stage.slow_down(&node);
    let begun = stage.begin();
    let id = begun.id();
    wait_every(Duration::from_micros(500), "the tasks to be stopped", || stage.is_stopped().then_some(()));
    node.shell(&format!("mount -o remount,size={ROOM}m {}", bundles.display())).unwrap();
    let (phase, reason) = stage.ended(&id);
    drop(slow);
    assert_eq!(phase, "failed", "{reason}");
    let upper = node.bundle(NAME).join("upper");
    let blob = upper.join("data/blob").display().to_string();
    assert_says(&reason, &[NODES[1], "no space left for", &blob, "what to do: make room"]);
    stage.assert_alive("after a target whose bundles are full");
    stage.assert_one_copy("after a target whose bundles are full");
    wait_for("the layer to be removed", || {
        fs::read_dir(node.on_machine(&upper)).unwrap().next().is_none().then_some(())
    });
    node.remove_workload(NAME).unwrap();
    tmpfs.end().unwrap();
    stage.cluster.prepare_workload(node.name(), &redis()).unwrap();
    stage.assert_sound("after a target whose bundles are full");
}
