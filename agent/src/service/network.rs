//! What of a container's network namespace, or of this node's, stands in the way of a migration.

use podferry_common::failure::chain;
use podferry_network::{Error, Unmoved};
use podferry_proto::v1::Finding;

use crate::target::INTERFACE;

/// More routes or rules are counted only: a finding's message has an end.
const MOST_NAMED: usize = 8;

/// Why links cannot join this node's bridge, and what to do.
pub(super) fn bridge_complaint(bridge: &str) -> Option<(String, String)> {
    let error = podferry_network::look_at_bridge(bridge).err()?;
    let remedy = match &error {
        Error::NoInterface { .. } => {
            format!(
                "make it (ip link add {bridge} type bridge; ip link set {bridge} up), or change network.bridge in agent.toml"
            )
        }
        Error::BridgeDown { .. } => format!("ip link set {bridge} up"),
        _ => "change network.bridge in agent.toml, and restart the agent".to_owned(),
    };
    Some((format!("containers' links cannot join the bridge {bridge}: {}", chain(&error)), remedy))
}

/// What speaks against joining an arriving link to this node's bridge.
pub(super) fn bridge_finding(bridge: &str) -> Option<Finding> {
    if let Some((message, remedy)) = bridge_complaint(bridge) {
        return Some(finding(true, "no-bridge", message, remedy));
    }
    let facts = podferry_network::look_at_bridge(bridge).ok()?;
    facts.spanning_tree.then(|| {
        let message = format!(
            "the bridge {bridge} speaks the spanning tree protocol: it forwards for a new link only after twice its forward \
             delay (30 s unless changed), and nobody reaches the container until then"
        );
        finding(false, "spanning-tree", message, format!("ip link set {bridge} type bridge stp_state 0"))
    })
}

/// What stays behind when the container's link moves.
pub(super) fn unmoved_findings(unmoved: &Unmoved) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (name, addresses) in &unmoved.interfaces {
        let addresses: Vec<String> = addresses.iter().map(ToString::to_string).collect();
        findings.push(finding(
            true,
            "second-interface",
            format!("the container's interface {name} ({}) does not move: only {INTERFACE} does", some_of(&addresses)),
            format!("give the container {INTERFACE} alone: ip link delete {name} in its network namespace"),
        ));
    }
    let loopback: Vec<String> = unmoved.loopback.iter().map(ToString::to_string).collect();
    let stay = [
        ("loopback-address", "addresses of its loopback interface", &loopback),
        ("unmoved-route", "routes", &unmoved.routes),
        ("unmoved-rule", "rules of its routing policy", &unmoved.rules),
    ];
    findings.extend(stay.into_iter().filter(|(.., list)| !list.is_empty()).map(|(kind, what, list)| {
        let message = format!("the container has {what} that do not move: {}", some_of(list));
        finding(false, kind, message, "set them again on the target if the workload needs them".to_owned())
    }));
    findings
}

fn some_of(list: &[String]) -> String {
    let named = list[..list.len().min(MOST_NAMED)].join(", ");
    match list.len().saturating_sub(MOST_NAMED) {
        0 => named,
        more => format!("{named}, and {more} more"),
    }
}

fn finding(refuses: bool, kind: &str, message: String, remedy: String) -> Finding {
    Finding { refuses, kind: kind.to_owned(), pid: 0, fd: -1, message, remedy }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use podferry_network::Netns;

    use super::*;

    /// A namespace of the test's own, in which a closure runs after a shell script.
    fn inside<T: Send>(script: &str, work: impl FnOnce() -> T + Send) -> T {
        let netns = Netns::anonymous().unwrap();
        let status = netns.run(|| Command::new("sh").args(["-ec", script]).status()).unwrap().unwrap();
        assert!(status.success(), "{script}");
        netns.run(work).unwrap()
    }

    #[test]
    fn a_bridge_that_cannot_be_joined_is_refused_and_one_that_delays_is_told() {
        let look = |script: &str| inside(script, || bridge_finding("br0"));
        for (script, words) in [
            ("true", "no network interface br0"),
            ("ip link add br0 type bridge", "is down"),
            ("ip link add br0 type veth peer name x; ip link set br0 up", "no bridge"),
        ] {
            let found = look(script).unwrap_or_else(|| panic!("{script}"));
            assert!(found.refuses && found.message.contains(words) && !found.remedy.is_empty(), "{found:?}");
        }
        let up = "ip link add br0 type bridge; ip link set br0 up";
        assert_eq!(look(up), None);
        let slow = look(&format!("{up}; ip link set br0 type bridge stp_state 1")).unwrap();
        assert!(!slow.refuses && slow.remedy.contains("stp_state 0"), "{slow:?}");
    }

    #[test]
    fn another_interface_is_refused_by_name_and_routes_are_told() {
        assert_eq!(unmoved_findings(&Unmoved::default()), []);
        let unmoved = Unmoved {
            interfaces: [("eth1".to_owned(), vec!["10.2.0.7/24".parse().unwrap()])].into(),
            routes: (0..20).map(|number| format!("10.{number}.0.0/16 in table 177")).collect(),
            ..Unmoved::default()
        };
        let findings = unmoved_findings(&unmoved);
        let [interface, routes] = &findings[..] else { panic!("{findings:?}") };
        assert!(interface.refuses && interface.message.contains("eth1 (10.2.0.7/24)"), "{interface:?}");
        assert!(interface.remedy.contains("eth1"), "{interface:?}");
        assert!(!routes.refuses && routes.message.contains("10.7.0.0/16 in table 177, and 12 more"), "{routes:?}");
    }
}
