//! Who calls, and whether what they ask for is open to them: the same for every front.

use podferry_common::identity::Peer;
use podferry_common::tls::PeerInfo;
use podferry_common::{Failure, FailureCode};

/// Whom a call is open to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Open {
    Clients,
    Agents,
    Both,
}

/// The caller that the connection's certificate names, if this call is open to them.
pub(super) fn authorise(caller: Option<&PeerInfo>, open: Open) -> Result<Peer, Failure> {
    let denied = |message: String| Failure::new(FailureCode::PermissionDenied, message);
    let Some(PeerInfo { peer, .. }) = caller else {
        return Err(denied("the caller has shown no certificate".to_owned()));
    };
    let allowed = match peer {
        Peer::Client(_) => open != Open::Agents,
        Peer::Agent(_) => open != Open::Clients,
        Peer::Coordinator => false,
    };
    if allowed {
        return Ok(peer.clone());
    }
    let who = match open {
        Open::Clients => "clients",
        Open::Agents => "agents",
        Open::Both => "clients and agents",
    };
    Err(denied(format!("{peer} may not make this call: it is for {who}")))
}
