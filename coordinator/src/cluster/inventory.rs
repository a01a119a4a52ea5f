//! The inventory: a TOML file that names nodes and workloads on machines without Kubernetes.
//!
//! `docs/inventory.md` describes the format. Errors say file, line and column, and all of them are said at once.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::Path;

use podferry_common::{NodeName, WorkloadName};
use serde::Deserialize;
use toml::Spanned;

use crate::placement::{AntiAffinity, HOSTNAME, Labels, NodeTraits, Selector, WorkloadTraits, check_label};
use crate::problem::{self, FileError, Problem};

/// The largest inventory that is read, in bytes: thousands of nodes fit.
const MAX_BYTES: u64 = 16 << 20;
/// The longest container id, in bytes: `podferry.v1` bounds ids so, and containerd's have this length.
const MAX_CONTAINER_BYTES: usize = 64;

/// A node of the inventory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its name, as in its agent's certificate.
    pub name: NodeName,
    /// `host:port` of its agent.
    pub address: String,
    /// Its labels and taints.
    pub traits: NodeTraits,
}

/// A workload of the inventory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// The name users say.
    pub name: WorkloadName,
    /// runc's id of its container.
    pub container: String,
    /// The node on which it was started; where it is now, the agents say.
    pub node: Option<NodeName>,
    /// The pod that it is; none where there are no pods.
    pub pod: Option<PodRef>,
    /// Its labels, its priority, and where it may run.
    pub traits: WorkloadTraits,
}

/// A pod with the container that moves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodRef {
    /// Its namespace,
    pub namespace: String,
    /// name,
    pub name: String,
    /// and uid.
    pub uid: String,
    /// The container's name in it.
    pub container: String,
    /// What the names of its successors begin with.
    pub base: String,
    /// Its successor has to have its name.
    pub keeps_name: bool,
}

/// Nodes and workloads, valid and without doubles.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inventory {
    nodes: BTreeMap<NodeName, Node>,
    workloads: BTreeMap<WorkloadName, Workload>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    nodes: Vec<NodeTable>,
    #[serde(default)]
    workloads: Vec<WorkloadTable>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NodeTable {
    name: Spanned<String>,
    address: Spanned<String>,
    #[serde(default)]
    labels: LabelTable,
    #[serde(default)]
    taints: Vec<Spanned<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WorkloadTable {
    name: Spanned<String>,
    container: Option<Spanned<String>>,
    node: Option<Spanned<String>>,
    #[serde(default)]
    priority: i32,
    #[serde(default)]
    labels: LabelTable,
    #[serde(default)]
    tolerations: Vec<Spanned<String>>,
    #[serde(default)]
    node_selector: LabelTable,
    #[serde(default)]
    affinity: Vec<Spanned<String>>,
    #[serde(default)]
    anti_affinity: Vec<AntiAffinityTable>,
}

type LabelTable = BTreeMap<Spanned<String>, Spanned<String>>;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AntiAffinityTable {
    workloads: Spanned<String>,
    topology: Option<Spanned<String>>,
}

impl Inventory {
    /// Reads and checks a file.
    pub fn load(path: &Path) -> Result<Self, FileError> {
        problem::load("the inventory", path, MAX_BYTES, Self::parse)
    }

    /// Checks a text.
    pub fn parse(text: &str) -> Result<Self, Vec<Problem>> {
        let file: File = toml::from_str(text).map_err(|error| vec![Problem::of_toml(text, &error)])?;
        let mut reader = Reader { text, inventory: Self::default(), problems: Vec::new(), seen: HashMap::new() };
        file.nodes.iter().for_each(|table| reader.node(table));
        file.workloads.iter().for_each(|table| reader.workload(table));
        let Reader { inventory, mut problems, .. } = reader;
        problems.sort_by_key(|problem| (problem.line, problem.column));
        if problems.is_empty() { Ok(inventory) } else { Err(problems) }
    }

    /// That of nodes and workloads whose names are known to differ.
    pub fn of(nodes: impl IntoIterator<Item = Node>, workloads: impl IntoIterator<Item = Workload>) -> Self {
        Self {
            nodes: nodes.into_iter().map(|node| (node.name.clone(), node)).collect(),
            workloads: workloads.into_iter().map(|workload| (workload.name.clone(), workload)).collect(),
        }
    }

    /// All nodes, by name.
    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.nodes.values()
    }

    /// All workloads, by name.
    pub fn workloads(&self) -> impl Iterator<Item = &Workload> {
        self.workloads.values()
    }

    /// Whether any workload has rules about neighbours.
    pub fn keeps_apart(&self) -> bool {
        self.workloads.values().any(|workload| !workload.traits.anti_affinity.is_empty())
    }

    /// The node of that name.
    pub fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.get(&name.parse::<NodeName>().ok()?)
    }

    /// The workload of that name.
    pub fn workload(&self, name: &str) -> Option<&Workload> {
        self.workloads.get(&name.parse::<WorkloadName>().ok()?)
    }
}

struct Reader<'a> {
    text: &'a str,
    inventory: Inventory,
    problems: Vec<Problem>,
    /// What must be unique, with the offset where it was said first: counting lines is for those that are repeated.
    seen: HashMap<(&'static str, String), usize>,
}

impl Reader<'_> {
    fn node(&mut self, table: &NodeTable) {
        let name = self.name::<NodeName>(&table.name);
        let unique = self.unique("node", &table.name);
        let address_fits = match check_address(table.address.get_ref()) {
            Ok(()) => self.unique("agent address", &table.address),
            Err(message) => self.problem(&table.address, message),
        };
        let traits = NodeTraits { labels: self.labels(&table.labels), taints: self.parsed(&table.taints) };
        if let (Some(name), true, true) = (name, unique, address_fits) {
            let node = Node { name: name.clone(), address: table.address.get_ref().clone(), traits };
            self.inventory.nodes.insert(name, node);
        }
    }

    fn workload(&mut self, table: &WorkloadTable) {
        let name = self.name::<WorkloadName>(&table.name);
        let unique = self.unique("workload", &table.name);
        let container = table.container.as_ref().unwrap_or(&table.name);
        let container_fits = match check_container(container.get_ref()) {
            // The name of a workload was looked at already; as a container's id it must be unique too.
            Ok(()) => !unique || self.unique("container", container),
            Err(message) if table.container.is_some() => self.problem(container, message),
            Err(_) => false,
        };
        let node = match &table.node {
            None => Some(None),
            Some(node) => self.known_node(node).map(Some),
        };
        let traits = self.traits(table);
        if let (Some(name), true, true, Some(node)) = (name, unique, container_fits, node) {
            let workload =
                Workload { name: name.clone(), container: container.get_ref().clone(), node, pod: None, traits };
            self.inventory.workloads.insert(name, workload);
        }
    }

    fn traits(&mut self, table: &WorkloadTable) -> WorkloadTraits {
        WorkloadTraits {
            affinity: self.parsed(&table.affinity),
            labels: self.labels(&table.labels),
            priority: table.priority,
            tolerations: self.parsed(&table.tolerations),
            node_selector: self.labels(&table.node_selector),
            anti_affinity: table.anti_affinity.iter().map(|rule| self.anti_affinity(rule)).collect(),
        }
    }

    fn anti_affinity(&mut self, table: &AntiAffinityTable) -> AntiAffinity {
        let topology = table.topology.as_ref().map_or(HOSTNAME, |topology| {
            if let Err(message) = check_label(topology.get_ref(), "") {
                self.problem(topology, message);
            }
            topology.get_ref()
        });
        let workloads = self.parsed::<Selector>(std::slice::from_ref(&table.workloads)).pop().unwrap_or_default();
        AntiAffinity { topology: topology.to_owned(), workloads }
    }

    fn labels(&mut self, table: &LabelTable) -> Labels {
        for (key, value) in table {
            if let Err(message) = check_label(key.get_ref(), value.get_ref()) {
                self.problem(key, message);
            }
        }
        table.iter().map(|(key, value)| (key.get_ref().clone(), value.get_ref().clone())).collect()
    }

    /// Those that can be read; the others are complained about.
    fn parsed<T: std::str::FromStr<Err = String>>(&mut self, texts: &[Spanned<String>]) -> Vec<T> {
        let mut all = Vec::new();
        for text in texts {
            match text.get_ref().parse() {
                Ok(value) => all.push(value),
                Err(message) => drop(self.problem(text, message)),
            }
        }
        all
    }

    fn known_node(&mut self, said: &Spanned<String>) -> Option<NodeName> {
        if let Some(node) = self.inventory.node(said.get_ref()) {
            return Some(node.name.clone());
        }
        // A node whose own entry is wrong has been complained about where it stands.
        if !self.seen.contains_key(&("node", said.get_ref().clone())) {
            let known = self.inventory.nodes.keys().map(NodeName::as_str).collect::<Vec<_>>().join(", ");
            let known = if known.is_empty() { "none".to_owned() } else { known };
            self.problem(said, format!("there is no node {:?}; nodes of this file: {known}", said.get_ref()));
        }
        None
    }

    fn name<T: std::str::FromStr<Err: fmt::Display>>(&mut self, said: &Spanned<String>) -> Option<T> {
        match said.get_ref().parse() {
            Ok(name) => Some(name),
            Err(error) => {
                self.problem(said, error.to_string());
                None
            }
        }
    }

    fn unique(&mut self, kind: &'static str, said: &Spanned<String>) -> bool {
        let offset = said.span().start;
        let first = *self.seen.entry((kind, said.get_ref().clone())).or_insert(offset);
        if first == offset {
            return true;
        }
        let first = Problem::at(self.text, first, String::new()).line;
        self.problem(said, format!("{kind} {:?} stands here again; first on line {first}", said.get_ref()))
    }

    /// Takes down what is wrong; always `false`, which is what the callers go on with.
    fn problem(&mut self, said: &Spanned<String>, message: String) -> bool {
        self.problems.push(Problem::at(self.text, said.span().start, message));
        false
    }
}

/// Whether it is `host:port`, with a name, an IPv4 address, or an IPv6 address in brackets.
fn check_address(address: &str) -> Result<(), String> {
    let wrong =
        |why: &str| Err(format!("the address {address:?} {why}; write \"host:port\", for example \"10.0.0.1:7443\""));
    let Some((host, port)) = address.rsplit_once(':') else { return wrong("has no port") };
    if port.parse::<u16>().is_ok_and(|port| port > 0) && port.bytes().all(|b| b.is_ascii_digit()) {
        return if is_host(host) { Ok(()) } else { wrong("has no valid host") };
    }
    wrong("has no port between 1 and 65535")
}

fn is_host(host: &str) -> bool {
    if let Some(inner) = host.strip_prefix('[') {
        return inner.strip_suffix(']').is_some_and(|ip| ip.parse::<std::net::Ipv6Addr>().is_ok());
    }
    let label =
        |label: &str| !label.is_empty() && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
    host.len() <= 253 && host.split('.').all(label)
}

/// runc's own rule for container ids (`libcontainer/factory_linux.go`), and podferry's bound on their length.
fn check_container(id: &str) -> Result<(), String> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"_+-.".contains(&b);
    if id.is_empty() || id.len() > MAX_CONTAINER_BYTES || !id.bytes().all(allowed) || id == "." || id == ".." {
        return Err(format!("the container id {id:?} is not 1 to {MAX_CONTAINER_BYTES} characters of [A-Za-z0-9_+.-]"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GOOD: &str = r#"
[[nodes]]
name = "a"
address = "10.0.0.1:7443"

[[nodes]]
name = "b"
address = "[fd00::2]:7443"

[[workloads]]
name = "cart"
container = "c0ffee.1"
node = "a"

[[workloads]]
name = "redis"
"#;

    #[test]
    fn a_good_file_is_read() {
        let inventory = Inventory::parse(GOOD).unwrap();
        let names: Vec<_> = inventory.nodes().map(|node| (node.name.as_str(), node.address.as_str())).collect();
        assert_eq!(names, [("a", "10.0.0.1:7443"), ("b", "[fd00::2]:7443")]);
        assert_eq!(inventory.workload("cart").unwrap().container, "c0ffee.1");
        assert_eq!(inventory.workload("cart").unwrap().node.as_ref().unwrap().as_str(), "a");
        assert_eq!(inventory.workload("redis").unwrap().container, "redis");
        assert_eq!(inventory.workload("redis").unwrap().node, None);
        assert!(inventory.workload("CART").is_none() && inventory.node("c").is_none());
    }

    #[test]
    fn labels_taints_and_rules_are_read() {
        let text = r#"
[[nodes]]
name = "a"
address = "10.0.0.1:7443"
labels = { zone = "a", "example.com/gpu" = "" }
taints = ["spot=true:NoSchedule", "old:PreferNoSchedule"]
[[workloads]]
name = "cart"
priority = -3
labels.app = "shop"
tolerations = ["spot=true:NoSchedule"]
node_selector = { zone = "a" }
affinity = ["zone in (a, b), !disk", "example.com/gpu"]
anti_affinity = [{ workloads = "app=shop" }, { workloads = "tier!=web", topology = "zone" }]
"#;
        let inventory = Inventory::parse(text).unwrap();
        let node = &inventory.node("a").unwrap().traits;
        assert_eq!(node.labels.get("zone").map(String::as_str), Some("a"));
        assert_eq!(
            node.taints.iter().map(ToString::to_string).collect::<Vec<_>>(),
            ["spot=true:NoSchedule", "old:PreferNoSchedule"]
        );
        let cart = &inventory.workload("cart").unwrap().traits;
        assert_eq!((cart.priority, cart.labels["app"].as_str(), cart.tolerations.len()), (-3, "shop", 1));
        let affinity: Vec<_> = cart.affinity.iter().map(ToString::to_string).collect();
        assert_eq!(affinity, ["zone in (a, b), !disk", "example.com/gpu"]);
        assert!(cart.affinity[0].is_met_by(&node.labels));
        let topologies: Vec<_> = cart.anti_affinity.iter().map(|rule| rule.topology.as_str()).collect();
        assert_eq!(topologies, [HOSTNAME, "zone"]);
        assert!(inventory.keeps_apart() && !Inventory::parse(GOOD).unwrap().keeps_apart());
    }

    #[test]
    fn what_is_wrong_with_labels_taints_and_rules_is_said_with_its_place() {
        let text = r#"
[[nodes]]
name = "a"
address = "10.0.0.1:7443"
labels = { "-zone" = "a" }
taints = ["spot=true"]
[[workloads]]
name = "cart"
tolerations = ["spot:Never"]
affinity = ["zone within (a)"]
anti_affinity = [{ workloads = "", topology = "a b" }]
"#;
        insta::assert_snapshot!(complaints(text), @r#"
        inventory.toml:5:12: the label key "-zone" is not 1 to 63 characters of [A-Za-z0-9_.-] that begin and end with a letter or digit, with a DNS name and '/' before them or without
        inventory.toml:6:11: "spot=true" is no taint; write "key=value:NoSchedule" or "key:NoSchedule"
        inventory.toml:9:16: there is no effect "Never"; one is NoSchedule, PreferNoSchedule or NoExecute
        inventory.toml:10:13: "zone within (a)" asks nothing of a label; write zone=a, zone!=a, zone in (a, b), zone notin (a, b), gpu, !gpu, cores>4 or cores<4
        inventory.toml:11:32: "" asks nothing of a label; write zone=a, zone!=a, zone in (a, b), zone notin (a, b), gpu, !gpu, cores>4 or cores<4
        inventory.toml:11:47: the label key "a b" is not 1 to 63 characters of [A-Za-z0-9_.-] that begin and end with a letter or digit, with a DNS name and '/' before them or without
        "#);
    }

    fn complaints(text: &str) -> String {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("inventory.toml");
        std::fs::write(&path, text).unwrap();
        let error = Inventory::load(&path).unwrap_err().to_string();
        error.replace(&format!("{}/", folder.path().display()), "")
    }

    #[test]
    fn errors_point_at_line_and_column() {
        let broken = [
            "[[nodes]]\nname = \"a\"\naddres = \"10.0.0.1:1\"\n",
            "[[nodes]]\nname = \"a\n",
            "[[nodes]]\nname = 7\naddress = \"a:1\"\n",
            "[[nodes]]\nname = \"a\"\n",
            "[[pods]]\nname = \"a\"\n",
        ];
        insta::assert_snapshot!(broken.map(complaints).join("\n"), @r#"
        inventory.toml:3:1: unknown field `addres`, expected one of `name`, `address`, `labels`, `taints`
        inventory.toml:2:10: invalid basic string, expected `"`
        inventory.toml:2:8: invalid type: integer `7`, expected a string
        inventory.toml:1:1: missing field `address`
        inventory.toml:1:3: unknown field `pods`, expected `nodes` or `workloads`
        "#);
    }

    #[test]
    fn all_semantic_errors_are_said_at_once() {
        let text = r#"
[[nodes]]
name = "Upper"
address = "10.0.0.1:7443"
[[nodes]]
name = "a"
address = "10.0.0.2"
[[nodes]]
name = "b"
address = "10.0.0.3:70000"
[[nodes]]
name = "c"
address = "10.0.0.4:7443"
[[nodes]]
name = "c"
address = "10.0.0.4:7443"
[[workloads]]
name = "w"
node = "nowhere"
[[workloads]]
name = "w"
[[workloads]]
name = "v"
container = "w"
[[workloads]]
name = "ä"
[[workloads]]
name = "x"
container = "../../etc"
"#;
        insta::assert_snapshot!(complaints(text), @r#"
        inventory.toml:3:8: node name "Upper" has 'U'; only a-z, 0-9 and '-' are allowed
        inventory.toml:7:11: the address "10.0.0.2" has no port; write "host:port", for example "10.0.0.1:7443"
        inventory.toml:10:11: the address "10.0.0.3:70000" has no port between 1 and 65535; write "host:port", for example "10.0.0.1:7443"
        inventory.toml:15:8: node "c" stands here again; first on line 12
        inventory.toml:16:11: agent address "10.0.0.4:7443" stands here again; first on line 13
        inventory.toml:19:8: there is no node "nowhere"; nodes of this file: c
        inventory.toml:21:8: workload "w" stands here again; first on line 18
        inventory.toml:24:13: container "w" stands here again; first on line 18
        inventory.toml:26:8: workload name "ä" has 'ä'; only a-z, 0-9 and '-' are allowed
        inventory.toml:29:13: the container id "../../etc" is not 1 to 64 characters of [A-Za-z0-9_+.-]
        "#);
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = Inventory::load(Path::new("/nonexistent/inventory.toml")).unwrap_err();
        assert_eq!(error.to_string(), "cannot read the inventory /nonexistent/inventory.toml");
    }

    #[test]
    fn addresses_are_checked() {
        for good in ["a:1", "node-1.example.com:7443", "127.0.0.1:65535", "[::1]:1"] {
            assert_eq!(check_address(good), Ok(()), "{good}");
        }
        for bad in ["", ":1", "a", "a:", "a:0", "a:+1", "a:65536", "::1:1", "[::1]", "a b:1", "a..b:1", "http://a:1"] {
            assert!(check_address(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "\\PC{0,200}") {
            let _ = Inventory::parse(&text);
        }

        #[test]
        fn problems_point_into_the_text(cut in 0..GOOD.len()) {
            if let Err(problems) = Inventory::parse(&GOOD[..cut]) {
                for problem in problems {
                    prop_assert!(problem.line <= GOOD[..cut].lines().count() + 1);
                }
            }
        }
    }
}
