//! The decision.

use std::fmt;

use podferry_common::identity::Peer;
use podferry_common::{Failure, FailureCode};

use super::action::{Action, Open};
use super::policy::{Grant, Policy, Role};

/// Why a request is allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grounds {
    /// The protocol is open to this kind of peer in this, whatever the policy says.
    Protocol,
    /// There is no policy: all clients may do everything.
    NoPolicy,
    /// A grant of the policy.
    Grant {
        /// Its line in the file.
        line: usize,
        /// Its role.
        role: Role,
    },
}

impl fmt::Display for Grounds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Protocol => f.write_str("open to its kind of peer"),
            Self::NoPolicy => f.write_str("there is no access policy"),
            Self::Grant { line, role } => write!(f, "role {}, granted on line {line}", role.as_str()),
        }
    }
}

/// Why a request is denied, and what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Denial {
    /// Who asked for what.
    pub what: String,
    /// What is missing.
    pub why: String,
    /// What a person can do.
    pub remedy: String,
}

impl From<Denial> for Failure {
    fn from(Denial { what, why, remedy }: Denial) -> Self {
        Self::new(FailureCode::PermissionDenied, format!("{what}: {why}")).remedy(remedy)
    }
}

/// Whether `peer` may do `action`; `None` is somebody without a certificate. What is not known of an action yet does not
/// stand against it: ask again when it is known. Who is allowed an action then was allowed it before, too.
pub fn decide(policy: Option<&Policy>, peer: Option<&Peer>, action: &Action<'_>) -> Result<Grounds, Denial> {
    let asked = Asked { peer, action };
    match (peer, action.verb.open()) {
        (Some(Peer::Client(_) | Peer::Agent(_)), Open::Both) | (Some(Peer::Agent(_)), Open::Agents) => {
            Ok(Grounds::Protocol)
        }
        (Some(Peer::Client(name)), Open::Viewers | Open::Operators) => {
            policy.map_or(Ok(Grounds::NoPolicy), |policy| by_grants(policy, name, &asked))
        }
        (None, _) => Err(asked.denied("the caller has shown no certificate", "use a certificate of the cluster")),
        (Some(_), open) => {
            Err(asked.denied(format!("this is for {}", whom(open)), "use a certificate of that kind of peer"))
        }
    }
}

fn whom(open: Open) -> &'static str {
    match open {
        Open::Both => "clients and agents",
        Open::Agents => "agents",
        Open::Viewers | Open::Operators => "clients",
    }
}

fn by_grants(policy: &Policy, client: &str, asked: &Asked<'_>) -> Result<Grounds, Denial> {
    let grants: Vec<_> = policy.grants_of(client).collect();
    let looks_only = asked.action.verb.open() == Open::Viewers;
    let allows = |grant: &&&Grant| looks_only || grant.role == Role::Admin || within_limits(grant, asked.action);
    match grants.iter().find(allows) {
        Some(grant) => Ok(Grounds::Grant { line: grant.line, role: grant.role }),
        None => Err(asked.missing(&grants)),
    }
}

fn within_limits(grant: &Grant, action: &Action<'_>) -> bool {
    grant.role == Role::Operator
        && grant.covers_workload(action.workload)
        && grant.covers_node(action.source)
        && grant.covers_node(action.target)
}

/// Who asks for what, for the words of a denial.
struct Asked<'a> {
    peer: Option<&'a Peer>,
    action: &'a Action<'a>,
}

impl Asked<'_> {
    fn denied(&self, why: impl Into<String>, remedy: impl Into<String>) -> Denial {
        let who = self.peer.map_or("somebody".to_owned(), ToString::to_string);
        Denial { what: format!("{who} may not {}", self.action), why: why.into(), remedy: remedy.into() }
    }

    /// Names the rule that is missing: the first that keeps all of the client's grants from allowing it.
    fn missing(&self, grants: &[&Grant]) -> Denial {
        const ASK: &str = "ask whoever keeps the coordinator's access policy";
        if grants.is_empty() {
            let needed = if self.action.verb.changes_something() { Role::Operator } else { Role::Viewer };
            let remedy = format!("{ASK} for a grant of the role {}", needed.as_str());
            return self.denied("no grant of the access policy names this client", remedy);
        }
        let operator: Vec<_> = grants.iter().filter(|grant| grant.role == Role::Operator).collect();
        if operator.is_empty() {
            let remedy = format!("{ASK} for a grant of the role operator");
            return self.denied("this client's only role is viewer, which looks and changes nothing", remedy);
        }
        let lines = operator.iter().map(|grant| grant.line.to_string()).collect::<Vec<_>>().join(", ");
        let action = self.action;
        let of_workload: Vec<_> = operator.iter().filter(|grant| grant.covers_workload(action.workload)).collect();
        let beyond = if of_workload.is_empty() {
            "this workload"
        } else if !of_workload.iter().any(|grant| grant.covers_node(action.source)) {
            "the node that it leaves"
        } else if !of_workload.iter().any(|grant| grant.covers_node(action.target)) {
            "the node that it goes to"
        } else {
            "both of these nodes in one grant"
        };
        let why = format!("none of this client's operator grants (access policy, line {lines}) covers {beyond}");
        self.denied(why, format!("{ASK} to widen one"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::access::Verb;

    const POLICY: &str = r#"
[[grants]]
clients = ["root"]
role = "admin"

[[grants]]
clients = ["*"]
role = "viewer"

[[grants]]
clients = ["shop", "shop-*"]
role = "operator"
workloads = ["shop-*"]

[[grants]]
clients = ["shop"]
role = "operator"
workloads = ["redis"]
nodes = ["a", "b"]

[[grants]]
clients = ["east"]
role = "operator"
nodes = ["east-*"]
"#;

    fn policy() -> Policy {
        Policy::parse(POLICY).unwrap()
    }

    fn client(name: &str) -> Peer {
        Peer::client(name).unwrap()
    }

    fn moving<'a>(workload: &'a str, source: &'a str, target: &'a str) -> Action<'a> {
        Action { source: Some(source), ..Action::migrate(workload, target) }
    }

    #[test]
    fn roles_and_limits_decide() {
        let policy = policy();
        let may = |name: &str, action| decide(Some(&policy), Some(&client(name)), &action).is_ok();
        assert!(may("root", moving("anything", "x", "y")) && may("anybody", Action::new(Verb::ListNodes)));
        assert!(!may("anybody", Action::migrate("shop-1", "a")));
        assert!(may("shop-eu", moving("shop-1", "x", "y")) && !may("shop-eu", moving("redis", "a", "b")));
        assert!(may("shop", moving("redis", "a", "b")) && may("shop", Action::migrate("redis", "")));
        assert!(!may("shop", moving("redis", "a", "c")) && !may("shop", moving("redis", "c", "b")));
        assert!(
            !may("shop", Action::migrate("redis", "c")),
            "a target that is named counts before the source is known"
        );
        assert!(may("east", moving("w", "east-1", "east-2")) && !may("east", moving("w", "east-1", "west-1")));
        let cancel = |source| Action { verb: Verb::CancelMigration, ..moving("redis", source, "b") };
        assert!(may("shop", cancel("a")) && !may("shop", cancel("c")) && !may("anybody", cancel("a")));
    }

    #[test]
    fn who_is_in_no_grant_may_say_hello_and_nothing_else() {
        let policy = Policy::parse("[[grants]]\nclients = [\"root\"]\nrole = \"admin\"\n").unwrap();
        for verb in Verb::ALL {
            let allowed = decide(Some(&policy), Some(&client("eve")), &Action::new(verb)).is_ok();
            assert_eq!(allowed, verb == Verb::Hello, "{verb:?}");
        }
    }

    #[test]
    fn without_a_policy_clients_may_do_everything_of_clients() {
        for verb in Verb::ALL {
            let allowed = |peer: Option<&Peer>| decide(None, peer, &Action::new(verb)).is_ok();
            assert_eq!(allowed(Some(&client("ada"))), verb != Verb::GetDecision, "{verb:?}");
            let agent = Peer::Agent("a".parse().unwrap());
            assert_eq!(allowed(Some(&agent)), matches!(verb, Verb::Hello | Verb::GetDecision), "{verb:?}");
            assert!(!allowed(Some(&Peer::Coordinator)) && !allowed(None), "{verb:?}");
        }
    }

    #[test]
    fn a_denial_says_who_what_which_rule_and_what_to_do() {
        let policy = policy();
        let strict = Policy::parse("[[grants]]\nclients = [\"root\"]\nrole = \"admin\"\n").unwrap();
        let agent = Peer::Agent("a".parse().unwrap());
        let asked = [
            (&strict, Some(client("eve")), Action::new(Verb::ListNodes)),
            (&strict, Some(client("eve")), Action::migrate("shop", "")),
            (&policy, Some(client("eve")), Action::on_migration(Verb::CancelMigration, "0123")),
            (&policy, Some(client("shop")), moving("other", "a", "b")),
            (&policy, Some(client("shop")), moving("redis", "c", "b")),
            (&policy, Some(client("shop")), moving("redis", "a", "c")),
            (&policy, Some(client("shop-eu")), Action::migrate("a\u{1b}\"b", "")),
            (&policy, Some(agent), Action::migrate("redis", "c")),
            (&policy, Some(client("root")), Action::new(Verb::GetDecision)),
            (&policy, None, Action::new(Verb::Hello)),
        ];
        let said = asked.map(|(policy, peer, action)| {
            Failure::from(decide(Some(policy), peer.as_ref(), &action).unwrap_err()).to_string()
        });
        insta::assert_snapshot!(said.join("\n"), @r#"
        client eve may not list nodes: no grant of the access policy names this client; what to do: ask whoever keeps the coordinator's access policy for a grant of the role viewer
        client eve may not migrate workload "shop": no grant of the access policy names this client; what to do: ask whoever keeps the coordinator's access policy for a grant of the role operator
        client eve may not cancel a migration (0123): this client's only role is viewer, which looks and changes nothing; what to do: ask whoever keeps the coordinator's access policy for a grant of the role operator
        client shop may not migrate workload "other" from node "a" to node "b": none of this client's operator grants (access policy, line 12, 17) covers this workload; what to do: ask whoever keeps the coordinator's access policy to widen one
        client shop may not migrate workload "redis" from node "c" to node "b": none of this client's operator grants (access policy, line 12, 17) covers the node that it leaves; what to do: ask whoever keeps the coordinator's access policy to widen one
        client shop may not migrate workload "redis" from node "a" to node "c": none of this client's operator grants (access policy, line 12, 17) covers the node that it goes to; what to do: ask whoever keeps the coordinator's access policy to widen one
        client shop-eu may not migrate workload "a\u{1b}\"b": none of this client's operator grants (access policy, line 12) covers this workload; what to do: ask whoever keeps the coordinator's access policy to widen one
        agent a may not migrate workload "redis" to node "c": this is for clients; what to do: use a certificate of that kind of peer
        client root may not ask for a decision: this is for agents; what to do: use a certificate of that kind of peer
        somebody may not say hello: the caller has shown no certificate; what to do: use a certificate of the cluster
        "#);
    }

    fn label() -> impl Strategy<Value = String> {
        "[ab]{1,2}"
    }

    fn grant() -> impl Strategy<Value = String> {
        let patterns = || prop::collection::vec("[ab*]{1,2}", 1..3).prop_map(|all| format!("{all:?}"));
        let role = prop_oneof![Just("viewer"), Just("operator"), Just("admin")];
        (patterns(), role, patterns(), prop::option::of(patterns())).prop_map(|(clients, role, workloads, nodes)| {
            let limits = match (role, nodes) {
                ("operator", Some(nodes)) => format!("workloads = {workloads}\nnodes = {nodes}\n"),
                ("operator", None) => format!("workloads = {workloads}\n"),
                _ => String::new(),
            };
            format!("[[grants]]\nclients = {clients}\nrole = \"{role}\"\n{limits}")
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

        #[test]
        fn rules_that_must_always_hold(
            grants in prop::collection::vec(grant(), 1..5), more in grant(), name in label(), workload in label(), source in label(),
            target in label(), verb in prop::sample::select(Verb::ALL.as_slice()), known in 0_u8..8,
        ) {
            let policy = Policy::parse(&grants.concat()).unwrap();
            let wider = Policy::parse(&format!("{}{more}", grants.concat())).unwrap();
            let peer = client(&name);
            let whole = Action {
                workload: Some(&workload), source: Some(&source), target: Some(&target), ..Action::new(verb)
            };
            let allowed = |policy: &Policy, action: &Action<'_>| decide(Some(policy), Some(&peer), action).is_ok();
            let part = Action {
                workload: whole.workload.filter(|_| known & 1 > 0),
                source: whole.source.filter(|_| known & 2 > 0),
                target: whole.target.filter(|_| known & 4 > 0),
                ..whole
            };
            // Who may do it when all is known was not turned away before.
            prop_assert!(!allowed(&policy, &whole) || allowed(&policy, &part));
            // A further grant takes nothing away.
            prop_assert!(!allowed(&policy, &whole) || allowed(&wider, &whole));
            // No policy grants what the protocol does not.
            prop_assert!(decide(None, Some(&peer), &whole).is_ok() || !allowed(&policy, &whole));
            // Who may change something may look.
            let changes = [Verb::Migrate, Verb::CancelMigration].iter().any(|&verb| allowed(&policy, &Action { verb, ..whole }));
            prop_assert!(!changes || allowed(&policy, &Action::new(Verb::ListNodes)));
            // What allows a change is a grant that says so.
            if let (Ok(Grounds::Grant { role, .. }), true) = (decide(Some(&policy), Some(&peer), &whole), verb.changes_something()) {
                prop_assert!(role != Role::Viewer);
            }
        }
    }
}
