//! What the tests share: nodes with a bridge and containers, each in a network namespace.
#![allow(dead_code, reason = "every test file uses its own part of it")]
#![allow(clippy::unwrap_used, reason = "helpers of tests fail the test")]

use std::future::Future;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use podferry_network::{MacAddress, Netns, NetworkPlan, Route, attach, create, destroy};

/// A node: a namespace of its own with a bridge.
pub(crate) struct Node {
    pub(crate) netns: Netns,
    pub(crate) dir: tempfile::TempDir,
}

/// Names on the node, by container.
const HOST_INTERFACES: [&str; 3] = ["pf-server", "pf-client", "pf-moved"];

impl Node {
    pub(crate) fn new() -> Self {
        let node = Self { netns: Netns::anonymous().unwrap(), dir: tempfile::tempdir().unwrap() };
        node.sh("ip link set lo up; ip link add br0 type bridge; ip link set br0 up");
        node.sh("ip addr add 10.77.0.1/24 dev br0; ip addr add fd77::1/64 dev br0 nodad");
        node
    }

    pub(crate) fn sh(&self, script: &str) -> String {
        sh(&self.netns, script)
    }

    /// Runs a future as an agent on this node would.
    pub(crate) fn agent<T: Send>(&self, future: impl Future<Output = T> + Send) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        self.netns.run(|| runtime.block_on(future)).unwrap()
    }

    pub(crate) fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.netns.run(work).unwrap()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("netns").join(name)
    }

    pub(crate) fn container(&self, host_interface: &str, number: u8) -> Netns {
        let path = self.path(host_interface);
        self.agent(create(&path, &plan(host_interface, number))).unwrap();
        Netns::open(&path).unwrap()
    }

    pub(crate) fn attached(&self, host_interface: &str, number: u8) -> Netns {
        let container = self.container(host_interface, number);
        self.run(|| attach(host_interface, "br0")).unwrap();
        container
    }

    pub(crate) fn links(&self) -> usize {
        self.sh("ip -o link").lines().count()
    }

    pub(crate) fn mounts(&self) -> usize {
        let dir = self.dir.path().to_str().unwrap();
        std::fs::read_to_string("/proc/self/mountinfo").unwrap().lines().filter(|line| line.contains(dir)).count()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        for name in HOST_INTERFACES {
            let path = self.path(name);
            let _ = self.agent(destroy(&path, name));
        }
    }
}

pub(crate) fn sh(netns: &Netns, script: &str) -> String {
    let output = netns.run(|| Command::new("sh").args(["-ec", script]).output()).unwrap().unwrap();
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

pub(crate) fn plan(host_interface: &str, number: u8) -> NetworkPlan {
    NetworkPlan {
        interface: "eth0".into(),
        mac: MacAddress([2, 0x70, 0x66, 0, 0, number]),
        mtu: 1400,
        addresses: vec![format!("10.77.0.{number}/24").parse().unwrap(), format!("fd77::{number}/64").parse().unwrap()],
        routes: vec![
            Route { destination: "0.0.0.0/0".parse().unwrap(), gateway: Some([10, 77, 0, 1].into()) },
            Route { destination: "192.0.2.0/24".parse().unwrap(), gateway: None },
            Route { destination: "::/0".parse().unwrap(), gateway: Some("fd77::1".parse().unwrap()) },
        ],
        host_interface: host_interface.into(),
        bridge: "br0".into(),
    }
}

/// Waits for what the kernel does in the background: a port of a bridge with spanning tree takes seconds to forward, and
/// whoever asked for an address in vain asks again only a second later.
pub(crate) fn eventually(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < deadline, "{what}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// All that a relay may change of a namespace.
pub(crate) fn facts(netns: &Netns) -> String {
    eventually("the addresses are tried", || !sh(netns, "ip -6 addr").contains("tentative"));
    let found = sh(
        netns,
        "ip -d rule; ip -d -6 rule; ip -d route show table all; ip -d -6 route show table all; ip -o link; ip -o addr
         ip neigh show proxy; ip -6 neigh show proxy
         sysctl -a -r '^net\\.(ipv4|ipv6)\\.(conf|ip_early|tcp_early|ip_forward)' 2>/dev/null",
    );
    let mut lines: Vec<&str> =
        found.lines().map(str::trim_end).filter(|line| !line.contains("stable_secret")).collect();
    lines.sort_unstable();
    lines.join("\n")
}

/// Shows what differs only.
pub(crate) fn assert_same(before: &str, after: &str) {
    let without = |one: &str, other: &str| {
        let lines = one.lines().filter(|line| !other.lines().any(|found| found == *line));
        lines.collect::<Vec<_>>().join("\n")
    };
    assert!(before == after, "gone:\n{}\ncome:\n{}", without(before, after), without(after, before));
}
