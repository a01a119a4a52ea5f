//! Links that are cut, also in one direction only, and slow ones. All of it is undone when the handle is dropped.

use std::net::Ipv4Addr;

use super::scene::{NODES, Scene};
use crate::cluster::LocalCluster;
use crate::error::{Error, Result};
use crate::network::COORDINATOR_ADDRESS;
use crate::place::Place;

/// What the tests' workload takes seconds on.
pub const TESTS_RATE: &str = "16mbit";
/// What it does not come through in the time that there is.
pub const CRAWL: &str = "1mbit";

/// Between whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// Between the two agents.
    Agents,
    /// Between the coordinator and the source's agent.
    ToSource,
    /// Between the coordinator and the target's agent.
    ToTarget,
}

/// Which way a link is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Nothing comes through.
    Both,
    /// What the first sends does not come through: the source's agent, or the coordinator.
    There,
    /// What the second sends does not.
    Back,
}

impl Link {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Agents, Self::ToSource, Self::ToTarget];

    /// In words for a table.
    pub fn words(self) -> &'static str {
        match self {
            Self::Agents => "source - target",
            Self::ToSource => "coordinator - source",
            Self::ToTarget => "coordinator - target",
        }
    }

    fn ends(self, scene: &Scene) -> Result<[(Place, Ipv4Addr); 2]> {
        let node = |at: usize| -> Result<(Place, Ipv4Addr)> {
            let node = scene.cluster.node(NODES[at])?;
            Ok(((*node).clone(), node.address()))
        };
        let coordinator = (scene.cluster.coordinator().place().clone(), COORDINATOR_ADDRESS);
        Ok(match self {
            Self::Agents => [node(scene.at)?, node(1 - scene.at)?],
            Self::ToSource => [coordinator, node(scene.at)?],
            Self::ToTarget => [coordinator, node(1 - scene.at)?],
        })
    }
}

/// A link that is cut. Containers' own traffic goes on: only what is for the node itself is dropped, where it arrives.
#[derive(Debug)]
pub struct Cut {
    rules: Vec<(Place, String)>,
}

impl Cut {
    /// Cuts it.
    pub fn new(scene: &Scene, link: Link, way: Way) -> Result<Self> {
        let [first, second] = link.ends(scene)?;
        let mut cut = Self { rules: Vec::new() };
        if way != Way::Back {
            cut.drop_at(&second.0, first.1)?;
        }
        if way != Way::There {
            cut.drop_at(&first.0, second.1)?;
        }
        Ok(cut)
    }

    fn drop_at(&mut self, place: &Place, sender: Ipv4Addr) -> Result<()> {
        let rule = format!("INPUT -s {sender} -j DROP");
        place.shell(&format!("iptables -w -A {rule}"))?;
        self.rules.push((place.clone(), rule));
        Ok(())
    }

    /// Heals it.
    pub fn heal(mut self) -> Result<()> {
        self.undo()
    }

    fn undo(&mut self) -> Result<()> {
        let undone = self.rules.drain(..).map(|(place, rule)| place.shell(&format!("iptables -w -D {rule}")).map(drop));
        undone.collect::<Vec<_>>().into_iter().collect()
    }
}

impl Drop for Cut {
    fn drop(&mut self) {
        // What cannot be undone goes with the cluster.
        let _ = self.undo();
    }
}

/// How a link is limited (tc-tbf(8)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// What it carries, in Mbit/s.
    pub mbit: u64,
    /// How much passes at once after a pause, in bytes.
    pub burst_bytes: u64,
    /// How long a packet waits in it at most, in ms; what would wait longer is dropped.
    pub queue_ms: u64,
}

/// A limit on what goes to a node.
#[derive(Debug)]
pub struct Slow {
    fabric: Place,
    port: Option<String>,
}

impl Slow {
    /// Limits what goes to a node to a rate as tc understands it.
    pub fn down(cluster: &LocalCluster, node: &str, rate: &str) -> Result<Self> {
        Self::limit(cluster, node, &format!("rate {rate} burst 64kb latency 100ms"))
    }

    /// As [`Slow::down`], with all that there is to say of it, at any port of the fabric.
    pub fn shaped(cluster: &LocalCluster, node: &str, shape: Shape) -> Result<Self> {
        let Shape { mbit, burst_bytes, queue_ms } = shape;
        Self::limit(cluster, node, &format!("rate {mbit}mbit burst {burst_bytes} latency {queue_ms}ms"))
    }

    fn limit(cluster: &LocalCluster, node: &str, how: &str) -> Result<Self> {
        let fabric = cluster.fabric().clone();
        fabric.shell(&format!("tc qdisc add dev {node} root tbf {how}"))?;
        Ok(Self { fabric, port: Some(node.to_owned()) })
    }

    /// Ends the limit.
    pub fn up(mut self) -> Result<()> {
        self.undo()
    }

    fn undo(&mut self) -> Result<()> {
        let Some(port) = self.port.take() else { return Ok(()) };
        self.fabric.shell(&format!("tc qdisc del dev {port} root")).map(drop)
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        // As above.
        let _ = self.undo();
    }
}

/// Takes a node off the net with all of its containers, or puts it back on.
pub fn unplug(cluster: &LocalCluster, node: &str, off: bool) -> Result<()> {
    if !NODES.contains(&node) {
        return Err(Error::Invalid(format!("{node} is no node of the scene")));
    }
    let word = if off { "down" } else { "up" };
    cluster.fabric().shell(&format!("ip link set {node} {word}")).map(drop)
}
