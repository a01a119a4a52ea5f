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
