//! What a migration of a pod asks for, by itself and by the policies of the pod.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Pod;
use kube::api::ListParams;
use kube::core::{Selector, SelectorExt as _};
use kube::{Api, Client, ResourceExt as _};
use podferry_common::{Failure, FailureCode};
use podferry_crds::{Connections, Limits, MigrationPolicy, MigrationSpec, Strategy, Wishes};
use podferry_proto::v1;
use thiserror::Error;

use super::refused as not_done;
use crate::store::pod_of;

/// The downtime that is aimed at when nobody says one, in milliseconds.
const DOWNTIME_BUDGET_MS: i32 = 100;

/// Why the policies of a pod are not known.
#[derive(Debug, Error)]
pub(crate) enum PolicyError {
    /// The API server does not say it.
    #[error("the API server does not {action}")]
    Api {
        /// What.
        action: &'static str,
        /// Why not.
        source: kube::Error,
    },
    /// One of them may or may not select it.
    #[error("the selector of the MigrationPolicy {policy} is wrong: {why}")]
    Selector {
        /// Which.
        policy: String,
        /// What is wrong with it.
        why: String,
    },
}

impl PolicyError {
    /// For whoever asked for a migration.
    pub(crate) fn failure(&self) -> Failure {
        match self {
            Self::Api { source, .. } => not_done("the policies of the pod cannot be read", source),
            Self::Selector { .. } => refused(self.to_string(), "correct the policy"),
        }
    }
}

/// The policies that select a pod. One that is not there has no labels.
pub(crate) async fn policies_of(
    client: &Client,
    namespace: &str,
    pod: &str,
) -> Result<Vec<MigrationPolicy>, PolicyError> {
    let failed = |action| move |source| PolicyError::Api { action, source };
    let policies: Api<MigrationPolicy> = Api::namespaced(client.clone(), namespace);
    let all = policies.list(&ListParams::default()).await.map_err(failed("list the MigrationPolicies"))?.items;
    if all.is_empty() {
        return Ok(all);
    }
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let found = pods.get_metadata_opt(pod).await.map_err(failed("get the pod"))?;
    let labels = found.and_then(|pod| pod.metadata.labels).unwrap_or_default();
    all.into_iter().filter_map(|policy| selecting(policy, &labels).transpose()).collect()
}

/// A policy, if it selects what has such labels.
fn selecting(
    policy: MigrationPolicy,
    labels: &BTreeMap<String, String>,
) -> Result<Option<MigrationPolicy>, PolicyError> {
    match Selector::try_from(policy.spec.pod_selector.clone()) {
        Ok(selector) => Ok(selector.matches(labels).then_some(policy)),
        Err(error) => Err(PolicyError::Selector { policy: policy.name_any(), why: error.to_string() }),
    }
}

/// A request that did not come from an object, as the policies of its pod have it; as it is where it is about no pod. `of_many`: the same was
/// wished of other pods, too, and gives way to what a policy does not allow of this one.
///
/// # Errors
/// When a policy forbids it, or they are not known.
pub(super) async fn as_policies_say(
    client: &Client,
    asked: &v1::MigrateRequest,
    of_many: bool,
) -> Result<v1::MigrateRequest, Failure> {
    let Some((namespace, pod)) = pod_of(&asked.workload) else { return Ok(asked.clone()) };
    let policies = policies_of(client, namespace, pod).await.map_err(|error| error.failure())?;
    by_policies(asked, pod, &policies, of_many)
}

fn by_policies(
    asked: &v1::MigrateRequest,
    pod: &str,
    policies: &[MigrationPolicy],
    of_many: bool,
) -> Result<v1::MigrateRequest, Failure> {
    if policies.is_empty() {
        return Ok(asked.clone());
    }
    let (pod_name, mut wishes) = (pod.to_owned(), wishes_of(asked));
    let budget_ms = wishes.downtime_budget_ms.map(f64::from);
    for policy in policies.iter().filter(|_| of_many) {
        give_way(&mut wishes, &policy.spec.limits);
    }
    let target_node = Some(asked.target.clone()).filter(|target| !target.is_empty());
    let spec = MigrationSpec { pod_name, target_node, wishes, ..MigrationSpec::default() };
    let mut request = request_of(asked.workload.clone(), &spec, policies)?;
    if budget_ms == Some(request.downtime_budget_ms) {
        // It may have been asked for to a fraction of a millisecond.
        request.downtime_budget_ms = asked.downtime_budget_ms;
    }
    Ok(request)
}

fn give_way(wishes: &mut Wishes, limits: &Limits) {
    if limits.allow_loss == Some(false) {
        wishes.accept_loss = None;
        if matches!(wishes.strategy, Some(Strategy::PostCopy | Strategy::Hybrid)) {
            // The fastest that risks nothing, which knows none of the others' wishes.
            let Wishes { bandwidth_limit, compress, .. } = *wishes;
            *wishes = Wishes { strategy: Some(Strategy::Warm), bandwidth_limit, compress, ..Wishes::default() };
        }
    }
    if limits.allow_restart == Some(false) && wishes.allow_restart.take().is_some() {
        wishes.grace_period_seconds = None;
    }
    if let (Some(most), Some(asked)) = (limits.max_downtime_budget_ms, wishes.downtime_budget_ms) {
        wishes.downtime_budget_ms = Some(asked.min(most));
    }
}

/// What a request says, as an object would. That the coordinator chooses is what it does when nobody says anything.
fn wishes_of(asked: &v1::MigrateRequest) -> Wishes {
    let strategy = match asked.strategy() {
        v1::Strategy::Auto => None,
        v1::Strategy::Unspecified | v1::Strategy::Warm => Some(Strategy::Warm),
        v1::Strategy::Cold => Some(Strategy::Cold),
        v1::Strategy::Live => Some(Strategy::Live),
        v1::Strategy::Postcopy => Some(Strategy::PostCopy),
        v1::Strategy::Hybrid => Some(Strategy::Hybrid),
        v1::Strategy::Application => Some(Strategy::Application),
    };
    Wishes {
        strategy,
        downtime_budget_ms: format!("{:.0}", asked.downtime_budget_ms.ceil()).parse().ok().filter(|ms| *ms > 0),
        bandwidth_limit: i64::try_from(asked.bandwidth_limit).ok().filter(|limit| *limit > 0),
        verify: asked.verify.then_some(true),
        throttle: asked.throttle.then_some(true),
        accept_loss: asked.accept_loss.then_some(true),
        allow_restart: asked.allow_restart.then_some(true),
        grace_period_seconds: asked.grace_period_s.and_then(|seconds| i32::try_from(seconds).ok()),
        connections: match asked.connections() {
            v1::Connections::Unspecified => None,
            v1::Connections::Keep => Some(Connections::Keep),
            v1::Connections::Close => Some(Connections::Close),
        },
        connections_deadline_seconds: i32::try_from(asked.connections_deadline_s).ok().filter(|seconds| *seconds > 0),
        compress: asked.no_compression.then_some(false),
    }
}

/// What to ask of the coordinator's core. `policies` are those that select the pod, in any order.
///
/// # Errors
/// When a policy forbids it, or the one that is named is not among them.
pub(crate) fn request_of(
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
    leave_out_what_closes_or_keeps(wishes, asked);
}

/// A restart that is allowed and connections that are kept exclude each other: what is asked for goes before a default, and among
/// defaults the one that loses nothing.
fn leave_out_what_closes_or_keeps(wishes: &mut Wishes, asked: &Wishes) {
    let anew = matches!(wishes.strategy, Some(Strategy::Cold | Strategy::Application));
    let restarts = anew || asked.allow_restart == Some(true);
    if wishes.connections == Some(Connections::Keep) && restarts {
        wishes.connections = asked.connections;
    } else if wishes.connections == Some(Connections::Keep) {
        wishes.allow_restart = asked.allow_restart;
    }
    if anew || wishes.connections == Some(Connections::Close) {
        wishes.connections_deadline_seconds = asked.connections_deadline_seconds;
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
        connections: fate(wishes.connections).into(),
        connections_deadline_s: seconds(wishes.connections_deadline_seconds),
    }
}

pub(crate) fn fate(connections: Option<Connections>) -> v1::Connections {
    match connections.unwrap_or_default() {
        Connections::Auto => v1::Connections::Unspecified,
        Connections::Keep => v1::Connections::Keep,
        Connections::Close => v1::Connections::Close,
    }
}

pub(crate) fn seconds(wish: Option<i32>) -> u32 {
    wish.and_then(|seconds| u32::try_from(seconds).ok()).unwrap_or_default()
}

pub(crate) fn wire(strategy: Strategy) -> v1::Strategy {
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
    fn policies_count_for_a_request_that_came_from_no_object() {
        let asked = v1::MigrateRequest {
            workload: "shop/cart-0".to_owned(),
            target: "b".to_owned(),
            strategy: v1::Strategy::Auto.into(),
            downtime_budget_ms: 49.5,
            bandwidth_limit: 1 << 20,
            ..v1::MigrateRequest::default()
        };
        let by = |policies: &[MigrationPolicy]| by_policies(&asked, "cart-0", policies, false);
        assert_eq!(by(&[]).as_ref(), Ok(&asked));
        let silent = policy("silent", Wishes::default(), Limits::default());
        assert_eq!(by(&[silent]).as_ref(), Ok(&asked), "it is said as it was, to the fraction");
        let defaults = Wishes { strategy: Some(Strategy::Live), verify: Some(true), ..Wishes::default() };
        let limits = Limits { max_downtime_budget_ms: Some(60), max_bandwidth: Some(1 << 18), ..Limits::default() };
        let said = by(&[policy("live", defaults, limits)]).unwrap();
        assert_eq!((said.strategy(), said.verify, said.bandwidth_limit), (v1::Strategy::Live, true, 1 << 18));
        assert_eq!((said.target.as_str(), said.downtime_budget_ms.to_bits()), ("b", 49.5_f64.to_bits()));
        let limits = Limits { movable: Some(false), ..Limits::default() };
        by(&[policy("stays", Wishes::default(), limits)]).unwrap_err();
    }

    #[test]
    fn what_is_wished_of_many_pods_gives_way_to_the_policy_of_one() {
        let limits = Limits {
            allow_loss: Some(false),
            allow_restart: Some(false),
            max_downtime_budget_ms: Some(50),
            ..Limits::default()
        };
        let policies = [policy("careful", Wishes::default(), limits)];
        let asked = v1::MigrateRequest {
            workload: "shop/cart-0".to_owned(),
            strategy: v1::Strategy::Auto.into(),
            downtime_budget_ms: 200.0,
            accept_loss: true,
            allow_restart: true,
            grace_period_s: Some(5),
            ..v1::MigrateRequest::default()
        };
        by_policies(&asked, "cart-0", &policies, false).unwrap_err();
        let said = by_policies(&asked, "cart-0", &policies, true).unwrap();
        assert_eq!((said.strategy(), said.accept_loss, said.allow_restart), (v1::Strategy::Auto, false, false));
        assert_eq!((said.grace_period_s, said.downtime_budget_ms.to_bits()), (None, 50.0_f64.to_bits()));
        let hurried = v1::MigrateRequest { strategy: v1::Strategy::Postcopy.into(), ..asked };
        let said = by_policies(&hurried, "cart-0", &policies, true).unwrap();
        assert_eq!((said.strategy(), said.downtime_budget_ms.to_bits()), (v1::Strategy::Warm, 0.0_f64.to_bits()));
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
            connections: Some(Connections::Close),
            connections_deadline_seconds: Some(60),
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
            connections: v1::Connections::Close.into(),
            connections_deadline_s: 60,
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
    fn a_restart_that_is_asked_for_goes_before_connections_that_a_policy_keeps_and_not_before_those_that_are_asked_for()
    {
        let of = |restart: Option<bool>, connections: Option<Connections>| Wishes {
            allow_restart: restart,
            connections,
            ..Wishes::default()
        };
        let of_both = |asked: Wishes, default: Wishes| {
            let asked = MigrationSpec { wishes: asked, ..spec() };
            let request = asks(&asked, &[policy("all", default, Limits::default())]).unwrap();
            (request.allow_restart, request.connections())
        };
        let (keep, close) = (Some(Connections::Keep), Some(Connections::Close));
        let (kept, closed) = (v1::Connections::Keep, v1::Connections::Close);
        assert_eq!(of_both(of(None, None), of(None, keep)), (false, kept));
        assert_eq!(of_both(of(Some(true), None), of(None, keep)), (true, v1::Connections::Unspecified));
        assert_eq!(of_both(of(None, keep), of(Some(true), None)), (false, kept));
        assert_eq!(of_both(of(None, None), of(Some(true), keep)), (false, kept));
        assert_eq!(of_both(of(None, close), of(Some(true), keep)), (true, closed));
        let torn = of_both(of(Some(true), keep), Wishes::default());
        assert_eq!(torn, (true, kept), "what makes no sense is refused by the core, which says why");
        let cold = Wishes { strategy: Some(Strategy::Cold), ..Wishes::default() };
        assert_eq!(of_both(cold, of(None, keep)).1, v1::Connections::Unspecified);
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
