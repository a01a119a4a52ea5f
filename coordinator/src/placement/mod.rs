//! Which node a workload goes to, and why not to the others.
//!
//! Pure: it judges facts that somebody else gathered ([`crate::cluster`]).

mod features;
mod labels;
mod rules;
mod taints;

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::fmt;

use podferry_common::{Failure, FailureCode, NodeName, room};

use crate::cluster::OLD_AGENT;

pub use labels::{Labels, Operator, Requirement, Selector, check_label};
pub use rules::{AntiAffinity, HOSTNAME, Neighbour, NodeTraits, WorkloadTraits};
pub use taints::{Effect, Taint, Toleration};

/// What the workload needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Demand {
    /// The node it runs on.
    pub source: NodeName,
    /// The source's architecture, as `uname -m` says it.
    pub architecture: String,
    /// The source's CPU features: programs choose their code by them once, when they start.
    pub cpu_features: BTreeSet<String>,
    /// Bytes of memory that move.
    pub memory_bytes: u64,
    /// The oldest version of the protocol that the target's agent may speak.
    pub version: u32,
    /// Whether it is started anew there: neither does it go on with code that was chosen for the source's CPU, nor are images of its
    /// memory kept.
    pub starts_anew: bool,
    /// Where it may run, by its own rules.
    pub traits: WorkloadTraits,
}

/// What is known of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Its name.
    pub name: NodeName,
    /// What its agent says, or why it says nothing.
    pub facts: Result<Facts, String>,
    /// Migrations it takes part in now.
    pub migrations: usize,
    /// Migrations it may take part in at a time.
    pub migration_limit: usize,
    /// Migrations that go from the workload's node to it now.
    pub link_migrations: usize,
    /// Migrations that may do so at a time.
    pub link_limit: usize,
    /// The evacuation that empties it, if one does.
    pub evacuated_by: Option<String>,
    /// Whether its preflight has refused the workload already.
    pub has_refused: bool,
    /// Its labels and taints.
    pub traits: NodeTraits,
    /// The other workloads that are there or on their way to it.
    pub neighbours: Vec<Neighbour>,
}

/// What a node's agent says of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// Whether it can do what this migration needs.
    pub fit: bool,
    /// Whether its agent knows this kind of migration.
    pub knows: bool,
    /// Why not.
    pub complaints: Vec<String>,
    /// The newest version of the protocol that it speaks.
    pub version: u32,
    /// As `uname -m` says it.
    pub architecture: String,
    /// Words of /proc/cpuinfo.
    pub cpu_features: BTreeSet<String>,
    /// Bytes that can be used without swapping.
    pub memory_available: u64,
    /// Bytes free where images are kept, which is memory too.
    pub images_free: u64,
    /// Containers that run there.
    pub containers: usize,
    /// Whether a container of the workload's id is there already.
    pub has_container: bool,
}

/// Why a node was not chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Objection {
    /// The workload runs there.
    IsSource,
    /// Its agent does not answer.
    Unreachable(String),
    /// It cannot restore anything.
    NotFit(Vec<String>),
    /// Its agent is too old for what is asked: version it speaks, version needed.
    OldAgent(u32, u32),
    /// Its agent does not know this kind of migration.
    DoesNotKnow,
    /// Another architecture: node's, wanted.
    OtherArchitecture(String, String),
    /// CPU features that the workload may be using.
    MissingFeatures(Vec<String>),
    /// A container of that id is there.
    ContainerExists,
    /// Its preflight has refused the workload already.
    HasRefused,
    /// It is being emptied: by which evacuation.
    Evacuated(String),
    /// One of its taints keeps everybody away who does not tolerate it.
    Tainted(Taint),
    /// It lacks a label that the workload's `node_selector` or affinity wants; says what is wanted.
    Unselected(String),
    /// Another workload is there or near that must not be: says which, and whose rule that is.
    Neighbour(String),
    /// It has as many migrations as it may have.
    Busy(usize),
    /// As many migrations go from the workload's node to it as may.
    LinkBusy(usize),
    /// Not enough memory: bytes needed, bytes there.
    TooLittleMemory(u64, u64),
    /// Not enough memory where images are kept: bytes needed, bytes there.
    TooLittleImageMemory(u64, u64),
    /// It would do, another one is better; says why.
    OtherIsBetter(String),
}

impl fmt::Display for Objection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::IsSource => f.write_str("the workload runs there already"),
            Self::Unreachable(why) => write!(f, "its agent does not answer: {why}"),
            Self::NotFit(complaints) if complaints.is_empty() => f.write_str("its agent says that it is not fit"),
            Self::NotFit(complaints) => write!(f, "it is not fit: {}", complaints.join("; ")),
            Self::OldAgent(spoken, needed) => write!(
                f,
                "its agent speaks version {spoken} of the protocol, and what this migration asks for needs version {needed}"
            ),
            Self::DoesNotKnow => f.write_str("its agent does not know this kind of migration"),
            Self::OtherArchitecture(node, wanted) => write!(f, "its architecture is {node}, not {wanted}"),
            Self::MissingFeatures(words) => write!(f, "its CPU lacks {}", words.join(" ")),
            Self::ContainerExists => f.write_str("a container of that id is there already"),
            Self::HasRefused => f.write_str("its preflight has refused the workload before"),
            Self::Evacuated(by) => write!(f, "it is being emptied by {by}"),
            Self::Tainted(taint) => write!(f, "taint {taint} is not tolerated"),
            Self::Unselected(wanted) => write!(f, "{wanted}"),
            Self::Neighbour(who) => f.write_str(who),
            Self::LinkBusy(limit) => {
                write!(f, "{limit} migrations go there from the workload's node already, which is the limit")
            }
            Self::Busy(limit) => write!(f, "it takes part in {limit} migrations already, which is its limit"),
            Self::TooLittleMemory(needed, there) => {
                write!(f, "{} MiB of memory are needed, {} MiB are free", needed.div_ceil(1 << 20), there >> 20)
            }
            Self::TooLittleImageMemory(needed, there) => {
                write!(f, "{} MiB are needed for images, {} MiB are free", needed.div_ceil(1 << 20), there >> 20)
            }
            Self::OtherIsBetter(why) => f.write_str(why),
        }
    }
}

impl Objection {
    /// As the refusal of a migration to exactly this node.
    pub fn into_failure(self, node: &NodeName) -> Failure {
        let (code, remedy) = match &self {
            Self::IsSource => (FailureCode::InvalidArgument, "name another node, or none"),
            Self::Unreachable(_) => (FailureCode::Unavailable, "see that the node's agent runs and can be reached"),
            Self::NotFit(_) => (FailureCode::FailedPrecondition, "run `podferry check` on the node"),
            Self::OldAgent(..) | Self::DoesNotKnow => (FailureCode::FailedPrecondition, OLD_AGENT),
            Self::OtherArchitecture(..) => (FailureCode::FailedPrecondition, "name a node of the same architecture"),
            Self::MissingFeatures(_) => {
                (FailureCode::FailedPrecondition, "name a node whose CPU has all features of the source's")
            }
            Self::ContainerExists => (FailureCode::AlreadyExists, "delete that container, if it is a left-over"),
            Self::Evacuated(_) => {
                (FailureCode::FailedPrecondition, "name another node, or wait for the evacuation to end, or cancel it")
            }
            Self::Tainted(_) => (FailureCode::FailedPrecondition, "name another node, or let the workload tolerate it"),
            Self::HasRefused | Self::Unselected(_) | Self::Neighbour(_) => {
                (FailureCode::FailedPrecondition, "name another node, or none")
            }
            Self::Busy(_) | Self::LinkBusy(_) | Self::OtherIsBetter(_) => {
                (FailureCode::ResourceExhausted, "wait until one has ended")
            }
            Self::TooLittleMemory(..) | Self::TooLittleImageMemory(..) => {
                (FailureCode::ResourceExhausted, "name a node with more free memory")
            }
        };
        Failure::new(code, format!("node {node} cannot take the workload: {self}"))
            .on(node.as_str())
            .in_phase("preflight")
            .remedy(remedy)
    }
}

/// A chosen target and why the others were not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The target.
    pub target: NodeName,
    /// Every other node, in the order of their names.
    pub others: Vec<(NodeName, Objection)>,
}

/// Whether the workload can go to that node. `inhabited` are all nodes with neighbours: a rule may be about those near by, too.
pub fn judge(demand: &Demand, candidate: &Candidate, inhabited: &[&Candidate]) -> Result<(), Objection> {
    if candidate.name == demand.source {
        return Err(Objection::IsSource);
    }
    if let Some(by) = &candidate.evacuated_by {
        return Err(Objection::Evacuated(by.clone()));
    }
    if candidate.has_refused {
        return Err(Objection::HasRefused);
    }
    rules::judge(&demand.traits, candidate, inhabited)?;
    let facts = candidate.facts.as_ref().map_err(|why| Objection::Unreachable(why.clone()))?;
    if !facts.fit {
        return Err(Objection::NotFit(facts.complaints.clone()));
    }
    if facts.version < demand.version {
        return Err(Objection::OldAgent(facts.version, demand.version));
    }
    if !facts.knows {
        return Err(Objection::DoesNotKnow);
    }
    if facts.architecture != demand.architecture {
        return Err(Objection::OtherArchitecture(facts.architecture.clone(), demand.architecture.clone()));
    }
    let missing = features::missing(&demand.cpu_features, &facts.cpu_features);
    if !missing.is_empty() && !demand.starts_anew {
        return Err(Objection::MissingFeatures(missing));
    }
    if facts.has_container {
        return Err(Objection::ContainerExists);
    }
    let stored = room::to_store(demand.memory_bytes);
    let needed = if demand.starts_anew { stored } else { room::to_restore(demand.memory_bytes) };
    if needed > facts.memory_available {
        return Err(Objection::TooLittleMemory(needed, facts.memory_available));
    }
    let needed = if demand.starts_anew { 0 } else { stored };
    if needed > facts.images_free {
        return Err(Objection::TooLittleImageMemory(needed, facts.images_free));
    }
    // Last: what is only busy would do later.
    if candidate.migrations >= candidate.migration_limit {
        return Err(Objection::Busy(candidate.migration_limit));
    }
    if candidate.link_migrations >= candidate.link_limit {
        return Err(Objection::LinkBusy(candidate.link_limit));
    }
    Ok(())
}

/// The best target: the fewest taints that would rather keep the workload away, then the fewest migrations under way, then the fewest
/// containers, then the most free memory, then the first name. Fails with all objections when no node will do: as `RESOURCE_EXHAUSTED`
/// when one of them is only busy.
pub fn choose(demand: &Demand, candidates: &[Candidate]) -> Result<Choice, Failure> {
    let (mut fitting, mut others) = (Vec::new(), Vec::new());
    let inhabited = inhabited(candidates);
    for candidate in candidates {
        match (judge(demand, candidate, &inhabited), &candidate.facts) {
            (Ok(()), Ok(facts)) => fitting.push((rank(demand, candidate, facts), candidate, facts)),
            (Err(objection), _) => others.push((candidate.name.clone(), objection)),
            (Ok(()), Err(why)) => others.push((candidate.name.clone(), Objection::Unreachable(why.clone()))),
        }
    }
    fitting.sort_by(|a, b| a.0.cmp(&b.0));
    let Some(((_, best, _), rest)) = fitting.split_first() else { return Err(nowhere(others)) };
    for (_, other, facts) in rest {
        others.push((other.name.clone(), Objection::OtherIsBetter(worse(demand, other, facts, best))));
    }
    others.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(Choice { target: best.name.clone(), others })
}

/// Those that rules about neighbours can be about.
pub fn inhabited(candidates: &[Candidate]) -> Vec<&Candidate> {
    candidates.iter().filter(|candidate| !candidate.neighbours.is_empty()).collect()
}

/// What a node that would do is compared by: less is better.
type Rank<'a> = (usize, usize, usize, Reverse<u64>, &'a NodeName);

fn rank<'a>(demand: &Demand, candidate: &'a Candidate, facts: &Facts) -> Rank<'a> {
    let shunned = rules::shunned(&demand.traits, candidate).count();
    (shunned, candidate.migrations, facts.containers, Reverse(facts.memory_available), &candidate.name)
}

/// Why a node that would do is worse than the best.
fn worse(demand: &Demand, other: &Candidate, facts: &Facts, best: &Candidate) -> String {
    let shunned = |node| rules::shunned(&demand.traits, node).count();
    if shunned(other) > shunned(best) {
        let taints: Vec<_> = rules::shunned(&demand.traits, other).map(ToString::to_string).collect();
        return format!("{} is better: taint {} is not tolerated", best.name, taints.join(", "));
    }
    format!(
        "{} is better: {} has {} containers, {} migrations and {} MiB free",
        best.name,
        other.name,
        facts.containers,
        other.migrations,
        facts.memory_available >> 20
    )
}

fn nowhere(mut others: Vec<(NodeName, Objection)>) -> Failure {
    others.sort_by(|a, b| a.0.cmp(&b.0));
    let busy = others.iter().any(|(_, objection)| matches!(objection, Objection::Busy(_) | Objection::LinkBusy(_)));
    let reasons: Vec<_> = others.iter().map(|(name, objection)| format!("{name}: {objection}")).collect();
    let message = format!("no node can take the workload ({})", reasons.join("; "));
    let (code, remedy) = if busy {
        (FailureCode::ResourceExhausted, "wait until a migration has ended")
    } else {
        (FailureCode::FailedPrecondition, "make room on a node or add one")
    };
    Failure::new(code, message).in_phase("preflight").remedy(remedy)
}

#[cfg(test)]
mod tests;
