//! All evictions in one table each: those of pods as they are, those of pods that have been tried, and those that came before.

use podferry_common::FailureCode;
use serde_json::{Value, json};

use super::*;
use crate::testing::merge;

const NOW: i64 = 1_000_000;
const PATIENCE: SignedDuration = SignedDuration::from_secs(600);

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

fn pod(change: Value) -> Pod {
    let mut pod = json!({
        "metadata": { "name": "web-1", "namespace": "shop", "uid": "u-1", "creationTimestamp": "1970-01-12T13:00:00Z" },
        "spec": { "runtimeClassName": "podferry", "nodeName": "a", "containers": [{ "name": "web" }] },
        "status": { "phase": "Running" },
    });
    merge(&mut pod, change);
    serde_json::from_value(pod).unwrap()
}

fn known(pod: Option<&Pod>) -> Known<'_> {
    Known {
        pod,
        wanted_uid: None,
        dry_run: false,
        node_takes_part: true,
        under_way: None,
        before: None,
        strategy: Ok(Strategy::Warm),
        patience: PATIENCE,
        now: at(NOW),
    }
}

fn attempt(title: &str, seconds_ago: i64, failed: Option<&str>) -> Attempt {
    Attempt { title: title.to_owned(), begun_at: at(NOW - seconds_ago), failed: failed.map(ToOwned::to_owned) }
}

/// What is counted of it.
fn word(verdict: &Verdict) -> &'static str {
    match verdict {
        Verdict::Begin => "begin",
        Verdict::Wait(_) => "wait",
        Verdict::Allow(why) => why.word(),
    }
}

#[test]
fn a_pod_is_moved_or_evicted_by_what_it_is() {
    for (change, expected) in [
        (json!({}), "begin"),
        (json!({ "spec": { "runtimeClassName": null } }), "not_ours"),
        (json!({ "spec": { "runtimeClassName": "gvisor" } }), "not_ours"),
        (json!({ "metadata": { "deletionTimestamp": "1970-01-12T13:46:00Z" } }), "ending"),
        (json!({ "status": { "phase": "Succeeded" } }), "ending"),
        (json!({ "status": { "phase": "Failed" } }), "ending"),
        (json!({ "status": { "phase": "Pending" } }), "not_running"),
        (json!({ "spec": { "hostNetwork": true } }), "cannot_move"),
        (json!({ "spec": { "volumes": [{ "name": "d", "hostPath": { "path": "/d" } }] } }), "cannot_move"),
    ] {
        let pod = pod(change.clone());
        assert_eq!(word(&decide(&known(Some(&pod)))), expected, "{change}");
    }
    assert_eq!(word(&decide(&known(None))), "gone");
}

#[test]
fn a_pod_of_another_uid_than_the_evictor_means_is_not_touched() {
    let pod = pod(json!({}));
    let of = |uid| word(&decide(&Known { wanted_uid: Some(uid), ..known(Some(&pod)) }));
    assert_eq!((of("u-1"), of("u-0")), ("begin", "gone"));
}

#[test]
fn node_and_policy_must_allow_it() {
    let pod = pod(json!({}));
    assert_eq!(word(&decide(&Known { node_takes_part: false, ..known(Some(&pod)) })), "node");
    let no = || Err(Failure::new(FailureCode::FailedPrecondition, "the MigrationPolicy stays does not allow it"));
    let forbidden = decide(&Known { strategy: no(), ..known(Some(&pod)) });
    assert_eq!(word(&forbidden), "policy");
    let Verdict::Allow(why) = forbidden else { panic!("{forbidden:?}") };
    assert!(why.warning().unwrap().contains("MigrationPolicy stays"), "{why:?}");
    assert_eq!(word(&decide(&Known { strategy: Ok(Strategy::Cold), ..known(Some(&pod)) })), "cannot_move");
}

#[test]
fn while_a_migration_is_under_way_an_eviction_waits_and_begins_none() {
    let pod = pod(json!({}));
    let ours = Known { before: Some(attempt("Migration evicted-u-1", 30, None)), ..known(Some(&pod)) };
    assert_eq!(decide(&ours), Verdict::Wait(attempt("Migration evicted-u-1", 30, None)));
    let anybodys = Known { under_way: Some(attempt("migration m-1", 30, None)), ..known(Some(&pod)) };
    assert_eq!(decide(&anybodys), Verdict::Wait(attempt("migration m-1", 30, None)));
    // What would keep it from being begun keeps nobody from waiting for it.
    let since = Known { node_takes_part: false, ..anybodys };
    assert_eq!(word(&decide(&since)), "wait");
}

#[test]
fn an_eviction_is_put_off_for_a_bounded_time_from_the_first_one_on() {
    let pod = pod(json!({}));
    let ours = |ago| Known { before: Some(attempt("m", ago, None)), ..known(Some(&pod)) };
    assert_eq!((word(&decide(&ours(599))), word(&decide(&ours(600)))), ("wait", "out_of_patience"));
    // It waited for its turn, which does not begin the time anew.
    let turn = Known { under_way: Some(attempt("own", 5, None)), ..ours(600) };
    assert_eq!(word(&decide(&turn)), "out_of_patience");
    let Verdict::Allow(why) = decide(&ours(601)) else { panic!() };
    assert!(why.warning().unwrap().contains("in 600 s"), "{why:?}");
}

#[test]
fn what_has_failed_is_not_tried_again_but_what_others_do_meanwhile_is_waited_for() {
    let pod = pod(json!({}));
    let failed = || Some(attempt("Migration evicted-u-1", 900, Some("no node has room")));
    let alone = decide(&Known { before: failed(), ..known(Some(&pod)) });
    let Verdict::Allow(why) = &alone else { panic!("{alone:?}") };
    assert_eq!(why.word(), "has_failed");
    assert!(why.warning().unwrap().contains("evicted-u-1 was tried already: no node has room"), "{why:?}");
    let others = Known { before: failed(), under_way: Some(attempt("m", 10, None)), ..known(Some(&pod)) };
    assert_eq!(word(&decide(&others)), "wait");
}

#[test]
fn a_pod_that_arrives_is_waited_for_since_it_was_made() {
    // Made 2800 s ago.
    let arriving = pod(json!({ "metadata": { "annotations": { "podferry.dev/migration": "m-1" } } }));
    let patient = Known { patience: SignedDuration::from_secs(3000), ..known(Some(&arriving)) };
    assert_eq!(decide(&patient), Verdict::Wait(attempt("migration m-1", 2800, None)));
    assert_eq!(word(&decide(&known(Some(&arriving)))), "out_of_patience");
}

#[test]
fn a_dry_run_begins_nothing_and_says_what_would_be() {
    let movable = pod(json!({}));
    let dry = |known: Known<'_>| decide(&Known { dry_run: true, ..known });
    assert_eq!(dry(known(Some(&movable))), Verdict::Allow(Why::DryRun));
    assert_eq!(
        dry(Known { before: Some(attempt("m", 1, None)), ..known(Some(&movable)) }),
        Verdict::Allow(Why::DryRun)
    );
    assert!(Why::DryRun.warning().unwrap().contains("would move"));
    let other = pod(json!({ "spec": { "runtimeClassName": null } }));
    assert_eq!(dry(known(Some(&other))), Verdict::Allow(Why::NotOurs));
}

#[test]
fn who_evicts_a_pod_that_is_none_of_ours_hears_nothing_of_us() {
    for why in [Why::Gone, Why::NotOurs, Why::Ending] {
        assert_eq!(why.warning(), None, "{why:?}");
    }
    for why in [Why::NotRunning, Why::Node, Why::Unknown("the API server is away".to_owned())] {
        assert!(why.warning().unwrap().starts_with("podferry does not move this pod, and it is evicted: "), "{why:?}");
    }
}
