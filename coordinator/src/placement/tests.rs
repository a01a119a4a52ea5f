//! Placement as a whole: what is refused, what is chosen.

use proptest::prelude::*;

use super::*;

fn judge(demand: &Demand, candidate: &Candidate) -> Result<(), Objection> {
    super::judge(demand, candidate, &inhabited(std::slice::from_ref(candidate)))
}

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
        traits: WorkloadTraits::default(),
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
    Candidate {
        name: name.parse().unwrap(),
        facts: Ok(facts),
        migrations: 0,
        migration_limit: 2,
        link_migrations: 0,
        link_limit: 2,
        evacuated_by: None,
        has_refused: false,
        traits: NodeTraits::default(),
        neighbours: Vec::new(),
    }
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
        with(|node, _| node.link_migrations = 2),
        with(|node, _| node.evacuated_by = Some("evac-1".to_owned())),
        with(|node, _| node.traits.taints = vec!["spot=true:NoSchedule".parse().unwrap()]),
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
    RESOURCE_EXHAUSTED node b cannot take the workload: 2 migrations go there from the workload's node already, which is the limit (on b, in preflight); what to do: wait until one has ended
    FAILED_PRECONDITION node b cannot take the workload: it is being emptied by evac-1 (on b, in preflight); what to do: name another node, or wait for the evacuation to end, or cancel it
    FAILED_PRECONDITION node b cannot take the workload: taint spot=true:NoSchedule is not tolerated (on b, in preflight); what to do: name another node, or let the workload tolerate it
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

fn labels(text: &str) -> Labels {
    text.split_whitespace().filter_map(|pair| pair.split_once('=')).map(|(k, v)| (k.to_owned(), v.to_owned())).collect()
}

fn labelled(name: &str, text: &str) -> Candidate {
    Candidate { traits: NodeTraits { labels: labels(text), taints: Vec::new() }, ..candidate(name, fit()) }
}

fn wanting(traits: WorkloadTraits) -> Demand {
    Demand { traits, ..demand() }
}

fn reasons(demand: &Demand, nodes: &[Candidate]) -> String {
    match choose(demand, nodes) {
        Ok(Choice { target, others }) => {
            let others: Vec<_> = others.iter().map(|(name, why)| format!("{name}: {why}")).collect();
            format!("-> {target}; {}", others.join("; "))
        }
        Err(failure) => failure.message,
    }
}

#[test]
fn a_taint_keeps_away_who_does_not_tolerate_it_and_a_soft_one_if_there_is_another_node() {
    let tainted = |name: &str, taint: &str| {
        let taints = vec![taint.parse().unwrap()];
        Candidate { traits: NodeTraits { labels: Labels::new(), taints }, ..candidate(name, fit()) }
    };
    let nodes = [tainted("b", "spot=true:NoSchedule"), tainted("c", "old:PreferNoSchedule")];
    insta::assert_snapshot!(reasons(&demand(), &nodes), @"-> c; b: taint spot=true:NoSchedule is not tolerated");
    let tolerant = |toleration: &str| {
        wanting(WorkloadTraits { tolerations: vec![toleration.parse().unwrap()], ..WorkloadTraits::default() })
    };
    insta::assert_snapshot!(reasons(&tolerant("spot"), &nodes), @"-> b; c: b is better: taint old:PreferNoSchedule is not tolerated");
    assert!(reasons(&tolerant("*"), &nodes).starts_with("-> b"), "neither counts: the first name");
}

#[test]
fn labels_that_are_wanted_are_needed() {
    let nodes = [labelled("b", "zone=x"), labelled("c", "zone=y disk=ssd")];
    let selecting = WorkloadTraits { node_selector: labels("disk=ssd"), ..WorkloadTraits::default() };
    insta::assert_snapshot!(reasons(&wanting(selecting), &nodes), @"-> c; b: it has no label disk=ssd, which node_selector wants");
    let affinity = |all: &[&str]| {
        let affinity = all.iter().map(|text| text.parse().unwrap()).collect();
        wanting(WorkloadTraits { affinity, ..WorkloadTraits::default() })
    };
    assert!(reasons(&affinity(&["zone in (x), disk", "zone=y"]), &nodes).starts_with("-> c"), "one of them is enough");
    insta::assert_snapshot!(reasons(&affinity(&["zone=z, disk", "gpu"]), &nodes), @"no node can take the workload (b: its labels do not meet the affinity to zone=z, disk or gpu; c: its labels do not meet the affinity to zone=z, disk or gpu)");
}

#[test]
fn who_must_not_be_near_each_other_is_kept_apart_whoevers_rule_that_is() {
    let apart = |workloads: &str, topology: &str| {
        vec![AntiAffinity { workloads: workloads.parse().unwrap(), topology: topology.to_owned() }]
    };
    let inhabited = |name: &str, zone: &str, anti_affinity: Vec<AntiAffinity>| {
        let neighbour = Neighbour { name: "redis-1".to_owned(), labels: labels("app=redis"), anti_affinity };
        Candidate { neighbours: vec![neighbour], ..labelled(name, zone) }
    };
    let nodes =
        [inhabited("b", "zone=x", Vec::new()), labelled("c", "zone=x"), labelled("d", "zone=y"), labelled("e", "")];
    let redis = |topology: &str| {
        let anti_affinity = apart("app=redis", topology);
        wanting(WorkloadTraits { labels: labels("app=redis"), anti_affinity, ..WorkloadTraits::default() })
    };
    let there = "redis-1 is there, and the workload must not be near app=redis";
    assert!(reasons(&redis(HOSTNAME), &nodes).starts_with(&format!("-> c; b: {there}; d: ")));
    let said = reasons(&redis("zone"), &nodes);
    let near = "redis-1 is on b, and the workload must not be near app=redis";
    assert!(said.starts_with(&format!("-> d; b: {there}; c: {near}; e: ")), "{said}");
    // The other one's rule holds, too.
    let plain = wanting(WorkloadTraits { labels: labels("app=redis"), ..WorkloadTraits::default() });
    let theirs = [inhabited("b", "", apart("app=redis", HOSTNAME)), labelled("c", "")];
    insta::assert_snapshot!(reasons(&plain, &theirs), @"-> c; b: redis-1 is there, which must not be near app=redis");
}

#[test]
fn that_a_node_is_only_busy_is_told_apart() {
    let busy = Candidate { migrations: 2, ..candidate("b", fit()) };
    let off = Candidate { facts: Err("timed out".to_owned()), ..candidate("c", fit()) };
    let code = |nodes: &[Candidate]| choose(&demand(), nodes).unwrap_err().code;
    assert_eq!(code(&[busy, off.clone()]), FailureCode::ResourceExhausted);
    assert_eq!(code(&[off]), FailureCode::FailedPrecondition);
}

fn any_candidate() -> impl proptest::strategy::Strategy<Value = Candidate> {
    let features = prop::sample::subsequence(vec!["sse2", "avx2", "avx512f", "vmx"], 0..=4);
    let facts = (any::<bool>(), any::<bool>(), features, 0_u64..600, 0_u64..600, 0_usize..4, any::<bool>()).prop_map(
        |(fit, x86, features, memory, images, containers, has_container)| Facts {
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
        },
    );
    ("[a-e]", prop::option::weighted(0.8, facts), 0_usize..3).prop_map(|(name, facts, migrations)| Candidate {
        facts: facts.ok_or_else(|| "gone".to_owned()),
        migrations,
        ..candidate(&name, fit())
    })
}

fn any_traits() -> impl Strategy<Value = WorkloadTraits> {
    let tolerations = prop::sample::subsequence(vec!["spot", "old:NoSchedule", "new=1:PreferNoSchedule"], 0..=3);
    let affinity = prop::sample::subsequence(vec!["zone=x", "zone in (x, y), !disk", "disk"], 0..=3);
    (tolerations, affinity, any::<bool>(), prop::option::of(prop::bool::ANY)).prop_map(
        |(tolerations, affinity, selects, apart)| WorkloadTraits {
            labels: labels("app=redis"),
            tolerations: tolerations.into_iter().map(|text| text.parse().unwrap()).collect(),
            affinity: affinity.into_iter().map(|text| text.parse().unwrap()).collect(),
            node_selector: if selects { labels("zone=x") } else { Labels::new() },
            anti_affinity: apart
                .map(|wide| AntiAffinity {
                    workloads: "app".parse().unwrap(),
                    topology: if wide { "zone" } else { HOSTNAME }.to_owned(),
                })
                .into_iter()
                .collect(),
            ..WorkloadTraits::default()
        },
    )
}

fn any_place() -> impl Strategy<Value = Candidate> {
    let taints = vec!["spot:NoSchedule", "old:NoSchedule", "new=1:PreferNoSchedule", "cheap:PreferNoSchedule"];
    let taints = prop::sample::subsequence(taints, 0..=4);
    let place = prop::sample::select(vec!["", "zone=x", "zone=y", "zone=x disk=ssd"]);
    ("[b-h]", taints, place, any::<bool>()).prop_map(|(name, taints, place, inhabited)| {
        let neighbour = Neighbour { name: "other".to_owned(), labels: labels("app=web"), anti_affinity: Vec::new() };
        Candidate {
            traits: NodeTraits {
                labels: labels(place),
                taints: taints.into_iter().map(|text| text.parse().unwrap()).collect(),
            },
            neighbours: if inhabited { vec![neighbour] } else { Vec::new() },
            ..candidate(&name, fit())
        }
    })
}

proptest! {
    #[test]
    fn where_a_workload_goes_no_rule_of_its_own_is_broken(
        traits in any_traits(), mut nodes in prop::collection::vec(any_place(), 0..6),
    ) {
        nodes.sort_by(|a, b| a.name.cmp(&b.name));
        nodes.dedup_by(|a, b| a.name == b.name);
        let demand = wanting(traits.clone());
        let Ok(choice) = choose(&demand, &nodes) else { return Ok(()) };
        let chosen = nodes.iter().find(|node| node.name == choice.target).unwrap();
        let there = &chosen.traits.labels;
        let hard = chosen.traits.taints.iter().filter(|taint| taint.effect == Effect::NoSchedule);
        prop_assert!(hard.clone().all(|taint| traits.tolerations.iter().any(|one| one.tolerates(taint))));
        prop_assert!(traits.node_selector.iter().all(|(key, value)| there.get(key) == Some(value)));
        prop_assert!(traits.affinity.is_empty() || traits.affinity.iter().any(|one| one.is_met_by(there)));
        if let Some(rule) = traits.anti_affinity.first() {
            let zone = there.get("zone");
            // As in Kubernetes, a node without the label is near nobody.
            prop_assert!(chosen.neighbours.is_empty() || (rule.topology != HOSTNAME && zone.is_none()));
            let near = |node: &&Candidate| rule.topology != HOSTNAME && zone.is_some() && node.traits.labels.get("zone") == zone;
            prop_assert!(nodes.iter().filter(near).all(|node| node.neighbours.is_empty()));
        }
    }

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
