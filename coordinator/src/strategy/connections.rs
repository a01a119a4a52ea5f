//! What becomes of a workload's connections.

use podferry_common::{Failure, FailureCode};
use podferry_proto::v1::{self, NetworkKind};
use serde::{Deserialize, Serialize};

use super::{Asked, Strategy};

/// The longest that connections may live on through a relay, in seconds: a week.
const LONGEST_DEADLINE_S: u32 = 7 * 24 * 3600;

/// What is wished for them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fate {
    /// They live on where they can.
    #[default]
    Auto,
    /// The workload moves only if they live on.
    Keep,
    /// They are closed.
    Close,
}

impl From<v1::Connections> for Fate {
    fn from(wire: v1::Connections) -> Self {
        match wire {
            v1::Connections::Unspecified => Self::Auto,
            v1::Connections::Keep => Self::Keep,
            v1::Connections::Close => Self::Close,
        }
    }
}

impl From<Fate> for v1::Connections {
    fn from(fate: Fate) -> Self {
        match fate {
            Fate::Auto => Self::Unspecified,
            Fate::Keep => Self::Keep,
            Fate::Close => Self::Close,
        }
    }
}

/// What was asked for them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Connections {
    /// What becomes of them.
    pub fate: Fate,
    /// Seconds that those to a pod's old address live on; 0 for as long as its nodes are set to.
    pub deadline_s: u32,
}

impl Connections {
    /// What a request says of them, if that makes sense.
    ///
    /// # Errors
    /// When the strategy does not do it, or the deadline is none.
    pub fn of(request: &v1::MigrateRequest) -> Result<Self, Failure> {
        let refused = |message: String, remedy: &str| {
            Err(Failure::new(FailureCode::InvalidArgument, message).in_phase("preflight").remedy(remedy))
        };
        let fate = Fate::from(request.connections());
        let asked = Asked::of(request.strategy)?;
        let anew = matches!(asked, Asked::This(strategy) if strategy.starts_anew());
        if fate == Fate::Keep && anew {
            let message = format!("the strategy {} closes connections: the workload starts anew", asked.at_least());
            return refused(message, "use live, or do not ask that connections are kept");
        }
        if fate == Fate::Keep && request.allow_restart {
            let message = "a restart closes the connections that are to be kept".to_owned();
            return refused(message, "do not allow a restart, or do not ask that connections are kept");
        }
        let deadline_s = request.connections_deadline_s;
        if deadline_s > 0 && (fate == Fate::Close || anew) {
            let message = format!("connections that are closed do not live on for {deadline_s} s");
            return refused(message, "give no deadline for them, or let them live on");
        }
        if deadline_s > LONGEST_DEADLINE_S {
            let message = format!("connections do not live on for {deadline_s} s: {LONGEST_DEADLINE_S} s at most");
            return refused(message, "give a shorter deadline for them, or none");
        }
        Ok(Self { fate, deadline_s })
    }

    /// Whether they move along with the address that they are to, and those who have them.
    pub fn move_along(self, strategy: Strategy, facts: &v1::PreflightSourceResponse) -> bool {
        self.fate != Fate::Close && facts.network() == NetworkKind::Path && !strategy.starts_anew()
    }

    /// What a relay is asked to carry.
    pub fn relayed(self, strategy: Strategy, facts: &v1::PreflightSourceResponse) -> Option<v1::Relayed> {
        if self.fate == Fate::Close || strategy.starts_anew() {
            return None;
        }
        let relayed = facts.relayed.clone()?;
        Some(v1::Relayed { lifetime_s: self.deadline_s, ..relayed })
    }

    /// Why the workload does not move, where its connections are to be kept and cannot be.
    pub fn obstacle(self, strategy: Strategy, facts: &v1::PreflightSourceResponse) -> Option<String> {
        let lives_on = self.move_along(strategy, facts) || self.relayed(strategy, facts).is_some();
        if self.fate != Fate::Keep || lives_on {
            return None;
        }
        let count = facts.tcp_connections;
        let why = why_closed(facts);
        Some(format!("its connections are to be kept, and cannot be ({count} are established): {why}"))
    }
}

/// Why connections are closed that would live on.
pub fn why_closed(facts: &v1::PreflightSourceResponse) -> &'static str {
    match facts.network() {
        NetworkKind::Pod => "the pod gets another address, and its node has nothing that carries them there",
        _ => "the container's address cannot move along, because its network namespace is not one given by path",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(strategy: v1::Strategy, connections: v1::Connections) -> v1::MigrateRequest {
        v1::MigrateRequest {
            strategy: strategy.into(),
            connections: connections.into(),
            ..v1::MigrateRequest::default()
        }
    }

    fn facts(network: NetworkKind, relayed: bool) -> v1::PreflightSourceResponse {
        let addresses = vec!["10.1.2.3".to_owned()];
        v1::PreflightSourceResponse {
            network: network.into(),
            tcp_connections: 3,
            relayed: relayed.then_some(v1::Relayed { addresses, mtu: 1500, lifetime_s: 0 }),
            ..v1::PreflightSourceResponse::default()
        }
    }

    #[test]
    fn wishes_that_make_no_sense_are_refused() {
        use v1::{Connections as Wire, Strategy as Way};
        let restart = v1::MigrateRequest { allow_restart: true, ..request(Way::Auto, Wire::Keep) };
        let closed = v1::MigrateRequest { connections_deadline_s: 60, ..request(Way::Live, Wire::Close) };
        let long = v1::MigrateRequest { connections_deadline_s: 604_801, ..request(Way::Live, Wire::Keep) };
        let refused = [request(Way::Cold, Wire::Keep), restart, closed, long];
        let said = refused.map(|request| Connections::of(&request).unwrap_err().to_string());
        insta::assert_snapshot!(said.join("\n"), @r#"
        the strategy cold closes connections: the workload starts anew (in preflight); what to do: use live, or do not ask that connections are kept
        a restart closes the connections that are to be kept (in preflight); what to do: do not allow a restart, or do not ask that connections are kept
        connections that are closed do not live on for 60 s (in preflight); what to do: give no deadline for them, or let them live on
        connections do not live on for 604801 s: 604800 s at most (in preflight); what to do: give a shorter deadline for them, or none
        "#);
        let week = v1::MigrateRequest { connections_deadline_s: 604_800, ..request(Way::Auto, Wire::Keep) };
        assert_eq!(Connections::of(&week), Ok(Connections { fate: Fate::Keep, deadline_s: 604_800 }));
        assert_eq!(Connections::of(&request(Way::Cold, Wire::Close)).map(|said| said.fate), Ok(Fate::Close));
        assert_eq!(Connections::of(&v1::MigrateRequest::default()), Ok(Connections::default()));
    }

    #[test]
    fn what_is_to_be_kept_and_cannot_be_is_an_obstacle_and_what_is_to_be_closed_is_carried_by_nobody() {
        let of = |fate| Connections { fate, deadline_s: 0 };
        let (path, pod, bare) =
            (facts(NetworkKind::Path, false), facts(NetworkKind::Pod, true), facts(NetworkKind::Pod, false));
        for facts in [&path, &pod, &bare] {
            assert_eq!(of(Fate::Auto).obstacle(Strategy::Live, facts), None);
            let close = of(Fate::Close);
            assert!(!close.move_along(Strategy::Live, facts) && close.relayed(Strategy::Live, facts).is_none());
        }
        let keep = Connections { fate: Fate::Keep, deadline_s: 90 };
        assert!(keep.move_along(Strategy::Live, &path) && keep.obstacle(Strategy::Live, &path).is_none());
        assert_eq!(keep.relayed(Strategy::Warm, &pod).map(|relayed| relayed.lifetime_s), Some(90));
        assert_eq!(keep.obstacle(Strategy::Warm, &pod), None);
        insta::assert_snapshot!(keep.obstacle(Strategy::Live, &bare).unwrap(), @"its connections are to be kept, and cannot be (3 are established): the pod gets another address, and its node has nothing that carries them there");
        assert!(keep.obstacle(Strategy::Cold, &pod).is_some(), "auto cannot choose it then");
    }
}
