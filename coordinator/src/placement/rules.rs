//! Where a workload may run by labels, taints and neighbours, as Kubernetes' scheduler judges that.

use super::labels::{Labels, Selector};
use super::taints::{Effect, Taint, Toleration};
use super::{Candidate, Objection};

/// The topology of rules about neighbours that are about one node each; Kubernetes has the same word.
pub const HOSTNAME: &str = "kubernetes.io/hostname";

/// What an operator says of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeTraits {
    /// Its labels.
    pub labels: Labels,
    /// Its taints.
    pub taints: Vec<Taint>,
}

/// What an operator says of a workload.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkloadTraits {
    /// Its labels: what other ones' rules are about.
    pub labels: Labels,
    /// Higher ones leave a node first.
    pub priority: i32,
    /// The taints that it tolerates.
    pub tolerations: Vec<Toleration>,
    /// Labels that its node has to have.
    pub node_selector: Labels,
    /// What its node's labels have to meet: one of these, if there are any.
    pub affinity: Vec<Selector>,
    /// Workloads that it must not be near.
    pub anti_affinity: Vec<AntiAffinity>,
}

/// A rule that keeps workloads apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AntiAffinity {
    /// From whom: workloads with such labels.
    pub workloads: Selector,
    /// How far: nodes with the same value of this label count as one.
    pub topology: String,
}

/// Another workload on a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// Its name.
    pub name: String,
    /// Its labels.
    pub labels: Labels,
    /// Its own rules about neighbours: they hold for who comes later, too.
    pub anti_affinity: Vec<AntiAffinity>,
}

impl AntiAffinity {
    /// Whether two nodes count as one. A node without the label is near nobody.
    fn joins(&self, one: &Candidate, other: &Candidate) -> bool {
        if self.topology == HOSTNAME {
            return one.name == other.name;
        }
        let place = |node: &Candidate| node.traits.labels.get(&self.topology).cloned();
        place(one).is_some_and(|here| place(other) == Some(here))
    }
}

impl Taint {
    fn is_tolerated(&self, by: &[Toleration]) -> bool {
        by.iter().any(|toleration| toleration.tolerates(self))
    }
}

/// Taints of a node that would rather keep the workload away.
pub(super) fn shunned<'a>(
    workload: &'a WorkloadTraits,
    candidate: &'a Candidate,
) -> impl Iterator<Item = &'a Taint> + 'a {
    let soft = candidate.traits.taints.iter().filter(|taint| taint.effect == Effect::PreferNoSchedule);
    soft.filter(|taint| !taint.is_tolerated(&workload.tolerations))
}

/// Whether its rules, the node's, and those of who is there let the workload go there.
pub(super) fn judge(
    workload: &WorkloadTraits,
    candidate: &Candidate,
    inhabited: &[&Candidate],
) -> Result<(), Objection> {
    let mut hard = candidate.traits.taints.iter().filter(|taint| taint.effect != Effect::PreferNoSchedule);
    if let Some(taint) = hard.find(|taint| !taint.is_tolerated(&workload.tolerations)) {
        return Err(Objection::Tainted(taint.clone()));
    }
    let labels = &candidate.traits.labels;
    let lacking = workload.node_selector.iter().find(|(key, value)| labels.get(*key) != Some(*value));
    if let Some((key, value)) = lacking {
        return Err(Objection::Unselected(format!("it has no label {key}={value}, which node_selector wants")));
    }
    if !workload.affinity.is_empty() && !workload.affinity.iter().any(|selector| selector.is_met_by(labels)) {
        let wanted: Vec<_> = workload.affinity.iter().map(ToString::to_string).collect();
        return Err(Objection::Unselected(format!("its labels do not meet the affinity to {}", wanted.join(" or "))));
    }
    match strangers(workload, candidate, inhabited) {
        Some(who) => Err(Objection::Neighbour(who)),
        None => Ok(()),
    }
}

/// The first neighbour that the workload, or that does not want the workload, near.
fn strangers(workload: &WorkloadTraits, candidate: &Candidate, inhabited: &[&Candidate]) -> Option<String> {
    let near = |rule: &AntiAffinity, node: &Candidate| rule.joins(candidate, node);
    let of = |node: &Candidate, neighbour: &Neighbour| {
        let own = |rule: &&AntiAffinity| near(rule, node) && rule.workloads.is_met_by(&neighbour.labels);
        let theirs = |rule: &&AntiAffinity| near(rule, node) && rule.workloads.is_met_by(&workload.labels);
        let place = if node.name == candidate.name { "there".to_owned() } else { format!("on {}", node.name) };
        let (name, own) = (&neighbour.name, workload.anti_affinity.iter().find(own));
        let theirs = neighbour.anti_affinity.iter().find(theirs);
        own.map(|rule| format!("{name} is {place}, and the workload must not be near {}", rule.workloads))
            .or_else(|| theirs.map(|rule| format!("{name} is {place}, which must not be near {}", rule.workloads)))
    };
    inhabited.iter().find_map(|node| node.neighbours.iter().find_map(|neighbour| of(node, neighbour)))
}
