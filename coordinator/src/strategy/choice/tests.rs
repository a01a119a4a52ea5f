use proptest::prelude::*;
use proptest::strategy::Strategy as _;

use super::*;
use crate::strategy::{Past, Strategy};

const MIB: u64 = 1 << 20;

fn end(node: &str) -> End {
    let tracks_writes = Some(true);
    End { node: node.to_owned(), version: 2, unfit: None, post_copy: true, cold: true, tracks_writes }
}

fn goals() -> Goals {
    Goals { auto: Auto::default(), budget_ms: 100.0, bandwidth_limit: 0, verify: false }
}

fn accepting() -> Goals {
    Goals { auto: Auto { accept_loss: true, ..Auto::default() }, ..goals() }
}

fn restartable() -> Goals {
    Goals { auto: Auto { allow_restart: true, ..Auto::default() }, ..goals() }
}

fn facts(memory_mib: u64, followed_mib: u64) -> v1::PreflightSourceResponse {
    let left = memory_mib - followed_mib;
    let reasons = if left > 0 { vec!["process 7 uses io_uring".to_owned()] } else { Vec::new() };
    let tracking = v1::Tracking {
        followed_bytes: followed_mib * MIB,
        left_bytes: left * MIB,
        tracker: "userfaultfd".to_owned(),
        reasons,
    };
    v1::PreflightSourceResponse { memory_bytes: memory_mib * MIB, tracking: Some(tracking), ..Default::default() }
}

/// A case: what preflight saw, as values that a view can be made of.
#[derive(Clone, Debug)]
struct Case {
    source: End,
    target: End,
    carried: Result<v1::PreflightSourceResponse, Obstacle>,
    restarted: Result<v1::PreflightSourceResponse, Obstacle>,
    refused: BTreeMap<Strategy, Obstacle>,
}

impl Case {
    fn of(memory_mib: u64, followed_mib: u64) -> Self {
        Self {
            source: end("a"),
            target: end("b"),
            carried: Ok(facts(memory_mib, followed_mib)),
            restarted: Ok(v1::PreflightSourceResponse::default()),
            refused: BTreeMap::new(),
        }
    }

    fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    fn view(&self) -> View<'_> {
        View {
            source: &self.source,
            target: Some(&self.target),
            carried: self.carried.as_ref().map_err(Clone::clone),
            restarted: self.restarted.as_ref().map_err(Clone::clone),
            refused: &self.refused,
        }
    }

    fn refuses(&mut self, strategies: &[Strategy], why: &str) {
        self.refused.extend(strategies.iter().map(|strategy| (*strategy, Obstacle::new(why).on("b"))));
    }

    fn chosen(&self, goals: &Goals) -> Result<Choice, Failure> {
        choose(goals, &self.view())
    }
}

fn past(left_ms: f64, converged: bool) -> Past {
    Past { left_ms, rate: 250e6, converged }
}

#[test]
fn what_is_seen_decides() {
    use Strategy::{Cold, Hybrid, Live, Postcopy, Warm};
    let large = || Case::of(500, 500);
    let with_past = |goals: Goals, past| Goals { auto: Auto { past: Some(past), ..goals.auto }, ..goals };
    let table = vec![
        ("memory that can be followed", large(), goals(), Live),
        ("and a loss is accepted", large(), accepting(), Hybrid),
        ("and the last one converged", large(), with_past(accepting(), past(20.0, true)), Live),
        ("and the last one did not", large(), with_past(accepting(), past(900.0, false)), Hybrid),
        ("that, and no loss is accepted", large(), with_past(goals(), past(900.0, false)), Live),
        ("hardly any memory", Case::of(2, 2), goals(), Warm),
        ("hardly any memory, and a loss is accepted", Case::of(2, 2), accepting(), Warm),
        ("little memory over a narrow link", Case::of(2, 2), Goals { bandwidth_limit: MIB, ..goals() }, Live),
        ("little for so large a budget", Case::of(90, 90), Goals { budget_ms: 5000.0, ..goals() }, Warm),
        (
            "a layer that is large",
            Case::of(2, 2).with(|case| case.carried.as_mut().unwrap().layer_bytes = 900 * MIB),
            goals(),
            Live,
        ),
        ("memory that cannot be followed", Case::of(500, 0), goals(), Warm),
        ("and a loss is accepted", Case::of(500, 0), accepting(), Postcopy),
        ("that stands still for no longer than is aimed at", Case::of(20, 0), accepting(), Warm),
        ("some that can be followed", Case::of(500, 300), goals(), Live),
        (
            "a source that does not say",
            large().with(|case| case.carried.as_mut().unwrap().tracking = None),
            goals(),
            Live,
        ),
        (
            "a source that does not say, and whose kernel has nothing for it",
            large().with(|case| {
                case.carried.as_mut().unwrap().tracking = None;
                case.source.tracks_writes = Some(false);
            }),
            goals(),
            Warm,
        ),
        ("a target that is too old", large().with(|case| case.target.version = 1), goals(), Warm),
        ("one that knows no post-copy", large().with(|case| case.target.post_copy = false), accepting(), Live),
        (
            "one that lays nothing in",
            large().with(|case| case.refuses(&[Live, Hybrid, Postcopy], "CRIU cannot lay in pages")),
            accepting(),
            Warm,
        ),
        ("what is to be verified", Case::of(2, 2), Goals { verify: true, ..goals() }, Live),
        ("a restart that is not needed", large(), restartable(), Live),
        ("no CRIU", large().with(|case| case.target.unfit = Some("no CRIU".to_owned())), restartable(), Cold),
        (
            "what cannot be dumped",
            large().with(|case| case.carried = Err(Obstacle::new("io-uring: a ring"))),
            restartable(),
            Cold,
        ),
        (
            "no CPU of these features",
            large(),
            Goals {
                auto: Auto { only_cold: Some("its CPU lacks avx512f".to_owned()), ..restartable().auto },
                ..goals()
            },
            Cold,
        ),
    ];
    for (what, case, goals, expected) in table {
        assert_eq!(case.chosen(&goals).map(|choice| choice.strategy), Ok(expected), "{what}");
    }
}

#[test]
fn people_are_told_why_and_why_not_the_others() {
    let past = Some(past(900.0, false));
    let hopeful = Goals { auto: Auto { past, ..accepting().auto }, ..accepting() };
    let told = [
        Case::of(500, 500).chosen(&goals()),
        Case::of(500, 300).chosen(&hopeful),
        Case::of(2, 2).chosen(&goals()),
        Case::of(500, 0).chosen(&goals()),
        Case::of(500, 0).chosen(&accepting()),
        Case::of(500, 500).with(|case| case.target.unfit = Some("no CRIU".to_owned())).chosen(&restartable()),
    ];
    insta::assert_snapshot!(told.map(|choice| choice.unwrap().reason).join("\n"), @r#"
    live: 500.0 MiB of 500.0 MiB can be copied while it runs (writes are followed by userfaultfd); without that it would stand still for about 2.1 s, with 100 ms aimed at. Not hybrid, postcopy: needs --accept-loss, since losing a node would lose the workload; cold: needs --allow-restart, since memory and connections are lost
    hybrid: 300.0 MiB of 500.0 MiB can be copied while it runs (writes are followed by userfaultfd; process 7 uses io_uring); without that it would stand still for about 2.1 s, with 100 ms aimed at, which may not be reached: the last migration had 900 ms left at the end of its rounds; what is not below it then is fetched after the resume, since a loss is accepted. Not live: would give up where the rounds do not get there; postcopy: would risk all memory, not only what is left; cold: needs --allow-restart, since memory and connections are lost
    warm: 2.0 MiB are so little that copying beforehand gains nothing: it stands still for about 188 ms either way. Not hybrid, postcopy: needs --accept-loss, since losing a node would lose the workload; cold: needs --allow-restart, since memory and connections are lost
    warm: writes to 500.0 MiB of its memory cannot be followed (process 7 uses io_uring); it stands still for about 2.1 s. Not hybrid, postcopy: needs --accept-loss, since losing a node would lose the workload; cold: needs --allow-restart, since memory and connections are lost
    postcopy: writes to 500.0 MiB of its memory cannot be followed (process 7 uses io_uring); warm would stand still for about 2.1 s, with 100 ms aimed at, and a loss is accepted. Not cold: needs --allow-restart, since memory and connections are lost
    cold: nothing else can work, and a restart is allowed: memory is lost and connections are closed. Not live, hybrid, postcopy, warm: node b is not fit for migrations: no CRIU
    "#);
}

#[test]
fn nothing_is_forced_and_each_strategy_says_what_it_lacked() {
    let ring =
        Obstacle::new("the workload cannot be taken from this node: io-uring: a ring").on("a").remedy("close it");
    let undumpable = Case::of(500, 500).with(|case| case.carried = Err(ring));
    let crowded = Case::of(500, 500).with(|case| case.refuses(&CHOICES, "a container redis is on this node already"));
    let told = [
        undumpable.chosen(&goals()),
        crowded.chosen(&Goals { auto: Auto { accept_loss: true, ..restartable().auto }, ..goals() }),
    ];
    let told = told.map(|choice| choice.unwrap_err()).map(|failure| format!("{} {failure}", failure.code));
    insta::assert_snapshot!(told.join("\n"), @r#"
    FAILED_PRECONDITION no strategy can move the workload: live, hybrid, postcopy, warm: the workload cannot be taken from this node: io-uring: a ring; cold: needs --allow-restart, since memory and connections are lost (on a, in preflight); what to do: close it; or allow a restart (--allow-restart), if the workload may lose its memory and its connections
    FAILED_PRECONDITION no strategy can move the workload: live, hybrid, postcopy, warm, cold: a container redis is on this node already (on b, in preflight)
    "#);
}

fn any_obstacle() -> impl proptest::strategy::Strategy<Value = Option<Obstacle>> {
    prop::option::weighted(0.2, Just(Obstacle::new("no")))
}

fn any_end(node: &'static str) -> impl proptest::strategy::Strategy<Value = End> {
    let unfit = prop::option::weighted(0.2, Just("no CRIU".to_owned()));
    (1_u32..3, unfit, any::<bool>(), any::<bool>(), any::<Option<bool>>()).prop_map(
        move |(version, unfit, post_copy, cold, tracks_writes)| End {
            node: node.to_owned(),
            version,
            unfit,
            post_copy,
            cold,
            tracks_writes,
        },
    )
}

fn any_case() -> impl proptest::strategy::Strategy<Value = Case> {
    let sizes = (0_u64..2000, 0_u64..2000, 0_u64..200, any::<bool>());
    let said = (any_obstacle(), any_obstacle());
    let refused = prop::collection::btree_map(prop::sample::select(CHOICES.to_vec()), Just(Obstacle::new("no")), 0..5);
    (any_end("a"), any_end("b"), sizes, said, refused).prop_map(|(source, target, sizes, said, refused)| {
        let (memory, followed, layer, tells) = sizes;
        let mut response = facts(memory, followed.min(memory));
        response.layer_bytes = layer * MIB;
        response.tracking = response.tracking.filter(|_| tells);
        let (carried, restarted) = said;
        Case {
            source,
            target,
            carried: carried.map_or(Ok(response), Err),
            restarted: restarted.map_or(Ok(v1::PreflightSourceResponse::default()), Err),
            refused,
        }
    })
}

fn any_goals() -> impl proptest::strategy::Strategy<Value = Goals> {
    let past = prop::option::of((0.1_f64..1e5, 1e3_f64..1e9, any::<bool>()));
    let flags = (any::<bool>(), any::<bool>(), prop::bool::weighted(0.2), prop::bool::weighted(0.2));
    let limit = prop_oneof![Just(0_u64), (64_u64 << 10)..(1 << 30)];
    (flags, 1.0_f64..60_000.0, limit, past).prop_map(|(flags, budget_ms, bandwidth_limit, past)| {
        let (accept_loss, allow_restart, verify, only_cold) = flags;
        let past = past.map(|(left_ms, rate, converged)| Past { left_ms, rate, converged });
        let only_cold = only_cold.then(|| "its CPU lacks avx2".to_owned());
        Goals { auto: Auto { accept_loss, allow_restart, only_cold, past }, budget_ms, bandwidth_limit, verify }
    })
}

proptest! {
    #[test]
    fn what_is_chosen_can_work_and_is_allowed_and_nothing_is_refused_that_could(case in any_case(), goals in any_goals()) {
        let allowed = |strategy: Strategy| {
            let (source, target) = (&case.source, &case.target);
            let cold = strategy == Strategy::Cold;
            let path = strategy.path();
            let old = (path.pre_copy || path.fill) && (source.version < 2 || target.version < 2);
            let limited = goals.bandwidth_limit > 0 && source.version < 2;
            let loss = !path.post_copy || (goals.auto.accept_loss && source.post_copy && target.post_copy);
            let restart = !cold || (goals.auto.allow_restart && source.cold && target.cold && case.restarted.is_ok());
            let dump = cold
                || (case.carried.is_ok() && goals.auto.only_cold.is_none() && source.unfit.is_none() && target.unfit.is_none());
            !old && !limited && loss && restart && dump
                && !case.refused.contains_key(&strategy)
                && (!goals.verify || strategy == Strategy::Live)
        };
        let possible: Vec<_> = CHOICES.into_iter().filter(|strategy| allowed(*strategy)).collect();
        match case.chosen(&goals) {
            Ok(choice) => {
                prop_assert!(possible.contains(&choice.strategy), "{choice:?} of {possible:?}");
                prop_assert!(choice.strategy != Strategy::Cold || possible == [Strategy::Cold], "{possible:?}");
                let begins = choice.reason.starts_with(&format!("{}: ", choice.strategy));
                prop_assert!(begins, "{choice:?}");
            }
            Err(failure) => {
                prop_assert!(possible.is_empty(), "{failure} although {possible:?}");
                prop_assert!(CHOICES.iter().all(|strategy| failure.message.contains(strategy.as_str())), "{failure}");
            }
        }
    }

    #[test]
    fn allowing_more_never_takes_a_strategy_away(case in any_case(), goals in any_goals()) {
        let strict = Auto { accept_loss: false, allow_restart: false, ..goals.auto.clone() };
        let strict = Goals { auto: strict, ..goals.clone() };
        if case.chosen(&strict).is_ok() {
            prop_assert!(case.chosen(&goals).is_ok());
        }
    }
}
