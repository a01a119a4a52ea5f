//! Nodes and coordinators of the protocol's previous version, as they are in the middle of an upgrade. Run by
//! `make e2e-versions`, which builds the last commit that spoke it.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use podferry_local::{Node, Place, Signal};
use serde_json::Value;
use support::counter::{Counter, digest};
use support::{NODES, Stage, eventually};

const LIVE: [&str; 4] = ["--strategy", "live", "--downtime-budget", "1000"];
const WARM: [&str; 2] = ["--strategy", "warm"];
const LIMITED: [&str; 4] = ["--strategy", "warm", "--bandwidth-limit", "100000000"];
const READY: Duration = Duration::from_secs(60);

/// The folder of programs that speak the previous version.
fn previous() -> PathBuf {
    let folder = std::env::var_os("PODFERRY_PREVIOUS").expect("PODFERRY_PREVIOUS: run `make e2e-versions`");
    let folder = PathBuf::from(folder);
    assert!(folder.join("podferry-agent").exists(), "no podferry-agent in {}", folder.display());
    folder
}

/// A program of the previous version; killed when dropped.
struct Previous(Child);

impl Previous {
    fn start(place: &Place, program: &str, config: &Path) -> Self {
        let mut command: Command = place.command(previous().join(program));
        command.arg("--config").arg(config).stdin(Stdio::null());
        Self(command.spawn().unwrap())
    }
}

impl Drop for Previous {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What the previous version's agent or coordinator reads: its own programs, and no key that it does not know.
fn config_of_previous(config: &str) -> String {
    let ours = podferry_local::default_binaries().canonicalize().unwrap().display().to_string();
    let mut config: toml::Table = config.parse().unwrap();
    config.remove("rest_listen");
    for (table, unknown) in [("tools", &["criu_shim", "pager", "tar"][..]), ("runtime", &["volume_dirs"])] {
        let Some(table) = config.get_mut(table).and_then(toml::Value::as_table_mut) else { continue };
        for key in unknown {
            table.remove(*key);
        }
    }
    toml::to_string(&config).unwrap().replace(&ours, &previous().display().to_string())
}

/// Puts an agent of the previous version in a node's place.
fn downgrade(stage: &Stage, name: &str) -> Previous {
    let node = stage.node(name);
    node.kill_agent(Signal::TERM).unwrap();
    // An upgrade keeps what agents wrote down; nothing promises that an older one can read what a newer one wrote.
    fs::remove_dir_all(node.agent_state()).unwrap();
    fs::create_dir(node.agent_state()).unwrap();
    let config = fs::read_to_string(node.agent_config()).unwrap();
    let path = node.agent_config().with_extension("previous.toml");
    fs::write(&path, config_of_previous(&config)).unwrap();
    let agent = Previous::start(&node, "podferry-agent", &path);
    wait_for_both(stage);
    agent
}

/// Puts this version's agent back, with what the previous one left in the state folder.
fn upgrade(stage: &Stage, name: &str, previous: Previous) {
    let node: Node = stage.node(name);
    node.shell("pkill -TERM -x podferry-agent").unwrap();
    drop(previous);
    node.start_agent().unwrap();
    node.wait_ready().unwrap();
    wait_for_both(stage);
}

fn wait_for_both(stage: &Stage) {
    eventually(READY, || {
        let output = stage.cluster.podferry(["nodes", "--output", "json"]).unwrap();
        let nodes: Vec<Value> = serde_json::from_str(&output.stdout).map_err(|error| error.to_string())?;
        let fit = nodes.iter().filter(|node| node["fit"] == true).count();
        if fit == NODES.len() { Ok(()) } else { Err(output.stdout) }
    });
}

fn assert_refused(stage: &Stage, target: &str, more: &[&str], old: &str) {
    let words = stage.try_migrate_with("redis", target, more).expect_err("it has to be refused");
    for word in [old, "version", "update"] {
        assert!(words.contains(word), "{word:?} is missing in {words}");
    }
}

#[test]
#[ignore = "needs programs of the previous version: make e2e-versions"]
fn nodes_are_upgraded_one_by_one_and_workloads_move_all_the_way() {
    let stage = Stage::up(&["redis"]);
    let [first, second] = NODES;
    let counter = Counter::on_redis(&stage, 20000);
    let first_digest = counter.between(digest);
    let hop = |target: &str, more: &[&str]| {
        let record = stage.migrate_with("redis", target, more);
        assert_eq!(counter.between(digest), first_digest, "{record:#}");
    };

    let old_second = downgrade(&stage, second);
    assert_refused(&stage, second, &LIVE, second);
    hop(second, &WARM);
    assert_refused(&stage, first, &LIVE, second);
    assert_refused(&stage, first, &LIMITED, second);
    hop(first, &WARM);
    hop(second, &LIMITED);

    let old_first = downgrade(&stage, first);
    hop(first, &WARM);
    upgrade(&stage, second, old_second);
    hop(second, &WARM);
    upgrade(&stage, first, old_first);
    hop(first, &LIVE);
    hop(second, &WARM);
    counter.stop();
}

#[test]
#[ignore = "needs programs of the previous version: make e2e-versions"]
fn a_coordinator_of_the_previous_version_moves_between_nodes_of_this_one() {
    let stage = Stage::up(&["redis"]);
    let counter = Counter::on_redis(&stage, 20000);
    let first_digest = counter.between(digest);
    let coordinator = stage.cluster.coordinator();
    coordinator.kill(Signal::TERM).unwrap();
    let path = coordinator.config().with_extension("previous.toml");
    fs::write(&path, config_of_previous(&fs::read_to_string(coordinator.config()).unwrap())).unwrap();
    let _old = Previous::start(coordinator.place(), "podferry-coordinator", &path);
    wait_for_both(&stage);
    for target in [NODES[1], NODES[0]] {
        let record = stage.migrate_with("redis", target, &WARM);
        assert_eq!(counter.between(digest), first_digest, "{record:#}");
    }
    counter.stop();
}
