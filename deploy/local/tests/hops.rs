//! Workloads that are moved again and again: nothing is lost, nothing is left behind.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

mod support;

use std::fs;
use std::path::Path;
use std::time::Duration;

use podferry_local::{FIRST_CONTAINER_ADDRESS, Node, Workload};
use support::counter::{Counter, digest};
use support::{NODES, Stage, eventually, redis, redis_address, redis_rootfs};

/// How long anything here may take, also on a machine that is busy with other things.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often Redis is moved in a row.
const HOPS: usize = 20;
/// After which hop all that a first migration makes once and for all is there; Redis is back at its first node.
const WARM: usize = 2;

#[test]
fn redis_goes_twenty_hops_on_one_connection_and_nothing_drifts() {
    let stage = Stage::up(&["redis"]);
    stage.start(&redis("redis", FIRST_CONTAINER_ADDRESS));
    let mut line = stage.connect(redis_address());
    assert_eq!(line.ask("DEBUG POPULATE 20000 key 100"), "+OK");
    assert_eq!(line.ask("SET counter 0"), "+OK");
    let counter = Counter::start(line);
    let first_digest = counter.between(digest);

    let mut after_two = None;
    for hop in 1..=HOPS {
        let before = counter.between(|_, counted| counted);
        let record = stage.migrate("redis", NODES[hop % 2]);
        let (digest, counted) = counter.between(|line, counted| (digest(line, counted), counted));
        assert_eq!(digest, first_digest, "after hop {hop}: {record:#}");
        assert!(counted > before, "nothing was counted during hop {hop}");
        if hop == WARM {
            after_two = Some(stage.settled_census());
        }
    }
    let (counted, longest) = counter.stop();
    println!("{HOPS} hops, {counted} increments, the longest took {} ms", longest.as_millis());

    // Less memory in use than before is no drift.
    stage.assert_census(&after_two.unwrap(), |change| change.area == "tmpfs bytes" && change.after < change.before);
    for name in NODES {
        let node = stage.node(name);
        let left = images_of(&node);
        assert!(left.is_empty(), "images are left on {name}: {left:?}");
        let kept_in = node.shell(&format!("stat --file-system --format %T {}", node.images().display())).unwrap();
        assert_eq!(kept_in.trim(), "tmpfs", "what is in memory may not come to a disk");
    }
}

/// Files below the node's tmpfs for images.
fn images_of(node: &Node) -> Vec<String> {
    let listing = node.shell(&format!("find {} -type f", node.images().display())).unwrap();
    listing.lines().map(str::to_owned).collect()
}

/// Appends to a file of its writable layer and writes to its output, in step.
const JOURNAL: &str = "mkdir -p /data/deep; i=0
    while :; do i=$((i+1)); echo \"entry $i\" >>/data/deep/journal; echo \"said $i\"; sleep 0.02; done";

#[test]
fn layer_output_and_address_go_along_both_ways() {
    let stage = Stage::up(&["journal"]);
    let workload = Workload::new("journal", redis_rootfs(), ["/bin/sh", "-c", JOURNAL], FIRST_CONTAINER_ADDRESS);
    let container = stage.start(&workload);
    let [first, second] = NODES.map(|name| stage.node(name));
    let log = |node: &Node| fs::read_to_string(node.container_logs().join("journal.log")).unwrap_or_default();
    eventually(PATIENCE, || {
        if log(&first).contains("said 10\n") {
            Ok(())
        } else {
            Err(format!("no output in {}", container.log.display()))
        }
    });
    assert_eq!(link_addresses(&stage), links_on(&first));

    let mut said = Vec::new();
    for (target, source) in [(&second, &first), (&first, &second)] {
        stage.migrate("journal", target.name());
        assert_gone(source);
        // It goes on there: more than at the time of the move.
        let moved_at = journal(target).len();
        eventually(PATIENCE, || {
            let now = journal(target).len();
            if now > moved_at + 10 { Ok(()) } else { Err(format!("{now} entries, {moved_at} at the move")) }
        });
        assert_eq!(link_addresses(&stage), links_on(target));
        said.push(log(target));
    }

    // Each node has its own file; the first one's has both its stays.
    let expected: Vec<String> = (1..=journal(&first).len()).map(|count| format!("entry {count}")).collect();
    assert_eq!(journal(&first)[..expected.len()], expected);
    let numbers = |text: &str| -> Vec<u64> {
        let whole = text.lines().filter_map(|line| line.strip_prefix("said "));
        whole.map(|number| number.parse().unwrap()).collect()
    };
    let mut all = numbers(&log(&first));
    all.extend(numbers(&log(&second)));
    all.sort_unstable();
    let consecutive: Vec<u64> = (1..=u64::try_from(all.len()).unwrap()).collect();
    assert_eq!(all, consecutive, "output was lost or doubled");
    assert!(!said[0].is_empty() && !said[1].is_empty());
}

/// The entries of the journal, which must be all from the first on.
fn journal(node: &Node) -> Vec<String> {
    let text = node.runc(&["exec", "journal", "/bin/cat", "/data/deep/journal"]).unwrap().success().unwrap();
    let lines: Vec<String> = text.lines().map(str::to_owned).collect();
    for (line, count) in lines.iter().zip(1..) {
        assert_eq!(*line, format!("entry {count}"), "the journal has a gap on {}", node.name());
    }
    lines
}

/// The link address that the client side finds the container at.
fn link_addresses(stage: &Stage) -> String {
    let question = format!(
        "ip neighbour flush dev eth0; (exec 3<>/dev/tcp/{FIRST_CONTAINER_ADDRESS}/9) 2>/dev/null || true
         ip neighbour show {FIRST_CONTAINER_ADDRESS}"
    );
    let table = stage.cluster.client().check(["bash", "-c", &question]).unwrap();
    let mut words = table.split_whitespace().skip_while(|word| *word != "lladdr");
    words.nth(1).unwrap_or_else(|| panic!("{FIRST_CONTAINER_ADDRESS} does not answer: {table}")).to_owned()
}

/// The link address of the container on a node.
fn links_on(node: &Node) -> String {
    let link = node.check(["ip", "-oneline", "-n", "journal", "link", "show", "eth0"]).unwrap();
    let addresses = node.check(["ip", "-oneline", "-n", "journal", "-4", "address", "show", "eth0"]).unwrap();
    assert!(addresses.contains(&format!("{FIRST_CONTAINER_ADDRESS}/24")), "{addresses}");
    link.split_whitespace().skip_while(|word| *word != "link/ether").nth(1).unwrap().to_owned()
}

/// Nothing of the journal stays on this node: no container, namespace or file of its layer. The removal goes on for a
/// moment after the migration has ended.
fn assert_gone(node: &Node) {
    eventually(PATIENCE, || {
        let list = node.runc(&["list", "--quiet"]).unwrap().success().unwrap();
        let netns = node.on_machine(Path::new("/run/netns/journal"));
        let upper = node.on_machine(&node.bundle("journal").join("upper"));
        let mut left: Vec<_> = fs::read_dir(&upper).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
        left.extend(netns.exists().then_some(netns));
        left.extend(list.lines().map(Into::into));
        if left.is_empty() { Ok(()) } else { Err(format!("left on {}: {left:?}", node.name())) }
    });
}

#[test]
fn runc_rules_a_container_that_arrived() {
    let stage = Stage::up(&["redis"]);
    stage.start(&redis("redis", FIRST_CONTAINER_ADDRESS));
    assert_eq!(stage.connect(redis_address()).ask("SET kept yes"), "+OK");
    stage.migrate("redis", NODES[1]);
    let node = stage.node(NODES[1]);
    let runc = |words: &[&str]| node.runc(words).unwrap().success().unwrap_or_else(|error| panic!("{error}"));
    let state = || serde_json::from_str::<serde_json::Value>(&runc(&["state", "redis"])).unwrap();

    assert_eq!(state()["status"], "running", "{}", state());
    assert_eq!(state()["bundle"], node.bundle("redis").display().to_string());
    assert_eq!(runc(&["exec", "redis", "/bin/redis-cli", "GET", "kept"]).trim(), "yes");
    assert!(runc(&["ps", "redis"]).contains("redis-server"));
    runc(&["pause", "redis"]);
    assert_eq!(state()["status"], "paused");
    runc(&["resume", "redis"]);
    assert_eq!(stage.connect(redis_address()).ask_bulk("GET kept"), "yes");

    let process = node.container_process("redis").unwrap();
    runc(&["kill", "redis", "TERM"]);
    assert!(process.wait_gone(PATIENCE), "redis does not end on TERM");
    eventually(PATIENCE, || match state()["status"].as_str() {
        Some("stopped") => Ok(()),
        other => Err(format!("the container is {other:?}")),
    });
    runc(&["delete", "redis"]);
    assert!(!node.runc(&["state", "redis"]).unwrap().status.success());
    eventually(PATIENCE, || {
        let log = fs::read_to_string(node.container_logs().join("redis.log")).unwrap();
        if log.contains("Received SIGTERM") { Ok(()) } else { Err(format!("the output does not go on:\n{log}")) }
    });
    let groups = stage.cluster.census().unwrap().cgroups;
    assert!(groups[NODES[1]].keys().all(|group| !group.ends_with("/redis")), "{groups:?}");
    node.remove_workload("redis").unwrap();
}
