//! What a Migration asks for, by itself and by the policies of its pod.

use podferry_common::{Failure, FailureCode};
use podferry_crds::{Limits, MigrationPolicy, MigrationSpec, Strategy, Wishes};
use podferry_proto::v1;

use kube::ResourceExt as _;

/// The downtime that is aimed at when nobody says one, in milliseconds.
const DOWNTIME_BUDGET_MS: i32 = 100;

/// What to ask of the coordinator's core. `policies` are those that select the pod, in any order.
///
/// # Errors
/// When a policy forbids it, or the one that is named is not among them.
pub(super) fn request_of(
    workload: String,
    spec: &MigrationSpec,
    policies: &[MigrationPolicy],
) -> Result<v1::MigrateRequest, Failure> {
    let mut sorted: Vec<_> = policies.iter().collect();
    sorted.sort_by_key(|policy| policy.name_any());
    let mut wishes = spec.wishes.clone();
    for policy in defaults(spec, &sorted)? {
        wishes = wishes.or(&policy.spec.defaults);
    }
    leave_out_what_does_not_fit(&mut wishes, &spec.wishes);
    for policy in sorted {
        limit(&mut wishes, &policy.spec.limits, &policy.name_any())?;
    }
    Ok(request(workload, spec, &wishes))
}

/// The policies whose defaults count, the first first.
fn defaults<'p>(spec: &MigrationSpec, sorted: &[&'p MigrationPolicy]) -> Result<Vec<&'p MigrationPolicy>, Failure> {
    let Some(named) = &spec.policy else { return Ok(sorted.to_vec()) };
    let found = sorted.iter().find(|policy| policy.name_any() == *named).copied();
    found.map(|policy| vec![policy]).ok_or_else(|| {
        let pod = &spec.pod_name;
        let message = format!("there is no MigrationPolicy {named} in this namespace that selects the pod {pod}");
        refused(message, "name another policy, or none; or make one that selects the pod")
    })
}

/// A default is for the strategies that know it; only what the migration asks for itself has to make sense.
fn leave_out_what_does_not_fit(wishes: &mut Wishes, asked: &Wishes) {
    let strategy = wishes.strategy.unwrap_or_default();
    let is_one_of = |some: &[Strategy]| some.contains(&strategy);
    if !copies_beforehand(strategy) {
        wishes.downtime_budget_ms = asked.downtime_budget_ms;
        wishes.throttle = asked.throttle;
    }
    if !is_one_of(&[Strategy::Auto, Strategy::Live]) {
        wishes.verify = asked.verify;
    }
    if !is_one_of(&[Strategy::Auto, Strategy::Cold]) {
        wishes.allow_restart = asked.allow_restart;
    }
    let may_stop = match strategy {
        Strategy::Auto => wishes.allow_restart == Some(true),
        Strategy::Cold | Strategy::Application => true,
        Strategy::Warm | Strategy::Live | Strategy::PostCopy | Strategy::Hybrid => false,
    };
    if !may_stop {
        wishes.grace_period_seconds = asked.grace_period_seconds;
    }
}

/// Whether it copies memory while the pod runs, or may be another that does.
fn copies_beforehand(strategy: Strategy) -> bool {
    matches!(strategy, Strategy::Auto | Strategy::Live | Strategy::Hybrid)
}

fn limit(wishes: &mut Wishes, limits: &Limits, policy: &str) -> Result<(), Failure> {
    let strategy = wishes.strategy.unwrap_or_default();
    let forbids = |what: &str| {
        let remedy = format!("ask for something else, or whoever keeps the MigrationPolicy {policy} to allow it");
        Err(refused(format!("the MigrationPolicy {policy} does not allow {what}"), &remedy))
    };
    if limits.movable == Some(false) {
        return forbids("that this pod is moved");
    }
    let risks = matches!(strategy, Strategy::PostCopy | Strategy::Hybrid) || wishes.accept_loss == Some(true);
    if limits.allow_loss == Some(false) && risks {
        return forbids("what risks the pod's memory (PostCopy, Hybrid, acceptLoss)");
    }
    let ends = matches!(strategy, Strategy::Cold | Strategy::Application) || wishes.allow_restart == Some(true);
    if limits.allow_restart == Some(false) && ends {
        return forbids("what ends the pod's processes (Cold, Application, allowRestart)");
    }
    match (limits.max_downtime_budget_ms, wishes.downtime_budget_ms) {
        (Some(most), Some(asked)) if asked > most => {
            return forbids(&format!("a downtime of more than {most} ms to be aimed at"));
        }
        (Some(most), None) if copies_beforehand(strategy) => {
            wishes.downtime_budget_ms = Some(most.min(DOWNTIME_BUDGET_MS));
        }
        _ => {}
    }
    if let Some(most) = limits.max_bandwidth {
        wishes.bandwidth_limit = Some(wishes.bandwidth_limit.map_or(most, |asked| asked.min(most)));
    }
    Ok(())
}

fn refused(message: String, remedy: &str) -> Failure {
    Failure::new(FailureCode::FailedPrecondition, message).in_phase("preflight").remedy(remedy)
}

fn request(workload: String, spec: &MigrationSpec, wishes: &Wishes) -> v1::MigrateRequest {
    let said = |flag: Option<bool>| flag.unwrap_or_default();
    v1::MigrateRequest {
        workload,
        target: spec.target_node.clone().unwrap_or_default(),
        strategy: wire(wishes.strategy.unwrap_or_default()).into(),
        no_compression: wishes.compress == Some(false),
        downtime_budget_ms: wishes.downtime_budget_ms.map_or(0.0, f64::from),
        bandwidth_limit: wishes.bandwidth_limit.and_then(|limit| u64::try_from(limit).ok()).unwrap_or_default(),
        verify: said(wishes.verify),
        accept_loss: said(wishes.accept_loss),
        throttle: said(wishes.throttle),
        grace_period_s: wishes.grace_period_seconds.and_then(|seconds| u32::try_from(seconds).ok()),
        allow_restart: said(wishes.allow_restart),
    }
}

fn wire(strategy: Strategy) -> v1::Strategy {
    match strategy {
        Strategy::Auto => v1::Strategy::Auto,
        Strategy::Cold => v1::Strategy::Cold,
        Strategy::Warm => v1::Strategy::Warm,
        Strategy::Live => v1::Strategy::Live,
        Strategy::PostCopy => v1::Strategy::Postcopy,
        Strategy::Hybrid => v1::Strategy::Hybrid,
        Strategy::Application => v1::Strategy::Application,
    }
}

#[cfg(test)]
mod tests {
    use podferry_crds::MigrationPolicySpec;

    use super::*;

    fn policy(name: &str, defaults: Wishes, limits: Limits) -> MigrationPolicy {
        let spec = MigrationPolicySpec { defaults, limits, ..MigrationPolicySpec::default() };
        MigrationPolicy::new(name, spec)
    }

    fn asks(spec: &MigrationSpec, policies: &[MigrationPolicy]) -> Result<v1::MigrateRequest, String> {
        request_of("shop/cart-0".to_owned(), spec, policies).map_err(|failure| failure.to_string())
    }

    fn spec() -> MigrationSpec {
        MigrationSpec { pod_name: "cart-0".to_owned(), ..MigrationSpec::default() }
    }

    #[test]
    fn without_a_word_the_coordinator_chooses() {
        let request = asks(&spec(), &[]).unwrap();
        assert_eq!((request.strategy(), request.target.as_str()), (v1::Strategy::Auto, ""));
        assert!(!request.no_compression && request.grace_period_s.is_none());
    }

    #[test]
    fn all_that_a_request_can_say_can_be_said() {
        let wishes = Wishes {
            strategy: Some(Strategy::Cold),
            downtime_budget_ms: Some(250),
            bandwidth_limit: Some(1 << 20),
            verify: Some(true),
            throttle: Some(true),
            accept_loss: Some(true),
            allow_restart: Some(true),
            grace_period_seconds: Some(0),
            compress: Some(false),
        };
        let all = MigrationSpec { target_node: Some("b".to_owned()), wishes, ..spec() };
        let request = v1::MigrateRequest {
            workload: "shop/cart-0".to_owned(),
            target: "b".to_owned(),
            strategy: v1::Strategy::Cold.into(),
            no_compression: true,
            downtime_budget_ms: 250.0,
            bandwidth_limit: 1 << 20,
            verify: true,
            accept_loss: true,
            throttle: true,
            grace_period_s: Some(0),
            allow_restart: true,
        };
        assert_eq!(asks(&all, &[]), Ok(request));
    }

    #[test]
    fn the_first_policy_that_says_something_counts_and_a_migration_counts_more() {
        let of =
            |strategy, budget| Wishes { strategy: Some(strategy), downtime_budget_ms: budget, ..Wishes::default() };
        let policies = [
            policy("b", of(Strategy::Warm, Some(50)), Limits::default()),
            policy("a", of(Strategy::Live, None), Limits::default()),
        ];
        let request = asks(&spec(), &policies).unwrap();
        assert_eq!(
            (request.strategy(), request.downtime_budget_ms.to_bits()),
            (v1::Strategy::Live, 50.0_f64.to_bits())
        );
        let named = MigrationSpec { policy: Some("b".to_owned()), ..spec() };
        assert_eq!(asks(&named, &policies).unwrap().strategy(), v1::Strategy::Warm);
        let mut says = spec();
        says.wishes.strategy = Some(Strategy::Cold);
        assert_eq!(asks(&says, &policies).unwrap().strategy(), v1::Strategy::Cold);
    }

    #[test]
    fn a_default_that_a_strategy_does_not_know_is_left_out() {
        let defaults = Wishes {
            downtime_budget_ms: Some(50),
            throttle: Some(true),
            verify: Some(true),
            grace_period_seconds: Some(60),
            allow_restart: Some(true),
            ..Wishes::default()
        };
        let policies = [policy("all", defaults, Limits::default())];
        let of = |strategy| {
            let mut asked = spec();
            asked.wishes.strategy = Some(strategy);
            let request = asks(&asked, &policies).unwrap();
            let flags = [request.throttle, request.verify, request.allow_restart].map(u8::from);
            (request.downtime_budget_ms.to_string(), flags, request.grace_period_s)
        };
        assert_eq!(of(Strategy::Auto), ("50".into(), [1, 1, 1], Some(60)));
        assert_eq!(of(Strategy::Warm), ("0".into(), [0, 0, 0], None));
        assert_eq!(of(Strategy::Hybrid), ("50".into(), [1, 0, 0], None));
        assert_eq!(of(Strategy::Cold), ("0".into(), [0, 0, 1], Some(60)));
        let mut asked = spec();
        (asked.wishes.strategy, asked.wishes.verify) = (Some(Strategy::Warm), Some(true));
        assert!(asks(&asked, &[]).unwrap().verify, "what makes no sense is refused by the core, which says why");
    }

    #[test]
    fn what_a_policy_does_not_allow_is_refused_whoever_asks_for_it() {
        let limits = |limits: Limits| [policy("shop", Wishes::default(), limits)];
        let asked = |change: &dyn Fn(&mut Wishes)| {
            let mut asked = spec();
            change(&mut asked.wishes);
            asked
        };
        let mut missing = spec();
        missing.policy = Some("none".to_owned());
        let said = [
            asks(&missing, &[]),
            asks(&spec(), &limits(Limits { movable: Some(false), ..Limits::default() })),
            asks(
                &asked(&|wishes| wishes.accept_loss = Some(true)),
                &limits(Limits { allow_loss: Some(false), ..Limits::default() }),
            ),
            asks(
                &asked(&|wishes| wishes.strategy = Some(Strategy::Cold)),
                &limits(Limits { allow_restart: Some(false), ..Limits::default() }),
            ),
            asks(
                &asked(&|wishes| wishes.downtime_budget_ms = Some(500)),
                &limits(Limits { max_downtime_budget_ms: Some(100), ..Limits::default() }),
            ),
        ];
        let said: Vec<_> = said.into_iter().map(Result::unwrap_err).collect();
        insta::assert_snapshot!(said.join("\n"), @"
        there is no MigrationPolicy none in this namespace that selects the pod cart-0 (in preflight); what to do: name another policy, or none; or make one that selects the pod
        the MigrationPolicy shop does not allow that this pod is moved (in preflight); what to do: ask for something else, or whoever keeps the MigrationPolicy shop to allow it
        the MigrationPolicy shop does not allow what risks the pod's memory (PostCopy, Hybrid, acceptLoss) (in preflight); what to do: ask for something else, or whoever keeps the MigrationPolicy shop to allow it
        the MigrationPolicy shop does not allow what ends the pod's processes (Cold, Application, allowRestart) (in preflight); what to do: ask for something else, or whoever keeps the MigrationPolicy shop to allow it
        the MigrationPolicy shop does not allow a downtime of more than 100 ms to be aimed at (in preflight); what to do: ask for something else, or whoever keeps the MigrationPolicy shop to allow it
        ");
        let request = asks(&spec(), &limits(Limits { max_bandwidth: Some(1 << 20), ..Limits::default() })).unwrap();
        assert_eq!(request.bandwidth_limit, 1 << 20);
        let request = asks(&spec(), &limits(Limits { max_downtime_budget_ms: Some(20), ..Limits::default() })).unwrap();
        assert_eq!(request.downtime_budget_ms.to_bits(), 20.0_f64.to_bits());
    }
}
