//! The link between the nodes: how fast it is, how far they are from each other, and how much went over it.

use std::time::Duration;

use podferry_local::{
    LocalCluster,
    faults::links::{Shape, Slow},
};

use super::delay::{FABRIC_END, FarLink};
use crate::{error::Result, stage::NODES};

/// How long a packet may wait in the shaped link at most, in ms, before the next one is dropped.
const QUEUE_MS: u64 = 20;

/// How a link is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LinkKind {
    /// What it carries, in Mbit/s; as much as it can when absent.
    pub mbit: Option<u64>,
    /// Its round-trip time, in ms.
    pub rtt_ms: f64,
}

/// A limit on what goes to either node, whoever sends it, and the distance between them; none of it when it is dropped.
#[derive(Debug)]
pub struct ShapedLink {
    // Dropped first: it is on the far link's device.
    _slow: Vec<Slow>,
    _far: Option<FarLink>,
}

impl ShapedLink {
    /// Makes it so.
    pub fn new(cluster: &LocalCluster, kind: LinkKind) -> Result<Self> {
        let is_far = kind.rtt_ms > 0.0;
        let far = is_far.then(|| FarLink::new(cluster, Duration::from_secs_f64(kind.rtt_ms / 1e3))).transpose()?;
        let ports = [NODES[0], if is_far { FABRIC_END } else { NODES[1] }];
        let shape = |mbit| Shape { mbit, burst_bytes: burst_bytes(mbit), queue_ms: QUEUE_MS };
        let slow: podferry_local::Result<Vec<Slow>> = kind.mbit.map_or_else(
            || Ok(Vec::new()),
            |mbit| ports.iter().map(|port| Slow::shaped(cluster, port, shape(mbit))).collect(),
        );
        Ok(Self { _slow: slow?, _far: far })
    }
}

/// What passes at once: a millisecond's worth, as the kernel's timer may be late by that on a busy machine, and at least one packet as large
/// as the kernel makes them (64 KiB).
fn burst_bytes(mbit: u64) -> u64 {
    (mbit * 1_000_000 / 8 / 1000).max(128 << 10)
}

/// Counts what the agents of the nodes send each other, IP headers included.
#[derive(Debug)]
pub(super) struct Traffic<'a> {
    cluster: &'a LocalCluster,
}

impl<'a> Traffic<'a> {
    /// Begins to count: a rule without a target in each node's filter, which goes with the cluster.
    pub(super) fn new(cluster: &'a LocalCluster) -> Result<Self> {
        for (node, other) in [(NODES[0], NODES[1]), (NODES[1], NODES[0])] {
            let sender = cluster.node(other)?.address();
            cluster.node(node)?.shell(&format!("iptables -w -I INPUT -s {sender}"))?;
        }
        Ok(Self { cluster })
    }

    /// Bytes that either node has had from the other since the beginning.
    pub(super) fn bytes(&self) -> Result<u64> {
        let mut bytes = 0;
        for (node, other) in [(NODES[0], NODES[1]), (NODES[1], NODES[0])] {
            let sender = self.cluster.node(other)?.address().to_string();
            let table = self.cluster.node(node)?.shell("iptables -w -L INPUT -n -v -x")?;
            bytes += counted(&table, &sender).unwrap_or(0);
        }
        Ok(bytes)
    }
}

/// Bytes of the first rule without a target for this sender, in what `iptables -L -n -v -x` prints: packets, bytes, (target,) protocol, …
fn counted(table: &str, sender: &str) -> Option<u64> {
    let line = table.lines().find(|line| {
        line.split_whitespace().any(|word| word == sender) && !line.contains("DROP") && !line.contains("ACCEPT")
    })?;
    line.split_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rule_of_the_other_node_is_found() {
        let table = "Chain INPUT (policy ACCEPT 9 packets, 540 bytes)\n    pkts      bytes target     prot opt in     out     source               destination\n\
                     \x20     33   104857            all  --  *      *       10.88.0.11           0.0.0.0/0\n";
        assert_eq!(counted(table, "10.88.0.11"), Some(104_857));
        assert_eq!(counted(table, "10.88.0.12"), None);
    }

    #[test]
    fn the_burst_holds_a_packet_and_a_millisecond() {
        assert_eq!((burst_bytes(100), burst_bytes(10_000)), (131_072, 1_250_000));
    }
}
