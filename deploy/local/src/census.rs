//! Everything of a cluster that can leak, counted, so that two moments can be compared.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::Path;

use nix::sys::statvfs::statvfs;

use crate::cgroup;
use crate::cluster::LocalCluster;
use crate::error::{Error, FileContext, Result};
use crate::network::{self, NETNS_FOLDER};
use crate::node::Node;
use crate::place::Place;
use crate::process;

/// How often each thing is there, by place and by name of the thing.
pub type Counts = BTreeMap<String, BTreeMap<String, u64>>;

/// A count of what a cluster holds. Names that differ from run to run (numbers of processes and inodes) are left out, so
/// that a workload which went away and came back makes no difference.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Census {
    /// Open files of agents: path, or kind such as `socket`; by node.
    pub agent_descriptors: Counts,
    /// Mount points, by node.
    pub mounts: Counts,
    /// Control groups of containers, in all hierarchies, by node.
    pub cgroups: Counts,
    /// Bytes in the tmpfs of a node's own, by node and mount point.
    pub tmpfs_bytes: Counts,
    /// Links, by network namespace (`node-a/redis` is a container's).
    pub links: Counts,
    /// Named network namespaces, by node; `machine` has those of the cluster itself.
    pub network_namespaces: Counts,
    /// Netfilter rules of iptables and nftables, by network namespace.
    pub netfilter_rules: Counts,
    /// Queueing disciplines that somebody made, and filters, both by kind, by network namespace.
    pub traffic_control: Counts,
    /// Processes by name, zombies apart, by node.
    pub processes: Counts,
}

/// One thing of which there is more or less than before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The field of [`Census`].
    pub area: &'static str,
    /// The place in it.
    pub place: String,
    /// The thing.
    pub item: String,
    /// How many there were.
    pub before: u64,
    /// How many there are.
    pub after: u64,
}

/// What changed between two counts. Displayed one change a line.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Difference {
    /// The changes, in the order of the fields.
    pub changes: Vec<Change>,
}

impl Difference {
    /// Whether nothing changed.
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return write!(f, "no difference");
        }
        for Change { area, place, item, before, after } in &self.changes {
            writeln!(f, "{area} of {place}: {item}: {before} -> {after}")?;
        }
        Ok(())
    }
}

impl Census {
    /// What changed from this count to a later one.
    pub fn difference(&self, later: &Self) -> Difference {
        let fields = self.fields().into_iter().zip(later.fields());
        let changes = fields.flat_map(|((area, before), (_, after))| changes(area, before, after)).collect();
        Difference { changes }
    }

    fn fields(&self) -> [(&'static str, &Counts); 9] {
        [
            ("agent descriptors", &self.agent_descriptors),
            ("mounts", &self.mounts),
            ("cgroups", &self.cgroups),
            ("tmpfs bytes", &self.tmpfs_bytes),
            ("links", &self.links),
            ("network namespaces", &self.network_namespaces),
            ("netfilter rules", &self.netfilter_rules),
            ("traffic control", &self.traffic_control),
            ("processes", &self.processes),
        ]
    }
}

fn changes(area: &'static str, before: &Counts, after: &Counts) -> Vec<Change> {
    let keys = |counts: &Counts| -> Vec<(String, String)> {
        let of = |(place, items): (&String, &BTreeMap<String, u64>)| {
            items.keys().map(|item| (place.clone(), item.clone())).collect::<Vec<_>>()
        };
        counts.iter().flat_map(of).collect()
    };
    let mut all = keys(before);
    all.extend(keys(after));
    all.sort();
    all.dedup();
    let count = |counts: &Counts, (place, item): &(String, String)| counts.get(place)?.get(item).copied();
    all.into_iter()
        .map(|key| {
            let (before, after) = (count(before, &key).unwrap_or(0), count(after, &key).unwrap_or(0));
            Change { area, place: key.0, item: key.1, before, after }
        })
        .filter(|change| change.before != change.after)
        .collect()
}

impl LocalCluster {
    /// Counts what the cluster holds now.
    pub fn census(&self) -> Result<Census> {
        let mut census = Census::default();
        let machine = network::named(&self.state.netns(""));
        census.network_namespaces.insert("machine".to_owned(), counted(machine));
        for place in [self.fabric(), self.coordinator().place(), self.client()] {
            census.count_network(place.name(), place, None)?;
        }
        for node in self.nodes() {
            census.count_node(node)?;
        }
        Ok(census)
    }
}

impl Census {
    fn count_node(&mut self, node: &Node) -> Result<()> {
        let name = node.name();
        let put = |counts: &mut Counts, items: Vec<String>| {
            counts.insert(name.to_owned(), counted(items));
        };
        put(&mut self.agent_descriptors, agent_descriptors(node));
        put(&mut self.mounts, node.mount_points());
        // The node's own group is made with its first container and stays.
        let groups = cgroup::groups(&node.cgroup).into_iter().filter(|group| !group.ends_with(&node.cgroup));
        put(&mut self.cgroups, groups.map(|group| group.display().to_string()).collect());
        put(&mut self.processes, processes(node));
        let containers = node_namespaces(node)?;
        put(&mut self.network_namespaces, containers.clone());
        self.tmpfs_bytes.insert(name.to_owned(), tmpfs_bytes(node)?);
        self.count_network(name, node, None)?;
        for container in &containers {
            self.count_network(&format!("{name}/{container}"), node, Some(container))?;
        }
        Ok(())
    }

    fn count_network(&mut self, key: &str, place: &Place, namespace: Option<&str>) -> Result<()> {
        let inside = |words: &str| {
            let enter = namespace.map(|name| format!("ip netns exec {name} ")).unwrap_or_default();
            place.shell(&format!("{enter}{words}"))
        };
        // `2: eth0@if3: <BROADCAST...`: the number after @ differs from run to run.
        let links = inside("ip -oneline link")?;
        let names = links.lines().filter_map(|line| line.split_whitespace().nth(1));
        let names = names.map(|word| word.trim_end_matches(':').split('@').next().unwrap_or(word).to_owned());
        self.links.insert(key.to_owned(), counted(names));
        self.netfilter_rules.insert(key.to_owned(), counted(netfilter_rules(place, &inside)?));
        self.traffic_control.insert(key.to_owned(), counted(traffic_control(&inside)?));
        Ok(())
    }
}

/// Rules as iptables and nftables list them, without the tables' and chains' own lines and without counters.
fn netfilter_rules(place: &Place, inside: &impl Fn(&str) -> Result<String>) -> Result<Vec<String>> {
    let mut rules = Vec::new();
    let mut asked = 0;
    for program in ["iptables-save", "ip6tables-save", "nft"] {
        if !place.exec(["sh", "-c", "command -v \"$0\"", program])?.status.success() {
            continue;
        }
        asked += 1;
        let listing = inside(if program == "nft" { "nft list ruleset" } else { program })?;
        let is_rule = |line: &&str| !line.is_empty() && !line.starts_with(['#', '*', ':']) && *line != "COMMIT";
        rules.extend(listing.lines().map(str::trim).filter(is_rule).map(|line| format!("{program}: {line}")));
    }
    if asked == 0 {
        let hint = "netfilter rules cannot be counted without it or nft: run deploy/setup/setup.sh";
        return Err(Error::MissingProgram { path: "iptables-save".into(), hint });
    }
    Ok(rules)
}

/// The disciplines and filters of all links of a namespace, without the links' names.
fn traffic_control(inside: &impl Fn(&str) -> Result<String>) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for (kind, link) in made_disciplines(&inside("tc qdisc show")?) {
        found.push(kind.to_owned());
        for hook in ["ingress", "egress"] {
            // A link that has just gone has no filters.
            let filters = inside(&format!("tc filter show dev {link} {hook}")).unwrap_or_default();
            let each = filters.lines().filter(|line| line.contains(" handle "));
            found.extend(each.map(|_| format!("filter of {kind} {hook}")));
        }
    }
    Ok(found)
}

/// Kind and link of each discipline that `tc qdisc show` lists, less those with handle 0: the kernel gives each link one.
fn made_disciplines(listing: &str) -> impl Iterator<Item = (&str, &str)> {
    listing.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let (Some("qdisc"), Some(kind), Some(handle), Some("dev"), Some(link)) =
            (words.next(), words.next(), words.next(), words.next(), words.next())
        else {
            return None;
        };
        (handle != "0:").then_some((kind, link))
    })
}

fn counted(items: impl IntoIterator<Item = String>) -> BTreeMap<String, u64> {
    let mut counts = BTreeMap::new();
    for item in items {
        *counts.entry(item).or_default() += 1;
    }
    counts
}

fn node_namespaces(node: &Node) -> Result<Vec<String>> {
    let folder = node.on_machine(Path::new(NETNS_FOLDER));
    let entries = fs::read_dir(&folder).at("list", &folder)?;
    Ok(entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect())
}

fn agent_descriptors(node: &Node) -> Vec<String> {
    let Some(pid) = node.agent_pid() else { return Vec::new() };
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let targets = entries.filter_map(|entry| fs::read_link(entry.path()).ok());
    // `socket:[123]` and `pipe:[123]`: the inode differs from run to run.
    targets
        .map(|target| {
            let text = target.to_string_lossy();
            text.split_once(":[").map_or_else(|| text.to_string(), |(kind, _)| kind.to_owned())
        })
        .collect()
}

/// The node's own view of processes: those of its pid namespace and of all below it.
fn processes(node: &Node) -> Vec<String> {
    let proc = node.on_machine(Path::new("/proc"));
    let describe = |pid: u32| {
        let (state, _) = process::stat(&proc, pid)?;
        let name = fs::read_to_string(proc.join(pid.to_string()).join("comm")).ok()?;
        let name = name.trim();
        Some(if state == 'Z' { format!("{name} (zombie)") } else { name.to_owned() })
    };
    process::pids(&proc).into_iter().filter_map(describe).collect()
}

fn tmpfs_bytes(node: &Node) -> Result<BTreeMap<String, u64>> {
    let own = ["/run".into(), node.images(), node.bundles()];
    let mounted = node.mount_points();
    let own = own.into_iter().filter(|folder| mounted.iter().any(|point| Path::new(point) == folder));
    own.map(|folder| {
        let path = node.on_machine(&folder);
        let status = statvfs(&path).at("measure", &path)?;
        let used = (status.blocks() - status.blocks_free()) * status.fragment_size();
        Ok((folder.display().to_string(), used))
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn difference_names_what_changed() {
        let counts = |items: &[&str]| -> Counts {
            [("node-a".to_owned(), counted(items.iter().map(ToString::to_string)))].into()
        };
        let before = Census { mounts: counts(&["/run", "/proc"]), ..Census::default() };
        let after = Census { mounts: counts(&["/run", "/run", "/x"]), ..Census::default() };
        assert!(before.difference(&before.clone()).is_empty());
        let difference = before.difference(&after).to_string();
        let lines: Vec<&str> = difference.lines().collect();
        assert_eq!(
            lines,
            ["mounts of node-a: /proc: 1 -> 0", "mounts of node-a: /run: 1 -> 2", "mounts of node-a: /x: 0 -> 1"]
        );
    }

    #[test]
    fn made_disciplines_are_told_from_the_kernels() {
        let listing = "qdisc noqueue 0: dev lo root refcnt 2\n\
            qdisc noqueue 0: dev pf0 root refcnt 2\n\
            qdisc clsact ffff: dev v-redis parent ffff:fff1\n";
        assert_eq!(made_disciplines(listing).collect::<Vec<_>>(), [("clsact", "v-redis")]);
    }
}
