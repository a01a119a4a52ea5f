//! Which node a workload goes to, and why not to the others.
//!
//! Pure: it judges facts that somebody else gathered ([`crate::cluster`]).

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::fmt;

use podferry_common::{Failure, FailureCode, NodeName, room};

use crate::cluster::OLD_AGENT;

/// CPU feature words that user space cannot depend on: what the hypervisor and the kernel say about themselves, about
/// power, virtualisation and the mitigation of hardware bugs. Two nodes of one pool differ in them by microcode alone.
const KERNEL_ONLY_FEATURES: &[&str] = &[
    "acpi",
    "aperfmperf",
    "arat",
    "arch_capabilities",
    "arch_perfmon",
    "art",
    "bts",
    "cat_l2",
    "cat_l3",
    "cdp_l3",
    "constant_tsc",
    "cpuid",
    "cpuid_fault",
    "cqm",
    "cqm_llc",
    "cqm_mbm_local",
    "cqm_mbm_total",
    "cqm_occup_llc",
    "dca",
    "de",
    "ds_cpl",
    "dtes64",
    "dtherm",
    "dts",
    "epb",
    "ept",
    "ept_ad",
    "est",
    "flexpriority",
    "flush_l1d",
    "hwp",
    "hwp_act_window",
    "hwp_epp",
    "hwp_notify",
    "hwp_pkg_req",
    "hypervisor",
    "ibpb",
    "ibpb_brtype",
    "ibrs",
    "ibrs_enhanced",
    "ida",
    "intel_ppin",
    "intel_pt",
    "invpcid_single",
    "mba",
    "mce",
    "mca",
    "md_clear",
    "monitor",
    "mtrr",
    "nonstop_tsc",
    "npt",
    "nrip_save",
    "ospke_kernel",
    "pat",
    "pcid",
    "pdcm",
    "pebs",
    "pge",
    "pln",
    "pse",
    "pse36",
    "pti",
    "pts",
    "rep_good",
    "rdt_a",
    "sep",
    "smx",
    "srbds_ctrl",
    "ss",
    "ssbd",
    "stibp",
    "svm",
    "tm",
    "tm2",
    "tpr_shadow",
    "tsc_adjust",
    "tsc_deadline_timer",
    "tsc_known_freq",
    "vme",
    "vmx",
    "vmmcall",
    "vnmi",
    "vpid",
    "x2apic",
    "xtopology",
    "xtpr",
];

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
    /// It has as many migrations as it may have.
    Busy(usize),
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
            Self::Busy(_) | Self::OtherIsBetter(_) => (FailureCode::ResourceExhausted, "wait until one has ended"),
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

/// Whether the workload can go to that node.
pub fn judge(demand: &Demand, candidate: &Candidate) -> Result<(), Objection> {
    if candidate.name == demand.source {
        return Err(Objection::IsSource);
    }
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
    let missing = missing_features(&demand.cpu_features, &facts.cpu_features);
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
    if candidate.migrations >= candidate.migration_limit {
        return Err(Objection::Busy(candidate.migration_limit));
    }
    Ok(())
}

/// The best target: the fewest migrations under way, then the fewest containers, then the most free memory, then the
/// first name. Fails with all objections when no node will do.
pub fn choose(demand: &Demand, candidates: &[Candidate]) -> Result<Choice, Failure> {
    let (mut fitting, mut others) = (Vec::new(), Vec::new());
    for candidate in candidates {
        match (judge(demand, candidate), &candidate.facts) {
            (Ok(()), Ok(facts)) => fitting.push((rank(candidate, facts), candidate, facts)),
            (Err(objection), _) => others.push((candidate.name.clone(), objection)),
            (Ok(()), Err(why)) => others.push((candidate.name.clone(), Objection::Unreachable(why.clone()))),
        }
    }
    fitting.sort_by(|a, b| a.0.cmp(&b.0));
    let Some(((_, best, _), rest)) = fitting.split_first() else { return Err(nowhere(others)) };
    for (_, other, facts) in rest {
        let why = format!(
            "{} is better: {} has {} containers, {} migrations and {} MiB free",
            best.name,
            other.name,
            facts.containers,
            other.migrations,
            facts.memory_available >> 20
        );
        others.push((other.name.clone(), Objection::OtherIsBetter(why)));
    }
    others.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(Choice { target: best.name.clone(), others })
}

fn rank<'a>(candidate: &'a Candidate, facts: &Facts) -> (usize, usize, Reverse<u64>, &'a NodeName) {
    (candidate.migrations, facts.containers, Reverse(facts.memory_available), &candidate.name)
}

fn nowhere(mut others: Vec<(NodeName, Objection)>) -> Failure {
    others.sort_by(|a, b| a.0.cmp(&b.0));
    let reasons: Vec<_> = others.iter().map(|(name, objection)| format!("{name}: {objection}")).collect();
    let message = format!("no node can take the workload ({})", reasons.join("; "));
    Failure::new(FailureCode::FailedPrecondition, message)
        .in_phase("preflight")
        .remedy("make room on a node or add one")
}

fn missing_features(wanted: &BTreeSet<String>, there: &BTreeSet<String>) -> Vec<String> {
    let for_programs = |word: &&String| !KERNEL_ONLY_FEATURES.contains(&word.as_str());
    wanted.difference(there).filter(for_programs).cloned().collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn words(text: &str) -> BTreeSet<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    fn demand() -> Demand {
        Demand {
            source: "a".parse().unwrap(),
            architecture: "x86_64".to_owned(),
            cpu_features: words("sse2 avx2 vmx ssbd"),
            memory_bytes: 100 << 20,
            version: 2,
            starts_anew: false,
        }
    }

    fn fit() -> Facts {
        Facts {
            fit: true,
            knows: true,
            version: 2,
            architecture: "x86_64".to_owned(),
            cpu_features: words("sse2 avx2 avx512f"),
            memory_available: 1 << 30,
            images_free: 1 << 30,
            ..Facts::default()
        }
    }

    fn candidate(name: &str, facts: Facts) -> Candidate {
        Candidate { name: name.parse().unwrap(), facts: Ok(facts), migrations: 0, migration_limit: 2 }
    }

    #[test]
    fn every_objection_is_found_and_said() {
        let with = |change: fn(&mut Candidate, &mut Facts)| {
            let mut facts = fit();
            let mut node = candidate("b", fit());
            change(&mut node, &mut facts);
            if node.facts.is_ok() {
                node.facts = Ok(facts);
            }
            judge(&demand(), &node).unwrap_err().into_failure(&node.name)
        };
        let all = [
            with(|node, _| node.name = "a".parse().unwrap()),
            with(|node, _| node.facts = Err("connection refused".to_owned())),
            with(|_, facts| (facts.fit, facts.complaints) = (false, vec!["no CRIU was found".to_owned()])),
            with(|_, facts| facts.version = 1),
            with(|_, facts| facts.architecture = "aarch64".to_owned()),
            with(|_, facts| facts.cpu_features = words("sse2")),
            with(|_, facts| facts.has_container = true),
            with(|_, facts| facts.memory_available = 5 << 20),
            with(|_, facts| facts.images_free = 6 << 20),
            with(|node, _| node.migrations = 2),
        ];
        let lines: Vec<_> = all.iter().map(|failure| format!("{} {failure}", failure.code)).collect();
        insta::assert_snapshot!(lines.join("\n"), @r#"
        INVALID_ARGUMENT node a cannot take the workload: the workload runs there already (on a, in preflight); what to do: name another node, or none
        UNAVAILABLE node b cannot take the workload: its agent does not answer: connection refused (on b, in preflight); what to do: see that the node's agent runs and can be reached
        FAILED_PRECONDITION node b cannot take the workload: it is not fit: no CRIU was found (on b, in preflight); what to do: run `podferry check` on the node
        FAILED_PRECONDITION node b cannot take the workload: its agent speaks version 1 of the protocol, and what this migration asks for needs version 2 (on b, in preflight); what to do: update the agent, or migrate warm and without a limit on the bandwidth
        FAILED_PRECONDITION node b cannot take the workload: its architecture is aarch64, not x86_64 (on b, in preflight); what to do: name a node of the same architecture
        FAILED_PRECONDITION node b cannot take the workload: its CPU lacks avx2 (on b, in preflight); what to do: name a node whose CPU has all features of the source's
        ALREADY_EXISTS node b cannot take the workload: a container of that id is there already (on b, in preflight); what to do: delete that container, if it is a left-over
        RESOURCE_EXHAUSTED node b cannot take the workload: 264 MiB of memory are needed, 5 MiB are free (on b, in preflight); what to do: name a node with more free memory
        RESOURCE_EXHAUSTED node b cannot take the workload: 164 MiB are needed for images, 6 MiB are free (on b, in preflight); what to do: name a node with more free memory
        RESOURCE_EXHAUSTED node b cannot take the workload: it takes part in 2 migrations already, which is its limit (on b, in preflight); what to do: wait until one has ended
        "#);
    }

    #[test]
    fn a_node_needs_the_room_that_its_agents_preflight_asks_for() {
        let memory = demand().memory_bytes;
        let (restore, images) = (room::to_restore(memory), room::to_store(memory));
        let judged = |memory_available: u64, images_free: u64| {
            judge(&demand(), &candidate("b", Facts { memory_available, images_free, ..fit() }))
        };
        assert_eq!(judged(restore, images), Ok(()));
        assert_eq!(judged(restore - 1, images), Err(Objection::TooLittleMemory(restore, restore - 1)));
        assert_eq!(judged(restore, images - 1), Err(Objection::TooLittleImageMemory(images, images - 1)));
    }

    #[test]
    fn features_of_the_kernel_alone_do_not_count() {
        assert_eq!(judge(&demand(), &candidate("b", fit())), Ok(()));
    }

    #[test]
    fn the_emptiest_node_is_chosen_and_the_others_are_told_why() {
        let busy = Candidate { migrations: 1, ..candidate("b", fit()) };
        let full = candidate("c", Facts { containers: 7, ..fit() });
        let best = candidate("e", Facts { containers: 1, ..fit() });
        let small = candidate("d", Facts { memory_available: 1 << 20, ..fit() });
        let source = candidate("a", fit());
        let choice = choose(&demand(), &[source, busy, full, small, best]).unwrap();
        let lines: Vec<_> = choice.others.iter().map(|(name, why)| format!("{name}: {why}")).collect();
        insta::assert_snapshot!(format!("-> {}\n{}", choice.target, lines.join("\n")), @r#"
        -> e
        a: the workload runs there already
        b: e is better: b has 0 containers, 1 migrations and 1024 MiB free
        c: e is better: c has 7 containers, 0 migrations and 1024 MiB free
        d: 264 MiB of memory are needed, 1 MiB are free
        "#);
    }

    #[test]
    fn what_starts_anew_needs_no_features_and_no_room_for_images_and_an_agent_that_knows_it() {
        let cold = Demand { starts_anew: true, ..demand() };
        let bare = Facts { cpu_features: words(""), images_free: 0, memory_available: 200 << 20, ..fit() };
        assert_eq!(judge(&cold, &candidate("b", bare.clone())), Ok(()));
        assert!(judge(&demand(), &candidate("b", bare.clone())).is_err());
        let small = Facts { memory_available: 100 << 20, ..bare.clone() };
        let objection = judge(&cold, &candidate("b", small));
        assert_eq!(objection, Err(Objection::TooLittleMemory(164 << 20, 100 << 20)));
        assert_eq!(judge(&cold, &candidate("b", Facts { knows: false, ..bare })), Err(Objection::DoesNotKnow));
    }

    #[test]
    fn no_node_says_why_for_each() {
        let off = Candidate { facts: Err("timed out".to_owned()), ..candidate("b", fit()) };
        let failure = choose(&demand(), &[off, candidate("a", fit())]).unwrap_err();
        insta::assert_snapshot!(failure, @r#"no node can take the workload (a: the workload runs there already; b: its agent does not answer: timed out) (in preflight); what to do: make room on a node or add one"#);
    }

    fn any_candidate() -> impl proptest::strategy::Strategy<Value = Candidate> {
        let features = prop::sample::subsequence(vec!["sse2", "avx2", "avx512f", "vmx"], 0..=4);
        let facts = (any::<bool>(), any::<bool>(), features, 0_u64..600, 0_u64..600, 0_usize..4, any::<bool>())
            .prop_map(|(fit, x86, features, memory, images, containers, has_container)| Facts {
                fit,
                knows: true,
                complaints: Vec::new(),
                version: 2,
                architecture: if x86 { "x86_64" } else { "aarch64" }.to_owned(),
                cpu_features: features.into_iter().map(str::to_owned).collect(),
                memory_available: memory << 20,
                images_free: images << 20,
                containers,
                has_container,
            });
        ("[a-e]", prop::option::weighted(0.8, facts), 0_usize..3).prop_map(|(name, facts, migrations)| Candidate {
            name: name.parse().unwrap(),
            facts: facts.ok_or_else(|| "gone".to_owned()),
            migrations,
            migration_limit: 2,
        })
    }

    proptest! {
        #[test]
        fn the_choice_is_fit_the_best_and_everything_else_has_a_reason(
            mut nodes in prop::collection::vec(any_candidate(), 0..6),
            seed in any::<usize>(),
        ) {
            nodes.sort_by(|a, b| a.name.cmp(&b.name));
            nodes.dedup_by(|a, b| a.name == b.name);
            let fitting: Vec<_> = nodes.iter().filter(|node| judge(&demand(), node).is_ok()).collect();
            let choice = choose(&demand(), &nodes);
            prop_assert_eq!(choice.is_ok(), !fitting.is_empty());
            if let Ok(choice) = &choice {
                let chosen = nodes.iter().find(|node| node.name == choice.target).unwrap();
                prop_assert!(judge(&demand(), chosen).is_ok());
                prop_assert!(fitting.iter().all(|node| node.migrations >= chosen.migrations));
                prop_assert_eq!(choice.others.len() + 1, nodes.len());
                prop_assert!(choice.others.iter().all(|(name, _)| *name != choice.target));
            }
            if !nodes.is_empty() {
                let middle = seed % nodes.len();
                nodes.rotate_left(middle);
            }
            prop_assert_eq!(choose(&demand(), &nodes), choice, "the order in which nodes are listed must not matter");
        }
    }
}
